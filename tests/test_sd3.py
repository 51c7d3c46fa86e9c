"""The SD3 pipeline module against the stock StableDiffusion3Pipeline, AutoencoderKL by hand, and the published geometry."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from src.pipelines import common, geometry, sd3

PROMPTS = ["a red circle", "", "a very long prompt, which no tokenizer of sixteen tokens can hold"]
PUBLISHED = {  # geometry of SD3.5-medium's other parts. Source: the config.json files of stabilityai/stable-diffusion-3.5-medium
    "text_encoder": dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768,
                         num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77),
    "text_encoder_2": dict(vocab_size=49408, hidden_size=1280, intermediate_size=5120, projection_dim=1280,
                           num_hidden_layers=32, num_attention_heads=20, max_position_embeddings=77),
    "text_encoder_3": dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240,
                           num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"),
    "vae": dict(block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=16,
                up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False),
    "transformer": geometry.SD35_MEDIUM,
}  # fmt: skip


def stock(folder, dtype=torch.float32, **parts):
    """The stock pipeline, frozen as ours is: torch takes other CPU kernels for weights that require grad, which differ in the last bits."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype, **parts)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        if part is not None:
            part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model(tiny_sd3_folder):
    return sd3.load(tiny_sd3_folder)


def inputs(model, batch=2, height=64, width=64):
    """Latents, sigma and a condition that differ from sample to sample."""
    g = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, 16, height // 8, width // 8, generator=g)
    with torch.no_grad():
        condition = sd3.encode_prompts(model, [f"{i} red circles" for i in range(batch)])
    return latents, torch.linspace(0.2, 0.711, batch), condition


# --------------------------------------------------------------------------- text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [16, 9])
def test_prompts_are_encoded_as_by_the_stock_pipeline(tiny_sd3_folder, dtype, length, caplog):
    model, pipe = sd3.load(tiny_sd3_folder, dtype=dtype, parts=("text",)), stock(tiny_sd3_folder, dtype)
    with torch.no_grad():
        want = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length)
    caplog.clear()
    logging.getLogger("transformers").addHandler(caplog.handler)
    got = sd3.encode_prompts(model, PROMPTS, length)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert got.embeds.shape == (3, 16 + length, 32) and got.pooled.shape == (3, 16)
    assert got.embeds.dtype == got.pooled.dtype == dtype
    assert torch.equal(got.embeds, want[0]) and torch.equal(got.pooled, want[2])
    assert not caplog.records, "cutting a long prompt must not print a line per batch"


def test_without_t5_its_tokens_are_zeros_as_in_diffusers(tiny_sd3_folder, tmp_path):
    """What `save_pretrained` writes after `from_pretrained(..., text_encoder_3=None, tokenizer_3=None)`."""
    pipe = stock(tiny_sd3_folder, text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    sd3.check_folder(tmp_path)
    assert sd3.default_sequence_length(tmp_path) == 256  # no tokenizer to ask: the stock pipeline's own length
    assert "text_encoder_3" not in sd3.parameter_counts(tmp_path)
    model = sd3.load(tmp_path, parts=("text",))
    with torch.no_grad():
        want = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    got = sd3.encode_prompts(model, PROMPTS)
    assert got.embeds.shape == (3, 16 + 256, 32) and not got.embeds[:, 16:].any()
    assert torch.equal(got.embeds, want[0]) and torch.equal(got.pooled, want[2])


def test_gradients_can_flow_into_the_text_encoders(tiny_sd3_folder):
    model = sd3.load(tiny_sd3_folder, parts=("text",))
    for encoder in model.text_encoders:
        encoder.requires_grad_(True)
    condition = sd3.encode_prompts(model, PROMPTS)
    (condition.embeds.square().sum() + condition.pooled.sum()).backward()
    assert all(encoder.get_input_embeddings().weight.grad.any() for encoder in model.text_encoders)


def test_sequence_length_is_the_tokenizers_own_but_at_most_256(tiny_sd3_folder, model):
    """SD3.5's tokenizer_3 says 512, the stock pipeline pads to 256; the public scripts train at 77 and validate at 256 (defect 14)."""
    assert sd3.default_sequence_length(tiny_sd3_folder) == sd3.default_sequence_length(str(tiny_sd3_folder)) == 16
    assert sd3.default_sequence_length(model.tokenizers[2]) == 16
    assert sd3.default_sequence_length(SimpleNamespace(model_max_length=512)) == 256
    assert sd3.encode_prompts(model, [""]).embeds.shape[1] == 16 + 16


def test_conditioning_can_be_cut_joined_and_repeated():
    condition = sd3.Conditioning(torch.randn(5, 4, 3), torch.randn(5, 2))
    joined = sd3.Conditioning.cat([condition[:2], condition[2:]])
    assert torch.equal(joined.embeds, condition.embeds) and torch.equal(joined.pooled, condition.pooled)
    assert torch.equal(condition[[3, 0]].pooled, condition.pooled[[3, 0]])
    assert torch.equal(condition[1:2].expand(3).embeds, condition.embeds[[1, 1, 1]])
    assert condition.to(torch.bfloat16).embeds.dtype == torch.bfloat16


def test_unloaded_text_encoders_are_gone(tiny_sd3_folder):
    model = sd3.load(tiny_sd3_folder, parts=("text",))
    sd3.unload_text_encoders(model)
    with pytest.raises(AssertionError, match="not loaded"):
        sd3.encode_prompts(model, ["a"])


# --------------------------------------------------------------------------- images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_gives_the_posterior_in_the_vaes_dtype(tiny_sd3_folder, dtype):
    """Defect 3: fp32 pixels into a bf16 VAE crash the public scripts' latent cache."""
    model = sd3.load(tiny_sd3_folder, dtype=dtype, parts=("vae",))
    pixels = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        mean, std = sd3.encode_images(model, pixels)
        posterior = model.vae.encode(pixels.to(dtype)).latent_dist
    assert mean.shape == std.shape == (2, 16, 8, 6) and mean.dtype == std.dtype == dtype
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    got = sd3.sample_posterior(mean, std, noise)
    assert got.dtype == torch.float32
    want = posterior.sample(torch.Generator().manual_seed(5)).float()
    torch.testing.assert_close(got, want, **(dict(rtol=0, atol=0) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)))


def test_scaled_latents_decode_to_what_the_vae_alone_decodes(model):
    """Defect 17: some scripts scale without the shift factor; then encode -> decode is not the VAE's own round trip."""
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mean, _ = sd3.encode_images(model, pixels)
        latents = sd3.scale_latents(model, mean)
        by_hand = (model.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(sd3.decode_latents(model, latents), by_hand, rtol=0, atol=1e-5)
        assert (sd3.decode_latents(model, mean * model.vae.config.scaling_factor) - by_hand).abs().max() > 1e-4
    torch.testing.assert_close(latents, (mean - 0.0609) * 1.5305)


def test_decoding_in_pieces_changes_nothing_and_lets_gradients_through(model, monkeypatch):
    """Of five pictures at most two are in the VAE at once: the decoder is what memory is short for."""
    latents, decode, pieces = torch.randn(5, 16, 4, 4, requires_grad=True), model.vae.decode, []
    with monkeypatch.context() as patch:
        patch.setattr(model.vae, "decode", lambda part, **options: pieces.append(len(part)) or decode(part, **options))
        images = sd3.decode_latents(model, latents, batch_size=2)
    assert pieces == [2, 2, 1]
    assert images.shape == (5, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images, sd3.decode_latents(model, latents, batch_size=5), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # as evaluation does, which has to judge the pictures that training judges
        assert torch.equal(images, sd3.decode_latents(model, latents, batch_size=2))
    images.sum().backward()
    assert latents.grad.flatten(1).any(1).all()


# --------------------------------------------------------------------------- the transformer


class Wrapper(torch.nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_velocity_is_diffusers_call_by_hand(model):
    latents, sigma, condition = inputs(model, 3, 64, 48)
    with torch.no_grad():
        want = model.transformer(latents, condition.embeds, condition.pooled, torch.tensor([200.0, 455.5, 711.0])).sample
        got = sd3.velocity(model.transformer, latents, sigma, condition)
        wrapped = Wrapper(model.transformer)
        assert torch.equal(sd3.velocity(wrapped, latents, sigma, condition), got)
    assert wrapped.calls == 1, "DDP reduces gradients only if its own forward is called"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_timesteps_stay_fp32_under_bf16(tiny_sd3_folder, model, weights):
    """bf16 holds 8 bits: 711 would become 712 and its sinusoids change by 24 %. diffusers casts after the sinusoids."""
    transformer = sd3.load(tiny_sd3_folder, dtype=weights, parts=("transformer",)).transformer
    latents, sigma, condition = inputs(model)
    seen = {}
    time_proj = transformer.time_text_embed.time_proj
    handle = time_proj.register_forward_hook(lambda _, args, out: seen.update(timestep=args[0], sinusoids=out))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prediction = sd3.velocity(transformer, latents, sigma, condition.to(torch.bfloat16))
    handle.remove()
    exact = time_proj(torch.tensor([200.0, 711.0]))
    assert seen["timestep"].dtype == seen["sinusoids"].dtype == prediction.dtype == torch.float32
    torch.testing.assert_close(seen["timestep"], torch.tensor([200.0, 711.0]))
    torch.testing.assert_close(seen["sinusoids"], exact, rtol=0, atol=1e-4)
    rounded = time_proj(torch.tensor([200.0, 711.0]).bfloat16())
    assert (rounded - exact)[1].norm() / exact[1].norm() > 0.2
    assert (exact.bfloat16() - exact)[1].norm() / exact[1].norm() < 0.003  # what the cast of the sinusoids costs a bf16 model


def test_a_scheduler_that_names_no_shift_has_that_of_diffusers(tiny_sd3_folder, tmp_path):
    """1, which leaves the timesteps as they are: read raw, before a run, as loaded."""
    folder = shutil.copytree(tiny_sd3_folder, tmp_path / "model")
    file = folder / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    assert sd3.local_shift(folder) == config.pop("shift") == 3.0
    file.write_text(json.dumps(config))
    assert sd3.local_shift(folder) == sd3.load(folder, parts=()).shift == 1.0


def test_timestep_shift_by_hand(model):
    """The tiny model's schedule has shift 3 and its native side is 64: at 32 x 32, sqrt(1024 / 4096) = 1/2 of it."""
    assert sd3.timestep_shift(model, "model", 32, 32) == 3.0
    assert sd3.timestep_shift(model, "resolution", 32, 32) == 1.5
    assert sd3.timestep_shift(model, "resolution", 128, 32) == 3.0
    assert sd3.timestep_shift(model, "2.5", 32, 32) == sd3.timestep_shift(model, 2.5, 64, 64) == 2.5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_render_is_the_stock_pipeline_bit_for_bit(tiny_sd3_folder, dtype, guidance_scale):
    model, pipe = sd3.load(tiny_sd3_folder, dtype=dtype), stock(tiny_sd3_folder, dtype)
    prompts, negatives = ["a red circle", "a blue star"], ["bad", "dull"]
    common = dict(height=64, width=48, num_inference_steps=3, guidance_scale=guidance_scale)
    want = pipe(prompts, negative_prompt=negatives, max_sequence_length=16, output_type="pt",
                generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)], **common).images  # fmt: skip
    torch.manual_seed(1)
    condition, negative = sd3.encode_prompts(model, prompts), sd3.encode_prompts(model, negatives)
    got = sd3.render(model, model.transformer, condition, negative=negative if guidance_scale > 1 else None, seeds=[7, 8], **common)
    assert got.shape == (2, 3, 64, 48) and got.dtype == torch.float32
    assert torch.equal(got, want.float())


def test_a_picture_depends_on_its_seed_and_not_on_the_batch(model):
    condition, negative = sd3.encode_prompts(model, ["a", "b", "c"]), sd3.encode_prompts(model, [""])
    common = dict(negative=negative, height=32, width=32, num_inference_steps=2, guidance_scale=3.0)
    together = sd3.render(model, model.transformer, condition, seeds=[1, 2, 3], batch_size=3, **common)
    apart = sd3.render(model, model.transformer, condition, seeds=[1, 2, 3], batch_size=2, **common)
    last = sd3.render(model, model.transformer, condition[2:], seeds=[3], **common)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    torch.testing.assert_close(together[2:], last, rtol=0, atol=1e-5)
    other = sd3.render(model, model.transformer, condition[2:], seeds=[4], **common)
    assert (other - last).abs().max() > 0.01


def test_fewer_pictures_may_be_decoded_than_denoised_at_once(model, monkeypatch):
    sizes = []
    monkeypatch.setattr(sd3, "decode_latents", lambda model, latents, size: sizes.append((len(latents), size)) or torch.zeros(len(latents)))
    common = dict(negative=None, seeds=[1, 2, 3], height=16, width=16, num_inference_steps=1, guidance_scale=1.0, batch_size=2)
    for size in (1, None):
        sd3.render(model, model.transformer, sd3.encode_prompts(model, ["a", "b", "c"]), decode_batch_size=size, **common)
    assert sizes == [(2, 1), (1, 1), (2, 2), (1, 2)]


def test_a_prompt_that_just_fits_is_not_called_long(model):
    """CLIP's 16 tokens, start and end among them, hold 14 words of one letter."""
    fits, longer = " ".join("a" * 14), " ".join("b" * 15)
    assert common.long_prompts(model.tokenizers[0], [fits], t5=True) is None
    note = common.long_prompts(model.tokenizers[0], [fits, longer], t5=False)
    assert note.startswith("note: 1 of 2 prompts have more than CLIP's 16 tokens, the first begins 'b b") and note.endswith("is not read")


def test_render_evaluates_and_puts_the_training_mode_back(model):
    condition = sd3.encode_prompts(model, ["a"])
    common = dict(negative=None, height=32, width=32, num_inference_steps=1, guidance_scale=1.0)
    modes = []
    wrapped = Wrapper(model.transformer).train()
    handle = model.transformer.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    image = sd3.render(model, wrapped, condition, seeds=[1], **common)
    handle.remove()
    assert modes == [False] and wrapped.training and model.transformer.training and not image.requires_grad
    with pytest.raises(ValueError):
        sd3.render(model, wrapped, condition, seeds=[1], **(common | dict(height=30)))
    assert wrapped.training
    wrapped.eval()


def test_guidance_without_a_negative_prompt_is_refused(model):
    condition = sd3.encode_prompts(model, ["a"])
    settings = dict(negative=None, seeds=[1], height=32, width=32, num_inference_steps=10)
    with pytest.raises(ValueError, match="negative prompt"):
        sd3.render(model, model.transformer, condition, guidance_scale=4.0, **settings)


# --------------------------------------------------------------------------- loading and checking


def test_only_the_asked_parts_are_read(tiny_sd3_folder, tmp_path):
    """The weights of the other parts are not even there."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd3_folder, folder)
    for part in ("transformer", "text_encoder_3"):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    model = sd3.load(folder, parts=("vae",))
    assert model.transformer is None and model.text_encoders == [] and model.tokenizers == []
    assert model.shift == 3.0 and model.native_resolution == 64
    with pytest.raises(OSError):
        sd3.load(folder, parts=("transformer",))


def test_what_is_loaded_is_frozen_and_evaluating(tiny_sd3_folder):
    model = sd3.load(tiny_sd3_folder, dtype=torch.bfloat16)
    for part in (model.transformer, model.vae, *model.text_encoders):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}


def damaged(folder, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    return copy


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f), "no such folder.*download.sh"),
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "damaged"),
        (lambda f: (f / "model_index.json").write_text("[]"), "damaged"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}'), "holds a StableDiffusionPipeline"),
        (lambda f: shutil.rmtree(f / "transformer"), "lacks transformer"),
        (lambda f: shutil.rmtree(f / "text_encoder_3"), "lacks text_encoder_3.*null"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_with_the_cure(tiny_sd3_folder, tmp_path, damage, message):
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*{message}"):
        sd3.check_folder(damaged(tiny_sd3_folder, tmp_path, damage))


def test_hub_ids_pass_and_missing_local_folders_do_not(tmp_path, monkeypatch, tiny_sd3_folder):
    monkeypatch.chdir(tmp_path)
    sd3.check_folder("stabilityai/stable-diffusion-3.5-medium")
    sd3.check_folder(tiny_sd3_folder)
    # The first is the scripts' default, and must not be taken for an organisation on the Hub.
    for path in ("models/stable-diffusion-3.5-medium", "./a/b", "/a/b", "name", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder"):
            sd3.check_folder(path)


def test_a_side_beyond_the_position_embeddings_is_refused(tiny_sd3_folder):
    """pos_embed_max_size 8 patches of 2 latents of 8 pixels: 128."""
    sd3.check_resolution(tiny_sd3_folder, 128, 64)
    sd3.check_resolution("owner/name", 4096)
    with pytest.raises(ValueError, match="--resolution 144: .* 128"):
        sd3.check_resolution(tiny_sd3_folder, 64, 144)


# --------------------------------------------------------------------------- planning


def test_published_parameter_counts_come_from_the_configs_alone(tmp_path):
    """The table of SD3.5-medium: 2,243,171,520 in the transformer, and so on, from five small JSON files."""
    index = {"_class_name": "StableDiffusion3Pipeline"}
    for part, config in PUBLISHED.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
        index[part] = ["library", "Class"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert sd3.parameter_counts(tmp_path) == {
        "transformer": 2_243_171_520, "vae": 83_819_683,
        "text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656,
    }  # fmt: skip
    transformer = sd3.transformer_from_config(tmp_path)
    assert all(p.is_meta for p in transformer.parameters())
    assert sum(b.numel() for b in transformer.buffers()) == 226_492_416  # pos_embed: 384^2 places of 1536


def test_counts_agree_with_the_loaded_model(tiny_sd3_folder, model):
    parts = dict(transformer=model.transformer, vae=model.vae)
    parts |= dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), model.text_encoders, strict=True))
    assert sd3.parameter_counts(tiny_sd3_folder) == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
