"""Train the tiny models that the repository ships, from nothing, on a CPU.

    torchrun --nproc_per_node 2 -m src.tiny.build --only sd3          # 2 cores, writes models/tiny-sd3; `python -m` works too
    python -m src.tiny.build --only sd3 --evaluate models/tiny-sd3 --evaluation_prompts 256    # the figures of models/README.md

1. An autoencoder learns drawings of every shape, also those that the base model never sees, and random blots: a concept
   that is taught later must survive the autoencoder. Its ceiling is the share of drawings read right after encode and decode.
2. The decoder learns on alone. The encoder is frozen: nothing that follows needs to wait for it.
3. Transformer and text encoders learn together, by flow matching on the autoencoder's latents, from captions.
   Training stops once the verifier reads a given share of held-out prompts right: there must be something left to improve.

What differs from Stable Diffusion 3.5: everything is small, the text encoders are trained along instead of coming pretrained,
and the autoencoder knows neither LPIPS nor an adversary. Classes, conventions and file layout are the real ones.
"""

import argparse
import json
import logging
import math
import os
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from src.tiny import shapes

RESOLUTION = 64  # pixels: 8 x 8 latents, 16 tokens after 2 x 2 patches
STAGES = ("vae", "decoder", "transformer", "save")
SHIFT = 3.0  # of the timestep schedule, as in Stable Diffusion 3.5
logger = logging.getLogger("build")

# ---------------------------------------------------------------------------------------------- geometry


def make_vae(channels: tuple[int, ...] = (16, 16, 32, 64)):
    """Return an `AutoencoderKL` as in Stable Diffusion 3.5: 8x smaller, 16 channels, no quant convolutions.

    Two groups for the norms: with a group for each channel (8 groups of 8 channels) a flat picture's colour is normalised away,
    and learning colours takes more than twice as long.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=channels,
        layers_per_block=1, latent_channels=16, norm_num_groups=2, sample_size=RESOLUTION,
        scaling_factor=1.0, shift_factor=0.0,  # measured later
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )


def make_transformer(layers: int = 6, heads: int = 4):
    """Return an `SD3Transformer2DModel` with dual attention in its first half and RMS norm on queries and keys."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=RESOLUTION // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=32,
        num_attention_heads=heads, joint_attention_dim=128, caption_projection_dim=heads * 32, pooled_projection_dim=128,
        pos_embed_max_size=16,  # positions for up to 256 pixels a side; the 384 of the real model would weigh 38 MB here
        dual_attention_layers=tuple(range((layers + 1) // 2)), qk_norm="rms_norm",
    )


def make_text_encoders(tokenizers: list):
    """Return two `CLIPTextModelWithProjection` (64 wide each, as 768 + 1280 are in the real model) and a `T5EncoderModel` (128)."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    encoders = []
    for tokenizer, activation in zip(tokenizers[:2], ("quick_gelu", "gelu"), strict=True):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
        encoders.append(CLIPTextModelWithProjection(config))
    t5 = T5Config(vocab_size=len(tokenizers[2]), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
                  feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, dropout_rate=0.0)
    return [*encoders, T5EncoderModel(t5)]


def make_sd3(seed: int = 0, layers: int = 6, heads: int = 4, vae_channels: tuple[int, ...] = (16, 16, 32, 64)):
    """Return a `StableDiffusion3Pipeline` of random weights and the final geometry."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from src.tiny.tokenizers import clip_tokenizer, t5_tokenizer

    torch.manual_seed(seed)
    tokenizers = [clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer()]
    encoders = make_text_encoders(tokenizers)
    return StableDiffusion3Pipeline(
        transformer=make_transformer(layers, heads), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=make_vae(vae_channels),
        text_encoder=encoders[0], tokenizer=tokenizers[0], text_encoder_2=encoders[1], tokenizer_2=tokenizers[1],
        text_encoder_3=encoders[2], tokenizer_3=tokenizers[2],
    )


# ---------------------------------------------------------------------------------------------- the autoencoder


def random_blots(rng: random.Random, resolution: int) -> torch.Tensor:
    """Draw one to three blots and polygons in any colours, so that shapes nobody drew yet survive the autoencoder too.

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


def vae_pictures(n: int, seed: int) -> torch.Tensor:
    """Return (n, 3, H, W) uint8: three drawings of any shape to one of random blots."""
    pictures = torch.empty(n, 3, RESOLUTION, RESOLUTION, dtype=torch.uint8)
    for i in range(n):
        if i % 4 == 3:
            picture = random_blots(random.Random(f"blots {seed}/{i}"), RESOLUTION)
        else:
            picture = shapes.draw(shapes.drawing(i, seed, "all", shapes.ALL_SHAPES), RESOLUTION)
        pictures[i] = (picture * 255).round().byte()
    return pictures


def vae_loss(
    vae, pixels: torch.Tensor, generator: torch.Generator, frozen_encoder: bool, kl_weight: float = 5e-4
) -> dict[str, torch.Tensor]:
    """Return the loss and its parts, 0-d tensors.

    Args:
        pixels: (b, 3, H, W) in [-1, 1].
        kl_weight: of the mean over latent elements. 5e-4 ends at 2 % of the loss and keeps latents tolerant of small errors.
    """
    with torch.set_grad_enabled(not frozen_encoder):
        posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    l1, mse = (decoded - pixels).abs().mean(), F.mse_loss(decoded, pixels)
    edges = sum((decoded.diff(dim=dim) - pixels.diff(dim=dim)).abs().mean() for dim in (2, 3))
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return {"loss": l1 + mse + 0.5 * edges + kl_weight * kl, "l1": l1, "mse": mse, "edges": edges, "kl": kl}


def train_vae(vae, args: argparse.Namespace, name: str) -> None:
    """Train in place, with AdamW and a cosine schedule: the whole autoencoder ("vae"), or its decoder alone ("decoder")."""
    frozen_encoder = name == "decoder"
    steps = args.decoder_steps if frozen_encoder else args.vae_steps
    pictures = vae_pictures(args.vae_pictures, args.seed)
    parameters = list(vae.decoder.parameters() if frozen_encoder else vae.parameters())
    logger.info("%s: %d parameters, %d pictures", name, sum(parameter.numel() for parameter in parameters), len(pictures))
    generator = torch.Generator().manual_seed(args.seed)
    vae.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(100, steps))
    state = {"vae": vae, "optimizer": optimizer, "schedule": schedule, "generator": generator}
    first = resume(args, name, **state)
    progress = Progress(name, steps, first)
    for step in range(first, steps):
        index = torch.randint(len(pictures), (args.vae_batch_size,), generator=generator)
        pixels = pictures[index].float() / 127.5 - 1  # (b, 3, H, W)
        losses = vae_loss(vae, pixels.to(memory_format=torch.channels_last), generator, frozen_encoder)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.step(losses)
        if (step + 1) % args.evaluation_steps == 0 or step + 1 == steps:
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
    """Return the share of held-out drawings read right after encode and decode, for the known shapes and for each new one."""
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
    """Return mean and standard deviation of each drawing's posterior, both (n, 16, H/8, W/8), unscaled."""
    means, stds = [], []
    for start in range(0, len(drawn), 100):
        pixels = torch.stack([shapes.draw(drawing, RESOLUTION) for drawing in drawn[start : start + 100]]) * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


# ---------------------------------------------------------------------------------------------- text to image


@dataclass(frozen=True)
class Text:
    """Token ids of some prompts."""

    clip_l: torch.Tensor  # (b, 16)
    clip_g: torch.Tensor  # (b, 16), padded with another token
    t5: torch.Tensor  # (b, 16)

    def all(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the three, in the pipeline's order."""
        return self.clip_l, self.clip_g, self.t5

    def __getitem__(self, index: torch.Tensor | slice) -> "Text":
        return Text(self.clip_l[index], self.clip_g[index], self.t5[index])


def tokenize(pipe, prompts: list[str]) -> Text:
    """Tokenize, padded to the tokenizers' 16 tokens."""
    ids = [
        tokenizer(prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)
    ]
    return Text(*ids)


def encode_text(pipe, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode with gradient, as `StableDiffusion3Pipeline.encode_prompt` does: penultimate CLIP states side by side, T5's below.

    Returns:
        Prompt embeddings (b, 32, 128) and pooled embeddings (b, 128).
    """
    clips = [
        encoder(ids, output_hidden_states=True)
        for encoder, ids in ((pipe.text_encoder, text.clip_l), (pipe.text_encoder_2, text.clip_g))
    ]
    clip = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)  # (b, 16, 64 + 64): no zeros to pad at this width
    t5 = pipe.text_encoder_3(text.t5)[0]  # (b, 16, 128), without a mask as in the pipeline
    return torch.cat([clip, t5], dim=1), torch.cat([output.text_embeds for output in clips], dim=-1)


@dataclass(frozen=True)
class Batch:
    """What one optimizer step needs."""

    latents: torch.Tensor  # scaled x0 (b, 16, h, w)
    noise: torch.Tensor  # eps (b, 16, h, w)
    sigma: torch.Tensor  # (b,) in (0, 1)
    text: Text

    def part(self, rank: int, processes: int) -> "Batch":
        """Return one process's share."""
        share = slice(rank, None, processes)
        return Batch(self.latents[share], self.noise[share], self.sigma[share], self.text[share])


def flow_loss(pipe, batch: Batch) -> torch.Tensor:
    """Return the mean squared error of the velocity eps - x0, 0-d."""
    noisy = batch.latents + batch.sigma[:, None, None, None] * (batch.noise - batch.latents)
    states, pooled = encode_text(pipe, batch.text)
    velocity = pipe.transformer(noisy, timestep=1000 * batch.sigma, encoder_hidden_states=states, pooled_projections=pooled).sample
    return F.mse_loss(velocity, batch.noise - batch.latents)


@dataclass(frozen=True)
class TrainingData:
    """Scaled posterior means and stds (n, 16, h, w) of the training drawings, their captions, and the empty prompt."""

    means: torch.Tensor
    stds: torch.Tensor
    text: Text
    empty: Text

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Draw a batch at logit-normal times after the schedule's shift; 10 % get the empty prompt, for guidance."""
        index = torch.randint(len(self.means), (size,), generator=generator)
        shape = (size, *self.means.shape[1:])
        latents = self.means[index] + self.stds[index] * torch.randn(shape, generator=generator)
        u = torch.sigmoid(torch.randn(size, generator=generator))  # (b,)
        dropped = torch.rand(size, generator=generator) < 0.1
        text = Text(*(
            torch.where(dropped[:, None], nothing, ids[index])
            for ids, nothing in zip(self.text.all(), self.empty.all(), strict=True)
        ))
        return Batch(latents, torch.randn(shape, generator=generator), SHIFT * u / (1 + (SHIFT - 1) * u), text)


def learners(pipe) -> list[torch.nn.Module]:
    """Return the modules that are trained together."""
    return [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]


def train_transformer(pipe, args: argparse.Namespace) -> None:
    """Train transformer and text encoders in place until the verifier reads `--stop_at` of the held-out prompts right."""
    data = training_data(pipe, args)
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    modules = torch.nn.ModuleList(learners(pipe)).train()
    parameters = list(modules.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(200, args.transformer_steps))
    state = {"modules": modules, "optimizer": optimizer, "schedule": schedule, "generator": generator, "average": average}
    first = resume(args, "transformer", **state)
    progress = Progress("transformer", args.transformer_steps, first)
    for step in range(first, args.transformer_steps):
        loss = flow_loss(pipe, data.batch(args.batch_size, generator).part(rank, processes))
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))  # about the last 500 steps, less at the start
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        progress.step({"loss": loss})
        if (step + 1) % args.evaluation_steps == 0 or step + 1 == args.transformer_steps:
            if rank == 0:
                save(args, "transformer", step + 1, **state)
            if held_out_score(pipe, parameters, average, args, step + 1) >= args.stop_at:
                break
    modules.eval()


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over processes: two of one thread each are twice as fast as one of two threads at this size."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]  # the same ones in every process
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, value in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(value.view_as(gradient))


def load_average(pipe, args: argparse.Namespace) -> None:
    """Load the averaged weights of transformer and text encoders from their checkpoint."""
    average = torch.load(Path(args.checkpoint_dir) / "transformer.pt", weights_only=True)["average"]
    for parameter, value in zip(torch.nn.ModuleList(learners(pipe)).parameters(), average, strict=True):
        parameter.data.copy_(value)


def measure_latents(vae, args: argparse.Namespace) -> tuple[float, float]:
    """Measure and set the autoencoder's shift and scale: latents have mean 0 and standard deviation 1 after them."""
    means, stds = encode_latents(vae, shapes.drawings(min(args.drawings, 2000), args.seed, "train"))  # 2,000: 0.1 % exact
    shift = means.mean().item()
    scale = 1 / torch.sqrt(means.var() + stds.square().mean()).item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    logger.info("latents: shift %.4f, scale %.4f, posterior std / std %.3f", shift, scale, stds.mean().item() * scale)
    return shift, scale


def training_data(pipe, args: argparse.Namespace) -> TrainingData:
    """Draw and encode what the transformer learns from."""
    shift, scale = measure_latents(pipe.vae, args)
    drawn = shapes.drawings(args.drawings, args.seed, "train")
    means, stds = encode_latents(pipe.vae, drawn)
    text = tokenize(pipe, [drawing.caption for drawing in drawn])
    return TrainingData((means - shift) * scale, stds * scale, text, tokenize(pipe, [""]))


def held_out_score(pipe, parameters: list, average: list, args: argparse.Namespace, step: int) -> float:
    """Return the score of the averaged weights on held-out prompts, and log it; the weights are as before afterwards."""
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, average, strict=True):
        parameter.data.copy_(value)
    load_vae(pipe.vae, args)  # the decoder may be training beside
    score = evaluate(pipe, args.evaluation_prompts, args.guidance_scale)["correct"]
    logger.info("transformer step %d: %.1f %% of %d held-out prompts right", step, 100 * score, args.evaluation_prompts)
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data.copy_(value)
    return score


# ---------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def generate(pipe, prompts: list[str], guidance_scale: float, batch_size: int = 64) -> torch.Tensor:
    """Generate with the stock pipeline at 20 steps; picture i starts from the noise of seed i.

    Returns:
        Pictures (b, 3, H, W), float in [0, 1].
    """
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        images.append(pipe(
            chunk, height=RESOLUTION, width=RESOLUTION, num_inference_steps=20, guidance_scale=guidance_scale, max_sequence_length=16,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))], output_type="pt",
        ).images.float())
    return torch.cat(images)


def evaluate(pipe, n: int, guidance_scale: float, seed: int = 0) -> dict[str, float]:
    """Return the shares of `n` held-out prompts whose picture is wholly right, and right in shape, colour and background."""
    prompts = shapes.held_out_prompts(n, seed)
    readings = shapes.verify(generate(pipe, prompts, guidance_scale))
    asked = [shapes.read_caption(prompt) for prompt in prompts]
    result = {"correct": shapes.correct(readings, prompts).float().mean().item()}
    for name in ("shape", "color", "background"):
        result[name] = sum(getattr(a, name) == getattr(b, name) for a, b in zip(readings, asked, strict=True)) / n
    return result


def print_evaluation(path: str, guidance_scale: float, n: int) -> None:
    """Print what models/README.md states about a model folder."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(path, local_files_only=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        print(f"{name}: {count(getattr(pipe, name)):,} parameters")
    print(f"folder: {sum(file.stat().st_size for file in Path(path).rglob('*') if file.is_file()) / 1e6:.2f} MB")
    print("read right after encode and decode:", {name: f"{100 * share:.1f} %" for name, share in vae_ceiling(pipe.vae).items()})
    for scale in (guidance_scale, 1.0):
        scores = {name: f"{100 * share:.1f} %" for name, share in evaluate(pipe, n, scale).items()}
        print(f"{n} held-out prompts, 20 steps, guidance {scale:g}: {scores}")


# ---------------------------------------------------------------------------------------------- plumbing


def count(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def warmup_cosine(warmup: int, steps: int):
    """Return the learning rate's factor by step: up to 1 in `warmup` steps, then down a half cosine to 0.02."""
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
    return factor


class Progress:
    """Logs means and seconds per step, every 50 steps."""

    def __init__(self, name: str, steps: int, first: int = 0):
        self.name, self.steps, self.done = name, steps, first
        self.since, self.sums, self.n = time.perf_counter(), {}, 0

    def step(self, losses: dict[str, torch.Tensor]) -> None:
        """Count one step; every loss is a 0-d tensor."""
        self.done, self.n = self.done + 1, self.n + 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()
        if self.done % 50 == 0 or self.done == self.steps:
            if not math.isfinite(self.sums["loss"]):
                raise RuntimeError(f"{self.name}: the loss is not finite at step {self.done}")
            means = ", ".join(f"{name} {value / self.n:.4f}" for name, value in self.sums.items())
            logger.info("%s %d/%d: %s, %.3f s/step", self.name, self.done, self.steps, means, (time.perf_counter() - self.since) / self.n)
            self.since, self.sums, self.n = time.perf_counter(), {}, 0


def save(args: argparse.Namespace, name: str, step: int, **state) -> None:
    """Write a checkpoint to a temporary name, then rename it: a kill leaves the previous one."""
    path = Path(args.checkpoint_dir) / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {}
    for key, value in state.items():
        values[key] = value.get_state() if isinstance(value, torch.Generator) else value
        values[key] = value.state_dict() if hasattr(value, "state_dict") else values[key]
    torch.save({"step": step, **values}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def resume(args: argparse.Namespace, name: str, **state) -> int:
    """Load the checkpoint with `--resume`, in place, and return the steps done; 0 without one."""
    path = Path(args.checkpoint_dir) / f"{name}.pt"
    if not args.resume or not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    for key, value in state.items():
        if isinstance(value, torch.Generator):
            value.set_state(saved[key])
        elif isinstance(value, list):
            torch._foreach_copy_(value, saved[key])
        else:
            value.load_state_dict(saved[key])
    logger.info("%s: resumed after step %d", name, saved["step"])
    return saved["step"]


def save_half(pipe, folder: str) -> None:
    """Write a pipeline folder of fp16 safetensors that loads as fp32 unless a `torch_dtype` is given.

    transformers 5 takes the type from the config, diffusers takes fp32: text encoders in fp16 beside a transformer in fp32 would crash.
    """
    pipe.to(torch.float16).save_pretrained(folder)
    for file in Path(folder).glob("text_encoder*/config.json"):
        config = json.loads(file.read_text())
        config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
    for file in Path(folder).rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600, which other users of a shared checkout could not read


def run_stage(pipe, args: argparse.Namespace, stage: str) -> None:
    """Run one of STAGES, on from the checkpoints of those before it."""
    if stage != "vae":
        load_vae(pipe.vae, args)
    if stage in ("vae", "decoder"):
        train_vae(pipe.vae, args, stage)
    elif stage == "transformer":
        train_transformer(pipe, args)
    else:
        measure_latents(pipe.vae, args)
        load_average(pipe, args)
        save_half(pipe, args.output_dir)


def build_sd3(args: argparse.Namespace) -> None:
    """Train tiny-sd3, stage by stage, and write it as fp16 safetensors; stages meet in the checkpoint folder."""
    started = time.perf_counter()
    pipe = make_sd3(args.seed, args.layers, args.heads, tuple(args.vae_channels))
    for stage in STAGES if args.stage == "all" else (args.stage,):
        if stage == "transformer" or not dist.is_initialized() or dist.get_rank() == 0:  # only this stage is shared by processes
            run_stage(pipe, args, stage)
        if dist.is_initialized():
            dist.barrier()
        logger.info("stage %s done after %.1f minutes", stage, (time.perf_counter() - started) / 60)


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m src.tiny.build", usage="%(prog)s --only sd3 [options]", allow_abbrev=False,
        description="Train the tiny models that the repository ships, from nothing, on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=["sd3"], required=True, help="which model to build or evaluate")
    parser.add_argument("--output_dir", help="model folder to write; models/tiny-NAME when unset")
    parser.add_argument("--checkpoint_dir", help="folder of checkpoints and the log's neighbour; outputs/build-NAME when unset")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --checkpoint_dir")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all",
                        help="one stage alone, from the checkpoints before it; decoder and transformer may run side by side")
    parser.add_argument("--evaluate", metavar="PATH", help="only print the figures of the model folder PATH")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the drawings and the noise")
    parser.add_argument("--vae_steps", type=int, default=4000, help="optimizer steps of the autoencoder")
    parser.add_argument("--decoder_steps", type=int, default=8500, help="optimizer steps of its decoder alone, after that")
    parser.add_argument("--vae_batch_size", type=int, default=8, help="pictures in a step of the autoencoder")
    parser.add_argument("--vae_pictures", type=int, default=24000, help="pictures that the autoencoder learns from")
    parser.add_argument("--transformer_steps", type=int, default=6200, help="optimizer steps of transformer and text encoders, at most")
    parser.add_argument("--stop_at", type=float, default=0.8, help="stop once this share of held-out prompts is right")
    parser.add_argument("--batch_size", type=int, default=64, help="drawings in a step of the transformer")
    parser.add_argument("--drawings", type=int, default=24000, help="captioned drawings that the transformer learns from")
    parser.add_argument("--evaluation_steps", type=int, default=500, help="optimizer steps between evaluations and checkpoints")
    parser.add_argument("--evaluation_prompts", type=int, default=128, help="held-out prompts in an evaluation")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance in evaluations")
    parser.add_argument("--layers", type=int, default=6, help="blocks of the transformer")
    parser.add_argument("--heads", type=int, default=4, help="attention heads of the transformer, 32 wide each")
    parser.add_argument("--vae_channels", type=int, nargs=4, default=[16, 16, 32, 64], help="channels of the autoencoder's four levels")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; unset folders are named after the model."""
    args = build_parser().parse_args(argv)
    args.output_dir = args.output_dir or f"models/tiny-{args.only}"
    args.checkpoint_dir = args.checkpoint_dir or f"outputs/build-{args.only}"
    return args


def start_log(args: argparse.Namespace) -> None:
    """Log to the terminal and to a file beside the checkpoints, in the first process."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    path = Path(f"{args.checkpoint_dir}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.setLevel(logging.INFO)
    for handler in (logging.StreamHandler(), logging.FileHandler(path)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.info("%s", vars(args))


def main(args: argparse.Namespace) -> None:
    """Build, or evaluate with `--evaluate`."""
    if args.evaluate:
        print_evaluation(args.evaluate, args.guidance_scale, args.evaluation_prompts)
        return
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo", timeout=timedelta(hours=2))  # one process trains the autoencoder while the others wait
    start_log(args)
    build_sd3(args)


if __name__ == "__main__":
    main(parse_args())
