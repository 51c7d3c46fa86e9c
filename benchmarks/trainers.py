"""The trainers that can be measured, by name: one entry each. What a loop is, see loops.py."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import train_ddpo_sd3
import train_dpo_sd15
import train_dreambooth_lora_sd3
import train_full_finetuning_sd3
import train_grpo_sd3
import train_refl_sd15
import train_text_to_image_lora_sd3
from benchmarks import aligned, loops
from benchmarks.loops import Loop, Setting, arguments
from src import full, lora, plan, policy
from src.pipelines import geometry

Planned = Callable[[Setting, argparse.Namespace], plan.StepMemory]


@dataclass(frozen=True)
class Trainer:
    """A training script and how its step is measured.

    Attributes:
        loop: sets the step up; planned: its memory as --dry_run plans it, of the parts that the loop holds (None: there is no plan yet).
        checked: flags of the check that its numbers are right; as_fp32: flags that make it compute in fp32 throughout.
    """

    script: ModuleType
    loop: Callable[[Setting], Loop]
    planned: Planned | None = None
    checked: tuple[str, ...] = ()
    as_fp32: tuple[str, ...] = ("--mixed_precision", "no", "--no-allow_tf32")


# --------------------------------------------------------------------------- what they should need


def planned_lora_sd3(setting: Setting, args: argparse.Namespace) -> plan.StepMemory:
    """As --dry_run plans it, for the parts that the loop holds."""
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"))
    number = plan.BYTES[args.mixed_precision]
    counts = {"transformer": sum(p.numel() for p in transformer.parameters())}
    weights = plan.weight_bytes(counts, transformer, number, quantized=args.quantize_base)
    train_text_to_image_lora_sd3.add_lora(transformer, args)
    trained = sum(p.numel() for p in lora.parameters(transformer))
    twice = True if getattr(args, "with_prior_preservation", False) else None  # the subject's gradients wait for those of the class
    return plan.step_memory(args, transformer, weights, trained=trained, tokens=setting.tokens, accumulated=twice)


def planned_full_sd3(setting: Setting, args: argparse.Namespace) -> plan.StepMemory:
    """As --dry_run plans it, for the parts that the loop holds."""
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"))
    whole = train_full_finetuning_sd3.full_plan(args)
    weights = plan.weight_bytes({"transformer": sum(p.numel() for p in transformer.parameters())}, transformer, whole.weight)
    train_full_finetuning_sd3.select(transformer, args)
    trained = sum(p.numel() for p in full.parameters(transformer))
    return plan.step_memory(args, transformer, weights, trained=trained, tokens=setting.tokens, whole=whole)


def planned_rollouts(setting: Setting, args: argparse.Namespace) -> plan.StepMemory:
    """As --dry_run plans it, for the parts that the loop holds: the VAE, too."""
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"))
    vae = geometry.build(setting.config("sd3.5-medium", "vae"))
    counts = {"transformer": sum(p.numel() for p in transformer.parameters()), "vae": sum(p.numel() for p in vae.parameters())}
    weights = plan.weight_bytes(counts, transformer, plan.BYTES[args.mixed_precision], quantized=args.quantize_base)
    policy.adapt(transformer, args)
    trained = sum(p.numel() for p in lora.parameters(transformer))
    passes = 2 if args.guidance_scale > 1 else 1
    return plan.step_memory(args, transformer, weights, trained=trained, tokens=setting.tokens, batch=passes * plan.rollout_batch(args),
                            accumulated=True)  # fmt: skip


# --------------------------------------------------------------------------- the list

TRAINERS = {
    "lora": Trainer(train_text_to_image_lora_sd3, loops.lora_sd3, planned_lora_sd3),
    "full": Trainer(train_full_finetuning_sd3, loops.full_sd3, planned_full_sd3, checked=("--weights_dtype", "bf16"),
                    as_fp32=("--mixed_precision", "no", "--no-allow_tf32", "--weights_dtype", "fp32")),
    "dreambooth": Trainer(train_dreambooth_lora_sd3, loops.dreambooth_sd3, planned_lora_sd3, checked=loops.PRIOR),
    "grpo": Trainer(train_grpo_sd3, aligned.grpo_sd3, planned_rollouts),
    "ddpo": Trainer(train_ddpo_sd3, aligned.ddpo_sd3, planned_rollouts),
    "dpo": Trainer(train_dpo_sd15, aligned.PreferenceLoop),
    "refl": Trainer(train_refl_sd15, aligned.RewardGradientLoop),
}  # fmt: skip


def make(setting: Setting) -> Loop:
    return TRAINERS[setting.trainer].loop(setting)


def planned(setting: Setting, batch: int) -> plan.StepMemory | None:
    """The memory of a step of `batch` samples; None for a trainer that has no plan yet. Nothing is built but on the meta device."""
    trainer = TRAINERS[setting.trainer]
    if trainer.planned is None:
        return None
    args = arguments(trainer.script, setting, Path(tempfile.gettempdir()) / "planned", dry_run=True)
    args.train_batch_size = batch
    return trainer.planned(setting, args)
