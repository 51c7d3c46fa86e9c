"""Where the time of a training step goes: the ten longest kernels, and the share of the time in which the GPU has nothing to do.

  python benchmarks/profile_step.py --trainer lora --resolution 512 --batch 8 --flags="--compile --rank 16"
  python benchmarks/profile_step.py --tiny                                       # on a CPU: operations instead of kernels

--flags are those of the training script. Weights and batches are random, as in real_geometry.py. With --trace the whole timeline
is written, for chrome://tracing or https://ui.perfetto.dev.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks import loops, real_geometry, trainers
from src import cli

LONGEST = 10


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("benchmark")
    g.add_argument("--trainer", choices=trainers.TRAINERS, default="lora", help="whose step")
    g.add_argument("--resolution", type=cli.multiple_of_16, default=512, help="side of the pictures in pixels")
    g.add_argument("--batch", type=cli.positive_int, default=8, help="pictures per step")
    g.add_argument("--tokens", type=cli.positive_int, default=154, help="text tokens: 77 of CLIP and those of T5")
    g.add_argument("--steps", type=cli.positive_int, default=5, help="steps to profile, after three to warm up")
    g.add_argument("--flags", default="", help='of the training script, in one word: --flags="--compile --rank 16"')
    g.add_argument("--tiny", action="store_true", help="models of a few thousand weights and 64 px, for a CPU")
    g.add_argument("--trace", type=cli.path, help="also write the timeline there, as JSON")
    return parser


def union(spans: list[tuple[float, float]]) -> float:
    """Total length covered by the spans (start, end)."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def summary(events: list[tuple[str, float, float]], wall: float) -> dict[str, Any]:
    """The longest names and the idle share.

    Args:
        events: name, start and end of every kernel (on a CPU: outermost operation), in microseconds.
        wall: microseconds that the steps took, waiting for the last kernel included.
    """
    totals: dict[str, tuple[float, int]] = {}
    for name, start, end in events:
        total, count = totals.get(name, (0.0, 0))
        totals[name] = total + end - start, count + 1
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:LONGEST]
    busy = union([(start, end) for _, start, end in events])
    return {"longest": [(name, total, count) for name, (total, count) in longest], "idle": 1 - busy / wall, "wall": wall}


def profile(loop: loops.Loop, steps: int, trace: Path | None = None) -> dict[str, Any]:
    """`summary` of some steps."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, record_function

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler, record_function("all steps"):
        for _ in range(steps):
            loop.step()
        real_geometry.synchronize()
    if trace:
        profiler.export_chrome_trace(str(trace))
    found = profiler.events()
    (whole,) = (event for event in found if event.name == "all steps" and event.device_type == DeviceType.CPU)
    span = whole.time_range
    if cuda:
        chosen = [event for event in found if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    else:  # outermost operations: no parent but `whole`; the backward pass runs in a thread of its own
        chosen = [event for event in found if event is not whole and event.cpu_parent in (None, whole)]
    events = [(event.name, max(event.time_range.start, span.start), min(event.time_range.end, span.end)) for event in chosen]
    return summary([event for event in events if event[1] < event[2]], span.end - span.start)


def main(args: argparse.Namespace) -> dict[str, Any]:
    side, flags = 64 if args.tiny else args.resolution, tuple(shlex.split(args.flags))
    setting = loops.Setting(args.trainer, side, flags, args.tokens, real_geometry.source(args))
    loop = trainers.make(setting)
    loop.draw(args.batch)
    if loop.args.compile:
        loop.compile(**real_geometry.compiler())
    for _ in range(3):
        loop.step()
    real_geometry.synchronize()
    found = profile(loop, args.steps, args.trace)
    loop.close()
    kind = "kernel" if torch.cuda.is_available() else "operation"
    print(f"{args.trainer}, {setting.resolution} px, batch {args.batch}: {found['wall'] / args.steps / 1e3:.2f} ms per step, "
          f"{100 * found['idle']:.1f} % of it idle: no {kind} runs")  # fmt: skip
    print(f"{'share':>7} {'ms/step':>9} {'calls':>7}  {kind}")
    for name, total, count in found["longest"]:
        print(f"{100 * total / found['wall']:>5.1f} % {total / args.steps / 1e3:>9.3f} {count / args.steps:>7.0f}  {name[:110]}")
    return found


if __name__ == "__main__":
    main(cli.parse(build_parser()))
