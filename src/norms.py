"""Norms under autocast, in fewer passes through memory, keeping 16-bit inputs instead of fp32 copies for the backward pass.

A GPU's autocast computes layer and group norms of an fp32 copy and returns fp32, so that the operations after them are fp32, too. Here
input and result have 16 bits. diffusers' `RMSNorm` of queries and keys is written for clarity: uncompiled, each takes a dozen passes
through memory and saves an fp32 copy of its input, a quarter of all that a LoRA of SD3.5-medium saves. Here products are computed in fp32
and stored in 16 bits by the same pass (`out=`). torch's own fused norm (`torch.nn.functional.rms_norm`) uses a block of threads per row; a
row here is only the 64 numbers of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.lora import under_autocast, unwrap


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x: (..., n) of 16 bits, weight: (n,); the result has the dtype of x.

    Rounds where diffusers' own does: to the weight's precision between the two products, to that of x at the end.
    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        between = torch.mul(x, inverse, out=torch.empty_like(x, dtype=weight.dtype))
        return torch.mul(between, weight, out=torch.empty_like(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With u = x * inverse and g = gradient * weight: dx = (g - u * mean(g * u)) * inverse, dweight = sum over rows of gradient * u.

        Results have the memory layout of x, that of attention's projections.
        """
        x, inverse, weight = ctx.saved_tensors
        between = torch.empty_like(x, dtype=weight.dtype)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            torch.mul(gradient, weight, out=between)
            wide = x.float() if x.dtype == torch.float16 else x  # fp16 might not hold the products
            products = torch.mul(between, wide)
            along = products.mean(-1, keepdim=True, dtype=torch.float32).mul_(inverse.square())
            across = torch.addcmul(between, wide, along, value=-1, out=products)
            for_x = torch.mul(across, inverse, out=torch.empty_like(x))
        if ctx.needs_input_grad[1]:
            torch.mul(x, inverse, out=between).mul_(gradient)
            for_weight = between.sum(tuple(range(x.ndim - 1)), dtype=torch.float32).to(weight.dtype)
        return for_x, for_weight, None


class Affine(torch.autograd.Function):
    """x * weight + bias in fp32, stored in the 16 bits of x (b, ...); weight and bias: as many dimensions, of size 1 or that of x.

    For norms with fp32 weights: rounded to 16 bits, weights near 1 would not feel the updates of a few hundred steps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addcmul(bias, x, weight, out=torch.empty_like(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x = for_weight = for_bias = None
        rest = [dimension for dimension, size in enumerate(weight.shape) if size == 1]
        if ctx.needs_input_grad[0]:
            for_x = torch.mul(gradient, weight, out=torch.empty_like(x))
        if ctx.needs_input_grad[1]:
            wide = gradient.float() if x.dtype == torch.float16 else gradient  # fp16 might not hold the products
            for_weight = (wide * x).sum(rest, keepdim=True, dtype=torch.float32).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(rest, keepdim=True, dtype=torch.float32).to(weight.dtype)
        return for_x, for_weight, for_bias


def lean(model: nn.Module) -> None:
    """Make the norms of an SD3 transformer or a UNet work in 16 bits under autocast, whenever the code is not compiled."""
    from diffusers.models.normalization import RMSNorm as Plain

    for module in unwrap(model).modules():
        kind = type(module)
        weights = [getattr(module, name, None) is not None for name in ("weight", "bias")]
        if (kind in (nn.LayerNorm, nn.GroupNorm) and weights[0] == weights[1]) or (kind is Plain and weights == [True, False]):
            module.__class__ = _lean(kind)  # with a function per module torch.compile would compile every block anew


@functools.cache
def _lean(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a norm's class."""
    compute = {nn.LayerNorm: _layer_norm, nn.GroupNorm: _group_norm}.get(kind, _rms_norm)

    class Lean(kind):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling() or not under_autocast(x) or x.element_size() != 2:
                return super().forward(x)  # the compiler fuses; in fp32 there are no copies
            return compute(self, x)

    return Lean


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return RMSNorm.apply(x, norm.weight, norm.eps)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    shape = [1] * (x.ndim - len(norm.normalized_shape)) + list(norm.normalized_shape)
    return _weighted(norm, x, shape, lambda weight, bias: F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps))


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    shape = [1, norm.num_channels] + [1] * (x.ndim - 2)
    return _weighted(norm, x, shape, lambda weight, bias: F.group_norm(x, norm.num_groups, weight, bias, norm.eps))


def _weighted(
    norm: nn.LayerNorm | nn.GroupNorm, x: Tensor, shape: list[int], kernel: Callable[[Tensor | None, Tensor | None], Tensor]
) -> Tensor:  # fmt: skip
    """The kernel with weight and bias of x's dtype; GPUs' kernels take no others, so fp32 ones come after it, in this shape."""
    with torch.autocast(x.device.type, enabled=False):
        if norm.weight is None or norm.weight.dtype == x.dtype:
            return kernel(norm.weight, norm.bias)
        return Affine.apply(kernel(None, None), norm.weight.view(shape), norm.bias.view(shape))
