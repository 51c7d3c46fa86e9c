"""The trainers on a simulated GPU: see tests/fake_gpu.

By hand, since it takes minutes: bash scripts/test.sh -m long tests/test_fake_gpu.py
"""

import os
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
