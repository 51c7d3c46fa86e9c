"""Text rendering as a reward: the rule against oracles, and pictures with drawn text through the real reader."""

import random
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from src import images, scorers
from src.scorers import ocr

# ---------------------------------------------------------------------------------------------- the rule


@cache
def recursive_distance(a: str, b: str) -> int:
    """Levenshtein's distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(recursive_distance(a[1:], b) + 1, recursive_distance(a, b[1:]) + 1, recursive_distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_the_edit_distance_agrees_with_its_definition():
    assert ocr.edit_distance("kitten", "sitting") == 3 and ocr.edit_distance("", "abc") == 3 and ocr.edit_distance("abc", "") == 3
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(7))) for _ in range(2))
        assert ocr.edit_distance(a, b) == recursive_distance(a, b)


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("OPEN", "open", 1.0),
        ("we are OPEN today", "open", 1.0),  # contained
        ("grand\nopening", "Grand Opening", 1.0),  # lines and case do not matter
        ("OPEM", "OPEN", 3 / 4),  # one replaced of four
        ("OPE", "OPEN", 3 / 4),  # one missing
        ("", "OPEN", 0.0),
        ("something else altogether", "OPEN", 0.0),  # more edits than letters count as all of them
        ("coffee", "coffee shop", 6 / 10),  # shop is missing: 4 of 10 letters
    ],
)
def test_the_score_is_one_minus_the_edits_per_letter(read, wanted, score):
    assert ocr.similarity(read, wanted) == pytest.approx(score)


def test_the_target_stands_in_the_first_double_quotes():
    assert ocr.target('a sign that says "OPEN" next to a "CLOSED" one') == "OPEN"
    assert ocr.target("a sign that says “Grand Opening”") == "Grand Opening"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a sign that says OPEN", "has no text in double quotes"),
        ('a sign: "OPEN', "has no text in double quotes"),
        ("it's a dog's 'bowl'", "has no text in double quotes"),
        ('a "" sign', "asks for an empty text"),
        ('a " " sign', "asks for an empty text"),
    ],
)
def test_a_prompt_without_a_quoted_text_is_refused_by_name(prompt, reason):
    with pytest.raises(ValueError, match=reason) as error:
        scorers.check_prompts("ocr", ['fine: "A"', prompt])
    assert repr(prompt) in str(error.value) and "prompt 1" in str(error.value)
    with pytest.raises(ValueError, match=reason):
        ocr.target(prompt)


def test_a_missing_reader_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"ocr: rapidocr is not installed: {sys.executable} -m pip install rapidocr"):
        scorers.check("ocr")


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (64, 64)), ((3, 400), (101, 400)), ((4096, 1), (4096, 1025)), ((400, 100), (400, 100))]
)
def test_strips_are_widened_to_four_to_one_before_reading(size, expected):
    """3 x 400 needs 400 / 4 = 100 across: 97 more, 49 on each side. Unwidened it would be read at 736 x 98,133 pixels."""
    seen = []
    ocr.read(lambda picture: seen.append(picture.size) or SimpleNamespace(txts=None), Image.new("RGB", size))
    assert seen == [expected]


# ---------------------------------------------------------------------------------------------- the reader


def sign(text: str, size: int = 256) -> torch.Tensor:
    """Black text on white, (3, size, size)."""
    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).text((size // 10, size // 3), text, fill="black", font=ImageFont.load_default(size=size // 7))
    return images.from_pil(picture)


@pytest.mark.slow
def test_drawn_text_is_read_and_scored():
    """HELLO read for a wanted HELP: L for P, and O too many, so 2 edits of 4 letters."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    texts = {"Grand\nOpening": "GRAND OPENING", "HELLO": "HELP", "": "OPEN", "COFFEE": "coffee shop"}
    signs, prompts = torch.stack([sign(text) for text in texts]), [f'a sign: "{text}"' for text in texts.values()]
    scores = scorers.build("ocr", batch_size=3)(signs, prompts)
    assert scores.total.dtype == torch.float32
    assert scores.total.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.6])
