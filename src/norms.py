"""RMS norm of queries and keys under autocast, in fewer passes through memory, saving 16-bit inputs instead of fp32 copies for backward.

diffusers' `RMSNorm` is written for clarity: uncompiled, each norm takes a dozen passes through memory and saves an fp32 copy of its input,
a quarter of all that a LoRA of SD3.5-medium saves. Here products are computed in fp32 and stored in 16 bits by the same pass (`out=`).
torch's own fused norm (`torch.nn.functional.rms_norm`) uses a block of threads per row; a row here is only the 64 numbers of a head.
"""

from __future__ import annotations

import functools
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


def lean(model: nn.Module) -> None:
    """Make the norms of an SD3 transformer or a UNet work in 16 bits under autocast, whenever the code is not compiled.

    Input and result have 16 bits, statistics and sums fp32. autocast itself makes an fp32 copy for layer and group norms and returns fp32,
    so that the products after them are fp32, too: three times the passes through memory, and twice the memory until the backward pass.
    """
    from diffusers.models.normalization import RMSNorm as Plain

    for module in unwrap(model).modules():
        kind = type(module)
        if kind in (nn.LayerNorm, nn.GroupNorm) or (kind is Plain and module.weight is not None and module.bias is None):
            module.__class__ = _lean(kind)  # with a function per module torch.compile would compile every block anew


@functools.cache
def _lean(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a norm's class."""
    compute = {nn.LayerNorm: _layer_norm, nn.GroupNorm: _group_norm}.get(kind, _rms_norm)

    class Lean(kind):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling() or not under_autocast(x) or x.element_size() != 2:
                return super().forward(x)  # the compiler fuses; in fp32 there are no copies
            with torch.autocast(x.device.type, enabled=False):
                return compute(self, x)

    return Lean


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return RMSNorm.apply(x, norm.weight, norm.eps)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, *_weights(norm, x), norm.eps)


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, *_weights(norm, x), norm.eps)


def _weights(norm: nn.LayerNorm | nn.GroupNorm, x: Tensor) -> list[Tensor | None]:
    """Weight and bias as the kernels want them: GPUs' in the dtype of the input; CPUs' sum gradients in that of the weights."""
    return [tensor.to(x.dtype) if tensor is not None and x.device.type != "cpu" else tensor for tensor in (norm.weight, norm.bias)]
