"""The flow maths against closed forms, plain loops and diffusers' scheduler."""

import math

import pytest
import torch

from src import flow

DENSITIES = {
    "uniform": lambda t: 1.0,
    "cosmap": lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t * t),  # paper, eq. 21
    "logit_normal": lambda t: math.exp(-0.5 * math.log(t / (1 - t)) ** 2) / (math.sqrt(2 * math.pi) * t * (1 - t)),  # eq. 19, m 0, s 1
}


def grid(n: int) -> torch.Tensor:
    """Midpoints of n equal parts of (0, 1): a uniform sample without noise."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def at(u: float, **options) -> float:
    return flow.sigmas(torch.tensor([u], dtype=torch.float64), **options).item()


def test_interpolation_runs_from_data_to_noise():
    x0, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    x_t = flow.interpolate(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])


def test_velocity_target_is_the_derivative_of_the_path():
    x0, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    sigma, step = torch.tensor([0.3, 0.7]), 1 / 64
    ahead, behind = flow.interpolate(x0, noise, sigma + step), flow.interpolate(x0, noise, sigma - step)
    torch.testing.assert_close(flow.velocity_target(x0, noise), (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)


def test_denoised_undoes_the_path():
    x0, noise, sigma = torch.randn(4, 16, 2, 2), torch.randn(4, 16, 2, 2), torch.tensor([0.0, 0.1, 0.9, 1.0])
    x_t = flow.interpolate(x0, noise, sigma)
    torch.testing.assert_close(flow.denoised(x_t, flow.velocity_target(x0, noise), sigma), x0, rtol=0, atol=1e-6)


def test_everything_is_fp32_for_bf16_input():
    """Defect 10 of the public scripts: sigma rounded to bf16. 0.711 would become 0.7109, timestep 711 would become 712."""
    x0, noise = torch.randn(2, 16, 2, 2).bfloat16(), torch.randn(2, 16, 2, 2).bfloat16()
    sigma = torch.tensor([0.711, 0.123])
    x_t = flow.interpolate(x0, noise, sigma)
    by_hand = torch.stack([(1 - s) * a.float() + s * b.float() for s, a, b in zip(sigma, x0, noise, strict=True)])
    assert torch.equal(x_t, by_hand)
    for tensor in (x_t, flow.velocity_target(x0, noise), flow.denoised(x0, noise, sigma), flow.velocity_loss(x0, noise)):
        assert tensor.dtype == torch.float32
    assert flow.timestep(sigma).tolist() == pytest.approx([711, 123], rel=1e-6)
    assert flow.timestep(sigma.bfloat16())[0] != flow.timestep(sigma)[0]


def test_loss_is_one_mean_per_sample():
    """A plain loop; the public full fine-tuning scripts multiply (B, 1, 1, 1) weights into (B,) losses (defect 19)."""
    prediction, target = torch.randn(3, 16, 4, 6), torch.randn(3, 16, 4, 6)
    loop = [sum((p - t) ** 2 for p, t in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / a.numel()
            for a, b in zip(prediction, target, strict=True)]  # fmt: skip
    got = flow.velocity_loss(prediction, target)
    assert got.shape == (3,)
    assert got.tolist() == pytest.approx(loop, rel=1e-5)


def test_a_mask_weights_the_mean_over_what_it_shows():
    """Two channels of two pixels, errors 1, 2 and 3, 4: the second pixel alone gives (4 + 16) / 2, half of the first one's weight beside it
    (0.5 (1 + 9) + 4 + 16) / 3, and a mask of ones the plain mean 30 / 4."""
    prediction, masks = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]).expand(3, 2, 1, 2), torch.tensor([[0.0, 1.0], [0.5, 1.0], [1.0, 1.0]])
    got = flow.velocity_loss(prediction, torch.zeros(3, 2, 1, 2), masks.view(3, 1, 1, 2))
    assert got.tolist() == pytest.approx([10, 25 / 3, 7.5])


def test_logit_normal_with_shift_3_has_the_known_quantiles():
    """Phi^-1(0.1) = -1.28155, sigmoid of it 0.21727; 3 u / (1 + 2 u) = 0.4544. At the median 3 * 0.5 / 2 = 0.75; at 90 % 0.9153."""
    got = [at(u, density="logit_normal", shift=3.0) for u in (0.1, 0.5, 0.9)]
    assert got == pytest.approx([0.4544, 0.75, 0.9153], abs=1e-4)


@pytest.mark.parametrize("density", DENSITIES)
def test_inverse_cdf_agrees_with_the_density(density):
    """The share of samples below each of 19 thresholds equals the integral of the closed-form density up to there."""
    sample, n = flow.sigmas(grid(200_000), density=density), 20_000
    integral, below = 0.0, {}
    for i in range(n):  # plain midpoint rule
        integral += DENSITIES[density]((i + 0.5) / n) / n
        below[i + 1] = integral
    for threshold in range(1, 20):
        assert (sample < threshold / 20).double().mean().item() == pytest.approx(below[threshold * n // 20], abs=1e-4)


def test_logit_normal_follows_its_mean_and_std():
    sample = flow.sigmas(grid(100_000), density="logit_normal", logit_mean=-0.5, logit_std=0.7).double()
    logits = torch.logit(sample)
    assert logits.mean().item() == pytest.approx(-0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(0.7, abs=2e-3)


def test_monte_carlo_draws_have_the_density_of_the_inverse_cdf():
    """sigmoid(N(0, 1)) drawn the plain way, 10 equally likely bins: each holds 10 % within four standard errors."""
    draws = torch.sigmoid(torch.randn(40_000, generator=torch.Generator().manual_seed(0)))
    edges = torch.tensor([at(i / 10, density="logit_normal") for i in range(1, 10)])
    counts = torch.bucketize(draws, edges).bincount(minlength=10) / 40_000
    assert (counts - 0.1).abs().max() < 4 * math.sqrt(0.1 * 0.9 / 40_000)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_is_the_map_of_the_paper(scale):
    """f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), which falls from 1 to 0; ours rises, from u' = 1 - u, and has the same density."""
    u = grid(1001)
    sample = flow.sigmas(u, density="mode", mode_scale=scale)
    paper = torch.tensor([1 - v - scale * (math.cos(math.pi / 2 * v) ** 2 - 1 + v) for v in (1 - u).tolist()])
    torch.testing.assert_close(sample, paper, rtol=0, atol=1e-6)
    assert (sample.diff() > 0).all() and 0 < sample[0] < sample[-1] < 1
    torch.testing.assert_close(sample.flip(0), 1 - sample, rtol=0, atol=1e-6)  # symmetric about the middle


def test_positive_mode_scale_prefers_the_middle():
    middle = [((s := flow.sigmas(grid(10_000), density="mode", mode_scale=scale)) - 0.5).abs().lt(0.25).double().mean().item()
              for scale in (-1.0, 0.0, 1.29)]  # fmt: skip
    assert middle[0] < middle[1] == 0.5 < middle[2]
    assert s.mean().item() == pytest.approx(0.5, abs=1e-4)


def test_densities_rise_with_u_and_stay_inside():
    """The smallest and largest u that seeds.uniform can give: no 0, no nan."""
    u = torch.tensor([2**-53, 1e-6, 0.3, 0.7, 1 - 1e-6, 1 - 2**-53], dtype=torch.float64)
    for density in flow.DENSITIES:
        sigma = flow.sigmas(u, density=density, shift=3.0)
        assert sigma.dtype == torch.float32 and (sigma.diff() >= 0).all() and sigma[0] > 0 and sigma[-1] <= 1, density


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_shift_equals_the_schedulers_sigmas(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    plain = torch.arange(1000, 0, -1).double() / 1000
    torch.testing.assert_close(flow.shift_sigma(plain, shift).float(), scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.timestep(flow.shift_sigma(plain, shift)), scheduler.timesteps, rtol=0, atol=1e-3)


def test_resolution_shift_by_hand():
    assert flow.resolution_shift(3.0, 1024, 1024, 1024) == 3.0
    assert flow.resolution_shift(3.0, 512, 512, 1024) == 1.5
    assert flow.resolution_shift(3.0, 512, 2048, 1024) == 3.0  # same number of pixels
    sigma = torch.tensor([0.2, 0.6])
    twice = flow.shift_sigma(flow.shift_sigma(sigma, 3.0), 0.5)  # paper, eq. 23 with sqrt(m / n) = 512 / 1024
    torch.testing.assert_close(flow.shift_sigma(sigma, flow.resolution_shift(3.0, 512, 512, 1024)), twice)


@pytest.mark.parametrize(
    "options, flag",
    [
        (dict(density="gauss"), "--timestep_density"),
        (dict(density="logit_normal", logit_std=0.0), "--logit_std"),
        (dict(density="mode", mode_scale=1.8), "--mode_scale"),
        (dict(density="mode", mode_scale=-1.1), "--mode_scale"),
    ],
)
def test_what_is_no_density_is_refused(options, flag):
    with pytest.raises(ValueError, match=flag):
        flow.sigmas(grid(4), **options)


def test_the_command_line_refuses_beyond_the_same_limit():
    """It has the number by itself: it must not import torch."""
    from src.cli import refusals

    assert refusals.MOST_MODE_SCALE == flow.MODE_SCALE_LIMITS[1]
