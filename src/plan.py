"""`--dry_run`: what a run would train, hold and cost, from configuration files and file headers alone; no weights are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from src import inputs, memory, optim, quantize, rounding
from src.data import buckets, captions
from src.pipelines import sd3

BYTES = {"no": 4, "fp16": 2, "bf16": 2}  # of a frozen weight or a cached number, by --mixed_precision
# fp32 weight, gradient and optimizer state: bytes per trained parameter. AdamW keeps two fp32 moments, 8-bit AdamW two of one byte,
# Prodigy four fp32 tensors; Adafactor's row and column of moments come to about 1 byte for a matrix of rank 16.
TRAINED_BYTES = {"adamw": 16, "adamw8bit": 10, "prodigy": 24, "adafactor": 9}
EMA_BYTES = 4  # per trained parameter with --use_ema
UPDATE_BYTES = 16  # per bf16 weight that is being updated: fp32 copies of it and of its gradient, its random bits, the sum
ENTRY_BYTES = 256  # of a cache file besides its tensors: names, shapes and key


@dataclass(frozen=True)
class Whole:
    """Parts of the pipeline that are trained themselves, not through an adapter: their names, bytes of a weight and of its gradient."""

    parts: tuple[str, ...]
    weight: int
    gradient: int


def show(args: argparse.Namespace, *, adapt: Callable[[nn.Module], None], whole: Whole | None = None) -> None:
    """Print the plan of a flow-matching run.

    Args:
        adapt: applied to the transformer on the meta device; leaves exactly the parameters trainable that the run trains.
        whole: None for adapters.

    Raises:
        ValueError: the data set cannot be read.
    """
    images, held_out = inputs.open_images(args, progress=True)
    path, tokens, batch = args.pretrained_model_name_or_path, text_tokens(args), args.train_batch_size * args.gradient_accumulation_steps
    transformer, counts = sd3.transformer_from_config(path, args.revision), sd3.parameter_counts(path, args.revision)
    weights = weight_bytes(counts, transformer, BYTES[args.mixed_precision], vars(args).get("quantize_base"))
    if whole:
        weights |= {part: size for part, size in weight_bytes(counts, transformer, whole.weight).items() if part in whole.parts}
    adapt(transformer)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    trained += sum(counts[part] for part in whole.parts if part != "transformer") if whole else 0
    rate = optim.learning_rate(args.learning_rate, args.scale_lr, batch)
    flops = step_flops(transformer, args.resolution, tokens, checkpointing=checkpoint_every(args)) * batch
    step = step_memory(args, transformer, weights, trained=trained, tokens=tokens, whole=whole)

    rows = [("model", path)]
    for part, count in counts.items():
        rows.append((f"  {part}", f"{count:>15,} parameters  {_size(weights[part]):>9}  {_residence(args, part)}"))
    trained_bytes = trained * per_trained_parameter(args, whole)
    rows += [
        ("trained", f"{trained:>15,} parameters  {_size(trained_bytes):>9}  {_state(args, whole)}"),
        ("activations", f"{_size(step.kept)} kept of {args.train_batch_size} picture(s), {_size(step.working)} more in the backward pass"),
        ("memory", _memory(args, weights, step)),
        ("pictures", f"{len(images):,} to train on, {len(held_out or [])} held out, {len(images.skipped)} skipped"),
        ("steps", f"{args.max_train_steps:,} of {batch} picture(s), one process: {args.max_train_steps * batch / len(images):.1f} epochs"),
        ("learning rate", f"{rate:.3g} at its peak, {args.lr_scheduler}, {args.optimizer}"),
        ("compute", f"{_flops(flops)} per step, {_flops(flops * args.max_train_steps)} in all, at {tokens} text tokens"),
    ]
    for name, (entries, size) in cache_bytes(args, images, held_out, transformer, tokens).items():
        rows.append((f"{name} cache", f"{entries:,} entries, {_size(size)} in {args.cache_dir} (what is there already is used again)"))
    wide = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{wide}}  {value}".rstrip() for name, value in rows))
    print("dry run: no weights were read, nothing was trained")


# --------------------------------------------------------------------------- what it holds


def weight_bytes(counts: dict[str, int], transformer: nn.Module, number: int, quantized: str | None = None) -> dict[str, int]:
    """Bytes of each part at `number` bytes a weight; the transformer's position embeddings, a buffer, included.

    Args:
        counts: parameters of each part; transformer: on the meta device, before adapters; quantized: --quantize_base.
    """
    buffers = sum(buffer.numel() for buffer in transformer.buffers())
    found = {part: (count + (buffers if part == "transformer" else 0)) * number for part, count in counts.items()}
    if quantized:
        packed = quantize.quantizable(transformer).values()
        saved = sum(layer.weight.numel() for layer in packed) * (number - quantize.BYTES[quantized])
        scales = sum(4 * layer.out_features for layer in packed) if quantized == "int8" else 0
        found["transformer"] -= round(saved - scales)
    return found


def per_trained_parameter(args: argparse.Namespace, whole: Whole | None = None) -> int:
    """Bytes of an fp32 adapter's parameter with its gradient, the optimizer's state and its moving average; of a part that is trained as
    a whole, without the parameter, which is counted with the part."""
    average = EMA_BYTES if args.use_ema and vars(args).get("ema_device") != "cpu" else 0
    return TRAINED_BYTES[args.optimizer] + average + (whole.gradient - 8 if whole else 0)  # 8: an fp32 parameter and its gradient


def checkpoint_every(args: argparse.Namespace) -> int:
    """Every how many blocks one is computed again in the backward pass; 0: none."""
    return args.checkpoint_every if args.gradient_checkpointing else 0


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one GPU.

    Attributes:
        resident: weights, optimizer state and average; kept: activations when the backward pass begins; working: what that pass needs
            besides; peak: the most of all at any time.
    """

    resident: float
    kept: int
    working: int
    peak: float


def step_memory(
    args: argparse.Namespace, transformer: nn.Module, weights: dict[str, int], *, trained: int, tokens: int, whole: Whole | None = None
) -> StepMemory:
    """What a step will hold, by the arithmetic of `src/memory.py`.

    Args:
        transformer: on the meta device, with adapters or selected weights; weights: bytes of the parts; trained: number of parameters;
            tokens: L.
    """
    step = memory.Step(
        batch=args.train_batch_size, image_tokens=(args.resolution // (sd3.VAE_SCALE * sd3.PATCH)) ** 2, text_tokens=tokens,
        autocast=args.mixed_precision != "no", wide=(whole.weight if whole else BYTES[args.mixed_precision]) == 4,
        checkpoint_every=checkpoint_every(args), compiled=args.compile,
    )  # fmt: skip
    kept, working = memory.activation_bytes(transformer, step)
    gradient = whole.gradient if whole else 4
    stays = [size for part, size in weights.items() if not part.startswith("text") or not args.cache_text]
    resident = sum(stays) + trained * (per_trained_parameter(args, whole) - gradient)
    updating = 0
    if whole and whole.weight == 2:
        pieces = max(p.numel() for p in transformer.parameters() if p.requires_grad) if whole.gradient == 0 else rounding.PIECE
        updating = UPDATE_BYTES * min(pieces, trained)
    peak = memory.peak_bytes(
        resident=resident, gradients=trained * gradient, kept=kept, working=working, updating=updating,
        accumulated=args.gradient_accumulation_steps > 1,
    )  # fmt: skip
    return StepMemory(resident, kept, working, peak)


def _state(args: argparse.Namespace, whole: Whole | None) -> str:
    held = [] if whole else ["weights"]
    held += ["gradients"] if whole is None or whole.gradient else []
    return ", ".join([*held, f"{args.optimizer} state" + (" and EMA" if args.use_ema else "")])


def _residence(args: argparse.Namespace, part: str) -> str:
    return "only while the text cache is filled" if part.startswith("text") and args.cache_text else ""


def _memory(args: argparse.Namespace, weights: dict[str, int], step: StepMemory) -> str:
    """The two high points, of tensors alone: CUDA itself takes about half a gigabyte more."""
    text = sum(size for part, size in weights.items() if part.startswith("text"))
    filling = f"{_size(text)} while the text cache is filled, " if args.cache_text else ""
    return f"{filling}{_size(step.peak)} at the peak of a step"


def cache_bytes(
    args: argparse.Namespace, images: captions.CaptionedImages, held_out: captions.CaptionedImages | None, transformer: nn.Module,
    tokens: int,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """Entries and bytes of the latent and the text cache, those that the flags ask for."""
    config, number, found = transformer.config, BYTES[args.mixed_precision], {}
    shapes = buckets.buckets(args.resolution, aspect_buckets=args.aspect_buckets)
    if args.cache_latents:
        keyed = {}  # pictures that are in the data set twice are cached once; only what is trained on is mirrored
        for part, copies in ((images, 1 if args.no_hflip else 2), (held_out, 1)):
            for record in part.records if part else ():
                size = buckets.assign(record.width, record.height, shapes)
                keyed[record.key, size] = max(copies, keyed.get((record.key, size), 0))
        value = 2 * config.in_channels * number  # bytes per latent: mean and standard deviation
        sizes = [copies * (value * h * w // sd3.VAE_SCALE**2 + ENTRY_BYTES) for (_, (h, w)), copies in keyed.items()]
        found["latent"] = (sum(keyed.values()), sum(sizes))
    if args.cache_text:
        prompts = {"", *inputs.validation_prompts(args), *(record.prompt for part in (images, held_out) if part for record in part.records)}
        entry = (tokens * config.joint_attention_dim + config.pooled_projection_dim) * number + ENTRY_BYTES
        found["text"] = (len(prompts), len(prompts) * entry)
    return found


def text_tokens(args: argparse.Namespace) -> int:
    """L: CLIP's tokens plus T5's."""
    path = args.pretrained_model_name_or_path
    clip = sd3.read_config(path, "tokenizer/tokenizer_config.json", args.revision)["model_max_length"]
    return clip + (args.max_sequence_length or sd3.default_sequence_length(path, args.revision))


# --------------------------------------------------------------------------- what it costs


def step_flops(transformer: nn.Module, resolution: int, tokens: int, *, checkpointing: int) -> int:
    """Floating-point operations (a multiply-add is two) of one picture's forward and backward pass, counted on the meta device.

    Counted, because no fixed multiple of the forward pass is right: frozen weights need no gradient, so the backward pass of a linear
    layer costs one forward, but that of attention costs 2.5. A LoRA of SD3.5-medium comes to 2.13 forwards at 512 px and 2.37 at 1024.

    Args:
        transformer: on the meta device, with the parameters trainable that are trained.
        tokens: L, CLIP's tokens plus T5's.
        checkpointing: every how many blocks one runs forward twice (the few layers outside of them counted as blocks are); 0: none.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config, side = transformer.config, resolution // sd3.VAE_SCALE
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        prediction = transformer(
            hidden_states=torch.empty(1, config.in_channels, side, side), timestep=torch.empty(1),
            encoder_hidden_states=torch.empty(1, tokens, config.joint_attention_dim),
            pooled_projections=torch.empty(1, config.pooled_projection_dim), return_dict=False,
        )[0]  # fmt: skip
        forward = counter.get_total_flops()
        prediction.sum().backward()
    transformer.zero_grad()
    again = len(transformer.transformer_blocks[::checkpointing]) / len(transformer.transformer_blocks) if checkpointing else 0
    return counter.get_total_flops() + round(again * forward)


# --------------------------------------------------------------------------- how it reads


def _size(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.1f} kB"


def _flops(count: float) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP")) if count >= unit), (1e9, "GFLOP"))
    return f"{count / unit:.3g} {name}"
