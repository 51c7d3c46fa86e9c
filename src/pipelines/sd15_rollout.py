"""Step-by-step sampling of noise-prediction models, with or without gradient, for training on a reward's gradient.

Shapes: b batch, h w latent side, T denoising steps, counted from 0. Latents are fp32 whatever the precision of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src import ddpm, seeds

# A rollout starts from pure noise, but at its first timestep the model was trained on noised pictures that keep sqrt(alpha_bar) of
# their amplitude: 0.08 with 40 steps, 0.12 with 10, 0.24 with 4, 0.52 with 2, nearly 1 with one step (timestep 1).
FEWEST_STEPS, FEW_STEPS = 3, 10
MOST_STEPS = 500  # more steps would use neighbouring timesteps of the 1000

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t (b, 4, h, w), timestep (b,) -> noise (b, 4, h, w), guidance applied
Draw = Callable[[str], Tensor]  # name of a random stream -> standard normal (b, 4, h, w)


@dataclass(frozen=True)
class Timetable:
    """The T denoising steps of a picture, from noise to the clean latents.

    Attributes:
        timesteps: (T,), decreasing; alphas: (T + 1,), their alpha_bar, then 1, so that the last step ends at the clean latents.
        eta: amount of fresh noise in a step: 1 as in DDPM, 0 none.
    """

    timesteps: Tensor
    alphas: Tensor
    eta: float = 0.0

    def __len__(self) -> int:
        return len(self.timesteps)


def check_steps(num_inference_steps: int) -> None:
    """Refuse too few or too many steps for a rollout; raises ValueError naming --num_inference_steps."""
    flag = f"--num_inference_steps {num_inference_steps}"
    if num_inference_steps > MOST_STEPS:
        raise ValueError(f"{flag} must be at most {MOST_STEPS}: of 1000 timesteps no two steps may be neighbours; try 40")
    if num_inference_steps < FEWEST_STEPS:
        first = ddpm.inference_timesteps(num_inference_steps)[0]
        raise ValueError(
            f"{flag} must be at least {FEWEST_STEPS}: a rollout would begin at timestep {first}, where the model takes half or more of the "
            "pure noise for a picture; try 40"
        )


def few_steps(alphas_cumprod: Tensor, num_inference_steps: int) -> str | None:
    """A note if a rollout of so few steps begins at a timestep far from pure noise; None from `FEW_STEPS` steps on."""
    if num_inference_steps >= FEW_STEPS:
        return None
    first = ddpm.inference_timesteps(num_inference_steps)[0]
    share, least = (alphas_cumprod[[first, -1]].sqrt() * 100).tolist()
    return (
        f"note: --num_inference_steps {num_inference_steps}: a rollout begins at timestep {first}, where the model expects {share:.0f} % "
        f"of a picture's amplitude in what is pure noise; {least:.0f} % are left at timestep 999, and {FEW_STEPS} or more steps come near"
    )


def timetable(alphas_cumprod: Tensor, num_inference_steps: int, eta: float) -> Timetable:
    """Evenly spaced steps for the model's alphas_cumprod (1000,), on its device; 40 of them end at the timesteps ..., 51, 26, 1."""
    timesteps = torch.tensor(ddpm.inference_timesteps(num_inference_steps), device=alphas_cumprod.device)
    return Timetable(timesteps, torch.cat([alphas_cumprod[timesteps], alphas_cumprod.new_ones(1)]), eta)


def denoise(predict: Predict, x_t: Tensor, i: int, timetable: Timetable, noise: Tensor | None) -> Tensor:
    """Sampling step i of the whole batch: latents (b, 4, h, w) before it -> those after it; `noise` of their shape if eta > 0."""
    alpha, alpha_next = timetable.alphas[i : i + 2, None].expand(-1, len(x_t))  # (b,) each
    step = ddpm.ddim_step(x_t, predict(x_t, timetable.timesteps[i].expand(len(x_t))), alpha, alpha_next, eta=timetable.eta)
    return step.mean if noise is None else step.sample(noise)


def jump(predict: Predict, x_t: Tensor, i: Tensor, timetable: Timetable) -> Tensor:
    """The clean latents (b, 4, h, w) that follow from the noise predicted at each picture's own step i (b,)."""
    i = seeds.send(i, x_t.device)
    return ddpm.x0_from_eps(x_t, predict(x_t, timetable.timesteps[i]), timetable.alphas[i])


@torch.no_grad()
def rollout(predict: Predict, stops: Tensor, timetable: Timetable, draw: Draw) -> Tensor:
    """Latents (b, 4, h, w) after each picture's own number of steps from noise, without gradient.

    Args:
        stops: (b,) whole numbers in [0, T], on the CPU: reading them does not wait for the device.
    """
    x_t = draw("noise")
    for i in range(int(stops.max())):
        x_next = denoise(predict, x_t, i, timetable, step_noise(i, timetable, draw))
        x_t = x_next if i < stops.min() else torch.where(seeds.send((stops > i).view(-1, 1, 1, 1), x_t.device), x_next, x_t)
    return x_t


def mean_steps(first: int, last: int, batch: int) -> float:
    """Expected number of steps of a rollout whose `batch` stops are each uniform in [first, last]: it runs to the largest of them.

    The largest of b draws from 0 ... n - 1 is at least k with probability 1 - (k / n)^b; its mean is the sum over k = 1 ... n - 1.
    """
    n = last - first + 1
    return first + sum(1 - (k / n) ** batch for k in range(1, n))


def step_noise(i: int, timetable: Timetable, draw: Draw) -> Tensor | None:
    """The fresh noise of step i, (b, 4, h, w); None if it has none: eta = 0, or the last step."""
    return draw(f"step {i}") if timetable.eta and i < len(timetable) - 1 else None
