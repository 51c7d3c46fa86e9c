"""Types of flags: each checks its values, and names the cure in its error."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
    return value


def positive_int(text: str) -> int:
    """1, 2, 3, ..."""
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """0, 1, 2, ..."""
    return _whole(text, 0)


def t5_length(text: str) -> int:
    """1 to 512 tokens of T5, what diffusers' pipeline takes; the model was trained with 256."""
    value = _whole(text, 1)
    if value > 512:
        raise argparse.ArgumentTypeError(f"is more than the pipeline takes, got {text}; try 512 or less")
    return value


def seed(text: str) -> int:
    """0 to 2**63 - 1: what a random generator takes, with room for the consecutive seeds of further pictures."""
    value = _whole(text, 0)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {text}; try 0")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def positive_fraction(text: str) -> float:
    """A number in (0, 1]."""
    value = fraction(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be greater than 0, at most 1")
    return value


def decay(text: str) -> float:
    """A number in [0, 1): a decay of 1 would never forget its first value."""
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("must be less than 1, got 1; try 0.999")
    return value


def multiple_of_16(text: str) -> int:
    """A side in pixels that the VAE (8x) and the 2x2 patches divide."""
    value = positive_int(text)
    if value % 16:
        nearest = max(16, value // 16 * 16)
        raise argparse.ArgumentTypeError(f"must be a multiple of 16 (8x VAE, 2x2 patches), got {value}; try {nearest}")
    return value


def timestep_shift(text: str) -> float | str:
    """A positive number, "model" or "resolution"."""
    if text in ("model", "resolution"):
        return text
    try:
        return positive_float(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f'must be "model", "resolution" or a number greater than 0, got {text!r}') from None


def layer_numbers(text: str) -> list[int]:
    """ "7,8,9" -> [7, 8, 9]."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be block numbers such as 7,8,9, got {text!r}")
    return [int(number) for number in text.split(",")]


def path_or_name(text: str) -> str:
    """A path, a Hub id or the name of something built in; a leading ~ is the home folder, also in --config and in --flag=~/x.

    The shell expands neither, and only some readers of paths do: folders would be checked in one place and written in another.
    """
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """A file or folder, there already or not."""
    return Path(path_or_name(text))


def existing_file(text: str) -> Path:
    """Path of a file that exists."""
    file = path(text)
    if not file.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return file
