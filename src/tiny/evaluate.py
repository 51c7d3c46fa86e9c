"""How well a tiny model follows prompts, by the verifier: `python -m src.tiny.evaluate --lora_weights_path outputs/quickstart`.

Draws held-out prompts of the known shapes and of a new one, each from a fixed seed, and reads the pictures back from their pixels; before
and after training, if a LoRA or a whole trained pipeline is given.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from torch import Tensor

from src import cli
from src.tiny import shapes

LORA_NAME = "pytorch_lora_weights.safetensors"  # what diffusers and our trainers write into a folder


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("evaluation")
    g.add_argument("--pretrained_model_name_or_path", default="models/tiny-sd3", help="tiny pipeline folder")
    g.add_argument("--lora_weights_path", type=Path, help="LoRA to measure, after the base model without it")
    g.add_argument("--trained_model", type=Path, help="pipeline folder to measure, after the base model")
    g.add_argument("--new_shape", choices=(*shapes.NEW_SHAPES, "none"), default="heart", help="the shape that the base model does not know")
    g.add_argument("--num_prompts", type=cli.positive_int, default=64, help="held-out prompts of the new and as many of the known shapes")
    g.add_argument("--num_inference_steps", type=cli.positive_int, default=20, help="denoising steps")
    g.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance weight; 1 turns it off")
    g.add_argument("--output", type=Path, help="also write the figures there, as JSON")
    return parser


def held_out_score(pipeline, prompts: list[str], *, num_inference_steps: int, guidance_scale: float) -> tuple[float, Tensor]:
    """Share of prompts whose picture shows the right shape, colour and background; and the pictures (n, 3, H, W) in [0, 1].

    Prompt i is drawn from seed i, in batches of 64, so that two models are compared on the same noise.
    """
    rendered, t5 = [], getattr(pipeline, "tokenizer_3", None)
    options = {"max_sequence_length": t5.model_max_length} if t5 else {}  # SD3 alone has one
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        rendered.append(pipeline(
            prompt=part, generator=[torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))], output_type="pt",
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **options,
        ).images.float())
    pictures = torch.cat(rendered)
    return shapes.correct(shapes.verify(pictures), prompts).float().mean().item(), pictures


def check(args: argparse.Namespace) -> None:
    """Refuse what is not there, before anything heavy is imported.

    Raises:
        ValueError: naming the flag.
    """
    if not (Path(args.pretrained_model_name_or_path) / "model_index.json").is_file():
        raise ValueError(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: no pipeline there; try models/tiny-sd3")
    if args.trained_model and not (args.trained_model / "model_index.json").is_file():
        raise ValueError(f"--trained_model {args.trained_model}: no pipeline there; give the output folder of a full fine-tuning run")
    if args.trained_model and args.lora_weights_path:
        raise ValueError("--trained_model contradicts --lora_weights_path: there is one figure after training; give one of them")
    lora = args.lora_weights_path
    if lora and not (lora / LORA_NAME if lora.is_dir() else lora).is_file():
        raise ValueError(f"--lora_weights_path {lora}: no {LORA_NAME} there; give a run's output folder or a .safetensors file")
    if args.output:
        cli.check_writable(args.output.parent, "output")


def main(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports, and which reports on kernels nobody asked for
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = {"known shapes": shapes.held_out_prompts(args.num_prompts)}
    if args.new_shape != "none":
        new = shapes.held_out_prompts(args.num_prompts, shapes=(args.new_shape,))
        prompts = {f"new shape ({args.new_shape})": new} | prompts
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    figures = {name: {"before": held_out_score(pipeline, texts, **options)[0]} for name, texts in prompts.items()}
    if args.lora_weights_path:
        lora = args.lora_weights_path  # the file by its name: a folder may hold kohya's besides
        file = lora / LORA_NAME if lora.is_dir() else lora
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    elif args.trained_model:
        pipeline = DiffusionPipeline.from_pretrained(args.trained_model, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
    if args.lora_weights_path or args.trained_model:
        for name, texts in prompts.items():
            figures[name]["after"] = held_out_score(pipeline, texts, **options)[0]
    for name, values in figures.items():
        line = " -> ".join(f"{values[key]:.0%}" for key in ("before", "after") if key in values)
        print(f"{name}: {line} of {args.num_prompts} held-out prompts drawn wholly right (shape, colour, background)")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
