#!/usr/bin/env bash
# Run a rae-scale command on several processes with torchrun.
#
#   launchers/torchrun.sh train configs/run/pretrain-2.4b.yaml
#
# PROCESSES    processes on this machine (default: its GPUs, or 1 without any)
# NNODES       number of machines (default 1). With more, start this script on each of them with the same
#              MASTER_ADDR and MASTER_PORT, and with its own NODE_RANK from 0.
#
# NNODES x PROCESSES must be the product of the `parallel` sizes in the config.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/common.sh

gpus=$(count_gpus)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
nodes=${NNODES:-1}
set_threads "$processes"
if ((nodes > 1)); then
  : "${MASTER_ADDR:?set MASTER_ADDR to the address of the machine with NODE_RANK=0}"
  : "${NODE_RANK:?set NODE_RANK to the number of this machine, from 0}"
  where=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
  where=(--master-addr 127.0.0.1 --master-port "${MASTER_PORT:-$(free_port)}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" "${where[@]}" -m rae_scale "$@"
