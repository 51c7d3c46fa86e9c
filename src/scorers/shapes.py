"""The tiny world's verifier as a reward: shape, colour and background read from the pixels, without any network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from src.scorers.base import Loader, Scorer, some_prompt
from src.tiny import shapes

if TYPE_CHECKING:
    from src.scorers.base import Judge


def target(prompt: str, metadata: dict | None) -> str:
    """The caption to verify: metadata's "caption" where there is one, so that the prompt may use other words."""
    return (metadata or {}).get("caption", prompt)


def check_prompt(prompt: str, metadata: dict | None) -> str | None:
    """Why there is nothing to verify, or None."""
    caption = target(prompt, metadata)
    if not isinstance(caption, str):
        return f'the metadata\'s "caption" must be a text, got {caption!r}'
    if reason := some_prompt(caption, metadata):
        return reason
    reading = shapes.read_caption(caption)
    if reading == shapes.Reading(None, None, None):
        return (f"it names no shape ({', '.join(shapes.ALL_SHAPES)}) and no colour ({', '.join(shapes.COLORS)}); "
                'write for example "a red circle on a blue background"')  # fmt: skip
    return None


def credit(images: Tensor, prompts: list[str], metadata: list[dict] | None) -> Tensor:
    """The share of the requested shape, colour and background that each picture (b, 3, H, W) shows: (b,) float32 in [0, 1].

    Attributes that a prompt does not mention do not count.

    Raises:
        ValueError: naming a prompt that mentions none of them.
    """
    captions = [target(prompt, one) for prompt, one in zip(prompts, metadata or [None] * len(prompts), strict=True)]
    return shapes.partial_credit(shapes.verify(images), captions).to(images.device)


def _load(loader: Loader) -> Judge:
    return credit


def _load_strict(loader: Loader) -> Judge:
    return lambda images, prompts, metadata: (credit(images, prompts, metadata) == 1).float()


SCORERS = (
    Scorer(
        name="shapes", summary="tiny world: the share of shape, colour and background that is as the prompt says",
        differentiable=False, range=(0.0, 1.0), normalizer=1.0, licence="Apache-2.0: code of this project", load=_load,
        check_prompt=check_prompt,
    ),
    Scorer(
        name="shapes_strict", summary="tiny world: 1 where shape, colour and background are all as the prompt says, else 0",
        differentiable=False, range=(0.0, 1.0), normalizer=1.0, licence="Apache-2.0: code of this project", load=_load_strict,
        check_prompt=check_prompt,
    ),
)  # fmt: skip
