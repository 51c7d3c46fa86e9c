"""DreamBooth's pictures: those of the class, rendered where they are missing, and masks of the subject.

A class folder may hold the user's own pictures; the rest is rendered into it as generated-00000.png, generated-00001.png, ... each with
its prompt in a .txt beside it. Picture i has seed i, and the prompts take turns, whatever the number of pictures, processes and
interruptions. generated.json holds the settings of the rendering; pictures of other settings are refused, never mixed.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src import images
from src.data import buckets, captions, sources

NOTE = "generated.json"
_GENERATED = re.compile(r"generated-(\d{5,})\.png")
_LARGEST_SKEW = 0.02  # share by which a mask's aspect ratio may differ from its picture's: both were rounded to whole pixels


# --------------------------------------------------------------------------- the class: what there is


@dataclass(frozen=True)
class ClassFolder:
    """What a class folder of `count` pictures consists of.

    Attributes:
        own: file names of pictures that were not rendered here, at most `count`, in their order.
        prompts: those of the class; they take turns in the rendered pictures.
    """

    folder: Path
    own: tuple[str, ...]
    count: int
    prompts: tuple[str, ...]

    @property
    def wanted(self) -> int:
        """How many rendered pictures belong to it: generated-00000.png and so on."""
        return self.count - len(self.own)

    def path(self, index: int) -> Path:
        return self.folder / f"generated-{index:05d}.png"

    def prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]

    def missing(self) -> list[int]:
        return [index for index in range(self.wanted) if not self.path(index).is_file()]


def class_folder(folder: Path, count: int, prompts: Sequence[str]) -> ClassFolder:
    """Looks at names and captions only; the folder need not exist.

    Args:
        count: pictures to train on, --num_class_images; prompts: of --class_prompt, may be empty.

    Raises:
        ValueError: there are fewer pictures and no prompt to render more with, or pictures without a caption and not exactly one prompt.
    """
    flag = f"--class_data_dir {folder}"
    rows: list[sources.Row] = []
    if folder.is_dir() and any(_is_source(file) for file in folder.iterdir()):
        with sources.naming("--class_data_dir"):
            rows = sources.open_source(str(folder), image_column="image", caption_column="text", cache_dir=folder, captioned=False).rows
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} is a file; give a folder of pictures, or one to render them into")
    own = [row for row in rows if not _GENERATED.fullmatch(row.name)][:count]
    bare = [row.name for row in own if captions.caption_text(row.caption) is None and not row.unreadable]
    if bare and len(prompts) != 1:
        given = "--class_prompt is not given" if not prompts else f"there are {len(prompts)} class prompts to choose from"
        raise ValueError(f"{flag}: {len(bare)} picture(s), such as {bare[0]}, have no caption, and {given}; write a .txt beside each")
    if len(own) < count and not prompts:
        raise ValueError(f"{flag}: has {len(own)} of --num_class_images {count} pictures; give --class_prompt to render the others")
    if len(own) < count and any((folder / name).is_file() for name in sources.METADATA):
        raise ValueError(
            f"{flag}: its metadata file lists {len(own)} of --num_class_images {count} pictures, and rendered ones would not be in it; "
            f"pass --num_class_images {len(own)}"
        )
    return ClassFolder(folder, tuple(row.name for row in own), count, tuple(prompts))


def _is_source(file: Path) -> bool:
    return file.suffix.lower() in sources.PICTURES or file.name in sources.METADATA


def open_class(there: ClassFolder, *, cache_dir: Path, strict: bool) -> captions.CaptionedImages:
    """The class pictures: the user's own first, then the rendered ones.

    Raises:
        ValueError: naming --class_data_dir, if nothing in it can be used.
    """
    with sources.naming("--class_data_dir"):
        default = there.prompts[0] if there.prompts else None
        opened = captions.open_captioned(str(there.folder), cache_dir=cache_dir, default_prompt=default, strict=strict)
    places = defaultdict(list)  # by name: a metadata file may list one several times, with other captions
    for index, record in enumerate(opened.records):
        places[record.name].append(index)
    names = [*there.own, *(there.path(index).name for index in range(there.wanted))]
    return opened.subset([places[name].pop(0) for name in names if places[name]])  # unreadable ones were reported and left out


# --------------------------------------------------------------------------- the class: rendering


def check_settings(there: ClassFolder, settings: dict[str, Any]) -> None:
    """Refuse to add to pictures that were rendered with other settings.

    Raises:
        ValueError: naming --class_data_dir and what differs.
    """
    if not any(_GENERATED.fullmatch(file.name) for file in there.folder.glob("generated-*.png")):
        return
    note, flag = there.folder / NOTE, f"--class_data_dir {there.folder}"
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    differing = [name for name in settings if before.get(name) != json.loads(json.dumps(settings[name]))]
    if differing:
        raise ValueError(
            f"{flag}: holds pictures that were generated with another {', '.join(differing)}; "
            "delete generated-*, or choose another folder (unset: one by itself for every setting)"
        )


def render_missing(
    there: ClassFolder, render: Callable[[list[str], list[int]], Tensor], *, settings: dict[str, Any], batch_size: int,
    rank: int = 0, world: int = 1, progress: bool = True,
) -> int:  # fmt: skip
    """Renders the missing pictures, a batch at a time; returns how many this process wrote.

    Batches are cut from all pictures, not from the missing ones, and rendered in full, so that after an interruption a picture
    has the same batch neighbours, and with them the same bits. Call `check_settings` first.

    Args:
        render: prompts and seeds -> images (b, 3, H, W) in [0, 1].
        settings: written to generated.json.
    """
    from tqdm import tqdm

    missing = set(there.missing())
    starts = range(0, there.wanted, batch_size)[rank::world]
    batches = [range(start, start + batch_size) for start in starts if not missing.isdisjoint(range(start, start + batch_size))]
    if missing:
        there.folder.mkdir(parents=True, exist_ok=True)
        _put(there.folder / NOTE, (json.dumps(settings, indent=1) + "\n").encode())
    own = sum(index in missing for batch in batches for index in batch)
    with tqdm(total=own, desc="render class pictures", unit="", disable=not progress or not own) as bar:
        for batch in batches:
            pictures = images.to_pil(render([there.prompt(index) for index in batch], list(batch)))
            for index, picture in zip(batch, pictures, strict=True):
                if index in missing:
                    _put(there.path(index).with_suffix(".txt"), (there.prompt(index) + "\n").encode())
                    _put(there.path(index), images.to_png(picture))  # last, so that every picture has its prompt
                    bar.update()
    return own


def _put(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, also if the process is killed."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # process ids repeat across machines
    temporary.write_bytes(data)
    temporary.replace(path)


# --------------------------------------------------------------------------- masks


def mask_files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The mask of each picture: the file of the same stem, whatever its format.

    Raises:
        ValueError: naming --mask_data_dir, if it is no folder; the first picture without a mask, or two of one stem.
    """
    flag = f"--mask_data_dir {folder}"
    if not folder.is_dir():
        raise ValueError(f"{flag}: no such folder; it should hold one black and white picture for each of the subject's")
    by_stem = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in sources.PICTURES}
    found = {name: by_stem.get(Path(name).stem) for name in names}
    owners: dict[str, str] = {}
    for name in found:
        if owners.setdefault(Path(name).stem, name) != name:
            raise ValueError(f"{flag}: {owners[Path(name).stem]} and {name} would share one mask; rename one of the pictures")
    without = [name for name, file in found.items() if file is None]
    if without:
        raise ValueError(f"{flag}: has no mask for {len(without)} picture(s), such as {Path(without[0]).stem}.png for {without[0]}")
    return found


def masks(
    pictures: captions.CaptionedImages, sizes: Sequence[tuple[int, int]], *, folder: Path | None = None, factor: int = 8
) -> list[Tensor]:
    """The weight of each latent of each picture in the loss, (1, H / factor, W / factor) in [0, 1]: the subject's share of its pixels.

    A mask is scaled and cropped as its picture is, then averaged over the pixels of a latent.

    Args:
        sizes: (H, W) that the pictures are fitted to.
        folder: of masks (--mask_data_dir): white is the subject. None: the pictures' own opacity (--mask_from_alpha).
        factor: pixels per latent in height and in width.

    Raises:
        ValueError: a picture without a mask, a mask of another shape than its picture, or one in which nothing is left of the subject.
    """
    records, found = pictures.records, {}
    files = mask_files(folder, (record.name for record in records)) if folder else {}
    for index, (record, size) in enumerate(zip(records, sizes, strict=True)):
        if (record.name, size) in found:  # --repeats
            continue
        flag = f"--mask_data_dir {folder}: the mask of {record.name}" if folder else f"--mask_from_alpha: {record.name}"
        if folder:  # black and white, perhaps with an opaque alpha channel
            mask, opacity = images.open_mask(files[record.name], opaque=False)
        else:
            mask, opacity = images.open_mask(pictures.read(index), record.name)
        if folder is None and not opacity:
            raise ValueError(f"{flag} has no transparency; cut the subject out, leave the picture out, or use --mask_data_dir")
        if abs(mask.width * record.height / (mask.height * record.width) - 1) > _LARGEST_SKEW:
            raise ValueError(f"{flag} is {mask.width}x{mask.height}, its picture {record.width}x{record.height}: make their shapes equal")
        pixels = (buckets.fit(mask.convert("RGB"), size)[:1] + 1) / 2  # (1, H, W) in [0, 1]
        weights = torch.nn.functional.avg_pool2d(pixels, factor)  # (1, h, w)
        if not weights.any():
            raise ValueError(f"{flag} shows nothing of the subject after the cut to {size[1]}x{size[0]}; white or opaque is the subject")
        found[record.name, size] = weights
    return [found[record.name, size] for record, size in zip(records, sizes, strict=True)]
