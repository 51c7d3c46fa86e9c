"""The tiny models' autoencoder: how it is trained, and how well drawings survive it.

1. It is trained on drawings of every shape, also those that the base model never sees, and on random blots: a concept that is
   taught later must survive the autoencoder. Its ceiling is the share of drawings read correctly after encode and decode.
2. Its decoder is trained further alone. The encoder is frozen, so that later stages need not wait.

Its loss has neither LPIPS nor an adversary, unlike Stable Diffusion's.
"""

import argparse
import logging
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from src.tiny import shapes
from src.tiny.loop import RESOLUTION, Progress, average_gradients, rank_and_processes, resume, save, warmup_cosine

logger = logging.getLogger("build")


def random_blots(rng: random.Random, resolution: int) -> torch.Tensor:
    """Draw one to three blots and polygons in any colours, so that unknown shapes survive the autoencoder, too.

    Returns:
        Picture (3, H, W), float in [0, 1].
    """

    def color():
        return torch.tensor([rng.random() for _ in range(3)])[:, None, None]

    line = (torch.arange(resolution * 2) + 0.5) / (resolution * 2)
    picture = color().expand(3, resolution, resolution)
    for _ in range(rng.randint(1, 3)):
        x, y = line[None, :] - rng.uniform(0.25, 0.75), line[:, None] - rng.uniform(0.25, 0.75)
        radius, turn, corners = rng.uniform(0.12, 0.32), rng.uniform(0, 2 * math.pi), rng.randint(3, 7)
        angle = torch.atan2(y, x) + turn
        if rng.random() < 0.5:  # a regular polygon
            wedge = 2 * math.pi / corners
            edge = radius * math.cos(wedge / 2) / torch.cos(angle % wedge - wedge / 2)
        else:  # a wavy circle
            edge = radius * (1 + rng.uniform(0.1, 0.5) * torch.cos(corners * angle)) * (1 + rng.uniform(0, 0.4) * torch.cos(2 * angle))
        coverage = F.avg_pool2d((torch.sqrt(x**2 + y**2) < edge).float()[None], 2)
        picture = picture + coverage * (color() - picture)
    return picture


def vae_pictures(n: int, seed: int, blots: int) -> torch.Tensor:
    """Return (n, 3, H, W) uint8: drawings of any shape, every `blots`-th picture random blots instead (0: none)."""
    pictures = torch.empty(n, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8)
    for i in range(n):
        if blots and i % blots == blots - 1:
            picture = random_blots(random.Random(f"blots {seed}/{i}"), RESOLUTION)
        else:
            picture = shapes.draw(shapes.drawing(i, seed, "all", shapes.ALL_SHAPES), RESOLUTION)
        pictures[i] = (picture * 255).round().byte()
    return pictures


def vae_loss(vae, pixels: torch.Tensor, noise: torch.Tensor, frozen_encoder: bool, kl_weight: float = 5e-4) -> dict[str, torch.Tensor]:
    """Return the loss and its parts, 0-d tensors.

    Args:
        pixels: (b, 3, H, W) in [-1, 1].
        noise: (b, C, H/8, W/8), standard normal: draws the latents from the posterior.
        kl_weight: of the KL's mean over latent elements. With 5e-4 it ends at 2 % of the loss, and latents tolerate small errors.
    """
    with torch.set_grad_enabled(not frozen_encoder):
        posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    l1, mse = (decoded - pixels).abs().mean(), F.mse_loss(decoded, pixels)
    edges = sum((decoded.diff(dim=dim) - pixels.diff(dim=dim)).abs().mean() for dim in (2, 3))
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return {"loss": l1 + mse + 0.5 * edges + kl_weight * kl, "l1": l1, "mse": mse, "edges": edges, "kl": kl}


def train_vae(vae, args: argparse.Namespace, name: str) -> None:
    """Train in place, with AdamW and a cosine schedule: the whole autoencoder ("vae"), or its decoder alone ("decoder")."""
    frozen_encoder = name == "decoder"
    steps = args.decoder_steps if frozen_encoder else args.vae_steps
    pictures = vae_pictures(args.vae_pictures, args.seed, args.vae_blots)
    parameters = list(vae.decoder.parameters() if frozen_encoder else vae.parameters())
    logger.info("%s: %d parameters, %d pictures", name, sum(parameter.numel() for parameter in parameters), len(pictures))
    generator = torch.Generator().manual_seed(args.seed)
    rank, processes = rank_and_processes()
    share = slice(rank, None, processes)  # of every batch
    noise_shape = (args.vae_batch_size, vae.config.latent_channels, RESOLUTION // 8, RESOLUTION // 8)
    vae.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(100, steps))
    state = {"vae": vae, "optimizer": optimizer, "schedule": schedule, "generator": generator}
    first = resume(args, name, **state)
    progress = Progress(name, steps, first)
    for step in range(first, steps):
        index = torch.randint(len(pictures), (args.vae_batch_size,), generator=generator)
        noise = torch.randn(noise_shape, generator=generator)
        pixels = pictures[index[share]].float() / 127.5 - 1  # (b / processes, 3, H, W)
        losses = vae_loss(vae, pixels.to(memory_format=torch.channels_last), noise[share], frozen_encoder)
        losses["loss"].backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.step(losses)
        if rank == 0 and ((step + 1) % args.evaluation_steps == 0 or step + 1 == steps):
            logger.info("%s step %d: ceiling %s", name, step + 1, vae_ceiling(vae, args.evaluation_prompts))
            save(args, name, step + 1, **state)
    vae.to(memory_format=torch.contiguous_format)


def load_vae(vae, args: argparse.Namespace) -> None:
    """Load the autoencoder's newest checkpoint."""
    paths = [Path(args.checkpoint_dir) / f"{name}.pt" for name in ("decoder", "vae")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise ValueError(f"no autoencoder in {args.checkpoint_dir}: run --stage vae first, or leave --stage out")
    vae.load_state_dict(torch.load(path, weights_only=True)["vae"])
    vae.eval()


@torch.no_grad()
def vae_ceiling(vae, n: int = 512, seed: int = 1) -> dict[str, float]:
    """Return the share of held-out drawings read correctly after encode and decode, for the known shapes and for each new one."""
    result = {}
    for name, kinds in {"known": shapes.SHAPES, **{shape: (shape,) for shape in shapes.NEW_SHAPES}}.items():
        drawn = shapes.drawings(n, seed, "held_out", kinds)
        readings = []
        for chunk in torch.stack([shapes.draw(drawing, RESOLUTION) for drawing in drawn]).split(64):
            decoded = vae.decode(vae.encode(chunk * 2 - 1).latent_dist.mean).sample
            readings += shapes.verify(decoded / 2 + 0.5)
        result[name] = shapes.correct(readings, [drawing.caption for drawing in drawn]).float().mean().item()
    return result


@torch.no_grad()
def encode_latents(vae, drawn: list[shapes.Drawing]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each drawing's posterior, both (n, C, H/8, W/8), unscaled."""
    means, stds = [], []
    for start in range(0, len(drawn), 100):
        pixels = torch.stack([shapes.draw(drawing, RESOLUTION) for drawing in drawn[start : start + 100]]) * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


def measure_latents(vae, args: argparse.Namespace) -> tuple[float, float]:
    """Measure and set the autoencoder's shift, where its config has one, and scale, which give latents a standard deviation of 1.

    Stable Diffusion 3 shifts its latents to mean 0. Stable Diffusion 1.5 does not: its config's `shift_factor` is None and stays so.
    """
    means, stds = encode_latents(vae, shapes.drawings(min(args.drawings, 2000), args.seed, "train"))  # 2,000: exact to 0.1 %
    scale = 1 / torch.sqrt(means.var() + stds.square().mean()).item()
    shift = 0.0
    if vae.config.shift_factor is not None:
        shift = means.mean().item()
        vae.register_to_config(shift_factor=shift)
    vae.register_to_config(scaling_factor=scale)
    logger.info("latents: shift %.4f, scale %.4f, posterior std / std %.3f", shift, scale, stds.mean().item() * scale)
    return shift, scale
