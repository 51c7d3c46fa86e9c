"""The training of models/tiny-clip, on a model smaller still, and the shipped folder where it is present."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from src import seeds
from src.tiny import clip, shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "models" / "tiny-clip"
needs_shipped = pytest.mark.skipif(not (SHIPPED / "config.json").exists(), reason="models/tiny-clip is not built")


def tiny_args(folder, *more):
    """Four steps of a one-layer model."""
    return clip.build_parser().parse_args([
        "--output_dir", str(folder / "model"), "--checkpoint_dir", str(folder / "checkpoints"),
        "--vae_model", str(ROOT / "models/tiny-sd3"), "--steps", "4", "--evaluation_steps", "2", "--color_pairs", "2",
        "--drawings", "12", "--evaluation_pictures", "4", "--width", "24", "--layers", "1", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "REPORT_PICTURES", 4)
        clip.main(tiny_args(folder))
    return folder


@pytest.fixture(scope="module")
def loaded(built):
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(built / "model").eval(), CLIPTokenizer.from_pretrained(built / "model")


# ---------------------------------------------------------------------------------------------- pictures


def test_blur_is_a_gaussian_of_each_picture_s_own_width():
    """A point spread by sigma = 1 keeps 1 / (sqrt(2 pi))^2 = 0.159 of itself (0.160 with 7 taps); by sigma = 0, all."""
    point = torch.zeros(2, 3, 15, 15)
    point[:, :, 7, 7] = 1
    blurred = clip.blur(point, torch.tensor([1.0, 0.0]))
    assert blurred[0, :, 7, 7].tolist() == pytest.approx([0.1596] * 3, abs=1e-3)
    assert torch.allclose(blurred[1], point[1]) and torch.allclose(blurred.sum((2, 3)), torch.ones(2, 3))
    assert torch.allclose(blurred[0], blurred[0].flip(1)) and torch.allclose(blurred[0], blurred[0].mT)


def test_disturbed_pictures_still_read_right_mostly():
    """By the verifier: what the network is told about a picture must still be true of it."""
    drawn = shapes.drawings(80, 3)
    images = clip.disturb(clip.draw_all(drawn), seeds.generator(0, "test"))
    assert images.min() >= 0 and images.max() <= 1
    readings = shapes.verify(images)
    assert sum(reading.color == drawing.color for reading, drawing in zip(readings, drawn, strict=True)) >= 76
    assert shapes.correct(readings, [drawing.caption for drawing in drawn]).float().mean() > 0.8


def test_a_batch_holds_every_shape_of_its_colours_once():
    """Of 8 shapes in each of 56 pairs of colours one is held out: 3 pairs are 21 pictures, all of different triples."""
    drawn = shapes.drawings(3000, 0, "train", shapes.ALL_SHAPES)
    pool = clip.Pool(torch.zeros(3000, 3, 8, 8, dtype=torch.uint8), torch.arange(3000)[:, None], clip.families(drawn))
    assert len(pool.families) == 56 and {len(family) for family in pool.families} == {7}
    taken = set()
    for step in range(60):
        images, ids = pool.batch(3, seeds.generator(0, step))
        batch = [drawn[number] for number in ids.flatten().tolist()]
        assert images.shape == (21, 3, 8, 8) and len({(d.shape, d.color, d.background) for d in batch}) == 21
        assert len({(d.color, d.background) for d in batch}) == 3
        taken |= set(ids.flatten().tolist())
    assert len(taken) > 0.25 * 3000  # of 60 x 21 draws


def test_wrong_captions_differ_in_one_attribute_and_stay_possible():
    rng = random.Random(0)
    for drawing in shapes.drawings(200, 1, "all", shapes.ALL_SHAPES):
        asked = shapes.read_caption(drawing.caption)
        for name, caption in clip.wrong_captions(drawing, rng).items():
            other = shapes.read_caption(caption)
            assert [key for key in clip.ATTRIBUTES if getattr(other, key) != getattr(asked, key)] == [name]
            assert other.color != other.background


# ---------------------------------------------------------------------------------------------- loss and training


def test_the_loss_is_clip_s():
    """Against transformers' own loss on the same table of cosines."""
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(7.0)
    assert torch.allclose(clip.contrastive_loss(images, texts, scale), image_text_contrastive_loss(scale * texts @ images.T))


def test_training_changes_every_weight_and_keeps_the_scale_below_its_limit(built, loaded):
    from transformers import CLIPModel

    torch.manual_seed(0)
    start = dict(CLIPModel(loaded[0].config).named_parameters())
    # A key's bias adds the same to every attention logit: its gradient is 0 for ever.
    trained = torch.load(built / "checkpoints/clip.pt", weights_only=True)["model"]  # fp32: fp16 cannot tell 1.0001 from 1
    kept = [name for name in start if torch.equal(trained[name], start[name])]
    assert all(name.endswith("k_proj.bias") for name in kept), kept
    assert loaded[0].logit_scale.exp() <= clip.MAX_SCALE * 1.01


def test_a_resumed_training_ends_with_the_same_weights(built, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(clip, "REPORT_PICTURES", 4)
    args = tiny_args(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # interrupted after two of four steps
        report, reports = clip.report, []

        def interrupt(*arguments):
            report(*arguments)
            reports.append(arguments)
            raise KeyboardInterrupt

        patch.setattr(clip, "report", interrupt)
        clip.main(args)
    clip.main(tiny_args(tmp_path, "--resume"))
    first, second = (load_file(folder / "model/model.safetensors") for folder in (built, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_folder_is_fp16_that_loads_as_fp32(built, loaded):
    from safetensors.torch import load_file

    assert all(value.dtype == torch.float16 for value in load_file(built / "model/model.safetensors").values())
    assert {parameter.dtype for parameter in loaded[0].parameters()} == {torch.float32}
    assert (built / "model/preprocessor_config.json").is_file()


def test_the_evaluation_prints_every_view(built, capsys):
    clip.main(tiny_args(built, "--evaluate", str(built / "model")))
    printed = capsys.readouterr().out
    for words in ("parameters", "drawn: right caption preferred: shape", "disturbed:", "decoded:"):
        assert words in printed


def test_a_missing_autoencoder_is_refused_with_the_flag(tmp_path):
    with pytest.raises(ValueError, match="--vae_model .*no autoencoder there; try models/tiny-sd3"):
        clip.main(tiny_args(tmp_path, "--vae_model", str(tmp_path)))


# ---------------------------------------------------------------------------------------------- what is shipped


@needs_shipped
def test_the_shipped_folder_is_small_and_names_no_path():
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 4e6
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"] and not str(config.get("_name_or_path", "")).startswith("/")


@pytest.mark.slow
@needs_shipped
def test_the_shipped_model_prefers_the_right_caption(monkeypatch):
    """What models/README.md promises, on 256 drawings: at least 95 % less two standard errors of 0.8 %."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(SHIPPED).eval(), CLIPTokenizer.from_pretrained(SHIPPED)
    for view, figures in clip.held_out(model, tokenizer, 256, seed=2).items():
        assert figures["pairs"] >= 0.934, (view, figures)
