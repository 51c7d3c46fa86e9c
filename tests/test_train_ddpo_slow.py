"""DDPO as people start and stop it: killed, told to stop, on two processes, by its wrapper."""

import random
import signal
import subprocess
from pathlib import Path

import pytest
import runs
import torch

from src import metrics

pytestmark = pytest.mark.slow

# Everything with a state: statistics in use, average, schedule, a window that moves, several inner epochs.
LONG = dict(
    rank=2, learning_rate=1e-2, lr_scheduler="cosine", use_ema=True, num_epochs=12, checkpointing_epochs=2, checkpoints_total_limit=2,
    num_inner_epochs=2, window_size=1, per_prompt_stat_tracking_buffer_size=6, per_prompt_stat_tracking_min_count=3, eval_epochs=4,
    eval_scorers="shapes", report_to="tensorboard",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("ddpo")
    found = runs.make_rollouts(tiny_sd3_folder, root)
    found.prompts.write_text("a red circle on a blue background\na green square on a white background\na blue ring on a red background\n")
    return found


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Output of an uninterrupted process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(launch(world, out, "log", **LONG), out.with_suffix(".log"))
    return out


def launch(world, out: Path, log: str, ranks: int = 1, **flags) -> runs.Forked:
    """Starts the script as one process or several; prints to `out`.LOG."""
    return runs.fork(["train_ddpo_sd3.py", *world.argv(out, **flags)], out.with_suffix(f".{log}"), ranks)


def step_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return max([line["step"] for line in metrics.read(path)], default=0) if path.exists() else 0


def assert_same_run(one: Path, other: Path) -> None:
    for number in (40, 48):  # 12 epochs of 4 updates, the last two checkpoints
        runs.assert_identical(runs.state(one / f"checkpoint-{number}"), runs.state(other / f"checkpoint-{number}"))
    for folder in (".", "raw"):
        runs.assert_identical(runs.saved(one / folder), runs.saved(other / folder))
    assert runs.lines(one) == runs.lines(other)
    assert (other / "summary.png").is_file()


def test_killed_at_a_random_moment_it_ends_like_an_uninterrupted_run(world, whole, tmp_path):
    step, pause = 4 * random.SystemRandom().randint(2, 10), random.SystemRandom().uniform(0, 0.3)
    print(f"killed {pause:.3f} s after step {step}")
    out = tmp_path / "run"
    process = launch(world, out, "killed", **LONG)
    runs.wait_for(process, lambda: step_of(out) >= step, out.with_suffix(".killed"))
    try:
        process.wait(pause)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait(60)
    runs.finish(launch(world, out, "resumed", resume_from_checkpoint="latest", **LONG), out.with_suffix(".resumed"))
    assert_same_run(whole, out)


def test_told_to_stop_inside_an_epoch_it_saves_exits_well_and_continues(world, whole, tmp_path):
    out = tmp_path / "run"
    process = launch(world, out, "stopped", **LONG)
    runs.wait_for(process, lambda: step_of(out) >= 12, out.with_suffix(".stopped"))
    process.send_signal(signal.SIGTERM)
    text = runs.finish(process, out.with_suffix(".stopped"))
    assert "--resume_from_checkpoint latest goes on" in text
    runs.finish(launch(world, out, "resumed", resume_from_checkpoint="latest", **LONG), out.with_suffix(".resumed"))
    assert_same_run(whole, out)


def test_two_processes_are_one_with_batches_twice_as_large(world, tmp_path):
    """16 pictures an epoch: 2 batches of 8, or 2 of 4 on each of two processes. Same pictures, same statistics, same weights to 1e-5."""
    flags = dict(rank=2, learning_rate=1e-3, per_prompt_stat_tracking_min_count=3, num_inner_epochs=2, train_gradient_accumulation_steps=1,
                 adam_epsilon=1e-3, checkpointing_epochs=1)  # fmt: skip  # epsilon: or the sign of a gradient of nearly 0 decides
    one, two = tmp_path / "one", tmp_path / "two"
    runs.finish(launch(world, one, "log", sample_batch_size=8, **flags), one.with_suffix(".log"))
    runs.finish(launch(world, two, "log", ranks=2, sample_batch_size=4, **flags), two.with_suffix(".log"))
    for name, tensor in runs.weights(one).items():
        torch.testing.assert_close(runs.weights(two)[name], tensor, rtol=0, atol=1e-5)
    for a, b in zip(runs.lines(one), runs.lines(two), strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], rel=1e-2, abs=1e-3) for name in a)
    states = [runs.state(out / "checkpoint-8")["statistics"]["rewards"] for out in (one, two)]
    assert states[0].keys() == states[1].keys()
    for text, values in states[0].items():
        assert values == pytest.approx(states[1][text], rel=1e-3)


def test_the_wrapper_runs_its_tiny_recipe(world, tmp_path):
    """The shipped model, two small epochs: as the recipe says but for its size."""
    out = tmp_path / "run"
    command = ["bash", "scripts/train_aesthetic_ddpo_sd3.sh", "--num_epochs", "2", "--sample_batch_size", "4", "--num_eval_prompts", "4",
               "--eval_num_inference_steps", "2", "--eval_epochs", "2", "--report_to", "none", "--seed", "0", "--output_dir", str(out),
               "--cache_dir", str(world.cache)]  # fmt: skip
    process = runs.start(command, out.with_suffix(".log"), TINY="1", NUM_PROCESSES="1")
    runs.finish(process, out.with_suffix(".log"))
    assert len(runs.values(out, "reward/jpeg_compressibility")) == 2 and len(runs.values(out, "eval/shapes")) == 2
    assert (out / "pytorch_lora_weights.safetensors").is_file() and (out / "summary.png").is_file()
