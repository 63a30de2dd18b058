#!/usr/bin/env bash
# Look at a small Scale-RAE at work, on two CPU cores and in minutes: draw captioned pictures, pack them into shards, train
# the shipped weights a little further on them under ZeRO-3 on two processes, then generate and score pictures.
# Every command is printed before it runs; the same ones, with other config names, are what a cluster runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/common.sh
# The models are so small that a second thread costs more than it brings, much more on a machine that is busy.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

DEMO=runs/demo
PICTURES=$DEMO/grid.png
started=$SECONDS

if [[ -d $DEMO ]]; then
  echo "Removing the previous demo in $DEMO"
  rm -r "$DEMO"
fi

rae() { run "$PYTHON" -m rae_scale "$@"; }

rae data shapes --out "$DEMO/tars" --count 20000 --seed 7
rae data build "$DEMO"/tars/*.tar --out "$DEMO/shards"
run env PROCESSES=2 launchers/deepspeed.sh train configs/run/demo.yaml
rae sample "$DEMO/train" --prompts-file configs/demo-prompts.txt --num-per-prompt 4 --out "$PICTURES"
rae eval shapes "$DEMO/train" --prompts-per-task 40 --samples-per-prompt 1 --out "$DEMO/shapes-score"

cat <<END

Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s.
  pictures        $PWD/$PICTURES
  score           the table above: floor is chance, ceiling a perfect model; in $DEMO/shapes-score/report.txt
  training curves $PYTHON -m tensorboard.main --logdir $DEMO/train/tensorboard
  more pictures   $PYTHON -m rae_scale sample $DEMO/train --prompt "a photo of a blue ring" --out ring.png
END
