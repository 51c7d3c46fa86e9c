"""What a forward pass keeps, counted without memory: by hand for small networks, and against what autograd really keeps on a CPU.

`tests/test_fake_gpu.py` has the same of whole training steps, by the counters of torch's own allocator.
"""

import argparse
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from test_rollout import LiveBytes
from torch import nn
from torch.nn import functional as F

from src import activations, lora, memory, speed
from src.pipelines import geometry, sd3, sd15

BF16 = torch.bfloat16
UNET = geometry.MODELS["sd1.5"]["unet"] | {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                                           "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 16}  # fmt: skip


def meta(*layers):
    return nn.Sequential(*layers).to("meta")


def count(model, shape, *, gradient=False, **options):
    """Of an input that is made in the pass, fp32."""
    options = {"autocast": BF16} | options
    return activations.count(model.train(), lambda copy: copy(torch.empty(shape, requires_grad=gradient)), **options)


def test_a_linear_layer_under_autocast_keeps_16_bit_copies_of_input_and_weight():
    """10 x 8 numbers of input, 16 x 8 of weight."""
    assert count(meta(nn.Linear(8, 16)), (10, 8)).total == 2 * (10 * 8)  # the input needs no gradient, so the weight is not needed
    assert count(meta(nn.Linear(8, 16)), (10, 8), gradient=True).total == 2 * (10 * 8 + 16 * 8)
    assert count(meta(nn.Linear(8, 16)), (10, 8), gradient=True, autocast=None).total == 4 * 10 * 8  # the weight is its own


def test_frozen_weights_keep_no_input_and_in_16_bits_no_copy():
    frozen = meta(nn.Linear(8, 16)).requires_grad_(False)
    assert count(frozen, (10, 8), gradient=True).total == 2 * 16 * 8
    assert count(frozen.to(BF16), (10, 8), gradient=True).total == 0


def test_group_norm_and_activation_keep_fp32():
    """5 pictures of 4 channels, 3 x 3: norm's fp32 input and its mean and deviation of 2 groups, SiLU's fp32 input; then the convolution's
    16-bit input and weight."""
    model = meta(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 6, 3, padding=1))
    pictures = 5 * 4 * 9
    assert count(model, (5, 4, 3, 3), gradient=True).total == 4 * (2 * pictures + 2 * 5 * 2) + 2 * (pictures + 6 * 4 * 9)


def test_attention_keeps_queries_keys_values_and_result():
    """Not its products; 2 pictures of 64 tokens, 2 heads of 16; and the logarithm of each sum, 4 bytes per head and token."""
    model = Attention(query_dim=32, heads=2, dim_head=16, bias=False).to("meta", BF16).requires_grad_(False)
    tokens = 2 * 64 * 32
    kept = activations.count(model, lambda copy: copy(torch.empty(2, 64, 32, dtype=BF16, requires_grad=True)), autocast=BF16)
    assert 0 <= kept.total - (2 * 4 * tokens + 4 * 2 * 2 * 64) <= 64  # the kernel's seed


def test_of_units_that_are_computed_again_the_input_is_kept():
    """Two units of two layers each, 10 x 8 numbers between them; inside, ReLU keeps its result, of 10 x 32, which the next layer needs in
    16 bits as it is."""
    unit = [nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2)]
    model = meta(*unit)
    inside = 2 * (10 * 8 + 32 * 8 + 10 * 32 + 8 * 32)  # input and weight of both layers
    plain = count(model, (10, 8), gradient=True)
    assert (plain.again, plain.copies) == (0, 0)
    assert plain.total == 2 * inside and plain.largest == 2 * 10 * 32
    kept = count(model, (10, 8), gradient=True, units=lambda copy: list(copy))
    assert kept.total == 4 * 10 * 8 + 2 * 10 * 8  # the first unit's input is fp32, the second's the first one's result
    assert kept.again == inside and kept.copies == 2 * 2 * (8 * 32 + 32 * 8)
    half = count(model, (10, 8), gradient=True, units=lambda copy: list(copy)[1:])
    assert half.total == inside + 2 * 10 * 8 and half.again == inside - 2 * 10 * 8  # what the unit reads is kept anyway
    without = count(model, (10, 8), gradient=True, units=lambda copy: list(copy), autocast=None)
    assert without.copies == 0


def test_what_a_unit_reads_is_kept_though_the_unit_before_keeps_it_too():
    """ReLU's result, 10 x 8, ends the first unit and begins the second; without units it is kept once."""
    model = meta(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8)))
    kept = count(model, (10, 8), gradient=True, autocast=None, units=lambda copy: list(copy))
    assert kept.total == 4 * (10 * 8 + 10 * 8) and kept.again == 0
    assert count(model, (10, 8), gradient=True, autocast=None).total == kept.total


def test_dropout_keeps_its_mask():
    model = meta(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).requires_grad_(False)
    assert count(model, (10, 8), gradient=True, autocast=None).total == 10 * 8  # a byte for each number


def test_the_model_that_is_counted_stays_as_it_was():
    model = meta(nn.Linear(8, 8))
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), F.scaled_dot_product_attention
    count(model, (1, 8), units=lambda copy: list(copy))
    assert model[0].weight.device.type == "meta" and not model[0]._forward_hooks
    assert before == (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), F.scaled_dot_product_attention)


def really_kept(module, run):
    """Bytes of the storages that autograd keeps on a CPU, weights aside."""
    own = {weight.untyped_storage().data_ptr() for weight in (*module.parameters(), *module.buffers())}
    found = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "LoRA"])
def test_a_unet_in_fp32_keeps_what_a_cpu_does(adapted):
    """Without autocast both take the same kernels, but for attention, whose CPU kernel keeps the same as a GPU's."""
    unet = geometry.build(UNET, device="cpu").train()
    lora.add(unet, rank=4) if adapted else unet.requires_grad_(True)
    given = sd15.example_inputs(unet.config, 16, 7, 3)

    def run(module):
        return module(**sd15.example_inputs(unet.config, 16, 7, 3), return_dict=False)[0]

    seen = really_kept(unet, lambda: unet(**given, return_dict=False))
    found = activations.count(unet.to("meta"), run)
    assert found.total == pytest.approx(seen, rel=0.02)
    again = activations.count(unet, run, units=speed.blocks)
    assert 0 < again.again < 0.3 * found.total and again.total < 0.6 * found.total


# --------------------------------------------------------------------------- without gradient


def test_live_bytes_by_hand():
    """10 rows in fp32: 8 numbers come in and stay; 16 and their ReLU are there at once; then 4 beside the ReLU: 40 x (8 + 16 + 16)."""
    model = meta(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert activations.live(model, lambda copy: copy(torch.empty(10, 8))) == 40 * (8 + 16 + 16)


@pytest.mark.parametrize(("pictures", "at_once"), [(2, 2), (4, 2), (4, 1)])
def test_decoding_holds_what_was_counted(pictures, at_once):
    """Against the storages that are alive on a CPU; in fp32, a small VAE of SD3 at 64 px."""
    config = geometry.MODELS["sd3.5-medium"]["vae"] | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8}
    args = argparse.Namespace(mixed_precision="no", resolution=64, sample_batch_size=pictures, decode_batch_size=at_once)
    planned = memory.drawing_bytes(args, geometry.build(config))
    with torch.device("cpu"):
        vae = AutoencoderKL.from_config(config).eval().requires_grad_(False)
    with torch.no_grad(), LiveBytes() as held:
        sd3.decode_latents(SimpleNamespace(vae=vae), torch.zeros(pictures, 16, 8, 8), at_once)
    assert planned == pytest.approx(held.peak, rel=0.03)
