"""docs/data.md: every example on the page is built as it stands there and read by the real loaders; its tables are held against the code.

An example is a tree: a folder, its files indented by four spaces, and what is in a file by eight. A picture has no content on the page.
"""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.data import buckets, captions, preferences, prompts, samples
from src.data.cache import TensorCache
from src.data.sources import PICTURES
from src.images import open_rgb

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def examples() -> dict[str, dict[str, list[str]]]:
    """{folder: {file: lines in it}} of all trees on the page."""
    found = {}
    for block in re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S):
        root, *lines = block.splitlines()
        files: dict[str, list[str]] = {}
        for line in lines:
            if line.startswith(" " * 8):
                files[list(files)[-1]].append(line.strip())
            else:
                files[line.strip()] = []
        found[root.rstrip("/")] = files
    return found


EXAMPLES = examples()


def picture(name: str) -> bytes:
    """A picture of its own for each name, in the format that the name says."""
    colour = tuple(np.random.default_rng(list(name.encode())).integers(0, 256, 3).tolist())
    stream = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(stream, {".jpg": "JPEG"}.get(Path(name).suffix, "PNG"))
    return stream.getvalue()


def tar(lines: list[str]) -> bytes:
    """Members `NAME` (a picture) or `NAME: content`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for line in lines:
            name, _, content = line.partition(": ")
            data = content.encode() if content else picture(name)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def parquet(lines: list[str], as_datasets_does: bool = False) -> bytes:
    """One JSON object a row, <NAME> for the bytes of a picture."""
    import pyarrow
    import pyarrow.parquet

    def value(found):
        name = re.fullmatch(r"<(.*)>", found) if isinstance(found, str) else None
        data = picture(name[1]) if name else found
        return {"bytes": data, "path": None} if name and as_datasets_does else data

    rows = [json.loads(re.sub(r"(<[^>]*>)", r'"\1"', line)) for line in lines]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({key: [value(row[key]) for row in rows] for key in rows[0]}), stream)
    return stream.getvalue()


def build(folder: str, where: Path, **options) -> str:
    """Writes an example under `where`; returns its path."""
    for name, lines in EXAMPLES[folder].items():
        file = where / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in PICTURES:
            assert not lines
            file.write_bytes(picture(file.name))
        else:
            binary = {".tar": tar, ".parquet": parquet}.get(file.suffix)
            file.write_bytes(binary(lines, **options) if binary else ("\n".join(lines) + "\n").encode())
    return str(where / folder)


# --------------------------------------------------------------------------- the examples

TABBY, DOG = "a close-up of a tabby cat with green eyes", "a dog running on a beach"
CAPTIONED = {  # folder -> what the page says to add, captions in order
    "datas/with-jsonl": ({}, [TABBY, DOG]),
    "datas/with-csv": ({"caption_column": "caption"}, ["a tabby cat, asleep", DOG]),
    "datas/with-txt": ({}, [TABBY, DOG]),
    "datas/with-tar": ({}, [TABBY, DOG]),
    "datas/with-parquet": ({}, [TABBY, DOG]),
}
PICKAPIC = preferences.Columns("jpg_0", "jpg_1", "label_0", "caption")
PAIRS = {  # folder -> columns, (caption, winner, loser), number of ties
    "datas/pairs-labelled": (PICKAPIC, [("a red circle", "0-a.png", "0-b.png"), ("a blue star", "1-b.png", "1-a.png")], 1),
    "datas/pairs-chosen": (preferences.Columns("good", "bad", None, "prompt"), [("a red circle", "0-a.png", "0-b.png")], 0),
    "datas/pairs-parquet": (PICKAPIC, [("a red circle", "a.jpg", "b.jpg")], 0),
}
FOX, OWL = "a fox in the snow", "an owl at night"
PROMPTS = {
    "plain.txt": [(FOX, {}), (OWL, {})],
    "with-metadata.jsonl": [
        ("a photo of two cats", {"tag": "counting", "include": [{"class": "cat", "count": 2}]}),
        ('a shop sign that says "OPEN"', {"language": "en"}),
    ],
    "refl.json": [(FOX, {"id": "000010-0137"}), (OWL, {"id": "000012-0056"})],
    "table.csv": [("a fox, asleep", {"source": "me"})],
}  # fmt: skip


def test_there_is_an_expectation_for_every_example():
    assert EXAMPLES.keys() == CAPTIONED.keys() | PAIRS.keys() | {"datas/prompts"}
    assert EXAMPLES["datas/prompts"].keys() == PROMPTS.keys()


def test_every_example_passes_the_check_before_anything_is_loaded(tmp_path):
    for folder, (columns, _) in CAPTIONED.items():
        captions.check_source(build(folder, tmp_path), **columns)
    for folder, (columns, _, _) in PAIRS.items():
        preferences.check_source(build(folder, tmp_path), columns)


def marked(folders):
    """Parquet is read through `datasets`, whose import takes seconds."""
    return [pytest.param(folder, marks=pytest.mark.slow) if "parquet" in folder else folder for folder in folders]


@pytest.mark.parametrize("folder", marked(CAPTIONED))
def test_captioned_pictures_are_read(tmp_path, folder):
    columns, expected = CAPTIONED[folder]
    for options in [{}, {"as_datasets_does": True}] if "parquet" in folder else [{}]:
        images = captions.open_captioned(build(folder, tmp_path, **options), cache_dir=tmp_path / "cache", strict=True, **columns)
        assert [record.prompt for record in images.records] == expected
        assert images.image(0).size == (24, 16)


@pytest.mark.parametrize("folder", marked(PAIRS))
def test_pairs_are_read_with_the_winner_first(tmp_path, folder):
    columns, expected, ties = PAIRS[folder]
    pairs = preferences.open_preferences(build(folder, tmp_path), columns, cache_dir=tmp_path / "cache", strict=True)
    assert pairs.ties == ties and len(pairs) == len(expected)
    for index, (caption, winner, loser) in enumerate(expected):
        assert pairs.records[index].prompt == caption
        for shown, name in zip(pairs.images(index), (winner, loser), strict=True):
            assert shown.tobytes() == open_rgb(picture(name)).tobytes()


def test_prompts_are_read_with_their_metadata(tmp_path):
    folder = build("datas/prompts", tmp_path)
    for name, expected in PROMPTS.items():
        assert prompts.read(f"{folder}/{name}", cache_dir=tmp_path) == [prompts.Prompt(*one) for one in expected], name


def test_the_built_in_lists_have_the_stated_lengths():
    stated = dict(re.findall(r"`(\w+)` \((\d+)\)", PAGE))
    assert {name: int(count) for name, count in stated.items()} == {name: len(make()) for name, make in prompts.BUILT_IN.items()}


# --------------------------------------------------------------------------- what becomes of a picture


def rows(head: str) -> list[list[str]]:
    table = re.search(rf"^\| {re.escape(head)}.*\n\|[-| ]+\n((?:\|.*\n)+)", PAGE, re.M)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize(("modes", "becomes"), rows("mode (Pillow's name)"), ids=lambda cell: cell)
def test_every_mode_becomes_what_the_table_says(modes, becomes):
    for mode in re.findall(r"`([^`]+)`", modes):
        image = Image.new(mode, (4, 4))  # zeros: black, and transparent where there is alpha
        if becomes.startswith("refused"):
            with pytest.raises(ValueError):
                open_rgb(image)
        else:
            shown = open_rgb(image)
            assert shown.mode == "RGB"
            assert (shown.getpixel((0, 0)) == (255, 255, 255)) is ("white" in becomes or mode == "CMYK"), mode  # no ink is white


def test_the_buckets_at_512_are_those_of_the_page():
    found = buckets.buckets(512, aspect_buckets=True)
    stated = [(int(height), int(width)) for height, width in re.findall(r"\b(\d{3})x(\d{3})\b", PAGE)]
    assert len(found) == 13 and set(stated) <= set(found) and stated[0] == found[0] and stated[-1] == found[-1]


# --------------------------------------------------------------------------- the caches


def computed(tmp_path: Path, folder: Path, *, side: int = 16, flip: bool = True, vae: str = "one", encoder: str = "one") -> tuple[int, int]:
    """(latents, embeddings) that this start computes anew."""
    images = captions.open_captioned(str(folder), cache_dir=tmp_path / "cache", progress=False)
    latents = TensorCache(tmp_path / "cache", "latents", {"vae": vae})
    text = TensorCache(tmp_path / "cache", "text", {"encoders": encoder})

    def encode(pixels):
        return pixels, torch.ones_like(pixels)

    def encode_text(texts):
        return torch.zeros(len(texts), 2, 4), torch.zeros(len(texts), 4)

    done = samples.fill_latents(latents, images, [(side, side)] * len(images), flip=flip, encode=encode, batch_size=4, progress=False)
    found = [record.prompt for record in images.records]
    return done, samples.fill_text(text, found, encode_text, batch_size=4, progress=False)


def test_what_makes_an_entry_stale(tmp_path):
    """Two pictures, each with a mirrored latent, and two captions; the rows of the page's table in their order."""
    folder = Path(build("datas/with-txt", tmp_path))
    assert computed(tmp_path, folder) == (4, 2)
    assert computed(tmp_path, folder) == (0, 0)
    (folder / "cat.jpg").write_bytes(picture("another.jpg"))
    assert computed(tmp_path, folder) == (2, 0)  # a picture's bytes
    for suffix in (".jpg", ".txt"):
        (folder / f"cat{suffix}").rename(folder / f"zebra{suffix}")
    assert computed(tmp_path, folder.rename(tmp_path / "elsewhere")) == (0, 0)  # its name, its place, the order
    (tmp_path / "elsewhere" / "rex.txt").write_text("a dog on a lawn")
    assert computed(tmp_path, tmp_path / "elsewhere") == (0, 1)  # a caption
    assert computed(tmp_path, tmp_path / "elsewhere", side=32) == (4, 0)  # --resolution
    assert computed(tmp_path, tmp_path / "elsewhere", vae="another") == (4, 0)
    assert computed(tmp_path, tmp_path / "elsewhere", encoder="another") == (0, 2)
    assert computed(tmp_path, tmp_path / "elsewhere", flip=False) == (0, 0)
    assert len(rows("what changes")) == 7
