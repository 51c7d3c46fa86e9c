"""Align Stable Diffusion 3.5 with a reward by DDPO, policy gradient over denoising steps (https://arxiv.org/abs/2305.13301).

Every epoch, with the policy as it is:
  1. rollout    draw a picture of each of many prompts; inside a window of denoising steps add noise, and keep what was drawn
  2. reward     decode and score the pictures
  3. advantage  reward minus the mean of the last rewards of that prompt, over their standard deviation
  4. update     --num_inner_epochs times: replay each picture's steps in a random order and follow the clipped policy gradient

What differs from the paper: in place of SD1.5's DDIM step, one of a rectified flow that keeps the schedule's noise (--transition cps);
noise and training in a window of 3 early steps, never in the last step (in all the others, as in the paper: --window_size 0
--window_range 0 9 --transition flow --clip_nats 6.55); no guidance; clip in nats of the joint probability. What differs from
train_grpo_sd3.py: no groups, but running statistics of each prompt; no KL.

  bash scripts/train_aesthetic_ddpo_sd3.sh                           # SD3.5-medium on one GPU
  TINY=1 bash scripts/train_aesthetic_ddpo_sd3.sh                    # the tiny model, pictures that JPEG compresses well, on a CPU
"""

import argparse
import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from src import card, checkpoint, cli, ema, inputs, metrics, optim, plan, policy, rewards, runtime, seeds, speed
from src.data import prompts
from src.pipelines import sd3, sd3_rollout


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    cli.add_ddpo_args(parser)
    cli.add_prompt_args(parser)
    cli.add_scorer_args(parser, default="aesthetic")
    cli.add_rollout_args(parser)
    cli.add_eval_args(parser, rewards.judges)
    cli.add_text_args(parser)
    cli.add_model_args(parser)
    cli.add_speed_args(parser, graphs=False)
    cli.add_lora_args(parser, rank=32, alpha_per_rank=2, dropout=False)
    cli.add_optimization_args(parser, learning_rate=3e-4, weight_decay=1e-4, ema_decay=0.987)
    cli.add_policy_args(parser)
    cli.add_run_args(parser, output_dir="outputs/ddpo_sd3", epochs=True)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script; whatever can be refused without loading a model is refused here, with exit code 2."""
    return cli.parse(build_parser(), argv, checks=(runtime.check, speed.check, check, policy.check, rewards.check))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for batches, updates and statistics that cannot work, before anything is loaded."""
    if args.sample_batch_size % args.train_batch_size:
        raise ValueError(f"--train_batch_size {args.train_batch_size} does not divide --sample_batch_size {args.sample_batch_size}: a "
                         "step must be scored in the batch that it was drawn in; try 1")  # fmt: skip
    batches = batches_per_epoch(args)
    if batches % args.train_gradient_accumulation_steps:
        raise ValueError(f"--train_gradient_accumulation_steps {args.train_gradient_accumulation_steps} does not divide the {batches} "
                         f"batches of {args.train_batch_size} of an epoch: every update takes equally many; try {batches}")  # fmt: skip
    size, least = args.per_prompt_stat_tracking_buffer_size, args.per_prompt_stat_tracking_min_count
    if args.per_prompt_stat_tracking and not 2 <= least <= size:
        raise ValueError(f"--per_prompt_stat_tracking_min_count {least} must lie in 2 .. {size}, the buffer's size: one reward has no "
                         "deviation, and a buffer never holds more than its size")  # fmt: skip
    policy.check_steps(args, updates_per_epoch(args))
    if not args.dry_run:
        checkpoint.check_resume(args.resume_from_checkpoint, args.output_dir, num_epochs=args.num_epochs, updates=updates_per_epoch(args))


def batches_per_epoch(args: argparse.Namespace) -> int:
    """Batches of --train_batch_size pictures in an epoch; pictures are also drawn in these."""
    return args.sample_num_batches_per_epoch * args.sample_batch_size // args.train_batch_size


def updates_per_epoch(args: argparse.Namespace) -> int:
    """Optimizer steps in an epoch."""
    return args.num_inner_epochs * (batches_per_epoch(args) // args.train_gradient_accumulation_steps)


# --------------------------------------------------------------------------- the algorithm


class PromptStatistics:
    """The last rewards of each prompt, and advantages relative to them; a part of a checkpoint.

    Source: arXiv 2305.13301 (rewards normalised for each prompt); buffer and least count as in its authors' code.

    Args:
        size: number of rewards kept per prompt; 0: none, every picture is compared with those of its epoch.
        least: a prompt with fewer is compared with the epoch's pictures.
    """

    def __init__(self, size: int, least: int):
        self.size, self.least = size, least
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, texts: Sequence[str], reward: Tensor, limit: float = 5.0) -> Tensor:
        """Store the rewards of an epoch; return reward minus mean, over standard deviation, within +-limit, (n,) float32.

        Args:
            texts: n prompts, those of all processes, so that all keep the same statistics.
            reward: (n,), NaN where a picture could not be judged: its advantage is 0, and it is not stored.
        """
        values = [value if math.isfinite(value) else None for value in reward.double().tolist()]
        for text, value in zip(texts, values, strict=True):
            if self.size and value is not None:
                self.rewards.setdefault(text, deque(maxlen=self.size)).append(value)
        epoch = _mean_and_std([value for value in values if value is not None])
        known = {text: _mean_and_std(own) for text, own in self.rewards.items() if len(own) >= self.least}
        found = []
        for text, value in zip(texts, values, strict=True):
            mean, std = known.get(text, epoch)
            found.append(0.0 if value is None else (value - mean) / (std + 1e-6))  # 1e-6: as the authors'
        return torch.tensor(found).clamp(-limit, limit)

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": {text: list(values) for text, values in self.rewards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards = {text: deque(values, maxlen=self.size) for text, values in state["rewards"].items()}


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / max(1, len(values))
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values)))


def shuffled_steps(window: range, positions: Sequence[int], count: int, seed: int, *keys: int) -> Tensor:
    """`count` different steps of the window for each picture, in an order of its own: (b, count), a function of (seed, keys, position)."""
    orders = [torch.randperm(len(window), generator=seeds.generator(seed, "steps", *keys, position)) for position in positions]
    return window.start + torch.stack(orders)[:, :count]


# twin: policy-loss
def policy_loss(log_ratio: Tensor, advantage: Tensor, clip_nats: float, dimensions: int) -> Tensor:
    """PPO's clipped surrogate for steps of D dimensions, to be minimised: (b,), with gradient -advantage * grad log p at ratio 1.

    The ratio is exp(log_ratio / D), clipped to exp(+-clip_nats / D), and the loss is times D: so it does not depend on the resolution.
    It is written relative to ratio 1, a constant shift: a difference of two numbers near D would have only two correct digits.

    Args:
        log_ratio: (b,), nats, of a step's joint probability under the current and under the sampling policy. advantage: (b,).

    Source: Flow-GRPO, eq. 5, whose log-probabilities are means over dimensions, too.
    """
    gain = dimensions * torch.expm1(log_ratio / dimensions)
    clipped = dimensions * torch.expm1(log_ratio.clamp(-clip_nats, clip_nats) / dimensions)
    return torch.maximum(-advantage * gain, -advantage * clipped)


# end twin


def surrogate(
    actor: policy.Policy, rollout: policy.Rollout, t: Tensor, condition: sd3.Conditioning, negative: sd3.Conditioning | None,
    clip_nats: float,
) -> tuple[Tensor, dict[str, Tensor], sd3_rollout.Step]:  # fmt: skip
    """Loss (b,) of step t (b,) of each picture, its metrics, and the step itself."""
    step = sd3_rollout.replay(actor.network, rollout.trajectory, t, condition, negative)
    loss = policy_loss(step.log_ratio, rollout.advantage, clip_nats, rollout.trajectory.dimensions)
    return loss, {"policy_loss": loss, **policy.ratio_metrics(step.log_ratio, step.log_ratio, clip_nats)}, step


# --------------------------------------------------------------------------- training


def main(args: argparse.Namespace) -> None:
    updates = updates_per_epoch(args)
    turns = max(1, round(args.train_timestep_fraction * policy.window_size(args)))  # steps of each picture per inner epoch
    if args.dry_run:
        return plan.show_rollouts(args, updates=updates, reference=False, trained_steps=turns * args.num_inner_epochs)
    run = runtime.start(args)

    # Prompts: those that will be drawn are encoded once; no text encoder stays in memory.
    found = run.require(lambda: rewards.read_prompts(args))
    sampler = prompts.GroupSampler(found.training, group_size=1, batch_size=args.train_batch_size, seed=args.seed,
                                   batches_per_epoch=batches_per_epoch(args), rank=run.rank, world=run.world)  # fmt: skip
    texts = inputs.prepare_texts(run, args, [args.negative_prompt, *sampler.drawn(args.num_epochs), *found.evaluated])
    negative = texts.condition([args.negative_prompt]) if args.guidance_scale > 1 else None

    # Policy: a LoRA on frozen weights, or all weights.
    actor = policy.Policy(run, args, needs_reference=False)
    sigmas = sd3_rollout.schedule(actor.model, args.num_inference_steps)  # (T + 1,)

    # Optimizer
    total_steps = args.num_epochs * updates
    update_size = args.train_batch_size * args.train_gradient_accumulation_steps * run.world
    optimizer, schedule = actor.tuned.optimizer(total_steps, update_size)
    optimizer = actor.prepare(optimizer)
    average = ema.Ema(actor.weights, args.ema_decay) if args.use_ema else None

    # What a checkpoint holds, and where the run stands
    log = metrics.Log(run, every=updates, total=total_steps, images_per_add=sampler.samples_per_epoch)
    scoring = rewards.Rewards(run, rewards.build(run, args, args.scorer), background=args.async_rewards)
    evaluator = rewards.Evaluator(run, args, actor.model, texts, found.evaluation, log, scoring.mixture, average=average)
    tracked = args.per_prompt_stat_tracking_buffer_size if args.per_prompt_stat_tracking else 0
    statistics = PromptStatistics(tracked, args.per_prompt_stat_tracking_min_count)
    parts = actor.parts(updates) | {"optimizer": optimizer, "schedule": schedule, "log": log, "evaluator": evaluator}
    parts |= {name: part for name, part in (("ema", average), ("statistics", statistics)) if part}
    saver = checkpoint.Checkpointer(run, every=args.checkpointing_epochs * updates, keep=args.checkpoints_total_limit,
                                    parts=parts, write_weights=actor.tuned.writer(average))  # fmt: skip
    first_epoch = saver.resume(args.resume_from_checkpoint) // updates
    if first_epoch == 0:
        evaluator.evaluate(0)

    # An epoch has `updates` optimizer steps, here called rounds, equally many in each inner epoch. A round has one of its `passes`,
    # forward and backward, for each batch and turn; `steps` gives each picture its own denoising step for each turn.
    for epoch in range(first_epoch, args.num_epochs):
        saver.hold(epoch * updates, copy=not args.full_weights)  # a run stopped inside an epoch goes back to its start: docs/scaling.md
        window = policy.window(args, epoch)
        batches = sampler.batches(epoch)
        values = defaultdict(list)  # metric -> one value per pass
        trajectories, rollouts, passes = [], [], []  # frees the previous epoch's
        for batch in run.progress(batches, f"epoch {epoch + 1}, pictures"):
            # 1. rollout
            trajectory = sd3_rollout.sample(
                actor.transformer, texts.condition(batch.texts), negative=negative, seed=args.seed, epoch=epoch,
                positions=batch.positions, sigmas=sigmas, height=args.resolution, width=args.resolution,
                guidance_scale=args.guidance_scale, transition=args.transition, noise_level=args.noise_level, window=window,
            )  # fmt: skip
            trajectories.append(trajectory.to("cpu"))
            # 2. reward
            scoring.submit(sd3.decode_latents(actor.model, trajectory.final, args.decode_batch_size), batch)
            if run.stop_requested(wait=args.full_weights):
                return rewards.stop(run, saver, scoring)
        scored = scoring.collect()

        # 3. advantage
        advantages = statistics.advantages(sampler.texts(epoch), scored.total, args.max_advantage)  # (N,)
        rollouts = policy.rollouts(batches, trajectories, advantages, scored.total.isfinite(), run.device)
        teaches = policy.with_advantage(advantages, len(batches))  # (batches,)

        # 4. update
        inner_epochs = range(args.num_inner_epochs)
        rounds = [(inner, members) for inner in inner_epochs  # inner epoch, and numbers of the batches, of each update
                  for members in sampler.updates(epoch * len(inner_epochs) + inner, updates // len(inner_epochs))]  # fmt: skip
        for update, (inner, members) in enumerate(rounds):
            used = [i for i in members if teaches[i]]  # the gradient of the others is 0
            if not used:
                schedule.step()
                continue
            steps = {i: shuffled_steps(window, batches[i].positions, turns, args.seed, epoch, inner) for i in used}  # each (b, turns)
            passes = [(rollouts[i], steps[i][:, turn]) for i in used for turn in range(turns)]
            for number, (rollout, t) in enumerate(run.progress(passes, f"epoch {epoch + 1}, update {update + 1}")):
                condition = texts.condition(rollout.batch.texts)
                with run.no_sync(actor.network, last=number == len(passes) - 1):
                    loss, logged, step = surrogate(actor, rollout, t, condition, negative, args.clip_nats)
                    if not values:  # the first pass of an epoch
                        sd3_rollout.check_on_policy(step, sd3_rollout.tolerance(run.weight_dtype, args.compile))
                    run.accelerator.backward(loss.mean() / (len(members) * turns))  # 0 of pictures that were not judged
                for name, value in {"loss": loss, **logged}.items():
                    values[name].append(value.detach().mean())
                if not args.full_weights and run.stop_requested():  # with --full_weights the epoch is finished: 27 GB and more to copy
                    return rewards.stop(run, saver, scoring)
            values["grad_norm"].append(run.clip_gradients(actor.weights, args.max_grad_norm))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if average:
                average.update()

        # twin: rl-tail
        done = (epoch + 1) * updates
        log.add(**{name: torch.stack(value).mean() for name, value in values.items()})
        log.write(done, lr=optim.rate(schedule), epoch=epoch + 1, no_signal=(advantages == 0).float().mean().item(),
                  skipped_updates=updates - len(values["grad_norm"]), **scored.metrics())  # fmt: skip
        evaluator.evaluate_if_due(epoch + 1, done)
        saver.save_if_due(done)
        if reason := evaluator.dropped():
            run.print(f"stopped after epoch {epoch + 1}: {reason}")
            break
        # end twin

    actor.tuned.save_result(actor.model.path, average)
    evaluator.evaluate_last(log.step)
    trained_on = f"DDPO on the reward `{args.scorer}`, {log.step // updates} epochs of {sampler.samples_per_epoch} pictures"
    card.write(run, args, kind=actor.kind, prompt=found.training[0].text, trained_on=trained_on)
    run.finish(f"done: {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
