"""The LoRA trainer as people start and stop it: processes, signals, the wrapper, two processes, real photographs, wandb."""

import functools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import runs
import torch
from PIL import Image

import train_text_to_image_lora_sd3 as script
from src import checkpoint, lora, metrics

pytestmark = pytest.mark.slow
WRAPPER = ["bash", "scripts/train_text_to_image_lora_sd3.sh"]
PROMPT = "a red ring"
LAYERS = ",".join(lora.DEFAULT_LAYERS)  # given, because the wrapper's TINY recipe adapts others than the script does by itself

# Some seconds of training with everything that has a state: schedule, EMA, dropout, an open window of metrics, loader workers.
LONG = dict(
    lora_layers=LAYERS,
    rank=4, learning_rate=1e-2, lr_scheduler="cosine", lora_dropout=0.2, use_ema=True, caption_dropout=0.3, no_hflip=True,
    max_train_steps=60, checkpointing_steps=5, checkpoints_total_limit=2, logging_steps=4, train_batch_size=2,
    gradient_accumulation_steps=2, num_validation_loss_images=2, validation_steps=20, validation_prompt=[PROMPT],
    dataloader_num_workers=1, report_to="tensorboard",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_world(tiny_sd3_folder, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Output of an uninterrupted process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    runs.finish(launch(world, out, "log", **LONG), out.with_suffix(".log"))
    return out


def launch(world, out: Path, log: str, wrapper: dict[str, str] | None = None, **flags) -> subprocess.Popen | runs.Forked:
    """Starts the script, or the wrapper with these variables; prints to `out`.LOG."""
    argv, file = world.argv(out, **flags), out.with_suffix(f".{log}")
    return runs.fork(["train_text_to_image_lora_sd3.py", *argv], file) if wrapper is None else runs.start(WRAPPER + argv, file, **wrapper)


def step_of(out: Path) -> int:
    """The last step in metrics.jsonl."""
    path = out / "metrics.jsonl"
    return max([line["step"] for line in metrics.read(path)], default=0) if path.exists() else 0


def assert_same_run(one: Path, other: Path) -> None:
    for number in (55, 60):
        runs.assert_identical(runs.state(one / f"checkpoint-{number}"), runs.state(other / f"checkpoint-{number}"))
    for folder in (".", "raw"):
        runs.assert_identical(runs.saved(one / folder), runs.saved(other / folder))
    assert runs.lines(one) == runs.lines(other)
    assert [path.name for path in sorted(other.glob("checkpoint-*"))] == ["checkpoint-55", "checkpoint-60"]
    assert (other / "summary.png").is_file()


# --------------------------------------------------------------------------- killed and stopped


def test_killed_twice_at_random_moments_it_ends_like_an_uninterrupted_run(world, whole, tmp_path):
    """kill -9 once while caches fill (they start empty), once while training; the moments are drawn anew at every test run."""
    chance = random.SystemRandom()
    entries, step, pause = chance.randint(1, 17), chance.randint(6, 40), chance.uniform(0, 0.1)  # of 18 cache entries, 60 steps
    print(f"killed at {entries} cache entries, and {pause:.3f} s after step {step}")
    world, out = runs.World(world.model, world.data, tmp_path / "cache"), tmp_path / "run"
    moments = [lambda: len(list(world.cache.rglob("*.safetensors"))) >= entries, lambda: step_of(out) >= step]
    for number, moment in enumerate(moments):
        process = launch(world, out, f"kill{number}", **LONG, resume_from_checkpoint="latest")
        runs.wait_for(process, moment, out.with_suffix(f".kill{number}"))
        time.sleep(pause * number)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (out / runs.WEIGHTS).exists()
    said = runs.finish(launch(world, out, "resumed", **LONG, resume_from_checkpoint="latest"), out.with_suffix(".resumed"))
    assert "resuming from" in said
    assert_same_run(whole, out)
    assert not list(out.glob("*.tmp")) and len(list(world.cache.rglob("*.safetensors"))) == 18


def test_sigterm_to_the_wrapper_saves_exits_0_and_resumes_exactly(world, whole, tmp_path):
    out, env = tmp_path / "run", {"TINY": "1"}
    process = launch(world, out, "stopped", env, **LONG)
    runs.wait_for(process, lambda: step_of(out) >= 12, out.with_suffix(".stopped"))
    process.send_signal(signal.SIGTERM)  # to the shell alone: it has to reach the trainer
    said = runs.finish(process, out.with_suffix(".stopped"))
    stopped = int(checkpoint.find_latest(out).name.split("-")[1])
    assert 12 <= stopped < 60 and f"stopped after step {stopped}" in said
    assert "Traceback" not in said and not (out / runs.WEIGHTS).exists()

    runs.finish(launch(world, out, "resumed", **LONG, resume_from_checkpoint="latest"), out.with_suffix(".resumed"))
    assert_same_run(whole, out)


def at_a_terminal(argv: list, log: Path, **env: str) -> subprocess.Popen:
    """The wrapper in a session of its own, which hears Ctrl-C also where a shell started the tests in the background, without it."""
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with open(log, "w") as file:
        return subprocess.Popen([*WRAPPER, *argv], stdout=file, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heard,
                                cwd=runs.ROOT, env=runs.environment(TINY="1", **env))  # fmt: skip


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C, as a terminal sends it: to all of its foreground processes."""
    os.killpg(process.pid, signal.SIGINT)


def test_ctrl_c_to_two_processes_saves_and_exits_0_without_a_report_of_the_launcher(world, tmp_path):
    out, log = tmp_path / "run", tmp_path / "run.log"
    argv = world.argv(out, **LONG | {"report_to": "none", "dataloader_num_workers": 0})
    process = at_a_terminal(argv, log, NUM_PROCESSES="2")
    runs.wait_for(process, lambda: step_of(out) >= 5, log)
    interrupt(process)
    said = runs.finish(process, log)
    assert said.count("stopped after step") == 1 and "Traceback" not in said and checkpoint.find_latest(out)


def test_ctrl_c_before_the_first_step_ends_at_once_in_one_line(world, tmp_path):
    """While Python imports: a shell starts its background jobs with Ctrl-C ignored, and it was heard only after that."""
    out, log = tmp_path / "run", tmp_path / "run.log"
    process = at_a_terminal(world.argv(out, **LONG), log, NUM_PROCESSES="1")

    def importing() -> bool:
        below = psutil.Process(process.pid).children(recursive=True)
        return any(child.ppid() != process.pid and child.name().startswith("python") for child in below)  # the launcher's child

    runs.wait_for(process, importing, log)
    interrupt(process)
    assert process.wait(10) == 130 and not out.exists()
    assert log.read_text() == "interrupted before the first step; what is cached stays\n"


# --------------------------------------------------------------------------- two processes

# One process with batch 4 and two with batch 2 sum the same gradients in another order: 1e-7 relative. Adam's epsilon above every
# gradient keeps its steps proportional to them (otherwise the sign of a zero decides), so losses agree far below 1e-5.
SHARED = dict(
    lora_layers=LAYERS,
    rank=4, learning_rate=10.0, adam_epsilon=1.0, lr_scheduler="cosine", max_train_steps=24, checkpointing_steps=100, caption_dropout=0.3,
    no_hflip=True, num_validation_loss_images=3, validation_steps=8, validation_prompt=[PROMPT], validation_guidance_scale=3.0,
)  # fmt: skip


def test_two_processes_are_one_with_twice_the_batch_also_when_stopped_in_between(world, tmp_path):
    """Noise, timesteps and captions by position (defect 8 of the public scripts: the same on every GPU), and the schedule (defect 20)."""
    runs.train(script, world.argv(tmp_path / "one", **SHARED, train_batch_size=4))
    pair = runs.World(world.model, world.data, tmp_path / "cache")  # empty: the two fill it together
    out, env = tmp_path / "two", {"TINY": "1", "NUM_PROCESSES": "2"}
    process = launch(pair, out, "stopped", env, **SHARED, train_batch_size=2)
    runs.wait_for(process, lambda: step_of(out) >= 5, out.with_suffix(".stopped"))
    process.send_signal(signal.SIGTERM)
    said = runs.finish(process, out.with_suffix(".stopped"))
    assert "step(s) of 4" in said  # the global batch: two processes of two
    assert said.count("stopped after step") == 1 and checkpoint.find_latest(out)

    again = ["--config", out / "args.json", "--resume_from_checkpoint", "latest"]  # with what the wrapper added
    log = out.with_suffix(".resumed")
    runs.finish(runs.fork(["train_text_to_image_lora_sd3.py", *again], log, ranks=2), log)
    one, two = runs.lines(tmp_path / "one"), runs.lines(out)
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for expected, line in zip(one, two, strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    moved = runs.values(tmp_path / "one", "val_loss")
    assert abs(moved[-1] / moved[0] - 1) > 1e-3  # else the weights would not matter
    for step in ("step-000000", "step-000024"):  # the wrapper renders two prompts of its own before ours
        pictures = [tmp_path / "one/samples" / step / "00-0.png", out / "samples" / step / "00-0.png"]
        here, there = (np.asarray(Image.open(path)).astype(int) for path in pictures)
        assert np.abs(here - there).max() <= 1


# --------------------------------------------------------------------------- the wrapper's refusal


def test_wrapper_answers_a_wrong_flag_in_one_line_within_5_seconds_and_writes_nothing(world, tmp_path):
    """Processor time counts, not the clock: other programs may be running."""
    before, env = runs.files(tmp_path), runs.environment(TINY="1")
    command = WRAPPER + world.argv(tmp_path / "run", resolution=500)
    start = os.times()
    process = subprocess.run(command, cwd=runs.ROOT, env=env, capture_output=True, text=True)
    end = os.times()
    assert process.returncode == 2 and not process.stdout
    assert process.stderr.count("\n") == 1 and "--resolution" in process.stderr and "try 496" in process.stderr
    assert end.children_user + end.children_system - start.children_user - start.children_system < 5
    assert runs.files(tmp_path) == before


# --------------------------------------------------------------------------- photographs


def test_photographs_of_every_shape_and_mode_train_resume_and_load_elsewhere(world, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(runs.ROOT / "datas/photos", tmp_path / "photos")
    (data / "broken.jpg").write_bytes((data / "cat.jpg").read_bytes()[:500])
    with open(data / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "broken.jpg", "text": "half a cat"}) + "\n")
    flags = dict(
        dataset_name=data, resolution=64, aspect_buckets=True, rank=8, learning_rate=2e-2, train_batch_size=2, max_train_steps=40,
        checkpointing_steps=10, num_validation_loss_images=3, validation_steps=20, validation_prompt=[PROMPT], dataloader_num_workers=1,
        shift="resolution",
    )  # fmt: skip
    runs.train(script, world.argv(tmp_path / "whole", **flags))
    said = capsys.readouterr().out
    assert "1 picture(s) skipped" in said and "broken.jpg" in said and "8 pictures to train on in" in said
    losses = runs.values(tmp_path / "whole", "val_loss")
    assert losses[-1] < 0.99 * losses[0]

    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(patch, 27)
        runs.train(script, world.argv(tmp_path / "parts", **flags))
    runs.train(script, world.argv(tmp_path / "parts", **flags, resume_from_checkpoint="latest"))
    runs.assert_identical(runs.saved(tmp_path / "whole"), runs.saved(tmp_path / "parts"))
    assert runs.lines(tmp_path / "whole") == runs.lines(tmp_path / "parts")

    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(world.model, torch_dtype=torch.float32)
    pipeline.load_lora_weights(str(tmp_path / "parts"))
    options = dict(height=64, width=64, num_inference_steps=2, guidance_scale=4.5, max_sequence_length=16)
    picture = np.asarray(pipeline(PROMPT, **options, generator=torch.Generator().manual_seed(0)).images[0]).astype(int)
    ours = np.asarray(Image.open(tmp_path / "parts/samples/step-000040/00-0.png"))
    assert np.abs(picture - ours).max() <= 1


# --------------------------------------------------------------------------- wandb


def records(file: Path):
    """Records of a .wandb file: 7 bytes of header, then LevelDB's log format (blocks of 32 kB; pieces with CRC, length and type)."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            return  # still being written
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def curves(files: list[Path]) -> tuple[dict[int, dict], set[str]]:
    """What .wandb files hold so far: all values by step, and the names in the configuration."""
    steps, config = {}, set()
    for record in (record for file in files for record in records(file)):
        config |= {item.key or item.nested_key[0] for item in (*record.run.config.update, *record.config.update)}
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if values:
            steps.setdefault(values["_step"], {}).update(values)
    return steps, config


def test_wandb_offline_holds_the_curves_the_flags_and_the_pictures(world, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = dict(report_to="wandb", num_validation_loss_images=1, validation_prompt=[PROMPT], checkpointing_steps=2)
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(patch, 4)
        runs.train(script, world.argv(out, **flags))
    wandb.finish()  # what the end of that process would do
    runs.train(script, world.argv(out, **flags, resume_from_checkpoint="latest"))
    folders = sorted((out / "logs/wandb").glob("offline-run-*"))
    assert len({folder.name.split("-")[3] for folder in folders}) == 1  # offline-run-TIME-ID: resumed, not a second curve
    files, end = [next(folder.glob("run-*.wandb")) for folder in folders], time.monotonic() + 30
    while not (said := curves(files))[0].keys() >= {1, 2, 3, 4} and time.monotonic() < end:
        time.sleep(0.1)  # wandb's own process writes the files, sometimes after `finish` has returned
    steps, config = said
    pictures = [path.name for folder in folders for path in folder.glob("files/media/images/*.png")]
    for line in runs.lines(out):
        for name in line.keys() & {"loss", "val_loss", "grad_norm"}:
            assert steps[line["step"]][name] == pytest.approx(line[name]), (name, line["step"])
    assert {name.split("_")[1] for name in pictures} == {"0", "4"} and "samples" in steps[4]
    assert {"rank", "seed", "learning_rate"} <= config


def test_compiled_training_is_the_same_training_and_validation_is_not_compiled(world, tmp_path, monkeypatch):
    """With the backend "eager", which runs the traced graphs as they are; pictures and losses of other batch sizes compile nothing."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = script.speed.compile_blocks
    monkeypatch.setattr(script.speed, "compile_blocks", lambda model, mode: compiled(model, backend=backend))
    torch._dynamo.reset()
    flags = dict(rank=2, lora_layers="attn.to_q", learning_rate=1e-2, validation_prompt=["a"], num_validation_loss_images=1)
    runs.train(script, world.argv(tmp_path / "plain", **flags))
    assert not graphs
    runs.train(script, world.argv(tmp_path / "compiled", compile=True, **flags))
    assert len(graphs) == 3  # first (with dual attention), plain and last block, of training alone
    for name, tensor in runs.weights(tmp_path / "plain").items():
        torch.testing.assert_close(runs.weights(tmp_path / "compiled")[name], tensor, rtol=1e-4, atol=1e-6)
