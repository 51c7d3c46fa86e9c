"""Rectified flow: the straight path from data to noise, what to predict on it, and how often to visit each noise level.

x_t = (1 - sigma) * x0 + sigma * noise, so sigma 0 is the picture and sigma 1 is noise; the velocity d x_t / d sigma = noise - x0.
Everything is computed in fp32 (sigma in fp64, rounded to fp32 at the end): bf16 has 8 bits, too few to tell timestep 711 from 712.

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206 ("the paper").
"""

import math

import torch
from torch import Tensor

DENSITIES = ("logit_normal", "uniform", "mode", "cosmap")
MODE_SCALE_LIMITS = (-1.0, 2 / (math.pi - 2))  # beyond them the mode map is not monotone, so it is no density (paper, sec. 3.1)
TRAIN_TIMESTEPS = 1000  # the transformer takes the timestep 1000 * sigma (num_train_timesteps of SD3's scheduler)


def _per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, ..., 1) float32, to multiply `like` (b, ...)."""
    return sigma.float().view(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) x0 + sigma noise, float32; x0, noise (b, ...), sigma (b,). Source: paper, eq. 13, its t is our sigma."""
    s = _per_sample(sigma, x0)
    return (1 - s) * x0.float() + s * noise.float()


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """d x_t / d sigma = noise - x0, float32 (b, ...). Source: paper, sec. 2, of the path of eq. 13."""
    return noise.float() - x0.float()


def denoised(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The picture that a velocity points to, x0 = x_t - sigma v, float32; x_t, velocity (b, ...), sigma (b,)."""
    return x_t.float() - _per_sample(sigma, x_t) * velocity.float()


def timestep(sigma: Tensor) -> Tensor:
    """The timestep 1000 * sigma that the transformer takes, float32, not rounded to a whole number."""
    return TRAIN_TIMESTEPS * sigma.float()


def velocity_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, (b,) float32: mean over channels, height and width, weight 1 at every sigma.

    Args:
        mask: (b, 1, h, w), at least 0: weights of the mean, divided by their sum, so that a small mask does not make the loss smaller.
    """
    error = (prediction.float() - target.float()).square()  # (b, c, h, w)
    if mask is None:
        return error.flatten(1).mean(1)
    weight = mask.float().expand_as(error)
    return (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """shift * sigma / (1 + (shift - 1) * sigma): more time at high noise for shift > 1. Source: paper, eq. 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(shift: float, height: int, width: int, base_resolution: int) -> float:
    """The shift of a height x width picture, if `shift` fits a square of side `base_resolution`: times sqrt(m / n), m and n pixel counts.

    A larger picture needs more noise to be destroyed equally. Shifts compose by multiplication. Source: paper, sec. 5.3.2.
    """
    return shift * math.sqrt(height * width) / base_resolution


def sigmas(
    u: Tensor, *, density: str = "logit_normal", logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29,
    shift: float = 1.0,
) -> Tensor:  # fmt: skip
    """Noise levels (b,) float32 in (0, 1) from uniform numbers (b,) in (0, 1), by the inverse CDF of a density and then the shift.

    The densities are increasing maps of u, so equal u mean comparable noise levels:
        uniform       sigma = u
        logit_normal  sigmoid(logit_mean + logit_std * Phi^-1(u))            paper, eq. 19
        mode          f(u) = 1 - u' - s (cos^2(pi u' / 2) - 1 + u'), u' = 1 - u; s = mode_scale, 1.29 is the paper's best   eq. 20
        cosmap        1 - 1 / (tan(pi u / 2) + 1), whose density is 2 / (pi - 2 pi t + 2 pi t^2)                           eq. 21

    Sigma is drawn from these densities and has weight 1 in the loss, as in the paper; they do not weight the loss of uniform timesteps.

    Raises:
        ValueError: for an unknown density or a parameter out of range, naming the flag.
    """
    u = u.double()
    if density == "uniform":
        sigma = u
    elif density == "logit_normal":
        if logit_std <= 0:
            raise ValueError(f"--logit_std must be above 0, got {logit_std}; the paper's default is 1")
        sigma = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    elif density == "mode":
        low, high = MODE_SCALE_LIMITS
        if not low <= mode_scale <= high:
            raise ValueError(f"--mode_scale must lie in [{low:g}, {high:.4f}], got {mode_scale}; 1.29 is the paper's best")
        v = 1 - u
        sigma = 1 - v - mode_scale * (torch.cos(math.pi / 2 * v) ** 2 - 1 + v)
    elif density == "cosmap":
        sigma = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    else:
        raise ValueError(f"--timestep_density must be one of {', '.join(DENSITIES)}, got {density!r}")
    return shift_sigma(sigma, shift).float()
