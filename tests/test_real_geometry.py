"""The benchmark at real size, run at a tiny one: every row works, the check notices what is wrong, a failure is recorded and no more."""

import argparse
import dataclasses
import json
import math
import os
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import loops, trainers
from benchmarks import real_geometry as benchmark
from src import cli

pytestmark = pytest.mark.slow


def arguments(*argv):
    return cli.parse(benchmark.build_parser(), ["--tiny", *argv], checks=(benchmark.check,))


SHORT = {  # few denoising steps
    "grpo": ("--num_inference_steps", "3", "--window_range", "0", "1", "--window_size", "1", "--lora_layers", "attn.to_q"),
    "ddpo": ("--num_inference_steps", "3", "--window_range", "0", "1", "--window_size", "1", "--lora_layers", "attn.to_q"),
    "refl": ("--num_inference_steps", "3"),
}
CONSTANT = ("--lr_scheduler", "constant")  # with a warm-up the first rate is 0
CASES = [(name, entry.checked + SHORT.get(name, ()) + CONSTANT) for name, entry in trainers.TRAINERS.items()]
CASES += [("dpo", ("--use_lora", *CONSTANT))]
COMPILED_BY_HAND = [name for name in trainers.TRAINERS if name not in ("lora", "full")]  # tracing takes a minute each


def make(trainer, *flags):
    return trainers.make(loops.Setting(trainer, 64, flags, tokens=6, source="tiny"))


@pytest.fixture
def loop(request):
    made = []

    def build(*given):
        made.append(make(*given))
        return made[-1]

    yield build
    for one in made:
        one.close()


def die():
    os._exit(3)


def sleep(seconds):
    import time

    time.sleep(seconds)


# --------------------------------------------------------------------------- the loops


@pytest.mark.parametrize(("trainer", "flags"), CASES)
def test_a_step_trains_what_the_script_trains_and_nothing_else(loop, trainer, flags):
    one = loop(trainer, *flags, "--learning_rate", "0.01")
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    trained = {name for name, parameter in one.model.named_parameters() if parameter.requires_grad}
    assert {id(weight) for weight in one.weights} == {id(p) for p in one.model.parameters() if p.requires_grad}
    one.draw(2)
    losses = [one.step() for _ in range(2)]  # a LoRA's A moves from the second step on
    assert len({float(loss) for loss in losses}) == (1 if trainer in ("grpo", "ddpo") else 2)  # at ratio 1 the surrogate is 0
    changed = {name for name, tensor in one.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trained and len(changed) > 0.9 * len(trained)


def test_the_losses_are_those_of_the_script_on_the_script_s_noise(loop):
    """One picture by hand: noise and u of (seed 0, step 0, position 0), sigma = shift 3 of the logit-normal's quantile u."""
    from src import flow, seeds
    from src.pipelines import sd3

    one = loop("lora", "--mixed_precision", "no")
    noise = seeds.normal(0, 0, [0], "noise", (16, 8, 8))
    u = seeds.uniform(0, 0, [0], "sigma")
    s = torch.sigmoid(torch.special.ndtri(u))
    sigma = (3 * s / (1 + 2 * s)).float()
    x0 = one.batch.x0
    x_t = (1 - sigma) * x0 + sigma * noise
    predicted = sd3.velocity(one.model, x_t, sigma, one.batch.condition)
    expected = (predicted - (noise - x0)).square().mean()
    torch.testing.assert_close(one.losses(), expected.reshape(1))
    assert flow.TRAIN_TIMESTEPS == 1000 and one.batch.condition.embeds.shape == (1, 6, 32)


def test_a_reference_computes_with_the_policy_s_kernels(loop):
    """Equal weights and equal bits: the preference loss is log 2 exactly, whatever the kernel of attention."""
    flags = ("--attention_backend", "_native_math", "--mixed_precision", "no")
    one, plain = loop("dpo", *flags), loop("dpo", "--mixed_precision", "no")
    assert one.losses().item() == plain.losses().item() == torch.tensor(2.0).log().item()
    name, processor = next(iter(one.model.attn_processors.items()))
    assert type(one.others[0].attn_processors[name]) is type(processor) is not type(plain.model.attn_processors[name])


def test_flags_are_the_script_s_own_and_its_refusals_count():
    with pytest.raises(ValueError, match="--checkpoint_every 2 has no effect without --gradient_checkpointing"):
        make("lora", "--checkpoint_every", "2")
    with pytest.raises(ValueError, match="unknown flag --rnak; did you mean --rank"):
        make("lora", "--rnak", "4")


# --------------------------------------------------------------------------- the check


@pytest.fixture
def gpu_defaults():
    """On a GPU autocast takes fp16 where nobody says bf16, which on a CPU is the default: what depends on it would go unnoticed."""
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    yield
    torch.set_autocast_dtype("cpu", before)


@pytest.fixture
def uncompiled(monkeypatch):
    """Tracing takes a minute; "compiled" is then the same computation once more."""
    monkeypatch.setattr(loops.Loop, "compile", lambda self, **options: None)


@pytest.fixture
def short(monkeypatch):
    """Checks of few denoising steps and few adapters."""
    for name, flags in SHORT.items():
        monkeypatch.setitem(trainers.TRAINERS, name, dataclasses.replace(trainers.TRAINERS[name], checked=flags))


@pytest.mark.parametrize("trainer", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in trainers.TRAINERS if name != "lora")])
def test_the_check_passes_at_tiny_size(trainer, uncompiled, gpu_defaults):
    found = benchmark.correctness(trainer, arguments("--tokens", "6"))
    assert found["passed"], found
    assert 0.99 < found["bf16_against_fp32"]["cosine"] < 1, "it did compute in two precisions"
    assert "right" in benchmark.verdict(trainer, found)
    assert list(found["bounds"]) == (["log_ratio"] if trainer in ("grpo", "ddpo") else [])


def test_only_an_operation_that_waits_is_a_wait(monkeypatch):
    """torch warns once, when the mode is set, in words that are much the same."""

    def set_mode(mode):
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype and does not yet detect all synchronizing operations", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    quiet = argparse.Namespace(step=lambda: None)
    loud = argparse.Namespace(step=lambda: warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1))
    assert benchmark.waits(quiet) == []
    with pytest.warns(UserWarning, match="synchronizing"):  # of the step before the watched one
        assert len(benchmark.waits(loud)) == 1


@pytest.mark.parametrize("driver", [None, "580.65"])
def test_where_it_was_measured_is_told_without_nvidia_smi_too(monkeypatch, driver):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: argparse.Namespace(total_memory=80))
    monkeypatch.setattr(benchmark.shutil, "which", lambda name: driver)
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *args, **options: argparse.Namespace(stdout=f"{driver}\n{driver}\n"))
    assert benchmark.about()["driver"] == driver


def test_differences_by_hand():
    """Losses 1 and 2 against 1 and 2.5: 0.5 / 2.5. Gradients (3, 4) and (4, 3): cosine 24 / 25."""
    one = (torch.tensor([1.0, 2.0]), [torch.tensor([3.0]), torch.tensor([4.0])])
    other = (torch.tensor([1.0, 2.5]), [torch.tensor([4.0]), torch.tensor([3.0])])
    found = benchmark.difference(one, other)
    assert found["loss"] == pytest.approx(0.2) and found["cosine"] == pytest.approx(0.96)


@pytest.mark.parametrize("trainer", [pytest.param(name, marks=pytest.mark.long if name in COMPILED_BY_HAND else pytest.mark.slow)
                                     for name in trainers.TRAINERS])  # fmt: skip
def test_compiled_steps_are_those_of_the_uncompiled_trainer(trainer, monkeypatch, short):
    lora = dataclasses.replace(trainers.TRAINERS["lora"], checked=("--lora_layers", "attn.to_q"))  # each adapter takes seconds to trace
    monkeypatch.setitem(trainers.TRAINERS, "lora", lora)
    found = benchmark.correctness(trainer, arguments("--tokens", "6"))
    assert found["passed"], found


def test_the_check_notices_a_loss_that_depends_on_precision(monkeypatch, uncompiled):
    """Noise levels that are a tenth lower in bf16."""
    loss = loops.train_text_to_image_lora_sd3.flow_matching_loss

    def rounded(transformer, x0, noise, sigma, condition):
        wide = transformer.pos_embed.proj.weight.dtype == torch.float32
        return loss(transformer, x0, noise, sigma if wide else sigma * 0.9, condition)

    monkeypatch.setattr(loops.train_text_to_image_lora_sd3, "flow_matching_loss", rounded)
    found = benchmark.correctness("lora", arguments("--tokens", "6"))
    assert not found["passed"] and "WRONG" in benchmark.verdict("lora", found)


def test_a_ratio_that_is_not_1_is_wrong(monkeypatch, uncompiled, short):
    """A policy that scores its own step 0.1 nats lower than it drew it."""
    surrogate = trainers.train_grpo_sd3.surrogate

    def drifted(*given):
        loss, logged, step = surrogate(*given)
        return loss, logged, dataclasses.replace(step, log_prob=step.log_prob - 0.1)

    monkeypatch.setattr(trainers.train_grpo_sd3, "surrogate", drifted)
    one = make("grpo", *SHORT["grpo"])
    value, bound = one.bounds()["log_ratio"]
    one.close()
    assert value == pytest.approx(0.1, abs=1e-3) and value > bound


# --------------------------------------------------------------------------- rows


def test_a_row_measures_what_it_says():
    row = benchmark.Row("lora", 512, ("--gradient_checkpointing",), (1, 2))
    args = arguments("--tokens", "6")
    found = benchmark.measure(row, args, deadline=float("inf"))
    assert found["per_second"] == pytest.approx(found["batch"] / found["seconds_per_step"]) and found["batch"] in (1, 2)
    assert found["tflops"] == pytest.approx(found["tflop_per_sample"] * found["per_second"])
    assert found["share_of_matmul"] == pytest.approx(found["tflops"] / found["matmul_tflops"])
    assert set(found["uncompiled"]) == {"1", "2"} and found["peak_allocated"] is None
    assert math.isfinite(found["compile_seconds"]) and json.dumps(found)
    assert "img/s" in benchmark.line(row.name, found) and "passes_by_work" not in found


@pytest.fixture
def plain_attention():
    """Attention as two products, which torch's counter knows on every device and in every version."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("plain_attention")
def test_a_rollout_is_told_in_forward_passes(loop):
    """3 denoising steps and one trained one, 2 to 3 passes' work forward and backward; the decoder, large beside a tiny model, left out."""
    from src.pipelines import sd3

    one = loop("grpo", *SHORT["grpo"])
    decoding = benchmark.flops_of(lambda: sd3.decode_latents(one.actor.model, torch.zeros(1, 16, 8, 8)))
    found = benchmark.in_forward_passes(one, 2.0, benchmark.flops_of(one.step) - decoding, 1)
    assert 5 < found["passes_by_work"] < 6.1 and found["passes_by_time"] > 0


def test_passes_of_a_batch_by_hand():
    """A pass of the batch is a product of 8 x 8 matrices, 2 * 8^3 operations; 3 samples of twice that are worth 6."""

    class Product(loops.Loop):
        def forward(self):
            torch.ones(8, 8) @ torch.ones(8, 8)

    found = benchmark.in_forward_passes(object.__new__(Product), 1.0, 2 * 2 * 8**3, 3)
    assert found["passes_by_work"] == 6 and benchmark.in_forward_passes(object.__new__(loops.Loop), 1.0, 1, 1) == {}


def test_one_slow_window_does_not_count(monkeypatch):
    """A call of 0.1 s, so 2 in each of 5 windows of a second; the median of their means."""
    seen, means = [], iter([0.1, 3.0, 1.0, 100.0, 2.0, 4.0])
    monkeypatch.setattr(benchmark, "seconds_of", lambda work, times: seen.append(times) or next(means))
    assert benchmark.steady(None, 1.0) == (3.0, 2) and seen == [2] * 6


def test_growth_is_what_a_loop_leaves_after_its_first_tenth(monkeypatch):
    steps, sizes = [], iter([100, 250])
    monkeypatch.setattr(benchmark, "allocated", lambda: steps.append("measured") or next(sizes))
    assert benchmark.growth(argparse.Namespace(step=lambda: steps.append("step")), 20) == 150
    assert steps == ["step"] * 2 + ["measured"] + ["step"] * 18 + ["measured"]


@pytest.mark.usefixtures("plain_attention")
def test_flops_of_a_step_are_the_planned_ones(loop):
    """Planned on the meta device: 6 text tokens, 64 px; recomputing costs a forward pass."""
    from src import lora, plan
    from src.pipelines import sd3

    planned = sd3.transformer_from_config(loops.TINY["sd3.5-medium"]["transformer"])
    lora.add(planned, rank=16)
    plain, again = (plan.step_flops(planned, 64, 6, checkpointing=every)[1] for every in (0, 1))
    assert benchmark.flops_of(loop("lora").step) == pytest.approx(plain, rel=0.06)  # attention counts differ between kernels
    assert benchmark.flops_of(loop("lora", "--gradient_checkpointing").step) == pytest.approx(again, rel=0.06)


def test_the_fastest_batch_that_fits_is_taken(monkeypatch):
    """1 runs at 10 a second, 2 at 30, 4 does not fit."""
    found = {1: {"per_second": 10.0}, 2: {"per_second": 30.0}, 4: None}
    monkeypatch.setattr(benchmark, "attempt", lambda loop, batch, deadline: found[batch])
    args = arguments("--tokens", "6")
    args.tiny = False
    monkeypatch.setattr(benchmark, "steady", lambda work, seconds: (0.5, 1))
    one = make("lora")
    monkeypatch.setattr(trainers, "make", lambda setting: one)
    row = benchmark.measure(benchmark.Row("lora", 512, (), (1, 2, 4)), args, deadline=0.0)
    assert row["batch"] == 2 and row["per_second"] == 4 and row["uncompiled"]["4"] is None


def test_what_does_not_fit_is_tried_and_left(loop, monkeypatch):
    one = loop("lora")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(one, "step", full)
    assert benchmark.attempt(one, 2, float("inf")) is None


def test_every_row_has_a_name_of_its_own_and_flags_that_its_script_takes():
    assert len({row.name for row in benchmark.ROWS}) == len(benchmark.ROWS)
    for row in benchmark.ROWS:
        args, rest = trainers.TRAINERS[row.trainer].script.build_parser().parse_known_args(row.flags)
        assert not rest and row.batches[0] == 1
    assert {row.trainer for row in benchmark.ROWS if not row.extra} == set(trainers.TRAINERS)


# --------------------------------------------------------------------------- the run


@pytest.fixture
def here(monkeypatch):
    """Rows run in this process; what they were asked for."""
    asked = []

    def run(work, *given, seconds):
        asked.append((work.__name__, given[0] if work is benchmark.correctness else given[0].name))
        if work is benchmark.correctness:
            return {"failed": "left out"}
        if "full" in given[0].name:
            return {"failed": "OutOfMemoryError: CUDA out of memory"}
        return {"unit": "img", "batch": 2, "per_second": 4.0, "tflops": 1.0, "share_of_matmul": 0.5, "peak_allocated": 2**30,
                "peak_reserved": 2**31, "planned_peak": 2**30}  # fmt: skip

    monkeypatch.setattr(benchmark, "in_process", run)
    monkeypatch.setattr(benchmark, "missing_packages", lambda row: [])
    return asked


def test_rows_are_kept_and_skipped_and_failures_are_rows(here, tmp_path, capsys):
    argv = ["--output", str(tmp_path / "out/result.json"), "--resolution", "512"]
    benchmark.main(arguments(*argv, "--trainers", "full"))
    first = capsys.readouterr().out
    assert "OutOfMemoryError" in first and len(here) == 2  # a check and a row
    benchmark.main(arguments(*argv))
    rows = [row.name for row in benchmark.ROWS if row.trainer == "lora" and row.resolution == 512 and not row.extra]
    assert [name for _, name in here[2:] if name.startswith("lora")] == ["lora", *rows]
    written = json.loads((tmp_path / "out/result.json").read_text())
    assert set(written["rows"]) == {row.name for row in benchmark.ROWS if row.resolution == 512 and not row.extra}
    assert {"date", "command", "machine", "torch", "diffusers"} <= written["rows"]["lora 512 compile"]["about"].keys()
    count = len(here)
    benchmark.main(arguments(*argv))
    assert len(here) == count
    benchmark.main(arguments(*argv, "--again"))
    assert len(here) == count + len(written["rows"]) + len(trainers.TRAINERS)


def test_a_row_without_its_package_is_not_measured_until_it_is_there(here, tmp_path, capsys, monkeypatch):
    argv = ["--output", str(tmp_path / "result.json"), "--resolution", "1024", "--trainers", "full"]
    row = next(row for row in benchmark.ROWS if (row.trainer, row.resolution) == ("full", 1024))
    monkeypatch.setattr(benchmark, "missing_packages", lambda row: ["bitsandbytes"])
    benchmark.main(arguments(*argv))
    assert "not measured: needs the package bitsandbytes" in capsys.readouterr().out and [kind for kind, _ in here] == ["correctness"]
    assert json.loads((tmp_path / "result.json").read_text())["rows"][row.name]["not_measured"] == "needs the package bitsandbytes"
    monkeypatch.setattr(benchmark, "missing_packages", lambda row: [])
    benchmark.main(arguments(*argv))
    assert here[-1] == ("measure", row.name)


def test_which_packages_a_row_needs(monkeypatch):
    monkeypatch.setattr(cli, "installed", lambda package: package != "bitsandbytes")
    missing = {row.name: benchmark.missing_packages(row) for row in benchmark.ROWS}
    assert missing["lora 1024 compile"] == [] and missing["lora 1024 gradient_checkpointing quantize_base nf4"] == ["bitsandbytes"]
    assert missing["full 512 weights_dtype bf16 optimizer adamw8bit compile"] == ["bitsandbytes"]


def test_no_row_begins_that_would_end_too_late(here, tmp_path, capsys, monkeypatch):
    """Minutes for two things of 45 s and a little, each of which takes 45 s: a check and a row; the next call goes on."""
    clock = [1000.0]
    monkeypatch.setattr(benchmark.time, "time", lambda: clock[0])
    inner = benchmark.in_process

    def takes_time(*given, seconds):
        clock[0] += 45
        return inner(*given, seconds=seconds)

    monkeypatch.setattr(benchmark, "in_process", takes_time)
    argv = ["--output", str(tmp_path / "result.json"), "--trainers", "lora", "--minutes", "1.6"]
    names = [row.name for row in benchmark.ROWS if row.trainer == "lora" and not row.extra]
    benchmark.main(arguments(*argv))
    out = capsys.readouterr().out
    assert [name for _, name in here] == ["lora", names[0]]
    assert f"not measured, as 1.6 minutes are over: {'; '.join(names[1:])}." in out
    benchmark.main(arguments(*argv))
    assert [name for _, name in here[2:]] == names[1:3]


def test_unknown_trainers_and_sizes_are_refused(capsys):
    for argv, message in ((["--trainers", "lroa"], "there is no lroa; choose from lora, full"), (["--resolution", "100"], "no row")):
        with pytest.raises(SystemExit):
            arguments(*argv)
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_crash_and_a_hang_of_a_row_are_told():
    assert "terminated abruptly" in benchmark.in_process(die, seconds=60)["failed"]
    assert benchmark.in_process(sleep, 300, seconds=15)["failed"] == "nothing after 15 s"
    assert benchmark.in_process(dict, {"works": True}, seconds=60) == {"works": True}


@pytest.mark.long
def test_the_whole_benchmark_at_tiny_size(tmp_path):
    """As a user types it: every row measured, or refused for want of a GPU."""
    import subprocess
    import sys

    import runs

    flags = ["--tiny", "--extra", "--output", str(tmp_path / "result.json"), "--trainers", "lora"]
    command = [sys.executable, "benchmarks/real_geometry.py", *flags]
    subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), check=True, capture_output=True, text=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["checks"]["lora"]["passed"]
    failed = {name: row["failed"] for name, row in result["rows"].items() if "failed" in row}
    assert all("NVIDIA GPU" in reason for reason in failed.values()), failed
    assert len(failed) < len(result["rows"]) == sum(row.trainer == "lora" for row in benchmark.ROWS)
