"""The tiny world's two small programs: the data set is the shipped one, and the evaluation counts what the verifier reads."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from src import cli, images
from src.data import captions
from src.tiny import dataset, evaluate, shapes

ROOT = Path(__file__).parent.parent


def make(folder, *argv):
    dataset.main(cli.parse(dataset.build_parser(), ["--output", str(folder), *argv], checks=(dataset.check,)))
    return folder


# ---------------------------------------------------------------------------------------------- data set


def test_the_shipped_data_set_is_what_its_command_makes(tmp_path):
    """The page gives 240 new and 600 known drawings; here the captions of all, and the first pictures of each kind."""
    lines = [json.loads(line) for line in (ROOT / "datas/shapes-new/metadata.jsonl").read_text().splitlines()]
    drawings = shapes.drawings(240, 1, shapes=("heart",)) + shapes.drawings(600, 1)
    assert [line["text"] for line in lines] == [drawing.caption for drawing in drawings]
    for number in (0, 1, 240, 241):
        shipped = Image.open(ROOT / "datas/shapes-new" / lines[number]["file_name"])
        assert np.array_equal(shipped, images.to_pil(shapes.draw(drawings[number], 64)[None])[0])


def test_a_written_folder_is_read_by_the_trainers_loader(tmp_path):
    folder = make(tmp_path / "made", "--new", "2", "--known", "1", "--new_shape", "crescent", "--resolution", "32")
    opened = captions.open_captioned(str(folder), cache_dir=tmp_path / "cache", progress=False)
    assert len(opened) == 3 and all("crescent" in record.prompt for record in opened.records[:2])
    assert opened.image(0).size == (32, 32) and "crescent" not in opened.records[2].prompt


def test_the_shipped_subject_is_what_its_command_makes(tmp_path):
    made, shipped = make(tmp_path / "made", "--subject", "purple"), ROOT / "datas/subject"
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in shipped.iterdir())
    for path in shipped.iterdir():
        if path.suffix == ".png":  # the pixels: another version of Pillow packs them differently
            assert np.array_equal(Image.open(path), Image.open(made / path.name))
        else:
            assert path.read_text() == (made / path.name).read_text()
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 50_000


def test_five_pictures_show_one_subject_on_five_backgrounds_and_its_class_does_not():
    folder = ROOT / "datas/subject"
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    readings = shapes.verify(torch.stack([images.from_pil(Image.open(folder / line["file_name"])) for line in lines]))
    assert {(reading.shape, reading.color) for reading in readings} == {("heart", "purple")} and len(lines) == 5
    assert len({reading.background for reading in readings}) == 5
    for line, reading in zip(lines, readings, strict=True):
        assert line["text"] == shapes.subject_prompt(reading.background) and shapes.SUBJECT_WORD in line["text"].split()
        assert shapes.read_caption(line["text"]) == shapes.Reading(None, None, reading.background)  # says nothing of shape and colour
    prompts = (folder / dataset.CLASS_PROMPTS).read_text().splitlines()
    asked = [shapes.read_caption(prompt) for prompt in prompts]
    assert len(set(prompts)) == 96 and {reading.shape for reading in asked} == set(shapes.SHAPES)
    assert not any(shapes.is_held_out(reading.shape, reading.color, reading.background) for reading in asked)
    assert not any(shapes.SUBJECT_WORD in prompt for prompt in prompts)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_the_subjects_word_is_one_token(part):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-sd3" / part)
    assert len(tokenizer.tokenize(shapes.SUBJECT_WORD)) == 1 and tokenizer.unk_token not in tokenizer.tokenize(shapes.SUBJECT_WORD)
    longest = max((shapes.subject_prompt(background) for background in shapes.COLORS), key=len)
    assert len(tokenizer(longest).input_ids) <= tokenizer.model_max_length


def test_held_out_triples_are_not_written():
    for drawing in shapes.drawings(240, 1, shapes=("heart",)) + shapes.drawings(600, 1):
        assert not shapes.is_held_out(drawing.shape, drawing.color, drawing.background)


@pytest.mark.parametrize(("argv", "line"), [
    (["--output", "src"], "--output src exists"),
    (["--output", "nowhere", "--new", "0", "--known", "0"], "make no drawing"),
    (["--output", "README.md/x"], "is not a folder"),
    (["--output", "nowhere", "--subject", "purple", "--new", "3"], "have no effect with --subject"),
    (["--output", "nowhere", "--subject", "pink"], "--subject: invalid choice: 'pink'"),
])  # fmt: skip
def test_what_the_data_set_program_refuses(argv, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        cli.parse(dataset.build_parser(), argv, checks=(dataset.check,))
    assert exit_.value.code == 2 and line in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- evaluation


class Painter:
    """Stands for a pipeline: draws each prompt right, except the seeds it is told to get wrong."""

    tokenizer_3 = SimpleNamespace(model_max_length=16)

    def __init__(self, wrong=()):
        self.wrong, self.calls = set(wrong), []

    def __call__(self, *, prompt, generator, **options):
        self.calls.append((len(prompt), options))
        drawn = []
        for text, source in zip(prompt, generator, strict=True):
            reading = shapes.read_caption(text)
            colour = reading.color if source.initial_seed() not in self.wrong else next(c for c in shapes.COLORS if c != reading.color)
            background = reading.background if colour != reading.background else next(c for c in shapes.COLORS if c != colour)
            drawing = shapes.Drawing(reading.shape, colour, background, "large", "in the centre", (0.5, 0.5), 0.29)
            drawn.append(shapes.draw(drawing, 64))
        return SimpleNamespace(images=torch.stack(drawn))


def test_the_score_is_the_share_of_wholly_right_pictures_and_prompt_i_has_seed_i():
    """70 prompts in batches of 64 and 6; seeds 3, 64 and 69 are painted in a wrong colour: 67 of 70."""
    painter, prompts = Painter(wrong=(3, 64, 69)), shapes.held_out_prompts(70)
    score, pictures = evaluate.held_out_score(painter, prompts, num_inference_steps=5, guidance_scale=2.0)
    assert score == pytest.approx(67 / 70) and pictures.shape == (70, 3, 64, 64)
    assert [size for size, _ in painter.calls] == [64, 6]
    assert painter.calls[0][1]["num_inference_steps"] == 5 and painter.calls[0][1]["max_sequence_length"] == 16


def test_the_subjects_share_counts_its_shape_and_its_colour():
    """16 prompts with sks: the painter draws a heart in the colour that it is told. Seeds 2 and 9 are green: 14 of 16."""

    class Portraitist(Painter):
        def __call__(self, *, prompt, generator, **options):
            self.calls.append(prompt)
            drawn = []
            for text, source in zip(prompt, generator, strict=True):
                background, wrong = shapes.read_caption(text).background, source.initial_seed() in self.wrong
                colour = "purple" if not wrong else next(c for c in ("green", "red") if c != background)
                drawn.append(shapes.draw(shapes.Drawing("heart", colour, background, "large", "in the centre", (0.5, 0.5), 0.29), 64))
            return SimpleNamespace(images=torch.stack(drawn))

    painter = Portraitist(wrong=(2, 9))
    options = {"num_inference_steps": 5, "guidance_scale": 2.0}
    assert evaluate.subject_score(painter, 16, shape="heart", color="purple", **options)[0] == 14 / 16
    (prompts,) = painter.calls
    assert prompts == [shapes.subject_prompt(shapes.read_caption(prompt).background) for prompt in prompts]
    assert {shapes.read_caption(prompt).background for prompt in prompts} == set(shapes.COLORS) - {"purple"}
    assert evaluate.subject_score(painter, 16, shape="crescent", color="purple", **options)[0] == 0


def test_with_a_subject_its_share_and_its_classs_score_are_measured():
    plain = evaluate.measures(cli.parse(evaluate.build_parser(), []))
    assert list(plain) == ["new shape (heart)", "known shapes"]
    assert list(evaluate.measures(cli.parse(evaluate.build_parser(), ["--new_shape", "none"]))) == ["known shapes"]
    argv = ["--subject", "purple", "--num_prompts", "3", "--num_subject_images", "7"]
    subject = evaluate.measures(cli.parse(evaluate.build_parser(), argv))
    assert list(subject) == ["subject (purple heart)", "class (without sks)"]
    painter = Painter()
    assert subject["class (without sks)"][0](painter) == 1.0 and painter.calls[0][0] == 3
    assert "of 7 pictures" in subject["subject (purple heart)"][1]


def test_the_evaluation_measures_at_the_demos_settings():
    """models/README.md states figures at the demo's default guidance and steps."""
    ours, theirs = evaluate.build_parser().parse_args([]), demo.parse_args([])
    for name in ("num_inference_steps", "guidance_scale", "pretrained_model_name_or_path"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.slow
def test_the_program_prints_before_and_after_and_writes_them(tiny_sd3_folder, tmp_path, capsys):
    from src import lora
    from src.pipelines import sd3

    transformer = sd3.load(tiny_sd3_folder, parts=("transformer",)).transformer
    lora.add(transformer, rank=2)
    lora.save(transformer, tmp_path, "kohya")
    argv = ["--pretrained_model_name_or_path", tiny_sd3_folder, "--lora_weights_path", tmp_path, "--num_prompts", 2,
            "--num_inference_steps", 1, "--output", tmp_path / "new" / "figures.json"]  # fmt: skip
    figures = evaluate.main(cli.parse(evaluate.build_parser(), [str(word) for word in argv], checks=(evaluate.check,)))
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == figures
    assert figures == {name: {"before": 0.0, "after": 0.0} for name in ("new shape (heart)", "known shapes")}  # noise shows no shape
    out = capsys.readouterr().out
    assert "new shape (heart): 0% -> 0% of 2 held-out prompts" in out and out.count("\n") == 2


@pytest.mark.parametrize("name", cli.SAMPLERS)
def test_another_sampler_takes_the_models_own_noise_levels(name, tiny_sd15_folder):
    own, other = (evaluate.load(tiny_sd15_folder, scheduler=wanted).scheduler for wanted in (None, name))
    assert type(other).__name__ == name and torch.equal(other.alphas_cumprod, own.alphas_cumprod)


@pytest.mark.parametrize(("argv", "line"), [
    (["--pretrained_model_name_or_path", "src"], "--pretrained_model_name_or_path src: no pipeline there"),
    (["--pretrained_model_name_or_path", "MODEL", "--lora_weights_path", "src"], "--lora_weights_path src: no pytorch_lora_weights"),
    (["--pretrained_model_name_or_path", "MODEL", "--output", "README.md/x.json"], "--output README.md"),
    (["--num_prompts", "0"], "--num_prompts: must be at least 1"),
    (["--pretrained_model_name_or_path", "MODEL", "--num_subject_images", "8"], "--num_subject_images 8 has no effect without --subject"),
    (["--pretrained_model_name_or_path", "MODEL", "--scheduler", "DDIMScheduler"], "--scheduler DDIMScheduler is for a UNet"),
    (["--pretrained_model_name_or_path", "MODEL", "--subject", "red", "--new_shape", "none"], "leave out --new_shape none"),
])  # fmt: skip
def test_what_the_evaluation_refuses(argv, line, tiny_sd3_folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = [str(tiny_sd3_folder) if word == "MODEL" else word for word in argv]
    with pytest.raises(SystemExit) as exit_:
        cli.parse(evaluate.build_parser(), argv, checks=(evaluate.check,))
    assert exit_.value.code == 2 and line in capsys.readouterr().err


def test_the_evaluation_measures_what_its_flags_say(monkeypatch):
    """Before and after training with the same sampler, margin and prompts: those of the new shape, then those of the known ones."""
    loads, asked = [], []
    monkeypatch.setattr(evaluate, "load", lambda folder, lora=None, *, scheduler=None: loads.append((str(folder), lora, scheduler)))
    monkeypatch.setattr(
        evaluate, "held_out_score", lambda _, prompts, **options: asked.append((prompts, options)) or (len(asked) / 10, None)
    )
    flags = "--pretrained_model_name_or_path models/tiny-sd15 --trained_model trained --scheduler DDIMScheduler --new_shape crescent"
    flags += " --num_prompts 3 --min_margin 0.03 --guidance_scale 3 --num_inference_steps 4"
    figures = evaluate.main(evaluate.build_parser().parse_args(flags.split()))
    assert loads == [("models/tiny-sd15", None, "DDIMScheduler"), ("trained", None, "DDIMScheduler")]
    assert all(options == {"num_inference_steps": 4, "guidance_scale": 3.0, "min_margin": 0.03} for _, options in asked)
    shown = [{shapes.read_caption(prompt).shape for prompt in prompts} for prompts, _ in asked]
    assert shown[0] == shown[2] == {"crescent"} and shown[1] == shown[3] <= set(shapes.SHAPES) and len(asked[0][0]) == 3
    assert figures == {"new shape (crescent)": {"before": 0.1, "after": 0.3}, "known shapes": {"before": 0.2, "after": 0.4}}
