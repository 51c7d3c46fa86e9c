"""Where the time of an epoch of reinforcement learning goes: sampling, decoding, scoring, training; and its cost by arithmetic.

  python benchmarks/rl_epoch.py                                        # GRPO on models/tiny-sd3, on this machine
  python benchmarks/rl_epoch.py --memory                               # and whether memory grows with the pictures of an epoch
  python benchmarks/rl_epoch.py --trainer ddpo -- --pretrained_model_name_or_path models/stable-diffusion-3.5-medium --resolution 512 \\
      --prompts simple_animals --scorer aesthetic --mixed_precision bf16

The trainer itself runs, with a clock around its functions; flags after `--` are the trainer's and override the tiny recipe. Costs are in
forward passes of the transformer for one picture (two with guidance). A trained step counts by its FLOPs: as 2.13 with a LoRA on
SD3.5-medium, whose frozen weights need no gradient. "train" is the rest of an epoch: replay, backward pass, optimizer.
"""

import argparse
import contextlib
import functools
import importlib
import json
import platform
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from src import checkpoint, cli, memory, metrics, plan, policy, rewards, runtime
from src.pipelines import sd3, sd3_rollout

STAGES = ("sample", "decode", "score", "train", "hold")
PUBLISHED = {"Flow-GRPO: every step, guidance, KL": 76, "no guidance, no KL, window of 3": 16.4}  # forward passes per picture, 10 steps
TINY = """--pretrained_model_name_or_path models/tiny-sd3 --resolution 64 --mixed_precision no --prompts shapes --scorer shapes --rank 32
    --sample_batch_size 16 --sample_num_batches_per_epoch 8""".split()
FIXED = """--report_to none --seed 0 --num_eval_prompts 1 --num_eval_images 1 --eval_num_inference_steps 1
    --checkpointing_epochs 1000000""".split()


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("benchmark")
    g.add_argument("--trainer", choices=("grpo", "ddpo"), default="grpo", help="train_grpo_sd3.py or train_ddpo_sd3.py")
    g.add_argument("--epochs", type=cli.positive_int, default=3, help="measured epochs, after one to warm up")
    g.add_argument("--memory", action="store_true", help="also the peak memory of an epoch, and of one with four times the pictures")
    g.add_argument("--output", type=cli.path, help="also write the result there, as JSON")
    return parser


class Clock:
    """Seconds and forward passes of each stage of each epoch of a trainer."""

    def __init__(self) -> None:
        self.epochs: list[tuple[Counter, Counter]] = []  # seconds, forward passes
        self.seconds, self.passes, self.stage = Counter(), Counter(), None
        self._began = time.perf_counter()

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, stage: str, function: Callable) -> Callable:
        """The function, its time counted for `stage`; a call inside another stage counts for that one."""

        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            if self.stage is not None:
                return function(*args, **options)
            self.stage, began = stage, self.now()
            try:
                return function(*args, **options)
            finally:
                self.seconds[stage] += self.now() - began
                self.stage = None

        return run

    def counted(self, velocity: Callable) -> Callable:
        """The function, with its forward passes counted; all of them go through it."""

        @functools.wraps(velocity)
        def run(transformer: torch.nn.Module, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
            kind = self.stage or ("train" if torch.is_grad_enabled() else "reference")
            self.passes[kind] += len(latents)
            return velocity(transformer, latents, *rest)

        return run

    def ends_epoch(self, write: Callable) -> Callable:
        """`metrics.Log.write`, which a trainer calls at the end of every epoch."""

        @functools.wraps(write)
        def run(*args: Any, **options: Any) -> Any:
            now = self.now()
            self.seconds["train"] = now - self._began - sum(self.seconds.values())
            self.epochs.append((self.seconds, self.passes))
            self.seconds, self.passes = Counter(), Counter()
            line = write(*args, **options)
            self._began = self.now()
            return line

        return run

    def around(self) -> contextlib.ExitStack:
        """Inside, the trainers' functions are timed."""
        stack = contextlib.ExitStack()
        for owner, name, stage in (
            (sd3_rollout, "sample", "sample"), (sd3, "decode_latents", "decode"), (rewards.Rewards, "submit", "score"),
            (rewards.Rewards, "collect", "score"), (checkpoint.Checkpointer, "hold", "hold"), (rewards.Evaluator, "evaluate", "evaluate"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, self.timed(stage, getattr(owner, name))))
        stack.enter_context(mock.patch.object(sd3, "velocity", self.counted(sd3.velocity)))
        stack.enter_context(mock.patch.object(metrics.Log, "write", self.ends_epoch(metrics.Log.write)))
        return stack


def trainer_of(name: str) -> Any:
    return importlib.import_module(f"train_{name}_sd3")


def trainer_args(name: str, flags: list[str], folder: Path, epochs: int) -> argparse.Namespace:
    """The trainer's arguments; a wrong one exits as it does there."""
    own = ["--num_epochs", str(epochs), "--eval_epochs", str(epochs), "--output_dir", str(folder / "run"), "--cache_dir", str(folder)]
    return trainer_of(name).parse_args([*TINY, *FIXED, *flags, *own])


def measure(name: str, flags: list[str], epochs: int) -> tuple[argparse.Namespace, dict[str, float], dict[str, float]]:
    """The trainer's arguments; mean seconds per epoch and forward passes per picture, by stage, without the first epoch."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as temporary:
        args = trainer_args(name, flags, Path(temporary), epochs + 1)
        with clock.around():
            trainer_of(name).main(args)
    measured = clock.epochs[1:]
    seconds = {stage: sum(found[stage] for found, _ in measured) / epochs for stage in STAGES}
    pictures = policy.samples_per_epoch(args) * epochs
    return args, seconds, {kind: sum(found[kind] for _, found in measured) / pictures for kind in ("sample", "train", "reference")}


def step_cost(args: argparse.Namespace) -> float:
    """FLOPs of a trained step, forward and backward, over those of a forward pass."""
    transformer = sd3.transformer_from_config(args.pretrained_model_name_or_path, args.revision)
    policy.adapt(transformer, args)
    tokens = plan.text_tokens(args)
    forward, step = plan.step_flops(transformer, args.resolution, tokens, checkpointing=memory.checkpoint_every(args))
    return step / forward


def ideal_passes(*, steps: int, trained_steps: int, step_cost: float, guidance: bool, others: int) -> float:
    """Cost per picture in forward passes: sampling, trained steps, and for each of these `others` passes without gradient, of the
    reference and DiffusionNFT's old policy."""
    return (steps + trained_steps * (step_cost + others)) * (2 if guidance else 1)


def peak_memory(name: str, flags: list[str], batches: int) -> int:
    """Peak bytes of one epoch of `batches` batches, in a process of its own: allocated on the GPU, or resident beyond the libraries."""
    import peft  # noqa: F401  (the libraries' own memory is not the epoch's)
    from diffusers import StableDiffusion3Pipeline  # noqa: F401

    before = runtime.resident_peak()
    with tempfile.TemporaryDirectory() as temporary:
        args = trainer_args(name, [*flags, "--sample_num_batches_per_epoch", str(batches)], Path(temporary), epochs=1)
        trainer_of(name).main(args)
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else runtime.resident_peak() - before


def report(args: argparse.Namespace, seconds: dict[str, float], passes: dict[str, float], trained_steps: float) -> dict[str, Any]:
    """Print the table and return its numbers; trained_steps: of each picture and epoch."""
    pictures, total, cost = policy.samples_per_epoch(args), sum(seconds.values()), step_cost(args)
    guided = args.guidance_scale > 1
    counted = passes["sample"] + passes["reference"] + cost * passes["train"]
    others = bool(getattr(args, "kl_weight", 0)) + (getattr(args, "loss", None) == "nft")
    ideal = ideal_passes(steps=args.num_inference_steps, trained_steps=trained_steps, step_cost=cost, guidance=guided, others=others)
    worth = {"sample": passes["sample"], "train": passes["reference"] + cost * passes["train"]}
    print(f"{'stage':<8} {'s/epoch':>8} {'share':>7} {'passes/picture':>15}")
    for stage in STAGES:
        print(f"{stage:<8} {seconds[stage]:>8.2f} {seconds[stage] / total:>7.1%} {worth.get(stage, 0):>15.1f}")
    print(f"{'epoch':<8} {total:>8.2f} {1:>7.1%} {counted:>15.1f}   {pictures} pictures, {pictures / total:.2f} per second")
    pass_seconds = seconds["sample"] / (pictures * passes["sample"])
    bound = counted * pictures * pass_seconds
    published = "; ".join(f"{number:g} ({text})" for text, number in PUBLISHED.items())
    print(f"forward passes' worth per picture: {counted:.1f} counted, {ideal:.1f} by arithmetic; published settings: {published}")
    if counted < ideal:
        print("(batches whose groups all got equal rewards have no advantage, and are not replayed)")
    print(f"a trained step costs {cost:.2f} forward passes by FLOPs; at sampling's {1000 * pass_seconds:.2f} ms a pass and picture the "
          f"epoch would take {bound:.2f} s: {total / bound:.2f} times that was measured")  # fmt: skip
    return {"seconds": seconds, "passes": passes, "step_cost": cost, "counted": counted, "ideal": ideal,
            "pictures_per_second": pictures / total, "over_bound": total / bound}  # fmt: skip


def trained_steps(name: str, args: argparse.Namespace) -> float:
    """Trained steps of each picture in an epoch, from the flags alone."""
    first, stop = args.window_range
    window = args.window_size or stop - first
    if name == "ddpo":
        return args.num_inner_epochs * max(1, round(args.train_timestep_fraction * window))
    return args.nft_levels if args.loss == "nft" else window


def main(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    used, seconds, passes = measure(args.trainer, flags, args.epochs)
    result = report(used, seconds, passes, trained_steps(args.trainer, used))
    if args.memory:
        few = used.sample_num_batches_per_epoch
        peaks = []
        for batches in (few, 4 * few):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a fresh process for each
                peaks.append(pool.submit(peak_memory, args.trainer, flags, batches).result())
        where = "on the GPU" if torch.cuda.is_available() else "in RAM, waiting latents included"
        print(f"peak memory {where}: {peaks[0] / 1e6:.0f} MB with {few} batches an epoch, {peaks[1] / 1e6:.0f} MB with {4 * few}")
        result["peak_bytes"] = peaks
    if args.output:
        about = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
                 "threads": torch.get_num_threads(), "command": shlex.join(["python", *sys.argv])}  # fmt: skip
        if torch.cuda.is_available():
            about["gpu"] = torch.cuda.get_device_name()
        args.output.write_text(json.dumps({"trainer": args.trainer, **result, "about": about}, indent=1) + "\n")
    return result


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's arguments, and those of the trainer after `--`; a wrong flag of either is refused before anything is loaded."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = cli.parse(build_parser(), own)
    with tempfile.TemporaryDirectory() as temporary:
        trainer_args(args.trainer, flags, Path(temporary), args.epochs + 1)
    return args, flags


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
