"""Train models/tiny-clip: a small `CLIPModel` that says how well a picture of the tiny world matches a caption.

    python -m src.tiny.clip --output_dir models/tiny-clip          # writes fp16 safetensors, tokenizer and preprocessor
    python -m src.tiny.clip --evaluate models/tiny-clip            # the figures of models/README.md

1. Drawings of the training split, of every shape, are made once; half of them pass through tiny-sd3's autoencoder with noise on
   their latents, so that the reward also learns the soft and slightly wrong edges of generated pictures.
2. A batch holds some pairs of colours, with one drawing of every shape that the training split has in each: no two captions fit one
   picture, and all of them exercise telling shapes apart, the hard part. Each picture is then blurred, tinted and made noisy at random.
3. CLIP's loss: cross-entropy of pictures over captions and of captions over pictures, on cosines times a learned scale. The scale
   is clamped to 16: with CLIP's own 100, cosines need to differ only by hundredths, and the reward would be flat but for a cliff.
4. The saved weights are a moving average over about the last --average_steps steps; its gradients are smoother.

The measure is held out twice: (shape, colour, background) triples that training never showed, and wrong captions that differ from the
right one in exactly one attribute.
"""

import argparse
import logging
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from src import seeds
from src.tiny import shapes
from src.tiny.build import start_log
from src.tiny.loop import Progress, count, load_as_fp32, resume, save, warmup_cosine

RESOLUTION = 64  # pixels: 8 x 8 patches of 8 x 8
MAX_SCALE = 16.0  # of the cosines in the loss
REPORT_PICTURES = 256  # held-out drawings that training is watched on
ATTRIBUTES = {"shape": shapes.ALL_SHAPES, "color": shapes.COLORS, "background": shapes.COLORS}
logger = logging.getLogger("build")

# ---------------------------------------------------------------------------------------------- model


def make_model(tokenizer, width: int = 96, layers: int = 4):
    """Return a `CLIPModel` of random weights: a vision transformer on 8 x 8 patches, a text encoder of two layers, 64 projected."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": 64,
    }
    vision = {
        "image_size": RESOLUTION,
        "patch_size": 8,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 24,
        "projection_dim": 64,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def make_processor():
    """Return the `CLIPImageProcessor` that the folder carries: 64 pixels, [0, 1] to [-1, 1]."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": RESOLUTION}, crop_size={"height": RESOLUTION, "width": RESOLUTION}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    """Return token ids (b, 16); tokens after the first end token have no effect."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def embed_images(model, images: torch.Tensor) -> torch.Tensor:
    """Return unit vectors (b, 64) for pictures (b, 3, 64, 64) in [0, 1]."""
    return F.normalize(model.get_image_features(pixel_values=images * 2 - 1).pooler_output, dim=-1)


def embed_texts(model, ids: torch.Tensor) -> torch.Tensor:
    """Return unit vectors (b, 64) for token ids (b, 16)."""
    return F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)


# ---------------------------------------------------------------------------------------------- pictures


def draw_all(drawn: list[shapes.Drawing]) -> torch.Tensor:
    """Return pictures (n, 3, 64, 64), float in [0, 1]."""
    return torch.stack([shapes.draw(drawing, RESOLUTION) for drawing in drawn])


@torch.no_grad()
def through_autoencoder(vae, images: torch.Tensor, generator: torch.Generator, noise: float = 0.3) -> torch.Tensor:
    """Encode, disturb and decode pictures (b, 3, H, W) in [0, 1].

    Args:
        noise: largest standard deviation of the noise, relative to that of the latents; each picture draws its own.
    """
    decoded = []
    for chunk in images.split(50):
        latents = vae.encode(chunk * 2 - 1).latent_dist.mean
        std = noise / vae.config.scaling_factor * torch.rand(len(chunk), 1, 1, 1, generator=generator)
        latents = latents + std * torch.randn(latents.shape, generator=generator)
        decoded.append((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(decoded)


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each picture (b, 3, H, W) by its own Gaussian of `sigma` (b,) pixels, up to about 2.5: a wider one is cut off by the 7 taps."""
    b, channels, height, width = images.shape
    taps = torch.arange(-3, 4)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp_min(0.05)[:, None]) ** 2)  # (b, 7)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]  # (b 3, 1, 7)
    flat = F.pad(images, (3, 3, 3, 3), mode="replicate").reshape(1, b * channels, height + 6, width + 6)
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=b * channels)
    return F.conv2d(flat, kernel[:, :, :, None], groups=b * channels).view(images.shape)


def disturb(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, tint and add noise to pictures (b, 3, H, W) in [0, 1], each by its own random amount, often little.

    The tint stays below 0.1 a channel: the palette's closest colours are 0.43 apart.
    """
    b = len(images)

    def amount(largest: float) -> torch.Tensor:
        return largest * torch.rand(b, generator=generator) ** 2  # (b,): half of them under a quarter of the largest

    images = blur(images, amount(2.0))
    contrast = 1 - amount(0.15)[:, None, None, None]
    tint = 0.06 * (2 * torch.rand(b, 3, 1, 1, generator=generator) - 1)
    noise = amount(0.2)[:, None, None, None] * torch.randn(images.shape, generator=generator)
    return ((images - 0.5) * contrast + 0.5 + tint + noise).clamp(0, 1)


@dataclass(frozen=True)
class Pool:
    """The training pictures (n, 3, 64, 64) uint8, their token ids (n, 16), and which of them show the same.

    Attributes:
        families: for each pair of colours and each shape drawn in them, the indices of the pictures.
    """

    pictures: torch.Tensor
    ids: torch.Tensor
    families: list[list[list[int]]]

    def batch(self, pairs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw pictures (b, 3, 64, 64) in [0, 1] and token ids (b, 16): one of every shape for each of `pairs` pairs of colours."""
        chosen = torch.randperm(len(self.families), generator=generator)[:pairs].tolist()
        alike = [numbers for family in chosen for numbers in self.families[family]]
        luck = torch.rand(len(alike), generator=generator).tolist()
        index = [numbers[int(u * len(numbers))] for numbers, u in zip(alike, luck, strict=True)]
        return disturb(self.pictures[index].float() / 255, generator), self.ids[index]


def families(drawn: list[shapes.Drawing]) -> list[list[list[int]]]:
    """Return the numbers of the drawings, by their two colours and then by shape: `Pool.families`."""
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for number, drawing in enumerate(drawn):
        found.setdefault((drawing.color, drawing.background), {}).setdefault(drawing.shape, []).append(number)
    return [list(family.values()) for family in found.values()]


def make_pool(tokenizer, vae, n: int, seed: int) -> Pool:
    """Draw `n` pictures of the training split, every second one passed through the autoencoder."""
    drawn = shapes.drawings(n, seed, "train", shapes.ALL_SHAPES)
    images = draw_all(drawn)
    images[1::2] = through_autoencoder(vae, images[1::2], seeds.generator(seed, "pool"))
    return Pool((images * 255).round().byte(), tokenize(tokenizer, [drawing.caption for drawing in drawn]), families(drawn))


# ---------------------------------------------------------------------------------------------- training


def contrastive_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return CLIP's loss, 0-d: the mean of both cross-entropies over the table of cosines.

    Args:
        images, texts: unit vectors (b, d); the i-th belong together, all other pairs do not.
        scale: what multiplies the cosines, 0-d.
    """
    logits = scale * images @ texts.T  # (b pictures, b captions)
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train(model, pool: Pool, tokenizer, args: argparse.Namespace) -> None:
    """Train in place, and leave the averaged weights in the model."""
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]  # norms, biases and the scale
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=args.learning_rate, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(100, args.steps))
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    first = resume(args, "clip", **state)
    progress = Progress("clip", args.steps, first)
    for step in range(first, args.steps):
        images, ids = pool.batch(args.color_pairs, seeds.generator(args.seed, "batch", step))
        loss = contrastive_loss(embed_images(model, images), embed_texts(model, ids), model.logit_scale.exp())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=torch.tensor(MAX_SCALE).log())
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 / min(step + 1, args.average_steps))
        progress.step({"loss": loss, "scale": model.logit_scale.exp()})
        if (step + 1) % args.evaluation_steps == 0 or step + 1 == args.steps:
            save(args, "clip", step + 1, **state)
            report(model, tokenizer, step + 1)
    for parameter, value in zip(parameters, average, strict=True):
        parameter.data.copy_(value)


# ---------------------------------------------------------------------------------------------- measuring


def wrong_captions(drawing: shapes.Drawing, rng: random.Random) -> dict[str, str]:
    """Return for each attribute the drawing's caption with that attribute alone replaced by another one."""
    result = {}
    for name, values in ATTRIBUTES.items():
        taken = {getattr(drawing, name)} if name == "shape" else {drawing.color, drawing.background}
        result[name] = replace(drawing, **{name: rng.choice([value for value in values if value not in taken])}).caption
    return result


@torch.no_grad()
def preferences(model, tokenizer, drawn: list[shapes.Drawing], images: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """Return the share of pictures (n, 3, 64, 64) for which the right caption beats one that is wrong in one attribute.

    Returns:
        The share for each attribute; "pairs", over all; "margin" and "cosine", the mean lead and the mean cosine of the right caption.
    """
    rng = random.Random(f"wrong {seed}")
    wrong = [wrong_captions(drawing, rng) for drawing in drawn]
    pictures = torch.cat([embed_images(model, chunk) for chunk in images.split(128)])

    def cosines(captions: list[str]) -> torch.Tensor:
        return (pictures * embed_texts(model, tokenize(tokenizer, captions))).sum(-1)  # (n,)

    right = cosines([drawing.caption for drawing in drawn])
    leads = {name: right - cosines([captions[name] for captions in wrong]) for name in ATTRIBUTES}
    every = torch.cat(list(leads.values()))
    result = {name: (lead > 0).float().mean().item() for name, lead in leads.items()}
    return {**result, "pairs": (every > 0).float().mean().item(), "margin": every.mean().item(), "cosine": right.mean().item()}


def held_out(model, tokenizer, n: int, vae=None, seed: int = 1) -> dict[str, dict[str, float]]:
    """Return `preferences` on `n` drawings of held-out triples: as drawn, disturbed as in training, and through the autoencoder."""
    drawn = shapes.drawings(n, seed, "held_out", shapes.ALL_SHAPES)
    images = draw_all(drawn)
    views = {"drawn": images, "disturbed": disturb(images, seeds.generator(seed, "disturb"))}
    if vae is not None:
        views["decoded"] = through_autoencoder(vae, images, seeds.generator(seed, "latents"))
    return {name: preferences(model, tokenizer, drawn, view) for name, view in views.items()}


def report(model, tokenizer, step: int) -> None:
    """Log how often the present weights prefer the right caption."""
    model.eval()
    figures = {name: f"{100 * values['pairs']:.1f} %" for name, values in held_out(model, tokenizer, REPORT_PICTURES).items()}
    logger.info("clip step %d: right caption preferred %s", step, figures)
    model.train()


def print_evaluation(path: str, vae, n: int) -> None:
    """Print the figures that models/README.md has for a model folder."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(path, local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()) / 1e6
    print(f"{count(model):,} parameters, {size:.2f} MB, scale {model.logit_scale.exp().item():.2f}")
    for name, values in held_out(model, tokenizer, n, vae).items():
        shares = ", ".join(f"{key} {100 * values[key]:.1f} %" for key in (*ATTRIBUTES, "pairs"))
        print(f"{name}: right caption preferred: {shares}; mean lead {values['margin']:.3f} of cosine {values['cosine']:.3f}")


# ---------------------------------------------------------------------------------------------- plumbing


def save_folder(model, tokenizer, folder: str) -> None:
    """Write fp16 safetensors that load as fp32 unless a `dtype` is given, with tokenizer and image processor."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    load_as_fp32(folder, "config.json")


def load_vae(path: str):
    """Return the autoencoder of a pipeline folder.

    Raises:
        ValueError: where there is none.
    """
    if not (Path(path) / "vae" / "config.json").is_file():
        raise ValueError(f"--vae_model {path}: no autoencoder there; try models/tiny-sd3")
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(path, subfolder="vae", local_files_only=True).eval()


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m src.tiny.clip",
        usage="%(prog)s [options]",
        allow_abbrev=False,
        description="Train the tiny world's text-image matching, from nothing, on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", default="models/tiny-clip", help="model folder to write")
    parser.add_argument("--checkpoint_dir", default="outputs/build-clip", help="folder of checkpoints and the log's neighbour")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --checkpoint_dir")
    parser.add_argument("--evaluate", metavar="PATH", help="only print the figures of the model folder PATH")
    parser.add_argument("--vae_model", default="models/tiny-sd3", help="pipeline folder whose autoencoder blurs half of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the drawings and what disturbs them")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--color_pairs", type=int, default=14, help="pairs of colours in a step, 56 at most, with 7 pictures each")
    parser.add_argument("--drawings", type=int, default=12000, help="captioned drawings to learn from")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--average_steps", type=int, default=100, help="optimizer steps that the saved weights are averaged over")
    parser.add_argument("--evaluation_steps", type=int, default=250, help="optimizer steps between evaluations and checkpoints")
    parser.add_argument("--evaluation_pictures", type=int, default=1000, help="held-out drawings in the final figures")
    parser.add_argument("--width", type=int, default=96, help="width of the vision transformer, a multiple of 24 (one head each)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the vision transformer")
    return parser


def main(args: argparse.Namespace) -> None:
    """Train, or evaluate with `--evaluate`."""
    vae = load_vae(args.vae_model)
    if args.evaluate:
        print_evaluation(args.evaluate, vae, args.evaluation_pictures)
        return
    from src.tiny.tokenizers import clip_tokenizer

    start_log(args)
    started = time.perf_counter()
    tokenizer = clip_tokenizer()
    torch.manual_seed(args.seed)
    model = make_model(tokenizer, args.width, args.layers).train()
    pool = make_pool(tokenizer, vae, args.drawings, args.seed)
    logger.info("clip: %d parameters, %d pictures after %.0f s", count(model), len(pool.pictures), time.perf_counter() - started)
    train(model, pool, tokenizer, args)
    save_folder(model, tokenizer, args.output_dir)
    logger.info("clip: done after %.1f minutes", (time.perf_counter() - started) / 60)
    print_evaluation(args.output_dir, vae, args.evaluation_pictures)


if __name__ == "__main__":
    main(build_parser().parse_args())
