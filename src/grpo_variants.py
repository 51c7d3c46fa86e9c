"""Alternatives to GRPO's clipped surrogate: GRPO-Guard's ratio, and DiffusionNFT's loss on the forward process.

Shapes: b pictures, h w latent side. Everything here is pure; log-ratios are joint over the latent, in nats.
"""

from torch import Tensor

from src import flow, transitions


def guarded_log_ratio(log_ratio: Tensor, mean: Tensor, old_mean: Tensor, step_std: Tensor, scale: float) -> Tensor:
    """GRPO-Guard's log-ratio, (b,) nats: scale times `log_ratio` without its drift, -|mean - old_mean|^2 / (2 step_std^2) of each sample.

    The drift makes every ratio fall below 1 on average, most where step_std is small, so that the upper clip hardly ever binds. The
    remainder, scale / step_std (x' - old_mean) (mean - old_mean) / step_std, is linear in the change of the mean, and spread equally
    over steps if `scale` is proportional to step_std.

    Args:
        log_ratio: (b,). mean, old_mean: (b, 16, h, w), by the current and the sampling policy. step_std: (b, 1, 1, 1).

    Source: arXiv 2510.22319, section 4.1; the authors' code takes one drift for the whole batch.
    """
    return scale * (log_ratio + transitions.kl(mean, old_mean, step_std))


def guard_factors(transition: str, noise_level: float, sigmas: Tensor, steps: range) -> dict[int, tuple[float, float]]:
    """By number of the step: step_std / mean(step_std), GRPO-Guard's factor of the log-ratio, and mean(|dt|) / |dt|, that of the loss.

    The paper has step_std and 1 / |dt|. Relative to their means, they leave clip and learning rate unchanged for the average step.

    Args:
        sigmas: (T + 1,), the whole schedule. steps: all that may be trained, over which the means are.
    """
    before, after = (sigmas.double()[first : first + len(steps)] for first in (steps.start, steps.start + 1))
    step_std, dt = transitions.coefficients(transition, before, after, noise_level)[2], before - after
    return dict(zip(steps, zip((step_std / step_std.mean()).tolist(), (dt.mean() / dt).tolist(), strict=True), strict=True))


def nft_loss(
    velocity: Tensor, old_velocity: Tensor, x_t: Tensor, x0: Tensor, sigma: Tensor, advantage: Tensor, *, strength: float, limit: float
) -> Tensor:  # fmt: skip
    """DiffusionNFT: pull the velocity towards good pictures, and its mirror image on the far side of old_velocity towards bad ones: (b,).

    Args:
        velocity, old_velocity: (b, 16, h, w) at x_t, by the current policy, and by its slow follower, which drew the pictures.
        x_t: x0 noised to sigma (b,). x0: (b, 16, h, w), the pictures' latents; advantage: (b,).
        strength: the paper's beta, how far both lie from old_velocity. limit: an advantage of +-limit counts as fully good or bad.

    Source: arXiv 2509.16117, eq. 5; each squared error is divided by its own detached mean absolute error, as in the authors' code.
    """

    def error(candidate: Tensor) -> Tensor:
        wrong = flow.denoised(x_t, candidate, sigma) - x0
        return wrong.square().flatten(1).mean(1) / wrong.detach().abs().flatten(1).mean(1).clamp_min(1e-5)

    good = (advantage / (2 * limit) + 0.5).clamp(0, 1)  # (b,) the share by which a picture counts as good
    positive = strength * velocity + (1 - strength) * old_velocity
    negative = (1 + strength) * old_velocity - strength * velocity
    return limit / strength * (good * error(positive) + (1 - good) * error(negative))


def nft_batches(members: list[int], teaches: Tensor) -> list[int]:
    """The batches of an update that DiffusionNFT replays: all, since average pictures hold it to the old policy; none if none teaches.

    Args:
        teaches: (batches,) bool, of the epoch.
    """
    return members if teaches[members].any() else []


def nft_decay(epochs: int, rate: float, most: float) -> float:
    """Decay of the old policy after so many epochs: it follows closely at first, then more slowly."""
    return min(rate * epochs, most)
