"""How well a tiny model follows prompts, by the verifier: `python -m src.tiny.evaluate --lora_weights_path outputs/quickstart`.

Draws held-out prompts of the known shapes and of a new one, each from a fixed seed, and reads shape and colours back from the pixels; with
a LoRA or a trained pipeline, before and after training.
With --subject, a DreamBooth subject takes the place of the new shape, drawn from prompts with its word; the known shapes are its class:

    python -m src.tiny.evaluate --lora_weights_path outputs/tiny_dreambooth_sd3 --subject purple
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from src import cli
from src.tiny import shapes

LORA_NAME = "pytorch_lora_weights.safetensors"  # what diffusers and our trainers write into a folder
SUBJECT_IMAGES = 32  # of a DreamBooth's subject, unless --num_subject_images says another number


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("evaluation")
    g.add_argument("--pretrained_model_name_or_path", type=cli.path_or_name, default="models/tiny-sd3", help="tiny pipeline folder")
    g.add_argument("--lora_weights_path", type=cli.path, help="LoRA to measure, after the base model without it")
    g.add_argument("--trained_model", type=cli.path, help="pipeline folder to measure, after the base model")
    g.add_argument("--new_shape", choices=(*shapes.NEW_SHAPES, "none"), default="heart", help="the shape that the base model does not know")
    g.add_argument(
        "--subject",
        choices=shapes.COLORS,
        metavar="COLOUR",
        help=f"measure prompts with {shapes.SUBJECT_WORD} instead: how many show the new shape in this colour",
    )
    g.add_argument("--num_subject_images", type=cli.positive_int, default=SUBJECT_IMAGES, help="pictures of the subject")
    g.add_argument("--num_prompts", type=cli.positive_int, default=128, help="held-out prompts of the new and as many of the known shapes")
    g.add_argument("--min_margin", type=cli.fraction, default=0.0,
                   help="overlap by which a shape has to lead every other one; at 0.03 a blob between two shapes is neither")  # fmt: skip
    g.add_argument("--num_inference_steps", type=cli.positive_int, default=20, help="denoising steps")
    g.add_argument("--guidance_scale", type=cli.number, default=2.0, help="classifier-free guidance weight; 1 turns it off")
    g.add_argument("--scheduler", choices=cli.SAMPLERS, help="sampler of a noise-prediction model (unset: the model's own)")
    g.add_argument("--output", type=cli.path, help="also write the figures there, as JSON")
    return parser


def draw(
    pipeline,
    prompts: list[str],
    seeds: Sequence[int] | None = None,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 64,
) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1]. Prompt i is drawn from seed i unless others are given: two models are compared on the same noise."""
    rendered, t5, seeds = [], getattr(pipeline, "tokenizer_3", None), seeds or range(len(prompts))
    options = {"max_sequence_length": t5.model_max_length} if t5 else {}  # SD3 alone has one
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]]
        drawn = pipeline(prompt=prompts[rows], generator=generators, output_type="pt", num_inference_steps=num_inference_steps,
                         guidance_scale=guidance_scale, **options)  # fmt: skip
        rendered.append(drawn.images.float())
    return torch.cat(rendered)


def held_out_score(pipeline, prompts: list[str], *, min_margin: float = 0.0, **options) -> tuple[float, Tensor]:
    """Share of prompts whose picture shows the right shape, colour and background; and the pictures (n, 3, H, W) in [0, 1]."""
    pictures = draw(pipeline, prompts, **options)
    return shapes.correct(shapes.verify(pictures, min_margin), prompts).float().mean().item(), pictures


def subject_prompts(count: int, color: str) -> list[str]:
    """Prompts with the subject's word, on every background but the subject's own colour in turn."""
    backgrounds = [name for name in shapes.COLORS if name != color]
    return [shapes.subject_prompt(backgrounds[i % len(backgrounds)]) for i in range(count)]


def subject_score(pipeline, count: int, *, shape: str, color: str, min_margin: float = 0.0, **options) -> tuple[float, Tensor]:
    """Share of `count` pictures from prompts with the subject's word that show it, on any background; and the pictures."""
    pictures = draw(pipeline, subject_prompts(count, color), **options)
    shown = [reading.shape == shape and reading.color == color for reading in shapes.verify(pictures, min_margin)]
    return sum(shown) / count, pictures


def measures(args: argparse.Namespace) -> dict[str, tuple[Callable[..., float], str]]:
    """The measures by name: a function of the pipeline that returns a share, and a description of that share."""
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale, "min_margin": args.min_margin}

    def held_out(*known: str) -> Callable[..., float]:
        prompts = shapes.held_out_prompts(args.num_prompts, shapes=known)
        return lambda pipeline: held_out_score(pipeline, prompts, **options)[0]

    of = f"of {args.num_prompts} held-out prompts drawn wholly right (shape, colour, background)"
    if not args.subject:
        new = {} if args.new_shape == "none" else {f"new shape ({args.new_shape})": (held_out(args.new_shape), of)}
        return new | {"known shapes": (held_out(*shapes.SHAPES), of)}
    look = {"shape": args.new_shape, "color": args.subject}
    return {
        f"subject ({args.subject} {args.new_shape})": (
            lambda pipeline: subject_score(pipeline, args.num_subject_images, **look, **options)[0],
            f"of {args.num_subject_images} pictures from prompts with {shapes.SUBJECT_WORD} show it",
        ),
        f"class (without {shapes.SUBJECT_WORD})": (held_out(*shapes.SHAPES), of),
    }


def check(args: argparse.Namespace) -> None:
    """Refuse missing files and contradictory flags, before anything heavy is imported.

    Raises:
        ValueError: naming the flag.
    """
    if not (Path(args.pretrained_model_name_or_path) / "model_index.json").is_file():
        raise ValueError(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: no pipeline there; try models/tiny-sd3")
    if args.scheduler and not Path(args.pretrained_model_name_or_path, "unet").is_dir():
        raise ValueError(f"--scheduler {args.scheduler} is for a UNet that predicts noise, as models/tiny-sd15: leave it out")
    if args.trained_model and not (args.trained_model / "model_index.json").is_file():
        raise ValueError(f"--trained_model {args.trained_model}: no pipeline there; give the output folder of a full fine-tuning run")
    if args.trained_model and args.lora_weights_path:
        raise ValueError("--trained_model contradicts --lora_weights_path: there is one figure after training; give one of them")
    lora = args.lora_weights_path
    if lora and not (lora / LORA_NAME if lora.is_dir() else lora).is_file():
        raise ValueError(f"--lora_weights_path {lora}: no {LORA_NAME} there; give a run's output folder or a .safetensors file")
    if not args.subject and args.num_subject_images != SUBJECT_IMAGES:
        raise ValueError(f"--num_subject_images {args.num_subject_images} has no effect without --subject")
    if args.subject and args.new_shape == "none":
        raise ValueError("--subject needs a shape that the base model does not know: leave out --new_shape none")
    if args.output:
        cli.check_writable(args.output.parent, "output")


def load(folder: str | Path, lora: Path | None = None, *, scheduler: str | None = None):
    """The stock pipeline of a folder in fp32, with a LoRA (its file, or the folder that holds it) if one is given; nothing is printed.

    Args:
        scheduler: diffusers class to use instead of the model's own, with the same configuration.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft; it reports on kernels that are not used here
    import diffusers
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    if lora:  # by file name: a folder may also hold kohya's file
        file = lora / LORA_NAME if lora.is_dir() else lora
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return pipeline


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    pipeline = load(args.pretrained_model_name_or_path, scheduler=args.scheduler)
    scores = measures(args)
    figures = {name: {"before": score(pipeline)} for name, (score, _) in scores.items()}
    if args.lora_weights_path or args.trained_model:
        pipeline = load(args.trained_model or args.pretrained_model_name_or_path, args.lora_weights_path, scheduler=args.scheduler)
        for name, (score, _) in scores.items():
            figures[name]["after"] = score(pipeline)
    for name, values in figures.items():
        print(f"{name}: " + " -> ".join(f"{values[key]:.0%}" for key in ("before", "after") if key in values) + f" {scores[name][1]}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
