"""The inputs of a trainer, from its arguments: captioned pictures, preference pairs or prompts, with buckets, caches and batches.

`family` is the module of the model: `pipelines.sd3`, or `pipelines.sd15` for Stable Diffusion 1.x, 2.x and XL.
Encoders are loaded only when something is missing from a cache, and leave memory as soon as it is filled: T5-XXL alone is 9.5 GB.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from src import runtime, seeds
from src.data import buckets, cache, captions, preferences, samples, sources
from src.data.prompts import read_file
from src.pipelines import common, sd3

TEXT_FOLDERS = tuple(f"{kind}{number}" for kind in ("tokenizer", "text_encoder") for number in ("", "_2", "_3"))
MAX_HELD_OUT = 16  # pictures for the validation loss by default: one in twenty, at most these
MAX_HELD_OUT_PAIRS = 64  # likewise: an accuracy needs more samples than a loss
SHARED = Path("/dev/shm")  # where workers put their batches; 64 MiB in a container by default
PREFETCHED = 2  # batches that a worker holds ready, torch's default


@dataclass(frozen=True)
class Inputs:
    """The opened data set with its order and caches.

    Attributes:
        family: module of the model's family.
        encoders: the model without its denoiser: the VAE, and those text encoders that the text cache does not replace.
        training, held_out: samples to train on, and those kept for the validation loss (never flipped, caption never dropped).
        order: which samples make up which optimizer step.
        sequence_length: tokens of SD3's T5, or of SD1.5's CLIP; the same in training and validation.
        first_position: position of a step's first sample; above 0 in a second data set of the run.
    """

    run: runtime.Run
    family: ModuleType
    encoders: Any
    training: samples.Samples
    held_out: samples.Samples
    order: buckets.Order
    text: cache.TensorCache | None
    sequence_length: int
    first_position: int = 0

    @property
    def identity(self) -> Identity:
        """Which samples are trained on, as a part of a checkpoint."""
        return Identity(self.run, self.training.images.records)

    def batches(self, first_step: int) -> Iterator[samples.Batch]:
        """This process's micro-batches from optimizer step `first_step` on, `gradient_accumulation_steps` a step, on its device."""
        args, run = self.run.args, self.run
        sampler = buckets.StepSampler(
            self.order, batch_size=args.train_batch_size, accumulation=args.gradient_accumulation_steps,
            rank=run.rank, world=run.world, start_step=first_step, max_steps=args.max_train_steps, first_position=self.first_position,
        )  # fmt: skip
        loader = samples.loader(self.training, sampler, num_workers=args.dataloader_num_workers, pin_memory=run.device.type == "cuda")
        return (batch.to(run.device) for batch in loader)

    @torch.no_grad()
    def encode(self, batch: samples.Batch, seed: int, step: int, *, train_text: bool = False) -> tuple[Tensor, sd3.Conditioning]:
        """A batch as the denoiser takes it: latents (b, C, h, w) drawn from the posterior and scaled, and the conditioning.

        For pairs (b, 2, C, h, w), the winner first. The draw depends on (seed, step, position) alone, so cached and encoded latents are
        the same.

        Args:
            train_text: let gradients flow into the text encoders, which must be resident.
        """
        batch, family = batch.to(self.run.device), self.family
        mean, std = (batch.latent_mean, batch.latent_std) if batch.pixels is None else self._posterior(batch.pixels)
        noise = seeds.normal(seed, step, batch.positions, "posterior", mean.shape[1:], mean.device)
        x0 = family.scale_latents(self.encoders, family.sample_posterior(mean, std, noise))  # (b, C, h, w)
        cached = None if batch.embeds is None else family.Conditioning(batch.embeds, batch.pooled)
        if train_text:
            with torch.enable_grad(), self.run.accelerator.autocast():
                return x0, self._by_residents(batch.prompts, cached)
        return x0, self._by_residents(batch.prompts, cached)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of pictures (b, 3, H, W) or pairs (b, 2, 3, H, W), in the same order."""
        encoded = self.family.encode_images(self.encoders, pixels.flatten(0, -4))
        return tuple(part.unflatten(0, pixels.shape[:-3]) for part in encoded)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> sd3.Conditioning:
        """Embeddings of prompts, from the cache or from the resident encoders: embeds (b, L, D), pooled (b, P)."""
        cached = None if self.text is None else Texts(self.text, self.run.device, self.family).condition(prompts)
        return self._by_residents(prompts, cached)

    def _by_residents(self, prompts: list[str], cached: sd3.Conditioning | None) -> sd3.Conditioning:
        """Conditioning by the resident text encoders, T5's tokens from `cached` if given; `cached` itself if none is resident."""
        if not self.encoders.text_encoders:
            return cached
        known = {} if cached is None else {"t5_tokens": cached.embeds[:, self.family.clip_length(self.encoders) :]}
        return self.family.encode_prompts(self.encoders, prompts, self.sequence_length, **known)


class Identity:
    """A part of a checkpoint: number and hash of a run's samples in their order. A run resumed with other samples prints one line.

    Saved in a file of its own, which older checkpoints lack.
    """

    FILE = "data.json"

    def __init__(self, run: runtime.Run, records: list[captions.Record | preferences.Pair]):
        digest = hashlib.sha256()
        for one in records:
            pictures = (one.winner, one.loser) if isinstance(one, preferences.Pair) else (one,)
            digest.update(json.dumps([*(picture.key for picture in pictures), one.prompt]).encode())
        self.run, self.here = run, {"samples": len(records), "sha256": digest.hexdigest()}

    def state_dict(self) -> dict[str, int | str]:
        return self.here

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        if state and state != self.here:
            before, now = state["samples"], self.here["samples"]
            equal = f"{now} samples as before, but other pictures, captions or another order"
            what = equal if now == before else f"{now} samples to train on, {before} before"
            self.run.print(f"the data set is not the checkpoint's: {what}")

    def write_files(self, folder: Path, state: dict[str, int | str]) -> None:
        (folder / self.FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def read_files(self, folder: Path) -> dict[str, int | str]:
        """Empty for an older checkpoint, without this file."""
        file = folder / self.FILE
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check(args: argparse.Namespace, family: ModuleType = sd3, *, captioned: bool = True) -> None:
    """Refuse a model or a data set that cannot be trained on, reading small files only.

    Args:
        captioned: pictures need captions of their own.

    Raises:
        ValueError: naming the flag and the cure.
    """
    _check_model(args, family)
    check_shared_memory(args, family)
    captions.check_source(args.dataset_name, image_column=args.image_column, caption_column=args.caption_column, captioned=captioned)


def check_pairs(args: argparse.Namespace, family: ModuleType) -> None:
    """As `check`, for a data set of preference pairs."""
    _check_model(args, family)
    check_shared_memory(args, family, pictures=2)
    preferences.check_source(args.dataset_name, _columns(args))


def _check_model(args: argparse.Namespace, family: ModuleType) -> None:
    family.check_folder(args.pretrained_model_name_or_path)
    family.check_resolution(args.pretrained_model_name_or_path, args.resolution)
    validation_prompts(args)


def check_shared_memory(args: argparse.Namespace, family: ModuleType, pictures: int = 1) -> None:
    """Refuse workers whose batches exceed shared memory: after the caches are filled, they would be killed, or the run would hang.

    A Hub id passes, since nothing is downloaded yet, and so does --dry_run, since the run may be meant for another machine.

    Args:
        pictures: number of pictures in a sample.

    Raises:
        ValueError: naming --dataloader_num_workers and how many there may be.
    """
    path, workers = args.pretrained_model_name_or_path, args.dataloader_num_workers
    if args.dry_run or not workers or not SHARED.is_dir() or common.is_hub_id(path):
        return
    config, number = common.read_config(path, f"{family.DENOISER}/config.json"), runtime.WEIGHT_DTYPES[args.mixed_precision].itemsize
    latents = 2 * config["in_channels"] * number * args.resolution**2 // family.VAE_SCALE**2  # mean and standard deviation
    sample = pictures * (latents if args.cache_latents else 3 * 4 * args.resolution**2)
    if getattr(args, "cache_text", True):
        width, pooled = family.text_width(config)
        sample += (family.text_tokens(path, None, getattr(args, "max_sequence_length", None)) * width + pooled) * number

    world = int(os.environ.get("WORLD_SIZE", 1))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", min(world, torch.accelerator.device_count() or world)))
    loaders = 2 if getattr(args, "with_prior_preservation", False) else 1  # of the subject, and of its class
    each, free = sample * args.train_batch_size * PREFETCHED * processes * loaders, shutil.disk_usage(SHARED).free
    if workers * each > free:
        raise ValueError(
            f"--dataloader_num_workers {workers}: the batches that they hold ready take {workers * each / 1e6:.0f} MB of /dev/shm, where "
            f"{free / 1e6:.0f} MB are free: in Docker `docker run --shm-size 8g`, or --dataloader_num_workers {free // each}"
        )


def _columns(args: argparse.Namespace) -> preferences.Columns:
    return preferences.Columns(args.chosen_column, args.rejected_column, args.label_column, args.caption_column)


def check_pretraining(args: argparse.Namespace, family: ModuleType) -> None:
    """As `check`, for the optional captioned pictures of --pretrain_dataset_name."""
    _check_model(args, family)
    if args.pretrain_dataset_name:
        check_shared_memory(args, family)
        with sources.naming("--pretrain_dataset_name"):
            captions.check_source(args.pretrain_dataset_name, image_column=args.image_column, caption_column=args.caption_column)


def open_pretraining(args: argparse.Namespace) -> captions.CaptionedImages | None:
    """The pictures of --pretrain_dataset_name, None without that flag; raises as `open_images`."""
    if args.pretrain_dataset_name is None:
        return None
    with sources.naming("--pretrain_dataset_name"):
        return open_images(args)[0]


def _dataset(args: argparse.Namespace) -> str:
    """Source of the captioned pictures: --dataset_name, or --pretrain_dataset_name in scripts where they are optional."""
    return getattr(args, "dataset_name", None) or getattr(args, "pretrain_dataset_name", None)


def open_images(
    args: argparse.Namespace, *, default_prompt: str | None = None
) -> tuple[captions.CaptionedImages, captions.CaptionedImages | None]:
    """The pictures to train on, and those held out for the validation loss (None if there are none).

    Args:
        default_prompt: for pictures without a caption (None: these cannot be used).

    Raises:
        ValueError: the data set cannot be read, or nothing is left to train on.
    """
    images = captions.open_captioned(
        _dataset(args), image_column=args.image_column, caption_column=args.caption_column, cache_dir=args.cache_dir,
        max_train_samples=args.max_train_samples, default_prompt=default_prompt, strict=args.strict_data,
        revision=args.dataset_revision,
    )  # fmt: skip
    wanted = getattr(args, "num_validation_loss_images", 0)
    different = len({record.key for record in images.records})  # a picture may be there several times, with other captions
    count = min(MAX_HELD_OUT, different // 20) if wanted is None else wanted
    if count == 0:
        return images, None
    try:
        return images.hold_out(count)
    except ValueError as error:
        raise ValueError(f"--num_validation_loss_images {count}: {error}; lower it") from error


def open_pairs(args: argparse.Namespace) -> tuple[preferences.PreferencePairs, preferences.PreferencePairs | None]:
    """The preference pairs to train on, and those held out for the implicit accuracy (None if there are none); raises as `open_images`."""
    pairs = preferences.open_preferences(
        args.dataset_name, _columns(args), cache_dir=args.cache_dir, max_train_samples=args.max_train_samples, strict=args.strict_data,
        revision=args.dataset_revision,
    )  # fmt: skip
    wanted = args.num_validation_pairs
    count = min(MAX_HELD_OUT_PAIRS, len(pairs) // 20) if wanted is None else wanted
    if count == 0:
        return pairs, None
    try:
        return pairs.hold_out(count)
    except ValueError as error:
        if wanted is None:  # all pairs of a caption are held out together: there may be only one caption
            return pairs, None
        raise ValueError(f"--num_validation_pairs {count}: {error}; lower it") from error


def validation_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of --validation_prompt and --validation_prompts_file, in order, each once.

    Raises:
        ValueError: the file holds none, or cannot be read.
    """
    found, file = list(getattr(args, "validation_prompt", None) or []), getattr(args, "validation_prompts_file", None)
    if file:
        found += [prompt.text for prompt in read_file(Path(file), "--validation_prompts_file")]
    return list(dict.fromkeys(found))


def prepare(run: runtime.Run, args: argparse.Namespace, family: ModuleType = sd3, *, flag: str = "--dataset_name") -> Inputs:
    """Open the data set that `flag` names, lay out the steps, fill the caches.

    Raises:
        SystemExit: where `open_images` raises ValueError.
    """

    def opened() -> tuple[captions.CaptionedImages, captions.CaptionedImages | None]:
        with sources.naming(flag):
            return open_images(args)

    train, held_out = run.require(opened)  # one download, one scan, and one result for all processes
    parts = [train, held_out or train.subset([])]
    return _prepare(run, args, family, samples.Samples, parts, parts, "pictures")


def prepare_pretraining(run: runtime.Run, args: argparse.Namespace, family: ModuleType) -> Inputs | None:
    """The same for the pictures of --pretrain_dataset_name, all of them trained on; None without that flag."""
    if args.pretrain_dataset_name is None:
        return None
    return prepare(run, args, family, flag="--pretrain_dataset_name")


def prepare_pairs(run: runtime.Run, args: argparse.Namespace, family: ModuleType) -> Inputs:
    """The same for preference pairs; both pictures of a pair use the bucket of the winner's shape.

    Raises:
        SystemExit: where `open_pairs` raises ValueError.
    """
    train, held_out = run.require(lambda: open_pairs(args))
    parts = [train, held_out or train.subset([])]
    return _prepare(run, args, family, preferences.PairSamples, parts, [part.pictures for part in parts], "pairs")


def _prepare(
    run: runtime.Run, args: argparse.Namespace, family: ModuleType, kind: type[samples.Samples], parts: list[Any],
    pictures: list[captions.CaptionedImages], name: str,
) -> Inputs:  # fmt: skip
    """List what was left out, encode the prompts, load the parts that are needed after that, and `assemble`."""
    list_skipped(run, parts[0])
    text = encode_texts(run, args, [record.prompt for part in parts for record in part.records], family)
    path, options = args.pretrained_model_name_or_path, dict(revision=args.revision, variant=args.variant)
    model = family.load(path, **options, dtype=run.weight_dtype, device=run.device, parts=resident(args, text))
    return assemble(run, args, family, kind, parts, pictures, name, model=model, text=text)


def list_skipped(run: runtime.Run, *parts: Any) -> None:
    """Write skipped.txt: what is wrong with each picture or row that is not used; that of an earlier start does not stay."""
    listed, lines = run.output_dir / "skipped.txt", [line for part in parts for line in part.skipped]
    if run.is_main:
        listed.unlink(missing_ok=True)
    if run.is_main and lines:
        listed.write_text("".join(f"{captions.printable(line)}\n" for line in lines), encoding="utf-8")
        run.print(f"what was skipped is listed in {listed}")


def resident(args: argparse.Namespace, text: cache.TensorCache | None) -> tuple[str, ...]:
    """Parts of the model that encode batches: with a text cache T5 is no longer needed, and CLIP only if it is trained."""
    if text is None:
        return ("vae", "text")
    return ("vae", "clip") if getattr(args, "train_text_encoder", False) else ("vae",)


def assemble(
    run: runtime.Run, args: argparse.Namespace, family: ModuleType, kind: type[samples.Samples], parts: list[Any],
    pictures: list[captions.CaptionedImages], name: str, *, model: Any, text: cache.TensorCache | None, first_position: int = 0,
    masks: Callable[[captions.CaptionedImages, list[tuple[int, int]]], list[Tensor]] | None = None,
) -> Inputs:  # fmt: skip
    """Lay out the steps of the samples to train on, and fill the latent cache of these and of the held-out samples.

    Args:
        parts: samples to train on, and held out, with `records`; pictures: theirs in the same order, one or two per sample.
        name: of the samples, in the line that is printed.
        model: with the VAE, and the text encoders that stay resident; text: the cache of the samples' prompts.
        first_position: see `Inputs`.
        masks: (pictures, their sizes (H, W)) -> weights of each picture in the loss, (1, h, w); None: all counts.
    """
    shapes = buckets.buckets(args.resolution, aspect_buckets=args.aspect_buckets)
    each = len(pictures[0]) // len(parts[0])  # pictures of a sample
    sizes = [[buckets.assign(one.width, one.height, shapes) for one in part.records[::each]] for part in pictures]
    loss_masks = [masks(part, part_sizes) if masks else None for part, part_sizes in zip(pictures, sizes, strict=True)]
    stream = "order" if first_position == 0 else "second order"
    order = buckets.Order(sizes[0], args.train_batch_size * run.world * args.gradient_accumulation_steps, args.seed, stream)
    run.print(
        f"{len(parts[0])} {name} to train on in {len(order.members)} bucket(s), {len(parts[1])} held out; "
        f"an epoch is {order.steps_per_epoch} step(s) of {order.global_batch}"
        + (f", which shows {order.repeated} of them again to fill its buckets' last batches" if order.repeated else "")
    )
    picture_sizes = [[size for size in part for _ in range(each)] for part in sizes]
    latents = _latent_cache(run, args, family, pictures, picture_sizes, model) if args.cache_latents else None
    common = {"seed": args.seed, "latents": latents, "text": text}
    return Inputs(
        run=run, family=family, encoders=model, order=order, text=text, sequence_length=sequence_length(args, family),
        first_position=first_position,
        training=kind(
            parts[0], sizes[0], caption_dropout=args.caption_dropout, random_crop=args.random_crop, flip=not args.no_hflip,
            masks=loss_masks[0], **common,
        ),
        held_out=kind(parts[1], sizes[1], masks=loss_masks[1], **common),
    )  # fmt: skip


def sequence_length(args: argparse.Namespace, family: ModuleType = sd3) -> int:
    """Tokens of SD3's T5, or of SD1.5's CLIP: --max_sequence_length, or what the model itself says."""
    length = getattr(args, "max_sequence_length", None)
    return family.default_sequence_length(args.pretrained_model_name_or_path, args.revision) if length is None else length


@dataclass(frozen=True)
class Texts:
    """Embeddings of prompts that were encoded before; no text encoder is in memory any more."""

    cache: cache.TensorCache
    device: torch.device
    family: ModuleType
    _last: list[Any] = field(default_factory=list, init=False, repr=False)  # [prompts, conditioning]

    def condition(self, prompts: list[str]) -> sd3.Conditioning:
        """embeds (b, L, D), pooled (b, P), read from the disk: fast compared with a denoising step.

        Called again with the same prompts, as for each step of a trajectory, it returns the same tensors.
        """
        if self._last[:1] == [prompts]:
            return self._last[1]
        unique = list(dict.fromkeys(prompts))  # a group repeats one prompt: its embedding is sent once
        entries = [self.cache.read(prompt) for prompt in unique]
        stacked = (torch.stack([entry[name] for entry in entries]) for name in ("embeds", "pooled"))
        found = self.family.Conditioning(*(seeds.send(part, self.device) for part in stacked))
        if len(unique) < len(prompts):
            found = found[seeds.send(torch.tensor([unique.index(prompt) for prompt in prompts]), self.device)]
        self._last[:] = [list(prompts), found]
        return found


def prepare_texts(run: runtime.Run, args: argparse.Namespace, prompts: list[str], family: ModuleType = sd3) -> Texts:
    """Encode every prompt that no earlier run has encoded."""
    return Texts(_text_cache(run, args, family, prompts), run.device, family)


def encode_texts(run: runtime.Run, args: argparse.Namespace, prompts: list[str], family: ModuleType = sd3) -> cache.TensorCache | None:
    """The cache with these prompts, the empty one and those of validation; None with --no-cache_text."""
    return _text_cache(run, args, family, ["", *validation_prompts(args), *prompts]) if getattr(args, "cache_text", True) else None


def fingerprint(args: argparse.Namespace, *folders: str) -> str:
    """Identifies these parts of the base model: by the content of a local folder, wherever it lies, or by Hub id and commit.

    Parts that model_index.json leaves out (often T5) do not count: they are not loaded even if their folders exist.
    """
    path = Path(args.pretrained_model_name_or_path)
    if path.is_dir():
        index = common.read_config(path, "model_index.json")
        return cache.folder_fingerprint(path, [folder for folder in folders if common.has_part(index, folder)])
    from huggingface_hub import snapshot_download

    snapshot = snapshot_download(str(path), revision=args.revision, allow_patterns="model_index.json")  # .../snapshots/COMMIT
    return f"{path}@{Path(snapshot).name}"


def _one_line_if_it_fails(fill: Callable[..., cache.TensorCache]) -> Callable[..., cache.TensorCache]:
    """If an entry cannot be written or is not finite, the program ends with one line; entries written so far are not computed again."""

    @functools.wraps(fill)
    def filled(run: runtime.Run, args: argparse.Namespace, *rest: Any) -> cache.TensorCache:
        try:
            return fill(run, args, *rest)
        except cache.Unwritable as error:
            raise SystemExit(f"error: --cache_dir {args.cache_dir}: {error.strerror}; make room there, or choose another folder") from error
        except cache.NotFinite as error:
            raise SystemExit(f"error: {error}") from error

    return filled


@_one_line_if_it_fails
def _text_cache(run: runtime.Run, args: argparse.Namespace, family: ModuleType, prompts: list[str]) -> cache.TensorCache:
    """Cache of embeds (L, D) and pooled (P,) by prompt; the encoders are loaded only if prompts are missing, then dropped."""
    length = sequence_length(args, family)
    described = {"encoders": fingerprint(args, *TEXT_FOLDERS), "variant": args.variant, "sequence_length": length}
    store = cache.TensorCache(args.cache_dir, "text", described | {"dtype": str(run.weight_dtype)})
    if missing := store.missing(prompts):
        encoders = family.load(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=run.weight_dtype, device=run.device,
            parts=("text",),
        )  # fmt: skip
        t5 = any(encoder is not None for encoder in encoders.text_encoders[2:])
        if run.is_main and (note := common.long_prompts(encoders.tokenizers[0], missing, t5=t5)):
            run.print(note)

        @torch.no_grad()
        def encode(batch: list[str]) -> tuple[Tensor, Tensor]:
            condition = family.encode_prompts(encoders, batch, length)
            return condition.embeds, condition.pooled

        samples.fill_text(store, prompts, encode, batch_size=args.cache_batch_size, rank=run.rank, world=run.world, progress=run.is_main)
        family.unload_text_encoders(encoders)
    run.barrier()  # every process has written its share
    return store


@_one_line_if_it_fails
def _latent_cache(
    run: runtime.Run, args: argparse.Namespace, family: ModuleType, parts: list[captions.CaptionedImages],
    sizes: list[list[tuple[int, int]]], model: Any,
) -> cache.TensorCache:  # fmt: skip
    """Cache of posterior mean and std (C, h, w) by picture, bucket and orientation; mirrored only for pictures that training flips."""
    described = {"vae": fingerprint(args, "vae"), "variant": args.variant, "dtype": str(run.weight_dtype)}
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
