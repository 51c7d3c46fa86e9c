"""models/tiny-clip as a reward: against transformers' own processor and model, its gradients, and what it prefers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from src import images as pictures
from src import scorers
from src.tiny import clip, shapes

SHIPPED = Path(__file__).parent.parent / "models" / "tiny-clip"
pytestmark = pytest.mark.skipif(not (SHIPPED / "config.json").exists(), reason="models/tiny-clip is not built")


@pytest.fixture(scope="module")
def mixture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return scorers.build("tiny_clip")


@pytest.fixture(scope="module")
def drawn():
    return shapes.drawings(100, 5, "held_out", shapes.ALL_SHAPES)


@pytest.fixture(scope="module")
def images(drawn):
    return clip.draw_all(drawn)  # (100, 3, 64, 64)


def captions(drawn):
    return [drawing.caption for drawing in drawn]


def test_scores_are_those_of_transformers_own_processor_and_model(mixture, images, drawn):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(SHIPPED).eval(), CLIPTokenizer.from_pretrained(SHIPPED)
    processor = CLIPImageProcessor.from_pretrained(SHIPPED)
    pixels = processor(images=pictures.to_pil(images[:8]), return_tensors="pt").pixel_values
    ids = tokenizer(captions(drawn[:8]), padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal() / model.logit_scale.exp()
    assert torch.allclose(mixture(images[:8], captions(drawn[:8])).total, expected, atol=1e-5)


@pytest.mark.slow
def test_the_right_caption_beats_one_that_is_wrong_in_a_word(mixture, images, drawn):
    """100 held-out drawings x 3 attributes: 95 % less two standard errors of 1.3 % is 92.5 %."""
    right = mixture(images, captions(drawn)).total
    rng = clip.random.Random(0)
    wrong = [clip.wrong_captions(drawing, rng) for drawing in drawn]
    leads = torch.stack([right - mixture(images, [texts[name] for texts in wrong]).total for name in clip.ATTRIBUTES])
    assert (leads > 0).float().mean() >= 0.925
    assert leads.median() > 0.05  # and not by a hair


def test_other_sizes_show_the_same(mixture, images, drawn):
    large = torch.stack([shapes.draw(drawing, 256) for drawing in drawn[:20]])
    small, big = mixture(images[:20], captions(drawn[:20])).total, mixture(large, captions(drawn[:20])).total
    assert (small - big).abs().mean() < 0.05


def test_the_gradient_points_to_the_right_colour(mixture):
    """A green circle asked to be red: the gradient inside it raises red and lowers green."""
    circle = shapes.Drawing("circle", "green", "white", "large", "in the centre", (0.5, 0.5), 0.3)
    image = shapes.draw(circle, 64)[None].requires_grad_()
    mixture(image, ["a red circle on a white background"]).total.sum().backward()
    inside = shapes.draw(replace(circle, color="black", background="white"), 64)[0] < 0.5
    red, green, _ = image.grad[0][:, inside].sum(1)
    assert red > 0 > green


def test_a_step_along_the_gradient_gains_what_it_promises(mixture, images, drawn):
    """Every value one level (1 / 255) up or down, as the gradient says: the gain is the sum of the gradient's sizes / 255, to first order.

    On soft pictures of whole levels, so that rounding to 8 bits changes nothing. Median ratio of 8 pictures.
    """
    soft = F.avg_pool2d(images[:8], 3, stride=1, padding=1).clamp(0.05, 0.95)
    soft = ((soft * 255).round() / 255).requires_grad_()
    scores = mixture(soft, captions(drawn[:8])).total
    (gradient,) = torch.autograd.grad(scores.sum(), soft)
    assert gradient.isfinite().all()
    with torch.no_grad():
        gain = mixture(soft + gradient.sign() / 255, captions(drawn[:8])).total - scores
    promised = gradient.abs().flatten(1).sum(1) / 255
    assert (gain / promised).median().item() == pytest.approx(1, abs=0.25)


def test_a_prompt_beyond_its_16_tokens_is_cut(mixture, images):
    one, other = (mixture(images[:1], ["a red circle on " * count]).total.item() for count in (5, 50))
    assert one == pytest.approx(other, abs=1e-5)


def test_saturated_pixels_learn_too(mixture):
    white = torch.ones(1, 3, 64, 64, requires_grad=True)
    mixture(white, ["a red circle on a black background"]).total.sum().backward()
    assert (white.grad != 0).float().mean() > 0.99


def test_a_missing_folder_is_named_with_the_cure(monkeypatch, tmp_path):
    from src.scorers import base

    monkeypatch.setattr(base, "MODELS", tmp_path)
    with pytest.raises(ValueError, match="tiny_clip: weights are missing: .*git checkout models/tiny-clip"):
        scorers.check("tiny_clip")
