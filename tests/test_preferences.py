"""Preference pairs: the layouts, who wins, ties by value, broken rows by name, and what the two pictures of a pair share."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from src.data import buckets, cache, preferences, samples

PICKAPIC = preferences.Columns("jpg_0", "jpg_1", "label_0", "caption")
SIZE = (24, 16)  # width, height


def picture(number: int) -> Image.Image:
    """A smooth lopsided picture that no other number has."""
    corners = np.random.default_rng(number).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize(SIZE, Image.Resampling.BILINEAR)


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


def parquet(folder, rows):
    """Rows (caption, first, second, label) as pickapic_v2 has them; numbers become pictures."""
    import pyarrow
    import pyarrow.parquet

    def blob(value):
        return encoded(value) if isinstance(value, int) else value

    columns = {
        "caption": [row[0] for row in rows], "jpg_0": [blob(row[1]) for row in rows], "jpg_1": [blob(row[2]) for row in rows],
        "label_0": pyarrow.array([row[3] for row in rows], pyarrow.float64()), "are_different": [True] * len(rows),
        "has_label": [row[3] is not None for row in rows],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train-00000.parquet")
    return folder


def metadata(folder, rows, **columns):
    """A folder of files and metadata.jsonl; rows (caption, first, second, label)."""
    folder.mkdir(parents=True)
    names = {"caption": "caption", "first": "jpg_0", "second": "jpg_1", "label": "label_0"} | columns
    with (folder / "metadata.jsonl").open("w") as lines:
        for caption, first, second, label in rows:
            for number in (first, second):
                picture(number).save(folder / f"{number}.png")
            entry = {names["caption"]: caption, names["first"]: f"{first}.png", names["second"]: f"{second}.png"}
            lines.write(json.dumps(entry | ({names["label"]: label} if names["label"] else {})) + "\n")
    return folder


def opened(folder, tmp_path, columns=PICKAPIC, **options):
    return preferences.open_preferences(str(folder), columns, cache_dir=tmp_path / "cache", **({"progress": False} | options))


def is_picture(image: Image.Image, number: int) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(picture(number)))


# --------------------------------------------------------------------------- who wins


@pytest.mark.parametrize(("label", "winner"), [(1, 0), (0, 1), (1.0, 0), (0.0, 1), ("1", 0), ("0.0", 1), (True, 0), (False, 1),
                                               (0.5, None), ("0.5", None)])  # fmt: skip
def test_the_label_says_who_wins(label, winner):
    assert preferences.preferred(label) == winner


@pytest.mark.parametrize("label", [None, math.nan, 0.7, 2, -1, "left", ""])
def test_anything_else_is_no_label(label):
    with pytest.raises(ValueError, match="neither 1"):
        preferences.preferred(label)


ROWS = [("a cat", 1, 2, 1.0), ("a dog", 3, 4, 0.0), ("a tie", 5, 6, 0.5), ("a cat", 7, 8, 0.0)]


@pytest.mark.parametrize("layout", [parquet, metadata])
def test_rows_of_pickapic_are_read_as_they_are(tmp_path, layout):
    """Winners: the first of row 0, the second of rows 1 and 3. Row 2 is a tie."""
    pairs = opened(layout(tmp_path / "data", ROWS), tmp_path)
    assert [pair.prompt for pair in pairs.records] == ["a cat", "a dog", "a cat"]
    assert pairs.ties == 1 and pairs.skipped == []
    for index, (winner, loser) in enumerate([(1, 2), (4, 3), (8, 7)]):
        images = pairs.images(index)
        assert is_picture(images[0], winner) and is_picture(images[1], loser)
        assert (pairs.records[index].winner.width, pairs.records[index].winner.height) == SIZE


def test_of_parquet_only_the_columns_in_use_are_copied(tmp_path):
    import pyarrow.parquet

    file = parquet(tmp_path / "data", ROWS) / "train-00000.parquet"
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.append_column("jpg_2", [[b"x" * 500_000] * len(table)]), file)
    pairs = opened(tmp_path / "data", tmp_path)
    assert len(pairs) == 3 and pairs.pictures.column_names[-1] == "jpg_2"
    assert 0 < sum(file.stat().st_size for file in (tmp_path / "cache" / "datasets").rglob("*.arrow")) < 20_000


def test_ties_are_dropped_by_value_whatever_the_data_set_is_called(tmp_path):
    for name in ("pickapic", "mine"):
        assert opened(metadata(tmp_path / name, ROWS), tmp_path).ties == 1


def test_without_a_label_the_chosen_picture_wins(tmp_path):
    columns = preferences.Columns("good", "bad", None, "text")
    folder = metadata(tmp_path / "data", ROWS, caption="text", first="good", second="bad", label=None)
    pairs = opened(folder, tmp_path, columns)
    assert len(pairs) == 4 and pairs.ties == 0
    assert all(is_picture(pairs.images(i)[0], row[1]) for i, row in enumerate(ROWS))


# --------------------------------------------------------------------------- what cannot be used


def test_half_a_surrogate_pair_is_no_caption(tmp_path, monkeypatch):
    folder = metadata(tmp_path / "data", [("a cat", 1, 2, 1), ("a \ud83d", 3, 4, 1), ("a dog", 5, 6, 1)])
    lines = (folder / "metadata.jsonl").read_text() + json.dumps({"caption": "x", "jpg_0": "\udcff.png", "jpg_1": "1.png", "label_0": 1})
    (folder / "metadata.jsonl").write_text(lines)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", out)
    pairs = opened(folder, tmp_path, progress=True)
    assert len(pairs) == 2 and pairs.skipped[0] == "3.png: caption is not valid Unicode" and len(pairs.skipped) == 2
    out.flush()
    assert "\\udcff.png: No such file" in out.buffer.getvalue().decode()


def test_broken_rows_are_named_and_counted(tmp_path, capsys):
    rows = [ROWS[0], ("a", b"no picture", 9, 1.0), ("b", 10, 11, None), ("", 12, 13, 1.0), ("d", 14, 14, 0.0), ("e", 15, None, 1.0)]
    pairs = opened(parquet(tmp_path / "data", rows), tmp_path, progress=True)
    said = capsys.readouterr().out
    assert len(pairs) == 1 and "1 pair(s)" in said and "5 row(s) skipped" in said
    for line in ("row 1 jpg_0: not a picture", "row 2 jpg_0: its label is None", "row 3 jpg_0: no caption",
                 "row 4 jpg_1: the same picture twice", "row 5 jpg_1: no picture in this row"):  # fmt: skip
        assert line in said.replace("cannot read ", ""), (line, said)
    with pytest.raises(ValueError, match="--strict_data: row 2 jpg_0: its label"):
        opened(tmp_path / "data", tmp_path, strict=True)


def test_a_column_without_pictures_is_refused_by_its_flag(tmp_path):
    folder = parquet(tmp_path / "pairs", [("a fox", 1, 2, 1.0)])
    with pytest.raises(ValueError, match="--rejected_column 'has_label' of .* holds bool; pictures are binary"):
        preferences.check_source(str(folder), preferences.Columns("jpg_0", "has_label", "label_0", "caption"))


def test_nothing_usable_is_an_error_with_the_counts(tmp_path):
    with pytest.raises(ValueError, match=r"no pair can be used: 1 tie\(s\), 1 broken row\(s\); the first: row 1 jpg_0: no caption"):
        opened(parquet(tmp_path / "data", [ROWS[2], ("", 1, 2, 1.0)]), tmp_path)


def test_the_first_pairs_are_kept(tmp_path):
    pairs = opened(parquet(tmp_path / "data", ROWS), tmp_path, max_train_samples=2)
    assert [pair.prompt for pair in pairs.records] == ["a cat", "a dog"]


@pytest.mark.parametrize(("columns", "flag"), [
    (preferences.Columns("left", "jpg_1", None, "caption"), "--chosen_column 'left'"),
    (preferences.Columns("jpg_0", "right", None, "caption"), "--rejected_column 'right'"),
    (preferences.Columns("jpg_0", "jpg_1", "winner", "caption"), "--label_column 'winner'"),
    (preferences.Columns("jpg_0", "jpg_1", None, "text"), "--caption_column 'text'"),
])  # fmt: skip
@pytest.mark.parametrize("layout", [parquet, metadata])
def test_a_missing_column_is_refused_with_those_that_exist(tmp_path, layout, columns, flag):
    folder = layout(tmp_path / "data", ROWS[:1])
    with pytest.raises(ValueError, match=f"{flag} is not in .*; it has .*caption.*jpg_0"):
        preferences.check_source(str(folder), columns)


@pytest.mark.parametrize("layout", [parquet, metadata])
def test_pickapics_columns_by_name_do_not_silence_its_labels(tmp_path, layout):
    """Without labels the first picture always wins: --chosen_column jpg_0 --rejected_column jpg_1 would turn half of pickapic round."""
    folder = layout(tmp_path / "data", ROWS[:1])
    with pytest.raises(ValueError, match="--chosen_column jpg_0 .* add --label_column label_0"):
        preferences.check_source(str(folder), preferences.Columns("jpg_0", "jpg_1", None, "caption"))
    preferences.check_source(str(folder), PICKAPIC)


def test_single_pictures_are_refused(tmp_path):
    picture(1).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="holds single pictures; pairs come in"):
        preferences.check_source(str(tmp_path), PICKAPIC)


def test_pictures_that_are_not_there_are_refused_at_once(tmp_path):
    folder = metadata(tmp_path / "data", ROWS[:1])
    for file in folder.glob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match="none exists; names are relative to"):
        preferences.check_source(str(folder), PICKAPIC)


# --------------------------------------------------------------------------- held out


def test_pairs_are_held_out_by_caption(tmp_path):
    rows = [(f"caption {i % 5}", 2 * i, 2 * i + 1, 1.0) for i in range(15)]
    pairs = opened(parquet(tmp_path / "data", rows), tmp_path)
    rest, held = pairs.hold_out(4)  # three pairs a caption: two captions
    assert len(rest) == 9 and len(held) == 6 and len(pairs.hold_out(3)[1]) == 3
    sides = {pair.winner.key: pair.loser.key for pair in pairs.records}
    assert all(sides[pair.winner.key] == pair.loser.key for part in (rest, held) for pair in part.records)  # none is turned round
    assert not {pair.prompt for pair in rest.records} & {pair.prompt for pair in held.records}
    again = opened(parquet(tmp_path / "other", rows[::-1]), tmp_path).hold_out(4)[1]
    assert {pair.prompt for pair in again.records} == {pair.prompt for pair in held.records}
    assert {pair.winner.key for pair in again.records} == {pair.winner.key for pair in held.records}
    with pytest.raises(ValueError, match="cannot hold out 13 of 15 pairs"):
        pairs.hold_out(13)


# --------------------------------------------------------------------------- samples


def pair_samples(pairs, **options):
    sizes = [(16, 16)] * len(pairs)
    return preferences.PairSamples(pairs, sizes, seed=0, **options)


def test_cut_and_mirror_are_shared_by_the_pair_and_differ_between_draws(tmp_path):
    """A pair of one picture and its brighter copy: whatever is done to both, the difference stays the same everywhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    plain = picture(1)
    plain.point(lambda level: level // 2).save(folder / "dark.png")
    plain.save(folder / "plain.png")
    entry = {"caption": "a", "jpg_0": "plain.png", "jpg_1": "dark.png", "label_0": 1}
    (folder / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
    data = pair_samples(opened(folder, tmp_path), random_crop=True, flip=True)
    seen = []
    for step in range(8):
        winner, loser = data[buckets.Key(0, step, 0)]["pixels"]
        assert torch.allclose((winner + 1) / 2, loser + 1, atol=4 / 255)  # half as bright, two roundings and the filter
        seen.append(winner)
    assert len({tensor.sum().item() for tensor in seen}) > 4
    assert any(torch.allclose(seen[0], other.flip(-1), atol=0.3) and not torch.allclose(seen[0], other, atol=0.3) for other in seen[1:])


def test_a_batch_holds_winner_and_loser_and_one_caption(tmp_path):
    pairs = opened(parquet(tmp_path / "data", ROWS), tmp_path)
    data = pair_samples(pairs, caption_dropout=0.5)
    batch = samples.collate([data[buckets.Key(index, 0, index)] for index in range(3)])
    assert batch.pixels.shape == (3, 2, 3, 16, 16) and len(batch.prompts) == 3 and set(batch.prompts) <= {"a cat", "a dog", ""}
    for index in range(3):
        for side, image in enumerate(pairs.images(index)):
            assert torch.equal(batch.pixels[index, side], buckets.fit(image, (16, 16)))


def test_cached_latents_are_those_of_the_same_pictures(tmp_path):
    """The encoder stands for a VAE: it takes means over 8 x 8 pixels."""
    pairs = opened(parquet(tmp_path / "data", ROWS), tmp_path)

    def encode(pixels):
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, torch.zeros_like(mean)

    store = cache.TensorCache(tmp_path / "cache", "latents", {})
    computed = samples.fill_latents(store, pairs.pictures, [(16, 16)] * 6, flip=True, encode=encode, batch_size=4, progress=False)
    assert computed == 12  # six pictures, each mirrored too
    plain, cached = pair_samples(pairs, flip=True), pair_samples(pairs, flip=True, latents=store)
    for step in range(4):
        key = buckets.Key(step % 3, step, 1)
        mean, _ = encode(plain[key]["pixels"])
        assert torch.allclose(cached[key]["latent_mean"], mean, atol=1e-6) and cached[key]["latent_std"].shape == (2, 3, 2, 2)


def test_the_pairs_can_be_pickled_for_loader_workers(tmp_path):
    import pickle

    pairs = pickle.loads(pickle.dumps(opened(parquet(tmp_path / "data", ROWS), tmp_path)))
    assert is_picture(pairs.images(1)[0], 4)
