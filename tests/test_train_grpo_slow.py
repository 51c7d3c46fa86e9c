"""The GRPO trainer as people start and stop it: killed, stopped through the wrapper, on two processes, and on the shipped tiny model."""

import random
import signal
import time
from pathlib import Path

import pytest
import runs
import torch

from src import checkpoint, metrics

pytestmark = pytest.mark.slow
WRAPPER = ["bash", "scripts/train_aesthetic_rlhf_grpo_lora_sd3.sh"]
EPOCHS = 12

# Everything that has a state, some seconds of it; what the wrapper's TINY recipe sets otherwise is given.
LONG = dict(
    group_size=4, rank=4, learning_rate=1e-2, num_epochs=EPOCHS, checkpointing_epochs=2, checkpoints_total_limit=2, eval_epochs=3,
    use_ema=True, lr_scheduler="cosine", kl_weight=0.01, async_rewards=True, eval_scorers="shapes", eval_prompts="shapes_held_out",
    report_to="tensorboard", sample_num_batches_per_epoch=4, cache_batch_size=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_rollouts(tiny_sd3_folder, tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Output of an uninterrupted process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(launch(world, out, "log", **LONG), out.with_suffix(".log"))
    return out


def launch(world, out: Path, log: str, ranks: int = 1, **flags) -> runs.Forked:
    """Starts the script as one process or several; prints to `out`.LOG."""
    return runs.fork(["train_grpo_sd3.py", *world.argv(out, **flags)], out.with_suffix(f".{log}"), ranks)


def step_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return max([line["step"] for line in metrics.read(path)], default=0) if path.exists() else 0


def assert_same_run(one: Path, other: Path) -> None:
    for number in (2 * EPOCHS - 4, 2 * EPOCHS):
        runs.assert_identical(runs.state(one / f"checkpoint-{number}"), runs.state(other / f"checkpoint-{number}"))
    for folder in (".", "raw"):
        runs.assert_identical(runs.saved(one / folder), runs.saved(other / folder))
    assert runs.lines(one) == runs.lines(other)
    assert (other / "summary.png").is_file() and not list(other.glob("*.tmp"))


def test_killed_twice_at_random_moments_it_ends_like_an_uninterrupted_run(world, whole, tmp_path):
    """kill -9 twice while it trains; the moments are drawn anew at every test run."""
    chance, out = random.SystemRandom(), tmp_path / "run"
    moments = sorted(chance.sample(range(2, 2 * EPOCHS - 1), 2))
    pauses = [chance.uniform(0, 0.5) for _ in moments]
    print(f"killed {pauses} s after steps {moments}")
    for number, (step, pause) in enumerate(zip(moments, pauses, strict=True)):
        process = launch(world, out, f"kill{number}", **LONG, resume_from_checkpoint="latest")
        runs.wait_for(process, lambda step=step: step_of(out) >= step, out.with_suffix(f".kill{number}"))
        time.sleep(pause)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)  # it may have ended meanwhile
    said = runs.finish(launch(world, out, "resumed", **LONG, resume_from_checkpoint="latest"), out.with_suffix(".resumed"))
    assert "resuming from" in said
    assert_same_run(whole, out)


def test_sigterm_saves_exits_0_and_resumes_exactly(world, whole, tmp_path):
    out = tmp_path / "run"
    process = launch(world, out, "stopped", **LONG)
    runs.wait_for(process, lambda: step_of(out) >= 6, out.with_suffix(".stopped"))
    process.send_signal(signal.SIGTERM)
    said = runs.finish(process, out.with_suffix(".stopped"))
    stopped = int(checkpoint.find_latest(out).name.split("-")[1])
    assert 6 <= stopped < 2 * EPOCHS and stopped % 2 == 0 and f"checkpoint-{stopped}" in said and "Traceback" not in said
    runs.finish(launch(world, out, "resumed", **LONG, resume_from_checkpoint="latest"), out.with_suffix(".resumed"))
    assert_same_run(whole, out)


# --------------------------------------------------------------------------- two processes

# The same gradients, summed in another order and by kernels of another batch size: 1e-6. An epsilon of Adam above every gradient keeps
# its steps proportional to them. Rewards are a smooth function of the pictures, or rounding could turn a byte of a JPEG.
SHARED = dict(
    group_size=8, rank=4, learning_rate=0.1, adam_epsilon=1.0, max_grad_norm=0, num_epochs=2, sample_num_batches_per_epoch=2,
    updates_per_epoch=2, kl_weight=0.01, window_size=3, eval_scorers="shapes", num_eval_prompts=3, num_eval_images=3,
)  # fmt: skip

SMOOTH = """
import sys
import train_grpo_sd3 as script
from src.scorers import Scores
from src.scorers.mixture import Mixture

def verdict(self, images, texts, metadata=None):
    total = 100 * images.mean((1, 2, 3))
    return Scores(total, {self.names[0]: total})

Mixture.__call__ = verdict
script.main(script.parse_args(sys.argv[1:]))
"""


def test_sixteen_on_one_process_are_eight_on_each_of_two(world, tmp_path):
    """Noise, groups and steps by position: metrics after two epochs agree to 1e-5, and both leave checkpoints (no process waits alone)."""
    (tmp_path / "smooth.py").write_text(SMOOTH)
    one, two = tmp_path / "one", tmp_path / "two"
    for out, ranks in ((one, 1), (two, 2)):
        argv = world.argv(out, **SHARED, sample_batch_size=16 // ranks, checkpointing_epochs=2)
        log = out.with_suffix(".log")
        runs.finish(runs.fork([tmp_path / "smooth.py", *argv], log, ranks, PYTHONPATH=str(runs.ROOT)), log)
    ours, theirs = runs.lines(one), runs.lines(two)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for expected, line in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-5)
    here, there = runs.weights(one), runs.weights(two)
    changed = max(value.abs().max() for name, value in here.items() if ".lora_B." in name)  # B starts at zero
    assert changed > 1e-3  # else nothing was compared
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-5, atol=1e-5)
    assert (two / "checkpoint-4/state.pt").is_file()


# --------------------------------------------------------------------------- the shipped tiny model


def test_a_few_epochs_on_the_shipped_model_through_the_wrapper(tmp_path):
    """The TINY recipe as it stands, but for its length: nothing breaks, and the held-out score stays where it was within 10 points."""
    out = tmp_path / "run"
    flags = runs.command_line(
        output_dir=out, cache_dir=tmp_path / "cache", num_epochs=2, num_eval_prompts=32, report_to="none", seed=0,
        sample_num_batches_per_epoch=4,
    )  # fmt: skip
    runs.finish(runs.start([*WRAPPER, *flags], tmp_path / "log", TINY="1", NUM_PROCESSES="1"), tmp_path / "log")
    evaluated = runs.values(out, "eval/shapes_strict")
    assert len(evaluated) == 2 and abs(evaluated[1] - evaluated[0]) <= 0.1 and 0.2 < evaluated[0] < 0.8
    assert len(runs.values(out, "reward")) == 2


def test_sharded_weights_draw_and_learn_as_whole_ones(tiny_sd3_folder, tmp_path):
    """FSDP2 over two processes: log-ratio 0 right after sampling, the gradient of one process, and back to the start of an epoch."""
    command, log = ["tests/sharded_rollout.py", tiny_sd3_folder], tmp_path / "log"
    said = runs.finish(runs.fork(command, log, ranks=2, PYTHONPATH=str(runs.ROOT)), log)
    assert said.count("as one process") == 2
