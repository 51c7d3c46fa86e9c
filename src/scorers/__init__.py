"""Rewards for pictures behind one interface: `build("pickscore=1.0,aesthetic=0.5")`, then `mixture(images, prompts) -> Scores`.

To add a scorer: a file beside this one that defines `SCORERS`, a tuple of `base.Scorer`, and one line in FILES.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from src.scorers.base import Loader, Option, Scorer, Scores, Weights

if TYPE_CHECKING:
    import torch

    from src.scorers.mixture import Mixture

__all__ = [
    "FILES", "Loader", "Option", "Scorer", "Scores", "Weights", "build", "check", "check_prompts", "get", "names", "parse",
]  # fmt: skip

FILES: dict[str, tuple[str, ...]] = {  # file -> the scorers that it declares
    "aesthetic": ("aesthetic",),
    "aesthetic_v1": ("aesthetic_v1",),
    "aesthetic_v25": ("aesthetic_v25",),
    "clip": ("clip",),
    "openclip": ("openclip",),
    "pickscore": ("pickscore",),
    "hps": ("hps",),
    "image_reward": ("image_reward",),
    "jpeg": ("jpeg_compressibility", "jpeg_incompressibility"),
    "ocr": ("ocr",),
    "shapes": ("shapes", "shapes_strict"),
    "tiny_clip": ("tiny_clip",),
    "vlm_judge": ("vlm_judge",),
    "geneval": ("geneval", "geneval_strict"),
}


def names() -> list[str]:
    """Every scorer's name, in the order of FILES."""
    return [name for declared in FILES.values() for name in declared]


def get(name: str) -> Scorer:
    """The declaration of a scorer; imports its file alone.

    Raises:
        ValueError: there is none of that name.
    """
    for file, declared in FILES.items():
        if name in declared:
            return next(scorer for scorer in import_module(f"src.scorers.{file}").SCORERS if scorer.name == name)
    near = difflib.get_close_matches(name, names(), n=2, cutoff=0.5)
    raise ValueError(f"unknown scorer {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names())}"))


def parse(spec: str) -> dict[str, float]:
    """ "pickscore=1.0,aesthetic" -> {"pickscore": 1.0, "aesthetic": 1.0}: names and their weights, which may be negative.

    Raises:
        ValueError: no name, an unknown one, one twice, or a weight that is not a number or is 0.
    """
    weights: dict[str, float] = {}
    for part in spec.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not name:
            raise ValueError(f"{spec!r} lacks a name; write NAME=WEIGHT,NAME=WEIGHT")
        get(name)
        if name in weights:
            raise ValueError(f"{name} stands twice in {spec!r}; add the weights up")
        try:
            weights[name] = float(text) if equals else 1.0
        except ValueError:
            raise ValueError(f"the weight of {name} must be a number, got {text!r}") from None
        if not math.isfinite(weights[name]) or weights[name] == 0:
            raise ValueError(f"the weight of {name} must be finite and not 0, got {text}")
    return weights


def check(spec: str, differentiable: bool = False, *, flag: str = "--scorer", weights: bool = True, **options: Any) -> None:
    """Refuse a mixture that could not be built, before anything heavy is imported.

    Args:
        spec: names and weights, as `parse` takes them.
        differentiable: the caller needs a gradient.
        flag: what the message calls the spec. weights: refuse missing ones.
        options: settings by name, None meaning unset. Those of scorers outside the spec are ignored, so that one set of flags
            serves several mixtures.

    Raises:
        ValueError: in one line, naming the scorer and the cure.
    """
    try:
        parts = parse(spec)
        _check_options([name for name, value in options.items() if value is not None])
        for name in parts:
            scorer = get(name)
            if differentiable and not scorer.differentiable:
                raise ValueError(f"{name} has no gradient; leave it out, or use one of {', '.join(_differentiable())}")
            if reason := scorer.trouble(options, weights=weights):
                raise ValueError(reason if spec == name else f"{name}: {reason}")
    except ValueError as error:
        raise ValueError(f"{flag} {spec}: {error}") from None


def _differentiable() -> list[str]:
    return [name for name in names() if get(name).differentiable]


def _check_options(given: Sequence[str]) -> None:
    declared = {option.name for name in names() for option in get(name).options} if given else set()
    for name in given:
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(declared))}"
            raise ValueError(f"no scorer has an option {name}; {hint}")


def check_prompts(spec: str, prompts: Sequence[str], metadata: Sequence[dict] | None = None, names: Sequence[str] | None = None) -> None:
    """Refuse prompts that a scorer of the mixture could not judge.

    Args:
        names: what the message calls each prompt (None: its number).

    Raises:
        ValueError: naming the scorer, the first such prompt, and the reason.
    """
    for name in parse(spec):
        scorer = get(name)
        for index, prompt in enumerate(prompts):
            if reason := scorer.check_prompt(prompt, metadata[index] if metadata is not None else None):
                raise ValueError(f"{name} cannot judge {names[index] if names else f'prompt {index}'} {prompt!r}: {reason}")


def build(spec: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, batch_size: int = 16, **options: Any) -> Mixture:
    """Load the scorers of a mixture, frozen, on one device; networks that they share are loaded once.

    Args:
        spec: names and weights, as `parse` takes them.
        dtype: of the weights of large networks (None: fp32); scores are fp32 always.
        batch_size: most pictures judged at once; bounds the memory.
        options: settings by name, as `check` takes them.

    Raises:
        ValueError: what `check` refuses, and weights of another model than the scorer's.
    """
    check(spec, flag="scorers.build", **options)
    if batch_size < 1:
        raise ValueError(f"scorers.build {spec}: batch_size must be at least 1, got {batch_size}")
    import torch

    from src.scorers.mixture import Mixture, Part

    weights, loaded = parse(spec), {}
    parts = []
    for name, weight in weights.items():
        scorer = get(name)
        loader = Loader(torch.device(device), dtype or torch.float32, scorer.settings(options), loaded)
        parts.append(Part(scorer, weight, scorer.load(loader)))
    return Mixture(tuple(parts), torch.device(device), batch_size)
