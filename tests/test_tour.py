"""The tour: what is run, skipped and resumed, with shell scripts for trainers; what is measured; the table and the picture."""

import importlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from PIL import Image
from safetensors.torch import save_file

from src import cli, images
from src.tiny import evaluate, pairs, shapes, tour, tour_measure, tour_report

# ---------------------------------------------------------------------------------------------- stand-ins

# Takes --output_dir as its 4th word (after the recipe's two): says what it would run, or "trains" as the file `behaviour` says.
WRAPPER = """#!/usr/bin/env bash
if [ "${PRINT_COMMAND:-}" = 1 ]; then echo python train.py $(cat recipe) "$@"; exit; fi
echo "train $*" >> calls
folder=$2
case "$(cat behaviour)" in
  breaks) echo one; echo "the reason"; exit 3 ;;
  stops) mkdir -p "$folder/checkpoint-1"; exit 0 ;;
  waits) trap 'echo saved > saved; exit 0' TERM; touch waiting; while true; do sleep 0.02; done ;;
esac
echo card > "$folder/README.md"
"""
PYTHON = """#!/usr/bin/env bash
shift; module=$1; shift; echo "$module $*" >> calls
case "$module" in
  src.tiny.tour_measure) echo '{"trained": {"kind": "LoRA", "model": "m", "parameters": 1, "steps": 2, "memory_gb": 1.5},
                                "measures": [], "shown": []}' > "$3/measures.json" ;;
  *) [ ! -e "$2" ] && mkdir "$2" && touch "$2/made" ;;
esac
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a wrapper and a Python that only note their calls; `calls()` reads them, `stop` is the tour's LoRA."""
    monkeypatch.chdir(tmp_path)
    for name, text in ((tour.TRAINERS["lora"].wrapper, WRAPPER), ("python", PYTHON)):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
        Path(name).chmod(Path(name).stat().st_mode | stat.S_IXUSR)
    Path("recipe").write_text("--rank 4")
    Path("behaviour").write_text("trains")
    monkeypatch.setattr(tour.sys, "executable", str(tmp_path / "python"))

    def visit():
        with tour.Shell() as shell:
            return tour.visit(shell, tour.Stop("lora", Path("out")))

    def calls():
        return [line.split()[0] for line in Path("calls").read_text().splitlines()] if Path("calls").exists() else []

    return SimpleNamespace(visit=visit, calls=calls, folder=Path("out/lora"))


# ---------------------------------------------------------------------------------------------- run, skip, resume


def test_a_stop_is_trained_and_measured_once(world):
    result = world.visit()
    assert world.calls() == ["train", "src.tiny.tour_measure"]
    assert result["title"] == "LoRA" and result["command"].startswith("python train.py --rank 4 --output_dir out/lora --report_to none")
    assert 0 < result["seconds"] < 60 and result["trained"]["memory_gb"] == 1.5
    assert "--num_prompts 128 --num_inference_steps 20" in Path("calls").read_text()
    assert world.visit() == result and len(world.calls()) == 2
    assert json.loads((world.folder / "result.json").read_text()) == result


def test_a_changed_recipe_is_trained_anew_in_an_empty_folder(world):
    world.visit()
    (world.folder / "checkpoint-9").mkdir()
    Path("recipe").write_text("--rank 8")
    assert "--rank 8" in world.visit()["command"]
    assert world.calls().count("train") == 2 and not (world.folder / "checkpoint-9").exists()


def test_other_measuring_measures_again_and_does_not_train(world, monkeypatch):
    seconds = world.visit()["seconds"]
    monkeypatch.setattr(tour.Stop, "settings", property(lambda stop: {"num_prompts": 7, "num_inference_steps": 20}))
    assert world.visit()["seconds"] == seconds
    assert world.calls() == ["train", "src.tiny.tour_measure", "src.tiny.tour_measure"]


def test_a_failure_names_step_log_reason_and_cure_and_the_next_start_goes_on(world):
    Path("behaviour").write_text("breaks")
    with pytest.raises(tour.StopError) as error:
        world.visit()
    text = str(error.value)
    assert text.startswith("error: lora: train ended with 3. The end of out/lora/train.log:\n    one\n    the reason\nCure: run the same")
    assert error.value.code == 1 and "delete out/lora" in text
    (world.folder / "checkpoint-5").mkdir()
    Path("behaviour").write_text("trains")
    world.visit()
    assert world.calls() == ["train", "train", "src.tiny.tour_measure"] and (world.folder / "checkpoint-5").exists()
    assert "--resume_from_checkpoint latest" in Path("calls").read_text().splitlines()[1]


def test_a_training_that_was_told_to_stop_is_not_taken_for_a_finished_one(world):
    """A trainer that saves on SIGTERM ends with 0, without its model card."""
    Path("behaviour").write_text("stops")
    with pytest.raises(tour.StopError, match="goes on from the last checkpoint"):
        world.visit()
    assert world.calls() == ["train"] and not (world.folder / "result.json").exists()
    first = json.loads((world.folder / "tour.json").read_text())["seconds"]
    Path("behaviour").write_text("trains")
    assert world.visit()["seconds"] > first > 0  # both parts count
    assert (world.folder / "checkpoint-1").exists()


def test_told_to_stop_the_tour_lets_the_trainer_save_first(world):
    Path("behaviour").write_text("waits")

    def terminate():
        while not Path("waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    with pytest.raises(tour.StopError, match="the same command goes on") as error:
        world.visit()
    thread.join()
    assert Path("saved").exists() and error.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before and "src.tiny.tour_measure" not in world.calls()


def test_the_seconds_of_a_killed_training_count_up_to_its_last_line(world):
    """Began at 1000 after 5 seconds of an earlier part, killed; its metrics were written last at 1030: 35 seconds."""
    stop = tour.Stop("lora", Path("out"))
    stop.folder.mkdir(parents=True)
    tour.write(stop.folder / "tour.json", {"command": "c", "seconds": 5.0, "began": 1000.0})
    (stop.folder / "metrics.jsonl").write_text("")
    os.utime(stop.folder / "metrics.jsonl", (1030, 1030))
    assert tour.begin(stop, "c") == {"command": "c", "seconds": 35.0, "began": None}
    assert tour.begin(stop, "c")["seconds"] == 35.0  # once


def test_a_missing_data_set_is_made_first_and_half_of_one_is_none(world):
    Path("recipe").write_text("--dataset_name datas/pairs --other datas/unknown")
    Path("datas/pairs.partial").mkdir(parents=True)
    (Path("datas/pairs.partial") / "half").touch()
    world.visit()
    assert world.calls() == ["src.tiny.pairs", "train", "src.tiny.tour_measure"]
    assert sorted(map(str, Path("datas").rglob("*"))) == ["datas/pairs", "datas/pairs/made"]
    assert "--output datas/pairs.partial --num_prompts 1280" in Path("calls").read_text()


def main(*argv):
    return tour.main(cli.parse(tour.build_parser(), list(argv), checks=(tour.check,)))


def result_of(name="lora", **changes):
    measure = {"title": "hearts", "scorer": tour_report.STRICT, "guidance_scale": 2.0, "count": 8, "before": 0.0, "after": 0.625}
    return {
        "name": name, "title": tour.TRAINERS[name].title, "seconds": 93.7, "machine": "2 CPU cores (x86_64), torch 2.15.0",
        "settings": {"num_prompts": 8, "num_inference_steps": 20},
        "trained": {"kind": "LoRA", "model": "tiny-sd3", "parameters": 612_345, "steps": 450, "memory_gb": 1.234},
        "measures": [measure], "shown": [],
    } | changes  # fmt: skip


def test_the_whole_tour_visits_in_order_and_a_later_part_still_shows_all(monkeypatch, tmp_path, capsys):
    """First dpo and lora, then refl alone: the table has the three, in the order of TRAINERS."""
    done = {}

    def visit(shell, stop):
        done[stop.name] = result_of(stop.name)
        stop.folder.mkdir(parents=True)
        (stop.folder / "result.json").write_text("{}")
        return done[stop.name]

    monkeypatch.setattr(tour, "visit", visit)
    monkeypatch.setattr(tour.Stop, "command", lambda stop: "c")
    monkeypatch.setattr(tour.Stop, "result", lambda stop, command: done.get(stop.name))
    main("dpo", "lora", "--output_dir", str(tmp_path))
    assert list(done) == ["lora", "dpo"] and "== 2/2 Diffusion-DPO: TINY=1 bash scripts/train_dpo_sd_v1_5.sh" in capsys.readouterr().out
    table = main("refl", "--output_dir", str(tmp_path))
    assert re.findall(r"^\| (\S+) +\| LoRA", table, re.M) == ["LoRA", "Diffusion-DPO", "ReFL"]
    assert (tmp_path / "table.md").read_text() == table and table in capsys.readouterr().out
    assert Image.open(tmp_path / "tour.png").size[1] > 300
    main("full", "--output_dir", str(tmp_path), "--quick")
    assert (tmp_path / "table.md").read_text().startswith("A quick tour: a few steps each. These figures say that everything runs, and")


@pytest.mark.parametrize(("argv", "line"), [
    (["lorax"], "unknown trainer 'lorax'; choose from lora, full, dreambooth"),
    (["--write", "--quick"], "leave out --quick"),
    (["--write", "lora", "dpo"], "leave out lora dpo"),
    (["--output_dir", "README.md/x"], "is not a folder"),
])  # fmt: skip
def test_what_the_tour_refuses(argv, line, monkeypatch, capsys):
    monkeypatch.chdir(runs.ROOT)
    with pytest.raises(SystemExit) as exit_:
        cli.parse(tour.build_parser(), argv, checks=(tour.check,))
    assert exit_.value.code == 2 and line in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- recipes


def test_all_trainers_are_visited_by_their_wrappers():
    launched = {re.search(r"launch (train_\w+\.py)", (runs.ROOT / one.wrapper).read_text())[1] for one in tour.TRAINERS.values()}
    assert launched <= {path.name for path in runs.ROOT.glob("train_*.py")} and len(tour.TRAINERS) == len(launched) == 7


def test_the_pairs_are_those_of_the_page():
    module, arguments = tour.DATASETS["datas/pairs"]
    assert f"`python -m {module} --output datas/pairs {arguments}` made them" in (runs.ROOT / "docs/dpo.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", tour.TRAINERS)
def test_every_recipe_takes_what_the_tour_adds(name, tmp_path, monkeypatch):
    """The command that the wrapper prints, parsed by its program with all refusals, as it stands and cut down to a few steps."""
    monkeypatch.chdir(runs.ROOT)
    for key in ("ACCELERATE_ARGS", "NUM_PROCESSES", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    drawn = [shapes.draw(drawing, 64) for drawing in shapes.drawings(8, seed=3)]
    pairs.write(tmp_path / "pairs", [(f"a red star {i}", drawn[i], drawn[i + 4]) for i in range(4)])
    for quick in (False, True):
        stop = tour.Stop(name, tmp_path, quick)
        python, script, *words = shlex.split(stop.command())
        if name == "dpo" and not quick:  # its pairs are made by the tour
            words = [str(tmp_path / "pairs") if word == "datas/pairs" else word for word in words]
        args = importlib.import_module(script.removesuffix(".py")).parse_args(words)
        assert python == "python" and args.output_dir == stop.folder and args.resume_from_checkpoint == "latest" and args.seed == 0
        if quick:
            assert (getattr(args, "max_train_steps", None) or args.num_epochs) <= 2


# ---------------------------------------------------------------------------------------------- measuring


class Painter:
    """Stands for a pipeline: draws what the prompt asks for, but in another colour for the first `wrong` seeds; counts its calls."""

    def __init__(self, wrong=0):
        self.wrong, self.calls = wrong, 0

    def __call__(self, *, prompt, generator, **options):
        self.calls += 1
        drawn = []
        for text, source in zip(prompt, generator, strict=True):
            asked = shapes.read_caption(text)
            color = asked.color or "purple"
            if source.initial_seed() < self.wrong:
                color = next(other for other in shapes.COLORS if other not in (color, asked.background))
            drawing = shapes.Drawing(asked.shape or "heart", color, asked.background, "large", "in the centre", (0.5, 0.5), 0.29)
            drawn.append(shapes.draw(drawing, 64))
        return SimpleNamespace(images=torch.stack(drawn))


REWARDED = {"scorer": "jpeg_compressibility=2", "eval_guidance_scale": 1.0}


def test_what_each_trainer_is_measured_by():
    titles = {name: [one.title for one in tour_measure.series_of(name, REWARDED, 8)] for name in tour.TRAINERS}
    assert titles["lora"] == titles["full"] == ["hearts, new to the model", "known shapes"]
    assert titles["dreambooth"] == ["the subject, a purple heart", "its class, other shapes"]
    assert titles["ddpo"] == titles["grpo"] == titles["refl"] == titles["dpo"] == ["known shapes"]
    (rewarded,), (strict,) = (tour_measure.series_of("grpo", {"scorer": spec, "eval_guidance_scale": 3.0}, 8)
                              for spec in ("shapes=1,tiny_clip=0.5", "shapes_strict"))  # fmt: skip
    assert rewarded.scorers == ("shapes", "tiny_clip", "shapes_strict") and rewarded.guidance_scale == 3.0
    assert strict.scorers == ("shapes_strict",)
    hearts, known = tour_measure.series_of("lora", {}, 8)
    assert all("heart" in prompt for prompt in hearts.prompts) and known.prompts == tuple(shapes.held_out_prompts(8))


def test_the_subject_counts_by_its_shape_and_colour_alone():
    """8 prompts with sks, the first 3 in another colour: 5 of 8; in front of any background."""
    (subject, _) = tour_measure.series_of("dreambooth", {}, 8)
    verdicts = tour_measure.judge(subject, tour_measure.draw(Painter(wrong=3), subject, 1))[tour_report.STRICT]
    assert verdicts.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


def test_base_pictures_are_drawn_once_for_each_model_and_setting(tmp_path, monkeypatch):
    model, painter = tmp_path / "model", Painter()
    model.mkdir()
    (model / "weights").write_bytes(b"a")
    monkeypatch.setattr(evaluate, "load", lambda folder: painter)
    series = tour_measure.Series("known", tuple(shapes.held_out_prompts(3)), 2.0)
    first = tour_measure.Before(tmp_path / "before", model, 5).draw(series)
    again = tour_measure.Before(tmp_path / "before", model, 5)
    assert torch.equal(again.draw(series), first) and painter.calls == 1 and again.pipeline is None
    unguided = tour_measure.Series("known", series.prompts, 1.0)
    tour_measure.Before(tmp_path / "before", model, 5).draw(unguided)
    tour_measure.Before(tmp_path / "before", model, 6).draw(series)
    (model / "weights").write_bytes(b"b")
    tour_measure.Before(tmp_path / "before", model, 5).draw(series)
    assert painter.calls == 4 and not list((tmp_path / "before").glob("*.tmp"))


def finished_run(folder, model, **args):
    """What a LoRA run leaves: a file of 2 x 3 + 5 numbers, 7 steps, 2.5 GB at its highest."""
    (folder / "run").mkdir()
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5)}, folder / "run" / evaluate.LORA_NAME)
    (folder / "run/args.json").write_text(json.dumps({"pretrained_model_name_or_path": str(model)} | args))
    lines = [{"step": 0, "eval_reward": 1.0}, {"step": 4, "memory_gb": 2.5}, {"step": 7, "memory_gb": 2.25}]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run/README.md").write_text("card")
    return folder / "run"


def test_a_run_is_measured_before_and_after_on_the_same_seeds(tmp_path, monkeypatch):
    """8 hearts of which 6 are wrong before and 2 after, 8 known shapes likewise: 0.25 -> 0.75. Three hearts and a known shape are shown."""
    model = tmp_path / "model"
    model.mkdir()
    run = finished_run(tmp_path, model)
    monkeypatch.setattr(evaluate, "load", lambda folder, lora=None: Painter(2) if lora == run else Painter(6))
    argv = ["lora", "--run", str(run), "--before", str(tmp_path / "before"), "--num_prompts", "8", "--num_inference_steps", "1"]
    found = tour_measure.main(cli.parse(tour_measure.build_parser(), argv, checks=(tour_measure.check,)))
    assert json.loads((run / "measures.json").read_text()) == found
    assert [(one["title"], one["before"], one["after"], one["count"]) for one in found["measures"]] == [
        ("hearts, new to the model", 0.25, 0.75, 8), ("known shapes", 0.25, 0.75, 8)]  # fmt: skip
    assert found["trained"] == {"kind": "LoRA", "model": "model", "parameters": 11, "steps": 7, "memory_gb": 2.5}
    assert [(one["seed"], one["before"]["right"], one["after"]["right"]) for one in found["shown"]] == [
        (0, False, False), (1, False, False), (2, False, True), (0, False, False)]  # fmt: skip
    third = found["shown"][2]
    (reading,) = shapes.verify(images.from_pil(Image.open(run / third["after"]["file"]))[None])
    assert reading == shapes.read_caption(third["prompt"]) and reading.shape == "heart"


def test_a_run_on_a_reward_is_measured_by_its_reward_too(tmp_path, monkeypatch):
    """The size of the drawings as JPEG, with the reward's sign and without its weight."""
    run = finished_run(tmp_path, tmp_path, **REWARDED)
    monkeypatch.setattr(tour_measure, "fingerprint", lambda model: "x")
    monkeypatch.setattr(evaluate, "load", lambda folder, lora=None: Painter())
    argv = ["ddpo", "--run", str(run), "--before", str(tmp_path / "before"), "--num_prompts", "2"]
    reward, strict = tour_measure.main(cli.parse(tour_measure.build_parser(), argv, checks=(tour_measure.check,)))["measures"]
    sizes = []
    for prompt in shapes.held_out_prompts(2):
        picture = Painter()(prompt=[prompt], generator=[torch.Generator().manual_seed(9)]).images
        images.to_pil(picture)[0].save(tmp_path / "x.jpg", quality=95)
        sizes.append((tmp_path / "x.jpg").stat().st_size / 1000)
    assert reward["scorer"] == "jpeg_compressibility" and reward["before"] == reward["after"] == pytest.approx(-sum(sizes) / 2)
    assert strict["scorer"] == "shapes_strict" and strict["after"] == 1.0 and strict["guidance_scale"] == 1.0


def test_an_unfinished_run_is_not_measured(tmp_path, capsys):
    run = finished_run(tmp_path, tmp_path)
    (run / "README.md").unlink()
    with pytest.raises(SystemExit):
        cli.parse(tour_measure.build_parser(), ["lora", "--run", str(run), "--before", "b"], checks=(tour_measure.check,))
    assert "no README.md there; give the output folder of a finished run" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- table and picture


def test_the_table_by_hand():
    reward = {"title": "known shapes", "scorer": "tiny_clip", "guidance_scale": 1, "count": 8, "before": 0.51234, "after": None}
    refl = result_of("refl", measures=[reward, reward | {"scorer": tour_report.STRICT, "before": 0.5, "after": 1.0}], seconds=6.3)
    head, ruler, first, second, third, empty, note = tour_report.table([result_of(), refl]).splitlines()
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "LoRA", "LoRA, 0.61 M of tiny-sd3, 450 steps", "hearts", "0 %", "62 %", "94", "1.2 GB"]  # fmt: skip
    assert [cell.strip() for cell in second.split("|")[3:-1]] == [
        "tiny_clip: known shapes, unguided", "0.512", "none judged", "6", "1.2 GB"]  # fmt: skip
    assert [cell.strip() for cell in third.split("|")[1:-1]] == ["", "", "known shapes, unguided", "50 %", "100 %", "", ""]
    assert len({len(line) for line in (head, ruler, first, second, third)}) == 1 and re.fullmatch(r"\|(-+:?\|)+", ruler) and empty == ""
    assert "share of 8 held-out prompts" in note and "20 denoising steps" in note and "100 together" in note and "2 CPU cores" in note


def test_the_table_takes_the_place_of_the_old_one_and_leaves_the_page(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"# Title\n\n{tour_report.BEGIN}\n| old |\n\n{tour_report.END}\nafter <!-- end of the table -->\n")
    for _ in range(2):
        tour_report.check_pages([page])
        tour_report.write_into(page, "| new |\n")
    assert page.read_text() == f"# Title\n\n{tour_report.BEGIN}\n| new |\n\n{tour_report.END}\nafter <!-- end of the table -->\n"


@pytest.mark.parametrize("text", [
    "no markers", tour_report.BEGIN, tour_report.END + tour_report.BEGIN, (tour_report.BEGIN + tour_report.END) * 2
])  # fmt: skip
def test_a_page_without_a_place_for_the_table_is_refused(text, tmp_path):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match="--write: page.md has no line <!-- table of scripts/tour.sh -->"):
        tour_report.check_pages([tmp_path / "page.md"])


def test_the_picture_sets_before_beside_after_in_frames_that_say_what_is_right(tmp_path):
    """Two trainers with two prompts: the middle of each cell has the colour of its file, its rim that of the verdict."""
    colors = {(name, i, when): (40 * i + 20, 90 if when == "before" else 200, 10 if name == "lora" else 130)
              for name in ("lora", "dpo") for i in range(2) for when in ("before", "after")}  # fmt: skip
    found = []
    for name in ("lora", "dpo"):
        (tmp_path / name / "shown").mkdir(parents=True)
        shown = []
        for i in range(2):
            entry = {"prompt": "a large purple heart at the bottom on a white background", "seed": i}
            for when in ("before", "after"):
                Image.new("RGB", (64, 64), colors[name, i, when]).save(tmp_path / name / f"shown/{i}-{when}.png")
                entry[when] = {"file": f"shown/{i}-{when}.png", "right": when == "after" and i == 0}
            shown.append(entry)
        found.append(result_of(name, shown=shown))
    sheet = tour_report.picture(found, tmp_path)
    pixels = sheet.load()
    middles = {pixels[x, y]: (x, y) for x in range(0, sheet.width, 8) for y in range(0, sheet.height, 8)}
    assert set(colors.values()) <= set(middles)
    for (name, i, when), color in colors.items():
        x, y = middles[color]
        while pixels[x, y] == color:  # to the frame on the right
            x += 1
        assert pixels[x, y] == (tour_report.RIGHT if (when, i) == ("after", 0) else tour_report.WRONG)
        if when == "before":  # the other half of the pair begins behind frame, gap and frame
            assert pixels[x + 2 * tour_report.FRAME + tour_report.GAP, y] == colors[name, i, "after"]
    assert middles[colors["lora", 0, "before"]][1] < middles[colors["dpo", 0, "before"]][1]


def test_words_are_wrapped_at_the_room_they_have():
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    lines = tour_report.wrapped("a large purple heart at the bottom on a white background", font, 150)
    assert " ".join(lines).split() == "a large purple heart at the bottom on a white background".split() and len(lines) > 1
    assert all(font.getlength(line) <= 150 for line in lines) and tour_report.wrapped("unbreakable", font, 1) == ["unbreakable"]


# ---------------------------------------------------------------------------------------------- the real thing


def run_here(shell, command, log, **env):
    """In place of Shell.run: the same programs in this process, which saves their imports. A wrapper is asked what it would run."""
    log.write_text("run in the test's process")
    if command[0] == "bash":
        printed = subprocess.run(command, env=os.environ | env | {"PRINT_COMMAND": "1"}, check=True, capture_output=True, text=True).stdout
        _, script, *words = shlex.split(printed)
        runs.train(importlib.import_module(script.removesuffix(".py")), words)
    else:
        assert command[1:3] == ["-m", "src.tiny.tour_measure"]
        tour_measure.main(cli.parse(tour_measure.build_parser(), command[3:], checks=(tour_measure.check,)))
    return 0


@pytest.mark.slow
def test_a_quick_tour_on_the_shipped_models(tmp_path, monkeypatch):
    """Trainers of either model family, a LoRA and all weights, with data and with a reward, and what each of them leaves is measured."""
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(tour.Shell, "run", run_here)
    table = main("full", "refl", "--quick", "--output_dir", str(tmp_path))
    full, refl = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("full", "refl"))
    assert full["trained"]["steps"] == 2 and full["trained"]["kind"] == "all weights" and 3e6 < full["trained"]["parameters"] < 5e6
    assert refl["trained"] == refl["trained"] | {"kind": "LoRA", "model": "tiny-sd15", "steps": 1}
    assert 1e5 < refl["trained"]["parameters"] < 2e5
    assert [one["scorer"] for one in refl["measures"]] == ["tiny_clip", "shapes_strict"]
    assert refl["measures"][0]["before"] != refl["measures"][0]["after"] and refl["trained"]["memory_gb"] > 0.1
    assert [len(result["shown"]) for result in (full, refl)] == [4, 4] and full["seconds"] > 1
    assert (tmp_path / "tour.png").is_file() and "| full fine-tuning " in table and "| ReFL " in table
    monkeypatch.setattr(tour.Shell, "run", None)  # nothing is left to be run
    assert main("full", "--quick", "--output_dir", str(tmp_path)) == table
