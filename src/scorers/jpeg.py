"""How large a picture is as a JPEG: DDPO's two rewards that need neither network nor prompt.

The size depends on the version of libjpeg, which Pillow's wheels bundle: other machines may differ by a few bytes.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from src import images as pictures
from src.scorers.base import Loader, Scorer

if TYPE_CHECKING:
    from src.scorers.base import Judge

QUALITY = 95  # as in DDPO (arXiv 2305.13301)


def kilobytes(images: Tensor) -> Tensor:
    """Size of each picture (b, 3, H, W) in [0, 1] as a JPEG file of quality 95: (b,) float32 in kB, 1 kB = 1000 bytes."""
    sizes = []
    for image in pictures.to_pil(images):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


def _loading(sign: float):
    def load(loader: Loader) -> Judge:
        return lambda images, prompts, metadata: (sign * kilobytes(images)).to(images.device)

    return load


# 512 x 512 pixels: photos take 60 to 120 kB, flat grey 4.72 kB, uniform noise 308 kB.
SCORERS = (
    Scorer(
        name="jpeg_compressibility", summary="minus the size as a JPEG of quality 95, in kB: simple pictures win",
        differentiable=False, range=(-120.0, -5.0), normalizer=100.0, licence="none: Pillow's JPEG encoder", load=_loading(-1.0),
    ),
    Scorer(
        name="jpeg_incompressibility", summary="the size as a JPEG of quality 95, in kB: busy pictures win",
        differentiable=False, range=(5.0, 120.0), normalizer=100.0, licence="none: Pillow's JPEG encoder", load=_loading(1.0),
    ),
)  # fmt: skip
