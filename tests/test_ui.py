"""What stands behind the page's button: the command line's own pictures, refusals and scores, one at a time; and the run's album."""

import html
import json
import math
import shlex
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import runs
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import demo
from src import cli, gallery, scorers, ui
from src.pipelines import stock

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def lora_folder(tiny_sd3_folder, tmp_path_factory):
    return runs.save_lora(tiny_sd3_folder, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def no_gradio_needed(monkeypatch):
    monkeypatch.setattr(cli.environment, "check_page", lambda host, port: None)


@pytest.fixture(scope="module")
def studio(tiny_sd3_folder, lora_folder, tmp_path_factory):
    """The tiny random model with a LoRA, 2 steps, judged by two scorers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.environment, "check_page", lambda host, port: None)
        args = demo.parse_args([str(word) for word in (
            "--ui", "--pretrained_model_name_or_path", tiny_sd3_folder, "--lora_weights_path", lora_folder, "--num_inference_steps", 2,
            "--output_dir", tmp_path_factory.mktemp("out"), "--scorer", "shapes,jpeg_compressibility",
        )])  # fmt: skip
    return ui.Studio(demo.build_parser(), args, *demo.load(args), demo.render, demo.check_flags)


def wish(prompt="a red heart", seed=3, scale=1.0, guidance=2.0, negative=""):
    return ui.Wish(prompt, negative, seed, 2, guidance, scale)


def draw(studio, *args, **kwargs):
    return list(studio.draw(wish(*args, **kwargs), lambda *progress: None))


def pixels(shown):
    return [np.asarray(Image.open(one.path)) for one in shown]


# --------------------------------------------------------------------------- pictures


@pytest.mark.slow
def test_the_page_draws_what_the_command_beside_it_draws(studio, tmp_path):
    """After another scale, guidance and prompt were drawn: nothing of them may be left."""
    draw(studio, "a blue star", seed=9, scale=2.0, guidance=1.0)
    asked = wish('it\'s a "heart"; $(ls)', scale=-0.35, guidance=3.5, negative="-blue")
    shown = list(studio.draw(asked, lambda *progress: None))
    words = shlex.split(studio.command(asked))
    assert words[:2] == ["python", "demo.py"]
    demo.main(demo.parse_args([*words[2:], "--output_dir", str(tmp_path)]))
    drawn = sorted(path for path in tmp_path.glob("*.png") if path.name != "grid.png")
    assert [one.column for one in shown] == ["base", "tuned"] and len(drawn) == 2
    assert all(map(np.array_equal, pixels(shown), (np.asarray(Image.open(path)) for path in drawn)))
    assert not np.array_equal(*pixels(shown)), "the LoRA changes the picture"
    for one, path in zip(shown, drawn, strict=True):  # and says the same about itself
        kept, expected = Image.open(one.path).text, Image.open(path).text
        assert {name: kept[name] for name in expected} == expected and json.loads(kept["scores"]) == one.scores


def test_the_page_opens_with_what_was_given_else_with_what_suits_the_model(studio):
    first = studio.first_wish("a red heart")
    assert (first.num_inference_steps, first.guidance_scale) == (2, 4.5)


def test_the_scale_changes_without_loading_anything(studio, monkeypatch):
    monkeypatch.setattr(stock, "load", None)
    full, zero, again = (pixels(draw(studio, scale=scale)) for scale in (1.0, 0.0, 1.0))
    assert np.array_equal(zero[0], zero[1]) and np.array_equal(zero[0], full[0]), "scale 0 is the base model, which has no scale"
    assert not np.array_equal(full[0], full[1]) and np.array_equal(full[1], again[1])


def test_progress_is_told_step_by_step(studio):
    told = []
    list(studio.draw(wish(), lambda *progress: told.append(progress)))
    assert told == [("base", 1, 2), ("base", 2, 2), ("tuned", 1, 2), ("tuned", 2, 2)]


def test_every_picture_is_kept_under_a_number_of_its_own(studio):
    one, two = draw(studio), draw(studio)
    assert len({shown.path for shown in one + two}) == 4
    assert gallery.next_index(studio.args.output_dir) == int(two[0].path.name.split("-")[0]) + 1


def test_numbers_go_on_after_those_in_the_folder(tmp_path):
    assert gallery.next_index(tmp_path / "none") == gallery.next_index(tmp_path) == 0
    for name in ("000-a-seed0.png", "1007-a-seed0.png", "grid.png", "2000-notes.txt", "2001dogs-x.png", "20-x.png"):
        (tmp_path / name).touch()
    assert gallery.next_index(tmp_path) == 1008


def test_visitors_wait_for_each_other_and_each_gets_his_own_scale(studio, tmp_path):
    """Four at once; the pretended drawing sleeps between setting the scale and reading it."""
    pipeline = SimpleNamespace(set_adapters=lambda name, scale: setattr(pipeline, "scale", scale))
    at_work, seen = [], []

    def render(pipeline, scorer, jobs, column, args, on_step):
        at_work.append(column)
        time.sleep(0.01)
        seen.append((len(at_work), pipeline.scale == args.lora_scale))
        at_work.pop()
        return [(tmp_path / f"{jobs[0].index}-{column}.png", Image.new("RGB", (8, 8)), {}, False)]

    busy = ui.Studio(studio.parser, studio.args, pipeline, None, render, demo.check_flags)
    paths = []
    threads = [threading.Thread(target=lambda scale=scale: paths.extend(one.path for one in draw(busy, scale=scale))) for scale in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(1, True)] * 8 and len(set(paths)) == 8


@pytest.mark.parametrize(("changes", "words"), [
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"seed": None}, "the seed must be a whole number"),
    ({"seed": -1}, "the seed must be a whole number"),
    ({"seed": 2**53}, "the seed must be a whole number"),
    ({"negative": "x", "guidance": 1.0}, "--negative_prompt x has no effect without --guidance_scale above 1"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_before_anything_is(studio, changes, words):
    before = runs.files(studio.args.output_dir)
    with pytest.raises(ValueError, match=words):
        draw(studio, **changes)
    assert runs.files(studio.args.output_dir) == before


# --------------------------------------------------------------------------- scores


def test_a_prompt_that_one_scorer_cannot_judge_is_judged_by_the_others(studio):
    shown = draw(studio, "two cats")
    assert set(shown[0].scores) == {"jpeg_compressibility", "total"}
    card = ui.score_card(studio.scorer, "two cats", shown[0].scores)
    assert "not judged" in card and "it names no shape" in card and f"{shown[0].scores['jpeg_compressibility']:.3g}" in card
    shapes = scorers.build("shapes")
    assert ui.judges(shapes, "two cats")[0] is None and ui.judges(shapes, "a red heart")[0].names == ["shapes"]


def test_a_card_by_hand():
    """shapes ranges from 0 to 1, jpeg_compressibility from -120 to -5: -97 is (120 - 97) / 115 = 20 % of the way."""
    mixture = scorers.build("shapes,jpeg_compressibility")
    scores, base = {"shapes": 2 / 3, "jpeg_compressibility": -97.0}, {"shapes": 1 / 3, "jpeg_compressibility": -96.5}
    card = ui.score_card(mixture, "a heart", scores, base)
    assert '<span class="change better">+0.333</span>0.667' in card and "width: 66.7%" in card
    assert '<span class="change worse">-0.5</span>-97' in card and "width: 20.0%" in card
    for name in mixture.names:
        assert scorers.get(name).summary in card and "{:g} to {:g}".format(*scorers.get(name).range) in card
    assert "±0" in ui.score_card(mixture, "a heart", scores, scores)
    assert "change" not in ui.score_card(mixture, "a heart", {"shapes": 0.5, "jpeg_compressibility": -97.0})
    assert "no verdict" in ui.score_card(mixture, "a heart", {"shapes": math.nan, "jpeg_compressibility": -97.0})
    assert "width: 100.0%" in ui.score_card(mixture, "a heart", {"shapes": 1.5, "jpeg_compressibility": -97.0})
    assert "--scorer" in ui.score_card(None, "a heart", {})


def test_a_picture_that_the_safety_checker_blacked_out_says_so(studio, monkeypatch):
    """Of base and tuned, the checker takes the base model's for unsafe."""
    hits = iter([[True], [False]])
    real = demo.draw
    monkeypatch.setattr(demo, "draw", lambda *given: SimpleNamespace(images=real(*given).images, nsfw_content_detected=next(hits)))
    base, tuned = draw(studio)
    assert base.blacked_out and all(map(math.isnan, base.scores.values())) and set(base.scores) == set(tuned.scores)
    assert not tuned.blacked_out and all(map(math.isfinite, tuned.scores.values()))
    reason = "the model's safety checker blacked the picture out"
    assert reason in html.unescape(ui.score_card(studio.scorer, "a red heart", base.scores, blacked_out=True))
    assert reason not in html.unescape(ui.score_card(studio.scorer, "a red heart", tuned.scores, base.scores))
    note = ui.caption(studio, wish(), [base, tuned], 1.0)
    assert f"the model's safety checker blacked out 1 of 2 picture(s), which are not scored: {base.path.name}" in note
    assert "safety" not in ui.caption(studio, wish(), [tuned], 1.0)


# --------------------------------------------------------------------------- the run's album


def make_run(folder, steps=(0, 100, 20), seeds=(9, 10), prompts=("a red heart", "ünï <b>")):
    for step in steps:
        (folder / "samples" / f"step-{step:06d}").mkdir(parents=True)
        for number, prompt in enumerate(prompts):
            for seed in seeds:
                info = PngInfo()
                info.add_itxt("prompt", prompt)
                path = folder / "samples" / f"step-{step:06d}" / f"{number:02d}-{seed}.png"
                Image.new("RGB", (64, 64), (step, 99 * number, seed)).save(path, pnginfo=info)
        Image.new("RGB", (64, 64)).save(folder / "samples" / f"step-{step:06d}.png")  # the grid, which is no step
    return folder


def test_the_album_has_every_step_in_order_with_the_prompts(tmp_path):
    found = ui.album(make_run(tmp_path))
    assert list(found) == [0, 20, 100]
    names = [f"{prompt:02d}-{seed}.png" for prompt in range(2) for seed in (9, 10)]
    assert [Path(path).name for path, _ in found[20]] == names
    assert [prompt for _, prompt in found[20]] == ["a red heart"] * 2 + ["ünï <b>"] * 2
    Image.new("RGB", (8, 8)).save(found[0][3][0])  # of a run before prompts were written into the files
    assert [prompt for _, prompt in ui.album(tmp_path)[0]] == ["a red heart"] * 2 + ["ünï <b>", "prompt 1"]


def test_the_run_of_weights_is_found_from_its_folder_a_checkpoint_or_a_file(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "checkpoint-20").mkdir()
    for weights in (run, run / "checkpoint-20", run / "w.safetensors", run / "checkpoint-20" / "w.safetensors"):
        assert ui.run_folder(weights) == run
    assert ui.run_folder(tmp_path / "elsewhere" / "model") is None


# --------------------------------------------------------------------------- the page


class Part:
    """A component: how it was made, and what its events call."""

    def __init__(self, given, options):
        self.given, self.options, self.events = given, options, {}

    def __getattr__(self, event):
        return lambda *given, **_: self.events.setdefault(event, given)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Gradio:
    """Stands for gradio, which the tests do without: the parts of a page by elem_id, or else by kind, and what the button calls."""

    def __init__(self):
        self.parts = {}

    def __getattr__(self, kind):
        def make(*given, **options):
            part = Part(given, options)
            self.parts[options.get("elem_id", kind)] = part
            return part

        return make

    def on(self, events, press, inputs, outputs, **_):
        self.press, self.inputs = press, inputs

    def update(self, **changes):
        return changes


@pytest.fixture
def gradio(monkeypatch):
    page = Gradio()
    monkeypatch.setitem(sys.modules, "gradio", page)
    return page


def test_the_button_draws_what_the_controls_say_and_compares_the_second_picture_with_the_first(studio, gradio):
    ui.build(studio, ["a red heart", "a blue star"], None)
    assert gradio.parts["prompt"].given == ("a red heart",), "the first prompt is filled in"
    values = {"prompt": "a blue star", "negative": "dull", "seed": 5, "steps": 2, "guidance": 3.5, "lora_scale": 0.5}
    told = []
    cleared, base, tuned, last = gradio.press(
        *(values[part.options["elem_id"]] for part in gradio.inputs), progress=lambda done, desc: told.append(done)
    )
    command, cards = gradio.parts["command"], [gradio.parts[f"{column}-scores"] for column in ("base", "tuned")]
    assert last[command]["value"] == studio.command(ui.Wish("a blue star", "dull", 5, 2, 3.5, 0.5))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)], "one bar over both pictures"
    assert "change" not in base[cards[0]] and "change" in tuned[cards[1]] and not cleared[cards[0]]
    assert [Path(shown[gradio.parts[column]]["value"]).is_file() for column, shown in (("base", base), ("tuned", tuned))] == [True, True]


def test_the_album_opens_with_the_first_step_beside_the_last(studio, gradio, tmp_path):
    ui.build(studio, ["a red heart"], make_run(tmp_path))
    step, first, chosen, summary = gradio.parts["Blocks"].events["load"][0]()
    assert step == {"choices": [0, 20, 100], "value": 100} and (first["label"], chosen["label"]) == ("Step 0", "Step 100")
    assert "step-000000" in first["value"][0][0] and "step-000100" in chosen["value"][0][0] and summary is None


# --------------------------------------------------------------------------- flags


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        demo.parse_args(list(argv))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1
    return text


@pytest.mark.parametrize(("argv", "words"), [
    (["--ui_port", "7000"], "--ui_port 7000 has no effect without --ui"),
    (["--ui_host", "0.0.0.0"], "--ui_host 0.0.0.0 has no effect without --ui"),
    (["--ui", "--compare"], "--compare True has no effect with --ui, which always compares"),
    (["--ui", "--num_images", "2"], "--num_images 2 has no effect with --ui"),
    (["--ui", "--batch_size", "2"], "--batch_size 2 has no effect with --ui"),
])  # fmt: skip
def test_flags_without_effect_on_the_page_are_refused(argv, words, capsys, no_gradio_needed):
    assert words in refusal(capsys, *argv)


def test_a_page_that_cannot_be_served_is_one_line(capsys, monkeypatch):
    installed = cli.installed
    monkeypatch.setattr(cli.environment, "installed", lambda package: package != "gradio" and installed(package))
    assert f"--ui needs gradio, which is not installed: {sys.executable} -m pip install {cli.GRADIO}" in refusal(capsys, "--ui")
    monkeypatch.setattr(cli.environment, "installed", lambda package: True)
    monkeypatch.setattr(cli.environment.importlib.metadata, "version", lambda package: "5.49.1")
    assert f"--ui does not know gradio 5.49.1: {sys.executable} -m pip install {cli.GRADIO}" in refusal(capsys, "--ui")
    monkeypatch.setattr(cli.environment.importlib.metadata, "version", lambda package: cli.GRADIO.split("==")[1])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--ui_port {port}: cannot listen on 127.0.0.1" in refusal(capsys, "--ui", "--ui_port", str(port))
    line = refusal(capsys, "--ui", "--ui_port", "65536")
    assert "--ui_port 65536: cannot listen" in line and int(line.split("--ui_port ")[-1]) < 65536, "the cure is a port that exists"


def test_the_tested_gradio_is_in_the_range_that_setup_states():
    major = cli.GRADIO.split("==")[1].split(".")[0]
    assert f'"gradio>={major}.' in (ROOT / "setup.py").read_text() and f",<{int(major) + 1}" in (ROOT / "setup.py").read_text()


def test_the_tiny_world_is_judged_by_its_own_scorers_unless_told_otherwise(tiny_sd3_folder, no_gradio_needed, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert demo.parse_args(["--ui"]).scorer == "shapes,tiny_clip" and demo.parse_args([]).scorer is None
    assert demo.parse_args(["--ui", "--scorer", "shapes"]).scorer == "shapes"
    assert demo.parse_args(["--ui", "--pretrained_model_name_or_path", str(tiny_sd3_folder)]).scorer is None


def test_a_command_says_what_was_parsed_and_nothing_more():
    """Every kind of flag: repeated, a list in one word, a path, a switch, a negative number; defaults are left out."""
    parser = demo.build_parser()
    argv = ["--prompt", "a=b", "--prompt=-b 'c'", "--seed", "4", "--skip_layer_guidance", "2.8", "--skip_layers", "1,2",
            "--lora_weights_path", "a b/c", "--lora_scale=-0.5", "--compare"]  # fmt: skip
    args = parser.parse_args([*argv, "--output_dir", "x"])
    assert cli.command_line(parser, args, ("what to draw", "model")) == argv
