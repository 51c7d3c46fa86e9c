"""The DreamBooth trainer in this process, on the smallest model: two losses, class pictures, text encoders, masks, refusals.

What it shares with the LoRA trainer (data, caches, signals, trackers, full disks) is tested there: the lines are the same.
"""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import train_dreambooth_lora_sd3 as script
from src import flow, lora, seeds
from src.data import buckets
from src.pipelines import sd3

pytestmark = pytest.mark.usefixtures("summaries")
SUBJECT, CLASS = "a photo of sks dog", "a photo of a dog"
SHOWN = dict(validation_prompt=[SUBJECT], validation_seed=7, validation_guidance_scale=4.0, validation_inference_steps=3)
PRIOR = dict(with_prior_preservation=True, class_prompt=[CLASS], num_class_images=6, class_inference_steps=2)
TEXT = dict(train_text_encoder=True, text_encoder_rank=2, text_encoder_learning_rate=2e-2)


def cut_out(folder: Path, names: list[str]) -> Path:
    """Pictures of a box that is not transparent, which lies elsewhere in each."""
    folder.mkdir()
    for number, name in enumerate(names):
        picture = Image.new("RGBA", (32, 32), (40, 90 + 40 * number, 200, 0))
        picture.paste((250 - 50 * number, 60, 20, 255), (4 * number, 2, 4 * number + 14, 20))
        picture.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    """Four pictures of the subject without captions, partly transparent."""
    root = tmp_path_factory.mktemp("dreambooth")
    return runs.World(tiny_sd3_folder, cut_out(root / "subject", [f"{number}.png" for number in range(4)]), root / "cache")


def train_in(world, root: Path):
    def run(name: str = "run", **changes) -> Path:
        flags = dict(dataset_name=None, instance_data_dir=world.data, instance_prompt=SUBJECT, rank=4, learning_rate=1e-2) | changes
        runs.train(script, world.argv(root / name, **flags))
        return root / name

    return run


@pytest.fixture
def train(world, tmp_path):
    """train("name", rank=2, ...) -> output folder of a run with these flags."""
    return train_in(world, tmp_path)


@pytest.fixture
def live(monkeypatch):
    """The modules that the next run trains, by name, and the adapters' `start` values."""
    seen, parts = {"modules": {}, "start": {}}, itertools.cycle(lora.TEXT_PARTS)

    def watch(name: str):
        add = getattr(script, name)

        def adding(module, args):
            add(module, args)
            part = "transformer" if name == "add_lora" else next(parts)
            seen["modules"][part] = module
            seen["start"] |= {f"{part}.{key}": value.clone() for key, value in lora.state(module).items()}

        monkeypatch.setattr(script, name, adding)

    watch("add_lora")
    watch("add_text_lora")
    return seen


# --------------------------------------------------------------------------- the two losses


def first_batch(count: int, size: int, seed: int, stream: str) -> list[int]:
    """Numbers of the first `size` of `count` pictures: shuffled, cut into batches, the last one filled up, the batches shuffled."""
    generator = seeds.generator(seed, stream, 0)
    order = torch.randperm(count, generator=generator).tolist()
    batches = [[order[i % count] for i in range(start, start + size)] for start in range(0, count, size)]
    return batches[torch.randperm(len(batches), generator=generator).tolist()[0]]


def plain_loss(model, pictures: list[Image.Image], prompt: str, positions: range, seed: int) -> float:
    """Mean of |v - (noise - x0)|^2 over the pictures, one at a time, each with the random numbers of its position."""
    total, shape = 0.0, (16, 4, 4)
    for picture, position in zip(pictures, positions, strict=True):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        pixels = pixels.flip(-1) if seeds.uniform(seed, 0, [position], "flip").item() < 0.5 else pixels
        posterior = model.vae.encode(pixels).latent_dist
        x0 = (posterior.mean + posterior.std * seeds.normal(seed, 0, [position], "posterior", shape) - 0.0609) * 1.5305
        noise = seeds.normal(seed, 0, [position], "noise", shape)
        sigma = flow.sigmas(seeds.uniform(seed, 0, [position], "sigma"), shift=3.0)
        velocity = sd3.velocity(model.transformer, (1 - sigma) * x0 + sigma * noise, sigma, sd3.encode_prompts(model, [prompt]))
        total += (velocity - (noise - x0)).square().mean().item()
    return total / len(pictures)


@pytest.mark.slow
def test_the_two_losses_are_those_of_a_plain_loop_and_their_weighted_sum_is_the_loss(train, world, tmp_path, monkeypatch):
    """Step 1, where the LoRA changes nothing yet: positions 0-3 are the subject's, 4-7 the class's, so that it shows 8 pictures.

    Two cycles of a cosine in two steps: the rate is whole again after the first, and zero after the second.
    """
    logs, drawn, log = [], [], script.metrics.Log
    monkeypatch.setattr(script.metrics, "Log", lambda *given, **named: logs.append(named) or log(*given, **named))
    monkeypatch.setattr(script.validation, "summary", lambda *given: drawn.append(given))
    variants, load = [], sd3.load
    monkeypatch.setattr(sd3, "load", lambda *given, variant=None, **named: variants.append(variant) or load(*given, **named))
    out = train(**PRIOR, class_data_dir=tmp_path / "class", prior_loss_weight=0.3, max_train_steps=2, lr_scheduler="cosine_with_restarts",
                lr_num_cycles=2, seed=3, variant="fp16")  # fmt: skip
    assert set(variants) == {"fp16"} and len(variants) >= 3
    assert [named["images_per_add"] for named in logs] == [8]
    assert runs.values(out, "lr") == pytest.approx([1e-2, 0], abs=1e-9)
    panels = drawn[0][2]
    assert (panels["loss of the subject"], panels["loss of its class"]) == ("instance_loss", "prior_loss")
    instance, prior = runs.values(out, "instance_loss"), runs.values(out, "prior_loss")
    subject = [Image.open(path) for path in sorted(world.data.glob("*.png"))]
    subject = [Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB") for picture in subject]
    others = [Image.open(path) for path in sorted((tmp_path / "class").glob("*.png"))]
    model = sd3.load(world.model)
    with torch.no_grad():
        expected = plain_loss(model, [subject[i] for i in first_batch(4, 4, 3, "order")], SUBJECT, range(4), 3)
        assert instance[0] == pytest.approx(expected, rel=1e-5)
        expected = plain_loss(model, [others[i] for i in first_batch(6, 4, 3, "second order")], CLASS, range(4, 8), 3)
        assert prior[0] == pytest.approx(expected, rel=1e-5)
    for total, one, other in zip(runs.values(out, "loss"), instance, prior, strict=True):
        assert total == pytest.approx(one + 0.3 * other, rel=1e-6)
    assert "prior_loss" not in runs.lines(train("plain", max_train_steps=1))[0]


def update(train, name: str, world, part: str = "transformer.", **flags) -> torch.Tensor:
    """What one step adds to every B of a part, which starts at zero; Adam's epsilon is far above every gradient: proportional to it."""
    out = train(name, adam_epsilon=1e3, learning_rate=1.0, max_grad_norm=0, adam_weight_decay=0.0, max_train_steps=1, **flags)
    found = sorted((key, value) for key, value in runs.weights(out).items() if ".lora_B." in key and key.startswith(part))
    return torch.cat([value.flatten() for _, value in found]).double()


@pytest.mark.slow
def test_the_weight_of_the_prior_acts_on_its_own_gradient_alone(train, world):
    """update(w) = update(0) + w * (update(1) - update(0)). Defect 4 of the public scripts: one half's weight acted on both."""
    subject = update(train, "subject", world)
    whole, part = (update(train, str(weight), world, **PRIOR, prior_loss_weight=weight) for weight in (1.0, 0.25))
    assert (whole - subject).norm() > 0.1 * subject.norm()
    assert (part - (subject + 0.25 * (whole - subject))).norm() < 1e-4 * subject.norm()
    texts = dict(part="text_encoder", train_text_encoder=True, text_encoder_learning_rate=1.0)
    subject, both = update(train, "text", world, **texts), update(train, "text and class", world, **PRIOR, **texts)
    assert (both - subject).norm() > 0.1 * subject.norm()  # the class teaches the text encoders, too


@pytest.mark.slow
def test_any_batch_size_gives_the_same_losses(train):
    """Batches of 1, 2 and 4 with as many accumulated, one class prompt or two. Defect 4 of the public scripts: a crash at batch 2.

    fp32 rounding of some hundred operations: below 1e-5; an epsilon above every gradient keeps Adam from blowing that up.
    """
    plain = dict(adam_epsilon=1.0, learning_rate=10.0, **TEXT, **(PRIOR | dict(class_prompt=[CLASS, "a puppy"])))
    plain["text_encoder_learning_rate"] = 5.0
    found = {}
    for size in (1, 2, 4):
        out = train(f"batch {size}", train_batch_size=size, gradient_accumulation_steps=4 // size, **plain)
        found[size] = [runs.values(out, name) for name in ("instance_loss", "prior_loss", "loss", "grad_norm")]
    for size in (1, 2):
        for values, expected in zip(found[size], found[4], strict=True):
            assert values == pytest.approx(expected, rel=1e-5)
    another = train("another", train_batch_size=4, **(plain | dict(learning_rate=5.0)))
    assert runs.values(another, "loss")[-1] != pytest.approx(found[4][2][-1], rel=1e-5)  # else the weights would not matter


# --------------------------------------------------------------------------- what it trains and writes


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run with everything switched on, of which several tests look at one side each."""
    flags = PRIOR | TEXT | SHOWN | dict(mask_from_alpha=True, use_ema=True, ema_decay=0.3, checkpointing_steps=4, lora_alpha=8.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.validation, "summary", lambda *_: None)
        return train_in(world, tmp_path_factory.mktemp("finished"))(**flags, learning_rate=3e-2, export_format="kohya")


@pytest.mark.slow
def test_every_adapter_is_trained_and_no_base_weight_changes(train, world, live):
    out = train(**PRIOR, **TEXT, adam_weight_decay=0.0, gradient_checkpointing=True)  # else decay alone would move A
    modules = live["modules"]
    assert modules["transformer"].is_gradient_checkpointing
    assert list(modules) == ["transformer", "text_encoder", "text_encoder_2"]
    trained = {f"{part}.{key}": value for part, module in modules.items() for key, value in lora.state(module).items()}
    assert not [name for name, start in live["start"].items() if torch.equal(start, trained[name])]
    assert {value.dtype for value in trained.values()} == {torch.float32}
    base = sd3.load(world.model)
    for part, original in zip(modules, [base.transformer, *base.text_encoders], strict=False):
        kept = {name.replace(".base_layer", ""): value for name, value in modules[part].state_dict().items() if ".lora_" not in name}
        runs.assert_identical(kept, dict(original.state_dict()))
    runs.assert_identical(runs.weights(out), trained)
    assert {value.shape[0] for name, value in trained.items() if name.startswith("text") and name.endswith("A.weight")} == {2}


def test_the_text_encoders_have_a_learning_rate_of_their_own(train, live):
    """Adam's first step is the learning rate itself, wherever the gradient is far above its epsilon of 1e-8; both times 4 pictures."""
    train(**TEXT | dict(text_encoder_learning_rate=5e-3), max_train_steps=1, learning_rate=2.5e-4, scale_lr=True, adam_weight_decay=0.0)
    for part, rate in (("transformer", 1e-3), ("text_encoder", 2e-2), ("text_encoder_2", 2e-2)):
        largest = max(value.abs().max().item() for key, value in lora.state(live["modules"][part]).items() if ".lora_B." in key)
        assert largest == pytest.approx(rate, rel=1e-3)


def draw(world, weights: Path | None = None) -> np.ndarray:
    """(32, 32, 3) integers, by the stock pipeline with the settings of SHOWN."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(world.model, torch_dtype=torch.float32)
    if weights is not None:
        pipeline.load_lora_weights(str(weights), weight_name=runs.WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(prompt=SUBJECT, height=32, width=32, num_inference_steps=3, guidance_scale=4.0, max_sequence_length=16)
    return np.asarray(pipeline(**settings, generator=torch.Generator("cpu").manual_seed(7)).images[0]).astype(int)


@pytest.mark.slow
def test_stock_diffusers_draws_the_last_validation_picture(finished, world, tmp_path):
    """One file for transformer and text encoders, alpha and ranks included; validation shows the average where one is kept."""
    ours = {step: np.asarray(Image.open(finished / f"samples/step-{step:06d}/00-7.png")).astype(int) for step in (0, 4)}
    assert np.abs(ours[4] - draw(world, finished)).max() <= 1  # one grey level of rounding
    assert np.abs(ours[0] - draw(world)).max() <= 1
    assert np.abs(ours[4] - ours[0]).mean() > 1 and np.abs(ours[4] - draw(world, finished / "raw")).mean() > 1
    from safetensors.torch import save_file

    tensors, metadata = runs.saved(finished)
    save_file({k: v for k, v in tensors.items() if k.startswith("transformer.")}, tmp_path / runs.WEIGHTS, metadata)
    assert np.abs(ours[4] - draw(world, tmp_path)).max() > 1  # the text encoders' part shows


@pytest.mark.slow
def test_what_is_merged_is_the_average_too(train, world):
    """Of one projection: B A times alpha / rank = 8 / 4."""
    from diffusers import SD3Transformer2DModel

    out, name = train(use_ema=True, ema_decay=0.3, export_merged=True, lora_alpha=8.0), "transformer_blocks.0.attn.to_q"
    average, raw = (
        2.0 * weights[f"transformer.{name}.lora_B.weight"] @ weights[f"transformer.{name}.lora_A.weight"]
        for weights in map(runs.weights, (out, out / "raw"))
    )
    base, merged = (SD3Transformer2DModel.from_pretrained(path) for path in (world.model / "transformer", out / "merged_transformer"))
    found = (merged.get_submodule(name).weight - base.get_submodule(name).weight).detach()
    torch.testing.assert_close(found, average, rtol=1e-3, atol=1e-6)
    assert (found - raw).abs().max() > 0.01 * raw.abs().max()


def test_a_run_leaves_its_card_and_metrics(finished):
    card = (finished / "README.md").read_text()
    assert "# DreamBooth LoRA of" in card and "4 pictures of" in card and SUBJECT in card and "| `prior_loss` |" in card
    assert "- dreambooth\n- lora\n" in card
    assert {"instance_loss", "prior_loss", "loss"} <= runs.lines(finished)[-1].keys()
    assert (finished / "samples/step-000004.png").is_file()
    average, raw = runs.weights(finished), runs.weights(finished / "raw")
    for part in ("transformer", *lora.TEXT_PARTS):
        assert any(not torch.equal(average[name], raw[name]) for name in raw if name.startswith(f"{part}.")), f"no average of {part}"


def test_kohyas_file_holds_the_text_encoders_under_its_names(finished):
    from safetensors.torch import load_file

    ours, kohya = runs.weights(finished), load_file(finished / lora.KOHYA_NAME)
    runs.assert_identical(load_file(finished / "checkpoint-4" / lora.KOHYA_NAME), kohya)
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        key, layer = f"lora_te{number}_text_model_encoder_layers_1_self_attn_q_proj", f"{part}.text_model.encoder.layers.1.self_attn.q_proj"
        runs.assert_identical(kohya[f"{key}.lora_down.weight"], ours[f"{layer}.lora_A.weight"])
        runs.assert_identical(kohya[f"{key}.lora_up.weight"], ours[f"{layer}.lora_B.weight"])
        assert kohya[f"{key}.alpha"].item() == 8.0 * 2 / 4  # rank 2 of the same alpha / rank
    assert sum(name.startswith("lora_te") for name in kohya) == 2 * 2 * 4 * 3  # encoders x layers x projections x tensors


@pytest.mark.slow
def test_init_lora_starts_all_parts_where_that_lora_ended(train, finished, live):
    flags = dict(max_train_steps=1, init_lora=finished, lora_alpha=8.0, learning_rate=1e-9)
    train(**TEXT | flags | dict(text_encoder_learning_rate=1e-9), adam_weight_decay=0.0)
    for name, value in runs.weights(finished).items():
        part, key = name.split(".", 1)
        torch.testing.assert_close(lora.state(live["modules"][part])[key].cpu(), value, rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="--init_lora .*adapts text_encoder and text_encoder_2 too.*--train_text_encoder"):
        train("dropped", **flags)
    with pytest.raises(ValueError, match="--init_lora .*has rank 2, this run --text_encoder_rank 4; pass --text_encoder_rank 2"):
        train("ranks", train_text_encoder=True, **flags)


@pytest.mark.slow
def test_t5_is_read_from_the_cache_where_clip_is_trained(train, monkeypatch):
    """The same losses as with all three encoders in memory; with the cache T5 (9.5 GB) is gone."""
    resident, prepare = {}, script.subject.prepare

    def spy(run, args):
        data, prior = prepare(run, args)
        resident[run.output_dir.name] = len(data.encoders.text_encoders)
        return data, prior

    monkeypatch.setattr(script.subject, "prepare", spy)
    flags = dict(**TEXT, **SHOWN, caption_dropout=0.3)
    cached, plain = train("cached", **flags), train("plain", **flags, cache_text=False)
    assert resident == {"cached": 2, "plain": 3}
    assert runs.values(cached, "loss") == pytest.approx(runs.values(plain, "loss"), rel=1e-5)
    one, other = (np.asarray(Image.open(out / "samples/step-000004/00-7.png")).astype(int) for out in (cached, plain))
    assert np.abs(one - other).max() <= 1
    alone = train("alone", caption_dropout=0.3, max_train_steps=1)  # the same first step; the norm is that of all trained weights
    assert runs.values(alone, "loss")[0] == pytest.approx(runs.values(plain, "loss")[0], rel=1e-5)
    assert runs.values(plain, "grad_norm")[0] > 1.0001 * runs.values(alone, "grad_norm")[0]


# --------------------------------------------------------------------------- class pictures


@pytest.fixture
def rendered(monkeypatch):
    """Seeds of the class pictures that are rendered from now on, batch by batch; `die_at` one of them like a kill."""
    seen, render = SimpleSeen(), script.subject.sd3.render

    def watching(*args, seeds, **options):
        if seen.die_at in seeds:
            raise runs.Interrupted
        seen.batches.append(list(seeds))
        return render(*args, seeds=seeds, **options)

    monkeypatch.setattr(script.subject.sd3, "render", watching)
    return seen


class SimpleSeen:
    def __init__(self):
        self.batches, self.die_at = [], None


@pytest.mark.slow
def test_class_pictures_are_rendered_once_and_kept_for_other_runs(train, tmp_path, rendered):
    """A folder of their own for every setting that they depend on; other settings find them again."""
    flags = PRIOR | dict(cache_dir=tmp_path / "cache", max_train_steps=1, sample_batch_size=4)
    train("first", **flags)
    assert rendered.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]  # whole batches, six pictures
    train("again", **flags, seed=5, learning_rate=1.0, prior_loss_weight=2.0)
    assert len(rendered.batches) == 2
    (folder,) = (tmp_path / "cache").glob("class-*")
    assert len(list(folder.glob("*.png"))) == 6
    train("more", **(flags | dict(num_class_images=7)))
    assert rendered.batches[2:] == [[4, 5, 6, 7]]  # picture 6 alone is new
    for change in (dict(class_prompt=["a cat"]), dict(class_guidance_scale=1.0), dict(class_inference_steps=3)):
        train(str(change), **(flags | change))
    assert len(list((tmp_path / "cache").glob("class-*"))) == 4


@pytest.mark.slow
def test_killed_while_rendering_the_rest_is_made_the_next_time(train, tmp_path, rendered):
    flags = PRIOR | dict(max_train_steps=1, sample_batch_size=2, cache_text=False)
    whole = train("whole", **flags, class_data_dir=tmp_path / "class")
    rendered.batches.clear()
    rendered.die_at = 2
    with pytest.raises(runs.Interrupted):
        train("parts", **flags, class_data_dir=tmp_path / "parts class")
    rendered.die_at = None
    parts = train("parts", **flags, class_data_dir=tmp_path / "parts class")
    assert rendered.batches == [[0, 1], [2, 3], [4, 5]]
    assert runs.files(tmp_path / "class") == runs.files(tmp_path / "parts class")
    for path in (tmp_path / "class").iterdir():
        assert path.read_bytes() == (tmp_path / "parts class" / path.name).read_bytes(), path.name
    runs.assert_identical(runs.saved(whole), runs.saved(parts))


@pytest.mark.slow
def test_a_class_picture_is_what_the_stock_pipeline_draws_from_its_prompt_and_seed(train, world, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    prompts = ["a dog", "a puppy"]
    train(**(PRIOR | dict(class_prompt=prompts, num_class_images=3)), class_data_dir=tmp_path / "class", max_train_steps=1)
    pipeline = StableDiffusion3Pipeline.from_pretrained(world.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(height=32, width=32, num_inference_steps=2, guidance_scale=4.5, max_sequence_length=16)
    for index in range(3):
        drawn = pipeline(prompts[index % 2], **settings, generator=torch.Generator("cpu").manual_seed(index)).images[0]
        kept = Image.open(tmp_path / f"class/generated-{index:05d}.png")
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(kept)).max() <= 1
        assert (tmp_path / f"class/generated-{index:05d}.txt").read_text().strip() == prompts[index % 2]


@pytest.mark.slow
def test_pictures_and_captions_of_ones_own_need_no_prompt_and_no_rendering(train, tmp_path, rendered):
    flags = dict(with_prior_preservation=True, class_data_dir=runs.make_pictures(tmp_path / "class", 6), num_class_images=6)
    (tmp_path / "class/5.png").write_bytes(b"broken")
    out = train(**flags, aspect_buckets=True, resolution=64)
    assert not rendered.batches and len(runs.values(out, "prior_loss")) == 4
    assert "5.png: not a picture" in (out / "skipped.txt").read_text()
    with pytest.raises(SystemExit, match="error: --strict_data: .*5.png"):
        train("strict", **flags, strict_data=True)


def test_class_pictures_of_other_settings_are_refused(train, tmp_path):
    flags = PRIOR | dict(class_data_dir=tmp_path / "class", max_train_steps=1)
    train(**flags)
    with pytest.raises(SystemExit, match="error: --class_data_dir .*generated with another class prompt"):
        train("other", **(flags | dict(class_prompt=["a cat"])))


def test_class_pictures_are_known_by_all_that_they_depend_on_and_by_nothing_else(world, tmp_path):
    flags = PRIOR | dict(dataset_name=None, instance_data_dir=world.data, instance_prompt=SUBJECT, max_sequence_length=16)

    def settings(**changes):
        return script.subject._class_settings(script.parse_args(world.argv(tmp_path / "out", **flags | changes)))

    def changed(part: str) -> Path:
        model = shutil.copytree(world.model, tmp_path / part)
        file = next((model / part).glob("*.json"))
        file.write_text(file.read_text() + "\n")
        return model

    plain = settings()
    for part in ("transformer", "vae", "scheduler", "text_encoder_2", "tokenizer_3"):
        assert settings(pretrained_model_name_or_path=changed(part)) != plain, part
    depends = dict(class_prompt=["a cat"], resolution=64, class_inference_steps=3, class_guidance_scale=2.0, max_sequence_length=8,
                   mixed_precision="bf16", variant="fp16")  # fmt: skip
    for name, value in depends.items():
        assert settings(**{name: value}) != plain, name
    for name, value in dict(num_class_images=9, seed=5, prior_loss_weight=2.0, sample_batch_size=1, rank=2).items():
        assert settings(**{name: value}) == plain, name


# --------------------------------------------------------------------------- masks, captions, repeats


@pytest.mark.slow
def test_a_mask_of_everything_is_no_mask_and_alpha_is_a_mask_folder(train, world, tmp_path):
    for kind, level in (("white", 255), ("alpha", None)):
        (tmp_path / kind).mkdir()
        for path in world.data.glob("*.png"):
            alpha = Image.open(path).getchannel("A")
            (alpha if level is None else Image.new("L", alpha.size, level)).save(tmp_path / kind / f"{path.stem}.bmp")
    flags = dict(max_train_steps=2, num_validation_loss_images=1)
    plain, white = train("plain", **flags), train("masked", mask_data_dir=tmp_path / "white", **flags)
    assert runs.values(white, "loss") == pytest.approx(runs.values(plain, "loss"), rel=1e-5)
    alpha, folder = train("alpha", mask_from_alpha=True, **flags), train("folder", mask_data_dir=tmp_path / "alpha", **flags)
    assert runs.lines(alpha) == runs.lines(folder)
    for name in ("loss", "val_loss"):
        assert abs(runs.values(alpha, name)[0] / runs.values(plain, name)[0] - 1) > 0.01


def test_each_picture_has_its_own_mask_also_those_held_out(train, world, monkeypatch):
    """The pictures have the size that they are trained in: a latent's weight is the mean opacity of its 8 x 8 pixels."""
    seen, validator = [], script.validation.Validator
    monkeypatch.setattr(script.validation, "Validator", lambda *given, **named: seen.append(given[2]) or validator(*given, **named))
    train(mask_from_alpha=True, num_validation_loss_images=2, max_train_steps=1, train_batch_size=2, no_hflip=True)
    for part in (seen[0].training, seen[0].held_out):
        assert len(part) == 2
        for index, record in enumerate(part.images.records):
            alpha = np.asarray(Image.open(world.data / record.name).getchannel("A"), dtype=np.float32) / 255
            expected = torch.from_numpy(alpha.reshape(4, 8, 4, 8).mean((1, 3)))
            torch.testing.assert_close(part[buckets.Key(index, 0, index)]["mask"][0], expected)


@pytest.mark.slow
def test_the_class_has_no_mask(train, tmp_path):
    flags = PRIOR | dict(max_train_steps=1)
    plain, masked = train("plain", **flags), train("masked", mask_from_alpha=True, **flags)
    assert runs.values(plain, "prior_loss") == runs.values(masked, "prior_loss")
    assert runs.values(plain, "instance_loss") != runs.values(masked, "instance_loss")


def test_captions_of_their_own_and_repeats(train, tmp_path, capsys):
    data, held_out = runs.make_pictures(tmp_path / "data", 4), dict(num_validation_loss_images=1)
    out = train(instance_data_dir=None, dataset_name=data, instance_prompt=None, repeats=4, max_train_steps=3, **held_out)
    assert "12 pictures to train on" in capsys.readouterr().out
    assert runs.values(out, "epoch") == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]  # 3 pictures x 4 in batches of 4
    assert "3 pictures of" in (out / "README.md").read_text()


# --------------------------------------------------------------------------- interrupted, resumed

LONG = dict(
    max_train_steps=5, checkpointing_steps=2, logging_steps=3, use_ema=True, lr_scheduler="cosine", caption_dropout=0.3, lora_dropout=0.3,
    train_batch_size=2, validation_steps=3, num_validation_loss_images=1, mask_from_alpha=True, **SHOWN, **PRIOR, **TEXT,
)  # fmt: skip


@pytest.mark.slow
def test_resumed_equals_uninterrupted(train, monkeypatch):
    whole = train("whole", **LONG)
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(patch, 4)  # two steps after the checkpoint, in the middle of a window of metrics
        train("parts", **LONG)
    parts = train("parts", **LONG, resume_from_checkpoint="latest")
    ended = runs.state(whole / "checkpoint-4")
    trained = {"transformer", "text_encoder", "text_encoder_2"}
    assert ended.keys() == {"step", "kinds", "world", *trained, "optimizer", "ema", "schedule", "log"}
    runs.assert_identical(ended, runs.state(parts / "checkpoint-4"))
    for folder in (".", "raw", "checkpoint-4", "checkpoint-4/raw"):
        runs.assert_identical(runs.saved(whole / folder), runs.saved(parts / folder))
    assert (whole / "samples/step-000005/00-7.png").read_bytes() == (parts / "samples/step-000005/00-7.png").read_bytes()
    assert runs.lines(whole) == runs.lines(parts)


def test_args_json_is_a_config(finished, tmp_path):
    args = script.parse_args(["--config", str(finished / "args.json"), "--output_dir", str(tmp_path)])
    before = json.loads((finished / "args.json").read_text()) | {"output_dir": str(tmp_path)}
    assert script.runtime.plain_args(args) == before


# --------------------------------------------------------------------------- dry run, bad input


@pytest.mark.slow
def test_dry_run_counts_the_class_and_the_text_encoders(world, tmp_path, capsys, live):
    flags = dict(dataset_name=None, instance_data_dir=world.data, instance_prompt=SUBJECT, rank=4, dry_run=True, max_train_steps=3)
    outs = {}
    for name, more in (("plain", {}), ("all", PRIOR | TEXT | dict(class_data_dir=tmp_path / "class", class_prompt=[CLASS, "b"]))):
        runs.train(script, world.argv(tmp_path / "out", **flags, **more))
        outs[name] = capsys.readouterr().out
    trained = sum(value.numel() for module in live["modules"].values() for value in lora.parameters(module))
    assert f"{trained:,} parameters" in outs["all"] and len(live["modules"]) == 3
    assert f"6, 6 of them to be rendered into {tmp_path / 'class'}" in outs["all"]

    def row(name: str, text: str) -> str:
        (line,) = (line for line in text.splitlines() if line.startswith(name))
        return line.removeprefix(name).strip()

    flops = [float(row("compute", outs[name]).split()[0]) for name in ("plain", "all")]
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01)
    assert row("latent cache", outs["plain"]).startswith("8 entries") and row("latent cache", outs["all"]).startswith("20 entries")
    assert row("text cache", outs["plain"]).startswith("2 entries") and row("text cache", outs["all"]).startswith("4 entries")
    assert [outs[name].count("only while the text cache is filled") for name in ("plain", "all")] == [3, 1]
    assert not (tmp_path / "out").exists() and not (tmp_path / "class").exists()


def captioned(tmp_path):
    runs.make_pictures(tmp_path / "captioned", 2)


def half_captioned(tmp_path):
    cut_out(tmp_path / "half", ["a.png", "b.png"])
    (tmp_path / "half/a.txt").write_text("a caption")


def empty(tmp_path):
    (tmp_path / "empty").mkdir()


def empty_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n")


def one_mask(tmp_path):
    cut_out(tmp_path / "masks", ["0.png"])


SOME = dict(with_prior_preservation=True)
BAD = {  # what is wrong: flags, set-up, what the line must name, the cure in it
    "no pictures": (dict(instance_data_dir=None), None, "--instance_data_dir is required", "folder with some pictures"),
    "pictures that are not there": (dict(instance_data_dir="nowhere"), None, "--instance_data_dir nowhere", "no such folder"),
    "an empty folder": (dict(instance_data_dir="empty"), empty, "--instance_data_dir empty has no pictures", "expected a folder"),
    "two data sets": (dict(dataset_name="captioned"), captioned, "--dataset_name", "give one of them"),
    "graphs of two backward passes": (
        PRIOR | dict(compile=True, compile_mode="reduce-overhead"), None, "--with_prior_preservation has several", "use default"
    ),
    "revision of a folder": (dict(dataset_revision="main"), None, "--dataset_revision main", "--instance_data_dir"),
    "no prompt": (dict(instance_prompt=None), None, "no captions", "write a metadata.jsonl"),
    "half the captions": (dict(instance_data_dir="half", instance_prompt=None), half_captioned, "1 of 2 pictures", "--instance_prompt"),
    "a prompt that nothing needs": (dict(instance_data_dir="captioned"), captioned, "--instance_prompt has no effect", "leave it out"),
    "a column that is not there": (
        dict(instance_data_dir="captioned", caption_column="words"), captioned, "--caption_column 'words'", "text"),
    "class without a prompt": (SOME, None, "--with_prior_preservation", "--class_prompt"),
    "class prompts in an empty file": (SOME | dict(class_prompts_file="prompts.txt"), empty_file, "--class_prompts_file", "one per line"),
    "class pictures without a prompt": (SOME | dict(class_data_dir="empty"), empty, "--class_data_dir empty", "give --class_prompt"),
    "class prompt without a class": (dict(class_prompt=[CLASS]), None, "--class_prompt", "--with_prior_preservation"),
    "weight of no class": (dict(prior_loss_weight=0.5), None, "--prior_loss_weight 0.5", "--with_prior_preservation"),
    "weight 0": (PRIOR | dict(prior_loss_weight=0), None, "--prior_loss_weight", "greater than 0"),
    "two masks": (dict(mask_from_alpha=True, mask_data_dir="masks"), one_mask, "--mask_data_dir", "one of them"),
    "masks that are the pictures": (
        dict(instance_data_dir="masks", mask_data_dir="./masks/"), one_mask, "--mask_data_dir masks holds", "folder of their own"),
    "a mask that is missing": (dict(mask_data_dir="masks"), one_mask, "--mask_data_dir masks", "1.png"),
    "masks that are not there": (dict(mask_data_dir="nowhere"), None, "--mask_data_dir nowhere", "black and white"),
    "masks of random crops": (dict(mask_from_alpha=True, random_crop=True, cache_latents=False), None, "--random_crop", "leave it out"),
    "rank of no text encoder": (dict(text_encoder_rank=4), None, "--text_encoder_rank 4", "--train_text_encoder"),
    "rate of no text encoder": (dict(text_encoder_learning_rate=1e-6), None, "--text_encoder_learning_rate", "--train_text_encoder"),
    "merged without the encoders": (TEXT | dict(export_merged=True), None, "--export_merged", "leave one out"),
    "rates that Prodigy ignores": (TEXT | dict(optimizer="prodigy"), None, "--text_encoder_learning_rate", "leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_the_cure(world, tmp_path, monkeypatch, capsys, what):
    flags, prepare, names, cure = BAD[what]
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare(tmp_path)
    before = runs.files(tmp_path)
    subject = dict(dataset_name=None, instance_data_dir=world.data, instance_prompt=SUBJECT)
    with pytest.raises(SystemExit) as stop:
        script.parse_args(replace(world, cache=Path("cache")).argv(Path("out"), **(subject | flags)))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert names in err and cure in err, err
    assert runs.files(tmp_path) == before
