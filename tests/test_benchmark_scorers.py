"""The benchmark of the scorers: rates and memory of the scorers' own path, on tiny random weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scorer_runs
import torch

from src import scorers

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark():
    return scorer_runs.load_benchmark("scorers")


@pytest.fixture
def arguments(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "SIZE", "tiny")
    monkeypatch.chdir(tmp_path)
    scorer_runs.make_tiny(monkeypatch)

    def parse(*argv):
        return benchmark.build_parser().parse_args([*argv, "--resolution", "64", "--rounds", "2", "--batch_sizes", "1", "3"])

    return parse


@pytest.mark.parametrize("flags", [[], ["--gradient", "--dtype", "bf16"]], ids=["forward", "backward"])
def test_random_weights_are_judged_like_real_ones_and_leave_nothing_behind(benchmark, arguments, tmp_path, flags):
    for name in ("pickscore", "image_reward"):
        rows = benchmark.measure(arguments("--random_weights", *flags), name)
        assert [row["batch"] for row in rows] == [1, 3]
        assert all(row["pictures_per_second"] > 0 and "peak_bytes" in row for row in rows)
    assert not list(tmp_path.iterdir())


def test_the_detector_of_geneval_is_drawn_too(benchmark, arguments):
    rows = benchmark.measure(arguments("--random_weights"), "geneval")
    assert [row["batch"] for row in rows] == [1, 3] and all(row["pictures_per_second"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a process on a CPU")
def test_memory_is_the_most_since_the_last_reset():
    """In a fresh process, as it is used: another may give back as much meanwhile as is taken here."""
    code = """
import sys, torch
sys.path.insert(0, "benchmarks")
import scorers
memory = scorers.Memory("cpu")
held = torch.ones(32 * 2**20)  # 134 MB
print(memory.peak())
del held
memory.reset()
print(memory.peak())
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert 100e6 < int(found[0]) < 300e6 and int(found[1]) < 60e6


def test_the_prompt_and_its_metadata_suit_every_scorer(benchmark):
    for name in scorers.names():
        scorers.check_prompts(name, [benchmark.PROMPT], [benchmark.METADATA])


def test_what_is_left_out_is_named_with_the_reason(benchmark, arguments, capsys, tmp_path, monkeypatch):
    class InProcess:  # a fresh process costs seconds, and its memory is not looked at here
        __enter__ = __exit__ = lambda self, *error: self

        def submit(self, function, *args):
            self.result = lambda: function(*args)
            return self

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *args, **options: InProcess())
    benchmark.main(arguments("--scorers", "jpeg_compressibility", "pickscore", "--output", str(tmp_path / "result.json")))
    printed = capsys.readouterr().out
    assert "left out: pickscore: weights are missing: models/pickscore has no config.json" in printed
    assert printed.count("jpeg_compressibility  ") == 2
    written = json.loads((tmp_path / "result.json").read_text())
    assert [row["batch"] for row in written["scorers"]["jpeg_compressibility"]] == [1, 3] and list(written["left_out"]) == ["pickscore"]
    assert benchmark.why_not("jpeg_compressibility", arguments("--gradient")) == "has no gradient"
    with pytest.raises(ValueError, match="--scorers: unknown scorer 'pikscore'; did you mean pickscore"):
        benchmark.check(arguments("--scorers", "pikscore"))
