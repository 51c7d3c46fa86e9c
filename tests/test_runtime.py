"""start(args) -> Run: repeated in one process, on two real processes, with trackers, seeds, signals and refusals."""

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src import checkpoint, cli, runtime
from src.pipelines import sd3

ROOT = Path(__file__).parent.parent


def arguments(folder, **changes):
    parser = cli.make_parser("a run")
    cli.add_model_args(parser)
    cli.add_speed_args(parser)
    cli.add_run_args(parser, output_dir=str(folder))
    args = cli.parse(parser, [])
    defaults = {"report_to": "none", "mixed_precision": "no", "seed": 5}
    for name, value in {**defaults, **changes}.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return args


@pytest.fixture(autouse=True)
def untouched_process():
    """Every test leaves the process-wide switches and the signal handlers as it found them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    conv = torch.backends.cudnn.allow_tf32
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.allow_tf32 = conv


def test_runs_of_different_precision_follow_each_other_in_one_process(tmp_path):
    """accelerate alone refuses the second: "AcceleratorState has already been initialized"."""
    for number, (name, dtype) in enumerate({"no": torch.float32, "bf16": torch.bfloat16, "no ": torch.float32}.items()):
        run = runtime.start(arguments(tmp_path / str(number), mixed_precision=name.strip()))
        assert run.weight_dtype == dtype and run.accelerator.mixed_precision == name.strip()
        assert (run.rank, run.world, run.is_main) == (0, 1, True)
        run.finish()


def test_a_run_that_failed_does_not_spoil_the_next(tmp_path):
    runtime.start(arguments(tmp_path / "a", mixed_precision="bf16")).signals.install()  # never finished
    before = signal.getsignal(signal.SIGTERM)
    run = runtime.start(arguments(tmp_path / "b"))
    run.signals.install()
    run.finish()
    assert signal.getsignal(signal.SIGTERM) not in (before, run.signals._handle)


def test_the_environment_of_the_launcher_changes_no_result(tmp_path, monkeypatch, capsys):
    """Left to itself, accelerate divides the loss by 8 here and compiles the model."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = runtime.start(arguments(tmp_path))
    x = torch.ones((), requires_grad=True)
    run.accelerator.backward(x * 3)
    assert x.grad == 3
    assert run.accelerator.state.dynamo_plugin.backend.value == "NO"
    assert run.accelerator.mixed_precision == "no"
    assert "the launcher's bf16 is ignored" in capsys.readouterr().out
    run.finish()


def test_fp16_on_a_cpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--mixed_precision fp16 .*bf16"):
        runtime.start(arguments(tmp_path / "run", mixed_precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_an_unset_seed_is_drawn_printed_and_recorded(tmp_path, capsys):
    args = arguments(tmp_path, seed=None)
    runtime.start(args).finish()
    recorded = json.loads((tmp_path / "args.json").read_text())["seed"]
    assert recorded == args.seed and 0 <= recorded < 2**31
    assert f"--seed {recorded} repeats this run" in capsys.readouterr().out
    other = arguments(tmp_path, seed=None)
    runtime.start(other).finish()
    assert other.seed != args.seed


def test_args_json_repeats_the_run_as_a_config(tmp_path):
    args = arguments(tmp_path / "run", seed=None, checkpointing_steps=7, checkpoints_total_limit=2)
    runtime.start(args).finish()
    parser = cli.make_parser("a run")
    cli.add_model_args(parser)
    cli.add_speed_args(parser)
    cli.add_run_args(parser, output_dir="elsewhere")
    again = cli.parse(parser, ["--config", str(tmp_path / "run" / "args.json")])
    assert {k: v for k, v in vars(again).items() if k != "config"} == {k: v for k, v in vars(args).items() if k != "config"}
    assert list((tmp_path / "run").glob("*.tmp")) == []


def checkpoint_of(folder, **flags):
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"")
    (folder / "args.json").write_text(json.dumps(flags))


def test_a_resumed_run_takes_the_checkpoints_seed_and_names_what_differs(tmp_path):
    args = arguments(tmp_path, seed=None, resume_from_checkpoint="latest", checkpointing_steps=9)
    saved = {**runtime.plain_args(args), "seed": 77, "checkpointing_steps": 4, "resume_from_checkpoint": None}
    checkpoint_of(tmp_path / "checkpoint-3", **saved)
    line = runtime.resume_args(args)
    assert args.seed == 77
    assert "checkpoint-3" in line and "--checkpointing_steps 4 -> 9" in line and "--seed" not in line and "resume" not in line
    args.seed = 5
    assert "--seed 77 -> 5" in runtime.resume_args(args) and args.seed == 5  # the command line wins, and says so


def test_latest_without_a_checkpoint_and_no_resume_change_nothing(tmp_path):
    for spec in (None, "latest"):
        args = arguments(tmp_path, seed=None, resume_from_checkpoint=spec)
        assert runtime.resume_args(args) is None and args.seed is None


def test_switches_are_set_both_ways(tmp_path):
    for tf32, deterministic in ((True, True), (False, False), (None, False)):  # None: in convolutions alone, as torch has it
        runtime.start(arguments(tmp_path, allow_tf32=tf32, deterministic=deterministic)).finish()
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == (tf32 is not False)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_the_device_of_a_single_gpu_has_its_number(tmp_path, monkeypatch):
    """accelerate's has none there, and `torch.cuda.set_device`, which the thread of the rewards calls, refuses such a one."""
    accelerator = runtime.start(arguments(tmp_path)).accelerator
    monkeypatch.setattr(type(accelerator), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert runtime.Run(arguments(tmp_path), accelerator).device == torch.device("cuda", 2)


def test_one_process_gathers_averages_and_broadcasts_to_itself(tmp_path):
    run = runtime.start(arguments(tmp_path))
    x = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(run.gather(x), x) and torch.equal(run.mean(x), x) and run.broadcast({"a": 1}) == {"a": 1}
    with pytest.raises(AssertionError, match="first axis"):
        run.gather(torch.tensor(1.0))
    with run.no_sync(torch.nn.Linear(1, 1), last=False):
        pass
    assert run.peak_memory() > 10_000_000  # Python with torch
    run.finish()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone says what a process itself has held")
def test_the_peak_of_a_program_is_not_its_parents():
    """A process of 1.5 GB starts one that holds next to nothing; getrusage would say 1.5 GB of it, too."""
    child = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from src import runtime; print(runtime.resident_peak())"
    start = f"subprocess.check_output([sys.executable, '-c', {child!r}], text=True)"
    parent = f"import subprocess, sys; held = bytearray(1_500_000_000); print({start})"
    out = subprocess.run([sys.executable, "-c", parent], env=environment(), capture_output=True, text=True).stdout
    assert 10_000_000 < int(out) < 1_000_000_000


@pytest.mark.parametrize(("error", "others"), [(ValueError("wrong"), ValueError), (OSError(), SystemExit), (MemoryError(), SystemExit)])
def test_what_the_main_process_meets_ends_the_others_too(error, others):
    """They wait in the broadcast for what it makes: told nothing, they would wait for hours."""
    sent = []

    def make():
        raise error

    with pytest.raises(type(error)):
        runtime.Run.from_main(SimpleNamespace(is_main=True, broadcast=lambda value: sent.append(value) or value), make)
    with pytest.raises(others, match="wrong" if others is ValueError else "main process"):
        runtime.Run.from_main(SimpleNamespace(is_main=False, broadcast=lambda value: sent[0]), make)


@pytest.mark.parametrize(("world", "is_fsdp2", "last", "waits"), [(2, False, False, True), (2, False, True, False), (2, True, False, False),
                                                              (1, False, False, False)])  # fmt: skip
def test_fsdp2_sums_gradients_at_every_micro_batch(world, is_fsdp2, last, waits):
    """Left for later they would lie whole, in fp32, on every GPU."""
    entered = []
    accelerator = SimpleNamespace(is_fsdp2=is_fsdp2, no_sync=lambda model: entered.append(model) or contextlib.nullcontext())
    with runtime.Run.no_sync(SimpleNamespace(world=world, accelerator=accelerator), "model", last):
        pass
    assert bool(entered) == waits


def test_gradients_are_clipped_to_the_norm_and_zero_leaves_them(tmp_path):
    """Gradient (3, 4) has norm 5; clipped to 1 it is (0.6, 0.8)."""
    run = runtime.start(arguments(tmp_path))
    for limit, expected in ((1.0, [0.6, 0.8]), (0.0, [3.0, 4.0])):
        p = torch.nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([3.0, 4.0])
        assert run.clip_gradients([p], limit) == 5.0
        torch.testing.assert_close(p.grad, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    run.finish()


def test_the_norm_of_bf16_gradients_is_an_fp32_number(tmp_path):
    """n numbers of 1 have the norm sqrt(n): 1001 of them 31.638584, which bf16 would round to 31.625."""
    run = runtime.start(arguments(tmp_path))
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in (1000, 1, 5)]
    for parameter in parameters[:2]:  # the last one has none
        parameter.grad = torch.ones_like(parameter)
    norm = run.clip_gradients(parameters, 8.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(1001**0.5, rel=1e-6)
    torch.testing.assert_close(parameters[0].grad, torch.full((1000,), 8 / 1001**0.5).bfloat16(), rtol=2**-8, atol=0)
    assert run.clip_gradients([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0  # nothing was trained
    parameters[0].grad = torch.ones_like(parameters[0])
    run.clip_gradients(parameters, 0)
    assert (parameters[0].grad == 1).all()  # without a limit they stay
    run.finish()


@pytest.mark.parametrize(("counts", "refused"), [([270336, 270336], False), ([270336, 233472], True)])
def test_gpus_that_would_round_differently_are_refused(counts, refused, monkeypatch):
    gpu = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=2048)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch, "tensor", lambda values, device: np.array(values))  # there is no GPU here to put one on
    run = SimpleNamespace(device=torch.device("cuda", 0), world=2, gather=lambda own: np.array([*own, *counts[1:]]))
    with pytest.raises(SystemExit, match="270336, 233472 threads") if refused else contextlib.nullcontext():
        runtime.check_equal_gpus(run, "--weights_dtype bf16")


def test_a_published_model_is_planned_without_its_download(tmp_path, capsys):
    """2,243,171,520 weights of the transformer, as its model card counts them; a run, and another folder, stay as they are."""
    flags = dict(cache_dir=tmp_path / "cache", mixed_precision="no", output_dir=tmp_path / "run")
    for name, dry_run in (("stable-diffusion-3.5-medium", False), ("my-model", True)):
        args = argparse.Namespace(pretrained_model_name_or_path=str(tmp_path / name), dry_run=dry_run, **flags)
        runtime.plan_without_download(args)
        assert args.pretrained_model_name_or_path == str(tmp_path / name)
    assert capsys.readouterr().out == "" and not (tmp_path / "cache").exists()
    args = argparse.Namespace(pretrained_model_name_or_path=str(tmp_path / "stable-diffusion-3.5-medium"), dry_run=True, **flags)
    runtime.check(args)
    assert "stable-diffusion-3.5-medium is not there" in capsys.readouterr().out
    two = argparse.Namespace(pretrained_model_name_or_path="models/tiny-sd15", reference_model=str(tmp_path / "stable-diffusion-v1-5"),
                             dry_run=True, **flags)  # fmt: skip
    runtime.plan_without_download(two)
    assert two.reference_model == str(tmp_path / "cache/published/stable-diffusion-v1-5")
    sd3.check_folder(args.pretrained_model_name_or_path)
    assert sd3.parameter_counts(args.pretrained_model_name_or_path)["transformer"] == 2_243_171_520


@pytest.fixture
def ctrl_c():
    """Python's own handler, also where a shell started the tests in the background, with Ctrl-C ignored."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, found)


def test_until_the_loop_begins_a_signal_ends_the_process_at_once(tmp_path, ctrl_c):
    """A cache of thousands of pictures takes hours to fill, and there is nothing to save yet: no handler of ours stands in the way."""
    before = signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)  # a run of an earlier test may have left its own
    run = runtime.start(arguments(tmp_path))
    assert signal.getsignal(signal.SIGTERM) == before and signal.getsignal(signal.SIGINT) == ctrl_c
    checkpoint.Checkpointer(run, every=1, keep=None, parts={}).resume(None)
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == run.signals._handle
    run.finish()
    assert signal.getsignal(signal.SIGTERM) == before and signal.getsignal(signal.SIGINT) == ctrl_c


def test_ctrl_c_is_heard_though_the_wrappers_shell_ignores_it(tmp_path, ctrl_c):
    """A shell script starts its background jobs with SIGINT ignored, and Python leaves that as it is. Until the loop begins it ends the
    process at once, without the traceback of a KeyboardInterrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = runtime.start(arguments(tmp_path))
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    run.finish()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_to_stop_and_the_second_ctrl_c_interrupts(tmp_path, number, capfd, ctrl_c):
    run = runtime.start(arguments(tmp_path))
    checkpoint.Checkpointer(run, every=1, keep=None, parts={}).resume(None)
    assert not run.stop_requested()
    os.kill(os.getpid(), number)
    assert run.stop_requested()
    assert number.name in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000):  # until Python runs the handler
            pass
    run.finish()
    assert signal.getsignal(signal.SIGINT) is ctrl_c


def test_only_the_main_process_prints(tmp_path, capsys):
    run = runtime.start(arguments(tmp_path))
    run.is_main = False
    run.print("from another rank")
    run.is_main = True
    run.finish("done: here")
    out = capsys.readouterr().out
    assert "another rank" not in out and out.endswith("done: here\n")


def test_tensorboard_points_are_not_doubled_by_a_resume(tmp_path):
    """Steps 1-4 are logged, the run dies, resumes at checkpoint-2 and logs 3-4 again: each step shows once, with the second value."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runtime.start(arguments(tmp_path, report_to="tensorboard"))
    for step in range(1, 5):
        run.accelerator.log({"loss": 1.0}, step=step)
    run.finish()
    checkpoint_of(tmp_path / "checkpoint-2", **runtime.plain_args(run.args))
    run = runtime.start(arguments(tmp_path, report_to="tensorboard", resume_from_checkpoint="latest"))
    for step in range(3, 5):
        run.accelerator.log({"loss": 2.0}, step=step)
    from PIL import Image

    run.log_image("samples", Image.new("RGB", (8, 4), "red"), step=4)
    run.finish()
    events = EventAccumulator(str(tmp_path / "logs" / "dive-sd3")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert [(e.step, e.width, e.height) for e in events.Images("samples")] == [(4, 8, 4)]


def test_a_fresh_run_draws_a_curve_of_its_own_where_an_earlier_one_was_begun(tmp_path, monkeypatch):
    """Only a resumed run continues the one that logs/wandb_id names."""
    begun, run = [], SimpleNamespace(output_dir=tmp_path, is_main=True, accelerator=SimpleNamespace())
    run.accelerator.init_trackers = lambda name, config, init_kwargs: begun.append(init_kwargs["wandb"]["id"])
    checkpoint_of(tmp_path / "checkpoint-1")
    for spec in (None, None, "latest"):
        run.args = arguments(tmp_path, report_to="wandb", resume_from_checkpoint=spec)
        runtime._start_trackers(run)
    assert begun[0] != begun[1] == begun[2]


def test_the_main_process_draws_the_seed_for_all(tmp_path, monkeypatch):
    """Two processes of other seeds would train on equal noise or on different weights."""
    monkeypatch.setattr(runtime.Run, "broadcast", lambda self, value: 77)
    checked = []
    monkeypatch.setattr(runtime, "check_shared", lambda run, folder, flag: folder.mkdir(exist_ok=True) or checked.append(flag))
    args = arguments(tmp_path, seed=None)
    args.cache_dir = tmp_path / "cache"
    runtime.start(args).finish()
    assert args.seed == 77 and json.loads((tmp_path / "args.json").read_text())["seed"] == 77
    assert checked == ["output_dir", "cache_dir"]


def test_several_processes_stop_at_the_same_step(monkeypatch):
    """Each asks once a step and hears what all had heard a step earlier; `wait` asks for now. What is under way is awaited at the end."""
    waited, run = [], runtime.Run.__new__(runtime.Run)
    work = SimpleNamespace(wait=lambda: waited.append(None))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, **_: work)
    run.world, run.rank, run.is_main, run._group, run._pending, run.signals = 2, 0, True, None, None, runtime.StopSignal()
    run.accelerator = SimpleNamespace(wait_for_everyone=lambda: None, end_training=lambda: None)
    assert not run.stop_requested()
    run.signals.received = True
    assert [run.stop_requested(), run.stop_requested()] == [False, True] and len(waited) == 2
    run.signals.received = False
    assert run.stop_requested(wait=True) is False
    run.signals.received = True
    assert run.stop_requested(wait=True) is True
    before = len(waited)
    run.finish()
    assert len(waited) == before + 1


def test_gradients_outside_the_wrapped_module_are_averaged():
    run = runtime.Run.__new__(runtime.Run)
    run.world, run.mean = 2, lambda tensor: tensor / 2
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([2.0, 4.0])
    run.average_gradients([weight])
    assert weight.grad.tolist() == [1, 2]


def test_processes_wait_for_hours_and_send_no_buffers(tmp_path, monkeypatch):
    """For one that renders or scores; SD3's position embeddings would be 0.45 GB in every forward pass."""
    import accelerate

    given = {}
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: given.update(options))
    runtime._accelerator(arguments(tmp_path))
    merged = {name: value for handler in given["kwargs_handlers"] for name, value in handler.to_kwargs().items()}
    assert merged["timeout"].total_seconds() == 2 * 3600
    assert merged["broadcast_buffers"] is False and merged["gradient_as_bucket_view"] is True


@pytest.mark.slow
def test_wandb_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from PIL import Image

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for spec in (None, "latest"):
        run = runtime.start(arguments(tmp_path, report_to="wandb", resume_from_checkpoint=spec))
        run.accelerator.log({"loss": 1.0}, step=1)
        run.log_image("samples", Image.new("RGB", (8, 4), "red"), step=1)
        run.finish()
        checkpoint_of(tmp_path / "checkpoint-1", **runtime.plain_args(run.args)) if spec is None else None
    written = list((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    identity = (tmp_path / "logs" / "wandb_id").read_text()
    assert written and all(identity in p.name for p in written)  # the resumed run continues the same curve


def test_trackers_get_plain_values(tmp_path):
    args = argparse.Namespace(folder=Path("a/b"), words=["x", "y"], nothing=None, config=Path("c.yaml"), number=3)
    assert runtime.plain_args(args) == {"folder": "a/b", "words": ["x", "y"], "nothing": None, "number": 3}


# What the launchers leave in the environment, read off accelerate's launcher and torchrun
SILENT = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SINGLE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}


@pytest.mark.parametrize(
    ("environ", "world", "fine"),
    [
        ({}, 1, True),
        (SINGLE, 1, True),
        (SILENT, 1, False),
        ({**SILENT, "WORLD_SIZE": "2"}, 2, True),
        ({**SILENT, "WORLD_SIZE": "2"}, 1, False),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, 1, False),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "x"}, 1, True),
        ({"MASTER_ADDR": "x"}, 1, True),  # a cluster's shell, no launcher
    ],
)
def test_processes_that_never_started_are_noticed(environ, world, fine):
    if fine:
        runtime.check_world(environ, world)
    else:
        with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes"):
            runtime.check_world(environ, world)


def test_a_driver_that_torch_cannot_use_is_a_warning_with_the_cure():
    assert runtime.unused_gpu(False, False, None) is None
    assert runtime.unused_gpu(True, True, "13.0") is None
    assert re.search("CPU build.*pytorch.org", runtime.unused_gpu(True, False, None))
    assert re.search("CUDA 13.0.*CUDA_VISIBLE_DEVICES", runtime.unused_gpu(True, False, "13.0"))


@pytest.mark.parametrize(
    ("visible", "flags", "refused"),
    [
        (None, {}, True),  # a GPU is there and nobody said to leave it: a real model would train for weeks
        ("9", {}, True),  # a slip, it seems
        ("", {}, False),  # hidden on purpose
        ("-1", {}, False),
        ("NoDevFiles", {}, False),  # Slurm's word for a job without GPUs
        ("accelerate", {}, False),  # `accelerate launch --cpu`
        (None, {"mixed_precision": "no"}, False),  # the tiny recipes
        (None, {"dry_run": True}, False),
    ],
)
@pytest.mark.parametrize("built_for", [None, "13.0"])
def test_a_gpu_that_torch_cannot_use_is_not_left_aside_for_a_real_model(visible, flags, refused, built_for, monkeypatch):
    monkeypatch.setattr(runtime, "_unused_gpu", lambda: runtime.unused_gpu(True, False, built_for))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible == "accelerate":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    elif visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    known = {"pretrained_model_name_or_path": "m", "weights_dtype": "fp32", "output_dir": Path("none")}
    args = argparse.Namespace(**{"mixed_precision": "bf16", "dry_run": False} | known | flags)
    if not refused:
        return runtime.check(args)
    with pytest.raises(ValueError, match="--mixed_precision bf16: .*NVIDIA driver.*train on the CPU all the same.*CUDA_VISIBLE_DEVICES=''"):
        runtime.check(args)


@pytest.mark.parametrize("trainer", sorted(path.stem for path in ROOT.glob("train_*.py")))
def test_no_run_writes_into_somebodys_model_but_over_an_earlier_result(trainer, tmp_path, monkeypatch):
    """A LoRA's args.json there would make the model look like a result of ours, which the next full run replaces."""
    checks = []
    monkeypatch.setattr(cli, "parse", lambda *_, **options: checks.extend(options["checks"]))
    importlib.import_module(trainer).parse_args([])
    assert checks[0] is runtime.check
    args = argparse.Namespace(mixed_precision="no", dry_run=False, output_dir=tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path} holds a model that no run here wrote.*; choose another folder"):
        runtime.check(args)
    (tmp_path / "args.json").write_text("{}")
    runtime.check(args)


@pytest.mark.parametrize(("flags", "kind"), [
    (dict(rank=16), "whole model"), (dict(rank=16, use_lora=True), "whole model"), (dict(rank=32, full_weights=False), "whole model"),
    (dict(rank=16, use_lora=False), "LoRA"), (dict(rank=32, full_weights=True), "LoRA"), (dict(weights_dtype="fp32"), "LoRA"),
])  # fmt: skip
def test_a_lora_and_a_model_do_not_share_a_folder(tmp_path, flags, kind):
    """Whoever loads the folder afterwards would get the one or the other, by the program."""
    args = argparse.Namespace(mixed_precision="no", dry_run=False, output_dir=tmp_path, **flags)
    ours, other = ("pytorch_lora_weights.safetensors", "model_index.json")[:: 1 if kind == "whole model" else -1]
    for name in ("args.json", ours):
        (tmp_path / name).write_text("{}")
    runtime.check(args)
    (tmp_path / other).write_text("{}")
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path} holds the {kind} of an earlier run.*; choose another folder, or"):
        runtime.check(args)


def test_a_machine_without_a_driver_trains_on_its_cpu(monkeypatch):
    monkeypatch.setattr(runtime, "_unused_gpu", lambda: runtime.unused_gpu(False, False, "13.0"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    runtime.check(argparse.Namespace(mixed_precision="bf16", dry_run=False, weights_dtype="fp32", output_dir=Path("none")))


# --------------------------------------------------------------------------- real processes

TWO = """
import json, os, signal, sys, time
import torch
from pathlib import Path
from src import checkpoint, cli, metrics, optim, runtime
torch.manual_seed(0)
folder = Path(sys.argv[1])
parser = cli.make_parser("two")
cli.add_model_args(parser)
cli.add_speed_args(parser)
cli.add_budget_args(parser, max_train_steps=8)
cli.add_run_args(parser, output_dir=str(folder))
args = cli.parse(parser, ["--report_to", "none", "--mixed_precision", "no", "--logging_steps", "2"])
run = runtime.start(args)
result = {"world": run.world, "seed": args.seed, "main": run.is_main}
result["gathered"] = run.gather(torch.tensor([[run.rank * 10.0, run.rank * 10.0 + 1]])).tolist()
result["mean"] = run.mean(torch.tensor([float(run.rank), 4.0])).tolist()
result["broadcast"] = run.broadcast(f"from rank {run.rank}")
def refuse():
    raise ValueError(f"refused by rank {run.rank}")
runtime.check_shared(run, folder / "common", "cache_dir")
result["shared_folder"] = "agreed"
try:
    runtime.check_shared(run, folder / f"own-{run.rank}", "cache_dir")
except SystemExit as refused:
    result["own_folder"] = str(refused)
result["made"] = run.from_main(lambda: f"made by rank {run.rank}")
try:
    run.from_main(refuse)
except ValueError as error:
    result["refused"] = str(error)

model = torch.nn.Linear(1, 1)
torch.nn.init.ones_(model.weight)
model.register_buffer("mark", torch.zeros(()))
policy = run.accelerator.prepare(model)
model.mark.fill_(run.rank)
for last, name in ((False, "local"), (True, "shared")):  # gradient of the output is the input: rank + 1
    with run.no_sync(policy, last=last):
        run.accelerator.backward(policy(torch.full((1, 1), run.rank + 1.0)).sum())
    result[name] = model.weight.grad.item()
result["buffer"] = model.mark.item()
result["storages"] = len({p.grad.untyped_storage().data_ptr() for p in model.parameters()})

optimizer = optim.build(model.parameters(), name="adamw", learning_rate=1.0, device=run.device)
schedule = optim.schedule(optimizer, "linear", total_steps=8)
log = metrics.Log(run, every=args.logging_steps)
part = {"log": log}
saver = checkpoint.Checkpointer(run, every=3, keep=None, parts=part)
saver.resume(None)
result["stops"] = []
for step in range(1, 7):
    if step == 3 and run.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)  # one process alone is told
    log.add(loss=torch.tensor(float(step + 10 * run.rank)))
    log.write(step)
    optimizer.step()
    schedule.step()
    saver.save_if_due(step)
    result["stops"].append(run.stop_requested())
    if step == 3:
        result["waited"] = run.stop_requested(wait=True)
    if result["stops"][-1]:
        break
result["lr"] = schedule.get_last_lr()[0]
rank = run.rank
def fail(folder):
    raise OSError(28, "No space left on device")
saver.write_weights = fail
try:
    saver.save(100)
except SystemExit as stop:
    result["failure"] = str(stop)
run.finish()
Path(folder, f"rank{rank}.json").write_text(json.dumps(result))
"""


def environment(**additions):
    """This process's environment without what a launcher may have left in it."""
    launchers = ("ACCELERATE_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **additions}


def launch(code, folder, environ):
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(command, env=environment(**environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two gloo processes saw; started the way torchrun and `accelerate launch --multi_gpu` start them."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [launch(TWO, folder, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)]
    output = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(output)
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in (0, 1)], folder, output


@pytest.mark.slow
def test_two_processes_agree(two_processes):
    (a, b), _, output = two_processes
    assert (a["world"], b["world"], a["main"], b["main"]) == (2, 2, True, False)
    assert a["seed"] == b["seed"]
    assert a["gathered"] == b["gathered"] == [[0.0, 1.0], [10.0, 11.0]]
    assert a["mean"] == b["mean"] == [0.5, 4.0]
    assert a["broadcast"] == b["broadcast"] == "from rank 0"
    assert a["made"] == b["made"] == "made by rank 0" and a["refused"] == b["refused"] == "refused by rank 0"
    assert "seed" in output[0] and "repeats this run" not in output[1]
    assert "Warning" not in output[0] + output[1]


@pytest.mark.slow
def test_two_processes_do_not_send_buffers_around(two_processes):
    """Each marks its own with its rank. SD3's position embeddings are a buffer of 0.45 GB, which torch would send in every forward pass."""
    assert [result["buffer"] for result in two_processes[0]] == [0.0, 1.0]


@pytest.mark.slow
def test_gradients_of_two_processes_are_kept_once(two_processes):
    """Those of weight and bias are parts of one bucket, that which is sent."""
    assert [result["storages"] for result in two_processes[0]] == [1, 1]


@pytest.mark.slow
def test_two_processes_share_gradients_only_at_the_last_micro_batch(two_processes):
    """Inputs 1 and 2. Without sync each keeps its own; with it the accumulated ones, 1 + 1 and 2 + 2, are averaged: 3."""
    (a, b), _, _ = two_processes
    assert (a["local"], b["local"]) == (1.0, 2.0)
    assert a["shared"] == b["shared"] == 3.0


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(two_processes):
    """Signalled in step 3; the answer is read one step later, or at once by who waits for it."""
    (a, b), _, _ = two_processes
    assert a["stops"] == b["stops"] == [False, False, False, True] and a["waited"] and b["waited"]


@pytest.mark.slow
def test_processes_that_see_other_folders_are_ended_together(two_processes):
    """Each with a folder of its own, as machines without common storage have; nothing is left in them."""
    (a, b), folder, _ = two_processes
    assert a["shared_folder"] == b["shared_folder"] == "agreed"
    for result in (a, b):
        assert "1 of 2 processes see another folder" in result["own_folder"] and "--cache_dir" in result["own_folder"]
    assert not list(folder.rglob(".seen*"))


@pytest.mark.parametrize(("count", "world"), [(1, 1), (5, 1), (0, 4), (1, 2), (4, 2), (5, 2), (16, 8), (17, 8), (3, 8)])
def test_every_process_has_as_many_turns_and_each_thing_is_done_once(count, world):
    """Of 4 things for 2 processes: 0, 2 and 1, 3. Of 5: 0, 2, 4 and 1, 3, 5, where 5 counts for nothing."""
    turns = [runtime.Run.turns(SimpleNamespace(rank=rank, world=world), count) for rank in range(world)]
    assert {len(own) for own in turns} == {math.ceil(count / world)}
    assert sorted(turn for own in turns for turn in own if turn < count) == list(range(count))


def test_gloo_is_told_the_interface_that_leads_to_the_first_machine(monkeypatch):
    ways = {"10.0.0.1": "eth7", "192.0.2.1": "eth9"}  # the second: to the outside, where the first machine's name is its own loopback
    monkeypatch.setattr(runtime, "interface_to", ways.get)
    several = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1"}
    for environ, expected in (
        (several, "eth7"), (several | {"LOCAL_WORLD_SIZE": "16"}, None), (several | {"GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        (several | {"MASTER_ADDR": "my-own-name"}, "eth9"), ({}, None),
    ):  # fmt: skip
        environ = dict(environ)
        runtime._settle_gloo(environ)
        assert environ.get("GLOO_SOCKET_IFNAME") == expected


def test_an_interface_is_found_by_its_address_and_the_loopback_is_none():
    assert runtime.interface_to("127.0.0.1") is None and runtime.interface_to("no such host.invalid") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # the address is reserved for examples: the way to it is the way out
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        own = probe.getsockname()[0]
    assert runtime.interface_to(own) == runtime.interface_to("192.0.2.1") in {name for _, name in socket.if_nameindex()}


def test_without_its_own_count_a_process_asks_the_system(monkeypatch):
    """gVisor's /proc/self/status has no VmHWM."""
    monkeypatch.setattr(runtime.Path, "read_text", lambda self: "VmRSS:\t 5 kB\n")
    assert runtime.resident_peak() > 10_000_000


@pytest.mark.slow
def test_two_processes_log_the_mean_and_save_once(two_processes):
    """Losses are step and step + 10: means 5 higher than rank 0's: window 1, 2 -> 6.5, window 3, 4 -> 8.5."""
    from src import metrics

    (a, b), folder, _ = two_processes
    assert [(line["step"], line["loss"]) for line in metrics.read(folder / "metrics.jsonl")] == [(2, 6.5), (4, 8.5)]
    state = torch.load(folder / "checkpoint-3" / "state.pt", weights_only=True)
    assert state["log"]["window"] == {"loss": [8.0]}  # the open window, already averaged over both
    assert a["lr"] == b["lr"] == pytest.approx(0.5)  # 4 of 8 steps: not faster with two processes


@pytest.mark.slow
def test_a_failed_save_stops_both_with_the_same_words(two_processes):
    (a, b), folder, _ = two_processes
    assert a["failure"] == b["failure"] and "No space left" in a["failure"] and "checkpoint-3, is intact" in a["failure"]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3"]


@pytest.mark.slow
def test_accelerate_launch_that_starts_one_process_instead_of_two_is_refused(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    environ = environment(CUDA_VISIBLE_DEVICES="", HF_HOME=str(tmp_path))  # HF_HOME: no configuration of this machine's user
    done = subprocess.run([*launcher, str(script), str(tmp_path / "run")], env=environ, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()
