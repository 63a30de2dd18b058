#!/usr/bin/env bash
# Entry point of the image: `docker run IMAGE train configs/run/demo.yaml` is `rae-scale train ...`; anything that is a
# program in the image (bash, launchers/torchrun.sh, python) runs as it is.
set -euo pipefail

# type -P: files only, since `eval` is a word of both the shell and rae-scale.
if (($# > 0)) && type -P -- "$1" >/dev/null; then
  exec "$@"
fi
exec rae-scale "$@"
