"""Checkpoints: whole or absent whatever happens, rotated by step, resumed to the bit, refused with a reason."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src import checkpoint, metrics, optim

ROOT = Path(__file__).parent.parent


class FakeRun:
    is_main = True
    world = 1
    signals = SimpleNamespace(install=lambda: None)

    def __init__(self, folder: Path, **flags):
        folder.mkdir(parents=True, exist_ok=True)
        self.output_dir, self.accelerator, self.lines = folder, SimpleNamespace(scaler=None), []
        self.args = argparse.Namespace(**flags)
        (folder / "args.json").write_text(json.dumps({"seed": 1, **flags}))

    def broadcast(self, value):
        return value

    def print(self, text):
        self.lines.append(text)


class Weights:
    """A part whose state is a flat dictionary of tensors."""

    def __init__(self, rank=2, value=0.0):
        self.tensors = {"a": torch.full((rank, 3), value), "b": torch.full((3, rank), value)}

    def state_dict(self):
        return {name: t.clone() for name, t in self.tensors.items()}

    def load_state_dict(self, state):
        for name, t in self.tensors.items():
            t.copy_(state[name])


def saver(folder, *, every=1, keep=None, parts=None, write_weights=None, **flags):
    parts = parts or {"lora": Weights()}
    return checkpoint.Checkpointer(FakeRun(folder, **flags), every=every, keep=keep, parts=parts, write_weights=write_weights)


def names(folder):
    return sorted(p.name for p in folder.glob("checkpoint-*"))


def test_saved_parts_come_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(4, 5))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.randn(4, 5)
    optimizer.step()
    part = Weights()
    part.tensors["a"].normal_()
    first = saver(tmp_path, parts={"lora": part, "optimizer": optimizer})
    first.save(7)

    fresh, other = Weights(), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4, 5))], lr=0.5)
    again = saver(tmp_path, parts={"lora": fresh, "optimizer": other})
    assert again.resume("latest") == 7
    assert torch.equal(fresh.tensors["a"], part.tensors["a"])
    mine, theirs = optimizer.state_dict(), other.state_dict()
    assert theirs["param_groups"][0]["lr"] == 0.1
    for key, value in mine["state"][0].items():
        assert torch.equal(theirs["state"][0][key], value)
    assert any("step 7" in line for line in again.run.lines)


def test_a_checkpoint_can_be_read_without_running_code(tmp_path):
    saver(tmp_path).save(3)
    state = torch.load(tmp_path / "checkpoint-3" / "state.pt", weights_only=True)
    assert state["step"] == 3 and set(state["lora"]) == {"a", "b"}
    assert json.loads((tmp_path / "checkpoint-3" / "args.json").read_text())["seed"] == 1


def test_other_weights_are_written_into_the_same_folder(tmp_path):
    saver(tmp_path, write_weights=lambda folder: (folder / "w.safetensors").write_bytes(b"x")).save(1)
    assert (tmp_path / "checkpoint-1" / "w.safetensors").read_bytes() == b"x"


def test_due_means_a_multiple_of_every(tmp_path):
    due = saver(tmp_path, every=3)
    assert [step for step in range(1, 8) if due.save_if_due(step)] == [3, 6]
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]


def test_rotation_keeps_the_newest_by_step_not_by_name(tmp_path):
    keep = saver(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        keep.save(step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]  # by name, 10 would come before 9


def test_rotation_never_takes_what_was_just_written(tmp_path):
    """An older run's later step lies there: by step it is the newest."""
    keep = saver(tmp_path, keep=1)
    keep.save(9)
    keep.save(3)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-9"]


def test_stopped_right_after_it_was_resumed_a_run_leaves_a_checkpoint_in_its_own_folder(tmp_path):
    """That of another folder is not there; its own is, and is not written again."""
    saver(tmp_path / "one").save(7)
    other = saver(tmp_path / "other")
    other.resume(tmp_path / "one/checkpoint-7")
    other.save(7)
    assert names(tmp_path / "other") == ["checkpoint-7"]
    before = (tmp_path / "one/checkpoint-7/state.pt").stat().st_ino
    own = saver(tmp_path / "one")
    own.resume("latest")
    own.save(7)
    assert (tmp_path / "one/checkpoint-7/state.pt").stat().st_ino == before


def test_what_was_held_comes_back_and_is_saved_though_the_weights_went_on(tmp_path):
    """Live tensors, as those of a LoRA: held as a copy. Without a copy what is there is saved, for a loop that has changed nothing."""

    class Live(Weights):
        def state_dict(self):
            return dict(self.tensors)

    part = Live(value=1.0)
    held = saver(tmp_path, parts={"lora": part})
    held.hold(4)
    part.tensors["a"].add_(1)
    assert held.save_held() == 4
    assert (part.tensors["a"] == 1).all() and (state_of(tmp_path / "checkpoint-4")["lora"]["a"] == 1).all()
    held.hold(6, copy=False)
    part.tensors["a"].add_(1)
    assert held.save_held() == 6 and (part.tensors["a"] == 2).all()


def state_of(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def test_rotation_removes_only_after_the_new_one_is_complete(tmp_path):
    seen = []
    keep = saver(tmp_path, keep=1, write_weights=lambda folder: seen.append(names(tmp_path)))
    keep.save(1)
    keep.save(2)
    assert seen == [["checkpoint-1.tmp"], ["checkpoint-1", "checkpoint-2.tmp"]]
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_time_of_saving_does_not_count_for_the_speed(tmp_path, monkeypatch):
    """Two steps of 1 s after the first, one picture each, and 50 s of writing: 1 picture a second, not 2 in 52."""
    now, run = [0.0], FakeRun(tmp_path, max_train_steps=9)
    run.mean, run.peak_memory, run.accelerator.log = lambda tensor: tensor, lambda: 0, lambda values, step: None
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = metrics.Log(run, every=3, images_per_add=1)

    def write(folder):
        now[0] += 50

    part = checkpoint.Checkpointer(run, every=2, keep=None, parts={"log": log}, write_weights=write)
    for step in (1, 2, 3):
        now[0] += 1
        log.add(loss=torch.tensor(1.0))
        line = log.write(step)
        part.save_if_due(step)
    assert names(tmp_path) == ["checkpoint-2"] and line["images_per_second"] == 1.0


def test_saving_the_same_step_twice_writes_once(tmp_path):
    calls = []
    once = saver(tmp_path, write_weights=calls.append)
    once.save(4)
    once.save(4)  # a SIGTERM right after a due checkpoint
    assert len(calls) == 1


def test_an_existing_folder_of_the_same_step_is_replaced(tmp_path):
    saver(tmp_path, parts={"lora": Weights(value=1.0)}).save(4)
    saver(tmp_path, parts={"lora": Weights(value=2.0)}).save(4)
    state = torch.load(tmp_path / "checkpoint-4" / "state.pt", weights_only=True)
    assert state["lora"]["a"][0, 0] == 2.0 and names(tmp_path) == ["checkpoint-4"]


def test_a_half_written_folder_is_never_resumed_and_removed_at_the_next_start(tmp_path):
    saver(tmp_path).save(5)
    stale = tmp_path / "checkpoint-6.tmp"
    stale.mkdir()
    (stale / "state.pt").write_bytes(b"half")
    (tmp_path / "checkpoint-9").mkdir()  # no state.pt: somebody else's
    assert checkpoint.find_latest(tmp_path).name == "checkpoint-5"
    saver(tmp_path)
    assert not stale.exists()


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_checkpoint import saver
def block(folder):
    (folder / "weights.bin").write_bytes(b"half of it")
    print("writing", flush=True)
    time.sleep(60)
folder = Path({folder!r})
saver(folder).save(1)
saver(folder, write_weights=block).save(2)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_saving_leaves_the_previous_checkpoint(tmp_path):
    code = KILLED.format(root=str(ROOT), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "writing"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "checkpoint-2.tmp" / "weights.bin").exists()
    assert saver(tmp_path).resume("latest") == 1
    assert names(tmp_path) == ["checkpoint-1"]


def full(folder):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failure_without_a_message_is_named_by_its_kind(tmp_path):
    def fail(folder):
        raise OSError

    with pytest.raises(SystemExit, match=r"could not write .*checkpoint-1 \(OSError\)"):
        saver(tmp_path, write_weights=fail).save(1)


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(tmp_path):
    saver(tmp_path).save(5)
    with pytest.raises(SystemExit) as stop:
        saver(tmp_path, write_weights=full).save(10)
    text = str(stop.value)
    assert "No space left" in text and "checkpoint-5, is intact" in text and "--resume_from_checkpoint latest" in text and "\n" not in text
    assert names(tmp_path) == ["checkpoint-5"]
    assert saver(tmp_path).resume("latest") == 5


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_none(tmp_path):
    with pytest.raises(SystemExit, match="no earlier one"):
        saver(tmp_path, write_weights=full).save(1)
    assert names(tmp_path) == []


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
from tests.test_checkpoint import Weights, saver
folder = Path({folder!r})
saver(folder).save(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
saver(folder, parts={{"lora": Weights(rank=10000)}}).save(2)
"""


@pytest.mark.slow
def test_torchs_own_writer_hitting_the_limit_is_reported_the_same_way(tmp_path):
    """RLIMIT_FSIZE makes write() fail inside torch.save, where a full disk would."""
    code = LIMITED.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "checkpoint-1, is intact" in done.stderr and "Traceback" not in done.stderr
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_safetensors_failure_is_a_failed_write(tmp_path):
    from safetensors import SafetensorError

    def fail(folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with pytest.raises(SystemExit, match="I/O error"):
        saver(tmp_path, write_weights=fail).save(1)


def test_a_mistake_in_the_code_is_not_disguised_as_a_full_disk(tmp_path):
    def mistake(folder):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        saver(tmp_path, write_weights=mistake).save(1)


def test_a_failure_on_the_main_process_stops_the_others_too(tmp_path):
    other = saver(tmp_path)
    other.run.is_main = False
    other.run.broadcast = lambda value: "error: could not write"
    with pytest.raises(SystemExit, match="could not write"):
        other.save(1)
    assert names(tmp_path) == []


def test_resume_from_latest_path_or_nothing(tmp_path):
    a = tmp_path / "a"
    saver(a, parts={"lora": Weights(value=1.0)}).save(2)
    saver(a, parts={"lora": Weights(value=2.0)}).save(4)
    part = Weights()
    assert saver(a, parts={"lora": part}).resume(None) == 0 and part.tensors["a"].sum() == 0
    assert saver(tmp_path / "b", parts={"lora": part}).resume(a / "checkpoint-2") == 2 and part.tensors["a"][0, 0] == 1
    empty = saver(tmp_path / "c")
    assert empty.resume("latest") == 0
    assert "no checkpoint" in empty.run.lines[0]


def test_a_checkpoint_of_another_rank_is_refused_with_the_flag(tmp_path):
    saver(tmp_path, parts={"lora": Weights(rank=4)}, rank=4).save(1)
    with pytest.raises(SystemExit, match=r"checkpoint-1 .*lora: a is \(4, 3\) in the checkpoint and \(8, 3\) here; .*--rank 4 -> 8"):
        saver(tmp_path, parts={"lora": Weights(rank=8)}, rank=8).resume("latest")


def test_missing_or_unused_parts_are_refused(tmp_path):
    saver(tmp_path, use_ema=False).save(1)
    with pytest.raises(SystemExit, match="no state of ema; .*--use_ema False -> True"):
        saver(tmp_path, parts={"lora": Weights(), "ema": Weights()}, use_ema=True).resume("latest")
    saver(tmp_path, parts={"lora": Weights(), "ema": Weights()}, use_ema=True).save(2)
    with pytest.raises(SystemExit, match="ema, which this run does not use.*--use_ema True -> False"):
        saver(tmp_path, use_ema=False).resume("latest")


def test_other_layers_are_refused(tmp_path):
    part = Weights()
    part.tensors["c"] = torch.zeros(1)
    saver(tmp_path, parts={"lora": part}).save(1)
    with pytest.raises(SystemExit, match="0 tensors are missing and 1 unknown, first c"):
        saver(tmp_path).resume("latest")


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    """torch would load AdamW's state into Adafactor and fail at the next step."""
    ps = [torch.nn.Parameter(torch.zeros(2))]
    saver(tmp_path, parts={"optimizer": torch.optim.AdamW(ps)}, optimizer="adamw").save(1)
    ours = optim.build(ps, name="adafactor", learning_rate=1e-4, device=torch.device("cpu"))
    with pytest.raises(SystemExit, match="saved by AdamW, this run uses Adafactor of transformers.*--optimizer adamw -> adafactor"):
        saver(tmp_path, parts={"optimizer": ours}, optimizer="adafactor").resume("latest")
    saver(tmp_path / "torch", parts={"optimizer": torch.optim.Adafactor(ps)}, optimizer="adafactor").save(1)
    with pytest.raises(SystemExit, match="saved by Adafactor, this run uses Adafactor of transformers"):
        saver(tmp_path / "torch", parts={"optimizer": ours}, optimizer="adafactor").resume("latest")


def test_a_step_of_other_size_is_named_with_what_would_keep_it(tmp_path):
    """2 processes x 3 x 1 accumulated = 6 pictures; one process with 3 has half of them, and keeps them with 2 accumulated."""
    run = FakeRun(tmp_path, train_batch_size=3, gradient_accumulation_steps=1)
    run.world = 2
    checkpoint.Checkpointer(run, every=1, keep=None, parts={"lora": Weights()}).save(1)

    def said(**flags):
        again = saver(tmp_path, **flags)
        again.resume(tmp_path / "checkpoint-1")
        return again.run.lines[1:]

    assert said(train_batch_size=3, gradient_accumulation_steps=2) == []
    line = "a step has {} samples on 1 process(es), 6 on 2 before, at the learning rate of the checkpoint"
    assert said(train_batch_size=3, gradient_accumulation_steps=1) == [f"{line.format(3)}; --gradient_accumulation_steps 2 would keep them"]
    assert said(train_batch_size=4, gradient_accumulation_steps=1) == [line.format(4)]  # no multiple of 4 is 6
    assert said(train_batch_size=8, gradient_accumulation_steps=1, sample_batch_size=4) == [line.format(8)]  # DreamBooth draws its class so


def test_an_epoch_of_drawn_pictures_of_other_size_is_named(tmp_path):
    flags = {"sample_batch_size": 4, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    before, now = ({**flags, "sample_num_batches_per_epoch": batches} for batches in (8, 4))
    assert checkpoint.other_batch(before, 1, now, 2) is None
    assert checkpoint.other_batch(before, 1, now, 1).startswith("an epoch has 16 samples on 1 process(es), 32 on 1 before")
    assert checkpoint.other_batch(before, 1, now, 1).endswith("--sample_num_batches_per_epoch 8 would keep them")
    assert checkpoint.other_batch(before, 2, now, 2).endswith("--sample_num_batches_per_epoch 8 would keep them")  # on each


def test_flags_that_differ_in_every_resumed_run_are_not_named():
    before = dict(rank=4, dry_run=None, output_dir="a", resume_from_checkpoint=None, gone=1)
    now = dict(rank=8, dry_run=False, output_dir="b", resume_from_checkpoint="latest", added=2)
    assert checkpoint.changed_flags(before, now) == ["--rank 4 -> 8", "--gone 1 -> None", "--added None -> 2"]


def test_another_failure_at_the_result_does_not_ask_for_space(tmp_path):
    """The base model's other files are gone: the result is completed from them."""
    with pytest.raises(SystemExit, match=r"No such file or directory.*gone\.json.*\. Mend that, then run again$"):
        with checkpoint.writing_result(tmp_path):
            (tmp_path / "gone.json").read_bytes()


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_at_the_result_says_what_is_intact(tmp_path, earlier):
    if earlier:
        saver(tmp_path).save(5)
    with pytest.raises(SystemExit) as stop, checkpoint.writing_result(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    intact = "; checkpoint-5 is intact. Free space there, then continue with --resume_from_checkpoint latest"
    cure = intact if earlier else ". Free space there, then run again"
    assert stop.value.code == f"error: could not write the result to {tmp_path} ([Errno 28] No space left on device){cure}"


def test_the_gradient_scaler_is_saved_too(tmp_path):
    class Scaler:
        scale = 2.0

        def state_dict(self):
            return {"scale": self.scale}

        def load_state_dict(self, state):
            self.scale = state["scale"]

    run = FakeRun(tmp_path)
    run.accelerator.scaler = Scaler()
    run.accelerator.scaler.scale = 8.0
    checkpoint.Checkpointer(run, every=1, keep=None, parts={"lora": Weights()}).save(1)
    again = FakeRun(tmp_path)
    again.accelerator.scaler = Scaler()
    checkpoint.Checkpointer(again, every=1, keep=None, parts={"lora": Weights()}).resume("latest")
    assert again.accelerator.scaler.scale == 8.0


def test_check_resume_accepts_what_can_be_resumed(tmp_path):
    checkpoint.check_resume(None, tmp_path / "new")
    checkpoint.check_resume("latest", tmp_path / "new")
    (tmp_path / "new").mkdir()
    saver(tmp_path).save(1)
    saver(tmp_path).save(2)
    checkpoint.check_resume("latest", tmp_path)
    checkpoint.check_resume(str(tmp_path / "checkpoint-2"), tmp_path)
    checkpoint.check_resume(str(tmp_path / "new/../checkpoint-2"), tmp_path)  # the same folder by another name
    checkpoint.check_resume(str(tmp_path / "checkpoint-1"), tmp_path / "new")


def test_check_resume_refuses_a_checkpoint_past_the_end(tmp_path):
    (tmp_path / "checkpoint-8").mkdir()
    for name in ("state.pt", "args.json"):
        (tmp_path / "checkpoint-8" / name).write_text("{}")
    checkpoint.check_resume("latest", tmp_path, max_train_steps=8)  # nothing left to train: the result is written again
    with pytest.raises(ValueError, match=r"--max_train_steps 7: checkpoint-8 is past it already; give at least 8"):
        checkpoint.check_resume("latest", tmp_path, max_train_steps=7)
    checkpoint.check_resume("latest", tmp_path, num_epochs=2, updates=4)
    with pytest.raises(ValueError, match=r"--num_epochs 2: checkpoint-8 is past it already; give at least 3"):  # of 3 steps each
        checkpoint.check_resume("latest", tmp_path, num_epochs=2, updates=3)


def test_check_resume_refuses_what_is_no_checkpoint(tmp_path):
    saver(tmp_path / "run").save(3)
    for spec, cure in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "run", "checkpoint-3"), (ROOT / "src", "checkpoint-STEP")):
        with pytest.raises(ValueError, match="--resume_from_checkpoint.*" + cure):
            checkpoint.check_resume(str(spec), tmp_path / "new")


def test_two_runs_are_not_mixed_in_one_folder(tmp_path):
    """Rotation goes by step: checkpoints of an earlier run with higher steps would make it delete the new ones."""
    saver(tmp_path).save(1)
    saver(tmp_path).save(2)
    for spec in (None, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match="--output_dir.*checkpoint-2.*--resume_from_checkpoint latest"):
            checkpoint.check_resume(spec, tmp_path)


def test_saving_flushes_files_and_folder_to_the_disk(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle)))
    saver(tmp_path).save(1)
    temporary = str(tmp_path / "checkpoint-1.tmp")
    assert [p for p in flushed if p.endswith("state.pt")] and temporary in flushed
    assert flushed[-1] == str(tmp_path)  # the rename itself


def test_changed_flags_by_hand():
    before = {"rank": 4, "seed": 1, "resume_from_checkpoint": None, "gone": 1}
    now = {"rank": 8, "seed": 1, "resume_from_checkpoint": "latest", "new": 2}
    assert checkpoint.changed_flags(before, now) == ["--rank 4 -> 8", "--gone 1 -> None", "--new None -> 2"]


def test_a_killed_removal_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """The folder changes its name before its files go."""
    saver(tmp_path).save(1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda folder, **_: time.sleep(0))
    checkpoint._remove(tmp_path / "checkpoint-1")
    assert checkpoint.find_latest(tmp_path) is None and names(tmp_path) == ["checkpoint-1.old.tmp"]
