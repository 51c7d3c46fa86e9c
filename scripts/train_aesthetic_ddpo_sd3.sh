#!/usr/bin/env bash
# A LoRA of SD3.5-medium against a reward, by DDPO.
#
#   needs     one GPU of 40 GB or more (19 GiB predicted, and the scorers), models/stable-diffusion-3.5-medium and its scorers' weights:
#             bash scripts/download.sh stable-diffusion-3.5-medium improved-aesthetic-predictor clip-vit-large-patch14 image-reward
#   smaller   --gradient_checkpointing: 7 GiB, a sixth more computing;  faster: --compile
#   override  any argument:  bash scripts/train_aesthetic_ddpo_sd3.sh --scorer jpeg_compressibility --prompts datas/my-prompts.txt
#   try it    TINY=1 bash scripts/train_aesthetic_ddpo_sd3.sh     the tiny model, pictures that JPEG compresses well, on a CPU;
#             --num_epochs 100 for more
#             expect the reward, jpeg_compressibility: -1.49 -> -1.42; shapes drawn as asked: 76 -> 64 %, the price; 122 s on two cores (the tour's evaluation in README.md, with --seed 0; at full size nothing has been measured)
#   plan it   bash scripts/train_aesthetic_ddpo_sd3.sh --dry_run
set -euo pipefail
source "$(dirname "$0")/launch.sh"

unseen=image_reward # what training does not see, and shares no network with the aesthetic scorer
case " $* " in *image_reward*) unseen=clip ;; esac

if [ "${TINY:-}" = 1 ]; then
  processes=$(tiny_processes)
  NUM_PROCESSES=$processes launch train_ddpo_sd3.py \
    --pretrained_model_name_or_path models/tiny-sd3 --resolution 64 --mixed_precision no --prompts shapes --scorer jpeg_compressibility \
    --sample_batch_size 16 --sample_num_batches_per_epoch $((8 / processes)) --learning_rate 3e-4 --num_epochs 18 --checkpointing_epochs 9 \
    --cache_batch_size 64 --eval_prompts shapes_held_out --num_eval_prompts 128 --eval_num_inference_steps 20 --eval_epochs 9 \
    --eval_scorers shapes --output_dir outputs/tiny_ddpo_sd3 -- "$@"
else
  launch train_ddpo_sd3.py \
    --pretrained_model_name_or_path models/stable-diffusion-3.5-medium --resolution 512 --mixed_precision bf16 \
    --prompts simple_animals --scorer aesthetic --eval_prompts activities --eval_scorers $unseen --num_epochs 200 --checkpointing_epochs 10 \
    --checkpoints_total_limit 3 --output_dir outputs/ddpo_sd3 -- "$@"
fi
