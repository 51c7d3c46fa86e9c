"""Norms under autocast: against the formula in fp64, against diffusers' and torch's modules, and what they keep."""

import copy

import pytest
import torch
from diffusers.models.normalization import RMSNorm as Plain
from torch import nn
from torch.utils.checkpoint import checkpoint

from src import activations, norms

EPS = 1e-6


def formula(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def heads(dtype, scale=1.0):
    """(pictures, heads, tokens, numbers) as an attention makes them: a view, tokens before heads in memory."""
    return (torch.randn(2, 9, 3, 64, generator=torch.Generator().manual_seed(0)) * scale).to(dtype).transpose(1, 2)


def value_and_gradients(function, x, weight, gradient):
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = function(x, weight)
    return y, *torch.autograd.grad(y, (x, weight), gradient.to(y.dtype))


def ours(x, weight):
    return norms.RMSNorm.apply(x, weight, EPS)


def diffusers(x, weight):
    module = Plain(64, eps=EPS)
    module.weight = nn.Parameter(weight)
    del module._parameters["weight"]
    module.weight = weight  # the tensor itself, for its gradient
    return module(x)


WEIGHT = 1 + 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
GRADIENT = torch.randn(2, 3, 9, 64, generator=torch.Generator().manual_seed(2))


def test_in_fp32_it_is_the_formula():
    want = value_and_gradients(formula, heads(torch.float64), WEIGHT.double(), GRADIENT)
    found = value_and_gradients(ours, heads(torch.float32), WEIGHT, GRADIENT)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, None], ids=["fp32 weights", "16-bit weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_near_to_the_formula_as_diffusers(dtype, weights):
    """Value and gradients. Where the weights are fp32 diffusers' result is too; attention then rounds it, as here."""
    x, weight = heads(dtype), WEIGHT.to(weights or dtype)
    exact = value_and_gradients(formula, x.double(), weight.double(), GRADIENT.to(dtype))
    before = value_and_gradients(lambda x, weight: diffusers(x, weight).to(dtype), x, weight, GRADIENT.to(dtype))
    found = value_and_gradients(ours, x, weight, GRADIENT.to(dtype))
    assert found[0].stride() == found[1].stride() == x.stride()  # whatever the gradient's layout: no copy for the projection before
    for a, b, want in zip(found, before, exact, strict=True):
        assert a.dtype == b.dtype
        # a number is off by half of the last place at most: each of three roundings by a relative eps / 2
        assert (a - want).norm() < 1.3 * (b - want).norm() and (a - want).norm() < 1.5 * torch.finfo(dtype).eps * want.norm()


def test_fp16_does_not_overflow():
    """Queries of 600 and a scaled gradient of 600: their product is beyond 65504, and so is a query's square."""
    x, gradient = heads(torch.float16, 600), GRADIENT.to(torch.float16) * 600
    exact = value_and_gradients(formula, x.double(), WEIGHT.double(), gradient)
    for found, want in zip(value_and_gradients(ours, x, WEIGHT.half(), gradient), exact, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), want, rtol=0.01, atol=0.01 * want.abs().max().item())


def test_fp32_weights_after_a_norm_get_gradients_that_are_neither_rounded_nor_infinite():
    """Of 100 rows each: 1 + 2^-7 sums to 100.78, which bf16 rounds to 101; 300 x 300 is beyond fp16's 65504."""
    for dtype, x, gradient in ((torch.bfloat16, 1.0, 1 + 2**-7), (torch.float16, 300.0, 300.0)):
        rows = torch.full((100, 4), x, dtype=dtype)
        weight, bias = (torch.ones(1, 4, requires_grad=True) for _ in range(2))
        norms.Affine.apply(rows, weight, bias).backward(torch.full_like(rows, gradient))
        assert weight.grad.tolist() == [[100 * x * gradient] * 4] and bias.grad.tolist() == [[100 * gradient] * 4]


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_a_gradient_that_nobody_needs_is_not_computed(wanted):
    x, weight = heads(torch.bfloat16), WEIGHT.bfloat16().clone()
    whole = dict(zip(("x", "weight"), value_and_gradients(ours, x, weight, GRADIENT.bfloat16())[1:], strict=True))
    {"x": x, "weight": weight}[wanted].requires_grad_()
    y = ours(x, weight)
    assert y.grad_fn.next_functions[wanted == "x"][0] is None
    y.backward(GRADIENT.bfloat16())
    assert torch.equal({"x": x, "weight": weight}[wanted].grad, whole[wanted])


# --------------------------------------------------------------------------- in a model


@pytest.fixture
def pair():
    """A module as diffusers has it, and one that was made lean."""
    plain, lean = Plain(64, eps=EPS).bfloat16(), nn.Sequential(Plain(64, eps=EPS).bfloat16())
    for module in (plain, lean[0]):
        module.weight.data.copy_(WEIGHT)
        module.requires_grad_(False)
    norms.lean(lean)
    return plain, lean


def kept(module, x):
    """Bytes that the backward pass needs, weights aside."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensors.append(tensor) or tensor, lambda tensor: tensor):
        module(x.detach().requires_grad_())
    own = {weight.data_ptr() for weight in module.parameters()}
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.data_ptr() not in own}.values())


def test_under_autocast_it_keeps_the_input_alone(pair):
    plain, lean = pair
    x = heads(torch.bfloat16)
    numbers, rows = x.numel(), x.numel() // 64
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(lean, x) == 2 * numbers + 4 * rows
        assert kept(plain, x) >= 6 * numbers  # the input, and a copy in fp32


def test_computed_again_and_copied_it_is_the_same(pair):
    """Under gradient checkpointing; and a copy of the model has norms of its own."""
    _, lean = pair
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for run in (lean, lambda x: checkpoint(lean, x, use_reentrant=False)):
            x = heads(torch.bfloat16).requires_grad_()
            run(x).square().sum().backward()
            found.append(x.grad)
        assert torch.equal(*found)
        twin, before = copy.deepcopy(lean), lean(x)
        twin[0].weight.data.mul_(2)
        assert torch.equal(lean(x), before) and torch.equal(twin(x), 2 * before)


def test_elsewhere_it_is_diffusers_own(pair):
    """Without autocast, in fp32, and while compiling: to the bit."""
    plain, lean = pair
    x = heads(torch.bfloat16)
    assert torch.equal(lean(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lean(x.float()), plain(x.float()))
        graphs = []
        compiled = torch.compile(lean, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
        assert torch.equal(compiled(x), plain(x)) and len(graphs) == 1
        assert not any("RMSNorm" in str(node.target) for node in graphs[0].graph.nodes)


def test_norms_with_a_bias_or_without_a_weight_are_left_alone():
    for options in (dict(bias=True), dict(elementwise_affine=False)):
        module = Plain(64, eps=EPS, **options)
        norms.lean(nn.Sequential(module))
        assert type(module) is Plain


# --------------------------------------------------------------------------- layer and group norms


def group_norm():
    return nn.GroupNorm(8, 64)


KINDS = pytest.mark.parametrize("make", [
    pytest.param(lambda: nn.LayerNorm(64, elementwise_affine=False), id="layer norm"),
    pytest.param(lambda: nn.LayerNorm(64), id="layer norm with weights"), pytest.param(group_norm, id="group norm"),
])  # fmt: skip


def pictures(norm, dtype):
    """Tokens (2, 50, 64) or feature maps (2, 64, 5, 10) around 3."""
    x = 3 + 2 * torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    return (x.transpose(1, 2).reshape(2, 64, 5, 10) if isinstance(norm, nn.GroupNorm) else x).to(dtype)


def lean_and_plain(make, dtype):
    plain = make().to(dtype)
    with torch.no_grad():
        for weight in plain.parameters():
            weight.add_(torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype), alpha=0.3)
    lean = nn.Sequential(copy.deepcopy(plain))
    norms.lean(lean)
    return lean, plain


def by_hand(norm, x):
    """(x - mean) / sqrt(variance + eps) * weight + bias in fp64, over the last dimension or over groups of 8 channels and all pixels."""
    rows = x.reshape(2, 8, -1) if isinstance(norm, nn.GroupNorm) else x
    rows = rows - rows.mean(-1, keepdim=True)
    y = (rows / (rows.square().mean(-1, keepdim=True) + norm.eps).sqrt()).view(x.shape)
    shape = (64, 1, 1) if isinstance(norm, nn.GroupNorm) else (64,)
    return y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["fp32 weights", "16-bit weights"])
def test_a_norm_works_in_16_bits_and_rounds_its_result_only(make, dtype, weights):
    """Value and gradients. A rounding is off by eps / 2 of a number at most; of a result weight, product and sum may be rounded.

    Gradients of 16-bit weights are left out: kernels of CPUs add them up in 16 bits.
    """
    lean, plain = lean_and_plain(make, weights or dtype)
    x = pictures(plain, dtype).requires_grad_()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.autocast("cpu", dtype):
        y = lean(x)
    trained = list(lean.parameters()) if weights else []
    found = [y, *torch.autograd.grad(y, [x, *trained], gradient)]
    exact = copy.deepcopy(plain).double()
    x64 = x.detach().double().requires_grad_()
    y = by_hand(exact, x64)
    wanted = [y, *torch.autograd.grad(y, [x64, *exact.parameters()][: len(found) - 1], gradient.double())]
    for a, want, like in zip(found, wanted, [x, x, *trained], strict=True):
        assert a.dtype == like.dtype and (a - want).norm() < 1.5 * torch.finfo(dtype).eps * want.norm()


@KINDS
def test_on_a_gpu_a_norm_keeps_its_input_alone_and_returns_16_bits(make):
    """On tensors without memory. autocast of CPUs makes no copies, that of GPUs does: there torch's own keeps 4 bytes a number."""
    lean, plain = lean_and_plain(make, torch.bfloat16)
    shape, dtypes = pictures(plain, torch.bfloat16).shape, []

    def forward(module):
        y = module(torch.empty(shape, dtype=torch.bfloat16, requires_grad=True))
        dtypes.append(y.dtype)
        return y

    found, before = (activations.count(module.to("meta"), forward, autocast=torch.bfloat16).total for module in (lean, plain))
    assert dtypes == [torch.bfloat16, torch.float32]
    assert 2 * 6400 < found <= 2 * 6400 + 2 * 4 * 100  # two fp32 numbers a row, or a group
    assert before >= 4 * 6400


@KINDS
def test_elsewhere_a_norm_is_torchs_own(make):
    """Without autocast, of an fp32 input, and while compiling: to the bit."""
    lean, plain = lean_and_plain(make, torch.float32)
    x = pictures(plain, torch.bfloat16)
    assert torch.equal(lean(x.float()), plain(x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lean(x.float()), plain(x.float()))
        compiled = torch.compile(lean, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), plain(x))


def test_autocast_is_on_again_after_a_norm():
    lean, _ = lean_and_plain(group_norm, torch.float32)
    layer = nn.Linear(10, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(lean(pictures(lean[0], torch.bfloat16))).dtype == torch.bfloat16
