"""Preprocessing of pictures in [0, 1] for vision towers: the same numbers as PIL gives, with a gradient.

PIL resizes 8-bit pictures in two passes, along the rows and along the columns, with integer weights, and rounds to 8 bits after each.
The same is done here in fp64, where all those integers are exact. Rounding and clipping let the gradient pass unchanged (straight-through):
a saturated pixel still gets a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's training pictures
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and std
_PRECISION = 22  # bits after the point in PIL's integer weights: 32, less 8 of the level, less 2 of headroom (its Resample.c)
_REACH = {"bicubic": 2, "bilinear": 1}  # of the kernel, in pixels of the coarser grid
_CHUNK = 2**24  # pixels that are resized at once: 400 MB in fp64

CropRounding = Literal["torchvision", "transformers"]
Kernel = Literal["bicubic", "bilinear"]


def shorter_side(images: Tensor, side: int, rounding: CropRounding, kernel: Kernel = "bicubic") -> Tensor:
    """Shorter side to `side`, then the centre: (b, 3, H, W) in [0, 1] -> (b, 3, side, side) float32 in [0, 1].

    Args:
        rounding: where the crop begins if an odd number of pixels is left over: torchvision rounds half of it to even, transformers down.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    size = (side if height == short else int(side * height / short), side if width == short else int(side * width / short))
    spare = [extent - side for extent in size]  # pixels
    starts = [round(extra / 2) if rounding == "torchvision" else extra // 2 for extra in spare]
    return _resize(images, size, starts, (side, side), kernel)


def squash(images: Tensor, side: int, kernel: Kernel = "bicubic") -> Tensor:
    """Both sides to `side`, whatever the aspect ratio: (b, 3, H, W) in [0, 1] -> (b, 3, side, side) float32 in [0, 1]."""
    return _resize(images, (side, side), (0, 0), (side, side), kernel)


def pad_to_square(images: Tensor, side: int) -> Tensor:
    """Longer side to `side`, black around: (b, 3, H, W) in [0, 1] -> (b, 3, side, side) float32, up to a tenth outside [0, 1].

    HPSv2's own way: it resizes floating-point tensors (torch's antialiased bicubic), so nothing is rounded after the 8 bits of the file.
    """
    height, width = images.shape[2:]
    size = [max(1, round(extent * (side / max(height, width)))) for extent in (height, width)]
    levels = _levels(images).float() / 255
    resized = levels if size == [height, width] else F.interpolate(levels, size, mode="bicubic", align_corners=False, antialias=True)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    return F.pad(resized, (left, side - size[1] - left, top, side - size[0] - top))


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels - mean) / std by channel, for (b, 3, h, w)."""
    mean_, std_ = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean_) / std_


def clip_pixels(images: Tensor, side: int, rounding: CropRounding) -> Tensor:
    """What CLIP's towers take: `shorter_side`, normalized by CLIP's statistics."""
    return normalize(shorter_side(images, side, rounding), CLIP_MEAN, CLIP_STD)


# --------------------------------------------------------------------------- PIL's resizing


def _straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of `exact`, to the bit, with the gradient of `smooth`."""
    return exact.detach() + (smooth - smooth.detach())


def _levels(images: Tensor) -> Tensor:
    """[0, 1] to the levels 0, 1, ..., 255 that a file holds, float32, straight-through."""
    images = images.float()
    return _straight_through((images.clamp(0, 1) * 255).round(), images * 255)


def pil_weights(old: int, new: int, start: int, count: int, kernel: Kernel = "bicubic") -> Tensor:
    """PIL's weights for outputs start, ..., start + count - 1 of a line of `old` pixels resized to `new`.

    Returns:
        (count, old) float64, whole numbers: weights times 2**22, rounded half away from zero.
    """
    scale = old / new
    stretch = max(scale, 1.0)  # shrinking widens the kernel, which is what keeps fine patterns from aliasing
    reach = _REACH[kernel] * stretch
    centre = (torch.arange(start, start + count, dtype=torch.float64)[:, None] + 0.5) * scale  # (count, 1)
    at = torch.arange(old, dtype=torch.float64)  # (old,)
    inside = (at >= (centre - reach + 0.5).trunc()) & (at < (centre + reach + 0.5).trunc())
    x = ((at - centre + 0.5) * (1 / stretch)).abs()  # (count, old)
    if kernel == "bicubic":  # Keys' cubic with a = -0.5
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))
    else:
        weights = (1 - x).clamp(min=0)
    weights = weights * inside
    weights = weights / weights.sum(1, keepdim=True) * 2**_PRECISION
    return (weights.abs() + 0.5).floor() * weights.sign()


def _pass(levels: Tensor, weights: Tensor) -> Tensor:
    """One pass along the last axis: (..., old) levels -> (..., count) levels, rounded and clipped as PIL does, float64."""
    smooth = levels @ weights.to(levels.device).T / 2**_PRECISION  # sums stay far below 2**53 and the divisor is a power of 2: exact
    return _straight_through((smooth + 0.5).floor().clamp(0, 255), smooth)


def _resize(images: Tensor, size: tuple[int, int], starts: tuple[int, int] | list[int], window: tuple[int, int], kernel: Kernel) -> Tensor:
    """The window of (height, width) `window` at (top, left) `starts` of the pictures resized to `size`; only the window is computed."""
    height, width = images.shape[2:]
    rows = pil_weights(height, size[0], starts[0], window[0], kernel)  # (h, H)
    columns = pil_weights(width, size[1], starts[1], window[1], kernel)  # (w, W)
    # Since version 13 PIL resizes columns first where these lose many more pixels; before, always rows first. The order changes the
    # rounding, by a few levels, in pictures more than twice as tall as wide and in tall ones that are squashed.
    columns_first = height - size[0] > max(0, 2 * (width - size[1]))
    done = []
    for part in images.split(max(1, _CHUNK // (height * width))):
        levels = _levels(part).double()  # (b, 3, H, W)
        levels = _pass(_pass(levels.mT, rows).mT, columns) if columns_first else _pass(_pass(levels, columns).mT, rows).mT
        done.append((levels / 255).float())  # (b, 3, h, w)
    return torch.cat(done)
