#!/usr/bin/env bash
# Diffusion-DPO: align SD1.5 with human preferences. SDXL is told from its folder.
#
#   needs     one GPU of 40 GB or more (24.5 GiB predicted), models/stable-diffusion-v1-5 (bash scripts/download.sh stable-diffusion-v1-5); pairs come from the Hub, 7,000 in 0.9 GB,
#             or from datas/open-image-preferences (bash scripts/download.sh open-image-preferences), unless --dataset_name names others
#   80 GB     faster: --train_batch_size 16 --gradient_accumulation_steps 8, the same pairs a step
#   24 GB     add --optimizer adamw8bit --gradient_checkpointing, or --use_lora
#   override  any argument:  bash scripts/train_dpo_sd_v1_5.sh --dataset_name datas/mine --chosen_column good --rejected_column bad
#   paper     Pick-a-Pic, 322 GB (bash scripts/download.sh pickapic; the original is gone from the Hub, this is a copy), 2048 pairs a step:
#             --dataset_name datas/pickapic --gradient_accumulation_steps 512 --max_train_steps 2000 --learning_rate 2e-5
#             --beta_dpo 5000
#   try it    TINY=1 bash scripts/train_dpo_sd_v1_5.sh      the same thing on the shipped tiny model, on a CPU
#             expect prompts wholly right: 39 -> 50 %; 135 s on two cores (the tour's evaluation in README.md, with --seed 0; at full size nothing has been measured)
#   plan it   bash scripts/train_dpo_sd_v1_5.sh --dry_run      it counts the pairs, so a data set of the Hub is downloaded for it
set -euo pipefail
source "$(dirname "$0")/launch.sh"

pairs=data-is-better-together/open-image-preferences-v1-binarized
if [ -d datas/open-image-preferences ]; then pairs=datas/open-image-preferences; fi

if [ "${TINY:-}" = 1 ]; then
  # A picture's latents are 256 numbers here, 16,384 at 512 px: beta is small in proportion (docs/dpo.md, "Which beta?").
  processes=$(tiny_processes)
  NUM_PROCESSES=$processes launch train_dpo_sd15.py \
    --pretrained_model_name_or_path models/tiny-sd15 --dataset_name datas/pairs --resolution 64 --no_hflip --mixed_precision no \
    --beta_dpo 500 --use_lora --rank 16 --learning_rate 3e-4 --lr_scheduler constant_with_warmup --use_ema --ema_decay 0.97 \
    --train_batch_size $((32 / processes)) --dataloader_num_workers 0 --max_train_steps 300 --checkpointing_steps 150 --validation_steps 150 \
    --num_validation_images 2 --validation_inference_steps 20 --validation_guidance_scale 1 \
    --validation_prompt "a red star on a blue background" --validation_prompt "a green circle on a white background" \
    --output_dir outputs/tiny_dpo_sd15 -- "$@"
else
  launch train_dpo_sd15.py \
    --pretrained_model_name_or_path models/stable-diffusion-v1-5 --dataset_name "$pairs" \
    --chosen_column chosen --rejected_column rejected --caption_column prompt --resolution 512 --beta_dpo 2000 \
    --mixed_precision bf16 --learning_rate 5e-6 --lr_scheduler constant_with_warmup \
    --train_batch_size 4 --gradient_accumulation_steps 32 --max_train_steps 500 --checkpointing_steps 100 --checkpoints_total_limit 2 \
    --validation_steps 100 --validation_prompt "a photo of a cup of coffee on a wooden table" --output_dir outputs/dpo_sd15 -- "$@"
fi
