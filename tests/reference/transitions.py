"""Stochastic flow steps for one number at a time, in plain Python, in the form in which the papers state them."""

import math


def flow(x: float, v: float, s: float, n: float, a: float) -> tuple[float, float]:
    """Mean and standard deviation of the step s -> n. Flow-GRPO, arXiv 2505.05470, eq. 9 (Euler-Maruyama), and its code at s = 1."""
    dt = n - s
    c = a * math.sqrt(s / (1 - (n if s == 1 else s)))
    drift = v + c**2 / (2 * s) * (x + (1 - s) * v)
    return x + drift * dt, c * math.sqrt(-dt)


def coefficients_preserving(x: float, v: float, s: float, n: float, std: float) -> tuple[float, float]:
    """What `cps` and `precise` share: the picture and the noise that v points to, mixed anew, with room left for fresh noise."""
    picture, noise = x - s * v, x + (1 - s) * v
    return (1 - n) * picture + math.sqrt(n**2 - std**2) * noise, std


def cps(x: float, v: float, s: float, n: float, a: float) -> tuple[float, float]:
    """FlowCPS, arXiv 2509.05952."""
    return coefficients_preserving(x, v, s, n, n * math.sin(a * math.pi / 2))


def precise(x: float, v: float, s: float, n: float, a: float) -> tuple[float, float]:
    """Precise, arXiv 2605.23522."""
    r = n * (1 - s) / (s * (1 - n))
    return coefficients_preserving(x, v, s, n, n * math.sqrt(1 - r ** (a**2)))


def ode(x: float, v: float, s: float, n: float, a: None) -> tuple[float, float]:
    return x + (n - s) * v, 0.0


def log_prob(sample: list[float], mean: list[float], std: float) -> float:
    """Joint log-density of independent normal numbers."""
    return sum(-((x - m) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2 for x, m in zip(sample, mean, strict=True))


def noise_after_many_euler_steps(s: float, n: float, a: float, steps: int) -> tuple[float, float]:
    """The stochastic equation of Flow-GRPO from s to n in many Euler steps, for a known picture x0: x = (1 - t) x0 + noise.

    Returns:
        what is left of the noise (its factor), and the standard deviation of the fresh noise.
    """
    left, variance, dt = 1.0, 0.0, (n - s) / steps
    for i in range(steps):
        t = s + i * dt
        # of x = (1 - t) x0 + noise the exact velocity is noise / t - x0; only the noise's part is followed
        factor, std = flow(1.0, 1 / t, t, t + dt, a)
        left, variance = left * factor, variance * factor**2 + std**2
    return left, math.sqrt(variance)
