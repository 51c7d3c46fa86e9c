"""Exponential moving average of trained parameters, in fp32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import Parameter


class Ema:
    """average <- average + (1 - d) * (parameter - average), once per optimizer step, starting at the parameters themselves.

    With `warmup` the n-th update (n = 0, 1, ...) uses d = min(decay, (1 + n) / (10 + n)): a short run then averages over its
    recent tenth instead of remembering its start. Source: diffusers' EMAModel, the same formula (its n = 0 copies the parameters instead).
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float, *, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"--ema_decay must lie in [0, 1), got {decay}; try 0.999")
        self.parameters = list(parameters)
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.average = [p.detach().to(torch.float32, copy=True) for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the parameters as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        torch._foreach_lerp_(self.average, [p.detach().float() for p in self.parameters], 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average; afterwards exactly the bits it held before, also after an error."""
        with torch.no_grad():
            trained = [p.detach().clone() for p in self.parameters]
            torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, trained)

    def state_dict(self) -> dict:
        """Number of updates and the average, in the order of the parameters."""
        return {"updates": self.updates, "average": [a.clone() for a in self.average]}

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
        torch._foreach_copy_(self.average, [a.to(self.average[0].device) for a in state["average"]])
