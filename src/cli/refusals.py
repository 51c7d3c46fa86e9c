"""Combinations of flags that cannot work, or have no effect: an option without effect is an error, never silence."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator

from src.cli.scorers import SCORER_OPTIONS, judged_by

MOST_MODE_SCALE = 2 / (math.pi - 2)  # as src/flow.py has it, which needs torch


def _data_of(args: argparse.Namespace) -> str | None:
    return args.dataset_name if hasattr(args, "dataset_name") else args.pretrain_dataset_name


# flags, when they have an effect, why they have none otherwise
WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], Callable[[argparse.Namespace], bool], str], ...] = (
    (("lr_warmup_steps",), lambda a: a.lr_scheduler != "constant" or a.lr_warmup_steps == 0,
     "with --lr_scheduler constant; use constant_with_warmup"),
    (("lr_num_cycles",), lambda a: a.lr_scheduler == "cosine_with_restarts", "without --lr_scheduler cosine_with_restarts"),
    (("lr_power",), lambda a: a.lr_scheduler == "polynomial", "without --lr_scheduler polynomial"),
    (("adam_beta1", "adam_beta2", "adam_epsilon"), lambda a: a.optimizer != "adafactor", "with --optimizer adafactor; leave it out"),
    (("ema_decay", "ema_device"), lambda a: a.use_ema, "without --use_ema"),
    (("text_encoder_learning_rate", "text_encoder_rank"), lambda a: a.train_text_encoder, "without --train_text_encoder"),
    (("class_data_dir", "class_prompt", "class_prompts_file", "num_class_images", "prior_loss_weight", "sample_batch_size",
      "class_inference_steps", "class_guidance_scale"), lambda a: getattr(a, "with_prior_preservation", True),
     "without --with_prior_preservation"),
    (("logit_mean", "logit_std"), lambda a: a.timestep_density == "logit_normal", "without --timestep_density logit_normal"),
    (("mode_scale",), lambda a: a.timestep_density == "mode", "without --timestep_density mode"),
    (("checkpoint_every",), lambda a: a.gradient_checkpointing, "without --gradient_checkpointing"),
    (("compile_mode",), lambda a: a.compile, "without --compile"),
    (("beta_dpo", "loss_type", "label_smoothing", "reference_model"), lambda a: not a.sft, "with --sft, which has no preferences"),
    (("label_smoothing",), lambda a: a.loss_type == "sigmoid", "without --loss_type sigmoid"),
    (("reference_model",), lambda a: not a.use_lora, "with --use_lora, whose reference is the UNet without it"),
    (("rank", "lora_alpha", "lora_dropout", "use_dora", "lora_layers", "init_lora", "export_merged"),
     lambda a: getattr(a, "use_lora", True), "without --use_lora"),
    (("hub_model_id",), lambda a: a.push_to_hub, "without --push_to_hub"),
    (("tracker_project_name",), lambda a: a.report_to != "none", "with --report_to none"),
    (("cache_batch_size",), lambda a: getattr(a, "cache_latents", True) or getattr(a, "cache_text", True),
     "without --cache_latents or --cache_text"),
    (("revision",), lambda a: not os.path.isdir(a.pretrained_model_name_or_path), "on a local --pretrained_model_name_or_path"),
    (("pretrain_loss_weight", "dataset_revision", "image_column", "caption_column", "max_train_samples", "strict_data", "aspect_buckets",
      "random_crop", "no_hflip", "caption_dropout", "dataloader_num_workers", "cache_latents"),
     lambda a: getattr(a, "pretrain_dataset_name", True), "without --pretrain_dataset_name"),
    (("dataset_revision",), lambda a: not os.path.exists(_data_of(a) or ""), "on a local --dataset_name"),
    (("rank", "lora_alpha", "use_dora", "lora_layers", "lora_blocks", "init_lora", "export_format", "export_merged", "quantize_base"),
     lambda a: not getattr(a, "full_weights", False), "with --full_weights"),
    (("negative_prompt",), lambda a: hasattr(a, "eval_guidance_scale") or a.guidance_scale is None or a.guidance_scale > 1,
     "without --guidance_scale above 1"),
    (("negative_prompt",), lambda a: getattr(a, "eval_guidance_scale", math.inf) > 1 or a.guidance_scale > 1,
     "without --guidance_scale or --eval_guidance_scale above 1"),
    (("compare",), lambda a: not getattr(a, "ui", False), "with --ui, which always compares; leave it out"),
    (("num_images", "batch_size"), lambda a: not getattr(a, "ui", False), "with --ui, which draws one picture at a time; leave it out"),
    (("ui_host", "ui_port"), lambda a: a.ui, "without --ui"),
    (("window_shift_epochs",), lambda a: a.window_order == "progressive", "without --window_order progressive"),
    (("transition", "noise_level", "window_size", "window_range", "window_order", "clip_nats", "kl_form"),
     lambda a: getattr(a, "loss", None) != "nft", "with --loss nft, which trains on pictures of the deterministic sampler"),
    (("guidance_scale",), lambda a: getattr(a, "loss", None) != "nft", "with --loss nft, which learns to do without guidance"),
    (("kl_form",), lambda a: a.kl_weight > 0, "without --kl_weight"),
    (("learning_rate",), lambda a: getattr(a, "optimizer", None) != "prodigy" or (a.learning_rate or 1) > 0.01,
     "with --optimizer prodigy, which multiplies the step size that it finds by it: leave it out, or give about 1"),
    (("nft_strength", "nft_levels", "nft_old_rate", "nft_old_decay"), lambda a: a.loss == "nft", "without --loss nft"),
    (("per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count"), lambda a: a.per_prompt_stat_tracking,
     "with --no-per_prompt_stat_tracking"),
    (("mid_range",), lambda a: a.method == "refl", "without --method refl"),
    (("draft_k",), lambda a: a.method == "draft", "without --method draft"),
    (("num_renoised",), lambda a: a.method == "draft_lv", "without --method draft_lv"),
    (("stop_if_eval_drops",), lambda a: a.eval_scorers, "without --eval_scorers, the measures that training does not see"),
    (("scorer_batch_size", "scorer_dtype"), lambda a: a.scorer or getattr(a, "eval_scorers", None), "without --scorer"),
    *(((option,), lambda a, name=name: judged_by(a, name), f"without {name} in --scorer") for option, name in SCORER_OPTIONS.items()),
)  # fmt: skip


# flags of a wrapper that are dropped if the user changes one of the others
BELONG_TOGETHER = (
    (("learning_rate",), ("use_lora", "full_weights")),
    (("chosen_column", "rejected_column", "label_column", "caption_column", "image_column"), ("dataset_name",)),
    (("eval_prompts",), ("prompts",)),  # a verifier may be unable to judge other prompts
)


def _full_refusals(args: argparse.Namespace) -> Iterator[str]:
    """What cannot work in full fine-tuning."""
    if args.weights_dtype == "bf16" and args.mixed_precision != "bf16":
        yield f"--weights_dtype bf16 needs --mixed_precision bf16, got {args.mixed_precision}"
    if args.optimizer == "prodigy" and (args.weights_dtype == "bf16" or args.fused_backward):
        flag = "--fused_backward" if args.fused_backward else "--weights_dtype bf16"
        yield f"--optimizer prodigy derives its step from all weights at once, {flag} updates them one by one; use adamw"
    if args.fused_backward:
        if args.gradient_accumulation_steps > 1:
            yield "--fused_backward updates in every backward pass: use --gradient_accumulation_steps 1 and a larger --train_batch_size"
        if args.max_grad_norm:
            yield "--fused_backward cannot clip by a norm that is known only after the last gradient: add --max_grad_norm 0"
        if args.mixed_precision == "fp16":
            yield "--fused_backward cannot wait for fp16's loss scale: use --mixed_precision bf16 or no"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            yield "--fused_backward works on one process: leave it out, or start one (NUM_PROCESSES=1)"
    if args.train_blocks and args.freeze_last_blocks:
        yield "--freeze_last_blocks contradicts --train_blocks, which says all; give one of them"
    if args.train_text_encoder and args.save_transformer_only:
        yield "--save_transformer_only would drop what --train_text_encoder trained; leave one out"


def _dreambooth_refusals(args: argparse.Namespace) -> Iterator[str]:
    """What cannot work in DreamBooth."""
    if not args.instance_data_dir and not args.dataset_name:
        yield "--instance_data_dir is required: a folder with some pictures of your subject"
    if args.instance_data_dir and args.dataset_name and str(args.instance_data_dir) != args.dataset_name:
        yield "--dataset_name contradicts --instance_data_dir, which names the pictures too; give one of them"
    if args.instance_data_dir and args.dataset_revision:
        yield f"--dataset_revision {args.dataset_revision} has no effect on a local --instance_data_dir"
    if args.mask_from_alpha and args.mask_data_dir:
        yield "--mask_data_dir contradicts --mask_from_alpha, which is another mask; give one of them"
    pictures = args.instance_data_dir or args.dataset_name
    if args.mask_data_dir and pictures and os.path.realpath(args.mask_data_dir) == os.path.realpath(pictures):
        yield f"--mask_data_dir {args.mask_data_dir} holds the pictures: every one would be its own mask; give masks a folder of their own"
    if args.random_crop and (args.mask_from_alpha or args.mask_data_dir):
        yield "--random_crop may cut off all of what a mask shows: leave it out"
    if args.with_prior_preservation and not (args.class_prompt or args.class_prompts_file or args.class_data_dir):
        yield "--with_prior_preservation needs --class_prompt, what to render without your subject, or pictures in --class_data_dir"
    if args.train_text_encoder and args.export_merged:
        yield "--export_merged writes the transformer alone, without what --train_text_encoder trains; leave one out"


def counts(rule: Callable[[argparse.Namespace], bool], args: argparse.Namespace) -> bool:
    """Whether a flag has an effect; True where the rule asks for a flag that this program does not have, as a trainer of your own may."""
    try:
        return rule(args)
    except AttributeError:
        return True


def find(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the combination of flags, one sentence each.

    A flag counts as given if it differs from its default, so that the complete args.json of a run can serve as --config.
    """
    has = vars(args)
    for names, rule, why in WITHOUT_EFFECT:
        for name in names:
            if name in has and has[name] != parser.get_default(name) and not counts(rule, args):
                yield f"--{name} {has[name]} has no effect {why}"
    if has.get("random_crop") and has.get("cache_latents"):
        yield "--random_crop needs fresh latents for every crop: add --no-cache_latents"
    if has.get("text_encoder_learning_rate") and has["optimizer"] == "prodigy":
        yield "--text_encoder_learning_rate contradicts --optimizer prodigy, which finds one step size for all; leave it out"
    if has.get("compile_mode") == "reduce-overhead":
        if has["gradient_checkpointing"]:
            yield "--compile_mode reduce-overhead cannot record what --gradient_checkpointing computes twice; use default"
        if has.get("gradient_accumulation_steps", 1) > 1 or has.get("with_prior_preservation"):  # the second replay writes over the first's
            why = "--with_prior_preservation" if has.get("with_prior_preservation") else "--gradient_accumulation_steps"
            yield f"--compile_mode reduce-overhead keeps the gradients of one backward pass an update, {why} has several; use default"
        if has.get("aspect_buckets"):
            yield "--compile_mode reduce-overhead records one size of picture, --aspect_buckets has many; use default"
    if has.get("quantize_base"):
        if has.get("use_dora"):
            yield "--use_dora needs the base's full weights, which --quantize_base does not keep; leave one out"
        if has.get("export_merged"):
            yield "--export_merged would write the rounded weights of --quantize_base: leave it out, and merge the LoRA into the original"
    if has.get("timestep_density") == "mode" and not -1 <= has["mode_scale"] <= MOST_MODE_SCALE:
        yield f"--mode_scale must lie in [-1, {MOST_MODE_SCALE:.4f}], got {has['mode_scale']:g}; 1.29 is the paper's best"
    if has.get("same_noise") and has["loss"] == "nft":
        yield "--same_noise would make all pictures of a group the same with --loss nft, whose steps have no noise; leave it out"
    if has.get("lr_scheduler") == "polynomial" and (has["learning_rate"] or 1) <= 1e-7 and not has.get("scale_lr"):
        yield f"--lr_scheduler polynomial ends at 1e-7, --learning_rate {has['learning_rate']:g} is no more than that; use linear"
    if has.get("scale_lr") and has["optimizer"] == "prodigy":
        yield "--scale_lr contradicts --optimizer prodigy, which finds its own step size; leave it out"
    if "chosen_column" in has and (has["chosen_column"] is None) != (has["rejected_column"] is None):
        yield "--chosen_column and --rejected_column belong together: give both, or neither for pickapic_v2's jpg_0 and jpg_1"
    if "weights_dtype" in has:
        yield from _full_refusals(args)
    if "instance_data_dir" in has:
        yield from _dreambooth_refusals(args)
    elif "dataset_name" in has and not has["dataset_name"]:
        pictures, pairs = "a folder of captioned pictures, parquet, webdataset", "preference pairs in a folder with metadata.jsonl, parquet"
        what = pairs if "chosen_column" in has else pictures
        yield f"--dataset_name is required: {what} or a Hub id"


def check_warmup(args: argparse.Namespace, steps: int) -> None:
    """Refuse a warm-up of 0 steps with constant_with_warmup, and one as long as the run or longer; steps: optimizer steps of the run."""
    has = vars(args)
    warmup, epochs = has["lr_warmup_steps"], has.get("num_epochs")
    if warmup == 0 and has["lr_scheduler"] == "constant_with_warmup" and steps >= 4:  # below 4, the default of a quarter is 0
        raise ValueError("--lr_scheduler constant_with_warmup needs --lr_warmup_steps of at least 1")
    if warmup >= steps > 0:  # 0 steps: the script itself refuses an epoch without an update
        end = f"the {steps} optimizer steps of --num_epochs {epochs}" if epochs else f"--max_train_steps {steps}"
        raise ValueError(f"--lr_warmup_steps {warmup} must be less than {end}")
