"""Small runs of the trainers, in this process and in others, and what they leave behind: shared by the tests of all scripts."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from src import metrics

ROOT = Path(__file__).parent.parent
WEIGHTS = "pytorch_lora_weights.safetensors"


class Interrupted(Exception):
    """Stands for a kill inside this process."""


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def make_pictures(folder: Path, count: int = 8, size: tuple[int, int] = (40, 32)) -> Path:
    """A data set of `count` different smooth pictures of (width, height) px, lopsided so that a mirrored one is another one."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        corners = np.random.default_rng(number).integers(0, 256, (2, 3, 3), dtype=np.uint8)
        Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"{'abcdefghijklmnop'[number % 16] * 3} picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command_line(**flags: Any) -> list[str]:
    """rank=4, use_ema=True, cache_text=False, validation_prompt=["a", "b"], window_range=(0, 3) -> the same as arguments.

    A list repeats the flag, a tuple gives it several values, None leaves it out.
    """
    tokens: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            tokens.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            tokens += [f"--{name}", *map(str, value)]
        else:
            for item in value if isinstance(value, list) else [] if value is None else [value]:
                tokens += [f"--{name}", str(item)]
    return tokens


@dataclass(frozen=True)
class World:
    """The smallest model, a few pictures, and a cache that all runs share."""

    model: Path
    data: Path
    cache: Path

    def argv(self, out: Path, **changes: Any) -> list[str]:
        """Arguments of a quiet run of 4 steps at 32 x 32 px into `out`: one metrics line a step, no validation, no held-out pictures."""
        flags = dict(
            pretrained_model_name_or_path=self.model, dataset_name=self.data, cache_dir=self.cache, output_dir=out, resolution=32,
            mixed_precision="no", max_train_steps=4, train_batch_size=4, dataloader_num_workers=0, logging_steps=1, seed=0,
            report_to="none", num_validation_loss_images=0, num_validation_images=1, validation_inference_steps=2,
        )  # fmt: skip
        return command_line(**(flags | changes))


def make_world(model: Path, root: Path) -> World:
    return World(model, make_pictures(root / "pictures"), root / "cache")


@dataclass(frozen=True)
class Rollouts:
    """The smallest model, six prompts, and a cache that all runs share: for scripts that learn from their own pictures."""

    model: Path
    prompts: Path
    cache: Path

    def argv(self, out: Path, **changes: Any) -> list[str]:
        """Arguments of a quiet run of 2 epochs of 2 batches of 4 pictures, 32 x 32 px in 4 steps of which 2 are trained, into `out`."""
        flags = dict(
            pretrained_model_name_or_path=self.model, prompts=self.prompts, cache_dir=self.cache, output_dir=out, resolution=32,
            mixed_precision="no", scorer="jpeg_incompressibility", num_epochs=2, sample_batch_size=4, sample_num_batches_per_epoch=2,
            num_inference_steps=4, window_size=2, seed=0, report_to="none", num_eval_prompts=2, num_eval_images=2,
            eval_num_inference_steps=2, checkpointing_epochs=100, window_range=(0, 3),
        )  # fmt: skip
        return command_line(**(flags | changes))


def make_rollouts(model: Path, root: Path) -> Rollouts:
    (root / "prompts.txt").write_text("a red ring\na green hill\na blue door\ntwo cats\na fox\nan owl\n")
    return Rollouts(model, root / "prompts.txt", root / "cache")


def save_lora(model_folder: Path, folder: Path, *, alpha: float = 8.0, size: float = 0.5, **changes: Any) -> Path:
    """A LoRA of rank 4 whose B is not zero, so that it changes pictures."""
    from src import lora
    from src.pipelines import sd3

    transformer = sd3.load(model_folder, parts=("transformer",)).transformer
    torch.manual_seed(1)
    lora.add(transformer, rank=4, alpha=alpha, **changes)
    for parameter in lora.parameters(transformer):
        parameter.data.normal_(0, size)
    lora.save(transformer, folder)
    return folder


def train(script: ModuleType, argv: list[str]) -> None:
    script.main(script.parse_args(argv))


def assert_settings_arrive(
    script: ModuleType, world: Rollouts, out: Path, monkeypatch: pytest.MonkeyPatch, *, samples: int, orders: int, **flags: Any
) -> None:  # fmt: skip
    """Train on rewards for 4 epochs of 2 updates of `samples` pictures, no setting at its default, and see each of them at its work.

    The rate falls in a line to 0 from `samples` times the flag. The average is recomputed from the weights after each update, with decay
    0.05, which is below that of its warm-up, 1/10 and more; it is evaluated after 3 and 4 of 4 epochs, and what checkpoints and the result
    hold, beside the weights in raw/. The batches are dealt anew `orders` times.
    """
    from src import checkpoint, lora, rewards
    from src.data import prompts
    from src.pipelines import sd3, sd3_rollout

    drawn, decoded, threads, clipped, dealt, saves, logged, evaluated, norms, trained = ([] for _ in range(10))

    def spy(owner: Any, name: str, note: Any) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: (note(*given, **named), real(*given, **named))[1])

    def weights_of(optimizer: Any) -> list[Tensor]:
        return [weight.detach().clone() for weight in optimizer.param_groups[0]["params"]]

    def step(optimizer: Any, *given: Any) -> Any:
        gradients = [weight.grad for weight in optimizer.param_groups[0]["params"]]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        trained.extend([] if trained else [weights_of(optimizer)])
        result = update(optimizer, *given)
        trained.append(weights_of(optimizer))
        return result

    update = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    spy(sd3_rollout, "sample", lambda *given, **named: drawn.append(named))
    spy(sd3, "decode_latents", lambda model, latents, size: decoded.append(size))
    spy(rewards.Rewards, "_score", lambda *_: threads.append(threading.current_thread().name))
    spy(script, "policy_loss", lambda ratio, advantage, *clip: clipped.append((clip[0], advantage.abs().max().item())))
    spy(prompts.GroupSampler, "updates", lambda sampler, order, count: dealt.append(order))
    spy(checkpoint.Checkpointer, "save", lambda saver, done: saves.append(done))
    spy(metrics.Log, "write", lambda log, done, **floats: logged.append((log.images_per_add, log.total)))
    spy(rewards.Evaluator, "_draw_and_score", lambda self: evaluated.append([w.clone() for w in lora.parameters(self.model.transformer)]))
    settings = dict(
        num_epochs=4, checkpointing_epochs=2, checkpoints_total_limit=1, eval_epochs=3, seed=5, transition="flow", noise_level=0.6,
        guidance_scale=2.0, clip_nats=0.5, window_size=1, window_order="progressive", window_shift_epochs=1, decode_batch_size=3, rank=2,
        learning_rate=1e-3, scale_lr=True, lr_scheduler="linear", max_grad_norm=1e-3, use_ema=True, ema_decay=0.05,
        async_rewards=True, max_advantage=0.75,
    )  # fmt: skip
    train(script, world.argv(out, **settings, **flags))

    assert [(named["epoch"], named["window"].start) for named in drawn] == [(epoch, epoch % 3) for epoch in range(4) for _ in range(2)]
    flow = {"seed": 5, "transition": "flow", "noise_level": 0.6, "guidance_scale": 2.0, "height": 32, "width": 32}
    assert all(named[name] == value for named in drawn for name, value in flow.items())
    assert not any(named.get("keep_means") for named in drawn)  # as much memory as the latents, for --loss guard alone
    assert threads == ["rewards_0"] * 8 and logged == [(8, 8)] * 4
    assert set(decoded) == {3} and dealt == list(range(orders))
    assert {clip for clip, _ in clipped} == {0.5} and max(size for _, size in clipped) == 0.75
    assert saves == [4, 8] and [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-8"]
    assert values(out, "lr") == pytest.approx([samples * 1e-3 * left / 8 for left in (6, 4, 2, 0)])
    assert norms == pytest.approx([1e-3] * 8, rel=1e-3) and min(values(out, "grad_norm")) > 2e-3

    averages = [trained[0]]
    for now in trained[1:]:
        averages.append([0.05 * before + 0.95 * weight for before, weight in zip(averages[-1], now, strict=True)])
    assert [line["step"] for line in lines(out) if "eval_reward" in line] == [0, 6, 8]
    for at, found in zip((0, 6, 8), evaluated, strict=True):
        torch.testing.assert_close(found, averages[at], rtol=1e-5, atol=1e-7)
    for folder in (out, out / "checkpoint-8"):
        for place, expected in ((folder, averages[8]), (folder / "raw", trained[8])):
            torch.testing.assert_close(sorted_norms(weights(place).values()), sorted_norms(expected), rtol=1e-5, atol=0)
    assert sorted_norms(averages[8]) != pytest.approx(sorted_norms(trained[8]), rel=1e-4)


def sorted_norms(tensors: Iterable[Tensor]) -> list[float]:
    """Tells two sets of tensors apart whatever their order."""
    return sorted(tensor.norm().item() for tensor in tensors)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run dies in optimizer step `step`: its weights are updated, its metrics and checkpoint are not written."""
    write = metrics.Log.write

    def dying(log: metrics.Log, done: int, **floats: float) -> Any:
        if done == step:
            raise Interrupted
        return write(log, done, **floats)

    monkeypatch.setattr(metrics.Log, "write", dying)


def stop(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next run gets a SIGTERM in optimizer step `step`."""
    write = metrics.Log.write

    def stopping(log: metrics.Log, done: int, **floats: float) -> Any:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(log, done, **floats)

    monkeypatch.setattr(metrics.Log, "write", stopping)


def assert_stopped(out: Path, step: int, said: str) -> None:
    """The run returned, so its process would exit with 0; it left a checkpoint and no result, and said how to go on."""
    from src import checkpoint

    assert checkpoint.find_latest(out).name == f"checkpoint-{step}" and not (out / "README.md").exists()
    assert "--resume_from_checkpoint latest" in said


def parts_before_refusal(monkeypatch: pytest.MonkeyPatch, family: ModuleType, train: Any) -> tuple[str, list[str]]:
    """The last words of a run that cannot fetch the rest of its result, and which parts of the model it had loaded by then."""
    from src import full

    loaded: list[str] = []
    load = family.load

    def refuse(source: str, **options: Any) -> Path:
        raise ValueError(f"--pretrained_model_name_or_path {source}: {', '.join(options['trained'])} alone is here")

    def spy(path: Any, *, parts: Any = ("everything",), **options: Any) -> Any:
        loaded.extend(parts)
        return load(path, parts=parts, **options)

    monkeypatch.setattr(full, "fetch", refuse)
    monkeypatch.setattr(family, "load", spy)
    with pytest.raises(SystemExit) as stop:
        train()
    return str(stop.value.code), loaded


# --------------------------------------------------------------------------- what a run leaves


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def saved(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file. Not its bytes: safetensors writes the metadata's two keys in any order."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times and memory."""
    return [{k: v for k, v in line.items() if k not in metrics.VARYING} for line in metrics.read(folder / "metrics.jsonl")]


def values(folder: Path, name: str) -> list[float]:
    return [line[name] for line in lines(folder) if name in line]


def state(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Paths at which two nested states differ in any bit, wherever their tensors lie."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{where}/{key}")
            else:
                yield f"{where}/{key} is only in one"
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or not torch.equal(one.cpu(), other.cpu()):
            yield f"{where}: tensors differ"
    elif one != other:
        yield f"{where}: {one!r} and {other!r}"


def assert_identical(one: Any, other: Any) -> None:
    found = list(differences(one, other))
    assert not found, f"{len(found)} differences, first {found[:5]}"


def files(folder: Path) -> list[str]:
    """Everything under a folder, to see that nothing was written."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --------------------------------------------------------------------------- processes


def environment(**changes: str) -> dict[str, str]:
    """One thread per process, this Python first on the path, no network, no launcher's leftovers."""
    env = {k: v for k, v in os.environ.items() if not re.match("ACCELERATE|MASTER_|WORLD_SIZE|RANK|LOCAL_|WANDB|TINY", k)}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VENV": sys.prefix}
    return env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"} | changes


def fork(command: list[str], log: Path, ranks: int = 1, **env: str) -> Forked:
    """Starts `python SCRIPT.py ARGUMENT...` as one process or several, without the ten seconds of imports; output goes to a file."""
    return Forked([str(word) for word in command], log, environment(**env), ROOT, ranks)


def start(command: list[str], log: Path, **env: str) -> subprocess.Popen:
    """Starts a program as a shell would; its output goes to a file: a full pipe would block it."""
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(**env))


def wait_for(process: subprocess.Popen | Forked, condition: Any, log: Path, seconds: float = 400) -> None:
    """Waits until the condition holds while the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"nothing after {seconds} s: {log.read_text()[-3000:]}"
        time.sleep(0.01)


def finish(process: subprocess.Popen | Forked, log: Path, seconds: float = 400) -> str:
    """Output of a process that has to end well."""
    code = process.wait(seconds)
    text = log.read_text()
    assert code == 0, f"ended with {code}: {text[-3000:]}"
    return text
