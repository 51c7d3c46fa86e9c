"""What a training step holds on one GPU, in bytes: weights, optimizer, and activations counted in a pass on tensors without memory."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from src import activations, lora, norms, quantize, rounding, runtime, speed
from src.pipelines import sd3

BYTES = {"no": 4, "fp16": 2, "bf16": 2}  # of a frozen weight or a cached number, by --mixed_precision
# Bytes of optimizer state per trained parameter. AdamW keeps two fp32 moments, 8-bit AdamW two of one byte, Prodigy four fp32 tensors;
# Adafactor's row and column of moments come to about 1 byte for a matrix of rank 16.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 1}
EMA_BYTES = 4  # per trained parameter with --use_ema
UPDATE_BYTES = 8  # per bf16 weight of a piece that is being updated: fp32 copies of it and of its gradient
ROUNDING_BYTES = 10  # per bf16 weight of the tensor that is being rounded: random bits, which become the result, a copy, and that in bf16


@dataclass(frozen=True)
class Whole:
    """Parts of the pipeline that are trained themselves, not through an adapter: their names, bytes of a weight and of its gradient."""

    parts: tuple[str, ...]
    weight: int
    gradient: int


def weight_bytes(
    counts: dict[str, int], denoiser: nn.Module, number: int, name: str = "transformer", quantized: str | None = None
) -> dict[str, int]:
    """Bytes of each frozen part at `number` bytes a weight; the position embeddings of SD3's transformer, a buffer, included.

    Args:
        counts: parameters of each part; denoiser: on the meta device (without adapters, if quantized); name: its own among them;
            quantized: --quantize_base.
    """
    buffers = sum(buffer.numel() for buffer in denoiser.buffers())
    found = {part: (count + (buffers if part == name else 0)) * number for part, count in counts.items()}
    if quantized:
        packed = quantize.quantizable(denoiser).values()
        saved = sum(layer.weight.numel() for layer in packed) * (number - quantize.BYTES[quantized])
        scales = sum(4 * layer.out_features for layer in packed) if quantized == "int8" else 0
        found[name] -= round(saved - scales)
    return found


def per_trained_parameter(args: argparse.Namespace, whole: Whole | None = None) -> int:
    """Bytes of an fp32 adapter's parameter with its gradient, the optimizer's state and its moving average; of a part that is trained as
    a whole, without the parameter, which is counted with the part."""
    average = EMA_BYTES if args.use_ema and vars(args).get("ema_device") != "cpu" else 0
    return STATE_BYTES[args.optimizer] + average + (whole.gradient if whole else 8)  # 8: an fp32 parameter and its gradient


def rollout_batch(args: argparse.Namespace) -> int:
    """Pictures that a policy draws and learns from in one forward pass, guidance not counted."""
    return vars(args).get("train_batch_size") or args.sample_batch_size


def checkpoint_every(args: argparse.Namespace) -> int:
    """Every how many blocks one is computed again in the backward pass; 0: none."""
    return args.checkpoint_every if args.gradient_checkpointing else 0


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one GPU.

    Attributes:
        resident: weights, optimizer state and average; kept: activations when the backward pass begins; working: what that pass needs
            besides; peak: the most of all at any time; uncompiled: though the run compiles.
    """

    resident: float
    kept: int
    working: int
    peak: float
    uncompiled: bool = False


def step_memory(
    args: argparse.Namespace, denoiser: nn.Module, weights: dict[str, int], *, trained: int, tokens: int, whole: Whole | None,
    family: ModuleType, batch: int, frozen_copy: bool = False, after: int = 0, chained: bool = False,
    accumulated: bool | None = None, averages: int = 0,
) -> StepMemory:  # fmt: skip
    """What a step will hold, from a forward pass without memory (`src/activations.py`), in which nothing is compiled.

    Args:
        denoiser: on the meta device, with adapters or selected weights; weights: bytes of the parts; trained: number of parameters;
            tokens: L; accumulated: over several passes, None: as --gradient_accumulation_steps says; averages: of what is trained,
            besides --use_ema.
        batch: pictures in a forward pass with gradient; frozen_copy: of the weights, which is asked afterwards, without gradient;
            after: bytes that are needed for a moment between that pass and its backward pass; chained: several such passes follow each
            other, of which all but the last are computed again, when the others have left gradients.
    """
    frozen, side = runtime.WEIGHT_DTYPES[args.mixed_precision], args.resolution // family.VAE_SCALE
    autocast = None if args.mixed_precision == "no" else frozen
    denoiser = copy.deepcopy(denoiser).train()
    for weight in denoiser.parameters():
        if not weight.requires_grad or (whole and whole.weight == 2):
            weight.data = weight.data.to(frozen)
    norms.lean(denoiser) if vars(args).get("quantize_base") else speed.fewer_passes(denoiser)  # packed projections are not stacked

    def forward(module: nn.Module) -> Any:
        given = family.example_inputs(denoiser.config, side, tokens, batch)
        return module(**given | {"encoder_hidden_states": given["encoder_hidden_states"].to(frozen)}, return_dict=False)[0]

    def recomputed(module: nn.Module) -> list[nn.Module]:
        return speed.blocks(module)[:: args.checkpoint_every] if args.gradient_checkpointing else []

    found = activations.count(denoiser, forward, autocast=autocast, units=recomputed)
    resident = _resident(args, weights, trained, whole) + (frozen_copy_bytes(args, denoiser) if frozen_copy else 0)
    resident += trained * EMA_BYTES * averages
    gradients, working = trained * (whole.gradient if whole else 4), found.again + found.largest
    accumulated = args.gradient_accumulation_steps > 1 if accumulated is None else accumulated
    # The highest point: when the forward pass ends, when the backward pass begins or ends, or while the weights are updated. Gradients grow
    # while what was kept shrinks, so the two are not there together, unless earlier micro-batches left gradients.
    earlier = gradients if accumulated else 0
    peak = resident + max(earlier + found.total + max(found.copies, after), max(gradients, earlier + found.total) + working,
                          gradients + _updating(denoiser, trained, whole))  # fmt: skip
    if chained:
        peak = max(peak, resident + gradients + found.total + working)
    return StepMemory(resident, found.total, working, peak, uncompiled=args.compile)


def frozen_copy_bytes(args: argparse.Namespace, denoiser: nn.Module) -> int:
    """Of a second denoiser that is only asked; denoiser: the trained one, in fp32 on the meta device."""
    frozen = copy.deepcopy(denoiser)
    speed.narrow_frozen(frozen, runtime.WEIGHT_DTYPES[args.mixed_precision])
    return sum(tensor.numel() * tensor.element_size() for tensor in (*frozen.parameters(), *frozen.buffers()))


def _updating(denoiser: nn.Module, trained: int, whole: Whole | None) -> int:
    """Bytes that an optimizer step needs for a moment: for weights in bf16, which are updated in fp32."""
    if whole is None or whole.weight != 2:
        return 0
    largest = max(p.numel() for p in denoiser.parameters() if p.requires_grad)
    return UPDATE_BYTES * (largest if whole.gradient == 0 else min(rounding.PIECE, trained)) + ROUNDING_BYTES * largest


def reward_gradient_memory(
    args: argparse.Namespace, unet: nn.Module, vae: nn.Module, *, weights: dict[str, int], trained: int, tokens: int, whole: Whole | None,
    family: ModuleType,
) -> tuple[StepMemory, int]:  # fmt: skip
    """What a step of ReFL or DRaFT will hold, and how much of it for decoding. Arguments as above; vae: on the meta device."""
    known = dict(weights=weights, trained=trained, tokens=tokens, whole=whole, family=family)
    decoding, passes = decoding_bytes(args, vae, family), 2 if args.guidance_scale > 1 else 1
    several = args.gradient_accumulation_steps > 1 or (args.method == "draft_lv" and args.num_renoised > 0)
    found = step_memory(args, unet, **known, batch=passes * args.train_batch_size, after=decoding,
                        chained=args.method == "draft" and args.draft_k > 1, accumulated=several)  # fmt: skip
    if args.pretrain_dataset_name:  # its pass comes after the reward's, unguided
        after = step_memory(args, unet, **known, batch=args.train_batch_size, accumulated=True)
        found = replace(found, peak=max(found.peak, after.peak))
    return found, decoding


def drawing_bytes(args: argparse.Namespace, vae: nn.Module) -> int:
    """The most that decoding a batch of SD3's latents without gradient holds, --decode_batch_size pictures at a time; vae as below."""
    for weight in vae.parameters():
        weight.data = weight.data.to(runtime.WEIGHT_DTYPES[args.mixed_precision])
    shape = (rollout_batch(args), vae.config.latent_channels, *[args.resolution // sd3.VAE_SCALE] * 2)
    return activations.live(vae, lambda module: sd3.decode_latents(SimpleNamespace(vae=module), torch.empty(shape), args.decode_batch_size))


def decoding_bytes(args: argparse.Namespace, vae: nn.Module, family: ModuleType) -> int:
    """The most that decoding with a gradient holds: in fp32, --decode_batch_size pictures at a time.

    Args:
        vae: on the meta device.
    """
    side, pictures = args.resolution // family.VAE_SCALE, min(args.decode_batch_size, args.train_batch_size)

    def forward(module: nn.Module) -> Any:
        return module.decode(torch.empty(pictures, vae.config.latent_channels, side, side, requires_grad=True), return_dict=False)[0]

    def recomputed(module: nn.Module) -> list[nn.Module]:
        return [module.decoder.mid_block, *module.decoder.up_blocks] if args.gradient_checkpointing else []

    found = activations.count(vae.requires_grad_(False), forward, units=recomputed)
    return found.total + max(found.again, found.largest)


def _resident(args: argparse.Namespace, weights: dict[str, int], trained: int, whole: Whole | None) -> float:
    """Bytes that are there all the time: weights, optimizer state and average."""
    stays = [size for part, size in weights.items() if not leaves(args, part)]
    return sum(stays) + trained * (per_trained_parameter(args, whole) - (whole.gradient if whole else 4))


def leaves(args: argparse.Namespace, part: str) -> bool:
    """Whether memory is rid of a part once the text cache is filled: of the text encoders, but for the two CLIPs where they are trained."""
    stays = getattr(args, "train_text_encoder", False) and part in lora.TEXT_PARTS
    return part.startswith("text") and getattr(args, "cache_text", True) and not stays  # without the flag text is always cached
