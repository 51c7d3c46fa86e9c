"""The match of picture and prompt by any CLIP that open_clip knows, ViT-H/14 of LAION by default."""

from __future__ import annotations

import difflib
import importlib.util
import os
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src import hub
from src.scorers import networks, preprocess
from src.scorers.base import Loader, Option, Scorer, Weights, some_prompt

if TYPE_CHECKING:
    from src.scorers.base import Judge

MODEL, TAG, REPOSITORY = "ViT-H-14", "laion2b_s32b_b79k", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILES = "open_clip_model.safetensors|open_clip_pytorch_model.safetensors|open_clip_pytorch_model.bin"


def _recipe(model: str, tag: str) -> dict[str, Any]:
    """open_clip's record of these weights: their place, and the preprocessing of their pictures.

    Raises:
        ValueError: no such model or tag; lists existing ones.
    """
    import open_clip

    if open_clip.get_model_config(model) is None:
        near = difflib.get_close_matches(model, open_clip.list_models(), n=3)
        hint = f"near ones: {', '.join(near)}" if near else "open_clip.list_models() lists them"
        raise ValueError(f"--openclip_model {model}: open_clip has no such model; {hint}")
    recipe = open_clip.get_pretrained_cfg(model, tag)
    if not recipe:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ValueError(f"--openclip_pretrained {tag}: {model} has {', '.join(tags) if tags else 'no published weights'}")
    return recipe


def weights(options: Mapping[str, Any]) -> tuple[Weights, ...]:
    model, tag = options["openclip_model"], options["openclip_pretrained"]
    if (model, tag) == (MODEL, TAG):  # known without importing open_clip, which takes seconds
        return (Weights(f"openclip-{MODEL}-{TAG}", (FILES,), REPOSITORY),)
    repository, file = os.path.split(_recipe(model, tag).get("hf_hub", ""))
    by_hand = f"put the file there from {repository} on the Hub" if repository else "put the file there"
    return (Weights(f"openclip-{model}-{tag}", (file or FILES,), repository or None, by_hand),)


def check_options(options: Mapping[str, Any]) -> str | None:
    model, tag = options["openclip_model"], options["openclip_pretrained"]
    if (model, tag) == (MODEL, TAG) or importlib.util.find_spec("open_clip") is None:
        return None
    try:
        _recipe(model, tag)
    except ValueError as error:
        return str(error)
    return None


def _pixels(images: Tensor, side: int, recipe: Mapping[str, Any]) -> Tensor:
    """Pictures (b, 3, H, W) in [0, 1] as the tower takes them: (b, 3, side, side), normalized."""
    if recipe["resize_mode"] == "squash":
        resized = preprocess.squash(images, side, recipe["interpolation"])
    else:
        resized = preprocess.shorter_side(images, side, "torchvision", recipe["interpolation"])
    return preprocess.normalize(resized, recipe["mean"], recipe["std"])


def _tokenizer(name: str) -> Any:
    """open_clip's own, or that of a repository on the Hub, as SigLIP has it.

    Raises:
        ValueError: the Hub does not give it; names the repository.
    """
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except hub.errors() as error:
        repository = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
        raise ValueError(f"--openclip_model {name}: cannot load its tokenizer, {repository} on the Hub: {hub.reason(error)}") from error


def load(loader: Loader) -> Judge:
    import open_clip

    name, tag = loader.options["openclip_model"], loader.options["openclip_pretrained"]
    recipe, (files,), tokenizer = _recipe(name, tag), weights(loader.options), _tokenizer(name)
    path = files.path(files.files[0])
    try:  # the tag says QuickGELU or GELU; the weights do not
        model = open_clip.create_model(name, pretrained=str(path), force_quick_gelu=bool(recipe.get("quick_gelu")))
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not open_clip's {name}: {' '.join(str(error).split())[:300]}") from None
    recipe = {"mean": preprocess.CLIP_MEAN, "std": preprocess.CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"} | recipe
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    if recipe["resize_mode"] not in ("shortest", "squash") or (side, side) != ((size, size) if isinstance(size, int) else tuple(size)):
        raise ValueError(f"--openclip_model {name}: its pictures are {recipe['resize_mode']} {size}, and only squares are prepared here")
    model = networks.freeze(model, loader)

    def judge(images, prompts, metadata):
        with torch.no_grad():
            texts = networks.unit(model.encode_text(tokenizer(prompts).to(loader.device)))
        return networks.cosines(networks.unit(model.encode_image(_pixels(images, side, recipe).to(loader.dtype))), texts)

    return judge


SCORERS = (
    Scorer(
        name="openclip", summary="match of picture and prompt: cosine of any open_clip model, LAION's ViT-H/14 by default",
        differentiable=True, range=(0.2, 0.4), normalizer=0.35, licence="MIT (the default's; others have their own)", load=load,
        packages={"open_clip": "open_clip_torch"}, weights=weights, check_options=check_options, check_prompt=some_prompt,
        options=(Option("openclip_model", default=MODEL), Option("openclip_pretrained", default=TAG)),
    ),
)  # fmt: skip
