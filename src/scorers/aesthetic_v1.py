"""The aesthetic score v1, LAION's: one linear layer on the embedding of OpenAI's CLIP ViT-L/14.

Its weights come in two forms: tower and layer in one folder (shunk031's), or the bare layer, applied to the embeddings of
models/clip-vit-large-patch14. The bare layer is used if the folder holds it but no tower.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from src.scorers import networks, preprocess
from src.scorers.base import Loader, Scorer, Weights

if TYPE_CHECKING:
    from src.scorers.base import Judge

FOLDER, MODEL, LAYER = "aesthetics-predictor-v1-vit-large-patch14", "model.safetensors|pytorch_model.bin", "sa_0_4_vit_l_14_linear.pth"
WHOLE = Weights(FOLDER, ("config.json", MODEL), "shunk031/aesthetics-predictor-v1-vit-large-patch14")
BARE = Weights(FOLDER, (LAYER,))


def _bare() -> bool:
    return BARE.local is not None and WHOLE.local is None


def _predictor(state: dict[str, torch.Tensor], path: Path, loader: Loader) -> nn.Module:
    """The linear layer, fp32: unit embeddings (b, 768) -> (b, 1)."""
    layer = nn.Linear(state["weight"].shape[-1] if "weight" in state else 768, 1)
    networks.load(layer, state, path=path, what="the linear layer of aesthetic-predictor v1")
    return networks.freeze(layer, loader, torch.float32)


def _load_bare(loader: Loader) -> Judge:
    path, model = BARE.path(LAYER), networks.clip_l(loader)
    predict = _predictor(networks.read(path), path, loader)
    return lambda images, prompts, metadata: predict(networks.embed_images(model, images, "torchvision")).squeeze(1)


def _load_whole(loader: Loader) -> Judge:
    path = WHOLE.path(MODEL)
    state = {name.removeprefix("predictor."): value for name, value in networks.read(path).items() if name.startswith("predictor.")}
    predict = _predictor(state, path, loader)
    tower = networks.pretrained("CLIPVisionModelWithProjection", WHOLE, loader, spare=("predictor.",))

    def judge(images, prompts, metadata):
        pixels = preprocess.clip_pixels(images, tower.config.image_size, "transformers")
        return predict(networks.unit(tower(pixels.to(tower.dtype)).image_embeds)).squeeze(1)

    return judge


SCORERS = (
    Scorer(
        name="aesthetic_v1", summary="how much people like the picture, whatever the prompt: LAION's first, linear predictor",
        differentiable=True, range=(3.0, 8.0), normalizer=10.0, licence="MIT",
        load=lambda loader: _load_bare(loader) if _bare() else _load_whole(loader),
        weights=lambda options: (BARE, networks.CLIP_L) if _bare() else (WHOLE,),
    ),
)  # fmt: skip
