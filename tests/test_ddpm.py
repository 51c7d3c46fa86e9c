"""Noise-prediction maths against diffusers' schedulers, torch.distributions, and by hand."""

import math

import pytest
import torch

from src import ddpm

SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def tensors(count: int, shape=(3, 4, 5, 6), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


@pytest.fixture(scope="module")
def alphas():
    return ddpm.alphas_cumprod(**SD15)


@pytest.mark.parametrize("schedule", ddpm.SCHEDULES)
def test_alphas_are_those_of_diffusers_to_the_bit(schedule):
    from diffusers import DDPMScheduler

    settings = SD15 | {"beta_schedule": schedule}
    assert torch.equal(ddpm.alphas_cumprod(**settings), DDPMScheduler(**settings).alphas_cumprod)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="scaled_linear"):
        ddpm.alphas_cumprod(beta_schedule="squaredcos_cap_v2")


@pytest.mark.parametrize("steps", [1, 20, 40])
def test_timesteps_are_those_of_diffusers(steps):
    """40 steps of 25: 976, 951, ..., 1. The last ten, where ReFL draws its step: 226 201 176 151 126 101 76 51 26 1."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SD15, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert ddpm.inference_timesteps(steps) == scheduler.timesteps.tolist()
    assert ddpm.inference_timesteps(40)[30:] == [226, 201, 176, 151, 126, 101, 76, 51, 26, 1]


def test_noise_is_added_as_in_diffusers(alphas):
    from diffusers import DDPMScheduler

    x0, noise = tensors(2)
    t = torch.tensor([0, 500, 999])
    assert torch.allclose(ddpm.add_noise(x0, noise, alphas[t]), DDPMScheduler(**SD15).add_noise(x0, noise, t), atol=1e-6)


def test_by_hand():
    """a = 0.64: sqrt(a) = 0.8, sqrt(1 - a) = 0.6. x0 = 2, noise = -1: x_t = 1.6 - 0.6 = 1.0."""
    a, x0, noise = torch.tensor([0.64]), torch.full((1, 1), 2.0), torch.full((1, 1), -1.0)
    x_t = ddpm.add_noise(x0, noise, a)
    assert x_t.item() == pytest.approx(1.0)
    assert ddpm.x0_from_eps(x_t, noise, a).item() == pytest.approx(2.0)


def test_the_picture_is_recovered_from_its_noise(alphas):
    """At t = 999 sqrt(a) is 0.068, so x0 = (...) / 0.068 carries 15 times fp32's rounding."""
    x0, noise = tensors(2)
    a = alphas[torch.tensor([1, 500, 999])]
    assert torch.allclose(ddpm.x0_from_eps(ddpm.add_noise(x0, noise, a), noise, a), x0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_is_fp32_whatever_comes_in(dtype, alphas):
    x0, noise = (tensor.to(dtype) for tensor in tensors(2))
    a = alphas[torch.tensor([1, 500, 999])]
    x_t = ddpm.add_noise(x0, noise, a)
    assert x_t.dtype == ddpm.eps_loss(x0, noise).dtype == torch.float32
    assert torch.equal(x_t, ddpm.add_noise(x0.float(), noise.float(), a))
    assert torch.equal(ddpm.eps_loss(x0, noise), ddpm.eps_loss(x0.float(), noise.float()))


def test_fp64_stays_fp64(alphas):
    x0, noise = tensors(2, dtype=torch.float64)
    assert ddpm.add_noise(x0, noise, alphas[[1, 2, 3]].double()).dtype == torch.float64


def test_the_loss_is_a_mean_per_sample():
    """Errors of 1 and of 3 everywhere: 1 and 9."""
    loss = ddpm.eps_loss(torch.stack([torch.ones(2, 2), 3 * torch.ones(2, 2)]), torch.zeros(2, 2, 2))
    assert loss.tolist() == [1.0, 9.0]


# --------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t", [951, 501, 51])
def test_a_step_is_that_of_diffusers_ddim(eta, t, alphas):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(20)
    x_t, eps, noise = tensors(3)
    expected = scheduler.step(eps, t, x_t, eta=eta, variance_noise=noise if eta else None)
    step = ddpm.ddim_step(x_t, eps, alphas[[t] * 3], alphas[[t - 50] * 3], eta=eta)
    assert torch.allclose(step.sample(noise), expected.prev_sample, atol=1e-5)
    assert torch.allclose(ddpm.x0_from_eps(x_t, eps, alphas[[t] * 3]), expected.pred_original_sample, atol=1e-4)


def test_with_eta_1_a_step_is_that_of_ddpm(alphas):
    """DDPM's posterior on the same timesteps ("fixed_small" variance) is DDIM's with eta 1: the same mean and standard deviation."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**SD15, clip_sample=False, steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    x_t, eps = tensors(2)
    step = ddpm.ddim_step(x_t, eps, alphas[[501] * 3], alphas[[451] * 3], eta=1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1)]
    noise = torch.randn(x_t.shape, generator=generators[0])
    assert torch.allclose(step.sample(noise), scheduler.step(eps, 501, x_t, generator=generators[1]).prev_sample, atol=1e-5)


def test_the_log_probability_is_that_of_a_normal_distribution(alphas):
    x_t, eps, noise = tensors(3)
    step = ddpm.ddim_step(x_t, eps, alphas[[501, 301, 51]], alphas[[451, 251, 1]], eta=0.7)
    sample = step.sample(noise)
    normal = torch.distributions.Normal(step.mean, step.std.view(3, 1, 1, 1).expand_as(step.mean))
    assert torch.allclose(step.log_prob(sample), normal.log_prob(sample).flatten(1).sum(1), rtol=1e-5)
    at_mean = -math.prod(x_t.shape[1:]) * (step.std[0].log() + 0.5 * math.log(2 * math.pi))
    assert step.log_prob(step.mean)[0].item() == pytest.approx(at_mean.item(), rel=1e-5)


def test_a_deterministic_step_has_no_log_probability(alphas):
    x_t, eps = tensors(2)
    step = ddpm.ddim_step(x_t, eps, alphas[[501] * 3], alphas[[451] * 3])
    assert torch.equal(step.sample(torch.randn(x_t.shape)), step.mean)
    with pytest.raises(ValueError, match="eta above 0"):
        step.log_prob(step.mean)


def test_exact_noise_leads_straight_to_the_picture(alphas):
    """With the true noise of a fixed x0, ten deterministic steps end at x0's own x_t of the last timestep."""
    x0, noise = tensors(2)
    timesteps = ddpm.inference_timesteps(10)
    x_t = ddpm.add_noise(x0, noise, alphas[[timesteps[0]] * 3])
    for t, t_next in zip(timesteps, timesteps[1:], strict=False):
        a = alphas[t]
        eps = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
        x_t = ddpm.ddim_step(x_t, eps, alphas[[t] * 3], alphas[[t_next] * 3]).mean
    assert torch.allclose(x_t, ddpm.add_noise(x0, noise, alphas[[1] * 3]), atol=1e-4)
