"""CLIPScore: how well a picture matches its prompt, by OpenAI's ViT-L/14 (https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.scorers import networks
from src.scorers.base import Loader, Scorer, some_prompt

if TYPE_CHECKING:
    from src.scorers.base import Judge


def load(loader: Loader) -> Judge:
    from transformers import CLIPTokenizer

    model, tokenizer = networks.clip_l(loader), CLIPTokenizer.from_pretrained(networks.CLIP_L.source)

    def judge(images, prompts, metadata):
        embeddings = networks.embed_images(model, images, "transformers")
        return networks.cosines(embeddings, networks.embed_prompts(model, tokenizer, prompts))

    return judge


SCORERS = (
    Scorer(
        name="clip", summary="match of picture and prompt: cosine of OpenAI's CLIP ViT-L/14", differentiable=True,
        range=(0.15, 0.35), normalizer=0.3, licence="MIT", load=load, weights=lambda options: (networks.CLIP_L,),
        check_prompt=some_prompt,
    ),
)  # fmt: skip
