"""The benchmark of preference steps compares like with like."""

import importlib.util

import pytest
import runs
from test_train_dpo import make_pairs


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("dpo_step", runs.ROOT / "benchmarks/dpo_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_both_loops_have_the_same_losses(benchmark, tiny_sd15_folder, tmp_path, full):
    argv = ["--pretrained_model_name_or_path", tiny_sd15_folder, "--dataset_name", make_pairs(tmp_path / "pairs"), "--resolution", 32,
            "--train_batch_size", 4, *(["--full"] if full else [])]  # fmt: skip
    args = benchmark.build_parser().parse_args([str(word) for word in argv])
    cached, encoding = (benchmark.Loop(args, kind, tmp_path / "cache") for kind in (True, False))
    assert cached.model.text_encoders == [] and encoding.model.text_encoders
    losses = [loop.train(3)[1] for loop in (cached, encoding)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) == 3
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-6)


def test_the_whole_benchmark_reports_pairs_per_second(benchmark, tiny_sd15_folder, tmp_path, capsys):
    argv = ["--pretrained_model_name_or_path", tiny_sd15_folder, "--dataset_name", make_pairs(tmp_path / "pairs"), "--resolution", 32,
            "--train_batch_size", 2, "--rounds", 1, "--steps_per_round", 1, "--output", tmp_path / "result.json"]  # fmt: skip
    result = benchmark.main(benchmark.build_parser().parse_args([str(word) for word in argv]))
    rates = result["pairs_per_second"]
    assert result["ratio"] == pytest.approx(rates["cached"] / rates["encoding at every step"])
    assert f"{result['ratio']:.2f}x as many pairs per second" in capsys.readouterr().out and (tmp_path / "result.json").exists()


def test_loops_that_differ_are_not_compared(benchmark):
    with pytest.raises(RuntimeError, match="step 1: the loss is 2.0 from the caches and 2.1 without"):
        benchmark.check_losses([1.0, 2.0], [1.0, 2.1], "fp32")
