"""A frozen base in 8 or 4 bits, under adapters that are trained in fp32 (QLoRA): --quantize_base.

Only storage shrinks: each product unpacks the weight for a moment, in the forward and again in the backward pass; no unpacked weight is
saved for the backward pass. The attention and feed-forward layers in the blocks are quantised, two thirds of SD3.5-medium. Norms,
modulation and layers outside the blocks stay as they are, including the layers that diffusers excludes from casting.

    int8  a scale per row, round(w / scale) in [-127, 127]; a byte per weight, off by at most half a scale
    nf4   blocks of 64 weights, each the nearest of 16 quantiles of a normal distribution, times the block's largest; 0.56 bytes per weight

bitsandbytes packs nf4. Its own 8-bit layer is not used: it rounds the activations as well, and keeps its input alive through gradient
checkpointing. Source: Dettmers et al., arXiv 2305.14314, section 3.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.lora import under_autocast

NF4_BLOCK = 64  # weights that share a scale
BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / NF4_BLOCK}  # per weight, without int8's one scale per row
_INSIDE = re.compile(r"transformer_blocks\.\d+\.(attn|ff)")  # attn, attn1, attn2, ff, ff_context; SD1.5's UNet has the same names inside


def check(kind: str | None) -> None:
    """Refuse nf4 without its package, importing nothing.

    Raises:
        ValueError: naming the package.
    """
    if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        install = f"{sys.executable} -m pip install bitsandbytes"
        raise ValueError(f"--quantize_base nf4 needs the package bitsandbytes: {install}, or use --quantize_base int8")


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that `linear_layers` replaces, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and _INSIDE.search(name)}


def linear_layers(model: nn.Module, kind: str, device: str | torch.device | None = None) -> None:
    """Replace the layers in place, before adapters are added; one at a time, so that the full model never has to fit on `device`.

    Args:
        kind: "int8" or "nf4".
        device: where each weight is packed and stays (None: where it is).
    """
    for name, layer in quantizable(model).items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, QuantizedLinear(layer if device is None else layer.to(device), kind))


def _pack(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(out, in) -> packed weights and their scales, fp32."""
    if kind == "int8":
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (out, 1)
        return (weight.float() / scale).round().to(torch.int8), scale
    import bitsandbytes  # noqa: F401  (registers the operations)

    return torch.ops.bitsandbytes.quantize_4bit.default(weight.contiguous(), NF4_BLOCK, "nf4", torch.uint8)


def _unpack(packed: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """The unpacked weight (out, in)."""
    if packed.dtype == torch.int8:
        return (packed * scale).to(dtype)
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, scale, NF4_BLOCK, "nf4", shape, dtype)


def _product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, shape: list[int]) -> Tensor:
    """x W^T + bias in the dtype of x, W (out, in) unpacked."""
    return F.linear(x, _unpack(packed, scale, shape, x.dtype), bias)


def _product_backward(gradient: Tensor, packed: Tensor, scale: Tensor, shape: list[int]) -> Tensor:
    return gradient @ _unpack(packed, scale, shape, gradient.dtype)


class _Product(torch.autograd.Function):
    """Torch's own linear would save the unpacked W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep(ctx, inputs, None)
        return _product(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _product_backward(gradient, *ctx.saved_tensors, ctx.shape), None, None, None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    _, packed, scale, _, ctx.shape = inputs
    ctx.save_for_backward(packed, scale)


# The same as opaque operations for torch.compile: otherwise it would see that both passes unpack the same weight, and save that.
# Uncompiled, such custom operations cost 0.1 ms a layer.
_compiled_product = torch.library.custom_op("sd35::packed_linear", _product, mutates_args=())
_compiled_backward = torch.library.custom_op("sd35::packed_linear_backward", _product_backward, mutates_args=())
_compiled_product.register_fake(lambda x, packed, scale, bias, shape: x.new_empty((*x.shape[:-1], shape[0])))
_compiled_backward.register_fake(lambda gradient, packed, scale, shape: gradient.new_empty((*gradient.shape[:-1], shape[1])))
_compiled_product.register_autograd(
    lambda ctx, gradient: (_compiled_backward(gradient, *ctx.saved_tensors, ctx.shape), None, None, None, None), setup_context=_keep
)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a packed weight; peft takes it for an ordinary one.

    Args:
        linear: the layer to replace; its bias is kept.
    """

    def __init__(self, linear: nn.Linear, kind: str):
        nn.Module.__init__(self)  # without Linear's own weights
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        packed, scale = _pack(linear.weight.detach(), kind)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", linear.bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product = _compiled_product if torch.compiler.is_compiling() else _Product.apply
        return product(x.to(dtype), self.weight, self.scale, bias, [self.out_features, self.in_features])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"
