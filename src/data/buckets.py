"""Aspect-ratio buckets, the fit of a picture into one, and the order of a run: which samples make up which optimizer step.

A tensor has one size, so all pictures of a global batch come from one bucket. The order is a pure function of (seed, step):
a resumed run, and the same run spread over another number of processes, sees the same samples at the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from src import seeds
from src.images import from_pil

STEP = 16  # px: 8x VAE downsampling times 2x2 patches
MAX_ASPECT = 2  # long side over short side
FIT = "cover, lanczos"  # how `fit` resizes; part of every latent cache key


def buckets(resolution: int, *, aspect_buckets: bool) -> list[tuple[int, int]]:
    """The sizes (H, W) that pictures are fitted to, portrait first: multiples of 16 px, each of about resolution^2 pixels.

    The long side grows in steps of about a sixteenth of the resolution, which gives 13 sizes at most: more would split small data sets
    into buckets that do not fill a batch. The short side is the nearest multiple of 16 that keeps the area, so the area exceeds
    resolution^2 by at most 8 px of the short side. Without `aspect_buckets` there is the square alone.

    Raises:
        ValueError: if `resolution` is not a positive multiple of 16.
    """
    if resolution < STEP or resolution % STEP:
        raise ValueError(f"--resolution must be a positive multiple of {STEP}, got {resolution}")
    if not aspect_buckets:
        return [(resolution, resolution)]
    sizes = {(resolution, resolution)}
    step = STEP * math.ceil(resolution / 256)
    for long in range(resolution + step, resolution * MAX_ASPECT + 1, step):
        short = STEP * math.floor(resolution**2 / long / STEP + 0.5)
        if short and long <= MAX_ASPECT * short:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: size[1] / size[0])


def assign(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (H, W) whose aspect ratio is nearest to the picture's, as |log of their quotient|; the first of equals."""
    return min(buckets, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def fit(image: Image.Image, size: tuple[int, int], *, crop: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> Tensor:
    """Scales an RGB picture to cover `size`, cuts out that size and mirrors it.

    Args:
        size: (H, W) px.
        crop: place of the crop, (y, x) fractions of the free room: (0, 0) top left, (0.5, 0.5) centre.
        flip: mirror left and right, after the crop.

    Returns:
        pixels (3, H, W) float32 in [-1, 1].
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    tall, wide = min(height / scale, image.height), min(width / scale, image.width)  # of the crop, in the picture's own pixels
    top, left = (image.height - tall) * crop[0], (image.width - wide) * crop[1]
    # Only the crop is computed; the filter still reads the pixels around it, as if the full picture had been resized.
    cut = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + wide, top + tall))
    if flip:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return from_pil(cut) * 2 - 1  # (3, H, W)


# --------------------------------------------------------------------------- order


class Order:
    """Which samples make up each optimizer step.

    Every epoch shuffles each bucket and cuts it into global batches. The last one of a bucket is filled up from the bucket's
    beginning, so an epoch shows every sample at least once; `repeated` counts the repetitions. Then the batches are shuffled.

    Args:
        buckets_of: the bucket (H, W) of each sample.
        global_batch: samples per optimizer step: train_batch_size x processes x gradient_accumulation_steps.
        stream: names the random numbers of the order, so that two data sets of one run are shuffled independently.
    """

    def __init__(self, buckets_of: Sequence[tuple[int, int]], global_batch: int, seed: int, stream: str = "order"):
        if not buckets_of or global_batch < 1:
            raise ValueError(f"an order needs samples and a batch, got {len(buckets_of)} sample(s) and a global batch of {global_batch}")
        self.global_batch, self.seed, self.stream = global_batch, seed, stream
        members: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(buckets_of):
            members.setdefault(tuple(size), []).append(index)
        self.members = {size: members[size] for size in sorted(members)}  # bucket -> its samples
        self.steps_per_epoch = sum(math.ceil(len(indices) / global_batch) for indices in self.members.values())
        self.repeated = self.steps_per_epoch * global_batch - len(buckets_of)  # per epoch
        self._epoch: tuple[int, list[list[int]]] = (-1, [])  # the epoch computed last, since computing one takes a while

    def batch(self, step: int) -> list[int]:
        """The G samples of optimizer step `step`, counted from 0; all of one bucket."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return list(self._epoch[1][place])

    def _order(self, epoch: int) -> list[list[int]]:
        generator = seeds.generator(self.seed, self.stream, epoch)
        batches = []
        for indices in self.members.values():
            shuffled = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
            for start in range(0, len(shuffled), self.global_batch):
                batches.append([shuffled[i % len(shuffled)] for i in range(start, start + self.global_batch)])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass(frozen=True)
class Key:
    index: int  # of the sample in the data set
    step: int  # optimizer step, from 0
    position: int  # in the global batch, from 0: names the sample's random numbers


class StepSampler:
    """What this process loads, micro-batch by micro-batch: `DataLoader(batch_sampler=...)`.

    Item j of micro-batch m on rank r is position m * world * batch_size + r * batch_size + j of the step's global batch.

    Args:
        batch_size: samples per process and forward pass; accumulation: forward passes per optimizer step.
        start_step: the first optimizer step to load, where a resumed run goes on; max_steps: the first one not to load.
        first_position: of the step's first sample: G in the second data set of a run, so that no random number is used twice.
    """

    def __init__(
        self, order: Order, *, batch_size: int, accumulation: int = 1, rank: int = 0, world: int = 1, start_step: int = 0, max_steps: int,
        first_position: int = 0,
    ):  # fmt: skip
        if batch_size * accumulation * world != order.global_batch:
            raise ValueError(
                f"the order was made for a global batch of {order.global_batch}, but batch size {batch_size} x accumulation {accumulation} "
                f"x {world} process(es) = {batch_size * accumulation * world}"
            )
        self.order, self.batch_size, self.accumulation = order, batch_size, accumulation
        self.rank, self.world = rank, world
        self.start_step, self.max_steps, self.first_position = start_step, max_steps, first_position

    def __len__(self) -> int:
        return max(0, self.max_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.max_steps):
            samples = self.order.batch(step)
            for micro in range(self.accumulation):
                first = (micro * self.world + self.rank) * self.batch_size
                yield [Key(samples[p], step, self.first_position + p) for p in range(first, first + self.batch_size)]
