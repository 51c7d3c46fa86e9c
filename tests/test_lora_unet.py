"""LoRA on the UNet of Stable Diffusion 1.5 and XL: which layers, the file that stock diffusers reads, the reference, the merged weights."""

import argparse
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src import lora, unet
from src.pipelines import sd15

CONVOLUTIONS = "attn1.to_q,attn2.to_v,ff.net.2,conv1,proj_in"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def model(request, tiny_sd15_folder, tiny_sdxl_folder):
    return sd15.load({"sd15": tiny_sd15_folder, "sdxl": tiny_sdxl_folder}[request.param])


def adapted(model, tmp_path=None, **options):
    """The model's UNet again, with an adapter whose B is not zero."""
    unet = sd15.load(model.path, parts=("unet",)).unet
    torch.manual_seed(1)
    lora.add(unet, **({"rank": 4} | options))
    for name, tensor in lora.state(unet).items():
        if "lora_B" in name:
            tensor.normal_(0, 0.2)
    return unet


def draw(model, unet):
    options = dict(height=32, width=32, num_inference_steps=2, guidance_scale=3.0, seeds=[1])
    return sd15.render(model, unet, sd15.encode_prompts(model, ["a ring"]), negative=sd15.encode_prompts(model, [""]), **options)[0]


def test_every_attention_projection_is_adapted_by_default(model):
    """Four attentions in the tiny UNet (down, middle, two up): each with self- and cross-attention of four projections."""
    names = lora.targets(model.unet)
    expected = [name for name, _ in model.unet.named_modules() if re.search(r"\.attn[12]\.to_([qkv]|out\.0)$", name)]
    assert names == expected and len(names) == 4 * 2 * 4


def test_every_default_layer_gets_a_gradient(model):
    unet = adapted(model)
    condition = sd15.encode_prompts(model, ["a ring"])
    sd15.eps(unet, torch.randn(1, 4, 4, 4), torch.tensor([500]), condition).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in lora.parameters(unet))


def test_an_unknown_layer_is_refused_with_those_that_exist(model):
    with pytest.raises(ValueError, match="attn1.to_k.*attn2.to_out.0.*conv1.*ff.net.2"):
        lora.targets(model.unet, "attn.to_q")


@pytest.mark.slow
def test_dora_on_a_convolution_is_refused(model):
    with pytest.raises(ValueError, match="--use_dora .*conv1 is a convolution"):
        adapted(model, layers="conv1", use_dora=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"layers": CONVOLUTIONS, "alpha": 8.0}, {"use_dora": True}], ids=["attention", "layers", "dora"])
def test_stock_diffusers_draws_with_the_saved_file(model, tmp_path, options):
    from diffusers import DiffusionPipeline

    unet = adapted(model, **options)
    lora.save(unet, tmp_path)
    pipe = DiffusionPipeline.from_pretrained(model.path)
    pipe.set_progress_bar_config(disable=True)
    before = draw(model, pipe.unet)
    pipe.load_lora_weights(str(tmp_path))
    theirs = pipe("a ring", height=32, width=32, num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(1),
                  output_type="np").images[0]  # fmt: skip
    ours = draw(model, unet).permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() <= 1 / 255 < np.abs(ours - before.permute(1, 2, 0).numpy()).max()


def test_the_reference_is_the_base_bit_for_bit(model):
    unet = adapted(model)
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([1, 999]), sd15.encode_prompts(model, ["a ring", "b"])
    with lora.disabled(unet):
        assert torch.equal(sd15.eps(unet, *inputs), sd15.eps(model.unet, *inputs))
    assert not torch.equal(sd15.eps(unet, *inputs), sd15.eps(model.unet, *inputs))


@pytest.mark.slow
def test_a_saved_lora_starts_another_one(model, tmp_path):
    unet, other = adapted(model), adapted(model)
    lora.save(unet, tmp_path)
    for tensor in lora.state(other).values():
        tensor.zero_()
    assert lora.load(other, tmp_path) == []
    for name, tensor in lora.state(unet).items():
        assert torch.equal(tensor, lora.state(other)[name]), name


def test_a_lora_of_another_family_is_refused(model, tmp_path):
    from safetensors.torch import save_file

    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)}, tmp_path / lora.WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"holds no LoRA of a UNet in diffusers' format \(no unet"):
        lora.load(adapted(model), tmp_path)


def test_a_lora_of_the_text_encoder_is_refused_not_dropped(model, tmp_path):
    from safetensors.torch import load_file, save_file

    unet, file = adapted(model), tmp_path / lora.WEIGHTS_NAME
    lora.save(unet, tmp_path)
    save_file(load_file(file) | {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 8)}, file)
    with pytest.raises(ValueError, match="adapts text_encoder too, which this run would drop; start from a LoRA of the UNet alone"):
        lora.load(unet, tmp_path)


@pytest.mark.parametrize("options", [{"layers": CONVOLUTIONS, "alpha": 8.0}, {"use_dora": True}], ids=["layers", "dora"])
def test_the_merged_unet_predicts_the_same(model, tmp_path, options):
    from diffusers import UNet2DConditionModel

    unet = adapted(model, **options)
    lora.export_merged(unet, tmp_path)
    merged = UNet2DConditionModel.from_pretrained(tmp_path)
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([1, 999]), sd15.encode_prompts(model, ["a ring", "b"])
    with torch.no_grad():
        assert torch.allclose(sd15.eps(merged, *inputs), sd15.eps(unet, *inputs), atol=1e-5)


# --------------------------------------------------------------------------- from the scripts' flags


@pytest.fixture
def calls(monkeypatch):
    """What `src.unet` asks of other modules, in order: (name, ...)."""
    found = []
    model = SimpleNamespace(unet=torch.nn.Linear(1, 1).requires_grad_(False))
    for owner, name, result in (
        (unet.lora, "add", None), (unet.sd15, "load", model), (unet.tuned, "check_layers", None), (unet.full, "fetch", None),
        (unet.speed, "apply", None), (unet.speed, "narrow_frozen", None), (unet.seeds, "seed_everything", None),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *given, name=name, result=result, **options: found.append((name, given, options)) or result)
    return found


FLAGS = dict(
    use_lora=True, rank=3, lora_alpha=5.0, lora_dropout=0.1, use_dora=True, lora_layers="attn1.to_q", seed=7, init_lora=None,
    pretrained_model_name_or_path="some/model", revision="v2", variant="fp16",
)  # fmt: skip
RUN = SimpleNamespace(weight_dtype=torch.bfloat16, device="here", require=lambda make: make())


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_unet_is_loaded_and_adapted_as_the_flags_say(calls, use_lora):
    """All weights are trained in fp32, under a LoRA they are frozen in the run's precision; it starts from the seed."""
    args = argparse.Namespace(**FLAGS | {"use_lora": use_lora})
    model = unet.load(RUN, args)
    same = dict(revision="v2", variant="fp16")
    dtype = torch.bfloat16 if use_lora else torch.float32
    load = ("load", ("some/model",), same | dict(dtype=dtype, device="here", parts=("unet",)))
    begin = ([] if use_lora else [("fetch", ("some/model",), same | {"trained": ["unet"]})]) + [
        ("check_layers", (args, unet.sd15.denoiser_from_config), {}), load, ("seed_everything", (7, "lora"), {}),
    ]  # fmt: skip
    options = dict(rank=3, alpha=5.0, dropout=0.1, use_dora=True, layers="attn1.to_q")
    assert calls == [*begin, *([("add", (model.unet,), options)] if use_lora else []), ("apply", (model.unet, args), {})]
    assert model.unet.weight.requires_grad is not use_lora


@pytest.mark.parametrize(("source", "path", "options"), [
    (None, "some/model", dict(revision="v2", variant="fp16")), ("a/reference", "a/reference", {}),
])  # fmt: skip
def test_a_frozen_unet_beside_it_computes_by_the_same_kernels(calls, source, path, options):
    """The base model in the same version, or another model, which has versions of its own; `requires_grad` decides on kernels, too."""
    args = argparse.Namespace(**FLAGS)
    frozen = unet.load_frozen(RUN, args, source)
    assert calls == [
        ("load", (path,), options | dict(dtype=torch.float32, device="here", parts=("unet",))),
        ("narrow_frozen", (frozen, torch.bfloat16), {}), ("apply", (frozen, args), {}),
    ]  # fmt: skip
    assert frozen.weight.requires_grad
