#!/usr/bin/env bash
# A LoRA of SD3.5-medium against a reward, by GRPO.
#
#   needs     one GPU of 40 GB or more (19 GiB predicted, and the scorers), models/stable-diffusion-3.5-medium and the weights
#             of the scorers (scripts/download.sh)
#   smaller   --gradient_checkpointing: 7 GiB, a sixth more computing;  faster: --compile
#   override  any argument:  bash scripts/train_aesthetic_rlhf_grpo_lora_sd3.sh --scorer pickscore=1 --prompts datas/my-prompts.txt
#   as paper  --config scripts/presets/flow_grpo.yaml (or grpo_guard.yaml, nft.yaml)
#   try it    TINY=1 bash scripts/train_aesthetic_rlhf_grpo_lora_sd3.sh     the tiny model against its own verifier, on a CPU;
#             docs/grpo.md has the flags of twenty minutes; --loss ppo --learning_rate 3e-4 takes the clipped surrogate, as the real run does
#             expect the reward, shapes: 0.911 -> 0.938; prompts wholly right: 76 -> 82 %; 319 s on two cores (the tour's evaluation in README.md, with --seed 0; at full size nothing has been measured)
#   plan it   bash scripts/train_aesthetic_rlhf_grpo_lora_sd3.sh --dry_run
set -euo pipefail
source "$(dirname "$0")/launch.sh"

unseen=image_reward # what training does not see, and shares no network with the aesthetic scorer
case " $* " in *image_reward*) unseen=clip ;; esac

if [ "${TINY:-}" = 1 ]; then
  processes=$(tiny_processes)
  NUM_PROCESSES=$processes launch train_grpo_sd3.py \
    --pretrained_model_name_or_path models/tiny-sd3 --resolution 64 --mixed_precision no --prompts shapes --scorer shapes \
    --loss nft --group_size 8 --sample_batch_size 16 --sample_num_batches_per_epoch $((16 / processes)) --updates_per_epoch 2 \
    --max_advantage 2 --learning_rate 2e-3 --lr_scheduler cosine --use_ema --ema_decay 0.9 --num_epochs 24 --checkpointing_epochs 8 \
    --cache_batch_size 64 --eval_prompts shapes_held_out --num_eval_prompts 128 --eval_num_inference_steps 20 --eval_epochs 12 \
    --eval_scorers shapes_strict,tiny_clip --output_dir outputs/tiny_grpo_sd3 -- "$@"
else
  launch train_grpo_sd3.py \
    --pretrained_model_name_or_path models/stable-diffusion-3.5-medium --config scripts/presets/one_gpu.yaml \
    --prompts simple_animals --scorer aesthetic --eval_prompts activities --eval_scorers $unseen --num_epochs 200 --checkpointing_epochs 10 \
    --checkpoints_total_limit 3 --output_dir outputs/grpo_sd3 -- "$@"
fi
