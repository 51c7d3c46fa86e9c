"""The geometry and the loss of tiny-sd15: Stable Diffusion 1.5's classes at a few million parameters, and noise prediction."""

import argparse

import torch
import torch.nn.functional as F

from src.tiny.denoiser import Batch, Text
from src.tiny.loop import RESOLUTION

DENOISER = "unet"
# Defaults of flags that both models have. Four latent channels hold a quarter of what tiny-sd3's sixteen do: no room for random blots.
AUTOENCODER = {"vae_steps": 10000, "decoder_steps": 4000, "vae_blots": 0}
DEFAULTS = {"unet_steps": 5000, "unet_channels": [64, 64, 96]}  # defaults of flags that only this model has
# The noise schedule of Stable Diffusion 1.5, from its scheduler_config.json.
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True, "clip_sample": False,
}  # fmt: skip


def make_vae(channels: tuple[int, ...]):
    """Return an `AutoencoderKL` as in Stable Diffusion 1.5: 8x smaller, 4 channels, quant convolutions, attention in the middle.

    Two groups for the norms; `build_sd3.make_vae` says why.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=RESOLUTION,
        scaling_factor=1.0,  # measured later
    )


def make_unet(channels: tuple[int, ...], text_width: int):
    """Return a `UNet2DConditionModel`: cross attention in all levels but the last, as in Stable Diffusion 1.5, and in the middle.

    Four heads (`attention_head_dim` is their number in this class) and eight groups for the norms: with the real 8 heads and 32 groups,
    each would have only a few channels.
    """
    from diffusers import UNet2DConditionModel

    attention = [True] * (len(channels) - 1) + [False]
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attention),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_text_encoder(tokenizer, width: int = 96):
    """Return a `CLIPTextModel` of two layers; 768 wide in the real model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_sd15(seed: int, unet_channels: tuple[int, ...], vae_channels: tuple[int, ...]):
    """Return a `StableDiffusionPipeline` of random weights and the final geometry."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    from src.tiny.tokenizers import clip_tokenizer

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    text_encoder = make_text_encoder(tokenizer)
    unet = make_unet(unet_channels, text_encoder.config.hidden_size)
    scheduler = PNDMScheduler(**{name: value for name, value in SCHEDULE.items() if name != "clip_sample"})
    scheduler.register_to_config(clip_sample=False)  # not PNDM's: for other schedulers loaded from this config, such as DDIM
    return StableDiffusionPipeline(
        vae=make_vae(vae_channels),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make(args: argparse.Namespace):
    """Return the pipeline of random weights that the flags describe."""
    return make_sd15(args.seed, tuple(args.unet_channels), tuple(args.vae_channels))


def tokenize(pipe, prompts: list[str]) -> Text:
    """Tokenize, padded to the tokenizer's 16 tokens."""
    length = pipe.tokenizer.model_max_length
    return (pipe.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids,)


def encode_text(pipe, text: Text) -> torch.Tensor:
    """Encode with gradient, as `StableDiffusionPipeline.encode_prompt` does: the last hidden state (b, 16, 96), after its norm."""
    return pipe.text_encoder(text[0])[0]


def times(size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw timesteps (b,), whole numbers from 0 to 999, uniform."""
    return torch.randint(SCHEDULE["num_train_timesteps"], (size,), generator=generator)


def loss(pipe, batch: Batch) -> torch.Tensor:
    """Return the mean squared error of the predicted noise, 0-d; the batch's times are timesteps."""
    signal = pipe.scheduler.alphas_cumprod[batch.time][:, None, None, None]  # (b, 1, 1, 1)
    noisy = signal.sqrt() * batch.latents + (1 - signal).sqrt() * batch.noise
    return F.mse_loss(pipe.unet(noisy, batch.time, encoder_hidden_states=encode_text(pipe, batch.text)).sample, batch.noise)


def learners(pipe) -> list[torch.nn.Module]:
    """Return the modules that are trained together."""
    return [pipe.unet, pipe.text_encoder]
