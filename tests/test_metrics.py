"""metrics.jsonl: means by hand, windows that survive a resume, the step of the first non-finite loss."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

from src import metrics


class FakeAccelerator:
    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


class FakeRun:
    """One process on the CPU; `peers` are what other processes would report, for the mean."""

    is_main, device = True, torch.device("cpu")

    def __init__(self, folder: Path, peers=(), max_train_steps=1000):
        self.output_dir, self.accelerator, self.peers, self.syncs = folder, FakeAccelerator(), peers, 0
        self.world = 1 + len(peers)
        self.args = argparse.Namespace(max_train_steps=max_train_steps, train_batch_size=2, gradient_accumulation_steps=3)

    def mean(self, tensor):
        self.syncs += 1
        return (tensor + sum(tensor * factor for factor in self.peers)) / self.world

    def peak_memory(self):
        return 3_000_000_000


def stable(path):
    """Lines without what may differ between a resumed and an uninterrupted run."""
    return [{k: v for k, v in line.items() if k not in metrics.VARYING} for line in metrics.read(path)]


def loss_of(step):
    return torch.tensor(1.0 / (step + 0.3)) ** 2  # no short decimals: sums depend on their order


def train(run, first, last, every=4, log=None):
    log = log or metrics.Log(run, every)
    for step in range(first, last + 1):
        log.add(loss=loss_of(step), grad_norm=torch.tensor(float(step)))
        log.write(step, lr=1e-4 * step)
    return log


def test_a_window_is_the_mean_of_its_steps(tmp_path):
    """Window of 2: losses 1, 4 -> 2.5; 10, 20 -> 15. lr is the last one given."""
    log = metrics.Log(FakeRun(tmp_path), every=2)
    for step, loss in enumerate([1.0, 4.0, 10.0, 20.0], start=1):
        log.add(loss=torch.tensor(loss))
        line = log.write(step, lr=step / 10)
        assert (line is None) == (step % 2 == 1)
    assert stable(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 2.5, "lr": 0.2}, {"step": 4, "loss": 15.0, "lr": 0.4}]


def test_the_mean_runs_over_the_processes(tmp_path):
    """Two peers report 2x and 3x: the mean of 1x, 2x, 3x is 2x."""
    log = metrics.Log(FakeRun(tmp_path, peers=(2, 3)), every=1)
    log.add(loss=torch.tensor(5.0))
    assert log.write(1)["loss"] == 10.0


def test_one_synchronisation_per_window(tmp_path):
    run = FakeRun(tmp_path)
    train(run, 1, 12, every=4)
    assert run.syncs == 3


def test_the_last_step_closes_an_open_window(tmp_path):
    log = train(FakeRun(tmp_path, max_train_steps=6), 1, 6, every=4)
    assert [line["step"] for line in metrics.read(log.path)] == [4, 6]
    assert metrics.read(log.path)[1]["grad_norm"] == 5.5


def test_timing_fields(tmp_path, monkeypatch):
    """Global batch 2 x 3 x 1 = 6. The clock starts after step 1 at 10 s; steps 2-4 end at 13 s: 3 x 6 / 3 = 6 images/s. Then validation
    takes 100 s that do not count: steps 5-8 from 13 to 117 s, 4 x 6 / 4 = 6 images/s."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = metrics.Log(FakeRun(tmp_path), every=4)
    now[0] = 9.0
    for step in range(1, 9):
        now[0] += 1
        log.add(loss=torch.tensor(1.0))
        log.write(step)
        if step == 4:
            with log.untimed():
                now[0] += 100
    first, second = metrics.read(log.path)
    assert first["images_per_second"] == second["images_per_second"] == 6.0
    assert (first["seconds"], second["seconds"]) == (13.0, 117.0)
    assert first["memory_gb"] == 3.0


@pytest.mark.parametrize("resumed", [False, True])
def test_the_first_line_counts_neither_the_evaluation_nor_what_is_loaded_before(tmp_path, monkeypatch, resumed):
    """Scorers are loaded until 40 s, an evaluation (or reading a checkpoint) ends at 100 s; a first step of 3 s makes 6 / 3 = 2 images/s,
    a second of 2 s 3."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    log = metrics.Log(FakeRun(tmp_path), every=1)
    now[0] = 40.0
    if resumed:
        now[0] = 100.0
        log.load_state_dict({"step": 0, "written": 0, "window": {}})
    else:
        with log.untimed():
            now[0] = 100.0
    for step, seconds in ((1, 3), (2, 2)):
        now[0] += seconds
        log.add(loss=torch.tensor(1.0))
        log.write(step)
    assert [(line["images_per_second"], line["seconds"]) for line in metrics.read(log.path)] == [(2.0, 103.0), (3.0, 105.0)]


def test_what_the_gpu_still_has_to_do_counts_as_training(tmp_path, monkeypatch):
    """Steps 2 and 3 are queued in no time; the GPU is done with them at 6 s: 12 pictures, 2 a second. A validation of 100 s begins
    before that, and has to wait for the GPU itself if nobody did."""
    now, run = [0.0], FakeRun(tmp_path)

    def wait(tensor=None):
        now[0] = max(now[0], 6.0)
        return tensor

    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "mean", wait)
    log = metrics.Log(run, every=3)
    for step in (1, 2, 3):
        log.add(loss=torch.tensor(1.0))
        if step == 3:
            with log.untimed():
                wait()
                now[0] += 100
        log.write(step)
    assert metrics.read(log.path)[0]["images_per_second"] == 2.0


def test_a_run_resumed_inside_a_window_writes_the_same_file(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    log = metrics.Log(FakeRun(whole), 4)
    log.record(0, val_loss=2.0)
    train(log.run, 1, 10, log=log)

    log = metrics.Log(FakeRun(cut), 4)
    log.record(0, val_loss=2.0)
    train(log.run, 1, 7, log=log)
    torch.save(log.state_dict(), cut / "state.pt")  # in the middle of the window 5..8
    train(log.run, 8, 9, log=log)  # lived on to write step 8, then was killed
    with open(log.path, "a") as file:
        file.write('{"step": 9, "lo')

    resumed = metrics.Log(FakeRun(cut), 4)
    resumed.load_state_dict(torch.load(cut / "state.pt", weights_only=True))
    train(resumed.run, 8, 10, log=resumed)
    assert stable(whole / "metrics.jsonl") == stable(cut / "metrics.jsonl")
    assert [line["step"] for line in stable(cut / "metrics.jsonl")] == [0, 4, 8]


def test_saving_does_not_change_what_is_written(tmp_path):
    """state_dict synchronises early; the mean must be the same to the last bit."""
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir(), b.mkdir()
    train(FakeRun(a), 1, 8)
    log = metrics.Log(FakeRun(b), 4)
    for step in range(1, 9):
        train(log.run, step, step, log=log)
        log.state_dict()
    assert stable(a / "metrics.jsonl") == stable(b / "metrics.jsonl")


def test_a_loaded_log_touches_the_file_only_when_it_writes(tmp_path):
    log = train(FakeRun(tmp_path), 1, 8)
    before = log.path.read_bytes()
    again = metrics.Log(FakeRun(tmp_path), 4)
    again.load_state_dict({"step": 4, "written": 4, "window": {}})
    assert log.path.read_bytes() == before  # resuming may still be refused
    again.record(4, val_loss=1.0)
    assert [line["step"] for line in metrics.read(log.path)] == [4, 4]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_loss": 1.0}\n{"step": 4, "loss": 1.0}\n')
    log = metrics.Log(FakeRun(tmp_path), 4)
    log.record(0, val_loss=3.0)
    assert metrics.read(log.path) == [{"step": 0, "val_loss": 3.0}]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_names_its_step_at_the_end_of_the_window(tmp_path, bad):
    log = metrics.Log(FakeRun(tmp_path), every=5)
    with pytest.raises(FloatingPointError, match="at step 8.*--learning_rate"):
        for step in range(1, 11):
            log.add(grad_norm=torch.tensor(1.0), loss=torch.tensor(bad if step >= 8 else 1.0))
            log.write(step)
    assert [line["step"] for line in metrics.read(log.path)] == [5]


def test_a_resumed_run_names_the_step_of_a_non_finite_loss_from_the_start_of_the_run(tmp_path):
    before = train(FakeRun(tmp_path), 1, 10).state_dict()  # windows of 4 steps: 9 and 10 are in an open one
    log = metrics.Log(FakeRun(tmp_path), every=4)
    log.load_state_dict(before)
    log.add(loss=torch.tensor(1.0), grad_norm=torch.tensor(1.0))
    log.write(11)
    log.add(loss=torch.tensor(math.nan), grad_norm=torch.tensor(1.0))
    with pytest.raises(FloatingPointError, match="at step 12"):
        log.write(12)


def test_a_validation_that_is_repeated_at_the_resumed_step_is_not_written_twice(tmp_path):
    """Killed after its last validation; one of other numbers, as a new scorer's, is written."""
    log = train(FakeRun(tmp_path), 1, 2, every=2)
    log.record(2, val_loss=0.5)
    again = metrics.Log(FakeRun(tmp_path), every=2)
    again.load_state_dict(log.state_dict())
    again.record(2, val_loss=0.5)
    again.record(2, eval_reward=1.0)
    again.record(4, val_loss=0.4)
    written = [line for line in stable(again.path) if "loss" not in line]
    assert written == [{"step": 2, "val_loss": 0.5}, {"step": 2, "eval_reward": 1.0}, {"step": 4, "val_loss": 0.4}]


def test_samples_of_a_step_are_counted_over_all_processes(tmp_path):
    """2 samples x 3 accumulated x 3 processes."""
    assert metrics.Log(FakeRun(tmp_path, peers=(2, 3)), every=1).images_per_add == 18


def test_a_non_finite_loss_prevents_a_checkpoint(tmp_path):
    log = metrics.Log(FakeRun(tmp_path), every=100)
    for step in (1, 2, 3):
        log.add(loss=torch.tensor(math.nan if step == 2 else 1.0))
        log.write(step)
    with pytest.raises(FloatingPointError, match="at step 2"):
        log.state_dict()


def test_a_non_finite_gradient_stops_the_run_unless_the_loss_is_scaled(tmp_path):
    """The loss of that step is finite; the update it would be saved with is not."""
    for refl, end in ((False, "bf16 or no$"), (True, "bf16 or no. The scorer's own gradient may be the cause")):
        log = metrics.Log(FakeRun(tmp_path), every=1)
        log.run.args.__dict__ |= {"grad_scale": 1.0} if refl else {}
        log.add(loss=torch.tensor(1.0), grad_norm=torch.tensor(math.inf))
        with pytest.raises(FloatingPointError, match=f"grad_norm is inf at step 1.* {end}"):
            log.write(1)


def test_another_number_that_is_not_finite_is_null_and_kept_from_the_tracker(tmp_path):
    run = FakeRun(tmp_path)
    run.accelerator.scaler = object()  # of fp16: it skips such a step
    log = metrics.Log(run, every=1)
    log.add(loss=torch.tensor(1.0), grad_norm=torch.tensor(math.inf))
    log.write(1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["grad_norm"] is None
    assert "grad_norm" not in run.accelerator.logged[0][1]


def test_the_tracker_gets_the_same_numbers(tmp_path):
    log = train(FakeRun(tmp_path), 1, 4)
    line = metrics.read(log.path)[0]
    assert log.run.accelerator.logged == [(4, {k: v for k, v in line.items() if k != "step"})]


def test_everything_written_has_a_meaning(tmp_path):
    log = train(FakeRun(tmp_path), 1, 4)
    assert set(metrics.read(log.path)[0]) <= set(metrics.NAMES)
    assert metrics.VARYING <= set(metrics.NAMES)
    assert all(meaning and "\n" not in meaning for meaning in metrics.NAMES.values())
    with pytest.raises(AssertionError, match="metrics.NAMES"):
        log.record(4, nonsense=1.0)
    with pytest.raises(AssertionError, match="metrics.NAMES"):
        log.add(nonsense=torch.tensor(1.0))


def test_the_graph_is_not_kept(tmp_path):
    log = metrics.Log(FakeRun(tmp_path), every=10)
    log.add(loss=torch.ones((), requires_grad=True) * 2)
    assert not log._fresh["loss"][0].requires_grad


def test_other_processes_write_nothing(tmp_path):
    run = FakeRun(tmp_path)
    run.is_main = False
    train(run, 1, 8)
    assert list(tmp_path.iterdir()) == []


def test_reading_drops_a_torn_last_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert metrics.read(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        metrics.read(path)
