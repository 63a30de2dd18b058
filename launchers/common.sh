# Sourced by the launchers: which Python they run.
# shellcheck shell=bash

# RAE_PYTHON, or the checkout's environment, or what is on the PATH (a container).
if [[ -n "${RAE_PYTHON:-}" ]]; then
  PYTHON=$RAE_PYTHON
elif [[ -x .venv/bin/python ]]; then
  PYTHON=.venv/bin/python
else
  PYTHON=python3
fi
export PYTHON

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
