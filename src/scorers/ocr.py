"""Whether a picture shows the text that its prompt asks for: rapidocr reads it, offline, with the weights that its wheel carries.

As Flow-GRPO (arXiv 2505.05470) scores text rendering, with two differences: the reader is PP-OCR by onnxruntime instead of by paddle,
and a prompt without a quoted text is an error instead of a wrong score.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps

from src import images as pictures
from src.scorers.base import Loader, Scorer, some_prompt

if TYPE_CHECKING:
    from rapidocr import RapidOCR

    from src.scorers.base import Judge


MAX_ASPECT = 4  # largest aspect ratio of a picture that the reader gets


# ---------------------------------------------------------------------------------------------- the rule


def target(prompt: str) -> str:
    """The text in the prompt's first pair of double quotes, straight or curly.

    Raises:
        ValueError: naming the prompt, where there is no pair, or nothing between them.
    """
    quoted = re.search(r"[\"“”](.*?)[\"“”]", prompt, re.S)
    if quoted is None:
        raise ValueError(f'the prompt {prompt!r} has no text in double quotes; write for example: a sign that says "OPEN"')
    if not normalized(quoted[1]):
        raise ValueError(f"the prompt {prompt!r} asks for an empty text; put at least one letter between the double quotes")
    return quoted[1]


def normalized(text: str) -> str:
    """Without case and white space, so that line breaks do not count as spelling."""
    return "".join(text.split()).casefold()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements of a character that turn `a` into `b`."""
    row = list(range(len(b) + 1))  # distances of the empty prefix of a to every prefix of b
    for i, ours in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, theirs in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (ours != theirs))
    return row[-1]


def similarity(read: str, wanted: str) -> float:
    """1 where `read` contains `wanted`, else 1 - min(distance, n) / n with n the length of `wanted`: in [0, 1].

    Both are compared `normalized`. Further text costs nothing if the wanted one is complete, else one edit a letter.
    """
    read, wanted = normalized(read), normalized(wanted)
    if wanted in read:
        return 1.0
    return 1.0 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


# ---------------------------------------------------------------------------------------------- the reader


def read(reader: RapidOCR, picture: Image.Image) -> str:
    """All texts in an RGB picture, line by line from the top; "" where there is none.

    Strips longer than 4:1 get black bars: the reader enlarges the short side to 736 pixels, however long the other one gets.
    """
    width, height = picture.size
    x, y = max(0, math.ceil((height / MAX_ASPECT - width) / 2)), max(0, math.ceil((width / MAX_ASPECT - height) / 2))
    texts = reader(ImageOps.expand(picture, (x, y))).txts
    return " ".join(texts or ())


def check_prompt(prompt: str, metadata: dict | None) -> str | None:
    """Why the prompt cannot be judged, or None."""
    if reason := some_prompt(prompt, metadata):
        return reason
    try:
        target(prompt)
    except ValueError as error:
        return str(error).removeprefix(f"the prompt {prompt!r} ")
    return None


def _load(loader: Loader) -> Judge:
    from rapidocr import RapidOCR

    # Log errors only: it warns about every picture without text. As many threads as torch, not all cores in each process.
    reader = RapidOCR(params={
        "Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
    })  # fmt: skip

    def judge(images, prompts, metadata):
        wanted = [target(prompt) for prompt in prompts]
        found = [read(reader, picture) for picture in pictures.to_pil(images)]
        return torch.tensor([similarity(*pair) for pair in zip(found, wanted, strict=True)], dtype=torch.float32).to(images.device)

    return judge


SCORERS = (
    Scorer(
        name="ocr", summary="how much of the text in the prompt's double quotes can be read in the picture",
        differentiable=False, range=(0.0, 1.0), normalizer=1.0, licence="Apache-2.0 (rapidocr, PP-OCR)", load=_load,
        packages={"rapidocr": "rapidocr", "onnxruntime": "onnxruntime"}, check_prompt=check_prompt,
    ),
)  # fmt: skip
