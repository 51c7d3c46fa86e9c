"""JPEG size as a reward: against Pillow itself, and two figures measured once on pictures that anybody can make."""

import io

import pytest
import torch
from PIL import Image

from src import scorers
from src.scorers import jpeg


def test_flat_grey_and_uniform_noise_have_their_known_sizes():
    """512 x 512 at quality 95: 4.72 kB and 308 kB, as measured with another version of Pillow; libjpegs differ by less than 1 %."""
    grey = torch.full((1, 3, 512, 512), 0.5)
    noise = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    sizes = jpeg.kilobytes(torch.cat([grey, noise]))
    assert sizes[0].item() == pytest.approx(4.72, rel=0.01)
    assert sizes[1].item() == pytest.approx(308, rel=0.01)


def test_a_kilobyte_is_1000_bytes_of_a_jpeg_of_quality_95():
    picture = Image.radial_gradient("L").convert("RGB")  # 256 x 256
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=95)
    image = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(256, 256, 3).permute(2, 0, 1)[None] / 255
    assert jpeg.kilobytes(image).item() == pytest.approx(len(file.getvalue()) / 1000, abs=1e-6)


def test_the_two_rewards_are_the_size_with_either_sign():
    images = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    parts = scorers.build("jpeg_compressibility=1,jpeg_incompressibility=2")(images, ["a"] * 3)
    assert torch.equal(parts.parts["jpeg_incompressibility"], jpeg.kilobytes(images))
    assert torch.equal(parts.parts["jpeg_compressibility"], -jpeg.kilobytes(images))
    assert parts.parts["jpeg_compressibility"].dtype == torch.float32
    assert torch.allclose(parts.total, jpeg.kilobytes(images) / 100)  # (-1 + 2) x size over the normalizer, 100 kB


def test_any_size_has_a_score():
    for height, width in ((1, 1), (1, 300), (7, 3)):
        assert 0.1 < jpeg.kilobytes(torch.zeros(1, 3, height, width)).item() < 5


def test_no_gradient_is_promised():
    with pytest.raises(ValueError, match="jpeg_compressibility has no gradient"):
        scorers.check("jpeg_compressibility", differentiable=True)
