"""The benchmark compares like with like: both loops train on the same tensors and reach the same weights."""

import importlib.util
import json
from pathlib import Path

import pytest
import runs
import torch

from src import lora

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("lora_step", ROOT / "benchmarks/lora_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(benchmark, tiny_sd3_folder, tmp_path):
    data = runs.make_pictures(tmp_path / "pictures")
    argv = ["--pretrained_model_name_or_path", tiny_sd3_folder, "--dataset_name", data, "--resolution", 32, "--train_batch_size", 4,
            "--rounds", 1, "--steps_per_round", 1, "--output", tmp_path / "result.json"]  # fmt: skip
    return benchmark.build_parser().parse_args([str(word) for word in argv])


def test_both_loops_have_the_same_losses_and_end_in_the_same_weights(benchmark, arguments, tmp_path):
    cached, encoding = (benchmark.Loop(arguments, kind, tmp_path / "cache") for kind in (True, False))
    assert cached.model.text_encoders == [] and encoding.model.text_encoders
    losses = [loop.train(3)[1] for loop in (cached, encoding)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[0])) == 3
    benchmark.check_losses(*losses, "fp32")
    for one, other in zip(lora.parameters(cached.model.transformer), lora.parameters(encoding.model.transformer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_loops_that_differ_are_not_compared(benchmark):
    benchmark.check_losses([1.0, 2.0], [1.00001, 2.0], "fp32")
    with pytest.raises(RuntimeError, match="step 1: the loss is 2.0 from the caches and 2.1 without"):
        benchmark.check_losses([1.0, 2.0], [1.0, 2.1], "fp32")


@pytest.mark.slow
def test_the_whole_benchmark_reports_times_memory_and_ratio(arguments, tmp_path):
    words = [word for name, value in vars(arguments).items() for word in (f"--{name}", str(value))]
    log = tmp_path / "log"  # a program, because it starts processes of its own, which need to find it by name
    out = runs.finish(runs.fork(["benchmarks/lora_step.py", *words], log), log)
    result = json.loads((tmp_path / "result.json").read_text())
    cached, encoding = result["loops"]["cached"], result["loops"]["encoding at every step"]
    assert result["ratio"] == pytest.approx(encoding["seconds_per_step"] / cached["seconds_per_step"])
    assert cached["peak_bytes"] > 0 and encoding["peak_bytes"] > 0
    assert f"encoding at every step takes {result['ratio']:.2f}x as long" in out and "1.71x" in out
    assert {"date", "torch", "machine", "threads", "command"} <= result["about"].keys()
