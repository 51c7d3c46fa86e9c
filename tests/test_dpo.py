"""The preference loss: by hand, against a plain loop, its identity at policy == reference in every precision, and what it is blind to."""

import contextlib
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import unets

import train_dpo_sd15 as dpo
from src.pipelines import sd15

ALPHAS = torch.linspace(0.999, 0.005, 1000)


def batch(b=3, dtype=torch.float32, seed=0):
    """x0, noise, timestep, alphas, condition of random pairs for the tiny UNet."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(b, 2, 4, 8, 8, generator=generator), torch.randn(b, 4, 8, 8, generator=generator)
    condition = sd15.Conditioning(torch.randn(b, 16, 8, generator=generator).to(dtype), torch.zeros(b, 0))
    return x0, noise, torch.randint(1000, (b,), generator=generator), ALPHAS, condition


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return unets.unet(8).requires_grad_(False)


def perturbed(unet, scale=0.05):
    other = copy.deepcopy(unet)
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return other


# --------------------------------------------------------------------------- the numbers


def test_logits_by_hand():
    """m = (0.3, 0.5), r = (0.4, 0.4), beta 10: -5 * ((0.3 - 0.5) - 0) = 1. m = (0.5, 0.3), r = (0.6, 0.2): -5 * (0.2 - 0.4) = 1.
    The second pair's winner is denoised worse than its loser, but less so than by the reference: that is a preference, too."""
    errors, reference = torch.tensor([[0.3, 0.5], [0.5, 0.3]]), torch.tensor([[0.4, 0.4], [0.6, 0.2]])
    assert torch.allclose(dpo.preference_logits(errors, reference, 10.0), torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize(("loss_type", "smoothing", "expected"), [
    ("sigmoid", 0.0, math.log1p(math.exp(-2.0))), ("sigmoid", 0.25, 0.75 * math.log1p(math.exp(-2.0)) + 0.25 * math.log1p(math.exp(2.0))),
    ("ipo", 0.0, 1.5**2), ("hinge", 0.0, 0.0),
])  # fmt: skip
def test_losses_by_hand(loss_type, smoothing, expected):
    assert dpo.preference_loss(torch.tensor([2.0]), loss_type, smoothing).item() == pytest.approx(expected)
    assert dpo.preference_loss(torch.tensor([-2.0]), "hinge").item() == 3.0
    with pytest.raises(AssertionError, match="no formula for kto"):
        dpo.preference_loss(torch.tensor([2.0]), "kto")


def test_ties_count_one_half():
    assert dpo.accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])).item() == pytest.approx(2.5 / 4)


def test_errors_are_those_of_a_plain_loop(unet):
    """One picture at a time: x_t = sqrt(a) x0 + sqrt(1 - a) noise with the pair's own noise and timestep, mean of squares."""
    x0, noise, timestep, alphas, condition = batch()
    errors = dpo.denoising_errors(dpo.predictor(unet), *batch())
    assert errors.shape == (3, 2)
    for i in range(3):
        a = alphas[timestep[i]]
        for j in range(2):
            x_t = a.sqrt() * x0[i, j] + (1 - a).sqrt() * noise[i]
            predicted = unet(x_t[None], timestep[i], condition.embeds[i : i + 1]).sample[0]
            assert errors[i, j].item() == pytest.approx((predicted - noise[i]).square().mean().item(), rel=1e-4)


def test_the_pair_goes_through_the_policy_in_one_forward_pass(unet):
    calls = []

    def counting(*inputs):
        calls.append(len(inputs[0]))
        return sd15.eps(unet, *inputs)

    dpo.objective(counting, counting, *batch(), beta=5000.0)
    assert calls == [6, 6]  # 3 pairs: once the policy, once the reference


# --------------------------------------------------------------------------- policy == reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_policy_equal_to_its_reference_has_the_loss_log_2_and_accuracy_one_half(unet, dtype):
    """With beta 5000, errors rounded to bf16 (3 digits) would give a loss of 4; all must be fp32 after the network."""
    policy, reference = (copy.deepcopy(unet).to(dtype) for _ in range(2))
    found = dpo.objective(dpo.predictor(policy), dpo.predictor(reference), *batch(8, dtype), beta=5000.0)
    assert found["loss"].dtype == torch.float32
    assert found["loss"].item() == pytest.approx(math.log(2), abs=1e-6) and found["accuracy"].item() == 0.5
    assert found["policy_margin"] == found["reference_margin"] != 0 and found["winner_gain"] == found["loser_gain"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_identity_holds_under_autocast_too(unet, dtype):
    with torch.autocast("cpu", dtype):
        found = dpo.objective(dpo.predictor(unet), dpo.predictor(copy.deepcopy(unet)), *batch(8), beta=5000.0)
    assert found["loss"].item() == pytest.approx(math.log(2), abs=1e-6) and found["accuracy"].item() == 0.5


# --------------------------------------------------------------------------- the gradient


def test_the_gradient_is_that_of_the_errors_weighted_by_the_preference(unet):
    """d loss / d theta = beta / 2 * sigmoid(-x) * (d m_w - d m_l) for each pair, here assembled from two plain backward passes."""
    policy, reference = perturbed(unet).requires_grad_(True), unet
    inputs, beta = batch(2), 20.0
    dpo.objective(dpo.predictor(policy), dpo.predictor(reference), *inputs, beta=beta)["loss"].backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    policy.zero_grad()
    errors = dpo.denoising_errors(dpo.predictor(policy), *inputs)
    with torch.no_grad():
        logits = dpo.preference_logits(errors, dpo.denoising_errors(dpo.predictor(reference), *inputs), beta)
    weight = 0.5 * beta * torch.sigmoid(-logits) / 2  # mean over two pairs
    (weight * (errors[:, 0] - errors[:, 1])).sum().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-6) and expected.abs().max() > 1e-3


def test_gains_are_what_the_margins_differ_by(unet):
    """(r_w - m_w) - (r_l - m_l) = (m_l - m_w) - (r_l - r_w)."""
    found = dpo.objective(dpo.predictor(perturbed(unet)), dpo.predictor(unet), *batch(), beta=50.0)
    expected = (found["policy_margin"] - found["reference_margin"]).item()
    assert (found["winner_gain"] - found["loser_gain"]).item() == pytest.approx(expected, rel=1e-3) != 0


def test_nothing_flows_into_the_reference(unet):
    reference = copy.deepcopy(unet).requires_grad_(True)
    policy = perturbed(unet).requires_grad_(True)
    dpo.objective(dpo.predictor(policy), dpo.predictor(reference), *batch(), beta=5000.0)["loss"].backward()
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_swapping_the_pair_turns_the_preference_round(unet):
    x0, *rest = batch()
    sides = [dpo.objective(dpo.predictor(perturbed(unet)), dpo.predictor(unet), pair, *rest, beta=50.0) for pair in (x0, x0.flip(1))]
    assert sides[0]["accuracy"] + sides[1]["accuracy"] == pytest.approx(1.0)
    assert sides[0]["winner_gain"] == pytest.approx(sides[1]["loser_gain"].item(), rel=1e-4)
    assert sides[0]["policy_margin"].item() == pytest.approx(-sides[1]["policy_margin"].item(), rel=1e-4)


def test_sft_is_the_winners_denoising_loss(unet):
    found = dpo.objective(dpo.predictor(unet), None, *batch(), beta=5000.0)
    assert found.keys() == {"loss"}
    errors = dpo.denoising_errors(dpo.predictor(unet), *batch())
    assert found["loss"].item() == pytest.approx(errors[:, 0].mean().item(), rel=1e-5)


# --------------------------------------------------------------------------- the held-out pairs


class HeldOut(list):
    """Stands for samples: `Key` -> what `collate` takes."""

    def __getitem__(self, key):
        return {"index": key.index, "position": key.position, "prompt": "", "size": (8, 8)}


def test_processes_share_the_held_out_pairs_and_each_level_has_noise_of_its_own():
    """Pair i has the loss i. Of three, the second of two processes has one and repeats the last: (0 + 1 + 2) / 3 = 1."""
    noises, total = {}, 0.0

    def encode(batch, seed, step):
        return torch.full((1, 2, 4, 1, 1), float(batch.indices[0])), sd15.Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 0))

    def loss(x0, noise, timestep, condition):
        assert x0.shape == (4, 2, 4, 1, 1) and len(condition) == 4
        assert timestep.tolist() == [125 - 1, 375 - 1, 625 - 1, 875 - 1]  # the middles of quarters of 1000, counted from 0
        noises[x0.mean().item()] = noise
        return {"loss": x0.mean(), "accuracy": torch.tensor(0.5), "policy_margin": x0.mean()}

    for rank in (0, 1):
        accelerator = SimpleNamespace(autocast=contextlib.nullcontext, reduce=lambda tensor, how: tensor)
        run = SimpleNamespace(turns=lambda count, rank=rank: range(rank, 4, 2), device="cpu", accelerator=accelerator)
        found = dpo.held_out_measures(SimpleNamespace(run=run, held_out=HeldOut([0, 1, 2]), encode=encode), loss)
        assert found.keys() == {"val_loss", "val_accuracy"}
        total += found["val_loss"]
    assert total == pytest.approx(1.0)
    assert torch.cat([noises[float(i)] for i in range(3)]).flatten(1)[:, 0].unique().numel() == 12
