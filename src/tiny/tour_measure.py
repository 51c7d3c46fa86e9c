"""Measure one stop of the tour: draw held-out prompts by the base model and by the trained one, from the same seeds, and judge them.

    python -m src.tiny.tour_measure lora --run outputs/tour/lora --before outputs/tour/before

The figures go to measures.json in the run's folder, the first pictures of both models to shown/ beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import cli, images, scorers
from src.tiny import evaluate, shapes
from src.tiny.tour import TRAINERS
from src.tiny.tour_report import STRICT

NEW_SHAPE, SUBJECT = "heart", ("purple", "heart")  # of datas/shapes-new and datas/subject
SHOWN = 4  # prompts of each trainer in the picture
BATCH = 64  # pictures judged at once


@dataclass(frozen=True)
class Series:
    """Prompts that are drawn by both models, picture i from the noise of seed i, and the scorers of the pictures."""

    title: str
    prompts: tuple[str, ...]
    guidance_scale: float
    scorers: tuple[str, ...] = (STRICT,)
    asked: tuple[str, ...] | None = None  # what the verifier looks for, where a prompt does not say it


def series_of(trainer: str, args: dict[str, Any], count: int) -> list[Series]:
    """The series that a trainer is measured by; the first is its main purpose.

    Args:
        args: the run's args.json: a run on a reward is measured by that reward, too, with the guidance of its own evaluations.
        count: prompts of each series.
    """

    def held_out(title: str, *known: str, guidance_scale: float = 2.0, judges: tuple[str, ...] = (STRICT,)) -> Series:
        return Series(title, tuple(shapes.held_out_prompts(count, shapes=known)), guidance_scale, judges)

    if trainer in ("lora", "full"):
        return [held_out(f"{NEW_SHAPE}s, new to the model", NEW_SHAPE), held_out("known shapes", *shapes.SHAPES)]
    if trainer == "dreambooth":
        color, shape = SUBJECT
        prompts = tuple(evaluate.subject_prompts(count, color))
        subject = Series(f"the subject, a {color} {shape}", prompts, 2.0, asked=(f"a {color} {shape}",) * count)
        return [subject, held_out("its class, other shapes", *shapes.SHAPES)]
    if trainer == "dpo":  # unguided, as half of its pairs are drawn
        return [held_out("known shapes", *shapes.SHAPES, guidance_scale=1.0)]
    judges = tuple(dict.fromkeys([*scorers.parse(args["scorer"]), STRICT]))
    return [held_out("known shapes", *shapes.SHAPES, guidance_scale=args["eval_guidance_scale"], judges=judges)]


# --------------------------------------------------------------------------- pictures


def draw(pipeline, series: Series, steps: int) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1], in the 256 levels of a picture file."""
    drawn = evaluate.draw(pipeline, list(series.prompts), num_inference_steps=steps, guidance_scale=series.guidance_scale)
    return (drawn.clamp(0, 1) * 255).round() / 255


def fingerprint(model: Path) -> str:
    """A short hash of all weights and settings of a pipeline folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(model)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class Before:
    """Pictures of the base models, drawn once for each model, series and number of steps, and kept in a folder."""

    def __init__(self, folder: Path, model: Path, steps: int):
        self.folder, self.model, self.steps = folder, model, steps
        self.weights = fingerprint(model)
        self.pipeline = None

    def draw(self, series: Series) -> Tensor:
        """As `draw`, from the disk if drawn before; the model is loaded when it is first needed."""
        settings = json.dumps([self.weights, series.prompts, series.guidance_scale, self.steps])
        file = self.folder / f"{self.model.name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.pt"
        if file.is_file():
            return torch.load(file, weights_only=True).float() / 255
        self.pipeline = self.pipeline or evaluate.load(self.model)
        pictures = draw(self.pipeline, series, self.steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save((pictures * 255).round().to(torch.uint8), file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)  # a kill leaves no partial file under this name
        return pictures


# --------------------------------------------------------------------------- verdicts


def judge(series: Series, pictures: Tensor) -> dict[str, Tensor]:
    """Verdicts (n,) of each scorer of the series on its pictures (n, 3, H, W)."""
    asked = None if series.asked is None else [{"caption": caption} for caption in series.asked]
    judged = {name: scorers.build(name, batch_size=BATCH)(pictures, series.prompts, asked) for name in series.scorers}
    return {name: scores.parts[name] for name, scores in judged.items()}


def mean(verdicts: Tensor) -> float | None:
    """Mean over the pictures that could be judged; None if there is none."""
    value = verdicts.nanmean().item()
    return value if math.isfinite(value) else None


def shares(count: int) -> list[int]:
    """How many pictures each of `count` series shows, SHOWN in all: each but the first shows one, to tell what was lost."""
    return [SHOWN] if count == 1 else [SHOWN - count + 1] + [1] * (count - 1)


def show(folder: Path, series: list[Series], pictures: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Writes the first pictures of each series, before and after, as PNGs; returns their prompts, seeds, files and verdicts."""
    folder.mkdir(exist_ok=True)
    shown = []
    for one, both, share in zip(series, pictures, shares(len(series)), strict=True):
        right = [judge(Series(one.title, one.prompts[:share], one.guidance_scale, asked=one.asked and one.asked[:share]), part[:share])
                 for part in both]  # fmt: skip
        for i in range(min(share, len(one.prompts))):
            entry: dict[str, Any] = {"prompt": one.prompts[i], "seed": i}
            for when, part, verdicts in zip(("before", "after"), both, right, strict=True):
                name = f"{len(shown)}-{when}.png"
                images.to_pil(part[i : i + 1])[0].save(folder / name)
                entry[when] = {"file": f"{folder.name}/{name}", "right": bool(verdicts[STRICT][i])}
            shown.append(entry)
    return shown


# --------------------------------------------------------------------------- what was trained


def trained(run: Path, args: dict[str, Any]) -> dict[str, Any]:
    """Kind and number of the weights that a run changed, its optimizer steps and its peak memory."""
    from safetensors import safe_open

    lora = run / evaluate.LORA_NAME
    files = [lora] if lora.is_file() else [*run.glob("transformer/*.safetensors"), *run.glob("unet/*.safetensors")]
    parameters = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name != "pos_embed.pos_embed"]  # a fixed table of sines
            parameters += sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "kind": "LoRA" if lora.is_file() else "all weights", "model": Path(args["pretrained_model_name_or_path"]).name,
        "parameters": parameters, "steps": max(line["step"] for line in lines),
        "memory_gb": max(line["memory_gb"] for line in lines if "memory_gb" in line),
    }  # fmt: skip


# --------------------------------------------------------------------------- the program


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    parser.prog = "python -m src.tiny.tour_measure"
    parser.usage = "%(prog)s TRAINER --run PATH --before PATH [options]"
    g = parser.add_argument_group("measuring")
    g.add_argument("trainer", choices=TRAINERS, metavar="TRAINER", help=f"what made the run: {', '.join(TRAINERS)}")
    g.add_argument("--run", type=cli.path, required=True, help="a finished run's output folder")
    g.add_argument("--before", type=cli.path, required=True, help="folder where the base models' pictures are kept")
    g.add_argument("--num_prompts", type=cli.positive_int, default=128, help="held-out prompts of each series")
    g.add_argument("--num_inference_steps", type=cli.positive_int, default=20, help="denoising steps")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse a run that is not there or not finished.

    Raises:
        ValueError: naming the flag.
    """
    for name in ("args.json", "metrics.jsonl", "README.md"):  # the last is what a run writes at its end
        if not (args.run / name).is_file():
            raise ValueError(f"--run {args.run}: no {name} there; give the output folder of a finished run")


def main(args: argparse.Namespace) -> dict[str, Any]:
    flags = json.loads((args.run / "args.json").read_text(encoding="utf-8"))
    base = Path(flags["pretrained_model_name_or_path"])
    series = series_of(args.trainer, flags, args.num_prompts)
    before = Before(args.before, base, args.num_inference_steps)
    first = [before.draw(one) for one in series]
    lora = (args.run / evaluate.LORA_NAME).is_file()
    tuned = evaluate.load(base, args.run) if lora else evaluate.load(args.run)
    pictures = [(old, draw(tuned, one, args.num_inference_steps)) for old, one in zip(first, series, strict=True)]
    figures = []
    for one, both in zip(series, pictures, strict=True):
        old, new = (judge(one, part) for part in both)
        figures += [{"title": one.title, "scorer": name, "guidance_scale": one.guidance_scale, "count": len(one.prompts),
                     "before": mean(old[name]), "after": mean(new[name])} for name in one.scorers]  # fmt: skip
    found = {"trained": trained(args.run, flags), "measures": figures, "shown": show(args.run / "shown", series, pictures)}
    (args.run / "measures.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for figure in figures:
        print(f"{figure['title']}, {figure['scorer']}: {figure['before']} -> {figure['after']}")
    return found


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
