"""HPSv2 and v2.1: people's preferences by a CLIP ViT-H/14 with open_clip's names (https://arxiv.org/abs/2306.09341).

The numbers of the two versions cannot be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from src.scorers import networks, preprocess
from src.scorers.base import Loader, Option, Scorer, Weights, some_prompt

if TYPE_CHECKING:
    from src.scorers.base import Judge

ARCHITECTURE = "ViT-H-14"  # in open_clip's list
FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2": "HPS_v2_compressed.pt"}


def _weights(version: str) -> Weights:
    return Weights("hps", (FILES[version],), "xswu/HPSv2")


def load(loader: Loader) -> Judge:
    import open_clip

    version = loader.options["hps_version"]
    path = _weights(version).path(FILES[version])
    state = networks.read(path)
    model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    networks.load(model, state, path=path, what=f"HPS {version}, open_clip's {ARCHITECTURE}")
    model, tokenizer = networks.freeze(model, loader), open_clip.get_tokenizer(ARCHITECTURE)
    side = model.visual.image_size[0]

    def judge(images, prompts, metadata):
        pixels = preprocess.normalize(preprocess.pad_to_square(images, side), preprocess.CLIP_MEAN, preprocess.CLIP_STD)
        with torch.no_grad():
            texts = networks.unit(model.encode_text(tokenizer(prompts).to(loader.device)))
        return networks.cosines(networks.unit(model.encode_image(pixels.to(loader.dtype))), texts)

    return judge


SCORERS = (
    Scorer(
        name="hps", summary="what people prefer for the prompt: HPS v2.1 or v2, cosine", differentiable=True,
        range=(0.2, 0.35), normalizer=0.3, licence="Apache-2.0", load=load, packages={"open_clip": "open_clip_torch"},
        options=(Option("hps_version", default="v2.1", choices=tuple(FILES)),),
        weights=lambda options: (_weights(options["hps_version"]),), check_prompt=some_prompt,
    ),
)  # fmt: skip
