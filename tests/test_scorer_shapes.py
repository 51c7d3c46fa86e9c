"""The tiny world's verifier as a reward."""

import pytest
import torch

from src import scorers
from src.tiny import shapes
from src.tiny.shapes import Drawing

RED_CIRCLE = Drawing("circle", "red", "blue", "large", "in the centre", (0.5, 0.5), 0.3)


@pytest.fixture(scope="module")
def mixture():
    return scorers.build("shapes,shapes_strict")


@pytest.fixture(scope="module")
def picture():
    return shapes.draw(RED_CIRCLE, 64)[None]  # (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        ("a red circle on a blue background", 1.0),
        ("a red square on a blue background", 2 / 3),
        ("a green square on a blue background", 1 / 3),
        ("a green square on a white background", 0.0),
        ("a green circle", 1 / 2),  # what the prompt does not mention does not count
        ("Draw me a large RED circle!", 1.0),
    ],
)
def test_the_score_is_the_share_that_is_right_and_the_strict_one_all_or_nothing(mixture, picture, prompt, share):
    scores = mixture(picture, [prompt]).parts
    assert scores["shapes"].item() == pytest.approx(share)
    assert scores["shapes_strict"].item() == float(share == 1)


def test_pictures_are_judged_one_by_one_and_at_any_size(mixture):
    drawn = shapes.drawings(6, seed=3)
    captions = [drawing.caption for drawing in drawn]
    images = torch.stack([shapes.draw(drawing, 96) for drawing in drawn])
    assert mixture(images, captions).parts["shapes"].tolist() == [1.0] * 6
    turned = mixture(images.flip(0), captions).parts["shapes"]
    assert torch.equal(turned.flip(0), mixture(images, captions[::-1]).parts["shapes"]) and turned.min() < 1


def test_the_caption_in_the_metadata_says_what_to_verify(mixture, picture):
    metadata = [{"caption": "a red circle on a blue background"}]
    assert mixture(picture, ["something round"], metadata).parts["shapes_strict"].item() == 1
    assert scorers.check_prompts("shapes", ["something round"], metadata) is None


def test_a_prompt_without_shape_and_colour_is_refused_before_and_while_judging(mixture, picture):
    for name in ("shapes", "shapes_strict"):
        with pytest.raises(ValueError, match=f"{name} cannot judge prompt 1 'a photo of a dog': it names no shape"):
            scorers.check_prompts(name, ["a red circle", "a photo of a dog"])
    with pytest.raises(ValueError, match="a photo of a dog"):
        mixture(picture, ["a photo of a dog"])
    with pytest.raises(ValueError, match='"caption" must be a text, got 3'):
        scorers.check_prompts("shapes", ["a red circle"], [{"caption": 3}])


def test_noise_shows_nothing(mixture):
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert mixture(noise, ["a red circle on a blue background"] * 2).parts["shapes"].tolist() == [0.0, 0.0]
