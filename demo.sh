#!/usr/bin/env bash
# Generate pictures; every argument of demo.py may follow. Runs on a CPU with models/tiny-sd3, on any GPU with 12 GB with --cpu_offload.
#   bash demo.sh                                                   # the shipped tiny model
#   bash demo.sh --prompt "a heart" --lora_weights_path outputs/quickstart --compare
set -euo pipefail
source "$(dirname "$0")/scripts/launch.sh"
require_torch
exec python demo.py "$@"
