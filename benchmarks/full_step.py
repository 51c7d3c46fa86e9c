"""Seconds per step and peak memory of full fine-tuning: fp32, bf16 with stochastic rounding, 8-bit Adam, fused backward.

  python benchmarks/full_step.py                                       # the geometry of models/tiny-sd3, on this machine
  python benchmarks/full_step.py --pretrained_model_name_or_path medium --resolution 512 --train_batch_size 4       # SD3.5-medium

Random weights in the geometry of the model and random latents of the given size, under bf16 autocast, with the training script's own
loss and optimizers; nothing is downloaded. Every way runs in a process of its own. Peak memory is what CUDA allocated for tensors, or on a
CPU the resident size beyond that of the imported libraries. "state" is arithmetic: weights, gradients and moments.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks import loops, trainers
from src import cli, full, memory, runtime
from src.pipelines import geometry, sd3

WAYS = {  # name: weights, optimizer, fused backward
    "fp32": ("fp32", "adamw", False),
    "fp32, fused backward": ("fp32", "adamw", True),
    "bf16 + stochastic rounding": ("bf16", "adamw", False),
    "bf16, 8-bit Adam": ("bf16", "adamw8bit", False),
    "bf16, 8-bit, fused backward": ("bf16", "adamw8bit", True),
}
TEXT_TOKENS = 333  # 77 of CLIP and 256 of T5


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("benchmark")
    g.add_argument(
        "--pretrained_model_name_or_path", type=cli.path_or_name, default="models/tiny-sd3", help="pipeline folder, or medium: SD3.5-medium"
    )
    g.add_argument("--resolution", type=cli.multiple_of_16, default=64, help="side of the pictures in pixels")
    g.add_argument("--train_batch_size", type=cli.positive_int, default=16, help="pictures per step")
    g.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in the backward pass")
    g.add_argument("--steps", type=cli.positive_int, default=10, help="measured optimizer steps, after three to warm up")
    g.add_argument("--output", type=cli.path, help="also write the result there, as JSON")
    return parser


def config_of(path: str) -> dict:
    return geometry.SD35_MEDIUM if path == "medium" else sd3.read_config(path, "transformer/config.json")


def make(args: argparse.Namespace, way: str) -> loops.Loop:
    """One way of training, set up and ready to step; none clips gradients, which is impossible with a fused backward pass."""
    dtype, optimizer, fused = WAYS[way]
    flags = ["--weights_dtype", dtype, "--optimizer", optimizer, "--max_grad_norm", "0"]
    flags += ["--fused_backward"] * fused + ["--gradient_checkpointing"] * args.gradient_checkpointing
    source = "published" if args.pretrained_model_name_or_path == "medium" else args.pretrained_model_name_or_path
    loop = trainers.make(loops.Setting("full", args.resolution, tuple(flags), TEXT_TOKENS, source))
    loop.draw(args.train_batch_size)
    return loop


def measure(args: argparse.Namespace, way: str) -> dict[str, float]:
    """Median seconds per step, peak bytes, and the last loss; to be run in a fresh process."""
    import bitsandbytes  # noqa: F401  (the libraries' own memory is not the loop's)
    from diffusers import SD3Transformer2DModel  # noqa: F401

    before = runtime.resident_peak()
    loop = make(args, way)
    for _ in range(3):
        loop.step()
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        loss = loop.step().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else runtime.resident_peak() - before
    loop.close()
    return {"seconds_per_step": statistics.median(seconds), "peak_bytes": peak, "loss": loss}


def state_bytes(args: argparse.Namespace, way: str) -> int:
    dtype, optimizer, fused = WAYS[way]
    weight = full.DTYPES[dtype].itemsize
    count = sum(p.numel() for p in sd3.transformer_from_config(config_of(args.pretrained_model_name_or_path)).parameters())
    return count * (weight + (0 if fused else weight) + memory.STATE_BYTES[optimizer])


def main(args: argparse.Namespace) -> dict:
    result = {}
    print(f"{'way':<28} {'s/step':>8} {'img/s':>8} {'peak GB':>9} {'state GB':>9} {'loss':>8}")
    for way in WAYS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result[way] = pool.submit(measure, args, way).result() | {"state_bytes": state_bytes(args, way)}
        r = result[way]
        rate = args.train_batch_size / r["seconds_per_step"]
        sizes = f"{r['peak_bytes'] / 1e9:>9.3f} {r['state_bytes'] / 1e9:>9.3f}"
        print(f"{way:<28} {r['seconds_per_step']:>8.3f} {rate:>8.1f} {sizes} {r['loss']:>8.4f}", flush=True)
    if args.output:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        about = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine, "command": " ".join(sys.argv)}
        args.output.write_text(json.dumps({"ways": result, "about": about}, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(cli.parse(build_parser()))
