"""The published geometries: exact parameter counts, weights born where they are needed, folders without weights."""

import json

import pytest
import torch

from src.pipelines import geometry, sd3, stock

# Parameters of each part as counted in the published weight files. The transformer of medium, by hand: width d = 1536, and per block
# 12 d^2 in each stream for attention and MLP (q, k, v, out, 4x up and down), 6 d^2 of adaLN in each; see the test below.
COUNTS = {
    ("sd3.5-medium", "transformer"): 2_243_171_520, ("sd3.5-medium", "vae"): 83_819_683,
    ("sd3.5-medium", "text_encoder"): 123_650_304, ("sd3.5-medium", "text_encoder_2"): 694_659_840,
    ("sd3.5-medium", "text_encoder_3"): 4_762_310_656, ("sd3.5-large", "transformer"): 8_056_627_520,
    ("sd1.5", "unet"): 859_520_964, ("sd1.5", "vae"): 83_653_863, ("sd1.5", "text_encoder"): 123_060_480,
}  # fmt: skip


@pytest.mark.parametrize(("model", "part"), COUNTS)
def test_counts_are_the_published_ones(model, part):
    module = geometry.build(geometry.MODELS[model][part])
    assert all(p.is_meta for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) == COUNTS[model, part]


def test_the_count_of_medium_by_hand():
    """d = 1536, 24 blocks, 13 of them dual, the last without a text half after its attention.

    Linear layers with bias: n d^2 weights and n d biases. One stream of a block: attention 4 d^2 (q, k, v, out), MLP 8 d^2 with 5 d biases,
    adaLN 6 d^2; q and k norms are 64 + 64. The last block's text stream: q, k, v (3 d^2, though q has no reader) and adaLN 2 d^2.
    A dual block adds 4 d^2 attention with its norms, and 3 d^2 more adaLN. Outside: patches 16*4 -> d, text 4096 -> d, time 256 -> d -> d,
    pooled 2048 -> d -> d, and at the end adaLN 2 d^2 and d -> 64.
    """
    d = 1536
    stream = (4 + 8 + 6) * d * d + (4 + 5 + 6) * d + 128
    last = (3 + 2) * d * d + (3 + 2) * d + 128
    dual = (4 + 3) * d * d + (4 + 3) * d + 128
    outside = (64 * d + d) + (4096 * d + d) + (256 * d + d + d * d + d) + (2048 * d + d + d * d + d) + (2 * d * d + 2 * d) + (d * 64 + 64)
    assert 47 * stream + last + 13 * dual + outside == COUNTS["sd3.5-medium", "transformer"]


def test_what_no_count_of_parameters_shows_is_as_published():
    """Position embeddings of large: 192^2 places of 38 * 64. SD1.5's "attention_head_dim" 8 is the number of heads, whatever its name.

    The tiny models have the published activations and noise schedule. The VAEs' latents are brought to unit variance by 1.5305, after
    0.0609 is taken away (SD3's config.json), and by 0.18215 (SD1.5's).
    """
    large = geometry.build(geometry.MODELS["sd3.5-large"]["transformer"])
    assert sum(buffer.numel() for buffer in large.buffers()) == 192**2 * 38 * 64
    models, folder = geometry.MODELS, geometry.Path(__file__).parent.parent / "models"
    heads = geometry.build(models["sd1.5"]["unet"]).down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads
    assert heads == 8
    for name, part in (("tiny-sd3", "text_encoder"), ("tiny-sd3", "text_encoder_2"), ("tiny-sd15", "text_encoder")):
        model = models["sd3.5-medium" if name == "tiny-sd3" else "sd1.5"]
        assert model[part]["hidden_act"] == json.loads((folder / name / part / "config.json").read_text())["hidden_act"], (name, part)
    schedule = json.loads((folder / "tiny-sd15/scheduler/scheduler_config.json").read_text())
    assert models["sd1.5"]["scheduler"].items() <= schedule.items()
    scales = [(model["vae"]["scaling_factor"], model["vae"].get("shift_factor")) for model in models.values()]
    assert scales == [(1.5305, 0.0609), (1.5305, 0.0609), (0.18215, None)]


TINY = geometry.MODELS["sd3.5-medium"]["transformer"] | {
    "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
    "pooled_projection_dim": 16, "pos_embed_max_size": 8, "sample_size": 8, "dual_attention_layers": (0,),
}  # fmt: skip


def test_weights_are_born_in_their_dtype_and_nowhere_else():
    """No tensor of a parameter's size is ever fp32: seen by watching every operation of the construction."""
    from torch.utils._python_dispatch import TorchDispatchMode

    wide = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and out.ndim == 2 and min(out.shape) > 8 and out.shape[0] != 64:
                wide.append((str(function), tuple(out.shape)))
            return out

    with Watch():
        module = geometry.build(TINY, dtype=torch.bfloat16, device="cpu")
    assert not wide
    assert {t.dtype for t in (*module.parameters(), *module.buffers())} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert module.transformer_blocks[0].ff.net[2].weight.std() > 0, "drawn, not left empty"


def test_the_default_dtype_is_put_back_after_an_error():
    with pytest.raises(AttributeError):
        geometry.build({"_class_name": "NoSuchModel"}, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_a_written_folder_is_planned_like_the_published_model(tmp_path):
    geometry.write_configs(geometry.MODELS["sd3.5-medium"], tmp_path)
    sd3.check_folder(tmp_path)
    counts = sd3.parameter_counts(tmp_path)
    assert counts == {part: count for (model, part), count in COUNTS.items() if model == "sd3.5-medium"}
    assert sd3.default_sequence_length(tmp_path) == 256 and sd3.block_count(tmp_path) == 24
    assert sd3.read_config(tmp_path, "scheduler/scheduler_config.json")["shift"] == 3.0
    geometry.write_configs(geometry.MODELS["sd1.5"], tmp_path / "sd15")
    assert stock.model_family(str(tmp_path / "sd15")) == "sd15"
    index = json.loads((tmp_path / "sd15/model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"] and "tokenizer_2" not in index


SMALL_TEXT = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "projection_dim": 8, "num_attention_heads": 2}
SMALL_VAE = geometry.MODELS["sd3.5-medium"]["vae"] | {
    "block_out_channels": (8,), "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
}  # fmt: skip


def small() -> dict:
    """SD3.5-medium's parts and token counts, a few thousand weights."""
    medium = geometry.MODELS["sd3.5-medium"]
    return medium | {
        "transformer": TINY, "vae": SMALL_VAE, "text_encoder": medium["text_encoder"] | SMALL_TEXT,
        "text_encoder_2": medium["text_encoder_2"] | SMALL_TEXT,
        "text_encoder_3": medium["text_encoder_3"] | {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2},
    }  # fmt: skip


def test_random_weights_load_and_read_texts_as_long_as_the_published_ones(tmp_path):
    """77 tokens of CLIP and 256 of T5; CLIP's pooled text is read at the end of the text, so that two texts differ."""
    tokenizers = geometry.Path(__file__).parent.parent / "models/tiny-sd3"
    geometry.write_weights(small(), tmp_path, tokenizers)
    model = sd3.load(tmp_path, dtype=torch.bfloat16)
    assert model.transformer.dtype == torch.bfloat16 and not list(tmp_path.glob("*.unfinished"))
    texts = sd3.encode_prompts(model, ["a red circle", "a blue star"])
    assert texts.embeds.shape == (2, 77 + 256, 16) and not torch.equal(texts.pooled[0], texts.pooled[1])


def test_weights_that_are_there_stay_and_an_interrupted_part_is_written_anew(tmp_path):
    tokenizers = geometry.Path(__file__).parent.parent / "models/tiny-sd3"
    geometry.write_weights(small(), tmp_path, tokenizers)
    vae = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    before = vae.read_bytes()
    transformer = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    (tmp_path / "transformer").rename(tmp_path / "transformer.unfinished")
    geometry.write_weights(small(), tmp_path, tokenizers)
    assert vae.read_bytes() == before and transformer.is_file() and not (tmp_path / "transformer.unfinished").exists()


def test_the_configs_say_only_what_differs_from_the_library():
    """Each key is known to its class: from_config drops an unknown one with no more than a warning."""
    import inspect

    import diffusers
    import transformers

    for model in geometry.MODELS.values():
        for part, config in model.items():
            keys = config.keys() - {"_class_name", "architectures", "model_type"}
            if "_class_name" in config:
                known = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters.keys()
            else:
                known = dir(getattr(transformers, config["architectures"][0]).config_class())
            assert keys <= set(known), (part, keys - set(known))
