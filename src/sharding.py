"""Weights sharded over processes (FSDP2): gathered for a checkpoint, and sharded again from one over any number of processes.

A sharded weight is a DTensor: each process holds a piece, and its `shape` is that of the full tensor. Every function here passes ordinary
tensors through, so that a run on one process takes the same path.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def sharded(value: Any) -> bool:
    """Whether it is a DTensor. If there is one, its module is imported already; importing it here would cost `--help` half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def gathered(tree: Any, *, keep: bool = True) -> Any:
    """The same nested state with sharded tensors gathered on the CPU; every process has to call it.

    Args:
        keep: False on processes that do not use the result: sharded tensors become None, or each process would fill the RAM.
    """
    if isinstance(tree, dict):
        return {key: gathered(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, keep=keep) for value in tree)
    if not sharded(tree):
        return tree
    together = whole(tree)
    return together.cpu() if keep else None


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered on every process if it is sharded."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a full tensor that all processes hold, sharded as `like` is."""
    if not sharded(like) or sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # no communication: all hold it


def placed_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state from a checkpoint, its moments sharded as their weights are."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not any(sharded(weight) for weight in weights):
        return state
    spread = {
        number: {
            name: placed(value, weights[number]) if isinstance(value, Tensor) and value.shape == weights[number].shape else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": spread}


def released(model: nn.Module) -> nn.Module:
    """Free gathered weights after every forward pass, also those of the root module, which FSDP2 would keep for the backward pass.

    After a pass without gradient they would stay and be used by the next pass, even if the weights were swapped since (EMA, old policy).
    """
    model.set_reshard_after_forward(True)
    return model


def policy(compute_dtype: torch.dtype) -> Any:
    """Mixed precision of FSDP2 without its cast of the inputs, which would round the timestep to bf16 (711 becomes 712)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def prepare(accelerator: Any, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """`accelerator.prepare` of both; under FSDP2 without a cast of the inputs, and under autocast as everywhere else."""
    if not getattr(accelerator, "is_fsdp2", False):
        return accelerator.prepare(model, optimizer)
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy(torch.bfloat16)  # fp16 was refused
        forward = model.forward

        def under_autocast(*args: Any, **kwargs: Any) -> Any:
            with accelerator.autocast():
                return forward(*args, **kwargs)

        model.forward = under_autocast
    model, optimizer = accelerator.prepare(model, optimizer)
    return released(model), optimizer


def check_whole(environ: Mapping[str, str]) -> None:
    """Refuse a launcher that would shard weights in a program that needs full weights on every process.

    Raises:
        ValueError: names the cure.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP2"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if environ.get(variable) == "true":  # the optimizer would update weights that the saved file and the average lack
            raise ValueError(f"{name} spreads weights, which this program keeps whole on every GPU: start it with --multi_gpu instead")


def check(environ: Mapping[str, str], *, pieces: bool, train_text_encoder: bool, optimizer: str, mixed_precision: str) -> None:
    """Refuse settings that do not work with sharded weights.

    Args:
        environ: environment variables, in which `accelerate launch` passes its configuration.
        pieces: the optimizer works piece by piece (bf16 weights).

    Raises:
        ValueError: names the flag and the cure.
    """
    if environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # its optimizer state loads on the same number of processes only
        raise ValueError("DeepSpeed is not supported: use --config_file scripts/accelerate/fsdp2.yaml, which spreads the weights as well")
    if environ.get("ACCELERATE_USE_FSDP") != "true" or int(environ.get("WORLD_SIZE", 1)) == 1:
        return
    if pieces:
        raise ValueError("--weights_dtype bf16 updates whole weights; under FSDP2 use fp32, with --mixed_precision bf16")
    if train_text_encoder:
        raise ValueError("--train_text_encoder does not work under FSDP2: leave it out or use plain data parallelism (--multi_gpu)")
    if mixed_precision == "fp16":  # accelerate would divide the gradients by the loss scale twice
        raise ValueError("--mixed_precision fp16 does not work under FSDP2: use bf16")
    if optimizer != "adamw":
        raise ValueError(f"--optimizer {optimizer} needs whole weights; under FSDP2 use --optimizer adamw")
