#!/usr/bin/env bash
# Writes and validates submissions/NAME.csv, without sending it:    scripts/submit.sh blend001
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run() { echo "+ $*"; "$@"; }
[ $# -ge 1 ] || { echo "usage: scripts/submit.sh NAME, a run or an ensemble" >&2; exit 2; }

run comp submit "$1" --dry-run
