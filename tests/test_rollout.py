"""Rollouts on SD3: what `sample` draws, and that `replay` scores it as it was drawn."""

import contextlib
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src import lora, seeds, speed, transitions
from src.pipelines import sd3, sd3_rollout

STEPS, SIDE, BATCH = 5, 32, 4
OPTIONS = {"seed": 0, "epoch": 2, "height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def world(tiny_sd3_folder):
    """A model with a LoRA that changes it, four prompts, a negative one, a schedule."""
    model = sd3.load(tiny_sd3_folder)
    with torch.no_grad():
        condition, negative = sd3.encode_prompts(model, ["a red", "a green", "two", "three"]), sd3.encode_prompts(model, ["bad"])
    seeds.seed_everything(0, "lora")
    lora.add(model.transformer, rank=2)
    with torch.no_grad():
        for weight in lora.parameters(model.transformer):
            weight.normal_(0, 0.3)
    return model, condition, negative, sd3_rollout.schedule(model, STEPS)


def draw(world, *, guided=False, rows=slice(0, BATCH), **changes):
    model, condition, negative, sigmas = world
    options = (
        dict(transition="cps", noise_level=0.8, window=range(1, 3), sigmas=sigmas, positions=range(BATCH)[rows], keep_means=True) | OPTIONS
    )
    options |= dict(guidance_scale=3.0, negative=negative) if guided else {}
    return sd3_rollout.sample(model.transformer, condition[rows], **(options | changes))


def replay(world, trajectory, t, rows=slice(0, BATCH)):
    model, condition, negative, _ = world
    return sd3_rollout.replay(model.transformer, trajectory, t, condition[rows], negative if trajectory.guidance_scale > 1 else None)


# --------------------------------------------------------------------------- sampling


def test_shapes_and_types_of_a_trajectory(world):
    trajectory = draw(world)
    assert len(trajectory) == BATCH and trajectory.dimensions == 16 * 4 * 4
    assert trajectory.final.shape == (BATCH, 16, 4, 4) and trajectory.final.dtype == torch.float32
    assert trajectory.latents.shape == (BATCH, 3, 16, 4, 4) and trajectory.means.shape == (BATCH, 2, 16, 4, 4)
    assert trajectory.log_probs.shape == (BATCH, 2) and trajectory.log_probs.dtype == torch.float64
    assert trajectory.sigmas.shape == (STEPS + 1,) and trajectory.sigmas[0] == 1 and trajectory.sigmas[-1] == 0
    assert not any(kept.requires_grad for kept in (trajectory.final, trajectory.latents, trajectory.means, trajectory.log_probs))


def test_means_are_kept_only_if_asked_for(world):
    one, other = draw(world), draw(world, keep_means=False)
    assert other.means is None and other.to("meta").means is None and torch.equal(one.latents, other.latents)
    step = replay(world, other, 1)
    assert step.old_mean is None and not step.log_ratio.any()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("transition", transitions.STOCHASTIC)
def test_sampling_is_the_loop_of_one_picture_at_a_time(world, guided, transition):
    """Picture 2 by hand: transformer called bare, two passes for guidance, steps from `transitions` (tested on their own)."""
    model, condition, negative, sigmas = world
    got = draw(world, guided=guided, transition=transition, noise_level=0.9)
    x = seeds.normal(0, 2, [2], "rollout", (16, 4, 4))
    with torch.no_grad():
        for t in range(STEPS):

            def predict(prompts):
                return model.transformer(
                    hidden_states=x, timestep=1000 * sigmas[t : t + 1], encoder_hidden_states=prompts.embeds,  # noqa: B023
                    pooled_projections=prompts.pooled,
                ).sample  # fmt: skip

            velocity = predict(condition[2:3])
            if guided:
                velocity = predict(negative) + 3.0 * (velocity - predict(negative))
            name, level = (transition, 0.9) if t in (1, 2) else ("ode", None)
            mean, step_std = transitions.moments(name, x, velocity, sigmas[t : t + 1], sigmas[t + 1 : t + 2], level)
            x = mean + step_std * seeds.normal(0, 2, [2], f"rollout step {t}", (16, 4, 4))
            if t in (1, 2):
                torch.testing.assert_close(got.means[2:3, t - 1], mean, rtol=1e-4, atol=1e-4)
                want = torch.distributions.Normal(mean.double(), step_std.double()).log_prob(x.double()).sum()
                assert got.log_probs[2, t - 1].item() == pytest.approx(want.item(), abs=1e-2)
                torch.testing.assert_close(got.latents[2:3, t], x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.final[2:3], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_without_a_window_it_is_the_stock_sampler(world, guided, monkeypatch):
    """`sd3.render`, which is the stock pipeline, from the same noise."""
    model, condition, negative, sigmas = world
    trajectory = draw(world, guided=guided, transition="ode", noise_level=None, window=range(0))
    assert trajectory.means is None and trajectory.log_probs.shape[1] == 0
    noises = iter(trajectory.latents[:, 0])  # x before step 0
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: next(noises)[None])
    images = sd3.render(
        model, model.transformer, condition, negative=negative, seeds=range(BATCH), height=SIDE, width=SIDE, num_inference_steps=STEPS,
        guidance_scale=3.0 if guided else 1.0,
    )  # fmt: skip
    torch.testing.assert_close(sd3.decode_latents(model, trajectory.final), images, rtol=1e-4, atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(world):
    whole = draw(world)
    for rows in (slice(0, 2), slice(2, 4), slice(3, 4)):
        part = draw(world, rows=rows)
        torch.testing.assert_close(part.final, whole.final[rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part.log_probs, whole.log_probs[rows], rtol=0, atol=1e-3)


def test_pictures_epochs_and_seeds_differ(world):
    first, row = draw(world), slice(0, 1)
    again = draw(world)
    assert torch.equal(first.final, again.final) and torch.equal(first.log_probs, again.log_probs)
    for other in (draw(world, epoch=3), draw(world, seed=1), draw(world, positions=range(4, 8))):
        assert (first.final - other.final).abs().flatten(1).mean(1).min() > 0.1
    # two pictures of one prompt differ in the initial noise and in the steps' noise
    pair = draw(world, rows=row, positions=[0]), draw(world, rows=row, positions=[9])
    assert (pair[0].latents[:, 0] - pair[1].latents[:, 0]).abs().mean() > 0.1


def test_equal_noise_keys_are_equal_starts_and_the_steps_noise_stays_each_pictures_own(world):
    """Without keys the positions are the keys."""
    starts, after, _ = draw(world, window=range(0, 2), noise_keys=[5, 5, 6, 1]).latents.unbind(1)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[3], draw(world, window=range(0, 2)).latents[1, 0])
    assert len({value.sum().item() for value in starts}) == 3 and len({value.sum().item() for value in after}) == 4


def test_only_steps_of_the_window_run_the_kernels_of_training(world, monkeypatch):
    """Their velocity is that of a pass with gradient, as in a replay; the others need no graph."""
    modes, velocity = [], sd3.velocity
    monkeypatch.setattr(sd3, "velocity", lambda *given: modes.append(torch.is_grad_enabled()) or velocity(*given))
    assert not draw(world, window=range(1, 3)).final.requires_grad
    assert modes == [False, True, True] + [False] * (STEPS - 3)


def test_steps_outside_the_window_are_deterministic(world):
    early, late = draw(world, window=range(0, 1)), draw(world, window=range(3, 4))
    plain = draw(world, transition="ode", noise_level=None, window=range(0))
    assert not torch.allclose(early.final, plain.final, atol=1e-2)
    assert not torch.allclose(late.final, plain.final, atol=1e-2)
    # up to step 3 the late one followed the ODE: one ODE step on from its state before the window is the ODE's
    model, condition, _, sigmas = world
    x = plain.latents[:, 0]
    with torch.no_grad():
        for t in range(3):
            sigma = sigmas[t].expand(BATCH)
            x = x + (sigmas[t + 1] - sigmas[t]) * sd3.velocity(model.transformer, x, sigma, condition)
    torch.testing.assert_close(late.latents[:, 0], x, rtol=1e-4, atol=1e-4)


def test_decoding_leaves_the_trajectory_as_it_is(world):
    """The seed of this project overwrote its latents with their unscaled version, and went on denoising that."""
    model, trajectory = world[0], draw(world, window=range(STEPS - 1))
    before = [kept.clone() for kept in (trajectory.final, trajectory.latents)]
    sd3.decode_latents(model, trajectory.final)
    assert torch.equal(before[0], trajectory.final) and torch.equal(before[1], trajectory.latents)
    assert trajectory.log_probs.isfinite().all(), "a log-probability at the last step would be NaN"


def test_rounded_latents_are_what_is_scored_and_denoised_on(world):
    trajectory = draw(world, dtype=torch.bfloat16)
    assert trajectory.latents.dtype == torch.bfloat16 and trajectory.means.dtype == torch.float32
    _, _, _, sigmas = world
    for column, t in enumerate(trajectory.window):
        step_std = transitions.coefficients("cps", sigmas[t], sigmas[t + 1], 0.8)[2].item()
        normal = torch.distributions.Normal(trajectory.means[:, column].double(), step_std)
        want = normal.log_prob(trajectory.latents[:, column + 1].double()).flatten(1).sum(1)
        torch.testing.assert_close(trajectory.log_probs[:, column], want, rtol=0, atol=1e-3)
        assert replay(world, trajectory, t).log_ratio.abs().max() == 0


# --------------------------------------------------------------------------- replay


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("transition", transitions.STOCHASTIC)
def test_the_ratio_is_exactly_one_right_after_sampling(world, guided, transition):
    trajectory = draw(world, guided=guided, transition=transition, window=range(0, STEPS - 1))
    for t in trajectory.window:
        step = replay(world, trajectory, t)
        assert step.log_prob.requires_grad
        assert torch.equal(step.log_prob, trajectory.log_probs[:, t]) and torch.equal(step.mean, trajectory.means[:, t])
        assert not step.log_ratio.any()
        sd3_rollout.check_on_policy(step, tolerance=0)


def test_the_ratio_is_exactly_one_with_a_step_of_its_own_for_each_picture(world):
    trajectory = draw(world, window=range(0, STEPS - 1))
    t = torch.tensor([2, 0, 3, 1])
    step = replay(world, trajectory, t)
    assert step.log_prob.requires_grad and not step.log_ratio.any()
    assert torch.equal(step.log_prob, trajectory.log_probs[torch.arange(4), t])
    assert torch.equal(step.sigma, trajectory.sigmas[t]) and torch.equal(step.sigma_next, trajectory.sigmas[t + 1])
    for i in range(4):
        torch.testing.assert_close(step.mean[i], replay(world, trajectory, int(t[i])).mean[i])


@pytest.mark.parametrize("guided", [False, True])
def test_the_ratio_is_exactly_one_in_bf16_autocast_too(world, guided):
    """On a CPU the same kernels run with and without gradient; the tolerance for GPUs is the trainers'."""
    with torch.autocast("cpu", torch.bfloat16):
        trajectory = draw(world, guided=guided)
        steps = [replay(world, trajectory, t) for t in trajectory.window]
    plain = draw(world, guided=guided)
    assert (plain.means - trajectory.means).abs().max() > 1e-3, "autocast was not on"
    assert trajectory.log_probs.dtype == torch.float64 and trajectory.means.dtype == torch.float32
    assert all(not step.log_ratio.any() for step in steps)


def test_sampling_inside_autocast_leaves_the_gradient_of_a_replay_whole(world):
    """torch once kept the bf16 copies of weights that it made under no_grad: gradients were then lost in silence."""
    model = world[0]
    weights, gradients = lora.parameters(model.transformer), []
    trajectory = None
    for sampled_inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            trajectory = draw(world) if sampled_inside else trajectory
            log_prob = replay(world, trajectory, 1).log_prob.sum()
        gradients.append(torch.autograd.grad(log_prob, weights))
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*gradients, strict=True))


def test_another_policy_gives_another_ratio(world):
    model, condition, _, _ = world
    trajectory = draw(world)
    with torch.no_grad(), lora.disabled(model.transformer):
        reference = replay(world, trajectory, 1)
    assert not reference.log_prob.requires_grad and reference.log_ratio.abs().min() > 0.01
    assert torch.equal(reference.old_mean, trajectory.means[:, 0])
    # log-ratio of two normals by their means: sum of (m' - m) (2 x - m - m') / (2 std^2)
    drawn, old, new, std = (value.double() for value in (trajectory.latents[:, 1], reference.old_mean, reference.mean, reference.step_std))
    want = ((new - old) * (2 * drawn - old - new) / (2 * std**2)).flatten(1).sum(1)
    torch.testing.assert_close(reference.log_ratio, want, rtol=1e-4, atol=1e-3)
    with pytest.raises(RuntimeError, match="log-ratio of .* nats.*dropout.*autocast.*torch.compile.*batches of another size"):
        sd3_rollout.check_on_policy(reference, tolerance=0.01)


def test_nan_is_no_ratio_of_one(world):
    step = replay(world, draw(world), 1)
    with pytest.raises(RuntimeError, match="nan nats"):
        sd3_rollout.check_on_policy(replace(step, log_prob=step.log_prob * torch.nan), tolerance=1.0)
    with pytest.raises(RuntimeError, match="log-ratio of 2 nats, at most 1 "):
        sd3_rollout.check_on_policy(replace(step, log_prob=step.old_log_prob - 2), tolerance=1.0)  # less likely than it was
    sd3_rollout.check_on_policy(replace(step, log_prob=step.old_log_prob - 0.5), tolerance=1.0)


def test_rounding_is_allowed_where_kernels_may_differ_and_to_a_tenth_of_the_clip():
    assert sd3_rollout.tolerance(torch.float32, compiled=False) == 0
    for dtype, compiled in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, True)):
        assert 0 < sd3_rollout.tolerance(dtype, compiled) <= 0.66 / 10


def test_the_gradient_is_that_of_the_log_probability(world):
    """d log p / d weights by autograd against a central difference along a random direction, in fp64."""
    model, condition, _, sigmas = world
    trajectory = draw(world)
    weights = lora.parameters(model.transformer)
    step = replay(world, trajectory, 2)
    gradient = torch.autograd.grad(step.log_prob.sum(), weights)
    g = torch.Generator().manual_seed(0)
    direction = [torch.randn(w.shape, generator=g) for w in weights]
    slope = sum((one * other).sum() for one, other in zip(gradient, direction, strict=True)).item()
    values = []
    for sign in (1, -2, 1):  # to +h, to -h, and back
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w += sign * 1e-3 * d
            values.append(replay(world, trajectory, 2).log_prob.sum().item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


def test_a_trajectory_kept_elsewhere_replays_the_same(world):
    """`to` moves every tensor but the schedule; here from the meta device's point of view, since there is one real device."""
    trajectory = draw(world)
    moved = trajectory.to("meta")
    assert {moved.final.device.type, moved.latents.device.type, moved.means.device.type, moved.log_probs.device.type} == {"meta"}
    assert moved.sigmas.device.type == "cpu" and moved.window == trajectory.window
    assert not replay(world, trajectory.to("cpu"), 1).log_ratio.any()


def test_wrapped_by_ddp_it_is_the_same(world, tmp_path):
    """One process of a process group: sampling runs the bare module, replay goes through the wrapper, which must see the gradient."""
    model, condition, _, _ = world
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = torch.nn.parallel.DistributedDataParallel(model.transformer)
        forwards = []
        policy.register_forward_hook(lambda *_: forwards.append(1))
        plain = draw(world)
        wrapped = sd3_rollout.sample(
            policy, condition, transition="cps", noise_level=0.8, window=range(1, 3), sigmas=world[3], positions=range(BATCH), **OPTIONS
        )
        assert torch.equal(plain.final, wrapped.final) and not forwards
        with torch.no_grad(), lora.disabled(policy):
            reference = sd3_rollout.replay(policy, wrapped, 1, condition)
        assert reference.log_ratio.any() and not forwards
        step = sd3_rollout.replay(policy, wrapped, 1, condition)
        assert not step.log_ratio.any() and forwards
        step.log_prob.sum().backward()
        assert all(weight.grad is not None for weight in lora.parameters(policy))
    finally:
        torch.distributed.destroy_process_group()
        model.transformer.zero_grad()


@pytest.mark.long  # torch compiles for more than a minute
def test_compiled_blocks_replay_within_the_stated_tolerance(tiny_sd3_folder):
    model = sd3.load(tiny_sd3_folder)
    with torch.no_grad():
        condition = sd3.encode_prompts(model, ["a", "b", "c", "d"])
    seeds.seed_everything(0, "lora")
    lora.add(model.transformer, rank=2)
    with torch.no_grad():
        for weight in lora.parameters(model.transformer):
            weight.normal_(0, 0.3)
    world = model, condition, None, sd3_rollout.schedule(model, STEPS)
    plain = draw(world)
    speed.compile_blocks(model.transformer)
    trajectory = draw(world)
    torch.testing.assert_close(plain.final, trajectory.final, rtol=1e-3, atol=1e-3)
    for t in trajectory.window:
        step = replay(world, trajectory, t)
        sd3_rollout.check_on_policy(step, sd3_rollout.tolerance(torch.float32, compiled=True))
        step.log_prob.sum().backward()
    assert all(weight.grad.any() for weight in lora.parameters(model.transformer))


# --------------------------------------------------------------------------- windows


def test_windows_are_a_function_of_epoch_and_seed():
    options = dict(num_inference_steps=10, size=3, window_range=(0, 5))
    windows = [sd3_rollout.choose_window(epoch, 7, **options) for epoch in range(300)]
    assert windows == [sd3_rollout.choose_window(epoch, 7, **options) for epoch in range(300)]
    assert windows != [sd3_rollout.choose_window(epoch, 8, **options) for epoch in range(300)]
    counts = {start: sum(window == range(start, start + 3) for window in windows) for start in (0, 1, 2)}
    assert sum(counts.values()) == 300
    assert all(abs(count - 100) < 4 * 8.2 for count in counts.values())  # binomial: sqrt(300 * 1/3 * 2/3) = 8.2


def test_a_progressive_window_moves_by_one_and_returns():
    """Steps 2 .. 6, window of 3: places 2, 3, 4, two epochs each."""
    starts = [
        sd3_rollout.choose_window(epoch, 0, num_inference_steps=10, size=3, window_range=(2, 7), order="progressive", shift_every=2)
        for epoch in range(8)
    ]
    assert starts == [range(s, s + 3) for s in (2, 2, 3, 3, 4, 4, 2, 2)]


def test_without_a_size_the_window_is_the_range_and_without_a_range_all_but_the_last_step():
    assert sd3_rollout.choose_window(0, 0, num_inference_steps=10) == range(9)
    assert sd3_rollout.choose_window(5, 3, num_inference_steps=10, window_range=(2, 4)) == range(2, 4)
    assert {sd3_rollout.choose_window(e, 0, num_inference_steps=4, size=2).start for e in range(30)} == {0, 1}


@pytest.mark.parametrize(
    ("steps", "size", "window_range", "message"),
    [
        (1, None, None, "--num_inference_steps must be at least 2, got 1"),
        (10, 10, None, "--window_size 10 must lie in 1 .. 9, the steps of --window_range 0 9"),
        (10, 0, None, "--window_size 0 must lie in 1 .. 9"),
        (10, 4, (2, 5), "--window_size 4 must lie in 1 .. 3, the steps of --window_range 2 5"),
        (10, None, (0, 10), "--window_range 0 10 .* of 10 steps the last has no log-probability; try --window_range 0 9"),
        (10, None, (5, 5), "--window_range 5 5 must satisfy 0 <= first < stop <= 9"),
        (10, None, (-1, 3), "--window_range -1 3 must satisfy"),
    ],
)
def test_windows_outside_the_steps_are_refused(steps, size, window_range, message):
    with pytest.raises(ValueError, match=message):
        sd3_rollout.check_window(steps, size, window_range)
    with pytest.raises(ValueError, match=message):
        sd3_rollout.choose_window(0, 0, num_inference_steps=steps, size=size, window_range=window_range)


# --------------------------------------------------------------------------- the schedule, and refusals


@pytest.mark.parametrize(("steps", "shift"), [(4, 3.0), (10, 3.0), (28, 1.5)])
def test_the_formula_gives_the_schedulers_own_schedule(world, steps, shift):
    expected = sd3_rollout.schedule(world[0], steps, shift)
    torch.testing.assert_close(sd3_rollout.schedule_by_formula(steps, shift), expected, rtol=1e-5, atol=1e-6)


def test_the_schedule_is_the_schedulers_own(world):
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = world[0]
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(10)
    got = sd3_rollout.schedule(model, 10)
    assert torch.equal(got, stock.sigmas) and got.dtype == torch.float32 and got[0] == 1 and got[-1] == 0
    assert torch.equal(1000 * got[:-1], stock.timesteps)
    model.scheduler.set_timesteps(3)  # its state is nobody's: the config alone counts
    assert torch.equal(sd3_rollout.schedule(model, 10), stock.sigmas)
    other = FlowMatchEulerDiscreteScheduler(shift=1.7)
    other.set_timesteps(7)
    assert torch.equal(sd3_rollout.schedule(model, 7, shift=1.7), other.sigmas) and other.sigmas[0] == 1


@pytest.mark.parametrize("window", [range(3, 5), range(-1, 2), range(0, 4, 2)])
def test_a_window_that_reaches_the_last_step_is_refused(world, window):
    with pytest.raises(ValueError, match="must lie within steps 0 to 3 of 5"):
        draw(world, window=window)


def test_noise_without_a_window_and_a_window_without_noise_are_refused(world):
    with pytest.raises(ValueError, match="'cps' does not go with a window of 0 steps"):
        draw(world, window=range(0))
    with pytest.raises(ValueError, match="'ode' does not go with a window of 2 steps"):
        draw(world, transition="ode", noise_level=None)
    with pytest.raises(ValueError, match="--noise_level must be above 0"):
        draw(world, noise_level=0.0)


def test_guidance_and_negative_prompt_belong_together(world):
    with pytest.raises(ValueError, match="guidance scale 2.0 needs a negative prompt"):
        draw(world, guidance_scale=2.0)
    with pytest.raises(ValueError, match="no effect at guidance scale 1.0"):
        draw(world, negative=world[2])
    model, condition, _, _ = world
    with pytest.raises(ValueError, match="needs a negative prompt"):
        sd3_rollout.replay(model.transformer, draw(world, guided=True), 1, condition)


def test_a_policy_in_training_mode_is_refused(world):
    model = world[0]
    trajectory = draw(world)
    model.transformer.train()
    try:
        for call in (lambda: draw(world), lambda: replay(world, trajectory, 1)):
            with pytest.raises(AssertionError, match="policy.eval"):
                call()
    finally:
        model.transformer.eval()


def test_steps_outside_the_window_cannot_be_replayed(world):
    trajectory = draw(world)
    for t in (0, 3, torch.tensor([1, 2, 3, 1])):
        with pytest.raises(AssertionError, match="not in the window"):
            replay(world, trajectory, t)


def test_latents_that_are_not_finite_stop_the_run(world, monkeypatch):
    monkeypatch.setattr(sd3, "velocity", lambda network, x, *_: torch.full_like(x, torch.inf))
    with pytest.raises(FloatingPointError, match="NaN or infinity; try --mixed_precision bf16"):
        draw(world)


@pytest.mark.parametrize("guided", [False, True])
def test_guidance_costs_one_forward_pass_a_step(world, guided):
    batches = []
    with contextlib.closing(_Hook(world[0].transformer, batches)):
        replay(world, draw(world, guided=guided), 1)
    assert batches == [BATCH * (2 if guided else 1)] * (STEPS + 1)


# --------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive, and the most there were: `now`, `peak`."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in self._storages((args, kwargs))}  # of which views are made
        for storage in self._storages(made):
            if storage._cdata not in self.known.keys() | given:
                self.known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return made

    def _storages(self, tree):
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def _free(self, key):
        self.now -= self.known.pop(key)


def epoch(world, batches):
    """(peak, kept) bytes of an epoch as the trainers run it: sample and decode all batches, then replay each with its gradient."""
    model, condition, _, _ = world
    with LiveBytes() as memory:
        kept = []
        for number in range(batches):
            trajectory = draw(world, positions=range(4 * number, 4 * number + 4), keep_means=False)
            sd3.decode_latents(model, trajectory.final, batch_size=2)
            kept.append(trajectory)
        del trajectory
        waiting = memory.now
        for trajectory in kept:
            for t in trajectory.window:
                replay(world, trajectory, t).log_prob.sum().backward()
        model.transformer.zero_grad()
    return memory.peak, waiting


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures_of_an_epoch_but_for_the_waiting_latents(world):
    """A picture of D = 256 numbers waits as 1 finished latent and 3 states in fp32, and 2 log-probs in fp64."""
    epoch(world, 1)  # what is made once
    (few_peak, few_kept), (many_peak, many_kept) = epoch(world, 2), epoch(world, 8)
    assert few_kept == 8 * (4 * 256 * 4 + 2 * 8) and many_kept == 4 * few_kept
    assert few_peak > 5 * few_kept, "the peak must be that of a batch's activations, or this shows nothing"
    assert many_peak - many_kept <= 1.01 * (few_peak - few_kept)


def test_decoding_holds_no_more_than_its_batch(world):
    model = world[0]
    latents, peaks = torch.randn(8, 16, 8, 8), {}
    for count, size in ((2, 2), (8, 2), (8, 8)):
        with torch.no_grad(), LiveBytes() as memory:
            sd3.decode_latents(model, latents[:count], batch_size=size)
        peaks[count, size] = memory.peak
    pictures = 8 * 3 * 64 * 64 * 4
    assert peaks[8, 2] < peaks[2, 2] + 5 * pictures < peaks[8, 8]  # the pictures themselves, and copies of them while they are scaled


class _Hook:
    """Records the batch size of every forward pass."""

    def __init__(self, module, batches):
        self.handle = module.register_forward_pre_hook(lambda _, __, inputs: batches.append(len(inputs["hidden_states"])), with_kwargs=True)

    def close(self):
        self.handle.remove()
