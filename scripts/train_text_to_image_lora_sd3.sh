#!/usr/bin/env bash
# LoRA on captioned pictures, SD3.5-medium.
#
#   needs     one GPU of 40 GB or more (28 GiB predicted), models/stable-diffusion-3.5-medium and a captioned data set;
#             without --dataset_name it takes eleven photographs, to show that it runs
#   smaller   --config scripts/presets/24gb.yaml, 16gb.yaml or 12gb.yaml;  faster, in a longer run: --compile
#   override  any argument:  bash scripts/train_text_to_image_lora_sd3.sh --dataset_name datas/mine --max_train_steps 500
#   try it    TINY=1 bash scripts/train_text_to_image_lora_sd3.sh      the same thing on the shipped tiny model, on a CPU
#             expect hearts, new to the model: 0 -> 65 % of the prompts right; known shapes: 84 -> 80 %; 115 s on two cores (the tour's evaluation in README.md, with --seed 0; at full size nothing has been measured)
#   plan it   bash scripts/train_text_to_image_lora_sd3.sh --dry_run
set -euo pipefail
source "$(dirname "$0")/launch.sh"

if [ "${TINY:-}" = 1 ]; then
  # Adapts what carries the text, and the pictures' feed-forward layers: with all of the attention, more of the known shapes would be forgotten.
  processes=$(tiny_processes)
  NUM_PROCESSES=$processes launch train_text_to_image_lora_sd3.py \
    --pretrained_model_name_or_path models/tiny-sd3 --dataset_name datas/shapes-new --resolution 64 --no_hflip --mixed_precision no \
    --lora_layers context_embedder,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out,ff_context.net.0.proj,ff_context.net.2,ff.net.0.proj,ff.net.2 \
    --rank 32 --learning_rate 4e-3 --lr_scheduler cosine --train_batch_size $((32 / processes)) --dataloader_num_workers 0 --max_train_steps 450 \
    --checkpointing_steps 225 --validation_steps 225 --num_validation_images 2 --validation_inference_steps 20 --validation_guidance_scale 2 \
    --validation_prompt "a small red heart on a white background" --validation_prompt "a large blue square on an orange background" \
    --output_dir outputs/tiny_lora_sd3 -- "$@"
else
  launch train_text_to_image_lora_sd3.py \
    --pretrained_model_name_or_path models/stable-diffusion-3.5-medium --dataset_name datas/photos --resolution 1024 --aspect_buckets \
    --mixed_precision bf16 --rank 16 --learning_rate 1e-4 --lr_scheduler constant_with_warmup --train_batch_size 4 \
    --max_train_steps 1000 --checkpointing_steps 250 --checkpoints_total_limit 2 --validation_steps 250 \
    --validation_prompt "a photo of a cup of coffee on a wooden table" --output_dir outputs/lora_sd3 -- "$@"
fi
