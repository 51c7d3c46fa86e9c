"""Rollouts of a policy on SD3: `sample` denoises with a window of stochastic steps and records them, `replay` recomputes them.

One picture is one trajectory z_0 .. z_T of T denoising steps: z_0 is noise, z_T the picture (elsewhere x_0 is the picture). Only steps of
the window are stochastic (see `transitions`) and can be trained; the others, and always the last one, follow the ODE.

Shapes: b pictures, T denoising steps, W steps of the window, h w latent side (pixels / 8).

Before any update, a replayed step must have exactly the log-probability it had in sampling, or its probability ratio is not 1. Hence the
policy stays in eval mode; `replay` takes the batches that `sample` made (kernels depend on the batch size); autocast and torch.compile
apply to both or to neither; and `sample` computes the velocities of the window with gradients enabled and discards the graph: without
gradients torch may choose other kernels, and torch.compile compiles a separate graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from src import flow, seeds, transitions
from src.lora import unwrap
from src.pipelines import sd3

CHANNELS = 16


@dataclass(frozen=True)
class Trajectory:
    """What `sample` records of b pictures: the final latents, and everything needed to replay the steps of the window.

    Attributes:
        final: (b, 16, h, w) float32, for `sd3.decode_latents`.
        latents: (b, W + 1, 16, h, w), the states before each step of the window and after its last; in the dtype given to `sample`.
        means: (b, W, 16, h, w) float32, of those steps under the policy that sampled them; None without keep_means.
        log_probs: (b, W) float64, of those steps under that policy, joint over all dimensions, nats.
        sigmas: (T + 1,) float32 on the CPU, the whole schedule from 1 to 0.
        window: numbers of the stochastic steps, within 0 .. T - 2.
        transition, noise_level: of those steps; "ode" and None if the window is empty.
        guidance_scale: above 1: classifier-free guidance, in sampling and in replay.
    """

    final: Tensor
    latents: Tensor
    means: Tensor | None
    log_probs: Tensor
    sigmas: Tensor
    window: range
    transition: str
    noise_level: float | None
    guidance_scale: float

    def __len__(self) -> int:
        return self.final.shape[0]

    @property
    def dimensions(self) -> int:
        """D = 16 h w, elements of a latent: log-probabilities are sums over D terms."""
        return self.final[0].numel()

    def to(self, device: torch.device | str) -> "Trajectory":
        """A copy on `device`: trajectories wait for training on the CPU, so that GPU memory does not grow with their number."""
        tensors = {name: getattr(self, name) for name in ("final", "latents", "means", "log_probs")}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


@dataclass(frozen=True)
class Step:
    """One denoising step of b pictures under the current policy, with its recorded values from sampling.

    Attributes:
        mean, old_mean: (b, 16, h, w) float32, of the next latent by the current policy, and by the sampling one if its means were kept.
        step_std: (b, 1, 1, 1) float32, the same for both.
        log_prob, old_log_prob: (b,) float64, of the sampled next latent, joint over all dimensions, nats.
        sigma, sigma_next: (b,) float32 on the CPU, noise levels before and after.
    """

    mean: Tensor
    old_mean: Tensor | None
    step_std: Tensor
    log_prob: Tensor
    old_log_prob: Tensor
    sigma: Tensor
    sigma_next: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log of the joint probability ratio of the two policies, nats: (b,) float64; 0 for the policy that sampled."""
        return self.log_prob - self.old_log_prob


# --------------------------------------------------------------------------- steps


def check_window(num_inference_steps: int, size: int | None, window_range: tuple[int, int] | None) -> None:
    """Refuse a window that does not fit the steps.

    Args:
        size: steps of the window; None: all of the range.
        window_range: (first, stop): the window lies in steps first .. stop - 1, counted from 0; None: all but the last step.

    Raises:
        ValueError: naming --num_inference_steps, --window_size or --window_range, what is allowed, and what to try.
    """
    if num_inference_steps < 2:
        raise ValueError(f"--num_inference_steps must be at least 2, got {num_inference_steps}: the last step is never stochastic")
    stop_at_most = num_inference_steps - 1
    first, stop = window_range or (0, stop_at_most)
    if not 0 <= first < stop <= stop_at_most:
        raise ValueError(
            f"--window_range {first} {stop} must satisfy 0 <= first < stop <= {stop_at_most}: of {num_inference_steps} steps the last has "
            f"no log-probability; try --window_range 0 {max(1, min(stop, stop_at_most))}"
        )
    if size is not None and not 1 <= size <= stop - first:
        raise ValueError(f"--window_size {size} must lie in 1 .. {stop - first}, the steps of --window_range {first} {stop}")


def choose_window(
    epoch: int, seed: int, *, num_inference_steps: int, size: int | None = None, window_range: tuple[int, int] | None = None,
    order: str = "random", shift_every: int = 25,
) -> range:  # fmt: skip
    """The steps that are stochastic and trained in this epoch: a function of (epoch, seed) alone.

    Args:
        size, window_range: see `check_window`.
        order: "random": the window's place in the range is drawn uniformly; "progressive": it starts at the first step of the
            range and moves on by one every `shift_every` epochs, from the end back to the start.

    Raises:
        ValueError: what `check_window` refuses.

    Source: progressive: MixGRPO, arXiv 2507.21802; random: Flow-GRPO-Fast (Flow-GRPO's repository).
    """
    check_window(num_inference_steps, size, window_range)
    assert order in ("random", "progressive"), f"order must be random or progressive, got {order!r}"
    first, stop = window_range or (0, num_inference_steps - 1)
    size = stop - first if size is None else size
    places = stop - first - size + 1
    if order == "progressive":
        start = first + epoch // shift_every % places
    else:
        start = first + int(torch.randint(places, (), generator=seeds.generator(seed, "window", epoch)))
    return range(start, start + size)


def schedule(model: sd3.SD3, num_inference_steps: int, shift: float | None = None) -> Tensor:
    """Noise levels (T + 1,) float32 on the CPU, from 1 to 0: those of the model's own scheduler, hence of `sd3.render`.

    Args:
        shift: timestep shift; None: the model's own. Another one than the model's makes other pictures than `sd3.render`.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler.config, shift=model.shift if shift is None else shift)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler.sigmas.cpu()


def schedule_by_formula(num_inference_steps: int, shift: float) -> Tensor:
    """As `schedule`, without importing diffusers, which takes seconds; like diffusers, it shifts the smallest level twice."""
    least = flow.shift_sigma(torch.tensor(1 / flow.TRAIN_TIMESTEPS), shift)
    return torch.cat([flow.shift_sigma(torch.linspace(1, float(least), num_inference_steps), shift), torch.zeros(1)])


def _velocity(
    network: nn.Module, x: Tensor, sigma: Tensor, condition: sd3.Conditioning, negative: sd3.Conditioning | None, guidance_scale: float
) -> Tensor:
    """Predicted velocity (b, 16, h, w) float32; with guidance both predictions come from one forward pass of 2 b pictures."""
    sigma = sigma.to(x.device, non_blocking=True)
    if guidance_scale <= 1:
        return sd3.velocity(network, x, sigma, condition)
    both = sd3.Conditioning.cat([negative.expand(len(condition)), condition])  # (2 b, L, D)
    against, towards = sd3.velocity(network, torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    return against + guidance_scale * (towards - against)


def _check_guidance(guidance_scale: float, negative: sd3.Conditioning | None) -> None:
    if guidance_scale > 1 and negative is None:
        raise ValueError(f"guidance scale {guidance_scale} needs a negative prompt's embeddings (those of '' by default)")
    if guidance_scale <= 1 and negative is not None:
        raise ValueError(f"a negative prompt has no effect at guidance scale {guidance_scale}; use more than 1 or leave it out")


def _bare_in_eval_mode(policy: nn.Module) -> nn.Module:
    bare = unwrap(policy)
    assert not bare.training, "call policy.eval(): with dropout a replayed step would not be the one that was sampled"
    return bare


@torch.no_grad()
def sample(
    policy: nn.Module, condition: sd3.Conditioning, *, negative: sd3.Conditioning | None = None, seed: int, epoch: int,
    positions: Sequence[int], noise_keys: Sequence[int] | None = None, sigmas: Tensor, height: int, width: int,
    guidance_scale: float = 1.0, transition: str = "ode", noise_level: float | None = None, window: range = range(0),
    keep_means: bool = False, dtype: torch.dtype = torch.float32,
) -> Trajectory:  # fmt: skip
    """Denoise b pictures from noise in one batch; stochastic steps in `window`, deterministic ones elsewhere.

    A picture depends on (seed, epoch, its position) and not on the batch, process or device it is drawn in, but for rounding.

    Args:
        policy: in eval mode; bare, with LoRA, compiled or wrapped by DDP.
        condition: b prompts on the policy's device. negative: b or 1 prompts, only with guidance_scale > 1.
        positions: of each picture in the epoch, counted over all processes.
        noise_keys: of each picture; equal ones start from the same noise (None: the positions). The steps' noise is never shared.
        sigmas: (T + 1,) on the CPU, from `schedule`.
        height, width: pixels, multiples of 16.
        window: steps within 0 .. T - 2; empty for the plain ODE, which takes transition "ode" and no noise level.
        keep_means: for GRPO-Guard, which compares means; as much memory as the latents.
        dtype: of the recorded latents; a sample is rounded to it before its log-probability is computed and denoising continues.

    Raises:
        ValueError: what `transitions.check` refuses, a window beyond the steps, a negative prompt without guidance or the reverse.
        FloatingPointError: NaN or infinity in the latents.
    """
    network, steps, device = _bare_in_eval_mode(policy), len(sigmas) - 1, condition.embeds.device
    assert len(positions) == len(condition), f"{len(condition)} prompts but {len(positions)} positions"
    _check_guidance(guidance_scale, negative)
    if len(window) and not (window.step == 1 and 0 <= window.start and window.stop < steps):
        raise ValueError(f"the window {window} must lie within steps 0 to {steps - 2} of {steps}; the last one has no log-probability")
    if (transition == "ode") == (len(window) > 0):
        raise ValueError(f"transition {transition!r} does not go with a window of {len(window)} steps: only `ode` has an empty one")
    shape = (CHANNELS, height // sd3.VAE_SCALE, width // sd3.VAE_SCALE)
    x = seeds.normal(seed, epoch, noise_keys or positions, "rollout", shape, device).to(dtype)  # (b, 16, h, w)
    latents, means, log_probs = [], [], []
    for t in range(steps):
        sigma, sigma_next = sigmas[t].expand(len(x)), sigmas[t + 1].expand(len(x))  # (b,)
        with torch.set_grad_enabled(t in window):  # the same kernels as in `replay`
            velocity = _velocity(network, x, sigma, condition, negative, guidance_scale).detach()  # (b, 16, h, w)
        if t == window.start:
            latents.append(x)
        if t in window:
            noise = seeds.normal(seed, epoch, positions, f"rollout step {t}", shape, device)
            mean, step_std = transitions.moments(transition, x, velocity, sigma, sigma_next, noise_level)
            x = transitions.draw(mean, step_std, noise, dtype)
            latents.append(x)
            means += [mean] if keep_means else []
            log_probs.append(transitions.log_prob(x, mean, step_std))
        else:
            x = transitions.moments("ode", x, velocity, sigma, sigma_next)[0].to(dtype)
    if not x.isfinite().all():
        raise FloatingPointError("the sampled latents hold NaN or infinity; try --mixed_precision bf16 or no, or a smaller --learning_rate")
    return Trajectory(
        final=x.float(), latents=torch.stack(latents, 1), means=torch.stack(means, 1) if means else None,
        log_probs=torch.stack(log_probs, 1) if log_probs else x.new_empty(len(x), 0, dtype=torch.float64),
        sigmas=sigmas, window=window, transition=transition, noise_level=noise_level, guidance_scale=guidance_scale,
    )  # fmt: skip


def replay(
    policy: nn.Module, trajectory: Trajectory, t: int | Tensor, condition: sd3.Conditioning, negative: sd3.Conditioning | None = None
) -> Step:
    """Recompute step t of a trajectory under `policy`, with gradient (unless torch.no_grad), in the batch that `sample` drew.

    For the reference model: `with torch.no_grad(), lora.disabled(policy)`.

    Args:
        t: number of a step in trajectory.window, or one for each picture: (b,) integers on the CPU.
        condition, negative: as in `sample`.
    """
    bare = _bare_in_eval_mode(policy)
    network = policy if torch.is_grad_enabled() else bare  # without gradient, DDP would only exchange buffers
    _check_guidance(trajectory.guidance_scale, negative)
    steps = torch.as_tensor(t).expand(len(trajectory))  # (b,)
    assert all(step in trajectory.window for step in steps.tolist()), f"step {t} is not in the window {trajectory.window}"
    rows, columns = torch.arange(len(trajectory)), steps - trajectory.window.start
    device = condition.embeds.device
    x, drawn = (seeds.send(trajectory.latents[rows, place], device) for place in (columns, columns + 1))  # each (b, 16, h, w)
    old_log_prob = seeds.send(trajectory.log_probs[rows, columns], device)  # (b,)
    old_mean = None if trajectory.means is None else seeds.send(trajectory.means[rows, columns], device)
    sigma, sigma_next = trajectory.sigmas[steps], trajectory.sigmas[steps + 1]  # (b,)
    velocity = _velocity(network, x, sigma, condition, negative, trajectory.guidance_scale)
    mean, step_std = transitions.moments(trajectory.transition, x, velocity, sigma, sigma_next, trajectory.noise_level)
    return Step(
        mean=mean, old_mean=old_mean, step_std=step_std, log_prob=transitions.log_prob(drawn, mean, step_std),
        old_log_prob=old_log_prob, sigma=sigma, sigma_next=sigma_next,
    )  # fmt: skip


def tolerance(dtype: torch.dtype, compiled: bool) -> float:
    """Largest |log-ratio|, nats, that rounding may give a step replayed right after sampling; dtype: of the frozen weights.

    Sampling and replay run the same kernels: measured on a CPU (fp32, bf16, eager, compiled) it is 0, which is required of eager fp32.
    Otherwise a library may still choose different kernels for the two; the tolerance is below a tenth of the trainers' clip.
    """
    return 0.0 if dtype == torch.float32 and not compiled else 0.05


def check_on_policy(step: Step, tolerance: float) -> None:
    """Stop if the policy, replayed right after sampling, gives its own steps other log-probabilities: its ratios are not 1.

    Args:
        step: replayed before any update. tolerance: largest |log-ratio|, nats; 0 in eager fp32.

    Raises:
        RuntimeError: says by how much, and what to look for.
    """
    worst = step.log_ratio.detach().abs().max().item()
    if not worst <= tolerance:
        raise RuntimeError(
            f"replaying the step that was just sampled gives a log-ratio of {worst:.3g} nats, at most {tolerance:g} is rounding: the "
            "gradient would be wrong. Look for dropout, autocast or torch.compile on one side only, batches of another size than in "
            "sampling, or weights that changed in between (EMA weights still applied)"
        )
