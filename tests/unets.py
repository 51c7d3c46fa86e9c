"""Randomly initialised Stable Diffusion 1.5, 2.x and XL pipelines, smaller than the shipped one, built without any download."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import clip_tokenizer

SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def text_encoder(kind: str, width: int = 8) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer()), hidden_size=width, intermediate_size=16, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def vae() -> Any:
    """As a trained one in this: scaled latents of pictures have a standard deviation of about 1, and the posterior is narrow."""
    from diffusers import AutoencoderKL

    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64, scaling_factor=0.18215,
    )  # fmt: skip
    with torch.no_grad():
        made.quant_conv.weight[:4] *= 27
        made.quant_conv.bias[4:] -= 8
    return made


def unet(width: int, **changes: Any) -> Any:
    """Two levels with cross attention to text tokens of this width; 16,000 parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, attention_head_dim=2,
    ) | changes)  # fmt: skip


def sd15_pipeline() -> Any:
    """A `StableDiffusionPipeline` in fp32 with every class of the real one, 64 x 64 pixels."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StableDiffusionPipeline(
            vae=vae(), text_encoder=text_encoder("CLIPTextModel"), tokenizer=clip_tokenizer(), unet=unet(8),
            scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip


def sdxl_pipeline() -> Any:
    """A `StableDiffusionXLPipeline` in fp32: two text encoders of width 8 and 12, size conditioning, linear projections."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StableDiffusionXLPipeline(
            vae=vae(), text_encoder=text_encoder("CLIPTextModel"), text_encoder_2=text_encoder("CLIPTextModelWithProjection", 12),
            tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), scheduler=EulerDiscreteScheduler(**SCHEDULE),
            unet=unet(20, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=12 + 6 * 4,
                      use_linear_projection=True),
        )  # fmt: skip


def altered(folder: Path, copy: Path, file: str, **changes: Any) -> Path:
    """A copy of a model folder in which one JSON file says something else."""
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(content | changes))
    return copy
