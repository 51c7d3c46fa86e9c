"""Several scorers as one: checks the pictures, judges them in batches, adds the verdicts up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.images import from_pil
from src.scorers.base import Scorer, Scores

if TYPE_CHECKING:
    from PIL import Image

    from src.scorers.base import Judge

_ROUNDING = 1e-3  # how far outside [0, 1] a picture may reach, since rounding of values near 1 is no mistake of units


@dataclass(frozen=True)
class Part:
    """A loaded scorer and its weight in the sum."""

    scorer: Scorer
    weight: float
    judge: Judge


@dataclass(frozen=True)
class Mixture:
    """Loaded scorers that judge together.

    Attributes:
        parts: in the order of the spec.
        device: where the networks lie; pictures may come from any device, and their scores go back to it.
        batch_size: the most pictures judged at once.
    """

    parts: tuple[Part, ...]
    device: torch.device
    batch_size: int

    @property
    def names(self) -> list[str]:
        """Of the parts, in the order of the spec."""
        return [part.scorer.name for part in self.parts]

    @property
    def differentiable(self) -> bool:
        """Whether a gradient reaches the pictures from every part."""
        return all(part.scorer.differentiable for part in self.parts)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Scores:
        """Judge b pictures.

        Args:
            images: (b, 3, H, W) in [0, 1], any floating dtype and device. If they require a gradient, so do the scores.
            prompts: what each was to show.
            metadata: what else is known of each prompt, for the scorers that read it.

        Raises:
            ValueError: pictures outside the contract, another number of prompts, or a gradient through a part that has none.
        """
        check_images(images)
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list with one text for each picture, got one text")
        prompts, metadata = list(prompts), None if metadata is None else list(metadata)
        for what, given in (("prompts", prompts), ("metadata", metadata)):
            if given is not None and len(given) != len(images):
                raise ValueError(f"{len(images)} picture(s) but {len(given)} {what}; give one for each picture")
        wants_gradient = images.requires_grad and torch.is_grad_enabled()
        if wants_gradient and not self.differentiable:
            flat = [part.scorer.name for part in self.parts if not part.scorer.differentiable]
            raise ValueError(f"no gradient flows through {', '.join(flat)}; detach the pictures, or take it out of --scorer")
        with torch.set_grad_enabled(wants_gradient):
            parts = {part.scorer.name: self._judge(part, images, prompts, metadata) for part in self.parts}
            total = sum(part.weight / part.scorer.normalizer * parts[part.scorer.name] for part in self.parts)
        return Scores(total, parts)

    def _judge(self, part: Part, images: Tensor, prompts: list[str], metadata: list[dict] | None) -> Tensor:
        """One part's verdicts (b,) float32 on the pictures' device, `batch_size` pictures at a time."""

        def judge(batch: Tensor, start: int) -> Tensor:
            span = slice(start, start + len(batch))
            with torch.autocast(self.device.type, enabled=False):  # each scorer sets its own precision
                return part.judge(batch.to(self.device, torch.float32), prompts[span], None if metadata is None else metadata[span])

        verdicts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            if torch.is_grad_enabled() and len(images) > self.batch_size:  # else the activations of all batches would be saved for backward
                verdict = checkpoint(judge, batch, start, use_reentrant=False, preserve_rng_state=False)
            else:
                verdict = judge(batch, start)
            assert verdict.shape == (len(batch),), f"{part.scorer.name} gave {tuple(verdict.shape)} for {len(batch)} picture(s)"
            # beside other parts it would train nothing, and nobody would see it
            assert verdict.requires_grad or not torch.is_grad_enabled(), (
                f"{part.scorer.name} is declared differentiable, but its judge cuts the gradient: by torch.no_grad, detach or rounding?"
            )
            verdicts.append(verdict.to(images.device, torch.float32))
        scores = torch.cat(verdicts) if verdicts else images.new_zeros(0, dtype=torch.float32)  # (b,)
        if part.scorer.differentiable and not torch.isfinite(scores).all():
            raise ValueError(f"{part.scorer.name} gave NaN or infinity for a sound picture; try fp32, or download its weights again")
        return scores


def score_pictures(
    mixture: Mixture, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[dict] | None = None,
    *, hidden: Sequence[bool] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Scores of RGB pictures of any sizes, equal sizes judged together: for each picture its parts by name, then "total".

    Args:
        hidden: for each picture whether it was replaced by something else and cannot be judged: its scores are NaN.
    """
    tensors = {number: from_pil(picture) for number, picture in enumerate(pictures) if not (hidden and hidden[number])}
    results = [dict.fromkeys([*mixture.names, "total"], math.nan) for _ in pictures]
    for size in {tensor.shape for tensor in tensors.values()}:
        same = [number for number, tensor in tensors.items() if tensor.shape == size]
        known = None if metadata is None else [metadata[number] for number in same]
        scores = mixture(torch.stack([tensors[number] for number in same]), [prompts[number] for number in same], known)
        for name, column in {**scores.parts, "total": scores.total}.items():
            for number, value in zip(same, column.tolist(), strict=True):
                results[number][name] = value
    return results


def means(results: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, int]]:
    """For each name in results of `score_pictures`: the mean over the pictures that could be judged (NaN: none), and their number."""
    finite = {name: [scores[name] for scores in results if math.isfinite(scores[name])] for name in (results[0] if results else {})}
    return {name: (sum(values) / len(values) if values else math.nan, len(values)) for name, values in finite.items()}


def check_images(images: Tensor) -> None:
    """Refuse what is outside the image contract.

    Raises:
        ValueError: shape, dtype, NaN, or a range that is not [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"scorers take images (b, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"scorers take floating-point images in [0, 1], got {images.dtype}; divide 8-bit levels by 255")
    if not len(images):
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()  # NaN in any value makes both NaN
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        cure = "the pictures hold NaN" if low != low else "map [-1, 1] by (x + 1) / 2, or clamp"
        raise ValueError(f"scorers take images in [0, 1], got values from {low:g} to {high:g}: {cure}")
