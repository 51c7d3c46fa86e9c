"""Seconds per LoRA step and peak memory: with the caches, against encoding text and pictures at every step as the public scripts do.

  python benchmarks/lora_step.py                                       # models/tiny-sd3 on this machine
  python benchmarks/lora_step.py --pretrained_model_name_or_path models/stable-diffusion-3.5-medium --dataset_name datas/photos \\
      --resolution 512 --train_batch_size 4 --dtype bf16

Both loops run the training script's own loss on the same pictures, model, noise and optimizer. They take turns of a few steps, so that a
busy machine slows both. The cached loop reads its entries from disk as training does. Peak memory is measured in a process of its own
per loop: allocated CUDA memory, or on a CPU (Linux) the resident size beyond that of the imported libraries. The last line is arithmetic,
not a measurement: the ratio of FLOPs at full size, SD3.5-medium at 512 px with 333 text tokens.
"""

import argparse
import json
import logging
import platform
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_text_to_image_lora_sd3 as trainer
from src import cli, flow, lora, runtime, seeds
from src.data import buckets, cache, captions, samples
from src.pipelines import sd3

WARM_UP = 3  # steps before the clock starts, in which both loops must have the same losses
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# TFLOP per picture of SD3.5-medium at 512 px and 333 text tokens (the default): LoRA step; VAE encode, a quarter of its 4.88 at 1024 px;
# T5-XXL on 256 tokens 2.40 and CLIP-G 0.10. Counted with torch's FlopCounter.
FULL_SIZE = {"step": 5.24, "vae": 1.22, "text": 2.50}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("benchmark")
    g.add_argument("--pretrained_model_name_or_path", type=cli.path_or_name, default="models/tiny-sd3", help="pipeline folder")
    g.add_argument("--dataset_name", type=cli.path_or_name, default="datas/shapes-new", help="captioned pictures")
    g.add_argument("--resolution", type=cli.multiple_of_16, default=64, help="side of the pictures in pixels")
    g.add_argument("--train_batch_size", type=cli.positive_int, default=16, help="pictures per step")
    g.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the frozen weights")
    g.add_argument("--rounds", type=cli.positive_int, default=8, help="turns of each loop")
    g.add_argument("--steps_per_round", type=cli.positive_int, default=5, help="optimizer steps in a turn")
    g.add_argument("--output", type=cli.path, help="also write the result there, as JSON")
    return parser


class Loop:
    """One of the two training loops, set up and ready to step. Modules that a loop does not need are not in memory, as in training."""

    def __init__(self, args: argparse.Namespace, cached: bool, folder: Path):
        self.args, self.cached, self.device, self.step = args, cached, "cuda" if torch.cuda.is_available() else "cpu", 0
        path, options = args.pretrained_model_name_or_path, {"dtype": DTYPES[args.dtype], "device": self.device}
        self.length = sd3.default_sequence_length(path)
        images = captions.open_captioned(args.dataset_name, cache_dir=folder, progress=False)
        sizes = [(args.resolution, args.resolution)] * len(images)
        latents = text = None
        if cached:
            latents, text = cache.TensorCache(folder, "latents", {}), cache.TensorCache(folder, "text", {})
            prompts = ["", *(record.prompt for record in images.records)]
            if text.missing(prompts):
                self.model = sd3.load(path, parts=("text",), **options)
                samples.fill_text(text, prompts, self.encode_text, batch_size=16, progress=False)
        self.model = sd3.load(path, parts=("transformer", "vae") if cached else sd3.PARTS, **options)
        if cached:
            samples.fill_latents(latents, images, sizes, flip=False, encode=self.encode_images, batch_size=16, progress=False)
        self.samples = samples.Samples(images, sizes, seed=0, caption_dropout=0.1, latents=latents, text=text)
        self.order = buckets.Order(sizes, args.train_batch_size, seed=0)
        torch.manual_seed(0)
        lora.add(self.model.transformer, rank=16)
        weights = lora.parameters(self.model.transformer)
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=self.device == "cuda")

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sd3.encode_images(self.model, pixels)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        condition = sd3.encode_prompts(self.model, prompts, self.length)
        return condition.embeds, condition.pooled

    def batch(self) -> tuple[torch.Tensor, sd3.Conditioning, list[int]]:
        """Scaled latents (b, 16, h, w), conditioning and positions of one step."""
        keys = [buckets.Key(index, self.step, i) for i, index in enumerate(self.order.batch(self.step))]
        batch = samples.collate([self.samples[key] for key in keys]).to(self.device)
        if self.cached:
            mean, std, embeds, pooled = batch.latent_mean, batch.latent_std, batch.embeds, batch.pooled
        else:
            mean, std = self.encode_images(batch.pixels)
            embeds, pooled = self.encode_text(batch.prompts)
        posterior = seeds.normal(0, self.step, batch.positions, "posterior", mean.shape[1:], self.device)
        x0 = sd3.scale_latents(self.model, sd3.sample_posterior(mean, std, posterior))  # (b, 16, h, w)
        return x0, sd3.Conditioning(embeds, pooled), batch.positions

    def train(self, steps: int) -> tuple[float, list[float]]:
        """Take optimizer steps; seconds per step, and the losses."""
        started, losses = time.perf_counter(), []
        for _ in range(steps):
            x0, condition, positions = self.batch()
            noise = seeds.normal(0, self.step, positions, "noise", x0.shape[1:], self.device)
            sigma = flow.sigmas(seeds.uniform(0, self.step, positions, "sigma", self.device), shift=self.model.shift)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.args.dtype == "bf16"):
                loss = trainer.flow_matching_loss(self.model.transformer, x0, noise, sigma, condition).mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
            self.step += 1
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps, torch.stack(losses).tolist()


def peak_memory(args: argparse.Namespace, cached: bool, folder: Path) -> int:
    """Run a few steps in a process of its own and return the peak in bytes; the caches are full."""
    import peft  # noqa: F401  (the libraries' own memory is not the loop's)
    from diffusers import StableDiffusion3Pipeline  # noqa: F401

    quiet()
    before = runtime.resident_peak()
    loop = Loop(args, cached, folder)
    if loop.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loop.train(3)
    return torch.cuda.max_memory_allocated() if loop.device == "cuda" else runtime.resident_peak() - before


def quiet() -> None:
    """Turn off the libraries' progress bars and bitsandbytes' report on kernels."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def check_losses(cached: list[float], encoding: list[float], dtype: str) -> None:
    """Both loops must compute the same losses, or their times cannot be compared.

    Raises:
        RuntimeError: the losses differ by more than rounding.
    """
    tolerance = {"fp32": 1e-4, "bf16": 3e-2}[dtype]  # bf16 encoders round differently in batches of another size
    for step, (one, other) in enumerate(zip(cached, encoding, strict=True)):
        if abs(one - other) > tolerance * abs(other):
            raise RuntimeError(f"step {step}: the loss is {one} from the caches and {other} without: the loops differ")


def main(args: argparse.Namespace) -> dict:
    quiet()
    names = {"cached": True, "encoding at every step": False}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loops = {name: Loop(args, cached, folder) for name, cached in names.items()}
        losses = {name: loop.train(WARM_UP)[1] for name, loop in loops.items()}
        check_losses(*losses.values(), args.dtype)
        seconds = {name: [] for name in loops}
        for _ in range(args.rounds):
            for name, loop in loops.items():
                seconds[name].append(loop.train(args.steps_per_round)[0])
        memory = {}
        for name, cached in names.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a fresh process for each
                memory[name] = pool.submit(peak_memory, args, cached, folder).result()

    result = {name: {"seconds_per_step": statistics.median(values), "peak_bytes": memory[name]} for name, values in seconds.items()}
    print(f"{'loop':<24} {'s/step':>8} {'img/s':>8} {'peak MB':>9}")
    for name, values in result.items():
        rate = args.train_batch_size / values["seconds_per_step"]
        print(f"{name:<24} {values['seconds_per_step']:>8.3f} {rate:>8.1f} {values['peak_bytes'] / 1e6:>9.0f}")
    ratio = result["encoding at every step"]["seconds_per_step"] / result["cached"]["seconds_per_step"]
    full = sum(FULL_SIZE.values()) / FULL_SIZE["step"]
    print(f"encoding at every step takes {ratio:.2f}x as long; by FLOPs at full size, 512 px: {full:.2f}x")
    if args.output:
        about = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
                 "threads": torch.get_num_threads(), "command": shlex.join(["python", *sys.argv])}  # fmt: skip
        if torch.cuda.is_available():
            about["gpu"] = torch.cuda.get_device_name()
        args.output.write_text(json.dumps({"ratio": ratio, "loops": result, "about": about}, indent=1) + "\n")
    return result


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a model or data set that is not there."""
    sd3.check_folder(args.pretrained_model_name_or_path)
    sd3.check_resolution(args.pretrained_model_name_or_path, args.resolution)
    captions.check_source(args.dataset_name, image_column="image", caption_column="text")


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
