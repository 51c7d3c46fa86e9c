"""The aesthetic score v2.5: an MLP on SigLIP's pooled embedding, trained for illustrations as well as photographs.

Its head is under the AGPL: get your own copy; none is shipped or downloaded here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from src.scorers import networks, preprocess
from src.scorers.base import Loader, Scorer, Weights

if TYPE_CHECKING:
    from src.scorers.base import Judge

SIGLIP = Weights("siglip-so400m-patch14-384", ("config.json", "model.safetensors"), "google/siglip-so400m-patch14-384")
HEAD = Weights(
    "aesthetic-predictor-v2-5", ("aesthetic_predictor_v2_5.pth",),
    by_hand="put the file there from github.com/discus0434/aesthetic-predictor-v2-5 (models/), whose licence is the AGPL-3.0",
)  # fmt: skip


def head(width: int, loader: Loader) -> nn.Module:
    """The user's copy of the head, fp32: unit embeddings (b, width) -> (b, 1)."""
    path = HEAD.path(HEAD.files[0])
    sizes = (width, 1024, 128, 64, 16, 1)
    # linear layers in the even places of its file, dropout in the odd ones
    layers = [layer for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(inputs, outputs), nn.Identity())]
    module = nn.ModuleDict({"scoring_head": nn.Sequential(*layers)})
    networks.load(module, networks.read(path), path=path, what="the head of aesthetic-predictor v2.5")
    return networks.freeze(module["scoring_head"], loader, torch.float32)


def load(loader: Loader) -> Judge:
    tower = networks.pretrained("SiglipVisionModel", SIGLIP, loader, spare=("text_model.", "logit_"))
    predict = head(tower.config.hidden_size, loader)

    def judge(images, prompts, metadata):
        squashed = preprocess.squash(images, tower.config.image_size)
        pixels = preprocess.normalize(squashed, preprocess.HALF, preprocess.HALF).to(tower.dtype)
        return predict(networks.unit(tower(pixels).pooler_output)).squeeze(1)

    return judge


SCORERS = (
    Scorer(
        name="aesthetic_v25", summary="how much people like the picture, 1 to 10, drawings too: aesthetic-predictor v2.5 on SigLIP",
        differentiable=True, range=(3.5, 6.5), normalizer=10.0, licence="AGPL-3.0 (head, your own copy), Apache-2.0 (SigLIP)", load=load,
        weights=lambda options: (HEAD, SIGLIP),
    ),
)  # fmt: skip
