"""Every random number of a run is a function of (seed, step, position, stream): nothing depends on what was drawn before.

`position` is the index of a sample in the global batch, 0..G-1 with G = train_batch_size x processes x gradient_accumulation_steps:
micro-batch m, rank r, item j -> m * world * batch_size + r * batch_size + j. So 1 process x batch 4, 2 x 2 and batch 1 x accumulation 4
see the same noise, two ranks never draw the same, and a resumed run needs no stored generator state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_EDGE = 2.0**-53  # half the spacing of float64 below 1: keeps inverse distribution functions finite


def _number(seed: int, keys: tuple[int | str, ...]) -> int:
    """63 bits of a hash of the seed and the keys, the same on every machine and Python version."""
    for key in (seed, *keys):
        if type(key) not in (int, str):  # numpy integers print differently from one version to the next
            raise TypeError(f"a random stream is named by int and str only, got {key!r} of {type(key).__name__}")
    digest = hashlib.blake2b(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch seeds are signed 64-bit numbers


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator that belongs to these keys alone: `generator(seed, "order", epoch)`."""
    return torch.Generator("cpu").manual_seed(_number(seed, keys))


def uniform(seed: int, step: int, positions: Sequence[int], stream: str, device: torch.device | str = "cpu") -> Tensor:
    """One number in the open interval (0, 1) per position: (b,) float64, the same numbers on every device."""
    draws = [torch.rand((), dtype=torch.float64, generator=generator(seed, step, position, stream)) for position in positions]
    if not draws:
        return torch.empty(0, dtype=torch.float64)
    return send(torch.stack(draws).clamp(_EDGE, 1 - _EDGE), device)  # (b,)


def normal(
    seed: int, step: int, positions: Sequence[int], stream: str, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """One standard normal tensor of `shape` per position: (b, *shape) float32, the same numbers on every device."""
    shape = tuple(shape)
    draws = [torch.randn(shape, generator=generator(seed, step, position, stream), dtype=torch.float32) for position in positions]
    if not draws:
        return torch.empty((0, *shape), dtype=torch.float32)
    return send(torch.stack(draws), device)  # (b, *shape)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy to the device without waiting for it: from pageable memory torch would first wait for all pending work of the GPU."""
    upwards = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if upwards else tensor.to(device)


def seed_everything(seed: int, *keys: int | str) -> None:
    """Seeds Python's, numpy's and torch's global generators (all devices), from which dropout inside a model draws."""
    number = _number(seed, keys)
    random.seed(number)
    np.random.seed(number % 2**32)  # numpy takes 32 bits
    torch.manual_seed(number)  # seeds every CUDA device as well
