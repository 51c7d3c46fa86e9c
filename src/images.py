"""THE image contract: pictures travel as float tensors (b, 3, H, W) in [0, 1], and every file becomes RGB in one place.

`open_rgb` reads any file that people have in their folders, `from_pil` and `to_pil` cross the border, `grid` shows the result, `save` and
`prompt_of` write and read a picture's prompt.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

SOFTWARE = "dive-into-sd3"  # under PNG's keyword for the writing program: other programs also have a "prompt"
_WHITE = (255, 255, 255)
_INK = (40, 40, 40)
_ORIENTATION = 0x0112  # EXIF tag, and what turns a picture with its values upright; 1: nothing does
_TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                         Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90),
                        start=2))  # fmt: skip
# Exceptions of Pillow's decoders on damaged bytes, depending on the format; DecompressionBombError: above 179 megapixels.
_DECODER_ERRORS = (
    OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_MIN_CELL = 128  # px: below this a shape in a 64 px picture is hard to see on a screen


# --------------------------------------------------------------------------- between PIL and tensors


def from_pil(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) float32 in [0, 1]; any mode, by the rules of `open_rgb`."""
    image = image if image.mode == "RGB" else open_rgb(image)
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # (H * W * 3,)
    return raw.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 255  # (3, H, W)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(b, 3, H, W) in [0, 1] as b RGB pictures, rounded to the nearest of 256 levels; values outside are clamped.

    Raises:
        ValueError: for another shape, or for NaN, which would become an innocent-looking black picture.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"to_pil takes images (b, 3, H, W), got {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError("to_pil got images with NaN or infinite values")
    levels = (images.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)  # (b, 3, H, W)
    return [Image.fromarray(one.contiguous().numpy()) for one in levels.permute(0, 2, 3, 1)]


def to_png(image: Image.Image) -> bytes:
    """The picture as a PNG file, without loss."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def save(image: Image.Image, path: Path, prompt: str, **texts: str) -> None:
    """Write a PNG with its prompt, further texts by keyword, and the mark by which `prompt_of` recognises it."""
    info = PngInfo()
    for keyword, text in {"Software": SOFTWARE, "prompt": prompt, **texts}.items():
        info.add_itxt(keyword, text)
    image.save(path, pnginfo=info)


def prompt_of(path: Path) -> str:
    """The prompt in a picture that `save` wrote; empty for any other file, also for one that is no picture."""
    try:
        with Image.open(path) as picture:
            ours = picture.info.get("Software") == SOFTWARE or "settings" in picture.info  # "settings": older versions of the demo
            return str(picture.info.get("prompt", "")) if ours else ""
    except _DECODER_ERRORS:
        return ""


# --------------------------------------------------------------------------- any file to RGB


def open_rgb(source: Path | str | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Decodes a picture fully and returns it upright in RGB.

    EXIF rotation is applied; transparency (alpha, palette or a transparent colour) is put on white; greyscale, palette, CMYK and
    1-bit pictures are converted; 16-bit greyscale is scaled to 8 bits, not clipped. Of an animation, the first frame.
    Colour profiles are not applied, so a CMYK picture gets plain, somewhat vivid colours.

    Args:
        source: a path, an encoded file's bytes, or an open picture.
        name: what to call it in an error; the path by default.

    Raises:
        ValueError: naming the picture, if it is missing, broken, cut short, or in a form whose brightness range is unknown.
    """
    with _opened(source, name) as image:
        image.load()  # decodes all of it: only this detects a file that was cut short
        return _upright_rgb(image)


def open_mask(
    source: Path | str | bytes | Image.Image, name: str | None = None, *, opaque: bool = True
) -> tuple[Image.Image, bool]:  # fmt: skip
    """Weight of each pixel, as an upright picture in mode L: 255 counts fully, 0 not at all.

    The weight is the opacity if the picture has transparency, else its brightness.

    Args:
        opaque: whether a picture whose alpha channel is opaque everywhere counts fully, instead of by its brightness.

    Returns:
        The mask, and whether it is an opacity.

    Raises:
        ValueError: as `open_rgb`.
    """
    with _opened(source, name) as image:
        image.load()
        if image.has_transparency_data:
            alpha = _upright(image).convert("RGBA").getchannel("A")
            if opaque or alpha.getextrema()[0] < 255:
                return alpha, True
        return _upright_rgb(image).convert("L"), False


def measure(source: Path | str | bytes | Image.Image, name: str | None = None) -> tuple[int, int]:
    """(width, height) of the result of `open_rgb`; refuses the same files, in about a third of the time for a JPEG.

    Raises:
        ValueError: as `open_rgb`.
    """
    with _opened(source, name) as image:
        width, height = image.size
        drafted = image.draft(None, (1, 1))  # JPEG only: reads all of the file but computes one pixel in 8 x 8
        image.load()
        turned = _orientation(image) in (5, 6, 7, 8)  # by 90 degrees one way or the other
        upright = _upright_rgb(image)
        if drafted is None:  # read only now: Pillow rotates a TIFF when it loads; before that, its size is the unrotated one
            return upright.size
        return (height, width) if turned else (width, height)


@contextlib.contextmanager
def _opened(source: Path | str | bytes | Image.Image, name: str | None) -> Iterator[Image.Image]:
    """Opens a picture, and turns whatever a decoder raises while it is open into a ValueError that names it."""
    name = name or (str(source) if isinstance(source, (Path, str)) else "picture")
    try:
        if isinstance(source, Image.Image):
            yield source
        else:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                yield image
    except _DECODER_ERRORS as error:
        raise ValueError(f"cannot read {name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in any format that Pillow knows"  # its own text prints a BytesIO address
    return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) if the EXIF data is damaged: the picture is not. Load the picture first."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1


def _upright(image: Image.Image) -> Image.Image:
    """As `PIL.ImageOps.exif_transpose`, which writes the EXIF data anew, too, and so fails at one odd tag; and copies upright pictures."""
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _upright_rgb(image: Image.Image) -> Image.Image:
    kind, image = image.format, _upright(image)
    if image.mode.startswith("I;16"):
        return _high_bytes(image).convert("RGB")
    if image.mode == "I":  # mode of a 16-bit PNG in older versions of Pillow
        if kind == "TIFF" or image.getextrema()[1] > 65535:
            raise ValueError("32-bit greyscale has no agreed white level; save it with 8 or 16 bits")
        return image.point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point greyscale has no agreed white level; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*_WHITE, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")  # a copy even where it is RGB already


def _high_bytes(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits; Pillow's own conversion to "L" clips everything above 255 to white in several versions."""
    high = 0 if image.mode == "I;16B" else 1  # big endian puts the high byte first; all other variants here are little endian
    return Image.frombytes("L", image.size, image.tobytes()[high::2])


# --------------------------------------------------------------------------- the contact sheet


def grid(
    images: Tensor | Sequence[Image.Image | Tensor],
    columns: int,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    scale: int | None = None,
    largest: int | None = None,
) -> Image.Image:
    """Pictures side by side on white, row by row, with room between them and readable labels.

    Args:
        images: (n, 3, H, W) in [0, 1], or n pictures or (3, H, W) tensors, also of different sizes (then centred in their cells).
        columns: pictures per row.
        row_labels: one text per row, left of it; column_labels: one per column, above; labels: one per picture, below it.
            Texts are wrapped, and end in an ellipsis where they are still too long.
        scale: whole-number enlargement, without smoothing; by default as needed for cells of at least 128 px, so 2 for 64 px pictures.
        largest: pixels of the longer side, to which larger pictures are shrunk; None: not shrunk.

    Raises:
        ValueError: without pictures, or if the number of labels is not that of the rows, columns or pictures.
    """
    pictures = [to_pil(one[None])[0] if isinstance(one, Tensor) else open_rgb(one) for one in images]
    if not pictures or columns < 1:
        raise ValueError(f"grid needs at least one picture and one column, got {len(pictures)} and {columns}")
    columns = min(columns, len(pictures)) if column_labels is None else columns
    rows = math.ceil(len(pictures) / columns)
    for kind, given, wanted in (("row", row_labels, rows), ("column", column_labels, columns), ("picture", labels, len(pictures))):
        if given is not None and len(given) != wanted:
            raise ValueError(f"grid has {wanted} {kind}(s) but {len(given)} label(s) for them")

    for picture in pictures if largest else ():
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    scale = scale or math.ceil(_MIN_CELL / min(width, height))
    width, height = width * scale, height * scale
    text = _Text((row_labels, column_labels, labels), size=min(28, max(13, height // 14)))  # px; below 13 the font is hard to read
    gutter = max(6, min(width, height) // 24)
    side = [text.wrap(label, max(120, int(width * 0.9)), max(1, height // text.line)) for label in row_labels or []]
    head = [text.wrap(label, width, 3) for label in column_labels or []]
    foot = [text.wrap(label, width, 4) for label in labels or []]
    left = gutter + (max(text.width(lines) for lines in side) + gutter if side else 0)  # x of the first cell
    top = gutter + (text.height(head) + gutter // 2 if head else 0)
    feet = [text.height(foot[row * columns : (row + 1) * columns]) for row in range(rows)]  # of each row, 0 without labels
    feet = [gutter // 2 + tall if tall else 0 for tall in feet]

    sheet = Image.new("RGB", (left + columns * (width + gutter), top + rows * (height + gutter) + sum(feet)), _WHITE)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        x, y = left + column * (width + gutter), top + row * (height + gutter) + sum(feet[:row])
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        if foot:
            text.draw(sheet, foot[index], x + width / 2, y + height + gutter // 2)
        if head and row == 0:  # set on the line above the pictures, however many lines the longest label takes
            text.draw(sheet, head[column], x + width / 2, y - gutter // 2 - text.line * len(head[column]))
        if side and column == 0:
            text.draw(sheet, side[row], left / 2, y + (height - text.line * len(side[row])) / 2)
    return sheet


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which knows ASCII alone; or matplotlib's, for Latin, Greek and Cyrillic letters; or, for Chinese, Japanese and
    Korean, one of the system, if there is any."""
    if text.isascii():
        return ImageFont.load_default(size=size)
    from matplotlib import font_manager

    first = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
    names = "CJK|WenQuanYi|Source Han|PingFang|Hei|Song|Ming|Gothic"
    others = (ImageFont.truetype(one.fname, size) for one in font_manager.fontManager.ttflist if re.search(names, one.name))
    return next((font for font in itertools.chain([first], others) if _has(font, text)), first)


def _has(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether the font has all letters: one that it lacks is drawn as a box, like U+0378, which is assigned to nothing."""
    box = bytes(font.getmask("\u0378"))
    return all(bytes(font.getmask(letter)) != box for letter in set(text) if not letter.isspace())


class _Text:
    """Wraps, measures and draws centred lines in one font, which has the letters of these labels."""

    def __init__(self, labels: Sequence[Sequence[str] | None], size: int):
        self.font = _font("".join(label for group in labels for label in group or ()), size)
        self.line = math.ceil(sum(self.font.getmetrics()) * 1.1)  # px from one baseline to the next

    def width(self, lines: list[str]) -> int:
        return max((math.ceil(self.font.getlength(line)) for line in lines), default=0)

    def height(self, blocks: Sequence[list[str]]) -> int:
        return self.line * max((len(lines) for lines in blocks), default=0)

    def wrap(self, label: str, room: int, most: int) -> list[str]:
        """At most `most` lines of at most `room` pixels; what does not fit is cut, with an ellipsis in its place."""

        def fits(text: str) -> bool:
            return len(text) == 1 or self.font.getlength(text) <= room

        lines: list[str] = []
        for word in label.split():
            joined = f"{lines[-1]} {word}" if lines else word
            if fits(joined):
                lines[-1:] = [joined]
                continue
            lines.append(word)
            while len(lines) <= most and not fits(lines[-1]):  # one word wider than the cell: break it at the edge
                cut = next(n for n in range(1, len(lines[-1])) if not fits(lines[-1][: n + 1]))
                lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
            if len(lines) > most:
                break
        if len(lines) > most:
            last = lines[most - 1]
            while last and not fits(last + "..."):
                last = last[:-1]
            lines = [*lines[: most - 1], last.rstrip() + "..."]
        return lines

    def draw(self, sheet: Image.Image, lines: list[str], centre: float, top: float) -> None:
        draw = ImageDraw.Draw(sheet)
        for number, line in enumerate(lines):
            x = centre - self.font.getlength(line) / 2
            draw.text((round(x), round(top + number * self.line)), line, fill=_INK, font=self.font)
