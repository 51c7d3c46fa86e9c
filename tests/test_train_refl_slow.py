"""ReFL as people start and stop it: killed and resumed, on two processes, by its wrapper on the shipped models."""

import signal
from pathlib import Path

import pytest
import runs
from test_train_refl import LORA, make_world, saved

from src import metrics

pytestmark = pytest.mark.slow
TINY = [runs.ROOT / "models" / name for name in ("tiny-sd15", "tiny-clip")]


@pytest.fixture(scope="module")
def program(tiny_sd15_folder, tmp_path_factory):
    """A world, and a program that is train_refl_sd15.py with the world's random CLIP in place of models/tiny-clip."""
    root = tmp_path_factory.mktemp("refl")
    file = root / "train.py"
    file.write_text(
        "from pathlib import Path\nfrom src.scorers import base\nimport train_refl_sd15 as script\n"
        f"base.MODELS = Path({str(root / 'models')!r})\nscript.main(script.parse_args())\n"
    )
    return make_world(tiny_sd15_folder, root), file


def launch(program, out: Path, log: str, *, ranks: int = 1, **flags) -> runs.Forked:
    world, file = program
    return runs.fork([file, *world.argv(out, **flags)], out.with_suffix(f".{log}"), ranks, PYTHONPATH=str(runs.ROOT))


def test_killed_while_training_it_ends_like_an_uninterrupted_run(program, tmp_path):
    flags = dict(max_train_steps=20, checkpointing_steps=4, logging_steps=3, use_ema=True, lora_dropout=0.2, eval_steps=10, **LORA)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs.finish(launch(program, whole, "log", **flags), whole.with_suffix(".log"))
    process = launch(program, parts, "killed", **flags)
    runs.wait_for(process, (parts / "checkpoint-8").is_dir, parts.with_suffix(".killed"))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    runs.finish(launch(program, parts, "resumed", **flags, resume_from_checkpoint="latest"), parts.with_suffix(".resumed"))
    for folder in (".", "raw"):
        runs.assert_identical(runs.saved(whole / folder), runs.saved(parts / folder))
    assert runs.lines(whole) == runs.lines(parts)


@pytest.mark.parametrize("method", [pytest.param("refl", marks=pytest.mark.long), "draft"])
def test_two_processes_are_one_with_twice_the_batch(program, tmp_path, method):
    """Adam's epsilon above every gradient keeps its steps proportional to them: fp32 sums in another order, no more."""
    world, _ = program
    flags = dict(adam_epsilon=1.0, learning_rate=1.0, max_grad_norm=0.01, adam_weight_decay=0.0, method=method, max_train_steps=4,
                 draft_k=2 if method == "draft" else None, eval_steps=2, **world.pretraining)  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    runs.finish(launch(program, one, "log", **flags, train_batch_size=4), one.with_suffix(".log"))
    runs.finish(launch(program, two, "log", **flags, train_batch_size=2, ranks=2), two.with_suffix(".log"))
    assert [line.keys() for line in runs.lines(one)] == [line.keys() for line in runs.lines(two)]
    for expected, line in zip(runs.lines(one), runs.lines(two), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    first, second, before = saved(one), saved(two), saved(world.model)
    changed = max((first[name] - before[name]).abs().max() for name in first)
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-2 * changed


@pytest.mark.skipif(not all(folder.is_dir() for folder in TINY), reason="models/tiny-sd15 and models/tiny-clip are not here")
def test_the_wrappers_tiny_recipe_runs(tmp_path):
    command = ["bash", "scripts/train_refl_v1_5.sh", "--max_train_steps", "3", "--train_batch_size", "4", "--num_eval_prompts", "4",
               "--report_to", "none", "--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]  # fmt: skip
    runs.finish(runs.start(command, tmp_path / "log", TINY="1", NUM_PROCESSES="1"), tmp_path / "log")
    assert (tmp_path / "run/summary.png").is_file() and metrics.read(tmp_path / "run/metrics.jsonl")[-1]["step"] == 3
