"""The benchmark of an epoch: it books time and forward passes where they belong, and its arithmetic is the published one."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import runs
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("rl_epoch", ROOT / "benchmarks/rl_epoch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_rollouts(tiny_sd3_folder, tmp_path_factory.mktemp("epoch"))


def flags(world, **changes):
    """The trainer's flags without those that the benchmark sets itself."""
    words = world.argv(Path("unused"), num_epochs=None, output_dir=None, cache_dir=None, **changes)
    return [word for word in words if word != "unused"]


def test_the_ideal_is_that_of_the_published_settings(benchmark):
    """With a LoRA, 2.13 passes a trained step: 10 + 3 x 2.13 = 16.4; 2 (10 + 9 (2.13 + 1)) = 76.3 with guidance and KL."""
    assert benchmark.ideal_passes(steps=10, trained_steps=3, step_cost=2.13, guidance=False, others=0) == pytest.approx(16.39)
    assert benchmark.ideal_passes(steps=10, trained_steps=9, step_cost=2.13, guidance=True, others=1) == pytest.approx(76.34)
    assert {round(number) for number in benchmark.PUBLISHED.values()} == {16, 76}


def test_time_inside_a_stage_is_booked_once(benchmark):
    """A clock that goes on by 1 whenever it is read: 0-1 evaluating (decoding inside is part of it), 2-3 decoding, 4 the epoch ends."""
    clock = benchmark.Clock()
    clock.now, clock._began = itertools.count().__next__, 0
    decode = clock.timed("decode", lambda: "pictures")
    assert clock.timed("evaluate", decode)() == "pictures"
    decode()
    clock.ends_epoch(lambda: None)()
    assert clock.epochs[0][0] == {"evaluate": 1, "decode": 1, "train": 4 - 1 - 1}
    clock.ends_epoch(lambda: None)()  # began at 5
    assert clock.epochs[1][0] == {"train": 6 - 5}


def test_forward_passes_are_counted_by_what_they_are_for(benchmark):
    clock, latents = benchmark.Clock(), torch.zeros(4, 1)
    velocity = clock.counted(lambda transformer, latents, sigma: latents)
    clock.timed("sample", lambda: velocity(None, latents, 1.0))()
    velocity(None, latents, 1.0)
    with torch.no_grad():
        velocity(None, latents[:3], 1.0)
    assert clock.passes == {"sample": 4, "train": 4, "reference": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "changes", "expected"),
    [
        ("ddpo", dict(num_inner_epochs=2), {"sample": 4, "train": 4, "reference": 0}),
        ("grpo", dict(group_size=4, kl_weight=0.1, guidance_scale=2.0), {"sample": 8, "train": 4, "reference": 4}),
        (
            "grpo",
            dict(group_size=4, loss="nft", nft_levels=2, window_size=None, window_range=None),
            {"sample": 4, "train": 2, "reference": 2},
        ),
    ],
)
def test_an_epoch_of_each_trainer_is_counted(benchmark, world, trainer, changes, expected, monkeypatch, capsys):
    """4 steps of which 2 are trained; guidance doubles every pass, DDPO's second inner epoch the trained ones. DiffusionNFT's
    old policy passes beside each of 2 noise levels."""
    monkeypatch.setattr(benchmark.rewards.validation, "summary", lambda *_: None)
    used, seconds, passes = benchmark.measure(trainer, flags(world, **changes), epochs=1)
    assert passes == expected
    assert all(seconds[stage] > 0 for stage in benchmark.STAGES)
    result = benchmark.report(used, seconds, passes, benchmark.trained_steps(trainer, used))
    assert result["counted"] == pytest.approx(result["ideal"]) and 1.5 < result["step_cost"] < 3
    assert result["pictures_per_second"] == pytest.approx(8 / sum(seconds.values()))
    out = capsys.readouterr().out
    assert f"{result['ideal']:.1f} by arithmetic" in out and "published settings: 76 (Flow-GRPO" in out


@pytest.mark.slow
def test_a_step_costs_the_blocks_that_are_computed_again(benchmark, world, tmp_path):
    """All of them: one forward pass more; every other one: some of that."""

    def cost(*more):
        return benchmark.step_cost(benchmark.trainer_args("grpo", [*flags(world, group_size=4), *more], tmp_path, epochs=1))

    none, every, other = cost(), cost("--gradient_checkpointing"), cost("--gradient_checkpointing", "--checkpoint_every", "2")
    assert every - none == pytest.approx(1, rel=0.02) and 0.1 < other - none < 0.9


def test_a_wrong_flag_of_the_trainer_is_refused_by_name(benchmark, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse(["--trainer", "ddpo", "--", "--noise_level", "0"])
    assert stopped.value.code == 2 and "--noise_level must be above 0" in capsys.readouterr().err


@pytest.mark.long
def test_the_whole_benchmark_reports_time_and_memory(world, tmp_path):
    """Memory of an epoch must not grow with its pictures but for what waits on the CPU: here 8 and 32 pictures, 20 kB each."""
    command = ["benchmarks/rl_epoch.py", "--trainer", "ddpo", "--epochs", "1", "--memory", "--output", tmp_path / "result.json", "--",
               *flags(world)]  # fmt: skip
    log = tmp_path / "log"
    out = runs.finish(runs.fork(command, log), log)
    result = json.loads((tmp_path / "result.json").read_text())
    few, many = result["peak_bytes"]
    assert 0 < many < 1.15 * few
    assert "peak memory in RAM" in out and {"date", "torch", "machine", "threads", "command"} <= result["about"].keys()
