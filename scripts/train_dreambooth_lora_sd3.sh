#!/usr/bin/env bash
# DreamBooth: one subject, from a handful of its pictures, as a LoRA of SD3.5-medium.
#
#   needs     one GPU of 40 GB or more (28 GiB predicted), models/stable-diffusion-3.5-medium, and a folder with three to twenty pictures of your subject:
#
#     bash scripts/train_dreambooth_lora_sd3.sh --instance_data_dir datas/mine --instance_prompt "a photo of sks dog" \
#       --class_prompt "a photo of a dog" --validation_prompt "sks dog on the beach"
#
#   smaller   --config scripts/presets/24gb.yaml, 16gb.yaml or 12gb.yaml;  faster, in a longer run: --compile
#   override  any argument: --no-with_prior_preservation does without class pictures, a --config with `no_hflip: false` mirrors at random,
#             --train_text_encoder --text_encoder_learning_rate 5e-6 adapts both CLIPs, too
#   try it    TINY=1 bash scripts/train_dreambooth_lora_sd3.sh      the same thing on the shipped tiny model, on a CPU
#             expect the subject: 0 -> 85 % of the pictures right; its class, other shapes: 84 -> 80 %; 161 s on two cores (the tour's evaluation in README.md, with --seed 0; at full size nothing has been measured)
#   plan it   bash scripts/train_dreambooth_lora_sd3.sh --dry_run with the arguments above
set -euo pipefail
source "$(dirname "$0")/launch.sh"

if [ "${TINY:-}" = 1 ]; then
  # The class of a drawn shape is all others: 96 prompts take turns. What carries the text is adapted, and the pictures' feed-forward layers.
  processes=$(tiny_processes)
  NUM_PROCESSES=$processes launch train_dreambooth_lora_sd3.py \
    --pretrained_model_name_or_path models/tiny-sd3 --instance_data_dir datas/subject --resolution 64 --no_hflip --mixed_precision no \
    --caption_dropout 0.1 --with_prior_preservation --class_prompts_file datas/subject/class_prompts.txt --num_class_images 288 \
    --sample_batch_size 32 --class_inference_steps 20 --class_guidance_scale 2 --rank 32 \
    --lora_layers context_embedder,attn.add_q_proj,attn.add_k_proj,attn.add_v_proj,attn.to_add_out,ff_context.net.0.proj,ff_context.net.2,ff.net.0.proj,ff.net.2 \
    --learning_rate 3e-3 --lr_scheduler cosine --train_batch_size $((8 / processes)) --dataloader_num_workers 0 --max_train_steps 700 \
    --checkpointing_steps 350 --validation_steps 350 --num_validation_images 2 --validation_inference_steps 20 --validation_guidance_scale 2 \
    --validation_prompt "a sks on a green background" --validation_prompt "a green circle on a white background" \
    --output_dir outputs/tiny_dreambooth_sd3 -- "$@"
else
  launch train_dreambooth_lora_sd3.py \
    --pretrained_model_name_or_path models/stable-diffusion-3.5-medium --resolution 1024 --mixed_precision bf16 --no_hflip \
    --with_prior_preservation --num_class_images 100 --rank 16 --learning_rate 1e-4 --lr_scheduler constant_with_warmup \
    --train_batch_size 4 --max_train_steps 500 --checkpointing_steps 250 --checkpoints_total_limit 2 \
    --validation_steps 100 --output_dir outputs/dreambooth_sd3 -- "$@"
fi
