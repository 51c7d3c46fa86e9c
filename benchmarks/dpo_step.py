"""Preference pairs per second: with the caches, against encoding text and both pictures at every step as the public script does.

  python benchmarks/dpo_step.py                                        # models/tiny-sd15 and datas/pairs, on this machine
  python benchmarks/dpo_step.py --pretrained_model_name_or_path models/stable-diffusion-v1-5 --dataset_name datas/mine \\
      --resolution 512 --train_batch_size 4 --dtype bf16

Both loops run the training script's own objective on the same pairs, noise and optimizer. They train a LoRA, whose reference is the UNet
without it (--full: all weights, beside a frozen copy), and take turns of a few steps, so that a busy machine slows both. The cached loop
reads its entries from disk as training does.
The public code (https://github.com/SalesforceAIResearch/DiffusionDPO) reports 47.4 pairs/s on 16 A100.
"""

import argparse
import copy
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_dpo_sd15 as trainer
from src import cli, lora, seeds, speed
from src.data import buckets, cache, preferences, samples
from src.pipelines import sd15

WARM_UP = 3  # steps before the clock starts, in which both loops must have the same losses
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = preferences.Columns("jpg_0", "jpg_1", "label_0", "caption")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("benchmark")
    g.add_argument("--pretrained_model_name_or_path", type=cli.path_or_name, default="models/tiny-sd15", help="pipeline folder")
    g.add_argument("--dataset_name", type=cli.path_or_name, default="datas/pairs", help="preference pairs in the columns of pickapic_v2")
    g.add_argument("--resolution", type=cli.multiple_of_16, default=64, help="side of the pictures in pixels")
    g.add_argument("--train_batch_size", type=cli.positive_int, default=16, help="pairs per step")
    g.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the frozen weights")
    g.add_argument("--full", action="store_true", help="train all weights, in fp32, beside a frozen copy")
    g.add_argument("--rounds", type=cli.positive_int, default=8, help="turns of each loop")
    g.add_argument("--steps_per_round", type=cli.positive_int, default=5, help="optimizer steps in a turn")
    g.add_argument("--output", type=cli.path, help="also write the result there, as JSON")
    return parser


class Loop:
    """One of the two training loops, set up and ready to step. Modules that a loop does not need are not in memory, as in training."""

    def __init__(self, args: argparse.Namespace, cached: bool, folder: Path):
        self.args, self.cached, self.device, self.step = args, cached, "cuda" if torch.cuda.is_available() else "cpu", 0
        path, options = args.pretrained_model_name_or_path, {"dtype": DTYPES[args.dtype], "device": self.device}
        pairs = preferences.open_preferences(args.dataset_name, COLUMNS, cache_dir=folder, progress=False)
        sizes = [(args.resolution, args.resolution)] * len(pairs)
        latents = text = None
        self.model = sd15.load(path, parts=("vae", "text"), **options)
        if cached:
            latents, text = cache.TensorCache(folder, "latents", {}), cache.TensorCache(folder, "text", {})
            prompts = ["", *(pair.prompt for pair in pairs.records)]
            samples.fill_text(text, prompts, self.encode_text, batch_size=16, progress=False)
            sd15.unload_text_encoders(self.model)
            samples.fill_latents(latents, pairs.pictures, sizes * 2, flip=False, encode=self.encode_images, batch_size=16, progress=False)
        self.samples = preferences.PairSamples(pairs, sizes, seed=0, caption_dropout=0.1, latents=latents, text=text)
        self.order = buckets.Order(sizes, args.train_batch_size, seed=0)
        self.alphas = self.model.alphas_cumprod.to(self.device)
        unet = sd15.load(path, parts=("unet",), device=self.device, dtype=torch.float32 if args.full else DTYPES[args.dtype]).unet
        torch.manual_seed(0)
        if args.full:
            unet.requires_grad_(True)
        else:
            lora.add(unet, rank=16)
        self.unet, self.frozen = unet, copy.deepcopy(unet) if args.full else unet
        if args.full:
            speed.narrow_frozen(self.frozen, DTYPES[args.dtype])
        weights = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=self.device == "cuda")

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sd15.encode_images(self.model, pixels)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        condition = sd15.encode_prompts(self.model, prompts)
        return condition.embeds, condition.pooled

    def reference(self, *inputs: torch.Tensor) -> torch.Tensor:
        with nullcontext() if self.args.full else lora.disabled(self.unet):
            return sd15.eps(self.frozen, *inputs)

    def batch(self) -> tuple[torch.Tensor, sd15.Conditioning, list[int]]:
        """Scaled latents (b, 2, 4, h, w), conditioning and positions of one step."""
        keys = [buckets.Key(index, self.step, i) for i, index in enumerate(self.order.batch(self.step))]
        batch = samples.collate([self.samples[key] for key in keys]).to(self.device)
        if self.cached:
            mean, std, embeds, pooled = batch.latent_mean, batch.latent_std, batch.embeds, batch.pooled
        else:
            mean, std = (part.unflatten(0, (-1, 2)) for part in self.encode_images(batch.pixels.flatten(0, 1)))
            embeds, pooled = self.encode_text(batch.prompts)
        posterior = seeds.normal(0, self.step, batch.positions, "posterior", mean.shape[1:], self.device)
        x0 = sd15.scale_latents(self.model, sd15.sample_posterior(mean, std, posterior))  # (b, 2, 4, h, w)
        return x0, sd15.Conditioning(embeds, pooled), batch.positions

    def train(self, steps: int) -> tuple[float, list[float]]:
        """Take optimizer steps; seconds per step, and the losses."""
        started, losses = time.perf_counter(), []
        for _ in range(steps):
            x0, condition, positions = self.batch()
            noise = seeds.normal(0, self.step, positions, "noise", x0.shape[2:], self.device)
            timestep = (seeds.uniform(0, self.step, positions, "timestep", self.device) * 1000).long()
            with torch.autocast(self.device, torch.bfloat16, enabled=self.args.dtype == "bf16"):
                policy = trainer.predictor(self.unet)
                found = trainer.objective(policy, self.reference, x0, noise, timestep, self.alphas, condition, beta=100.0)
            found["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(found["loss"].detach())
            self.step += 1
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps, torch.stack(losses).tolist()


def check_losses(cached: list[float], encoding: list[float], dtype: str) -> None:
    """Both loops must compute the same losses, or their times cannot be compared.

    Raises:
        RuntimeError: the losses differ by more than rounding, which beta multiplies.
    """
    tolerance = {"fp32": 1e-3, "bf16": 0.1}[dtype]
    for step, (one, other) in enumerate(zip(cached, encoding, strict=True)):
        if abs(one - other) > tolerance * abs(other):
            raise RuntimeError(f"step {step}: the loss is {one} from the caches and {other} without: the loops differ")


def main(args: argparse.Namespace) -> dict:
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    names = {"cached": True, "encoding at every step": False}
    with tempfile.TemporaryDirectory() as temporary:
        loops = {name: Loop(args, cached, Path(temporary)) for name, cached in names.items()}
        check_losses(*(loop.train(WARM_UP)[1] for loop in loops.values()), args.dtype)
        seconds = {name: [] for name in loops}
        for _ in range(args.rounds):
            for name, loop in loops.items():
                seconds[name].append(loop.train(args.steps_per_round)[0])

    rates = {name: args.train_batch_size / statistics.median(values) for name, values in seconds.items()}
    print(f"{'loop':<24} {'s/step':>8} {'pairs/s':>8}")
    for name, rate in rates.items():
        print(f"{name:<24} {args.train_batch_size / rate:>8.3f} {rate:>8.1f}")
    ratio = rates["cached"] / rates["encoding at every step"]
    print(f"from the caches {ratio:.2f}x as many pairs per second")
    result = {"ratio": ratio, "pairs_per_second": rates}
    if args.output:
        about = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
                 "threads": torch.get_num_threads(), "command": shlex.join(["python", *sys.argv])}  # fmt: skip
        if torch.cuda.is_available():
            about["gpu"] = torch.cuda.get_device_name()
        args.output.write_text(json.dumps({**result, "about": about}, indent=1) + "\n")
    return result


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a model or data set that is not there."""
    sd15.check_folder(args.pretrained_model_name_or_path)
    sd15.check_resolution(args.pretrained_model_name_or_path, args.resolution)
    preferences.check_source(args.dataset_name, COLUMNS)


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
