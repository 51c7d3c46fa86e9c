"""Align Stable Diffusion 1.5, 2.x-base or XL with a reward by its gradient: ReFL (ImageReward, https://arxiv.org/abs/2304.05977).

Every optimizer step:
  1. rollout    denoise pure noise, without gradient, up to a late step that is drawn anew for each picture
  2. predict    take this step with gradient, straight to the clean latents
  3. reward     decode and score the picture; the loss is relu(threshold - reward), or minus the reward
  4. pretrain   add the denoising loss of captioned pictures, which holds the model back (with --pretrain_dataset_name)
  5. update     clipped gradient, AdamW on the UNet or its LoRA

--method draft follows the gradient through the last K real sampling steps (DRaFT-K, https://arxiv.org/abs/2309.17400), draft_lv through
the last one, for the picture and for re-noised copies of it.

What differs from the paper's code: guidance in the rollout, as pictures are drawn later; noise and late step are each picture's own, on
every process; the UNet gets the late step's timestep, not its index; clamping passes on the gradient of saturated pixels; decoder and
scorers compute in fp32; the pre-training loss is there.

  bash scripts/train_refl_v1_5.sh                                    # SD1.5 against ImageReward on one GPU
  TINY=1 bash scripts/train_refl_v1_5.sh                             # the tiny model against a tiny CLIP, minutes on a CPU
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from src import card, checkpoint, cli, ddpm, ema, inputs, metrics, optim, plan, rewards, runtime, seeds, speed, tuned, unet
from src.data import prompts
from src.pipelines import sd15, sd15_rollout
from src.pipelines.common import evaluating

KINDS = {"refl": "ReFL", "draft": "DRaFT", "draft_lv": "DRaFT-LV"}  # by --method


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    cli.add_refl_args(parser)
    cli.add_prompt_args(parser)
    cli.add_scorer_args(parser, default="image_reward")
    cli.add_eval_args(parser, rewards.judges, steps=50, guidance_scale=7.5, inference_steps=25)
    cli.add_lora_args(parser, unet=True)
    cli.add_model_args(parser, default="models/stable-diffusion-v1-5")
    cli.add_speed_args(parser, unet=True, graphs=False)
    cli.add_data_args(parser, resolution=None, pretrain=True)
    cli.add_optimization_args(parser, learning_rate=1e-5, lora_learning_rate=1e-4)
    cli.add_budget_args(parser, max_train_steps=100)
    cli.add_run_args(parser, output_dir="outputs/refl_sd15")
    unet.add_defaults(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script; whatever can be refused without loading a model is refused here, with exit code 2."""
    return cli.parse(build_parser(), argv, checks=(runtime.check, speed.check, check))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for steps, scorers, models or data that cannot work, before anything is loaded."""
    steps = args.num_inference_steps
    if args.method == "refl" and not args.mid_range[0] <= args.mid_range[1] < steps:
        first, last = args.mid_range
        raise ValueError(f"--mid_range {first} {last} must name steps of 0 .. {steps - 1} in order (--num_inference_steps {steps}); "
                         f"try --mid_range {min(3 * steps // 4, steps - 1)} {steps - 1}")  # fmt: skip
    if args.method == "draft" and args.draft_k > steps:
        raise ValueError(f"--draft_k {args.draft_k} is more than --num_inference_steps {steps}; try --draft_k 1")
    sd15_rollout.check_steps(steps)
    inputs.check_pretraining(args, sd15)
    rewards.check(args, differentiable=True)
    unet.check(args)


# --------------------------------------------------------------------------- the algorithm


def clean_latents(
    predict: sd15_rollout.Predict, x_t: Tensor, first: Tensor, timetable: sd15_rollout.Timetable, draw: sd15_rollout.Draw, *,
    method: str, num_renoised: int = 0,
) -> Iterator[Tensor]:  # fmt: skip
    """Clean latents (b, 4, h, w) with a gradient to the policy; run backward on each before taking the next: one graph at a time.

    refl and draft_lv jump from step `first` to the clean latents, draft takes the remaining steps. Then a jump from each of num_renoised
    copies, noised back to that last step.
    Source: ImageReward, algorithm 1; DRaFT, section 3.

    Args:
        predict: the policy, with gradient. x_t: (b, 4, h, w) before step `first`, from the rollout, a constant.
        first: (b,) whole numbers on the CPU: the step where gradients begin, in draft and draft_lv the same for all.
    """
    last = len(timetable) - 1
    if method == "draft":
        for i in range(int(first[0]), last):  # several steps would not fit into memory: each is recomputed in the backward pass
            noise = sd15_rollout.step_noise(i, timetable, draw)
            x_t = recomputed(sd15_rollout.denoise, predict, x_t, i, timetable, noise, use_reentrant=False)
        first = torch.full_like(first, last)
    x0 = sd15_rollout.jump(predict, x_t, first, timetable)
    picture = x0.detach()
    yield x0
    for n in range(num_renoised):
        renoised = ddpm.add_noise(picture, draw(f"renoise {n}"), timetable.alphas[seeds.send(first, picture.device)])
        yield sd15_rollout.jump(predict, renoised, first, timetable)


def first_steps(args: argparse.Namespace, where: tuple[int, int, list[int]]) -> Tensor:
    """The step of each picture where gradients begin, (b,) on the CPU; where: seed, optimizer step, positions."""
    if args.method == "refl":
        first, last = args.mid_range
        return first + (seeds.uniform(*where, "late step") * (last - first + 1)).long()
    return torch.full((len(where[2]),), args.num_inference_steps - (args.draft_k if args.method == "draft" else 1))


def straight_through_clamp(images: Tensor) -> Tensor:
    """Images (b, 3, H, W) clamped to [0, 1], with the gradient of the unclamped ones: a saturated pixel still learns."""
    return images.clamp(0, 1).detach() + (images - images.detach())


def decode(model: sd15.SD15, x0: Tensor, batch_size: int) -> Tensor:
    """Images (b, 3, H, W) in [0, 1] of clean latents, in the VAE's own precision, some at a time.

    The backward pass recomputes each batch but the last, which comes first there: it holds the activations of one batch at a time.
    """
    *early, last = x0.split(batch_size)
    parts = [recomputed(sd15.decode_pixels, model, part, use_reentrant=False, preserve_rng_state=False) for part in early]
    return straight_through_clamp(torch.cat([*parts, sd15.decode_pixels(model, last)]) * 0.5 + 0.5)


def reward_loss(reward: Tensor, threshold: float | None) -> Tensor:
    """relu(threshold - reward) of each picture, or minus its reward: (b,). Source: ImageReward, algorithm 1, with relu(2 - r)."""
    return -reward if threshold is None else F.relu(threshold - reward)


# --------------------------------------------------------------------------- the policy


def predictor(
    run: runtime.Run, policy: torch.nn.Module, condition: sd15.Conditioning, negative: sd15.Conditioning | None, guidance_scale: float
) -> sd15_rollout.Predict:
    """How the policy predicts noise for these prompts: towards them and away from `negative` (1, L, D), or without guidance if None."""
    text = condition if negative is None else sd15.Conditioning.cat([negative.expand(len(condition)), condition])  # (b or 2b, L, D)
    copies = 1 if negative is None else 2

    def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
        with run.accelerator.autocast():  # no wider: autocast caches cast weights, and those cached by the rollout have no gradient
            noise = sd15.eps(policy, x_t.repeat(copies, 1, 1, 1), timestep.repeat(copies), text)
        if negative is None:
            return noise
        away, towards = noise.chunk(2)
        return away + guidance_scale * (towards - away)

    return predict


@contextmanager
def sampling(run: runtime.Run, policy: torch.nn.Module) -> Iterator[None]:
    """Inside, the policy draws pictures: no dropout, and autocast casts its weights once for all steps, until the end."""
    with evaluating(policy), run.accelerator.autocast():
        yield


def denoising_loss(
    run: runtime.Run, policy: torch.nn.Module, data: inputs.Inputs, batch: inputs.samples.Batch, step: int, alphas_cumprod: Tensor
) -> Tensor:
    """The loss that the model was pre-trained with, on captioned pictures: a scalar."""
    where = run.args.seed, step, batch.positions
    x0, condition = data.encode(batch, run.args.seed, step)  # (b, 4, h, w), (b, L, D)
    noise = seeds.normal(*where, "pretrain noise", x0.shape[1:], run.device)  # (b, 4, h, w)
    timestep = (seeds.uniform(*where, "pretrain timestep", run.device) * len(alphas_cumprod)).long()  # (b,) in [0, 999]
    with run.accelerator.autocast():
        return ddpm.eps_loss(sd15.eps(policy, ddpm.add_noise(x0, noise, alphas_cumprod[timestep]), timestep, condition), noise).mean()


# --------------------------------------------------------------------------- training


def show_plan(args: argparse.Namespace) -> None:
    steps, whole = args.num_inference_steps, None if args.use_lora else plan.Whole(("unet",), weight=4, gradient=4)
    before = (sd15_rollout.mean_steps(*args.mid_range, args.train_batch_size) if args.method == "refl"
              else steps - (args.draft_k if args.method == "draft" else 1))  # fmt: skip
    trained = {"refl": 1, "draft": args.draft_k, "draft_lv": 1 + args.num_renoised}[args.method]
    plan.show_reward_gradient(args, adapt=lambda module: unet.adapt(module, args), whole=whole, family=sd15, rollout_steps=before,
                              trained_steps=trained, recomputed=args.method == "draft" and args.draft_k > 1)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    if args.dry_run:
        return show_plan(args)
    run = runtime.start(args)

    # Prompts that will be drawn, and captioned pictures for the pre-training loss: encoded once; no text encoder stays in memory.
    found = run.require(lambda: rewards.read_prompts(args))
    sampler = prompts.GroupSampler(
        found.training, group_size=1, batch_size=args.train_batch_size, batches_per_epoch=args.gradient_accumulation_steps,
        seed=args.seed, rank=run.rank, world=run.world,
    )  # fmt: skip
    texts = inputs.prepare_texts(run, args, ["", *sampler.drawn(args.max_train_steps), *found.evaluated], sd15)
    negative = texts.condition([""]) if args.guidance_scale > 1 else None
    data = inputs.prepare_pretraining(run, args, sd15)

    # Model: the VAE in fp32, for the precision of its gradient
    model = unet.load(run, args)
    policy = model.unet
    options = dict(revision=args.revision, variant=args.variant, device=run.device)
    model.vae = sd15.load(args.pretrained_model_name_or_path, **options, parts=("vae",)).vae
    if args.gradient_checkpointing:
        model.vae.enable_gradient_checkpointing()  # otherwise decoding one picture of 512 px saves 6 GB for backward
    alphas_cumprod = model.alphas_cumprod.to(run.device)  # (1000,)
    timetable = sd15_rollout.timetable(alphas_cumprod, args.num_inference_steps, args.eta)
    if note := sd15_rollout.few_steps(alphas_cumprod, args.num_inference_steps):
        run.print(note)
    latent_shape = (sd15.LATENT_CHANNELS, args.resolution // sd15.VAE_SCALE, args.resolution // sd15.VAE_SCALE)

    # Optimizer; the policy is not wrapped for several processes, since a step runs it many times: gradients are averaged below
    trained = tuned.Tuned(run, args, policy, whole=not args.use_lora)
    weights = trained.parameters
    optimizer, schedule = trained.optimizer(args.max_train_steps, sampler.samples_per_epoch)
    average = ema.Ema(weights, args.ema_decay) if args.use_ema else None
    optimizer = run.accelerator.prepare(optimizer)

    # What a checkpoint holds, and where the run stands
    log = metrics.Log(run, every=args.logging_steps)
    scorer = rewards.build(run, args, args.scorer)
    evaluator = rewards.Evaluator(run, args, model, texts, found.evaluation, log, scorer, average=average)
    parts = trained.parts | {"optimizer": optimizer, "schedule": schedule, "log": log, "evaluator": evaluator}
    parts |= {"ema": average} if average else {}
    saver = checkpoint.Checkpointer(run, every=args.checkpointing_steps, keep=args.checkpoints_total_limit, parts=parts,
                                    write_weights=trained.writer(average))  # fmt: skip
    first_step = saver.resume(args.resume_from_checkpoint)
    if first_step == 0:
        evaluator.evaluate(0)

    policy.train()
    pictures = data.batches(first_step) if data else None
    accumulation, renoised = args.gradient_accumulation_steps, args.num_renoised if args.method == "draft_lv" else 0
    for step in range(first_step, args.max_train_steps):
        seeds.seed_everything(args.seed, "dropout", step, run.rank)  # LoRA dropout, the only draw that torch makes itself
        values: dict[str, list[Tensor]] = defaultdict(list)
        for batch in sampler.batches(step):
            where = args.seed, step, batch.positions
            predict = predictor(run, policy, texts.condition(batch.texts), negative, args.guidance_scale)

            def draw(stream: str, where: tuple = where) -> Tensor:
                return seeds.normal(*where, stream, latent_shape, run.device)

            # 1. rollout
            first = first_steps(args, where)
            with sampling(run, policy):
                x_t = sd15_rollout.rollout(predict, first, timetable, draw)
            # 2. predict
            for x0 in clean_latents(predict, x_t, first, timetable, draw, method=args.method, num_renoised=renoised):
                # 3. reward
                scores = scorer(decode(model, x0, args.decode_batch_size), batch.texts, batch.metadata)
                loss = args.grad_scale * reward_loss(scores.total, args.reward_threshold).mean()
                run.accelerator.backward(loss / ((1 + renoised) * accumulation))
                for name, value in {"loss": loss, "reward": scores.total.mean()}.items():
                    values[name].append(value.detach())
                for name, part in scores.parts.items():
                    values[f"reward/{name}"].append(part.detach().mean())
            # 4. pretrain
            if data:
                loss = denoising_loss(run, policy, data, next(pictures), step, alphas_cumprod)
                run.accelerator.backward(args.pretrain_loss_weight * loss / accumulation)
                values["pretrain_loss"].append(loss.detach())

        # 5. update
        run.average_gradients(weights)
        grad_norm = run.clip_gradients(weights, args.max_grad_norm)
        # twin: update
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if average:
            average.update()

        done = step + 1
        # end twin
        log.add(grad_norm=grad_norm, **{name: torch.stack(value).mean() for name, value in values.items()})
        log.write(done, lr=optim.rate(schedule))
        evaluator.evaluate_if_due(done, done)
        saver.save_if_due(done)
        if run.stop_requested():
            return saver.stop(done)
        if reason := evaluator.dropped():
            run.print(f"stopped after step {done}: {reason}")
            break

    trained.save_result(model.path, average)
    evaluator.evaluate_last(log.step)
    kind = KINDS[args.method] + (" LoRA" if args.use_lora else "")
    trained_on = f"the gradient of the reward `{args.scorer}`, {log.step} optimizer steps of {sampler.samples_per_epoch} pictures"
    card.write(run, args, kind=kind, trained_on=trained_on, prompt=found.training[0].text)
    run.finish(f"done: {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
