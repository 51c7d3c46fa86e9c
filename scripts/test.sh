#!/usr/bin/env bash
# Lint, the fast tier of tests (<= 60 s), then the slow tier. Makes the environment first if it is missing.
#
#   bash scripts/test.sh              lint, fast, slow: what CI runs
#   bash scripts/test.sh fast         lint and the fast tier
#   bash scripts/test.sh -m long      the trainings of minutes; further arguments go to pytest
set -euo pipefail
source "$(dirname "$0")/env.sh"
# Two workers of one thread each: torch's threads fight over the cores as soon as there are more of them.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE  # what the fast tests have compiled serves the slow ones, and the next run
# Whole files, in the order of tests/conftest.py: their fixtures are expensive, and the longest files have to start first.
workers=(-n 2 --dist loadfile --no-loadscope-reorder)

if [ "$#" -gt 0 ] && [ "$1" != fast ]; then exec python -m pytest "$@"; fi

say "Lint"
ruff check .
ruff format --check .
say "Fast tests"
python -m pytest -q "${workers[@]}"
if [ "${1:-}" = fast ]; then exit 0; fi
say "Slow tests"
python -m pytest -q "${workers[@]}" -m "slow and not long"
