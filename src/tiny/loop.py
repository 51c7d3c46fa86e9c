"""The plumbing of the builders: progress, checkpoints, averaged gradients."""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

RESOLUTION = 64  # pixels: 8 x 8 latents
logger = logging.getLogger("build")


def count(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def warmup_cosine(warmup: int, steps: int):
    """Return the learning rate's factor by step: up to 1 in `warmup` steps, then down a half cosine to 0.02."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return factor


def rank_and_processes() -> tuple[int, int]:
    """Return this process's number and how many share the work: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over processes: two of one thread each are twice as fast as one of two threads at this size."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # the same ones in every process
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, value in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(value.view_as(gradient))


class Progress:
    """Logs means and seconds per step, every 50 steps."""

    def __init__(self, name: str, steps: int, first: int = 0):
        self.name, self.steps, self.done = name, steps, first
        self.since, self.sums, self.n = time.perf_counter(), {}, 0

    def step(self, losses: dict[str, torch.Tensor]) -> None:
        """Count one step; every loss is a 0-d tensor."""
        self.done, self.n = self.done + 1, self.n + 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()
        if self.done % 50 == 0 or self.done == self.steps:
            if not math.isfinite(self.sums["loss"]):
                raise RuntimeError(f"{self.name}: the loss is not finite at step {self.done}")
            means = ", ".join(f"{name} {value / self.n:.4f}" for name, value in self.sums.items())
            logger.info("%s %d/%d: %s, %.3f s/step", self.name, self.done, self.steps, means, (time.perf_counter() - self.since) / self.n)
            self.since, self.sums, self.n = time.perf_counter(), {}, 0


def save(args: argparse.Namespace, name: str, step: int, **state) -> None:
    """Write a checkpoint to a temporary name, then rename it: a kill leaves the previous one."""
    path = Path(args.checkpoint_dir) / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {}
    for key, value in state.items():
        values[key] = value.get_state() if isinstance(value, torch.Generator) else value
        values[key] = value.state_dict() if hasattr(value, "state_dict") else values[key]
    torch.save({"step": step, **values}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def resume(args: argparse.Namespace, name: str, **state) -> int:
    """With `--resume`, load the checkpoint in place and return its number of steps; else, or without one, return 0."""
    path = Path(args.checkpoint_dir) / f"{name}.pt"
    if not args.resume or not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    for key, value in state.items():
        if isinstance(value, torch.Generator):
            value.set_state(saved[key])
        elif isinstance(value, list):
            torch._foreach_copy_(value, saved[key])
        else:
            value.load_state_dict(saved[key])
    logger.info("%s: resumed after step %d", name, saved["step"])
    return saved["step"]


def load_as_fp32(folder: str, configs: str) -> None:
    """Make a folder of fp16 weights load as fp32 unless a dtype is given, and readable for other users of a shared checkout.

    transformers 5 takes the type from the config, diffusers takes fp32: text encoders in fp16 beside a transformer in fp32 would crash.
    """
    for file in Path(folder).glob(configs):
        config = json.loads(file.read_text())
        for part in (config, *(config[name] for name in ("text_config", "vision_config") if name in config)):
            part["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
    for file in Path(folder).rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600
