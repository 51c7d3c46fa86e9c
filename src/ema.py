"""Exponential moving average of trained parameters, in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.nn import Parameter

from src.sharding import placed, sharded

RAW = "raw"  # folder of the trained weights, beside their average


@contextmanager
def swapped(parameters: list[Parameter], values: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the parameters hold these values; afterwards exactly the bits they held before, also after an error.

    In place: no autograd graph that still has to run backward may depend on the parameters.
    """
    with torch.no_grad():
        held = [p.detach().to(value.device, copy=True) for value, p in zip(values, parameters, strict=True)]
        _fill(parameters, values)
    try:
        yield
    finally:
        with torch.no_grad():
            _fill(parameters, held)


def _fill(parameters: list[Parameter], values: list[torch.Tensor]) -> None:
    if not any(map(sharded, parameters)):
        torch._foreach_copy_(parameters, values)  # one kernel for hundreds of adapters
        return
    for parameter, value in zip(parameters, values, strict=True):  # foreach does not support sharded tensors
        parameter.copy_(value)


def applied(average: Ema | None) -> AbstractContextManager[None]:
    """Inside, the model holds the average, if there is one: the weights to validate, evaluate, and save as the result."""
    return average.applied() if average else nullcontext()


def save(folder: Path, average: Ema | None, write: Callable[[Path], None]) -> None:
    """Call `write(folder)`, with the average in the model if there is one, and then also `write(folder/raw)` with the trained weights."""
    with applied(average):
        write(folder)
    if average:
        write(folder / RAW)


class Ema:
    """average <- average + (1 - d) * (parameter - average), once per optimizer step, starting at the parameters themselves.

    With `warmup` the n-th update (n = 0, 1, ...) uses d = min(decay, (1 + n) / (10 + n)): a short run then averages over its
    recent tenth instead of remembering its start. Source: diffusers' EMAModel, the same formula (its n = 0 copies the parameters instead).

    Args:
        device: where the average is kept; None: beside each parameter. On the CPU, an update waits for a copy of every parameter.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float, *, warmup: bool = True, device: torch.device | str | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"--ema_decay must lie in [0, 1), got {decay}; try 0.999")
        self.parameters = list(parameters)
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.average = [p.detach().to(device or p.device, torch.float32, copy=True) for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        for start in range(0, len(self.average), 32):  # some at a time: fp32 copies of all bf16 weights would be as large as the average
            part = slice(start, start + 32)
            now = [p.detach().to(a.device).float() for a, p in zip(self.average[part], self.parameters[part], strict=True)]
            torch._foreach_lerp_(self.average[part], now, 1 - decay)
        self.updates += 1

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the model holds the average: see `swapped`."""
        return swapped(self.parameters, self.average)

    def state_dict(self) -> dict:
        """Number of updates and the average, in the order of the parameters; not copied: a full model may leave no room."""
        return {"updates": self.updates, "average": list(self.average)}

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state_dict()`, on this run's device.

        Raises:
            ValueError: the average belongs to other parameters.
        """
        saved = [tuple(a.shape) for a in state["average"]]
        here = [tuple(a.shape) for a in self.average]
        if saved != here:
            raise ValueError(f"the saved EMA has {len(saved)} tensors, this run {len(here)}, or their shapes differ")
        self.updates = int(state["updates"])
        for average, value in zip(self.average, state["average"], strict=True):
            average.copy_(placed(value, average))
