"""Stochastic flow steps: against plain loops, torch.distributions, the schedule that they must keep, and the equation they solve."""

import math

import pytest
import torch
from reference import transitions as plain

from src import transitions

LEVELS = {"flow": 0.7, "cps": 0.8, "precise": 1.5}  # usual noise level of each
# shift 3, 10 steps: u = 1 .. 0.002994 (0.001 shifted) linearly, sigma = 3 u / (1 + 2 u); without the final 0
SIGMAS = [3 * u / (1 + 2 * u) for u in (1 - (1 - 0.003 / 1.002) * i / 9 for i in range(10))]
PAIRS = list(zip(SIGMAS[:-1], SIGMAS[1:], strict=True))  # the steps that can be stochastic


def test_sensitivity_by_hand():
    """cps at 0.8, step 8 of 10, 0.278 -> 0.0089: step_std = 0.0089 sin 72 deg = 0.0085, k = 0.0089 cos 72 deg = 0.00276,
    B = k (1 - 0.278) - (1 - 0.0089) 0.278 = -0.2735, so 32; step 4, 0.7904 -> 0.7073: B = 0.2186 x 0.2096 - 0.2927 x 0.7904 = -0.1855,
    step_std 0.6727: 0.276. flow at 0.7, step 8: c^2 = 0.49 x 0.278 / 0.722 = 0.1887, dt = -0.2691, B = -0.2691 (1 + 0.1887 x 0.722 / 0.556)
    = -0.335, step_std = sqrt(0.1887 x 0.2691) = 0.2253: 1.487."""
    s, n = torch.tensor(PAIRS, dtype=torch.float64).T
    cps, flow, precise = (transitions.sensitivity(name, s, n, LEVELS[name]) for name in ("cps", "flow", "precise"))
    assert cps[8].item() == pytest.approx(32.2, abs=0.1) and cps[4].item() == pytest.approx(0.276, abs=1e-3)
    assert flow[8].item() == pytest.approx(1.487, abs=1e-3) and flow.max() == flow[8]
    assert precise[8] > 30 and cps[:8].max() < 1.2 and precise[:8].max() < 1.2


def test_the_public_clip_of_cps_in_nats():
    """1e-5 on the mean over D of -(x' - mean)^2 is 65,536 x 1e-5 / (2 step_std^2) nats: at step 0 0.655 / (2 x 0.913^2) = 0.39."""
    s, n = torch.tensor(PAIRS[:5], dtype=torch.float64).T
    nats = 65_536 * 1e-5 / (2 * transitions.coefficients("cps", s, n, 0.8)[2] ** 2)
    assert [round(value, 2) for value in nats.tolist()] == [0.39, 0.43, 0.49, 0.58, 0.72]


def batch(values, shape=(2, 3)):
    """(b, *shape) standard normal numbers, and (b,) float32 columns of the pairs."""
    g = torch.Generator().manual_seed(1)
    columns = torch.tensor(values, dtype=torch.float32).T
    return torch.randn(len(values), *shape, generator=g), torch.randn(len(values), *shape, generator=g), *columns


def test_the_schedule_of_these_tests_is_the_published_one():
    assert [round(s, 4) for s in SIGMAS] == [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089]


@pytest.mark.parametrize(
    ("transition", "level"), [*LEVELS.items(), ("flow", 1.0), ("cps", 1.0), ("cps", 0.1), ("precise", 0.3), ("ode", None)]
)
def test_moments_are_those_of_a_plain_loop(transition, level):
    """Every sample has a sigma of its own here, the first of them 1."""
    x, v, s, n = batch(PAIRS)
    mean, step_std = transitions.moments(transition, x, v, s, n, level)
    assert mean.dtype == step_std.dtype == torch.float32 and step_std.shape == (len(PAIRS), 1, 1)
    for i in range(len(PAIRS)):
        for j in range(2):
            for k in range(3):
                want = getattr(plain, transition)(x[i, j, k].item(), v[i, j, k].item(), s[i].item(), n[i].item(), level)
                # fp32 rounding: 3 operations on numbers of about 3 each, and steps to small sigma cancel
                assert mean[i, j, k].item() == pytest.approx(want[0], abs=2e-6)
                assert step_std[i, 0, 0].item() == pytest.approx(want[1], rel=1e-6)


def scheduled(transition, level):
    """Of x' for exact v: factor of the picture over its scheduled 1 - s', and standard deviation of the noise over s'; (9,) each.

    v = noise - x0 and x = (1 - s) x0 + s noise give x' = (A (1 - s) - B) x0 + (A s + B) noise + step_std z.
    """
    s, n = torch.tensor(PAIRS, dtype=torch.float64).T
    a, b, step_std = transitions.coefficients(transition, s, n, level)
    return (a * (1 - s) - b) / (1 - n), ((a * s + b) ** 2 + step_std**2).sqrt() / n


@pytest.mark.parametrize("transition", ["cps", "precise"])
@pytest.mark.parametrize("level", [0.05, 0.5, 1.0])
def test_cps_and_precise_keep_the_marginals_of_the_schedule(transition, level):
    picture, noise = scheduled(transition, level)
    assert picture.sub(1).abs().max() < 1e-12 and noise.sub(1).abs().max() < 1e-12


def test_flow_leaves_too_much_noise_by_the_documented_figures():
    picture, noise = scheduled("flow", 0.7)
    assert picture.sub(1).abs().max() < 1e-12  # the picture's part is right
    text = " ".join(f"{value:.3g}" for value in noise.tolist())
    assert text == "1.04 1.06 1.03 1.02 1.03 1.04 1.07 1.23 26.9"
    assert noise[-1].item() == pytest.approx(26.9, abs=0.05)
    assert "1.04 1.06 1.03 1.02 1.03 1.04 1.07 1.23 26.9 " in transitions.__doc__


def test_the_ode_keeps_the_schedule_too():
    s, n = torch.tensor([*PAIRS, (SIGMAS[-1], 0.0)], dtype=torch.float64).T
    a, b, step_std = transitions.coefficients("ode", s, n)
    assert not step_std.any()
    torch.testing.assert_close(a * (1 - s) - b, 1 - n)
    torch.testing.assert_close(a * s + b, n)


@pytest.mark.parametrize("transition", ["cps", "precise"])
def test_a_sampled_chain_keeps_the_marginals_within_one_percent(transition):
    """Chains with the exact velocity (x - x0) / s of a known picture x0 = 2.

    100,000 of them: a standard deviation has a standard error of 1 / sqrt(200,000) = 0.2 %.
    """
    x0, g = 2.0, torch.Generator().manual_seed(0)
    x = torch.randn(1, 100_000, generator=g)
    for s, n in PAIRS:
        mean, step_std = transitions.moments(transition, x, (x - x0) / s, torch.tensor([s]), torch.tensor([n]), LEVELS[transition])
        x = transitions.draw(mean, step_std, torch.randn(x.shape, generator=g))
        assert abs(x.std().item() / n - 1) < 0.01
        assert abs(x.mean().item() - (1 - n) * x0) < 4 * n / math.sqrt(100_000)  # four standard errors


@pytest.mark.parametrize("level", [0.7, 1.5])
@pytest.mark.parametrize("pair", PAIRS[2::3])
def test_precise_solves_the_equation_that_flow_takes_one_euler_step_of(pair, level):
    """Of noise s e, Euler steps leave left * s e and add fresh noise; `precise` must agree in the limit of many steps."""
    s, n = pair
    left, fresh = plain.noise_after_many_euler_steps(s, n, level, steps=20_000)
    a, b, step_std = transitions.coefficients("precise", torch.tensor(s).double(), torch.tensor(n).double(), level)
    assert (a * s + b).item() == pytest.approx(left * s, rel=2e-3, abs=1e-6)
    assert step_std.item() == pytest.approx(fresh, rel=2e-3)


def test_at_level_one_cps_forgets_all_noise_and_from_sigma_one_precise_does():
    s, n = torch.tensor([0.9]), torch.tensor([0.5])
    a, b, step_std = transitions.coefficients("cps", s, n, 1.0)
    assert step_std.item() == 0.5 and (a * s + b).item() == pytest.approx(0, abs=1e-7)
    a, b, step_std = transitions.coefficients("precise", torch.ones(1), n, 0.2)
    assert step_std.item() == 0.5 and (a + b).item() == pytest.approx(0, abs=1e-12)


def test_precise_at_small_levels_keeps_its_digits():
    """1 - r^(a^2) = -expm1(a^2 log r) ~ -a^2 log r for small a; here a = 1e-6, where 1 - r^(a^2) in fp64 has 4 digits left."""
    s, n = torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    r = 0.7 * 0.2 / (0.8 * 0.3)
    step_std = transitions.coefficients("precise", s, n, 1e-6)[2].item()
    assert step_std == pytest.approx(0.7 * 1e-6 * math.sqrt(-math.log(r)), rel=1e-9)


# --------------------------------------------------------------------------- log-probabilities


def test_log_prob_is_that_of_torch_distributions():
    x, v, s, n = batch(PAIRS, shape=(16, 4, 4))
    mean, step_std = transitions.moments("cps", x, v, s, n, 0.8)
    drawn = transitions.draw(mean, step_std, torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    got = transitions.log_prob(drawn, mean, step_std)
    want = torch.distributions.Normal(mean.double(), step_std.double()).log_prob(drawn.double()).flatten(1).sum(1)
    assert got.shape == (len(PAIRS),) and got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-4)


def test_log_prob_is_that_of_a_plain_loop():
    drawn, mean = [0.3, -1.0, 2.0], [0.1, 0.2, 1.5]
    want = plain.log_prob(drawn, mean, 0.25)  # -0.32 - 11.52 - 2 - 3 (log 0.25 + log(2 pi) / 2) = -12.438
    assert want == pytest.approx(-12.438, abs=1e-3)
    got = transitions.log_prob(torch.tensor([drawn]), torch.tensor([mean]), torch.full((1, 1), 0.25))
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_gradient_reaches_the_velocity_and_not_the_sample():
    """d log N(x'; A x + B v, std^2) / dv = B (x' - mean) / std^2."""
    x, v, s, n = batch(PAIRS)
    v.requires_grad_()
    mean, step_std = transitions.moments("flow", x, v, s, n, 0.7)
    drawn = transitions.draw(mean, step_std, torch.ones_like(x))
    assert drawn.requires_grad  # as it does when somebody forgets torch.no_grad while sampling
    transitions.log_prob(drawn, mean, step_std).sum().backward()
    b = transitions.coefficients("flow", s, n, 0.7)[1].float().view(-1, 1, 1)
    torch.testing.assert_close(v.grad, b / step_std * torch.ones_like(x), rtol=1e-3, atol=1e-3)


def test_a_sample_is_scored_as_it_is_kept():
    """With 8 bits the kept number is not mean + std * noise; -z^2 / 2 must be that of the kept one."""
    mean, step_std = torch.full((1, 4), 1.0), torch.full((1, 1), 0.01)
    noise = torch.tensor([[0.1, 0.2, -0.3, 0.6]])
    drawn = transitions.draw(mean, step_std, noise, torch.bfloat16)
    assert drawn.dtype == torch.bfloat16
    assert drawn.float().tolist() == [[1.0, 1.0, 0.99609375, 1.0078125]]  # spacing 1/256 below 1, 1/128 above
    z = torch.tensor([0, 0, -0.390625, 0.78125])
    want = (-z.square() / 2).sum() - 4 * (math.log(0.01) + math.log(2 * math.pi) / 2)
    assert transitions.log_prob(drawn, mean, step_std).item() == pytest.approx(want.item(), rel=1e-6)


def test_log_ratios_keep_three_more_digits_than_fp32_sums():
    """Steps of 65,536 dimensions (512 px) whose log-ratio is of the order of 1; the truth in fp64 throughout.

    Measured root mean square error: 3e-5 nats with fp64 sums, 5e-3 with fp32 sums.
    """
    g = torch.Generator().manual_seed(0)
    x, v, change, noise = (torch.randn(8, 65_536, generator=g) for _ in range(4))
    s, n = torch.full((8,), 0.79), torch.full((8,), 0.71)
    mean, step_std = transitions.moments("cps", x, v, s, n, 0.8)
    b = transitions.coefficients("cps", s, n, 0.8)[1].float()[:, None]
    moved, _ = transitions.moments("cps", x, v + change / 256 * step_std / b, s, n, 0.8)
    drawn = transitions.draw(mean, step_std, noise)
    got = transitions.log_prob(drawn, moved, step_std) - transitions.log_prob(drawn, mean, step_std)

    def exact(mean):
        return -((drawn.double() - mean.double()) / step_std.double()).square().sum(1) / 2

    want = exact(moved) - exact(mean)
    assert 0.3 < want.std() < 3
    assert (got - want).square().mean().sqrt() < 2e-4


def test_kl_is_that_of_torch_distributions():
    mean, reference, step_std = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.tensor([0.1, 1.0, 2.0]).view(3, 1, 1)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, step_std), normal(reference, step_std)).flatten(1).sum(1)
    torch.testing.assert_close(transitions.kl(mean, reference, step_std), want.double(), rtol=1e-5, atol=1e-6)


def test_permuting_the_batch_permutes_the_result():
    x, v, s, n = batch(PAIRS)
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(3))
    mean, step_std = transitions.moments("precise", x, v, s, n, 1.5)
    permuted, permuted_std = transitions.moments("precise", x[order], v[order], s[order], n[order], 1.5)
    assert torch.equal(mean[order], permuted) and torch.equal(step_std[order], permuted_std)


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("transition", transitions.STOCHASTIC)
@pytest.mark.parametrize("level", [0.0, -0.5, math.nan, math.inf])
def test_a_step_without_noise_is_refused(transition, level):
    with pytest.raises(ValueError, match="--noise_level must be above 0"):
        transitions.check(transition, level)


def test_a_missing_noise_level_is_refused():
    with pytest.raises(ValueError, match="--noise_level must be above 0"):
        transitions.coefficients("cps", torch.tensor([0.5]), torch.tensor([0.4]))


def test_more_noise_than_cps_can_replace_is_refused():
    transitions.check("cps", 1.0)
    transitions.check("precise", 1.5)
    with pytest.raises(ValueError, match="--noise_level 1.5: cps .* usual is 0.8"):
        transitions.check("cps", 1.5)


def test_the_ode_is_refused_for_training_and_takes_no_noise():
    with pytest.raises(ValueError, match="--transition must be one of cps, flow, precise, got 'ode'"):
        transitions.check("ode", 0.8)
    with pytest.raises(ValueError, match="takes no noise"):
        transitions.coefficients("ode", torch.tensor([0.5]), torch.tensor([0.4]), 0.8)


def test_an_unknown_transition_is_refused():
    with pytest.raises(ValueError, match="--transition must be one of cps, flow, precise, got 'ddim'"):
        transitions.check("ddim", 0.8)


@pytest.mark.parametrize("transition", transitions.STOCHASTIC)
def test_the_last_step_has_no_log_probability(transition):
    with pytest.raises(ValueError, match="leave the last step out"):
        transitions.coefficients(transition, torch.tensor([0.5, 0.01]), torch.tensor([0.4, 0.0]), LEVELS[transition])


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.0, 0.0), (0.5, -0.1), (math.nan, 0.1)])
def test_steps_that_do_not_denoise_are_refused(sigma, sigma_next):
    with pytest.raises(ValueError, match="to a smaller one"):
        transitions.coefficients("cps", torch.tensor([0.9, sigma]), torch.tensor([0.8, sigma_next]), 0.8)
