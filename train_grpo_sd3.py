"""Align Stable Diffusion 3.5 with a reward by GRPO on denoising steps (Flow-GRPO, https://arxiv.org/abs/2505.05470).

Every epoch, with the policy as it is:
  1. rollout    draw K pictures of each of some prompts; inside a window of denoising steps add noise, and keep what was drawn
  2. reward     decode and score the pictures
  3. advantage  reward minus the mean of the K pictures of that prompt, over their standard deviation
  4. update     replay the steps of the window and follow the clipped policy gradient; --kl_weight adds a pull to the base model
                (--loss nft: noise the pictures anew; pull the velocity towards good ones, away from bad ones)

What differs from the paper: a step that keeps the schedule's noise (--transition cps); noise and training in a window of 3 early steps;
no guidance, and no KL unless asked for; clip and KL in nats of the joint probability, which mean the same at any resolution.
scripts/presets/flow_grpo.yaml has the paper's settings, grpo_guard.yaml those of GRPO-Guard (--loss guard), nft.yaml those of DiffusionNFT
(--loss nft), which needs no stochastic step.

  bash scripts/train_aesthetic_rlhf_grpo_lora_sd3.sh                 # SD3.5-medium on one GPU
  TINY=1 bash scripts/train_aesthetic_rlhf_grpo_lora_sd3.sh          # the tiny model against its own verifier, on a CPU
"""

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from src import card, checkpoint, cli, ema, flow, inputs, metrics, optim, plan, policy, rewards, runtime, seeds, speed, transitions
from src.data import prompts
from src.grpo_variants import guard_factors, guarded_log_ratio, nft_batches, nft_decay, nft_loss
from src.pipelines import sd3, sd3_rollout


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    cli.add_grpo_args(parser)
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
    cli.add_run_args(parser, output_dir="outputs/grpo_sd3", epochs=True)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script; whatever can be refused without loading a model is refused here, with exit code 2."""
    return cli.parse(build_parser(), argv, checks=(runtime.check, speed.check, check, policy.check, rewards.check))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for groups, updates and losses that cannot work, before anything is loaded."""
    if args.group_size < 2:
        raise ValueError("--group_size 1: GRPO compares pictures of one prompt; give at least 2, usual are 8 to 24")
    prompts.check_group_size(args.group_size, policy.samples_per_epoch(args))
    if args.sample_num_batches_per_epoch % args.updates_per_epoch:
        raise ValueError(f"--updates_per_epoch {args.updates_per_epoch} does not divide --sample_num_batches_per_epoch "
                         f"{args.sample_num_batches_per_epoch}: every update takes equally many batches; try 1")  # fmt: skip
    if args.loss != "nft":
        policy.check_steps(args, args.updates_per_epoch)
    if args.kl_form == "flow_grpo" and args.transition != "flow":
        raise ValueError(f"--kl_form flow_grpo belongs to --transition flow, got {args.transition}; use --kl_form exact")
    if not args.dry_run:
        checkpoint.check_resume(args.resume_from_checkpoint, args.output_dir, num_epochs=args.num_epochs, updates=args.updates_per_epoch)


# --------------------------------------------------------------------------- the algorithm


def group_advantages(reward: Tensor, groups: Tensor, scale: str = "group", limit: float = 5.0) -> Tensor:
    """Reward minus the mean of its group, over a standard deviation, within +-limit. Source: Flow-GRPO, eq. 4.

    Args:
        reward: (n,), NaN where a picture could not be judged: its advantage is 0, and its group's statistics leave it out.
        groups: (n,) whole numbers; equal ones are pictures of one prompt.
        scale: the deviation of the "group" (the paper), or of all rewards ("global": groups of similar rewards count less).

    Returns:
        (n,) float32, summing to 0 in each group unless the limit binds; all 0 in a group whose rewards are equal.

    Raises:
        ValueError: a group of one, whose advantage would always be 0.
    """
    _, index, size = torch.unique(groups, return_inverse=True, return_counts=True)  # (n,) which group, (groups,) pictures of each
    if (size < 2).any():
        raise ValueError("GRPO compares pictures of one prompt, but a group holds only one: --group_size must be at least 2")
    judged = reward.isfinite()
    values = torch.where(judged, reward, 0).double()

    def group_mean(x: Tensor) -> Tensor:
        total, count = (torch.zeros(len(size), dtype=torch.float64).index_add_(0, index, part) for part in (x, judged.double()))
        return (total / count.clamp_min(1))[index]  # (n,)

    assert scale in ("group", "global"), f"no formula for {scale}"
    centred = torch.where(judged, values - group_mean(values), 0)
    variance = group_mean(centred**2) if scale == "group" else values[judged].var(correction=0)
    return (centred / (variance.sqrt() + 1e-4)).clamp(-limit, limit).float()  # 1e-4: as the authors', for rewards of the order of 1


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


def step_factors(args: argparse.Namespace, sigmas: Tensor) -> dict[int, tuple[float, float]]:
    """Of each step that may be trained: a factor of its log-ratio, and one of its loss; 1 and 1 without guard."""
    steps = range(*args.window_range)
    return guard_factors(args.transition, args.noise_level, sigmas, steps) if args.loss == "guard" else dict.fromkeys(steps, (1.0, 1.0))


def surrogate(
    actor: policy.Policy, rollout: policy.Rollout, t: int, condition: sd3.Conditioning, negative: sd3.Conditioning | None,
    factors: dict[int, tuple[float, float]], args: argparse.Namespace,
) -> tuple[Tensor, dict[str, Tensor], sd3_rollout.Step]:  # fmt: skip
    """Loss (b,) of step t of the window, its metrics, and the step itself."""
    assert args.loss in ("ppo", "guard"), f"no surrogate for {args.loss}"
    trajectory, kl = rollout.trajectory, torch.zeros_like(rollout.advantage)
    if args.kl_weight:  # first, before there is an autograd graph: the reference may swap values into the same parameters
        with actor.reference() as network:
            reference = sd3_rollout.replay(network, trajectory, t, condition, negative)
    step = sd3_rollout.replay(actor.network, trajectory, t, condition, negative)
    log_ratio, (scale, weight) = step.log_ratio, factors[t]  # (b,), numbers
    if args.loss == "guard":
        log_ratio = guarded_log_ratio(log_ratio, step.mean, step.old_mean, step.step_std, scale)
    loss = weight * policy_loss(log_ratio, rollout.advantage, args.clip_nats, trajectory.dimensions)
    if args.kl_weight:
        kl = transitions.kl(step.mean, reference.mean, step.step_std)  # (b,), with gradient
        if args.kl_form == "flow_grpo":
            kl = kl * seeds.send(step.sigma - step.sigma_next, kl.device)
    logged = {"policy_loss": loss, "kl": kl, **policy.ratio_metrics(step.log_ratio, log_ratio, args.clip_nats)}
    return loss + args.kl_weight * kl, logged, step


def forward_process(
    actor: policy.Policy, old_policy: ema.Ema, rollout: policy.Rollout, level: int, epoch: int, condition: sd3.Conditioning,
    args: argparse.Namespace,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """DiffusionNFT's loss (b,) at noise level number `level` of each picture, and its metrics."""
    x0, where = seeds.send(rollout.trajectory.final, condition.embeds.device), (args.seed, epoch, rollout.batch.positions)
    noise = seeds.normal(*where, f"nft noise {level}", x0.shape[1:], x0.device)  # (b, 16, h, w)
    sigma = flow.sigmas(seeds.uniform(*where, f"nft level {level}", x0.device), density="uniform", shift=actor.model.shift)  # (b,)
    x_t, kl = flow.interpolate(x0, noise, sigma), torch.zeros_like(rollout.advantage)
    with torch.no_grad(), old_policy.applied():  # this and the reference before the policy's own pass, as above
        old_velocity = sd3.velocity(actor.transformer, x_t, sigma, condition)
    if args.kl_weight:
        with actor.reference() as network:
            reference = sd3.velocity(network, x_t, sigma, condition)
    velocity = sd3.velocity(actor.network, x_t, sigma, condition)
    if args.kl_weight:
        kl = flow.velocity_loss(velocity, reference)
    options = {"strength": args.nft_strength, "limit": args.max_advantage}
    loss = nft_loss(velocity, old_velocity, x_t, x0, sigma, rollout.advantage, **options)
    return loss + args.kl_weight * kl, {"policy_loss": loss, "kl": kl}


# --------------------------------------------------------------------------- training


def main(args: argparse.Namespace) -> None:
    nft = args.loss == "nft"
    if args.dry_run:
        return plan.show_rollouts(args, updates=args.updates_per_epoch, reference=args.kl_weight > 0, other_passes=int(nft),
                                  trained_steps=args.nft_levels if nft else policy.window_size(args))  # fmt: skip
    run = runtime.start(args)

    # Prompts: those that will be drawn are encoded once; no text encoder stays in memory.
    found = run.require(lambda: rewards.read_prompts(args))
    sampler = prompts.GroupSampler(found.training, group_size=args.group_size, batch_size=args.sample_batch_size, seed=args.seed,
                                   batches_per_epoch=args.sample_num_batches_per_epoch, rank=run.rank, world=run.world)  # fmt: skip
    texts = inputs.prepare_texts(run, args, [args.negative_prompt, *sampler.drawn(args.num_epochs), *found.evaluated])
    negative = texts.condition([args.negative_prompt]) if args.guidance_scale > 1 else None

    # Policy: a LoRA on frozen weights, or all weights. The reference is its start.
    actor = policy.Policy(run, args, needs_reference=args.kl_weight > 0)
    sigmas = sd3_rollout.schedule(actor.model, args.num_inference_steps)  # (T + 1,)
    factors = step_factors(args, sigmas)

    # Optimizer
    updates, total_steps = args.updates_per_epoch, args.num_epochs * args.updates_per_epoch
    optimizer, schedule = actor.tuned.optimizer(total_steps, sampler.samples_per_epoch // updates)
    optimizer = actor.prepare(optimizer)
    average = ema.Ema(actor.weights, args.ema_decay) if args.use_ema else None
    old_policy = ema.Ema(actor.weights, 0.0, warmup=False) if nft else None  # draws nft's pictures

    # What a checkpoint holds, and where the run stands
    log = metrics.Log(run, every=updates, total=total_steps, images_per_add=sampler.samples_per_epoch)
    scoring = rewards.Rewards(run, rewards.build(run, args, args.scorer), background=args.async_rewards)
    evaluator = rewards.Evaluator(run, args, actor.model, texts, found.evaluation, log, scoring.mixture, average=average)
    parts = actor.parts(updates) | {"optimizer": optimizer, "schedule": schedule, "log": log, "evaluator": evaluator}
    parts |= {name: part for name, part in (("ema", average), ("old", old_policy)) if part}
    saver = checkpoint.Checkpointer(run, every=args.checkpointing_epochs * updates, keep=args.checkpoints_total_limit,
                                    parts=parts, write_weights=actor.tuned.writer(average))  # fmt: skip
    first_epoch = saver.resume(args.resume_from_checkpoint) // updates
    if first_epoch == 0:
        evaluator.evaluate(0)

    for epoch in range(first_epoch, args.num_epochs):
        saver.hold(epoch * updates, copy=not args.full_weights)  # a run stopped inside an epoch goes back to its start: docs/scaling.md
        window = range(0) if nft else policy.window(args, epoch)
        batches = sampler.batches(epoch)
        values = defaultdict(list)  # metric -> one value per pass
        trajectories, rollouts, passes = [], [], []  # frees the previous epoch's
        for batch in run.progress(batches, f"epoch {epoch + 1}, pictures"):
            # 1. rollout
            with ema.applied(old_policy):
                trajectory = sd3_rollout.sample(
                    actor.transformer, texts.condition(batch.texts), negative=negative, seed=args.seed, epoch=epoch,
                    positions=batch.positions, noise_keys=batch.groups if args.same_noise else None, sigmas=sigmas,
                    height=args.resolution, width=args.resolution, guidance_scale=args.guidance_scale,
                    transition=args.transition if window else "ode", noise_level=args.noise_level if window else None, window=window,
                    keep_means=args.loss == "guard",
                )  # fmt: skip
            trajectories.append(trajectory.to("cpu"))
            # 2. reward
            scoring.submit(sd3.decode_latents(actor.model, trajectory.final, args.decode_batch_size), batch)
            if run.stop_requested(wait=args.full_weights):
                return rewards.stop(run, saver, scoring)
        scored = scoring.collect()

        # 3. advantage
        advantages = group_advantages(scored.total, scored.groups, args.advantage_std, args.max_advantage)  # (N,)
        rollouts = policy.rollouts(batches, trajectories, advantages, scored.total.isfinite(), run.device)
        teaches = policy.with_advantage(advantages, len(batches)) | (args.kl_weight > 0)  # (batches,)

        # 4. update
        for update, members in enumerate(sampler.updates(epoch, updates)):
            used = nft_batches(members, teaches) if nft else [i for i in members if teaches[i]]  # the gradient of the others is 0
            if not used:
                schedule.step()
                continue
            steps = window or range(args.nft_levels)
            passes = [(rollouts[i], t) for i in used for t in steps]
            for number, (rollout, t) in enumerate(run.progress(passes, f"epoch {epoch + 1}, update {update + 1}")):
                condition = texts.condition(rollout.batch.texts)
                with run.no_sync(actor.network, last=number == len(passes) - 1):
                    if nft:
                        loss, logged = forward_process(actor, old_policy, rollout, t, epoch, condition, args)
                    else:
                        loss, logged, step = surrogate(actor, rollout, t, condition, negative, factors, args)
                        if not values:  # the first pass of an epoch
                            sd3_rollout.check_on_policy(step, sd3_rollout.tolerance(run.weight_dtype, args.compile))
                    run.accelerator.backward((loss * rollout.judged).mean() / (len(members) * len(steps)))  # unused members count as 0
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
        if nft:
            old_policy.decay = nft_decay(epoch + 1, args.nft_old_rate, args.nft_old_decay)
            old_policy.update()

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
    trained_on = f"GRPO on the reward `{args.scorer}`, {log.step // updates} epochs of {sampler.samples_per_epoch} pictures"
    card.write(run, args, kind=actor.kind, prompt=found.training[0].text, trained_on=trained_on)
    run.finish(f"done: {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
