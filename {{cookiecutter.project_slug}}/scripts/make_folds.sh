#!/usr/bin/env bash
# From data/raw to folds that may be trained on:    scripts/make_folds.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run() { echo "+ $*"; "$@"; }

run comp prepare
run comp check
run comp folds
