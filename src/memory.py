"""GPU memory of a training step of SD3, by arithmetic: weights, gradients, optimizer, and what the forward pass keeps for the backward one.

What a block keeps, in numbers for each of its tokens; d is the width of the model. A number has 2 bytes under autocast and 4 without it.

    any block              2 d    inputs of the two layer norms
                           2 d    queries and keys before their norm; if stacked and joint (`src/attention.py`) values with them
                           4 d    queries, keys, values and the result of attention
                           4 d    input of GELU
    a trained layer        its input, d or 4 d; queries, keys and values share theirs, unless an adapter has
                           dropout: then each has its own, and a byte for each number of it
      with an adapter      its rank besides, between the two matrices
    trained modulation     2 d    results of the layer norms
                           2 d    results of attention and MLP before their gates
    trained q and k norms  2 d    queries and keys before their weights (nothing under autocast)
    a dual block           all of this again for image tokens, but for layer norms, GELU and MLP, and copies of values and result

Of a single picture what attention gives is cut into image and text without a copy: inputs of the layers after it are there already. A
compiled block does not keep what it can compute again from what is there: results of norms, and the second norm's input where the results
before the gates are kept.

What DoRA computes besides is not among this; `plan.step_memory` counts it. The tests count what autograd keeps, on tensors without
memory (`tests/test_memory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from src import lora

IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
DUAL = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
# Numbers (times d) that are alive besides in the backward pass of one block: gradients of the MLP's 4 d before and after GELU, of its
# result and of the residual.
WORKING = 10


@dataclass(frozen=True)
class Step:
    """One forward and backward pass.

    Attributes:
        batch: pictures; image_tokens: N, of a picture, one for 16 x 16 pixels; text_tokens: L.
        autocast: computes in 16 bits; wide: the transformer's own weights are fp32.
        checkpoint_every: every how many blocks one keeps its input alone; 0: none.
        compiled: blocks are compiled; packed: frozen weights are quantised, so that projections are not stacked.
    """

    batch: int
    image_tokens: int
    text_tokens: int
    autocast: bool = True
    wide: bool = False
    checkpoint_every: int = 0
    compiled: bool = False
    packed: bool = False


def _trains(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def _rank(layer: nn.Module) -> int:
    """Of the layer's adapter, 0 without one."""
    adapters = getattr(layer, "lora_A", {})
    return sum(adapter.out_features for adapter in adapters.values())


def _apart(layer: nn.Module) -> bool:
    """Whether the layer's adapter reads an input of its own, of which dropout leaves a part."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in getattr(layer, "lora_dropout", nn.ModuleDict()).values())


def _layers(block: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Those of the linear layers that the block has; the last block has no text after its attention."""
    modules = dict(block.named_modules())
    return {name: modules[name] for name in names if name in modules}


def _size(step: Step) -> int:
    return 2 if step.autocast else 4


def _stacked(layers: dict[str, nn.Module], step: Step) -> list[nn.Module]:
    """Those that give queries, keys and values, if `attention.stack` puts them together."""
    projections = [layer for name, layer in layers.items() if name.endswith(("_q", "_k", "_v", "_q_proj", "_k_proj", "_v_proj"))]
    can = step.autocast and not step.packed and all(isinstance(layer, lora.PlainLora) for layer in projections)
    return projections if can else []


def _inputs(layers: dict[str, nn.Module], step: Step, *, own_result: bool) -> int:
    """Bytes per token of the kept inputs of layers that are trained, or adapted.

    Args:
        own_result: the layer after attention reads a copy of its result (of the joint ones of several pictures, cut into image and text),
            not the result itself.
    """
    size, total, shared = _size(step), 0, 0
    for name, layer in layers.items():
        if not _trains(layer):
            continue
        total += _rank(layer) * size
        if _apart(layer):
            total += layer.in_features * (size + 1)  # a byte for each number that may be dropped
        elif name.endswith(("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj")):
            shared = layer.in_features * size
        elif not name.endswith(("to_out.0", "to_add_out")) or own_result:
            total += layer.in_features * size
    return total + shared


def _attention(d: int, norms: nn.Module | None, layers: dict[str, nn.Module], step: Step, *, joint: bool) -> int:
    """Bytes per token: queries and keys before their norm, then queries, keys, values and the result.

    Args:
        layers: of this stream; joint: with the other one, so that values are copied.
    """
    before = 0 if norms is None else 3 if joint and _stacked(layers, step) else 2
    normed = 2 if _trains(norms) and not (step.compiled or step.autocast) else 0
    return d * (before + 4 + normed) * _size(step)


def _stream(block: nn.Module, names: Sequence[str], modulation: nn.Module, norms: nn.Module | None, step: Step) -> int:
    """Bytes per token of one stream of a block, its share of the joint attention included."""
    d, size, layers = block.attn.to_q.in_features, _size(step), _layers(block, names)
    mlp = any(name.endswith("net.2") for name in layers)  # and with it a second layer norm
    normed = (2 if mlp else 1) * size
    total = d * (normed + 4 * size * mlp) + _attention(d, norms, layers, step, joint=True)
    total += _inputs(layers, step, own_result=step.batch > 1)
    if _trains(modulation):
        total += d * size * mlp if step.compiled else d * (normed + 2 * size * mlp)
    return total


def _second_attention(block: nn.Module, step: Step) -> int:
    """Bytes per image token of a dual block's second attention."""
    if block.attn2 is None:
        return 0
    d = block.attn2.to_q.in_features
    gate = d * _size(step) if _trains(block.norm1) else 0
    layers = _layers(block, DUAL)
    return _attention(d, block.attn2.norm_q, layers, step, joint=False) + _inputs(layers, step, own_result=False) + gate


def block_bytes(block: nn.Module, step: Step) -> int:
    """Bytes that a block keeps for its backward pass, of a batch."""
    image = _stream(block, IMAGE, block.norm1, block.attn.norm_q, step) + _second_attention(block, step)
    text = _stream(block, TEXT, block.norm1_context, block.attn.norm_added_q, step)
    return step.batch * (image * step.image_tokens + text * step.text_tokens)


def activation_bytes(transformer: nn.Module, step: Step) -> tuple[int, int]:
    """Bytes that are kept until the backward pass begins, and the most that it needs besides at any time.

    Blocks before the first that trains something keep nothing: no gradient passes them.

    Args:
        transformer: on the meta device, with adapters or trained weights as in the run.
    """
    blocks = list(transformer.transformer_blocks)
    d, size = blocks[0].attn.to_q.in_features, _size(step)
    outside = [module for name, module in transformer.named_children() if name not in ("transformer_blocks", "norm_out", "proj_out")]
    first = 0 if any(_trains(module) for module in outside) else next((i for i, block in enumerate(blocks) if _trains(block)), len(blocks))
    tokens = step.batch * (step.image_tokens + step.text_tokens)
    kept, again = 0, 0
    for index, block in enumerate(blocks[first:], start=first):
        own = block_bytes(block, step)
        if step.checkpoint_every and index % step.checkpoint_every == 0:
            kept, again = kept + tokens * d * size, max(again, own)
        else:
            kept += own
    trains_end = _trains(transformer.norm_out) or _trains(transformer.proj_out)
    kept += step.batch * step.image_tokens * d * size * (3 if trains_end else 1)  # the last norm
    copies = _copies(transformer, step)
    return kept + (0 if step.checkpoint_every == 1 else sum(copies)), again + max(copies) + WORKING * tokens * d * size


def _copies(transformer: nn.Module, step: Step) -> list[int]:
    """Bytes of the 16-bit copies that autocast makes of each block's trained weights, where these are fp32 as those of adapters are."""
    if not step.autocast:
        return [0 for _ in transformer.transformer_blocks]
    return [2 * _narrowed(block, step) for block in transformer.transformer_blocks]


def _narrowed(block: nn.Module, step: Step) -> int:
    named = [(name, weight) for name, weight in block.named_parameters() if weight.requires_grad and weight.ndim > 1]
    return sum(weight.numel() for name, weight in named if step.wide or "lora_" in name)


def forward_bytes(transformer: nn.Module, step: Step) -> int:
    """Bytes that are there at the end of a forward pass alone: autocast's copies of weights, which a checkpointed block's backward pass
    does not keep, but which autocast remembers as long as it lasts. It remembers what it made itself: not B of a plain LoRA, no stacked A.
    """
    if step.checkpoint_every != 1 or step.compiled or not step.autocast:
        return 0
    return sum(2 * (_narrowed(block, step) - _unremembered(block, step)) for block in transformer.transformer_blocks)


def _unremembered(block: nn.Module, step: Step) -> int:
    plain = {layer for layer in block.modules() if isinstance(layer, lora.PlainLora)}
    stacked = {layer for names in (IMAGE, TEXT, DUAL) for layer in _stacked(_layers(block, names), step)}
    return sum(_rank(layer) * layer.out_features for layer in plain) + sum(_rank(layer) * layer.in_features for layer in stacked)


def peak_bytes(
    *, resident: float, gradients: float, kept: float, working: float, forward: float = 0, updating: float = 0, accumulated: bool = False
) -> float:
    """The highest point of a step: when the forward pass ends, when the backward pass begins or ends, or while the weights are updated.

    Gradients grow while what was kept shrinks, so the two are not there together, unless earlier micro-batches left gradients.

    Args:
        resident: weights, optimizer state, average; gradients, kept, working: bytes; forward: `forward_bytes`; updating: what the
            optimizer needs for a moment.
    """
    earlier = gradients if accumulated else 0
    return resident + max(earlier + kept + forward, max(gradients, earlier + kept) + working, gradients + updating)
