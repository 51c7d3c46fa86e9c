"""ReFL, DRaFT and DRaFT-LV in this process, on the smallest models: what they train, write, repeat, resume and refuse.

What they share with the other trainers (signals, trackers, full disks, caches) is tested there; the gradient itself in test_refl.py.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import unets
from accelerate import Accelerator
from conftest import clip_tokenizer
from PIL import Image

import train_refl_sd15 as script
from src import cli, lora
from src.scorers import Scores, base
from src.scorers.mixture import Mixture

pytestmark = pytest.mark.usefixtures("summaries")
LORA = dict(use_lora=True, rank=4, learning_rate=1e-2)


@dataclass(frozen=True)
class World(runs.World):
    """`data` are captioned pictures for the pre-training loss, which no run uses unless it says so."""

    prompts: Path

    def argv(self, out: Path, **changes) -> list[str]:
        """Arguments of a quiet run of 3 steps of 2 pictures, 32 x 32 px in 4 denoising steps, into `out`."""
        flags = dict(
            pretrained_model_name_or_path=self.model, prompts=self.prompts, cache_dir=self.cache, output_dir=out, resolution=32,
            mixed_precision="no", scorer="tiny_clip", max_train_steps=3, train_batch_size=2, num_inference_steps=4, guidance_scale=2,
            grad_scale=1, learning_rate=1e-3, logging_steps=1, seed=0, report_to="none", num_eval_prompts=2, num_eval_images=2,
            eval_num_inference_steps=2, eval_guidance_scale=2, eval_steps=100, checkpointing_steps=100,
        )  # fmt: skip
        return runs.command_line(**(flags | changes))

    @property
    def pretraining(self) -> dict:
        return dict(pretrain_dataset_name=self.data, dataloader_num_workers=0)


def make_tiny_clip(folder: Path) -> None:
    """A random CLIPModel in place of models/tiny-clip: 64 x 64 px, the tests' own tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    shape = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    tokenizer = clip_tokenizer()
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = CLIPConfig(text_config=shape | text, vision_config=shape | dict(image_size=64, patch_size=16), projection_dim=8)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_world(model: Path, root: Path) -> World:
    (root / "prompts.txt").write_text("a red ring\na green hill\na blue door\ntwo cats\na fox\nan owl\n")
    make_tiny_clip(root / "models/tiny-clip")
    return World(model, runs.make_pictures(root / "pictures"), root / "cache", root / "prompts.txt")


@pytest.fixture(scope="module")
def world(tiny_sd15_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("refl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "MODELS", root / "models")
        yield make_world(tiny_sd15_folder, root)


@pytest.fixture
def train(world, tmp_path):
    """train("name", use_lora=True, ...) -> output folder of a run with these flags."""

    def run(name: str = "run", **changes) -> Path:
        runs.train(script, world.argv(tmp_path / name, **changes))
        return tmp_path / name

    return run


@pytest.fixture
def judge(monkeypatch):
    """judge(function) lets it take the place of the scorers: function(images) -> (b,)."""

    def replace_scorers(function):
        def verdict(self, images, texts, metadata=None):
            total = function(images)
            return Scores(total, {self.names[0]: total})

        monkeypatch.setattr(Mixture, "__call__", verdict)

    return replace_scorers


def saved(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def draw(model: Path, unet: Path | None = None, lora_folder: Path | None = None) -> np.ndarray:
    """(32, 32, 3) integers: the first evaluation picture, by the stock pipeline."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    parts = {"unet": UNet2DConditionModel.from_pretrained(unet, subfolder="unet")} if unet else {}
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if lora_folder:
        pipeline.load_lora_weights(str(lora_folder))
    settings = dict(prompt="a red ring", height=32, width=32, num_inference_steps=2, guidance_scale=2.0)
    return np.asarray(pipeline(**settings, generator=torch.Generator("cpu").manual_seed(0)).images[0]).astype(int)


def shown(out: Path, step: int) -> np.ndarray:
    return np.asarray(Image.open(out / f"samples/step-{step:06d}/00-0.png")).astype(int)


# --------------------------------------------------------------------------- what it trains and writes


@pytest.mark.slow
def test_a_full_run_trains_every_weight_and_leaves_a_pipeline_that_stock_diffusers_draws_with(train, world, summaries):
    """With everything that may be switched on; the evaluation shows the average, and the folder holds it."""
    summaries()
    out = train(use_ema=True, ema_decay=0.5, adam_weight_decay=0.0, eval_scorers="jpeg_incompressibility", eval_steps=2,
                checkpointing_steps=3, learning_rate=1e-2, **world.pretraining)  # fmt: skip
    ours, theirs = saved(out), saved(world.model)
    assert ours.keys() == theirs.keys() and not [name for name in ours if torch.equal(ours[name], theirs[name])]
    for part in ("vae", "text_encoder"):  # the very files, in their precision
        (one,), (other,) = ((folder / part).glob("*.safetensors") for folder in (out, world.model))
        assert one.stat().st_ino == other.stat().st_ino
    assert np.abs(shown(out, 0) - draw(world.model)).max() <= 1  # one grey level of rounding
    assert np.abs(shown(out, 3) - draw(out)).max() <= 1
    assert np.abs(draw(world.model, unet=out / "raw") - draw(world.model)).mean() > 0.1
    assert (out / "summary.png").exists() and (out / "checkpoint-3/unet").is_dir()
    card = (out / "README.md").read_text()
    assert "# ReFL of" in card and "gradient of the reward `tiny_clip`, 3 optimizer steps of 2 pictures" in card

    lines = runs.lines(out)
    evaluated = {"step", "eval_reward", "eval/tiny_clip", "eval/jpeg_incompressibility"}
    trained = {"step", "loss", "reward", "reward/tiny_clip", "pretrain_loss", "grad_norm", "lr"}
    assert [set(line) for line in lines] == [evaluated, trained, trained, evaluated, trained, evaluated]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx([-value for value in runs.values(out, "reward")])
    assert 0.3 < runs.values(out, "pretrain_loss")[0] < 3 and min(runs.values(out, "grad_norm")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["refl", "draft", "draft_lv"])
def test_a_lora_run_trains_the_adapter_alone_and_stock_diffusers_reads_it(train, world, method):
    out = train(**LORA, method=method, draft_k=2 if method == "draft" else None, export_merged=True)
    assert set(path.name for path in out.iterdir()) >= {lora.WEIGHTS_NAME, "merged_unet", "README.md"} and not (out / "unet").exists()
    assert all(tensor.abs().sum() > 0 for tensor in runs.weights(out).values())
    assert np.abs(shown(out, 3) - draw(world.model, lora_folder=out)).max() <= 1
    assert not np.array_equal(shown(out, 3), shown(out, 0))
    assert f"# {script.KINDS[method]} LoRA of" in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["refl", "draft_lv"])
def test_the_reward_rises(train, judge, method):
    """Dark pictures are wanted. Saturated pixels go on learning, and better pictures than the threshold no longer do."""
    judge(lambda images: -images.mean((1, 2, 3)))
    out = train(**LORA | dict(learning_rate=2e-2), method=method, max_train_steps=12, eval_steps=12, train_batch_size=4)
    before, after = runs.values(out, "eval_reward")
    assert after > before + 0.01, (before, after)


@pytest.mark.slow
def test_the_threshold_stops_learning(train, judge, world):
    judge(lambda images: 5 + images.mean((1, 2, 3)))
    out = train(reward_threshold=2.0, adam_weight_decay=0.0, max_train_steps=1)
    runs.assert_identical(saved(out), saved(world.model))
    assert runs.values(out, "loss") == [0.0] and runs.values(out, "grad_norm") == [0.0]


@pytest.mark.slow
def test_the_pre_training_loss_is_weighed_and_alone_it_is_the_denoising_loss(train, judge, world):
    """Without any reward's gradient, twice the weight is twice the gradient."""
    judge(lambda images: 0 * images.mean((1, 2, 3)))
    norms = [runs.values(train(f"weight {weight}", pretrain_loss_weight=weight, max_train_steps=1, **world.pretraining), "grad_norm")[0]
             for weight in (0.5, 1.0)]  # fmt: skip
    assert norms[0] > 0 and norms[1] == pytest.approx(2 * norms[0], rel=1e-4)


@pytest.mark.slow
def test_text_encoders_are_gone_and_vae_and_scorer_compute_in_fp32(train, monkeypatch):
    seen, real = [], script.decode

    def spy(model, x0, batch_size):
        images = real(model, x0, batch_size)
        seen.append((model.text_encoders, model.vae.dtype, x0.dtype, images.dtype, images.requires_grad))
        return images

    monkeypatch.setattr(script, "decode", spy)
    out = train(mixed_precision="bf16", **LORA, max_train_steps=2)
    assert seen == [([], torch.float32, torch.float32, torch.float32, True)] * 2
    assert {value.dtype for value in runs.weights(out).values()} == {torch.float32} and min(runs.values(out, "grad_norm")) > 0


@pytest.mark.slow
def test_a_held_out_measure_that_falls_ends_the_run(train, judge, capsys):
    """Its usual range is 5 to 120 kB: 0.2 of that is 23. From 100 it goes to 90, which is let pass, and to 70."""
    values = iter([1.0, 100.0, 0.9, 90.0, 0.5, 70.0, 0.1, 10.0])  # of both mixtures, from evaluation to evaluation

    def verdict(images):
        return images.mean((1, 2, 3)) if images.requires_grad else torch.full((len(images),), next(values))

    judge(verdict)
    out = train(max_train_steps=6, eval_steps=1, eval_scorers="jpeg_incompressibility", stop_if_eval_drops=0.2)
    assert "stopped after step 2: jpeg_incompressibility fell from 100 to 70" in capsys.readouterr().out
    assert (out / "model_index.json").is_file() and runs.lines(out)[-1]["step"] == 2
    assert "2 optimizer steps of 2 pictures" in (out / "README.md").read_text()


@pytest.mark.slow
def test_every_flag_of_the_method_reaches_it(train, tmp_path, monkeypatch):
    """Two passes of two pictures, and two copies of each: what goes backward adds up to the mean, half the negative reward."""
    rows = {f"picture {number}": number for number in range(6)}
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text, "number": number}) for text, number in rows.items()))
    seen = defaultdict(list)

    def watch(owner, name, note):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: seen[name].append(note(*given, **named)) or real(*given, **named))

    watch(Accelerator, "backward", lambda self, loss: loss.item())
    watch(script, "decode", lambda model, x0, size: (model.vae.is_gradient_checkpointing, size))
    watch(script.sd15_rollout, "timetable", lambda alphas, steps, eta: (steps, eta))
    watch(script.prompts, "GroupSampler", lambda found, **named: named["seed"])
    watch(Mixture, "__call__", lambda self, images, texts, metadata: [rows[text] for text in texts] == [one["number"] for one in metadata])
    load = script.sd15.load
    monkeypatch.setattr(script.sd15, "load", lambda *given, variant, **named: seen["variant"].append(variant) or load(*given, **named))
    out = train(**LORA | dict(learning_rate=1e-4), scale_lr=True, method="draft_lv", num_renoised=2, grad_scale=0.5, eta=0.5, seed=3,
                gradient_accumulation_steps=2, max_train_steps=1, decode_batch_size=2, gradient_checkpointing=True,
                prompts=tmp_path / "prompts.jsonl", variant="fp16")  # fmt: skip
    (loss,), (reward,) = runs.values(out, "loss"), runs.values(out, "reward")
    assert loss == pytest.approx(-0.5 * reward, rel=1e-5)
    assert len(seen["backward"]) == 6 and sum(seen["backward"]) == pytest.approx(loss, rel=1e-5)
    assert runs.values(out, "lr") == [pytest.approx(4e-4)]  # 2 x 2 pictures
    assert seen["decode"] == [(True, 2)] * 6 and seen["timetable"] == [(4, 0.5)] and seen["GroupSampler"] == [3]
    assert all(seen["__call__"]) and seen["variant"] == ["fp16"] * 3  # text encoders, UNet, VAE


# --------------------------------------------------------------------------- the same tensors


@pytest.mark.slow
def test_one_batch_of_four_equals_four_accumulated(train, world):
    """Noise, late step, prompt and picture belong to a position. An Adam epsilon above every gradient keeps its steps proportional."""
    plain = dict(adam_epsilon=1.0, learning_rate=1.0, max_grad_norm=0.01, adam_weight_decay=0.0, max_train_steps=2, **world.pretraining)
    whole = train("whole", **plain, train_batch_size=4, decode_batch_size=3)
    parts = train("parts", **plain, train_batch_size=1, gradient_accumulation_steps=4)
    for name in ("loss", "reward", "pretrain_loss", "grad_norm"):
        assert runs.values(whole, name) == pytest.approx(runs.values(parts, name), rel=1e-3, abs=1e-5), name
    one, other, base_weights = saved(whole), saved(parts), saved(world.model)
    changed = max((one[name] - base_weights[name]).abs().max() for name in one)
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-2 * changed


@pytest.mark.slow
def test_no_two_pictures_of_a_run_start_from_the_same_noise(train, monkeypatch):
    """On the public code every rank drew the same."""
    seen, real = [], script.sd15_rollout.rollout
    monkeypatch.setattr(
        script.sd15_rollout,
        "rollout",
        lambda predict, stops, timetable, draw: (
            seen.extend(zip(draw("noise").flatten(1)[:, 0].tolist(), stops.tolist(), strict=True)),
            real(predict, stops, timetable, draw),
        )[1],
    )
    train(max_train_steps=4, train_batch_size=4, gradient_accumulation_steps=2, num_inference_steps=8, **LORA)
    noises, stops = zip(*seen, strict=True)
    assert len(set(noises)) == len(noises) == 32 and set(stops) == {6, 7}  # the last quarter of 8


LONG = dict(max_train_steps=5, checkpointing_steps=2, logging_steps=3, use_ema=True, lr_scheduler="cosine", eval_steps=3,
            eval_scorers="jpeg_incompressibility", gradient_accumulation_steps=2)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "lora"])
def test_resumed_equals_uninterrupted(train, world, monkeypatch, capsys, way):
    flags = LONG | (LORA | dict(lora_dropout=0.2, method="draft", draft_k=2) if way == "lora" else world.pretraining)
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
    assert runs.lines(whole) == runs.lines(parts)


@pytest.mark.slow
def test_xl_trains_too(world, tiny_sdxl_folder, tmp_path):
    out = tmp_path / "out"
    runs.train(script, replace(world, model=tiny_sdxl_folder, cache=tmp_path / "cache").argv(out, **LORA, max_train_steps=1))
    assert np.abs(shown(out, 1) - draw(tiny_sdxl_folder, lora_folder=out)).max() <= 1 and runs.values(out, "grad_norm")[0] > 0


# --------------------------------------------------------------------------- arguments


def test_defaults_that_depend_on_others(world):
    """ReFL's published step is one of 30 .. 39 of 40; its threshold 2 belongs to ImageReward's scale."""

    def parsed(**flags):
        return cli.parse(script.build_parser(), runs.command_line(pretrained_model_name_or_path=world.model, report_to="none", **flags))

    args = parsed()
    assert (args.scorer, args.mid_range, args.reward_threshold) == ("image_reward", [30, 39], 2.0)
    assert (args.learning_rate, args.resolution, args.num_inference_steps, args.grad_scale) == (1e-5, 512, 40, 1.0)
    beside = {scorer: parsed(pretrain_dataset_name="datas/photos", scorer=scorer).grad_scale
              for scorer in ("image_reward", "clip=0.5, image_reward=1", "clip", "tiny_clip=1.0")}  # fmt: skip
    assert list(beside.values()) == [1e-3, 1e-3, 1.0, 1.0]  # beside another loss: as published, for the scorer it was published for
    args = parsed(scorer="image_reward,clip", use_lora=True, num_inference_steps=1)
    assert (args.mid_range, args.reward_threshold, args.learning_rate) == ([0, 0], None, 1e-4)
    assert parsed(scorer="clip", method="draft").mid_range is None


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_nothing(world, tmp_path, capsys, monkeypatch):
    """Late step 3 of 4: 3 steps before, 1 with gradient; guidance doubles each.

    A forward pass of 1 GFLOP, 3 with its backward pass: 2 (3 * 1 + 1 * 3) and 3 of the pre-training loss for each of 2 pictures, 30; of
    draft, which recomputes 3 steps with gradient after 1 without, 2 (1 + 3 (3 + 1)) for each, 52. The VAE decodes in fp32.
    """
    monkeypatch.setattr(script.plan, "step_flops", lambda *_, **__: (10**9, 3 * 10**9))
    runs.train(script, world.argv(tmp_path / "out", dry_run=True, **world.pretraining))
    plan = capsys.readouterr().out
    count = sum(tensor.numel() for tensor in saved(world.model).values())
    for part in (f"{count:,} parameters", "6 of ", "2 evaluated every 100 steps", "8 for the pre-training loss", "3 of 2 drawn picture(s)",
                 "3 denoising steps without gradient, 1 with, 2 pass(es) each", "text cache", "kept of 4 picture(s)",
                 "decoding  ", "1 picture(s) at a time", "at the peak of a step; scorers come on top", "30 GFLOP per step"):  # fmt: skip
        assert part in plan, plan
    assert not (tmp_path / "out").exists()
    runs.train(script, world.argv(tmp_path / "out", dry_run=True, **LORA, method="draft", draft_k=3, mixed_precision="bf16"))
    plan, decoder = capsys.readouterr().out, script.sd15.parameter_counts(world.model)["vae"]
    assert "1 denoising steps without gradient, 3 with" in plan and "52 GFLOP per step" in plan
    assert re.search(rf"vae +{decoder:,} parameters +{re.escape(script.plan._size(4 * decoder))}", plan), plan


@pytest.mark.slow
def test_only_prompts_that_will_be_drawn_are_encoded_and_planned(world, train, tmp_path, monkeypatch, capsys):
    """2 steps of 1 picture draw 2 of 200 prompts, the evaluation has the first: with "" 3 or 4 texts."""
    (tmp_path / "many.txt").write_text("\n".join(f"picture number {i}" for i in range(200)))
    few = dict(prompts=tmp_path / "many.txt", max_train_steps=2, train_batch_size=1, num_eval_prompts=1, guidance_scale=1, **LORA)
    runs.train(script, world.argv(tmp_path / "plan", dry_run=True, **few))
    assert re.search(r"text cache +[34] entries", capsys.readouterr().out)
    encoded, prepare = [], script.inputs.prepare_texts

    def spy(run, args, prompts, family):
        encoded.append(set(prompts))
        return prepare(run, args, prompts, family)

    monkeypatch.setattr(script.inputs, "prepare_texts", spy)
    train(**few)
    assert 3 <= len(encoded[0]) <= 4 and {"", "picture number 0"} < encoded[0]


@pytest.mark.parametrize(
    ("flags", "before", "trained", "recomputed"),
    [
        (dict(method="draft", draft_k=3), 1, 3, True),  # of 4 steps
        (dict(method="draft", draft_k=1), 3, 1, False),
        (dict(method="draft_lv", num_renoised=2), 3, 1 + 2, False),
        (dict(mid_range=(2, 2)), 2, 1, False),
    ],
    ids=["draft", "draft of one", "draft_lv", "refl"],
)
def test_the_plan_knows_the_steps_of_its_method(world, tmp_path, monkeypatch, flags, before, trained, recomputed):
    planned = []
    monkeypatch.setattr(script.plan, "show_reward_gradient", lambda args, **named: planned.append(named))
    args = script.parse_args(world.argv(tmp_path / "out", dry_run=True, **flags))
    script.main(args)
    (plan,) = planned
    assert (plan["rollout_steps"], plan["trained_steps"], plan["recomputed"]) == (before, trained, recomputed)
    assert script.first_steps(args, (0, 0, [0, 1])).tolist() == [before] * 2


BAD = {  # what is wrong: flags, what the line must name, the cure in it
    "a scorer without gradient": (dict(scorer="jpeg_incompressibility"), "--scorer jpeg_incompressibility", "tiny_clip"),
    "one such in a mixture": (dict(scorer="tiny_clip,shapes"), "shapes has no gradient", "leave it out"),
    "a step beyond the last": (dict(mid_range=(2, 4)), "--mid_range 2 4", "try --mid_range 3 3"),
    "a range turned round": (dict(mid_range=(3, 1)), "--mid_range 3 1", "try"),
    "a range for DRaFT": (dict(mid_range=(1, 2), method="draft"), "--mid_range", "--method refl"),
    "more steps than there are": (dict(method="draft", draft_k=5), "--draft_k 5", "--num_inference_steps 4"),
    "K of ReFL": (dict(draft_k=2), "--draft_k 2", "--method draft"),
    "copies of DRaFT": (dict(method="draft", num_renoised=3), "--num_renoised 3", "draft_lv"),
    "too many steps": (dict(num_inference_steps=501), "--num_inference_steps 501", "at most 500"),
    "too few steps": (dict(num_inference_steps=2, mid_range=(1, 1)), "--num_inference_steps 2", "begin at timestep 501, where"),
    "settings of pictures that are not there": (dict(no_hflip=True), "--no_hflip", "--pretrain_dataset_name"),
    "a weight of nothing": (dict(pretrain_loss_weight=0.1), "--pretrain_loss_weight", "--pretrain_dataset_name"),
    "pictures that are not there": (dict(pretrain_dataset_name="./nowhere"), "--pretrain_dataset_name './nowhere'", "does not exist"),
    "rank without LoRA": (dict(rank=8), "--rank 8", "--use_lora"),
    "prompts that are not there": (dict(prompts="nowhere.txt"), "--prompts nowhere.txt", "give"),
    "a held-out scorer that is trained on": (dict(eval_scorers="tiny_clip"), "--eval_scorers", "leave it out"),
    "nothing to hold against": (dict(stop_if_eval_drops=0.1), "--stop_if_eval_drops", "--eval_scorers"),
    "another family": (dict(pretrained_model_name_or_path="models/tiny-sd3"), "--pretrained_model_name_or_path", "StableDiffusionPipeline"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_the_cure(world, tmp_path, capsys, what):
    flags, names, cure = BAD[what]
    with pytest.raises(SystemExit) as stop:
        script.parse_args(world.argv(tmp_path / "out", **flags))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and names in err and cure in err, err
    assert runs.files(tmp_path) == []


def test_a_model_for_few_steps_is_refused_by_name(world, tmp_path, capsys):
    """As sd-turbo and sdxl-turbo say it: their few steps end at the noisy end of the timesteps, which the rollout does not reach."""
    folder = unets.altered(world.model, tmp_path / "turbo", "scheduler/scheduler_config.json", timestep_spacing="trailing")
    with pytest.raises(SystemExit):
        script.parse_args(replace(world, model=folder).argv(tmp_path / "out"))
    error = capsys.readouterr().err
    assert f"--pretrained_model_name_or_path {folder}: " in error and "trailing" in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_rollout_of_few_steps_is_said_to_be_one(train, capsys):
    train(max_train_steps=1, **LORA)
    note = "note: --num_inference_steps 4: a rollout begins at timestep 751, where the model expects 24 % of a picture"
    assert note in capsys.readouterr().out


def test_imagerewards_list_is_taken_as_it_is(world, tmp_path):
    entries = [{"id": "000010-0137", "text": "a red ring"}, {"id": "000010-0138", "text": "a fox"}]
    (tmp_path / "refl_data.json").write_text(json.dumps(entries))
    args = script.parse_args(world.argv(tmp_path / "out", prompts=tmp_path / "refl_data.json"))
    assert [prompt.text for prompt in script.rewards.read_prompts(args).training] == ["a red ring", "a fox"]
