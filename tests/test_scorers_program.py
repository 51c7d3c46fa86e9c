"""`python -m src.scorers`: the list, scores of files, and what it refuses. In process, with scorers that need no weights."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from src import images, scorers
from src.scorers import __main__ as program
from src.scorers import mixture
from src.tiny import shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture
def drawings(tmp_path):
    """Two files of 64 x 64 pixels and one of 96: a red circle on blue, a green square on white, and a larger red circle on blue."""
    paths = []
    for number, (caption, side) in enumerate((("red circle blue", 64), ("green square white", 64), ("red circle blue", 96))):
        color, shape, background = caption.split()
        one = next(one for one in shapes.drawings(5000, seed=0, split="all")
                   if (one.color, one.shape, one.background) == (color, shape, background) and "small" not in one.caption)  # fmt: skip
        paths.append(tmp_path / f"{number}.png")
        images.to_pil(shapes.draw(one, side)[None])[0].save(paths[-1])
    return [str(path) for path in paths]


def run(capsys, *argv):
    program.main(program.parse_args([str(word) for word in argv]))
    return capsys.readouterr().out


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        run(capsys, *argv)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and error.startswith("python -m src.scorers: error: ")
    return error.removeprefix("python -m src.scorers: error: ").strip()


def test_the_list_says_what_each_scorer_needs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no weights here
    listed = run(capsys)
    assert "shapes: ready\n" in listed and "jpeg_compressibility: ready\n" in listed
    assert "pickscore: weights are missing: models/pickscore has no config.json; run bash scripts/download.sh pickscore" in listed
    assert "vlm_judge: needs --judge_url" in listed
    assert "with gradient; usually 17 to 24, divided by 26 in a mixture; licence:" in listed


def test_the_list_names_a_package_that_is_missing(capsys, monkeypatch):
    from src.scorers import base

    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    assert f"pickscore: open_clip is not installed: {sys.executable} -m pip install open_clip_torch" in run(capsys)


def test_weights_that_the_hub_would_send_are_told_apart_from_those_that_are_here(capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "pickscore: ready after a download from the Hub (yuvalkirstain/PickScore_v1)" in run(capsys)


def test_files_are_scored_each_with_its_prompt_whatever_their_sizes(capsys, drawings):
    prompts = ("a red circle on a blue background", "a green square on a black background", "a blue star on a green background")
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    rows = run(capsys, "shapes,jpeg_compressibility=0.5", *drawings, *flags).splitlines()
    assert rows[0].split() == ["shapes", "jpeg_compressibility", "total", "image"]
    table = [[float(word) for word in row.split()[:3]] for row in rows[1:]]
    assert [row.split()[3] for row in rows[1:4]] == drawings
    assert [row[0] for row in table[:3]] == pytest.approx([1, 2 / 3, 0], abs=1e-4)
    for shape, size, total in table:
        assert total == pytest.approx(shape + 0.5 * size / 100, abs=1e-3)
    assert rows[4].endswith("mean of 3") and table[3][0] == pytest.approx(sum(row[0] for row in table[:3]) / 3, abs=1e-3)


def test_one_prompt_serves_all_pictures_and_a_picture_may_carry_its_own(capsys, drawings, tmp_path):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from src import gallery

    both = run(capsys, "shapes_strict", *drawings[:2], "--prompt", "a red circle on a blue background").splitlines()
    assert [row.split()[0] for row in both[1:3]] == ["1.0000", "0.0000"]
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "width": 64, "height": 64, "pretrained_model_name_or_path": "x",
                "negative_prompt": ""}  # fmt: skip
    gallery.save(Image.open(drawings[1]), tmp_path / "own.png", "a green square on a white background", 0, settings, {})
    assert run(capsys, "shapes_strict", tmp_path / "own.png").splitlines()[1].split()[0] == "1.0000"
    info = PngInfo()
    info.add_itxt("prompt", '{"3": {"class_type": "KSampler"}}')  # as ComfyUI writes it
    Image.open(drawings[1]).save(tmp_path / "other.png", pnginfo=info)
    line = refusal(capsys, "shapes", tmp_path / "own.png", tmp_path / "other.png")  # names the file of the two
    assert line.startswith(f"shapes cannot judge {tmp_path / 'other.png'} with prompt '': it is empty; --prompt")


def test_the_samples_of_a_run_are_scored_by_the_prompts_in_their_files(capsys, drawings, tmp_path):
    """A red circle on blue and a green square on white, in a validation of two prompts."""
    import torch

    from src.validation import Album

    asked = ["a red circle on a blue background", "a green square on a white background"]
    run_ = SimpleNamespace(is_main=True, log_image=lambda *given: None)
    pictures = torch.stack([images.from_pil(images.open_rgb(path)) for path in drawings[:2]])
    Album(run_, tmp_path, asked, [["00-0.png"], ["01-0.png"]]).save(3, pictures)
    samples = sorted((tmp_path / "samples/step-000003").iterdir())
    assert [row.split()[0] for row in run(capsys, "shapes_strict", *samples).splitlines()[1:3]] == ["1.0000", "1.0000"]
    assert "it is empty; --prompt" in refusal(capsys, "shapes_strict", tmp_path / "samples/step-000003.png")  # the grid: of all prompts


def test_no_scorer_that_judges_by_the_prompt_takes_an_empty_one(capsys, drawings):
    line = refusal(capsys, "jpeg_compressibility,tiny_clip", *drawings)
    assert line == f"tiny_clip cannot judge {drawings[0]} with prompt '': it is empty; --prompt says what the picture was to show"
    line = refusal(capsys, "tiny_clip", *drawings[:2], "--prompt", "a star", "--prompt", " ")
    assert f"tiny_clip cannot judge {drawings[1]} with prompt ' '" in line
    metadata = {"include": [{"class": "dog", "count": 1}]}
    blind = {name for name in scorers.names() if scorers.get(name).check_prompt("", metadata) is None}
    assert blind == {"aesthetic", "aesthetic_v1", "aesthetic_v25", "geneval", "geneval_strict", "jpeg_compressibility",
                     "jpeg_incompressibility"}  # fmt: skip
    assert run(capsys, "jpeg_compressibility", drawings[0])


def test_json_lines_have_null_where_a_picture_could_not_be_judged(capsys, drawings, monkeypatch):
    monkeypatch.setattr(program, "score_files", lambda args: [{"shapes": 1.0, "total": math.nan}])
    line = run(capsys, "shapes", drawings[0], "--prompt", "a red circle", "--json")
    assert json.loads(line) == {"image": drawings[0], "shapes": 1.0, "total": None}


def test_the_mean_is_that_of_the_pictures_that_could_be_judged(capsys):
    results = [{"ocr": one, "clip": 0.3, "total": one} for one in (0.5, math.nan, 1.0)]
    program.show_scores([Path(name) for name in "abc"], results, as_json=False)
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].split() == ["nan", "0.3000", "nan", "b"] and rows[4].split("  ")[-1] == "mean of 2; 1 could not be judged"
    assert rows[4].split()[0] == "0.7500"


def test_a_line_of_metadata_ends_at_a_line_feed_alone(tmp_path, drawings):
    """JSON may hold U+2028 as it is, at which `splitlines` would cut."""
    (tmp_path / "one.jsonl").write_text('{"caption": "a red\u2028circle"}\n', encoding="utf-8")
    args = program.build_parser().parse_args(["shapes", str(drawings[0]), "--metadata", str(tmp_path / "one.jsonl")])
    assert program.metadata_of(args) == [{"caption": "a red\u2028circle"}]


def test_what_cannot_be_scored_is_refused_in_one_line(capsys, drawings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "two.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    (tmp_path / "bad.jsonl").write_text("{\n")
    red = ("--prompt", "a red circle")
    assert refusal(capsys, "shaeps", drawings[0]).startswith("scorers shaeps: unknown scorer 'shaeps'; did you mean shapes")
    assert "run bash scripts/download.sh pickscore" in refusal(capsys, "pickscore", drawings[0])
    assert "--json has no effect without scorers and pictures" in refusal(capsys, "--json")
    assert refusal(capsys, "shapes") == "shapes: no pictures to judge; give their files after it"
    assert "no such file: nowhere.png" in refusal(capsys, "shapes", "nowhere.png")
    assert "--prompt is given 2 times for 3 pictures" in refusal(capsys, "shapes", *drawings, *red, *red)
    assert "with prompt '': it is empty; --prompt" in refusal(capsys, "shapes", drawings[0])
    assert "cannot read" in refusal(capsys, "shapes", "broken.png", *red)
    assert "--metadata two.jsonl must hold a JSON object for each of 1 picture(s), got 2 line(s)" in refusal(
        capsys, "shapes", drawings[0], *red, "--metadata", "two.jsonl"
    )
    assert "bad.jsonl: not JSON lines" in refusal(capsys, "shapes", drawings[0], *red, "--metadata", "bad.jsonl")
    assert "--hps_version v2 has no effect without hps" in refusal(capsys, "shapes", drawings[0], *red, "--hps_version", "v2")


def test_pictures_are_opened_a_batch_at_a_time(capsys, drawings, monkeypatch, tmp_path):
    """And each batch has its own prompts and metadata."""
    opened, judged = [], []
    original_open, original_score = images.open_rgb, mixture.score_pictures
    monkeypatch.setattr(images, "open_rgb", lambda path: opened.append(path) or original_open(path))
    monkeypatch.setattr(mixture, "score_pictures", lambda *given: judged.append((len(opened), *given[2:])) or original_score(*given))
    (tmp_path / "three.jsonl").write_text('{"n": 0}\n{"n": 1}\n{"n": 2}\n')
    prompts = [word for prompt in "abc" for word in ("--prompt", prompt)]
    run(capsys, "jpeg_compressibility", *drawings, *prompts, "--metadata", tmp_path / "three.jsonl", "--scorer_batch_size", 2)
    assert judged == [(2, ["a", "b"], [{"n": 0}, {"n": 1}]), (3, ["c"], [{"n": 2}])]


def test_scorers_are_built_as_the_flags_say(drawings, monkeypatch):
    import torch

    asked, build = {}, scorers.build
    monkeypatch.setattr(scorers, "check", lambda *_, **__: None)
    monkeypatch.setattr(scorers, "build", lambda spec, **given: asked.update(given) or build("jpeg_compressibility"))
    flags = "--scorer_dtype bf16 --scorer_batch_size 3 --hps_version v2 --prompt a"
    program.score_files(program.parse_args(["hps", drawings[0], *flags.split()]))
    assert (asked["dtype"], asked["batch_size"], asked["hps_version"]) == (torch.bfloat16, 3, "v2")


@pytest.mark.slow
def test_help_and_a_wrong_name_answer_fast():
    """Processor time of the child: the same on a busy machine."""
    for argv, code in ((["--help"], 0), (["pikscore", "README.md"], 2)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run([sys.executable, "-X", "importtime", "-m", "src.scorers", *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5
        assert "torch" not in done.stderr
