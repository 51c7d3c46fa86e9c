"""DreamBooth's pictures: captions or one prompt, class pictures rendered once and for all, masks that count what they show."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image, ImageDraw

from src import flow, images
from src.data import buckets, captions, dreambooth, samples, sources


def bare_pictures(folder: Path, count: int = 3) -> Path:
    """Pictures without captions, and a file that is none."""
    runs.make_pictures(folder, count)
    (folder / "metadata.jsonl").unlink()
    (folder / "notes.pdf").write_text("no picture")
    return folder


def opened(folder: Path, tmp_path: Path, **options) -> captions.CaptionedImages:
    return captions.open_captioned(str(folder), cache_dir=tmp_path / "cache", **({"progress": False} | options))


def prompts(found: captions.CaptionedImages) -> list[str]:
    return [record.prompt for record in found.records]


def names(found: captions.CaptionedImages) -> list[str]:
    return [record.name for record in found.records]


def open_class(there: dreambooth.ClassFolder, tmp_path: Path) -> captions.CaptionedImages:
    return dreambooth.open_class(there, cache_dir=tmp_path / "cache", strict=True)


# --------------------------------------------------------------------------- a prompt for pictures without a caption


def test_any_folder_of_pictures_will_do_and_what_is_none_is_counted(tmp_path, capsys):
    found = opened(bare_pictures(tmp_path / "dog"), tmp_path, default_prompt="a photo of sks dog", progress=True)
    assert prompts(found) == ["a photo of sks dog"] * 3
    assert "3 picture(s), 1 other file(s) ignored" in capsys.readouterr().out


def test_a_caption_of_its_own_comes_before_the_prompt_for_all(tmp_path):
    folder = bare_pictures(tmp_path / "dog")
    (folder / "1.txt").write_text("sks dog asleep\n")
    assert prompts(opened(folder, tmp_path, default_prompt="sks dog")) == ["sks dog", "sks dog asleep", "sks dog"]
    lines = [{"file_name": "0.png", "text": ""}, {"file_name": "2.png", "text": "sks dog in the sea"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert prompts(opened(folder, tmp_path, default_prompt="sks dog")) == ["sks dog", "sks dog in the sea"]


@pytest.mark.slow
def test_metadata_tar_and_parquet_may_lack_the_caption_column(tmp_path):
    import tarfile

    import pyarrow
    import pyarrow.parquet

    folder = bare_pictures(tmp_path / "dog")
    with tarfile.open(tmp_path / "dog.tar", "w") as archive:
        archive.add(folder / "0.png", "0.png")
    table = pyarrow.table({"image": [{"bytes": (folder / "0.png").read_bytes(), "path": "0.png"}]})
    pyarrow.parquet.write_table(table, tmp_path / "dog.parquet")
    (folder / "metadata.csv").write_text("file_name\n0.png\n")
    for name in ("dog", "dog.tar", "dog.parquet"):
        assert prompts(opened(tmp_path / name, tmp_path, default_prompt="sks")) == ["sks"], name
        with pytest.raises(ValueError, match="--caption_column 'text' is not in"):
            opened(tmp_path / name, tmp_path)


# --------------------------------------------------------------------------- the class folder


def test_a_class_folder_that_is_not_there_is_wholly_to_be_rendered(tmp_path):
    there = dreambooth.class_folder(tmp_path / "new", 5, ["a dog", "a puppy"])
    assert (there.own, there.wanted, there.missing()) == ((), 5, [0, 1, 2, 3, 4])
    assert [there.prompt(index) for index in range(5)] == ["a dog", "a puppy", "a dog", "a puppy", "a dog"]
    assert not (tmp_path / "new").exists()


def test_pictures_of_its_owner_come_first_and_the_rest_is_rendered(tmp_path):
    folder = bare_pictures(tmp_path / "class")
    there = dreambooth.class_folder(folder, 5, ["a dog"])
    assert there.own == ("0.png", "1.png", "2.png") and there.missing() == [0, 1]
    render(there, batch_size=2)
    assert dreambooth.class_folder(folder, 5, ["a dog"]) == there and there.missing() == []
    found = open_class(there, tmp_path)
    assert names(found) == ["0.png", "1.png", "2.png", "generated-00000.png", "generated-00001.png"]
    assert set(prompts(found)) == {"a dog"}
    assert names(open_class(dreambooth.class_folder(folder, 2, ["a dog"]), tmp_path)) == ["0.png", "1.png"]


def test_fewer_rendered_pictures_than_there_are_take_the_first(tmp_path):
    render(dreambooth.class_folder(tmp_path / "class", 6, ["a", "b"]))
    there = dreambooth.class_folder(tmp_path / "class", 4, ["a", "b"])
    assert there.missing() == []
    found = open_class(there, tmp_path)
    assert names(found) == [f"generated-0000{index}.png" for index in range(4)] and prompts(found) == ["a", "b", "a", "b"]


def with_captions(folder: Path, count: int) -> Path:
    return runs.make_pictures(folder, count)


@pytest.mark.parametrize(
    ("make", "count", "given", "words"),
    [
        (bare_pictures, 3, [], "--class_data_dir .*3 picture.*0.png, have no caption, and --class_prompt is not given"),
        (bare_pictures, 3, ["a", "b"], "--class_data_dir .*no caption, and there are 2 class prompts to choose from"),
        (with_captions, 4, [], "--class_data_dir .*has 3 of --num_class_images 4 pictures; give --class_prompt"),
        (with_captions, 4, ["a dog"], "--class_data_dir .*metadata file lists 3 of --num_class_images 4.*pass --num_class_images 3"),
        (None, 4, [], "--class_data_dir .*has 0 of --num_class_images 4"),
    ],
)
def test_a_class_folder_that_cannot_be_used_is_refused(tmp_path, make, count, given, words):
    if make:
        make(tmp_path / "class", 3)
    with pytest.raises(ValueError, match=words):
        dreambooth.class_folder(tmp_path / "class", count, given)


def test_a_file_for_a_folder_and_broken_metadata_name_the_right_flag(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "class").mkdir()
    (tmp_path / "class/metadata.jsonl").write_text("{")
    for name in ("file", "class"):
        with pytest.raises(ValueError, match="^--class_data_dir"):
            dreambooth.class_folder(tmp_path / name, 4, ["a dog"])


def test_captioned_pictures_of_the_class_need_no_prompt(tmp_path):
    there = dreambooth.class_folder(with_captions(tmp_path / "class", 3), 3, [])
    found = open_class(there, tmp_path)
    assert prompts(found) == ["aaa picture 0", "bbb picture 1", "ccc picture 2"]


# --------------------------------------------------------------------------- rendering


class Painter:
    """Stands for the base model: paints the prompt's length and the seed, and a trace of whoever else is in the batch."""

    def __init__(self, die_at: int | None = None):
        self.calls, self.die_at = [], die_at

    def __call__(self, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        self.calls.append(seeds)
        if self.die_at is not None and self.die_at in seeds:
            raise runs.Interrupted
        colors = torch.tensor([[len(prompt), 7 * seed, sum(seeds)] for prompt, seed in zip(prompts, seeds, strict=True)]) / 255
        return colors[:, :, None, None].expand(-1, -1, 8, 8)


SETTINGS = {"base model": "m", "class prompt": ["a", "b"], "guidance scale": 4.5}


def render(there: dreambooth.ClassFolder, painter: Painter | None = None, batch_size: int = 4, **options) -> Painter:
    painter = painter or Painter()
    dreambooth.render_missing(there, painter, settings=SETTINGS, batch_size=batch_size, **({"progress": False} | options))
    return painter


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """Ten pictures in batches of four."""
    there = dreambooth.class_folder(tmp_path / "whole", 10, ["a", "bb", "ccc"])
    assert render(there).calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]  # the last batch as full as the others
    return contents(there.folder)


def test_picture_i_has_prompt_i_and_seed_i(whole):
    assert sorted(whole) == sorted(["generated.json", *(f"generated-{i:05d}.{end}" for i in range(10) for end in ("png", "txt"))])
    for index in range(10):
        prompt = whole[f"generated-{index:05d}.txt"].decode().strip()
        assert prompt == ["a", "bb", "ccc"][index % 3]
        picture = Image.open(io.BytesIO(whole[f"generated-{index:05d}.png"]))
        assert picture.getpixel((0, 0))[:2] == (len(prompt), 7 * index)


@pytest.mark.parametrize("die_at", [1, 5, 9])
def test_killed_in_a_batch_the_rest_is_made_the_next_time_and_is_the_same(tmp_path, whole, die_at):
    there = dreambooth.class_folder(tmp_path / "parts", 10, ["a", "bb", "ccc"])
    with pytest.raises(runs.Interrupted):
        render(there, Painter(die_at))
    assert len(there.missing()) == 10 - die_at // 4 * 4
    assert render(there).calls[0][0] == die_at // 4 * 4  # nothing twice
    assert contents(there.folder) == whole
    assert render(there).calls == []


def test_killed_between_two_files_or_with_one_deleted_only_what_is_missing_is_written(tmp_path, whole):
    """The batch is rendered whole, so that the picture has its neighbours again; those that are there are left alone."""
    there = dreambooth.class_folder(tmp_path / "parts", 10, ["a", "bb", "ccc"])
    render(there)
    there.path(6).unlink()
    before = there.path(5).stat().st_mtime_ns
    assert render(there).calls == [[4, 5, 6, 7]]
    assert contents(there.folder) == whole and there.path(5).stat().st_mtime_ns == before


def test_processes_share_the_batches_and_find_the_same(tmp_path, whole):
    there = dreambooth.class_folder(tmp_path / "shared", 10, ["a", "bb", "ccc"])
    assert render(there, rank=1, world=2).calls == [[4, 5, 6, 7]]  # whoever comes first
    assert render(there, rank=0, world=2).calls == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert contents(there.folder) == whole


def test_more_pictures_later_keep_the_first_ones(tmp_path, whole):
    render(dreambooth.class_folder(tmp_path / "grown", 6, ["a", "bb", "ccc"]))
    assert render(dreambooth.class_folder(tmp_path / "grown", 10, ["a", "bb", "ccc"])).calls == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert contents(tmp_path / "grown") == whole


def test_a_bar_counts_the_pictures(tmp_path, capsys):
    render(dreambooth.class_folder(tmp_path / "new", 5, ["a"]), progress=True)
    shown = capsys.readouterr().err
    assert "render class pictures" in shown and "5/5" in shown


def test_pictures_of_other_settings_are_refused_and_of_the_same_are_not(tmp_path):
    there = dreambooth.class_folder(tmp_path / "class", 2, ["a"])
    dreambooth.check_settings(there, {"guidance scale": 1})  # nothing is there yet
    render(there)
    dreambooth.check_settings(there, dict(SETTINGS))
    with pytest.raises(ValueError, match=r"--class_data_dir .*another base model, guidance scale; delete generated-\*"):
        dreambooth.check_settings(there, SETTINGS | {"guidance scale": 1, "base model": "n"})
    (there.folder / dreambooth.NOTE).unlink()
    with pytest.raises(ValueError, match="--class_data_dir"):
        dreambooth.check_settings(there, SETTINGS)
    for file in there.folder.glob("generated-*"):
        file.unlink()
    dreambooth.check_settings(there, SETTINGS)


# --------------------------------------------------------------------------- masks


def cut_out(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A picture that is opaque in a box (left, top, right, bottom exclusive) alone."""
    picture = Image.new("RGBA", size, (200, 30, 30, 0))
    picture.paste((200, 30, 30, 255), box)
    return picture


def masks_of(pictures: Path, tmp_path: Path, size: tuple[int, int], **options) -> list[torch.Tensor]:
    found = opened(pictures, tmp_path, default_prompt="sks")
    return dreambooth.masks(found, [size] * len(found), **options)


def test_a_mask_is_the_share_of_each_latent_by_area(tmp_path):
    """32 x 32 pixels, 4 x 4 latents of 8 x 8: the box covers columns 4-15 and rows 8-19: half of latent column 0, all of column 1;
    all of latent row 1, and 4 of 8 rows of row 2."""
    (tmp_path / "dog").mkdir()
    cut_out((32, 32), (4, 8, 16, 20)).save(tmp_path / "dog/0.png")
    (mask,) = masks_of(tmp_path / "dog", tmp_path, (32, 32))
    expected = torch.zeros(1, 4, 4)
    expected[0, 1, :2] = torch.tensor([0.5, 1.0])
    expected[0, 2, :2] = torch.tensor([0.25, 0.5])
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-6)


def test_a_mask_is_scaled_and_cut_as_its_picture_is(tmp_path):
    """The red box of a wide, EXIF-rotated picture lies where its mask says after the cut, alpha or folder alike."""
    (tmp_path / "dog").mkdir()
    (tmp_path / "masks").mkdir()
    picture, mask = Image.new("RGB", (96, 64), "white"), Image.new("L", (192, 128))  # a mask may have another resolution
    ImageDraw.Draw(picture).rectangle((40, 8, 71, 39), fill="red")
    ImageDraw.Draw(mask).rectangle((80, 16, 143, 79), fill="white")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    picture.save(tmp_path / "dog/it.png", exif=exif)
    mask.save(tmp_path / "masks/it.jpg", exif=exif, quality=100)
    found = opened(tmp_path / "dog", tmp_path, default_prompt="sks")
    assert (found.records[0].width, found.records[0].height) == (64, 96)
    (weights,) = dreambooth.masks(found, [(64, 64)], folder=tmp_path / "masks")
    pixels = buckets.fit(found.image(0), (64, 64))  # (3, 64, 64)
    red = ((pixels[0] > 0.5) & (pixels[1] < 0)).float()
    torch.testing.assert_close(weights, torch.nn.functional.avg_pool2d(red[None], 8), rtol=0, atol=0.02)
    assert 0.1 < weights.mean() < 0.4


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("opaque", "--mask_from_alpha: 0.png has no transparency"),
        ("transparent", "--mask_from_alpha: 0.png shows nothing of the subject after the cut to 32x32"),
        ("cut away", "--mask_from_alpha: 0.png shows nothing of the subject after the cut to 32x32"),
        ("no folder", "--mask_data_dir .*no such folder"),
        ("none", "--mask_data_dir .*has no mask for 1 picture.*0.png for 0.png"),
        ("black", "--mask_data_dir .*the mask of 0.png shows nothing"),
        ("other shape", "--mask_data_dir .*the mask of 0.png is 32x16, its picture 32x32"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(tmp_path, how, words):
    (tmp_path / "dog").mkdir()
    picture = {"opaque": Image.new("RGB", (32, 32)), "transparent": cut_out((32, 32), (0, 0, 0, 0)),
               "cut away": cut_out((96, 32), (0, 0, 8, 8))}  # fmt: skip
    picture.get(how, cut_out((32, 32), (0, 0, 9, 9))).save(tmp_path / "dog/0.png")
    folder = None if how in picture else tmp_path / "masks"
    if how not in ("no folder", *picture):
        folder.mkdir()
    if how in ("black", "other shape"):
        Image.new("L", (32, 32 if how == "black" else 16), 0 if how == "black" else 255).save(folder / "0.webp")
    with pytest.raises(ValueError, match=words):
        masks_of(tmp_path / "dog", tmp_path, (32, 32), folder=folder)


def test_two_pictures_of_one_name_in_different_folders_share_no_mask(tmp_path):
    (tmp_path / "masks").mkdir()
    Image.new("L", (32, 32), 255).save(tmp_path / "masks/1.png")
    with pytest.raises(ValueError, match="--mask_data_dir .*beach/1.png and sofa/1.png would share one mask"):
        dreambooth.mask_files(tmp_path / "masks", ["beach/1.png", "sofa/1.png"])
    assert dreambooth.mask_files(tmp_path / "masks", ["1.jpg", "1.jpg"]) == {"1.jpg": tmp_path / "masks/1.png"}  # --repeats


def test_a_picture_that_is_repeated_has_its_mask_read_once(tmp_path, monkeypatch):
    (tmp_path / "dog").mkdir()
    cut_out((32, 32), (0, 0, 9, 9)).save(tmp_path / "dog/0.png")
    found, reads, open_mask = opened(tmp_path / "dog", tmp_path, default_prompt="sks").subset([0, 0, 0]), [], images.open_mask
    monkeypatch.setattr(images, "open_mask", lambda *given: reads.append(given) or open_mask(*given))
    masks = dreambooth.masks(found, [(32, 32), (32, 32), (16, 16)])
    assert len(reads) == 2 and torch.equal(masks[0], masks[1]) and [mask.shape[-1] for mask in masks] == [4, 4, 2]


def test_what_counts_is_the_opacity_or_else_the_brightness():
    translucent = Image.new("RGBA", (2, 2), (255, 255, 255, 51))
    mask, opacity = images.open_mask(translucent)
    assert (mask.mode, mask.getpixel((0, 0)), opacity) == ("L", 51, True)
    mask, opacity = images.open_mask(Image.new("1", (2, 2), 1))
    assert (mask.getpixel((0, 0)), opacity) == (255, False)
    drawn = Image.new("L", (2, 1))
    drawn.putpixel((1, 0), 255)
    for mode in ("RGBA", "LA"):  # as some programs save a black and white mask: opaque everywhere
        mask, opacity = images.open_mask(drawn.convert(mode), opaque=False)
        assert (list(mask.tobytes()), opacity) == ([0, 255], False)
        assert list(images.open_mask(drawn.convert(mode))[0].tobytes()) == [255, 255]
    assert images.open_mask(translucent, opaque=False)[1]


def test_a_mask_with_an_opaque_alpha_channel_is_its_brightness(tmp_path):
    pictures = bare_pictures(tmp_path / "subject", 1)
    (name,) = [file.name for file in pictures.iterdir() if file.suffix == ".png"]
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", Image.open(pictures / name).size)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    found = []
    for mode in ("L", "RGBA"):
        mask.convert(mode).save(tmp_path / "masks" / name)
        found += masks_of(pictures, tmp_path, (64, 64), folder=tmp_path / "masks")
    assert torch.equal(*found) and 0 < found[0].mean() < 1
    (tmp_path / "masks" / name).write_bytes(b"junk")
    with pytest.raises(ValueError, match=f"cannot read .*masks/{name}"):
        masks_of(pictures, tmp_path, (64, 64), folder=tmp_path / "masks")


def test_a_class_picture_that_is_listed_twice_keeps_both_captions(tmp_path):
    folder = bare_pictures(tmp_path / "class", 2)
    first, second = sorted(file.name for file in folder.iterdir() if file.suffix == ".png")
    rows = [(first, "one"), (first, "two"), (second, "three")]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows))
    assert prompts(open_class(dreambooth.class_folder(folder, 3, []), tmp_path)) == ["one", "two", "three"]


def test_a_batch_carries_the_masks_mirrored_with_their_pictures(tmp_path):
    (tmp_path / "dog").mkdir()
    for number in range(4):
        cut_out((32, 32), (8 * number, 0, 8 * number + 8, 8)).save(tmp_path / f"dog/{number}.png")
    found = opened(tmp_path / "dog", tmp_path, default_prompt="sks")
    sizes = [(32, 32)] * 4
    weights = dreambooth.masks(found, sizes)
    data = samples.Samples(found, sizes, seed=0, flip=True, masks=weights)
    keys = [buckets.Key(index, step, index) for step in range(8) for index in range(4)]
    flipped = 0
    for start in range(0, 32, 4):
        batch = samples.collate([data[key] for key in keys[start : start + 4]])
        assert batch.mask.shape == (4, 1, 4, 4)
        for pixels, mask in zip(batch.pixels, batch.mask, strict=True):
            red = ((pixels[0] > 0) & (pixels[1] < 0)).float()
            torch.testing.assert_close(mask, torch.nn.functional.avg_pool2d(red[None], 8), rtol=0, atol=1e-6)
        flipped += sum(not torch.equal(mask, weights[i]) for mask, i in zip(batch.mask, batch.indices, strict=True))
    assert 5 < flipped < 27  # of 32, half: more than 3.5 standard deviations from neither


def test_a_masked_loss_is_the_mean_over_what_counts():
    """Errors 1 on the left half, 3 on the right: squares 1 and 9. The whole: 5; the left alone: 1; a quarter weight on the right:
    (1 + 9/4) / (1 + 1/4) = 2.6. The same whatever the mask's size or scale."""
    target = torch.zeros(1, 16, 4, 4)
    prediction = torch.ones(1, 16, 4, 4)
    prediction[..., 2:] = 3.0
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 1.0
    for mask, expected in ((None, 5.0), (torch.ones_like(left), 5.0), (left, 1.0), (0.1 * left, 1.0), (left + 0.25 * (1 - left), 2.6)):
        assert flow.velocity_loss(prediction, target, mask).item() == pytest.approx(expected)
    one = torch.zeros_like(left)
    one[0, 0, 0, 0] = 0.01  # a sixteenth of the picture, hardly covered
    assert flow.velocity_loss(prediction, target, one).item() == pytest.approx(1.0)


def test_outside_the_mask_no_gradient_flows():
    prediction = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 1, 2], mask[1] = 1.0, 1.0
    flow.velocity_loss(prediction, torch.zeros_like(prediction), mask).sum().backward()
    assert prediction.grad[0].abs().sum(0).nonzero().tolist() == [[1, 2]] and (prediction.grad[1] != 0).all()


# --------------------------------------------------------------------------- the order of two data sets in one run


def test_two_data_sets_of_a_run_share_no_random_number():
    sizes = [(16, 16)] * 12
    first, second = buckets.Order(sizes, 4, seed=0), buckets.Order(sizes, 4, 0, "second order")
    assert [first.batch(step) for step in range(3)] != [second.batch(step) for step in range(3)]
    positions = []
    for rank in range(2):
        sampler = buckets.StepSampler(second, batch_size=1, accumulation=2, rank=rank, world=2, max_steps=1, first_position=4)
        positions += [key.position for batch in sampler for key in batch]
    assert sorted(positions) == [4, 5, 6, 7]


def test_sources_are_looked_at_with_captions_unless_told_otherwise(tmp_path):
    folder = bare_pictures(tmp_path / "dog")
    with pytest.raises(ValueError, match="has 3 picture.* but no captions"):
        sources.check_source(str(folder))
    sources.check_source(str(folder), captioned=False)
    assert np.all([row.caption is None for row in sources.open_source(str(folder), image_column="image", caption_column="text",
                                                                      cache_dir=tmp_path, captioned=False).rows])  # fmt: skip
