"""The trainers on a simulated GPU: see tests/fake_gpu.

By hand, since it takes minutes: bash scripts/test.sh -m long tests/test_fake_gpu.py
"""

import os
import re
import subprocess
import sys

import fake_gpu
import pytest
import runs

pytestmark = [pytest.mark.long, pytest.mark.skipif(fake_gpu.missing() is not None, reason=f"needs {fake_gpu.missing()}")]
GARBAGE = "a kernel that computes nothing"

RULES = """
import torch

held = torch.zeros(2**20, device="cuda")
assert torch.cuda.memory_allocated() == 2**22
assert torch.empty(2**24, device="cuda").isnan().all()  # what nobody wrote shows

x = torch.ones(3, device="cuda", requires_grad=True)
(x * torch.tensor(2.0)).sum().backward()  # a scalar of the CPU goes anywhere
assert x.device == torch.device("cuda", 0) and x.grad.tolist() == [2, 2, 2]

def refused(function):
    try:
        function()
    except RuntimeError:
        return True

assert refused(lambda: x + torch.ones(3))
assert refused(lambda: torch.randn(3, device="cuda", generator=torch.Generator("cpu")))
torch.cuda.manual_seed(0)
one, other = torch.randn(3, device="cuda"), torch.randn(3, device="cuda")
torch.cuda.manual_seed(0)
assert torch.equal(one, torch.randn(3, device="cuda")) and not torch.equal(one, other)

torch.cuda.set_sync_debug_mode("error")
assert refused(lambda: x.sum().item()) and refused(lambda: torch.ones(3).cuda()) and refused(lambda: x[x > 0])
assert not refused(lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True)) and not refused(lambda: x[:2].exp())
torch.cuda.set_sync_debug_mode("default")
"""


def on_the_fake_gpu(*words: str) -> subprocess.CompletedProcess:
    environment = runs.environment(**fake_gpu.environment())
    environment["PYTHONPATH"] += os.pathsep + str(runs.ROOT)
    return subprocess.run([sys.executable, *words], cwd=runs.ROOT, env=environment, capture_output=True, text=True)


# Loops of the benchmark at a small width, on pictures large enough that activations count.
PEAKS = """
import gc, sys, tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks import loops, trainers
from src.pipelines import geometry

SD3, SD15 = (dict(geometry.MODELS[name]) for name in ("sd3.5-medium", "sd1.5"))
SD3["transformer"] |= {"num_layers": 6, "num_attention_heads": 8, "caption_projection_dim": 512, "joint_attention_dim": 256,
                       "pooled_projection_dim": 128, "dual_attention_layers": (0, 1, 2)}
SD3["vae"] |= {"block_out_channels": (32, 32, 32, 32)}
SD15["unet"] |= {"block_out_channels": (64, 128, 256, 256)}
SD15["vae"] |= {"block_out_channels": (64, 128, 128, 128)}


class Fused(torch.autograd.Function):  # keeps what a GPU's kernel does
    @staticmethod
    def forward(ctx, *tensors):
        result = torch.zeros_like(tensors[0])
        ctx.save_for_backward(*tensors, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])


def fused(query, key, value, **_):
    narrow = torch.is_autocast_enabled("cuda")
    return Fused.apply(*(tensor.bfloat16() if narrow else tensor for tensor in (query, key, value)))


if __name__ == "__main__":
    trainer, batch, *flags = sys.argv[1:]
    folder = Path(tempfile.mkdtemp())
    geometry.write_configs(SD15 if trainer in ("dpo", "refl") else SD3, folder)
    setting = loops.Setting(trainer, 256, ("--mixed_precision", "bf16", *flags), source=str(folder))
    planned = trainers.planned(setting, int(batch)).peak
    F.scaled_dot_product_attention = fused
    loop = trainers.make(setting)
    loop.draw(int(batch))
    loop.step()  # makes the optimizer's state
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    loop.step()
    print("planned", planned, "seen", torch.cuda.max_memory_allocated())
"""
ROLLOUT = "--num_inference_steps 4 --window_range 0 2 --window_size 2"
PLANNED = [
    "lora 2", "lora 2 --gradient_checkpointing", "lora 2 --gradient_checkpointing --checkpoint_every 2", "lora 2 --lora_dropout 0.1",
    "lora 2 --use_dora", "lora 2 --use_dora --gradient_checkpointing",
    "full 2", "full 2 --gradient_checkpointing", "full 2 --weights_dtype bf16",
    "full 2 --weights_dtype bf16 --gradient_checkpointing --fused_backward --max_grad_norm 0",
    "dreambooth 2 --with_prior_preservation --class_prompt dog", f"grpo 4 {ROLLOUT}", f"ddpo 4 {ROLLOUT}",
    "dpo 2", "dpo 2 --gradient_checkpointing", "dpo 2 --use_lora", "dpo 2 --use_lora --gradient_checkpointing --checkpoint_every 2",
    "refl 2 --num_inference_steps 4 --mid_range 1 2", "refl 2 --num_inference_steps 4 --mid_range 1 2 --gradient_checkpointing",
    "refl 2 --num_inference_steps 4 --mid_range 1 2 --use_lora --gradient_checkpointing",
    "refl 2 --num_inference_steps 4 --method draft --draft_k 2 --use_lora",
]  # fmt: skip


@pytest.mark.parametrize("words", PLANNED)
def test_memory_is_what_the_plan_says(words, tmp_path):
    """The peak of a whole step, of tensors, by the counters of torch's own allocator; no workspace of real kernels is among them."""
    (tmp_path / "peaks.py").write_text(PEAKS)
    done = on_the_fake_gpu(str(tmp_path / "peaks.py"), *words.split())
    assert done.returncode == 0, done.stderr[-3000:]
    planned, seen = map(float, re.search(r"planned (\S+) seen (\S+)", done.stdout).groups())
    assert planned == pytest.approx(seen, rel=0.07)


def test_it_is_as_strict_as_a_gpu():
    done = on_the_fake_gpu("-c", RULES)
    assert done.returncode == 0 and GARBAGE not in done.stderr, done.stderr[-3000:]


def test_the_tests_of_the_trainers_pass_there():
    """But those of bitsandbytes, whose kernels are not torch's."""
    files = sorted(str(file) for file in runs.ROOT.glob("tests/test_train_*.py") if not file.stem.endswith("_slow"))
    done = on_the_fake_gpu("-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not long", "-rA",
                           "-k", "not quantised and not 8bit and not 8-bit", *files)  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]
    assert GARBAGE not in done.stdout


@pytest.mark.parametrize("trainer", ["lora", "full", "dreambooth", "ddpo", "grpo", "dpo", "refl"])
def test_the_check_of_the_benchmark_passes_there_and_finds_no_wait(trainer):
    """Its parts for GPUs alone: where the host waits, and how the memory grows."""
    code = f"""
import sys
from benchmarks import real_geometry
from src import cli

if __name__ == "__main__":
    args = cli.parse(real_geometry.build_parser(), ["--tiny", "--tokens", "6"], checks=(real_geometry.check,))
    found = real_geometry.correctness({trainer!r}, args)
    assert found["passed"] and found["growth"] == 0, found
    assert not found["waits"] or {trainer!r} in ("ddpo", "grpo"), found
"""
    done = on_the_fake_gpu("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
