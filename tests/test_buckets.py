"""Buckets, fit and order: by hand, and against plain loops. Facts: a resumed or differently spread run sees the same samples."""

from collections import Counter

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from src.data.buckets import Key, Order, StepSampler, assign, buckets, fit

# --------------------------------------------------------------------------- sizes


def test_buckets_of_64_by_hand():
    """Long side 80: 4096 / 80 = 51.2 -> 48; 96: 42.7 -> 48, aspect 2; 112: 36.6 -> 32, aspect 3.5, too long. And mirrored."""
    assert buckets(64, aspect_buckets=True) == [(96, 48), (80, 48), (64, 64), (48, 80), (48, 96)]
    assert buckets(64, aspect_buckets=False) == [(64, 64)]


@pytest.mark.parametrize("resolution", [16, 64, 128, 256, 512, 768, 1024, 1440])
def test_buckets_keep_to_the_grid_the_area_and_the_aspect(resolution):
    sizes = buckets(resolution, aspect_buckets=True)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes) <= 13
    for height, width in sizes:
        assert height % 16 == 0 and width % 16 == 0
        assert height * width <= resolution**2 + 8 * max(height, width)  # half a step of the short side
        assert max(height, width) / min(height, width) <= 2
        assert (width, height) in sizes


@pytest.mark.parametrize("wrong", [0, -16, 500, 8])
def test_a_resolution_off_the_grid_is_refused(wrong):
    with pytest.raises(ValueError, match="--resolution"):
        buckets(wrong, aspect_buckets=True)


@pytest.mark.parametrize(
    "picture, wanted",
    [((640, 640), (64, 64)), ((1000, 480), (48, 96)), ((1600, 1000), (48, 80)), ((300, 500), (80, 48)), ((10, 9000), (96, 48))],
)
def test_a_picture_goes_to_the_nearest_aspect(picture, wanted):
    """1.6 lies nearer to 80/48 = 1.67 than to 2 or 1; anything longer than all buckets goes to the longest."""
    assert assign(*picture, buckets(64, aspect_buckets=True)) == wanted


def test_nearness_is_symmetric_in_log():
    """1.4 between 1 and 2: |log 1.4| = .336 < |log 1.4/2| = .357, though 1.4 - 1 < 2 - 1.4 too; 1.43 goes to 2 by log only."""
    assert assign(140, 100, [(64, 64), (64, 128)]) == (64, 64)
    assert assign(143, 100, [(64, 64), (64, 128)]) == (64, 128)
    assert assign(100, 143, [(64, 64), (128, 64)]) == (128, 64)


# --------------------------------------------------------------------------- fit


def columns(width: int, height: int) -> Image.Image:
    """A picture whose red channel is the column's number."""
    return Image.frombytes("RGB", (width, height), bytes(v for _ in range(height) for x in range(width) for v in (x, 0, 0)))


def red(pixels: torch.Tensor) -> list[int]:
    return ((pixels[0, 0] + 1) * 127.5).round().int().tolist()


def test_same_size_is_the_same_pixels_in_minus_one_to_one():
    image = Image.linear_gradient("L").resize((32, 16)).convert("RGB")
    pixels = fit(image, (16, 32))
    assert pixels.shape == (3, 16, 32) and pixels.dtype == torch.float32
    expected = torch.tensor([image.getpixel((x, y)) for y in range(16) for x in range(32)]).reshape(16, 32, 3).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_black_and_white_are_the_ends_of_the_range():
    for level, value in ((0, -1.0), (255, 1.0)):
        assert torch.equal(fit(Image.new("RGB", (70, 50), (level,) * 3), (16, 16)), torch.full((3, 16, 16), value))


@pytest.mark.parametrize("crop, first", [((0.5, 0.5), 24), ((0.5, 0.0), 0), ((0.5, 1.0), 48), ((0.0, 0.25), 12)])
def test_the_cut_lies_where_the_fraction_says(crop, first):
    """64 x 16 into 16 x 16: no scaling, 48 px of room."""
    assert red(fit(columns(64, 16), (16, 16), crop=crop)) == list(range(first, first + 16))


def test_flip_mirrors_the_cut():
    straight, mirrored = (fit(columns(64, 16), (16, 16), crop=(0.5, 0.25), flip=flip) for flip in (False, True))
    assert torch.equal(mirrored, straight.flip(-1)) and not torch.equal(mirrored, straight)


def test_scaling_covers_the_bucket_and_cuts_the_long_side_only():
    """200 x 100 into 64 x 64: the scale is .64, 128 x 64, then 32 px go on each side: columns 50 to 150 of the picture remain."""
    got = red(fit(columns(200, 100), (64, 64)))
    assert got[0] == pytest.approx(50, abs=2) and got[-1] == pytest.approx(149, abs=2)
    steps = [b - a for a, b in zip(got, got[1:], strict=False)]
    assert set(steps) <= {1, 2}  # 100 columns in 64: nothing stretched, no border repeated


def test_small_pictures_are_enlarged():
    assert fit(Image.new("RGB", (5, 9), (10, 20, 30)), (64, 48)).shape == (3, 64, 48)


def test_agrees_with_resize_then_crop_up_to_its_border():
    """Oracle: resize the whole picture with the same filter, then cut whole pixels out of it; both round twice, to 8 bits."""
    rows, columns = torch.arange(240.0)[:, None], torch.arange(120.0)[None]
    waves = 127.5 + 60 * torch.sin(rows / 7 + columns / 11) + 60 * torch.cos(rows / 5 - columns / 4)  # 10 px and longer
    image = Image.fromarray(waves.round().byte().numpy()).convert("RGB")
    whole = image.resize((48, 96), Image.Resampling.LANCZOS).crop((0, 24, 48, 72))
    expected = torch.tensor([whole.getpixel((x, y))[0] for y in range(48) for x in range(48)]).reshape(48, 48) / 127.5 - 1
    assert expected.std() > 0.4 and (fit(image, (48, 48))[0] - expected).abs().max() <= 2.01 / 127.5


# --------------------------------------------------------------------------- the order

SIZES = [(64, 64)] * 10 + [(48, 80)] * 5 + [(80, 48)] * 1
ORDER = [SIZES[(7 * i) % 16] for i in range(16)]  # mixed


def test_steps_per_epoch_by_hand():
    """Global batch 4: ceil(10/4) + ceil(5/4) + ceil(1/4) = 3 + 2 + 1 = 6 steps, 24 places for 16 samples."""
    order = Order(ORDER, 4, seed=0)
    assert order.steps_per_epoch == 6 and order.repeated == 8


@pytest.mark.parametrize("global_batch", [1, 2, 3, 4, 7, 16, 40])
def test_every_epoch_shows_every_sample_and_a_step_is_one_bucket(global_batch):
    order = Order(ORDER, global_batch, seed=3)
    for epoch in range(3):
        steps = [order.batch(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert all(len(step) == global_batch for step in steps)
        assert all(len({ORDER[index] for index in step}) == 1 for step in steps)
        counts = Counter(index for step in steps for index in step)
        assert set(counts) == set(range(16))
        assert sum(counts.values()) - 16 == order.repeated
        for size in set(SIZES):  # who is shown again is spread evenly inside a bucket
            times = [counts[i] for i in range(16) if ORDER[i] == size]
            assert max(times) - min(times) <= 1


def test_one_bucket_and_a_dividing_batch_repeat_nothing():
    order = Order([(64, 64)] * 12, 4, seed=0)
    assert order.repeated == 0 and sorted(i for step in range(3) for i in order.batch(step)) == list(range(12))


def test_the_plan_is_a_pure_function_of_seed_and_step():
    order, again, other = Order(ORDER, 4, seed=5), Order(ORDER, 4, seed=5), Order(ORDER, 4, seed=6)
    steps = list(range(30))
    forward = [order.batch(step) for step in steps]
    assert [again.batch(step) for step in reversed(steps)] == forward[::-1]  # asked in any order
    assert [other.batch(step) for step in steps] != forward
    assert forward[:6] != forward[6:12]  # each epoch has its own order
    forward[0].clear()
    assert order.batch(0)  # the caller's list is its own


def test_nothing_to_plan_is_refused():
    with pytest.raises(ValueError, match="order needs"):
        Order([], 4, seed=0)


# --------------------------------------------------------------------------- who loads what


def test_positions_by_hand():
    """Batch 2, accumulation 2, 2 processes: rank 1 has positions 2, 3 of micro-batch 0 and 6, 7 of micro-batch 1."""
    order = Order([(64, 64)] * 16, 8, seed=0)
    sampler = StepSampler(order, batch_size=2, accumulation=2, rank=1, world=2, max_steps=1)
    whole = order.batch(0)
    assert list(sampler) == [[Key(whole[2], 0, 2), Key(whole[3], 0, 3)], [Key(whole[6], 0, 6), Key(whole[7], 0, 7)]]


@pytest.mark.parametrize("batch_size, world, accumulation", [(4, 1, 1), (2, 2, 1), (1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 1, 2)])
def test_every_way_to_spread_a_global_batch_of_4_loads_the_same(batch_size, world, accumulation):
    order = Order(ORDER, 4, seed=1)
    loaded: dict[int, list[Key]] = {}
    for rank in range(world):
        for keys in StepSampler(order, batch_size=batch_size, accumulation=accumulation, rank=rank, world=world, max_steps=13):
            assert len(keys) == batch_size
            loaded.setdefault(keys[0].step, []).extend(keys)
    for step in range(13):
        keys = sorted(loaded[step], key=lambda key: key.position)
        assert [key.position for key in keys] == [0, 1, 2, 3]  # each once: no two ranks share a position
        assert [key.index for key in keys] == order.batch(step)


@pytest.mark.parametrize("stop", [1, 5, 6, 11])
def test_resumed_at_any_step_is_the_rest_of_an_uninterrupted_run(stop):
    """Facts, defect 9: the public scripts restart the epoch and overshoot."""
    whole = list(StepSampler(Order(ORDER, 4, seed=1), batch_size=2, accumulation=2, max_steps=13))
    first = StepSampler(Order(ORDER, 4, seed=1), batch_size=2, accumulation=2, max_steps=stop)
    rest = StepSampler(Order(ORDER, 4, seed=1), batch_size=2, accumulation=2, start_step=stop, max_steps=13)
    assert list(first) + list(rest) == whole
    assert len(whole) == 26 and (len(first), len(rest)) == (2 * stop, 2 * (13 - stop))


def test_a_batch_that_does_not_make_up_the_plan_is_refused():
    with pytest.raises(ValueError, match=r"4.*3 x accumulation 1 x 1 process\(es\) = 3"):
        StepSampler(Order(ORDER, 4, seed=0), batch_size=3, max_steps=1)


def test_it_is_a_batch_sampler():
    order = Order(ORDER, 4, seed=0)

    class Echo(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return key

    loader = DataLoader(Echo(), batch_sampler=StepSampler(order, batch_size=4, max_steps=7), collate_fn=list)
    assert [[key.index for key in keys] for keys in loader] == [order.batch(step) for step in range(7)] and len(loader) == 7
