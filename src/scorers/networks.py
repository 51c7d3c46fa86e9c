"""Checkpoints, read without running code from them, and loaded completely or refused; and unit embeddings by CLIP's two towers."""

from __future__ import annotations

import contextlib
import gzip
import pickle
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src import hub
from src.errors import first_line
from src.scorers import preprocess
from src.scorers.base import Loader, Weights

CLIP_L = Weights(  # OpenAI's ViT-L/14: of `clip`, and the backbone of the aesthetic heads
    "clip-vit-large-patch14", ("config.json", "model.safetensors|pytorch_model.bin", "tokenizer.json|vocab.json"),
    "openai/clip-vit-large-patch14",
)  # fmt: skip


# --------------------------------------------------------------------------- checkpoints


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of torch's own format, on the CPU wherever they were saved; a wrapping "state_dict" is opened.

    Raises:
        ValueError: not a checkpoint, cut short, or one that holds Python objects besides tensors: those could run code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: is not a plain file of tensors ({first_line(error).rstrip(' .')}), and code in it will not be run; "
            "download it again, or save its state_dict() alone"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = first_line(error) if str(error).strip() else "it is cut short"
        raise ValueError(f"{path}: cannot be read ({reason}); download it again") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not named tensors; download it again")
    return dict(content)


def load(module: nn.Module, state: Mapping[str, Tensor], *, path: Path, what: str) -> None:
    """Load `state` into the module; names and shapes must match exactly.

    Raises:
        ValueError: another architecture or size, with what was expected and found.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        name = next(name for name in [*expected, *found] if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path} is not {what}: expected {len(expected)} tensors, found {len(found)}; first difference: {name}, expected "
            f"{expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        )
    module.load_state_dict(state)


def freeze(module: nn.Module, loader: Loader, dtype: torch.dtype | None = None) -> nn.Module:
    """The module on the loader's device, in its dtype unless another is given, without dropout and without gradients of its own."""
    return module.to(loader.device, dtype or loader.dtype).eval().requires_grad_(False)


def pretrained(class_name: str, weights: Weights, loader: Loader, *, spare: tuple[str, ...] = ()) -> nn.Module:
    """A transformers model of that class, frozen, with every one of its tensors from the checkpoint.

    Args:
        spare: beginnings or ends of names of further tensors that the checkpoint may hold.

    Raises:
        ValueError: the checkpoint does not match the class exactly; or it is on the Hub, which cannot be reached or refuses it.
    """
    import transformers
    from safetensors import SafetensorError

    source = weights.source
    with _quiet(bars=not (weights.local or weights.cached)):  # a download of gigabytes should be seen
        try:
            model, report = getattr(transformers, class_name).from_pretrained(source, dtype=loader.dtype, output_loading_info=True)
        except (*hub.errors(), SafetensorError, pickle.UnpicklingError) as error:
            if not weights.local and hub.concerned(error):
                raise ValueError(f"{source}: {hub.reason(error)}; {weights.cure}") from error
            raise ValueError(f"{source} is not a {class_name}: {' '.join(str(error).split())[:300]}") from None
    extra = sorted(name for name in report["unexpected_keys"] if not (name.startswith(spare) or name.endswith(spare)))
    lacking = sorted(report["missing_keys"])
    if extra or lacking or report["mismatched_keys"]:
        raise ValueError(
            f"{source} is not a {class_name}: {len(lacking)} tensor(s) missing{_such_as(lacking)}, {len(extra)} unexpected{_such_as(extra)}"
        )
    return freeze(model, loader)


def _such_as(names: list[str]) -> str:
    return f" such as {names[0]}" if names else ""


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Silences transformers' loading report, which `pretrained` checks itself, and its progress bars unless `bars`."""
    from transformers.utils import logging

    verbosity, restore = logging.get_verbosity(), not bars and logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if restore:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if restore:
            logging.enable_progress_bar()


def mlp(width: int, *, activation: bool = False) -> nn.Sequential:
    """The head that improved-aesthetic-predictor and ImageReward share: width-1024-128-64-16-1, numbered as in their files.

    `nn.Identity` takes the place of dropout, which does nothing here. `activation`: the variant with ReLUs.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in ((width, 1024), (1024, 128), (128, 64)):
        layers += [nn.Linear(inputs, outputs), *([nn.ReLU()] if activation else []), nn.Identity()]
    return nn.Sequential(*layers, nn.Linear(64, 16), *([nn.ReLU()] if activation else []), nn.Linear(16, 1))


# --------------------------------------------------------------------------- CLIP


def clip_l(loader: Loader) -> nn.Module:
    """OpenAI's ViT-L/14, once per mixture."""
    return loader.once(CLIP_L, lambda: pretrained("CLIPModel", CLIP_L, loader))


def unit(features: Tensor) -> Tensor:
    """(b, D) vectors of length 1, float32."""
    return F.normalize(features.float(), dim=-1)


def clip_tokenizer() -> Any:
    """CLIP's tokenizer as transformers has it, from the vocabulary file inside the open_clip package: it is the same for every CLIP."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    file = Path(find_spec("open_clip").origin).with_name("bpe_simple_vocab_16e6.txt.gz")  # found without its import, which takes seconds
    lines = gzip.open(file, "rt", encoding="utf-8").read().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]  # as CLIP itself cuts the file
    characters = list(bytes_to_unicode().values())
    tokens = [*characters, *(character + "</w>" for character in characters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)


def embed_images(model: Any, images: Tensor, rounding: preprocess.CropRounding) -> Tensor:
    """Unit embeddings (b, D) float32 of images (b, 3, H, W) in [0, 1] by a transformers CLIPModel."""
    pixels = preprocess.clip_pixels(images, model.config.vision_config.image_size, rounding)
    return unit(model.get_image_features(pixels.to(model.dtype)).pooler_output)  # transformers 4 returned the tensor itself


def embed_prompts(model: Any, tokenizer: Any, prompts: list[str]) -> Tensor:
    """Unit embeddings (b, D) float32 of prompts by a transformers CLIPModel; longer ones are cut at its number of positions."""
    limit = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
    with torch.no_grad():
        return unit(model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output)


def cosines(images: Tensor, prompts: Tensor) -> Tensor:
    """Cosines (b,) of unit vectors (b, D) and (b, D), pair by pair."""
    return (images * prompts).sum(-1)
