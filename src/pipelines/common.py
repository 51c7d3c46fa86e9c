"""What the model families share: the text conditioning, small files of a model folder or Hub repository, and a few steps."""

import gc
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src import hub


@dataclass(frozen=True)
class Conditioning:
    """Text input of the denoiser: embeds (b, L, D), one row per token, and pooled (b, P), from CLIP alone; P is 0 in SD1.x and 2.x."""

    embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> "Conditioning":
        """Some of the prompts, as a batch: a slice, a mask or a list of numbers (not one number, which would drop the batch axis)."""
        return Conditioning(self.embeds[index], self.pooled[index])

    def to(self, *args: Any, **kwargs: Any) -> "Conditioning":
        """Like `Tensor.to`: device, dtype, non_blocking."""
        return Conditioning(self.embeds.to(*args, **kwargs), self.pooled.to(*args, **kwargs))

    def expand(self, batch: int) -> "Conditioning":
        """One prompt repeated to (batch, ...) without copying; a condition that already has that many is returned as it is."""
        return Conditioning(self.embeds.expand(batch, -1, -1), self.pooled.expand(batch, -1))

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        return Conditioning(torch.cat([p.embeds for p in parts]), torch.cat([p.pooled for p in parts]))


# --------------------------------------------------------------------------- files


def is_hub_id(path: str) -> bool:
    """Whether the path is a Hub id owner/name: it does not exist here, and `owner` is no local folder nor models, outputs or datas."""
    owner = path.split("/")[0]
    local = Path(path).exists() or owner in ("models", "outputs", "datas") or Path(owner).is_dir()
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None and not local


def read_config(path: str | Path, name: str, revision: str | None = None) -> dict[str, Any]:
    """A small JSON file of the model, from the local folder or from the Hub (where only that file is downloaded).

    Raises:
        ValueError: naming --pretrained_model_name_or_path, if the Hub does not give it.
    """
    if is_hub_id(str(path)):
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(str(path), name, revision=revision)
        except hub.errors() as error:
            raise ValueError(f"--pretrained_model_name_or_path {path}: cannot read {name} from the Hub: {hub.reason(error)}") from error
        return json.loads(Path(file).read_text())
    return json.loads((Path(path).expanduser() / name).read_text())


def has_part(index: dict[str, Any], component: str) -> bool:
    """Whether model_index.json names the component; [null, null] stands for one that was left out, as T5 often is."""
    return index.get(component, [None, None])[1] is not None


def check_folder(
    path: str | Path, flag: str, pipelines: Mapping[str, Collection[str]], *, takes: str, optional: str, tiny: str, repository: str
) -> bool:
    """Refuse a base model that cannot be loaded, reading only small files; returns whether it is a local folder (a Hub id passes).

    Args:
        pipelines: accepted beginnings of the pipeline's class name -> required parts, besides those in model_index.json.
        takes, optional, tiny, repository: for the messages: accepted class, part that may be left out, shipped model, real one on the Hub.

    Raises:
        ValueError: naming the flag, if a local path is missing, is no diffusers folder, holds another family or is incomplete.
    """
    given, folder = f"{flag} {path}", Path(path).expanduser()
    if is_hub_id(str(path)):
        return False
    if not folder.exists():
        raise ValueError(
            f"{given}: no such folder; `bash scripts/download.sh {repository.split('/')[1]}` fetches the real weights, models/{tiny} is "
            f"shipped, and a Hub id looks like {repository}"
        )
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{given}: no model_index.json in it; a model in diffusers' folder layout is needed, not a single weight file")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        kind = index.get("_class_name", "")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{given}: model_index.json is damaged ({error}); download the model again") from error
    needed = next((parts for begins, parts in pipelines.items() if kind.startswith(begins)), None)
    if needed is None:
        raise ValueError(f"{given}: holds a {kind or 'nameless model'}, this program takes a {takes}")
    named = {part for part, value in index.items() if isinstance(value, list) and has_part(index, part)}
    missing = [part for part in sorted(named.union(needed)) if not (folder / part).is_dir()]
    if missing:
        raise ValueError(
            f"{given}: incomplete, it lacks {', '.join(missing)}; download the model again (or, to do without {optional}, "
            "write [null, null] there in its model_index.json)"
        )
    return True


# --------------------------------------------------------------------------- steps


def token_ids(tokenizer: Any, prompts: list[str], length: int, device: torch.device) -> Tensor:
    """Token ids (b, length), padded; longer prompts are cut without a warning (the stock pipeline warns at every batch)."""
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids.to(device)


def long_prompts(clip_tokenizer: Any, prompts: list[str], *, t5: bool) -> str | None:
    """A note on prompts longer than CLIP's limit, with the beginning of the first; None if there are none."""
    limit = clip_tokenizer.model_max_length
    cut = [prompt for prompt in prompts if len(clip_tokenizer(prompt, verbose=False).input_ids) > limit]
    if not cut:
        return None
    first, rest = " ".join(cut[0].split())[:60], "T5 alone reads the rest" if t5 else "the rest is not read"
    return f"note: {len(cut)} of {len(prompts)} prompts have more than CLIP's {limit} tokens, the first begins {first!r}; {rest}"


def unload_text_encoders(model: Any) -> None:
    """Drop a model's text encoders (SD3: 9.5 GB of T5 in bf16) once every prompt is encoded."""
    model.text_encoders.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encode_images(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (b, C, h, w) of the VAE's posterior, in its dtype, not yet shifted and scaled.

    Args:
        pixels: (b, 3, H, W) in [-1, 1], any float dtype.
    """
    posterior = model.vae.encode(pixels.to(model.vae.device, model.vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def sample_posterior(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """mean + std * noise in fp32; all (b, C, h, w)."""
    return mean.float() + std.float() * noise.float()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside (no LoRA dropout), the former mode after, also after an exception."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@torch.no_grad()
def render(
    pipe: Any, denoiser: nn.Module, decode: Callable[[Tensor, int], Tensor], condition: Conditioning, *, negative: Conditioning | None,
    seeds: Sequence[int], height: int, width: int, num_inference_steps: int, guidance_scale: float, batch_size: int = 4,
    decode_batch_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Images (b, 3, H, W) float32 in [0, 1] by a stock pipeline, picture i from CPU noise of seeds[i].

    A picture depends on its seed and not on the batch or device (but for rounding). The denoiser is in eval mode meanwhile.

    Args:
        decode: latents, pictures at once -> images.
        condition: b prompts, where the denoiser is, in its dtype. negative: b or 1 negative prompts of the same L; needed when
            guidance_scale > 1, else unused.
        height, width: multiples of 16, for a UNet of 8.
        batch_size: pictures denoised at once. decode_batch_size: pictures decoded at once; None: batch_size.

    Raises:
        ValueError: missing negative prompt.
    """
    assert len(seeds) == len(condition), f"{len(condition)} prompts but {len(seeds)} seeds"
    if guidance_scale > 1 and negative is None:
        raise ValueError(f"guidance scale {guidance_scale} needs a negative prompt's embeddings (those of '' by default)")
    pipe.set_progress_bar_config(disable=True)
    texts = {"": condition} | ({"negative_": negative.to(condition.embeds).expand(len(condition))} if guidance_scale > 1 else {})
    images = []
    with evaluating(denoiser):
        for start in range(0, len(condition), batch_size):
            rows = slice(start, start + batch_size)
            text = {f"{prefix}prompt_embeds": part.embeds[rows] for prefix, part in texts.items()}
            if condition.pooled.shape[-1]:
                text |= {f"{prefix}pooled_prompt_embeds": part.pooled[rows] for prefix, part in texts.items()}
            latents = pipe(
                height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, output_type="latent",
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]], **text,
            ).images  # fmt: skip
            images.append(decode(latents, decode_batch_size or batch_size))
    return torch.cat(images)
