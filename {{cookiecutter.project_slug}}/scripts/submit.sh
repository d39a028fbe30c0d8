#!/usr/bin/env bash
# Writes and validates submissions/NAME.csv of a run or a blend:    scripts/submit.sh blend001
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run() { echo "+ $*"; "$@"; }
[ $# -ge 1 ] || { echo "submit what? scripts/submit.sh blend001" >&2; exit 2; }

run comp submit "$1" --dry-run
