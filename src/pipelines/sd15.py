"""Stable Diffusion 1.x, 2.x-base and XL, models that predict noise: load, encode prompts and images, predict, render, plan from configs.

A model's model_index.json says which of them it is. Shapes: b batch, h w latent side (pixels / 8), H W pixels, L text tokens,
D cross_attention_dim, P pooled width (1280 in XL, 0 in the others, which have no pooled embedding). `pixels` lie in [-1, 1], `images` in
[0, 1]. diffusers and transformers are imported inside the functions that need them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src import ddpm, seeds
from src.lora import unwrap
from src.pipelines import common
from src.pipelines.common import Conditioning, has_part, is_hub_id, read_config, token_ids
from src.pipelines.common import encode_images as encode_images  # every family offers these under its own name
from src.pipelines.common import sample_posterior as sample_posterior
from src.pipelines.common import unload_text_encoders as unload_text_encoders

VAE_SCALE = 8  # pixels per latent, in height and in width: three halvings in the VAE's encoder
LATENT_CHANNELS = 4
PARTS = ("unet", "vae", "text")
DENOISER = "unet"  # the denoiser's name in a pipeline
_ENCODERS, _TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
_NEEDED = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
PIPELINES = {"StableDiffusionPipeline": _NEEDED, "StableDiffusionXLPipeline": (*_NEEDED, _TOKENIZERS[1], _ENCODERS[1])}


@dataclass
class SD15:
    """The requested parts of a pipeline, frozen and in eval mode; the others are None or empty."""

    path: str
    unet: nn.Module | None
    vae: nn.Module | None
    scheduler: Any  # of any kind; its config is read, its state never used
    xl: bool
    text_encoders: list[nn.Module] = field(default_factory=list)  # CLIP-L (2.x: OpenCLIP-H); XL: CLIP-L, CLIP-G
    tokenizers: list[Any] = field(default_factory=list)
    zeros_for_empty: bool = False  # XL: zeros stand for the empty prompt

    @property
    def denoiser(self) -> nn.Module | None:
        """The UNet, by the name that all model families share."""
        return self.unet

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar of the model's training timesteps, (1000,) float32."""
        return ddpm.alphas_cumprod(**_schedule(self.scheduler.config))


# --------------------------------------------------------------------------- checking and loading


def _schedule(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}


def _is_xl(index: dict[str, Any]) -> bool:
    return index.get("_class_name") == "StableDiffusionXLPipeline"


def is_xl(path: str | Path, revision: str | None = None) -> bool:
    """Whether the model is Stable Diffusion XL, by its model_index.json; of a Hub id that one small file is downloaded."""
    return _is_xl(read_config(path, "model_index.json", revision))


def check_folder(path: str | Path, name: str = "--pretrained_model_name_or_path") -> None:
    """Refuse a base model that cannot be trained here, reading only small files; a Hub id passes (`load` checks it).

    Raises:
        ValueError: naming the flag, if a local path is missing, is no diffusers folder, is incomplete, holds
            another family, or does not predict noise.
    """
    local = common.check_folder(
        path, name, PIPELINES, takes=" or a ".join(PIPELINES), optional="the safety checker", tiny="tiny-sd15",
        repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
    )  # fmt: skip
    if local:
        _check_configs(path, f"{name} {path}")


def _check_configs(path: str | Path, flag: str, revision: str | None = None) -> None:
    """Refuse models that the maths here does not cover: another prediction or noise schedule, few steps, inpainting, shifted latents."""
    scheduler = read_config(path, "scheduler/scheduler_config.json", revision)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(
            f"{flag}: a {prediction} model (scheduler/scheduler_config.json); the losses here are defined for noise (epsilon) prediction: "
            "take Stable Diffusion 1.5, 2-1-base or XL"
        )
    if scheduler.get("beta_schedule", "linear") not in ddpm.SCHEDULES or scheduler.get("trained_betas") is not None:
        raise ValueError(f"{flag}: its noise schedule is none of {', '.join(ddpm.SCHEDULES)}, which Stable Diffusion 1.x, 2.x and XL have")
    for name, value in (("num_train_timesteps", 1000), ("rescale_betas_zero_snr", False)):  # alpha_bar has 1000 values, none of them 0
        if scheduler.get(name, value) != value:
            raise ValueError(f"{flag}: {name} {scheduler[name]} in scheduler/scheduler_config.json; Stable Diffusion 1.x, 2.x-base and XL, "
                             f"which can be trained here, have {value}")  # fmt: skip
    if scheduler.get("timestep_spacing") == "trailing":
        raise ValueError(
            f"{flag}: its scheduler has timestep_spacing trailing, as those of sd-turbo and sdxl-turbo, which draw in 1 to 4 steps; "
            "training covers all timesteps, most of which they never sample: take Stable Diffusion 1.5, 2-1-base or XL"
        )
    channels = read_config(path, "unet/config.json", revision)["in_channels"]
    if channels != LATENT_CHANNELS:
        raise ValueError(f"{flag}: its UNet takes {channels} channels, text-to-image models take {LATENT_CHANNELS}; is it for inpainting?")
    vae = read_config(path, "vae/config.json", revision)
    if vae.get("latents_mean") is not None or vae.get("shift_factor"):
        raise ValueError(f"{flag}: its VAE shifts the latents, which Stable Diffusion 1.x, 2.x and XL do not; take one of these")


def check_reference(reference: str | Path, path: str | Path) -> None:
    """Refuse a reference model that takes other text inputs than `path`: XL beside 1.x, 2.x beside 1.x; a Hub id passes.

    Raises:
        ValueError: naming --reference_model; also what `check_folder` refuses.
    """
    check_folder(reference, "--reference_model")
    if is_hub_id(str(reference)) or is_hub_id(str(path)):
        return
    theirs, ours = (text_width(read_config(one, "unet/config.json")) for one in (reference, path))
    if theirs != ours:
        raise ValueError(f"--reference_model {reference}: its UNet reads text of width {theirs[0]}, that of {path} {ours[0]}; "
                         "take a model of the same family")  # fmt: skip


def check_resolution(path: str | Path, *sides: int) -> None:
    """Refuse pixel sides that leave less than one latent at the UNet's lowest level; a Hub id passes.

    Raises:
        ValueError: naming --resolution and the smallest side that works.
    """
    if is_hub_id(str(path)):
        return
    least = VAE_SCALE * 2 ** (len(read_config(path, "unet/config.json")["block_out_channels"]) - 1)
    if min(sides) < least:
        raise ValueError(f"--resolution {min(sides)}: nothing would be left at the lowest level of the UNet of {path}; try {least} or more")


def load(
    path: str | Path, *, revision: str | None = None, variant: str | None = None, dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu", parts: Sequence[str] = PARTS,
) -> SD15:  # fmt: skip
    """Load the requested parts ("unet", "vae", "text") of a folder or Hub id; the others are neither read nor downloaded.

    Everything comes frozen (requires_grad False) and in eval mode. XL's VAE overflows in fp16: with that dtype it is converted to fp32.

    Raises:
        ValueError: what `check_folder` refuses, here for a Hub id, too.
    """
    import diffusers

    check_folder(path)
    assert set(parts) <= set(PARTS), f"parts must be among {PARTS}, got {tuple(parts)}"
    source = str(path) if is_hub_id(str(path)) else str(Path(path).expanduser())
    index = read_config(source, "model_index.json", revision)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"--pretrained_model_name_or_path {path}: holds a {name}, this program takes a {' or a '.join(PIPELINES)}")
    _check_configs(source, f"--pretrained_model_name_or_path {path}", revision)
    absent: dict[str, Any] = dict.fromkeys(("image_encoder", "feature_extractor"))  # IP-adapters, which nothing here uses
    if not _is_xl(index):
        absent |= {"safety_checker": None, "requires_safety_checker": False}  # it judges pictures for a demo, not for training
    absent |= {part: None for part in ("unet", "vae") if part not in parts}
    names = _TOKENIZERS + _ENCODERS if _is_xl(index) else (_TOKENIZERS[0], _ENCODERS[0])
    absent |= {name: None for name in names if "text" not in parts}
    pipe = getattr(diffusers, name).from_pretrained(source, revision=revision, variant=variant, dtype=dtype, **absent)
    encoders = [getattr(pipe, name) for name in names if name in _ENCODERS and "text" in parts]
    if pipe.vae is not None and dtype == torch.float16 and _is_xl(index):
        pipe.vae.float()
    for part in (pipe.unet, pipe.vae, *encoders):
        if part is not None:
            part.requires_grad_(False).eval().to(device)
    return SD15(
        path=source, unet=pipe.unet, vae=pipe.vae, scheduler=pipe.scheduler, xl=_is_xl(index), text_encoders=encoders,
        tokenizers=[getattr(pipe, name) for name in names if name in _TOKENIZERS and "text" in parts],
        zeros_for_empty=_is_xl(index) and index.get("force_zeros_for_empty_prompt", True),
    )  # fmt: skip


# --------------------------------------------------------------------------- text


def default_sequence_length(path: str | Path, revision: str | None = None) -> int:
    """CLIP tokens that the model's own tokenizer pads to: 77."""
    return int(read_config(path, "tokenizer/tokenizer_config.json", revision)["model_max_length"])


def encode_prompts(model: SD15, prompts: Sequence[str], max_sequence_length: int | None = None) -> Conditioning:
    """The text encoders on a batch of prompts, exactly as the stock pipeline's `encode_prompt` does; gradients may flow.

    1.x and 2.x: the last hidden state. XL: the penultimate ones of both encoders, concatenated, and CLIP-G's projection as `pooled`; its
    empty prompt is all zeros if model_index.json says so, as in the stock pipeline's guidance. In the encoders' dtype, on their device.

    Args:
        max_sequence_length: tokens to pad to; None takes each tokenizer's own.
    """
    assert model.text_encoders, "the text encoders are not loaded; load(parts=(..., 'text')) or use the text cache"
    prompts, hidden = list(prompts), []
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        ids = token_ids(tokenizer, prompts, max_sequence_length or tokenizer.model_max_length, encoder.device)
        out = encoder(ids, output_hidden_states=model.xl)
        hidden.append(out.hidden_states[-2] if model.xl else out[0])  # (b, L, width)
    embeds = torch.cat(hidden, dim=-1).to(model.text_encoders[-1].dtype)  # (b, L, D)
    pooled = out[0] if model.xl else embeds.new_zeros(len(prompts), 0)  # (b, P); the last encoder's
    if model.zeros_for_empty:
        said = torch.tensor([bool(prompt) for prompt in prompts], device=embeds.device)
        embeds, pooled = embeds * said[:, None, None], pooled * said[:, None]
    return Conditioning(embeds, pooled)


# --------------------------------------------------------------------------- images


def scale_latents(model: SD15, latents: Tensor) -> Tensor:
    """VAE latents -> the UNet's: times scaling_factor (0.18215 in SD1.x; there is no shift, unlike SD3)."""
    return latents * model.vae.config.scaling_factor


def decode_pixels(model: SD15, latents: Tensor, batch_size: int = 4) -> Tensor:
    """The UNet's latents (b, 4, h, w) -> pixels (b, 3, H, W) float32 at least, about [-1, 1] and not clamped; gradients may flow.

    In the VAE's own precision, also inside autocast: XL's is fp32 because it overflows in fp16.
    """
    latents = latents.to(model.vae.device) / model.vae.config.scaling_factor
    with torch.autocast(latents.device.type, enabled=False):
        decoded = [model.vae.decode(part.to(model.vae.dtype), return_dict=False)[0] for part in latents.split(batch_size)]
    pixels = torch.cat(decoded)
    return pixels if pixels.dtype == torch.float64 else pixels.float()


def decode_latents(model: SD15, latents: Tensor, batch_size: int = 4) -> Tensor:
    """The UNet's latents (b, 4, h, w) -> images (b, 3, H, W) float32 in [0, 1], `batch_size` at a time."""
    return (decode_pixels(model, latents, batch_size) * 0.5 + 0.5).clamp(0, 1)


# --------------------------------------------------------------------------- the UNet


def _device_and_dtype(unet: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the base weights: `unet.dtype` may be that of an fp32 LoRA adapter, and a wrapped UNet has no dtype."""
    weight = unwrap(unet).conv_in.weight
    return weight.device, weight.dtype


def eps(unet: nn.Module, x_t: Tensor, timestep: Tensor, condition: Conditioning) -> Tensor:
    """The predicted noise (b, 4, h, w), float32 at least.

    XL's size conditioning says that pictures were neither shrunk nor cropped, as in its stock pipeline.

    Args:
        unet: bare, LoRA'd, compiled or wrapped by DDP.
        x_t: noised latents (b, 4, h, w); timestep: (b,), whole numbers in [0, 999].
        condition: with a pooled embedding for XL, with one of width 0 for the others.
    """
    _, dtype = _device_and_dtype(unet)
    added = None
    if condition.pooled.shape[-1]:
        height, width = (side * VAE_SCALE for side in x_t.shape[-2:])
        # original size, corner of the cut, target size
        sizes = seeds.send(torch.tensor([height, width, 0, 0, height, width], dtype=dtype), x_t.device)
        added = {"text_embeds": condition.pooled.to(dtype), "time_ids": sizes.expand(len(x_t), -1)}
    prediction = unet(
        x_t.to(dtype), timestep, encoder_hidden_states=condition.embeds.to(dtype), added_cond_kwargs=added, return_dict=False
    )[0]  # fmt: skip
    return prediction if prediction.dtype == torch.float64 else prediction.float()


def _stock_pipeline(model: SD15, unet: nn.Module) -> Any:
    """diffusers' own pipeline around this UNet, with a fresh scheduler of the model's kind and nothing else."""
    import diffusers

    scheduler = type(model.scheduler).from_config(model.scheduler.config)
    parts = dict(vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler)
    if model.xl:
        return diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def render(model: SD15, unet: nn.Module, condition: Conditioning, **options: Any) -> Tensor:
    """Images (b, 3, H, W) float32 in [0, 1] by the stock pipeline and the model's own sampler; options of `common.render`."""
    pipe, condition = _stock_pipeline(model, unwrap(unet)), condition.to(*_device_and_dtype(unet))
    return common.render(pipe, unet, partial(decode_latents, model), condition, **options)


# --------------------------------------------------------------------------- planning, from the configs alone


def denoiser_from_config(source: str | Path | dict[str, Any], revision: str | None = None) -> nn.Module:
    """The UNet on the meta device, without weights: for counting parameters, LoRA targets and FLOPs. `source`: model or config."""
    from diffusers import UNet2DConditionModel

    config = dict(source) if isinstance(source, dict) else read_config(source, "unet/config.json", revision)
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def parameter_counts(path: str | Path, revision: str | None = None) -> dict[str, int]:
    """Parameters of each part that the model has, by its name in model_index.json; reads configs only, never weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    index = read_config(path, "model_index.json", revision)
    parts = {"unet": denoiser_from_config(path, revision), "vae": vae_from_config(path, revision)}
    with torch.device("meta"):
        for name, kind in zip(_ENCODERS, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
            if has_part(index, name):
                parts[name] = kind(CLIPTextConfig.from_dict(read_config(path, f"{name}/config.json", revision)))
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def text_tokens(path: str | Path, revision: str | None = None, max_sequence_length: int | None = None) -> int:
    """L of a model: CLIP's tokens, `max_sequence_length` or, if None, as many as its tokenizer pads to."""
    return max_sequence_length or default_sequence_length(path, revision)


def text_width(config: dict[str, Any]) -> tuple[int, int]:
    """(D, P) from the UNet's config: width of a text token, and of the pooled embedding."""
    if config.get("addition_embed_type") != "text_time":
        return config["cross_attention_dim"], 0
    return config["cross_attention_dim"], config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]


def vae_from_config(path: str | Path, revision: str | None = None) -> nn.Module:
    """The VAE on the meta device, without weights."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(read_config(path, "vae/config.json", revision))


def example_inputs(config: dict[str, Any], side: int, tokens: int, pictures: int = 1) -> dict[str, Any]:
    """Empty inputs of pictures of latents (side, side) with L = `tokens`, on the default device: for counting FLOPs and memory."""
    width, pooled = text_width(config)
    added = {"text_embeds": torch.empty(pictures, pooled), "time_ids": torch.empty(pictures, 6)} if pooled else None
    return dict(sample=torch.empty(pictures, config["in_channels"], side, side), timestep=torch.empty(pictures),
                encoder_hidden_states=torch.empty(pictures, tokens, width), added_cond_kwargs=added)  # fmt: skip
