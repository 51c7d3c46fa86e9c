"""The published models as small dictionaries, so that their size can be planned, measured and tested without a download.

A model is `{part: config}`, with the parts' names in model_index.json and the keys of diffusers' and transformers' own config files; keys
at the library's default are left out. `build` makes one part with random weights, `write_configs` writes a model folder without
weights, `write_weights` one with random weights, which every program can load.

Sources: the config files of stabilityai/stable-diffusion-3.5-medium, stabilityai/stable-diffusion-3.5-large and
stable-diffusion-v1-5/stable-diffusion-v1-5.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

Config = dict[str, Any]

_FOUR_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
}  # fmt: skip
_VAE_16 = {  # 16 channels, 8x: SD3 and SD3.5
    "_class_name": "AutoencoderKL", **_FOUR_LEVELS, "latent_channels": 16, "sample_size": 1024,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_VAE_4 = {"_class_name": "AutoencoderKL", **_FOUR_LEVELS, "latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215}
_CLIP_L = {
    "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "vocab_size": 49408,
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu",
}  # fmt: skip
_T5_XXL = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240,
    "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
_LARGE = SD35_MEDIUM | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192, "dual_attention_layers": (),
}  # fmt: skip
_UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768,
    "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
_DDPM = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
}  # fmt: skip

_SD3_TEXT = {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5_XXL}
MODELS: dict[str, dict[str, Config]] = {
    "sd3.5-medium": {"transformer": SD35_MEDIUM, "vae": _VAE_16, "scheduler": _FLOW, **_SD3_TEXT},
    "sd3.5-large": {"transformer": _LARGE, "vae": _VAE_16, "scheduler": _FLOW, **_SD3_TEXT},
    "sd1.5": {
        "unet": _UNET, "vae": _VAE_4, "scheduler": _DDPM, "text_encoder": _CLIP_L | {"architectures": ["CLIPTextModel"]},
    },
}  # fmt: skip

# The folder that scripts/download.sh gives a model -> its name above
FOLDERS = {"stable-diffusion-3.5-medium": "sd3.5-medium", "stable-diffusion-3.5-large": "sd3.5-large", "stable-diffusion-v1-5": "sd1.5"}

# Tokens that a model's tokenizers pad to. T5's own file says 512; `sd3.default_sequence_length` caps it at 256.
_TOKENIZERS = {"tokenizer": ("CLIPTokenizer", 77), "tokenizer_2": ("CLIPTokenizer", 77), "tokenizer_3": ("T5TokenizerFast", 512)}


@contextlib.contextmanager
def _drawn_as(dtype: torch.dtype, device: str | torch.device) -> Iterator[None]:
    """Inside, new parameters are created in `dtype` on `device`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(config: Config, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "meta") -> nn.Module:
    """A part with random weights, created in `dtype` directly on `device` (no copy on the host); frozen, in eval mode.

    Drawn by the library's own initialisation from torch's global generator of that device.

    Args:
        config: one of MODELS[...][...], or what a config.json holds; a scheduler has no weights and cannot be built.
    """
    name = config["_class_name"] if "_class_name" in config else config["architectures"][0]
    with _drawn_as(dtype, device):
        if "_class_name" in config:
            import diffusers

            module = getattr(diffusers, name).from_config(config)
        else:
            import transformers

            kind = getattr(transformers, name)
            module = kind(kind.config_class.from_dict(config))
    for owner in module.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():  # position embeddings: fp32 whatever the default
                setattr(owner, key, buffer.to(dtype))
    return module.requires_grad_(False).eval()


def write_configs(model: dict[str, Config], folder: str | Path) -> None:
    """Write a model folder without weights: what --dry_run reads. diffusers refuses to load it.

    Args:
        model: such as MODELS["sd3.5-medium"], or a smaller one with the same parts.
    """
    folder, sd3 = Path(folder), "transformer" in model
    index: Config = {"_class_name": "StableDiffusion3Pipeline" if sd3 else "StableDiffusionPipeline"}
    for part, config in model.items():
        library = "diffusers" if "_class_name" in config else "transformers"
        index[part] = [library, config["_class_name"] if library == "diffusers" else config["architectures"][0]]
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        _write(folder / part / file, config)
    for part, (kind, length) in _TOKENIZERS.items():
        if part.replace("tokenizer", "text_encoder") in model:
            index[part] = ["transformers", kind]
            _write(folder / part / "tokenizer_config.json", {"tokenizer_class": kind, "model_max_length": length})
    _write(folder / "model_index.json", index)


def write_weights(model: dict[str, Config], folder: str | Path, tokenizers: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model folder with random weights, part by part; parts that are there stay as they are.

    Args:
        model: such as MODELS["sd3.5-medium"], whose weights take 16 GB in bf16.
        tokenizers: a model folder such as models/tiny-sd3; its tokenizers are used, padded to the published lengths. Their few tokens lie
            within the published vocabularies.
    """
    folder, tokenizers = Path(folder), Path(tokenizers)
    configs = dict(model)
    for part in (part for part in model if part.startswith("text_encoder")):  # CLIP finds the end of a text by its token id
        given = _read(tokenizers / part / "config.json")
        configs[part] = model[part] | {key: given[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in given}
    write_configs(configs, folder)
    for part, (_, length) in _TOKENIZERS.items():
        if (folder / part).is_dir():
            shutil.copytree(tokenizers / part, folder / part, dirs_exist_ok=True)
            _write(
                folder / part / "tokenizer_config.json", _read(tokenizers / part / "tokenizer_config.json") | {"model_max_length": length}
            )
    for part, config in configs.items():
        if part != "scheduler" and not any((folder / part).glob("*.safetensors")):
            unfinished = folder / f"{part}.unfinished"
            build(config, dtype=dtype, device="cpu").save_pretrained(unfinished, max_shard_size="5GB")  # sharded as the published T5
            shutil.rmtree(folder / part)
            unfinished.rename(folder / part)


def _read(path: Path) -> Config:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
