"""The LoRA trainer in this process, on the smallest model: what it trains, writes, repeats, resumes and refuses."""

import errno
import importlib.util
import json
import os
import re
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import train_text_to_image_lora_sd3 as script
from src import checkpoint, lora, metrics, seeds
from src.data import buckets, cache, samples
from src.pipelines import sd3

pytestmark = pytest.mark.usefixtures("summaries")
PROMPT = "a red ring"


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_world(tiny_sd3_folder, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def train(world, tmp_path):
    """train("name", rank=2, ...) -> output folder of a run with these flags."""

    def run(name: str = "run", **changes) -> Path:
        runs.train(script, world.argv(tmp_path / name, **({"rank": 4, "learning_rate": 1e-2} | changes)))
        return tmp_path / name

    return run


@pytest.fixture
def live(monkeypatch):
    """What the next run trains: `transformer`, and the adapters' `start` values."""
    seen = {}

    def add(transformer, args):
        add_lora(transformer, args)
        seen.update(transformer=transformer, start={name: value.clone() for name, value in lora.state(transformer).items()})

    add_lora = script.add_lora
    monkeypatch.setattr(script, "add_lora", add)
    return seen


def stock_pipeline(world, weights: Path | None = None):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(world.model, torch_dtype=torch.float32)
    if weights is not None:
        pipeline.load_lora_weights(str(weights))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **changes) -> np.ndarray:
    """(32, 32, 3) uint8, with the settings of this file's validation."""
    settings = dict(prompt=PROMPT, height=32, width=32, num_inference_steps=3, guidance_scale=4.0, max_sequence_length=16)
    return np.asarray(pipeline(**(settings | changes), generator=torch.Generator("cpu").manual_seed(7)).images[0])


SHOWN = dict(validation_prompt=[PROMPT], validation_seed=7, validation_guidance_scale=4.0, validation_inference_steps=3)


# --------------------------------------------------------------------------- what it trains and writes


def test_every_adapter_is_trained_and_no_base_weight_changes(train, world, live):
    from diffusers import SD3Transformer2DModel

    out = train(adam_weight_decay=0.0)  # else decay alone would move A
    transformer = live["transformer"]
    assert all(np.isfinite(runs.values(out, "loss"))) and len(runs.values(out, "loss")) == 4
    trained = lora.state(transformer)
    still = [name for name, start in live["start"].items() if torch.equal(start, trained[name])]
    assert trained and not still, f"never trained: {still}"
    assert any(".attn2." in name for name in trained)  # defect 1 of the public scripts: dual attention left out
    assert not any("2.attn.add_q_proj" in name for name in trained)  # defect 11: the last block's queries get no gradient

    base = SD3Transformer2DModel.from_pretrained(world.model, subfolder="transformer").state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in transformer.state_dict().items() if ".lora_" not in name}
    runs.assert_identical(kept, base)
    saved = {name.removeprefix("transformer."): value for name, value in runs.weights(out).items()}
    runs.assert_identical(saved, dict(trained))


@pytest.mark.slow
def test_a_run_leaves_what_the_outputs_page_promises(train, summaries):
    summaries()
    validated = dict(validation_steps=2, num_validation_loss_images=2, **SHOWN)
    out = train(use_ema=True, checkpointing_steps=2, logging_steps=2, report_to="tensorboard", **validated)
    page = (runs.ROOT / "outputs/README.md").read_text()
    promised = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert len(promised) >= 8
    for name in promised:
        assert list(out.glob(name.replace("-N", "-*").rstrip("/"))), f"outputs/README.md promises {name}"
    assert (out / "raw" / runs.WEIGHTS).is_file() and (out / "checkpoint-4" / runs.WEIGHTS).is_file()
    assert runs.files(out / "samples") == [
        "step-000000", "step-000000.png", "step-000000/00-7.png", "step-000002", "step-000002.png", "step-000002/00-7.png",
        "step-000004", "step-000004.png", "step-000004/00-7.png",
    ]  # fmt: skip
    assert Image.open(out / "summary.png").width > 500
    card = (out / "README.md").read_text()
    assert "load_lora_weights" in card and "6 pictures of" in card  # the other 2 are held out

    written = metrics.read(out / "metrics.jsonl")
    names = {"step", "loss", "grad_norm", "lr", "epoch", "images_per_second", "seconds", "memory_gb", "val_loss"}
    assert {name for line in written for name in line} == names | {f"val_loss_sigma_{sigma}" for sigma in (0.25, 0.5, 0.75, 0.95)}
    assert [line["step"] for line in written if "loss" in line] == [2, 4]
    assert [line["step"] for line in written if "val_loss" in line] == [0, 2, 4]
    assert [line["epoch"] for line in written if "epoch" in line] == [1.0, 2.0]  # 8 pictures, 2 held out: 2 batches of 4 show the other 6


def test_text_encoders_are_gone_while_training(train, monkeypatch):
    """Defect 13 of the public scripts: 9.5 GB of encoders stayed on the GPU."""
    seen, validator = [], script.validation.Validator

    def spy(run, args, data, model, *rest, **named):
        seen.extend(data.encoders.text_encoders + model.text_encoders + ["called"])
        return validator(run, args, data, model, *rest, **named)

    monkeypatch.setattr(script.validation, "Validator", spy)
    train(max_train_steps=1)
    assert seen == ["called"]


def test_variant_and_cache_batch_size_reach_all_that_loads_and_fills(train, tmp_path, monkeypatch):
    loaded, filled, load = [], [], sd3.load

    def loading(path, *, parts, variant, **options):
        loaded.append((parts, variant))
        return load(path, parts=parts, **options)  # the plain files: there are no others

    def filling(name):
        fill = getattr(samples, name)
        monkeypatch.setattr(samples, name, lambda *given, **named: filled.append(named["batch_size"]) or fill(*given, **named))

    monkeypatch.setattr(sd3, "load", loading)
    filling("fill_text")
    filling("fill_latents")
    train(variant="fp16", cache_batch_size=3, cache_dir=tmp_path / "cache", max_train_steps=1)
    assert loaded == [(("text",), "fp16"), (("vae",), "fp16"), (("transformer",), "fp16")]
    assert filled == [3, 3, 3]  # text; pictures to train on, and held out


def expected_loss(model, world, seed: int, step: int) -> float:
    """Of the four pictures of a step, one at a time: mean of |v - (noise - x0)|^2, all random numbers named by seed, step and position.

    Captions are dropped below 0.5, pictures mirrored below 0.5 and cut anywhere. The noise level t is the paper's eq. 20 with s = 0.5,
    shifted by 3 x 32 / 64 = 1.5, the model's shift at half its resolution: 1.5 t / (1 + 0.5 t).
    """
    losses = []
    for position, index in enumerate(buckets.Order([(32, 32)] * 8, 4, seed).batch(step)):

        def number(stream, position=position):
            return seeds.uniform(seed, step, [position], stream).item()

        def normal(stream, position=position):
            return seeds.normal(seed, step, [position], stream, (16, 4, 4))

        crop, flip = (number("crop_y"), number("crop_x")), number("flip") < 0.5
        pixels = buckets.fit(Image.open(world.data / f"{index}.png"), (32, 32), crop=crop, flip=flip)
        prompt = "" if number("caption") < 0.5 else f"{'abcdefgh'[index] * 3} picture {index}"
        posterior = model.vae.encode(pixels[None]).latent_dist
        x0, noise = (posterior.mean + posterior.std * normal("posterior") - 0.0609) * 1.5305, normal("noise")
        v = 1 - number("sigma")
        t = 1 - v - 0.5 * (np.cos(np.pi / 2 * v) ** 2 - 1 + v)
        sigma = torch.tensor([1.5 * t / (1 + 0.5 * t)])
        velocity = sd3.velocity(model.transformer, (1 - sigma) * x0 + sigma * noise, sigma, sd3.encode_prompts(model, [prompt]))
        losses.append((velocity - (noise - x0)).square().mean().item())
    return sum(losses) / len(losses)


@pytest.mark.slow
@torch.no_grad()
def test_the_losses_are_those_of_a_plain_loop_at_every_step_and_of_every_flag(world, tmp_path):
    """At a learning rate of 1e-12, times the four samples of a step, the LoRA changes nothing."""
    flags = dict(seed=3, train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=3, learning_rate=1e-12, scale_lr=True, rank=4)
    flags |= dict(timestep_density="mode", mode_scale=0.5, shift="resolution", random_crop=True, caption_dropout=0.5, cache_latents=False)
    with torch.enable_grad():
        runs.train(script, world.argv(tmp_path / "run", **flags))
    model = sd3.load(world.model)
    expected = [expected_loss(model, world, 3, step) for step in range(3)]
    assert runs.values(tmp_path / "run", "loss") == pytest.approx(expected, rel=1e-5)
    assert runs.values(tmp_path / "run", "lr") == pytest.approx([4e-12] * 3)


# --------------------------------------------------------------------------- the same tensors


@pytest.mark.slow
def test_same_command_gives_the_same_lora_and_another_seed_another(train):
    hard = dict(lora_dropout=0.3, caption_dropout=0.5, gradient_accumulation_steps=2, train_batch_size=2)
    first = runs.saved(train("first", **hard))
    runs.assert_identical(runs.saved(train("again", **hard, dataloader_num_workers=2)), first)
    other = runs.saved(train("other", **hard, seed=1))
    assert other[1] == first[1] and not any(torch.equal(value, other[0][name]) for name, value in first[0].items())


@pytest.mark.slow
def test_args_json_repeats_the_run(train, tmp_path):
    first = train("first", lora_dropout=0.3, seed=None, validation_prompt=["-- a dash", "two\nlines"])  # the seed is drawn
    runs.train(script, ["--config", str(first / "args.json"), "--output_dir", str(tmp_path / "again")])
    runs.assert_identical(runs.saved(tmp_path / "again"), runs.saved(first))


def test_caches_do_not_change_the_loss(train):
    """The same latents and embeddings, computed in batches of other sizes: fp32 rounding, some hundred operations deep, below 1e-5."""
    hard = dict(max_train_steps=6, caption_dropout=0.4, gradient_accumulation_steps=2, train_batch_size=2, cache_batch_size=3)
    cached = runs.values(train("cached", **hard), "loss")
    plain = runs.values(train("plain", **(hard | dict(cache_text=False, cache_latents=False, cache_batch_size=8))), "loss")
    assert cached == pytest.approx(plain, rel=1e-5)
    for name, other in {"unmirrored": dict(no_hflip=True), "undropped": dict(caption_dropout=0.0)}.items():  # else nothing was compared
        assert runs.values(train(name, **(hard | other)), "loss") != pytest.approx(plain, rel=1e-4), name


def test_one_batch_of_four_equals_four_accumulated(train):
    """Both sum the same four gradients, in another order: fp32 rounding of some hundred operations, 100 x 2^-24 < 1e-5 relative.

    Adam would blow that up where a gradient is nearly zero (its step is the sign there): an epsilon above every gradient makes its step
    proportional to the gradient, so weights agree to 1e-4 of the largest change after 4 steps. The norm is clipped in both.
    """
    plain = dict(adam_epsilon=1.0, learning_rate=10.0, max_grad_norm=0.01, seed=3)
    whole = train("whole", **plain)
    parts = train("parts", **plain, train_batch_size=1, gradient_accumulation_steps=4)
    for name in ("loss", "grad_norm"):
        assert runs.values(whole, name) == pytest.approx(runs.values(parts, name), rel=1e-5)
    assert min(runs.values(whole, "grad_norm")) > 0.01  # clipped
    one, other = runs.weights(whole), runs.weights(parts)
    changed = max(value.abs().max() for name, value in one.items() if ".lora_B." in name)  # B starts at zero
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-4 * changed

    another = runs.weights(train("another", **(plain | dict(seed=4))))
    assert max((one[name] - another[name]).abs().max() for name in one if ".lora_B." in name) > 0.1 * changed


def test_gradient_checkpointing_changes_nothing(train, live, monkeypatch):
    """Not even dropout, which is another at every step and on every process."""
    drawn, draw = [], seeds.seed_everything
    monkeypatch.setattr(seeds, "seed_everything", lambda *key: drawn.append(key) or draw(*key))
    one = train("plain", lora_dropout=0.3)
    assert not live["transformer"].is_gradient_checkpointing
    assert [key for key in drawn if key[1] == "dropout"] == [(0, "dropout", step, 0) for step in range(4)]  # seed, step, rank
    assert {module.p for name, module in live["transformer"].named_modules() if name.endswith(".lora_dropout.default")} == {0.3}
    other = train("checkpointed", lora_dropout=0.3, gradient_checkpointing=True)
    assert live["transformer"].is_gradient_checkpointing
    runs.assert_identical(runs.weights(one), runs.weights(other))
    assert runs.lines(one) == runs.lines(other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_trains_the_adapters_alone_and_resumes_exactly(train, monkeypatch, kind):
    pytest.importorskip("bitsandbytes")
    whole = train("whole", quantize_base=kind, checkpointing_steps=2, learning_rate=1e-2)
    assert all(tensor.abs().max() > 0 for tensor in runs.weights(whole).values())
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(patch, 3)
        train("parts", quantize_base=kind, checkpointing_steps=2, learning_rate=1e-2)
    parts = train("parts", quantize_base=kind, checkpointing_steps=2, learning_rate=1e-2, resume_from_checkpoint="latest")
    runs.assert_identical(runs.weights(whole), runs.weights(parts))
    plain = train("plain", learning_rate=1e-2)
    losses, near = runs.values(plain, "loss"), runs.values(whole, "loss")
    assert losses != near and losses == pytest.approx(near, rel={"int8": 0.01, "nf4": 0.1}[kind])


# --------------------------------------------------------------------------- interrupted, resumed, stopped

LONG = dict(
    max_train_steps=8, checkpointing_steps=4, logging_steps=3, lora_dropout=0.3, use_ema=True, lr_scheduler="cosine", caption_dropout=0.3,
    train_batch_size=2, gradient_accumulation_steps=2, validation_steps=3, num_validation_loss_images=1, **SHOWN,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Output of the uninterrupted run that resumed ones are compared with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    runs.train(script, world.argv(out, rank=4, learning_rate=1e-2, **LONG))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 6])  # before the first checkpoint; two steps after it, in the middle of a window of metrics
def test_resumed_equals_uninterrupted(train, whole, monkeypatch, step):
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(patch, step)
        train("parts", **LONG)
    parts = train("parts", **LONG, resume_from_checkpoint="latest")
    ended = runs.state(whole / "checkpoint-8")
    assert ended.keys() == {"step", "kinds", "world", "lora", "optimizer", "ema", "schedule", "log"}
    runs.assert_identical(ended, runs.state(parts / "checkpoint-8"))
    for folder in (".", "raw", "checkpoint-8", "checkpoint-8/raw"):
        runs.assert_identical(runs.saved(whole / folder), runs.saved(parts / folder))
    for file in ("samples/step-000008/00-7.png", "samples/step-000008.png", "samples/step-000003.png"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    assert runs.lines(whole) == runs.lines(parts)
    # Defect 9 of the public scripts: a resumed run did 9 of 8 steps.
    steps = {value["step"].item() for value in runs.state(parts / "checkpoint-8")["optimizer"]["state"].values()}
    assert steps == {8.0} and runs.lines(parts)[-1]["step"] == 8


@pytest.mark.slow
def test_killed_while_it_ends_a_run_resumes_to_the_same_files(train, whole, summaries, monkeypatch):
    """The last checkpoint and the last metrics are there, the last files are not."""

    def die(*_):
        raise runs.Interrupted

    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        patch.setattr(script.validation, "summary", die)
        train("parts", **LONG)
    summaries()
    parts = train("parts", **LONG, resume_from_checkpoint="latest")
    assert runs.lines(whole) == runs.lines(parts)
    runs.assert_identical(runs.saved(whole), runs.saved(parts))
    assert (parts / "summary.png").is_file() and (parts / "README.md").is_file()


@pytest.mark.slow
def test_sigterm_saves_and_a_resumed_run_ends_the_same(train, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        runs.stop(patch, 5)
        parts = train("parts", **LONG)
    runs.assert_stopped(parts, 5, capsys.readouterr().out)
    train("parts", **LONG, resume_from_checkpoint="latest")
    runs.assert_identical(runs.state(whole / "checkpoint-8"), runs.state(parts / "checkpoint-8"))
    assert runs.lines(whole) == runs.lines(parts)


@pytest.mark.slow
def test_a_longer_run_continues_a_finished_one(train):
    train("run", max_train_steps=2, checkpointing_steps=2)
    out = train("run", max_train_steps=4, checkpointing_steps=2, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    whole = train("whole", max_train_steps=4)
    runs.assert_identical(runs.weights(out), runs.weights(whole))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_result_does_not_wait_for_the_last_validation(train, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(script.validation, "summary", full_disk)
    with pytest.raises(OSError):
        train("run", max_train_steps=2, checkpointing_steps=1)
    runs.assert_identical(runs.weights(tmp_path / "run"), runs.weights(tmp_path / "run/checkpoint-2"))


def test_a_full_disk_at_the_result_is_one_line(train, tmp_path, monkeypatch):
    written = []

    def full_disk(*_):
        written.append(1)
        if len(written) > 1:  # the checkpoint's goes through
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(script.lora, "save", full_disk)
    with pytest.raises(SystemExit, match="error: could not write the result to .*No space left on device.*; checkpoint-2 is intact"):
        train("run", max_train_steps=2, checkpointing_steps=2)


def poison(monkeypatch, step: int, break_loss) -> None:
    calls, healthy = [], script.flow_matching_loss

    def loss(*args):
        calls.append(None)
        return break_loss(healthy(*args)) if len(calls) == step else healthy(*args)

    monkeypatch.setattr(script, "flow_matching_loss", loss)


def nan_loss(loss):
    return loss * float("nan")


def nan_gradient(loss):
    loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_loss", "logging", "checkpointing"),
    [(nan_loss, 1, 2), (nan_loss, 2, 2), (nan_loss, 10, 1), (nan_gradient, 10, 1)],
    ids=["found at once", "found at the end of its window", "found when a checkpoint is due", "only its gradient is not finite"],
)
def test_a_non_finite_step_stops_the_run_before_it_is_saved(train, tmp_path, monkeypatch, break_loss, logging, checkpointing):
    poison(monkeypatch, 3, break_loss)
    with pytest.raises(FloatingPointError, match="step 3"):
        train(logging_steps=logging, checkpointing_steps=checkpointing, max_train_steps=6)
    assert checkpoint.find_latest(tmp_path / "run").name == "checkpoint-2"
    assert not (tmp_path / "run" / runs.WEIGHTS).exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint_intact(train, tmp_path):
    """No file may grow beyond 20 kB: metrics and pictures fit, a checkpoint does not (Python turns the signal into an OSError)."""
    steps = dict(checkpointing_steps=2, resume_from_checkpoint="latest")
    train(**steps, max_train_steps=2)
    before = runs.state(tmp_path / "run/checkpoint-2")
    assert (tmp_path / "run/checkpoint-2/state.pt").stat().st_size > 20_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            train(**steps, max_train_steps=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-2, is intact" in str(stop.value) and "--resume_from_checkpoint latest" in str(stop.value)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    runs.assert_identical(runs.state(tmp_path / "run/checkpoint-2"), before)
    runs.assert_identical(runs.weights(train(**steps, max_train_steps=4)), runs.weights(train("whole", max_train_steps=4)))


# --------------------------------------------------------------------------- the result, elsewhere


def test_stock_diffusers_draws_the_last_validation_picture(train, world):
    from safetensors import safe_open

    out = train(rank=2, lora_alpha=8.0, learning_rate=0.1, max_train_steps=6, **SHOWN)
    with safe_open(out / runs.WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 8.0
    ours = {step: np.asarray(Image.open(out / f"samples/step-{step:06d}/00-7.png")).astype(int) for step in (0, 6)}
    assert np.abs(ours[6] - draw(stock_pipeline(world, out))).max() <= 1  # one grey level of rounding
    assert np.abs(ours[0] - draw(stock_pipeline(world))).max() <= 1
    assert np.abs(ours[6] - ours[0]).mean() > 1  # and the LoRA shows


@pytest.mark.slow
def test_init_lora_starts_where_that_lora_ended(train):
    scored = dict(num_validation_loss_images=2, lora_alpha=2.0, learning_rate=0.1)
    first = train("first", **scored)
    second = train("second", **scored, init_lora=first, max_train_steps=1)
    before, after = runs.values(first, "val_loss")
    assert runs.values(second, "val_loss")[0] == after != before


def test_exports_say_the_same_as_the_lora(train, live):
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import load_file

    out = train(export_format="kohya", export_merged=True, lora_alpha=2.0, learning_rate=0.1)
    ours, kohya = runs.weights(out), load_file(out / lora.KOHYA_NAME)
    layer = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    up, down, alpha = (kohya[f"{layer}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    fused = up @ down * alpha / down.shape[0]
    layers = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    apart = torch.cat([ours[f"{layer}.lora_B.weight"] @ ours[f"{layer}.lora_A.weight"] * 2.0 / 4 for layer in layers])
    torch.testing.assert_close(fused, apart)

    generator = torch.Generator().manual_seed(0)
    device = live["transformer"].device
    latents, embeds, pooled = (torch.randn(shape, generator=generator).to(device) for shape in ((2, 16, 4, 4), (2, 32, 32), (2, 16)))
    sigma, condition = torch.tensor([0.3, 0.9], device=device), sd3.Conditioning(embeds, pooled)
    merged = SD3Transformer2DModel.from_pretrained(out / "merged_transformer").to(device)
    with torch.no_grad():
        live["transformer"].eval()
        tuned = sd3.velocity(live["transformer"], latents, sigma, condition)
        torch.testing.assert_close(sd3.velocity(merged, latents, sigma, condition), tuned, rtol=1e-4, atol=1e-5)
        with lora.disabled(live["transformer"]):
            assert (sd3.velocity(live["transformer"], latents, sigma, condition) - tuned).abs().max() > 1e-2


@pytest.mark.slow
def test_all_forms_of_a_result_hold_the_average(train, world):
    """Of the first query projection: kohya's product, here and in a checkpoint, and what was merged beyond the base model."""
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import load_file

    out = train(export_format="kohya", export_merged=True, use_ema=True, ema_decay=0.5, lora_alpha=2.0, learning_rate=0.1,
                max_train_steps=4, checkpointing_steps=4)  # fmt: skip
    name = "transformer_blocks.0.attn.to_q"

    def product(folder):
        ours = runs.weights(folder)
        return ours[f"transformer.{name}.lora_B.weight"] @ ours[f"transformer.{name}.lora_A.weight"] * 2.0 / 4

    average = product(out)
    assert (average - product(out / "raw")).abs().max() > 0.01 * average.abs().max()
    for folder in (out, out / "checkpoint-4"):
        kohya, layer = load_file(folder / lora.KOHYA_NAME), "lora_unet_joint_blocks_0_x_block_attn_qkv"
        fused = kohya[f"{layer}.lora_up.weight"] @ kohya[f"{layer}.lora_down.weight"] * kohya[f"{layer}.alpha"] / 12  # 3 ranks of 4
        torch.testing.assert_close(fused[: len(average)], average)
    base, merged = (SD3Transformer2DModel.from_pretrained(path) for path in (world.model / "transformer", out / "merged_transformer"))
    found = merged.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(found.detach(), average, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------- variants


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        dict(use_dora=True),
        dict(optimizer="prodigy", learning_rate=None),
        dict(optimizer="adafactor"),
        dict(optimizer="adamw8bit", rank=256),  # only tensors of 4096 numbers and more are kept in 8 bits
        dict(timestep_density="mode", shift="resolution", max_grad_norm=0, max_sequence_length=8),
        dict(timestep_density="cosmap", shift=2.0, lr_scheduler="constant_with_warmup", lr_warmup_steps=1, scale_lr=True),
        dict(lora_layers="attn.to_q,ff.net.2", lora_blocks="0-1", timestep_density="uniform", random_crop=True, cache_latents=False),
    ],
    ids=["dora", "prodigy", "adafactor", "adamw8bit", "mode", "cosmap", "layers"],
)  # fmt: skip
def test_variant_trains_every_adapter(train, live, flags):
    if flags.get("optimizer") in ("prodigy", "adamw8bit"):
        pytest.importorskip({"prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}[flags["optimizer"]])
    out = train(**flags, adam_weight_decay=0.0, max_train_steps=3)
    trained, magnitudes = lora.state(live["transformer"]), [name for name in live["start"] if "magnitude" in name]
    assert all(np.isfinite(runs.values(out, "loss")))
    assert not [name for name, start in live["start"].items() if torch.equal(start, trained[name])]
    assert bool(magnitudes) == flags.get("use_dora", False)
    if "lora_blocks" in flags:
        layers = {f"transformer_blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.to_q", "ff.net.2")}
        assert {name.split(".lora_")[0] for name in trained} == layers


@pytest.mark.slow
def test_adapters_and_optimizer_stay_fp32_under_bf16(train, live, tmp_path):
    """Defect 6 of the public scripts; and defect 3: the latent cache crashed them in half precision."""
    out = train(mixed_precision="bf16", checkpointing_steps=4, num_validation_loss_images=1, **SHOWN)
    transformer = live["transformer"]
    assert {value.dtype for value in lora.state(transformer).values()} == {torch.float32}
    assert {p.dtype for p in transformer.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {value.dtype for value in runs.weights(out).values()} == {torch.float32}
    moments = [value for entry in runs.state(out / "checkpoint-4")["optimizer"]["state"].values() for value in entry.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}
    exact = runs.values(train("exact", num_validation_loss_images=1, **SHOWN), "loss")
    assert runs.values(out, "loss") == pytest.approx(exact, rel=0.05)  # bf16 has 3 digits


def test_broken_pictures_are_named_and_skipped_or_stop_the_run(train, world, tmp_path, capsys):
    data = shutil.copytree(world.data, tmp_path / "data")
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:60])
    listed = train(dataset_name=data) / "skipped.txt"
    said = capsys.readouterr().out
    assert "1 picture(s) skipped" in said and f"what was skipped is listed in {listed}" in said
    assert re.fullmatch("cannot read 3.png: .+\n", listed.read_text())
    with pytest.raises(SystemExit, match="error: --strict_data: cannot read 3.png"):
        train("strict", dataset_name=data, strict_data=True)


@pytest.mark.parametrize(("kind", "suffix"), [("text", ".safetensors"), ("latents", ".safetensors"), ("latents", ".json")])
def test_a_cache_that_cannot_be_written_is_one_line(train, tmp_path, monkeypatch, kind, suffix):
    put = cache.TensorCache._put

    def full(self, data, target):
        if kind in str(target) and target.suffix == suffix:
            raise cache.Unwritable(errno.ENOSPC, "cannot write to the cache: No space left on device", str(target))
        put(self, data, target)

    monkeypatch.setattr(cache.TensorCache, "_put", full)
    with pytest.raises(SystemExit, match=f"error: --cache_dir {tmp_path}/c: cannot write to the cache: No space left on device; make room"):
        train(cache_dir=tmp_path / "c")


@pytest.mark.slow
def test_buckets_train_on_pictures_of_every_shape(train, tmp_path):
    data = runs.make_pictures(tmp_path / "wide", 3, (64, 32))
    for number, path in enumerate(sorted(runs.make_pictures(tmp_path / "tall", 3, (32, 64)).glob("*.png"))):
        shutil.copy(path, data / f"tall-{number}.png")
        with open(data / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": f"tall-{number}.png", "text": "tall"}) + "\n")
    hard = dict(dataset_name=data, aspect_buckets=True, resolution=64, train_batch_size=2, shift="resolution")  # 48 x 96 and 96 x 48
    cached = runs.values(train("cached", **hard), "loss")
    assert cached == pytest.approx(runs.values(train("plain", **hard, cache_latents=False), "loss"), rel=1e-5)
    assert runs.values(tmp_path / "cached", "epoch")[-1] == 1.0  # 2 shapes x 2 batches of 2


# --------------------------------------------------------------------------- trackers, dry run


@pytest.mark.slow
def test_tensorboard_has_the_curves_once_and_the_pictures(train, monkeypatch, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = dict(report_to="tensorboard", checkpointing_steps=2, num_validation_loss_images=1, validation_steps=2, **SHOWN)
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(patch, 4)  # step 3 is written, then undone by resuming at 2
        train(**flags)
    out = train(**flags, resume_from_checkpoint="latest")
    (folder,) = {path.parent for path in (out / "logs").rglob("events.out.tfevents.*")} - {
        path.parent for path in (out / "logs").rglob("events.out.tfevents.*") if path.parent.name.replace(".", "").isdigit()
    }  # flags are stored in folders named by the time
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    for name in ("loss", "val_loss", "lr"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in runs.lines(out) if name in line
        ]
    assert [event.step for event in events.Images("samples")] == [0, 2, 4]


def test_dry_run_prints_the_plan_reads_no_weights_and_writes_nothing(world, tmp_path, capsys, live):
    model = shutil.copytree(world.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    flags = dict(rank=4, dry_run=True, gradient_accumulation_steps=2, num_validation_loss_images=2)
    runs.train(script, replace(world, model=model).argv(tmp_path / "out", **flags))
    plan = capsys.readouterr().out
    trained = sum(p.numel() for p in lora.parameters(live["transformer"]))
    for part in (f"{trained:,} parameters", "6 to train on, 2 held out", "FLOP", "text_encoder_3", "4 of 8 picture(s)"):
        assert part in plan, plan
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- bad input


def empty_folder(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()


def other_family(tmp_path, monkeypatch):
    (tmp_path / "sd15").mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "sd15/model_index.json").write_text(json.dumps(index))


def a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")


def typo_in_config(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("rnak: 4\n")


def half_a_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7/args.json").write_text("{}")


def finished_run(tmp_path, monkeypatch):
    (tmp_path / "out/checkpoint-7").mkdir(parents=True)
    (tmp_path / "out/checkpoint-7/args.json").write_text("{}")
    (tmp_path / "out/checkpoint-7/state.pt").write_text("")


def without(package):
    def hide(tmp_path, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))

    return hide


def logged_out(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def empty_prompts(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n\n")


def fsdp(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def deepspeed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


def read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere


MODEL = "pretrained_model_name_or_path"
BAD = {  # what is wrong: flags, set-up, what the line must name, the cure in it
    "flag that does not exist": (dict(learning_rte=1), None, "--learning_rte", "--learning_rate"),
    "resolution": (dict(resolution=500), None, "--resolution", "try 496"),
    "model that is not there": ({MODEL: "models/nowhere"}, None, MODEL, "download.sh"),
    "model of another family": ({MODEL: "sd15"}, other_family, MODEL, "StableDiffusion3Pipeline"),
    "folder that is no model": ({MODEL: "empty"}, empty_folder, MODEL, "model_index.json"),
    "resolution beyond the model": (dict(resolution=4096), None, "--resolution", "try 128"),
    "no data set": (dict(dataset_name=None), None, "--dataset_name", "folder of captioned pictures"),
    "data set that is not there": (dict(dataset_name="./nowhere"), None, "--dataset_name", "does not exist"),
    "empty data set": (dict(dataset_name="empty"), empty_folder, "--dataset_name", "no picture"),
    "caption column": (dict(caption_column="prompt"), None, "--caption_column", "text"),
    "output under a file": (dict(output_dir="file/out"), a_file, "--output_dir", "choose another"),
    "output without permission": (dict(), read_only, "--output_dir", "permission"),
    "resume from nowhere": (dict(resume_from_checkpoint="checkpoint-3"), None, "--resume_from_checkpoint", "latest"),
    "resume from half a checkpoint": (dict(resume_from_checkpoint="checkpoint-7"), half_a_checkpoint, "--resume_from_checkpoint", "latest"),
    "output of another run": (dict(), finished_run, "--output_dir", "--resume_from_checkpoint latest"),
    "key in the config": (dict(config="config.yaml"), typo_in_config, "--config", "rank"),
    "config that is not there": (dict(config="nowhere.yaml"), None, "--config", "YAML"),
    "adamw8bit uninstalled": (
        dict(optimizer="adamw8bit"),
        without("bitsandbytes"),
        "--optimizer",
        f"{sys.executable} -m pip install bitsandbytes",
    ),
    "prodigy uninstalled": (dict(optimizer="prodigy"), without("prodigyopt"), "--optimizer", f"{sys.executable} -m pip install prodigyopt"),
    "wandb uninstalled": (dict(report_to="all"), without("wandb"), "--report_to", f"{sys.executable} -m pip install wandb"),
    "wandb without a login": (dict(report_to="wandb"), logged_out, "--report_to", "WANDB_MODE=offline"),
    "random crop of cached latents": (dict(random_crop=True), None, "--random_crop", "--no-cache_latents"),
    "warm-up of a constant rate": (dict(lr_warmup_steps=3), None, "--lr_warmup_steps", "constant_with_warmup"),
    "warm-up beyond the end": (dict(lr_warmup_steps=9, lr_scheduler="linear"), None, "--lr_warmup_steps", "--max_train_steps"),
    "EMA decay without EMA": (dict(ema_decay=0.5), None, "--ema_decay", "--use_ema"),
    "logit mean of another density": (dict(timestep_density="uniform", logit_mean=1), None, "--logit_mean", "logit_normal"),
    "kohya cannot hold DoRA": (dict(use_dora=True, export_format="kohya"), None, "--export_format", "diffusers"),
    "rank 0": (dict(rank=0), None, "--rank", "at least 1"),
    "not a number": (dict(learning_rate="fast"), None, "--learning_rate", "number"),
    "scheduler that does not exist": (dict(lr_scheduler="cosin"), None, "--lr_scheduler", "cosine"),
    "empty prompts file": (dict(validation_prompts_file="prompts.txt"), empty_prompts, "--validation_prompts_file", "one per line"),
    "sharded by FSDP2": ({}, fsdp, "FSDP2", "--multi_gpu"),
    "sharded by DeepSpeed": ({}, deepspeed, "DeepSpeed", "--multi_gpu"),
    "LoRA to start from that is not there": (dict(init_lora="nowhere"), None, "--init_lora", "pytorch_lora_weights.safetensors"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_the_cure(world, tmp_path, monkeypatch, capsys, what):
    flags, prepare, names, cure = BAD[what]
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare(tmp_path, monkeypatch)
    before = runs.files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.parse_args(replace(world, cache=Path("cache")).argv(Path("out"), **flags))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert names in err and cure in err, err
    assert runs.files(tmp_path) == before


@pytest.mark.parametrize("flags", [dict(lora_blocks="0-9"), dict(lora_layers="attn.to_query")], ids=["blocks", "layers"])
def test_layers_that_do_not_exist_are_named_before_training(train, flags):
    (name,) = flags
    for mode in ({}, {"dry_run": True}):
        with pytest.raises(SystemExit, match=f"error: --{name}.*(0-2|attn.to_q)"):
            train(**flags, **mode)


def test_half_precision_on_a_cpu_is_refused(train, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        train(mixed_precision="fp16")
    assert stopped.value.code == 2 and "--mixed_precision fp16 needs a GPU" in capsys.readouterr().err
