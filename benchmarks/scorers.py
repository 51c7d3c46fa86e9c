"""Pictures per second and memory of every scorer, at several batch sizes, from pictures in memory to scores.

  python benchmarks/scorers.py                                              # those whose weights are here, and those that need none
  python benchmarks/scorers.py --random_weights --scorers pickscore hps     # the real geometry with random weights, nothing downloaded
  python benchmarks/scorers.py --gradient --resolution 1024                 # forward and backward, of those that have a gradient

Every scorer runs in a process of its own. Peak memory is what CUDA allocated for tensors, or on a CPU the resident size beyond that of the
imported libraries, weights included in both. Preparing the pictures counts: it is part of scoring.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import scorer_weights
import torch

from src import cli, scorers

SIZE = "real"  # of the random weights
PROMPT = 'a red circle on a blue background, with the word "OPEN"'  # which every scorer can judge
METADATA = {"tag": "single_object", "prompt": PROMPT, "include": [{"class": "stop sign", "count": 1}]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("benchmark")
    g.add_argument("--scorers", nargs="+", default=["all"], metavar="NAME", help="which of them; all: whatever is ready")
    g.add_argument("--batch_sizes", type=cli.positive_int, nargs="+", default=[1, 8, 32], metavar="N", help="pictures judged at once")
    g.add_argument("--resolution", type=cli.positive_int, default=512, help="side of the pictures in pixels")
    g.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="weights of the networks")
    g.add_argument("--gradient", action="store_true", help="forward and backward, to the pictures")
    g.add_argument("--random_weights", action="store_true", help="draw the weights of the real geometry instead of loading them")
    g.add_argument("--rounds", type=cli.positive_int, default=5, help="measured batches of each size, whose median counts")
    g.add_argument("--output", type=cli.path, help="also write the result there, as JSON")
    return parser


def pictures(count: int, side: int, device: str) -> torch.Tensor:
    """Smooth noise (count, 3, side, side) in [0, 1]."""
    coarse = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").clamp(0, 1).to(device)


class Memory:
    """The most bytes held since the last `reset`, beyond those at the start."""

    def __init__(self, device: str):
        self.device, self.before = device, 0
        self.reset()
        self.before = self.peak()

    def reset(self) -> None:
        gc.collect()  # else garbage of earlier work would be counted until Python collects it
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls back to the present size

    def peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1]) - self.before


def measure(args: argparse.Namespace, name: str) -> list[dict[str, float]]:
    """For each batch size: median pictures per second and peak bytes; to be run in a fresh process."""
    import open_clip  # noqa: F401  (the libraries' own memory is not the scorer's)
    import transformers  # noqa: F401

    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = Memory(device)
    if args.random_weights and name in scorer_weights.WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            here = os.getcwd()
            os.chdir(folder)
            scorer_weights.write(name, SIZE)
            mixture = scorers.build(name, device, DTYPES[args.dtype], max(args.batch_sizes))
            os.chdir(here)
    else:
        mixture = scorers.build(name, device, DTYPES[args.dtype], max(args.batch_sizes))
    mixture(pictures(1, args.resolution, device), [PROMPT], [METADATA])  # warms up
    return [measure_batch(mixture, args, count, device, memory) for count in args.batch_sizes]


def measure_batch(mixture, args: argparse.Namespace, count: int, device: str, memory: Memory) -> dict[str, float]:
    """Median rate of `rounds` batches of `count` pictures, and the most memory that one of them took."""
    images = pictures(count, args.resolution, device).requires_grad_(args.gradient)
    memory.reset()
    seconds = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        total = mixture(images, [PROMPT] * count, [METADATA] * count).total
        if args.gradient:
            total.sum().backward()
            images.grad = None
        total.sum().item()  # waits for the device
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"batch": count, "pictures_per_second": count / statistics.median(seconds), "peak_bytes": memory.peak()}


def why_not(name: str, args: argparse.Namespace) -> str | None:
    """Why a scorer is left out, or None."""
    scorer = scorers.get(name)
    if args.gradient and not scorer.differentiable:
        return "has no gradient"
    if args.random_weights and name in scorer_weights.WRITERS:
        return None
    return scorer.trouble({})


def main(args: argparse.Namespace) -> dict:
    chosen = scorers.names() if args.scorers == ["all"] else args.scorers
    result, left_out = {}, {}
    print(f"{'scorer':<24} {'batch':>6} {'img/s':>9} {'peak GB':>9}")
    for name in chosen:
        if reason := why_not(name, args):
            left_out[name] = reason
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result[name] = pool.submit(measure, args, name).result()
        for row in result[name]:
            print(f"{name:<24} {row['batch']:>6} {row['pictures_per_second']:>9.2f} {row['peak_bytes'] / 1e9:>9.3f}", flush=True)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if args.output:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        about = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine, "command": " ".join(sys.argv)}
        args.output.write_text(json.dumps({"scorers": result, "left_out": left_out, "about": about}, indent=1) + "\n")
    return result


def check(args: argparse.Namespace) -> None:
    """Refuse unknown scorers.

    Raises:
        ValueError: naming the known ones.
    """
    for name in args.scorers if args.scorers != ["all"] else []:
        try:
            scorers.get(name)
        except ValueError as error:
            raise ValueError(f"--scorers: {error}") from None


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
