"""The aesthetic score v2, "improved-aesthetic-predictor": an MLP on OpenAI's CLIP ViT-L/14, trained on people's ratings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from src.scorers import networks
from src.scorers.base import Loader, Option, Scorer, Weights

if TYPE_CHECKING:
    from src.scorers.base import Judge

# The numbers of different heads cannot be compared: ava+logos is 1.44 times as steep.
HEADS = {
    "sac+logos+ava1": "sac+logos+ava1-l14-linearMSE.pth", "ava+logos": "ava+logos-l14-linearMSE.pth",
    "ava+logos-relu": "ava+logos-l14-reluMSE.pth",
}  # fmt: skip


def _weights(name: str) -> Weights:
    return Weights("improved-aesthetic-predictor", (HEADS[name],))


def head(name: str, loader: Loader) -> nn.Module:
    """One of the published heads, fp32: unit embeddings (b, 768) -> (b, 1); its keys tell whether it has ReLUs."""
    path = _weights(name).path(HEADS[name])
    state = networks.read(path)
    layers = nn.ModuleDict({"layers": networks.mlp(768, activation="layers.11.weight" in state)})
    networks.load(layers, state, path=path, what="a head of improved-aesthetic-predictor (layers.0, 2, 4, 6, 7, or 0, 3, 6, 9, 11)")
    return networks.freeze(layers["layers"], loader, torch.float32)


def load(loader: Loader) -> Judge:
    model, predict = networks.clip_l(loader), head(loader.options["aesthetic_head"], loader)
    return lambda images, prompts, metadata: predict(networks.embed_images(model, images, "torchvision")).squeeze(1)


SCORERS = (
    Scorer(
        name="aesthetic", summary="how much people like the picture, 1 to 10, whatever the prompt: improved-aesthetic-predictor",
        differentiable=True, range=(4.5, 7.0), normalizer=10.0, licence="Apache-2.0 (head), MIT (CLIP)", load=load,
        options=(Option("aesthetic_head", default="sac+logos+ava1", choices=tuple(HEADS)),),
        weights=lambda options: (_weights(options["aesthetic_head"]), networks.CLIP_L),
    ),
)  # fmt: skip
