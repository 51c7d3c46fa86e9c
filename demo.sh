#!/usr/bin/env bash
# Generate pictures; every argument of demo.py may follow. Runs on a CPU with models/tiny-sd3, on any GPU with 10 GB with --cpu_offload.
#   bash demo.sh                                                   # the shipped tiny model
#   bash demo.sh --prompt "a heart" --lora_weights_path outputs/quickstart --compare
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv}
if [ -x "$VENV/bin/python" ]; then export PATH="$(cd "$VENV" && pwd)/bin:$PATH"; fi
exec python demo.py "$@"
