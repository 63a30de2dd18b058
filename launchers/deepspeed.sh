#!/usr/bin/env bash
# Run a rae-scale command on several processes with the DeepSpeed launcher, on one machine or on those of a hostfile:
# `rae-scale launch --with deepspeed`, whose options (--dry-run, --restarts, ...) may stand before the command.
#
#   launchers/deepspeed.sh train configs/run/pretrain-2.4b.yaml engine.name=zero
#
# PROCESSES    processes on this machine (default: its GPUs, or what the config asks for without any)
# HOSTFILE     "host slots=8" lines: one process per slot on every host, started over ssh
# MASTER_PORT  (default: a free one; with a hostfile 29500)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/common.sh

options=()
[[ -z "${PROCESSES:-}" ]] || options+=(--processes "$PROCESSES")
[[ -z "${HOSTFILE:-}" ]] || options+=(--hostfile "$HOSTFILE")
[[ -z "${MASTER_PORT:-}" ]] || options+=(--master-port "$MASTER_PORT")
exec "$PYTHON" -m rae_scale launch --with deepspeed "${options[@]}" "$@"
