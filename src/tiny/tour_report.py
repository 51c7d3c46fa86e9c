"""The report of the tour: one table, for the screen and the pages alike, and a picture of the same prompts before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent.parent
PAGES = tuple(path for path in (ROOT / "README.md", ROOT / "README_zh.md") if path.is_file())
BEGIN, END = "<!-- table of scripts/tour.sh -->\n", "<!-- end of the table -->\n"
STRICT = "shapes_strict"  # scorer: 1 where a picture shows all that the prompt asks for, else 0; every trainer is measured by it
HEAD = ("trainer", "what was trained", "held-out measure", "before", "after", "seconds", "memory")
RIGHT_ALIGNED = ("before", "after", "seconds", "memory")

# The picture, in pixels.
CELL, GAP, MARGIN, SIDE = 128, 4, 28, 300  # side of a picture, between before and after, around and between pairs, width of the texts
FRAME, BADGE = 4, 18
INK, GREY, PAPER, LINE = (30, 34, 40), (110, 116, 124), (255, 255, 255), (225, 228, 232)
RIGHT, WRONG = (46, 160, 84), (214, 96, 82)
LEGEND = "of each pair: left before, right after training, from the same noise"


# --------------------------------------------------------------------------- table


def measure_name(measure: dict[str, Any]) -> str:
    """`hearts, new to the model`; `known shapes, unguided`; of a reward `jpeg_compressibility: known shapes, unguided`."""
    judged = "" if measure["scorer"] == STRICT else f"{measure['scorer']}: "
    return judged + measure["title"] + (", unguided" if measure["guidance_scale"] == 1 else "")


def figure(measure: dict[str, Any], when: str) -> str:
    """`62 %` of the pictures are right, or a scorer's mean to three digits."""
    value = measure[when]
    if value is None:
        return "none judged"
    return f"{100 * value:.0f} %" if measure["scorer"] == STRICT else f"{value:.3g}"


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of the table: one row for each measure; the cells of the whole run are in its first row."""
    found = []
    for result in results:
        trained = result["trained"]
        steps = f"{trained['steps']} step{'s' if trained['steps'] != 1 else ''}"
        what = f"{trained['kind']}, {trained['parameters'] / 1e6:.2f} M of {trained['model']}, {steps}"
        run = (f"{result['seconds']:.0f}", f"{trained['memory_gb']:.1f} GB")
        for number, measure in enumerate(result["measures"]):
            first = (result["title"], what) if number == 0 else ("", "")
            last = run if number == 0 else ("", "")
            found.append((*first, measure_name(measure), figure(measure, "before"), figure(measure, "after"), *last))
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, aligned for reading on a screen, and its footnote."""
    cells = rows(results)
    widths = [max(len(row[column]) for row in (HEAD, *cells)) for column in range(len(HEAD))]

    def line(row: Sequence[str]) -> str:
        padded = [text.rjust(width) if name in RIGHT_ALIGNED else text.ljust(width)
                  for name, text, width in zip(HEAD, row, widths, strict=True)]  # fmt: skip
        return f"| {' | '.join(padded)} |"

    ruler = [("-" * (width + 1) + ":" if name in RIGHT_ALIGNED else "-" * (width + 2)) for name, width in zip(HEAD, widths, strict=True)]
    lines = [line(HEAD), f"|{'|'.join(ruler)}|", *map(line, cells)]
    return "\n".join([*lines, "", footnote(results)]) + "\n"


def footnote(results: Sequence[dict[str, Any]]) -> str:
    """How the figures were measured."""
    counts = sorted({measure["count"] for result in results for measure in result["measures"]})
    steps = sorted({result["settings"]["num_inference_steps"] for result in results})
    machines = list(dict.fromkeys(result["machine"] for result in results))
    total = sum(result["seconds"] for result in results)
    return (
        f"%: share of {_either(counts)} held-out prompts whose picture shows the right shape, colour and background (of the subject: its "
        "shape and colour), read back from the pixels. Other figures: mean of the named scorer, higher is better. The same seeds before "
        f"and after, {_either(steps)} denoising steps. Seconds: the whole training command with its own evaluations, {total:.0f} together. "
        f"Memory: peak of the training process. Measured on {_either(machines)}."
    )


def _either(values: Sequence[Any]) -> str:
    return " or ".join(map(str, values))


# --------------------------------------------------------------------------- pages


def check_pages(pages: Sequence[Path]) -> None:
    """Refuse pages that have no place for the table.

    Raises:
        ValueError: naming the page and the two lines.
    """
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
            raise ValueError(f"--write: {page.name} has no line {BEGIN.strip()} with {END.strip()} after it; add both to the page")


def write_into(page: Path, text: str) -> None:
    """Put the table between the page's two markers, in place of what stands there."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END, 1)[1], encoding="utf-8")


# --------------------------------------------------------------------------- picture


def picture(results: Sequence[dict[str, Any]], output_dir: Path) -> Image.Image:
    """One row for each trainer: its figures, then pairs of pictures, before and after, over the prompt that both were drawn from.

    Args:
        output_dir: of the tour; the pictures of a trainer lie in its folder.
    """
    title, text, small = (ImageFont.load_default(size) for size in (22, 15, 14))
    pairs = max(len(result["shown"]) for result in results)
    line = 20  # pixels from one line of words to the next
    pair = 2 * CELL + GAP
    high = CELL + 2 * line + 24
    width = MARGIN + SIDE + pairs * (pair + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + 2 * line + len(results) * high), PAPER)
    draw = ImageDraw.Draw(sheet)
    _legend(draw, text, width)
    for number, result in enumerate(results):
        top = MARGIN + 2 * line + number * high
        draw.line([(MARGIN, top - 12), (width - MARGIN, top - 12)], fill=LINE, width=1)
        draw.text((MARGIN, top), result["title"], fill=INK, font=title)
        for row, (words, color) in enumerate(_words(result, text)):
            draw.text((MARGIN, top + 32 + row * line), words, fill=color, font=text)
        for column, shown in enumerate(result["shown"]):
            left = MARGIN + SIDE + column * (pair + MARGIN)
            for x, when in ((left, "before"), (left + CELL + GAP, "after")):
                _paste(sheet, draw, output_dir / result["name"] / shown[when]["file"], (x, top), shown[when]["right"])
            for row, words in enumerate(wrapped(shown["prompt"], small, pair)[:2]):
                draw.text((left + pair / 2, top + CELL + 6 + row * line), words, fill=GREY, font=small, anchor="ma")
    return sheet


def _legend(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: int) -> None:
    """What the halves of a pair and the colours of the frames mean, at the top."""
    x = MARGIN + SIDE
    for color, words in ((None, LEGEND), (RIGHT, "drawn as asked"), (WRONG, "not as asked")):
        if color:
            draw.rectangle([(x, MARGIN), (x + 14, MARGIN + 14)], outline=color, width=FRAME)
            _badge(draw, (x + 22, MARGIN - 1), color == RIGHT)
            x += 22 + BADGE + 6
        draw.text((x, MARGIN - 2), words, fill=GREY, font=font)
        x += font.getlength(words) + 24


def _words(result: dict[str, Any], font: ImageFont.FreeTypeFont) -> list[tuple[str, tuple[int, int, int]]]:
    """Name and figures of each measure in turn, in lines that fit into the column, with their colours."""
    found = []
    for measure in result["measures"]:
        found += [(words, GREY) for words in wrapped(measure_name(measure), font, SIDE - MARGIN)]
        found.append((f"{figure(measure, 'before')} to {figure(measure, 'after')}", INK))
    return found


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, file: Path, corner: tuple[int, int], right: bool) -> None:
    """One picture at its corner, enlarged without smoothing, in a frame that says whether it is right."""
    with Image.open(file) as opened:
        cell = opened.convert("RGB").resize((CELL - 2 * FRAME, CELL - 2 * FRAME), Image.Resampling.NEAREST)
    x, y = corner
    draw.rectangle([(x, y), (x + CELL - 1, y + CELL - 1)], outline=RIGHT if right else WRONG, width=FRAME)
    sheet.paste(cell, (x + FRAME, y + FRAME))
    _badge(draw, (x + CELL - BADGE, y), right)


def _badge(draw: ImageDraw.ImageDraw, corner: tuple[int, int], right: bool) -> None:
    """A tick or a cross on a small square: what the frame's colour says, for those who cannot tell green from red."""
    x, y = corner
    draw.rectangle([(x, y), (x + BADGE - 1, y + BADGE - 1)], fill=RIGHT if right else WRONG)
    strokes = [((4, 9), (7, 13), (14, 5))] if right else [((5, 5), (12, 12)), ((12, 5), (5, 12))]
    for stroke in strokes:
        draw.line([(x + dx, y + dy) for dx, dy in stroke], fill="white", width=2)


def wrapped(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
    """The words of a text in lines of at most `room` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(joined) > room:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines
