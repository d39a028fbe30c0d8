#!/usr/bin/env bash
# Reads data/raw, validates it and makes the folds:    scripts/make_folds.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run() { echo "+ $*"; "$@"; }

run comp prepare
run comp check
run comp folds
