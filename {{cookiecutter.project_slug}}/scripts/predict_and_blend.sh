#!/usr/bin/env bash
# Merges the folds of some runs and blends what configs/ensembles/NAME.yaml lists:
#   scripts/predict_and_blend.sh blend001 exp001 exp002
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run() { echo "+ $*"; "$@"; }
[ $# -ge 2 ] || { echo "which blend, of which runs? scripts/predict_and_blend.sh blend001 exp001 exp002" >&2; exit 2; }

blend=$1
shift
for experiment in "$@"; do run comp predict "$experiment"; done
run comp ensemble "$blend"
run comp runs
