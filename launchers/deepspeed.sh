#!/usr/bin/env bash
# Run a rae-scale command on several processes with the DeepSpeed launcher, on one machine or on those of a hostfile.
#
#   launchers/deepspeed.sh train configs/run/pretrain-2.4b.yaml engine.name=zero
#
# PROCESSES    processes on this machine (default: its GPUs, or 1 without any)
# HOSTFILE     "host slots=8" lines: one process per slot on every host, started over ssh
# MASTER_PORT  (default: a free one; with a hostfile 29500)
# LOG_LEVEL    of the launcher itself (default error; info shows what it starts where)
#
# The number of processes must be the product of the `parallel` sizes in the config.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/common.sh

gpus=$(count_gpus)
if [[ -n "${HOSTFILE:-}" ]]; then
  where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
  set_threads "$((gpus > 0 ? gpus : 1))"
else
  # Not the default /job/hostfile: a run on one machine stays there.
  where=(--hostfile /dev/null --master_port "${MASTER_PORT:-$(free_port)}")
  if [[ -n "${PROCESSES:-}" || "$gpus" == 0 ]]; then
    where+=(--num_gpus "${PROCESSES:-1}")
  fi
  set_threads "${PROCESSES:-$((gpus > 0 ? gpus : 1))}"
fi
if [[ "$gpus" == 0 ]]; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --log_level "${LOG_LEVEL:-error}" --module rae_scale "$@"
