"""The tiny world's text-image matching: models/tiny-clip, a CLIPModel of 64 x 64 pixels that knows drawn shapes and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.scorers import networks, preprocess
from src.scorers.base import Loader, Scorer, Weights, some_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from src.scorers.base import Judge

TINY_CLIP = Weights(
    "tiny-clip", ("config.json", "model.safetensors", "tokenizer.json"),
    by_hand="it is part of the repository: git checkout models/tiny-clip, or python -m src.tiny.clip",
)  # fmt: skip


def embed_images(model, images: Tensor) -> Tensor:
    """Unit embeddings (b, D) float32 of images (b, 3, H, W) in [0, 1]: shorter side to 64, its centre, [0, 1] to [-1, 1]."""
    square = preprocess.shorter_side(images, model.config.vision_config.image_size, "transformers")
    pixels = preprocess.normalize(square, preprocess.HALF, preprocess.HALF)
    return networks.unit(model.get_image_features(pixels.to(model.dtype)).pooler_output)


def load(loader: Loader) -> Judge:
    from transformers import CLIPTokenizer

    model = networks.pretrained("CLIPModel", TINY_CLIP, loader)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_CLIP.source)
    return lambda images, prompts, metadata: networks.cosines(
        embed_images(model, images), networks.embed_prompts(model, tokenizer, prompts)
    )


SCORERS = (
    Scorer(
        name="tiny_clip", summary="tiny world: match of picture and prompt, cosine of models/tiny-clip", differentiable=True,
        range=(-0.2, 0.9), normalizer=1.0, licence="Apache-2.0: weights of this project", load=load,
        weights=lambda options: (TINY_CLIP,), check_prompt=some_prompt,
    ),
)  # fmt: skip
