"""The torch data set of a fine-tuning run: a `Key` in, a sample out, independent of the numbers of processes and workers.

The random choices of a sample (crop, flip, caption dropout) depend on (seed, step, position) alone, and are the same with and
without caches. Cached latents are found by the picture's content and embeddings by the prompt, never by an index.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src import seeds
from src.data.buckets import FIT, Key, StepSampler, fit
from src.data.cache import TensorCache, fill
from src.data.captions import CaptionedImages, Record


@dataclass(frozen=True)
class Batch:
    """b samples of one size. With a latent cache `pixels` is None, without one the latents are; likewise for the text."""

    indices: list[int]  # in the data set
    positions: list[int]  # in the global batch
    prompts: list[str]  # after caption dropout
    size: tuple[int, int]  # (H, W) px
    pixels: Tensor | None  # (b, 3, H, W) float32 in [-1, 1]; of pairs (b, 2, 3, H, W), the winner first
    latent_mean: Tensor | None  # (b, C, h, w) of the VAE's posterior, unscaled; of pairs (b, 2, C, h, w)
    latent_std: Tensor | None  # as latent_mean
    embeds: Tensor | None  # (b, L, D)
    pooled: Tensor | None  # (b, P)
    mask: Tensor | None = None  # (b, 1, h, w) in [0, 1]: how much each latent counts in the loss; None: all of them

    def __len__(self) -> int:
        return len(self.indices)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)})

    def pin_memory(self) -> Batch:
        """Called by the DataLoader's pinning thread, so that `to` can copy while the GPU computes."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


def latent_key(record: Record, size: tuple[int, int], flip: bool) -> str:
    """Names a cached latent: the picture's content, and everything done to it before the VAE."""
    return f"{record.key} {size[0]}x{size[1]} {FIT}, centre{', mirrored' if flip else ''}"


class Samples(Dataset):
    """The sample of a `Key`: tensors and prompt, by name.

    Args:
        images: the records; sizes: the bucket (H, W) of each.
        caption_dropout: share of samples whose prompt becomes "" (teaches the unconditional half of guidance).
        random_crop: crop anywhere instead of in the centre; flip: mirror half of the samples.
        latents, text: filled caches (`fill_latents`, `fill_text`); None: the batch carries pixels instead, or prompts alone.
        masks: (1, h, w) of each record, cropped in the centre as the record is (so not with `random_crop`); None: no masks.

    Raises:
        ValueError: for --random_crop with a latent cache, which holds one crop of each picture.
    """

    def __init__(
        self,
        images: CaptionedImages,
        sizes: Sequence[tuple[int, int]],
        *,
        seed: int,
        caption_dropout: float = 0.0,
        random_crop: bool = False,
        flip: bool = False,
        latents: TensorCache | None = None,
        text: TensorCache | None = None,
        masks: Sequence[Tensor] | None = None,
    ):
        assert masks is None or not random_crop, "masks are cut in the centre"
        if random_crop and latents is not None:
            raise ValueError("--random_crop has no effect on cached latents, which hold one crop of each picture; add --no-cache_latents")
        if len(sizes) != len(images):
            raise ValueError(f"{len(images)} pictures but {len(sizes)} sizes")
        self.images, self.sizes = images, [tuple(size) for size in sizes]
        self.seed, self.caption_dropout, self.random_crop, self.flip = seed, caption_dropout, random_crop, flip
        self.latents, self.text, self.masks = latents, text, masks

    def __len__(self) -> int:
        return len(self.images)

    def _draw(self, key: Key, stream: str) -> float:
        return seeds.uniform(self.seed, key.step, [key.position], stream).item()

    def __getitem__(self, key: Key) -> dict:
        size = self.sizes[key.index]
        dropped = self.caption_dropout and self._draw(key, "caption") < self.caption_dropout
        prompt = "" if dropped else self.images.records[key.index].prompt
        flip = bool(self.flip and self._draw(key, "flip") < 0.5)
        crop = (self._draw(key, "crop_y"), self._draw(key, "crop_x")) if self.random_crop else (0.5, 0.5)
        sample = {"index": key.index, "position": key.position, "prompt": prompt, "size": size}
        sample |= self._picture(key.index, size, crop, flip)
        if self.text is not None:
            entry = self.text.read(prompt)
            sample |= {"embeds": entry["embeds"], "pooled": entry["pooled"]}  # (L, D), (P,)
        if self.masks is not None:
            sample["mask"] = self.masks[key.index].flip(-1) if flip else self.masks[key.index]  # (1, h, w)
        return sample

    def _picture(self, index: int, size: tuple[int, int], crop: tuple[float, float], flip: bool) -> dict[str, Tensor]:
        """Pixels (3, H, W), or latent mean and std (C, h, w) with a cache."""
        return look(self.images, index, size, crop, flip, self.latents)


def look(
    images: CaptionedImages, index: int, size: tuple[int, int], crop: tuple[float, float], flip: bool, latents: TensorCache | None
) -> dict[str, Tensor]:
    """One picture as a sample holds it: pixels (3, H, W) in [-1, 1], or latent mean and std (C, h, w) from the cache."""
    if latents is None:
        return {"pixels": fit(images.image(index), size, crop=crop, flip=flip)}
    entry = latents.read(latent_key(images.records[index], size, flip))
    return {"latent_mean": entry["mean"], "latent_std": entry["std"]}


def collate(samples: list[dict]) -> Batch:
    sizes = {sample["size"] for sample in samples}
    assert len(sizes) == 1, f"a batch has one size, got {sorted(sizes)}: the plan keeps buckets apart"

    def stack(name: str) -> Tensor | None:
        return torch.stack([sample[name] for sample in samples]) if name in samples[0] else None

    return Batch(
        indices=[sample["index"] for sample in samples],
        positions=[sample["position"] for sample in samples],
        prompts=[sample["prompt"] for sample in samples],
        size=sizes.pop(),
        **{name: stack(name) for name in ("pixels", "latent_mean", "latent_std", "embeds", "pooled", "mask")},
    )


def loader(samples: Samples, sampler: StepSampler, *, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """Batches in the sampler's order, which is that of the whole run: so workers stay. They use one thread each."""
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),  # else its start draws from the global generator, which is the training loop's
    )


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # the workers are the parallelism
    os.setpgrp()  # no SIGTERM to the main process's group reaches the workers: the main process saves first, and needs them for it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: only the main one handles it, and ends the workers


# --------------------------------------------------------------------------- filling the caches


def fill_latents(
    cache: TensorCache,
    images: CaptionedImages,
    sizes: Sequence[tuple[int, int]],
    *,
    flip: bool,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> int:
    """Encodes every picture in its bucket's size, centred, and with `flip` its mirror image, too (whose latent is not the mirrored latent).

    Args:
        encode: pixels (b, 3, H, W) in [-1, 1], on the CPU -> mean, std of the VAE's posterior (b, 16, h, w); one size per call.

    Returns:
        How many entries were computed; 0 if all were there.
    """
    jobs: dict[str, tuple[int, tuple[int, int], bool]] = {}
    for index, (record, size) in enumerate(zip(images.records, sizes, strict=True)):
        for mirrored in (False, True) if flip else (False,):
            jobs[latent_key(record, size, mirrored)] = (index, tuple(size), mirrored)

    with ThreadPoolExecutor(min(batch_size, 16)) as pool:

        def compute(keys: list[str]) -> list[dict[str, Tensor]]:
            batch = [jobs[key] for key in keys]
            indices = list({index for index, _, _ in batch})
            pictures = dict(zip(indices, pool.map(images.image, indices), strict=True))  # each decoded once for both orientations
            pixels = pool.map(lambda job: fit(pictures[job[0]], job[1], flip=job[2]), batch)
            mean, std = encode(torch.stack(list(pixels)))  # (b, 16, h, w)
            return [{"mean": m, "std": s} for m, s in zip(mean, std, strict=True)]

        return fill(
            cache, list(jobs), compute, batch_size=batch_size, description="cache latents", rank=rank, world=world,
            group=lambda key: jobs[key][1], together=lambda key: jobs[key][0], named=lambda key: images.records[jobs[key][0]].name,
            progress=progress,
        )  # fmt: skip


def fill_text(
    cache: TensorCache,
    prompts: Sequence[str],
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> int:
    """Encodes every different prompt; include "" if captions are dropped.

    Args:
        encode: prompts -> embeds (b, L, D), pooled (b, P), L the same for all.

    Returns:
        How many entries were computed; 0 if all were there.
    """

    def compute(batch: list[str]) -> list[dict[str, Tensor]]:
        embeds, pooled = encode(batch)
        return [{"embeds": e, "pooled": p} for e, p in zip(embeds, pooled, strict=True)]

    return fill(cache, prompts, compute, batch_size=batch_size, description="cache text", rank=rank, world=world, progress=progress)
