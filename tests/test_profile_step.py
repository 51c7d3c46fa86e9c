"""Where a step's time goes, and that no step of a trainer waits for the device."""

import traceback
from pathlib import Path

import pytest
import runs
from torch.utils._python_dispatch import TorchDispatchMode

import train_full_finetuning_sd3
import train_text_to_image_lora_sd3
from benchmarks import profile_step
from src import cli

pytestmark = pytest.mark.slow

SCRIPTS = {"lora": train_text_to_image_lora_sd3, "full": train_full_finetuning_sd3}
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2"}  # the host needs a value, or a shape, to go on
# Where a step may need a number: while a sample is chosen (on the CPU, in the loader's processes), and in AdamW's plain form, which only a
# CPU takes: on a GPU it is fused.
ALLOWED = {("samples.py", "_draw"), ("optimizer.py", "_get_value")}


class Waits(TorchDispatchMode):
    """Who asked for a value: (file, function) of the innermost frame that is ours or an optimizer's."""

    def __init__(self):
        super().__init__()
        self.callers = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split("::")[1].split(".")[0] in WAITING:
            frames = [f for f in traceback.extract_stack() if str(runs.ROOT) in f.filename and "tests/" not in f.filename
                      or "torch/optim/optimizer.py" in f.filename]  # fmt: skip
            self.callers.add((Path(frames[-1].filename).name, frames[-1].name))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_world(tiny_sd3_folder, tmp_path_factory.mktemp("waits"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_step_waits_for_the_device(world, tmp_path, name, monkeypatch):
    """Every operation of a run from the second step's forward pass to the last step's end, before the last validation."""
    script, waits, calls = SCRIPTS[name], Waits(), []
    loss, validate_last = script.flow_matching_loss, script.validation.Validator.validate_last

    def watched(*args):
        calls.append(None)
        if len(calls) == 2:
            waits.__enter__()
        return loss(*args)

    def ended(validator, step):
        waits.__exit__(None, None, None)
        validate_last(validator, step)

    monkeypatch.setattr(script, "flow_matching_loss", watched)
    monkeypatch.setattr(script.validation.Validator, "validate_last", ended)
    flags = dict(use_ema=True, logging_steps=100, checkpointing_steps=100, lr_scheduler="linear", max_train_steps=3, train_batch_size=2)
    runs.train(script, world.argv(tmp_path / "out", **flags))
    assert waits.callers == ALLOWED  # these are seen, so others would be


# --------------------------------------------------------------------------- the profile


def test_union_by_hand():
    """0-2 and 1-3 overlap, 5-6 stands alone, 5.2-5.4 lies within it: 3 + 1."""
    assert profile_step.union([(1, 3), (5, 6), (0, 2), (5.2, 5.4)]) == pytest.approx(4)
    assert profile_step.union([]) == 0


def test_summary_by_hand():
    """Two calls of a (3 + 2), one of b (4) that overlaps one of them by 1: 8 of 10 microseconds are busy."""
    found = profile_step.summary([("a", 0, 3), ("b", 2, 6), ("a", 8, 10)], wall=10)
    assert found["longest"] == [("a", 5, 2), ("b", 4, 1)] and found["idle"] == pytest.approx(0.2)


def test_only_the_longest_are_shown():
    events = [(f"kernel {n}", n, n + 0.01 * n) for n in range(20)]
    assert [name for name, _, _ in profile_step.summary(events, 20)["longest"]] == [f"kernel {n}" for n in range(19, 9, -1)]


@pytest.mark.slow
def test_the_program_prints_operations_and_idle_share(capsys, tmp_path):
    words = ["--tiny", "--batch", "2", "--steps", "2", "--tokens", "6", "--trace", str(tmp_path / "trace.json"), "--flags=--rank 2"]
    found = profile_step.main(cli.parse(profile_step.build_parser(), words))
    lines = capsys.readouterr().out.splitlines()
    assert "lora, 64 px, batch 2:" in lines[0] and "% of it idle" in lines[0]
    assert len(lines) == 2 + profile_step.LONGEST and 0 <= found["idle"] < 1
    assert any("linear" in name or "Addmm" in name for name, _, _ in found["longest"])
    assert (tmp_path / "trace.json").stat().st_size > 1000
