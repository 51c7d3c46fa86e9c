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
        """With u = x * inverse and g = gradient * weight * inverse: dx = g - u * mean(g * u), dweight = sum over rows of gradient * u.

        Results have the memory layout of x, that of attention's projections.
        """
        x, inverse, weight = ctx.saved_tensors
        between = torch.empty_like(x, dtype=weight.dtype)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            torch.mul(gradient, weight, out=between)
            g = torch.mul(between, inverse, out=torch.empty_like(x, dtype=torch.float32))  # fp16 might not hold g * x
            along = (g * x).mean(-1, keepdim=True).mul_(inverse.square())
            for_x = torch.addcmul(g, x, along, value=-1, out=torch.empty_like(x))
        if ctx.needs_input_grad[1]:
            torch.mul(x, inverse, out=between).mul_(gradient)
            for_weight = between.sum(tuple(range(x.ndim - 1)), dtype=torch.float32).to(weight.dtype)
        return for_x, for_weight, None


def lean(model: nn.Module) -> None:
    """Make all attention RMS norms of an SD3 transformer use `RMSNorm` above, whenever autocast is on and the code is not compiled."""
    from diffusers.models.normalization import RMSNorm as Plain

    for module in unwrap(model).modules():
        if type(module) is Plain and module.weight is not None and module.bias is None:
            module.__class__ = _lean(Plain)  # with a function per module torch.compile would compile every block anew


@functools.cache
def _lean(kind: type[nn.Module]) -> type[nn.Module]:
    class Lean(kind):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling() or not under_autocast(x) or x.element_size() != 2:
                return super().forward(x)  # the compiler fuses; in fp32 there are no copies
            return RMSNorm.apply(x, self.weight, self.eps)

    return Lean
