"""Validation and summary.png: the loss by a plain loop, pictures by the stock pipeline's seeds, what is kept and what is replaced."""

import argparse
import contextlib
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import runs
import torch
from PIL import Image

import train_text_to_image_lora_sd3 as script
from src import ema, inputs, lora, metrics, runtime, seeds, subject, validation
from src.data import buckets, samples
from src.pipelines import sd3

PROMPTS = ["a red heart", "a blue star " + "on a very long road " * 20]


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_world(tiny_sd3_folder, tmp_path_factory.mktemp("validation"))


@pytest.fixture(scope="module")
def parts(world, tmp_path_factory):
    """What a validator takes: the run, its arguments, data and model, with three held-out pictures and two prompts."""
    flags = dict(num_validation_loss_images=3, validation_prompt=PROMPTS, num_validation_images=2, validation_steps=2, caption_dropout=0.5)
    args = script.parse_args(world.argv(tmp_path_factory.mktemp("run") / "out", **flags))
    run = runtime.start(args)
    data = inputs.prepare(run, args)
    model = sd3.load(world.model, parts=("transformer",))
    torch.manual_seed(0)
    lora.add(model.transformer, rank=4, dropout=0.5)
    for tensor in lora.parameters(model.transformer):
        tensor.data.normal_(0, 0.3)
    yield SimpleNamespace(run=run, args=args, data=data, model=model)
    run.finish()


@pytest.fixture
def validator(parts, tmp_path):
    """A validator that writes into a folder of its own; its `args` and `run` may be changed."""

    def make(run=None, average=None, **changes):
        args = argparse.Namespace(**(vars(parts.args) | {"output_dir": tmp_path} | changes))
        run = run or parts.run
        log = metrics.Log(fake_run_of(tmp_path, args), every=1)
        return validation.Validator(run, args, parts.data, parts.model, log, loss=script.flow_matching_loss, average=average)

    return make


def fake_run_of(folder, args):
    """What metrics.Log takes of a run: one process without trackers."""
    return SimpleNamespace(output_dir=folder, args=args, world=1, is_main=True, accelerator=SimpleNamespace(log=lambda *a, **k: None))


def recorded(folder):
    return metrics.read(folder / "metrics.jsonl")


# ---------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_a_plain_loop_over_pictures_and_levels(parts, validator, tmp_path):
    """Each held-out picture at each level, one at a time: mean over pictures of |v - (noise - x0)|^2, captions kept, nothing flipped."""
    transformer, data = parts.model.transformer.eval(), parts.data
    losses = np.zeros((len(data.held_out), 4))
    for i in range(len(data.held_out)):
        sample = samples.collate([data.held_out[buckets.Key(i, 0, i)]])
        assert sample.prompts[0] == data.held_out.images.records[i].prompt
        x0, condition = data.encode(sample, 0, 0)
        for j, sigma in enumerate((0.25, 0.5, 0.75, 0.95)):
            noise = seeds.normal(0, 0, [4 * i + j], "validation", x0.shape[1:])
            x_t = (1 - sigma) * x0 + sigma * noise
            with torch.no_grad():
                velocity = transformer(x_t, encoder_hidden_states=condition.embeds, pooled_projections=condition.pooled,
                                       timestep=torch.tensor([1000 * sigma]), return_dict=False)[0]  # fmt: skip
            losses[i, j] = (velocity - (noise - x0)).square().mean().item()
    validator(validation_prompt=None).validate(7)
    (line,) = recorded(tmp_path)
    assert line["step"] == 7 and line["val_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    for j, sigma in enumerate((0.25, 0.5, 0.75, 0.95)):
        assert line[f"val_loss_sigma_{sigma}"] == pytest.approx(losses[:, j].mean(), rel=1e-4)
    assert not (tmp_path / "samples").exists(), "no prompts, no pictures"


def test_two_validations_of_the_same_weights_agree_and_dropout_is_off(parts, validator, tmp_path):
    parts.model.transformer.train()
    one = validator()
    one.validate(1)
    one.validate(2)
    first, second = recorded(tmp_path)
    assert first | {"step": 2} == second
    for path in (tmp_path / "samples" / "step-000001").iterdir():
        assert path.read_bytes() == (tmp_path / "samples" / "step-000002" / path.name).read_bytes()
    assert all(module.training for module in parts.model.transformer.modules()), "train mode is back"


def test_the_mode_comes_back_after_an_error(parts, validator):
    parts.model.transformer.train()
    broken = validator()
    broken.loss = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.validate(1)
    assert parts.model.transformer.training


def test_the_moving_average_is_validated_and_the_raw_weights_come_back(parts, validator, tmp_path):
    weights = lora.parameters(parts.model.transformer)
    average = ema.Ema(weights, 0.9)
    raw = [tensor.detach().clone() for tensor in weights]
    validator(validation_prompt=None).validate(1)
    with torch.no_grad():
        for tensor in weights:
            tensor.mul_(3)
    validator(validation_prompt=None, average=average).validate(1)  # a log of its own: metrics.jsonl begins anew
    with_average = recorded(tmp_path)[0]["val_loss"]
    for tensor, before in zip(weights, raw, strict=True):
        assert torch.equal(tensor, before * 3)
        tensor.data.copy_(before)
    validator(validation_prompt=None).validate(1)
    assert with_average == recorded(tmp_path)[0]["val_loss"]


class Half:
    """Process `rank` of two. Sums and gathers are put together by the test."""

    world, device, is_main = 2, torch.device("cpu"), False

    def __init__(self, rank, run):
        self.rank, self.accelerator = rank, SimpleNamespace(autocast=run.accelerator.autocast, reduce=lambda tensor, how: tensor)
        self.turns = functools.partial(runtime.Run.turns, self)

    def gather(self, tensor):
        return tensor


def test_a_validation_is_not_timed_and_runs_uncompiled(validator, monkeypatch):
    seen, one = [], validator(validation_prompt=None)

    @contextlib.contextmanager
    def inside(name):
        seen.append(name)
        yield
        seen.append(f"no longer {name}")

    monkeypatch.setattr(one.log, "untimed", lambda: inside("untimed"))
    monkeypatch.setattr(validation.speed, "as_written", lambda args: inside("as written"))
    one.measure = lambda: seen.append("measured") or {"val_loss": 1.0}
    one.validate(1)
    assert seen.index("measured") == 2 and set(seen[:2]) == {"untimed", "as written"}


@torch.no_grad()
def test_two_processes_share_the_work_and_find_the_same(parts, validator, tmp_path):
    """3 held-out pictures, so 2 and 1; 2 prompts x 2 seeds, so 2 and 2; of a single picture, both make the same one: a gather is even."""
    parts.model.transformer.eval()
    whole, halves = validator(), [validator(run=Half(rank, parts.run)) for rank in (0, 1)]
    losses = [half._losses() for half in halves]
    for name, value in whole._losses().items():
        assert losses[0][name] + losses[1][name] == pytest.approx(value, rel=1e-5)
    jobs = whole._render()
    shares = [half._render() for half in halves]
    assert [len(share) for share in shares] == [2, 2]
    assert (torch.cat(shares)[:4] - jobs).abs().max() <= 1 / 255 + 1e-6
    odd = [validator(run=Half(rank, parts.run), num_validation_images=1, validation_prompt=PROMPTS[:1])._render() for rank in (0, 1)]
    assert [len(share) for share in odd] == [1, 1]


# ---------------------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize(
    ("read", "flag"), [(inputs.validation_prompts, "validation_prompts_file"), (subject.class_prompts, "class_prompts_file")]
)
def test_a_prompts_file_loses_its_byte_order_mark_and_another_encoding_is_refused(tmp_path, read, flag):
    """Windows editors put U+FEFF first, which no tokenizer takes for a space."""
    file = tmp_path / "prompts.txt"
    args = argparse.Namespace(validation_prompt=["a fox"], class_prompt=["a fox"], **{flag: file})
    file.write_bytes("\ufeffa caf\u00e9\n\na fox\n".encode())
    assert read(args) == ["a fox", "a caf\u00e9"]
    file.write_bytes("a caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"--{flag} .*prompts.txt is not UTF-8 text"):
        read(args)
    setattr(args, flag, tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "an owl", "tag": 1}\n')
    assert read(args) == ["a fox", "an owl"]
    setattr(args, flag, tmp_path / "prompts.yaml")
    with pytest.raises(ValueError, match=f"--{flag} .*prompts.yaml: cannot be read as prompts; give a .txt, .json, .jsonl"):
        read(args)


def test_pictures_are_those_of_their_prompt_and_seed(parts, validator, tmp_path):
    """Prompt 1, seed 5 + 1, alone, by `render`."""
    one = validator(validation_seed=5, train_batch_size=3)
    one.validate(4)
    written = sorted(path.name for path in (tmp_path / "samples" / "step-000004").iterdir())
    assert written == ["00-5.png", "00-6.png", "01-5.png", "01-6.png"]
    args = one.args
    text, negative = parts.data.condition([PROMPTS[1]]), parts.data.condition([""])
    alone = sd3.render(parts.data.encoders, parts.model.transformer, text, negative=negative,
                       seeds=[6], height=32, width=32, num_inference_steps=args.validation_inference_steps,
                       guidance_scale=args.validation_guidance_scale)  # fmt: skip
    picture = Image.open(tmp_path / "samples" / "step-000004" / "01-6.png")
    assert picture.text["prompt"] == PROMPTS[1]
    assert Image.open(tmp_path / "samples" / "step-000004" / "00-6.png").text["prompt"] == PROMPTS[0]
    assert np.abs(np.asarray(picture, dtype=float) - 255 * alone[0].permute(1, 2, 0).numpy()).max() <= 1.5


def test_nothing_larger_than_a_training_batch_is_rendered_at_once(parts, validator, monkeypatch):
    sizes, render = [], sd3.render

    def counted(*args, **kwargs):
        sizes.append(len(kwargs["seeds"]))
        return render(*args, **kwargs)

    monkeypatch.setattr(sd3, "render", counted)
    validator(train_batch_size=3, validation_inference_steps=1)._render()
    assert sizes == [3, 1]


def test_without_guidance_no_empty_prompt_is_encoded(parts, validator, monkeypatch):
    asked, condition = [], inputs.Inputs.condition
    monkeypatch.setattr(inputs.Inputs, "condition", lambda self, prompts: asked.extend(prompts) or condition(self, prompts))
    validator(validation_guidance_scale=1.0, validation_inference_steps=1)._render()
    assert "" not in asked and set(asked) == set(PROMPTS)


def test_pictures_with_nan_are_refused_not_black(parts, validator, monkeypatch):
    monkeypatch.setattr(sd3, "render", lambda *_, seeds, **__: torch.full((len(seeds), 3, 32, 32), float("nan")))
    with pytest.raises(ValueError, match="NaN"):
        validator()._render()


def test_samples_that_an_earlier_run_left_are_replaced(validator, tmp_path):
    folder = tmp_path / "samples"
    for step in (0, 2, 400):
        (folder / f"step-{step:06d}").mkdir(parents=True)
        (folder / f"step-{step:06d}" / "09-9.png").write_bytes(b"old")
        (folder / f"step-{step:06d}.png").write_bytes(b"old")
    (folder / "step-notes.txt").write_text("mine")
    validator(validation_inference_steps=1).validate(2)  # a run continued before step 2
    kept = ["step-000000", "step-000000.png", "step-000002", "step-000002.png", "step-notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert not (folder / "step-000002" / "09-9.png").exists()
    validator(validation_inference_steps=1).validate(0)  # a fresh one
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000", "step-000000.png", "step-notes.txt"]


def test_the_grid_shows_before_and_after(validator, tmp_path):
    one = validator(validation_inference_steps=1)
    one.validate(0)
    one.validate(3)
    first, later = (Image.open(tmp_path / "samples" / f"step-{step:06d}.png") for step in (0, 3))
    assert first.height == later.height and later.width > first.width + 2 * 128


def test_before_stands_left_of_after_and_each_prompt_has_a_row(tmp_path, monkeypatch):
    """Two prompts with two seeds each; picture k has the grey level 10 k at step 0, and 100 + 10 k at step 3."""
    names, laid = [["00-5.png", "00-6.png"], ["01-5.png", "01-6.png"]], []

    def grid(cells, **named):
        laid.append(([cell.getpixel((0, 0))[0] for cell in cells], named["columns"], named["row_labels"], named["column_labels"]))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(validation.images, "grid", grid)
    album = validation.Album(fake_run_of(tmp_path, argparse.Namespace()), tmp_path, ["a", "b"], names)
    album.run.log_image = lambda *_: None
    for step, first in ((0, 0), (3, 100)):
        levels = torch.tensor([first + 10.0 * k for k in range(4)]) / 255
        album.save(step, levels.view(4, 1, 1, 1).expand(4, 3, 8, 8))
    assert laid[0] == ([0, 10, 20, 30], 2, ["a", "b"], ["step 0"] * 2)
    assert laid[1] == ([0, 10, 100, 110, 20, 30, 120, 130], 4, ["a", "b"], ["before"] * 2 + ["step 3"] * 2)


def test_the_grid_is_of_smaller_pictures_but_the_files_are_whole(tmp_path):
    album = validation.Album(fake_run_of(tmp_path, argparse.Namespace()), tmp_path, ["a cat"], [["00-0.png"]])
    album.run.log_image = lambda *_: None
    album.save(0, torch.zeros(1, 3, 1024, 1024))
    assert Image.open(tmp_path / "samples/step-000000/00-0.png").size == (1024, 1024)
    assert max(Image.open(tmp_path / "samples/step-000000.png").size) < 1024


# ---------------------------------------------------------------------------------------------- resumed at the last step


def test_a_line_that_is_there_is_not_written_again(tmp_path):
    """Killed between the last checkpoint's rename and the summary: the resumed run validates the last step once more."""
    run = fake_run_of(tmp_path, argparse.Namespace(max_train_steps=4, train_batch_size=1, gradient_accumulation_steps=1))
    lines = [{"step": 2, "val_loss": 3.0}, {"step": 4, "loss": 1.0}, {"step": 4, "val_loss": 2.0}]
    for kept in (3, 2):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:kept]))
        log = metrics.Log(run, every=1)
        log.load_state_dict({"step": 4, "written": 4, "window": {}})
        log.record(4, val_loss=2.0)
        assert recorded(tmp_path) == lines


# ---------------------------------------------------------------------------------------------- summary.png


def fake_run(folder: Path, steps, prompts=2, size=64, loss=lambda step: 1 / (1 + step)):
    """metrics.jsonl and samples as a run leaves them; sample (row, step) has red = step, green = 40 * row."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in steps:
        lines.append({"step": step, "loss": loss(step)})
        lines.append({"step": step, "val_loss": loss(step)} | {f"val_loss_sigma_{sigma}": 1.0 for sigma in validation.SIGMAS})
        (folder / "samples" / f"step-{step:06d}").mkdir(parents=True)
        for row in range(prompts):
            for seed in (9, 10):
                colour = (step, 40 * row, 255 if seed == 10 else 0)
                Image.new("RGB", (size, size), colour).save(folder / "samples" / f"step-{step:06d}" / f"{row:02d}-{seed}.png")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def colours(path):
    """Flat colours of at least a cell's size that are no grey: {(red, green, blue)}."""
    counts = Image.open(path).convert("RGB").getcolors(2**24)
    return {colour for count, colour in counts if count > 5000 and not colour[0] == colour[1] == colour[2]} | (
        {(0, 0, 0)} if any(count > 15000 and colour == (0, 0, 0) for count, colour in counts) else set()
    )


@pytest.mark.slow
def test_the_film_strip_goes_from_first_to_last(tmp_path):
    """9 validations, 5 prompts: 8 columns with first and last, the first 4 prompts, always the smallest seed (9 before 10)."""
    folder = fake_run(tmp_path, range(0, 180, 20), prompts=5)
    path = validation.summary(folder, ["p"] * 5)
    shown = colours(path)
    assert shown == {(step, 40 * row, 0) for step in (0, 20, 40, 60, 100, 120, 140, 160) for row in range(4)}


@pytest.mark.slow
def test_the_strip_of_large_pictures_stays_small(tmp_path):
    sheet = Image.open(validation.summary(fake_run(tmp_path, [5], prompts=1, size=1024), ["a"]))
    assert sheet.width == 1100 and sheet.height < 1000


@pytest.mark.parametrize(("count", "picked"), [(1, [0]), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 1, 2, 4, 5, 6]), (101, [0, 20, 40, 60, 80, 100])])
def test_columns_are_evenly_chosen_with_first_and_last(count, picked):
    assert validation._evenly(list(range(count)), 6) == picked


@pytest.mark.slow
def test_a_run_without_prompts_or_with_lost_samples_still_has_a_summary(tmp_path):
    folder = fake_run(tmp_path, [0, 5, 10])
    assert Image.open(validation.summary(folder, [])).height < 400  # curves alone
    (folder / "samples" / "step-000005" / "01-9.png").unlink()
    (folder / "samples" / "step-000005" / "01-10.png").unlink()  # a prompt that this step did not have
    assert {colour[0] for colour in colours(validation.summary(folder, ["a", "b"]))} == {0, 10}


@pytest.mark.slow
def test_curves_take_gaps_of_non_finite_values_and_any_number_of_points(tmp_path):
    folder = fake_run(tmp_path, range(0, 60, 2))
    lines = metrics.read(folder / "metrics.jsonl")
    for line in lines[10:14]:
        line.update({name: None for name in line if name != "step"})  # how Log writes NaN
    for kept in (lines, [{"step": 1, "lr": 0.1}]):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        assert validation.summary(folder, ["a"]).exists()


def test_a_run_that_only_validates_has_the_curves_of_that(tmp_path):
    """Resumed in another folder where nothing is left to train: no line of it has a training loss."""
    folder = fake_run(tmp_path, [4])
    lines = [line for line in metrics.read(folder / "metrics.jsonl") if "loss" not in line]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert validation.summary(folder, ["a", "b"]).exists()


def test_the_summary_has_the_panels_of_its_algorithm(validator, tmp_path, monkeypatch):
    done, one = [], validator()
    monkeypatch.setattr(validation, "summary", lambda *given: done.append(given))
    monkeypatch.setattr(one, "validate", done.append)
    one.panels = {"accuracy, held out": "val_accuracy"}
    one.validate_last(9)
    assert done == [9, (tmp_path, PROMPTS, one.panels)]


def test_a_levels_change_is_in_percent_of_its_first_value():
    """2 -> 3 is +50 %, 4 -> 3 is -25 %, 1 -> 1 nothing."""
    axis, levels = mock.Mock(), [f"val_loss_sigma_{sigma}" for sigma in validation.SIGMAS]
    lines = [{"step": 0} | dict(zip(levels, (2.0, 4.0, 1.0, 1.0), strict=True)), {"step": 8} | dict.fromkeys(levels[:2], 3.0)]
    validation._changes(axis, lines, lambda share: share)
    drawn = [call.args for call in axis.plot.call_args_list]
    assert drawn == [((0, 8), (0.0, 50.0)), ((0, 8), (0.0, -25.0)), ((0,), (0.0,)), ((0,), (0.0,))]


def test_the_running_mean_by_hand():
    """40 points 0..39: half a window is 2 points; the mean of i-2..i+2 is i, at the ends that of what there is."""
    smooth = validation._smoothed([(10 * i, float(i)) for i in range(40)])
    assert smooth[20] == (200, 20.0) and smooth[0] == (0, 1.0) and smooth[39] == (390, 38.0)
