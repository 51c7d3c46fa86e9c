"""Align the UNet of Stable Diffusion 1.5, 2.x-base or XL with preferences: Diffusion-DPO (https://arxiv.org/abs/2311.12908).

Every optimizer step:
  1. data       take one global batch of pairs, winner and loser for one caption: latents x_0 and text embeddings, from the caches on disk
  2. noise      draw one timestep and one noise for each pair, shared by its pictures; x_t = sqrt(a) x_0 + sqrt(1 - a) noise
  3. predict    the UNet predicts the noise in winner and loser together; so does the reference, without gradient
  4. prefer     the error should fall, against the reference's, more on the winner: -log sigmoid(-beta / 2 ((m_w - m_l) - (r_w - r_l)))
  5. update     clipped gradient, AdamW on the UNet or its LoRA

What differs from the paper and its code: the whole loss is computed in fp32 whatever the precision of the models, so that a policy equal
to its reference has the loss log 2 and the accuracy 0.5 exactly; ties are dropped by their label, not by the name of the data set; latents
and text are encoded once; with --use_lora the reference is the UNet without the LoRA. --sft trains on the winners alone, to compare.

  bash scripts/train_dpo_sd_v1_5.sh                                  # SD1.5 on one GPU
  python train_dpo_sd15.py --pretrained_model_name_or_path models/tiny-sd15 --dataset_name datas/pairs \\
      --resolution 64 --mixed_precision no --no_hflip --max_train_steps 100       # minutes on a CPU
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from src import card, checkpoint, cli, ddpm, ema, inputs, lora, metrics, optim, plan, runtime, seeds, speed, tuned, unet, validation
from src.data import buckets, samples
from src.pipelines import sd15

VALIDATION_TIMESTEPS = (124, 374, 624, 874)  # the middles of four equal parts of [0, 1000)
PANELS = {"preference loss": "loss", "accuracy, training": "accuracy", "accuracy, held out": "val_accuracy"}


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    cli.add_dpo_args(parser)
    cli.add_lora_args(parser, unet=True)
    cli.add_model_args(parser, default="models/stable-diffusion-v1-5")
    cli.add_speed_args(parser, unet=True, graphs=False)
    cli.add_data_args(parser, resolution=None, caption_dropout=0.2, pairs=True)
    cli.add_optimization_args(parser, learning_rate=1e-5, lora_learning_rate=1e-4, warmup=True)
    cli.add_budget_args(parser, max_train_steps=2000)
    cli.add_validation_args(parser, guidance_scale=7.5, inference_steps=25)
    cli.add_validation_pairs_args(parser)
    cli.add_run_args(parser, output_dir="outputs/dpo_sd15")
    unet.add_defaults(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script; whatever can be refused without loading a model is refused here, with exit code 2."""
    return cli.parse(build_parser(), argv, checks=(runtime.check, speed.check, check))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for models, data, adapter, optimizer, upload or checkpoint that cannot work, before anything is loaded."""
    inputs.check_pairs(args, sd15)
    if args.reference_model:
        sd15.check_reference(args.reference_model, args.pretrained_model_name_or_path)
    unet.check(args)


# --------------------------------------------------------------------------- the algorithm

Predict = Callable[[Tensor, Tensor, sd15.Conditioning], Tensor]  # x_t (n, 4, h, w), timestep (n,), condition of n -> noise (n, 4, h, w)


def denoising_errors(
    predict: Predict, x0: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor, condition: sd15.Conditioning
) -> Tensor:
    """|predicted noise - noise|^2 of both pictures of each pair, (b, 2) float32, mean over channels and pixels; one forward pass.

    Args:
        x0: clean latents (b, 2, 4, h, w), the winner first, or (b, 1, 4, h, w) of winners alone.
        noise: (b, 4, h, w); timestep: (b,), whole numbers: both are shared by the pair.
        condition: embeds (b, L, D), pooled (b, P).
    """
    pictures = x0.shape[1]
    noise, timestep = (value.repeat_interleave(pictures, dim=0) for value in (noise, timestep))  # (b * 2, ...): w, l, w, l, ...
    both = sd15.Conditioning(condition.embeds.repeat_interleave(pictures, 0), condition.pooled.repeat_interleave(pictures, 0))
    x_t = ddpm.add_noise(x0.flatten(0, 1), noise, alphas_cumprod[timestep])  # (b * 2, 4, h, w)
    return ddpm.eps_loss(predict(x_t, timestep, both), noise).unflatten(0, (-1, pictures))


def preference_logits(errors: Tensor, reference_errors: Tensor, beta: float) -> Tensor:
    """How strongly the policy prefers each winner, (b,) float32: -beta / 2 * ((m_w - m_l) - (r_w - r_l)).

    beta is the paper's: its code has the factor 1/2, too. Source: arXiv 2311.12908, eq. 14, with the sum over timesteps and omega in beta.

    Args:
        errors, reference_errors: (b, 2) float32, winner and loser.
    """
    return -0.5 * beta * ((errors[:, 0] - errors[:, 1]) - (reference_errors[:, 0] - reference_errors[:, 1]))


def preference_loss(logits: Tensor, loss_type: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair, (b,) float32, from its logit x.

    sigmoid: -log sigmoid(x), a share `label_smoothing` of it with the reversed preference; ipo: (x - 1/2)^2; hinge: max(0, 1 - x).
    Source: DPO, arXiv 2305.18290, eq. 7; IPO, arXiv 2310.12036, eq. 17; SLiC, arXiv 2305.10425.
    """
    if loss_type == "ipo":
        return (logits - 0.5).square()
    if loss_type == "hinge":
        return F.relu(1 - logits)
    assert loss_type == "sigmoid", f"no formula for {loss_type}"
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def accuracy(logits: Tensor) -> Tensor:
    """Share of pairs whose winner is preferred, as a scalar; a tie counts one half."""
    return ((logits > 0).float() + 0.5 * (logits == 0).float()).mean()


def objective(
    policy: Predict, reference: Predict | None, x0: Tensor, noise: Tensor, timestep: Tensor, alphas_cumprod: Tensor,
    condition: sd15.Conditioning, *, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss and other metrics, as scalars; without a reference the winners' denoising loss alone. Arguments as above."""
    if reference is None:
        return {"loss": denoising_errors(policy, x0[:, :1], noise, timestep, alphas_cumprod, condition).mean()}
    errors = denoising_errors(policy, x0, noise, timestep, alphas_cumprod, condition)  # (b, 2)
    with torch.no_grad():
        reference_errors = denoising_errors(reference, x0, noise, timestep, alphas_cumprod, condition)
    logits = preference_logits(errors, reference_errors, beta)  # (b,)
    margins = {"policy_margin": errors.detach(), "reference_margin": reference_errors}
    gains = (reference_errors - errors.detach()).mean(0)
    return {
        "loss": preference_loss(logits, loss_type, label_smoothing).mean(), "accuracy": accuracy(logits.detach()),
        **{name: (error[:, 1] - error[:, 0]).mean() for name, error in margins.items()}, "winner_gain": gains[0], "loser_gain": gains[1],
    }  # fmt: skip


# --------------------------------------------------------------------------- policy and reference


def predictor(module: torch.nn.Module) -> Predict:
    return lambda x_t, timestep, condition: sd15.eps(module, x_t, timestep, condition)


def reference_of(policy: torch.nn.Module, args: argparse.Namespace, run: runtime.Run) -> Predict | None:
    """How the reference predicts: a frozen copy, or the policy with its LoRA off; None with --sft."""
    if args.sft:
        return None
    frozen = policy if args.use_lora else unet.load_frozen(run, args, args.reference_model)

    def predict(x_t: Tensor, timestep: Tensor, condition: sd15.Conditioning) -> Tensor:
        with lora.disabled(policy), run.accelerator.autocast():
            return sd15.eps(frozen, x_t, timestep, condition)

    return predict


def held_out_measures(data: inputs.Inputs, loss: Callable[..., dict[str, Tensor]]) -> dict[str, float]:
    """Loss and accuracy of the held-out pairs at VALIDATION_TIMESTEPS, always with the same noise; the processes share the pairs.

    Args:
        loss: x0, noise, timestep, condition -> scalars, as `objective`.
    """
    run, levels, count, total = data.run, len(VALIDATION_TIMESTEPS), len(data.held_out), {}
    for turn in run.turns(count):
        i = min(turn, count - 1)
        x0, condition = data.encode(samples.collate([data.held_out[buckets.Key(i, 0, i)]]), validation.FIXED_SEED, 0)  # (1, 2, 4, h, w)
        positions = range(i * levels, (i + 1) * levels)
        noise = seeds.normal(validation.FIXED_SEED, 0, positions, "validation", x0.shape[2:], run.device)  # (levels, 4, h, w)
        timestep = torch.tensor(VALIDATION_TIMESTEPS, device=run.device)
        with run.accelerator.autocast():
            found = loss(x0.expand(levels, -1, -1, -1, -1), noise, timestep, condition.expand(levels))
        for name in found.keys() & {"loss", "accuracy"}:
            total[name] = total.get(name, 0) + found[name] * (turn < count)
    return {f"val_{name}": (run.accelerator.reduce(total[name], "sum") / count).item() for name in sorted(total)}


# --------------------------------------------------------------------------- training


def main(args: argparse.Namespace) -> None:
    if args.dry_run:
        whole = None if args.use_lora else plan.Whole(("unet",), weight=4, gradient=4)
        preference = plan.Preference(reference=not args.sft, copy=not (args.sft or args.use_lora))
        return plan.show(args, adapt=lambda module: unet.adapt(module, args), whole=whole, family=sd15, preference=preference)
    run = runtime.start(args)

    # Data: the caches are filled first; no encoder stays in memory that is not needed later.
    data = inputs.prepare_pairs(run, args, sd15)

    # Model and reference
    model = unet.load(run, args)
    policy = model.unet
    reference = reference_of(policy, args, run)
    alphas_cumprod = model.alphas_cumprod.to(run.device)  # (1000,)
    settings = dict(beta=args.beta_dpo, loss_type=args.loss_type, label_smoothing=args.label_smoothing)

    # Optimizer
    trained = tuned.Tuned(run, args, policy, whole=not args.use_lora)
    weights = trained.parameters
    optimizer, schedule = trained.optimizer(args.max_train_steps, data.order.global_batch)
    average = ema.Ema(weights, args.ema_decay) if args.use_ema else None
    wrapped, optimizer = run.accelerator.prepare(policy, optimizer)

    # What a checkpoint holds, and where the run stands
    log = metrics.Log(run, every=args.logging_steps)
    parts = trained.parts | {"optimizer": optimizer, "schedule": schedule, "log": log, "data": data.identity}
    parts |= {"ema": average} if average else {}
    saver = checkpoint.Checkpointer(run, every=args.checkpointing_steps, keep=args.checkpoints_total_limit, parts=parts,
                                    write_weights=trained.writer(average))  # fmt: skip
    first_step = saver.resume(args.resume_from_checkpoint)

    def measure(x0: Tensor, noise: Tensor, timestep: Tensor, condition: sd15.Conditioning) -> dict[str, Tensor]:
        return objective(predictor(policy), reference, x0, noise, timestep, alphas_cumprod, condition, **settings)

    validator = validation.Validator(run, args, data, model, log, measure=lambda: held_out_measures(data, measure), panels=PANELS,
                                     average=average)  # fmt: skip
    if first_step == 0:
        validator.validate(0)

    policy.train()
    batches = data.batches(first_step)
    for step in range(first_step, args.max_train_steps):
        seeds.seed_everything(args.seed, "dropout", step, run.rank)  # LoRA dropout, the only draw that torch makes itself
        found: list[dict[str, Tensor]] = []
        for micro in range(args.gradient_accumulation_steps):
            # 1. data
            batch = next(batches)
            x0, condition = data.encode(batch, args.seed, step)  # (b, 2, 4, h, w), (b, L, D)
            # 2. noise
            noise = seeds.normal(args.seed, step, batch.positions, "noise", x0.shape[2:], run.device)  # (b, 4, h, w)
            u = seeds.uniform(args.seed, step, batch.positions, "timestep", run.device)  # (b,)
            timestep = (u * len(alphas_cumprod)).long()  # (b,) in [0, 999]
            # 3. predict, 4. prefer
            with run.no_sync(wrapped, last=micro == args.gradient_accumulation_steps - 1):
                measures = objective(predictor(wrapped), reference, x0, noise, timestep, alphas_cumprod, condition, **settings)
                run.accelerator.backward(measures["loss"] / args.gradient_accumulation_steps)
            found.append({name: value.detach() for name, value in measures.items()})

        # 5. update
        grad_norm = run.clip_gradients(weights, args.max_grad_norm)
        # twin: update
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if average:
            average.update()

        done = step + 1
        # end twin
        log.add(grad_norm=grad_norm, **{name: torch.stack([measures[name] for measures in found]).mean() for name in found[0]})
        log.write(done, lr=optim.rate(schedule), epoch=done / data.order.steps_per_epoch)
        validator.validate_if_due(done)
        saver.save_if_due(done)
        if run.stop_requested():
            return saver.stop(done)

    trained.save_result(model.path, average)
    validator.validate_last(args.max_train_steps)
    kind = ("SFT" if args.sft else "Diffusion-DPO") + (" LoRA" if args.use_lora else "")
    trained_on = f"{len(data.training)} preference pairs of `{args.dataset_name}`, {args.max_train_steps} optimizer steps"
    card.write(run, args, kind=kind, trained_on=trained_on, prompt=data.training.images.records[0].prompt)
    run.finish(f"done: {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
