"""The trainers that can be measured, by name: one entry each. loops.py says what a loop is."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import train_ddpo_sd3
import train_dpo_sd15
import train_dreambooth_lora_sd3
import train_full_finetuning_sd3
import train_grpo_sd3
import train_refl_sd15
import train_text_to_image_lora_sd3
from benchmarks import aligned, loops
from benchmarks.loops import Loop, Setting, arguments
from src import full, lora, memory, policy, unet
from src.pipelines import geometry, sd3, sd15

Planned = Callable[[Setting, argparse.Namespace], memory.StepMemory]


@dataclass(frozen=True)
class Trainer:
    """A training script and how its step is measured.

    Attributes:
        loop: sets the step up; planned: its memory as --dry_run plans it, of the parts that the loop holds.
        model: a key of geometry.MODELS, for scripts whose flags depend on their model's configuration files.
        checked: flags of the check that its numbers are right; as_fp32: flags that make it compute in fp32 throughout.
    """

    script: ModuleType
    loop: Callable[[Setting], Loop]
    planned: Planned
    model: str | None = None
    checked: tuple[str, ...] = ()
    as_fp32: tuple[str, ...] = ("--mixed_precision", "no", "--no-allow_tf32")


# --------------------------------------------------------------------------- what they should need


def planned_lora_sd3(setting: Setting, args: argparse.Namespace) -> memory.StepMemory:
    """As --dry_run plans it, for the parts that the loop holds."""
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"))
    number = memory.BYTES[args.mixed_precision]
    counts = {"transformer": sum(p.numel() for p in transformer.parameters())}
    weights = memory.weight_bytes(counts, transformer, number, quantized=args.quantize_base)
    train_text_to_image_lora_sd3.add_lora(transformer, args)
    trained = sum(p.numel() for p in lora.parameters(transformer))
    twice = True if getattr(args, "with_prior_preservation", False) else None  # the subject's gradients stay until the class's are added
    return memory.step_memory(args, transformer, weights, trained=trained, tokens=setting.tokens, whole=None, family=sd3,
                              batch=args.train_batch_size, accumulated=twice)  # fmt: skip


def planned_full_sd3(setting: Setting, args: argparse.Namespace) -> memory.StepMemory:
    """As --dry_run plans it, for the parts that the loop holds."""
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"))
    whole = train_full_finetuning_sd3.full_plan(args)
    weights = memory.weight_bytes({"transformer": sum(p.numel() for p in transformer.parameters())}, transformer, whole.weight)
    train_full_finetuning_sd3.select(transformer, args)
    trained = sum(p.numel() for p in full.parameters(transformer))
    return memory.step_memory(args, transformer, weights, trained=trained, tokens=setting.tokens, whole=whole, family=sd3,
                              batch=args.train_batch_size)  # fmt: skip


def planned_rollouts(setting: Setting, args: argparse.Namespace) -> memory.StepMemory:
    """As --dry_run plans it, for the parts that the loop holds: the VAE, too."""
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"))
    vae = geometry.build(setting.config("sd3.5-medium", "vae"))
    counts = {"transformer": sum(p.numel() for p in transformer.parameters()), "vae": sum(p.numel() for p in vae.parameters())}
    weights = memory.weight_bytes(counts, transformer, memory.BYTES[args.mixed_precision], quantized=args.quantize_base)
    policy.adapt(transformer, args)
    trained = sum(p.numel() for p in lora.parameters(transformer))
    passes = 2 if args.guidance_scale > 1 else 1
    return memory.step_memory(args, transformer, weights, trained=trained, tokens=setting.tokens, whole=None, family=sd3,
                              batch=passes * memory.rollout_batch(args), accumulated=True)  # fmt: skip


def planned_unet(setting: Setting, args: argparse.Namespace) -> tuple[torch.nn.Module, dict]:
    """The UNet on the meta device, with its adapter, and the arguments of `memory.step_memory` for it."""
    module = geometry.build(setting.config("sd1.5", "unet"))
    whole = None if args.use_lora else memory.Whole(("unet",), weight=4, gradient=4)
    number = whole.weight if whole else memory.BYTES[args.mixed_precision]
    weights = memory.weight_bytes({"unet": sum(p.numel() for p in module.parameters())}, module, number, "unet")
    unet.adapt(module, args)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return module, dict(weights=weights, trained=trained, tokens=aligned.CLIP_TOKENS, whole=whole, family=sd15)


def planned_pairs(setting: Setting, args: argparse.Namespace) -> memory.StepMemory:
    module, known = planned_unet(setting, args)
    pictures = args.train_batch_size * (1 if args.sft else 2)
    return memory.step_memory(args, module, **known, batch=pictures, frozen_copy=not (args.use_lora or args.sft))


def planned_reward_gradient(setting: Setting, args: argparse.Namespace) -> memory.StepMemory:
    module, known = planned_unet(setting, args)
    vae = geometry.build(setting.config("sd1.5", "vae"))
    known["weights"]["vae"] = 4 * sum(p.numel() for p in vae.parameters())
    return memory.reward_gradient_memory(args, module, vae, **known)[0]


# --------------------------------------------------------------------------- the list

TRAINERS = {
    "lora": Trainer(train_text_to_image_lora_sd3, loops.lora_sd3, planned_lora_sd3),
    "full": Trainer(train_full_finetuning_sd3, loops.full_sd3, planned_full_sd3, checked=("--weights_dtype", "bf16"),
                    as_fp32=("--mixed_precision", "no", "--no-allow_tf32", "--weights_dtype", "fp32")),
    "dreambooth": Trainer(train_dreambooth_lora_sd3, loops.dreambooth_sd3, planned_lora_sd3, checked=loops.PRIOR),
    "grpo": Trainer(train_grpo_sd3, aligned.grpo_sd3, planned_rollouts),
    "ddpo": Trainer(train_ddpo_sd3, aligned.ddpo_sd3, planned_rollouts),
    "dpo": Trainer(train_dpo_sd15, aligned.PreferenceLoop, planned_pairs, model="sd1.5"),
    "refl": Trainer(train_refl_sd15, aligned.RewardGradientLoop, planned_reward_gradient, model="sd1.5"),
}  # fmt: skip


def make(setting: Setting) -> Loop:
    return TRAINERS[setting.trainer].loop(setting)


def planned(setting: Setting, batch: int | None = None) -> memory.StepMemory:
    """The memory of a step of `batch` samples, None: as the flags say. Modules are built on the meta device only."""
    trainer = TRAINERS[setting.trainer]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model" if trainer.model else None
        if model:
            geometry.write_configs({part: setting.config(trainer.model, part) for part in geometry.MODELS[trainer.model]}, model)
        args = arguments(trainer.script, setting, Path(folder) / "planned", model, dry_run=True)
        if batch is not None:
            args.train_batch_size = batch
        return trainer.planned(setting, args)
