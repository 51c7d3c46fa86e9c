"""A randomly initialised SD3 pipeline, smaller than the shipped one, built once per session without any download; the order of the tests.

torch is imported inside the functions: the process that only hands the tests out to its workers needs none.
"""

import gc
import os
import sys
from pathlib import Path

import pytest

# The tests compare bits and count on a CPU's memory and speed: a GPU stays out of sight, here and in the processes that they start.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nor do they ask the Hub, also without scripts/test.sh

# Looking for cyclic garbage among all that torch, diffusers and transformers define takes half a second, and Python looks often: a tenth
# of the suite's time. So it looks less often, and never at what was there when the first model had been built (`gc.freeze` below).
gc.set_threshold(10_000, 10, 10)

# Files that take several seconds, longest first: who starts with them ends together, which --dist loadfile alone would not see to.
LONGEST = [
    "test_train_lora_slow", "test_train_grpo_slow", "test_train_ddpo_slow", "test_train_dpo_slow", "test_train_refl_slow",
    "test_learning", "test_rl_epoch", "test_real_geometry", "test_contributing", "test_train_dreambooth_slow", "test_benchmarks",
    "test_rollout", "test_train_grpo", "test_train_lora", "test_train_dpo", "test_train_refl", "test_train_dreambooth",
    "test_train_full", "test_tiny_build", "test_runtime", "test_memory_table", "test_train_full_slow", "test_plan", "test_cli",
    "test_scorer_preprocess", "test_lora", "test_demo", "test_sharding", "test_tour", "test_speed", "test_train_ddpo",
    "test_tiny_build_sd15", "test_shapes", "test_seeds",
]  # fmt: skip


def clip_tokenizer():
    """CLIP's tokenizer over single letters: byte-level BPE without merges, 16 tokens at most."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!-"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)


def t5_tokenizer():
    """T5's Unigram tokenizer over single letters and the word mark, 16 tokens at most."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,.!-"]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=16)


def tiny_pipeline():
    """StableDiffusion3Pipeline in fp32 with every class of the real one; about 60 thousand parameters, 64 x 64 pixels."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16, out_channels=16,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8),
            layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=64, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        encoders = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(clip), hidden_size=8, intermediate_size=16, projection_dim=8, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=16, hidden_act=act, bos_token_id=0, eos_token_id=1, pad_token_id=1,
                )
            ) for act in ("quick_gelu", "gelu")
        ]  # fmt: skip
        encoders.append(
            T5EncoderModel(
                T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
            )
        )
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoders[0], tokenizer=clip, text_encoder_2=encoders[1], tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoders[2], tokenizer_3=t5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory) -> Path:
    """Folder of a tiny random SD3 pipeline in fp32; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-random-sd3"
    tiny_pipeline().save_pretrained(folder)
    gc.freeze()
    return folder


@pytest.fixture(scope="session")
def tiny_sd15_folder(tmp_path_factory) -> Path:
    """Folder of a tiny random SD1.5 pipeline in fp32; read it, do not write into it."""
    import unets

    folder = tmp_path_factory.mktemp("models") / "tiny-random-sd15"
    unets.sd15_pipeline().save_pretrained(folder)
    gc.freeze()
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory) -> Path:
    """Folder of a tiny random SDXL pipeline in fp32; read it, do not write into it."""
    import unets

    folder = tmp_path_factory.mktemp("models") / "tiny-random-sdxl"
    unets.sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def summaries(monkeypatch):
    """Runs draw no summary.png, which is a third of a small one, unless the test calls this."""
    from src import validation

    draw = validation.summary
    monkeypatch.setattr(validation, "summary", lambda *_: None)
    return lambda: monkeypatch.setattr(validation, "summary", draw)


def pytest_collection_modifyitems(items):
    places = {f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_sessionfinish():
    gc.unfreeze()
    if "forked" in sys.modules:
        sys.modules["forked"].stop()
