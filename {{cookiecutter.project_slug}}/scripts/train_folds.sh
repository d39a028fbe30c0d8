#!/usr/bin/env bash
# Trains all folds in parallel, one per GPU:    scripts/train_folds.sh exp001 [key=value …] [--seed S] [--as NAME]
# CUDA_VISIBLE_DEVICES=0,2 uses these two GPUs. Run it again after a crash: finished folds are not trained twice.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
[ $# -ge 1 ] || { echo "usage: scripts/train_folds.sh exp001 [key=value …]" >&2; exit 2; }

echo "+ comp train $* --on local"
exec comp train "$@" --on local   # replaces this shell, so that a scheduler's signal reaches comp
