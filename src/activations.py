"""Bytes that a forward pass of any model saves for the backward pass: counted in a pass on fake CUDA tensors, which have no memory.

Not counted: tensors that compiled code saves, and the workspace of kernels.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Kept:
    """Bytes.

    Attributes:
        total: saved for the backward pass, without the weights; of recomputed units only the inputs.
        again: the most that one recomputed unit saves besides, while its own backward pass runs; 0 without such units.
        copies: autocast's 16-bit copies of weights in recomputed units: in its cache when the forward pass ends, but not saved.
        largest: the largest saved tensor; the backward pass briefly holds about as much besides.
    """

    total: int
    again: int
    copies: int
    largest: int


def count(
    model: nn.Module, forward: Callable[[Any], Any], *, autocast: torch.dtype | None = None,
    units: Callable[[Any], Sequence[nn.Module]] = lambda _: (),
) -> Kept:  # fmt: skip
    """Run `forward` on a copy of the model.

    Args:
        model: on the meta device, in the mode and with the dtypes of training; trained parameters have requires_grad.
        forward: takes the copy, makes its inputs on torch's default device, and returns the tensor that the backward pass starts from.
        autocast: 16-bit dtype; None: none.
        units: gives the copy's modules that gradient checkpointing recomputes in the backward pass.
    """
    with without_memory(model) as model, FusedAttention(), _autocast(autocast):
        again = units(model)
        book = _Book(model, again)
        with torch.autograd.graph.saved_tensors_hooks(book.keep, lambda tensor: tensor):
            forward(model)
    outside, inside = book.sizes()
    weights = [weight for unit in again for weight in unit.parameters() if autocast]
    converted = [w for w in weights if w.requires_grad and w.ndim > 1 and w.dtype != autocast]  # at most these
    return Kept(
        total=sum(outside), again=max(map(sum, inside), default=0), copies=sum(2 * weight.numel() for weight in converted),
        largest=max(chain(outside, *inside), default=0),
    )  # fmt: skip


def live(model: nn.Module, forward: Callable[[Any], Any]) -> int:
    """Peak bytes of the tensors that `forward` makes on a copy of the model, run without gradient; weights are not counted.

    Args:
        model, forward: as for `count`.
    """
    with without_memory(model) as model, torch.no_grad(), FusedAttention(), _Live() as held:
        forward(model)
    return held.peak


@contextlib.contextmanager
def without_memory(model: nn.Module, device: str = "cuda") -> Iterator[nn.Module]:
    """Yields a copy of the model on a fake GPU, or a fake CPU: its tensors, and those made inside, have sizes but no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = copy.deepcopy(model)
    with FakeTensorMode(), torch.device(device):
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield model


class _Live(TorchDispatchMode):
    """Counts the bytes of each storage from the operation that makes it until nothing refers to it."""

    def __init__(self):
        super().__init__()
        self.peak, self._now, self._known = 0, 0, {}

    def __torch_dispatch__(self, function: Any, types: Any, given: tuple = (), named: dict[str, Any] | None = None) -> Any:
        made = function(*given, **(named or {}))
        before = {storage._cdata for storage in self._storages((given, named))}  # views, and what is written in place
        for storage in self._storages(made):
            key = storage._cdata
            if key not in before and key not in self._known:
                self._known[key] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self._now)
        return made

    def _storages(self, tree: Any) -> list[Any]:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def _free(self, key: int) -> None:
        self._now -= self._known.pop(key)


class _Book:
    """The storages saved for the backward pass, by address: outside of all units, and inside each of them."""

    def __init__(self, model: nn.Module, units: Sequence[nn.Module]):
        self._own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._kept: dict[nn.Module | None, dict[int, Tensor]] = {None: {}, **{unit: {} for unit in units}}
        self._inside: nn.Module | None = None
        for unit in units:
            unit.register_forward_pre_hook(self._enter, with_kwargs=True)
            unit.register_forward_hook(self._leave)

    def keep(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in self._own:
            self._kept[self._inside][address] = tensor  # alive, so that no other storage takes the address
        return tensor

    def sizes(self) -> tuple[list[int], list[list[int]]]:
        """Bytes of each storage saved outside the units; and for each unit, of those that it saves besides."""
        outside, *units = self._kept.values()
        return list(map(_bytes, outside.values())), [[_bytes(unit[key]) for key in unit.keys() - outside.keys()] for unit in units]

    def _enter(self, unit: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        for value in (*given, *named.values()):
            if isinstance(value, Tensor):
                self.keep(value)
        self._inside = unit

    def _leave(self, *_: Any) -> None:
        self._inside = None


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class FusedAttention(TorchFunctionMode):
    """Attention by a GPU's fused kernel, in autocast's dtype, which saves only its inputs and its result. For tensors without memory torch
    would choose a kernel that saves every product."""

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, given: tuple = (), named: dict[str, Any] | None = None) -> Any:
        named = named or {}
        if function is not F.scaled_dot_product_attention:
            return function(*given, **named)
        tensors = [*given[:3], *(named[name] for name in ("query", "key", "value")[len(given) :])]
        if torch.is_autocast_enabled(self.device):
            tensors = [tensor.to(torch.get_autocast_dtype(self.device)) for tensor in tensors]
        return torch.ops.aten._scaled_dot_product_flash_attention(*tensors)[0]


@contextlib.contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """As torch.autocast("cuda"), but also on a machine without a GPU, where that has no effect."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
