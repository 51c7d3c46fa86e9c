"""PickScore: which picture people would pick for a prompt, a CLIP ViT-H/14 trained on their choices (https://arxiv.org/abs/2305.01569)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from src.scorers import networks
from src.scorers.base import Loader, Scorer, Weights, some_prompt

if TYPE_CHECKING:
    from src.scorers.base import Judge

WEIGHTS = Weights("pickscore", ("config.json", "model.safetensors|pytorch_model.bin"), "yuvalkirstain/PickScore_v1")


def load(loader: Loader) -> Judge:
    model = networks.pretrained("CLIPModel", WEIGHTS, replace(loader, device=torch.device("cpu"), dtype=torch.float32))
    scale = model.logit_scale.exp().item()  # in fp32: with its logarithm, 4.605, rounded to bf16, 100 would become 98.9
    model, tokenizer = networks.freeze(model, loader), networks.clip_tokenizer()

    def judge(images, prompts, metadata):
        embeddings = networks.embed_images(model, images, "transformers")
        return scale * networks.cosines(embeddings, networks.embed_prompts(model, tokenizer, prompts))

    return judge


SCORERS = (
    Scorer(
        name="pickscore", summary="what people would pick for the prompt: PickScore v1, its scale times cosine", differentiable=True,
        range=(17.0, 24.0), normalizer=26.0, licence="none stated", load=load, weights=lambda options: (WEIGHTS,),
        packages={"open_clip": "open_clip_torch"}, check_prompt=some_prompt,
    ),
)  # fmt: skip
