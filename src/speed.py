"""How the model computes, not what: kernels of attention, gradient checkpointing, torch.compile. Results change by rounding at most.

A `model` is an SD3 transformer or an SD1.5 UNet of diffusers, bare or wrapped, with or without adapters.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from src import attention, norms
from src.lora import unwrap

# diffusers' names. Its own `set_attention_backend` has no effect here: SD3's and SD1.5's attention processors do not use it.
BACKENDS = {
    "native": None,  # torch chooses
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
NEED_CUDA = ("_native_cudnn", "_native_efficient")
# Limit of compiled variants of one function. A block of SD3 has four (first, dual, plain, last), each again without gradient, without
# adapters (the reference of RL), and per picture size. torch's limit of 8 would leave the rest uncompiled.
COMPILED_VARIANTS = 64


def check(args: argparse.Namespace) -> None:
    """Refuse flags that have no effect or do not work on this machine; not with --dry_run, whose run may be meant for another one.

    Raises:
        ValueError: naming the flag and the cure.
    """
    if args.dry_run:
        return
    cuda = torch.cuda.is_available()
    if args.allow_tf32 and not (cuda and torch.cuda.get_device_capability() >= (8, 0)):
        raise ValueError("--allow_tf32 has no effect here: it takes an NVIDIA GPU of the Ampere generation or later; leave it out")
    if args.attention_backend != "native" and getattr(args, "async_rewards", False):
        raise ValueError(f"--async_rewards does not go with --attention_backend {args.attention_backend}: torch has one such choice "
                         "for all threads, and the scorer's would meet it too; leave one of them out")  # fmt: skip
    if args.attention_backend in NEED_CUDA and not cuda:
        raise ValueError(f"--attention_backend {args.attention_backend} needs an NVIDIA GPU; use native")
    if args.attention_backend == "_native_cudnn" and args.deterministic:
        raise ValueError("--attention_backend _native_cudnn adds in no fixed order, which --deterministic excludes; use _native_flash")
    if args.compile_mode == "reduce-overhead" and not cuda:
        raise ValueError("--compile_mode reduce-overhead records CUDA graphs, which needs an NVIDIA GPU; use default")


def apply(model: nn.Module, args: argparse.Namespace) -> None:
    """Set up the model as the flags say; after adapters were added, before `accelerator.prepare`."""
    fewer_passes(model)
    set_attention(model, args.attention_backend)
    if args.gradient_checkpointing:
        checkpoint_blocks(model, args.checkpoint_every)
    if args.compile:
        compile_blocks(model, mode=args.compile_mode)


def fewer_passes(model: nn.Module) -> None:
    """Under autocast, take fewer passes through memory and keep less for the backward pass: norms, and projections of attention."""
    attention.stack(model)
    norms.lean(model)


def as_written(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Inside, compiled blocks run uncompiled: each batch size of validation would be compiled, only for a few forward passes."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


# --------------------------------------------------------------------------- attention


class _Under:
    """An attention processor that computes with one kernel. The choice is made inside, so that a recomputed forward pass makes it too."""

    def __init__(self, processor: Any, backend: SDPBackend):
        self.processor, self.backend = processor, backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(self.backend):
            return self.processor(*args, **kwargs)


def set_attention(model: nn.Module, name: str) -> None:
    """Compute every attention of the model with the kernel `name`, a key of BACKENDS. Where that kernel cannot work, torch raises."""
    from diffusers.models.attention_processor import Attention

    backend = BACKENDS[name]
    for module in unwrap(model).modules():
        if isinstance(module, Attention):
            plain = module.processor.processor if isinstance(module.processor, _Under) else module.processor
            module.set_processor(plain if backend is None else _Under(plain, backend))


def narrow_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of a model that only runs under autocast to autocast's dtype once, instead of in every forward pass.

    Results stay the same to the bit. `requires_grad` stays as it is, and so does the first layer: inputs are converted to its dtype.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for weight in (weight for layer in layers[1:] for weight in layer.parameters(recurse=False)):
        weight.data = weight.data.to(dtype)


# --------------------------------------------------------------------------- gradient checkpointing


def blocks(model: nn.Module) -> list[nn.Module]:
    """The units of gradient checkpointing, in order: SD3's transformer blocks, a UNet's residual and transformer blocks.

    diffusers never recomputes the first block in the middle of a UNet.
    """
    model = unwrap(model)
    if hasattr(model, "transformer_blocks"):
        return list(model.transformer_blocks)
    units = [module for module in model.modules() if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    return [module for module in units if module is not model.mid_block.resnets[0]]


def checkpoint_blocks(model: nn.Module, every: int = 1) -> None:
    """Save only the inputs of every `every`-th block and recompute it in the backward pass; the other blocks save all they need.

    With `every` 2 half of the memory is saved for half of the extra time.
    """
    chosen = {id(block) for block in blocks(model)[::every]}

    def run(block: nn.Module, *inputs: Any) -> Any:
        if id(block) not in chosen:
            return block(*inputs)
        return checkpoint(block.__call__, *inputs, use_reentrant=False)

    unwrap(model).enable_gradient_checkpointing(run)


# --------------------------------------------------------------------------- compiling


def compile_blocks(model: nn.Module, *, mode: str = "default", **options: Any) -> None:
    """torch.compile each repeated part in place: names in the state dict, adapters and hooks stay as they are.

    Parts, not the full model: equal blocks share their code, so that compiling takes a tenth of the time for nearly the same speed.

    Args:
        mode: of torch.compile; "reduce-overhead" records CUDA graphs.

    Raises:
        RuntimeError: in a later forward pass, if there are more variants than COMPILED_VARIANTS; nothing silently runs uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.optimize_ddp = False  # it would split blocks at DDP's buckets; they are small enough to overlap as they are
    model = unwrap(model)
    parts = model.transformer_blocks if hasattr(model, "transformer_blocks") else [*model.down_blocks, model.mid_block, *model.up_blocks]
    for part in parts:
        part.compile(**({"mode": mode} if mode != "default" else {}), **options)
