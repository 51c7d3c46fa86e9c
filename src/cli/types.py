"""Types of flags: each checks its values, and names the cure in its error."""

from __future__ import annotations

import argparse
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Number:
    """The type of a flag: numbers of a range.

    Attributes:
        least, most: bounds, allowed themselves unless named in `but`. whole: whole numbers only. wrong: what an error says of the range.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    but: tuple[float, ...] = ()
    wrong: str = ""

    def __call__(self, text: str) -> float:
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * self.whole}number, got {text!r}") from None
        if not (self.whole or math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
        if not self.least <= value <= self.most or value in self.but:
            raise argparse.ArgumentTypeError(f"{self.wrong or f'must be at least {self.least:g}'}, got {text}")
        return value


positive_int = Number(1, whole=True)
non_negative_int = Number(0, whole=True)
t5_length = Number(1, 512, whole=True, wrong="must lie in 1 .. 512, like 256")  # what diffusers takes; the model was trained with 256
seed = Number(0, 2**63 - 1, whole=True, wrong="must lie in 0 .. 2**63 - 1")  # what a random generator takes, with room for more pictures
number = Number()
positive_float = Number(0, but=(0,), wrong="must be greater than 0")
non_negative_float = Number(0)
fraction = Number(0, 1, wrong="must lie in [0, 1]")
positive_fraction = Number(0, 1, but=(0,), wrong="must be greater than 0, at most 1")
decay = Number(0, 1, but=(1,), wrong="must lie in [0, 1), like 0.999")  # a decay of 1 would never forget its first value


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
