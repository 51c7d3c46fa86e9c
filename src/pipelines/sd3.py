"""Stable Diffusion 3 and 3.5: load, encode prompts and images, predict velocities, render, and plan a run from the configs alone.

Shapes: b batch, h w latent side (pixels / 8), H W pixels, L text tokens (CLIP's plus T5's), D joint_attention_dim, P pooled_projection_dim.
`pixels` lie in [-1, 1], `images` in [0, 1]. diffusers and transformers are imported inside the functions that need them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src import flow, quantize
from src.lora import unwrap
from src.pipelines import common
from src.pipelines.common import Conditioning, has_part, is_hub_id, read_config, token_ids
from src.pipelines.common import encode_images as encode_images  # every family offers these under its own name
from src.pipelines.common import sample_posterior as sample_posterior
from src.pipelines.common import unload_text_encoders as unload_text_encoders

VAE_SCALE = 8  # pixels per latent, in height and in width: three halvings in the VAE's encoder
PATCH = 2  # latents per token, in height and in width (patch_size of every SD3 transformer)
MAX_SEQUENCE_LENGTH = 256  # T5 tokens in SD3's training and in the stock pipeline; longer texts cause artefacts at the edges
PARTS = ("transformer", "vae", "text", "clip")  # clip: the text encoders without T5
DENOISER = "transformer"  # the denoiser's name in a pipeline


@dataclass
class SD3:
    """The requested parts of a pipeline, frozen and in eval mode; the others are None or empty."""

    path: str
    transformer: nn.Module | None
    vae: nn.Module | None
    text_encoders: list[nn.Module | None] = field(default_factory=list)  # CLIP-L, CLIP-G, T5 (None in a folder without T5); two or []
    tokenizers: list[Any] = field(default_factory=list)
    scheduler: Any = None  # FlowMatchEulerDiscreteScheduler; its config is read, its state never used
    transformer_config: dict[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> nn.Module | None:
        """The transformer, by the name that all model families share."""
        return self.transformer

    @property
    def shift(self) -> float:
        """The timestep shift of the model's own schedule (3.0 in SD3.5)."""
        return float(self.scheduler.config.shift)

    @property
    def native_resolution(self) -> int:
        """Side in pixels that the position embeddings are laid out for (1024 in SD3.5)."""
        return self.transformer_config["sample_size"] * VAE_SCALE


# --------------------------------------------------------------------------- checking and loading


def check_folder(path: str | Path) -> None:
    """Refuse a base model that cannot be loaded, reading only small files; a Hub id passes.

    Raises:
        ValueError: naming --pretrained_model_name_or_path, if a local path is missing, is no diffusers folder, or holds another family.
    """
    common.check_folder(
        path, "--pretrained_model_name_or_path", {"StableDiffusion3": ("transformer", "vae", "scheduler")},
        takes="StableDiffusion3Pipeline (SD3 or SD3.5)", optional="T5: text_encoder_3 and tokenizer_3", tiny="tiny-sd3",
        repository="stabilityai/stable-diffusion-3.5-medium",
    )  # fmt: skip


def check_resolution(path: str | Path, *sides: int) -> None:
    """Refuse pixel sides beyond the position embeddings of a local model folder; a Hub id passes.

    Raises:
        ValueError: naming --resolution and the largest side that the model can take.
    """
    if is_hub_id(str(path)):
        return
    limit = read_config(path, "transformer/config.json")["pos_embed_max_size"] * PATCH * VAE_SCALE
    if max(sides) > limit:
        raise ValueError(f"--resolution {max(sides)}: the position embeddings of {path} end at {limit} pixels; try {limit}")


def local_shift(path: str | Path) -> float:
    """The timestep shift of a local model folder; SD3's 3.0 for a Hub id (nothing is downloaded) and for a folder without a scheduler."""
    name = "scheduler/scheduler_config.json"
    local = not is_hub_id(str(path)) and (Path(path).expanduser() / name).is_file()
    return float(read_config(path, name).get("shift", 1.0)) if local else 3.0  # 1: diffusers' default, used by `load`


def block_count(path: str | Path) -> int | None:
    """Transformer blocks of a local model folder; None for a Hub id: nothing is downloaded."""
    return None if is_hub_id(str(path)) else read_config(path, "transformer/config.json")["num_layers"]


def load(
    path: str | Path, *, revision: str | None = None, variant: str | None = None, dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu", parts: Sequence[str] = PARTS, quantized: str | None = None,
) -> SD3:  # fmt: skip
    """Load the requested parts of a folder or Hub id; the others are neither read nor downloaded.

    The parts are "transformer", "vae", "text" (all three encoders) and "clip" (CLIP-L and CLIP-G, where T5's output is computed already).
    Everything comes frozen (requires_grad False) and in eval mode. A folder without T5 (text_encoder_3 null) loads, as in diffusers.

    Args:
        quantized: "int8" or "nf4": keep most of the transformer packed (see `src/quantize.py`).

    Raises:
        ValueError: what `check_folder` refuses.
    """
    from diffusers import StableDiffusion3Pipeline

    check_folder(path)
    assert set(parts) <= set(PARTS), f"parts must be among {PARTS}, got {tuple(parts)}"
    source = str(path) if is_hub_id(str(path)) else str(Path(path).expanduser())
    encoders, tokenizers = ("text_encoder", "text_encoder_2", "text_encoder_3"), ("tokenizer", "tokenizer_2", "tokenizer_3")
    count = 3 if "text" in parts else 2 if "clip" in parts else 0
    absent = dict.fromkeys(("image_encoder", "feature_extractor"))  # IP-adapters, which nothing here uses
    absent |= {part: None for part in ("transformer", "vae") if part not in parts}
    index = read_config(source, "model_index.json", revision)
    wanted = encoders[:count] + tokenizers[:count]
    absent |= {name: None for name in encoders + tokenizers if name not in wanted or not has_part(index, name)}
    pipe = StableDiffusion3Pipeline.from_pretrained(source, revision=revision, variant=variant, dtype=dtype, **absent)
    if quantized and pipe.transformer is not None:
        quantize.linear_layers(pipe.transformer, quantized, device)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if part is not None:
            part.requires_grad_(False).eval().to(device)
    return SD3(
        path=source, transformer=pipe.transformer, vae=pipe.vae, scheduler=pipe.scheduler,
        text_encoders=[getattr(pipe, name) for name in encoders[:count]],
        tokenizers=[getattr(pipe, name) for name in tokenizers[:count]],
        transformer_config=read_config(source, "transformer/config.json", revision),
    )  # fmt: skip


def random_transformer(path: str | Path, *, revision: str | None = None, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """A transformer of the model's own geometry with new weights, drawn in fp32 from torch's global generator; frozen, in eval mode."""
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel.from_config(read_config(path, "transformer/config.json", revision))
    return nn.Module.to(transformer.requires_grad_(False).eval(), device, dtype)  # diffusers' own `to` would warn of this cast


def reload_clips(model: SD3, *, revision: str | None = None, variant: str | None = None, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Read CLIP-L and CLIP-G again, in `dtype` and trainable, by pipeline name: a cast would not restore weights that were rounded."""
    from transformers import CLIPTextModelWithProjection

    clips, options = {}, dict(revision=revision, variant=variant, dtype=dtype)
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        device = model.text_encoders[number].device
        clips[name] = CLIPTextModelWithProjection.from_pretrained(model.path, subfolder=name, **options).eval().to(device)
        model.text_encoders[number] = clips[name]
    return clips


# --------------------------------------------------------------------------- text


def default_sequence_length(source: Any, revision: str | None = None) -> int:
    """T5 tokens to pad to: what the model's own tokenizer_3 says, at most 256. The same in training, validation and demo.

    Args:
        source: a local folder, a Hub id, or the tokenizer itself. A model without T5 gets 256, the stock pipeline's zeros.
    """
    if isinstance(source, str | Path):
        if not has_part(read_config(source, "model_index.json", revision), "tokenizer_3"):
            return MAX_SEQUENCE_LENGTH
        length = read_config(source, "tokenizer_3/tokenizer_config.json", revision).get("model_max_length", MAX_SEQUENCE_LENGTH)
    else:
        length = MAX_SEQUENCE_LENGTH if source is None else source.model_max_length
    return int(min(MAX_SEQUENCE_LENGTH, length))


def clip_length(model: SD3) -> int:
    """Tokens of CLIP at the front of `Conditioning.embeds` (77 in SD3.5); T5's come after them."""
    return model.tokenizers[0].model_max_length  # both CLIPs are cut at the first tokenizer's length, as in the stock pipeline


def encode_prompts(
    model: SD3, prompts: Sequence[str], max_sequence_length: int | None = None, t5_tokens: Tensor | None = None
) -> Conditioning:
    """The three text encoders on a batch of prompts, exactly as `StableDiffusion3Pipeline.encode_prompt` does; gradients may flow.

    The penultimate hidden states of CLIP-L and CLIP-G, concatenated and zero-padded to D, followed by T5's tokens (zeros without T5).
    In the encoders' dtype, on their device.

    Args:
        max_sequence_length: T5 tokens; None takes `default_sequence_length` of the model's tokenizer.
        t5_tokens: (b, length, D) computed earlier, where only the two CLIPs are loaded.
    """
    assert model.text_encoders, "the text encoders are not loaded; load(parts=(..., 'text')) or use the text cache"
    assert len(model.text_encoders) == 3 or t5_tokens is not None, "T5 is not loaded; hand its tokens over"
    prompts, dtype, device = list(prompts), model.text_encoders[0].dtype, model.text_encoders[0].device
    hidden, pooled = [], []
    for encoder, tokenizer in zip(model.text_encoders[:2], model.tokenizers[:2], strict=True):
        out = encoder(token_ids(tokenizer, prompts, clip_length(model), device), output_hidden_states=True)
        hidden.append(out.hidden_states[-2].to(dtype))
        pooled.append(out[0])
    t5_hidden = _encode_t5(model, prompts, max_sequence_length) if t5_tokens is None else t5_tokens.to(device, dtype)  # (b, length, D)
    clip = torch.cat(hidden, dim=-1)  # (b, 77, 768 + 1280)
    clip = nn.functional.pad(clip, (0, t5_hidden.shape[-1] - clip.shape[-1]))  # (b, 77, D)
    return Conditioning(torch.cat([clip, t5_hidden], dim=-2), torch.cat(pooled, dim=-1))


def _encode_t5(model: SD3, prompts: list[str], length: int | None) -> Tensor:
    """T5's tokens (b, length, D), zeros without T5."""
    tokenizer, t5, clip = model.tokenizers[2], model.text_encoders[2], model.text_encoders[0]
    length = default_sequence_length(tokenizer) if length is None else length
    if t5 is None:
        return torch.zeros(len(prompts), length, model.transformer_config["joint_attention_dim"], device=clip.device, dtype=clip.dtype)
    return t5(token_ids(tokenizer, prompts, length, clip.device))[0].to(t5.dtype)


# --------------------------------------------------------------------------- images


def scale_latents(model: SD3, latents: Tensor) -> Tensor:
    """VAE latents -> the transformer's: (latents - shift_factor) * scaling_factor. Some other code leaves out the shift, a known bug."""
    return (latents - model.vae.config.shift_factor) * model.vae.config.scaling_factor


def decode_latents(model: SD3, latents: Tensor, batch_size: int = 4) -> Tensor:
    """The transformer's latents (b, 16, h, w) -> images (b, 3, H, W) float32 in [0, 1], `batch_size` at a time; gradients may flow.

    In the VAE's own precision, also inside autocast: training and evaluation decode the same latents to the same picture.
    """
    latents = latents.to(model.vae.device) / model.vae.config.scaling_factor + model.vae.config.shift_factor
    with torch.autocast(latents.device.type, enabled=False):
        decoded = [model.vae.decode(part.to(model.vae.dtype), return_dict=False)[0] for part in latents.split(batch_size)]
    return (torch.cat(decoded) * 0.5 + 0.5).clamp(0, 1).float()


# --------------------------------------------------------------------------- the transformer


def _device_and_dtype(transformer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the base weights: `transformer.dtype` may be that of an fp32 LoRA adapter, and a wrapped one has no dtype."""
    weight = unwrap(transformer).pos_embed.proj.weight
    return weight.device, weight.dtype


def velocity(transformer: nn.Module, latents: Tensor, sigma: Tensor, condition: Conditioning) -> Tensor:
    """The predicted velocity noise - x0, (b, 16, h, w) float32.

    The timestep goes in as fp32 whatever the transformer's dtype: rounded to bf16 it would be another timestep (711 becomes 712), and
    its sinusoids would change by up to 44 % (norm). diffusers computes them in fp32 and only then casts them to `pooled`'s dtype.

    Args:
        transformer: bare, LoRA'd, compiled or wrapped by DDP.
        latents: (b, 16, h, w), noised.
        sigma: (b,) float32 in [0, 1].
    """
    _, dtype = _device_and_dtype(transformer)
    prediction = transformer(
        hidden_states=latents.to(dtype), timestep=flow.timestep(sigma), encoder_hidden_states=condition.embeds.to(dtype),
        pooled_projections=condition.pooled.to(dtype), return_dict=False,
    )[0]  # fmt: skip
    return prediction.float()


def timestep_shift(model: SD3, shift: float | str, height: int, width: int) -> float:
    """The timestep shift that --shift gives for pictures of height x width pixels.

    "model": the schedule's own shift; "resolution": that shift, scaled from the native resolution to this size;
    a number: itself.
    """
    if shift == "resolution":
        return flow.resolution_shift(model.shift, height, width, model.native_resolution)
    return model.shift if shift == "model" else float(shift)


def render(model: SD3, transformer: nn.Module, condition: Conditioning, **options: Any) -> Tensor:
    """Images (b, 3, H, W) float32 in [0, 1] by the stock StableDiffusion3Pipeline; options of `common.render`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline(
        transformer=unwrap(transformer), scheduler=FlowMatchEulerDiscreteScheduler.from_config(model.scheduler.config), vae=None,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    condition = condition.to(*_device_and_dtype(transformer))
    return common.render(pipe, transformer, partial(decode_latents, model), condition, **options)


# --------------------------------------------------------------------------- planning, from the configs alone


def transformer_from_config(source: str | Path | dict[str, Any], revision: str | None = None) -> nn.Module:
    """The transformer on the meta device, without weights: for counting parameters, LoRA targets and FLOPs. `source`: model or config."""
    from diffusers import SD3Transformer2DModel

    config = dict(source) if isinstance(source, dict) else read_config(source, "transformer/config.json", revision)
    with torch.device("meta"):
        return SD3Transformer2DModel.from_config(config)


denoiser_from_config = transformer_from_config  # by the name that all model families share


def text_encoder_from_config(path: str | Path, name: str, revision: str | None = None) -> nn.Module:
    """`text_encoder` (CLIP-L), `text_encoder_2` (CLIP-G) or `text_encoder_3` (T5) on the meta device, without weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    config = read_config(path, f"{name}/config.json", revision)
    with torch.device("meta"):
        if name == "text_encoder_3":
            return T5EncoderModel(T5Config.from_dict(config))
        return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))


def parameter_counts(path: str | Path, revision: str | None = None) -> dict[str, int]:
    """Parameters of each part that the model has, by its name in model_index.json; reads configs only, never weights."""
    from diffusers import AutoencoderKL

    index = read_config(path, "model_index.json", revision)
    parts = {"transformer": transformer_from_config(path, revision)}
    with torch.device("meta"):
        parts["vae"] = AutoencoderKL.from_config(read_config(path, "vae/config.json", revision))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if has_part(index, name):
            parts[name] = text_encoder_from_config(path, name, revision)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def text_tokens(path: str | Path, revision: str | None = None, max_sequence_length: int | None = None) -> int:
    """L of a model: CLIP's tokens plus T5's, which are `max_sequence_length` or, if None, the model's own."""
    clip = read_config(path, "tokenizer/tokenizer_config.json", revision)["model_max_length"]
    return clip + (max_sequence_length or default_sequence_length(path, revision))


def text_width(config: dict[str, Any]) -> tuple[int, int]:
    """(D, P) from the transformer's config: width of a text token, and of the pooled embedding."""
    return config["joint_attention_dim"], config["pooled_projection_dim"]


def example_inputs(config: dict[str, Any], side: int, tokens: int, pictures: int = 1) -> dict[str, Tensor]:
    """Empty inputs of pictures of latents (side, side) with L = `tokens`, on the default device: for counting FLOPs and memory."""
    width, pooled = text_width(config)
    return dict(hidden_states=torch.empty(pictures, config["in_channels"], side, side), timestep=torch.empty(pictures),
                encoder_hidden_states=torch.empty(pictures, tokens, width), pooled_projections=torch.empty(pictures, pooled))  # fmt: skip
