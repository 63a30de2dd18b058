# Sourced by the launchers: which Python, how many processes, how many threads each, and a free port.
# shellcheck shell=bash

# RAE_PYTHON, or the checkout's environment, or what is on the PATH (a container).
if [[ -n "${RAE_PYTHON:-}" ]]; then
  PYTHON=$RAE_PYTHON
elif [[ -x .venv/bin/python ]]; then
  PYTHON=.venv/bin/python
else
  PYTHON=python3
fi

# GPUs that this shell may use.
count_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus | grep -c '^GPU' || true
  else
    echo 0
  fi
}

# Share the cores between the processes of this machine, unless the user has decided.
set_threads() {
  local processes=$1 cores
  cores=$(nproc)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
}

# Two runs on one machine must not meet on the default port.
free_port() {
  "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Print a command as it could be typed, then run it.
run() {
  local line
  line=$(printf '%q ' "$@")
  if [[ -t 1 ]]; then
    printf '\n\033[1m$ %s\033[0m\n' "${line% }"
  else
    printf '\n$ %s\n' "${line% }"
  fi
  "$@"
}
