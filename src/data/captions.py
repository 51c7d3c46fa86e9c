"""Captioned pictures from any source, each checked once before training: unusable ones are named and counted.

A record is identified by the hash of its file's bytes, so a picture's cache entry can never be mistaken for another's, and `image`
refuses a file that changed after the scan. The hash is computed at every start; only the size found by decoding is remembered.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.data.sources import Row, Source, check_source, open_source

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CaptionedImages", "Record", "check_source", "open_captioned"]

NO_CAPTION = "no caption"
_BLOCK = 256  # rows scanned ahead: bounds memory, and what is read in vain past --max_train_samples
_KEEP_EVERY = 4096  # new pictures between two saves of the memo: some minutes of a slow disk
_MEASURED_BY = 2  # version in the memo's file name: raise it when `measure` changes (1 swapped the sides of rotated TIFFs)
_PAUSE = 0.5  # s before the second attempt at a file that could not be read


@dataclass(frozen=True)
class Record:
    name: str  # what to print: file name, archive:key or row number
    prompt: str
    key: str  # first 16 hex digits of the SHA-256 of the encoded file: equal for equal contents
    width: int  # px, after EXIF rotation
    height: int


class CaptionedImages:
    """Usable records in a fixed order, and their pictures on demand. Can be pickled, so it goes into loader workers."""

    def __init__(self, source: Source, rows: Sequence[int], records: Sequence[Record], skipped: Sequence[str]):
        assert len(rows) == len(records), "each record has its row in the source"
        self._source, self._rows = source, list(rows)
        self.records, self.skipped = list(records), list(skipped)
        self.column_names = list(source.column_names)

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Image.Image:
        """The picture, upright, in RGB.

        Raises:
            ValueError: if its file is gone or no longer holds the bytes that the scan saw.
        """
        from src.images import open_rgb

        return open_rgb(self.read(index), self.records[index].name)

    def read(self, index: int) -> bytes:
        """The picture's file as it is; raises as `image`."""
        record = self.records[index]
        try:
            data = _read(self._source, self._rows[index])
        except OSError as error:
            raise ValueError(f"cannot read {record.name} any more: {error}") from error
        if _key(data) != record.key:  # ~1 ms per megabyte; without it a cache could be filled under the wrong key
            raise ValueError(f"{record.name} changed while it was in use; start again, so that it is scanned again")
        return data

    def subset(self, indices: Sequence[int]) -> CaptionedImages:
        """The records at these indices, in this order."""
        return CaptionedImages(self._source, [self._rows[i] for i in indices], [self.records[i] for i in indices], self.skipped)

    def hold_out(self, count: int) -> tuple[CaptionedImages, CaptionedImages]:
        """(the rest, all records of `count` pictures chosen by content).

        Chosen by content, they stay the same when the data set is sorted differently, and only new pictures can displace them
        when it grows; a picture that occurs twice is on one side only.

        Raises:
            ValueError: if nothing would be left to train on.
        """
        keys = sorted({record.key for record in self.records})  # a hash: sorting it is a fixed shuffle
        if count >= len(keys):
            raise ValueError(f"cannot hold out {count} of {len(keys)} different pictures and still train on the others")
        held = set(keys[:count])
        inside = [i for i, record in enumerate(self.records) if record.key in held]
        outside = [i for i, record in enumerate(self.records) if record.key not in held]
        return self.subset(outside), self.subset(inside)


def open_captioned(
    dataset_name: str,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    cache_dir: Path,
    max_train_samples: int | None = None,
    default_prompt: str | None = None,
    strict: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> CaptionedImages:
    """Opens a data set (layouts: `src.data.sources`), decodes every picture once and keeps those that can be used.

    Of a caption that is a list, the first text counts. The first `max_train_samples` usable records are kept, in the order of the
    source. Decoded sizes are remembered under `cache_dir` by content, so that a second start only reads and hashes the files.

    Args:
        default_prompt: of pictures that have no caption of their own (None: they cannot be used).
        strict: stop at the first picture that cannot be read or has no caption (--strict_data), instead of leaving it out.
        progress: show a bar, and print what was left out.

    Raises:
        ValueError: naming the flag, if the data set cannot be opened, or nothing in it can be used, or for the first fault if `strict`.
    """
    columns = {"image_column": image_column, "caption_column": caption_column, "captioned": default_prompt is None}
    check_source(dataset_name, **columns)
    source = open_source(dataset_name, **columns, cache_dir=cache_dir, revision=revision)
    memo = Memo.of(dataset_name, cache_dir)
    found, skipped = keep(scan(source, memo, progress, default_prompt), memo, most=max_train_samples, strict=strict)
    if not found:
        raise ValueError(f"--dataset_name {dataset_name}: none of its {len(source.rows)} picture(s) can be used{first_of(skipped)}")
    if progress:
        usable = f"{dataset_name}: {len(found)} {'picture(s)' if default_prompt else 'captioned picture(s)'}"
        usable += f", {source.ignored} other file(s) ignored" if source.ignored else ""
        usable += f", {source.deeper} picture(s) in subfolders not read" if source.deeper else ""
        report(usable, skipped, "picture(s)")
    return CaptionedImages(source, [row for row, _ in found], [record for _, record in found], skipped)


def keep(
    scanned: Iterator[tuple[int, Any]], memo: Memo, *, most: int | None, strict: bool
) -> tuple[list[tuple[int, Any]], list[str]]:  # fmt: skip
    """(row, what was found) of the first `most` usable rows, and what is wrong with the others; the memo is saved in any case.

    Raises:
        ValueError: for the first fault if `strict`.
    """
    kept, skipped = [], []
    try:
        for row, found in scanned:
            if not isinstance(found, str):
                kept.append((row, found))
                if len(kept) == most:
                    break
            elif strict:
                raise ValueError(f"--strict_data: {found}")
            else:
                skipped.append(found)
    finally:
        memo.save()
    return kept, skipped


def first_of(skipped: list[str]) -> str:
    """How an error goes on that says that nothing can be used."""
    return f"; the first: {skipped[0]}" if skipped else ""


def report(usable: str, skipped: list[str], what: str) -> None:
    """Print what can be used and, of what was left out, the first ten."""
    print(printable(usable))
    if skipped:
        print(f"{len(skipped)} {what} skipped (--strict_data stops at the first):")
        print("\n".join(f"  {printable(line)}" for line in skipped[:10]))
        if len(skipped) > 10:
            print(f"  and {len(skipped) - 10} more")


def printable(line: str) -> str:
    """The line in a form that can be printed: file names need not be valid text, and Python keeps their other bytes as surrogates."""
    return line.encode(errors="backslashreplace").decode()


# --------------------------------------------------------------------------- the scan


def scan(source: Source, memo: Memo, progress: bool, default_prompt: str | None = None) -> Iterator[tuple[int, Record | str]]:
    """(row, record or what is wrong with it) in order; a thread pool works at most a block ahead."""
    from tqdm import tqdm

    threads = min(32, (os.cpu_count() or 1) + 4)  # reading waits, decoding frees Python's lock
    with ThreadPoolExecutor(threads) as pool, tqdm(total=len(source.rows), desc="scan pictures", unit="", disable=not progress) as bar:
        for start in range(0, len(source.rows), _BLOCK):
            memo.save_if_due()  # here, where no thread adds to it
            block = range(start, min(start + _BLOCK, len(source.rows)))
            for row, found in zip(block, pool.map(lambda row: _inspect(source, row, memo, default_prompt), block), strict=True):
                bar.update()
                yield row, found


def _inspect(source: Source, number: int, memo: Memo, default_prompt: str | None) -> Record | str:
    from src.images import measure

    row: Row = source.rows[number]
    prompt, problem = caption_text(row.caption), caption_problem(row.caption)
    if problem == NO_CAPTION and default_prompt is not None and not row.unreadable:
        prompt, problem = default_prompt, ""
    if problem:
        return f"{row.name}: {row.problem or problem}"
    try:
        data = _read(source, number)
    except OSError as error:
        return f"{row.name}: {error.strerror or error}"
    except ValueError as error:  # a name that no file can have: with a zero byte, or one that cannot be encoded
        return f"{row.name}: {error}"
    key = _key(data)
    size = memo.size(key)
    if size is None:
        try:
            size = measure(data, row.name)
        except ValueError as error:
            return str(error)
    memo.keep(key, size)
    return Record(row.name, prompt, key, *size)


def _read(source: Source, number: int) -> bytes:
    """As `source.read`, with a second attempt: network disks fail now and then, and one picture fewer is another data set."""
    try:
        return source.read(number)
    except OSError as error:
        if error.errno in (None, errno.ENOENT):  # permanent: no picture in the row, a truncated archive, no such file
            raise
    time.sleep(_PAUSE)
    return source.read(number)


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def caption_text(caption: Any) -> str | None:
    """The caption, of a list its first text, without surrounding white space; None if it cannot be used."""
    return None if caption_problem(caption) else _first_text(caption)


def caption_problem(caption: Any) -> str:
    """What is wrong with a caption: `NO_CAPTION`, or that it cannot be written as UTF-8 and so neither cached nor encoded; else ""."""
    text = _first_text(caption)
    if text is None:
        return NO_CAPTION
    return "" if is_unicode(text) else "caption is not valid Unicode"


def is_unicode(text: str) -> bool:
    """Whether the text is free of lone halves of surrogate pairs, which JSON can contain."""
    return text == text.encode(errors="ignore").decode()


def _first_text(caption: Any) -> str | None:
    if isinstance(caption, (list, tuple)):
        return next((text for text in map(_first_text, caption) if text), None)
    return caption.strip() or None if isinstance(caption, str) else None


class Memo:
    """Sizes of pictures decoded in earlier scans, by content. It only saves time: if its file cannot be read, it starts empty."""

    def __init__(self, file: Path):
        self.file = file
        self._new: dict[str, tuple[int, int]] = {}
        try:
            self._saved = {key: (int(w), int(h)) for key, (w, h) in json.loads(file.read_text()).items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            self._saved = {}

    @classmethod
    def of(cls, dataset_name: str, cache_dir: Path) -> Memo:
        """The memo of a data set, independent of the working directory."""
        return cls(cache_dir / "scans" / f"{_key(os.fsencode(os.path.abspath(dataset_name)))}-{_MEASURED_BY}.json")

    def size(self, key: str) -> tuple[int, int] | None:
        return self._saved.get(key) or self._new.get(key)

    def keep(self, key: str, size: tuple[int, int]) -> None:
        if key not in self._saved:
            self._new[key] = size

    def save_if_due(self) -> None:
        """Saves after every few thousand new pictures, or a tenth of those saved if that is more: each save rewrites the full file."""
        if len(self._new) >= max(_KEEP_EVERY, len(self._saved) // 10):
            self.save()

    def save(self) -> None:
        """Adds the sizes found by this scan; renamed into place, so that the file is complete after a kill or beside a second process."""
        if not self._new:
            return
        self._saved |= self._new
        self._new = {}
        temporary = self.file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._saved))
            temporary.replace(self.file)
        except OSError as error:  # it only spares the next scan some time
            temporary.unlink(missing_ok=True)
            print(f"warning: what this scan saw is not remembered: {self.file.parent}: {error.strerror}", file=sys.stderr)
