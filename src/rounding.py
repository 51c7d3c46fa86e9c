"""Weights kept in bf16: updates computed in fp32 and rounded at random; and updates made during the backward pass.

bf16 has 8 significant bits: rounded to nearest, an update smaller than 1/512 of its weight is lost, every time. Rounded up with a
probability equal to the distance from the number below, it survives on average: a thousand updates of 1e-5 move many weights' mean by 1e-2.
Source: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551, section 3.

Both methods need an optimizer that updates some of the weights at a time: for bf16 weights, so that their fp32 copies never all exist
at once; during the backward pass, so that each gradient is freed before the next one is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from src import seeds

PIECE = 2**26  # weights that are updated together: their fp32 copies and gradients take half a gigabyte


def stochastic_round_(target: Tensor, values: Tensor, generator: torch.Generator, *, compiled: bool = False) -> None:
    """Write fp32 `values` into the bf16 `target` (same shape), rounded up or down at random so that the mean is exact.

    bf16 is fp32 without its last 16 bits: a uniform 16-bit number is added to those before they are cut off, so the carry happens with
    probability (last 16 bits) / 2^16.

    Args:
        generator: on the device of `target`.
        compiled: same result; one pass through memory after the draw instead of six, which are a tenth of a training step.
    """
    assert target.dtype == torch.bfloat16 and values.dtype == torch.float32, f"fp32 -> bf16, not {values.dtype} -> {target.dtype}"
    values = values.reshape(-1).data  # no view: compiled code would be made anew for each number of dimensions of its base
    noise = torch.empty_like(values, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    target.copy_((_compiled_carry() if compiled else _carry)(values, noise).view(target.shape))


def _carry(values: Tensor, noise: Tensor) -> Tensor:
    """Rounded bf16 (n,) of fp32 values (n,) and whole numbers (n,) below 2^16, `noise`, which is overwritten.

    NaN passes through unchanged: the carry could turn it into a number.
    """
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)  # the last 16 bits are zero: a bf16 number
    return torch.where(values == values, rounded, values).bfloat16()


@functools.cache
def _compiled_carry() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(lambda values, noise: _carry(values, noise.clone()), dynamic=True)  # compiled, a copy is free; writing back is not


@dataclass(frozen=True)
class _Piece:
    """Some weights of one group, and the optimizer of `copies`: the weights themselves if fp32, else fp32 copies, empty until needed."""

    group: int
    numbers: list[int]  # of the weights, in the order of all
    weights: list[Parameter]
    copies: list[Parameter]
    optimizer: Optimizer


class Pieces(Optimizer):
    """An optimizer that updates its weights piece by piece: bf16 ones in fp32 with stochastic rounding, fp32 ones as they are.

    Moments are fp32 (or 8 bits, by the optimizer inside) whatever the weights are. Only for optimizers that treat every weight tensor
    independently: not for Prodigy, whose step size depends on all. On one model of GPU, the rounding depends only on (seed, number of the
    update, number of the weight tensor): it is equal on all processes, and a resumed run repeats it exactly. The state has the layout of
    any torch optimizer.

    Args:
        groups: as torch takes them: {"params": [...], "lr": ...}.
        build: makes the optimizer of one piece, such as torch.optim.AdamW with its settings.
        fused: update each weight as soon as the backward pass has its gradient, then drop the gradient; `step` only counts. Needs one
            process, one backward pass per update and no clipping by the global norm.
        compiled: compile the rounding.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], build: Callable[[list[Parameter]], Optimizer], *, seed: int, fused: bool = False,
        compiled: bool = False, piece: int = PIECE,
    ):  # fmt: skip
        super().__init__(groups, {"lr": groups[0].get("lr", 0.0)})  # one of diffusers' schedules reads it there
        self.seed, self.fused, self.compiled, self.updates = seed, fused, compiled, 0
        self._squares: list[Tensor] = []  # squared norms of the gradients of a fused backward pass
        self._generators: dict[torch.device, torch.Generator] = {}
        self.pieces: list[_Piece] = []
        number = 0
        for index, group in enumerate(self.param_groups):
            for weights in _split(group["params"], 1 if fused else piece):
                copies = [w if w.dtype == torch.float32 else Parameter(w.new_empty(0, dtype=torch.float32)) for w in weights]
                self.pieces.append(_Piece(index, list(range(number, number + len(weights))), weights, copies, build(copies)))
                number += len(weights)
            options = self.pieces[-1].optimizer.param_groups[0]
            group.update({name: value for name, value in options.items() if name not in group})
        inside = self.pieces[-1].optimizer
        self.kind = f"{getattr(inside, 'kind', type(inside).__name__)} in pieces"
        if compiled:  # compile now, and not later in the thread of the backward pass
            for device in {weight.device for group in self.param_groups for weight in group["params"]}:
                values = torch.zeros(1024, device=device)
                with torch.no_grad():  # as in `step`: code is compiled for one grad mode
                    stochastic_round_(values.bfloat16(), values, torch.Generator(device), compiled=True)
        if fused:
            for piece_ in self.pieces:
                piece_.weights[0].register_post_accumulate_grad_hook(lambda _, piece_=piece_: self._update_fused(piece_))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update every piece; after a fused backward pass that is done already."""
        assert closure is None, "no optimizer here takes a closure"
        if not self.fused:
            for piece in self.pieces:
                self._update(piece)
        self._squares.clear()
        self.updates += 1

    def grad_norm(self) -> Tensor:
        """Global norm of the gradients of the last fused backward pass, a scalar; call it before `step`."""
        return torch.stack(self._squares).sum().sqrt()

    @torch.no_grad()
    def _update_fused(self, piece: _Piece) -> None:
        self._squares.append(torch.linalg.vector_norm(piece.weights[0].grad, dtype=torch.float32).square())
        self._update(piece)
        piece.weights[0].grad = None

    def _update(self, piece: _Piece) -> None:
        options = self.param_groups[piece.group]
        piece.optimizer.param_groups[0].update({name: value for name, value in options.items() if name != "params"})
        triples = zip(piece.numbers, piece.weights, piece.copies, strict=True)
        scratch = [(number, weight, copy) for number, weight, copy in triples if copy is not weight and weight.grad is not None]
        for _, weight, copy in scratch:
            copy.data = weight.detach().float()
            copy.grad = weight.grad.float()
        piece.optimizer.step()
        for number, weight, copy in scratch:
            stochastic_round_(weight.data, copy.data, self._generator(number, weight.device), compiled=self.compiled)
            copy.grad = None
            copy.data = copy.data.new_empty(0)

    def _generator(self, number: int, device: torch.device) -> torch.Generator:
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed(seeds.generator(self.seed, "rounding", self.updates, number).initial_seed())

    def state_dict(self) -> dict[str, Any]:
        """State of every weight by its number, settings of every group, and the number of updates."""
        state = {}
        for piece in self.pieces:
            state |= {piece.numbers[local]: value for local, value in piece.optimizer.state_dict()["state"].items()}
        numbers = [[n for piece in self.pieces if piece.group == index for n in piece.numbers] for index in range(len(self.param_groups))]
        groups = [{**group, "params": of_group} for group, of_group in zip(self.param_groups, numbers, strict=True)]
        return {"state": state, "param_groups": groups, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`, of a fused or an unfused run.

        Raises:
            ValueError: other groups, or groups of another size.
        """
        saved, here = state_dict["param_groups"], self.state_dict()["param_groups"]
        if [group["params"] for group in saved] != [group["params"] for group in here]:
            count, wanted = (sum(len(group["params"]) for group in groups) for groups in (saved, here))
            raise ValueError(f"saved for {count} weight tensors, here are {wanted}")
        for group, old in zip(self.param_groups, saved, strict=True):
            group.update({name: value for name, value in old.items() if name != "params"})
        for piece in self.pieces:
            state = {local: state_dict["state"][n] for local, n in enumerate(piece.numbers) if n in state_dict["state"]}
            options = {**saved[piece.group], "params": list(range(len(piece.numbers)))}
            piece.optimizer.load_state_dict({"state": state, "param_groups": [options]})
        self.updates = int(state_dict["updates"])


def _split(weights: Sequence[Parameter], size: int) -> list[list[Parameter]]:
    """Consecutive weights in lists of at most `size` numbers, or of one weight that is larger."""
    parts: list[list[Parameter]] = []
    room = 0
    for weight in weights:
        if not parts or weight.numel() > room:
            parts.append([])
            room = size
        parts[-1].append(weight)
        room -= weight.numel()
    return parts
