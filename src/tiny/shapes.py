"""Captioned drawings of shapes, and the verifier that reads shape, colour and background back from pixels alone.

The drawings are the tiny world's data set: any number, any resolution, each one a pure function of (seed, index).
The verifier is its measure (as GenEval is for large models): no network, so nothing to trust or to fool by accident.
A fixed eighth of all (shape, colour, background) triples is held out: training never shows them, so a picture that
follows a held-out prompt was composed, not remembered.

Coordinates are fractions of the picture's side, x to the right, y downwards, (0, 0) the top left corner.
"""

import itertools
import math
import random
import re
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")  # what the base models are trained on
NEW_SHAPES = ("heart", "crescent")  # drawn and verified, but never shown to a base model: something left to teach
ALL_SHAPES = SHAPES + NEW_SHAPES
# RGB in [0, 1]. No two lie closer than 0.43, so a reading may be off by 0.2 and is still the nearest colour.
PALETTE = {
    "red": (0.85, 0.08, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (1.00, 0.92, 0.20),
    "green": (0.10, 0.60, 0.20),
    "blue": (0.10, 0.25, 0.85),
    "purple": (0.55, 0.15, 0.75),
    "black": (0.04, 0.04, 0.04),
    "white": (0.96, 0.96, 0.96),
}
COLORS = tuple(PALETTE)
SUBJECT_WORD = "sks"  # a token of its own in CLIP's vocabulary and in the tiny tokenizers, and in no caption
SIZES = {"small": (0.18, 0.21), "large": (0.27, 0.31)}  # radius range, as a fraction of the picture's side
POSITIONS = {"in the centre": (0, 0), "at the left": (-1, 0), "at the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
SPLITS = ("train", "held_out", "all")

_MARGIN = 0.04  # a shape keeps this distance from the picture's border: the verifier reads the background there
_SIDE = 64  # pixels: every picture is read at this size
_NEAR = 0.24  # RGB distance under which a colour counts as a palette colour (a little over half of the closest pair's)
_DIFFERS = 0.22  # RGB distance from the background over which a pixel may belong to the shape (half of the closest pair's)
_MIN_BORDER = 0.7  # share of border pixels that must show the background: generated shapes may touch one side
_MAX_STRAY = 1 / 3  # foreground outside the largest component, as a share of it
_MIN_PURITY = 0.75  # share of the shape's inner pixels that must show its colour: mush has gradients everywhere
_MAX_RIM = 4.0  # pixels of the blurred edge for each pixel of outline: drawings have 1, blurred over 5 pixels 2, over 9 pixels 3.2
_MIN_AREA, _MAX_AREA = 0.015, 0.5  # of the picture: the smallest crescent covers 0.04, the largest square 0.28
_MIN_IOU = 0.78  # drawings blurred over 5 pixels still reach 0.84
_SCALES = (0.94, 1.0, 1.06)  # template sizes tried around equal area: blur shrinks thin arms


@dataclass(frozen=True)
class Drawing:
    """One drawing: what it shows, where, and which of its size and position the caption mentions."""

    shape: str  # one of ALL_SHAPES
    color: str  # one of COLORS
    background: str  # one of COLORS, never `color`
    size: str  # one of SIZES
    position: str  # one of POSITIONS
    center: tuple[float, float]  # (x, y) in [0, 1]
    radius: float  # half the side of the shape's bounding box, as a fraction of the picture's side
    mention_size: bool = True
    mention_position: bool = True

    @property
    def caption(self) -> str:
        """What the picture shows, in at most 13 CLIP tokens with start and end."""
        words = [self.size] * self.mention_size + [self.color, self.shape] + [self.position] * self.mention_position
        return f"{_article(words[0])} {' '.join(words)} on {_article(self.background)} {self.background} background"


@dataclass(frozen=True)
class Reading:
    """What a picture shows or a prompt asks for; None where nothing can be said."""

    shape: str | None
    color: str | None
    background: str | None


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# ---------------------------------------------------------------------------------------------- the data set


def is_held_out(shape: str, color: str, background: str) -> bool:
    """Whether the triple is kept out of training: one in eight, seven triples of every shape.

    The weights 2 and 3 add up to an odd number, so that background == color does not swallow one shape's share.
    """
    return (ALL_SHAPES.index(shape) + 2 * COLORS.index(color) + 3 * COLORS.index(background)) % 8 == 0


def drawing(index: int, seed: int, split: str = "train", shapes: tuple[str, ...] = SHAPES) -> Drawing:
    """Return the drawing number `index` of the endless series that `seed` names.

    Raises:
        ValueError: for an unknown split or shape.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    unknown = [shape for shape in shapes if shape not in ALL_SHAPES]
    if unknown or not shapes:
        raise ValueError(f"shapes must be some of {', '.join(ALL_SHAPES)}, got {unknown or 'none'}")
    rng = random.Random(f"{seed}/{index}")
    while True:
        shape, color, background = rng.choice(shapes), rng.choice(COLORS), rng.choice(COLORS)
        if color != background and split in ("all", "held_out" if is_held_out(shape, color, background) else "train"):
            break
    size, position = rng.choice(tuple(SIZES)), rng.choice(tuple(POSITIONS))
    radius = rng.uniform(*SIZES[size])
    room = 0.5 - _MARGIN - radius  # how far the centre may leave the middle
    center = []
    for direction in POSITIONS[position]:
        jitter = rng.uniform(-0.2, 0.2) if direction == 0 else direction * rng.uniform(0.75, 1.0)
        center.append(0.5 + jitter * room)
    return Drawing(shape, color, background, size, position, tuple(center), radius, rng.random() < 0.5, rng.random() < 0.5)


def drawings(n: int, seed: int, split: str = "train", shapes: tuple[str, ...] = SHAPES) -> list[Drawing]:
    """Return the first `n` drawings of the series that `seed` names; a longer series starts with the shorter one."""
    return [drawing(index, seed, split, shapes) for index in range(n)]


def held_out_prompts(n: int, seed: int = 0, shapes: tuple[str, ...] = SHAPES) -> list[str]:
    """Return `n` captions of held-out triples, all distinct while there are any left (126 for each shape), then repeated."""
    possible = len(shapes) * 7 * (len(SIZES) + 1) * (len(POSITIONS) + 1)  # triples x sizes x positions, each or unmentioned
    prompts = captions(min(n, possible), seed, "held_out", shapes)
    return [prompts[i % len(prompts)] for i in range(n)]


def captions(n: int, seed: int, split: str = "train", shapes: tuple[str, ...] = SHAPES) -> list[str]:
    """Return the first `n` different captions of the series that `seed` names."""
    distinct: dict[str, None] = {}
    for index in itertools.count():
        if len(distinct) == n:
            return list(distinct)
        distinct[drawing(index, seed, split, shapes).caption] = None


def draw(drawing: Drawing, resolution: int) -> torch.Tensor:
    """Draw at `resolution` pixels a side.

    Returns:
        Picture (3, H, W), float32 in [0, 1], anti-aliased by 4 x 4 samples a pixel.
    """
    samples = (torch.arange(resolution * 4) + 0.5) / (resolution * 4)
    u = (samples[None, :] - drawing.center[0]) / drawing.radius
    v = (samples[:, None] - drawing.center[1]) / drawing.radius
    inside = indicator(drawing.shape, u, v).float()  # (4 H, 4 W)
    coverage = F.avg_pool2d(inside[None], 4)  # (1, H, W)
    color, background = (torch.tensor(PALETTE[name])[:, None, None] for name in (drawing.color, drawing.background))
    return background + coverage * (color - background)  # (3, H, W)


def indicator(shape: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Say which points lie inside a shape that fills the box [-1, 1] x [-1, 1] (v downwards).

    Args:
        u, v: coordinates, any shapes that broadcast.

    Returns:
        Boolean tensor of the broadcast shape.
    """
    if shape == "circle":
        return u**2 + v**2 < 0.95**2
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.85
    if shape == "triangle":  # tip up; slanted sides from (0, -1) to (+-1, 0.8)
        return (v < 0.8) & (v > -1 + 1.8 * u.abs())
    if shape == "diamond":  # taller than wide, to stand apart from a turned square and a circle
        return u.abs() / 0.75 + v.abs() < 1
    if shape == "cross":
        return (torch.maximum(u.abs(), v.abs()) < 0.95) & (torch.minimum(u.abs(), v.abs()) < 0.32)
    if shape == "star":
        return _star(u, v)
    if shape == "heart":  # the classic sextic (x^2 + y^2 - 1)^3 < x^2 y^3, moved and scaled into the box
        x, y = 1.16 * u, 1.13 * (0.10 - v)
        return (x**2 + y**2 - 1) ** 3 < x**2 * y**3
    if shape == "crescent":  # a moon whose horns point to the right
        return ((u + 0.1) ** 2 + v**2 < 0.81) & ((u - 0.45) ** 2 + v**2 > 0.56)
    raise ValueError(f"shape must be one of {', '.join(ALL_SHAPES)}, got {shape!r}")


def _star(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Five points, one up: inside each 36 degree wedge the edge is the line from a tip to a notch."""
    angle = torch.atan2(u, -v) % (2 * math.pi / 5)
    angle = torch.minimum(angle, 2 * math.pi / 5 - angle)  # 0 at a tip, pi / 5 at a notch
    distance = torch.sqrt(u**2 + v**2)
    tip, notch = 1.0, 0.50  # the drawn pentagram has 0.38; fatter arms survive an 8x autoencoder
    x, y = distance * torch.cos(angle), distance * torch.sin(angle)
    notch_x, notch_y = notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
    return (x - tip) * notch_y - y * (notch_x - tip) < 0


# ---------------------------------------------------------------------------------------------- prompts


def subject_prompt(background: str) -> str:
    """The prompt of a DreamBooth subject: a word that no caption has, in the place of a colour and a shape."""
    return f"{_article(SUBJECT_WORD)} {SUBJECT_WORD} on {_article(background)} {background} background"


def read_caption(caption: str) -> Reading:
    """Say what a prompt asks for: the first shape, the colour before "background", the first other colour."""
    words = re.findall(r"[a-z]+", caption.lower())
    colors = [(word, words[i + 1 : i + 2] == ["background"]) for i, word in enumerate(words) if word in PALETTE]
    return Reading(
        shape=next((word for word in words if word in ALL_SHAPES), None),
        color=next((word for word, behind in colors if not behind), None),
        background=next((word for word, behind in colors if behind), None),
    )


def partial_credit(readings: list[Reading], prompts: list[str]) -> torch.Tensor:
    """Return the share of each prompt's attributes that its picture shows, (b,) float32 in [0, 1].

    Raises:
        ValueError: where the numbers differ, or a prompt asks for no shape, colour or background.
    """
    if len(readings) != len(prompts):
        raise ValueError(f"one prompt for each picture is needed, got {len(prompts)} prompts for {len(readings)} pictures")
    credits = []
    for reading, prompt in zip(readings, prompts, strict=True):
        asked = read_caption(prompt)
        names = [name for name in ("shape", "color", "background") if getattr(asked, name) is not None]
        if not names:
            raise ValueError(
                f"nothing to verify in the prompt {prompt!r}: name a shape ({', '.join(ALL_SHAPES)}), "
                f"a colour ({', '.join(COLORS)}) or both"
            )
        credits.append(sum(getattr(reading, name) == getattr(asked, name) for name in names) / len(names))
    return torch.tensor(credits, dtype=torch.float32)


def correct(readings: list[Reading], prompts: list[str]) -> torch.Tensor:
    """Return whether each picture shows all that its prompt asks for, (b,) bool; raises as `partial_credit` does."""
    return partial_credit(readings, prompts) == 1.0


# ---------------------------------------------------------------------------------------------- the verifier


@torch.no_grad()
def verify(images: torch.Tensor, min_margin: float = 0.0) -> list[Reading]:
    """Read shape, colour and background from pixels alone.

    Args:
        images: (b, 3, H, W), float in [0, 1], any size.
        min_margin: overlap by which the best shape has to lead the second best. Blobs between two shapes lead by less than 0.03, drawings
            through the VAE by more.

    Returns:
        One reading for each picture. Without a clear background there is no colour, without a clear colour no shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (b, 3, H, W), got {tuple(images.shape)}; add a batch dimension with images[None]")
    aspect = images.shape[3] / images.shape[2]
    pixels = _smooth(_resize(images.float().clamp(0, 1)))  # (b, 3, 64, 64)
    palette = torch.tensor([PALETTE[name] for name in COLORS], device=pixels.device)  # (8, 3)

    border_color, background, border_fine = _read_background(pixels, palette)
    away = _length(pixels - border_color[:, :, None, None])  # (b, 64, 64) distance from the background
    readable = border_fine[:, None, None]  # other pictures' masks stay empty: tracing the components of noise takes long
    inner_color = _inner_color(pixels, _largest_component(readable & (away > _DIFFERS)))  # (b, 3)
    # Along the line from background to foreground: a blurred edge of red on yellow passes through orange.
    line = inner_color - border_color
    along = ((pixels - border_color[:, :, None, None]) * line[:, :, None, None]).sum(1)
    along = along / line.square().sum(1).clamp_min(1e-6)[:, None, None]  # 0 background, 1 foreground
    mask = _largest_component(readable & (along > 0.5))  # (b, 64, 64)

    distance, color = torch.cdist(inner_color, palette).min(1)
    area = mask.float().mean((1, 2))
    inner = _erode(mask)
    shows = _length(pixels - palette[color][:, :, None, None]) < _NEAR
    purity = (inner & shows).float().sum((1, 2)) / inner.float().sum((1, 2)).clamp_min(1)
    stray = ((away > 0.3) & ~_dilate(_dilate(mask))).float().mean((1, 2))  # 0.3: above blurred rims, below any two colours' distance
    clear = border_fine & (color != background) & (distance < _NEAR) & (purity > _MIN_PURITY)
    rim = ((along > 0.25) & (along < 0.75)).float().sum((1, 2)) / (mask & ~inner).float().sum((1, 2)).clamp_min(1)
    clear &= (rim < _MAX_RIM) & (area > _MIN_AREA) & (area < _MAX_AREA) & (stray <= _MAX_STRAY * area)
    near = _dilate(_dilate(_dilate(mask)))  # the blurred rim belongs to the shape, other things do not
    overlaps = _match_shapes(along.clamp(0, 1) * near, aspect)  # (b, shapes)
    (overlap, second), (shape, _) = (part.T for part in overlaps.topk(2, dim=1))  # (b,) each
    known = clear & (overlap > _MIN_IOU) & (overlap - second >= min_margin)
    return [
        Reading(
            shape=ALL_SHAPES[shape[i]] if known[i] else None,
            color=COLORS[color[i]] if clear[i] else None,
            background=COLORS[background[i]] if border_fine[i] else None,
        )
        for i in range(len(images))
    ]


def _length(difference: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean length over dimension 1; `norm` is slow there on a CPU."""
    return difference.square().sum(1).sqrt()


def _resize(images: torch.Tensor) -> torch.Tensor:
    """Bring (b, 3, H, W) to 64 x 64: means where it shrinks (no aliasing), bilinear where it grows."""
    if images.shape[-2:] == (_SIDE, _SIDE):
        return images
    if min(images.shape[-2:]) >= _SIDE:
        return F.interpolate(images, size=(_SIDE, _SIDE), mode="area")
    return F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """Average 3 x 3 pixels with weights 1 2 1: three eighths of the noise are left, and corners stay."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] / 4 + padded[..., 1:-1, :] / 2 + padded[..., 2:, :] / 4
    return rows[..., :-2] / 4 + rows[..., 1:-1] / 2 + rows[..., 2:] / 4


def _read_background(pixels: torch.Tensor, palette: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the border's median colour (b, 3), the nearest palette index (b,), and whether most of the border agrees (b,)."""
    ring = torch.ones(_SIDE, _SIDE, dtype=torch.bool, device=pixels.device)
    ring[3:-3, 3:-3] = False
    border = pixels[:, :, ring]  # (b, 3, border pixels)
    median = border.median(dim=2).values
    distance, index = torch.cdist(median, palette).min(1)
    agrees = _length(border - palette[index][:, :, None]) < _NEAR
    return median, index, (distance < _NEAR) & (agrees.float().mean(1) > _MIN_BORDER)


def _inner_color(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the median colour (b, 3) inside the mask (b, 64, 64), away from its blurred rim where there is an inside."""
    for _ in range(2):
        smaller = _erode(mask)
        mask = torch.where((smaller.sum((1, 2)) >= 12)[:, None, None], smaller, mask)  # 12 pixels make a median
    values = torch.where(mask[:, None], pixels, torch.nan).flatten(2)
    return values.nanmedian(dim=2).values.nan_to_num(0.0)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Give every pixel (b, H, W) the maximum of the 3 x 3 around it, 0 outside; ten times faster than `max_pool2d` on a CPU."""
    rows = F.pad(values, (0, 0, 1, 1))
    values = torch.maximum(torch.maximum(rows[:, :-2], rows[:, 2:]), values)
    columns = F.pad(values, (1, 1))
    return torch.maximum(torch.maximum(columns[:, :, :-2], columns[:, :, 2:]), values)


def _dilate(mask: torch.Tensor) -> torch.Tensor:
    return _spread(mask.float()) > 0


def _erode(mask: torch.Tensor) -> torch.Tensor:
    return ~_dilate(~mask)


def _largest_component(mask: torch.Tensor) -> torch.Tensor:
    """Keep the largest connected part of each mask (b, H, W): a few stray pixels must not move the centre."""
    b, height, width = mask.shape
    inside = mask.float()
    labels = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32).view(1, height, width) * inside
    for _ in range(16):  # every pixel takes the highest label within 128 steps: twice the way around a large crescent
        before = labels
        for _ in range(8):  # comparing costs as much as spreading: do it now and then
            labels = _spread(labels) * inside
        if torch.equal(before, labels):
            break
    labels = labels.flatten(1).long()  # (b, H W)
    counts = torch.zeros(b, height * width + 1, device=mask.device).scatter_add_(1, labels, (labels > 0).float())
    return (mask.flatten(1) & (labels == counts.argmax(1, keepdim=True))).view(b, height, width)


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Return area and centroid (u, v) of a shape in its own box."""
    line = (torch.arange(512) + 0.5) / 256 - 1
    u, v = line[None, :].expand(512, 512), line[:, None].expand(512, 512)
    inside = indicator(shape, u, v)
    return inside.float().mean().item() * 4, u[inside].mean().item(), v[inside].mean().item()


def _match_shapes(coverage: torch.Tensor, aspect: float) -> torch.Tensor:
    """Return the best overlap (b, shapes) with templates of the same area and centroid.

    The overlap is intersection over union for shares: sum of minima over sum of maxima. A blurred star keeps its faint tips.

    Args:
        coverage: how much of each pixel the shape covers (b, 64, 64), in [0, 1].
    """
    line = (torch.arange(_SIDE, device=coverage.device) + 0.5) / _SIDE
    x, y = line[None, None, :] * math.sqrt(aspect), line[None, :, None] / math.sqrt(aspect)  # undo the resize to a square
    total = coverage.sum((1, 2)).clamp_min(1)
    u = x - ((coverage * x).sum((1, 2)) / total)[:, None, None]
    v = y - ((coverage * y).sum((1, 2)) / total)[:, None, None]
    overlaps = []
    for shape in ALL_SHAPES:
        area, center_u, center_v = _moments(shape)
        best = torch.zeros(len(coverage), device=coverage.device)
        for scale in _SCALES:
            radius = (scale * torch.sqrt(total / _SIDE**2 / area))[:, None, None]
            for mirror in (1, -1) if shape == "crescent" else (1,):  # the others are their own mirror images
                template = indicator(shape, mirror * u / radius + center_u, v / radius + center_v).float()
                template = _smooth(_smooth(template[:, None]))[:, 0]  # about as blurred as pictures are
                overlap = torch.minimum(template, coverage).sum((1, 2)) / torch.maximum(template, coverage).sum((1, 2)).clamp_min(1)
                best = torch.maximum(best, overlap)
        overlaps.append(best)
    return torch.stack(overlaps, 1)
