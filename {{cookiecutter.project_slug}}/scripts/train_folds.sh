#!/usr/bin/env bash
# Every fold of an experiment, one per visible GPU at a time, or one after the other:
#   scripts/train_folds.sh exp001 [key=value …] [--seed S] [--as NAME]
# CUDA_VISIBLE_DEVICES=0,2 takes these two. Run it again after a crash: finished folds are not trained twice.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run() { echo "+ $*"; "$@"; }
[ $# -ge 1 ] || { echo "which experiment? scripts/train_folds.sh exp001" >&2; exit 2; }

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  list=$CUDA_VISIBLE_DEVICES
else
  list=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd, -) || list=""
fi
IFS=, read -ra gpus <<< "$list"

if [ "${#gpus[@]}" -gt 1 ]; then
  folds=$(python -c "from comp import folds, samples; print(folds.load(samples.load()).count)")
  set -m # a process group for each GPU; without it Ctrl+C would not reach what runs in the background
  workers=()
  stop() { for worker in "${workers[@]}"; do kill "-$1" -- "-$worker" 2> /dev/null || true; done; wait; exit "$2"; }
  trap 'stop INT 130' INT
  trap 'stop TERM 143' TERM
  trap 'stop USR1 138' USR1
  for slot in "${!gpus[@]}"; do
    (
      trap 'exit 130' INT TERM USR1 # after the fold under way, which writes its checkpoint first
      export CUDA_VISIBLE_DEVICES="${gpus[slot]}"
      for ((fold = slot; fold < folds; fold += ${#gpus[@]})); do
        echo "+ CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES comp train $* --fold $fold"
        comp train "$@" --fold "$fold"
      done
    ) &
    workers+=($!)
  done
  failed=0
  for worker in "${workers[@]}"; do wait "$worker" || failed=$?; done
  [ "$failed" = 0 ] || { echo "a fold failed; the same command goes on where it stopped" >&2; exit "$failed"; }
fi
echo "+ comp train $*" # with every fold there already, it only joins them into one score
exec comp train "$@"   # in the place of this shell, so that a scheduler's signal reaches it
