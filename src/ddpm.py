"""Noise-prediction diffusion as in Stable Diffusion 1.x, 2.x and XL: add noise, recover x0, DDIM steps.

x_t = sqrt(a) x0 + sqrt(1 - a) noise, where a = alpha_bar(t) falls from nearly 1 (t = 0, the picture) to nearly 0 (t = 999, noise).
Every function takes `alpha`, the value of alpha_bar for each sample: `alphas_cumprod(...)[timesteps]`. Computed in fp32; fp64 stays fp64.

Source: Ho et al., DDPM, arXiv 2006.11239; Song et al., DDIM, arXiv 2010.02502.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCHEDULES = ("linear", "scaled_linear")


def alphas_cumprod(
    *, beta_start: float = 0.00085, beta_end: float = 0.012, beta_schedule: str = "scaled_linear", num_train_timesteps: int = 1000
) -> Tensor:
    """alpha_bar of every training timestep, (num_train_timesteps,) float32; the defaults are Stable Diffusion 1.5's.

    In fp32, as the models were trained: the product in fp64 differs from it by 1e-6 at the end.

    Raises:
        ValueError: for a schedule of another kind.
    """
    if beta_schedule not in SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {', '.join(SCHEDULES)}, got {beta_schedule!r}")
    power = 0.5 if beta_schedule == "scaled_linear" else 1.0
    betas = torch.linspace(beta_start**power, beta_end**power, num_train_timesteps, dtype=torch.float32) ** (1 / power)
    return torch.cumprod(1 - betas, dim=0)


def inference_timesteps(num_inference_steps: int) -> list[int]:
    """Timesteps of a sampler, from noise to picture, evenly spaced among the model's 1000; the last is 1 ("leading", with offset 1)."""
    stride = 1000 // num_inference_steps
    return [step * stride + 1 for step in reversed(range(num_inference_steps))]


def _per_sample(alpha: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, ..., 1) on the device of `like` (b, ...); fp32, or fp64 if alpha is fp64."""
    alpha = alpha if alpha.dtype == torch.float64 else alpha.float()
    return alpha.to(like.device).view(-1, *[1] * (like.ndim - 1))


def _float(tensor: Tensor) -> Tensor:
    """At least fp32: fp64 stays, for tests by finite differences."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x_t = sqrt(a) x0 + sqrt(1 - a) noise; x0, noise (b, ...), alpha (b,). Source: DDPM, eq. 4."""
    a = _per_sample(alpha, x0)
    return a.sqrt() * _float(x0) + (1 - a).sqrt() * _float(noise)


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
    """The picture that a noise prediction points to: (x_t - sqrt(1 - a) eps) / sqrt(a). Source: DDIM, eq. 9."""
    a = _per_sample(alpha, x_t)
    return (_float(x_t) - (1 - a).sqrt() * _float(eps)) / a.sqrt()


def eps_loss(prediction: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each sample, (b,) float32: mean over channels, height and width, weight 1 at every timestep."""
    return (_float(prediction) - _float(noise)).square().flatten(1).mean(1)


# --------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Step:
    """One step of a sampler: mean of the next latents, (b, ...), and their standard deviation, (b,), 0 for eta = 0."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The next latents, (b, ...), from standard normal `noise` of that shape."""
        return self.mean + _per_sample(self.std, self.mean) * _float(noise)

    def log_prob(self, sample: Tensor) -> Tensor:
        """Log-density of `sample` (b, ...), in nats, summed over its elements: (b,). Needs eta > 0.

        Raises:
            ValueError: a deterministic step has none.
        """
        if not (self.std > 0).all():
            raise ValueError("a deterministic DDIM step has no log-probability; use eta above 0")
        std = _per_sample(self.std, self.mean)
        density = -0.5 * ((_float(sample) - self.mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return density.flatten(1).sum(1)


def ddim_step(x_t: Tensor, eps: Tensor, alpha: Tensor, alpha_next: Tensor, *, eta: float = 0.0) -> Step:
    """From x_t towards the picture, to the noise level of `alpha_next`. Source: DDIM, eq. 12 and 16.

    Args:
        x_t, eps: latents and the noise predicted in them, (b, ...); alpha, alpha_next: (b,), alpha_next is larger.
        eta: 0: deterministic; 1: as much fresh noise as in DDPM: the step is then DDPM's on the same timesteps.
    """
    x0 = x0_from_eps(x_t, eps, alpha)
    a, a_next = (_per_sample(value, x_t) for value in (alpha, alpha_next))
    variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)  # (b, 1, ..., 1)
    mean = a_next.sqrt() * x0 + (1 - a_next - variance).clamp_min(0).sqrt() * _float(eps)
    return Step(mean, variance.sqrt().flatten())
