#!/usr/bin/env bash
# All weights of SD1.5's UNet against a reward, by the reward's own gradient: ReFL.
#
#   needs     one GPU of 40 GB or more (21 GiB predicted, and the scorers), models/stable-diffusion-v1-5 and its scorers' weights:
#             bash scripts/download.sh stable-diffusion-v1-5 image-reward clip-vit-large-patch14
#   24 GB     add --optimizer adamw8bit, or --use_lora
#   override  any argument:  bash scripts/train_refl_v1_5.sh --scorer pickscore --prompts datas/my-prompts.txt --use_lora
#   prompts   ImageReward's list works as it is: --prompts refl_data.json
#   hold back --pretrain_dataset_name datas/photos adds the denoising loss of captioned pictures
#   relatives --method draft --draft_k 1, --method draft_lv
#   try it    TINY=1 bash scripts/train_refl_v1_5.sh      the tiny model against a tiny CLIP, on a CPU
#             expect the reward, tiny_clip: 0.655 -> 0.716; prompts wholly right: 39 -> 51 %; 142 s on two cores (the tour's evaluation in README.md, with --seed 0; at full size nothing has been measured)
#   plan it   bash scripts/train_refl_v1_5.sh --dry_run
set -euo pipefail
source "$(dirname "$0")/launch.sh"

if [ "${TINY:-}" = 1 ]; then
  processes=$(tiny_processes)
  NUM_PROCESSES=$processes launch train_refl_sd15.py \
    --pretrained_model_name_or_path models/tiny-sd15 --resolution 64 --mixed_precision no --prompts shapes --scorer tiny_clip \
    --num_inference_steps 20 --guidance_scale 1 --train_batch_size $((16 / processes)) --decode_batch_size 16 --grad_scale 1 --use_lora --rank 16 \
    --learning_rate 5e-4 --max_train_steps 100 --checkpointing_steps 50 --cache_batch_size 64 --eval_prompts shapes_held_out --num_eval_prompts 64 \
    --eval_num_inference_steps 20 --eval_guidance_scale 1 --eval_steps 50 --eval_scorers shapes_strict \
    --output_dir outputs/tiny_refl_sd15 -- "$@"
else
  launch train_refl_sd15.py \
    --pretrained_model_name_or_path models/stable-diffusion-v1-5 --prompts activities --scorer image_reward --gradient_checkpointing \
    --train_batch_size 4 --gradient_accumulation_steps 16 --max_train_steps 100 --use_ema --checkpointing_steps 25 \
    --eval_steps 25 --eval_scorers clip --checkpoints_total_limit 2 --output_dir outputs/refl_sd15 -- "$@"
fi
