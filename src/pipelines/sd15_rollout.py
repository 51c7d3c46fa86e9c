"""Pictures of noise-prediction models drawn step by step, with or without a gradient: what training on a reward's gradient needs.

Shapes: b batch, h w latent side, T denoising steps, counted from 0. Latents are fp32 whatever the precision of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src import ddpm, seeds

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t (b, 4, h, w), timestep (b,) -> noise (b, 4, h, w), guided if it is to be
Draw = Callable[[str], Tensor]  # name of a random stream -> standard normal (b, 4, h, w)


@dataclass(frozen=True)
class Schedule:
    """The T denoising steps of a picture, from noise to the clean latents.

    Attributes:
        timesteps: (T,) falling; alphas: (T + 1,) alpha_bar there, and 1 at the end, so that the last step lands on the clean latents.
        eta: fresh noise of a step: 1 as in DDPM, 0 none.
    """

    timesteps: Tensor
    alphas: Tensor
    eta: float = 0.0

    def __len__(self) -> int:
        return len(self.timesteps)


def schedule(alphas_cumprod: Tensor, num_inference_steps: int, eta: float) -> Schedule:
    """Evenly spaced steps for the model's alphas_cumprod (1000,), on its device; 40 of them end at the timesteps ..., 51, 26, 1."""
    timesteps = torch.tensor(ddpm.inference_timesteps(num_inference_steps), device=alphas_cumprod.device)
    return Schedule(timesteps, torch.cat([alphas_cumprod[timesteps], alphas_cumprod.new_ones(1)]), eta)


def denoise(predict: Predict, x_t: Tensor, i: int, schedule: Schedule, noise: Tensor | None) -> Tensor:
    """Sampling step number i of all pictures: latents (b, 4, h, w) -> those of step i + 1; `noise` like them if eta > 0."""
    alpha, alpha_next = schedule.alphas[i : i + 2, None].expand(-1, len(x_t))  # (b,) each
    step = ddpm.ddim_step(x_t, predict(x_t, schedule.timesteps[i].expand(len(x_t))), alpha, alpha_next, eta=schedule.eta)
    return step.mean if noise is None else step.sample(noise)


def jump(predict: Predict, x_t: Tensor, i: Tensor, schedule: Schedule) -> Tensor:
    """The clean latents that the prediction at step i (b,) of each picture points to, (b, 4, h, w)."""
    i = seeds.send(i, x_t.device)
    return ddpm.x0_from_eps(x_t, predict(x_t, schedule.timesteps[i]), schedule.alphas[i])


@torch.no_grad()
def rollout(predict: Predict, stops: Tensor, schedule: Schedule, draw: Draw) -> Tensor:
    """Latents (b, 4, h, w) after each picture's own number of steps from noise, without gradient.

    Args:
        stops: (b,) whole numbers in [0, T], on the CPU, so that nothing waits for the device.
    """
    x_t = draw("noise")
    for i in range(int(stops.max())):
        x_next = denoise(predict, x_t, i, schedule, step_noise(i, schedule, draw))
        x_t = x_next if i < stops.min() else torch.where(seeds.send((stops > i).view(-1, 1, 1, 1), x_t.device), x_next, x_t)
    return x_t


def step_noise(i: int, schedule: Schedule, draw: Draw) -> Tensor | None:
    """What step i adds, (b, 4, h, w); None where it adds nothing: eta = 0, or the last step."""
    return draw(f"step {i}") if schedule.eta and i < len(schedule) - 1 else None
