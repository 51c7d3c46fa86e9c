"""The benchmark of full fine-tuning compares ways that train alike."""

import importlib.util

import pytest
import runs

from src import optim

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("full_step", runs.ROOT / "benchmarks/full_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(benchmark, tiny_sd3_folder):
    argv = ["--pretrained_model_name_or_path", str(tiny_sd3_folder), "--resolution", "32", "--train_batch_size", "2"]
    return benchmark.build_parser().parse_args(argv)


@pytest.mark.slow
def test_every_way_lowers_the_same_loss(benchmark, arguments):
    """From the same weights, on the same batch; the loss after two steps is asked with the noise of the first."""
    losses, start = {}, benchmark.make(arguments, "fp32")
    for way, (_, optimizer, _) in benchmark.WAYS.items():
        if optim.PACKAGES[optimizer]:
            pytest.importorskip(optim.PACKAGES[optimizer])
        loop = benchmark.make(arguments, way)
        loop.adopt(start)
        losses[way] = [loop.step().item(), loop.step().item(), loop.losses().mean().item()]
        assert losses[way] == pytest.approx(losses["fp32"], rel=2e-2), way  # bf16 weights: 3 digits
        assert losses[way][-1] < losses[way][0]
        loop.close()
    start.close()
    assert losses["fp32, fused backward"] == losses["fp32"]


def test_state_of_sd35_medium_is_that_of_the_table(benchmark):
    """Bytes for each of 2,243,171,520 weights: 4 + 4 + 8 in fp32, and 2 + 2 + 2 in bf16 with 8-bit Adam: 35.9 and 13.5 GB."""
    args = benchmark.build_parser().parse_args(["--pretrained_model_name_or_path", "medium"])
    sizes = {way: benchmark.state_bytes(args, way) / 1e9 for way in benchmark.WAYS}
    assert sizes["fp32"] == pytest.approx(35.9, abs=0.05) and sizes["bf16, 8-bit Adam"] == pytest.approx(13.46, abs=0.05)
    assert sizes["bf16, 8-bit, fused backward"] == pytest.approx(2.243 * 4, abs=0.05)
