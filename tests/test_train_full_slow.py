"""Full fine-tuning as people start and stop it: killed processes, two processes, the wrapper."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import train_full_finetuning_sd3 as script
from src import checkpoint, metrics

pytestmark = pytest.mark.slow
WRAPPER = ["bash", "scripts/train_full_finetuning_sd3.sh"]
PROMPT = "a red ring"

# Some seconds of training with everything that has a state: bf16 weights rounded at random, 8-bit or fp32 moments, schedule, average.
LONG = dict(
    mixed_precision="bf16", weights_dtype="bf16", learning_rate=1e-3, lr_scheduler="cosine", use_ema=True, caption_dropout=0.3,
    no_hflip=True, max_train_steps=60, checkpointing_steps=5, checkpoints_total_limit=2, logging_steps=4, train_batch_size=2,
    dataloader_num_workers=1, num_validation_loss_images=2, validation_steps=20, validation_prompt=[PROMPT],
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_world(tiny_sd3_folder, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Output of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    runs.train(script, world.argv(out, **LONG))
    return out


def launch(world, out: Path, log: str, ranks: int = 1, **flags) -> runs.Forked:
    """Starts the script as one process or several; prints to `out`.LOG."""
    return runs.fork(["train_full_finetuning_sd3.py", *world.argv(out, **flags)], out.with_suffix(f".{log}"), ranks)


def step_of(out: Path) -> int:
    """The last step in metrics.jsonl."""
    path = out / "metrics.jsonl"
    return max([line["step"] for line in metrics.read(path)], default=0) if path.exists() else 0


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_the_validation_loss_falls_by_at_least_3_percent_in_60_steps(whole):
    """It fell by 9."""
    losses = runs.values(whole, "val_loss")
    assert len(losses) == 4 and losses[-1] < 0.97 * losses[0]


def assert_same_run(whole: Path, out: Path) -> None:
    assert files(whole) == files(out)
    for number in (55, 60):
        runs.assert_identical(runs.state(whole / f"checkpoint-{number}"), runs.state(out / f"checkpoint-{number}"))
    assert runs.lines(whole) == runs.lines(out)
    assert not list(out.rglob("*.tmp"))


def test_killed_at_a_random_moment_it_ends_like_an_uninterrupted_run(world, whole, tmp_path):
    """kill -9; the moment is drawn anew at every test run: within a step, while a checkpoint is written, while a picture is rendered."""
    chance = random.SystemRandom()
    step, pause = chance.randint(6, 40), chance.uniform(0, 0.1)
    print(f"killed {pause:.3f} s after step {step}")
    out = tmp_path / "run"
    process = launch(world, out, "killed", **LONG)
    runs.wait_for(process, lambda: step_of(out) >= step, out.with_suffix(".killed"))
    time.sleep(pause)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (out / "model_index.json").exists()
    runs.train(script, world.argv(out, **LONG, resume_from_checkpoint="latest"))
    assert_same_run(whole, out)


def test_sigterm_to_the_wrapper_saves_exits_0_and_resumes_exactly(world, whole, tmp_path):
    out = tmp_path / "run"
    log = out.with_suffix(".stopped")
    process = runs.start(WRAPPER + world.argv(out, **LONG), log, TINY="1", NUM_PROCESSES="1")
    runs.wait_for(process, lambda: step_of(out) >= 8, log)
    process.send_signal(signal.SIGTERM)
    said = runs.finish(process, log)
    assert "stopped after step" in said and "Traceback" not in said and not (out / "model_index.json").exists()
    runs.train(script, world.argv(out, **LONG, resume_from_checkpoint="latest"))
    assert_same_run(whole, out)


# One process with batch 4 and two with batch 2 sum the same gradients in another order: 1e-7 relative. Adam's epsilon above every
# gradient keeps its steps proportional to them (otherwise the sign of a zero decides), so losses agree far below 1e-5.
SHARED = dict(
    learning_rate=1.0, adam_epsilon=1.0, lr_scheduler="cosine", max_train_steps=12, checkpointing_steps=6, caption_dropout=0.3,
    no_hflip=True, num_validation_loss_images=3, validation_steps=6, validation_prompt=[PROMPT],
    validation_guidance_scale=4.0, use_ema=True, ema_decay=0.9,
)  # fmt: skip


def test_two_processes_are_one_with_twice_the_batch_and_one_continues_two(world, tmp_path):
    """The text encoders are outside the module that is wrapped: their gradients have to be averaged, too.

    1e-8: the bias of CLIP's keys has no gradient but rounding, a constant added to all keys changes no attention.
    """
    flags = SHARED | dict(train_text_encoder=True, cache_text=False)
    runs.train(script, world.argv(tmp_path / "one", **flags, train_batch_size=4))
    out = tmp_path / "two"
    said = runs.finish(launch(world, out, "log", ranks=2, **flags, train_batch_size=2), out.with_suffix(".log"))
    assert "step(s) of 4" in said  # the global batch: two processes of two
    one, two = runs.lines(tmp_path / "one"), runs.lines(out)
    for expected, line in zip(one, two, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    ours, theirs, base = (script_weights(folder) for folder in (tmp_path / "one", out, world.model))
    for name in ours:
        moved = (ours[name] - base[name]).abs().max()
        assert (ours[name] - theirs[name]).abs().max() <= 1e-4 * moved + 1e-8, name
    files = [folder / "samples/step-000012/00-0.png" for folder in (tmp_path / "one", out)]
    pictures = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1

    folder = out / "checkpoint-6"  # written by two processes
    runs.train(script, world.argv(tmp_path / "again", **flags, train_batch_size=4, resume_from_checkpoint=folder))
    assert checkpoint.find_latest(tmp_path / "again").name == "checkpoint-12"
    assert runs.values(tmp_path / "again", "loss") == pytest.approx(runs.values(out, "loss")[6:], rel=1e-5)


def script_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = {}
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        (file,) = (folder / part).glob("*.safetensors")
        found |= {f"{part}/{name}": value for name, value in load_file(file).items()}
    return found


def test_two_processes_round_bf16_weights_alike(world, tmp_path):
    """Each process rounds at random; were it not the same on both, they would drift apart and the losses with them."""
    flags = SHARED | dict(mixed_precision="bf16", weights_dtype="bf16", max_train_steps=8)
    runs.train(script, world.argv(tmp_path / "one", **flags, train_batch_size=4))
    out = tmp_path / "two"
    runs.finish(launch(world, out, "log", ranks=2, **flags, train_batch_size=2), out.with_suffix(".log"))
    assert runs.values(out, "loss") == pytest.approx(runs.values(tmp_path / "one", "loss"), rel=1e-2)  # bf16: 3 digits
