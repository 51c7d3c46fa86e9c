"""GRPO's maths against numbers derived by hand, plain loops, torch.distributions, and the plain policy gradient of a chain of two steps."""

import argparse
import math

import pytest
import torch
from test_transitions import SIGMAS
from torch.distributions import Normal

from src import flow, grpo_variants, policy, transitions
from train_grpo_sd3 import group_advantages, policy_loss, surrogate

D512 = 16 * 64 * 64  # numbers in a latent of 512 x 512 px


# --------------------------------------------------------------------------- advantages


def test_group_advantages_by_hand():
    """Group 7 has rewards 1, 3: mean 2, deviation 1. Group 2 has 5, 5: nothing to learn. 1e-4 is added to the deviation."""
    got = group_advantages(torch.tensor([1.0, 5.0, 3.0, 5.0]), torch.tensor([7, 2, 7, 2]))
    torch.testing.assert_close(got, torch.tensor([-1 / 1.0001, 0.0, 1 / 1.0001, 0.0]))


def test_global_deviation_by_hand():
    """Rewards 1, 3 | 4, 4 have mean 3 and squared distances 4, 0, 1, 1: deviation sqrt(1.5). Centred by group: -1, 1 | 0, 0."""
    got = group_advantages(torch.tensor([1.0, 3.0, 4.0, 4.0]), torch.tensor([0, 0, 1, 1]), "global")
    expected = 1 / (math.sqrt(1.5) + 1e-4)
    torch.testing.assert_close(got, torch.tensor([-expected, expected, 0.0, 0.0]))


@pytest.mark.parametrize("scale", ["group", "global"])
def test_against_a_plain_loop_and_they_sum_to_0_in_each_group(scale):
    torch.manual_seed(0)
    rewards, groups = torch.randn(60) * 3 + 20, torch.randint(0, 7, (60,)) * 10
    got = group_advantages(rewards, groups, scale, limit=1e9)
    for number, (reward, group) in enumerate(zip(rewards.tolist(), groups.tolist(), strict=True)):
        peers = [r for r, g in zip(rewards.tolist(), groups.tolist(), strict=True) if g == group]
        among = peers if scale == "group" else rewards.tolist()
        mean, spread = sum(peers) / len(peers), sum(among) / len(among)
        std = math.sqrt(sum((r - spread) ** 2 for r in among) / len(among))
        assert got[number].item() == pytest.approx((reward - mean) / (std + 1e-4), rel=1e-5, abs=1e-6)
    for group in groups.unique():
        assert got[groups == group].double().sum().abs() < 1e-5


@pytest.mark.parametrize("scale", ["group", "global"])
def test_permuting_the_batch_permutes_the_result(scale):
    torch.manual_seed(1)
    rewards, groups, order = torch.randn(40), torch.arange(40) // 8, torch.randperm(40)
    rewards[3] = float("nan")
    torch.testing.assert_close(group_advantages(rewards[order], groups[order], scale), group_advantages(rewards, groups, scale)[order])


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="--group_size"):
        group_advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))


def test_a_new_choice_needs_a_formula_of_its_own():
    with pytest.raises(AssertionError, match="no formula for none"):
        group_advantages(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), "none")
    rollout = argparse.Namespace(trajectory=None, advantage=torch.zeros(1))
    with pytest.raises(AssertionError, match="no surrogate for cispo"):
        surrogate(None, rollout, 0, None, None, {}, argparse.Namespace(loss="cispo"))


def test_groups_are_told_apart_by_number_not_by_prompt():
    """The same prompt in two groups, one of good and one of bad noise: each picture is compared within its own group."""
    got = group_advantages(torch.tensor([0.0, 1.0, 10.0, 11.0]), torch.tensor([4, 4, 5, 5]))
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=1e-3, atol=0)


def test_pictures_that_were_not_judged_count_in_no_mean():
    """1, 3 and an unjudged one are a group of mean 2 and deviation 1; one alone among unjudged ones has nothing to be compared with."""
    nan = float("nan")
    got = group_advantages(torch.tensor([1.0, nan, 3.0, 4.0, nan, nan]), torch.tensor([0, 0, 0, 1, 1, 1]))
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]), rtol=1e-3, atol=0)
    both = group_advantages(torch.tensor([1.0, nan, 3.0, 5.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1, 1]), "global")
    assert both[0].item() == pytest.approx(-1 / (math.sqrt(12.8 / 5) + 1e-4))  # 1 3 5 5 5: mean 3.8, squared distances sum to 12.8


def test_advantages_are_bounded():
    """Of 100 rewards one is 1, the others 0: (1 - 0.01) / sqrt(0.01 * 0.99) = 9.95."""
    rewards = torch.zeros(100)
    rewards[5] = 1.0
    assert group_advantages(rewards, torch.zeros(100, dtype=torch.long))[5] == 5.0
    assert group_advantages(rewards, torch.zeros(100, dtype=torch.long), limit=20.0)[5].item() == pytest.approx(9.95, rel=2e-3)


# --------------------------------------------------------------------------- the surrogate


def test_gradient_at_ratio_1_is_the_plain_policy_gradient():
    """Also what the seed project lacked: its clamp(log_ratio, 20, 20) had gradient 0."""
    log_prob = torch.tensor([-1.0, -2.0, 5.0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([0.5, -3.0, 0.0])
    loss = policy_loss(log_prob - log_prob.detach(), advantage, 0.66, D512)
    assert torch.equal(loss.detach(), torch.zeros(3, dtype=torch.float64))
    loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, -advantage.double())


@pytest.mark.parametrize("transition", transitions.STOCHASTIC)
def test_surrogate_gradient_of_a_chain_of_two_steps_is_that_of_its_log_probability(transition):
    """x0 -> x1 -> x2 with a linear policy: the gradient of -A (log p(x1 | x0) + log p(x2 | x1)), with torch's own density."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 12) * 0.1)
    sigmas, level = torch.tensor([0.9, 0.7, 0.4]), {"cps": 0.8, "flow": 0.7, "precise": 1.5}[transition]
    advantage, x, states = torch.randn(5), torch.randn(5, 12), []

    def moments(x, t):
        return transitions.moments(transition, x, x @ weight, sigmas[t].expand(5), sigmas[t + 1].expand(5), level)

    with torch.no_grad():
        for t in range(2):
            mean, std = moments(x, t)
            drawn = transitions.draw(mean, std, torch.randn(5, 12))
            states.append((x, drawn, transitions.log_prob(drawn, mean, std)))
            x = drawn
    surrogate, plain = 0, 0
    for t, (x, drawn, old) in enumerate(states):
        mean, std = moments(x, t)
        surrogate = surrogate + policy_loss(transitions.log_prob(drawn, mean, std) - old, advantage, 0.66, 12).mean()
        plain = plain - (advantage * Normal(mean, std.expand_as(mean)).log_prob(drawn).sum(1)).mean()
    (got,), (expected,) = (torch.autograd.grad(value, weight, retain_graph=True) for value in (surrogate, plain))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_clipping_stops_the_gradient_only_where_the_policy_went_too_far_already():
    """Beyond the clip: gained where it should (0), lost where it should (0), gained where it should lose, lost where it should gain."""
    log_ratio = torch.tensor([1.0, -1.0, 1.0, -1.0], requires_grad=True)
    policy_loss(log_ratio, torch.tensor([1.0, -1.0, -1.0, 1.0]), 0.66, D512).sum().backward()
    assert log_ratio.grad[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(log_ratio.grad[2:], torch.tensor([1.0, -1.0]), rtol=1e-4, atol=0)


def test_against_the_textbook_formula_in_a_plain_loop():
    """D max(-A r, -A clamp(r, e^-c/D, e^c/D)) with r = e^(l/D), which is larger by -A D."""
    torch.manual_seed(0)
    log_ratios, advantages, clip, dimensions = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64), 0.5, 48
    expected = []
    for log_ratio, advantage in zip(log_ratios.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(log_ratio / dimensions)
        bounded = min(max(ratio, math.exp(-clip / dimensions)), math.exp(clip / dimensions))
        expected.append(dimensions * max(-advantage * ratio, -advantage * bounded) + advantage * dimensions)
    got = policy_loss(log_ratios, advantages, clip, dimensions)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)
    assert (log_ratios.abs() > clip).sum() > 20  # else the clip was not met


def test_the_loss_does_not_depend_on_the_resolution():
    """A log-ratio of 0.3 nats costs the same at 512 and at 1024 px, to 1e-5; in fp32, too, where D ratio would have no digits left."""
    small, large = (policy_loss(torch.tensor([0.3]), torch.tensor([2.0]), 0.66, dimensions) for dimensions in (D512, 4 * D512))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=0)
    torch.testing.assert_close(small, torch.tensor([-0.6]), rtol=1e-5, atol=0)


def test_the_clip_in_nats_is_the_published_one_per_dimension():
    """--help says that 1e-5 at 512 px is 0.66 nats."""
    assert 1e-5 * D512 == pytest.approx(0.66, abs=0.005)
    assert math.expm1(0.66 / D512) == pytest.approx(1e-5, rel=0.01)


# --------------------------------------------------------------------------- KL


@pytest.mark.parametrize("transition", transitions.STOCHASTIC)
def test_kl_is_that_of_torch_distributions_and_has_a_gradient(transition):
    torch.manual_seed(0)
    a, b, std = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3), torch.rand(2, 1, 1, 1) + 0.1
    got = transitions.kl(a, b, std)
    expected = torch.distributions.kl_divergence(Normal(a, std.expand_as(a)), Normal(b, std.expand_as(b))).sum((1, 2, 3))
    torch.testing.assert_close(got, expected.double(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(got.sum(), a)
    torch.testing.assert_close(gradient, (a - b).detach() / std**2)


def test_flow_grpos_kl_is_the_exact_one_times_dt():
    """Theirs is |mean - ref|^2 / (2 c^2) with c = a sqrt(s / (1 - s)), where step_std^2 = c^2 |dt|: smaller than the KL by |dt|."""
    sigma, sigma_next, noise = torch.tensor([0.8]), torch.tensor([0.7]), 0.7
    step_std = transitions.coefficients("flow", sigma, sigma_next, noise)[2].float().view(1, 1, 1, 1)
    a, b = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    c_squared = noise**2 * 0.8 / 0.2
    theirs = ((a - b) ** 2).sum() / (2 * c_squared)
    torch.testing.assert_close((transitions.kl(a, b, step_std) * (sigma - sigma_next)).float()[0], theirs, rtol=1e-4, atol=0)


def test_the_figures_that_page_help_and_preset_state():
    """At the first five of ten steps 0.04 and 0.01 of flow_grpo's form are 0.0016 to 0.0033 and 0.0004 to 0.0008 of the exact one.

    For the same change of velocity there, `cps` moves its mean by 0.6 to 1.1 times the nats of `flow`.
    """
    levels = torch.tensor(SIGMAS, dtype=torch.float64)[:6]
    steps = levels[:-1] - levels[1:]
    assert [round(x, 2) for x in (steps.min().item(), steps.max().item())] == [0.04, 0.08]
    assert [round(weight * x.item(), 4) for weight in (0.04, 0.01) for x in (steps.min(), steps.max())] == [0.0016, 0.0033, 0.0004, 0.0008]
    found = (transitions.coefficients(name, levels[:-1], levels[1:], level) for name, level in (("cps", 0.8), ("flow", 0.7)))
    cps, flow_ = ((velocity / step_std) ** 2 for _, velocity, step_std in found)
    assert [round(x, 1) for x in ((cps / flow_).min().item(), (cps / flow_).max().item())] == [0.6, 1.1]
    assert [round(x, 2) for x in (1e-5 * D512, 1e-4 * D512, 4 * 1e-5 * D512, 1e-4 * 4 * 64 * 64)] == [0.66, 6.55, 2.62, 1.64]
    assert round(10 + 3 * 2.13, 1) == 16.4 and round(2 * 10 + 2 * 9 * 2.13 + 2 * 9) == 76  # steps, guidance twice, the reference


# --------------------------------------------------------------------------- GRPO-Guard


def drifted(b=3):
    """A policy that moved: (log_ratio, mean, old_mean, step_std, z), with x' = old_mean + step_std z."""
    torch.manual_seed(0)
    old_mean, z, step_std = torch.randn(b, 4, 2, 2), torch.randn(b, 4, 2, 2), torch.tensor([0.1, 0.5, 2.0]).view(b, 1, 1, 1)
    mean = (old_mean + 0.1 * torch.randn(b, 4, 2, 2)).requires_grad_()
    drawn = old_mean + step_std * z
    ratio = transitions.log_prob(drawn, mean, step_std) - transitions.log_prob(drawn, old_mean, step_std)
    return ratio, mean, old_mean, step_std, z


def test_guarded_log_ratio_is_linear_in_the_change_of_the_mean():
    """log N(x'; m) - log N(x'; m0) = z d / s - d^2 / 2 s^2 with d = m - m0: without the last term z d / s is left, per sample."""
    ratio, mean, old_mean, step_std, z = drifted()
    got = grpo_variants.guarded_log_ratio(ratio, mean, old_mean, step_std, 1.5)
    expected = 1.5 * (z * (mean - old_mean) / step_std).flatten(1).sum(1)
    torch.testing.assert_close(got, expected.double(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(got.sum(), mean)
    torch.testing.assert_close(gradient, 1.5 * z / step_std, rtol=1e-4, atol=1e-5)


def test_the_drift_is_of_each_sample_not_of_the_batch():
    """The authors' code takes one mean over the batch: the result for a picture would depend on the others."""
    ratio, *rest, z = drifted()
    alone = [grpo_variants.guarded_log_ratio(ratio[i : i + 1], *(part[i : i + 1] for part in rest), 1.0) for i in range(3)]
    torch.testing.assert_close(grpo_variants.guarded_log_ratio(ratio, *rest, 1.0), torch.cat(alone))


def test_guard_factors_by_hand():
    """Steps 1 and 2 of cps: deviations 0.6 and 0.2 times the same sine, over their mean 0.4; |dt| 0.3 and 0.4, whose mean is 0.35."""
    found = grpo_variants.guard_factors("cps", 0.8, torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0]), range(1, 3))
    assert list(found) == [1, 2]
    assert found[1] == pytest.approx((1.5, 0.35 / 0.3), rel=1e-6) and found[2] == pytest.approx((0.5, 0.35 / 0.4), rel=1e-6)


def test_signs_and_sizes_of_log_ratios_are_logged():
    """Sizes are of the log-ratio itself, drift and shares of what is clipped, at 1: two of four are beyond, one of them above."""
    found = policy.ratio_metrics(torch.tensor([3.0, -3.0, 1.0, 0.0]), torch.tensor([1.5, -2.0, 0.5, -1.0]), 1.0)
    assert {name: value.mean().item() for name, value in found.items()} == {
        "log_ratio": 1.75, "drift": -0.25, "clip_fraction": 0.5, "clip_above": 0.25,
    }  # fmt: skip


# --------------------------------------------------------------------------- DiffusionNFT


def forward_process(b=4):
    torch.manual_seed(0)
    x0, noise, old = (torch.randn(b, 4, 2, 2) for _ in range(3))
    sigma = torch.rand(b) * 0.8 + 0.1
    return dict(old_velocity=old, x_t=flow.interpolate(x0, noise, sigma), x0=x0, sigma=sigma), noise - x0


def test_nft_against_a_plain_loop():
    """r = A / 10 + 1/2 within [0, 1]; 5 (r L+ + (1 - r) L-) / beta with L = mean (x0(v) - x0)^2 / mean |x0(v) - x0|."""
    given, _ = forward_process()
    velocity, advantages, beta = torch.randn(4, 4, 2, 2), [0.0, 2.0, -7.0, 5.0], 0.6
    expected = []
    for i, advantage in enumerate(advantages):
        good, losses = min(max(advantage / 10 + 0.5, 0), 1), []
        v, old, x_t, x0, s = (value[i].double() for value in (velocity, *given.values()))
        for candidate in (beta * v + (1 - beta) * old, (1 + beta) * old - beta * v):
            wrong = [x - s.item() * c - truth for x, c, truth in zip(*(t.flatten().tolist() for t in (x_t, candidate, x0)), strict=True)]
            losses.append(sum(w * w for w in wrong) / sum(abs(w) for w in wrong))
        expected.append(5 * (good * losses[0] + (1 - good) * losses[1]) / beta)
    got = grpo_variants.nft_loss(velocity, advantage=torch.tensor(advantages), strength=beta, limit=5.0, **given)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_nft_pulls_good_pictures_in_pushes_bad_ones_away_and_leaves_average_ones():
    """On policy (v = v_old) both errors are the same e: the gradient is (2 r - 1) 5 d|e|^2/dv, so 0 at A = 0 and opposite at +-A."""
    given, target = forward_process()
    gradients = {}
    for advantage in (0.0, 5.0, -5.0):
        velocity = given["old_velocity"].clone().requires_grad_()
        loss = grpo_variants.nft_loss(velocity, advantage=torch.full((4,), advantage), strength=1.0, limit=5.0, **given)
        (gradients[advantage],) = torch.autograd.grad(loss.sum(), velocity)
    assert gradients[0.0].abs().max() < 1e-6
    torch.testing.assert_close(gradients[5.0], -gradients[-5.0])
    towards = ((target - given["old_velocity"]) * -gradients[5.0]).flatten(1).sum(1)
    assert (towards > 0).all()  # descent moves the velocity of a good picture towards the one that leads to it


def test_nft_at_full_advantage_is_flow_matching_on_the_good_picture():
    """r = 1 and beta = 1: only the squared error of x0 counts, which is sigma^2 times that of the velocity."""
    given, target = forward_process()
    velocity = torch.randn(4, 4, 2, 2)
    got = grpo_variants.nft_loss(velocity, advantage=torch.full((4,), 9.0), strength=1.0, limit=5.0, **given)
    sigma = given["sigma"]
    size = sigma * (velocity - target).abs().flatten(1).mean(1)
    torch.testing.assert_close(got, 5 * sigma**2 * flow.velocity_loss(velocity, target) / size, rtol=1e-4, atol=1e-5)


def test_nft_of_a_velocity_that_is_exact_is_zero():
    """Halves and quarters, so that x_t - sigma v is x0 to the bit: the error is divided by its own size, 0."""
    x0, noise, sigma = torch.full((1, 4, 2, 2), 0.5), torch.full((1, 4, 2, 2), -0.25), torch.tensor([0.5])
    exact = noise - x0
    given = dict(x_t=flow.interpolate(x0, noise, sigma), x0=x0, sigma=sigma, advantage=torch.zeros(1), strength=1.0, limit=5.0)
    assert grpo_variants.nft_loss(exact, exact, **given).tolist() == [0.0]


def test_nft_replays_all_batches_of_an_update_or_none():
    """Batch 1 alone teaches: of two updates the one that has it replays its other batch, too."""
    teaches = torch.tensor([False, True, False, False])
    assert grpo_variants.nft_batches([0, 1], teaches) == [0, 1] and grpo_variants.nft_batches([2, 3], teaches) == []


def test_the_old_policys_decay_grows_to_its_bound():
    assert [grpo_variants.nft_decay(epochs, 0.2, 0.5) for epochs in (1, 2, 3, 4)] == pytest.approx([0.2, 0.4, 0.5, 0.5])
