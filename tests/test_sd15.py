"""Stable Diffusion 1.x, 2.x and XL: what is loaded, text, latents and predictions, against the stock pipelines of diffusers."""

import json

import numpy as np
import pytest
import torch
import unets

from src.pipelines import sd15

PROMPTS = ["a red ring", "blue", ""]
FAMILIES = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def folders(tiny_sd15_folder, tiny_sdxl_folder):
    return {"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder}


@pytest.fixture(scope="module")
def models(folders):
    return {name: sd15.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def stock(folders):
    """The same folders in diffusers' own pipelines."""
    from diffusers import DiffusionPipeline

    pipes = {name: DiffusionPipeline.from_pretrained(folder, safety_checker=None) if name == "sd15" else
             DiffusionPipeline.from_pretrained(folder) for name, folder in folders.items()}  # fmt: skip
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- loading and checking


def test_a_variant_is_loaded_from_its_own_files(tmp_path):
    unets.sd15_pipeline().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(OSError):
        sd15.load(tmp_path, parts=("vae",))
    assert sd15.load(tmp_path, parts=("vae",), variant="fp16").vae is not None


def test_what_is_loaded_is_what_was_asked_for(folders):
    for name, folder in folders.items():
        model = sd15.load(folder, parts=("unet",))
        assert model.vae is None and model.text_encoders == [] and model.denoiser is model.unet
        assert model.xl == (name == "sdxl") == sd15.is_xl(folder)
        assert not model.unet.training and not any(p.requires_grad for p in model.unet.parameters())
        model = sd15.load(folder, parts=("vae", "text"), dtype=torch.bfloat16)
        assert model.unet is None and model.vae.dtype == torch.bfloat16
        assert len(model.text_encoders) == len(model.tokenizers) == (2 if name == "sdxl" else 1)


def test_the_vae_of_xl_stays_in_fp32_where_fp16_would_overflow(folders):
    assert sd15.load(folders["sdxl"], parts=("vae",), dtype=torch.float16).vae.dtype == torch.float32
    assert sd15.load(folders["sd15"], parts=("vae",), dtype=torch.float16).vae.dtype == torch.float16


def test_the_noise_schedule_is_the_models_own(models, stock):
    for name, model in models.items():
        assert torch.equal(model.alphas_cumprod, stock[name].scheduler.alphas_cumprod)


BAD = {  # file, what it says, what the message names
    "v-prediction": ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction model.*2-1-base"),
    "another schedule": ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "noise schedule"),
    "zero terminal SNR": ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True.*have False"),
    "4000 timesteps": ("scheduler/scheduler_config.json", {"num_train_timesteps": 4000}, "num_train_timesteps 4000 .*have 1000"),
    "few steps": ("scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}, "trailing, as those of sd-turbo.*take Stable"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "9 channels.*inpainting"),
    "normalised latents": ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "VAE shifts"),
    "SD3": ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "holds a StableDiffusion3Pipeline.*StableDiffusionXLPipeline"),
    "refiner": ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "holds a StableDiffusionXLImg2ImgPipeline"),
    "incomplete": ("model_index.json", {"text_encoder_3": ["transformers", "T5EncoderModel"]}, "lacks text_encoder_3"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_model_that_cannot_be_trained_is_refused_by_name(folders, tmp_path, what):
    file, changes, message = BAD[what]
    folder = unets.altered(folders["sd15"], tmp_path / "copy", file, **changes)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*{message}"):
        sd15.check_folder(folder)


def test_paths_that_are_no_model_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/model_index.json").write_text("{")
    for folder, message in (("missing", "no such folder"), ("empty", "no model_index.json"), ("damaged", "is damaged")):
        with pytest.raises(ValueError, match=message):
            sd15.check_folder(tmp_path / folder)
    sd15.check_folder("stable-diffusion-v1-5/stable-diffusion-v1-5")  # a Hub id: nothing is read


def test_a_picture_too_small_for_the_unet_is_refused(folders):
    """Two levels halve latents once: 8 x 2 = 16 px make one latent there."""
    sd15.check_resolution(folders["sd15"], 16, 48)
    with pytest.raises(ValueError, match="--resolution 8: .* try 16"):
        sd15.check_resolution(folders["sd15"], 8)


# --------------------------------------------------------------------------- text


def test_prompts_are_encoded_as_the_stock_pipeline_does(models, stock):
    """XL: the prompt's embeddings side by side, CLIP-G's projection, and zeros for the empty prompt, as its guidance has them."""
    encoded = sd15.encode_prompts(models["sd15"], PROMPTS)
    expected, _ = stock["sd15"].encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(encoded.embeds, expected) and encoded.pooled.shape == (3, 0)
    encoded = sd15.encode_prompts(models["sdxl"], PROMPTS)
    embeds, negative, pooled, negative_pooled = stock["sdxl"].encode_prompt(PROMPTS[:2], do_classifier_free_guidance=True)
    assert torch.equal(encoded.embeds, torch.cat([embeds, negative[:1]])) and encoded.embeds.shape == (3, 16, 20)
    assert torch.equal(encoded.pooled, torch.cat([pooled, negative_pooled[:1]])) and encoded.pooled.shape == (3, 12)


def test_zeros_for_the_empty_prompt_can_be_switched_off_by_the_model(folders, tmp_path):
    folder = unets.altered(folders["sdxl"], tmp_path / "copy", "model_index.json", force_zeros_for_empty_prompt=False)
    encoded = sd15.encode_prompts(sd15.load(folder, parts=("text",)), [""])
    assert encoded.embeds.abs().sum() > 0 and encoded.pooled.abs().sum() > 0


def test_the_sequence_length_is_the_tokenizers(folders, models):
    assert sd15.default_sequence_length(folders["sd15"]) == 16
    assert sd15.encode_prompts(models["sd15"], ["a"], 8).embeds.shape == (1, 8, 8)


# --------------------------------------------------------------------------- latents


def test_latents_are_those_of_the_vae_times_its_scale(models):
    model = models["sd15"]
    pixels = random(2, 3, 64, 64).clamp(-1, 1)
    mean, std = sd15.encode_images(model, pixels)
    posterior = model.vae.encode(pixels).latent_dist
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
    assert torch.allclose(sd15.scale_latents(model, mean), 0.18215 * mean)


def test_decoding_is_that_of_the_stock_pipeline_and_has_a_gradient(models, stock):
    """The image processor maps [-1, 1] to [0, 1] and clamps; the unclamped pixels keep a gradient everywhere."""
    latents = random(3, 4, 8, 8).requires_grad_()
    images = sd15.decode_latents(models["sd15"], latents, batch_size=2)
    decoded = stock["sd15"].vae.decode(latents.detach() / 0.18215).sample
    expected = stock["sd15"].image_processor.postprocess(decoded, output_type="pt")
    assert torch.allclose(images, expected, atol=1e-5)
    sd15.decode_pixels(models["sd15"], latents).sum().backward()
    assert (latents.grad.abs() > 0).all()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_autocast_around_decoding_changes_nothing(models, family):
    """Validation and evaluation draw under autocast; in fp16 XL's decoder, which is fp32 for that reason, would overflow."""
    latents = random(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        images = sd15.decode_latents(models[family], latents)
    assert torch.equal(images, sd15.decode_latents(models[family], latents))


# --------------------------------------------------------------------------- predictions


def test_the_prediction_is_the_unets(models):
    model = models["sd15"]
    x_t, timestep = random(2, 4, 8, 8), torch.tensor([1, 999])
    condition = sd15.encode_prompts(model, PROMPTS[:2])
    expected = model.unet(x_t, timestep, condition.embeds).sample
    assert torch.equal(sd15.eps(model.unet, x_t, timestep, condition), expected)


def test_xl_is_told_that_nothing_was_shrunk_or_cropped(models):
    """64 x 32 pixels: original size 64 x 32, corner (0, 0), target 64 x 32."""
    model = models["sdxl"]
    x_t, timestep = random(2, 4, 8, 4), torch.tensor([1, 999])
    condition = sd15.encode_prompts(model, PROMPTS[:2])
    sizes = torch.tensor([[64, 32, 0, 0, 64, 32]] * 2)
    expected = model.unet(x_t, timestep, condition.embeds, added_cond_kwargs={"text_embeds": condition.pooled, "time_ids": sizes}).sample
    assert torch.equal(sd15.eps(model.unet, x_t, timestep, condition), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_prediction_is_fp32_at_least(folders, dtype):
    model = sd15.load(folders["sd15"], parts=("unet",), dtype=dtype)
    condition = sd15.Conditioning(random(1, 16, 8), torch.zeros(1, 0))
    predicted = sd15.eps(model.unet, random(1, 4, 8, 8), torch.tensor([500]), condition)
    assert predicted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and predicted.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_are_those_of_the_stock_pipeline(models, stock, family, guidance):
    """One grey level for rounding: batches of another size may add in another order."""
    model = models[family]
    options = dict(height=64, width=48, num_inference_steps=4, guidance_scale=guidance)
    images = sd15.render(
        model, model.unet, sd15.encode_prompts(model, PROMPTS[:2]), negative=sd15.encode_prompts(model, [""]), seeds=[3, 4], batch_size=1,
        **options,
    )  # fmt: skip
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = stock[family](PROMPTS[:2], generator=generators, output_type="np", **options).images
    ours = images.permute(0, 2, 3, 1).numpy()
    assert ours.shape == (2, 64, 48, 3) and np.abs(ours - expected).max() <= 1 / 255
    assert expected.std() > 0.02


def test_guidance_without_a_negative_prompt_is_refused(models):
    model = models["sd15"]
    with pytest.raises(ValueError, match="needs a negative prompt"):
        sd15.render(model, model.unet, sd15.encode_prompts(model, ["a"]), negative=None, seeds=[0], height=64, width=64,
                    num_inference_steps=1, guidance_scale=2.0)  # fmt: skip


# --------------------------------------------------------------------------- planning


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_from_the_configs(folders, models, family):
    model, counts = models[family], sd15.parameter_counts(folders[family])
    modules = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoders[0]}
    modules |= {"text_encoder_2": model.text_encoders[1]} if family == "sdxl" else {}
    assert counts == {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_example_inputs_fit_the_unet(folders, models, family):
    config = json.loads((folders[family] / "unet/config.json").read_text())
    assert sd15.text_width(config) == ((20, 12) if family == "sdxl" else (8, 0))
    with torch.device("meta"):
        assert sd15.denoiser_from_config(config)(**sd15.example_inputs(config, 8, 16)).sample.shape == (1, 4, 8, 8)
