"""Stacked projections of SD3's attention: against the layers one by one, and against diffusers' own processor."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from src import attention, lora, quantize, speed
from src.pipelines import geometry, sd3
from tests import unets

CONFIG = geometry.SD35_MEDIUM | {
    "sample_size": 8, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
    "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0, 1),
}  # fmt: skip


def adapted(dtype=torch.float32, **options):
    """A transformer of three blocks, two of them dual, with a LoRA that is not zero."""
    torch.manual_seed(0)
    model = geometry.build(CONFIG, device="cpu", dtype=dtype)
    lora.add(model, rank=4, alpha=8, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm_" in name or "lora_B" in name:
                weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def inputs(model, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(1)
    embeds, pooled = (torch.randn(batch, *shape, 16, generator=generator).to(dtype) for shape in ((5,), ()))
    condition = sd3.Conditioning(embeds, pooled)
    return torch.randn(batch, 16, 8, 8, generator=generator), torch.linspace(0.2, 0.8, batch), condition


def predict(model, dtype=torch.float32, autocast=None, batch=2):
    x, sigma, condition = inputs(model, dtype, batch)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        return sd3.velocity(model, x, sigma, condition)


def gradients(model, *args, **kwargs):
    """The prediction, and the gradient of its mean square by the adapters, as one vector."""
    velocity = predict(model, *args, **kwargs)
    return velocity, torch.cat([g.flatten() for g in torch.autograd.grad(velocity.float().square().mean(), lora.parameters(model))])


@pytest.mark.parametrize(("place", "names"), [("attn", attention.IMAGE), ("attn", attention.TEXT), ("attn2", attention.IMAGE)])
def test_one_product_is_the_three_layers(place, names):
    """In fp64: queries, keys, values, and gradients of the input and of every A and B."""
    model = adapted().double()
    module = getattr(model.transformer_blocks[0], place)
    layers = [getattr(module, name) for name in names]
    weights = [weight for layer in layers for weight in lora.matrices(layer)]
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    aim = torch.randn(3, 2, 7, 32, dtype=torch.float64)

    def found(parts):
        whole = torch.stack([part.flatten(2) for part in parts])
        return whole, *torch.autograd.grad((whole * aim).sum(), [x, *weights])

    want = found([layer(x) for layer in layers])
    attention.stack(model)
    parts = attention.project(module, names, x)
    assert all(part.shape == (2, 7, 2, 16) for part in parts) and hasattr(module, f"{names[0]}_weight")
    for a, b in zip(found(parts), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_near_to_fp32_as_diffusers(dtype, batch):
    """All three kinds of block in one model: the error of the prediction, and the direction and size of the gradient."""
    model = adapted(dtype)
    exact = gradients(copy.deepcopy(model).float(), batch=batch)
    before = gradients(model, dtype, dtype, batch)
    attention.stack(model)
    assert all(isinstance(processor, attention.Joint) for processor in model.attn_processors.values())
    found = gradients(model, dtype, dtype, batch)
    for a, b, want in zip(found, before, exact, strict=True):
        assert (a.float() - want).norm() < 1.3 * (b.float() - want).norm() < 0.1 * want.norm()


def test_recomputed_it_is_the_same_to_the_bit():
    model = adapted(torch.bfloat16).train()
    attention.stack(model)
    want = gradients(model, torch.bfloat16, torch.bfloat16)
    speed.checkpoint_blocks(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, torch.bfloat16, torch.bfloat16), want, strict=True))


@pytest.mark.slow
def test_compiled_it_computes_the_same():
    """Values and gradients, with the adapters on and off; the backend "eager" traces as any other and needs no compiler."""
    torch._dynamo.reset()
    model = adapted(torch.bfloat16)
    exact = gradients(copy.deepcopy(model).float())
    attention.stack(model)
    before = gradients(model, torch.bfloat16, torch.bfloat16)
    graphs = []
    speed.compile_blocks(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    found = gradients(model, torch.bfloat16, torch.bfloat16)
    assert len(graphs) == 3 and "block_diag" in str(graphs[0].code)
    for a, b, want in zip(found, before, exact, strict=True):
        assert (a.float() - want).norm() < 1.3 * (b.float() - want).norm()
    with lora.disabled(model), torch.no_grad():
        off = predict(model, torch.bfloat16, torch.bfloat16)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(off, predict(model, torch.bfloat16, torch.bfloat16), rtol=0.02, atol=0.02)
        assert not torch.allclose(off, found[0], rtol=0.02, atol=0.02)


def test_without_autocast_it_is_diffusers_to_the_bit():
    model = adapted()
    before = gradients(model)
    attention.stack(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))


def test_the_adapter_can_be_switched_off():
    """As when B is zero, to the bit."""
    model = adapted(torch.bfloat16)
    attention.stack(model)
    with lora.disabled(model), torch.no_grad():
        off = predict(model, torch.bfloat16, torch.bfloat16)
    assert not torch.equal(predict(model, torch.bfloat16, torch.bfloat16), off)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    with torch.no_grad():
        assert torch.equal(predict(model, torch.bfloat16, torch.bfloat16), off)


def test_names_and_weights_stay_and_take_no_more_memory():
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention.stack(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], tensor) for name, tensor in after.items())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    assert sum(storages.values()) == sum(t.nbytes for t in before.values())
    lora.load_state(model, {name: 2 * tensor for name, tensor in lora.state(model).items()})  # adapters stay single
    module = model.transformer_blocks[0].attn
    down, _ = lora.matrices(module.to_q)
    assert torch.equal(down, 2 * before["transformer_blocks.0.attn.to_q.lora_A.default.weight"])


def test_weights_loaded_later_count_and_a_copy_stays_as_it_is():
    model = adapted(torch.bfloat16)
    attention.stack(model)
    twin, before = copy.deepcopy(model), predict(model, torch.bfloat16, torch.bfloat16)
    model.load_state_dict({name: tensor * 2 if "base_layer.weight" in name else tensor for name, tensor in model.state_dict().items()})
    assert torch.equal(predict(twin, torch.bfloat16, torch.bfloat16), before)
    fresh = adapted(torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    attention.stack(fresh)
    assert torch.equal(predict(model, torch.bfloat16, torch.bfloat16), predict(fresh, torch.bfloat16, torch.bfloat16))


def stacked(model):
    """(block, attention, first layer) of every stacked projection."""
    names = [name.split(".") for name, _ in model.named_buffers() if name.endswith("_weight")]
    return {(int(name[1]), name[2], name[3].removesuffix("_weight")) for name in names}


@pytest.mark.parametrize(("options", "which"), [
    ({}, {(i, "attn", "to_q") for i in range(3)} | {(i, "attn", "add_q_proj") for i in (0, 1)} | {(i, "attn2", "to_q") for i in (0, 1)}),
    ({"blocks": "1"}, {(1, "attn", "to_q"), (1, "attn", "add_q_proj"), (1, "attn2", "to_q")}),
    ({"layers": "attn.to_q,attn.to_k,attn.to_v,attn2.to_q"}, {(i, "attn", "to_q") for i in range(3)}),
    ({"layers": "attn.to_q"}, set()),
    ({"dropout": 0.1}, set()),
    ({"use_dora": True}, set()),
])  # fmt: skip
def test_only_three_plain_adapters_are_stacked(options, which):
    """The last block's add_q_proj has no adapter. What is not stacked works as before, under autocast too."""
    model = adapted(torch.bfloat16, **options).eval()
    exact, before = predict(copy.deepcopy(model).float()), predict(model, torch.bfloat16, torch.bfloat16)
    attention.stack(model)
    assert stacked(model) == which
    assert (predict(model, torch.bfloat16, torch.bfloat16) - exact).norm() < 1.3 * (before - exact).norm()


def test_packed_weights_are_not_stacked():
    model = geometry.build(CONFIG, device="cpu", dtype=torch.bfloat16)
    quantize.linear_layers(model, "int8")
    lora.add(model, rank=4)
    attention.stack(model)
    assert not stacked(model) and predict(model, torch.bfloat16, torch.bfloat16).isfinite().all()


def test_a_second_call_and_other_models_change_nothing():
    model, unet = adapted(), unets.unet(8)
    attention.stack(model)
    for module, kind in ((model, attention.Joint), (unet, AttnProcessor2_0)):
        processors = list(module.attn_processors.values())
        attention.stack(module)
        assert all(a is b and type(a) is kind for a, b in zip(module.attn_processors.values(), processors, strict=True))
