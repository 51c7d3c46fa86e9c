"""Pairs of pictures for one caption, one of them preferred: pickapic_v2 as published, or any table or folder of pairs.

  folder   metadata.jsonl or metadata.csv with two columns of file names and one of captions
  table    parquet files, or a data set of the Hugging Face Hub, with two columns of pictures

The label says which picture is preferred: 1 the first, 0 the second; without a label column it is always the first. A label of 0.5
is a tie, with no preference to learn from: such rows of any data set are dropped and counted.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src.data import sources
from src.data.captions import CaptionedImages, Memo, Record, caption_problem, first_of, keep, report, scan
from src.data.samples import Samples, look

if TYPE_CHECKING:
    from PIL import Image

_LAYOUTS = "pairs come in a folder with metadata.jsonl or metadata.csv, in .parquet files, or by a Hub id"


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns: two of pictures, that of the label (None: the first is always preferred), that of the caption."""

    chosen: str
    rejected: str
    label: str | None
    caption: str

    def flags(self) -> dict[str, str]:
        """The required columns, by flag."""
        named = {"--chosen_column": self.chosen, "--rejected_column": self.rejected, "--caption_column": self.caption}
        return named | ({"--label_column": self.label} if self.label else {})


@dataclass(frozen=True)
class Pair:
    name: str  # what to print: file names or row number
    prompt: str
    winner: Record
    loser: Record


class PreferencePairs:
    """Usable pairs in a fixed order, and their pictures on demand. Can be pickled, so it goes into loader workers.

    Attributes:
        records: the pairs; pictures: record 2i is the winner of pair i, 2i + 1 its loser.
        ties: number of rows without a preference; skipped: the faults of rows that cannot be used.
    """

    def __init__(self, pictures: CaptionedImages, ties: int, skipped: Sequence[str]):
        self.pictures, self.ties, self.skipped = pictures, ties, list(skipped)
        records = pictures.records
        self.records = [Pair(winner.name, winner.prompt, winner, loser) for winner, loser in zip(records[::2], records[1::2], strict=True)]

    def __len__(self) -> int:
        return len(self.records)

    def images(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Winner and loser, upright, in RGB; raises ValueError if a file changed since it was looked at."""
        return self.pictures.image(2 * index), self.pictures.image(2 * index + 1)

    def subset(self, indices: Sequence[int]) -> PreferencePairs:
        """The pairs at these indices, in this order."""
        rows = [row for index in indices for row in (2 * index, 2 * index + 1)]
        return PreferencePairs(self.pictures.subset(rows), self.ties, self.skipped)

    def hold_out(self, count: int) -> tuple[PreferencePairs, PreferencePairs]:
        """(the rest, at least `count` pairs): all pairs of some captions, chosen by the captions' hash.

        By caption, because pairs of one caption share pictures. The choice stays the same when the data set grows or is sorted differently.

        Raises:
            ValueError: if nothing would be left to train on.
        """
        prompts = sorted({pair.prompt for pair in self.records}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
        sizes = {prompt: 0 for prompt in prompts}
        for pair in self.records:
            sizes[pair.prompt] += 1
        held, total = set(), 0
        while total < count and prompts:
            prompt = prompts.pop(0)
            held.add(prompt)
            total += sizes[prompt]
        if not prompts:
            raise ValueError(f"cannot hold out {count} of {len(self)} pairs by their captions and still train on others")
        inside = [i for i, pair in enumerate(self.records) if pair.prompt in held]
        outside = [i for i, pair in enumerate(self.records) if pair.prompt not in held]
        return self.subset(outside), self.subset(inside)


class PairSamples(Samples):
    """As `Samples`, with both pictures of a pair, winner first: pixels (2, 3, H, W), or latent mean and std (2, C, h, w).

    Mirroring and crop are drawn once for both pictures, so that they differ by the preference alone.
    """

    images: PreferencePairs

    def _picture(self, index: int, size: tuple[int, int], crop: tuple[float, float], flip: bool) -> dict[str, Tensor]:
        both = [look(self.images.pictures, 2 * index + k, size, crop, flip, self.latents) for k in (0, 1)]
        return {name: torch.stack([one[name] for one in both]) for name in both[0]}


# --------------------------------------------------------------------------- the preference in a row


def preferred(label: Any) -> int | None:
    """Which picture a label prefers: 0 the first, 1 the second, None neither (a tie).

    Raises:
        ValueError: for any other value.
    """
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if value not in (1.0, 0.0, 0.5):
        raise ValueError(f"its label is {label!r}, neither 1 (the first), 0 (the second) nor 0.5 (a tie)")
    return None if value == 0.5 else int(value == 0.0)


@dataclass(frozen=True)
class _Rows:
    """A `sources.Source` whose rows are winners and losers in turn."""

    rows: list[sources.Row]
    column_names: list[str]
    table: Any = None  # a datasets.Dataset of the two picture columns, not decoded; None: files
    ignored: int = 0
    deeper: int = 0

    def read(self, row: int) -> bytes:
        where = self.rows[row].where
        if self.table is None:
            return where.read_bytes()
        number, column = where
        return sources.encoded(self.table[number][column])


@dataclass(frozen=True)
class _Listed:
    """Captions, labels and picture locations of a data set, before any picture is read."""

    captions: list[Any]
    labels: list[Any]  # all 1 without a label column
    names: list[tuple[str, str]]
    where: list[tuple[Any, Any]]
    column_names: list[str]
    table: Any = None


def _list(dataset_name: str, columns: Columns, cache_dir: Path, revision: str | None) -> _Listed:
    at = sources.locate(dataset_name)
    pictures = (columns.chosen, columns.rejected)
    if at.kind == "metadata":
        entries = list(sources.metadata_lines(at.files[0]))
        names = [tuple(str(entry.get(column)) for column in pictures) for entry in entries]
        where = [tuple(at.path / str(entry.get(column) or "(no file name)") for column in pictures) for entry in entries]
        labels = [entry.get(columns.label) if columns.label else 1 for entry in entries]
        return _Listed([entry.get(columns.caption) for entry in entries], labels, names, where, sources.columns_of(entries))
    import datasets

    there = sources.first_schemas(at.files)[0][1].names if at.kind == "parquet" else None
    table = sources.load_table(at, dataset_name, cache_dir, revision, list(dict.fromkeys(columns.flags().values())))
    there = there or table.column_names
    _check_columns(dataset_name, there, columns)
    values = table.select_columns([columns.caption, *([columns.label] if columns.label else [])])
    labels = list(values[columns.label]) if columns.label else [1] * len(table)
    both = table.select_columns(list(pictures))
    for column in pictures:
        both = both.cast_column(column, datasets.Image(decode=False))
    numbers = range(len(table))
    names = [tuple(f"row {i} {column}" for column in pictures) for i in numbers]
    where = [tuple((i, column) for column in pictures) for i in numbers]
    return _Listed(list(values[columns.caption]), labels, names, where, there, both)


def _in_order(listed: _Listed) -> tuple[_Rows, int, list[str]]:
    """Rows of winners and losers in turn, the number of ties, and the faults of rows with a broken caption or label."""
    rows, ties, broken = [], 0, []
    for caption, label, names, where in zip(listed.captions, listed.labels, listed.names, listed.where, strict=True):
        try:
            first = preferred(label)
        except ValueError as error:
            broken.append(f"{names[0]}: {error}")
            continue
        if first is None:
            ties += 1
        elif problem := caption_problem(caption):
            broken.append(f"{names[0]}: {problem}")
        else:
            rows += [sources.Row(names[side], where[side], caption) for side in (first, 1 - first)]
    return _Rows(rows, listed.column_names, listed.table), ties, broken


def _pairs(source: _Rows, memo: Memo, progress: bool) -> Iterator[tuple[int, tuple[Record, Record] | str]]:
    """(row of the winner, both records or what is wrong) in order."""
    found = scan(source, memo, progress)
    for (row, winner), (_, loser) in zip(found, found, strict=True):  # the same iterator twice: two at a time
        broken = next((one for one in (winner, loser) if isinstance(one, str)), None)
        if broken is None and winner.key == loser.key:
            broken = f"{winner.name}: the same picture twice"
        yield row, broken or (winner, loser)


# --------------------------------------------------------------------------- the two entrances


def _check_columns(name: object, there: list[str], columns: Columns) -> None:
    for flag, column in columns.flags().items():
        if column not in there:
            raise ValueError(f"{flag} {column!r} is not in {name}; it has {', '.join(there)}")
    if columns.chosen == "jpg_0" and columns.label is None and "label_0" in there:  # half of them would be learnt reversed
        raise ValueError(
            f"--chosen_column jpg_0 alone leaves the labels of {name} unread; add --label_column label_0, or leave both columns out"
        )


def check_source(dataset_name: str, columns: Columns) -> None:
    """Looks at names and the first entries only, before anything heavy is imported. A Hub id passes.

    Raises:
        ValueError: naming --dataset_name, or the flag of a column that is not there, with those that are.
    """
    at = sources.locate(dataset_name)
    if at.kind in ("txt", "tar"):
        raise ValueError(f"--dataset_name {dataset_name} holds single pictures; {_LAYOUTS}")
    if at.kind == "metadata":
        entries = list(itertools.islice(sources.metadata_lines(at.files[0]), 2000))
        if not entries:
            raise ValueError(f"--dataset_name: {at.files[0]} has no entries")
        _check_columns(at.files[0], sources.columns_of(entries), columns)
        if not any(os.path.isfile(at.path / str(entry.get(columns.chosen))) for entry in entries):  # Path.is_file raises on overlong names
            raise ValueError(
                f"--dataset_name: of the first {len(entries)} pictures that {at.files[0]} names in {columns.chosen!r}, none exists; "
                f"names are relative to {at.path}, and the first one is {entries[0].get(columns.chosen)!r}"
            )
    elif at.kind == "parquet":
        for file, schema in sources.first_schemas(at.files):
            _check_columns(file, schema.names, columns)
            for flag, column in (("--chosen_column", columns.chosen), ("--rejected_column", columns.rejected)):
                sources.check_pictures(flag, column, schema.field(column).type, str(file))


def open_preferences(
    dataset_name: str, columns: Columns, *, cache_dir: Path, max_train_samples: int | None = None, strict: bool = False,
    revision: str | None = None, progress: bool = True,
) -> PreferencePairs:  # fmt: skip
    """Opens a data set of pairs, decodes every picture once and keeps the pairs that can be used; the first `max_train_samples` of them.

    Args:
        strict: stop at the first row that cannot be used (--strict_data), instead of leaving it out; ties are no faults.
        progress: show a bar, and print what was left out.

    Raises:
        ValueError: naming the flag, if the data set cannot be opened, or nothing in it can be used, or for the first fault if `strict`.
    """
    check_source(dataset_name, columns)
    source, ties, skipped = _in_order(_list(dataset_name, columns, cache_dir, revision))
    if strict and skipped:
        raise ValueError(f"--strict_data: {skipped[0]}")
    memo = Memo.of(dataset_name, cache_dir)
    found, broken = keep(_pairs(source, memo, progress), memo, most=max_train_samples, strict=strict)
    skipped += broken
    if not found:
        what = f"{ties} tie(s), {len(skipped)} broken row(s){first_of(skipped)}"
        raise ValueError(f"--dataset_name {dataset_name}: no pair can be used: {what}")
    if progress:
        report(f"{dataset_name}: {len(found)} pair(s)" + (f", {ties} tie(s) dropped" if ties else ""), skipped, "row(s)")
    rows = [side for row, _ in found for side in (row, row + 1)]
    return PreferencePairs(CaptionedImages(source, rows, [record for _, pair in found for record in pair], skipped), ties, skipped)
