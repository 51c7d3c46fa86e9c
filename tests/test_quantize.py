"""A base in 8 and 4 bits: what the bits say, by hand and against bitsandbytes; gradients; which layers; what a graph keeps."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from src import lora, quantize, speed
from src.pipelines import geometry, sd3

KINDS = [pytest.param("int8"), pytest.param("nf4")]


@pytest.fixture(autouse=True)
def packages():
    pytest.importorskip("bitsandbytes")


def linear(rows=48, columns=64, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(columns, rows).to(dtype)


# --------------------------------------------------------------------------- the bits


def full_weight(layer):
    """(out, in), rounded to what the packed one can say."""
    return quantize._unpack(layer.weight, layer.scale, [layer.out_features, layer.in_features], layer.bias.dtype)


def test_int8_by_hand():
    """A row whose largest is 127 has scale 1: 63.4 -> 63, -0.6 -> -1. One of 2.54 has scale 0.02: 0.031 -> 2 (1.55 rounded) -> 0.04.
    A row of zeros stays zero."""
    layer = nn.Linear(3, 3)
    layer.weight.data = torch.tensor([[127.0, 63.4, -0.6], [2.54, 0.031, -1.0], [0.0, 0.0, 0.0]])
    packed = quantize.QuantizedLinear(layer, "int8")
    assert packed.weight.tolist() == [[127, 63, -1], [127, 2, -50], [0, 0, 0]]
    torch.testing.assert_close(full_weight(packed), torch.tensor([[127.0, 63.0, -1.0], [2.54, 0.04, -1.0], [0.0, 0.0, 0.0]]))


def test_no_weight_is_off_by_more_than_its_bits_allow():
    """int8: half a scale, the row's largest / 254. nf4: half the widest gap between levels, (1 - 0.6962) / 2 of the block's largest."""
    layer = linear()
    weight = layer.weight.detach()
    int8 = full_weight(quantize.QuantizedLinear(layer, "int8"))
    assert ((weight - int8).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    nf4 = full_weight(quantize.QuantizedLinear(layer, "nf4"))
    block = weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert ((weight - nf4).view(-1, 64).abs() <= 0.152 * block).all()
    assert len((nf4.view(-1, 64) / block).round(decimals=3).unique()) <= 16


def test_nf4_is_that_of_bitsandbytes():
    import bitsandbytes as bnb

    layer = linear(dtype=torch.bfloat16)
    theirs = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", compress_statistics=False, requires_grad=False).to("cpu")
    want = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(full_weight(quantize.QuantizedLinear(layer, "nf4")), want)


@pytest.mark.parametrize(("kind", "each"), [("int8", 1 + 4 / 64), ("nf4", 0.5 + 4 / 64)])
def test_bytes_per_weight(kind, each):
    packed = quantize.QuantizedLinear(linear(), kind)
    assert packed.weight.nbytes + packed.scale.nbytes == each * 48 * 64
    assert each - (4 / 64 if kind == "int8" else 0) == quantize.BYTES[kind]


# --------------------------------------------------------------------------- products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_products_and_gradients_are_those_of_the_full_weight(kind, autocast):
    packed = quantize.QuantizedLinear(linear(), kind)
    ours, theirs = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        a, b = packed(ours), F.linear(theirs, full_weight(packed), packed.bias)
    assert a.dtype == b.dtype and torch.equal(a, b)
    a.float().square().sum().backward()
    b.float().square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert packed.weight.grad is None and packed.bias.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_nothing_full_is_kept_for_the_backward_pass(kind, backend):
    """Under the compiler's rule of what to keep as well, with ReLU between the layers: the backward pass needs their outputs, and so
    what it would take for the same weight. Numbers and gradients are the same to the bit."""
    torch._dynamo.reset()
    layers, kept = [quantize.QuantizedLinear(linear(64, 64), kind) for _ in range(2)], []
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())
    x = torch.randn(2, 64, requires_grad=True)
    want = model(x)
    (gradient,) = torch.autograd.grad(want.square().sum(), x)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = run(x)
    assert torch.equal(found, want) and torch.equal(torch.autograd.grad(found.square().sum(), x)[0], gradient)
    own = {tensor.data_ptr() for layer in layers for tensor in (layer.weight, layer.scale)}
    assert own <= {tensor.data_ptr() for tensor in kept}
    assert not [tensor.shape for tensor in kept if tensor.numel() == 64 * 64 and tensor.data_ptr() not in own]


# --------------------------------------------------------------------------- models


def test_attention_and_feed_forward_of_the_blocks_and_nothing_else():
    """In units of d^2, d = 1536: 24 in a block, 28 in a dual one, 15 in the last (no text after its attention): 10 x 24 + 13 x 28 + 15."""
    medium = geometry.build(geometry.MODELS["sd3.5-medium"]["transformer"])
    layers = quantize.quantizable(medium)
    assert sum(layer.weight.numel() for layer in layers.values()) == (10 * 24 + 13 * 28 + 15) * 1536**2
    assert not any("norm" in name or not name.startswith("transformer_blocks.") for name in layers)
    unet = quantize.quantizable(geometry.build(geometry.MODELS["sd1.5"]["unet"]))
    ends = {name.split("transformer_blocks.0.")[1] for name in unet}
    assert ends == {f"attn{n}.{end}" for n in (1, 2) for end in ("to_q", "to_k", "to_v", "to_out.0")} | {"ff.net.0.proj", "ff.net.2"}
    assert len(unet) == 16 * 10


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("nf4", 0.3)])
def test_a_loaded_model_predicts_nearly_the_same_and_takes_adapters(tiny_sd3_folder, kind, bound):
    plain = sd3.load(tiny_sd3_folder, parts=("transformer",)).transformer
    packed = sd3.load(tiny_sd3_folder, parts=("transformer",), quantized=kind).transformer
    g = torch.Generator().manual_seed(0)
    condition = sd3.Conditioning(torch.randn(2, 6, 32, generator=g), torch.randn(2, 16, generator=g))
    inputs = torch.randn(2, 16, 8, 8, generator=g), torch.tensor([0.3, 0.9]), condition
    with torch.no_grad():
        want, found = sd3.velocity(plain, *inputs), sd3.velocity(packed, *inputs)
    assert 0 < (found - want).norm() / want.norm() < bound
    assert not any(p.requires_grad for p in packed.parameters()) and not packed.training

    before = copy.deepcopy(packed.state_dict())
    torch.manual_seed(0)
    lora.add(packed, rank=2)
    assert lora.adapted(packed) == lora.targets(plain) and {p.dtype for p in lora.parameters(packed)} == {torch.float32}
    speed.checkpoint_blocks(packed)
    with torch.no_grad():
        assert torch.equal(sd3.velocity(packed, *inputs), found), "B is zero"
    sd3.velocity(packed.train(), *inputs).square().mean().backward()
    assert all(p.grad is not None for p in lora.parameters(packed))
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in packed.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with lora.disabled(packed), torch.no_grad():
        assert torch.equal(sd3.velocity(packed, *inputs), found)


def test_weights_are_packed_where_they_will_stay(tiny_sd3_folder):
    """One at a time on the device of training, so that the whole model never has to fit there."""
    model = sd3.load(tiny_sd3_folder, parts=("transformer",)).transformer
    layers = list(quantize.quantizable(model))
    quantize.linear_layers(model, "int8", "meta")
    assert layers and all(model.get_submodule(name).weight.is_meta for name in layers) and not model.proj_out.weight.is_meta


def test_merging_into_rounded_weights_is_refused(tiny_sd3_folder, tmp_path):
    packed = sd3.load(tiny_sd3_folder, parts=("transformer",), quantized="int8").transformer
    lora.add(packed, rank=2)
    with pytest.raises(ValueError, match="--export_merged: .* layers are quantised, such as transformer_blocks.0.attn.to_q"):
        lora.export_merged(packed, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nf4_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    quantize.check(None)
    quantize.check("int8")
    with pytest.raises(ValueError, match=f"--quantize_base nf4 needs the package bitsandbytes: {sys.executable} -m pip install"):
        quantize.check("nf4")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_is_traced_whole(kind):
    torch._dynamo.reset()
    packed = quantize.QuantizedLinear(linear(), kind)
    x = torch.randn(2, 64, requires_grad=True)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), packed(x))
    (one,), (other,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, packed))
    torch.testing.assert_close(one, other)
