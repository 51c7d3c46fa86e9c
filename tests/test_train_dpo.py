"""Diffusion-DPO in this process, on the smallest models: what it trains, writes, repeats, resumes and refuses.

What it shares with the other trainers (signals, trackers, full disks, caches) is tested there.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import unets
from PIL import Image

import train_dpo_sd15 as script
from src import full, lora, seeds, unet
from src.data import buckets
from src.pipelines import sd15

pytestmark = pytest.mark.usefixtures("summaries")
PROMPT = "a red ring"
SHOWN = dict(validation_prompt=[PROMPT], validation_seed=7, validation_guidance_scale=4.0, validation_inference_steps=3)
LORA = dict(use_lora=True, rank=4, learning_rate=1e-2)


@dataclass(frozen=True)
class World(runs.World):
    def argv(self, out: Path, **changes) -> list[str]:
        """As in `runs.World`: 4 steps of 4 pairs, at a learning rate and a beta at which these steps show."""
        flags = dict(num_validation_loss_images=None, num_validation_pairs=0, learning_rate=1e-3, beta_dpo=100, lr_scheduler="constant")
        return super().argv(out, **(flags | changes))


def make_pairs(folder: Path, count: int = 8) -> Path:
    """Pairs of the pictures of `runs`, two for each caption, in the layout of pickapic_v2; the second one wins in odd rows."""
    runs.make_pictures(folder, 2 * count)
    entries = [
        {"caption": f"{'abcdefgh'[i // 2]} ring", "jpg_0": f"{2 * i}.png", "jpg_1": f"{2 * i + 1}.png", "label_0": 1 - i % 2}
        for i in range(count)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    return folder


@pytest.fixture(scope="module")
def world(tiny_sd15_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("dpo")
    before = contents(tiny_sd15_folder)
    yield World(tiny_sd15_folder, make_pairs(root / "pairs"), root / "cache")
    assert contents(tiny_sd15_folder) == before, "the base model was written into"


@pytest.mark.slow
def test_the_rest_of_the_result_is_fetched_before_the_unet_is_loaded(world, tmp_path, monkeypatch):
    run = train_in(world, tmp_path)
    line, loaded = runs.parts_before_refusal(monkeypatch, script.sd15, lambda: run(max_train_steps=1))
    assert line == f"error: --pretrained_model_name_or_path {world.model}: unet alone is here"
    assert not {"unet", "everything"} & set(loaded)
    run("lora", **LORA, max_train_steps=1)  # has no use for it


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def train_in(world, root: Path):
    def run(name: str = "run", **changes) -> Path:
        runs.train(script, world.argv(root / name, **changes))
        return root / name

    return run


@pytest.fixture
def train(world, tmp_path):
    """train("name", use_lora=True, ...) -> output folder of a run with these flags."""
    return train_in(world, tmp_path)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A full run with everything switched on that may be, of which several tests look at one side each."""
    settings = dict(use_ema=True, ema_decay=0.5, checkpointing_steps=4, num_validation_pairs=2, validation_steps=2, scale_lr=True,
                    learning_rate=2.5e-4, adam_weight_decay=0.0, **SHOWN)  # fmt: skip
    return train_in(world, tmp_path_factory.mktemp("finished"))(**settings)


def saved(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def draw(model: Path, unet: Path | None = None, lora_folder: Path | None = None) -> np.ndarray:
    """(32, 32, 3) integers, by the stock pipeline with the settings of SHOWN."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    parts = {"unet": UNet2DConditionModel.from_pretrained(unet, subfolder="unet")} if unet else {}
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if lora_folder:
        pipeline.load_lora_weights(str(lora_folder))
    settings = dict(prompt=PROMPT, height=32, width=32, num_inference_steps=3, guidance_scale=4.0)
    return np.asarray(pipeline(**settings, generator=torch.Generator("cpu").manual_seed(7)).images[0]).astype(int)


def shown(out: Path, step: int) -> np.ndarray:
    return np.asarray(Image.open(out / f"samples/step-{step:06d}/00-7.png")).astype(int)


# --------------------------------------------------------------------------- what it trains and writes


@pytest.mark.slow
def test_a_full_run_trains_every_weight_and_leaves_a_pipeline(finished, world):
    ours, theirs = saved(finished), saved(world.model)
    assert ours.keys() == theirs.keys() and not [name for name in ours if torch.equal(ours[name], theirs[name])]
    for part in ("vae", "text_encoder"):  # the very files, not another copy in another precision
        (one,), (other,) = ((folder / part).glob("*.safetensors") for folder in (finished, world.model))
        assert one.stat().st_ino == other.stat().st_ino
    assert (finished / "summary.png").exists() and (finished / "raw/unet").is_dir() and not list(finished.rglob("*.tmp"))
    assert "DiffusionPipeline.from_pretrained" in (finished / "README.md").read_text()
    card = (finished / "README.md").read_text()
    assert "# Diffusion-DPO of" in card and "6 preference pairs" in card


def test_the_metrics_are_logged(finished):
    """Before the first update policy and reference are equal: log 2 and one half. With --scale_lr 2.5e-4 x 4 pairs = 1e-3."""
    lines = runs.lines(finished)
    assert runs.values(finished, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert runs.values(finished, "accuracy")[0] == 0.5
    first = next(line for line in lines if "loss" in line)
    assert first["policy_margin"] == first["reference_margin"] != 0 and first["grad_norm"] > 0
    assert set(runs.values(finished, "lr")) == {1e-3}
    validated = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validated] == [0, 2, 4]
    assert validated[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6) and validated[0]["val_accuracy"] == 0.5
    assert validated[2]["val_loss"] != validated[0]["val_loss"]


def test_the_learning_rate_that_results_is_printed(train, capsys):
    train(scale_lr=True, learning_rate=1e-8, max_train_steps=1)
    assert "learning rate 4e-08 = 1e-08 x 4 samples" in capsys.readouterr().out


@pytest.mark.slow
def test_stock_diffusers_draws_the_validation_pictures(finished, world):
    """Validation shows the average where one is kept, and the pipeline folder holds it."""
    assert np.abs(shown(finished, 0) - draw(world.model)).max() <= 1  # one grey level of rounding
    assert np.abs(shown(finished, 4) - draw(finished)).max() <= 1
    assert np.abs(draw(world.model, unet=finished / "raw") - draw(world.model)).mean() > 0.1


def test_a_lora_run_trains_the_adapter_alone_and_stock_diffusers_reads_it(train, world, monkeypatch):
    drawn, draw_of = [], script.seeds.seed_everything
    monkeypatch.setattr(script.seeds, "seed_everything", lambda *key: drawn.append(key) or draw_of(*key))
    out = train(**LORA, export_merged=True, max_train_steps=2, **SHOWN)
    assert [key for key in drawn if key[1] == "dropout"] == [(0, "dropout", step, 0) for step in range(2)]  # seed, step, rank
    assert "# Diffusion-DPO LoRA of" in (out / "README.md").read_text()
    assert set(path.name for path in out.iterdir()) >= {lora.WEIGHTS_NAME, "merged_unet", "README.md"} and not (out / "unet").exists()
    assert all(tensor.abs().sum() > 0 for tensor in runs.weights(out).values())
    assert np.abs(shown(out, 2) - draw(world.model, lora_folder=out)).max() <= 1 < np.abs(shown(out, 2) - shown(out, 0)).max()
    assert runs.values(out, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(mixed_precision="bf16"), dict(mixed_precision="bf16", **LORA)], ids=["full", "lora"])
def test_in_bf16_the_start_is_log_2_too(train, flags, monkeypatch):
    """All of it through accelerate's autocast, a reference in bf16 included; and at the start of an accumulated step."""
    references = []
    monkeypatch.setattr(unet, "load_frozen", lambda *args, load=unet.load_frozen: references.append(load(*args)) or references[0])
    out = train(**flags, beta_dpo=5000, max_train_steps=1, train_batch_size=2, gradient_accumulation_steps=2)
    assert runs.values(out, "loss") == pytest.approx([math.log(2)], abs=1e-6) and runs.values(out, "accuracy") == [0.5]
    assert [reference.mid_block.resnets[0].conv1.weight.dtype for reference in references] == [torch.bfloat16] * ("use_lora" not in flags)


@pytest.mark.slow
def test_training_prefers_the_winners(train, tmp_path):
    """Winners are bright, losers dark: after 40 steps most pairs, seen or held out, are told apart."""
    data = make_pairs(tmp_path / "bright")
    for line in map(json.loads, (data / "metadata.jsonl").read_text().splitlines()):
        for name, wins in ((line["jpg_0"], line["label_0"] == 1), (line["jpg_1"], line["label_0"] == 0)):
            image = Image.open(data / name).point(lambda level, wins=wins: level // 4 + 180 * wins)
            image.save(data / name)
    out = train(dataset_name=data, max_train_steps=40, logging_steps=10, num_validation_pairs=2, validation_steps=40, caption_dropout=0)
    losses, accuracies = runs.values(out, "loss"), runs.values(out, "accuracy")
    assert losses[-1] < 0.6 and accuracies[-1] > 0.7, (losses, accuracies)
    assert runs.values(out, "val_accuracy")[-1] > 0.7 and runs.values(out, "val_loss")[-1] < 0.6


@pytest.mark.slow
def test_sft_trains_on_the_winners_alone(train, world):
    """Its loss is a denoising error, about 1 for an untrained model, and losers that are other pictures change nothing."""
    out = train("one", sft=True, beta_dpo=None, max_train_steps=2)
    assert 0.5 < runs.values(out, "loss")[0] < 2 and not runs.values(out, "accuracy")
    assert "# SFT of" in (out / "README.md").read_text()
    data = make_pairs(out.parent / "pairs")
    for line in map(json.loads, (data / "metadata.jsonl").read_text().splitlines()):
        loser = data / (line["jpg_1"] if line["label_0"] else line["jpg_0"])
        Image.open(loser).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(loser)
    other = train("other", sft=True, beta_dpo=None, max_train_steps=2, dataset_name=data)
    runs.assert_identical(saved(out), saved(other))


@pytest.mark.slow
def test_another_reference_is_another_start(train, world, tmp_path):
    torch.manual_seed(5)
    reference = tmp_path / "reference"
    pipe = unets.sd15_pipeline()
    pipe.unet = unets.unet(8)
    pipe.save_pretrained(reference)
    out = train(reference_model=reference, max_train_steps=1)
    assert abs(runs.values(out, "loss")[0] - math.log(2)) > 1e-4
    line = next(line for line in runs.lines(out) if "loss" in line)
    assert line["policy_margin"] != line["reference_margin"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(loss_type="ipo"), dict(loss_type="hinge"), dict(label_smoothing=0.1),
                                   dict(optimizer="adafactor"), dict(optimizer="adamw8bit")], ids=str)  # fmt: skip
def test_every_loss_and_optimizer_trains(train, world, flags):
    """At policy == reference x = 0: sigmoid log 2, however smoothed; ipo 1/4; hinge 1."""
    if flags.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    out = train(**flags, max_train_steps=1)
    start = {"ipo": 0.25, "hinge": 1.0}.get(flags.get("loss_type"), math.log(2))
    assert runs.values(out, "loss")[0] == pytest.approx(start, abs=1e-6)
    assert any(not torch.equal(saved(out)[name], tensor) for name, tensor in saved(world.model).items())


def expected_margin(model, world, seed: int, step: int) -> float:
    """Mean of |e(loser) - noise|^2 - |e(winner) - noise|^2 over the four pairs of a step, one picture at a time.

    All random numbers are named by seed, step and position; noise, timestep and mirroring are those of the pair.
    """
    total = 0.0
    for position, index in enumerate(buckets.Order([(32, 32)] * 8, 4, seed).batch(step)):

        def number(stream, position=position):
            return seeds.uniform(seed, step, [position], stream).item()

        prompt = "" if number("caption") < 0.5 else f"{'abcdefgh'[index // 2]} ring"
        condition, timestep = sd15.encode_prompts(model, [prompt]), torch.tensor([int(1000 * number("timestep"))])
        noise = seeds.normal(seed, step, [position], "noise", (4, 4, 4))
        draws = seeds.normal(seed, step, [position], "posterior", (2, 4, 4, 4))[0]
        winner = 2 * index + index % 2
        for sign, name, drawn in ((-1, winner, draws[0]), (1, 4 * index + 1 - winner, draws[1])):
            pixels = buckets.fit(Image.open(world.data / f"{name}.png"), (32, 32), flip=number("flip") < 0.5)
            posterior = model.vae.encode(pixels[None]).latent_dist
            x_t = model.scheduler.add_noise((posterior.mean + posterior.std * drawn) * 0.18215, noise, timestep)
            predicted = model.unet(x_t, timestep, encoder_hidden_states=condition.embeds).sample
            total += sign * (predicted - noise).square().mean().item()
    return total / 4


@pytest.mark.slow
@torch.no_grad()
def test_the_margins_are_those_of_a_plain_loop_at_every_step(world, tmp_path):
    """At a learning rate of 1e-12 the UNet stays the reference: both have this margin, the loss is log 2."""
    with torch.enable_grad():
        out = train_in(world, tmp_path)(seed=3, train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=3, learning_rate=1e-12,
                                        adam_weight_decay=0.0, caption_dropout=0.5)  # fmt: skip
    model = sd15.load(world.model)
    expected = [expected_margin(model, world, 3, step) for step in range(3)]
    for name in ("policy_margin", "reference_margin"):
        assert runs.values(out, name) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert runs.values(out, "loss") == pytest.approx([math.log(2)] * 3, abs=1e-6)


# --------------------------------------------------------------------------- XL


def test_xl_is_told_from_the_folder(world, tiny_sdxl_folder, tmp_path):
    args = script.parse_args(replace(world, model=tiny_sdxl_folder).argv(tmp_path, resolution=None))
    assert args.resolution == 1024 and args.gradient_checkpointing
    args = script.parse_args(world.argv(tmp_path, resolution=None))
    assert args.resolution == 512 and not args.gradient_checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_xl_trains_with_its_own_settings(world, tiny_sdxl_folder, tmp_path, flags):
    out = train_in(replace(world, model=tiny_sdxl_folder, cache=tmp_path / "cache"), tmp_path)(max_train_steps=2, **flags, **SHOWN)
    assert runs.values(out, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    model = dict(model=tiny_sdxl_folder, lora_folder=out) if flags else dict(model=out)
    assert np.abs(shown(out, 2) - draw(**model)).max() <= 1
    assert np.abs(shown(out, 0) - draw(tiny_sdxl_folder)).max() <= 1


# --------------------------------------------------------------------------- equivalences


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(train):
    one, other = train("plain", max_train_steps=2), train("checkpointed", max_train_steps=2, gradient_checkpointing=True)
    runs.assert_identical(saved(one), saved(other))


@pytest.mark.slow
def test_one_batch_of_four_equals_four_accumulated(train, world):
    """As in full fine-tuning: an Adam epsilon above every gradient keeps its steps proportional to them."""
    plain = dict(adam_epsilon=1.0, learning_rate=1.0, max_grad_norm=0.01, seed=3, adam_weight_decay=0.0)
    whole = train("whole", **plain)
    parts = train("parts", **plain, train_batch_size=1, gradient_accumulation_steps=4)
    for name in ("loss", "grad_norm", "accuracy", "policy_margin", "reference_margin"):
        assert runs.values(whole, name) == pytest.approx(runs.values(parts, name), rel=1e-4, abs=1e-6), name
    one, other, base = saved(whole), saved(parts), saved(world.model)
    changed = max((one[name] - base[name]).abs().max() for name in one)
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-3 * changed


@pytest.mark.slow
def test_cached_equals_encoded_at_every_step(train, world):
    """The VAE sees one picture or several at once: fp32 rounding, which Adam turns into the sign of tiny gradients unless held down."""
    plain = dict(adam_epsilon=1.0, learning_rate=1.0, adam_weight_decay=0.0, caption_dropout=0.5)
    one, other = train("cached", **plain), train("encoded", **plain, cache_latents=False, cache_text=False)
    for name in ("loss", "grad_norm"):
        assert runs.values(one, name) == pytest.approx(runs.values(other, name), rel=1e-4)
    base = saved(world.model)
    changed = max((tensor - base[name]).abs().max() for name, tensor in saved(one).items())
    assert max((tensor - saved(other)[name]).abs().max() for name, tensor in saved(one).items()) < 1e-3 * changed


@pytest.mark.slow
def test_pairs_of_every_shape_train_in_the_buckets_of_their_winners(train, tmp_path, capsys):
    """Pairs 0 and 1 are wide (48 x 96), 2 and 3 tall: in an epoch 2 batches of 2, all of whose latents are in the cache."""
    data = make_pairs(tmp_path / "pairs", 4)
    for number in range(8):
        Image.open(data / f"{number}.png").resize((64, 32) if number < 4 else (32, 64)).save(data / f"{number}.png")
    out = train(dataset_name=data, aspect_buckets=True, resolution=64, train_batch_size=2, max_train_steps=2)
    assert "4 pairs to train on in 2 bucket(s)" in capsys.readouterr().out
    assert runs.values(out, "epoch")[-1] == 1.0 and np.isfinite(runs.values(out, "loss")).all()


LONG = dict(
    max_train_steps=5, checkpointing_steps=2, logging_steps=3, use_ema=True, lr_scheduler="cosine", caption_dropout=0.3, train_batch_size=2,
    validation_steps=3, num_validation_pairs=2, gradient_accumulation_steps=2, **SHOWN,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "lora"])
def test_resumed_equals_uninterrupted(train, monkeypatch, capsys, way):
    flags = LONG | (LORA | dict(lora_dropout=0.2) if way == "lora" else {})
    whole = train("whole", **flags)
    with monkeypatch.context() as patch:
        if way == "lora":
            runs.interrupt(patch, 4)  # two steps after the checkpoint, in the middle of a window of metrics
            with pytest.raises(runs.Interrupted):
                train("parts", **flags)
        else:
            runs.stop(patch, 3)
            runs.assert_stopped(train("parts", **flags), 3, capsys.readouterr().out)
    parts = train("parts", **flags, resume_from_checkpoint="latest")
    runs.assert_identical(runs.state(whole / "checkpoint-4"), runs.state(parts / "checkpoint-4"))
    for folder in (whole, whole / "raw", whole / "checkpoint-4"):
        other = parts / folder.relative_to(whole)
        runs.assert_identical(*((runs.saved(one)[0] if way == "lora" else saved(one)) for one in (folder, other)))
    assert contents(whole / "samples") == contents(parts / "samples")
    assert runs.lines(whole) == runs.lines(parts)


# --------------------------------------------------------------------------- dry run, bad input


@pytest.mark.slow
def test_dry_run_counts_pairs_and_the_reference(world, tmp_path, capsys, monkeypatch):
    """Both pictures of a pair are in one forward pass; --sft has the winner alone, and no reference."""
    asked, count = [], script.plan.memory.step_memory
    monkeypatch.setattr(script.plan.memory, "step_memory", lambda *given, **named: asked.append(named) or count(*given, **named))
    pairs = script.parse_args(world.argv(tmp_path / "out")).train_batch_size
    for sft in (True, False):
        runs.train(script, world.argv(tmp_path / "out", dry_run=True, **(dict(sft=True, beta_dpo=None) if sft else {})))
        assert (asked[-1]["batch"], asked[-1]["frozen_copy"]) == ((pairs, False) if sft else (2 * pairs, True))
    said = capsys.readouterr().out.split("dry run: ")[1]
    count = sum(tensor.numel() for tensor in saved(world.model).values())
    assert said.count(f"{count:,} parameters") == 3  # UNet, reference, trained
    assert "pair(s), " in said and "more in the backward pass" in said and "at the peak of a step" in said
    assert "8 to train on, 0 held out, 0 skipped, 0 ties dropped" in said and "32 entries" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "consulted", "copied"),
    [({}, True, True), (LORA, True, False), (dict(sft=True, beta_dpo=None), False, False)],
    ids=["full", "lora", "sft"],
)
def test_the_plan_knows_whether_a_reference_is_consulted_and_copied(world, tmp_path, monkeypatch, flags, consulted, copied):
    planned = []
    monkeypatch.setattr(script.plan, "show", lambda args, **named: planned.append(named["preference"]))
    runs.train(script, world.argv(tmp_path / "out", dry_run=True, **flags))
    assert [(preference.reference, preference.copy) for preference in planned] == [(consulted, copied)]


BAD = {  # what is wrong: flags, what the line must name, the cure in it
    "no data": (dict(dataset_name=None), "--dataset_name", "pairs"),
    "one column": (dict(chosen_column="jpg_1"), "--rejected_column", "both"),
    "a missing column": (dict(chosen_column="good", rejected_column="jpg_1"), "--chosen_column 'good'", "jpg_0"),
    "a missing label": (dict(label_column="winner"), "--label_column 'winner'", "label_0"),
    "a missing reference": (dict(reference_model="nowhere"), "--reference_model nowhere", "Hub id"),
    "a reference for a LoRA": (dict(reference_model="nowhere", **LORA), "--reference_model", "without it"),
    "rank without LoRA": (dict(rank=8), "--rank 8", "--use_lora"),
    "smoothing of ipo": (dict(loss_type="ipo", label_smoothing=0.1), "--label_smoothing", "sigmoid"),
    "beta of sft": (dict(sft=True), "--beta_dpo", "--sft"),
    "random crops of cached latents": (dict(random_crop=True), "--random_crop", "--no-cache_latents"),
    "warm-up of a constant rate": (dict(lr_warmup_steps=2), "--lr_warmup_steps 2", "constant_with_warmup"),
    "too small": (dict(resolution=None, pretrained_model_name_or_path="src"), "--pretrained_model_name_or_path src", "model_index.json"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_the_cure(world, tmp_path, capsys, what):
    flags, names, cure = BAD[what]
    with pytest.raises(SystemExit) as stop:
        script.parse_args(world.argv(tmp_path / "out", **flags))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and names in err and cure in err, err
    assert runs.files(tmp_path) == []


@pytest.mark.parametrize(("name", "value"), [("prediction_type", "v_prediction"), ("timestep_spacing", "trailing")])
def test_a_velocity_or_turbo_model_is_refused_by_name(world, tmp_path, capsys, name, value):
    folder = unets.altered(world.model, tmp_path / "model", "scheduler/scheduler_config.json", **{name: value})
    for flag in ("pretrained_model_name_or_path", "reference_model"):
        with pytest.raises(SystemExit):
            script.parse_args(world.argv(tmp_path / "out", **{flag: folder}))
        assert f"--{flag} {folder}: " in (said := capsys.readouterr().err) and value in said and said.count("\n") == 1


def test_a_reference_of_another_family_is_refused_before_loading(world, tiny_sdxl_folder, tmp_path, capsys):
    """Width 8 + 12 of XL's two encoders against 8: without the check, an error deep inside the UNet after both models are loaded."""
    with pytest.raises(SystemExit):
        script.parse_args(world.argv(tmp_path / "out", reference_model=tiny_sdxl_folder))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--reference_model {tiny_sdxl_folder}: its UNet reads text of width 20" in said


def test_a_layer_that_does_not_exist_is_refused_before_loading(train):
    with pytest.raises(SystemExit, match="error: --lora_layers: .*attn1.to_q"):
        train(**LORA, lora_layers="attn.to_q")


def test_the_schedule_is_a_warm_up_of_a_quarter_by_default(world, tmp_path):
    args = script.parse_args(world.argv(tmp_path, lr_scheduler=None, max_train_steps=2000))
    assert (args.lr_scheduler, args.lr_warmup_steps) == ("constant_with_warmup", 500)
    assert script.parse_args(world.argv(tmp_path, lr_scheduler=None, max_train_steps=3)).lr_warmup_steps == 0


def test_args_json_is_a_config(finished, tmp_path):
    args = script.parse_args(["--config", str(finished / "args.json"), "--output_dir", str(tmp_path)])
    before = json.loads((finished / "args.json").read_text()) | {"output_dir": str(tmp_path)}
    assert script.runtime.plain_args(args) == before


def test_a_checkpoint_serves_as_a_unet(finished):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(finished / "checkpoint-4", subfolder="unet")
    runs.assert_identical(dict(unet.state_dict()), saved(finished / "raw"))
    assert (finished / "checkpoint-4/unet" / full.WEIGHTS_NAME).exists()
