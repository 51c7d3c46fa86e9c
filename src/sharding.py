"""Weights that are spread over processes (FSDP2): gathered whole for a checkpoint, spread again from one, whatever the number of processes.

A sharded weight is a DTensor: each process holds a piece, and its `shape` is that of the whole. Every function here passes ordinary
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
    """Whether it is a DTensor. Whoever made one has imported them; here that would cost every `--help` half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def gathered(tree: Any, *, keep: bool = True) -> Any:
    """The same nested state with whole tensors, on the CPU where they were sharded; every process has to call it.

    Args:
        keep: False where nobody will read it: in place of sharded tensors None, or each process would fill the RAM with a copy.
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
    """A sharded tensor in one piece, on every process."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor that all processes hold, spread as `like` is."""
    if not sharded(like) or sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # no communication: all hold it


def placed_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state from a checkpoint, its moments spread as the weights that they belong to."""
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
    """Lets go of what was gathered after every forward pass, in the model's own part as well, where FSDP2 keeps it for the backward pass.

    A pass without gradient would leave it behind, and the next one use it, whatever the weights hold by then: an average, the old policy.
    """
    model.set_reshard_after_forward(True)
    return model


def policy(compute_dtype: torch.dtype) -> Any:
    """Mixed precision of FSDP2 without its cast of the inputs, which would round the timestep to bf16 (711 becomes 712)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def prepare(accelerator: Any, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """`accelerator.prepare` of both; under FSDP2 with the inputs left as they are, and computing under autocast as everywhere else."""
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
    """Refuse a launcher that would spread weights in a program that keeps them whole on every process.

    Raises:
        ValueError: names the cure.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP2"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if environ.get(variable) == "true":  # the optimizer would step weights that the saved file and the average do not see
            raise ValueError(f"{name} spreads weights, which this program keeps whole on every GPU: start it with --multi_gpu instead")


def check(environ: Mapping[str, str], *, pieces: bool, train_text_encoder: bool, optimizer: str, mixed_precision: str) -> None:
    """Refuse what cannot be sharded.

    Args:
        environ: environment variables, where `accelerate launch` says what it was configured for.
        pieces: the optimizer works piece by piece (bf16 weights).

    Raises:
        ValueError: names the flag and the cure.
    """
    if environ.get("ACCELERATE_USE_DEEPSPEED") == "true":  # its optimizer keeps a state that no other number of processes can load
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
