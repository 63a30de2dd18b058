#!/usr/bin/env bash
# The demo with every part trained from nothing: tokenizer, encoder, decoder, then LLM and DiT. It continues where an
# interrupted run of it stopped: finished steps are kept, and training resumes from its newest checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/common.sh
# The models are so small that a second thread costs more than it brings, much more on a machine that is busy.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

DEMO=runs/demo-from-scratch
PICTURES=$DEMO/grid.png
started=$SECONDS

rae() { run "$PYTHON" -m rae_scale "$@"; }

# once PATH COMMAND...: run the command unless an earlier run has already made PATH, which appears only when complete.
once() {
  local made=$1
  shift
  if [[ -e $made ]]; then
    printf '\n%s is there already\n' "$made"
  else
    "$@"
  fi
}

once "$DEMO/shards/index.json" rae data shapes --out "$DEMO/tars" --count 80000 --seed 1
once "$DEMO/shards/index.json" rae data build "$DEMO"/tars/*.tar --out "$DEMO/shards"
once "$DEMO/tokenizer" rae data tokenizer "$DEMO/shards" --out "$DEMO/tokenizer" --prompt-template "Generate {caption}"
once "$DEMO/shards-finetune/index.json" rae data shapes --out "$DEMO/tars-finetune" --count 80000 --seed 2 \
  --task-weight colors=3 --task-weight color_attr=4 --task-weight two_object=1.5 --task-weight single_object=0.5
once "$DEMO/shards-finetune/index.json" rae data build "$DEMO"/tars-finetune/*.tar --out "$DEMO/shards-finetune"

run env PROCESSES=1 launchers/torchrun.sh train configs/run/demo-encoder.yaml
once "$DEMO/weights/encoder" rae checkpoint export "$DEMO/encoder" --out "$DEMO/weights/encoder"
run env PROCESSES=2 launchers/deepspeed.sh train configs/run/demo-decoder.yaml
once "$DEMO/weights/decoder" rae checkpoint export "$DEMO/decoder" --out "$DEMO/weights/decoder"
run env PROCESSES=2 launchers/deepspeed.sh train configs/run/demo-pretrain.yaml
run env PROCESSES=2 launchers/deepspeed.sh train configs/run/demo-finetune.yaml

rae sample "$DEMO/finetune" --prompts-file configs/demo-prompts.txt --num-per-prompt 4 --out "$PICTURES"
SCORE=$DEMO/shapes-score-$(date +%Y%m%d-%H%M%S)
rae eval shapes "$DEMO/finetune" --prompts-per-task 40 --samples-per-prompt 1 --out "$SCORE"

cat <<END

Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s.
  pictures        $PWD/$PICTURES
  score           the table above: floor is chance, ceiling a perfect model; in $SCORE/report.txt
  training curves $PYTHON -m tensorboard.main --logdir $DEMO
END
