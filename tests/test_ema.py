"""The moving average against a plain loop and diffusers; swapping in and out leaves the trained bits alone."""

import pytest
import torch

from src import ema
from src.ema import Ema


def parameters(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 4), (5,))]


def walk(ps, number):
    noise = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for p in ps:
            p.add_(torch.randn(p.shape, generator=noise).to(p.dtype))


def test_two_updates_by_hand():
    """decay 0.5, no warm-up, from 0: towards 1 gives 0.5; towards 3 gives 0.5 * 0.5 + 0.5 * 3 = 1.75."""
    p = torch.nn.Parameter(torch.zeros(1))
    ema = Ema([p], 0.5, warmup=False)
    for value, expected in ((1.0, 0.5), (3.0, 1.75)):
        with torch.no_grad():
            p.fill_(value)
        ema.update()
        assert ema.average[0].item() == expected


def test_warm_up_by_hand():
    """From 0 towards 1: the first decay is 1/10, so 0.9; the second 2/11, so 2/11 * 0.9 + 9/11; later ones never exceed `decay`."""
    p = torch.nn.Parameter(torch.zeros(1))
    ema = Ema([p], 0.99)
    with torch.no_grad():
        p.fill_(1.0)
    ema.update()
    assert ema.average[0].item() == pytest.approx(0.9)
    ema.update()
    assert ema.average[0].item() == pytest.approx(2 / 11 * 0.9 + 9 / 11)
    low = Ema([p], 0.05)
    with torch.no_grad():
        p.fill_(2.0)
    low.update()
    assert low.average[0].item() == pytest.approx(0.05 * 1 + 0.95 * 2)


def test_against_diffusers():
    """diffusers' first step copies (decay 0); from the second on its decay is min(decay, (1 + n) / (10 + n)), n = 1, 2, ..."""
    from diffusers.training_utils import EMAModel

    ps = parameters()
    ours, theirs = Ema(ps, 0.6), EMAModel(ps, decay=0.6, foreach=False)
    theirs.step(ps)
    ours.updates = 1
    for number in range(25):
        walk(ps, number)
        ours.update()
        theirs.step(ps)
        for mine, other in zip(ours.average, theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_against_a_plain_loop():
    ps = parameters()
    ema = Ema(ps, 0.8)
    expected = [p.detach().double() for p in ps]
    for number in range(20):
        walk(ps, number)
        ema.update()
        d = min(0.8, (1 + number) / (10 + number))
        expected = [d * e + (1 - d) * p.detach().double() for e, p in zip(expected, ps, strict=True)]
    for mine, other in zip(ema.average, expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)


def test_the_average_of_bf16_parameters_is_fp32():
    """A step of 2^-9 is lost in bf16 beside 1 (8 bits of mantissa), not in the average."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = Ema([p], 0.999, warmup=False)
    with torch.no_grad():
        p.fill_(1.5)
    ema.update()
    assert ema.average[0].dtype == torch.float32
    assert ema.average[0].item() == pytest.approx(1.0005)


def test_the_start_is_a_copy():
    ps = parameters()
    ema = Ema(ps, 0.9)
    before = ema.average[0].clone()
    walk(ps, 0)
    assert torch.equal(ema.average[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_swaps_in_and_restores_the_exact_bits_also_after_an_error(dtype):
    ps = parameters(dtype)
    ema = Ema(ps, 0.9)
    walk(ps, 1)
    ema.update()
    trained = [p.detach().clone() for p in ps]
    storage = [p.data_ptr() for p in ps]
    with ema.applied():
        for p, average in zip(ps, ema.average, strict=True):
            assert torch.equal(p.detach(), average.to(dtype))
    with pytest.raises(KeyError):
        with ema.applied():
            raise KeyError
    for p, bits, pointer in zip(ps, trained, storage, strict=True):
        assert torch.equal(p.detach(), bits)
        assert p.data_ptr() == pointer  # DDP and compiled graphs keep pointing at the parameter
        assert p.requires_grad


def test_the_state_is_no_copy():
    """Of a whole transformer it would be 9 GB on the GPU at every checkpoint."""
    ema = Ema(parameters(), 0.9)
    assert [a.data_ptr() for a in ema.state_dict()["average"]] == [a.data_ptr() for a in ema.average]


def test_resumed_equals_uninterrupted(tmp_path):
    ps = parameters()
    ema = Ema(ps, 0.95)
    for number in range(6):
        if number == 3:
            torch.save({"ema": ema.state_dict(), "p": [p.detach() for p in ps]}, tmp_path / "state.pt")
        walk(ps, number)
        ema.update()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = parameters(seed=1)
    with torch.no_grad():
        for p, saved in zip(again, state["p"], strict=True):
            p.copy_(saved)
    resumed = Ema(again, 0.95)
    resumed.load_state_dict(state["ema"])
    for number in range(3, 6):
        walk(again, number)
        resumed.update()
    assert resumed.updates == ema.updates == 6
    for a, b in zip(ema.average, resumed.average, strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_parameters_is_refused():
    state = Ema(parameters(), 0.9).state_dict()
    with pytest.raises(ValueError, match="saved EMA"):
        Ema([torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(5))], 0.9).load_state_dict(state)


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match="--ema_decay"):
        Ema(parameters(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_average_on_another_device_is_the_same(dtype):
    """40 parameters, more than are copied at a time; the meta device stands for a GPU in the last line: nothing of it may be kept."""
    parameters = [torch.nn.Parameter(torch.full((2,), float(number)).to(dtype)) for number in range(40)]
    here, there = Ema(parameters, 0.9), Ema(parameters, 0.9, device="cpu")
    for _ in range(3):
        with torch.no_grad():
            for parameter in parameters:
                parameter += 1
        here.update()
        there.update()
    for one, other in zip(here.average, there.average, strict=True):
        assert torch.equal(one, other) and other.dtype == torch.float32
    assert [a[0].item() - number for number, a in enumerate(here.average)] == pytest.approx([here.average[0][0].item()] * 40, abs=1e-5)
    assert here.average[0][0] > 2  # all moved alike, most of the way to 3
    with there.applied():
        assert torch.equal(parameters[7], there.average[7].to(dtype))
    assert parameters[7][0] == 10
    assert Ema([torch.nn.Parameter(torch.ones(2, device="meta"))], 0.9, device="meta").average[0].device.type == "meta"


def test_the_result_is_the_average_and_the_trained_weights_lie_beside_it(tmp_path):
    """One weight, trained to 5, whose average is 2; without an average there is nothing beside the result."""
    (weight,) = weights = [torch.nn.Parameter(torch.tensor([5.0]))]
    average, written = Ema(weights, 0.9), {}
    average.average[0].fill_(2.0)
    ema.save(tmp_path, average, lambda folder: written.update({folder: weight.item()}))
    assert written == {tmp_path: 2.0, tmp_path / "raw": 5.0}
    written.clear()
    ema.save(tmp_path, None, lambda folder: written.update({folder: weight.item()}))
    assert written == {tmp_path: 5.0}
