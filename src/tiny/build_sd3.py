"""The geometry and the loss of tiny-sd3: Stable Diffusion 3.5's classes at a few million parameters, and flow matching."""

import argparse

import torch
import torch.nn.functional as F

from src.tiny.denoiser import Batch, Text
from src.tiny.loop import RESOLUTION

DENOISER = "transformer"
SHIFT = 3.0  # of the timestep schedule, as in Stable Diffusion 3.5
AUTOENCODER = {"vae_steps": 4000, "decoder_steps": 14000, "vae_blots": 4}  # defaults of flags that both models have
DEFAULTS = {"transformer_steps": 10000, "layers": 6, "heads": 4}  # defaults of flags that only this model has


def make_vae(channels: tuple[int, ...] = (16, 16, 32, 64)):
    """Return an `AutoencoderKL` as in Stable Diffusion 3.5: 8x smaller, 16 channels, no quant convolutions.

    Two groups for the norms: with a group for each channel (8 groups of 8 channels) a flat picture's colour is normalised away,
    and learning colours takes more than twice as long.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
        shift_factor=0.0,  # measured later
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def make_transformer(layers: int = 6, heads: int = 4):
    """Return an `SD3Transformer2DModel` with dual attention in its first half and RMS norm on queries and keys."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=RESOLUTION // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=128,
        caption_projection_dim=heads * 32,
        pooled_projection_dim=128,
        pos_embed_max_size=16,  # positions for up to 256 pixels a side; the 384 of the real model would weigh 38 MB here
        dual_attention_layers=tuple(range((layers + 1) // 2)),
        qk_norm="rms_norm",
    )


def make_text_encoders(tokenizers: list):
    """Return two `CLIPTextModelWithProjection` (64 wide each, as 768 + 1280 are in the real model) and a `T5EncoderModel` (128)."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    encoders = []
    for tokenizer, activation in zip(tokenizers[:2], ("quick_gelu", "gelu"), strict=True):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        encoders.append(CLIPTextModelWithProjection(config))
    t5 = T5Config(
        vocab_size=len(tokenizers[2]),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        dropout_rate=0.0,
    )
    return [*encoders, T5EncoderModel(t5)]


def make_sd3(seed: int = 0, layers: int = 6, heads: int = 4, vae_channels: tuple[int, ...] = (16, 16, 32, 64)):
    """Return a `StableDiffusion3Pipeline` of random weights and the final geometry."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from src.tiny.tokenizers import clip_tokenizer, t5_tokenizer

    torch.manual_seed(seed)
    tokenizers = [clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer()]
    encoders = make_text_encoders(tokenizers)
    return StableDiffusion3Pipeline(
        transformer=make_transformer(layers, heads),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=make_vae(vae_channels),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=encoders[2],
        tokenizer_3=tokenizers[2],
    )


def make(args: argparse.Namespace):
    """Return the pipeline of random weights that the flags describe."""
    return make_sd3(args.seed, args.layers, args.heads, tuple(args.vae_channels))


def tokenize(pipe, prompts: list[str]) -> Text:
    """Tokenize for CLIP-L, CLIP-G (padded with another token) and T5, padded to the tokenizers' 16 tokens."""
    return tuple(
        tokenizer(prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)
    )


def encode_text(pipe, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode with gradient, as `StableDiffusion3Pipeline.encode_prompt` does: penultimate CLIP states concatenated, T5's tokens after them.

    Returns:
        Prompt embeddings (b, 32, 128) and pooled embeddings (b, 128).
    """
    clip_l, clip_g, t5 = text
    clips = [encoder(ids, output_hidden_states=True) for encoder, ids in ((pipe.text_encoder, clip_l), (pipe.text_encoder_2, clip_g))]
    clip = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)  # (b, 16, 64 + 64): no zeros to pad at this width
    t5 = pipe.text_encoder_3(t5)[0]  # (b, 16, 128), without a mask as in the pipeline
    return torch.cat([clip, t5], dim=1), torch.cat([output.text_embeds for output in clips], dim=-1)


def times(size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw sigmas (b,) in (0, 1): logit-normal, after the schedule's shift."""
    u = torch.sigmoid(torch.randn(size, generator=generator))
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def loss(pipe, batch: Batch) -> torch.Tensor:
    """Return the mean squared error of the velocity eps - x0, 0-d; the batch's times are sigmas."""
    noisy = batch.latents + batch.time[:, None, None, None] * (batch.noise - batch.latents)
    states, pooled = encode_text(pipe, batch.text)
    velocity = pipe.transformer(noisy, timestep=1000 * batch.time, encoder_hidden_states=states, pooled_projections=pooled).sample
    return F.mse_loss(velocity, batch.noise - batch.latents)


def learners(pipe) -> list[torch.nn.Module]:
    """Return the modules that are trained together."""
    return [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
