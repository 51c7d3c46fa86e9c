"""Train a tiny model's denoiser and its text encoders together, from captions, on the autoencoder's latents; and measure it.

Training stops once the verifier finds a given share of held-out prompts drawn right, so that something is left to improve.
`family` is the module that knows the model: `build_sd3` or `build_sd15`.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from src.tiny import shapes
from src.tiny.autoencoder import encode_latents, load_vae, measure_latents
from src.tiny.evaluate import draw
from src.tiny.loop import Progress, average_gradients, rank_and_processes, resume, save, warmup_cosine

Text = tuple[torch.Tensor, ...]  # token ids (b, 16) of some prompts, for every text encoder
logger = logging.getLogger("build")


@dataclass(frozen=True)
class Batch:
    """What one optimizer step needs."""

    latents: torch.Tensor  # scaled x0 (b, C, h, w)
    noise: torch.Tensor  # eps (b, C, h, w)
    time: torch.Tensor  # (b,), in the family's own unit
    text: Text

    def part(self, rank: int, processes: int) -> "Batch":
        """Return one process's share."""
        share = slice(rank, None, processes)
        return Batch(self.latents[share], self.noise[share], self.time[share], tuple(ids[share] for ids in self.text))


@dataclass(frozen=True)
class TrainingData:
    """Scaled posterior means and stds (n, C, h, w) of the training drawings, their captions, and the empty prompt."""

    means: torch.Tensor
    stds: torch.Tensor
    text: Text
    empty: Text
    times: Callable[[int, torch.Generator], torch.Tensor]  # draws (b,)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw a batch; 10 % get the empty prompt, for guidance."""
        index = torch.randint(len(self.means), (size,), generator=generator)
        shape = (size, *self.means.shape[1:])
        latents = self.means[index] + self.stds[index] * torch.randn(shape, generator=generator)
        time = self.times(size, generator)  # (b,)
        dropped = torch.rand(size, generator=generator) < 0.1
        text = tuple(torch.where(dropped[:, None], nothing, ids[index]) for ids, nothing in zip(self.text, self.empty, strict=True))
        return Batch(latents, torch.randn(shape, generator=generator), time, text)


def train_denoiser(family: ModuleType, pipe, args: argparse.Namespace) -> None:
    """Train denoiser and text encoders in place until the share of held-out prompts drawn right reaches `--stop_at`."""
    data = training_data(family, pipe, args)
    name, steps = family.DENOISER, getattr(args, f"{family.DENOISER}_steps")
    rank, processes = rank_and_processes()
    modules = torch.nn.ModuleList(family.learners(pipe)).train()
    parameters = list(modules.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(200, steps))
    state = {"modules": modules, "optimizer": optimizer, "schedule": schedule, "generator": generator, "average": average}
    first = resume(args, name, **state)
    progress = Progress(name, steps, first)
    for step in range(first, steps):
        loss = family.loss(pipe, data.batch(args.batch_size, generator).part(rank, processes))
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))  # about the last 500 steps, less at the start
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        progress.step({"loss": loss})
        if (step + 1) % args.evaluation_steps == 0 or step + 1 == steps:
            if rank == 0:
                save(args, name, step + 1, **state)
            if held_out_score(family, pipe, parameters, average, args, step + 1) >= args.stop_at:
                break
    modules.eval()


def load_average(family: ModuleType, pipe, args: argparse.Namespace) -> None:
    """Load the averaged weights of denoiser and text encoders from their checkpoint."""
    average = torch.load(Path(args.checkpoint_dir) / f"{family.DENOISER}.pt", weights_only=True)["average"]
    for parameter, value in zip(torch.nn.ModuleList(family.learners(pipe)).parameters(), average, strict=True):
        parameter.data.copy_(value)


def training_data(family: ModuleType, pipe, args: argparse.Namespace) -> TrainingData:
    """Draw and encode the denoiser's training data."""
    shift, scale = measure_latents(pipe.vae, args)
    drawn = shapes.drawings(args.drawings, args.seed, "train")
    means, stds = encode_latents(pipe.vae, drawn)
    text = family.tokenize(pipe, [drawing.caption for drawing in drawn])
    return TrainingData((means - shift) * scale, stds * scale, text, family.tokenize(pipe, [""]), family.times)


def held_out_score(family: ModuleType, pipe, parameters: list, average: list, args: argparse.Namespace, step: int) -> float:
    """Return the score of the averaged weights on held-out prompts, and log it; the current weights are restored afterwards."""
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, average, strict=True):
        parameter.data.copy_(value)
    load_vae(pipe.vae, args)  # another process may be training the decoder
    score = evaluate(pipe, args.evaluation_prompts, args.guidance_scale)["correct"]
    logger.info("%s step %d: %.1f %% of %d held-out prompts right", family.DENOISER, step, 100 * score, args.evaluation_prompts)
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data.copy_(value)
    return score


def evaluate(pipe, n: int, guidance_scale: float, seed: int = 0) -> dict[str, float]:
    """Return the shares of `n` held-out prompts whose picture is wholly right, and right in shape, colour and background."""
    prompts = shapes.held_out_prompts(n, seed)
    pipe.set_progress_bar_config(disable=True)
    readings = shapes.verify(draw(pipe, prompts, num_inference_steps=20, guidance_scale=guidance_scale))
    asked = [shapes.read_caption(prompt) for prompt in prompts]
    result = {"correct": shapes.correct(readings, prompts).float().mean().item()}
    for name in ("shape", "color", "background"):
        result[name] = sum(getattr(a, name) == getattr(b, name) for a, b in zip(readings, asked, strict=True)) / n
    return result
