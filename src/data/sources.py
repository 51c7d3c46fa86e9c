"""Where pictures and captions come from: one class per layout, all with `rows`, `column_names` and `read(row) -> bytes`.

  folder   metadata.jsonl or metadata.csv (`file_name` and a caption column), or NAME.txt beside each NAME.jpg
  tar      WebDataset: 0001.jpg, 0001.txt or 0001.json in .tar files, read in place
  table    parquet files, or a data set of the Hugging Face Hub, through `datasets`

Nothing is decoded here, and `datasets` is imported for tables only, so that a wrong path is reported at once. `captioned` means that
captions are required; without it a picture may have none, and the column may be missing.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from src import hub
from src.errors import first_line

PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
_FOREIGN = {".heic", ".heif", ".jxl", ".jp2", ".cr2", ".nef", ".arw", ".dng", ".psd"}  # of cameras and phones, which Pillow cannot read
METADATA = ("metadata.jsonl", "metadata.csv")
_LOOKED_AT = 100  # parquet files whose footers are read before a run begins
_LAYOUTS = (
    "expected a folder with metadata.jsonl or metadata.csv, a folder with one .txt per picture, "
    ".parquet or WebDataset .tar files, or a Hub id"
)


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Inside, errors of the data set readers name this flag instead of --dataset_name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--dataset_name", flag)) from error


@dataclass(frozen=True)
class Row:
    """One picture, not read yet. `where` is a path, (tar, offset, size) or a row number; `caption` is still raw."""

    name: str
    where: Any
    caption: Any
    problem: str = ""  # why there is no caption, where a better reason than "no caption" is known
    unreadable: bool = False  # there is a caption, but it cannot be read: no default may replace it


class Source(Protocol):
    rows: list[Row]
    column_names: list[str]
    ignored: int  # files that are not part of the data set
    deeper: int  # pictures in subfolders, which are not part of it either

    def read(self, row: int) -> bytes: ...


# --------------------------------------------------------------------------- what is it?


@dataclass(frozen=True)
class Located:
    kind: str  # metadata, txt, tar, parquet or hub
    path: Path
    files: tuple[Path, ...] = ()  # the metadata file, the pictures, or the .tar or .parquet files
    stray: int = 0  # pictures beside .tar or .parquet files, without captions

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Inside, errors say why .tar or .parquet files were read, in case the pictures beside them were meant."""
        try:
            yield
        except ValueError as error:
            if not self.stray:
                raise
            why = f"{self.path} is read as .{self.kind} files, because none of the {self.stray} picture(s) beside them has a .txt"
            raise ValueError(f"{error} ({why})") from error


def locate(dataset_name: str, captioned: bool = True) -> Located:
    """Says which layout `dataset_name` has, from file names alone.

    Args:
        captioned: captions are required; .parquet or .tar files in the folder then take precedence over pictures without captions.

    Raises:
        ValueError: naming --dataset_name, if it looks like a path and is not there, or holds nothing that can be read.
    """
    path = Path(dataset_name).expanduser()
    if not dataset_name or not path.exists():
        if not dataset_name or _looks_local(dataset_name):
            raise ValueError(f"--dataset_name {dataset_name!r} does not exist; {_LAYOUTS}")
        return Located("hub", path)
    if path.is_file():
        kind = {".parquet": "parquet", ".tar": "tar"}.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"--dataset_name {dataset_name} is a file, but neither .parquet nor .tar; {_LAYOUTS}")
        return Located(kind, path, (path,))
    for name in METADATA:
        if (path / name).is_file():
            return Located("metadata", path, (path / name,))
    pictures = _pictures(path)
    if any(not captioned or picture.with_suffix(".txt").is_file() for picture in pictures):
        return Located("txt", path, tuple(pictures))
    for kind in ("parquet", "tar"):
        files = sorted(file for file in path.rglob(f"*.{kind}") if not file.name.startswith("."))
        # A clone of a Hub data set holds the test and validation parts too: they are not for training.
        training = [file for file in files if any(part.startswith("train") for part in file.relative_to(path).parts)]  # train/0000.parquet
        files = training or files
        if files:
            return Located(kind, path, tuple(files), len(pictures))  # the pictures are a banner, or examples
    if pictures:
        return Located("txt", path, tuple(pictures))
    folders = [sub for sub in sorted(path.iterdir()) if sub.is_dir()]
    inside = [sub for sub in folders if _pictures(sub) or any((sub / name).is_file() for name in METADATA)]
    inside.sort(key=lambda sub: not sub.name.startswith("train"))
    if inside:
        raise ValueError(f"--dataset_name {dataset_name} has no pictures; there are some in its subfolder: try --dataset_name {inside[0]}")
    foreign = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _FOREIGN)
    if foreign:
        raise ValueError(f"--dataset_name {dataset_name} has no pictures that can be read; convert {foreign[0]} and the rest to JPEG")
    raise ValueError(f"--dataset_name {dataset_name} has no pictures; {_LAYOUTS}")


def _looks_local(name: str) -> bool:
    """Whether the name is meant as a path. A Hub id is NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        return True
    owner, slash, _ = name.partition("/")
    return name.endswith((".parquet", ".tar", *PICTURES)) or (slash == "/" and (owner in ("datas", "outputs") or Path(owner).is_dir()))


def _pictures(folder: Path) -> list[Path]:
    """The folder's own pictures, sorted by name; hidden files (macOS leaves `._x.jpg` behind) are not pictures."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith("."))


# --------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class Folder:
    rows: list[Row]
    column_names: list[str]
    ignored: int
    deeper: int = 0

    def read(self, row: int) -> bytes:
        return self.rows[row].where.read_bytes()


def csv_rows(lines: Iterable[str]) -> Iterator[dict[str, str | None]]:
    """The rows of a CSV file with a header.

    Raises:
        csv.Error: naming the line; also for unbalanced quotes, and for a row with more fields than the header (an unquoted comma).
    """
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if any(row.pop(None, ())):
                raise csv.Error(f"more fields than the header's {len(reader.fieldnames)}; put a text with a comma in double quotes")
            yield row
    except csv.Error as error:
        raise csv.Error(f"line {reader.reader.line_num}: {error}") from error  # the DictReader's own count stops at the last good row


def text_rows(file: Path, where: str, example: str) -> Iterator[tuple[str, dict]]:
    """The rows of a .csv file, else of JSON lines, and what to call each: row 1, row 2 of CSV; line 1, line 4 of JSON.

    Raises:
        ValueError: beginning with `where`, naming the line that cannot be read.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:  # -sig: Windows editors put a byte order mark first
            if file.suffix.lower() == ".csv":
                yield from ((f"row {number}", row) for number, row in enumerate(csv_rows(lines), start=1))
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{where}: line {number} is not JSON ({error.msg}); one object a line") from error
                    if not isinstance(row, dict):
                        raise ValueError(f"{where}: line {number} must be an object like {example}")
                    yield f"line {number}", row
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{where} cannot be read as CSV ({error})") from error


def metadata_lines(file: Path) -> Iterator[dict]:
    """The rows of metadata.jsonl or metadata.csv; raises as `text_rows`."""
    return (row for _, row in text_rows(file, f"--dataset_name: {file}", '{"file_name": "a.png", "text": "a fox"}'))


def columns_of(entries: list[dict]) -> list[str]:
    return list(dict.fromkeys(str(key) for entry in entries for key in entry if key is not None))


def _check_columns(file: Path, columns: list[str], image_column: str, caption_column: str, captioned: bool) -> str:
    """Returns the name of the column with the file names."""
    if not columns:
        raise ValueError(f"--dataset_name: {file} has no entries")
    name_column = next((column for column in ("file_name", image_column) if column in columns), None)
    if name_column is None:
        raise ValueError(f"--dataset_name: {file} has no column 'file_name'; it has {', '.join(columns)}")
    if captioned and caption_column not in columns:
        raise ValueError(f"--caption_column {caption_column!r} is not in {file}; it has {', '.join(columns)}")
    return name_column


def _open_metadata(at: Located, image_column: str, caption_column: str, captioned: bool) -> Folder:
    entries = list(metadata_lines(at.files[0]))
    columns = columns_of(entries)
    name_column = _check_columns(at.files[0], columns, image_column, caption_column, captioned)
    rows = []
    for number, entry in enumerate(entries, start=1):
        if name := entry.get(name_column):
            rows.append(Row(str(name), at.path / str(name), entry.get(caption_column)))
        else:
            rows.append(Row(f"entry {number}", None, None, f"no {name_column!r} in it", unreadable=True))
    named = {row.where for row in rows}
    return Folder(rows, columns, sum(file.is_file() and file not in named for file in at.path.iterdir()) - 1)  # 1: the metadata itself


def _pictures_below(folder: Path) -> int:
    """How many pictures a subfolder holds, for a message; 0 if it is none, hidden, or may not be read (a disk's lost+found)."""
    try:
        return 0 if folder.name.startswith(".") or not folder.is_dir() else len(_pictures(folder))
    except OSError:
        return 0


def _open_txt(at: Located) -> Folder:
    rows = []
    for picture in at.files:
        beside = picture.with_suffix(".txt")
        try:
            rows.append(Row(picture.name, picture, beside.read_text(encoding="utf-8-sig")))
        except FileNotFoundError:
            rows.append(Row(picture.name, picture, None, f"no {beside.name} beside it"))
        except UnicodeDecodeError:
            rows.append(Row(picture.name, picture, None, f"{beside.name} is not UTF-8 text", unreadable=True))
        except OSError as error:
            rows.append(Row(picture.name, picture, None, f"{beside.name} cannot be read ({error.strerror})", unreadable=True))
    used = {file for picture in at.files for file in (picture, picture.with_suffix(".txt"))}
    ignored = sum(file.is_file() and file not in used for file in at.path.iterdir())
    return Folder(rows, ["text"], ignored, sum(map(_pictures_below, at.path.iterdir())))


# --------------------------------------------------------------------------- tar files


@dataclass(frozen=True)
class Tar:
    rows: list[Row]
    column_names: list[str]
    ignored: int
    deeper: int = 0

    def read(self, row: int) -> bytes:
        path, offset, size = self.rows[row].where
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{path} ends in the middle of it")
        return data


def _tar_samples(path: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]], dict[str, bytes]]]:
    """(key, {extension: (offset, size)}, {"txt": ..., "json": ...}) for all members that share a key, in the order of their first ones.

    WebDataset's rule: the key is the name up to the first dot of its last part, the rest is the extension.
    """

    def split(member: tarfile.TarInfo) -> tuple[str, str]:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        return (f"{folder}/{stem}" if folder else stem), extension.lower()

    try:
        with tarfile.open(path, "r:") as archive:
            # over the whole archive: `tar` packs a folder in the file system's order, and a caption may lie far from its picture
            samples: dict[str, tuple[dict, dict]] = {}
            for member in archive:
                if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                    continue
                key, extension = split(member)
                places, texts = samples.setdefault(key, ({}, {}))
                places[extension] = (member.offset_data, member.size)
                if f".{extension}" not in PICTURES and member.size < 2**20:  # captions; larger members are other data
                    texts[extension] = archive.extractfile(member).read()
            archive.fileobj.seek(archive.offset)  # tarfile silently takes a damaged later header for the end
            if archive.fileobj.read(2**16).strip(b"\0"):
                raise ValueError(f"--dataset_name: {path} is damaged or cut short at byte {archive.offset} (or two archives in one file)")
    except tarfile.TarError as error:
        raise ValueError(f"--dataset_name: {path} is not a whole, uncompressed .tar file ({error})") from error
    yield from ((key, places, texts) for key, (places, texts) in samples.items())


def _tar_caption(texts: dict[str, bytes], caption_column: str) -> tuple[Any, list[str], str]:
    """(caption, columns, fault). The caption is the member of that name, else that field of the .json, else for "text" the .txt."""
    columns = [extension for extension in texts if extension != "json"]
    fields: Any = {}
    problem = ""
    try:
        fields = json.loads(texts["json"]) if "json" in texts else {}
    except ValueError:
        problem = "its .json cannot be read"
    if isinstance(fields, dict):
        columns += [field for field in fields if field not in columns]
    member = caption_column if caption_column in texts else "txt"
    if isinstance(fields, dict) and caption_column in fields and caption_column not in texts:
        return fields[caption_column], columns, ""
    if member in texts and caption_column in (member, "text"):
        try:
            return texts[member].decode("utf-8-sig"), columns, ""
        except UnicodeDecodeError:
            return None, columns, f"its .{member} is not UTF-8 text"
    return None, columns, problem


def _tar_rows(files: tuple[Path, ...], image_column: str, caption_column: str) -> Iterator[tuple[Row | None, list[str]]]:
    """A row (None for a sample without a picture) and the sample's columns, in the order of the archives."""
    for path in files:
        for key, places, texts in _tar_samples(path):
            pictures = [extension for extension in places if f".{extension}" in PICTURES]
            pictures = [image_column] if image_column in places else pictures
            caption, columns, problem = _tar_caption(texts, caption_column)
            name = f"{path.name}:{key}"
            where = (str(path), *places[pictures[0]]) if pictures else None
            row = Row(f"{name}.{pictures[0]}", where, caption, problem, unreadable=bool(problem)) if pictures else None
            yield row, pictures + columns


def _check_tar(files: tuple[Path, ...], found: list[tuple[Row | None, list[str]]], caption_column: str, captioned: bool) -> list[str]:
    rows = [row for row, _ in found if row is not None]
    columns = list(dict.fromkeys(column for _, names in found for column in names))
    if not rows:
        raise ValueError(f"--dataset_name {files[0]}: no pictures in it")
    if captioned and all(row.caption is None for row in rows):
        raise ValueError(f"--caption_column {caption_column!r} is not in {files[0]}; it has {', '.join(columns)}")
    return columns


def _open_tar(at: Located, image_column: str, caption_column: str, captioned: bool) -> Tar:
    found = list(_tar_rows(at.files, image_column, caption_column))
    columns = _check_tar(at.files, found, caption_column, captioned)
    rows = [row for row, _ in found if row is not None]
    return Tar(rows, columns, len(found) - len(rows) + at.stray)


# --------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    rows: list[Row]
    column_names: list[str]
    table: Any  # a datasets.Dataset with the picture column only, not decoded
    image_column: str
    ignored: int = 0
    deeper: int = 0

    def read(self, row: int) -> bytes:
        return encoded(self.table[row][self.image_column])


def encoded(value: dict[str, Any] | None) -> bytes:
    """The encoded picture in a table's field.

    Raises:
        OSError: there is none, or the file that it names cannot be read.
    """
    if value is None or (value.get("bytes") is None and not value.get("path")):
        raise OSError("no picture in this row")
    if value.get("bytes") is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"{value['path']}: {error.strerror}") from error


def _check_table(name: str, schema: Any, image_column: str, caption_column: str, captioned: bool) -> str:
    """Returns the picture column of a pyarrow schema: the one given, else the only one that holds pictures."""
    columns = list(schema.names)
    if captioned and caption_column not in columns:
        raise ValueError(f"--caption_column {caption_column!r} is not in {name}; it has {', '.join(columns)}")
    types = {column: schema.field(column).type for column in columns}
    if image_column in columns:
        check_pictures("--image_column", image_column, types[image_column], name)
        return image_column
    found = [column for column, kind in types.items() if _holds_pictures(kind)]
    if len(found) != 1:
        raise ValueError(f"--image_column {image_column!r} is not in {name}; it has {', '.join(columns)}")
    return found[0]


def _holds_pictures(kind: Any) -> bool:
    """Whether a pyarrow type is that of encoded pictures."""
    from pyarrow import types

    return types.is_struct(kind) and kind.get_field_index("bytes") >= 0 or types.is_binary(kind) or types.is_large_binary(kind)


def check_pictures(flag: str, column: str, kind: Any, name: str) -> None:
    """Refuses a column whose pyarrow type holds neither pictures nor paths of them; null passes: all its pictures are missing.

    Raises:
        ValueError: naming the flag.
    """
    from pyarrow import types

    if not (_holds_pictures(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
        raise ValueError(f"{flag} {column!r} of {name} holds {kind}; pictures are binary, a struct with 'bytes', or paths")


def with_rows(files: Sequence[Path]) -> list[Path]:
    """The parquet files that have rows (an empty one may lack the columns' types); the first file if none has."""
    return [file for file in files if open_parquet(file).metadata.num_rows] or list(files[:1])


def first_schemas(files: Sequence[Path]) -> list[tuple[Path, Any]]:
    """pyarrow schemas of those of the first parquet files that have rows, so that errors name a differing file before data is read."""
    some = [(file, open_parquet(file)) for file in files[:_LOOKED_AT]]
    return [(file, opened.schema_arrow) for file, opened in some if opened.metadata.num_rows] or [(some[0][0], some[0][1].schema_arrow)]


def open_parquet(file: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile`; only its footer is read.

    Raises:
        ValueError: naming --dataset_name, if it is no parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"--dataset_name: {file} cannot be read as parquet: {first_line(error)}") from error


def load_table(at: Located, dataset_name: str, cache_dir: Path, revision: str | None, columns: list[str] | None = None) -> Any:
    """The `datasets.Dataset` of local parquet files, or of the Hub's "train" split, read by index from a copy in `cache_dir`.

    Args:
        columns: columns to copy from local files (None: all).

    Raises:
        ValueError: naming --dataset_name, if it cannot be read.
    """
    import datasets

    from src.data.cache import fingerprint

    where = cache_dir / "datasets"
    try:
        if at.kind == "parquet":
            files = [str(file) for file in with_rows(at.files)]
            # `datasets` tells local files by path and time alone: a file replaced within its resolution would be read from the old copy
            states = [os.stat(file) for file in files]
            where /= fingerprint(files=[[file, s.st_size, s.st_mtime_ns] for file, s in zip(files, states, strict=True)])
            return datasets.load_dataset("parquet", data_files=files, columns=columns, split="train", cache_dir=str(where))
        return datasets.load_dataset(dataset_name, split="train", cache_dir=str(where), revision=revision)
    except (*hub.errors(), datasets.exceptions.DatasetsError) as error:
        if at.kind == "parquet":
            why = first_line(error.__cause__ or error)
            raise ValueError(f"--dataset_name {dataset_name} cannot be read as parquet: {why}") from error
        raise ValueError(
            f"--dataset_name {dataset_name} is no local path, and cannot be had from the Hugging Face Hub either ({hub.reason(error)}); "
            "check the spelling, the connection and, for a gated data set, the login (hf auth login)"
        ) from error


def _open_table(
    at: Located, dataset_name: str, image_column: str, caption_column: str, captioned: bool, cache_dir: Path, revision: str | None
) -> Table:
    import datasets

    wanted = (image_column, caption_column, captioned)
    if at.kind == "parquet":
        schema = first_schemas(at.files)[0][1]
        column = _check_table(dataset_name, schema, *wanted)
        table = load_table(at, dataset_name, cache_dir, None, [column] + [caption_column] * (caption_column in schema.names))
    else:
        table = load_table(at, dataset_name, cache_dir, revision)
        schema = table.features.arrow_schema
        column = _check_table(dataset_name, schema, *wanted)
    there = caption_column in table.column_names
    captions = list(table.select_columns([caption_column])[caption_column]) if there else [None] * len(table)
    pictures = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Table([Row(f"row {i}", i, caption) for i, caption in enumerate(captions)], schema.names, pictures, column, at.stray)


# --------------------------------------------------------------------------- the two entrances


def open_source(
    dataset_name: str, *, image_column: str, caption_column: str, cache_dir: Path, revision: str | None = None, captioned: bool = True
) -> Source:
    """Lists a data set's pictures and raw captions in a fixed order: that of the metadata, the archive or the table, else by file name.

    Raises:
        ValueError: as `check_source`, and for a Hub id that cannot be reached.
    """
    at = locate(dataset_name, captioned)
    if at.kind == "metadata":
        return _open_metadata(at, image_column, caption_column, captioned)
    if at.kind == "txt":
        return _open_txt(at)
    with at.explaining():
        if at.kind == "tar":
            return _open_tar(at, image_column, caption_column, captioned)
        return _open_table(at, dataset_name, image_column, caption_column, captioned, cache_dir, revision)


def check_source(dataset_name: str, *, image_column: str = "image", caption_column: str = "text", captioned: bool = True) -> None:
    """Looks at names and the first entries only, in a fraction of a second, before anything heavy is imported. A Hub id passes.

    Raises:
        ValueError: naming --dataset_name (missing, empty, without captions) or --caption_column (with the columns there are).
    """
    at = locate(dataset_name, captioned)
    with at.explaining():
        _check_first(at, dataset_name, image_column, caption_column, captioned)


def _check_first(at: Located, dataset_name: str, image_column: str, caption_column: str, captioned: bool) -> None:
    if at.kind == "metadata":
        entries = list(itertools.islice(metadata_lines(at.files[0]), 2000))
        name_column = _check_columns(at.files[0], columns_of(entries), image_column, caption_column, captioned)
        if not any(os.path.isfile(at.path / str(entry.get(name_column))) for entry in entries):  # a name may be a text too long for one
            raise ValueError(
                f"--dataset_name: of the first {len(entries)} pictures that {at.files[0]} names, none exists; "
                f"{name_column!r} is relative to {at.path}, and the first one is {entries[0].get(name_column)!r}"
            )
    elif at.kind == "txt":
        if captioned and not any(picture.with_suffix(".txt").is_file() for picture in at.files):
            raise ValueError(
                f"--dataset_name {dataset_name} has {len(at.files)} picture(s) but no captions; "
                f"write a metadata.jsonl, or a .txt for each picture ({at.files[0].with_suffix('.txt').name} for {at.files[0].name})"
            )
    elif at.kind == "tar":
        _check_tar(at.files, list(itertools.islice(_tar_rows(at.files, image_column, caption_column), 10)), caption_column, captioned)
    elif at.kind == "parquet":
        for file, schema in first_schemas(at.files):
            _check_table(str(file), schema, image_column, caption_column, captioned)
        if len(at.files) == 1 and open_parquet(at.files[0]).metadata.num_rows == 0:
            raise ValueError(f"--dataset_name: {at.files[0]} has no rows")
