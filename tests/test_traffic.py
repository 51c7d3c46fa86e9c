"""What a training step moves through memory: the counting by hand, and that the project's own forms of layers move less."""

import pytest
import torch

from benchmarks import traffic
from src import cli

TINY = ["--batch", "2", "--resolution", "64", "--tokens", "5"]
SMALL = {
    "transformer": {"num_layers": 2, "dual_attention_layers": (0,), "num_attention_heads": 2, "caption_projection_dim": 128,
                    "joint_attention_dim": 32, "pooled_projection_dim": 16},
    "unet": {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 16, "attention_head_dim": 2},
}  # fmt: skip


def counted(function, *tensors, compute=1.0, bandwidth=1.0):
    with traffic.Traffic(compute, bandwidth) as found:
        function(*tensors)
    return found.totals


def test_a_product_by_hand():
    """(3, 4) @ (4, 5): 2 * 60 operations; 12 + 20 numbers read, 15 written, of 4 bytes."""
    (total,) = counted(torch.mm, torch.ones(3, 4), torch.ones(4, 5), compute=10.0).values()
    assert (total.calls, total.flops, total.bytes, total.seconds) == (1, 120, 188, 188.0)
    (total,) = counted(torch.mm, torch.ones(3, 4), torch.ones(4, 5), bandwidth=100.0).values()
    assert total.seconds == 120.0


def test_what_moves_nothing_is_free_and_in_place_is_read_and_written():
    x = torch.ones(10, 4)
    assert not counted(lambda x: x.t().view(4, 10).detach().expand(3, 4, 10), x)
    assert counted(torch.Tensor.add_, x, 1)["add_"].bytes == 2 * 160
    assert counted(lambda x: torch.exp(x, out=torch.empty_like(x)), x)["exp"].bytes == 2 * 160
    assert counted(torch.add, x, torch.ones(4).expand(10, 4))["add"].bytes == 160 + 16 + 160  # an expanded tensor is read once


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "share"), [([], 0.65), (["--full"], 0.85)])
def test_a_step_here_moves_less_than_diffusers_own(flags, share, monkeypatch):
    """Under a CPU's autocast, whose layer norms work in 16 bits already; on a GPU it saves more."""
    small = {"num_layers": 3, "dual_attention_layers": (0, 1), "num_attention_heads": 4, "caption_projection_dim": 256,
             "joint_attention_dim": 64, "pooled_projection_dim": 32}  # fmt: skip
    monkeypatch.setitem(traffic.geometry.MODELS["sd3.5-medium"], "transformer", traffic.geometry.SD35_MEDIUM | small)
    args = cli.parse(traffic.build_parser(), ["--batch", "2", "--resolution", "256", "--tokens", "20", *flags])
    found = traffic.count(traffic.prepared(args), args)
    args.stock = True
    before = traffic.count(traffic.prepared(args), args)
    moved, moved_before = (sum(total.bytes for total in totals.values()) for totals in (found, before))
    assert moved < share * moved_before


@pytest.mark.parametrize("flags", [
    pytest.param([], marks=pytest.mark.slow), pytest.param(["--model", "sd1.5", "--full"], marks=pytest.mark.slow),
    ["--gradient_checkpointing"],
])  # fmt: skip
def test_it_prints_a_bound_and_where_the_bytes_go(flags, capsys, monkeypatch):
    for model, part in (("sd3.5-medium", "transformer"), ("sd1.5", "unet")):
        monkeypatch.setitem(traffic.geometry.MODELS[model], part, traffic.geometry.MODELS[model][part] | SMALL[part])
    totals = traffic.main(cli.parse(traffic.build_parser(), [*TINY, *flags]))
    text = capsys.readouterr().out
    assert "pictures/s, if all went" in text and {"mm", "add"} <= totals.keys()
    assert any("attention_backward" in name for name in totals)
