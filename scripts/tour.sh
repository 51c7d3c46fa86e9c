#!/usr/bin/env bash
# All seven trainers on the tiny world, one after another: their tiny recipes, held-out prompts before and after, one table, one picture.
# Needs what quickstart.sh needs; about 25 minutes on two cores, no GPU, no download. Stopped at any moment, the same command goes on from there.
#
#   bash scripts/tour.sh              all seven: outputs/tour/table.md, outputs/tour/tour.png
#   bash scripts/tour.sh lora dpo     these two; the others are dreambooth, full, ddpo, grpo, refl
#   bash scripts/tour.sh --quick      a few steps each, to see that everything runs here; the figures mean nothing
set -euo pipefail
source "$(dirname "$0")/env.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m src.tiny.tour "$@"
