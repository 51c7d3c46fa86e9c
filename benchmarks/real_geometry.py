"""Speed and memory of each trainer at the real size: SD3.5-medium and SD1.5 with random weights, on this machine's GPU.

  python benchmarks/real_geometry.py                                   # the default selection: 8 minutes on one H100
  python benchmarks/real_geometry.py --trainers lora --resolution 1024 --seconds 30
  python benchmarks/real_geometry.py --tiny                            # every row at a size that a CPU runs in seconds: does it work?

Nothing is downloaded: weights, latents and text embeddings are random tensors of the real shapes. Each row is a training script with its
own flags, loss, optimizer and noise, on batches that lie on the GPU, as they do when the caches are filled. A row first tries batches of
growing size uncompiled, takes the fastest, compiles if its flags say so, and measures. Rows are written as they end, and skipped if
already written (--again measures them anew); a row that fails says why and the next one starts. When --minutes are over, the same command
continues with the remaining rows.

Before a trainer's first row its numbers are checked: bf16 against fp32, compiled against uncompiled, finite gradients, a ratio of 1 where
there is one, no growth of memory over many steps. Read benchmarks/README.md for what the columns mean.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from benchmarks import loops, trainers
from src import cli

RESULTS = Path(__file__).parent / "results"
LOSS_BOUND = 0.01  # relative difference of a loss in bf16 (8 bits: 0.4 % per number) from fp32, and compiled from uncompiled
COSINE_BOUND = 0.99  # least cosine between their gradients
GROWTH_BOUND = 2**20  # bytes that the allocated memory may grow by after the first tenth of a loop's `growth_steps`
WINDOWS = 5  # of equal numbers of steps; the median counts
OVER = "nothing"  # first word of the failure message of a row that took too long
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")

BF16_FULL = ("--weights_dtype", "bf16", "--optimizer", "adamw8bit")
CHECKPOINTED = ("--gradient_checkpointing",)
COMPILED = ("--compile",)
NEEDS = {"adamw8bit": "bitsandbytes", "nf4": "bitsandbytes", "prodigy": "prodigyopt"}  # value of a flag -> package


@dataclass(frozen=True)
class Row:
    """What one row measures: a trainer with its flags at one resolution, with the fastest of these batches.

    `extra` rows are measured with --extra alone.
    """

    trainer: str
    resolution: int
    flags: tuple[str, ...]
    batches: tuple[int, ...]
    extra: bool = False

    @property
    def name(self) -> str:
        return " ".join((self.trainer, str(self.resolution), *(flag.removeprefix("--") for flag in self.flags)))


# Most important figures first, in case the time runs out.
ROWS = (
    Row("lora", 1024, COMPILED, (1, 2, 4)),
    Row("lora", 512, COMPILED, (1, 8, 16)),
    Row("grpo", 512, (), (1, 8, 16)),
    Row("dpo", 512, ("--use_lora",), (1, 8, 16)),
    Row("dpo", 512, (), (1, 8, 16)),
    Row("refl", 512, CHECKPOINTED, (1, 4)),
    Row("ddpo", 512, (), (1, 8, 16)),
    Row("full", 512, (*BF16_FULL, *COMPILED), (1, 8, 16)),
    Row("full", 1024, (*BF16_FULL, *COMPILED), (1, 2, 4)),
    Row("lora", 1024, (*CHECKPOINTED, *COMPILED), (1, 4, 8)),
    Row("dreambooth", 512, (*loops.PRIOR, *COMPILED), (1, 8, 16)),
    Row("lora", 512, (*CHECKPOINTED, *COMPILED), (1, 16, 32), extra=True),
    Row("lora", 1024, ("--attention_backend", "_native_cudnn", *COMPILED), (1, 2, 4), extra=True),
    Row("grpo", 512, COMPILED, (1, 8, 16), extra=True),
    Row("grpo", 512, (*CHECKPOINTED, "--quantize_base", "int8"), (1, 4, 8), extra=True),
    Row("dpo", 512, ("--use_lora", *COMPILED), (1, 8, 16), extra=True),
    Row("dpo", 512, COMPILED, (1, 8, 16), extra=True),
    Row("refl", 512, ("--method", "draft", *CHECKPOINTED), (1, 4), extra=True),
    Row("full", 1024, (*BF16_FULL, *CHECKPOINTED), (1, 8), extra=True),
    Row("full", 1024, (*BF16_FULL, *CHECKPOINTED, "--fused_backward", "--max_grad_norm", "0"), (1, 8), extra=True),
    Row("lora", 1024, (*CHECKPOINTED, "--checkpoint_every", "2", *COMPILED), (1, 2, 4), extra=True),
    Row("lora", 1024, (*CHECKPOINTED, "--quantize_base", "nf4"), (1, 4), extra=True),
    Row("lora", 1024, (*CHECKPOINTED, "--quantize_base", "int8", *COMPILED), (1, 4), extra=True),
    Row("lora", 512, ("--compile_mode", "reduce-overhead", *COMPILED), (1, 4), extra=True),
)


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("benchmark")
    g.add_argument("--trainers", default=",".join(trainers.TRAINERS), help="comma-separated names")
    g.add_argument("--resolution", default="512,1024", help="comma-separated sides of the pictures in pixels")
    g.add_argument("--seconds", type=cli.positive_float, default=45, help="time for one row, batch search and compiling included")
    g.add_argument("--minutes", type=cli.positive_float, default=8, help="time for all; no row is begun that would end later")
    g.add_argument("--extra", action="store_true", help="also rows of small cards, of CUDA graphs, of kernels and of compiled alignment")
    g.add_argument("--tokens", type=cli.positive_int, default=154, help="text tokens: 77 of CLIP and those of T5")
    g.add_argument("--tiny", action="store_true", help="models of a few thousand weights and 64 px, for a CPU")
    g.add_argument("--again", action="store_true", help="measure rows that the output holds already")
    g.add_argument("--output", type=cli.path, help="result file (unset: benchmarks/results/real_geometry_GPU.json)")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a trainer or resolution without a row, or if there is no GPU."""
    unknown = set(args.trainers.split(",")) - trainers.TRAINERS.keys()
    if unknown:
        raise ValueError(f"--trainers: there is no {', '.join(sorted(unknown))}; choose from {', '.join(trainers.TRAINERS)}")
    if not selected(args):
        sides = sorted({str(row.resolution) for row in ROWS})
        raise ValueError(f"--resolution {args.resolution}: no row of these trainers has it; choose from {', '.join(sides)}")
    if not (args.tiny or torch.cuda.is_available()):
        raise ValueError("a GPU is needed for the real size; --tiny runs every row on a CPU")


def selected(args: argparse.Namespace) -> list[Row]:
    names, sides = args.trainers.split(","), args.resolution.split(",")
    return [row for row in ROWS if row.trainer in names and str(row.resolution) in sides and (args.extra or not row.extra)]


def missing_packages(row: Row) -> list[str]:
    return sorted({NEEDS[flag] for flag in row.flags if flag in NEEDS and not cli.installed(NEEDS[flag])})


def source(args: argparse.Namespace) -> str:
    return "tiny" if args.tiny else "published"


# --------------------------------------------------------------------------- time, work, memory


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], times: int) -> float:
    """Mean seconds of `times` calls in a row; on a GPU between two events, so that the calls need not wait."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - start) / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / times


def steady(work: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """Median over WINDOWS windows of the seconds of one call, and how many calls a window has; takes about `seconds` in all."""
    once = seconds_of(work, 2)
    times = max(2, round(seconds / WINDOWS / once))
    return statistics.median(seconds_of(work, times) for _ in range(WINDOWS)), times


def matmul_rate(tiny: bool) -> float:
    """FLOP/s of a large product of random matrices, in the precision that training computes in."""
    n, dtype = (256, torch.float32) if tiny or not torch.cuda.is_available() else (8192, torch.bfloat16)
    a, b = torch.randn(2, n, n, device=device(), dtype=dtype)
    seconds_of(lambda: a @ b, 3)
    return 2 * n**3 / steady(lambda: a @ b, 1.0 if n > 256 else 0.05)[0]


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int | None]:
    """Peak bytes since `reset_peak`: allocated for tensors, and reserved on the card by torch. None without a GPU."""
    if not torch.cuda.is_available():
        return {"peak_allocated": None, "peak_reserved": None}
    return {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}


def flops_of(work: Callable[[], Any]) -> int:
    """Floating-point operations of an uncompiled step: every product, recomputed ones included."""
    from torch.utils.flop_counter import FlopCounterMode

    def in_place(out: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    # addmm_ of LoRA layers, which torch's counter does not know
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        work()
    return counter.get_total_flops()


# --------------------------------------------------------------------------- is it right?


def allocated() -> int | None:
    """Bytes of all tensors on the GPU."""
    synchronize()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None


def compiler() -> dict[str, str]:
    """Options of torch.compile: on a CPU the graphs are traced and run as they are, which takes no C++ compiler and less time."""
    return {} if torch.cuda.is_available() else {"backend": "aot_eager"}


def gradients(loop: loops.Loop) -> tuple[Tensor, list[Tensor]]:
    """The losses (b,) of a batch, and the gradients of their mean."""
    losses = loop.losses()
    loop.run.accelerator.backward(losses.mean())
    found = [weight.grad for weight in loop.weights]
    for weight in loop.weights:
        weight.grad = None
    missing = sum(grad is None for grad in found)
    if missing:
        raise RuntimeError(f"{missing} of {len(found)} trained weights got no gradient")
    return losses.detach().float(), found


def difference(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    """The difference of two computations of the same batch: largest relative difference of a loss, cosine between the gradients."""
    dot, squares, other_squares = torch.zeros(3, device=one[0].device, dtype=torch.float64)
    for a, b in zip(one[1], other[1], strict=True):
        a, b = a.float(), b.float()
        dot, squares, other_squares = dot + (a * b).sum(), squares + a.square().sum(), other_squares + b.square().sum()
    relative = (one[0] - other[0]).abs() / other[0].abs()
    return {"loss": relative.max().item(), "cosine": (dot / (squares * other_squares).sqrt()).item()}


def correctness(trainer: str, args: argparse.Namespace) -> dict[str, Any]:
    """Checks bf16 against fp32 and compiled against uncompiled on two samples at the smallest resolution, then memory over many steps."""
    entry, side = trainers.TRAINERS[trainer], 64 if args.tiny else min(row.resolution for row in ROWS if row.trainer == trainer)
    flags = entry.checked
    setting = loops.Setting(trainer, side, flags, args.tokens, source(args))
    loop = trainers.make(setting)
    with torch.no_grad():
        for weight in loop.weights if loop.starts_random else ():
            if not weight.any():  # a LoRA's B: while it is zero, its A has no gradient
                weight.normal_(std=0.02)
    loop.draw(2)
    narrow = gradients(loop)
    wide = trainers.make(replace(setting, flags=(*flags, *entry.as_fp32)))
    wide.adopt(loop)
    found: dict[str, Any] = {
        "losses": narrow[0].tolist(),
        "finite": all(bool(tensor.isfinite().all()) for tensor in (narrow[0], *narrow[1])),
        "bf16_against_fp32": difference(narrow, gradients(wide)),
    }
    for ended in (wide, loop):
        ended.close()
    del wide
    same = trainers.make(setting)  # one run at a time: accelerate takes the precision of autocast from the run started last
    same.adopt(loop)
    loop = same
    loop.compile(**compiler())
    found["compiled_against_eager"] = difference(gradients(loop), narrow)
    del narrow
    found["bounds"] = loop.bounds()
    found["waits"], found["growth_steps"] = waits(loop), 4 if args.tiny else loop.growth_steps
    found["growth"] = growth(loop, found["growth_steps"])
    loop.close()
    pairs = (found["bf16_against_fp32"], found["compiled_against_eager"])
    right = all(pair["loss"] < LOSS_BOUND and pair["cosine"] > COSINE_BOUND for pair in pairs)
    right = right and all(value <= bound for value, bound in found["bounds"].values())
    right = right and found["finite"] and (loop.may_wait or not found["waits"]) and (found["growth"] or 0) < GROWTH_BOUND
    return found | {"passed": right}


WAITED = "called a synchronizing CUDA operation"  # torch's message; setting the mode gives another warning, once in a process


def waits(loop: loops.Loop) -> list[str]:
    """Places where a step makes the host wait for the GPU; there should be none, except between the passes of a rollout."""
    loop.step()
    if not torch.cuda.is_available():
        return []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        loop.step()
        torch.cuda.set_sync_debug_mode("default")
    return sorted({f"{warning.filename}:{warning.lineno}" for warning in seen if WAITED in str(warning.message)})


def growth(loop: loops.Loop, steps: int) -> int | None:
    """Bytes by which the allocated memory grows over `steps` steps, after a tenth of them; unknown without a GPU."""
    for _ in range(steps // 10):
        loop.step()
    before = allocated()
    for _ in range(steps - steps // 10):
        loop.step()
    after = allocated()
    return None if before is None else after - before


# --------------------------------------------------------------------------- how fast is it?


def attempt(loop: loops.Loop, batch: int, deadline: float) -> dict[str, Any] | None:
    """Samples per second and peak memory of a few steps with this batch; None if it does not fit, or the time is over."""
    if time.time() > deadline:
        return None
    reset_peak()
    try:
        loop.draw(batch)
        seconds_of(loop.step, 2)
        return {"per_second": batch / seconds_of(loop.step, 3), **peak()}
    except torch.OutOfMemoryError:
        return None


def in_forward_passes(loop: loops.Loop, seconds: float, flops: int, batch: int) -> dict[str, float]:
    """The cost of a sample in forward passes of the same batch, by FLOPs and by time; {} for loops without `forward`.

    Args:
        seconds: of a step of `batch` samples; flops: of one sample, uncompiled.
    """
    if type(loop).forward is loops.Loop.forward:
        return {}
    work = flops_of(loop.forward)
    loop.forward()
    once = steady(loop.forward, 1.0 if torch.cuda.is_available() else 0.05)[0]
    return {"passes_by_work": flops * batch / work, "passes_by_time": seconds / once}


def measure(row: Row, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """One row, in a fresh process, until `deadline` (time.time()) or a little longer."""
    rate = matmul_rate(args.tiny)
    loop = trainers.make(loops.Setting(row.trainer, 64 if args.tiny else row.resolution, row.flags, args.tokens, source(args)))
    loop.step()  # allocates the optimizer's state
    flops = flops_of(loop.step)  # of one sample
    began = time.time()
    batches = (1, 2) if args.tiny else row.batches
    tried = {batch: attempt(loop, batch, (began + deadline) / 2 if batch > 1 else deadline) for batch in batches}
    fits = {batch: found for batch, found in tried.items() if found}
    if not fits:
        raise RuntimeError(f"not even a batch of {batches[0]} fits")
    batch = max(fits, key=lambda size: fits[size]["per_second"])
    loop.draw(batch)
    compiling = time.time()
    if loop.args.compile:
        loop.compile(**compiler())
        seconds_of(loop.step, 3)
    compiled = time.time()
    reset_peak()
    seconds, times = steady(loop.step, 0.05 if args.tiny else max(5.0, deadline - compiled))
    highest, planned = peak(), trainers.planned(loop.setting, batch)
    passes = in_forward_passes(loop, seconds, flops, batch)
    if not bool(loop.step().isfinite()):
        raise RuntimeError("the loss is not finite")
    loop.close()
    return {
        "unit": loop.unit, "batch": batch, "per_second": batch / seconds, "seconds_per_step": seconds, "steps": times * WINDOWS,
        "tflop_per_sample": flops / 1e12, "tflops": flops * batch / seconds / 1e12, "matmul_tflops": rate / 1e12,
        "share_of_matmul": flops * batch / seconds / rate, **highest, "planned_peak": planned.peak,
        "uncompiled": {str(size): found for size, found in tried.items()}, "compile_seconds": compiled - compiling, **passes,
    }  # fmt: skip


# --------------------------------------------------------------------------- all of it


def about() -> dict[str, Any]:
    """Where and with what this was measured."""
    found = {"date": date.today().isoformat(), "command": shlex.join(["python", *sys.argv]), "python": platform.python_version()}
    installed = {name: version(name) for name in PACKAGES if cli.installed(name)}
    if not torch.cuda.is_available():
        return found | {"machine": f"CPU {platform.machine()}, {torch.get_num_threads()} thread(s)", **installed}
    driver = None
    if shutil.which("nvidia-smi"):  # which some containers lack
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().partition("\n")[0] or None
    memory = torch.cuda.get_device_properties(0).total_memory
    return found | {"machine": torch.cuda.get_device_name(0), "memory": memory, "driver": driver,
                    "cuda": torch.version.cuda, **installed}  # fmt: skip


def in_process(work: Callable[..., dict], *given: Any, seconds: float) -> dict[str, Any]:
    """The result of `work(*given)` in a process of its own, or why it failed: a row's memory, kernels or crash affect no other."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(work, *given)
        try:
            error = future.exception(timeout=seconds)
        except TimeoutError:
            error = f"{OVER} after {seconds:.0f} s"
            for child in multiprocessing.active_children():
                child.kill()
    if error is None:
        return future.result()
    return {"failed": (error if isinstance(error, str) else f"{type(error).__name__}: {error}").strip().splitlines()[0][:300]}


def verdict(trainer: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"check of {trainer}: {found['failed']}"
    pairs = (f"{name.replace('_', ' ')}: losses differ by {100 * found[name]['loss']:.2g} %, gradients' cosine {found[name]['cosine']:.5f}"
             for name in ("bf16_against_fp32", "compiled_against_eager"))  # fmt: skip
    grown = "memory not measured" if found["growth"] is None else f"{found['growth']:,} bytes more after {found['growth_steps']} steps"
    bounds = (f"{name.replace('_', ' ')} {value:.2g} of {bound:g} allowed" for name, (value, bound) in found["bounds"].items())
    finite = "finite" if found["finite"] else "NOT FINITE"
    waiting = f"waits at {', '.join(found['waits'])}" if found["waits"] else "no waits"
    return "; ".join((f"check of {trainer}: {'right' if found['passed'] else 'WRONG'}", *pairs, *bounds, finite, waiting, grown))


def line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name:<58} {row['failed']}"
    if "not_measured" in row:
        return f"{name:<58} not measured: {row['not_measured']}"
    sizes = (row[kind] for kind in ("peak_allocated", "peak_reserved", "planned_peak"))
    memory = "".join(f"{size / 2**30:>8.2f}" if size else f"{'-':>8}" for size in sizes)
    speeds = f"{row['batch']:>5} {row['per_second']:>8.2f} {row['unit']}/s {row['tflops']:>8.1f} {100 * row['share_of_matmul']:>7.1f} %"
    passes = f"   {row['passes_by_work']:.1f} forward passes in the time of {row['passes_by_time']:.1f}" if "passes_by_work" in row else ""
    return f"{name:<58} {speeds}{memory}{passes}"


def main(args: argparse.Namespace) -> dict[str, Any]:
    here = about()
    slug = re.sub(r"[^a-z0-9]+", "_", here["machine"].lower()).strip("_")
    file = args.output or (None if args.tiny else RESULTS / f"real_geometry_{slug}.json")
    result = json.loads(file.read_text()) if file and file.exists() else {"checks": {}, "rows": {}}

    def keep(kind: str, name: str, found: dict[str, Any]) -> None:
        result[kind][name] = found | {"about": here}
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")

    def is_open(kind: str, name: str) -> bool:
        return name not in result[kind] or args.again or "not_measured" in result[kind][name]

    def run(kind: str, name: str, work: Callable[..., dict], *given: Any) -> bool:
        """False when the time is over."""
        limit = min(4 * args.seconds, end + args.seconds - time.time())
        found = in_process(work, *given, seconds=limit) if limit > 2 * args.seconds else {"failed": OVER}
        over = limit < 4 * args.seconds and found.get("failed", "").startswith(OVER)
        if not over:
            keep(kind, name, found)
        return not over

    end, left = time.time() + 60 * args.minutes, []
    print(f"{'row':<58} {'batch':>5} {'speed':>14} {'TFLOP/s':>8} {'of matmul':>9}   peak GiB: tensors, reserved, planned")
    shown = set()
    for row in selected(args):
        if row.trainer not in shown:
            if not is_open("checks", row.trainer) or run("checks", row.trainer, correctness, row.trainer, args):
                print(verdict(row.trainer, result["checks"][row.trainer]), flush=True)
            shown.add(row.trainer)
        if absent := missing_packages(row):
            keep("rows", row.name, {"not_measured": f"needs the package {', '.join(absent)}"})
        elif is_open("rows", row.name) and not run("rows", row.name, measure, row, args, time.time() + args.seconds):
            left.append(row.name)
            continue
        print(line(row.name, result["rows"][row.name]), flush=True)
    if left:
        print(f"not measured, as {args.minutes:g} minutes are over: {'; '.join(left)}. The same command again goes on with them.")
    return result


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
