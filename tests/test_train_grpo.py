"""The GRPO trainer in this process, on the smallest model: what it trains, writes, repeats, resumes and refuses."""

import argparse
import contextlib
import gc
import json
import math
import os
import re
import shutil
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from test_transitions import SIGMAS

import train_grpo_sd3 as script
from src import checkpoint, ema, full, grpo_variants, lora, metrics, policy, quantize, runtime, seeds
from src.pipelines import sd3, sd3_rollout
from src.scorers import Scores
from src.scorers.mixture import Mixture

pytestmark = pytest.mark.usefixtures("summaries")
GRPO = dict(group_size=4, rank=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_rollouts(tiny_sd3_folder, tmp_path_factory.mktemp("grpo"))


@pytest.fixture
def train(world, tmp_path):
    """train("name", rank=2, ...) -> output folder of a run with these flags."""

    def run(name: str = "run", **changes) -> Path:
        runs.train(script, world.argv(tmp_path / name, **(GRPO | changes)))
        return tmp_path / name

    return run


@pytest.fixture
def live(monkeypatch):
    """The policy of the next run, and the trained weights as it started with them."""
    seen = {}

    class Spy(script.policy.Policy):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            seen.update(actor=self, start=[weight.detach().clone() for weight in self.weights])

    monkeypatch.setattr(script.policy, "Policy", Spy)
    return seen


@pytest.fixture
def judge(monkeypatch):
    """judge(function) lets it take the place of the scorers: function(images, texts) -> (b,)."""

    def replace_scorers(function):
        def verdict(self, images, texts, metadata=None):
            total = function(images.cpu(), texts).to(images.device)
            return Scores(total, {self.names[0]: total})

        monkeypatch.setattr(Mixture, "__call__", verdict)

    return replace_scorers


def test_with_all_weights_the_rest_of_the_result_is_fetched_before_the_model_is_loaded(train, world, monkeypatch):
    line, loaded = runs.parts_before_refusal(monkeypatch, sd3, lambda: train(full_weights=True, rank=None))
    assert line == f"error: --pretrained_model_name_or_path {world.model}: transformer alone is here"
    assert not {"transformer", "vae", "everything"} & set(loaded)
    train("lora", num_epochs=1)  # has no use for it


def weights(folder):
    return runs.weights(folder)


def brightness(images, texts):
    return images.mean((1, 2, 3))


# --------------------------------------------------------------------------- what it trains and writes


def test_every_adapter_is_trained_and_no_base_weight_changes(train, world, live):
    """The seed project's policy gradient was exactly zero. Decay alone would move A: it is off."""
    from diffusers import SD3Transformer2DModel

    out = train(adam_weight_decay=0.0)
    trained = live["actor"].weights
    assert trained and not [weight.shape for weight, start in zip(trained, live["start"], strict=True) if torch.equal(weight, start)]
    base = SD3Transformer2DModel.from_pretrained(world.model, subfolder="transformer").state_dict()
    state = live["actor"].transformer.state_dict()
    kept = {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}
    runs.assert_identical(kept, base)
    for name in ("loss", "policy_loss", "grad_norm", "reward", "reward_std", "log_ratio", "reward/jpeg_incompressibility"):
        assert len(runs.values(out, name)) == 2 and all(np.isfinite(runs.values(out, name))), name
    assert min(runs.values(out, "grad_norm")) > 0 and min(runs.values(out, "log_ratio")) > 0


@pytest.mark.slow
def test_a_run_leaves_what_the_outputs_page_promises(train, summaries):
    summaries()
    out = train(use_ema=True, checkpointing_epochs=1, eval_epochs=1, eval_scorers="shapes", report_to="tensorboard")
    page = (runs.ROOT / "outputs/README.md").read_text()
    promised = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    for name in promised:
        assert list(out.glob(name.replace("-N", "-*").rstrip("/"))), f"outputs/README.md promises {name}"
    assert (out / "raw" / runs.WEIGHTS).is_file() and (out / "checkpoint-4" / runs.WEIGHTS).is_file()
    pictures = [f"step-{step:06d}/{name}" for step in (0, 2, 4) for name in ("00-0.png", "01-1.png")]
    assert sorted(name for name in runs.files(out / "samples") if "/" in name) == pictures
    assert Image.open(out / "summary.png").width > 500
    card = (out / "README.md").read_text()
    assert "load_lora_weights" in card and "GRPO on the reward `jpeg_incompressibility`, 2 epochs of 8 pictures" in card
    assert "| `eval/shapes` |" in card

    written = metrics.read(out / "metrics.jsonl")
    trained = {
        "step", "loss", "policy_loss", "kl", "log_ratio", "drift", "clip_fraction", "clip_above", "grad_norm", "lr", "epoch", "no_signal",
        "skipped_updates", "reward", "reward_std", "group_std", "unjudged", "reward/jpeg_incompressibility", "images_per_second", "seconds",
        "memory_gb",
    }  # fmt: skip
    evaluated = {"step", "eval_reward", "eval/jpeg_incompressibility", "eval/shapes"}
    assert [set(line) for line in written] == [evaluated, trained, evaluated, trained, evaluated]
    assert [line["step"] for line in written] == [0, 2, 2, 4, 4]
    assert [line["epoch"] for line in written if "epoch" in line] == [1, 2]
    assert all(metrics.meaning(name) for line in written for name in line)


def test_text_encoders_are_gone_and_the_vae_decodes_a_few_at_a_time(train, monkeypatch):
    """What runs out of memory elsewhere: 9.5 GB of encoders, and the decoding of a whole batch."""
    sizes, real = [], sd3.decode_latents

    def spy(model, latents, batch_size=4):
        assert not model.text_encoders
        vae_decode = model.vae.decode

        def counting(part, **named):
            sizes.append(len(part))
            return vae_decode(part, **named)

        monkeypatch.setattr(model.vae, "decode", counting)
        try:
            before = latents.clone()
            images = real(model, latents, batch_size)
            assert torch.equal(latents, before)  # the seed project went on with the VAE's latents
            return images
        finally:
            monkeypatch.setattr(model.vae, "decode", vae_decode)

    monkeypatch.setattr(script.sd3, "decode_latents", spy)
    train(num_epochs=1, decode_batch_size=3, num_eval_prompts=4)
    assert sizes == [3, 1] * 4  # batches of 4: evaluation, two of the epoch, evaluation


@pytest.mark.slow
def test_settings_arrive_where_they_act(world, tmp_path, monkeypatch):
    runs.assert_settings_arrive(script, world, tmp_path / "run", monkeypatch, samples=4, orders=4, group_size=4, updates_per_epoch=2)


@pytest.mark.slow
def test_only_finished_pictures_are_scored_each_once(train, judge):
    """The seed project scored half-denoised pictures at every step."""
    scored = []

    def count(images, texts):
        scored.append((len(images), images.min() >= 0 and images.max() <= 1, images.shape[1:]))
        return brightness(images, texts)

    judge(count)
    train()
    assert len(scored) == 1 + 2 * 2 + 1  # evaluation, two epochs of two batches, evaluation
    assert all(inside and shape == (3, 32, 32) for _, inside, shape in scored)


# --------------------------------------------------------------------------- the algorithm, in the script


@pytest.mark.slow
def test_a_constant_added_to_all_rewards_changes_nothing(train, judge):
    """Raw rewards as advantages would; a power of two, so that nothing is rounded."""
    judge(lambda images, texts: (brightness(images, texts) * 256).round())
    one = train("one")
    judge(lambda images, texts: (brightness(images, texts) * 256).round() + 1024)
    other = train("other")
    runs.assert_identical(weights(one), weights(other))
    assert runs.values(other, "reward") == [value + 1024 for value in runs.values(one, "reward")]
    judge(lambda images, texts: -(brightness(images, texts) * 256).round())
    opposite = weights(train("opposite"))
    assert not any(torch.equal(value, opposite[name]) for name, value in weights(one).items())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(), dict(loss="nft", window_size=None, window_range=None)], ids=str)
def test_equal_rewards_skip_the_update_as_a_whole(train, judge, live, flags):
    """Momentum and decay would move the weights without any reason to. The schedule goes on: of a line to 0 half is left after epoch 1."""
    judge(lambda images, texts: torch.ones(len(images)))
    out = train(**flags, adam_weight_decay=0.1, lr_scheduler="linear")
    assert runs.values(out, "lr") == pytest.approx([1e-2 / 2, 0])
    assert all(torch.equal(weight, start) for weight, start in zip(live["actor"].weights, live["start"], strict=True))
    assert runs.values(out, "skipped_updates") == [2, 2] and runs.values(out, "no_signal") == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(), dict(loss="guard"), dict(loss="nft", window_size=None, window_range=None, nft_levels=2)])
def test_a_batch_without_advantage_is_not_replayed_and_changes_nothing(train, judge, monkeypatch, flags):
    """Two of an update's three batches have equal rewards: 2 passes of 6, whose gradient is the same to the bit. nft learns from all."""
    calls, losses = [], {"surrogate": script.surrogate, "forward_process": script.forward_process}

    def verdict(images, texts):  # the evaluation, then three batches an epoch
        calls.append(None)
        return brightness(images, texts) * (len(calls) % 3 == 0)

    judge(verdict)
    passes = []
    for name, real in losses.items():
        monkeypatch.setattr(script, name, lambda *given, real=real: passes.append(None) or real(*given))
    flags = flags | dict(num_epochs=2, sample_num_batches_per_epoch=3, updates_per_epoch=1)
    one = train("one", **flags)
    assert len(passes) == 2 * (6 if "nft_levels" in flags else 2)
    calls.clear(), passes.clear()
    monkeypatch.setattr(script.policy, "with_advantage", lambda advantages, batches: torch.ones(batches, dtype=torch.bool))
    other = train("other", **flags)
    assert len(passes) == 2 * 6
    runs.assert_identical(weights(one), weights(other))
    assert runs.values(one, "grad_norm") == runs.values(other, "grad_norm") and min(runs.values(one, "grad_norm")) > 0
    assert runs.values(one, "no_signal") == pytest.approx([2 / 3] * 2)


@pytest.mark.slow
def test_pictures_that_cannot_be_judged_are_left_out(train, judge):
    """NaN for 2 pictures of a batch of 4: counted, and the weights stay finite; all of them: said so."""
    judge(lambda images, texts: torch.where(torch.arange(len(images)) < 2, torch.nan, brightness(images, texts)))
    out = train()
    assert runs.values(out, "unjudged") == [4, 4] and runs.values(out, "no_signal") == [0.5, 0.5]
    assert all(value.isfinite().all() for value in weights(out).values())
    judge(lambda images, texts: torch.full((len(images),), torch.nan))
    with pytest.raises(ValueError, match="could be judged"):
        train("nothing")


def test_bound_window_and_mean_of_an_epoch(train, judge, monkeypatch):
    """A progressive window of two steps in three is 0 1, then 1 2.

    Rewards 0, 1, 3 lie -4/3, -1/3, 5/3 from their mean, and the second batch has equal ones: the deviation of all seven is sqrt(2/3), and
    the bound of 1 is for the outer two. The fourth picture of the first batch is not judged: a loss of 1 is 3/4 / (2 batches x 2 steps)
    in the mean, in each pass of the first.
    """
    windows, advantages, means, calls, backward = [], [], [], [], Accelerator.backward

    def verdict(images, texts):  # the evaluation, then two batches an epoch
        calls.append(None)
        return torch.tensor([0, 1, 3, torch.nan])[: len(images)] if len(calls) % 2 == 0 else torch.full((len(images),), 4 / 3)

    judge(verdict)
    sample, with_advantage = sd3_rollout.sample, policy.with_advantage
    monkeypatch.setattr(sd3_rollout, "sample", lambda *args, **named: windows.append(named["window"]) or sample(*args, **named))
    monkeypatch.setattr(policy, "with_advantage", lambda values, count: advantages.append(values) or with_advantage(values, count))
    monkeypatch.setattr(script, "policy_loss", lambda log_ratio, *rest: log_ratio * 0 + 1)
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: means.append(loss.item()) or backward(self, loss))
    train(window_order="progressive", window_shift_epochs=1, max_advantage=1.0, advantage_std="global", updates_per_epoch=1)
    assert windows == [range(0, 2)] * 2 + [range(1, 3)] * 2
    for values in advantages:
        assert values.tolist() == pytest.approx([-1, -1 / 3 / math.sqrt(2 / 3), 1] + [0] * 5, abs=1e-3)
    assert len(advantages) == 2 and means == [3 / 4 / 4] * 4


@pytest.mark.slow
def test_pictures_of_a_group_may_start_from_the_same_noise(train, monkeypatch):
    """Two epochs of two groups of four, each group drawn in two batches; what their steps add stays each picture's own."""
    drawn, to = [], sd3_rollout.Trajectory.to
    monkeypatch.setattr(sd3_rollout.Trajectory, "to", lambda self, device: drawn.append(self.latents[:, :2].cpu()) or to(self, device))
    train(same_noise=True, sample_batch_size=2, sample_num_batches_per_epoch=4, window_size=1, window_range=(0, 1), num_eval_prompts=1)
    first, second = torch.cat(drawn).unflatten(0, (4, 4)).unbind(2)  # each (groups, K, 16, h, w): the start, and after a step
    assert (first == first[:, :1]).all()
    for values in (first[:, 0], second.flatten(0, 1)):
        assert len({value.sum().item() for value in values}) == len(values)


@pytest.mark.parametrize("loss", ["ppo", "guard"])
def test_an_update_makes_good_steps_likelier_than_bad_ones(train, live, monkeypatch, loss):
    """After one small update, sum of advantage x log-ratio over the very steps that were trained on is above 0; it was 0 before."""
    rollouts, real = {}, script.surrogate

    def spy(actor, rollout, t, condition, *rest):
        rollouts[tuple(rollout.batch.positions), t] = (rollout, condition)
        return real(actor, rollout, t, condition, *rest)

    monkeypatch.setattr(script, "surrogate", spy)
    train(loss=loss, num_epochs=1, updates_per_epoch=1, learning_rate=1e-4, adam_weight_decay=0.0)
    gain = 0.0
    for (_, t), (rollout, condition) in rollouts.items():
        with torch.no_grad():
            step = sd3_rollout.replay(live["actor"].transformer, rollout.trajectory, t, condition)
        gain += (rollout.advantage * step.log_ratio).sum().item()
    assert len(rollouts) == 4 and gain > 0


def actor_with(weights_of, world, tmp_path, **flags):
    """(args, actor, rollout, condition) of a batch that has just been sampled, with an adapter that `weights_of` fills."""
    args = script.parse_args(world.argv(tmp_path / "unit", **(GRPO | flags)))
    run = script.runtime.start(args)
    texts = script.inputs.prepare_texts(run, args, ["a fox"])
    actor = script.policy.Policy(run, args, needs_reference=True)
    weights_of(actor.weights)
    condition = texts.condition(["a fox"] * 4)
    trajectory = sd3_rollout.sample(
        actor.transformer, condition, seed=0, epoch=0, positions=range(4), height=32, width=32,
        sigmas=sd3_rollout.schedule(actor.model, args.num_inference_steps), transition=args.transition, noise_level=args.noise_level,
        window=range(0, 2), keep_means=True,
    )  # fmt: skip
    batch = script.prompts.Batch(list(range(4)), [script.prompts.Prompt("a fox")] * 4, [0] * 4)
    advantage, judged = (part.to(run.device) for part in (torch.zeros(4), torch.ones(4, dtype=torch.bool)))
    rollout = script.policy.Rollout(batch, trajectory, advantage, judged)
    run.finish()
    return args, actor, rollout, condition


def surrogate(args, actor, rollout, t, condition):
    return script.surrogate(actor, rollout, t, condition, None, script.step_factors(args, rollout.trajectory.sigmas), args)


def perturb(parameters):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("flags", [dict(), dict(transition="flow", kl_form="flow_grpo"), dict(full_weights=True)], ids=str)
def test_the_kl_pulls_back_to_the_reference(world, tmp_path, flags):
    """With advantage 0 the KL alone is left: a small step against its gradient lowers it. Elsewhere it stood under no_grad."""
    flags = {name: value for name, value in flags.items()}
    base = dict(rank=None) if "full_weights" in flags else {}
    args, actor, rollout, condition = actor_with(perturb, world, tmp_path, kl_weight=1.0, **(base | flags))
    losses = []
    for _ in range(2):
        loss, logged, step = surrogate(args, actor, rollout, 1, condition)
        losses.append(loss.detach().mean().item())
        torch.testing.assert_close(loss.detach(), logged["kl"].detach())
        loss.mean().backward()
        with torch.no_grad():
            for weight in actor.weights:
                if weight.grad is not None:
                    weight -= 1e-4 * weight.grad / max(weight.grad.norm().item(), 1e-9)
                    weight.grad = None
    assert losses[0] > 0 and losses[1] < losses[0]
    assert torch.equal(step.old_mean, rollout.trajectory.means[:, 1])


def test_kl_to_the_reference_by_hand(world, tmp_path):
    """|mean - base mean|^2 / (2 step_std^2), from two replays of our own; flow_grpo: times |dt|."""
    args, actor, rollout, condition = actor_with(perturb, world, tmp_path, kl_weight=1.0, transition="flow")
    got = surrogate(args, actor, rollout, 1, condition)[1]["kl"]
    with torch.no_grad():
        step = sd3_rollout.replay(actor.transformer, rollout.trajectory, 1, condition)
        with lora.disabled(actor.transformer):
            base = sd3_rollout.replay(actor.transformer, rollout.trajectory, 1, condition)
    expected = ((step.mean - base.mean) ** 2 / (2 * step.step_std**2)).sum((1, 2, 3))
    torch.testing.assert_close(got.detach().float(), expected, rtol=1e-4, atol=0)
    args.kl_form = "flow_grpo"
    scaled = surrogate(args, actor, rollout, 1, condition)[1]["kl"]
    dt = rollout.trajectory.sigmas[1] - rollout.trajectory.sigmas[2]
    torch.testing.assert_close(scaled.detach().float(), expected * dt, rtol=1e-4, atol=0)


def test_guards_surrogate_by_hand(world, tmp_path):
    """With cps s = s' sin(0.4 pi); bars are over the three steps of --window_range, of which the window has two, and one is in neither.

    The log-ratio without its drift is sum z (mean - old mean) / s, z being the noise that was drawn, and the loss
    -A D (exp(that s / mean(s) / D) - 1) mean(d) / d.
    """
    flags = dict(loss="guard", window_range=(0, 3), num_inference_steps=5)
    args, actor, rollout, condition = actor_with(lambda weights: None, world, tmp_path, **flags)
    for _ in range(3):
        perturb(actor.weights)
    rollout, trajectory = replace(rollout, advantage=rollout.advantage.new_tensor([2.0, -1.0, 0.3, 0.5])), rollout.trajectory
    args.clip_nats = 1e9
    sigmas, size = trajectory.sigmas.double(), trajectory.dimensions
    step_std, length = sigmas[1:4] * math.sin(0.4 * math.pi), sigmas[:3] - sigmas[1:4]
    for t in (0, 1):
        loss, logged, step = surrogate(args, actor, rollout, t, condition)
        z = (trajectory.latents[:, t + 1] - step.old_mean) / step.step_std
        linear = (z * (step.mean - step.old_mean) / step.step_std).double().sum((1, 2, 3)) * step_std[t] / step_std.mean()
        expected = -rollout.advantage * size * torch.expm1(linear / size) * length.mean() / length[t]
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logged["drift"], linear, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logged["log_ratio"], step.log_ratio.abs())
        assert (step.log_ratio - linear).abs().max() > 0.1  # the drift is not small here


def test_nfts_loss_by_hand(world, tmp_path):
    """x0 is noised to u, shifted, by noise of its own for each level, epoch and position; the old policy's velocity is not the new one's.

    The KL is the mean square of the velocity's distance from the base model's.
    """
    args, actor, rollout, condition = actor_with(perturb, world, tmp_path, kl_weight=0.5)
    args.nft_strength, args.max_advantage = 0.5, 2.0
    rollout = replace(rollout, advantage=rollout.advantage.new_tensor([2.0, -1.0, 0.0, 0.5]))
    old = ema.Ema(actor.weights, 0.0, warmup=False)
    perturb(actor.weights)
    x0, where, shift = rollout.trajectory.final, (args.seed, 3, range(4)), actor.model.shift
    assert shift != 1
    for level in (0, 1):
        loss, logged = script.forward_process(actor, old, rollout, level, 3, condition, args)
        u = seeds.uniform(*where, f"nft level {level}")
        sigma = (shift * u / (1 + (shift - 1) * u)).float().to(x0.device)
        share = sigma.view(-1, 1, 1, 1)
        x_t = (1 - share) * x0 + share * seeds.normal(*where, f"nft noise {level}", x0.shape[1:], x0.device)
        found = []
        for model in (contextlib.nullcontext(), old.applied(), lora.disabled(actor.transformer)):
            with torch.no_grad(), model:
                found.append(sd3.velocity(actor.transformer, x_t, sigma, condition))
        new, before, base = found
        kl = (new - base).square().mean((1, 2, 3))
        expected = grpo_variants.nft_loss(new, before, x_t, x0, sigma, rollout.advantage, strength=0.5, limit=2.0)
        torch.testing.assert_close(logged["kl"], kl)
        torch.testing.assert_close(loss, expected + 0.5 * kl)
        assert min((new - before).abs().max(), kl.min()) > 1e-3


def test_a_policy_is_made_and_its_window_drawn_as_the_flags_say(monkeypatch):
    added, loaded = [], []
    monkeypatch.setattr(lora, "add", lambda module, **options: added.append(options))
    monkeypatch.setattr(sd3, "load", lambda path, **options: loaded.append((path, options)))
    args = argparse.Namespace(
        full_weights=False, rank=3, lora_alpha=5.0, use_dora=True, lora_layers="attn.to_q", lora_blocks="0-1", quantize_base="int8",
        pretrained_model_name_or_path="some/model", revision="v2", variant="fp16", num_inference_steps=9, window_size=2,
        window_range=(0, 8), window_order="random", window_shift_epochs=25,
    )  # fmt: skip
    policy.adapt(torch.nn.Identity(), args)
    assert added == [dict(rank=3, alpha=5.0, use_dora=True, layers="attn.to_q", blocks="0-1")]
    policy.Policy._load(argparse.Namespace(args=args, run=argparse.Namespace(device="here")), ("vae",), torch.bfloat16)
    options = dict(revision="v2", variant="fp16", dtype=torch.bfloat16, device="here", parts=("vae",), quantized="int8")
    assert loaded == [("some/model", options)]
    one, other = ([policy.window(argparse.Namespace(**vars(args), seed=seed), epoch) for epoch in range(8)] for seed in (1, 2))
    assert one != other


def test_advantages_and_verdicts_go_beside_their_pictures():
    """This process has positions 2, 3 and 6, 7 of eight."""
    batches = [script.prompts.Batch(positions, [], []) for positions in ([2, 3], [6, 7])]
    advantage, judged = torch.arange(8.0), torch.tensor([True, True, True, False, True, True, False, True])
    one, other = policy.rollouts(batches, ["first", "second"], advantage, judged, torch.device("cpu"))
    assert (one.trajectory, one.advantage.tolist(), one.judged.tolist()) == ("first", [2, 3], [True, False])
    assert (other.trajectory, other.advantage.tolist(), other.judged.tolist()) == ("second", [6, 7], [False, True])


@pytest.mark.slow
def test_an_initial_lora_belongs_to_the_reference(train, world, tmp_path):
    """At its start the policy is the reference, KL 0, though both differ from the base model; later it is not. Files may change since."""
    first = train("first", lora_alpha=8.0)
    args, actor, rollout, condition = actor_with(lambda _: None, world, tmp_path, kl_weight=1.0, lora_alpha=8.0, init_lora=first)
    assert surrogate(args, actor, rollout, 1, condition)[1]["kl"].abs().max() == 0
    with torch.no_grad(), lora.disabled(actor.transformer):
        base = sd3_rollout.replay(actor.transformer, rollout.trajectory, 1, condition)
    assert (base.mean - rollout.trajectory.means[:, 1]).abs().max() > 1e-4
    perturb(actor.weights)
    assert surrogate(args, actor, rollout, 1, condition)[1]["kl"].min() > 0
    start = actor.parts(1)["reference"]
    start.load_state_dict({name: value + 1 for name, value in start.state_dict().items()})  # of a checkpoint, from before the file changed
    with actor.reference(), torch.no_grad():
        moved = [weight.clone() for weight in actor.weights]
    assert sum(w.sum().item() for w in moved) == pytest.approx(sum(w.sum().item() + w.numel() for w in weights(first).values()), rel=1e-4)
    second = train("second", lora_alpha=8.0, init_lora=first, checkpointing_epochs=2, kl_weight=0.01)
    held = runs.state(second / "checkpoint-4")["reference"]
    runs.assert_identical(sorted(value.sum().item() for value in held.values()), sorted(v.sum().item() for v in weights(first).values()))


def test_a_policy_that_does_not_replay_what_it_sampled_stops_the_run(train, monkeypatch):
    """Weights that move between sampling and training, as forgotten EMA weights would."""
    collect = script.rewards.Rewards.collect
    actors = []
    real = script.policy.Policy.prepare
    monkeypatch.setattr(script.policy.Policy, "prepare", lambda self, optimizer: (actors.append(self), real(self, optimizer))[1])

    def moving(self):
        perturb(actors[0].weights)
        return collect(self)

    monkeypatch.setattr(script.rewards.Rewards, "collect", moving)
    with pytest.raises(RuntimeError, match="replaying the step that was just sampled.*dropout, autocast or torch.compile"):
        train()


@pytest.mark.slow
def test_the_first_ratio_of_an_epoch_is_checked_even_if_its_first_update_is_skipped(train, judge, monkeypatch):
    """The first of two batches has equal rewards: nothing to learn from it, so that the second is the first to be replayed."""
    monkeypatch.setattr(script.prompts.GroupSampler, "updates", lambda sampler, epoch, count: [[0], [1]])
    checked, calls = [], []

    def verdict(images, texts):  # the evaluation, then two batches an epoch
        calls.append(None)
        return brightness(images, texts) * (len(calls) % 2)

    judge(verdict)
    monkeypatch.setattr(sd3_rollout, "check_on_policy", lambda step, tolerance: checked.append((step.log_ratio.abs().max(), tolerance)))
    out = train(num_epochs=2)
    assert runs.values(out, "skipped_updates") == [1, 1] and checked == [(0, 0)] * 2


@pytest.mark.slow
def test_the_trajectories_of_an_epoch_leave_memory_before_the_next_is_drawn(train, monkeypatch):
    """All but the last that was drawn and the last that was trained on, which variables still name; of 4 batches 3 lie there in the end."""
    sample, drawn, alive = sd3_rollout.sample, [], []

    def counting(*args, **named):
        gc.collect()
        alive.append(sum(kept() is not None for kept in drawn))
        return sample(*args, **named)

    to = sd3_rollout.Trajectory.to

    def moving(trajectory, device):
        moved = to(trajectory, device)
        drawn.append(weakref.ref(moved.latents))
        return moved

    monkeypatch.setattr(sd3_rollout, "sample", counting)
    monkeypatch.setattr(sd3_rollout.Trajectory, "to", moving)
    train(num_epochs=2, sample_num_batches_per_epoch=4)
    assert alive[:4] == [0, 1, 2, 3] and alive[4] <= 2 and max(alive) <= 4, alive


# --------------------------------------------------------------------------- the same tensors


@pytest.mark.slow
def test_rewards_on_a_thread_change_nothing(train):
    one, other = train("one"), train("other", async_rewards=True)
    runs.assert_identical(weights(one), weights(other))
    assert runs.lines(one) == runs.lines(other)


@pytest.mark.slow
def test_same_command_gives_the_same_lora_and_another_seed_another(train):
    first = runs.saved(train("first"))
    runs.assert_identical(runs.saved(train("again")), first)
    other = runs.saved(train("other", seed=1))
    assert not any(torch.equal(value, other[0][name]) for name, value in first[0].items())


@pytest.mark.slow
def test_args_json_repeats_the_run(train, tmp_path):
    first = train("first", seed=None)  # drawn
    runs.train(script, ["--config", str(first / "args.json"), "--output_dir", str(tmp_path / "again")])
    runs.assert_identical(runs.saved(tmp_path / "again"), runs.saved(first))


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(train):
    runs.assert_identical(weights(train("one")), weights(train("other", gradient_checkpointing=True)))


# --------------------------------------------------------------------------- interrupted, resumed, stopped

LONG = dict(
    num_epochs=4, checkpointing_epochs=2, eval_epochs=1, use_ema=True, ema_decay=0.9, lr_scheduler="cosine", kl_weight=0.01,
    eval_scorers="shapes", stop_if_eval_drops=5.0, async_rewards=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Output of the uninterrupted run that resumed ones are compared with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    runs.train(script, world.argv(out, **(GRPO | LONG)))
    return out


def assert_same(whole, parts):
    ended = runs.state(whole / "checkpoint-8")
    assert ended.keys() == {"step", "kinds", "world", "lora", "pace", "optimizer", "ema", "schedule", "log", "evaluator"}
    runs.assert_identical(ended, runs.state(parts / "checkpoint-8"))
    for folder in (".", "raw", "checkpoint-8"):
        runs.assert_identical(runs.saved(whole / folder), runs.saved(parts / folder))
    assert (whole / "samples/step-000008.png").read_bytes() == (parts / "samples/step-000008.png").read_bytes()
    assert runs.lines(whole) == runs.lines(parts)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(train, whole, monkeypatch):
    """Killed while epoch 3 is written down, after the checkpoint of epoch 2."""
    with monkeypatch.context() as patch, pytest.raises(runs.Interrupted):
        runs.interrupt(patch, 6)
        train("parts", **LONG)
    assert_same(whole, train("parts", **LONG, resume_from_checkpoint="latest"))


@pytest.mark.slow
@pytest.mark.parametrize(("where", "epoch"), [("sample", 0), ("sample", 3), ("update", 2)])
def test_sigterm_inside_an_epoch_goes_back_to_its_start(train, whole, monkeypatch, capsys, where, epoch):
    """Stopped after a batch, or after the first pass of the second update: the checkpoint is that of the epoch's beginning, to the bit."""
    with monkeypatch.context() as patch:
        if where == "sample":
            sample = sd3_rollout.sample

            def stopping(*args, **named):
                if named["epoch"] == epoch:
                    os.kill(os.getpid(), signal.SIGTERM)
                return sample(*args, **named)

            patch.setattr(sd3_rollout, "sample", stopping)
        else:
            update, calls = ema.Ema.update, []

            def stopping(self):
                calls.append(None)
                if len(calls) == 2 * epoch + 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return update(self)

            patch.setattr(ema.Ema, "update", stopping)
            replay, after = sd3_rollout.replay, []

            def counting(*args, **named):
                after.extend([None] if len(calls) > 2 * epoch else [])
                return replay(*args, **named)

            patch.setattr(sd3_rollout, "replay", counting)
        parts = train("parts", **LONG)  # returns: the process would exit with 0
        assert where == "sample" or len(after) == 2  # of the policy and its reference; an update has two passes
    assert checkpoint.find_latest(parts).name == f"checkpoint-{2 * epoch}" and not (parts / runs.WEIGHTS).exists()
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    assert_same(whole, train("parts", **LONG, resume_from_checkpoint="latest"))


@pytest.mark.slow
@pytest.mark.parametrize(("where", "stopped_at"), [("collect", 4), ("step", 4), ("sample", 2)])
def test_stopped_with_all_weights_nothing_is_copied_and_nothing_lost(train, monkeypatch, where, stopped_at):
    """27 GB for SD3.5-medium, in every epoch: instead an epoch whose updates have begun is finished, and one that only drew is given up."""
    flags = dict(full_weights=True, rank=None, learning_rate=1e-3, num_epochs=3, checkpointing_epochs=3)
    whole = train("whole", **flags)
    monkeypatch.setattr(checkpoint, "_copied", lambda state: pytest.fail("the weights were copied"))
    with monkeypatch.context() as patch:
        owner = {"collect": script.rewards.Rewards, "step": torch.optim.AdamW, "sample": sd3_rollout}[where]
        called, calls = getattr(owner, where), []

        def stopping(*args, **named):
            calls.append(None)
            if len(calls) == {"collect": 2, "step": 3, "sample": 3}[where]:  # in the second epoch
                os.kill(os.getpid(), signal.SIGTERM)
            return called(*args, **named)

        patch.setattr(owner, where, stopping)
        parts = train("parts", **flags)
    assert checkpoint.find_latest(parts).name == f"checkpoint-{stopped_at}" and not (parts / "model_index.json").exists()
    assert_state(whole, train("parts", **flags, resume_from_checkpoint="latest"))


def assert_state(whole, parts):
    runs.assert_identical(runs.state(whole / "checkpoint-6"), runs.state(parts / "checkpoint-6"))
    assert runs.lines(whole) == runs.lines(parts)


@pytest.mark.slow
def test_the_kl_of_all_weights_starts_at_zero_in_bf16(train, monkeypatch):
    """The reference's weights are in bf16 where autocast would convert them, and there alone: that is the same model."""
    actors = []
    monkeypatch.setattr(policy, "Policy", lambda *args, kind=policy.Policy, **options: actors.append(kind(*args, **options)) or actors[0])
    out = train(full_weights=True, rank=None, mixed_precision="bf16", kl_weight=0.01, updates_per_epoch=1, num_epochs=1)
    assert runs.values(out, "kl") == [0.0]
    reference = actors[0]._copy
    assert reference.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    assert reference.pos_embed.proj.weight.dtype == reference.transformer_blocks[0].attn.norm_q.weight.dtype == torch.float32


@pytest.mark.slow
def test_a_resumed_run_keeps_the_updates_of_an_epoch(train):
    """A checkpoint's number counts optimizer steps: with others an epoch, the run would go on in the wrong place."""
    train(checkpointing_epochs=1)
    with pytest.raises(SystemExit, match="saved with 2 optimizer steps an epoch, this run has 1.*--updates_per_epoch 2 -> 1"):
        train(updates_per_epoch=1, num_epochs=8, resume_from_checkpoint="latest")


def test_a_non_finite_loss_stops_the_run_before_it_is_saved(train, tmp_path, monkeypatch):
    healthy, calls = script.policy_loss, []

    def poisoned(*args):
        calls.append(None)
        return healthy(*args) * (float("nan") if len(calls) == 6 else 1)  # 4 passes an epoch

    monkeypatch.setattr(script, "policy_loss", poisoned)
    with pytest.raises(FloatingPointError, match="step [34]"):
        train(checkpointing_epochs=1, num_epochs=3)
    assert checkpoint.find_latest(tmp_path / "run").name == "checkpoint-2"


def test_a_held_out_measure_that_falls_ends_the_run(train, judge, capsys, monkeypatch):
    """eval/shapes goes 1, 0.9, 0.7 from evaluation to evaluation: more than 20 % below its start after epoch 2 of 6."""
    sequence = iter([1.0, 0.9, 0.7, 0.1])
    current = {}

    def verdict(self, images, texts, metadata=None):
        if self.names == ["shapes"]:
            current["value"] = next(sequence)
        total = images.new_full((len(images),), current["value"]) if self.names == ["shapes"] else brightness(images, texts)
        return Scores(total, {self.names[0]: total})

    monkeypatch.setattr(Mixture, "__call__", verdict)
    out = train(num_epochs=6, eval_epochs=1, eval_scorers="shapes", stop_if_eval_drops=0.2)
    assert runs.values(out, "epoch") == [1, 2] and runs.values(out, "eval/shapes") == pytest.approx([1.0, 0.9, 0.7])
    assert "stopped after epoch 2: shapes fell from 1 to 0.7" in capsys.readouterr().out
    assert (out / runs.WEIGHTS).is_file()


# --------------------------------------------------------------------------- the result, elsewhere


@pytest.mark.slow
def test_stock_diffusers_draws_the_last_evaluation_picture(train, world):
    from diffusers import StableDiffusion3Pipeline

    out = train(learning_rate=0.1, lora_alpha=16.0, eval_num_inference_steps=3)
    pipeline = StableDiffusion3Pipeline.from_pretrained(world.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(height=32, width=32, num_inference_steps=3, guidance_scale=1.0, max_sequence_length=16)
    for step in (0, 4):
        if step:
            pipeline.load_lora_weights(str(out))
        for number, prompt in enumerate(("a red ring", "a green hill")):
            drawn = pipeline(prompt, **options, generator=torch.Generator("cpu").manual_seed(number)).images[0]
            ours = np.asarray(Image.open(out / f"samples/step-{step:06d}/{number:02d}-{number}.png")).astype(int)
            assert np.abs(ours - np.asarray(drawn)).max() <= 1
    first = np.asarray(Image.open(out / "samples/step-000000/00-0.png")).astype(int)
    assert np.abs(first - np.asarray(Image.open(out / "samples/step-000004/00-0.png")).astype(int)).mean() > 1


# --------------------------------------------------------------------------- variants

VARIANTS = {
    "guard": dict(loss="guard", kl_weight=0.01),
    "nft": dict(loss="nft", kl_weight=1e-4, nft_strength=0.5, transition=None, window_size=None, window_range=None),
    "Flow-GRPO": dict(transition="flow", window_size=0, guidance_scale=4.5, kl_weight=0.04, kl_form="flow_grpo", negative_prompt="bad"),
    "precise, progressive": dict(transition="precise", window_order="progressive", window_shift_epochs=1, advantage_std="global"),
    "DoRA, checkpointing": dict(use_dora=True, gradient_checkpointing=True),
    "int8 base": dict(quantize_base="int8", gradient_checkpointing=True, checkpoint_every=2, attention_backend="_native_math"),
    "all weights": dict(full_weights=True, rank=None, learning_rate=1e-3, kl_weight=0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains_every_weight(train, live, name):
    out = train(**VARIANTS[name], adam_weight_decay=0.0)
    still = [weight.shape for weight, start in zip(live["actor"].weights, live["start"], strict=True) if torch.equal(weight, start)]
    assert all(np.isfinite(runs.values(out, "loss"))) and not still
    packed = [module for module in live["actor"].transformer.modules() if isinstance(module, quantize.QuantizedLinear)]
    assert bool(packed) == (name == "int8 base")
    if name == "all weights":
        from diffusers import StableDiffusion3Pipeline

        pipeline = StableDiffusion3Pipeline.from_pretrained(out, torch_dtype=torch.float32)
        runs.assert_identical(pipeline.transformer.state_dict(), live["actor"].transformer.state_dict())


@pytest.mark.slow
def test_nft_samples_with_the_old_policy_which_follows(train, live, monkeypatch):
    """After epoch e the old policy moves by 1 - min(0.25 e, 0.5) towards the new one, and it is what draws the pictures."""
    decays, followed, drawn_with = [], [], []
    update, sample = ema.Ema.update, sd3_rollout.sample

    def noting(self):
        decays.append(self.decay)
        followed.append(self.parameters[1].detach().clone())
        update(self)

    monkeypatch.setattr(ema.Ema, "update", noting)

    def spy(policy, *args, **named):
        drawn_with.append((named["epoch"], live["actor"].weights[1].detach().clone()))
        assert named["transition"] == "ode" and named["noise_level"] is None
        return sample(policy, *args, **named)

    monkeypatch.setattr(sd3_rollout, "sample", spy)
    out = train(loss="nft", num_epochs=3, nft_old_rate=0.25, checkpointing_epochs=3, window_size=None, window_range=None)
    assert decays == [0.25, 0.5, 0.5]
    state = runs.state(out / "checkpoint-6")
    old = live["start"][1]
    for decay, policy_now in zip(decays, followed, strict=True):
        old = decay * old + (1 - decay) * policy_now
    torch.testing.assert_close(state["old"]["average"][1], old.cpu())
    assert not torch.equal(old.cpu(), list(state["lora"].values())[1])
    assert torch.equal(drawn_with[0][1], live["start"][1]) and not torch.equal(drawn_with[-1][1], live["start"][1])
    assert not torch.equal(drawn_with[-1][1], live["actor"].weights[1])


@pytest.mark.slow
def test_guidance_of_the_evaluation_moves_away_from_what_training_does(train, monkeypatch):
    asked, condition = [], script.inputs.Texts.condition
    monkeypatch.setattr(script.inputs.Texts, "condition", lambda self, texts: asked.append(list(texts)) or condition(self, texts))
    train(guidance_scale=3.0, negative_prompt="two cats", eval_guidance_scale=2.0, num_epochs=1)
    assert asked.count(["two cats"]) == 3 and [""] not in asked  # for training, and two evaluations


def test_a_negative_prompt_may_be_for_the_evaluation_alone(world, tmp_path):
    """Training without guidance, which is half the cost, and evaluation with it."""
    args = script.parse_args(world.argv(tmp_path / "out", **GRPO, negative_prompt="blurry", eval_guidance_scale=4.5))
    assert (args.guidance_scale, args.eval_guidance_scale, args.negative_prompt) == (1, 4.5, "blurry")


@pytest.mark.slow
def test_a_negative_prompt_is_one_text_and_counts(train):
    """A trailing comma made it a nested list in the seed project."""
    guided = dict(guidance_scale=3.0, num_epochs=1)
    one, other = train("one", **guided), train("other", **guided, negative_prompt="two cats")
    assert not torch.equal(*(list(weights(out).values())[0] for out in (one, other)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])
def test_adapters_and_optimizer_stay_fp32_under_bf16(train, live, precision):
    """The ratio is 1 in bf16, too: sampling and training run the same kernels (asserted in every epoch)."""
    out = train(mixed_precision=precision, checkpointing_epochs=2, window_range=(0, 2))
    assert {value.dtype for value in weights(out).values()} == {torch.float32}
    assert {p.dtype for p in live["actor"].transformer.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.slow
def test_only_prompts_that_will_be_drawn_are_encoded(train, monkeypatch, capsys):
    """Of 6 prompts an epoch draws 2, and 2 are evaluated: no more than 4, and the one of guidance. Another epoch, resumed, adds its own."""
    encoded, prepare = [], script.inputs.prepare_texts
    monkeypatch.setattr(script.inputs, "prepare_texts", lambda run, args, texts: encoded.append(set(texts)) or prepare(run, args, texts))
    first = dict(num_epochs=1, checkpointing_epochs=1)
    train(**first, dry_run=True)
    planned = int(re.search(r"text cache +(\d+) entries", capsys.readouterr().out)[1])
    train(**first)
    assert len(encoded[0]) == planned <= 5
    train(num_epochs=2, resume_from_checkpoint="latest")
    assert encoded[0] < encoded[1] and len(encoded[1]) <= 7


# --------------------------------------------------------------------------- dry run


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "copies"), [(dict(), 0), (dict(loss="nft", transition=None, window_size=None, window_range=None), 2)])
def test_the_plan_counts_what_lies_aside_while_the_old_policy_is_asked(world, tmp_path, monkeypatch, capsys, flags, copies):
    """nft keeps the old policy, and while that is in the place of the new one, the new one as well: 18 GB of all weights in fp32.

    16 bytes are a trained number, its gradient and two moments; 4 the old policy's. A picture is 4 steps of 1 and 2 trained ones of 3
    forward passes; with nft, 3 trained ones of 3 and the old policy's 1.
    """
    counted, memory = [], script.plan.memory
    monkeypatch.setattr(script.plan, "step_flops", lambda *_, **__: (10**9, 3 * 10**9))
    count = memory.step_memory
    monkeypatch.setattr(memory, "step_memory", lambda *args, **named: counted.append(named["averages"]) or count(*args, **named))
    runs.train(script, world.argv(tmp_path / "out", **(GRPO | flags), dry_run=True))
    assert counted == [copies]
    shown = capsys.readouterr().out
    trained = int(re.search(r"trained +([\d,]+) parameters", shown)[1].replace(",", ""))
    assert f"{trained:,} parameters  {script.plan._size(trained * (16 + 4 * (copies > 0))):>9}" in shown, shown
    assert f"each beside {int(copies > 0)} without gradient" in shown
    assert f"{4 + 3 * 4 if copies else 4 + 2 * 3}.0 forward passes' worth" in shown, shown


@pytest.mark.slow
def test_the_plans_checkpoints_hold_all_weights_and_no_reference(world, tmp_path, capsys):
    """fp32 weights with what is frozen of them, and two moments of what is trained; --kl_weight adds a copy in memory, none on the disk."""
    rows, resident = [], []
    for kl_weight in (0.0, 0.01):
        runs.train(script, world.argv(tmp_path / "out", group_size=4, full_weights=True, kl_weight=kl_weight, dry_run=True))
        lines = capsys.readouterr().out.splitlines()
        rows.append(next(line for line in lines if line.startswith("checkpoints")).split(" each")[0])
        resident.append(next(line for line in lines if line.startswith("  transformer")).split("parameters")[1].strip())
    transformer = sd3.transformer_from_config(str(world.model), None)
    held = sum(tensor.numel() for tensor in transformer.state_dict().values()) * 4
    full.select(transformer)
    moments = sum(p.numel() for p in transformer.parameters() if p.requires_grad) * 8
    assert rows[0] == rows[1] and rows[0].split(maxsplit=1)[1] == script.plan._size(held + moments)
    assert resident == [script.plan._size(held), script.plan._size(2 * held)]


@pytest.mark.slow
def test_dry_run_prints_the_plan_reads_no_weights_and_writes_nothing(world, tmp_path, capsys):
    """4 steps and 2 trained, 8 pictures: 32 passes, 16 with gradient."""
    model = shutil.copytree(world.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    runs.train(script, replace(world, model=model).argv(tmp_path / "out", **GRPO, dry_run=True))
    plan = capsys.readouterr().out
    for part in (
        "6 of ", "2 evaluated every 20 epochs", "8 pictures on one process, in batches of 4; 2 update(s)", "32 forward passes",
        "16 forward and backward passes", "4 in 2 epochs, 16 pictures", "text cache  ", "only while the text cache is filled",
        "kept of 4 picture(s)", "at the peak of a step; scorers come on top", "  decoding   ", ", 4 picture(s) at a time",
    ):  # fmt: skip
        assert part in plan, plan
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_plan_counts_the_groups_of_all_processes(world, tmp_path, monkeypatch, capsys):
    """4 pictures on each of 2 processes are a group of 8, which the check lets pass; those of one process would be half of a group."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = dict(group_size=8, sample_num_batches_per_epoch=1, updates_per_epoch=1, num_epochs=3, num_eval_prompts=1)
    runs.train(script, world.argv(tmp_path / "out", **(GRPO | flags), dry_run=True))
    assert re.search(r"text cache +[45] entries", capsys.readouterr().out)  # "", one prompt an epoch, the evaluated one among them or not


@pytest.mark.slow
def test_decoding_is_the_plans_peak_where_it_takes_more_than_a_step(world, tmp_path, monkeypatch, capsys):
    """A terabyte, beside what is there all the time: weights, optimizer state, no gradient."""
    monkeypatch.setattr(script.plan.memory, "drawing_bytes", lambda args, vae: 10**12)
    runs.train(script, world.argv(tmp_path / "out", **GRPO, dry_run=True))
    shown = capsys.readouterr().out
    assert "1000.00 GB, 4 picture(s) at a time" in shown and "1000.00 GB (931.3 GiB) at the peak of a step" in shown


# --------------------------------------------------------------------------- bad input


def empty(folder):
    (folder / "empty.txt").write_text("\n\n")


BAD = {
    "groups that an epoch cuts": (dict(group_size=3), "--group_size 3", "try"),
    "a group of one": (dict(group_size=1), "--group_size 1", "at least 2"),
    "updates that do not divide the batches": (dict(sample_num_batches_per_epoch=3, group_size=4), "--updates_per_epoch 2", "try 1"),
    "window beyond the steps": (dict(window_range=(0, 4)), "--window_range 0 4", "try --window_range 0 3"),
    "window larger than its range": (dict(window_size=4), "--window_size 4", "1 .. 3"),
    "too few steps": (dict(num_inference_steps=1), "--num_inference_steps", "at least 2"),
    "a ratio of rounding alone": (
        dict(mixed_precision="bf16"),
        "--window_range 0 3: at step 2 rounding to bf16 alone makes an estimated log-ratio of 63 nats with cps, against --clip_nats 0.66",
        "use --window_range 0 2 or --transition flow --clip_nats 6.55 or --loss guard or --mixed_precision no",
    ),
    "no noise": (dict(noise_level=0), "--noise_level", "above 0"),
    "too much noise": (dict(noise_level=1.5), "--noise_level 1.5", "0.8"),
    "packed weights that are trained": (dict(full_weights=True, rank=None, quantize_base="int8"), "--quantize_base int8", "--full_weights"),
    "empty prompt file": (dict(prompts="empty.txt"), "--prompts empty.txt", "holds no prompt"),
    "prompts that do not exist": (dict(prompts="simple_animal"), "--prompts simple_animal", "did you mean simple_animals?"),
    "evaluation prompts that do not exist": (dict(eval_prompts="none.txt"), "--eval_prompts none.txt", "no such file"),
    "scorer that does not exist": (dict(scorer="shape"), "--scorer shape", "did you mean shapes"),
    "OCR without quotes": (dict(scorer="ocr"), "--prompts", "quot"),
    "prompts that the verifier cannot read": (dict(scorer="shapes", prompts="simple_animals"), "--prompts", "red circle"),
    "prompts that the held-out verifier cannot read": (
        dict(eval_scorers="shapes", num_eval_prompts=6),
        "--prompts: shapes cannot judge prompt 3 'two cats'",
        "red circle",
    ),
    "evaluation prompts that it cannot read": (
        dict(eval_scorers="shapes", eval_prompts="simple_animals"),
        "--eval_prompts: shapes cannot judge",
        "red circle",
    ),
    "held-out scorer that is trained on": (dict(eval_scorers="jpeg_incompressibility"), "--eval_scorers", "leave it out"),
    "nothing to hold against": (dict(stop_if_eval_drops=0.1), "--stop_if_eval_drops", "--eval_scorers"),
    "KL form of another transition": (dict(kl_weight=0.1, kl_form="flow_grpo"), "--kl_form flow_grpo", "--kl_form exact"),
    "KL form without KL": (dict(kl_form="flow_grpo", transition="flow"), "--kl_form", "--kl_weight"),
    "transition for DiffusionNFT": (dict(loss="nft", transition="flow"), "--transition flow has no effect", "nft"),
    "one noise for steps without noise": (dict(loss="nft", same_noise=True, window_size=None, window_range=None), "--same_noise", "nft"),
    "DiffusionNFT's options without it": (dict(nft_levels=5), "--nft_levels", "--loss nft"),
    "dropout": (dict(lora_dropout=0.1), "--lora_dropout", "unknown flag"),
    "LoRA options for all weights": (dict(full_weights=True), "--rank 4 has no effect", "--full_weights"),
    "negative prompt without guidance": (
        dict(negative_prompt="bad"),
        "--negative_prompt bad has no effect",
        "without --guidance_scale or --eval_guidance_scale above 1",
    ),
    "progressive only": (dict(window_shift_epochs=5), "--window_shift_epochs", "--window_order progressive"),
    "no such model": (dict(pretrained_model_name_or_path="models/none"), "--pretrained_model_name_or_path", "download.sh"),
    "resolution": (dict(resolution=500), "--resolution", "try 496"),
    "warm-up beyond the end": (dict(lr_scheduler="linear", lr_warmup_steps=4), "--lr_warmup_steps", "4 optimizer steps of --num_epochs 2"),
    "resume from nowhere": (dict(resume_from_checkpoint="none"), "--resume_from_checkpoint none", "no such folder"),
    "unknown flag": (dict(num_epoch=3), "--num_epoch", "--num_epochs"),
}


@pytest.mark.parametrize(("variable", "cure"), [("ACCELERATE_USE_FSDP", "add --full_weights"), ("ACCELERATE_USE_DEEPSPEED", "--multi_gpu")])
def test_a_lora_is_not_spread(world, tmp_path, monkeypatch, capsys, variable, cure):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(SystemExit):
        script.parse_args(world.argv(tmp_path / "out", **GRPO))
    assert cure in capsys.readouterr().err


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_the_cure(world, tmp_path, monkeypatch, capsys, what):
    flags, names, cure = BAD[what]
    monkeypatch.chdir(tmp_path)
    empty(tmp_path)
    before = runs.files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.parse_args(replace(world, cache=Path("cache")).argv(Path("out"), **(GRPO | flags)))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert names in err and cure in err, err
    assert runs.files(tmp_path) == before


@pytest.mark.parametrize(
    "flags",
    [dict(loss="nft", window_size=None, window_range=None), dict(full_weights=True, rank=None),
     dict(optimizer="prodigy", learning_rate=None), dict(lr_scheduler="constant_with_warmup")],
)  # fmt: skip
def test_arguments_read_back_as_they_were_filled_in(world, tmp_path, flags):
    """args.json is a --config that repeats the run: nothing that was filled in may be refused as a flag without effect."""
    args = script.parse_args(world.argv(tmp_path / "out", **(GRPO | dict(num_epochs=10) | flags)))
    (tmp_path / "args.json").write_text(json.dumps(runtime.plain_args(args)))
    again = script.parse_args(["--config", str(tmp_path / "args.json")])
    assert runtime.plain_args(again) == runtime.plain_args(args)
    assert args.lr_warmup_steps == (5 if "lr_scheduler" in flags else 0)  # a quarter of 10 x 2 steps


def test_a_checkpoint_past_the_last_epoch_is_refused_in_epochs(world, tmp_path, capsys):
    folder = tmp_path / "out/checkpoint-5"
    folder.mkdir(parents=True)
    for name in ("state.pt", "args.json"):
        (folder / name).write_text("{}")
    with pytest.raises(SystemExit):
        script.parse_args(world.argv(tmp_path / "out", **GRPO, resume_from_checkpoint="latest"))
    assert "--num_epochs 2: checkpoint-5 is past it already; give at least 3" in capsys.readouterr().err


def test_a_scorer_without_weights_is_refused_with_the_download(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.rewards.scorers, "check", lambda spec, differentiable=False, *, flag, **_: (_ for _ in ()).throw(
        ValueError(f"{flag} {spec}: weights are missing: run bash scripts/download.sh")))  # fmt: skip
    with pytest.raises(SystemExit):
        script.parse_args(world.argv(tmp_path / "out", **GRPO))
    err = capsys.readouterr().err
    assert "download.sh" in err and err.count("\n") == 1


def test_old_names_of_the_sampling_flags_still_work(world, tmp_path):
    argv = world.argv(tmp_path / "out", **(GRPO | dict(num_inference_steps=None, sample_num_steps=6, sample_guidance_scale=2.0)))
    args = script.parse_args(argv)
    assert (args.num_inference_steps, args.guidance_scale) == (6, 2.0)


PRESETS = {  # with their transition, window, guidance and KL
    "one_gpu": ("cps", 3, 1.0, 0.0),
    "flow_grpo": ("flow", 0, 4.5, 0.04),
    "grpo_guard": ("flow", 0, 4.5, 0.0),
    "nft": ("cps", 3, 1.0, 1e-4),  # has no use for the first two
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole_recipes_that_the_command_line_overrules(preset, world, tmp_path, monkeypatch):
    with contextlib.chdir(runs.ROOT):
        monkeypatch.setattr(script.rewards, "check", lambda args: None)  # scorers without weights here
        argv = ["--config", f"scripts/presets/{preset}.yaml", "--pretrained_model_name_or_path", str(world.model), "--resolution", "64",
                "--output_dir", str(tmp_path / "out"), "--report_to", "none"]  # fmt: skip
        args = script.parse_args(argv)
    assert (args.transition, args.window_size, args.guidance_scale, args.kl_weight) == PRESETS[preset] and args.resolution == 64


def test_presets_turn_published_numbers_into_ours():
    """ppo: our log-ratio is D times theirs, and so is the loss. Guard: D / mean(s) times, and its loss D mean(d) / mean(s) times.

    Theirs is a mean over D, times s, and the loss divided by d; ours a sum, times s / mean(s), and the loss times mean(d) / d. s and d are
    those of `flow` at steps 0 to 8: s = c sqrt(d), c = 0.7 sqrt(sigma / (1 - sigma)), where sigma is 1 with the next one in place of the
    second sigma. Published are clips of 1e-4 and 2e-6 (4e-6), a gradient norm of 1 and an epsilon of 1e-8.
    """
    flow_grpo, guard = (yaml.safe_load((runs.ROOT / f"scripts/presets/{name}.yaml").read_text()) for name in ("flow_grpo", "grpo_guard"))
    lengths = [sigma - after for sigma, after in zip(SIGMAS[:9], SIGMAS[1:], strict=True)]
    spreads = [0.7 * math.sqrt(d * sigma / (1 - min(sigma, SIGMAS[1]))) for sigma, d in zip(SIGMAS[:9], lengths, strict=True)]
    size, std = 16 * 64 * 64, sum(spreads) / 9
    loss = size * sum(lengths) / 9 / std
    assert flow_grpo["clip_nats"] == round(1e-4 * size, 2) and flow_grpo["max_grad_norm"] == size
    assert guard["clip_nats"] == round(2e-6 * size / std, 2) and guard["max_grad_norm"] == round(loss)
    assert flow_grpo["adam_epsilon"] == pytest.approx(1e-8 * size) and guard["adam_epsilon"] == pytest.approx(1e-8 * loss, rel=1e-4)
    said = (f"65,536 / {std:.3f}", f"d = {sum(lengths) / 9:.4f}", f"4e-6, {4e-6 * size / std:.2f}")
    text = (runs.ROOT / "scripts/presets/grpo_guard.yaml").read_text()
    assert not [part for part in said if part not in text] and f"{loss:,.0f}" in (runs.ROOT / "docs/grpo.md").read_text()
    passes = {"grpo_guard": 2 * 10 + 9 * 2 * 2.13, "nft": 10 + 9 * (2.13 + 1 + 1), "flow_grpo": 2 * 10 + 9 * 2 * (2.13 + 1)}
    for name, count in passes.items():  # a step of the LoRA is 2.13, guidance doubles, nft asks its old policy, and a KL the reference
        assert f"{count:.0f} forward passes" in (runs.ROOT / f"scripts/presets/{name}.yaml").read_text()
