"""SD3's attention under autocast: queries, keys and values by one product where all three have a plain LoRA on frozen weights.

Three LoRAs on one input x are one LoRA of the matrices stacked, A stacked and B block-diagonal:

    [q k v] = x [Wq Wk Wv]^T + scale * (x [Aq Ak Av]^T) diag(Bq, Bk, Bv)^T

so x is read twice instead of six times, and its gradient is one product, to which another adds, instead of a sum of six. Weights, names and
files stay those of the three layers: their frozen weights become parts of the stacked one. Without autocast diffusers' own processor
computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src import lora

IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def stack(transformer: nn.Module) -> None:
    """Give every attention of an SD3 transformer the processor below, and stack frozen weights.

    After adapters were added, on the device of training: a copy of the model, or one that is moved, has these weights twice, and does not
    follow weights that are loaded into it later.
    """
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    for module in lora.unwrap(transformer).modules():
        if isinstance(module, Attention) and type(module.processor) is JointAttnProcessor2_0:
            for names in (IMAGE, TEXT):
                _stack(module, names)
            module.set_processor(Joint(module.processor))


def _stack(attention: nn.Module, names: tuple[str, str, str]) -> None:
    """Put the frozen weights of three layers into one buffer of the attention, which no file holds, if all three have a plain LoRA."""
    layers = [getattr(attention, name, None) for name in names]
    if not all(isinstance(layer, lora.PlainLora) and layer.base_layer.weight.is_floating_point() for layer in layers):
        return  # not adapted, dropout, DoRA, or packed weights; the projections of SD3 all have a bias
    for kind in ("weight", "bias"):
        whole = torch.cat([getattr(layer.base_layer, kind).detach() for layer in layers])
        attention.register_buffer(f"{names[0]}_{kind}", whole, persistent=False)
        for layer, part in zip(layers, whole.chunk(3), strict=True):
            getattr(layer.base_layer, kind).data = part


class Joint:
    """diffusers' `JointAttnProcessor2_0` with stacked projections, and tokens before heads in memory: the layout that the kernels of
    attention keep for their result, so that the layer after it reads no copy.

    Args:
        plain: diffusers' own, which computes without autocast.
    """

    def __init__(self, plain: Any):
        self.plain = plain

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:  # fmt: skip
        """Image tokens (b, N, d) and text tokens (b, L, d) or None -> the same shapes; without text a tensor, else a pair."""
        if not lora.under_autocast(hidden_states):
            return self.plain(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        query, key, value = project(attn, IMAGE, hidden_states)  # (b, N, heads, d / heads)
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = project(attn, TEXT, encoder_hidden_states)  # (b, L, heads, d / heads)
            query = torch.cat([query, _normed(attn.norm_added_q, text_query)], dim=1)
            key = torch.cat([key, _normed(attn.norm_added_k, text_key)], dim=1)
            value = torch.cat([value, text_value], dim=1)
        found = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        found = found.transpose(1, 2).flatten(2).to(query.dtype)  # (b, N + L, d)
        if encoder_hidden_states is None:
            return _output(attn, found)
        image, text = found.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return _output(attn, image.contiguous()), text if attn.context_pre_only else attn.to_add_out(text.contiguous())


def _output(attention: nn.Module, x: Tensor) -> Tensor:
    projection, dropout = attention.to_out
    return dropout(projection(x))


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def project(attention: nn.Module, names: tuple[str, str, str], x: Tensor) -> list[Tensor]:
    """Queries, keys and values of tokens x (b, n, d), each (b, n, heads, d / heads)."""
    layers = [getattr(attention, name) for name in names]
    weight = getattr(attention, f"{names[0]}_weight", None)
    if weight is None or layers[0].merged:
        return [layer(x).unflatten(-1, (attention.heads, -1)) for layer in layers]
    flat, bias = x.reshape(-1, x.shape[-1]), getattr(attention, f"{names[0]}_bias")
    if layers[0].disable_adapters:
        whole = F.linear(flat, weight, bias)  # (b n, 3 d)
    else:
        downs, ups = zip(*map(lora.matrices, layers), strict=True)
        narrow = torch.get_autocast_dtype(x.device.type) if lora.under_autocast(x) else x.dtype
        function = adapted if torch.compiler.is_compiling() else Adapted.apply
        whole = function(flat, weight, bias, torch.cat(downs).to(narrow), torch.stack(ups).to(narrow), layers[0].scaling[lora.ADAPTER])
    return [part.view(*x.shape[:-1], attention.heads, -1) for part in whole.chunk(len(names), dim=-1)]


def adapted(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The sum of base and adapters of k layers, for the compiler, which fuses it. B as one block-diagonal matrix: fewer, larger products.

    Args:
        x: (n, d); weight: (k m, d) and bias: (k m,), frozen; down: k stacked A, (k rank, d); up: k B, (k, m, rank).

    Returns:
        (n, k m).
    """
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, down), torch.block_diag(*up))


class Adapted(torch.autograd.Function):
    """The same uncompiled: products add to the result in place, and to the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        x, weight, bias = (tensor.to(down.dtype) for tensor in (x, weight, bias))
        low, whole = F.linear(x, down), F.linear(x, weight, bias)
        for part, of_low, of_up in zip(whole.chunk(len(up), 1), low.chunk(len(up), 1), up, strict=True):
            part.addmm_(of_low, of_up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, low)
        ctx.scale = scale
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, low = ctx.saved_tensors
        for_low, for_up, k = torch.empty_like(low), torch.empty_like(up), len(up)
        for i, part in enumerate(gradient.chunk(k, 1)):
            torch.mm(part, up[i], out=for_low.chunk(k, 1)[i])
            torch.mm(part.t(), low.chunk(k, 1)[i], out=for_up[i])
        for_x = torch.mm(gradient, weight).addmm_(for_low, down, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        return for_x, None, None, torch.mm(for_low.t(), x).mul_(ctx.scale), for_up.mul_(ctx.scale), None
