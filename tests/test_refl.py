"""The gradient of a reward through the sampler: by hand, against plain loops, by finite differences; what it must not flow through."""

import argparse
import copy
import itertools

import pytest
import torch
import unets

import train_refl_sd15 as refl
from src import ddpm
from src.pipelines import sd15, sd15_rollout

ALPHAS = ddpm.alphas_cumprod()
STEPS = 6


def timetable_for(eta=0.0):
    return sd15_rollout.timetable(ALPHAS, STEPS, eta)


def drawing(b=3, dtype=torch.float32):
    """draw(stream): the same noise for the same name, whenever it is asked for."""

    def draw(stream):
        generator = torch.Generator().manual_seed(sum(map(ord, stream)) * 1000)
        return torch.randn(b, 4, 8, 8, generator=generator).to(dtype)

    return draw


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return unets.unet(8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return sd15.SD15(path="", unet=None, vae=unets.vae().requires_grad_(False).eval(), scheduler=None, xl=False)


def predicting(unet, b=3):
    condition = sd15.Conditioning(torch.randn(b, 16, 8, generator=torch.Generator().manual_seed(5)), torch.zeros(b, 0))
    return lambda x_t, timestep: sd15.eps(unet, x_t, timestep, condition)


def gradient(unet, value):
    """Of a scalar by all weights, as one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(unet.parameters()))])


def weigh(latents):
    """A smooth scalar of latents, different for each of their numbers."""
    return (latents * torch.linspace(-1, 1, latents.numel(), dtype=latents.dtype).view_as(latents)).sum() + latents.square().mean()


# --------------------------------------------------------------------------- the sampler


def test_forty_steps_end_where_refl_draws_its_step():
    """The ten timesteps of the published recipe."""
    found = sd15_rollout.timetable(ALPHAS, 40, 1.0)
    assert found.timesteps[30:].tolist() == [226, 201, 176, 151, 126, 101, 76, 51, 26, 1]
    assert found.alphas[40] == 1 and torch.equal(found.alphas[:40], ALPHAS[found.timesteps])


def test_few_steps_begin_where_noise_is_no_longer_all():
    """sqrt(alpha_bar) of SD1.5 is 0.52 at timestep 501 and 0.24 at 751; from 10 steps on, which begin at 901, it is below 0.12."""
    assert ALPHAS[[501, 751, 901, 999]].sqrt().tolist() == pytest.approx([0.524, 0.236, 0.118, 0.068], abs=5e-4)
    for steps in (1, 2, 501):
        with pytest.raises(ValueError, match=f"--num_inference_steps {steps}"):
            sd15_rollout.check_steps(steps)
    for steps in (3, 500):
        sd15_rollout.check_steps(steps)
    assert "751" in sd15_rollout.few_steps(ALPHAS, 4) and "24 %" in sd15_rollout.few_steps(ALPHAS, 4)
    assert sd15_rollout.few_steps(ALPHAS, 9) and sd15_rollout.few_steps(ALPHAS, 10) is None


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_rollout_is_the_stock_sampler(unet, eta):
    """diffusers' DDIM scheduler on the same timesteps; its last step lands on the clean latents, too (set_alpha_to_one)."""
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(**unets.SCHEDULE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    stock.set_timesteps(STEPS)
    predict, draw, timetable = predicting(unet), drawing(), timetable_for(eta)
    assert stock.timesteps.tolist() == timetable.timesteps.tolist()
    x_t = draw("noise")
    with torch.no_grad():
        for i, timestep in enumerate(stock.timesteps):
            noise = draw(f"step {i}") if eta else None
            x_t = stock.step(predict(x_t, timestep.expand(3)), timestep, x_t, eta=eta, variance_noise=noise).prev_sample
    ours = sd15_rollout.rollout(predict, torch.full((3,), STEPS), timetable, draw)
    torch.testing.assert_close(ours, x_t, rtol=1e-4, atol=1e-4)


def test_each_picture_stops_at_its_own_step(unet):
    predict, draw, timetable = predicting(unet), drawing(), timetable_for(1.0)
    together = sd15_rollout.rollout(predict, torch.tensor([0, 2, 5]), timetable, draw)
    for index, stop in enumerate((0, 2, 5)):
        alone = sd15_rollout.rollout(predict, torch.full((3,), stop), timetable, draw)
        assert torch.equal(together[index], alone[index])
    assert torch.equal(together[0], draw("noise")[0])


def test_a_jump_is_the_plain_formula(unet):
    predict, draw, timetable = predicting(unet), drawing(), timetable_for()
    x_t, steps = draw("noise"), torch.tensor([5, 0, 3])
    found = sd15_rollout.jump(predict, x_t, steps, timetable)
    noise = predict(x_t, timetable.timesteps[steps])
    for index, step in enumerate(steps):
        a = ALPHAS[timetable.timesteps[step]]
        torch.testing.assert_close(found[index], (x_t[index] - (1 - a).sqrt() * noise[index]) / a.sqrt())


# --------------------------------------------------------------------------- what the gradient flows through


def clean(unet, first, method="refl", eta=0.0, num_renoised=0, predict=None):
    """All that `clean_latents` yields, summed to one scalar."""
    predict = predict or predicting(unet)
    timetable, draw = timetable_for(eta), drawing()
    x_t = sd15_rollout.rollout(predict, first, timetable, draw)
    found = list(refl.clean_latents(predict, x_t, first, timetable, draw, method=method, num_renoised=num_renoised))
    return sum(map(weigh, found)), found


def test_refls_gradient_is_that_of_the_chosen_step_with_its_input_detached(unet):
    """Each picture's step on its own: a rollout without gradient by hand, then one prediction with it."""
    first = torch.tensor([2, 4, 5])
    value, found = clean(unet, first, eta=1.0)
    assert len(found) == 1
    predict, draw, timetable = predicting(unet), drawing(), timetable_for(1.0)
    states = [draw("noise")]
    with torch.no_grad():
        for i in range(5):
            states.append(sd15_rollout.denoise(predict, states[-1], i, timetable, draw(f"step {i}")))
    x_t = torch.stack([states[step][index] for index, step in enumerate(first)]).detach()
    a = ALPHAS[timetable.timesteps[first]].view(3, 1, 1, 1)
    by_hand = weigh((x_t - (1 - a).sqrt() * predict(x_t, timetable.timesteps[first])) / a.sqrt())
    torch.testing.assert_close(gradient(unet, value), gradient(unet, by_hand), rtol=1e-3, atol=1e-5)


def test_nothing_flows_through_earlier_steps(unet):
    """The rollout gets a copy of the UNet, which receives no gradient; with the whole chain open the gradient would be another."""
    early, predict = copy.deepcopy(unet), predicting(unet)
    first, timetable, draw = torch.full((3,), 4), timetable_for(), drawing()
    x_t = sd15_rollout.rollout(predicting(early), first, timetable, draw)
    (found,) = refl.clean_latents(predict, x_t, first, timetable, draw, method="refl")
    weights = [*unet.parameters(), *early.parameters()]
    both = torch.autograd.grad(weigh(found), weights, allow_unused=True)
    count = len(weights) // 2
    assert all(part is not None for part in both[:count]) and all(part is None for part in both[count:])
    ours = torch.cat([part.flatten() for part in both[:count]])
    x_t = drawing()("noise")
    for i in range(4):
        x_t = sd15_rollout.denoise(predict, x_t, i, timetable_for(), None)
    whole = gradient(unet, weigh(sd15_rollout.jump(predict, x_t, torch.full((3,), 4), timetable_for())))
    assert (ours - whole).norm() > 1e-2 * whole.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("k", "eta"), [(1, 0.0), (3, 0.0), (3, 1.0), (STEPS, 0.0)])
def test_draft_follows_the_last_k_real_steps(unet, k, eta):
    """Recomputed in the backward pass or kept: the same gradient as plain autograd through the same steps."""
    value, found = clean(unet, torch.full((3,), STEPS - k), "draft", eta)
    predict, draw, timetable = predicting(unet), drawing(), timetable_for(eta)
    x_t = sd15_rollout.rollout(predict, torch.full((3,), STEPS - k), timetable, draw)
    for i in range(STEPS - k, STEPS):
        x_t = sd15_rollout.denoise(predict, x_t, i, timetable, draw(f"step {i}") if eta and i < STEPS - 1 else None)
    torch.testing.assert_close(found[0], x_t, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(unet, value), gradient(unet, weigh(x_t)), rtol=1e-3, atol=1e-4)


def test_draft_lv_adds_re_noised_copies_of_the_picture(unet):
    """Two copies: the picture noised back to the last timestep, whatever the gradient of the first; each then denoised by one step."""
    value, found = clean(unet, torch.full((3,), STEPS - 1), "draft_lv", num_renoised=2)
    assert len(found) == 3
    predict, draw, timestep = predicting(unet), drawing(), timetable_for().timesteps[-1]
    a, picture = ALPHAS[timestep], found[0].detach()
    by_hand = weigh(clean(unet, torch.full((3,), STEPS - 1), "draft")[1][0])
    for n in range(2):
        x_t = a.sqrt() * picture + (1 - a).sqrt() * draw(f"renoise {n}")
        by_hand = by_hand + weigh((x_t - (1 - a).sqrt() * predict(x_t, timestep.expand(3))) / a.sqrt())
    torch.testing.assert_close(gradient(unet, value), gradient(unet, by_hand), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "first"), [("refl", 3), ("draft", STEPS - 2)])
def test_the_gradient_agrees_with_finite_differences(unet, model, method, first):
    """d reward / d theta along a random direction, in fp64 through UNet and VAE, clamping and rounding left out, to 1e-3.

    What is held fixed on the way is the input of the chosen step: the finite difference must not see it move.
    """
    policy = copy.deepcopy(unet).double()
    model = copy.copy(model)
    model.vae = copy.deepcopy(model.vae).double()
    draw, frozen = drawing(dtype=torch.float64), predicting(copy.deepcopy(policy))
    timetable = timetable_for()

    def reward():
        at = torch.full((3,), first)
        x_t = sd15_rollout.rollout(frozen, at, timetable, draw)
        found = refl.clean_latents(predicting(policy), x_t, at, timetable, draw, method=method)
        return torch.tanh(sd15.decode_pixels(model, next(found))).square().mean()

    direction = [torch.randn_like(parameter) for parameter in policy.parameters()]
    slope = sum((part * way).sum() for part, way in zip(torch.autograd.grad(reward(), list(policy.parameters())), direction, strict=True))
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, way in zip(policy.parameters(), direction, strict=True):
                parameter.add_(step * way)
            values.append(reward().item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3) and abs(slope.item()) > 1e-6


# --------------------------------------------------------------------------- picture and loss


def test_saturated_pixels_are_clamped_and_still_learn():
    images = torch.tensor([-0.5, 0.25, 1.7], requires_grad=True)
    clamped = refl.straight_through_clamp(images)
    assert clamped.tolist() == [0.0, 0.25, 1.0]
    assert torch.autograd.grad((clamped * torch.tensor([1.0, 2.0, 3.0])).sum(), images)[0].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("first", "last", "batch"), [(30, 39, 1), (3, 5, 2), (4, 4, 8), (0, 2, 3)])
def test_a_rollouts_mean_length_is_that_of_all_draws(first, last, batch):
    """(3, 5, 2): the latest of two is 3, 4, 5 in 1, 3, 5 of 9 cases: 40 / 9."""
    latest = [max(draws) for draws in itertools.product(range(first, last + 1), repeat=batch)]
    assert sd15_rollout.mean_steps(first, last, batch) == pytest.approx(sum(latest) / len(latest))


def test_decoding_in_parts_that_are_recomputed_is_decoding(model):
    """Under bf16's autocast, too: the VAE stays in fp32, and so does its gradient."""
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = sd15.decode_pixels(model, x0) * 0.5 + 0.5
    clamped = plain + (plain.clamp(0, 1) - plain).detach()
    with torch.autocast("cpu", torch.bfloat16):
        images = refl.decode(model, x0, 2)
    torch.testing.assert_close(images, clamped)
    assert images.dtype == torch.float32 and images.shape == (3, 3, 64, 64)
    ours, theirs = (torch.autograd.grad(weigh(value), x0)[0] for value in (images, clamped))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()  # rounding: the VAE saw two and one, or three; in bf16 it would be 1e-2


def test_a_checkpointed_decoder_has_the_same_gradient_and_keeps_less_at_work(model):
    """--gradient_checkpointing: bit for bit, though the decoder's blocks are computed once more.

    Of two parts the first is decoded twice, the second once; checkpointed, each of their backward passes computes the block once more.
    """
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    calls = []
    hook = model.vae.decoder.up_blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))

    def run():
        calls.clear()
        (found,) = torch.autograd.grad(weigh(refl.decode(model, x0, 1)), x0)
        return found, len(calls)

    plain, twice = run()
    model.vae.enable_gradient_checkpointing()
    try:
        checkpointed, thrice = run()
    finally:
        model.vae.disable_gradient_checkpointing()
        hook.remove()
    assert torch.equal(plain, checkpointed) and (twice, thrice) == (3, 5)


def test_weights_cast_for_the_rollout_are_not_met_by_the_gradient(unet):
    """bf16, all weights: autocast's copies made without gradient are gone when the step with gradient begins."""
    policy, first, draw, timetable = copy.deepcopy(unet).train(), torch.full((3,), 4), drawing(), timetable_for()
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    run = argparse.Namespace(accelerator=argparse.Namespace(autocast=autocast))
    condition = sd15.Conditioning(torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(5)), torch.zeros(3, 0))
    predict = refl.predictor(run, policy, condition, None, 1.0)
    with refl.sampling(run, policy):
        assert not policy.training
        x_t = sd15_rollout.rollout(predict, first, timetable, draw)
    assert policy.training and x_t.dtype == torch.float32
    (x0,) = refl.clean_latents(predict, x_t, first, timetable, draw, method="refl")
    assert all(part is not None and part.any() for part in torch.autograd.grad(weigh(x0), list(policy.parameters()), allow_unused=True))


def test_rewards_above_the_threshold_teach_nothing():
    reward = torch.tensor([-1.0, 1.5, 3.0], requires_grad=True)
    loss = refl.reward_loss(reward, 2.0)
    assert loss.tolist() == [3.0, 0.5, 0.0] and torch.autograd.grad(loss.sum(), reward)[0].tolist() == [-1.0, -1.0, 0.0]
    assert refl.reward_loss(reward, None).tolist() == [1.0, -1.5, -3.0]
