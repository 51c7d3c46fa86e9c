"""Prompts for training on a reward, and the choice of those that an epoch draws, K pictures each.

A source of prompts is given by one string: a built-in list (`BUILT_IN`), a text file with one prompt a line, JSON lines or a JSON list such
as ImageReward's (every field besides the prompt is metadata for the scorers), or the text column of a data set. A sample's prompt is a
function of (seed, epoch, position in the epoch) alone: it does not depend on the number of processes, and a resumed run needs no stored
state.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from src import hub, seeds
from src.data import sources
from src.data.captions import is_unicode
from src.errors import first_line

Rows = list[tuple[str, dict[str, Any]]]  # a row's place, for error messages; its fields
COLUMNS = ("prompt", "text", "caption")  # where the prompts are looked for, in this order, if no column is named

_ANIMALS = (
    "ant", "badger", "bat", "bear", "bee", "beetle", "bison", "butterfly", "camel", "cat", "cheetah", "chicken", "cow", "crab", "crow",
    "deer", "dog", "dolphin", "donkey", "duck", "eagle", "elephant", "falcon", "fish", "flamingo", "fox", "frog", "giraffe", "goat",
    "goose", "hamster", "hedgehog", "horse", "kangaroo", "koala", "leopard", "lion", "lizard", "llama", "monkey", "mouse", "octopus",
    "otter", "owl", "panda", "parrot", "peacock", "penguin", "pig", "rabbit", "raccoon", "rhino", "seal", "shark", "sheep", "snail",
    "snake", "spider", "squirrel", "swan", "tiger", "turtle", "whale", "wolf", "zebra",
)  # fmt: skip
_ACTORS = ("bear", "cat", "dog", "duck", "elephant", "fox", "frog", "hedgehog", "horse", "monkey", "owl", "penguin", "rabbit", "tiger")
_ACTIVITIES = (
    "baking bread", "brushing its teeth", "flying a kite", "painting a fence", "playing the violin", "reading a newspaper",
    "repairing a clock", "riding a bicycle", "watering a garden",
)  # fmt: skip
_SHAPES = 512  # captions of drawings in `shapes`: more only make the text cache larger
_SHAPES_HELD_OUT = 256  # what models/README.md measures on


@dataclass(frozen=True)
class Prompt:
    """A prompt, and metadata for scorers (the other fields of its JSON line)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------- our own lists


def simple_animals() -> list[str]:
    """65 animals, one word each, after an article."""
    return [f"{_article(animal)} {animal}" for animal in _ANIMALS]


def activities() -> list[str]:
    """14 animals in 9 activities that no photograph shows: 126 prompts whose pictures have to be composed."""
    return [f"{_article(actor)} {actor} {activity}" for actor, activity in itertools.product(_ACTORS, _ACTIVITIES)]


def shapes() -> list[str]:
    """512 different captions of drawings that models/tiny-sd3 was trained on; none names a held-out triple."""
    from src.tiny import shapes as world

    return world.captions(_SHAPES, seed=0)


def shapes_held_out() -> list[str]:
    """256 captions of triples that no training set holds."""
    from src.tiny import shapes as world

    return world.held_out_prompts(_SHAPES_HELD_OUT)


BUILT_IN: dict[str, Callable[[], list[str]]] = {
    "simple_animals": simple_animals, "activities": activities, "shapes": shapes, "shapes_held_out": shapes_held_out,
}  # fmt: skip


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


# --------------------------------------------------------------------------- reading


def is_local(source: str, *, flag: str = "--prompts") -> bool:
    """Whether the source can be read without a download; False for a Hub id.

    Raises:
        ValueError: naming `flag` and what it may be, for what is no source.
    """
    return _kind(source, flag) != "hub"


def read(source: str, *, column: str | None = None, cache_dir: Path, revision: str | None = None, flag: str = "--prompts") -> list[Prompt]:
    """All prompts of a source, in its order; a prompt that stands there twice is drawn twice as often.

    Args:
        column: field of the prompt in JSON, CSV, parquet or a data set; None: the first of `COLUMNS` that exists.
        cache_dir: where a data set of the Hub is downloaded to.
        revision: of a data set of the Hub.

    Raises:
        ValueError: naming `flag`: unknown name, missing file, a line that cannot be read, no such column, or no prompt at all.
    """
    kind, where = _kind(source, flag), f"{flag} {source}"
    if kind == "built-in":
        return [Prompt(text) for text in BUILT_IN[source]()]
    if kind == "lines":
        found = [Prompt(line.strip()) for line in _text(Path(source), where).split("\n") if line.strip()]
    elif kind == "rows":
        file = Path(source).expanduser()
        file = next(file / name for name in _METADATA if (file / name).is_file()) if file.is_dir() else file
        rows = _json_list(file, where) if file.suffix.lower() == ".json" else list(sources.text_rows(file, where, '{"prompt": "a fox"}'))
        found = _from_rows(rows, column, where)
    else:
        found = _from_table(source, kind, column, cache_dir, revision, where)
    if not found:
        raise ValueError(f"{where} holds no prompt; one per line, or one per row")
    return found


def read_file(file: Path, flag: str) -> list[Prompt]:
    """`read` for a flag that takes files alone: ValueError for another kind of file, too."""
    if file.suffix.lower() not in _KINDS:
        raise ValueError(f"{flag} {file}: cannot be read as prompts; give a {', '.join(_KINDS)} file (a list of lines: rename it to .txt)")
    return read(str(file), cache_dir=file.parent, flag=flag)


_KINDS = {".txt": "lines", ".json": "rows", ".jsonl": "rows", ".csv": "rows", ".parquet": "parquet"}  # how a file is read
_METADATA = ("metadata.jsonl", "metadata.csv")
_ALLOWED = f"one of {', '.join(BUILT_IN)}, a .txt, .json, .jsonl, .csv or .parquet file, a data set folder, or a Hub id (owner/name)"


def _kind(source: str, flag: str) -> str:
    """built-in, lines, rows, parquet or hub; raises ValueError for what is none of them."""
    path = Path(source).expanduser()
    if source in BUILT_IN:
        return "built-in"
    if path.is_file():
        kind = _KINDS.get(path.suffix.lower())
        if kind:
            return kind
    elif path.is_dir():
        if any((path / name).is_file() for name in _METADATA):
            return "rows"
        if _tables(path):
            return "parquet"
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and path.suffix.lower() not in _KINDS and not Path(source.split("/")[0]).is_dir():
        return "hub"
    else:
        near = difflib.get_close_matches(source, BUILT_IN, n=1)
        raise ValueError(f"{flag} {source}: no such file; " + (f"did you mean {near[0]}?" if near else f"give {_ALLOWED}"))
    raise ValueError(f"{flag} {source}: cannot be read as prompts; give {_ALLOWED}")


def _tables(folder: Path) -> tuple[Path, ...]:
    """The .parquet files that --dataset_name would read from the folder (only train*, if there are any); () for another layout."""
    try:
        at = sources.locate(str(folder))
    except ValueError:  # no data set; the caller says what is allowed here
        return ()
    return at.files if at.kind == "parquet" else ()


def _text(file: Path, where: str) -> str:
    """The text of a file, with \\n as line ends; to be split at these, as splitlines() also cuts at U+2028, which a prompt may contain."""
    try:
        return file.expanduser().read_text(encoding="utf-8-sig")  # -sig: Windows editors put a byte order mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason}); save it as UTF-8") from error


def _json_list(file: Path, where: str) -> Rows:
    """Rows of one JSON list of objects, or of texts."""
    try:
        rows = json.loads(_text(file, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: line {error.lineno} is not JSON ({error.msg}); one list of objects or of texts") from error
    if not isinstance(rows, list):
        raise ValueError(f'{where}: must hold one list such as [{{"prompt": "a fox"}}], got a {type(rows).__name__}')
    rows = [(f"entry {number}", {COLUMNS[0]: row} if isinstance(row, str) else row) for number, row in enumerate(rows, start=1)]
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{where}: {place} must be a text or an object like {{"prompt": "a fox"}}, got {row!r}')
    return rows


def _column(names: Sequence[str], column: str | None, where: str) -> str:
    """The column of the prompts: the one given, else the first of COLUMNS that is there."""
    found = next((name for name in ((column,) if column else COLUMNS) if name in names), None)
    if found is None:
        wanted, cure = column or " or ".join(COLUMNS), "rename one, or beside --prompts give it as --prompt_column"
        raise ValueError(f"{where} has no column {wanted}; it has {', '.join(names)}: {cure}")
    return found


def _from_rows(rows: Rows, column: str | None, where: str) -> list[Prompt]:
    if not rows:
        return []
    name = _column(list(dict.fromkeys(key for _, row in rows for key in row)), column, where)
    for place, row in rows:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{where}: {place} has no text in {name!r}, but {row.get(name)!r}")
        if not is_unicode(row[name]):
            raise ValueError(f"{where}: {place} is not valid Unicode in {name!r}: half of a surrogate pair in {row[name]!r}")
    return [Prompt(row[name].strip(), {key: value for key, value in row.items() if key != name}) for _, row in rows]


def _from_table(source: str, kind: str, column: str | None, cache_dir: Path, revision: str | None, where: str) -> list[Prompt]:
    """The prompts of a parquet file or folder, or of a data set of the Hub; only their column is read, no pictures."""
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        path = Path(source).expanduser()
        files = _tables(path) if path.is_dir() else (path,)
        try:
            name = _column(parquet.read_schema(files[0]).names, column, where)
            values = [value for file in files for value in parquet.ParquetFile(file).read(columns=[name])[name].to_pylist()]
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{where} cannot be read as parquet: {first_line(error)}") from error
    else:
        name, values = _from_hub(source, column, cache_dir / "datasets", revision, where)
    return _from_rows([(f"row {number}", {name: value}) for number, value in enumerate(values, start=1)], name, where)


def _from_hub(source: str, column: str | None, folder: Path, revision: str | None, where: str) -> tuple[str, list[Any]]:
    """Name and values of the prompt column. Of parquet only that column is copied to `folder`, where an offline run finds it."""
    import datasets

    @contextmanager
    def available() -> Iterator[None]:
        try:
            yield
        except (*hub.errors(), datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"{where} is no local path, and cannot be had from the Hugging Face Hub either ({hub.reason(error)}); give {_ALLOWED}"
            ) from error

    folder /= "prompts" if column is None else f"prompts_{column}"  # apart from copies with all columns
    with available():
        builder = datasets.load_dataset_builder(source, cache_dir=str(folder), revision=revision)
        parquet = hasattr(builder.config, "columns")
        names = builder.info.features or (builder.as_streaming_dataset(split="train").column_names if parquet else None)
    if parquet:
        builder.config.columns = [_column(list(names), column, where)]
    with available():
        builder.download_and_prepare()
        table = builder.as_dataset(split="train")
    name = _column(table.column_names, column, where)
    return name, list(table.select_columns([name])[name])


# --------------------------------------------------------------------------- which prompts an epoch draws


@dataclass(frozen=True)
class Batch:
    """b samples that one process draws and trains on together."""

    positions: list[int]  # in the epoch, over all processes: the key of every random number of a sample
    prompts: list[Prompt]
    groups: list[int]  # equal numbers: pictures of one prompt; no number recurs in another epoch

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def metadata(self) -> list[dict[str, Any]]:
        return [prompt.metadata for prompt in self.prompts]


class GroupSampler:
    """The prompts of every epoch, K pictures each, distributed so that the result does not depend on the number of processes.

    An epoch has N = batch_size x processes x batches_per_epoch positions; group g holds positions g K ... g K + K - 1. Batch m of rank r
    has the positions m x world x batch_size + r x batch_size + 0, 1, ...: over all ranks, those of batch m of one process with a world
    times larger batch. Each pass over the prompts has a new order, and an epoch continues where the one before stopped.

    Args:
        prompts: to choose from. group_size: K.
        batch_size: samples per process and batch; batches_per_epoch: of each process.

    Raises:
        ValueError: an epoch does not hold a whole number of groups.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, group_size: int, batch_size: int, batches_per_epoch: int, seed: int, rank: int = 0,
        world: int = 1,
    ):  # fmt: skip
        check_group_size(group_size, batch_size * batches_per_epoch * world)
        self.prompts, self.group_size, self.batch_size, self.batches_per_epoch = list(prompts), group_size, batch_size, batches_per_epoch
        self.seed, self.rank, self.world = seed, rank, world
        self.samples_per_epoch = batch_size * world * batches_per_epoch  # N
        self.groups_per_epoch = self.samples_per_epoch // group_size

    def batches(self, epoch: int) -> list[Batch]:
        """This process's batches of an epoch, counted from 0."""
        chosen, found = self._chosen(epoch), []
        for number in range(self.batches_per_epoch):
            start = (number * self.world + self.rank) * self.batch_size
            positions = list(range(start, start + self.batch_size))
            groups = [position // self.group_size for position in positions]
            numbers = [epoch * self.groups_per_epoch + group for group in groups]
            found.append(Batch(positions, [self.prompts[chosen[group]] for group in groups], numbers))
        return found

    def texts(self, epoch: int) -> list[str]:
        """The prompt of each position of an epoch, over all processes."""
        return [self.prompts[index].text for index in self._chosen(epoch) for _ in range(self.group_size)]

    def drawn(self, epochs: int) -> list[str]:
        """The distinct prompts of the first `epochs` epochs; the first pass is enough, since the others hold the same prompts."""
        return list(dict.fromkeys(self.prompts[index].text for index in self._shuffled(0)[: epochs * self.groups_per_epoch]))

    def updates(self, epoch: int, count: int) -> list[list[int]]:
        """The batch numbers that each of `count` optimizer steps trains on: each batch once, the same numbers on every process.

        A step takes consecutive batches, and the order of the steps is random: so a step's pictures are the same whether one process
        draws all batches or several draw fewer each.
        """
        order = torch.randperm(count, generator=seeds.generator(self.seed, "updates", epoch)).tolist()
        size = self.batches_per_epoch // count
        return [list(range(part * size, (part + 1) * size)) for part in order]

    def _chosen(self, epoch: int) -> list[int]:
        """Index of the prompt of each group: a window of the endless series of shuffled passes."""
        count, first = len(self.prompts), epoch * self.groups_per_epoch
        passes = range(first // count, (first + self.groups_per_epoch - 1) // count + 1)
        series = [index for number in passes for index in self._shuffled(number)]
        start = first - passes[0] * count
        return series[start : start + self.groups_per_epoch]

    def _shuffled(self, number: int) -> list[int]:
        return torch.randperm(len(self.prompts), generator=seeds.generator(self.seed, "prompts", number)).tolist()


def check_group_size(group_size: int, samples_per_epoch: int) -> None:
    """Refuse groups that would be cut at the end of an epoch.

    Raises:
        ValueError: naming --group_size, with a number that works.
    """
    if samples_per_epoch % group_size:
        fitting = [size for size in range(2, samples_per_epoch + 1) if samples_per_epoch % size == 0]
        nearest = min(fitting, key=lambda size: (abs(size - group_size), size), default=None)
        raise ValueError(
            f"--group_size {group_size} does not divide the {samples_per_epoch} samples of an epoch (--sample_batch_size x "
            f"--sample_num_batches_per_epoch x processes); {f'try {nearest}' if nearest else 'draw more of them'}"
        )
