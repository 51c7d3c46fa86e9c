"""DDPO: running statistics, order of the steps, the clipped surrogate, and the trainer in this process on the smallest model."""

import argparse
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import runs
import torch
from accelerate import Accelerator

import train_ddpo_sd3 as script
from src import cli, lora, metrics
from src.pipelines import sd3_rollout

pytestmark = pytest.mark.usefixtures("summaries")
NAN = math.nan


@pytest.fixture(scope="module")
def world(tiny_sd3_folder, tmp_path_factory):
    return runs.make_rollouts(tiny_sd3_folder, tmp_path_factory.mktemp("ddpo"))


@pytest.fixture
def train(world, tmp_path):
    """train("name", rank=2, ...) -> output folder of a run with these flags."""

    def run(name: str = "run", **changes) -> Path:
        runs.train(script, world.argv(tmp_path / name, **({"rank": 2, "learning_rate": 1e-2} | changes)))
        return tmp_path / name

    return run


# --------------------------------------------------------------------------- running statistics


def advantages(statistics, texts, rewards, **options):
    return statistics.advantages(texts, torch.tensor(rewards), **options).tolist()


def test_a_prompt_is_compared_with_its_last_rewards_once_it_has_enough():
    """Buffers of 4, used from 2 on.

    Epoch 1: a has 1, 3: mean 2, std 1 -> -1, 1. b has one reward, 5: compared with 1, 3, 5: mean 3, std sqrt(8 / 3) -> 2 / 1.633 = 1.2247.
    Epoch 2: a gets 8: 1, 3, 8: mean 4, std sqrt((9 + 1 + 16) / 3) = 2.9439 -> 4 / 2.9439 = 1.3587.
             b gets 5, 8: 5, 5, 8: mean 6, std sqrt((1 + 1 + 4) / 3) = 1.4142 -> -0.7071, 1.4142.
    """
    statistics = script.PromptStatistics(size=4, least=2)
    assert advantages(statistics, ["a", "b", "a"], [1.0, 5.0, 3.0]) == pytest.approx([-1, 1.2247, 1], abs=1e-4)
    assert advantages(statistics, ["b", "a", "b"], [5.0, 8.0, 8.0]) == pytest.approx([-0.7071, 1.3587, 1.4142], abs=1e-4)


def test_a_full_buffer_forgets_its_oldest_reward():
    """Buffer of 2: after 100, 1, 3 it holds 1, 3: mean 2, std 1; 100 is compared with what is held now: (100 - 2) / 1, limited to 5."""
    statistics = script.PromptStatistics(size=2, least=2)
    assert advantages(statistics, ["a"] * 3, [100.0, 1.0, 3.0]) == pytest.approx([5, -1, 1], abs=1e-5)
    assert statistics.state_dict() == {"rewards": {"a": [1.0, 3.0]}}
    assert advantages(statistics, ["a"] * 3, [0.0, 0.0, 0.0], limit=2.0) == [0, 0, 0]
    assert advantages(statistics, ["a"] * 2, [0.0, 9.0], limit=0.5) == [-0.5, 0.5]


def test_without_statistics_every_picture_is_compared_with_its_epoch():
    """1, 2, 3, 6: mean 3, std sqrt((4 + 1 + 0 + 9) / 4) = 1.8708; an earlier epoch is forgotten."""
    statistics = script.PromptStatistics(size=0, least=2)
    advantages(statistics, ["a"] * 4, [100.0, 200.0, 300.0, 400.0])
    want = [-2 / 1.8708, -1 / 1.8708, 0, 3 / 1.8708]
    assert advantages(statistics, ["a", "a", "b", "b"], [1.0, 2.0, 3.0, 6.0]) == pytest.approx(want, abs=1e-4)
    assert statistics.state_dict() == {"rewards": {}}


def test_a_picture_that_could_not_be_judged_has_no_advantage_and_leaves_no_trace():
    """Of 1, NaN, 3 the mean is 2 and the std 1."""
    statistics = script.PromptStatistics(size=4, least=2)
    assert advantages(statistics, ["a", "a", "a"], [1.0, NAN, 3.0]) == pytest.approx([-1, 0, 1], abs=1e-5)
    assert statistics.state_dict() == {"rewards": {"a": [1.0, 3.0]}}
    assert advantages(script.PromptStatistics(4, 2), ["a", "b"], [NAN, NAN]) == [0, 0]


def test_equal_rewards_teach_nothing():
    statistics = script.PromptStatistics(size=8, least=2)
    for _ in range(2):
        assert advantages(statistics, ["a", "a", "b"], [0.1, 0.1, 0.1]) == [0, 0, 0]


def test_statistics_survive_a_checkpoint(tmp_path):
    one, other = script.PromptStatistics(3, 2), script.PromptStatistics(3, 2)
    advantages(one, ["a", "b", "a", "a", "a"], [1.0, 2.0, 3.0, 4.0, 5.0])
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):  # also the buffers' size
        assert advantages(one, ["a", "b"], [7.0, 9.0]) == advantages(other, ["a", "b"], [7.0, 9.0])
    assert one.state_dict() == other.state_dict() == {"rewards": {"a": [5.0, 7.0, 7.0], "b": [2.0, 9.0, 9.0]}}


def test_statistics_do_not_depend_on_the_order_of_the_prompts_of_an_epoch():
    texts, rewards = ["a", "b", "a", "b", "c"], [1.0, 2.0, 4.0, 8.0, 16.0]
    order = [3, 0, 4, 2, 1]  # a and b keep their own order but for b's two: a full buffer would tell, this one is not
    one = advantages(script.PromptStatistics(8, 2), texts, rewards)
    other = advantages(script.PromptStatistics(8, 2), [texts[i] for i in order], [rewards[i] for i in order])
    assert other == pytest.approx([one[i] for i in order], abs=1e-6)


# --------------------------------------------------------------------------- steps


def test_every_picture_trains_the_steps_in_an_order_of_its_own():
    window = range(2, 6)
    orders = script.shuffled_steps(window, range(50), 4, 0, 7, 0)
    assert orders.shape == (50, 4)
    assert all(sorted(row) == list(window) for row in orders.tolist())
    assert len({tuple(row) for row in orders.tolist()}) > 12  # of 24 orders; 50 draws miss few
    again = script.shuffled_steps(window, [30, 3], 4, 0, 7, 0)
    assert torch.equal(again, orders[[30, 3]]), "an order must not depend on the batch"
    for other in ((1, 7, 0), (0, 8, 0), (0, 7, 1)):  # seed, epoch, inner epoch
        assert not torch.equal(orders, script.shuffled_steps(window, range(50), 4, *other))


def test_a_share_of_the_steps_is_drawn_without_repetition_and_equally_often():
    """2 of 4 steps for 1,000 pictures: each step 500 times, with a standard deviation of sqrt(1000 / 4) = 15.8."""
    steps = script.shuffled_steps(range(4), range(1000), 2, 0, 0, 0)
    assert steps.shape == (1000, 2) and not (steps[:, 0] == steps[:, 1]).any()
    assert all(abs(count - 500) < 4 * 15.8 for count in torch.bincount(steps.flatten()).tolist())


def test_at_ratio_one_the_surrogate_has_the_plain_policy_gradient():
    """A chain of two steps x' = w x + z with known log-probabilities: d loss / d w = -A d log p / d w, whatever D and the clip."""
    w, x, drawn = torch.tensor(0.7, requires_grad=True), torch.tensor([1.0, -0.4]), torch.tensor([0.9, 0.1])
    advantage = torch.tensor([1.5, -0.5])
    log_prob = -((drawn - w * x) ** 2) / 2
    plain = torch.autograd.grad((-advantage * log_prob).sum(), w, retain_graph=True)[0]
    for clip, dimensions in ((0.66, 65_536), (5.0, 1), (1e-3, 10)):
        loss = script.policy_loss(log_prob - log_prob.detach(), advantage, clip, dimensions).sum()
        surrogate = torch.autograd.grad(loss, w, retain_graph=True)[0]
        assert surrogate.item() == pytest.approx(plain.item(), abs=1e-5)
        assert loss.item() == 0


def test_beyond_the_clip_only_the_way_back_has_a_gradient():
    log_ratio = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    script.policy_loss(log_ratio, advantage, 0.5, 1000).sum().backward()
    assert log_ratio.grad[[0, 3]].tolist() == [0, 0]  # better ones more likely, or worse ones less, already by more than the clip
    assert log_ratio.grad[1].item() == pytest.approx(1, abs=2e-3) and log_ratio.grad[2].item() == pytest.approx(-1, abs=2e-3)


# --------------------------------------------------------------------------- the trainer


def test_it_trains_the_adapters_alone_and_leaves_the_documented_files(train, monkeypatch):
    seen = {}

    def adapt(transformer, args):
        original(transformer, args)
        seen.update(transformer=transformer, start={name: p.detach().clone() for name, p in transformer.named_parameters()})

    original = script.policy.adapt
    monkeypatch.setattr(script.policy, "adapt", adapt)
    out = train(num_inner_epochs=2, train_gradient_accumulation_steps=1, checkpointing_epochs=1)
    trained = {id(p) for p in lora.parameters(seen["transformer"])}
    for name, parameter in seen["transformer"].named_parameters():
        assert torch.equal(parameter, seen["start"][name]) != (id(parameter) in trained), name
    assert (out / runs.WEIGHTS).is_file() and (out / "README.md").is_file()
    assert "DDPO on the reward `jpeg_incompressibility`, 2 epochs of 8 pictures" in (out / "README.md").read_text()

    lines = [line for line in runs.lines(out) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8]  # 2 inner epochs x 2 updates
    expected = {"loss", "policy_loss", "log_ratio", "drift", "clip_fraction", "clip_above", "grad_norm", "lr", "epoch", "no_signal",
                "skipped_updates", "reward", "reward_std", "unjudged", "reward/jpeg_incompressibility"}  # fmt: skip
    assert lines[0].keys() == expected | {"step"} and all(metrics.meaning(name) for name in expected)
    assert all(line["log_ratio"] > 0 for line in lines), "from the second update on the policy is not the one that sampled"
    evaluated = [line["step"] for line in runs.lines(out) if "eval_reward" in line]
    assert evaluated == [0, 8]
    state = runs.state(out / "checkpoint-4")
    assert sum(len(values) for values in state["statistics"]["rewards"].values()) == 8
    seen = runs.state(out / "checkpoint-8")["statistics"]["rewards"]
    assert sorted(map(len, seen.values())) == [2, 2, 3, 3, 3, 3]  # 16 pictures: 6 prompts twice, and 4 of them once more


@pytest.mark.slow
def test_settings_arrive_where_they_act(world, tmp_path, monkeypatch):
    flags = dict(num_inner_epochs=2, train_gradient_accumulation_steps=2)
    runs.assert_settings_arrive(script, world, tmp_path / "run", monkeypatch, samples=8, orders=8, **flags)


def test_an_update_makes_good_steps_likelier_than_bad_ones(train, monkeypatch):
    """After one small update, sum of advantage x log-ratio over the very steps that were trained on is above 0; it was 0 before."""
    trained, real = [], script.surrogate

    def spy(actor, rollout, t, condition, *rest):
        trained.append((actor, rollout, t, condition))
        return real(actor, rollout, t, condition, *rest)

    monkeypatch.setattr(script, "surrogate", spy)
    train(num_epochs=1, train_gradient_accumulation_steps=2, learning_rate=1e-4, adam_weight_decay=0.0)
    gain = 0.0
    for actor, rollout, t, condition in trained:
        with torch.no_grad():
            step = sd3_rollout.replay(actor.transformer, rollout.trajectory, t, condition)
        gain += (rollout.advantage * step.log_ratio).sum().item()
    assert len(trained) == 4 and gain > 0


@pytest.mark.slow
def test_a_batch_without_advantage_is_not_replayed_and_changes_nothing(train, monkeypatch):
    """One of an update's two batches has no advantage: 2 passes of 4 in each of 2 inner epochs, and the same gradient to the bit."""
    given, replayed, replay = script.PromptStatistics.advantages, [], sd3_rollout.replay

    def half(self, texts, reward, limit):
        return given(self, texts, reward, limit) * (torch.arange(8) >= 4)

    monkeypatch.setattr(script.PromptStatistics, "advantages", half)
    monkeypatch.setattr(sd3_rollout, "replay", lambda *args: replayed.append(None) or replay(*args))
    flags = dict(num_epochs=1, num_inner_epochs=2, train_gradient_accumulation_steps=2)
    one = train("one", **flags)
    assert len(replayed) == 4
    monkeypatch.setattr(script.policy, "with_advantage", lambda advantages, batches: torch.ones(batches, dtype=torch.bool))
    other = train("other", **flags)
    assert len(replayed) == 4 + 8
    runs.assert_identical(runs.weights(one), runs.weights(other))
    assert runs.values(one, "grad_norm") == runs.values(other, "grad_norm")
    monkeypatch.undo()
    monkeypatch.setattr(script.PromptStatistics, "advantages", half)
    skipping = train("skipping", num_epochs=1, num_inner_epochs=2, train_gradient_accumulation_steps=1, lr_scheduler="linear")
    assert runs.values(skipping, "skipped_updates") == [2] and runs.values(skipping, "lr") == [0]  # the schedule counts them


@pytest.mark.slow
def test_resumed_it_ends_like_an_uninterrupted_run(train, monkeypatch):
    """Everything that has a state: optimizer, schedule, average, statistics that are used already, a random window."""
    flags = dict(num_epochs=4, checkpointing_epochs=2, use_ema=True, lr_scheduler="cosine", num_inner_epochs=2, window_size=1,
                 per_prompt_stat_tracking_min_count=2, per_prompt_stat_tracking_buffer_size=3)  # fmt: skip
    whole = train("whole", **flags)
    runs.interrupt(monkeypatch, step=12)  # epoch 3: after its updates, before its metrics
    with pytest.raises(runs.Interrupted):
        train("cut", **flags)
    monkeypatch.undo()
    cut = train("cut", resume_from_checkpoint="latest", **flags)
    runs.assert_identical(runs.state(whole / "checkpoint-16"), runs.state(cut / "checkpoint-16"))
    assert runs.lines(whole) == runs.lines(cut)
    for folder in (".", "raw"):
        runs.assert_identical(runs.saved(whole / folder), runs.saved(cut / folder))


@pytest.mark.slow
def test_smaller_training_batches_draw_the_same_pictures(train):
    """Drawn 1 at a time they differ by rounding alone; so do the updates, if these take the same pictures: one update an epoch does."""
    one = train("4", num_epochs=1, train_gradient_accumulation_steps=2)
    other = train("1", num_epochs=1, train_batch_size=1, train_gradient_accumulation_steps=8)
    assert runs.values(one, "reward")[0] == pytest.approx(runs.values(other, "reward")[0], rel=1e-5)
    assert runs.values(one, "grad_norm")[0] == pytest.approx(runs.values(other, "grad_norm")[0], rel=1e-3)
    for name, tensor in runs.weights(one).items():
        # Adam's first step is the learning rate times the gradient's sign: rounding may turn a gradient of nearly 0
        assert (tensor - runs.weights(other)[name]).abs().gt(1e-3).float().mean() < 0.02


@pytest.mark.slow
def test_statistics_change_the_update_only_once_they_are_used(train):
    """With 6 prompts and 8 pictures an epoch, no prompt has 16 rewards in 2 epochs: tracking must not matter yet."""
    off = train("off", per_prompt_stat_tracking=False)
    early = train("early")
    used = train("used", per_prompt_stat_tracking_min_count=2)
    runs.assert_identical(runs.weights(off), runs.weights(early))
    assert any(not torch.equal(tensor, runs.weights(used)[name]) for name, tensor in runs.weights(early).items())


@pytest.mark.slow
def test_a_share_of_the_steps_costs_that_share(train, monkeypatch):
    """0.5 of 3 steps are 2: so many passes for each batch of 4 in each of 2 inner epochs. An update has one batch, a loss of 1 is 1/2 in
    each pass. A picture has other steps in its two passes, and pictures, inner epochs and epochs an order of their own."""
    passes, means, backward = [], [], Accelerator.backward
    surrogate = script.surrogate
    monkeypatch.setattr(script, "surrogate", lambda *given: passes.append((given[1].batch.positions, given[2])) or surrogate(*given))
    monkeypatch.setattr(script, "policy_loss", lambda log_ratio, *rest: log_ratio * 0 + 1)
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: means.append(loss.item()) or backward(self, loss))
    train(window_size=0, train_timestep_fraction=0.5, num_inner_epochs=2, train_gradient_accumulation_steps=1, seed=3)
    assert means == [1 / 2] * 16
    orders = []  # of each inner epoch: picture -> its steps
    for start in range(0, 16, 4):
        orders.append({})
        for positions, steps in passes[start : start + 4]:
            for position, step in zip(positions, steps.tolist(), strict=True):
                orders[-1].setdefault(position, []).append(step)
    for order in orders:
        assert sorted(order) == list(range(8)) and all(len(set(steps)) == 2 for steps in order.values())
        assert len(set(map(tuple, order.values()))) > 1
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert orders[0] == dict(enumerate(script.shuffled_steps(range(3), range(8), 2, 3, 0, 0).tolist()))  # the run's seed


def test_a_replay_that_is_not_the_sampled_step_stops_the_run(train, monkeypatch):
    """Weights that change between sampling and training: the ratio is not 1 at the first inner step."""
    to = sd3_rollout.Trajectory.to
    changed = []

    def tampering(trajectory, device):
        changed.append(1)
        return to(trajectory, device)

    adapted = []
    monkeypatch.setattr(script.policy, "adapt", lambda t, a, original=script.policy.adapt: (original(t, a), adapted.append(t)))
    monkeypatch.setattr(sd3_rollout.Trajectory, "to", tampering)
    collect = script.rewards.Rewards.collect

    def shaken(self):
        with torch.no_grad():
            lora.parameters(adapted[0])[1].add_(0.5)
        return collect(self)

    monkeypatch.setattr(script.rewards.Rewards, "collect", shaken)
    with pytest.raises(RuntimeError, match="log-ratio of .* nats"):
        train()
    assert changed


@pytest.mark.slow
def test_the_first_ratio_of_every_epoch_is_checked(train, monkeypatch):
    checked = []
    monkeypatch.setattr(sd3_rollout, "check_on_policy", lambda step, tolerance: checked.append((step.log_ratio.abs().max(), tolerance)))
    train(num_epochs=3, num_inner_epochs=2)
    assert checked == [(0, 0)] * 3


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(train_batch_size=3), "--train_batch_size 3 does not divide --sample_batch_size 4: .* try 1"),
        (dict(train_gradient_accumulation_steps=3), "--train_gradient_accumulation_steps 3 does not divide the 2 batches of 4 .* try 2"),
        (dict(per_prompt_stat_tracking_min_count=40), "--per_prompt_stat_tracking_min_count 40 must lie in 2 .. 32"),
        (dict(per_prompt_stat_tracking_min_count=1), "--per_prompt_stat_tracking_min_count 1 must lie in 2 .. 32, the buffer's size: one"),
        (dict(per_prompt_stat_tracking=False, per_prompt_stat_tracking_buffer_size=8), "--per_prompt_stat_tracking_buffer_size 8 has no"),
        (dict(noise_level=0), "--noise_level must be above 0"),
        (dict(window_range=(0, 4)), "--window_range 0 4 .* of 4 steps the last has no log-probability"),
        (dict(window_size=9), "--window_size 9 must lie in 1 .. 3"),
        (
            dict(mixed_precision="bf16", transition="precise"),
            "--window_range 0 3: at step 2 rounding to bf16 alone makes an estimated log-ratio of 57 nats with precise, against "
            "--clip_nats 0.66; use --window_range 0 2 or --transition flow --clip_nats 6.55 or --mixed_precision no",
        ),
        (
            dict(mixed_precision="bf16", transition="flow", noise_level=0.01, clip_nats=6.55),
            "at step 2 rounding .* 50 nats with flow, against --clip_nats 6.55; "
            "use --window_range 0 2 or --noise_level 0.7 or --mixed_precision no",
        ),
        (dict(train_timestep_fraction=0), "--train_timestep_fraction"),
        (dict(lr_scheduler="linear", lr_warmup_steps=9), "--lr_warmup_steps 9 must be less than the 4 optimizer steps of --num_epochs 2"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(world, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(world.argv(tmp_path / "run", **flags))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_what_rounding_makes_of_the_ratio_by_hand():
    """At 512 px, D = 65,536, by a velocity that is off by 0.01: D (0.01 |B| / step_std)^2 / 2. cps: 0.276 at step 4, 32.2 at step 8,
    1.10 before that: 0.25, 3,390 and 3.9 nats; flow: 1.487 at step 8, 7.2 nats. A side twice as long has four times as many; fp16, whose
    three more bits make the velocity's error an eighth, a 64th."""
    args = paper(window_range=[4, 9])
    nats = script.policy.rounding_nats(args)
    assert nats[[0, 3, 4]].tolist() == pytest.approx([0.25, 3.94, 3390], rel=0.02)
    args.mixed_precision = "fp16"
    assert torch.equal(script.policy.rounding_nats(args), nats / 64)
    args = paper(window_range=[4, 9], resolution=1024, transition="flow", noise_level=0.7)
    assert script.policy.rounding_nats(args)[4].item() == pytest.approx(4 * 7.25, rel=0.01)


def paper(**changes):
    """Ten steps of 512 px, all but the last: the nats are those of the test above."""
    flags = dict(pretrained_model_name_or_path="models/tiny-sd3", num_inference_steps=10, resolution=512, window_range=[0, 9],
                 window_size=0, transition="cps", noise_level=0.8, clip_nats=0.66, mixed_precision="bf16")  # fmt: skip
    return argparse.Namespace(**(flags | changes))


@pytest.mark.parametrize(
    ("flags", "step", "cures"),
    [
        (dict(), 7, "--window_range 0 7 or --transition flow --clip_nats 6.55"),
        (dict(mixed_precision="fp16"), 8, "--window_range 0 8 or --transition flow --clip_nats 6.55"),
        (dict(loss="ppo"), 7, "--window_range 0 7 or --transition flow --clip_nats 6.55 or --loss guard"),
        (dict(window_range=[6, 9]), 7, "--window_range 6 7 or --transition flow --clip_nats 6.55"),
        (dict(window_range=[6, 9], window_size=1), 7, "--window_range 6 7 or --transition flow --clip_nats 6.55"),
        (dict(window_range=[6, 9], window_size=2), 7, "--transition flow --clip_nats 6.55"),  # one step would be left
        (dict(window_range=[7, 8]), 7, "--transition flow --clip_nats 6.55"),
        (dict(noise_level=0.01), 0, "--transition flow --noise_level 0.7 --clip_nats 6.55"),
        (dict(clip_nats=20.0), 8, "--window_range 0 8 or --transition flow"),
        (dict(transition="flow", noise_level=0.7), 7, "--window_range 0 7 or --clip_nats 6.55"),
        (dict(resolution=1024), 5, "--window_range 0 5"),  # flow's last but one has 29 nats there
        (dict(resolution=1024, window_range=[8, 9]), 8, ""),
        (dict(resolution=1024, window_range=[5, 9], window_size=3), 5, ""),
        (dict(resolution=1024, window_range=[8, 9], transition="flow", noise_level=0.7, clip_nats=6.55), 8, ""),
    ],
)
def test_a_refusal_for_rounding_names_only_cures_that_pass(flags, step, cures):
    args = paper(**flags)
    with pytest.raises(ValueError, match=f": at step {step} rounding to {args.mixed_precision} alone makes an estimated log") as refusal:
        script.policy.check_steps(args, updates=2)
    *offered, last = str(refusal.value).partition("; use ")[2].split(" or ")
    assert last == "--mixed_precision no" and " or ".join(offered) == cures
    parser = cli.make_parser("the flags of both trainers")
    cli.add_grpo_args(parser)
    cli.add_rollout_args(parser)
    for cure in offered:
        changed = parser.parse_args(cure.split(), argparse.Namespace(**vars(args)))
        if args.noise_level == cli.NOISE_LEVELS[args.transition]:  # it was unset
            changed.noise_level = cli.NOISE_LEVELS[changed.transition]
        script.policy.check_steps(changed, updates=2)


def test_guidance_is_left_out_of_the_estimate_so_that_public_settings_pass():
    """Flow-GRPO's: guidance 4.5 in 16 bits. Independent errors of its two predictions would make 32.5 x 7.2 nats against 2 x 6.55."""
    for precision in ("bf16", "fp16"):
        flow_grpo = dict(transition="flow", noise_level=0.7, clip_nats=6.55, guidance_scale=4.5, mixed_precision=precision)
        script.policy.check_steps(paper(**flow_grpo), updates=2)


@pytest.mark.parametrize(
    "flags",
    [dict(mixed_precision="no"), dict(window_range=(0, 8)), dict(transition="flow", clip_nats=6.55), dict(clip_nats=100.0),
     dict(train_gradient_accumulation_steps=2)],  # one update an epoch: every ratio is 1
)  # fmt: skip
def test_the_papers_window_is_let_through_where_rounding_does_not_decide(world, tmp_path, flags):
    """Ten steps, all but the last, at 32 px: D = 256, so that 32.2 makes 13 nats against 2 x 0.66, and 1.1 before that 0.02."""
    paper = dict(mixed_precision="bf16", num_inference_steps=10, window_size=0, window_range=(0, 9))
    script.parse_args(world.argv(tmp_path / "run", **(paper | flags)))
    with pytest.raises(SystemExit):
        script.parse_args(world.argv(tmp_path / "run", **paper))


def test_older_programs_flags_keep_working(world, tmp_path):
    argv = [*world.argv(tmp_path / "run", num_inference_steps=None), "--sample_num_steps", "6", "--per_prompt_stat_tracking",
            "--per_prompt_stat_tracking_buffer_size", "48", "--train_batch_size", "2", "--train_gradient_accumulation_steps", "1",
            "--tracker_project_name", "stable_diffusion_training", "--report_to", "tensorboard"]  # fmt: skip
    args = script.parse_args(argv)
    assert (args.num_inference_steps, args.per_prompt_stat_tracking_buffer_size, args.train_batch_size) == (6, 48, 2)
    assert script.batches_per_epoch(args) == 4 and script.updates_per_epoch(args) == 4


def test_what_is_unset_follows_from_the_rest(world, tmp_path):
    args = script.parse_args(world.argv(tmp_path / "run", sample_num_batches_per_epoch=6))
    assert (args.train_batch_size, args.train_gradient_accumulation_steps, script.updates_per_epoch(args)) == (4, 3, 2)
    flags = dict(sample_num_batches_per_epoch=6, num_epochs=10, lr_scheduler="constant_with_warmup")
    warming = script.parse_args(world.argv(tmp_path / "run", **flags))
    assert warming.lr_warmup_steps == 5  # a quarter of 10 x 2 steps
    odd = script.parse_args(world.argv(tmp_path / "run", sample_num_batches_per_epoch=3, num_inner_epochs=2))
    assert (odd.train_gradient_accumulation_steps, script.updates_per_epoch(odd)) == (3, 2)


@pytest.mark.slow
def test_the_plan_counts_what_is_trained(world, tmp_path, capsys):
    flags = dict(window_size=0, train_timestep_fraction=0.34, num_inner_epochs=2, dry_run=True)
    script.main(script.parse_args(world.argv(tmp_path / "run", **flags)))
    plan = capsys.readouterr().out
    assert "8 pictures on one process, in batches of 4; 4 update(s)" in plan
    assert "16 forward and backward passes" in plan  # 8 pictures, 1 of 3 steps, twice
    assert not (tmp_path / "run").exists()


def test_every_flag_that_is_written_reads_back(train):
    """args.json serves as --config of another run."""
    out = train(num_epochs=1)
    saved = json.loads((out / "args.json").read_text())
    args = script.parse_args(["--config", str(out / "args.json"), "--output_dir", str(out.parent / "other")])
    assert args.train_batch_size == saved["train_batch_size"] == 4
