"""`--dry_run`: what a run would train, hold and cost, from configuration files and file headers alone; no weights are read."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from src import inputs, memory, optim, policy, rewards, runtime, speed
from src.data import buckets, captions, prompts
from src.memory import BYTES, EMA_BYTES, STATE_BYTES, StepMemory, Whole
from src.pipelines import sd3, sd15

RATE = 300e12  # FLOP/s: about half of what an H100's matrix multiplications reach in bf16, a good training step on it
ENTRY_BYTES = 256  # of a cache file besides its tensors: names, shapes and key


@dataclass(frozen=True)
class Preference:
    """What a preference run adds: pairs instead of pictures, and a reference model."""

    reference: bool  # it is consulted
    copy: bool  # and lies in memory beside the trained one


@dataclass(frozen=True)
class Subject:
    """What DreamBooth adds to the plan of a LoRA.

    Attributes:
        images, held_out: the subject's pictures, opened.
        adapters: parameters that are trained in CLIP-L and CLIP-G, which then stay in memory; 0: neither.
        class_images, missing: pictures of the class, and how many of them would be rendered, into `folder`; 0 without prior preservation.
        class_prompts: for the text cache.
    """

    images: captions.CaptionedImages
    held_out: captions.CaptionedImages | None
    adapters: int = 0
    class_images: int = 0
    missing: int = 0
    folder: Path | None = None
    class_prompts: tuple[str, ...] = ()

    @property
    def rows(self) -> list[tuple[str, str]]:
        if not self.class_images:
            return []
        return [("class pictures", f"{self.class_images:,}, {self.missing:,} of them to be rendered into {self.folder}")]


def show(
    args: argparse.Namespace, *, adapt: Callable[[nn.Module], None], whole: Whole | None = None, family: ModuleType = sd3,
    preference: Preference | None = None, subject: Subject | None = None,
) -> None:  # fmt: skip
    """Print the plan of a supervised or a preference run.

    Args:
        adapt: applied to the denoiser on the meta device; leaves exactly the parameters trainable that the run trains.
        whole: None for adapters; preference: None for captioned pictures; subject: None but for DreamBooth.

    Raises:
        SystemExit: the data set cannot be read.
    """
    runtime.quieten_libraries()
    if subject:
        samples, held_out = subject.images, subject.held_out
    else:
        with runtime.refusals():
            samples, held_out = inputs.open_pairs(args) if preference else inputs.open_images(args)
    denoiser = family.denoiser_from_config(args.pretrained_model_name_or_path, args.revision)
    counts = family.parameter_counts(args.pretrained_model_name_or_path, args.revision)
    weights = memory.weight_bytes(counts, denoiser, BYTES[args.mixed_precision], family.DENOISER, vars(args).get("quantize_base"))
    if whole:
        trainable = {part: counts[part] for part in whole.parts}
        weights |= memory.weight_bytes(trainable, denoiser, whole.weight, family.DENOISER)
    with runtime.refusals():
        adapt(denoiser)
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    trained += sum(counts[part] for part in whole.parts if part != family.DENOISER) if whole else 0
    trained += subject.adapters if subject else 0
    tokens, batch = text_tokens(args, family), args.train_batch_size * args.gradient_accumulation_steps
    reference = memory.frozen_copy_bytes(args, denoiser) if preference and preference.copy else 0
    trained_bytes = trained * memory.per_trained_parameter(args, whole)
    rate = optim.learning_rate(args.learning_rate, args.scale_lr, batch)
    flops = sample_flops(family, denoiser, args, tokens, preference) * batch * (2 if subject and subject.class_images else 1)
    twice = True if subject and subject.class_images else None  # gradients of the subject wait for those of the class
    together = args.train_batch_size * (2 if preference and preference.reference else 1)
    step = memory.step_memory(args, denoiser, weights, trained=trained, tokens=tokens, whole=whole, family=family, batch=together,
                              frozen_copy=reference > 0, accumulated=twice)  # fmt: skip

    rows = _model_rows(args, counts, weights, trained, trained_bytes, whole)
    if reference:
        rows.insert(-1, ("  reference", f"{counts[family.DENOISER]:>15,} parameters  {_size(reference):>9}"))
    kind, epochs = "pairs" if preference else "pictures", args.max_train_steps * batch / len(samples)
    much = "" if subject or preference or epochs <= 150 else f"; usual are 100 at most: --max_train_steps {100 * len(samples) // batch}"
    rows += [
        _activation_row(args, step, f"{args.train_batch_size} {kind[:-1]}(s)"),
        ("memory", _memory(args, weights, step)),
        (kind, _samples(samples, held_out)),
        *(subject.rows if subject else []),
        ("steps", f"{args.max_train_steps:,} of {batch} {kind[:-1]}(s), one process: {epochs:.1f} epochs{much}"),
        ("learning rate", f"{rate:.3g} at its peak, {args.lr_scheduler}, {args.optimizer}"),
        ("compute", f"{_flops(flops)} per step, {_total(flops * args.max_train_steps)}, at {tokens} text tokens"),
        ("checkpoints", _checkpoints(args, trained, _written(weights, whole), args.max_train_steps // args.checkpointing_steps)),
    ]
    cached = cache_bytes(args, samples, held_out, denoiser, tokens, family, subject)
    _print(rows + [_cache_row(args, name, *found) for name, found in cached.items()])


def show_rollouts(args: argparse.Namespace, *, updates: int, trained_steps: int, reference: bool, other_passes: int = 0) -> None:
    """Print the plan of a run that learns from its own pictures.

    Args:
        updates: optimizer steps per epoch. trained_steps: denoising steps, or noise levels, that each picture is trained at.
        reference: whether each of them takes a forward pass of the reference, too. other_passes: further ones without gradient, of an
            older copy of what is trained.

    Raises:
        SystemExit: the prompts cannot be read.
    """
    runtime.quieten_libraries()
    with runtime.refusals():
        path, found = args.pretrained_model_name_or_path, rewards.read_prompts(args)
    transformer, counts = sd3.transformer_from_config(path, args.revision), sd3.parameter_counts(path, args.revision)
    whole = Whole(("transformer",), weight=4, gradient=4) if args.full_weights else None
    weights = memory.weight_bytes(counts, transformer, BYTES[args.mixed_precision], quantized=args.quantize_base)
    if whole:
        weights["transformer"] = memory.weight_bytes(counts, transformer, whole.weight)["transformer"]
    written = _written(weights, whole)
    if whole and reference:
        weights["transformer"] += memory.frozen_copy_bytes(args, transformer)
    with runtime.refusals():
        policy.adapt(transformer, args)
    trained, tokens = sum(p.numel() for p in transformer.parameters() if p.requires_grad), text_tokens(args)
    trained_bytes = trained * (memory.per_trained_parameter(args, whole) + EMA_BYTES * other_passes)

    extra = reference + other_passes
    pictures, passes = args.sample_batch_size * args.sample_num_batches_per_epoch, 2 if args.guidance_scale > 1 else 1
    together = passes * memory.rollout_batch(args)
    peak = memory.step_memory(args, transformer, weights, trained=trained, tokens=tokens, whole=whole, family=sd3, batch=together,
                          accumulated=True, averages=2 * other_passes)  # fmt: skip  # itself, and what it takes the place of while asked
    decoding = memory.drawing_bytes(args, sd15.vae_from_config(path, args.revision))
    peak = replace(peak, peak=max(peak.peak, peak.resident + decoding))  # no gradient is there meanwhile
    forward, step = step_flops(transformer, args.resolution, tokens, checkpointing=memory.checkpoint_every(args))
    each = passes * (args.num_inference_steps * forward + trained_steps * (step + extra * forward))  # FLOP per picture
    sampler = prompts.GroupSampler(found.training, group_size=vars(args).get("group_size", 1), batch_size=args.sample_batch_size,
                                   batches_per_epoch=args.sample_num_batches_per_epoch, seed=args.seed or 0,
                                   world=policy.processes())  # fmt: skip  # as check_group_size counted
    texts = {args.negative_prompt, *sampler.drawn(args.num_epochs), *found.evaluated}
    entry = (tokens * transformer.config.joint_attention_dim + transformer.config.pooled_projection_dim) * BYTES[args.mixed_precision]
    rows = _model_rows(args, counts, weights, trained, trained_bytes, whole) + [
        _activation_row(args, peak, f"{together} picture(s)"),
        ("  decoding", f"{_size(decoding)}, {min(args.decode_batch_size, memory.rollout_batch(args))} picture(s) at a time"),
        ("memory", _memory(args, weights, peak) + "; scorers come on top"),
        ("prompts", f"{len(found.training):,} of {args.prompts}, {len(found.evaluation):,} evaluated every {args.eval_epochs} epochs"),
        ("an epoch", f"{pictures:,} pictures on one process, in batches of {args.sample_batch_size}; {updates} update(s)"),
        ("  sampling", f"{pictures * args.num_inference_steps * passes:,} forward passes"),
        ("  training", f"{pictures * trained_steps * passes:,} forward and backward passes, each beside {extra} without gradient"),
        ("steps", f"{args.num_epochs * updates:,} in {args.num_epochs:,} epochs, {args.num_epochs * pictures:,} pictures"),
        ("compute", f"{_flops(each * pictures)} per epoch, {_total(each * pictures * args.num_epochs)}, at {tokens} text tokens"),
        ("  a picture", f"{each / forward:.1f} forward passes' worth; decoding and scoring come on top"),
        ("checkpoints", _checkpoints(args, trained, written, args.num_epochs // args.checkpointing_epochs, averages=other_passes)),
        _cache_row(args, "text", len(texts), len(texts) * (entry + ENTRY_BYTES)),
        *(("needed", text) for text in rewards.lacking(args)),
    ]  # fmt: skip
    _print(rows)


def show_reward_gradient(
    args: argparse.Namespace, *, adapt: Callable[[nn.Module], None], whole: Whole | None, family: ModuleType, rollout_steps: float,
    trained_steps: int, recomputed: bool,
) -> None:  # fmt: skip
    """Print the plan of a run that follows the gradient of a reward.

    Args:
        adapt, whole: as for `show`.
        rollout_steps: denoising steps of a picture without gradient, on average; trained_steps: with gradient; recomputed: these once more.

    Raises:
        SystemExit: the prompts, or the pictures of the pre-training loss, cannot be read.
    """
    runtime.quieten_libraries()
    with runtime.refusals():
        path, found, pretraining = args.pretrained_model_name_or_path, rewards.read_prompts(args), inputs.open_pretraining(args)
    denoiser = family.denoiser_from_config(path, args.revision)
    with runtime.refusals():
        adapt(denoiser)
    trained, tokens = sum(p.numel() for p in denoiser.parameters() if p.requires_grad), text_tokens(args, family)
    counts, batch = family.parameter_counts(path, args.revision), args.train_batch_size * args.gradient_accumulation_steps
    weights = memory.weight_bytes(counts, denoiser, BYTES[args.mixed_precision], family.DENOISER) | {"vae": counts["vae"] * 4}
    if whole:
        weights |= memory.weight_bytes({part: counts[part] for part in whole.parts}, denoiser, whole.weight, family.DENOISER)
    trained_bytes = trained * memory.per_trained_parameter(args, whole)

    passes = 2 if args.guidance_scale > 1 else 1
    known = dict(weights=weights, trained=trained, tokens=tokens, whole=whole, family=family)
    peak, decoding = memory.reward_gradient_memory(args, denoiser, sd15.vae_from_config(path, args.revision), **known)
    forward, step = step_flops(denoiser, args.resolution, tokens, checkpointing=memory.checkpoint_every(args), family=family)
    each = passes * (rollout_steps * forward + trained_steps * (step + recomputed * forward)) + (step if pretraining else 0)
    rate = optim.learning_rate(args.learning_rate, args.scale_lr, batch)
    sampler = prompts.GroupSampler(found.training, group_size=1, batch_size=args.train_batch_size, seed=args.seed or 0,
                                   batches_per_epoch=args.gradient_accumulation_steps, world=policy.processes())  # fmt: skip
    texts = {"", *sampler.drawn(args.max_train_steps), *found.evaluated}
    width, pooled = family.text_width(denoiser.config)
    rows = _model_rows(args, counts, weights, trained, trained_bytes, whole) + [
        _activation_row(args, peak, f"{passes * args.train_batch_size} picture(s)"),
        ("  decoding", f"{_size(decoding)}, {min(args.decode_batch_size, args.train_batch_size)} picture(s) at a time"),
        ("memory", _memory(args, weights, peak) + "; scorers come on top"),
        ("prompts", f"{len(found.training):,} of {args.prompts}, {len(found.evaluation):,} evaluated every {args.eval_steps} steps"),
        ("pictures", f"{len(pretraining or []):,} for the pre-training loss"),
        ("steps", f"{args.max_train_steps:,} of {batch} drawn picture(s), one process"),
        ("  a picture", f"{rollout_steps:.3g} denoising steps without gradient, {trained_steps} with, {passes} pass(es) each"),
        ("learning rate", f"{rate:.3g} at its peak, {args.lr_scheduler}, {args.optimizer}"),
        ("compute", f"{_flops(each * batch)} per step, {_total(each * batch * args.max_train_steps)}, at {tokens} text tokens"),
        ("", "decoding and scoring come on top"),
        ("checkpoints", _checkpoints(args, trained, _written(weights, whole), args.max_train_steps // args.checkpointing_steps)),
        _cache_row(args, "text", len(texts), len(texts) * ((tokens * width + pooled) * BYTES[args.mixed_precision] + ENTRY_BYTES)),
        *(("needed", text) for text in rewards.lacking(args)),
    ]  # fmt: skip
    _print(rows)


def _model_rows(
    args: argparse.Namespace, counts: dict[str, int], weights: dict[str, int], trained: int, trained_bytes: float, whole: Whole | None
) -> list[tuple[str, str]]:
    rows = [("model", args.pretrained_model_name_or_path)]
    for part, count in counts.items():
        rows.append((f"  {part}", f"{count:>15,} parameters  {_size(weights[part]):>9}  {_residence(args, part)}"))
    return rows + [("trained", f"{trained:>15,} parameters  {_size(trained_bytes):>9}  {_state(args, whole)}")]


def _cache_row(args: argparse.Namespace, name: str, entries: int, size: int) -> tuple[str, str]:
    return f"{name} cache", f"{entries:,} entries, {_size(size)} in {args.cache_dir} (what is there already is used again)"


def _print(rows: list[tuple[str, str]]) -> None:
    wide = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{wide}}  {value}".rstrip() for name, value in rows))
    print("dry run: no weights were read, nothing was trained")


def _samples(samples: Any, held_out: Any) -> str:
    ties = f", {samples.ties:,} ties dropped" if hasattr(samples, "ties") else ""
    return f"{len(samples):,} to train on, {len(held_out or [])} held out, {len(samples.skipped)} skipped{ties}"


# --------------------------------------------------------------------------- how it reads, row by row


def _state(args: argparse.Namespace, whole: Whole | None) -> str:
    held = [] if whole else ["weights"]
    held += ["gradients"] if whole is None or whole.gradient else []
    return ", ".join([*held, f"{args.optimizer} state" + (" and EMA" if args.use_ema else "")])


def _residence(args: argparse.Namespace, part: str) -> str:
    return "only while the text cache is filled" if memory.leaves(args, part) else ""


def _activation_row(args: argparse.Namespace, step: StepMemory, what: str) -> tuple[str, str]:
    math = "; products of attention, which _native_math keeps, come on top" if args.attention_backend == "_native_math" else ""
    return "activations", f"{_size(step.kept)} kept of {what}, {_size(step.working)} more in the backward pass{math}"


def _memory(args: argparse.Namespace, weights: dict[str, int], step: StepMemory) -> str:
    """The two high points, of tensors alone: CUDA itself takes about half a gigabyte more."""
    text = sum(size for part, size in weights.items() if part.startswith("text"))
    filling = f"{_size(text)} while the text cache is filled, " if any(memory.leaves(args, part) for part in weights) else ""
    return f"{filling}{_size(step.peak)} ({step.peak / 2**30:.1f} GiB) at the peak of a step{', uncompiled' if step.uncompiled else ''}"


def _checkpoints(args: argparse.Namespace, trained: int, modules: int | None, due: int, averages: int = 0) -> str:
    """What they take on the disk.

    Args:
        trained: number of parameters; modules: bytes of the parts that are trained themselves and written whole, with what is frozen of
            them and their buffers; None: an adapter is trained. due: how many the run writes; averages: of what is trained, besides
            --use_ema.
    """
    size = trained * (STATE_BYTES[args.optimizer] + EMA_BYTES * (args.use_ema + averages))
    # An adapter is there twice, once more for other programs, and so is its average.
    size += trained * (8 + 4 * args.use_ema) if modules is None else modules
    due = max(due, 1)  # a run that is told to stop writes one in any case
    kept = min(due, args.checkpoints_total_limit or due)
    most = kept + (due > kept)  # the new one is whole before the oldest goes
    folder = args.output_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return f"{_size(size)} each, {_size(size * most)} of the {most} there at most; {_size(free)} are free"


def _written(weights: dict[str, int], whole: Whole | None) -> int | None:
    """Bytes of the parts that a checkpoint holds whole."""
    return sum(weights[part] for part in whole.parts) if whole else None


def cache_bytes(
    args: argparse.Namespace, samples: Any, held_out: Any, denoiser: nn.Module, tokens: int, family: ModuleType = sd3,
    subject: Subject | None = None,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """Entries and bytes of the latent and the text cache, those that the flags ask for.

    Args:
        samples, held_out: opened pictures or pairs; subject: its class pictures count as squares.
    """
    config, number, found = denoiser.config, BYTES[args.mixed_precision], {}
    shapes = buckets.buckets(args.resolution, aspect_buckets=args.aspect_buckets)
    if args.cache_latents:
        keyed = {}  # pictures that are in the data set twice are cached once; only what is trained on is mirrored
        for part, copies in ((samples, 1 if args.no_hflip else 2), (held_out, 1)):
            for record in part.records if part else ():
                first, *others = (record.winner, record.loser) if hasattr(record, "winner") else (record,)  # a pair has one size
                size = buckets.assign(first.width, first.height, shapes)
                for picture in (first, *others):
                    keyed[picture.key, size] = max(copies, keyed.get((picture.key, size), 0))
        for i in range(subject.class_images if subject else 0):
            keyed[f"class {i}", (args.resolution, args.resolution)] = 1 if args.no_hflip else 2
        value = 2 * config["in_channels"] * number  # bytes per latent: mean and standard deviation
        sizes = [copies * (value * h * w // family.VAE_SCALE**2 + ENTRY_BYTES) for (_, (h, w)), copies in keyed.items()]
        found["latent"] = (sum(keyed.values()), sum(sizes))
    if args.cache_text:
        prompts = {"", *inputs.validation_prompts(args), *(subject.class_prompts if subject else ())}
        prompts |= {record.prompt for part in (samples, held_out) if part for record in part.records}
        width, pooled = family.text_width(config)
        found["text"] = (len(prompts), len(prompts) * ((tokens * width + pooled) * number + ENTRY_BYTES))
    return found


def text_tokens(args: argparse.Namespace, family: ModuleType = sd3) -> int:
    """L, of all text encoders."""
    return family.text_tokens(args.pretrained_model_name_or_path, args.revision, getattr(args, "max_sequence_length", None))


# --------------------------------------------------------------------------- what it costs


def sample_flops(family: ModuleType, denoiser: nn.Module, args: argparse.Namespace, tokens: int, preference: Preference | None) -> int:
    """Of one sample in an optimizer step: a picture; or a pair, with the reference's forward passes (without one, its winner alone)."""
    forward, step = step_flops(denoiser, args.resolution, tokens, checkpointing=memory.checkpoint_every(args), family=family)
    return 2 * (step + forward) if preference and preference.reference else step


def step_flops(denoiser: nn.Module, resolution: int, tokens: int, *, checkpointing: int = 0, family: ModuleType = sd3) -> tuple[int, int]:
    """Floating-point operations (a multiply-add is two) of one picture: of its forward pass, and of forward and backward pass together.

    Counted on the meta device, because no fixed multiple of the forward pass is right: frozen weights need no gradient, so the backward
    pass of a linear layer costs one forward, but that of attention costs 2.5. A LoRA of SD3.5-medium comes to 2.13 forwards at 512 px and
    2.37 at 1024.

    Args:
        denoiser: on the meta device, with the parameters trainable that are trained.
        tokens: L, of all text encoders.
        checkpointing: every how many blocks one runs forward twice (the few layers outside of them counted as blocks are); 0: none.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        prediction = denoiser(**family.example_inputs(denoiser.config, resolution // family.VAE_SCALE, tokens), return_dict=False)[0]
        forward = counter.get_total_flops()
        prediction.sum().backward()
    denoiser.zero_grad()
    blocks = speed.blocks(denoiser)
    again = len(blocks[::checkpointing]) / len(blocks) if checkpointing else 0
    return forward, counter.get_total_flops() + round(again * forward)


# --------------------------------------------------------------------------- how it reads


def _size(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.1f} kB"


def _total(count: float) -> str:
    """FLOPs of a run, and how long they take at least: without reading, encoding, validation, saving."""
    minutes = count / RATE / 60
    text = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.0f} min" if minutes >= 1 else "less than a minute"
    return f"{_flops(count)} in all ({text} at {RATE / 1e12:.0f} TFLOP/s)"


def _flops(count: float) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP")) if count >= unit), (1e9, "GFLOP"))
    return f"{count / unit:.3g} {name}"
