"""Metrics: means over samples, micro-batches, steps and processes, in metrics.jsonl and the tracker under one name each."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from src.runtime import Run

NAMES = {
    "step": "optimizer steps done",
    "loss": "training loss: squared error of the velocity or noise (mean over latent values), preference loss, policy loss with the "
    "weighted KL, or what ReFL makes of the reward; mean over the window's samples",
    "instance_loss": "DreamBooth: the part of loss that the subject's pictures give",
    "prior_loss": "DreamBooth: the same for pictures of its class; loss is instance_loss + --prior_loss_weight * this",
    "grad_norm": "global norm of the gradient before clipping, mean over the window",
    "lr": "learning rate of the next step; prodigy's is the step size that it has found, times that of the schedule",
    "epoch": "passes over the training set so far; in reinforcement learning rounds of sampling and training",
    "accuracy": "share of pairs that the model prefers as people do: its error fell more on the winner than on the loser; ties count half",
    "policy_margin": "squared error of the predicted noise on the loser minus that on the winner",
    "reference_margin": "that margin of the reference model",
    "winner_gain": "by how much the model's squared error on the winners is below the reference's; negative: it forgets to draw them, too",
    "loser_gain": "the same on the losers; below winner_gain, or nothing is preferred",
    "val_loss": "the training loss on held-out samples with fixed noise, mean over noise levels",
    "val_accuracy": "the accuracy on held-out pairs with fixed noise, mean over noise levels",
    "val_loss_sigma_0.25": "that loss at noise level 0.25: detail",
    "val_loss_sigma_0.5": "that loss at noise level 0.5",
    "val_loss_sigma_0.75": "that loss at noise level 0.75: the median of training with shift 3",
    "val_loss_sigma_0.95": "that loss at noise level 0.95: composition",
    "reward": "weighted sum of the scorers on pictures drawn for training, mean over those of the epoch or window that could be judged",
    "reward_std": "standard deviation of that sum over those pictures",
    "group_std": "mean over prompts of the standard deviation of that sum over a prompt's pictures of the epoch",
    "pretrain_loss": "squared error of the predicted noise on the captioned pictures of the pre-training loss, before its weight",
    "unjudged": "pictures of the epoch that a scorer could not judge: they are left out of the update",
    "no_signal": "share of the epoch's pictures whose advantage is 0, as in a group of equal rewards",
    "policy_loss": "the part of the loss that follows the reward; 0 at ratio 1, so its size says nothing",
    "kl": "KL divergence of a denoising step from the reference's, nats, joint over the latent (flow_grpo: times the length of the step; "
    "nft: squared velocity difference); 0 where it has no weight",
    "log_ratio": "mean absolute log-ratio of a replayed denoising step to the policy that drew it, nats; 0 in the first update of an epoch",
    "drift": "mean log-ratio with its sign, as it is clipped, nats; below 0 (minus the KL of two policies) unless guard takes that out",
    "clip_fraction": "share of the replayed steps whose log-ratio lies beyond the clip",
    "clip_above": "share of them whose log-ratio lies above it: those below are clip_fraction - clip_above",
    "skipped_updates": "updates of the epoch that were left out because no advantage was other than 0",
    "eval_reward": "the training reward on the evaluation prompts, deterministic sampler, fixed seeds",
    "images_per_second": "training samples per second over all processes, without validation and saving",
    "seconds": "seconds since this process started to train, validation and saving included",
    "memory_gb": "peak memory of the main process: on the GPU, or in RAM without one (1 GB = 10^9 bytes)",
}
FAMILIES = {  # prefixes of names that end in a scorer's name
    "reward/": "this scorer on pictures drawn for training, on its own scale",
    "eval/": "this scorer on the evaluation prompts, deterministic sampler, fixed seeds",
}
VARYING = frozenset({"images_per_second", "seconds", "memory_gb"})  # the only metrics that differ in a resumed run


def meaning(name: str) -> str | None:
    """The explanation of a metric, or None: then it must not be written."""
    return NAMES.get(name) or next((text for start, text in FAMILIES.items() if name.startswith(start)), None)


class Log:
    """Collects scalars on the device, once per optimizer step, and writes a line of means every `every` steps and at the last one.

    A part of every checkpoint. Before its first line it cuts metrics.jsonl back: to the resumed step, or to nothing in a fresh
    run. Shows a progress bar on the main process.

    Args:
        every: optimizer steps per line.
        total: optimizer steps of the run (None: --max_train_steps).
        images_per_add: pictures that one call of `add` stands for (None: those of an optimizer step).
    """

    def __init__(self, run: Run, every: int, *, total: int | None = None, images_per_add: int | None = None):
        self.run, self.every = run, every
        self.path = run.output_dir / "metrics.jsonl"
        self.total: int = run.args.max_train_steps if total is None else total
        self.images_per_add: int = images_per_add or run.args.train_batch_size * run.args.gradient_accumulation_steps * run.world
        self._fresh: dict[str, list[Tensor]] = {}  # this process's values since the last synchronisation
        self._settled: dict[str, list[float]] = {}  # the open window's earlier values, means over the processes
        self._written = 0  # last step of the last window
        self._step = 0  # last step of all
        self._resumed, self._opened = 0, False
        self._known: list[set[str]] = []  # names in each line that metrics.jsonl already has for the resumed step
        self._bar: tqdm | None = None
        self._began, self._clock = time.monotonic(), None  # the clock starts after the first step, which loads, compiles, warms up
        self._first = self._began  # when the first step began: loading, resuming and validating before it do not count
        self._timed = 0  # steps since the clock started

    @property
    def step(self) -> int:
        """The last step that was written, or resumed from; 0 before."""
        return self._step

    def add(self, **scalars: Tensor) -> None:
        """Adds one optimizer step's values: scalar tensors, means over the micro-batches of this process.

        Every process passes the same names. Nothing waits for the GPU here.
        """
        for name, value in scalars.items():
            assert meaning(name), f"give {name!r} a line of meaning in metrics.NAMES"
            self._fresh.setdefault(name, []).append(value.detach().double().reshape(()))
        if self._clock is None:
            self._clock = time.monotonic()
        else:
            self._timed += 1

    def write(self, step: int, **floats: float) -> dict[str, float] | None:
        """To be called after every step; at the end of a window writes and returns a line with its means and `floats`, else returns None.

        Raises:
            FloatingPointError: a loss was not finite; names the step, on every process.
        """
        self._step = step
        self._advance()
        if step % self.every and step != self.total:
            return None
        self._settle()
        means = {name: math.fsum(values) / len(values) for name, values in self._settled.items()}
        now = time.monotonic()
        steps, since = (self._timed, self._clock) if self._timed else (1, self._first)  # the window has only the first step
        speed = steps * self.images_per_add / max(now - since, 1e-9)
        timing = {"images_per_second": speed, "seconds": now - self._began, "memory_gb": self.run.peak_memory() / 1e9}
        self._settled, self._written, self._timed, self._clock = {}, step, 0, now
        line = self._append(step, {**means, **floats, **timing})
        self._show(line)
        return line

    def record(self, step: int, **floats: float) -> None:
        """Writes one line of numbers that are not means of training steps: results of a validation.

        A run killed after its last validation and resumed at its last step validates again; its line exists and is not written twice.
        """
        if not self._opened:
            self._rewind()
        if step != self._resumed or {"step", *floats} not in self._known:
            self._append(step, floats)

    def _advance(self) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self.total, initial=self._step - 1, disable=not self.run.is_main, unit="step", mininterval=0.5)
        self._bar.update(self._step - self._bar.n)

    def _show(self, line: dict[str, float]) -> None:
        shown = {"loss": ".4f", "reward": ".4g", "lr": ".2e", "images_per_second": ".2f", "memory_gb": ".2f"}
        units = {"images_per_second": "img/s", "memory_gb": "GB"}
        self._bar.set_postfix({units.get(name, name): format(line[name], spec) for name, spec in shown.items() if name in line})
        if self._step == self.total:
            self._bar.close()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Time spent inside (validation, saving) does not count for images_per_second; called on every process."""
        self._settle()  # waits for the GPU: pending work of earlier steps is training time
        began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            if self._clock is None:
                self._first = now
            else:
                self._clock += now - began

    def _settle(self) -> None:
        """Moves the fresh values to the host as means over the processes: one synchronisation."""
        if not self._fresh:
            return
        together = torch.cat([torch.stack(values) for values in self._fresh.values()])  # (names x steps,)
        numbers = iter(self.run.mean(together).tolist())
        for name, values in self._fresh.items():
            self._settled.setdefault(name, []).extend(next(numbers) for _ in values)
        self._fresh = {}
        # A finite loss may have a non-finite gradient, whose update ruins the weights. Only fp16's loss scale skips such steps.
        scaled = getattr(self.run.accelerator, "scaler", None) is not None
        for name, values in self._settled.items():
            for index, value in enumerate(values):
                if name.endswith("loss" if scaled else ("loss", "grad_norm")) and not math.isfinite(value):
                    refl = hasattr(self.run.args, "grad_scale")  # a scorer is a part of its gradient
                    judged = ". The scorer's own gradient may be the cause: a root or a division at 0" if refl else ""
                    raise FloatingPointError(
                        f"{name} is {value} at step {self._written + 1 + index}: nothing was saved since; go on from the last checkpoint "
                        f"with a smaller --learning_rate, more --lr_warmup_steps, or --mixed_precision bf16 or no{judged}"
                    )

    def _append(self, step: int, floats: dict[str, float]) -> dict[str, float]:
        unnamed = [name for name in floats if not meaning(name)]
        assert not unnamed, f"give {sorted(unnamed)} a line of meaning in metrics.NAMES"
        if not self._opened:
            self._rewind()
        finite = {name: value for name, value in floats.items() if math.isfinite(value)}
        if self.run.is_main:
            line = {"step": step, **{name: finite.get(name) for name in floats}}  # JSON has no NaN: null
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.run.accelerator.log(finite, step=step)
        return {"step": step, **floats}

    def _rewind(self) -> None:
        """Cuts metrics.jsonl back to the step that this run continues after; a last line cut short by a kill is dropped."""
        self._opened = True
        resumed = self._resumed
        if self.run.is_main and self.path.exists():
            kept = [line for line in read(self.path) if 0 < resumed and line["step"] <= resumed]
            self._known = [set(line) for line in kept if line["step"] == resumed]
            temporary = self.path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(temporary, self.path)

    def state_dict(self) -> dict[str, Any]:
        """The open window, so that a run resumed inside it writes the same line; call it on every process.

        Raises:
            FloatingPointError: a loss was not finite, so that no checkpoint is written after it.
        """
        self._settle()
        window = {name: list(values) for name, values in self._settled.items()}
        return {"step": self._step, "written": self._written, "window": window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the window of `state_dict()`."""
        self._step = self._resumed = int(state["step"])
        self._written = int(state["written"])
        self._settled = {name: list(values) for name, values in state["window"].items()}
        self._fresh, self._timed, self._first = {}, 0, time.monotonic()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as dictionaries, without a last line that a kill cut short.

    Raises:
        ValueError: a line before the last is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, text in enumerate(lines, start=1):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is damaged ({error.msg}); delete that line") from None
    return found
