"""Files of the demo: pictures with their settings and scores inside, and a sheet of them."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from src import images
from src.scorers.mixture import means

PROMPTS, SEEDS, CELL = 24, 8, 512  # limits of the sheet: prompts, seeds per prompt, pixels of a side


@dataclass(frozen=True)
class Job:
    """One picture to draw: its number, the prompt and seed, which with the settings determine it, and what scorers know of the prompt."""

    index: int
    prompt: str
    seed: int
    metadata: dict[str, Any] = field(default_factory=dict)


def next_index(folder: Path) -> int:
    """One more than the highest number of the pictures in a folder; 0 in an empty one, or in none."""
    numbers = (re.match(r"(\d{3,})-", path.name) for path in folder.glob("*.png"))  # a user's own 100dogs-x.png has none
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def file_name(index: int, prompt: str, seed: int, suffix: str = "") -> str:
    """`003-a-red-star-seed7.png`: safe on every file system whatever the prompt holds."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", prompt.lower()) if not unicodedata.combining(c))  # schöner -> schoner
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].rstrip("-")
    return f"{index:03d}-{words or 'picture'}-seed{seed}{suffix}.png"


def score_suffix(scores: Mapping[str, float]) -> str:
    """`-aesthetic5.43-clip0.281` for the parts of a mixture; nothing for no scores."""
    return "".join(f"-{name}{value:.3g}" for name, value in scores.items() if name != "total")


def blacked_out(output: Any) -> list[bool]:
    """For each picture of a pipeline's output: whether the model's safety checker made it black; False without a checker."""
    return [bool(hit) for hit in getattr(output, "nsfw_content_detected", None) or [False] * len(output.images)]


def safety_note(names: Sequence[str], count: int, *, scored: bool) -> str:
    """One line on the blacked-out pictures among `count`, with their file names; scored: whether pictures are judged."""
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    effect = ", which are not scored" if scored else ""
    return f"note: the model's safety checker blacked out {len(names)} of {count} picture(s){effect}: {listed}"


def parameters(prompt: str, seed: int, settings: Mapping[str, Any]) -> str:
    """Prompt and settings in the three lines that other programs read."""
    numbers = {"Steps": settings["num_inference_steps"], "CFG scale": f"{settings['guidance_scale']:g}", "Seed": seed,
               "Size": f"{settings['width']}x{settings['height']}",
               "Model": Path(settings["pretrained_model_name_or_path"]).name}  # fmt: skip
    last = ", ".join(f"{name}: {value}" for name, value in numbers.items())
    return f"{prompt}\nNegative prompt: {settings['negative_prompt']}\n{last}"


def save(picture: Image.Image, path: Path, prompt: str, seed: int, settings: Mapping[str, Any], scores: Mapping[str, float]) -> None:
    """PNG with `prompt`, `seed` and `settings` (JSON), which reproduce it, `scores` (JSON), and `parameters` for other programs."""
    texts = {"seed": str(seed), "settings": json.dumps(settings), "parameters": parameters(prompt, seed, settings)}
    if scores:
        texts["scores"] = json.dumps({name: value if math.isfinite(value) else None for name, value in scores.items()})
    images.save(picture, path, prompt, **texts)


def wins(base: Sequence[Mapping[str, float]], tuned: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, int]]:
    """For each scorer, of pairs of one prompt and seed: how often `tuned` scores higher, half for a tie, and of how many pairs.

    A pair counts if both of its scores are finite.
    """
    pairs = {name: [(one[name], other[name]) for one, other in zip(base, tuned, strict=True)] for name in (base[0] if base else ())}
    judged = {name: [pair for pair in found if all(map(math.isfinite, pair))] for name, found in pairs.items()}
    return {name: (sum((b < t) + (b == t) / 2 for b, t in found), len(found)) for name, found in judged.items()}


def report(verdicts: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Lines on the scores of each column's pictures: the means, and where there are two columns who wins."""
    lines = [f"{column}: mean {name} {mean:.4f} over {count} picture(s)"
             for column, scores in verdicts.items() for name, (mean, count) in means(scores).items()]  # fmt: skip
    if len(verdicts) > 1:
        lines += [f"tuned wins {won:g} of {count} by {name}" for name, (won, count) in wins(**verdicts).items()]
    return lines


def sheet(
    cells: Mapping[tuple[str, int], tuple[Image.Image, Mapping[str, float]]], prompts: Sequence[str], columns: Sequence[str],
    seeds: Sequence[int],
) -> Image.Image:  # fmt: skip
    """One row per prompt; in it, seed by seed, one picture of each column, with its scores below.

    Args:
        cells: (column, number of the picture) -> picture and scores; picture n of prompt p has number p * len(seeds) + n.
    """
    shown, count = prompts[:PROMPTS], len(seeds)
    order = [(column, n) for n in range(min(count, SEEDS)) for column in columns]
    ordered = [cells[column, row * count + n] for row in range(len(shown)) for column, n in order]
    parts = [[column] * (len(columns) > 1) + [f"seed {seeds[n]}"] * (count > 1) for column, n in order]
    names = [", ".join(part) for part in parts] if any(parts) else None
    labels = [" ".join(f"{name} {value:.3g}" for name, value in scores.items() if name != "total") for _, scores in ordered]
    return images.grid(
        [picture for picture, _ in ordered], columns=len(order), row_labels=shown, column_labels=names,
        labels=labels if any(labels) else None,
    )  # fmt: skip
