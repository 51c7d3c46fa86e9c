"""Preprocessing against PIL, torchvision and transformers, which the scorers were published with; and its gradient."""

from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from src import images
from src.scorers import preprocess

PHOTOS = sorted(path for path in (Path(__file__).parent.parent.parent / "shared/data/photos").glob("*") if path.suffix in (".png", ".jpg"))
# (height, width): shrunk, enlarged, odd, tall, a little tall, wide, one pixel
SIZES = [(512, 512), (64, 64), (300, 301), (217, 333), (97, 41), (290, 260), (37, 500), (1, 1), (3, 1)]
NEW_PIL = int(PIL.__version__.split(".")[0]) >= 13  # its order of the passes: see `_resize`


def tall(size):
    """Whether PIL 13 begins with the columns where older versions begin with the rows, for some target of these tests."""
    return size[0] > size[1]


def noise(size, seed=0):
    """A picture of independent levels: every weight shows, and most enlarged values are clipped."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def board(size):
    """A picture of black and white single pixels, saturated everywhere."""
    rows, columns = np.indices(size)
    return Image.fromarray(np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2))


def levels(pil_image):
    return torch.from_numpy(np.array(pil_image)).permute(2, 0, 1)  # (3, H, W) uint8


def assert_pil(ours, theirs):
    """(3, h, w) in [0, 1] are PIL's 8-bit levels, every one of them."""
    ours = ours * 255
    assert torch.equal(ours.round().to(torch.uint8), levels(theirs))
    assert (ours - ours.round()).abs().max() < 1e-4


# --------------------------------------------------------------------------- against PIL


def test_weights_of_four_pixels_on_two_by_hand():
    """scale 2, so the kernel reaches 4 pixels; output 0 is centred on 1.0.

    Distances / 2 of inputs 0-3: 0.25, 0.25, 0.75, 1.25. Keys' cubic, a = -1/2: 1.5 x^3 - 2.5 x^2 + 1 below 1 gives 0.8671875,
    0.8671875, 0.2265625; -0.5 x^3 + 2.5 x^2 - 4 x + 2 beyond gives -0.0703125. They add up to 1.890625.
    """
    kernel = np.array([0.8671875, 0.8671875, 0.2265625, -0.0703125])
    expected = np.round(kernel / 1.890625 * 2**22)
    assert preprocess.pil_weights(4, 2, 0, 1)[0].tolist() == expected.tolist()
    assert preprocess.pil_weights(4, 2, 1, 1)[0].tolist() == expected[::-1].tolist()


@pytest.mark.parametrize("side", [224, 384])
@pytest.mark.parametrize("picture", [noise, board])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_squash_is_pil_to_the_bit(size, picture, side):
    if tall(size) and not NEW_PIL:
        pytest.skip("PIL before 13 begins with the rows")
    image = picture(size)
    assert_pil(preprocess.squash(images.from_pil(image)[None], side)[0], image.resize((side, side), Image.BICUBIC))


@pytest.mark.skipif(not PHOTOS, reason="no photographs beside the repository")
@pytest.mark.parametrize("size", [(512, 512), (64, 64), (301, 333), (255, 225)], ids=str)
def test_photographs_are_resized_as_pil_does(size):
    for path in PHOTOS:
        image = images.open_rgb(path).resize((size[1], size[0]), Image.LANCZOS)
        assert_pil(preprocess.squash(images.from_pil(image)[None], 224)[0], image.resize((224, 224), Image.BICUBIC))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shorter_side_is_torchvisions_resize_and_centre_crop(size):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    if tall(size) and not NEW_PIL:
        pytest.skip("PIL before 13 begins with the rows")
    image = noise(size)
    reference = Compose([Resize(32, interpolation=InterpolationMode.BICUBIC), CenterCrop(32)])(image)
    assert_pil(preprocess.shorter_side(images.from_pil(image)[None], 32, "torchvision")[0], reference)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_clip_pixels_are_transformers_processor(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    if tall(size) and not NEW_PIL:
        pytest.skip("PIL before 13 begins with the rows")
    image = noise(size)
    reference = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(image, return_tensors="pt")
    ours = preprocess.clip_pixels(images.from_pil(image)[None], 32, "transformers")
    torch.testing.assert_close(ours, reference["pixel_values"], atol=1e-5, rtol=0)


def test_the_two_conventions_of_cropping_differ_where_three_pixels_are_left_over():
    """32 x 35: torchvision starts at round(1.5) = 2, transformers at 3 // 2 = 1."""
    image = torch.zeros(1, 3, 32, 35)
    image[..., 1] = 1.0  # a white column
    assert preprocess.shorter_side(image, 32, "transformers")[..., 0].min() == 1
    assert preprocess.shorter_side(image, 32, "torchvision").max() == 0


def test_siglips_squash_is_transformers_processor():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    image = noise((217, 333))
    reference = SiglipImageProcessorPil(size={"height": 384, "width": 384})(image, return_tensors="pt")["pixel_values"]
    ours = preprocess.normalize(preprocess.squash(images.from_pil(image)[None], 384), preprocess.HALF, preprocess.HALF)
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [*SIZES, (224, 224), (224, 100), (100, 224), (1, 900)], ids=str)
def test_pad_to_square_is_hpsv2s_transform(size):
    """To tensor first, then torchvision's antialiased bicubic of the longer side, then zeros around."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    image = noise(size)
    new = [max(1, round(extent * (224 / max(size)))) for extent in size]
    reference = F.resize(F.to_tensor(image), new, InterpolationMode.BICUBIC)
    high, wide = 224 - new[0], 224 - new[1]
    reference = F.pad(reference, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=0)
    ours = preprocess.pad_to_square(images.from_pil(image)[None], 224)[0]
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=0)


# --------------------------------------------------------------------------- tensors that no file holds


def test_values_between_levels_count_as_the_level_that_a_file_would_hold():
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    saved = images.from_pil(images.to_pil(image)[0])[None]
    for path in (lambda x: preprocess.squash(x, 32), lambda x: preprocess.pad_to_square(x, 32)):
        assert torch.equal(path(image), path(saved))


def test_a_batch_is_resized_as_its_pictures_are_one_by_one(monkeypatch):
    """Where two pictures are too many pixels, no two are there in fp64 at once."""
    batch = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    together, levels_of, pieces = preprocess.squash(batch, 16), preprocess._levels, []
    monkeypatch.setattr(preprocess, "_levels", lambda images: pieces.append(len(images)) or levels_of(images))
    monkeypatch.setattr(preprocess, "_CHUNK", 2 * 20 * 30 - 1)
    assert torch.equal(preprocess.squash(batch, 16), together) and pieces == [1, 1, 1]
    assert torch.equal(preprocess.squash(batch[1:2], 16)[0], together[1])


@pytest.mark.parametrize("size", [(1, 4096), (4096, 1), (4096, 7)], ids=str)
def test_strips_of_4096_pixels_cost_no_more_than_what_is_kept(size):
    """Their shorter side becomes 224, so the longer one up to 917504, of which 224 are computed."""
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    for resized in (preprocess.shorter_side(image, 224, "torchvision"), preprocess.pad_to_square(image, 224)):
        assert resized.shape == (1, 3, 224, 224) and torch.isfinite(resized).all()


@pytest.mark.slow
def test_a_picture_of_4096_pixels_is_resized_as_pil_does():
    image = noise((4096, 4096))
    assert_pil(preprocess.squash(images.from_pil(image)[None], 224)[0], image.resize((224, 224), Image.BICUBIC))


# --------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("size", [(48, 40), (20, 24)], ids=str)
def test_the_gradient_is_that_of_the_plain_weights(size):
    """Straight-through: out = R x C^T apart from rounding, so d<g, out>/dx = R^T g C, for saturated pixels too."""
    x = torch.full((1, 3, *size), 1.0)
    x[..., ::2] = 0.0  # black and white columns: all saturated, and clipped after each pass
    x.requires_grad_()
    weight = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (preprocess.squash(x, 32) * weight).sum().backward()
    rows, columns = (preprocess.pil_weights(extent, 32, 0, 32) / 2**22 for extent in size)
    expected = (rows.T @ weight.double() @ columns).float()
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "path",
    [
        lambda x: preprocess.clip_pixels(x, 32, "torchvision"),
        lambda x: preprocess.squash(x, 32),
        lambda x: preprocess.pad_to_square(x, 32),
    ],
    ids=["crop", "squash", "pad"],
)
def test_every_pixel_of_a_saturated_square_gets_a_gradient(path):
    for value in (0.0, 1.0):
        x = torch.full((2, 3, 64, 64), value, requires_grad=True)
        (path(x) * torch.linspace(1, 2, 32)).sum().backward()
        assert torch.isfinite(x.grad).all() and (x.grad != 0).all()


def test_rounding_is_exact_with_a_gradient_too():
    image = images.from_pil(noise((50, 70)))[None]
    assert torch.equal(preprocess.squash(image.clone().requires_grad_(), 32).detach(), preprocess.squash(image, 32))
