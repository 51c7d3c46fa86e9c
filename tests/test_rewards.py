"""Scores of rollouts, on a thread or not, in the order of positions; and when an evaluation ends a run."""

import argparse
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from src import rewards
from src.data import prompts
from src.scorers import Scores


def mean_colour(images, texts, metadata):
    """Scores that can be told apart: the mean value of a picture, plus what its metadata says; negative prompts are not judged."""
    value = images.mean((1, 2, 3)) + torch.tensor([float(entry.get("bonus", 0)) for entry in metadata])
    value = torch.where(torch.tensor([text == "unreadable" for text in texts]), torch.nan, value)
    return Scores(2 * value, {"brightness": value})


@pytest.fixture
def run():
    """One process of as many as `others` says: their part is joined after ours."""
    return SimpleNamespace(device=torch.device("cpu"), world=1, rank=0, is_main=True, gather=lambda tensor: tensor)


def batch(positions, texts=None, **metadata):
    texts = texts or ["a fox"] * len(positions)
    return prompts.Batch(list(positions), [prompts.Prompt(text, metadata) for text in texts], [position // 2 for position in positions])


def pictures(*values):
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_the_background_thread_takes_this_processs_gpu(run, monkeypatch):
    """A new thread's current GPU is the first one, on which every process of a machine would leave half a gigabyte."""
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    run.device = torch.device("cuda", 3)
    rewards.Rewards(run, mean_colour, background=True)._thread.submit(int).result()
    assert devices == [torch.device("cuda", 3)]


def test_the_gradient_of_hps_is_not_deterministic_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rewards.scorers, "check", lambda *args, **options: None)
    args = argparse.Namespace(scorer="hps=1,clip=1", eval_scorers=None, deterministic=True, dry_run=False)
    monkeypatch.setattr(rewards.cli, "scorer_options", lambda args: {})
    with pytest.raises(ValueError, match="--deterministic: the gradient of hps"):
        rewards.check(args, differentiable=True)


def test_a_plan_names_the_weights_that_the_run_will_need(monkeypatch):
    monkeypatch.setattr(rewards.cli, "scorer_options", lambda args: {})
    args = argparse.Namespace(scorer="jpeg_compressibility", eval_scorers="no_such_scorer")
    (line,) = rewards.lacking(args)
    assert line.startswith("--eval_scorers no_such_scorer: ")
    assert rewards.lacking(argparse.Namespace(scorer="jpeg_compressibility", eval_scorers=None)) == []


@pytest.mark.parametrize("background", [False, True])
def test_scores_come_back_in_the_order_of_positions(run, background):
    scoring = rewards.Rewards(run, mean_colour, background=background)
    scoring.submit(pictures(0.5, 0.25), batch([2, 3]))
    scoring.submit(pictures(0.125, 0.75), batch([0, 1], bonus=1))
    found = scoring.collect()
    assert found.parts["brightness"].tolist() == [1.125, 1.75, 0.5, 0.25]
    assert found.total.tolist() == [2.25, 3.5, 1.0, 0.5] and found.groups.tolist() == [0, 0, 1, 1]
    scoring.submit(pictures(0.0), batch([0]))
    assert scoring.collect().total.tolist() == [0.0]  # the epoch before is forgotten
    for positions in ([0, 0], [1, 2]):  # drawn twice, left out
        scoring.submit(pictures(0.5, 0.25), batch(positions))
        with pytest.raises(AssertionError, match="number the pictures anew"):
            scoring.collect()
        scoring._scored, scoring._positions, scoring._groups = [], [], []
    scoring.close()


def test_several_processes_agree_on_the_order(run):
    """Rank 0 has positions 0, 1 and 4, 5, rank 1 has 2, 3 and 6, 7: gathering joins the ranks, not the batches."""
    ours, theirs = torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])

    def gather(tensor):
        if tensor.ndim == 1:
            return torch.cat([ours, theirs])
        return torch.cat([tensor, torch.stack([theirs.float() / 4, theirs.float() / 8], dim=1)])

    run.gather = gather
    scoring = rewards.Rewards(run, mean_colour, background=False)
    for positions in ((0, 1), (4, 5)):
        scoring.submit(pictures(*(position / 8 for position in positions)), batch(positions))
    found = scoring.collect()
    assert found.parts["brightness"].tolist() == [position / 8 for position in range(8)]
    assert found.total.tolist() == [position / 4 for position in range(8)]


def test_the_thread_works_while_the_caller_goes_on_and_lets_no_more_than_one_batch_wait(run):
    free, scored = threading.Event(), []

    def slow(images, texts, metadata):
        assert free.wait(10)
        scored.append(threading.current_thread().name)
        return mean_colour(images, texts, metadata)

    scoring = rewards.Rewards(run, slow, background=True)
    scoring.submit(pictures(0.0), batch([0]))
    scoring.submit(pictures(0.5), batch([1]))
    assert not scored  # both calls returned before anything was scored
    third = threading.Thread(target=scoring.submit, args=(pictures(1.0), batch([2])))
    third.start()
    time.sleep(0.1)
    assert third.is_alive()  # one batch is being scored, one waits: the third has to
    free.set()
    third.join(10)
    assert scoring.collect().parts["brightness"].tolist() == [0.0, 0.5, 1.0]
    assert set(scored) == {"rewards_0"} != {threading.current_thread().name}
    scoring.close()


def test_an_error_on_the_thread_reaches_the_caller(run):
    def broken(*_):
        raise ValueError("the server is gone")

    scoring = rewards.Rewards(run, broken, background=True)
    scoring.submit(pictures(0.0), batch([0]))
    with pytest.raises(ValueError, match="the server is gone"):
        scoring.collect()


def test_pictures_that_cannot_be_judged_are_counted_and_left_out_of_the_means(run):
    scoring = rewards.Rewards(run, mean_colour, background=False)
    scoring.submit(pictures(0.5, 0.75, 1.0), batch([0, 1, 2], ["a", "unreadable", "b"]))
    found = scoring.collect().metrics()
    assert found == {"reward": 1.5, "reward_std": 0.5, "unjudged": 1, "reward/brightness": 0.75}
    scoring.submit(pictures(0.5), batch([0], ["unreadable"]))
    with pytest.raises(ValueError, match="no picture of this epoch could be judged"):
        scoring.collect()


def test_the_deviation_within_groups_is_not_that_between_them():
    """Group 7 has rewards 1, 3, group 5 has 2, 8: deviations 1 and 3, whose mean is 2. Group 9 has one that was judged, so no deviation."""
    total, groups = torch.tensor([1.0, 2.0, 3.0, 8.0, 4.0, torch.nan]), torch.tensor([7, 5, 7, 5, 9, 9])
    assert rewards.Scored(total, {}, groups).metrics()["group_std"] == 2
    assert "group_std" not in rewards.Scored(total, {}, torch.arange(6)).metrics()  # DDPO: every picture is a group


def test_flags_reach_the_scorers_and_the_reader_of_prompts(monkeypatch):
    """Half of the scorers' memory, and the prompts of a published data set as they were on some day."""
    built, read = [], []
    monkeypatch.setattr(rewards.scorers, "build", lambda spec, **options: built.append((spec, options)))
    monkeypatch.setattr(rewards.cli, "scorer_options", lambda args: {"vlm_url": "here"})
    monkeypatch.setattr(rewards.scorers, "check_prompts", lambda *_: None)
    monkeypatch.setattr(
        rewards.prompts, "read", lambda source, **options: read.append((source, options)) or [prompts.Prompt(source + n) for n in "123"]
    )
    args = argparse.Namespace(
        scorer="clip", eval_scorers=None, scorer_dtype="bf16", scorer_batch_size=3, prompts="some/set", eval_prompts="held.txt",
        num_eval_prompts=2, prompt_column="words", cache_dir="there", prompts_revision="v2",
    )  # fmt: skip
    rewards.build(SimpleNamespace(device="cpu"), args, "clip=1")
    assert built == [("clip=1", dict(device="cpu", dtype=torch.bfloat16, batch_size=3, vlm_url="here"))]
    found = rewards.read_prompts(args)
    assert [prompt.text for prompt in found.training] == ["some/set1", "some/set2", "some/set3"]
    assert found.evaluated == ["held.txt1", "held.txt2"]
    same = dict(column="words", cache_dir="there", revision="v2")
    assert read == [("some/set", same | {"flag": "--prompts"}), ("held.txt", same | {"flag": "--eval_prompts"})]


# --------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_draws_every_prompt_from_the_seed_of_its_number(world):
    """Five prompts in batches of two; picture i has the brightness i / 10 and a bonus of i. On two processes the second draws 3, 4 and,
    to be as long, 4 again: that one is dropped. The first three pictures are kept, in steps of 1/255."""
    asked, inside = [], []

    @contextlib.contextmanager
    def autocast():
        inside.append(None)
        yield
        inside.pop()

    def render(model, denoiser, condition, **options):
        assert model == "model" and denoiser == "denoiser" and inside
        asked.append((condition, options))
        return pictures(*(seed / 10 for seed in options["seeds"]))

    class Model(str):
        denoiser = "denoiser"

    def evaluator(rank, gather):
        found = rewards.Evaluator.__new__(rewards.Evaluator)
        found.args = argparse.Namespace(
            eval_guidance_scale=3.0, negative_prompt="blurry", resolution=32, eval_num_inference_steps=7, decode_batch_size=1,
            num_eval_images=3,
        )  # fmt: skip
        found.run = SimpleNamespace(rank=rank, world=world, gather=gather, accelerator=SimpleNamespace(autocast=autocast))
        found.prompts = [prompts.Prompt(f"prompt {i}", {"bonus": i}) for i in range(5)]
        found.model, found.batch_size, found.mixtures = Model("model"), 2, [mean_colour]
        found.texts = SimpleNamespace(family=SimpleNamespace(render=render), condition=list)
        return found

    parts = []  # of each call of gather, over the ranks
    for rank in range(world):
        sent = []
        evaluator(rank, lambda tensor, sent=sent: sent.append(tensor) or tensor)._draw_and_score()
        parts.append(sent)
    together = iter(map(torch.cat, zip(*parts, strict=True)))
    asked.clear()
    scores, kept = evaluator(0, lambda tensor: next(together))._draw_and_score()
    assert scores["brightness"].tolist() == pytest.approx([i + i / 10 for i in range(5)])
    assert scores["reward"].tolist() == pytest.approx([2 * (i + i / 10) for i in range(5)])
    assert torch.equal(kept, torch.tensor([0, 26, 51]).view(3, 1, 1, 1).expand(3, 3, 4, 4) / 255)  # 25.5 is rounded to the even number
    same = dict(negative=["blurry"], height=32, width=32, num_inference_steps=7, guidance_scale=3.0, batch_size=2, decode_batch_size=1)
    batches = [[0, 1], [2, 3], [4]] if world == 1 else [[0, 1], [2]]
    assert asked == [([f"prompt {i}" for i in batch], same | {"seeds": batch}) for batch in batches]


def test_evaluations_are_due_between_the_first_and_the_last_epoch():
    evaluator = rewards.Evaluator.__new__(rewards.Evaluator)
    evaluator.every, evaluator.rounds, done = 2, 6, []
    evaluator.evaluate = done.append
    for epoch in range(1, 7):
        evaluator.evaluate_if_due(epoch, 10 * epoch)
    assert done == [20, 40]  # the last one, after epoch 6, is `evaluate_last`'s


# --------------------------------------------------------------------------- when an evaluation ends a run


@pytest.mark.parametrize(("name", "limit", "before", "now", "ends"), [
    ("clip", 0.1, 0.25, 0.231, False), ("clip", 0.1, 0.25, 0.229, True),  # usual range 0.15 to 0.35: 0.02
    ("image_reward", 0.1, 0.05, -0.34, False), ("image_reward", 0.1, 0.05, -0.36, True),  # -2 to 2: 0.4, wherever it starts
    ("jpeg_compressibility", 0.05, -20.0, -25.0, False), ("jpeg_compressibility", 0.05, -20.0, -26.0, True),  # -120 to -5: 5.75
    ("clip", 0.05, 0.2, 0.3, False), ("clip", 0.05, 0.2, float("nan"), True), ("clip", None, 0.2, 0.0, False),
])  # fmt: skip
def test_a_held_out_measure_may_fall_by_a_share_of_its_usual_range(name, limit, before, now, ends):
    evaluator = rewards.Evaluator.__new__(rewards.Evaluator)
    evaluator.args = argparse.Namespace(stop_if_eval_drops=limit)
    evaluator.before, evaluator.now = {"shapes": 1.0, name: before}, {"shapes": 1.0, name: now}
    reason = evaluator.dropped()
    assert (reason is not None) is ends
    if ends:
        assert reason.startswith(f"{name} fell from") and f"--stop_if_eval_drops {limit} of its usual range" in reason


def test_a_resumed_run_may_bring_other_held_out_scorers(monkeypatch):
    """The one that was there keeps its start, 0.3; the new one starts with the first evaluation of this run."""
    evaluator = rewards.Evaluator.__new__(rewards.Evaluator)
    evaluator.args = argparse.Namespace(stop_if_eval_drops=0.1)
    evaluator.log = SimpleNamespace(untimed=contextlib.nullcontext, record=lambda step, **means: None)
    evaluator.album, evaluator.average = SimpleNamespace(save=lambda step, pictures: None), None
    evaluator.mixtures = [None, SimpleNamespace(names=["clip", "image_reward"])]
    monkeypatch.setattr(rewards.speed, "as_written", lambda args: contextlib.nullcontext())
    evaluator.load_state_dict({"before": {"clip": 0.3, "hps": 0.2}})
    for clip, image_reward, ends in ((0.29, 1.0, None), (0.29, 0.5, "image_reward fell from 1 to 0.5"), (0.27, 1.0, "clip fell from 0.3")):
        scores = {"reward": torch.ones(2), "clip": torch.full((2,), clip), "image_reward": torch.full((2,), image_reward)}
        evaluator._draw_and_score = lambda scores=scores: (scores, None)
        evaluator.evaluate(4)
        assert (evaluator.dropped() or "").startswith(ends or "") and (evaluator.dropped() is None) is (ends is None)
