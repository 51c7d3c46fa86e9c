"""Captioned data sets in every layout, made by hand in tmp_path.

What cannot be used is named, and a changed file is never taken for the old one.
"""

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from src.data import captions, sources
from src.data.captions import CaptionedImages, check_source, open_captioned

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT / "datas" / "photos"
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]


def picture(number: int, size: tuple[int, int] = (32, 24), form: str = "PNG") -> bytes:
    """A picture that says by its colour which one it is."""
    stream = io.BytesIO()
    Image.new("RGB", size, COLOURS[number]).save(stream, form)
    return stream.getvalue()


def make_folder(folder: Path, captions: list, names: list[str] | None = None) -> Path:
    """Pictures 0.png, 1.png... and a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"{i}.png" for i in range(len(captions))]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture(number))
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in zip(names, captions, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def load(source: Path | str, tmp_path: Path, **options) -> CaptionedImages:
    return open_captioned(str(source), cache_dir=tmp_path / "cache", **{"progress": False, **options})


def shown(images: CaptionedImages) -> list[tuple[str, int]]:
    """(prompt, number of the picture that its pixels show)."""
    return [(record.prompt, COLOURS.index(images.image(i).getpixel((3, 3)))) for i, record in enumerate(images.records)]


# --------------------------------------------------------------------------- folders


def test_a_folder_with_metadata_in_its_order(tmp_path):
    images = load(make_folder(tmp_path / "d", ["zero", "one", "two"], ["c.png", "sub/a.png", "b.png"]), tmp_path)
    assert shown(images) == [("zero", 0), ("one", 1), ("two", 2)] and len(images) == 3
    assert [r.name for r in images.records] == ["c.png", "sub/a.png", "b.png"]
    assert {(r.width, r.height) for r in images.records} == {(32, 24)} and len({r.key for r in images.records}) == 3
    assert images.column_names == ["file_name", "text"] and images.skipped == []


def test_csv_and_another_caption_column(tmp_path):
    folder = make_folder(tmp_path / "d", ["x", "y"])
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,prompt\r\n1.png,"one, with a comma"\r\n0.png,zero\r\n', encoding="utf-8-sig")
    assert shown(load(folder, tmp_path, caption_column="prompt")) == [("one, with a comma", 1), ("zero", 0)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0.png,a tabby cat, asleep", "line 2: more fields than the header's 2; put a text with a comma in double quotes"),
        ('0.png,"OPEN, says a sign', "unexpected end of data"),
        ('0.png,"OPEN" says a sign', "line 2: .*expected after"),
    ],
)
def test_a_csv_whose_captions_would_be_cut_or_joined_is_refused(tmp_path, line, words):
    """A comma without quotes would end the caption; a quote that is not closed would swallow the rows after it."""
    folder = make_folder(tmp_path / "d", ["zero", "one"])
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(f"file_name,text\n{line}\n1.png,one\n")
    with pytest.raises(ValueError, match=f"--dataset_name: .*metadata.csv cannot be read as CSV .*{words}"):
        load(folder, tmp_path)
    (folder / "metadata.csv").write_text("file_name,text\n0.png,zero,,\n1.png,one\n")  # as spreadsheets end their lines
    assert shown(load(folder, tmp_path)) == [("zero", 0), ("one", 1)]


def test_a_caption_file_that_cannot_be_opened_costs_its_picture_alone(tmp_path):
    folder = tmp_path / "d"
    (folder / "1.txt").mkdir(parents=True)
    for number in (0, 1):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "0.txt").write_text("zero")
    images = load(folder, tmp_path, default_prompt="a thing")
    assert shown(images) == [("zero", 0)] and images.skipped == ["1.png: 1.txt cannot be read (Is a directory)"]


def test_a_text_in_place_of_a_file_name_is_refused_in_one_line(tmp_path):
    """Longer than a file's name may be: swapped columns."""
    folder = make_folder(tmp_path / "d", ["zero"])
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a long caption " * 30, "text": "0.png"}))
    with pytest.raises(ValueError, match="of the first 1 pictures .* none exists"):
        check_source(str(folder))


def test_a_full_disk_does_not_end_the_scan(tmp_path, monkeypatch, capsys):
    """What a scan remembers only spares time."""
    folder = make_folder(tmp_path / "d", ["zero", "one"])

    def full(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(captions.Path, "write_text", full)
    assert shown(load(folder, tmp_path)) == [("zero", 0), ("one", 1)]
    assert "warning: what this scan saw is not remembered" in (said := capsys.readouterr().err) and "No space left" in said
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_one_txt_per_picture_sorted_by_name(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for number, stem in enumerate(["b", "a"]):
        (folder / f"{stem}.PNG").write_bytes(picture(number))
        (folder / f"{stem}.txt").write_text(f" caption of {stem} ü\n", encoding="utf-8-sig")
    assert shown(load(folder, tmp_path, caption_column="whatever")) == [("caption of a ü", 1), ("caption of b ü", 0)]


def test_other_files_are_ignored_with_a_count(tmp_path, capsys):
    """Facts, defect 12: any file that is no picture crashed the public scripts."""
    folder = make_folder(tmp_path / "d", ["zero", "one"])
    for name in ("notes.md", "Thumbs.db", "._0.png", "unnamed.png"):
        (folder / name).write_bytes(b"x")
    assert len(load(folder, tmp_path, progress=True)) == 2
    assert "2 captioned picture(s), 4 other file(s) ignored" in capsys.readouterr().out


def test_pictures_in_subfolders_are_not_read_but_counted(tmp_path, capsys):
    for name in ("0", "more/1", "more/2", ".thumbnails/3"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / f"{name}.png").write_bytes(picture(0))
        (tmp_path / "d" / f"{name}.txt").write_text("a caption")
    assert len(load(tmp_path / "d", tmp_path, progress=True)) == 1
    assert capsys.readouterr().out == f"{tmp_path / 'd'}: 1 captioned picture(s), 2 picture(s) in subfolders not read\n"


def test_an_entry_without_a_file_name_is_named_by_its_number(tmp_path):
    folder = make_folder(tmp_path / "d", ["zero"])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"text": "no picture"}\n')
    images = load(folder, tmp_path, default_prompt="a thing")
    assert shown(images) == [("zero", 0)] and images.skipped == ["entry 2: no 'file_name' in it"]


def test_duplicates_keep_their_own_captions(tmp_path):
    folder = make_folder(tmp_path / "d", ["zero", "one"])
    shutil.copy(folder / "0.png", folder / "again.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "again.png", "text": "the same again"}\n{"file_name": "1.png", "text": "one, said differently"}\n')
    images = load(folder, tmp_path)
    assert shown(images) == [("zero", 0), ("one", 1), ("the same again", 0), ("one, said differently", 1)]
    keys = [record.key for record in images.records]
    assert keys[0] == keys[2] and keys[1] == keys[3] and keys[0] != keys[1]


def test_of_a_list_of_captions_the_first_text_counts(tmp_path):
    assert [r.prompt for r in load(make_folder(tmp_path / "d", [["", " a ", "b"], "c"]), tmp_path).records] == ["a", "c"]


@pytest.mark.parametrize("nothing", [None, "", "  \n", [], [None], 7])
def test_without_a_caption_a_picture_is_skipped_and_named(tmp_path, nothing, capsys):
    folder = make_folder(tmp_path / "d", ["zero", nothing, "two"])
    images = load(folder, tmp_path, progress=True)
    assert shown(images) == [("zero", 0), ("two", 2)] and images.skipped == ["1.png: no caption"]
    assert "1 picture(s) skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--strict_data: 1.png: no caption"):
        load(folder, tmp_path, strict=True)


def test_a_default_prompt_stands_in_for_a_missing_caption_not_for_an_unreadable_one(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "0.txt").write_text("zero")
    (folder / "2.txt").write_bytes("狗".encode("gbk"))
    images = load(folder, tmp_path, default_prompt="a thing")
    assert shown(images) == [("zero", 0), ("a thing", 1)] and images.skipped == ["2.png: 2.txt is not UTF-8 text"]
    with pytest.raises(ValueError, match="--strict_data: 2.png: 2.txt is not UTF-8 text"):
        load(folder, tmp_path, default_prompt="a thing", strict=True)
    tar = make_tar(tmp_path / "d.tar", {"0.png": picture(0), "0.json": b"{broken", "1.png": picture(1)})
    images = load(tar, tmp_path, default_prompt="a thing")
    assert shown(images) == [("a thing", 1)] and images.skipped == ["d.tar:0.png: its .json cannot be read"]


@pytest.mark.parametrize("broken", ["a smile \ud83d", ["", "\udc80"]])
def test_half_a_surrogate_pair_is_no_caption(tmp_path, broken, capsys):
    """JSON can write one, as "\\ud83d"; it has no place in UTF-8, nor in a tokenizer. A default prompt does not stand in for it."""
    folder = make_folder(tmp_path / "d", ["zero", broken, "two \U0001f600"])
    for default in (None, "a thing"):
        images = load(folder, tmp_path, progress=True, default_prompt=default)
        assert shown(images) == [("zero", 0), ("two \U0001f600", 2)] and images.skipped == ["1.png: caption is not valid Unicode"]
        assert "1 picture(s) skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--strict_data: 1.png: caption is not valid Unicode"):
        load(folder, tmp_path, strict=True)


def test_file_names_that_are_no_text_are_skipped_and_printed(tmp_path, monkeypatch):
    """Python reads the byte FF of a file name as "\\udcff", which standard output refuses; "\\ud83d" names no file at all."""
    folder = make_folder(tmp_path / "d", ["zero", "one", "two"])
    lines = [{"file_name": name, "text": "caption"} for name in ("0.png", "none-\udcff.png", "none-\ud83d.png", "none\0.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    assert len(load(folder, tmp_path, progress=True).skipped) == 3
    out.flush()
    said = out.buffer.getvalue().decode()
    assert "3 picture(s) skipped" in said and "none-\\udcff.png: No such file" in said and "none-\\ud83d.png: " in said


def break_file(folder: Path, how: str) -> None:
    file = folder / "1.png"
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"short": picture(1, (300, 300))[:200], "empty": b"", "text": b"hello"}[how])


@pytest.mark.parametrize("how", ["short", "empty", "text", "missing"])
def test_a_broken_picture_is_skipped_and_named(tmp_path, how):
    folder = make_folder(tmp_path / "d", ["zero", "one", "two"])
    break_file(folder, how)
    for _ in range(2):  # the second start, with a memory of the first, says the same
        images = load(folder, tmp_path)
        assert shown(images) == [("zero", 0), ("two", 2)]
        assert len(images.skipped) == 1 and "1.png: " in images.skipped[0]
    with pytest.raises(ValueError, match="--strict_data: .*1.png"):
        load(folder, tmp_path, strict=True)


def test_a_read_that_fails_once_costs_no_picture(tmp_path, monkeypatch):
    """As a network disk does now and then. What fails twice is broken; what is not there is not asked for again."""
    folder = make_folder(tmp_path / "d", ["zero", "one", "two"])
    read, failures, asked = sources.Folder.read, {1: 1}, []

    def failing(source, row):
        asked.append(row)
        failures[row] = failures.get(row, 0) - 1
        if failures[row] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return read(source, row)

    monkeypatch.setattr(sources.Folder, "read", failing)
    monkeypatch.setattr(captions, "_PAUSE", 0.0)
    assert shown(load(folder, tmp_path)) == [("zero", 0), ("one", 1), ("two", 2)]
    failures[1] = 2
    assert load(folder, tmp_path).skipped == ["1.png: Input/output error"]
    (folder / "2.png").unlink()
    asked.clear()
    assert load(folder, tmp_path).skipped == ["2.png: No such file or directory"] and asked.count(2) == 1


def test_a_picture_without_its_txt_is_skipped_with_the_reason(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(i))
    (folder / "0.txt").write_text("zero")
    (folder / "2.txt").write_bytes(b"\xff\xfe latin?")
    images = load(folder, tmp_path)
    assert shown(images) == [("zero", 0)] and images.skipped == ["1.png: no 1.txt beside it", "2.png: 2.txt is not UTF-8 text"]


def test_nothing_usable_is_an_error(tmp_path):
    folder = make_folder(tmp_path / "d", ["zero"])
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"--dataset_name .*none of its 1 picture\(s\).*0.png"):
        load(folder, tmp_path)


def test_max_train_samples_takes_the_first_usable_ones(tmp_path):
    folder = make_folder(tmp_path / "d", ["zero", "one", "two", "three"])
    break_file(folder, "short")
    assert shown(load(folder, tmp_path, max_train_samples=2)) == [("zero", 0), ("two", 2)]
    assert len(load(folder, tmp_path, max_train_samples=100)) == 3


def test_size_is_that_of_the_upright_picture(tmp_path):
    folder = make_folder(tmp_path / "d", ["zero"])
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (40, 20)).save(folder / "0.png", exif=exif)
    record = load(folder, tmp_path).records[0]
    assert (record.width, record.height) == (20, 40)


def test_sizes_that_another_measure_found_are_not_believed(tmp_path, monkeypatch):
    """They are remembered by content, so that nothing else would ever correct them."""
    folder = make_folder(tmp_path / "d", ["zero"])
    monkeypatch.setattr(captions, "_MEASURED_BY", 1)
    monkeypatch.setattr("src.images.measure", lambda *_: (7, 7))
    assert load(folder, tmp_path).records[0].width == 7
    monkeypatch.undo()
    assert load(folder, tmp_path).records[0].width == 32


def test_the_shipped_photographs(tmp_path):
    images = load(PHOTOS, tmp_path, strict=True)
    assert len(images) == 11 and len({record.prompt for record in images.records}) == 11
    assert all(images.image(i).size == (r.width, r.height) for i, r in enumerate(images.records))
    aspects = [r.width / r.height for r in images.records]
    assert min(aspects) < 0.6 and max(aspects) > 1.4


# --------------------------------------------------------------------------- never stale


def test_a_changed_picture_has_another_key_even_with_the_same_size_and_time(tmp_path):
    folder = make_folder(tmp_path / "d", ["zero"])
    file, stamp = folder / "0.png", (folder / "0.png").stat()
    before = load(folder, tmp_path).records[0]
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1  # in the last chunk's checksum, which decoders do not look at: only the bytes tell
    file.write_bytes(changed)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    assert load(folder, tmp_path).records[0].key != before.key


def test_a_picture_that_changes_during_the_run_is_refused(tmp_path):
    folder = make_folder(tmp_path / "d", ["zero", "one"])
    images = load(folder, tmp_path)
    (folder / "0.png").write_bytes(picture(2))
    with pytest.raises(ValueError, match="0.png changed"):
        images.image(0)
    (folder / "1.png").unlink()
    with pytest.raises(ValueError, match="1.png any more"):
        images.image(1)


def test_the_second_start_decodes_nothing(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "d", ["zero", "one"])
    before = load(folder, tmp_path).records
    monkeypatch.setattr("src.images.measure", lambda *a: pytest.fail("decoded again"))
    assert load(folder, tmp_path).records == before
    (folder / "0.png").write_bytes(picture(2))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):  # a new content is looked at
        load(folder, tmp_path)


def test_a_scan_that_is_killed_leaves_what_it_saw(tmp_path, monkeypatch):
    """SIGTERM ends Python where it stands, without `finally`: 8 new sizes are kept as soon as the next block, of 4 rows, begins."""
    folder = make_folder(tmp_path / "d", ["caption"] * 4)
    for i in range(20):
        (folder / f"{i}.png").write_bytes(picture(0, (8 + i, 8)))
        (folder / f"{i}.txt").write_text("caption")
    (folder / "metadata.jsonl").unlink()
    monkeypatch.setattr(captions, "_BLOCK", 4)
    monkeypatch.setattr(captions, "_KEEP_EVERY", 8)
    source = sources.open_source(str(folder), image_column="image", caption_column="text", cache_dir=tmp_path)
    rows = captions.scan(source, captions.Memo(tmp_path / "memo.json"), progress=False)
    keys = [next(rows)[1].key for _ in range(14)]
    known = captions.Memo(tmp_path / "memo.json")  # the scan is not over yet
    assert [known.size(key) is not None for key in keys] == [True] * 8 + [False] * 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_memory_is_no_obstacle(tmp_path, text):
    folder = make_folder(tmp_path / "d", ["zero"])
    before = load(folder, tmp_path).records
    (memo,) = (tmp_path / "cache" / "scans").iterdir()
    memo.write_text(text)
    assert load(folder, tmp_path).records == before


# --------------------------------------------------------------------------- parts of a data set


def test_subset_and_pickle_keep_captions_with_pictures(tmp_path):
    images = load(make_folder(tmp_path / "d", ["zero", "one", "two", "three"]), tmp_path)
    part = pickle.loads(pickle.dumps(images.subset([3, 1])))
    assert shown(part) == [("three", 3), ("one", 1)]


def test_held_out_pictures_are_chosen_by_content(tmp_path):
    folder = make_folder(tmp_path / "d", ["zero", "one", "two", "three"])
    shutil.copy(folder / "0.png", folder / "again.png")
    lines = (folder / "metadata.jsonl").read_text() + '{"file_name": "again.png", "text": "again"}\n'
    (folder / "metadata.jsonl").write_text(lines)
    rest, held = load(folder, tmp_path).hold_out(2)
    assert len(rest) + len(held) == 5 and len({r.key for r in held.records}) == 2
    assert not {r.key for r in rest.records} & {r.key for r in held.records}
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines.splitlines())))  # another order
    assert {r.key for r in load(folder, tmp_path).hold_out(2)[1].records} == {r.key for r in held.records}
    with pytest.raises(ValueError, match="cannot hold out 4 of 4"):
        load(folder, tmp_path).hold_out(4)


# --------------------------------------------------------------------------- tar


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_tars_in_order_with_txt_and_mixed_forms(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    make_tar(folder / "00001.tar", {"x/0.jpg": picture(2, form="JPEG"), "x/0.txt": b"two"})
    members = {"1.txt": b"one", "1.png": picture(1), "0.jpg": picture(0, form="JPEG"), "0.txt": b"zero\n", "9.cls": b"5"}
    make_tar(folder / "00000.tar", members)
    images = load(folder, tmp_path)
    assert [r.prompt for r in images.records] == ["one", "zero", "two"]
    brightest = [max(range(3), key=images.image(i).getpixel((3, 3)).__getitem__) for i in range(3)]
    assert brightest == [1, 0, 2]  # not by equality: JPEG shifts the colours a little
    assert [r.name for r in images.records] == ["00000.tar:1.png", "00000.tar:0.jpg", "00001.tar:x/0.jpg"]
    assert images.skipped == [] and shown(pickle.loads(pickle.dumps(images)).subset([0])) == [("one", 1)]


def test_a_caption_may_lie_far_from_its_picture(tmp_path):
    """`tar cf d.tar -C folder .` packs a folder in the file system's order: here all pictures, then all captions the other way round."""
    members = {f"./{i}.png": picture(i) for i in range(4)} | {f"./{i}.txt": f"number {i}".encode() for i in (3, 2, 1, 0)}
    tar = make_tar(tmp_path / "d.tar", members)
    expected = [(f"number {i}", i) for i in range(4)]
    assert shown(load(tar, tmp_path)) == expected
    assert shown(load(tar, tmp_path, default_prompt="a thing")) == expected  # as DreamBooth reads it


def test_webdataset_json_and_a_named_member(tmp_path):
    members = {"a.png": picture(0), "a.json": b'{"caption": "from json", "width": 3}', "a.txt": b"from txt"}
    members |= {"b.png": picture(1), "b.json": b"{"}
    tar = make_tar(tmp_path / "d.tar", members)
    images = load(tar, tmp_path, caption_column="caption")
    assert shown(images) == [("from json", 0)] and images.skipped == ["d.tar:b.png: its .json cannot be read"]
    assert shown(load(tar, tmp_path)) == [("from txt", 0)]
    with pytest.raises(ValueError, match="--caption_column 'prompt'.*png.*txt.*caption, width"):
        check_source(str(tar), caption_column="prompt")


def test_a_stray_picture_does_not_hide_the_shards(tmp_path, capsys):
    """A data set's banner, beside archives or above parquet; a captioned picture says that the folder is one of pictures."""
    folder = tmp_path / "d"
    (folder / "data").mkdir(parents=True)
    (folder / "banner.png").write_bytes(picture(3))
    assert sources.locate(str(folder)).kind == "txt"
    make_tar(folder / "data" / "00000.tar", {"0.png": picture(0), "0.txt": b"zero"})
    images = load(folder, tmp_path, progress=True)
    assert shown(images) == [("zero", 0)] and "1 other file(s) ignored" in capsys.readouterr().out
    make_parquet(folder / "data" / "train.parquet", ["one"])
    assert sources.locate(str(folder)).kind == "parquet"
    assert sources.locate(str(folder), captioned=False).kind == "txt"  # a DreamBooth's: its pictures need no captions
    (folder / "banner.txt").write_text("a banner")
    assert shown(load(folder, tmp_path)) == [("a banner", 3)]


def test_a_tar_that_was_cut_short_is_refused(tmp_path):
    members = {f"{i}.{form}": data for i in range(3) for form, data in (("png", picture(i)), ("txt", b"caption"))}
    tar = make_tar(tmp_path / "d.tar", members)
    whole = tar.read_bytes()
    assert len(load(tar, tmp_path)) == 3
    header, inside = whole[: 512 * 4 + 100], whole[: 512 * 5 + 20]  # cut in the third member's header, and in its data
    for damaged in (header, inside, header[:2048] + b"garbage" * 200, whole + whole, b"\0" * 100, b"not a tar" * 100):
        tar.write_bytes(damaged)
        with pytest.raises(ValueError, match="--dataset_name"):
            load(tar, tmp_path)


# --------------------------------------------------------------------------- tables


def make_parquet(path: Path, captions: list, column: str = "image", plain: bool = False) -> Path:
    import pyarrow
    import pyarrow.parquet

    pictures = [picture(i) if plain else {"bytes": picture(i), "path": None} for i in range(len(captions))]
    pyarrow.parquet.write_table(pyarrow.table({column: pictures, "text": captions, "id": list(range(len(captions)))}), path)
    return path


@pytest.mark.slow  # importing datasets takes seconds
@pytest.mark.parametrize("plain", [False, True])
def test_parquet(tmp_path, plain):
    make_parquet(tmp_path / "train-0.parquet", ["zero", None, "two"], plain=plain)
    make_parquet(tmp_path / "test-0.parquet", ["not for training"], plain=plain)
    images = load(tmp_path, tmp_path)
    assert shown(images) == [("zero", 0), ("two", 2)] and images.skipped == ["row 1: no caption"]
    assert shown(pickle.loads(pickle.dumps(images)).subset([1])) == [("two", 2)]
    assert images.column_names == ["image", "text", "id"]


def test_a_folder_of_parts_is_read_for_its_training_part(tmp_path):
    """As the Hub converts data sets: default/train/0000.parquet."""
    for part in ("test", "train"):
        (tmp_path / "d" / "default" / part).mkdir(parents=True)
        make_parquet(tmp_path / "d" / "default" / part / "0000.parquet", [f"for {part}"])
    assert shown(load(tmp_path / "d", tmp_path)) == [("for train", 0)]


def test_parquet_replaced_under_its_name_and_time_is_read_anew(tmp_path):
    file = tmp_path / "d.parquet"
    for captions_ in (["old"], ["new", "newer"]):
        make_parquet(file, captions_)
        os.utime(file, (1e9, 1e9))  # as archives with fixed times unpack
        assert [prompt for prompt, _ in shown(load(file, tmp_path))] == captions_


def test_a_table_names_the_file_that_is_gone(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"image": ["gone.png"], "text": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"none of its 1 picture\(s\) can be used; the first: row 0: gone.png: No such file"):
        load(tmp_path / "d.parquet", tmp_path)


@pytest.mark.slow
def test_of_parquet_only_the_columns_in_use_are_copied(tmp_path):
    """`datasets` reads parquet from an Arrow file of its own in --cache_dir: here without 1 MB of masks, which nobody asked for."""
    import pyarrow
    import pyarrow.parquet

    rows = {"image": [picture(0), picture(1)], "text": ["zero", "one"], "mask": [b"x" * 500_000, b"y" * 500_000]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "d.parquet")
    images = load(tmp_path / "d.parquet", tmp_path)
    assert shown(images) == [("zero", 0), ("one", 1)] and images.column_names == ["image", "text", "mask"]
    assert 0 < sum(file.stat().st_size for file in (tmp_path / "cache" / "datasets").rglob("*.arrow")) < 10_000
    assert load(tmp_path / "d.parquet", tmp_path, caption_column="none", default_prompt="a thing").records[1].prompt == "a thing"


@pytest.mark.slow
def test_a_row_without_a_picture_is_named_and_an_empty_shard_passed_over(tmp_path):
    """A struct whose parts are null, as libraries write a missing picture; and a first shard without rows, whose captions have no type."""
    import pyarrow
    import pyarrow.parquet

    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    nothing = {"bytes": None, "path": None}
    rows = {"image": pyarrow.array([{"bytes": picture(0), "path": None}, nothing, None], struct), "text": ["zero", "one", "two"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "train-1.parquet")
    empty = pyarrow.table({"image": pyarrow.array([], struct), "text": pyarrow.array([], pyarrow.null())})
    pyarrow.parquet.write_table(empty, tmp_path / "train-0.parquet")
    images = load(tmp_path, tmp_path)
    assert shown(images) == [("zero", 0)] and images.skipped == [f"row {i}: no picture in this row" for i in (1, 2)]


@pytest.mark.parametrize("column", ["image", "other"])
def test_what_holds_no_pictures_is_refused_by_name(tmp_path, column):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: [1, 2], "text": ["a", "b"]}), tmp_path / "d.parquet")
    words = "holds int64; pictures are binary" if column == "image" else "is not in .*it has other, text"
    with pytest.raises(ValueError, match=f"--image_column 'image' .*{words}"):
        check_source(str(tmp_path / "d.parquet"))


def test_each_shard_is_looked_at(tmp_path):
    import pyarrow
    import pyarrow.parquet

    make_parquet(tmp_path / "train-0.parquet", ["zero"])
    pyarrow.parquet.write_table(pyarrow.table({"image": [picture(1)]}), tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match="--caption_column 'text' is not in .*train-1.parquet; it has image"):
        check_source(str(tmp_path))


@pytest.mark.slow
def test_the_only_picture_column_is_found(tmp_path):
    import pyarrow
    import pyarrow.parquet

    large = pyarrow.array([picture(2)], pyarrow.large_binary())
    pyarrow.parquet.write_table(pyarrow.table({"jpg": large, "text": ["two"]}), tmp_path / "large.parquet")
    assert shown(load(tmp_path / "large.parquet", tmp_path)) == [("two", 2)]
    file = make_parquet(tmp_path / "d.parquet", [["zero", "other"], ["one"]], column="jpg")
    assert shown(load(file, tmp_path)) == [("zero", 0), ("one", 1)]


def test_a_connection_that_breaks_halfway_is_one_line(tmp_path, monkeypatch):
    """`datasets` lets HTTPError through, which is neither an OSError nor a ValueError."""
    from huggingface_hub.errors import HTTPError

    def refuse(*args, **options):
        raise HTTPError("peer closed connection\nwithout sending complete message body")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    line = r"--dataset_name nobody/pictures .* Hub either \(the Hub could not be reached .*\); check the spelling"
    with pytest.raises(ValueError, match=line) as error:
        open_captioned("nobody/pictures", cache_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_unreachable_hub_id_names_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "import sys; from pathlib import Path; from src.data.captions import open_captioned\n"
        "try: open_captioned('nobody/no-such-pictures', cache_dir=Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    expected = "--dataset_name nobody/no-such-pictures is no local path, and cannot be had from the Hugging Face Hub either"
    assert expected in done.stdout, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1


# --------------------------------------------------------------------------- check_source


@pytest.mark.parametrize(
    "name", ["datas/photoz", "./nowhere", "/nowhere/x", "~/no such folder", "a/b/c", "my pictures", "nothing.parquet", ""]
)
def test_a_path_that_is_not_there(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # where a folder datas lies: datas/photoz is a misspelt path, not a Hub id
    with pytest.raises(ValueError, match="--dataset_name .*does not exist"):
        check_source(name)


@pytest.mark.parametrize("name", ["nobody/some-pictures", "mnist", "a_b/c.d-e"])
def test_a_hub_id_passes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_source(name)


def wrong_sources(tmp: Path) -> dict[str, tuple[Path, str]]:
    made = {}
    for name in ("empty", "nested", "uncaptioned", "file", "csv", "json", "list", "latin", "nofile", "nocolumn", "gone", "none"):
        (tmp / name).mkdir()
    made["empty"] = tmp / "empty", "--dataset_name .*has no pictures; expected"
    (tmp / "empty" / "readme.md").write_text("x")
    made["nested"] = make_folder(tmp / "nested" / "train", ["zero"]).parent, "has no pictures.*try --dataset_name .*train"
    make_folder(tmp / "nested" / "test", ["zero"])  # comes first by name
    (tmp / "phone").mkdir()
    (tmp / "phone" / "IMG_1.HEIC").write_bytes(b"x")
    made["phone"] = tmp / "phone", "has no pictures that can be read; convert IMG_1.HEIC and the rest to JPEG"
    (tmp / "uncaptioned" / "a.png").write_bytes(picture(0))
    made["uncaptioned"] = tmp / "uncaptioned", r"1 picture\(s\) but no captions.*a.txt for a.png"
    (tmp / "file" / "a.zip").write_bytes(b"x")
    (tmp / "stray").mkdir()
    (tmp / "stray" / "a.png").write_bytes(picture(0))
    make_tar(tmp / "stray" / "a.tar", {"a.md": b"x"})
    made["stray"] = tmp / "stray", r"a.tar: no pictures in it .*because none of the 1 picture\(s\) beside them has a .txt"
    made["file"] = tmp / "file" / "a.zip", "neither .parquet nor .tar"
    for name, text, reason in (
        ("json", '{"file_name": "a.png", "text": "b"}\n{broken\n', "line 2 is not JSON"),
        ("list", '["a.png", "b"]\n', "line 1 must be an object"),
        ("nofile", '{"picture": "a.png", "text": "b"}\n', "no column 'file_name'; it has picture, text"),
        ("nocolumn", '{"file_name": "a.png", "prompt": "b"}\n', "--caption_column 'text' is not in .*it has file_name, prompt"),
        ("gone", '{"file_name": "a.png", "text": "b"}\n', "of the first 1 pictures .* none exists"),
        ("none", "\n", "has no entries"),
    ):
        (tmp / name / "metadata.jsonl").write_text(text)
        made[name] = tmp / name, reason
    (tmp / "latin" / "metadata.csv").write_bytes("file_name,text\na.png,caf\xe9\n".encode("latin-1"))
    made["latin"] = tmp / "latin", "is not UTF-8"
    (tmp / "csv" / "metadata.csv").write_text("file_name,prompt\na.png,b\n")
    made["csv"] = tmp / "csv", "--caption_column 'text' is not in .*it has file_name, prompt"
    made["tar"] = make_tar(tmp / "a.tar", {"a.txt": b"x"}), "no pictures in it"
    (tmp / "bad.parquet").write_bytes(b"PAR1")
    made["bad parquet"] = tmp / "bad.parquet", "cannot be read as parquet"
    made["column"] = make_parquet(tmp / "b.parquet", ["x"]), "--caption_column 'prompt' is not in .*it has image, text, id"
    made["rows"] = make_parquet(tmp / "c.parquet", []), "--image_column 'image'|has no rows"
    return made


def test_what_is_wrong_is_said_in_one_line_with_the_flag(tmp_path):
    for name, (path, reason) in wrong_sources(tmp_path).items():
        column = "prompt" if name == "column" else "text"
        with pytest.raises(ValueError, match=reason) as caught:
            check_source(str(path), caption_column=column)
        assert "\n" not in str(caught.value) and "--" in str(caught.value), name
        with pytest.raises(ValueError, match=reason):
            open_captioned(str(path), caption_column=column, cache_dir=tmp_path / "cache", progress=False)


@pytest.mark.slow
def test_the_check_is_quick_and_imports_nothing_heavy(tmp_path):
    """5,000 pictures with text files in well under half a second, without torch, PIL or datasets."""
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(5000):
        (folder / f"{i}.jpg").touch()
        (folder / f"{i}.txt").touch()
    seconds = []
    for _ in range(3):  # the best of three: other programs run here too
        start = time.perf_counter()
        check_source(str(folder))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    code = (
        "import sys; from src.data.captions import check_source; check_source('datas/photos'); "
        "print({'torch', 'PIL', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
