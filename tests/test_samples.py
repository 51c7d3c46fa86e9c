"""What a training step gets: the caption stays with its picture, and chance depends on (seed, step, position) alone."""

import json
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from src import seeds
from src.data.buckets import FIT, Key, Order, StepSampler, assign, buckets, fit
from src.data.cache import TensorCache
from src.data.captions import CaptionedImages, open_captioned
from src.data.samples import Samples, collate, fill_latents, fill_text, latent_key, loader

COUNT, SIDE = 12, 16


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> CaptionedImages:
    """Twelve gradients of known slope, portrait, square and wide, all different; two files have the same bytes."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(COUNT):
        width, height = [(32, 32), (48, 24), (24, 48)][i % 3]
        data = bytes(v for y in range(height) for x in range(width) for v in (20 * i, 5 * x, 5 * y))
        Image.frombytes("RGB", (width, height), data).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"picture number {i}"})
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())
    lines.append({"file_name": "copy.png", "text": "number 3 by another name"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return open_captioned(str(folder), cache_dir=folder / "cache", progress=False)


@pytest.fixture(scope="module")
def sizes(images) -> list[tuple[int, int]]:
    shapes = [(32, 16), (16, 16), (16, 32)]
    return [assign(record.width, record.height, shapes) for record in images.records]


def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for the VAE that keeps everything: 8x8 means of the pixels, their order, and which picture it is."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return mean, torch.full_like(mean, 0.1)


def encode_text(prompts: list[str]) -> tuple[Tensor, Tensor]:
    numbers = torch.tensor([float(sum(map(ord, prompt))) for prompt in prompts])
    return numbers[:, None, None].expand(-1, 4, 6).bfloat16(), numbers[:, None].expand(-1, 3)


def make_caches(root: Path, images, sizes, flip=True, **described) -> tuple[TensorCache, TensorCache]:
    latents, text = TensorCache(root, "latents", {"vae": "v", **described}), TensorCache(root, "text", {"encoders": "e"})
    fill_latents(latents, images, sizes, flip=flip, encode=encode, batch_size=4, progress=False)
    fill_text(text, ["", *(r.prompt for r in images.records)], encode_text, batch_size=4, progress=False)
    return latents, text


def run(samples: Samples, order: Order, steps: int, *, batch_size: int, accumulation: int = 1, world: int = 1, workers: int = 0) -> dict:
    """(step, position) -> what was loaded there, over all ranks."""
    loaded = {}
    for rank in range(world):
        sampler = StepSampler(order, batch_size=batch_size, accumulation=accumulation, rank=rank, world=world, max_steps=steps)
        for number, batch in enumerate(loader(samples, sampler, num_workers=workers)):
            for i, position in enumerate(batch.positions):
                image = batch.pixels if batch.pixels is not None else batch.latent_mean
                assert (number // accumulation, position) not in loaded
                loaded[number // accumulation, position] = (batch.indices[i], batch.prompts[i], image[i])
    return loaded


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k][:2] == b[k][:2] and torch.equal(a[k][2], b[k][2]) for k in a)


# --------------------------------------------------------------------------- one sample


def test_an_uncached_batch_holds_the_pictures_and_prompts(images, sizes):
    samples = Samples(images, sizes, seed=0)
    batch = collate([samples[Key(0, 5, 2)], samples[Key(6, 5, 3)]])
    assert batch.pixels.shape == (2, 3, 16, 16) and batch.pixels.dtype == torch.float32 and batch.size == (16, 16) and len(batch) == 2
    assert batch.prompts == ["picture number 0", "picture number 6"] and batch.indices == [0, 6] and batch.positions == [2, 3]
    assert torch.equal(batch.pixels[1], fit(images.image(6), (16, 16)))
    assert batch.latent_mean is batch.latent_std is batch.embeds is batch.pooled is None


def test_a_cached_batch_holds_latents_and_embeddings_of_the_same_samples(images, sizes, tmp_path):
    latents, text = make_caches(tmp_path, images, sizes)
    samples = Samples(images, sizes, seed=0, latents=latents, text=text)
    batch = collate([samples[Key(1, 0, 0)], samples[Key(4, 0, 1)]])
    assert batch.size == (16, 32) and batch.pixels is None and batch.latent_mean.shape == batch.latent_std.shape == (2, 3, 2, 4)
    mean, std = encode(torch.stack([fit(images.image(i), (16, 32)) for i in (1, 4)]))
    assert torch.equal(batch.latent_mean, mean) and torch.equal(batch.latent_std, std)
    embeds, pooled = encode_text(["picture number 1", "picture number 4"])
    assert torch.equal(batch.embeds, embeds) and torch.equal(batch.pooled, pooled) and batch.embeds.dtype == torch.bfloat16


def test_with_both_caches_no_picture_is_opened(images, sizes, tmp_path, monkeypatch):
    latents, text = make_caches(tmp_path, images, sizes)
    monkeypatch.setattr(CaptionedImages, "image", lambda *a: pytest.fail("opened"))
    Samples(images, sizes, seed=0, flip=True, latents=latents, text=text)[Key(0, 0, 0)]


def test_batches_travel(images, sizes):
    samples = Samples(images, sizes, seed=0)
    batch = collate([samples[Key(0, 0, 0)]])
    moved = batch.to("meta")
    assert moved.pixels.device.type == "meta" and moved.prompts == batch.prompts and moved.embeds is None
    assert batch.pixels.device.type == "cpu"
    if torch.cuda.is_available():
        assert batch.pin_memory().pixels.is_pinned()


def test_two_sizes_in_one_batch_is_our_own_mistake(images, sizes):
    samples = Samples(images, sizes, seed=0)
    with pytest.raises(AssertionError, match="one size"):
        collate([samples[Key(0, 0, 0)], samples[Key(1, 0, 1)]])


def test_random_crop_with_cached_latents_is_refused(images, sizes, tmp_path):
    with pytest.raises(ValueError, match="--random_crop.*--no-cache_latents"):
        Samples(images, sizes, seed=0, random_crop=True, latents=TensorCache(tmp_path, "latents", {}))
    with pytest.raises(ValueError, match="13 pictures but 1 sizes"):
        Samples(images, [(16, 16)], seed=0)


# --------------------------------------------------------------------------- chance


def test_rates(images, sizes):
    """4,000 draws: 3 standard deviations are .023 at 1/2 and .015 at .1. Flip and caption dropout are independent of each other."""
    samples = Samples(images, sizes, seed=7, caption_dropout=0.1, flip=True)
    straight, mirrored = fit(images.image(0), (16, 16)), fit(images.image(0), (16, 16), flip=True)
    samples.images = type("Opened", (), {"records": images.records, "image": lambda self, i: images.image(0)})()
    flips, drops = [], []
    for step in range(500):
        for position in range(8):
            drops.append(seeds.uniform(7, step, [position], "caption").item() < 0.1)
            flips.append(seeds.uniform(7, step, [position], "flip").item() < 0.5)
    for i in range(0, 4000, 97):  # the samples obey exactly these draws
        sample = samples[Key(0, i // 8, i % 8)]
        assert (sample["prompt"] == "") == drops[i]
        assert torch.equal(sample["pixels"], mirrored if flips[i] else straight)
    assert sum(flips) / 4000 == pytest.approx(0.5, abs=0.024) and sum(drops) / 4000 == pytest.approx(0.1, abs=0.015)
    assert sum(a and b for a, b in zip(flips, drops, strict=True)) / 4000 == pytest.approx(0.05, abs=0.011)


def test_without_flip_and_dropout_nothing_is_random(images, sizes):
    samples = Samples(images, sizes, seed=0)
    first = samples[Key(0, 0, 0)]
    for step in range(40):
        sample = samples[Key(0, step, step % 3)]
        assert sample["prompt"] == "picture number 0" and torch.equal(sample["pixels"], first["pixels"])


def test_random_crops_reach_everywhere_and_stay_inside(images):
    """Picture 1 is 48 x 24 with green = 5 x: at 16 x 16 the cut's mean tells where it lies; all of 24 px of room is used."""
    sizes = [(16, 16)] * len(images)
    samples = Samples(images, sizes, seed=0, random_crop=True)
    lefts = []
    for step in range(60):
        green = (samples[Key(1, step, 0)]["pixels"][1] + 1) * 127.5
        lefts.append(green.mean().item() / 5 - 11.5)  # the mean of columns left .. left + 23
        assert samples[Key(1, step, 0)]["pixels"][0].add(1).mul(127.5).round().unique().tolist() == [20]  # of picture 1 still
    assert min(lefts) < 3 and max(lefts) > 21 and -0.5 < min(lefts) and max(lefts) < 24.5
    assert len({round(left, 2) for left in lefts}) > 40


def test_dropping_every_caption(images, sizes):
    samples = Samples(images, sizes, seed=0, caption_dropout=1.0)
    assert {samples[Key(i, i, 0)]["prompt"] for i in range(5)} == {""}


def test_two_positions_of_one_step_do_not_share_their_chance(images, sizes):
    """Facts, defect 8: with --seed every GPU drew the same."""
    samples = Samples(images, [(16, 16)] * len(images), seed=0, random_crop=True)
    crops = [samples[Key(1, 3, position)]["pixels"] for position in range(6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])


# --------------------------------------------------------------------------- the run


@pytest.mark.parametrize("cached", [False, True])
def test_the_spread_over_processes_changes_nothing(images, sizes, tmp_path, cached):
    latents, text = make_caches(tmp_path, images, sizes) if cached else (None, None)
    samples = Samples(images, sizes, seed=4, caption_dropout=0.3, flip=True, random_crop=not cached, latents=latents, text=text)
    order = Order(sizes, 4, seed=4)
    whole = run(samples, order, 9, batch_size=4)
    assert len(whole) == 36 and len({prompt for _, prompt, _ in whole.values()}) > 5
    assert same(run(samples, order, 9, batch_size=2, world=2), whole)
    assert same(run(samples, order, 9, batch_size=1, accumulation=4), whole)
    assert same(run(samples, order, 9, batch_size=1, accumulation=2, world=2), whole)


@pytest.mark.slow
def test_workers_change_nothing(images, sizes):
    samples = Samples(images, sizes, seed=4, caption_dropout=0.3, flip=True, random_crop=True)
    order = Order(sizes, 4, seed=4)
    assert same(run(samples, order, 8, batch_size=4, workers=2), run(samples, order, 8, batch_size=4))


def test_the_loader_has_the_workers_and_the_pinned_memory_asked_for(images, sizes):
    sampler = StepSampler(Order(sizes, 4, seed=0), batch_size=4, max_steps=1)
    for workers, pinned in ((0, False), (2, True)):
        made = loader(Samples(images, sizes, seed=0), sampler, num_workers=workers, pin_memory=pinned)
        assert (made.num_workers, made.pin_memory) == (workers, pinned)


@pytest.mark.slow
def test_ctrl_c_is_for_the_main_process_to_answer(images, sizes, capfd):
    """A terminal sends it to the workers as well, which have the main process's handler: each would announce that it stops."""
    before = signal.signal(signal.SIGINT, lambda number, frame: os.write(2, b"stopping"))
    try:
        sampler = StepSampler(Order(sizes, 2, seed=4), batch_size=2, max_steps=8)
        batches = iter(loader(Samples(images, sizes, seed=4), sampler, num_workers=1))
        next(batches)
        os.kill(batches._workers[0].pid, signal.SIGINT)
        assert os.getpgid(batches._workers[0].pid) != os.getpgrp()  # nor does SIGTERM to the main process's group reach them
        assert len(list(batches)) == 7 and "stopping" not in capfd.readouterr().err
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_goes_to_a_worker_can_be_pickled(images, sizes, tmp_path):
    """Spawned workers, and those of macOS and Windows, get the data set through pickle."""
    latents, text = make_caches(tmp_path, images, sizes)
    samples = Samples(images, sizes, seed=1, caption_dropout=0.3, flip=True, latents=latents, text=text)
    copy = pickle.loads(pickle.dumps(samples))
    assert torch.equal(copy[Key(2, 1, 0)]["latent_mean"], samples[Key(2, 1, 0)]["latent_mean"])


def test_loading_leaves_the_global_generator_alone(images, sizes):
    """The training loop seeds it at each step, for LoRA dropout."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(Samples(images, sizes, seed=4, flip=True, random_crop=True), Order(sizes, 2, seed=4), 3, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_cached_is_uncached_encoded(images, sizes, tmp_path):
    """The same flips and prompts; the latent of a flipped sample is that of the mirrored picture."""
    latents, text = make_caches(tmp_path, images, sizes)
    order = Order(sizes, 4, seed=2)
    options = {"seed": 2, "caption_dropout": 0.3, "flip": True}
    plain = run(Samples(images, sizes, **options), order, 12, batch_size=4)
    cached = run(Samples(images, sizes, latents=latents, text=text, **options), order, 12, batch_size=4)
    assert plain.keys() == cached.keys()
    mirrored = 0
    for at, (index, prompt, pixels) in plain.items():
        assert cached[at][:2] == (index, prompt) and torch.equal(cached[at][2], encode(pixels[None])[0][0])
        mirrored += torch.equal(pixels, fit(images.image(index), sizes[index], flip=True))
    assert 12 < mirrored < 36  # of 48: both orientations were there


def test_captions_stay_with_their_pictures_in_every_epoch(images, sizes, tmp_path):
    """Facts, defect 2: a cache indexed by loader step gives latents other pictures' captions as soon as the loader shuffles."""
    latents, text = make_caches(tmp_path, images, sizes)
    order = Order(sizes, 3, seed=11)
    samples = Samples(images, sizes, seed=11, flip=True, latents=latents, text=text)
    seen = set()
    for index, prompt, mean in run(samples, order, 4 * order.steps_per_epoch, batch_size=3).values():
        number = round((mean[0].mean().item() + 1) * 127.5 / 20)  # red says which picture this is
        assert prompt in ({f"picture number {number}", "number 3 by another name"} if number == 3 else {f"picture number {number}"})
        assert images.records[index].prompt == prompt
        seen.add(prompt)
    assert len(seen) == COUNT + 1


# --------------------------------------------------------------------------- filling


def test_filling_again_computes_nothing(images, sizes, tmp_path):
    latents, text = make_caches(tmp_path, images, sizes)
    assert fill_latents(latents, images, sizes, flip=True, encode=pytest.fail, batch_size=4, progress=False) == 0
    assert fill_text(text, [r.prompt for r in images.records], pytest.fail, batch_size=4, progress=False) == 0


def test_a_batch_to_encode_has_one_size_and_equal_files_are_encoded_once(images, sizes, tmp_path):
    shapes = []

    def note(pixels):
        shapes.append(tuple(pixels.shape))
        return encode(pixels)

    count = fill_latents(TensorCache(tmp_path, "latents", {}), images, sizes, flip=False, encode=note, batch_size=3, progress=False)
    assert count == COUNT  # 13 records, two of them equal
    assert shapes == [(3, 3, 16, 16), (1, 3, 16, 16), (3, 3, 16, 32), (1, 3, 16, 32), (3, 3, 32, 16), (1, 3, 32, 16)]


def test_two_ranks_fill_everything_together(images, sizes, tmp_path):
    cache = TensorCache(tmp_path, "latents", {})
    counts = [
        fill_latents(cache, images, sizes, flip=True, encode=encode, batch_size=4, rank=rank, world=2, progress=False) for rank in (0, 1)
    ]
    assert counts == [COUNT, COUNT]  # half of two orientations each
    assert fill_latents(cache, images, sizes, flip=True, encode=pytest.fail, batch_size=4, progress=False) == 0


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_picture_is_decoded_once_for_both_orientations(images, sizes, tmp_path, monkeypatch, world):
    decoded = []
    image = CaptionedImages.image
    monkeypatch.setattr(CaptionedImages, "image", lambda self, index: decoded.append(self.records[index].key) or image(self, index))
    cache = TensorCache(tmp_path, "latents", {})
    for rank in range(world):
        fill_latents(cache, images, sizes, flip=True, encode=encode, batch_size=4, rank=rank, world=world, progress=False)
    assert len(decoded) == len(set(decoded)) == COUNT


def stale(images, sizes, root: Path) -> dict[str, int]:
    """How many entries each change leaves to compute, after everything was cached once with the first settings."""
    latents, text = make_caches(root, images, sizes, flip=False)

    def count(cache=latents, images=images, sizes=sizes, flip=False):
        return fill_latents(cache, images, sizes, flip=flip, encode=encode, batch_size=4, progress=False)

    found = {"nothing": count(), "vae": count(TensorCache(root, "latents", {"vae": "w"}))}
    found["resolution"] = count(sizes=[(2 * h, 2 * w) for h, w in sizes])
    found["bucket"] = count(sizes=[(16, 16)] * len(images))
    found["flip"] = count(flip=True)
    found["crop"] = count(TensorCache(root, "latents", {"vae": "v", "crop": "top"}))
    prompts = [r.prompt for r in images.records]
    prompts[2] = "picture number two"
    found["caption"] = fill_text(text, prompts, encode_text, batch_size=4, progress=False)
    found["encoders"] = fill_text(TensorCache(root, "text", {"encoders": "f"}), prompts, encode_text, batch_size=4, progress=False)
    return found


def test_every_change_is_a_miss(images, sizes, tmp_path):
    """12 different pictures; in other buckets the 4 square ones keep theirs. 13 prompts, one of them changed."""
    assert stale(images, sizes, tmp_path) == {
        "nothing": 0, "vae": 12, "resolution": 12, "bucket": 8, "flip": 12, "crop": 12, "caption": 1, "encoders": 13,
    }  # fmt: skip


def test_changed_bytes_are_a_miss_for_that_picture_only(tmp_path):
    """Same path, same size in bytes, same modification time."""
    import os

    for i in range(3):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    options = {"flip": False, "encode": encode, "batch_size": 2, "progress": False}
    before = open_captioned(str(tmp_path), cache_dir=tmp_path / "cache", progress=False)
    cache = TensorCache(tmp_path / "cache", "latents", {})
    assert fill_latents(cache, before, [(16, 16)] * 3, **options) == 3
    file, stamp = tmp_path / "1.png", (tmp_path / "1.png").stat()
    Image.new("RGB", (16, 16), (61, 0, 0)).save(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    after = open_captioned(str(tmp_path), cache_dir=tmp_path / "cache", progress=False)
    assert fill_latents(cache, after, [(16, 16)] * 3, **options) == 1
    got = Samples(after, [(16, 16)] * 3, seed=0, latents=cache)[Key(1, 0, 0)]["latent_mean"]
    assert got[0, 0, 0].item() == pytest.approx(61 / 127.5 - 1)


def test_a_latent_key_names_everything_that_was_done(images):
    first, second, third, copy = (images.records[i] for i in (0, 1, 3, 12))
    keys = [latent_key(r, s, f) for r, s, f in ((first, (16, 16), False), (first, (16, 16), True), (first, (16, 32), False))]
    assert len({*keys, latent_key(second, (16, 16), False)}) == 4 and all(FIT in key for key in keys)
    assert latent_key(third, (16, 16), False) == latent_key(copy, (16, 16), False)


def test_photographs_from_folder_to_batch(tmp_path):
    """The shipped pictures in every awkward form, in buckets of about 64 x 64, cached and mirrored."""
    photos = Path(__file__).parent.parent / "datas" / "photos"
    images = open_captioned(str(photos), cache_dir=tmp_path, strict=True, progress=False)
    shapes = buckets(64, aspect_buckets=True)
    sizes = [assign(record.width, record.height, shapes) for record in images.records]
    assert len(set(sizes)) >= 3
    latents, text = make_caches(tmp_path, images, sizes)
    order = Order(sizes, 2, seed=0)
    samples = Samples(images, sizes, seed=0, flip=True, latents=latents, text=text)
    loaded = run(samples, order, order.steps_per_epoch, batch_size=2)
    assert {prompt for _, prompt, _ in loaded.values()} == {record.prompt for record in images.records}
