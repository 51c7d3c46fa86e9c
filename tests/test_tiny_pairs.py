"""Pairs of a tiny model's own pictures: who wins, what is written, and that the trainer reads it."""

from types import SimpleNamespace

import pytest
import runs
import torch
from pyarrow import parquet

from src import cli, images
from src.data import preferences
from src.tiny import evaluate, pairs, shapes


class Painter:
    """Stands for a pipeline: draws each prompt right if its seed is even, in another colour if it is odd."""

    def __call__(self, *, prompt, generator, **options):
        drawn = []
        for text, source in zip(prompt, generator, strict=True):
            asked = shapes.read_caption(text)
            others = [color for color in shapes.COLORS if color not in (asked.color, asked.background)]
            color = asked.color if source.initial_seed() % 2 == 0 else others[0]
            drawn.append(shapes.draw(shapes.Drawing(asked.shape, color, asked.background, "large", "in the centre", (0.5, 0.5), 0.29), 64))
        return SimpleNamespace(images=torch.stack(drawn))

    def set_progress_bar_config(self, **options):
        pass


@pytest.fixture
def painted(monkeypatch, tmp_path):
    import diffusers

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: Painter())
    (tmp_path / "model_index.json").write_text("{}")

    def run(*argv):
        words = ["--output", str(tmp_path / "pairs"), "--pretrained_model_name_or_path", str(tmp_path), *argv]
        return pairs.main(cli.parse(pairs.build_parser(), words, checks=(pairs.check,)))

    return run


def test_right_pictures_win_against_wrong_ones():
    """Right, wrong, wrong, right, wrong: 0 beats 1, 3 beats 2; none is in two pairs."""
    right = [True, False, False, True, False]
    assert pairs.pair_up(right, 5) == [(0, 1), (3, 2)] and pairs.pair_up(right, 1) == [(0, 1)]
    assert pairs.pair_up([True] * 4, 2) == pairs.pair_up([False] * 4, 2) == []


def test_captions_are_those_of_training_and_all_different():
    prompts = shapes.captions(200, seed=2)
    assert len(set(prompts)) == 200
    asked = [shapes.read_caption(prompt) for prompt in prompts]
    assert not any(shapes.is_held_out(one.shape, one.color, one.background) for one in asked)


@pytest.mark.slow
def test_what_is_written_is_read_by_the_trainer_and_the_winner_is_right(painted, tmp_path):
    assert painted("--num_prompts", "3", "--num_images", "4", "--pairs_per_prompt", "2") == 6
    assert parquet.read_table(tmp_path / "pairs/pairs.parquet")["label_0"].to_pylist() == [1, 0, 1, 0, 1, 0]
    columns = preferences.Columns("jpg_0", "jpg_1", "label_0", "caption")
    opened = preferences.open_preferences(str(tmp_path / "pairs"), columns, cache_dir=tmp_path / "cache", progress=False)
    assert len(opened) == 6 and opened.ties == 0
    for index, record in enumerate(opened.records):
        both = torch.stack([images.from_pil(image) for image in opened.images(index)])
        assert shapes.correct(shapes.verify(both), [record.prompt] * 2).tolist() == [True, False]


@pytest.mark.slow
def test_the_shipped_pairs_are_of_training_captions_and_ordered_by_the_verifier(tmp_path):
    columns = preferences.Columns("jpg_0", "jpg_1", "label_0", "caption")
    opened = preferences.open_preferences(str(runs.ROOT / "datas/pairs"), columns, cache_dir=tmp_path / "cache", progress=False)
    assert len(opened) == 1176 and opened.ties == 0
    assert {record.prompt for record in opened.records} <= set(shapes.captions(1280, seed=2))
    chosen = range(0, 1176, 40)
    both = torch.stack([images.from_pil(image) for index in chosen for image in opened.images(index)])
    prompts = [opened.records[index].prompt for index in chosen for _ in range(2)]
    assert shapes.correct(shapes.verify(both), prompts).tolist() == [True, False] * len(chosen)


def test_pictures_of_a_caption_take_the_guidance_weights_in_turn():
    """Each picture keeps its own seed and prompt, however the pictures are batched by weight."""
    calls = []

    def pipeline(*, prompt, generator, guidance_scale, **options):
        seeds = [source.initial_seed() for source in generator]
        calls.append((guidance_scale, seeds))
        return SimpleNamespace(images=torch.tensor([[seed, guidance_scale, float(text)] for text, seed in zip(prompt, seeds, strict=True)]))

    drawn = pairs.draw(pipeline, ["10", "11", "12", "13", "14"], [3, 1, 3, 1, 3], batch_size=2, num_inference_steps=1)
    assert drawn.tolist() == [[0, 3, 10], [1, 1, 11], [2, 3, 12], [3, 1, 13], [4, 3, 14]]
    assert calls == [(1, [1, 3]), (3, [0, 2]), (3, [4])]


@pytest.mark.parametrize(("argv", "line"), [
    (["--num_images", "1"], "--num_images 1 makes no pair"),
    (["--num_images", "2", "--guidance_scale", "1", "2", "3"], "--guidance_scale names 3 weights for --num_images 2"),
    (["--output", "src"], "--output src exists"),
    (["--pretrained_model_name_or_path", "nowhere"], "no pipeline there; try models/tiny-sd15"),
])  # fmt: skip
def test_what_the_program_refuses(painted, argv, line, capsys):
    with pytest.raises(SystemExit):
        painted(*argv)
    assert line in capsys.readouterr().err


def test_no_pair_is_an_error(painted, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "correct", lambda readings, prompts: torch.ones(len(prompts), dtype=torch.bool))
    with pytest.raises(SystemExit, match="4 of 4 pictures are right"):
        painted("--num_prompts", "2", "--num_images", "2")


def test_evaluation_takes_a_trained_pipeline_instead_of_a_lora(painted, tmp_path, capsys):
    words = ["--pretrained_model_name_or_path", str(tmp_path), "--trained_model", str(tmp_path)]
    words += ["--num_prompts", "2", "--new_shape", "none"]
    figures = evaluate.main(cli.parse(evaluate.build_parser(), words, checks=(evaluate.check,)))
    assert figures == {"known shapes": {"before": 0.5, "after": 0.5}} and "50% -> 50%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.parse(evaluate.build_parser(), [*words, "--lora_weights_path", "x"], checks=(evaluate.check,))
    assert "--trained_model contradicts --lora_weights_path" in capsys.readouterr().err
