#!/usr/bin/env bash
# From a fresh machine to a picture: makes the environment, teaches the shipped tiny SD3 a shape that it does not know, draws it.
# Needs Python 3.11 to 3.13 and 8 GB of disk; no GPU, no account, no model download. About two minutes after the install.
set -euo pipefail
source "$(dirname "$0")/env.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
output=outputs/quickstart
trap 'status=$?; [ $status -eq 0 ] || printf "error: quickstart stopped at step \"%s\" (message above). Cure: run it again; if it stops at the same place, run bash scripts/test.sh fast.\n" "$step" >&2' EXIT

step="1/3 train"
say "$step: a LoRA on datas/shapes-new (hearts), from models/tiny-sd3, which was never shown one"
rm -rf "$output"
TINY=1 bash scripts/train_text_to_image_lora_sd3.sh --output_dir "$output" --report_to none --seed 0

step="2/3 generate"
say "$step: the same seeds without and with the LoRA"
bash demo.sh --lora_weights_path "$output" --compare --num_images 2 --output_dir "$output/demo" \
  --prompt "a small red heart on a white background" --prompt "a small white heart at the right on a blue background" \
  --prompt "a large blue square on an orange background"

step="3/3 measure"
say "$step: pictures of held-out prompts, read back from their pixels"
python -m src.tiny.evaluate --lora_weights_path "$output" --output "$output/evaluation.json"

say "Done. Look at"
printf '   %-42s %s\n' "$output/demo/grid.png" "before and after, side by side" "$output/summary.png" "loss curves and samples by step" "$output/README.md" "what was trained, and how to load it"
