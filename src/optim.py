"""Optimizers and learning-rate schedules by name. The optional packages are imported when something is built."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterable

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PACKAGES = {"adamw": None, "adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "adafactor": None}  # package that each needs besides torch


def check(name: str) -> None:
    """Refuses an optimizer whose package is missing, without importing anything.

    Raises:
        ValueError: unknown name, or the package to install.
    """
    if name not in PACKAGES:
        raise ValueError(f"--optimizer {name} is unknown; choose from {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    if package and importlib.util.find_spec(package) is None:
        install = f"{sys.executable} -m pip install {package}"
        raise ValueError(f"--optimizer {name} needs the package {package}: {install}, or use --optimizer adamw")


def build(
    parameters: Iterable[Parameter],
    *,
    name: str,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    epsilon: float = 1e-8,
    device: torch.device,
) -> Optimizer:
    """The optimizer `name` over `parameters`; all of them decouple the weight decay.

    adamw is fused on CUDA (one kernel per step). adamw8bit keeps both moments in 8 bits for tensors of at least 4096 numbers.
    prodigy estimates its step size, `learning_rate` only scales it: leave it at 1. adafactor keeps a row and a column of
    second moments and no first one: `betas` and `epsilon` do not apply. Its step is `learning_rate`, as Adam's; torch's Adafactor
    also multiplies by the root mean square of the weights, which is 0 for a LoRA's B.

    Raises:
        ValueError: see `check`; or nothing to train.
    """
    check(name)
    parameters = list(parameters)
    if not parameters:
        raise ValueError("nothing to train: no parameter was selected; check the flags that choose layers and blocks")
    adam = {"lr": learning_rate, "betas": tuple(betas), "eps": epsilon, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type == "cuda", **adam)
    if name == "adamw8bit":
        return _adamw8bit()(parameters, **adam)
    if name == "prodigy":
        from prodigyopt import Prodigy

        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line on every rank
            # both switches as its authors advise for diffusion models: a warm-up must not inflate the estimate
            return Prodigy(parameters, use_bias_correction=True, safeguard_warmup=True, **adam)
    from transformers.optimization import Adafactor

    optimizer = Adafactor(parameters, lr=learning_rate, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    optimizer.kind = "Adafactor of transformers"  # its name in checkpoints: torch's class has the same name and another state
    return optimizer


def _adamw8bit() -> type[Optimizer]:
    """bitsandbytes' AdamW8bit without its wait for the GPU after every weight tensor: 900 per step if a full transformer is trained."""
    from bitsandbytes import optim as stock

    class AdamW8bit(stock.AdamW8bit):  # its name in checkpoints
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            assert closure is None, "no optimizer here takes a closure"
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()  # moves a loaded state
                self.initialized = True
            for index, group in enumerate(self.param_groups):
                for number, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, index, number)
                    self.update_step(group, parameter, index, number)

    return AdamW8bit


def schedule(
    optimizer: Optimizer, name: str, *, warmup_steps: int = 0, total_steps: int, cycles: int = 1, power: float = 1.0
) -> LRScheduler:
    """diffusers' schedule `name`, to be stepped once per optimizer step whatever the number of processes.

    Do not pass it through `accelerator.prepare`: that steps it once per process, so that it ends too early.
    Source: diffusers.optimization.get_scheduler.
    """
    from diffusers.optimization import get_scheduler

    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps, num_cycles=cycles, power=power)


def rate(schedule: LRScheduler) -> float:
    """The learning rate of the next step; prodigy's is the schedule's rate times its current estimate of the step size."""
    group = schedule.optimizer.param_groups[0]
    return group["lr"] * group.get("d", 1.0)


def learning_rate(peak: float, scale: bool, global_batch: int) -> float:
    """The learning rate to use: `peak`, times the global batch with --scale_lr (batch x accumulation x processes)."""
    return peak * global_batch if scale else peak
