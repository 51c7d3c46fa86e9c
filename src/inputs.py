"""What a trainer feeds on, from its arguments: captioned pictures, preference pairs or prompts, with buckets, caches and batches.

`family` is the module of the model: `pipelines.sd3`, or `pipelines.sd15` for Stable Diffusion 1.x, 2.x and XL.
Encoders are loaded only when something is missing from a cache, and leave memory as soon as it is filled: T5-XXL alone is 9.5 GB.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from src import runtime, seeds
from src.data import buckets, cache, captions, preferences, samples
from src.pipelines import sd3

MAX_HELD_OUT = 16  # pictures of the validation loss, if its number is not given: one in twenty, no more than these
MAX_HELD_OUT_PAIRS = 64  # likewise: an accuracy needs more samples than a loss


@dataclass(frozen=True)
class Inputs:
    """The opened data set with its plan and caches.

    Attributes:
        family: module of the model's family.
        model: what the run still needs besides the denoiser: the VAE, and the text encoders if there is no text cache.
        training, held_out: samples to train on, and those kept for the validation loss (never flipped, caption never dropped).
        plan: which samples make up which optimizer step.
        sequence_length: tokens of SD3's T5, or of SD1.5's CLIP; the same in training and validation.
    """

    run: runtime.Run
    family: ModuleType
    model: Any
    training: samples.Samples
    held_out: samples.Samples
    plan: buckets.Plan
    text: cache.TensorCache | None
    sequence_length: int

    def batches(self, first_step: int) -> Iterator[samples.Batch]:
        """This process's micro-batches from optimizer step `first_step` on, `gradient_accumulation_steps` of them per step."""
        args, run = self.run.args, self.run
        sampler = buckets.StepSampler(
            self.plan, batch_size=args.train_batch_size, accumulation=args.gradient_accumulation_steps,
            rank=run.rank, world=run.world, start_step=first_step, max_steps=args.max_train_steps,
        )  # fmt: skip
        return iter(samples.loader(self.training, sampler, num_workers=args.dataloader_num_workers, pin_memory=run.device.type == "cuda"))

    @torch.no_grad()
    def encode(self, batch: samples.Batch, seed: int, step: int, *, train_text: bool = False) -> tuple[Tensor, sd3.Conditioning]:
        """A batch as the denoiser takes it: latents (b, C, h, w) drawn from the posterior and scaled, and the conditioning.

        Of pairs (b, 2, C, h, w), the winner first. The draw depends on (seed, step, position) alone, so cached and encoded latents are
        the same.

        Args:
            train_text: let gradients flow into the text encoders; takes a run without the text cache.
        """
        batch, family = batch.to(self.run.device), self.family
        mean, std = (batch.latent_mean, batch.latent_std) if batch.pixels is None else self._posterior(batch.pixels)
        noise = seeds.normal(seed, step, batch.positions, "posterior", mean.shape[1:], mean.device)
        x0 = family.scale_latents(self.model, family.sample_posterior(mean, std, noise))  # (b, C, h, w)
        if train_text:
            with torch.enable_grad(), self.run.accelerator.autocast():
                return x0, family.encode_prompts(self.model, batch.prompts, self.sequence_length)
        return x0, self.condition(batch.prompts) if batch.embeds is None else family.Conditioning(batch.embeds, batch.pooled)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pictures (b, 3, H, W) or pairs (b, 2, 3, H, W), in the same order."""
        encoded = self.family.encode_images(self.model, pixels.flatten(0, -4))
        return tuple(part.unflatten(0, pixels.shape[:-3]) for part in encoded)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> sd3.Conditioning:
        """Embeddings of prompts, from the cache or from the resident encoders: embeds (b, L, D), pooled (b, P)."""
        if self.text is None:
            return self.family.encode_prompts(self.model, prompts, self.sequence_length)
        return _cached(self.text, prompts, self.run.device, self.family)


def check(args: argparse.Namespace, family: ModuleType = sd3) -> None:
    """Refuse a model or a data set that cannot be trained on, reading small files only.

    Raises:
        ValueError: naming the flag and the cure.
    """
    _check_model(args, family)
    captions.check_source(args.dataset_name, image_column=args.image_column, caption_column=args.caption_column)


def check_pairs(args: argparse.Namespace, family: ModuleType) -> None:
    """As `check`, of a data set of preference pairs."""
    _check_model(args, family)
    preferences.check_source(args.dataset_name, _columns(args))


def _check_model(args: argparse.Namespace, family: ModuleType) -> None:
    family.check_folder(args.pretrained_model_name_or_path)
    family.check_resolution(args.pretrained_model_name_or_path, args.resolution)
    file = getattr(args, "validation_prompts_file", None)
    if file and not validation_prompts(args):
        raise ValueError(f"--validation_prompts_file {file} holds no prompt; one per line")


def _columns(args: argparse.Namespace) -> preferences.Columns:
    return preferences.Columns(args.chosen_column, args.rejected_column, args.label_column, args.caption_column)


def check_pretraining(args: argparse.Namespace, family: ModuleType) -> None:
    """As `check`, of captioned pictures that may be left out: those of --pretrain_dataset_name."""
    _check_model(args, family)
    if args.pretrain_dataset_name:
        with _flag_renamed():
            captions.check_source(args.pretrain_dataset_name, image_column=args.image_column, caption_column=args.caption_column)


def open_pretraining(args: argparse.Namespace, *, progress: bool) -> captions.CaptionedImages | None:
    """The pictures of --pretrain_dataset_name, None without; raises as `open_images`."""
    if args.pretrain_dataset_name is None:
        return None
    with _flag_renamed():
        return open_images(args, progress=progress)[0]


def _dataset(args: argparse.Namespace) -> str:
    """The captioned pictures: of --dataset_name, or in a script that can do without them of --pretrain_dataset_name."""
    return getattr(args, "dataset_name", None) or getattr(args, "pretrain_dataset_name", None)


@contextlib.contextmanager
def _flag_renamed() -> Iterator[None]:
    """Refusals inside name the flag that the pictures were given by."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--dataset_name", "--pretrain_dataset_name")) from error


def open_images(args: argparse.Namespace, *, progress: bool) -> tuple[captions.CaptionedImages, captions.CaptionedImages | None]:
    """The pictures to train on, and those held out for the validation loss (None if there are none).

    Raises:
        ValueError: the data set cannot be read, or nothing is left to train on.
    """
    images = captions.open_captioned(
        _dataset(args), image_column=args.image_column, caption_column=args.caption_column, cache_dir=args.cache_dir,
        max_train_samples=args.max_train_samples, strict=args.strict_data, revision=args.dataset_revision, progress=progress,
    )  # fmt: skip
    wanted = getattr(args, "num_validation_loss_images", 0)
    count = min(MAX_HELD_OUT, len(images) // 20) if wanted is None else wanted
    if count == 0:
        return images, None
    try:
        return images.hold_out(count)
    except ValueError as error:
        raise ValueError(f"--num_validation_loss_images {count}: {error}; lower it") from error


def open_pairs(args: argparse.Namespace, *, progress: bool) -> tuple[preferences.PreferencePairs, preferences.PreferencePairs | None]:
    """The preference pairs to train on, and those held out for the implicit accuracy (None if there are none); raises as `open_images`."""
    pairs = preferences.open_preferences(
        args.dataset_name, _columns(args), cache_dir=args.cache_dir, max_train_samples=args.max_train_samples, strict=args.strict_data,
        revision=args.dataset_revision, progress=progress,
    )  # fmt: skip
    wanted = args.num_validation_pairs
    count = min(MAX_HELD_OUT_PAIRS, len(pairs) // 20) if wanted is None else wanted
    if count == 0:
        return pairs, None
    try:
        return pairs.hold_out(count)
    except ValueError as error:
        raise ValueError(f"--num_validation_pairs {count}: {error}; lower it") from error


def validation_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of --validation_prompt and --validation_prompts_file, in order, each once."""
    prompts, file = list(getattr(args, "validation_prompt", None) or []), getattr(args, "validation_prompts_file", None)
    if file:
        prompts += [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    return list(dict.fromkeys(prompts))


def prepare(run: runtime.Run, args: argparse.Namespace, family: ModuleType = sd3) -> Inputs:
    """Open the data set, lay out the steps, fill the caches.

    Raises:
        ValueError: what `open_images` refuses.
    """
    with run.accelerator.main_process_first():  # one download and one scan; the others find the result on disk
        train, held_out = open_images(args, progress=run.is_main)
    parts = [train, held_out or train.subset([])]
    return _assemble(run, args, family, samples.Samples, parts, parts, "pictures")


def prepare_pretraining(run: runtime.Run, args: argparse.Namespace, family: ModuleType) -> Inputs | None:
    """The same for the pictures of --pretrain_dataset_name, all of which are trained on; None without."""
    if args.pretrain_dataset_name is None:
        return None
    with _flag_renamed():
        return prepare(run, args, family)


def prepare_pairs(run: runtime.Run, args: argparse.Namespace, family: ModuleType) -> Inputs:
    """The same for preference pairs, whose pictures share a bucket: that of the winner's shape.

    Raises:
        ValueError: what `open_pairs` refuses.
    """
    with run.accelerator.main_process_first():
        train, held_out = open_pairs(args, progress=run.is_main)
    parts = [train, held_out or train.subset([])]
    return _assemble(run, args, family, preferences.PairSamples, parts, [part.pictures for part in parts], "pairs")


def _assemble(
    run: runtime.Run, args: argparse.Namespace, family: ModuleType, kind: type[samples.Samples], parts: list[Any],
    pictures: list[captions.CaptionedImages], name: str,
) -> Inputs:  # fmt: skip
    """Buckets, plan and caches of the samples to train on and those held out.

    Args:
        parts: what is one sample each, with `records`; pictures: theirs, equally many (one, or two) for each sample, in the same order.
        name: of a sample, in the line that is printed.
    """
    shapes = buckets.buckets(args.resolution, aspect_buckets=args.aspect_buckets)
    each = len(pictures[0]) // len(parts[0])  # pictures of a sample
    sizes = [[buckets.assign(one.width, one.height, shapes) for one in part.records[::each]] for part in pictures]
    plan = buckets.Plan(sizes[0], args.train_batch_size * run.world * args.gradient_accumulation_steps, args.seed)
    run.print(
        f"{len(parts[0])} {name} to train on in {len(plan.members)} bucket(s), {len(parts[1])} held out; "
        f"an epoch is {plan.steps_per_epoch} step(s) of {plan.global_batch}"
    )

    path, length = args.pretrained_model_name_or_path, getattr(args, "max_sequence_length", None)
    length = family.default_sequence_length(path, args.revision) if length is None else length
    prompts = ["", *validation_prompts(args), *(record.prompt for part in parts for record in part.records)]
    text = _text_cache(run, args, family, prompts, length) if getattr(args, "cache_text", True) else None
    resident = ("vae",) if text else ("vae", "text")
    model = family.load(path, revision=args.revision, variant=args.variant, dtype=run.weight_dtype, device=run.device, parts=resident)
    picture_sizes = [[size for size in part for _ in range(each)] for part in sizes]
    latents = _latent_cache(run, args, family, pictures, picture_sizes, model) if args.cache_latents else None
    common = {"seed": args.seed, "latents": latents, "text": text}
    return Inputs(
        run=run, family=family, model=model, plan=plan, text=text, sequence_length=length,
        training=kind(
            parts[0], sizes[0], caption_dropout=args.caption_dropout, random_crop=args.random_crop, flip=not args.no_hflip, **common
        ),
        held_out=kind(parts[1], sizes[1], **common),
    )  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Embeddings of prompts that were encoded before; no text encoder is in memory any more."""

    cache: cache.TensorCache
    device: torch.device
    family: ModuleType

    def condition(self, prompts: list[str]) -> sd3.Conditioning:
        """embeds (b, L, D), pooled (b, P), read from the disk, which is little beside a denoising step."""
        return _cached(self.cache, prompts, self.device, self.family)


def prepare_texts(run: runtime.Run, args: argparse.Namespace, prompts: list[str], family: ModuleType = sd3) -> Texts:
    """Encode every prompt that no earlier run has encoded."""
    path, length = args.pretrained_model_name_or_path, getattr(args, "max_sequence_length", None)
    length = family.default_sequence_length(path, args.revision) if length is None else length
    return Texts(_text_cache(run, args, family, prompts, length), run.device, family)


def _cached(text: cache.TensorCache, prompts: list[str], device: torch.device, family: ModuleType) -> sd3.Conditioning:
    entries = {prompt: text.read(prompt) for prompt in dict.fromkeys(prompts)}  # a group has one prompt, many times
    embeds, pooled = (torch.stack([entries[prompt][name] for prompt in prompts]) for name in ("embeds", "pooled"))
    return family.Conditioning(embeds, pooled).to(device)


def _fingerprint(args: argparse.Namespace, *folders: str) -> str:
    """What identifies these parts of the base model: their content, wherever the folder lies, or a Hub id with its commit."""
    path = Path(args.pretrained_model_name_or_path)
    if path.is_dir():
        return cache.folder_fingerprint(path, [folder for folder in folders if (path / folder).is_dir()])
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(str(path), revision=args.revision, allow_patterns="model_index.json")  # .../snapshots/COMMIT
    return f"{path}@{Path(snapshot).name}"


def _text_cache(run: runtime.Run, args: argparse.Namespace, family: ModuleType, prompts: list[str], length: int) -> cache.TensorCache:
    """Cache of embeds (L, D) and pooled (P,) by prompt; the encoders are loaded only for what is missing, then dropped."""
    folders = [f"{kind}{number}" for kind in ("tokenizer", "text_encoder") for number in ("", "_2", "_3")]
    encoders, dtype = _fingerprint(args, *folders), str(run.weight_dtype)
    store = cache.TensorCache(
        args.cache_dir, "text", {"encoders": encoders, "variant": args.variant, "sequence_length": length, "dtype": dtype}
    )
    if store.missing(prompts):
        encoders = family.load(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=run.weight_dtype, device=run.device,
            parts=("text",),
        )  # fmt: skip

        @torch.no_grad()
        def encode(batch: list[str]) -> tuple[Tensor, Tensor]:
            condition = family.encode_prompts(encoders, batch, length)
            return condition.embeds, condition.pooled

        samples.fill_text(store, prompts, encode, batch_size=args.cache_batch_size, rank=run.rank, world=run.world, progress=run.is_main)
        family.unload_text_encoders(encoders)
    run.barrier()  # every process has written its share
    return store


def _latent_cache(
    run: runtime.Run, args: argparse.Namespace, family: ModuleType, parts: list[captions.CaptionedImages],
    sizes: list[list[tuple[int, int]]], model: Any,
) -> cache.TensorCache:  # fmt: skip
    """Cache of posterior mean and std (C, h, w) by picture, bucket and orientation; mirrored ones only of what training flips."""
    described = {"vae": _fingerprint(args, "vae"), "variant": args.variant, "dtype": str(run.weight_dtype)}
    store = cache.TensorCache(args.cache_dir, "latents", described)

    @torch.no_grad()
    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return family.encode_images(model, pixels)

    for part, part_sizes, flip in zip(parts, sizes, (not args.no_hflip, False), strict=True):  # the held-out part is never flipped
        samples.fill_latents(
            store, part, part_sizes, flip=flip, encode=encode, batch_size=args.cache_batch_size, rank=run.rank, world=run.world,
            progress=run.is_main,
        )  # fmt: skip
    run.barrier()
    return store
