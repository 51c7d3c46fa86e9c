"""Denoising steps with a log-probability, which a policy gradient needs and the deterministic sampler lacks.

A step goes from noise level sigma = s to sigma_next = s' < s. It is a Gaussian whose mean is linear in the state and in the predicted
velocity v (noise - x0, see `flow`), and whose standard deviation depends on the noise levels alone:

    x' = A x + B v + step_std * z,   z standard normal

    x0 = x - s v, noise = x + (1 - s) v       the picture and the noise that v points to
    cps       (1 - s') x0 + k noise           step_std = s' sin(a pi / 2)          k = sqrt(s'^2 - step_std^2)     FlowCPS, 2509.05952
    precise   (1 - s') x0 + k noise           step_std = s' sqrt(1 - r^(a^2))      r = s' (1 - s) / (s (1 - s'))   Precise, 2605.23522
    flow      x (1 + c^2 dt / 2s) + v dt (1 + c^2 (1 - s) / 2s)   step_std = c sqrt(-dt)   c = a sqrt(s / (1 - s)) Flow-GRPO, 2505.05470
    ode       x + v dt                        no noise, no log-probability: evaluation, and steps that are not trained

a is the noise level, dt = s' - s. At s = 1, where c is infinite, `flow` takes a sqrt(s / (1 - s')) for c, as its authors do.

`cps` and `precise` keep the schedule: if v is exact, x' is (1 - s') x0 + s' noise' with standard normal noise'. `precise` is the exact
solution of the stochastic equation of which `flow` is one Euler step. That Euler step leaves too much noise. With a = 0.7, shift 3 and
10 steps, its noise divided by the scheduled s' is 1.04 1.06 1.03 1.02 1.03 1.04 1.07 1.23 26.9 from the first step to the last but one:
its pictures look grainy. The last step ends at s' = 0, where no density exists: it is always `ode`.

Log-probabilities are joint ones, in nats, over all dimensions of a sample. They are of the order of D = 16 h w (65,536 at 512 px), but only
differences of the order of 1 count: they are summed in fp64. Measured at 512 px: a log-ratio of about 1 is then off by 3e-5 (1e-3
at the last but one step, whose step_std is 0.008); with fp32 sums by 5e-3 (2e-2). Other code divides by D (mean over dimensions).
"""

import math

import torch
from torch import Tensor

STOCHASTIC = ("cps", "flow", "precise")


def check(transition: str, noise_level: float) -> None:
    """Refuse a step that has no log-probability.

    Raises:
        ValueError: naming --transition or --noise_level, and the cure.
    """
    if transition not in STOCHASTIC:
        raise ValueError(f"--transition must be one of {', '.join(STOCHASTIC)}, got {transition!r}")
    if not 0 < noise_level < math.inf:
        raise ValueError(
            f"--noise_level must be above 0, got {noise_level:g}: without noise there is no log-probability; "
            "usual are 0.8 (cps), 0.7 (flow), 1.5 (precise)"
        )
    if transition == "cps" and noise_level > 1:
        raise ValueError(f"--noise_level {noise_level:g}: cps replaces all noise at 1 already; use (0, 1], usual is 0.8")


def coefficients(
    transition: str, sigma: Tensor, sigma_next: Tensor, noise_level: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A, B and step_std of the step sigma -> sigma_next, float64, of the shape of sigma: see the module's docstring.

    Args:
        sigma: in (0, 1], any shape. sigma_next: in [0, sigma), the same shape; above 0 unless the transition is `ode`.
        noise_level: a; None for `ode`, which has none.

    Raises:
        ValueError: as `check`, or for sigmas outside these ranges.
    """
    s, n = sigma.double(), sigma_next.double()
    if not bool(((n < s) & (s > 0) & (s <= 1) & (n >= 0)).all()):
        raise ValueError(f"a denoising step goes from sigma in (0, 1] to a smaller one, got {s.tolist()} -> {n.tolist()}")
    dt = n - s
    if transition == "ode":
        if noise_level is not None:
            raise ValueError(f"the ode transition takes no noise, got noise level {noise_level}")
        return torch.ones_like(s), dt, torch.zeros_like(s)
    check(transition, math.nan if noise_level is None else noise_level)
    if not bool((n > 0).all()):
        raise ValueError("the step to sigma 0 has no log-probability: leave the last step out of the window, it is deterministic")
    if transition == "flow":
        variance = noise_level**2 * s / (1 - torch.where(s == 1, n, s))  # c^2
        return 1 + variance * dt / (2 * s), dt * (1 + variance * (1 - s) / (2 * s)), (-variance * dt).sqrt()
    if transition == "cps":
        angle = noise_level * math.pi / 2
        kept, step_std = n * math.cos(angle), n * math.sin(angle)
    else:
        assert transition == "precise", f"no formula for {transition}"
        # r^(a^2) by its logarithm: near r = 1 the difference 1 - r^(a^2) would lose its digits
        power = noise_level**2 * torch.log(n * (1 - s) / (s * (1 - n)))
        kept, step_std = n * (power / 2).exp(), n * (-torch.expm1(power)).sqrt()
    return 1 - n + kept, kept * (1 - s) - (1 - n) * s, step_std


def sensitivity(transition: str, sigma: Tensor, sigma_next: Tensor, noise_level: float | None = None) -> Tensor:
    """|B| / step_std: the change of a step's mean, in its standard deviations, if the velocity changes by 1; float64, as `coefficients`.

    A velocity error of e in each of D dimensions causes a mean log-ratio of size D (sensitivity e)^2 / 2 nats.
    """
    _, b, step_std = coefficients(transition, sigma, sigma_next, noise_level)
    return b.abs() / step_std


def moments(
    transition: str, x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean (b, ...) and standard deviation (b, 1, ..., 1) of x' given x_t, float32; gradients flow from the mean to the velocity.

    Args:
        x_t, velocity: (b, ...). sigma, sigma_next: (b,) each, best on the CPU: the coefficients are then found without a wait for the GPU.

    Raises:
        ValueError: as `coefficients`.
    """
    found = torch.stack(coefficients(transition, sigma, sigma_next, noise_level)).float()  # (3, b)
    a, b, step_std = found.to(x_t.device, non_blocking=True).view(3, -1, *[1] * (x_t.ndim - 1))  # each (b, 1, ..., 1)
    return a * x_t.float() + b * velocity.float(), step_std


def draw(mean: Tensor, step_std: Tensor, noise: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x' = mean + step_std * noise, rounded to the `dtype` of storage: take its log-probability after rounding, as a replay does."""
    return (mean + step_std * noise).to(dtype)


def log_prob(sample: Tensor, mean: Tensor, step_std: Tensor) -> Tensor:
    """log N(sample; mean, step_std^2), joint over all dimensions of a sample, in nats: (b,) float64.

    The sample is detached: the policy gradient goes through the mean. Terms in fp32, their sum in fp64.

    Args:
        sample, mean: (b, ...). step_std: (b, 1, ..., 1), above 0.
    """
    z = (sample.detach().float() - mean) / step_std
    dimensions = z[0].numel()
    squares = z.square().flatten(1).sum(1, dtype=torch.float64)  # (b,)
    return -squares / 2 - dimensions * (step_std.double().flatten().log() + math.log(2 * math.pi) / 2)


def kl(mean: Tensor, reference_mean: Tensor, step_std: Tensor) -> Tensor:
    """KL divergence of two steps of equal step_std, |mean - reference_mean|^2 / (2 step_std^2), joint, in nats: (b,) float64."""
    return ((mean - reference_mean) / step_std).square().flatten(1).sum(1, dtype=torch.float64) / 2
