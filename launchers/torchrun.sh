#!/usr/bin/env bash
# Run a rae-scale command on several processes with torchrun: `rae-scale launch --with torchrun`, whose options (--dry-run,
# --restarts, ...) may stand before the command.
#
#   launchers/torchrun.sh train configs/run/pretrain-2.4b.yaml
#
# PROCESSES    processes on this machine (default: its GPUs, or what the config asks for without any)
# NNODES       number of machines (default 1). With more, start this script on each of them with the same
#              MASTER_ADDR and MASTER_PORT (default 29500), and with its own NODE_RANK from 0.
#
# NNODES x PROCESSES must be the product of the `parallel` sizes in the config; --fit makes it so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/common.sh

options=()
[[ -z "${PROCESSES:-}" ]] || options+=(--processes "$PROCESSES")
[[ -z "${NNODES:-}" ]] || options+=(--nodes "$NNODES")
[[ -z "${NODE_RANK:-}" ]] || options+=(--node-rank "$NODE_RANK")
[[ -z "${MASTER_ADDR:-}" ]] || options+=(--master-addr "$MASTER_ADDR")
[[ -z "${MASTER_PORT:-}" ]] || options+=(--master-port "$MASTER_PORT")
exec "$PYTHON" -m rae_scale launch --with torchrun "${options[@]}" "$@"
