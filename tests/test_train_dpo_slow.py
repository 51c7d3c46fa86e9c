"""Diffusion-DPO as people start and stop it: kill -9, two processes, the wrapper."""

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file
from test_train_dpo import SHOWN, World, make_pairs, saved

from src import metrics

pytestmark = pytest.mark.slow
WRAPPER = ["bash", "scripts/train_dpo_sd_v1_5.sh"]

# Some seconds of training with everything that has a state: schedule, EMA, an open window of metrics, loader workers.
LONG = dict(
    learning_rate=1e-3, lr_scheduler="cosine", use_ema=True, caption_dropout=0.3, no_hflip=True, max_train_steps=40, checkpointing_steps=5,
    checkpoints_total_limit=2, logging_steps=4, train_batch_size=2, gradient_accumulation_steps=2, num_validation_pairs=2,
    validation_steps=20, dataloader_num_workers=1, **SHOWN,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_sd15_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("dpo")
    return World(tiny_sd15_folder, make_pairs(root / "pairs"), root / "cache")


def launch(world, out: Path, log: str, ranks: int = 1, **flags) -> runs.Forked:
    """Starts the script as one process or several; prints to `out`.LOG."""
    return runs.fork(["train_dpo_sd15.py", *world.argv(out, **flags)], out.with_suffix(f".{log}"), ranks)


def step_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return max([line["step"] for line in metrics.read(path)], default=0) if path.exists() else 0


def test_killed_at_a_random_moment_it_ends_like_an_uninterrupted_run(world, tmp_path):
    whole, out, step = tmp_path / "whole", tmp_path / "run", random.SystemRandom().randint(6, 28)
    runs.finish(launch(world, whole, "log", **LONG), whole.with_suffix(".log"))
    print(f"killed after step {step}")
    process = launch(world, out, "killed", **LONG, resume_from_checkpoint="latest")
    runs.wait_for(process, lambda: step_of(out) >= step, out.with_suffix(".killed"))
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (out / "unet").exists()
    runs.finish(launch(world, out, "resumed", **LONG, resume_from_checkpoint="latest"), out.with_suffix(".resumed"))
    for folder in ("", "raw", "checkpoint-40"):
        runs.assert_identical(saved(whole / folder), saved(out / folder))
    runs.assert_identical(runs.state(whole / "checkpoint-40"), runs.state(out / "checkpoint-40"))
    assert runs.lines(whole) == runs.lines(out) and not list(out.glob("*.tmp"))


# One process with batch 4 and two with batch 2 sum the same gradients in another order. Adam's epsilon above every gradient keeps its steps
# proportional to them (otherwise the sign of a zero decides).
SHARED = dict(
    learning_rate=0.5, adam_epsilon=1.0, lr_scheduler="cosine", max_train_steps=12, checkpointing_steps=100, caption_dropout=0.3,
    no_hflip=True, num_validation_pairs=2, validation_steps=6, adam_weight_decay=0,
)  # fmt: skip


@pytest.mark.parametrize("way", ["full", "lora"])
def test_two_processes_are_one_with_twice_the_batch(world, tmp_path, way):
    flags = SHARED | (dict(use_lora=True, rank=4) if way == "lora" else {})
    runs.finish(launch(world, tmp_path / "one", "log", **flags, train_batch_size=4), tmp_path / "one.log")
    pair = World(world.model, world.data, tmp_path / "cache")  # empty: the two fill it together
    said = runs.finish(launch(pair, tmp_path / "two", "log", ranks=2, **flags, train_batch_size=2), tmp_path / "two.log")
    assert "step(s) of 4" in said
    one, two = runs.lines(tmp_path / "one"), runs.lines(tmp_path / "two")
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for expected, line in zip(one, two, strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-6)
    moved = runs.values(tmp_path / "one", "val_loss")
    assert abs(moved[-1] - moved[0]) > 1e-3  # else the weights would not matter


def test_the_wrapper_trains_and_answers_a_wrong_flag_at_once(world, tmp_path):
    """Processor time counts, not the clock: other programs may be running."""
    env = runs.environment(TINY="1")
    start = os.times()
    command = WRAPPER + world.argv(tmp_path / "wrong", resolution=500)
    process = subprocess.run(command, cwd=runs.ROOT, env=env, capture_output=True, text=True)
    end = os.times()
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "try 496" in process.stderr
    assert end.children_user + end.children_system - start.children_user - start.children_system < 5
    out = tmp_path / "run"
    command = WRAPPER + world.argv(out, lr_scheduler=None, validation_steps=2)
    runs.finish(runs.start(command, out.with_suffix(".log"), TINY="1", NUM_PROCESSES="1"), out.with_suffix(".log"))
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert weights and all(torch.isfinite(value).all() for value in weights.values())
