"""Full fine-tuning in this process, on the smallest model: what it trains, writes, repeats, resumes and refuses.

What it shares with the LoRA trainer (data, caches, signals, trackers, full disks) is tested there: the lines are the same.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import train_full_finetuning_sd3 as script
import train_text_to_image_lora_sd3 as lora_script
from src import full

pytestmark = pytest.mark.usefixtures("summaries")
PROMPT = "a red ring"
SHOWN = dict(validation_prompt=[PROMPT], validation_seed=7, validation_guidance_scale=4.0, validation_inference_steps=3)
BF16 = dict(mixed_precision="bf16", weights_dtype="bf16")
FUSED = dict(fused_backward=True, max_grad_norm=0)
DEAD = "transformer_blocks.2.attn.add_q_proj", "transformer_blocks.2.attn.norm_added_q"  # never get a gradient


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    before = contents(tiny_sd3_folder)
    yield runs.make_world(tiny_sd3_folder, tmp_path_factory.mktemp("full"))
    assert contents(tiny_sd3_folder) == before, "the base model was written into"


def train_in(world, root: Path):
    def run(name: str = "run", **changes) -> Path:
        runs.train(script, world.argv(root / name, **({"learning_rate": 1e-2} | changes)))
        return root / name

    return run


@pytest.fixture
def train(world, tmp_path):
    """train("name", fused_backward=True, ...) -> output folder of a run with these flags."""
    return train_in(world, tmp_path)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run with everything switched on that may be, of which several tests look at one side each."""
    settings = dict(use_ema=True, ema_decay=0.5, checkpointing_steps=4, adam_weight_decay=0.0, num_validation_loss_images=1)
    return train_in(world, tmp_path_factory.mktemp("finished"))(**settings, **SHOWN)


def test_the_rest_of_the_result_is_fetched_before_anything_is_loaded(train, world, monkeypatch):
    line, loaded = runs.parts_before_refusal(monkeypatch, script.sd3, lambda: train(train_text_encoder=True, cache_text=False))
    assert line == f"error: --pretrained_model_name_or_path {world.model}: transformer, text_encoder, text_encoder_2 alone is here"
    assert loaded == []
    train("alone", save_transformer_only=True, max_train_steps=1)  # has no use for it


def saved(folder: Path, part: str = "transformer") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def unchanged(out: Path, base: Path, part: str = "transformer") -> set[str]:
    ours, theirs = saved(out, part), saved(base, part)
    assert ours.keys() == theirs.keys()
    return {name for name in ours if torch.equal(ours[name], theirs[name])}


def draw(model: Path, other: Path | None = None) -> np.ndarray:
    """(32, 32, 3) integers, by the stock pipeline with the settings of SHOWN."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    parts = {"transformer": SD3Transformer2DModel.from_pretrained(other, subfolder="transformer")} if other else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, torch_dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    settings = dict(prompt=PROMPT, height=32, width=32, num_inference_steps=3, guidance_scale=4.0, max_sequence_length=16)
    return np.asarray(pipeline(**settings, generator=torch.Generator("cpu").manual_seed(7)).images[0]).astype(int)


# --------------------------------------------------------------------------- what it trains and writes


def test_every_weight_is_trained(finished, world):
    assert len(runs.values(finished, "loss")) == 4 and all(np.isfinite(runs.values(finished, "loss")))
    assert {name for name in unchanged(finished, world.model)} == {"pos_embed.pos_embed", *(
        name for name in saved(world.model) if name.startswith(DEAD))}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        (dict(train_blocks="1", **BF16), lambda name: not name.startswith("transformer_blocks.1.")),
        (dict(freeze_last_blocks=2, **FUSED), lambda name: name.startswith(("transformer_blocks.1.", "transformer_blocks.2."))),
    ],
    ids=["blocks", "last blocks"],
)
def test_frozen_blocks_stay_bit_for_bit(train, world, flags, frozen):
    """bf16 base weights, so that training in bf16 begins at exactly their values."""
    from diffusers import SD3Transformer2DModel

    out = train(**flags, max_train_steps=2)
    base = SD3Transformer2DModel.from_pretrained(world.model, subfolder="transformer").state_dict()
    ours = saved(out)
    still = {name for name in ours if torch.equal(ours[name], base[name].to(ours[name].dtype))}
    assert still == {name for name in base if frozen(name) or name == "pos_embed.pos_embed" or name.startswith(DEAD)}


@pytest.mark.slow
def test_the_text_encoders_are_trained_and_saved(train, world):
    """Words that no caption has keep their embeddings, so tensors are compared whole. T5 stays what it was."""
    rates = dict(learning_rate=2.5e-3, text_encoder_learning_rate=2.5e-4, scale_lr=True)  # times 4 pictures
    out = train(train_text_encoder=True, adam_weight_decay=0.0, use_ema=True, **rates, **SHOWN)
    for part in ("text_encoder", "text_encoder_2"):
        assert not unchanged(out, world.model, part)
        ours, theirs = saved(out, part), saved(world.model, part)
        moved = max((ours[name] - theirs[name]).abs().max() for name in ours)
        assert 1e-3 < moved < 6e-3  # Adam moves by about the learning rate: at most 4 steps of 1e-3, and the other rate is 1e-2
    assert (out / "text_encoder_3/model.safetensors").stat().st_ino == (world.model / "text_encoder_3/model.safetensors").stat().st_ino
    for part in ("text_encoder", "text_encoder_2", "transformer"):
        assert runs.files(out / "raw" / part) == runs.files(out / part)
        ours, raw = saved(out, part), saved(out / "raw", part)
        assert any(not torch.equal(ours[name], raw[name]) for name in ours), f"no average of {part}"


@pytest.mark.slow
def test_trained_text_encoders_beside_cached_t5_give_what_encoding_at_every_step_does(train):
    """The same losses, of training and validation, whose prompt is encoded by the trained encoders as well."""
    flags = dict(train_text_encoder=True, text_encoder_learning_rate=1e-3, max_train_steps=4, logging_steps=1,
                 num_validation_loss_images=1, validation_steps=2, caption_dropout=0.5)  # fmt: skip
    cached, encoded = (train(name, cache_text=cached, **flags) for name, cached in (("cached", True), ("encoded", False)))
    for metric in ("loss", "val_loss"):
        assert runs.values(cached, metric) == pytest.approx(runs.values(encoded, metric), rel=1e-5)
    alone = train("alone", caption_dropout=0.5, max_train_steps=1, num_validation_loss_images=1)  # the same first step
    assert runs.values(alone, "loss")[0] == pytest.approx(runs.values(cached, "loss")[0], rel=1e-5)
    assert runs.values(cached, "grad_norm")[0] > 1.0001 * runs.values(alone, "grad_norm")[0]  # of all weights that are trained


def test_a_run_leaves_a_pipeline_and_its_average(finished, world):
    for name in ("model_index.json", "transformer", "vae", "scheduler", "text_encoder_3", "tokenizer_3", "raw/transformer", "summary.png"):
        assert (finished / name).exists(), name
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):  # the very files, not another copy in another precision
        (ours,), (theirs,) = ((folder / part).glob("*.safetensors") for folder in (finished, world.model))
        assert ours.stat().st_ino == theirs.stat().st_ino
    assert not list(finished.rglob("*.tmp")) and not list(finished.rglob("*.bin"))
    assert runs.files(finished / "checkpoint-4") == [
        "args.json", "data.json", "state.pt", "transformer", "transformer/config.json", f"transformer/{full.WEIGHTS_NAME}",
    ]  # fmt: skip
    runs.assert_identical(saved(finished / "checkpoint-4"), saved(finished / "raw"))
    assert "DiffusionPipeline.from_pretrained" in (finished / "README.md").read_text()


@pytest.mark.slow
def test_stock_diffusers_draws_the_last_validation_picture(finished, world):
    """Validation shows the average where one is kept, and the pipeline folder holds it; the weights as trained are beside it."""
    ours = {step: np.asarray(Image.open(finished / f"samples/step-{step:06d}/00-7.png")).astype(int) for step in (0, 4)}
    assert np.abs(ours[4] - draw(finished)).max() <= 1  # one grey level of rounding
    assert np.abs(ours[0] - draw(world.model)).max() <= 1
    assert np.abs(ours[4] - draw(finished, finished / "raw")).mean() > 1 and np.abs(ours[4] - ours[0]).mean() > 1


@pytest.mark.slow
def test_the_raw_weights_alone_are_drawn_without_an_average(train):
    out = train(max_train_steps=2, **SHOWN)
    shown = np.asarray(Image.open(out / "samples/step-000002/00-7.png")).astype(int)
    assert np.abs(shown - draw(out)).max() <= 1 and not (out / "raw").exists()


@pytest.mark.slow
def test_only_the_transformer_is_saved_if_asked(train):
    out = train(save_transformer_only=True, max_train_steps=1)
    assert not (out / "model_index.json").exists() and not (out / "vae").exists() and saved(out)
    assert 'subfolder="transformer"' in (out / "README.md").read_text()


# --------------------------------------------------------------------------- precisions and ways to update


@pytest.mark.parametrize("way", [{}, BF16], ids=["fp32", "bf16"])
def test_every_flag_of_adam_reaches_it(world, tmp_path, way):
    adam = dict(adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3, adam_weight_decay=0.3, seed=5)
    args = script.parse_args(world.argv(tmp_path, learning_rate=1e-2, **adam, **way))
    weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=full.DTYPES[args.weights_dtype]))
    made = script.make_optimizer([{"params": [weight], "lr": 1e-4}], args, torch.device("cpu"))
    inside = made.pieces[0].optimizer if way else made
    (group,) = inside.param_groups
    assert {name: group[name] for name in ("betas", "eps", "weight_decay")} == dict(betas=(0.7, 0.8), eps=1e-3, weight_decay=0.3)
    assert made.param_groups[0]["lr"] == 1e-4 and getattr(made, "seed", 5) == 5


def test_bf16_weights_move_by_less_than_a_bf16_step(train, world):
    """Steps of 2e-5 on weights about 0.1, whose bf16 spacing is 2^-11 to 2^-12 = 4.9e-4 to 2.4e-4: some move by a whole spacing."""
    out = train(**BF16, learning_rate=2e-5, adam_weight_decay=0.0, checkpointing_steps=4)
    ours, base = saved(out), {name: value.bfloat16() for name, value in saved(world.model).items()}
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    moved = torch.cat([(ours[name] != base[name]).flatten() for name in ours if name.endswith("to_q.weight")]).float().mean()
    assert 0.02 < moved < 0.6
    moments = [value for entry in runs.state(out / "checkpoint-4")["optimizer"]["state"].values() for value in entry.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert (out / "vae/config.json").read_bytes() == (world.model / "vae/config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, BF16, dict(optimizer="adamw8bit"), dict(optimizer="adafactor", **BF16)], ids=str)
def test_a_fused_backward_pass_changes_nothing(train, flags):
    if flags.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    one = train("plain", max_grad_norm=0, max_train_steps=2, **flags)
    other = train("fused", max_train_steps=2, **flags, **FUSED)
    runs.assert_identical(saved(one), saved(other))
    for name, rel in (("loss", 0), ("grad_norm", 1e-2 if "mixed_precision" in flags else 1e-5)):  # bf16 gradients: the norm has 3 digits
        assert runs.values(one, name) == pytest.approx(runs.values(other, name), rel=rel)


@pytest.mark.slow
def test_gradient_checkpointing_and_where_the_average_lies_change_nothing(train, monkeypatch):
    """Two cycles of a cosine in two steps: the rate is whole again after the first, and zero after the second."""
    averages, average, trained, select = [], script.ema.Ema, [], script.select
    monkeypatch.setattr(script, "select", lambda transformer, args: trained.append(transformer) or select(transformer, args))
    monkeypatch.setattr(script.ema, "Ema", lambda *given, device: averages.append(device) or average(*given, device=device))
    twice = dict(use_ema=True, max_train_steps=2, lr_scheduler="cosine_with_restarts", lr_num_cycles=2, **FUSED)
    one = train("plain", **twice)
    other = train("other", **twice, ema_device="cpu", gradient_checkpointing=True)
    assert [transformer.is_gradient_checkpointing for transformer in trained] == [False, True]
    assert averages == [None, "cpu"] and runs.values(one, "lr") == pytest.approx([1e-2, 0], abs=1e-9)
    runs.assert_identical(saved(one), saved(other))
    runs.assert_identical(saved(one / "raw"), saved(other / "raw"))


@pytest.mark.slow
def test_one_batch_of_four_equals_four_accumulated(train, world):
    """Both sum the same four gradients, in another order: fp32 rounding of some hundred operations, 100 x 2^-24 < 1e-5 relative.

    Adam would blow that up where a gradient is nearly zero (its step is the sign there): an epsilon above every gradient makes its step
    proportional to the gradient, so weights agree to 1e-4 of the largest change after 4 steps. The norm is clipped in both.
    """
    plain = dict(adam_epsilon=1.0, learning_rate=10.0, max_grad_norm=0.01, seed=3, adam_weight_decay=0.0)
    whole = train("whole", **plain)
    parts = train("parts", **plain, train_batch_size=1, gradient_accumulation_steps=4)
    for name in ("loss", "grad_norm"):
        assert runs.values(whole, name) == pytest.approx(runs.values(parts, name), rel=1e-5)
    assert min(runs.values(whole, "grad_norm")) > 0.01  # clipped
    one, other, base = saved(whole), saved(parts), saved(world.model)
    changed = max((one[name] - base[name]).abs().max() for name in one)
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-4 * changed


@pytest.mark.slow
def test_the_losses_are_those_of_the_lora_trainer(train, world, tmp_path, monkeypatch):
    """Whose losses are tested against a plain loop; at a learning rate of 1e-12 both are the base model."""
    variants, load = [], script.sd3.load
    monkeypatch.setattr(script.sd3, "load", lambda *given, variant, **named: variants.append(variant) or load(*given, **named))
    flags = dict(seed=3, train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-12, adam_weight_decay=0.0, caption_dropout=0.5,
                 timestep_density="mode", mode_scale=0.5, shift="resolution", variant="fp16", cache_dir=tmp_path / "cache")  # fmt: skip
    out = train("full", **flags)
    assert variants == ["fp16"] * 3  # text encoders, VAE, transformer
    runs.train(lora_script, world.argv(tmp_path / "lora", **flags))
    assert runs.values(out, "loss") == pytest.approx(runs.values(tmp_path / "lora", "loss"), rel=1e-5)


@pytest.mark.slow
def test_a_random_start_is_that_of_the_seed(train, world):
    first, again, other = (train(name, from_config=True, seed=seed, max_train_steps=1) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    runs.assert_identical(saved(first), saved(again))
    name = "transformer_blocks.0.attn.to_q.weight"
    distance = {out: (saved(out)[name] - saved(world.model)[name]).abs().max() for out in (first, other)}
    assert min(distance.values()) > 0.1 and not torch.equal(saved(first)[name], saved(other)[name])  # one step alone moves by 0.01


# --------------------------------------------------------------------------- interrupted and resumed

LONG = dict(
    max_train_steps=5, checkpointing_steps=2, logging_steps=3, use_ema=True, lr_scheduler="cosine", caption_dropout=0.3, train_batch_size=2,
    validation_steps=3, num_validation_loss_images=1, **SHOWN,
)  # fmt: skip
WAYS = {
    "fp32": dict(gradient_accumulation_steps=2),
    "bf16": dict(**BF16, ema_device="cpu"),
    "fused 8-bit": dict(**BF16, **FUSED, optimizer="adamw8bit"),
    "text encoders": dict(train_text_encoder=True, from_config=True),
}


@pytest.mark.parametrize("way", [way if way == "bf16" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_resumed_equals_uninterrupted(train, monkeypatch, way):
    if way == "fused 8-bit":
        pytest.importorskip("bitsandbytes")
    flags = LONG | WAYS[way]
    whole = train("whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(patch, 4)  # two steps after the checkpoint, in the middle of a window of metrics
        train("parts", **flags)
    parts = train("parts", **flags, resume_from_checkpoint="latest")
    runs.assert_identical(runs.state(whole / "checkpoint-4"), runs.state(parts / "checkpoint-4"))  # optimizer, EMA, schedule, window
    trained = ("transformer", "text_encoder", "text_encoder_2") if way == "text encoders" else ("transformer",)
    for folder in ("", "raw", "checkpoint-4"):
        for part in trained if folder else (*trained, "samples"):
            assert contents(whole / folder / part) == contents(parts / folder / part), f"{folder}/{part}"
    assert runs.lines(whole) == runs.lines(parts)


def test_a_checkpoint_of_another_precision_is_refused(train):
    train("run", max_train_steps=1, checkpointing_steps=1)
    with pytest.raises(SystemExit, match=r"optimizer: saved by AdamW, this run uses AdamW in pieces.*--weights_dtype fp32 -> bf16"):
        train("run", max_train_steps=2, resume_from_checkpoint="latest", **BF16)


@pytest.mark.slow
def test_a_checkpoint_without_the_trained_part_is_refused(train):
    train("run", max_train_steps=1, checkpointing_steps=1)
    with pytest.raises(SystemExit, match="checkpoint-1 holds no text_encoder/"):
        train("run", max_train_steps=2, resume_from_checkpoint="latest", train_text_encoder=True, cache_text=False)


def test_a_checkpoint_serves_as_a_transformer(finished):
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel.from_pretrained(finished / "checkpoint-4", subfolder="transformer")
    runs.assert_identical(dict(transformer.state_dict()), saved(finished / "raw"))


# --------------------------------------------------------------------------- dry run, bad input


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "bytes_of_one"),
    [
        ({}, 4 + 8),  # gradient and two moments in fp32; the weight is counted with the model
        (BF16 | dict(use_ema=True), 2 + 8 + 4),
        (FUSED | dict(optimizer="adamw8bit", train_blocks="0-1"), 0 + 2),
        (dict(train_text_encoder=True), 4 + 8),
    ],
    ids=["fp32", "bf16", "fused 8-bit", "with both CLIPs"],
)
def test_dry_run_counts_what_is_trained(world, tmp_path, capsys, flags, bytes_of_one):
    if flags.get("optimizer") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    runs.train(script, world.argv(tmp_path / "out", dry_run=True, **flags))
    plan = capsys.readouterr().out
    transformer = script.sd3.transformer_from_config(world.model)
    full.select(transformer, blocks=flags.get("train_blocks"))
    count = sum(parameter.numel() for parameter in full.parameters(transformer))
    if flags.get("train_text_encoder"):
        parts = script.sd3.parameter_counts(world.model)
        count += parts["text_encoder"] + parts["text_encoder_2"]
    assert f"{count:,} parameters" in plan and f"{count * bytes_of_one / 1e3:.1f} kB" in plan, plan
    weights = sum(tensor.numel() for tensor in transformer.state_dict().values()) * (2 if "weights_dtype" in flags else 4)
    assert f"{weights / 1e3:.1f} kB" in plan and not (tmp_path / "out").exists()


def torchrun(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")


def fsdp(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def deepspeed(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


BAD = {  # what is wrong: flags, set-up, what the line must name, the cure in it
    "bf16 weights without autocast": (dict(weights_dtype="bf16"), None, "--weights_dtype", "--mixed_precision bf16"),
    "prodigy in pieces": (dict(optimizer="prodigy", **BF16), None, "--optimizer prodigy", "adamw"),
    "prodigy fused": (dict(optimizer="prodigy", **FUSED), None, "--fused_backward", "adamw"),
    "fused with accumulation": (dict(gradient_accumulation_steps=2, **FUSED), None, "--fused_backward", "--gradient_accumulation_steps 1"),
    "fused with clipping": (dict(fused_backward=True), None, "--fused_backward", "--max_grad_norm 0"),
    "fused with fp16": (dict(mixed_precision="fp16", **FUSED), None, "--fused_backward", "--mixed_precision bf16"),
    "fused on two processes": (FUSED, torchrun, "--fused_backward", "NUM_PROCESSES=1"),
    "sharded bf16": (BF16, fsdp, "--weights_dtype bf16", "--mixed_precision bf16"),
    "sharded text encoders": (dict(train_text_encoder=True, cache_text=False), fsdp, "--train_text_encoder", "--multi_gpu"),
    "sharded adafactor": (dict(optimizer="adafactor"), fsdp, "--optimizer adafactor", "adamw"),
    "DeepSpeed": ({}, deepspeed, "DeepSpeed", "scripts/accelerate/fsdp2.yaml"),
    "text encoders trained and not saved": (
        dict(train_text_encoder=True, cache_text=False, save_transformer_only=True), None, "--save_transformer_only", "leave one out"),
    "rate of no text encoder": (dict(text_encoder_learning_rate=1e-6), None, "--text_encoder_learning_rate", "--train_text_encoder"),
    "place of no average": (dict(ema_device="cpu"), None, "--ema_device", "--use_ema"),
    "block that does not exist": (dict(train_blocks="0-9"), None, "--train_blocks", "0-2"),
    "more blocks frozen than there are": (dict(freeze_last_blocks=4), None, "--freeze_last_blocks", "3"),
    "blocks twice": (dict(train_blocks="0", freeze_last_blocks=1), None, "--freeze_last_blocks", "one of them"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_the_cure(world, tmp_path, monkeypatch, capsys, what):
    flags, prepare, names, cure = BAD[what]
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare(monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.parse_args(replace(world, cache=Path("cache")).argv(Path("out"), **flags))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert names in err and cure in err, err
    assert runs.files(tmp_path) == []


def test_a_checkpoint_past_the_end_is_refused(world, tmp_path, capsys):
    (tmp_path / "out/checkpoint-8").mkdir(parents=True)
    for name in ("state.pt", "args.json"):
        (tmp_path / "out/checkpoint-8" / name).write_text("{}")
    with pytest.raises(SystemExit):
        script.parse_args(world.argv(tmp_path / "out", max_train_steps=7, resume_from_checkpoint="latest"))
    assert "--max_train_steps 7: checkpoint-8 is past it already; give at least 8" in capsys.readouterr().err


def test_the_base_model_as_output_is_refused(world, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(world.argv(world.model))
    assert "--output_dir" in capsys.readouterr().err


def test_args_json_is_a_config(finished, tmp_path):
    args = script.parse_args(["--config", str(finished / "args.json"), "--output_dir", str(tmp_path)])
    before = json.loads((finished / "args.json").read_text()) | {"output_dir": str(tmp_path)}
    assert script.runtime.plain_args(args) == before
