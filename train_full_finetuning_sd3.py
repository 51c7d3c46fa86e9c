"""Fine-tune all weights of Stable Diffusion 3.5 on captioned pictures (rectified flow, https://arxiv.org/abs/2403.03206, section 2).

Every optimizer step:
  1. data      take one global batch of captioned pictures: latents x_0 and text embeddings, from the caches on disk
  2. noise     draw noise and sigma for each picture; x_t = (1 - sigma) x_0 + sigma noise
  3. predict   the transformer, all of its weights trained, predicts the velocity noise - x_0
  4. update    mean squared error, clipped gradient, AdamW on every weight; --use_ema keeps their moving average

What differs from the paper: training starts from a trained model (--from_config: from random weights, as there), and may run on bf16
weights with stochastic rounding (https://arxiv.org/abs/1502.02551), or update each weight in the middle of the backward pass;
the timestep densities of section 3.1 are densities here, never loss weights, so every choice minimises the same plain velocity loss.

  bash scripts/train_full_finetuning_sd3.sh                          # SD3.5-medium on one GPU
  python train_full_finetuning_sd3.py --pretrained_model_name_or_path models/tiny-sd3 --dataset_name datas/shapes-new \\
      --resolution 64 --mixed_precision no --no_hflip --max_train_steps 100          # minutes on a CPU
"""

import argparse
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from src import card, checkpoint, cli, ema, flow, full, inputs, metrics, optim, plan, rounding, runtime, seeds, sharding, speed, validation
from src.pipelines import sd3


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    cli.add_full_args(parser)
    cli.add_timestep_args(parser)
    cli.add_text_args(parser)
    cli.add_model_args(parser)
    cli.add_speed_args(parser)
    cli.add_data_args(parser)
    cli.add_optimization_args(parser, learning_rate=1e-5)
    cli.add_budget_args(parser, max_train_steps=1000)
    cli.add_validation_args(parser)
    cli.add_validation_loss_args(parser)
    cli.add_run_args(parser, output_dir="outputs/full_sd3")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script; whatever can be refused without loading a model is refused here, with exit code 2."""
    return cli.parse(build_parser(), argv, checks=(runtime.check, speed.check, inputs.check, check))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for blocks, an optimizer, an upload or a checkpoint that cannot work, before anything is loaded."""
    full.check_blocks(sd3.block_count(args.pretrained_model_name_or_path), args.train_blocks, args.freeze_last_blocks)
    full.check_output(args.output_dir, args.pretrained_model_name_or_path)
    sharding.check(os.environ, pieces=args.weights_dtype == "bf16", train_text_encoder=args.train_text_encoder, optimizer=args.optimizer,
                   mixed_precision=args.mixed_precision)  # fmt: skip
    optim.check(args.optimizer)
    card.check(args.push_to_hub)
    if not args.dry_run:
        checkpoint.check_resume(args.resume_from_checkpoint, args.output_dir, args.max_train_steps)


# --------------------------------------------------------------------------- the algorithm


# twin: flow-matching-loss
def flow_matching_loss(transformer: torch.nn.Module, x0: Tensor, noise: Tensor, sigma: Tensor, condition: sd3.Conditioning) -> Tensor:
    """Squared error of the velocity predicted at x_t = (1 - sigma) x0 + sigma noise, one value per picture.

    Args:
        x0: clean latents (b, 16, h, w), scaled; noise: (b, 16, h, w), standard normal; sigma: (b,) in [0, 1].
        condition: embeds (b, L, D), pooled (b, P).

    Returns:
        (b,) float32, mean over channels and pixels.

    Source: arXiv 2403.03206, section 2: conditional flow matching with the straight path, whose velocity is noise - x0.
    """
    x_t = flow.interpolate(x0, noise, sigma)  # (b, 16, h, w)
    velocity = sd3.velocity(transformer, x_t, sigma, condition)  # (b, 16, h, w)
    return flow.velocity_loss(velocity, flow.velocity_target(x0, noise))  # (b,)


# end twin


def select(transformer: torch.nn.Module, args: argparse.Namespace) -> None:
    """Make trainable the blocks that the flags name."""
    full.select(transformer, blocks=args.train_blocks, freeze_last=args.freeze_last_blocks)


def full_plan(args: argparse.Namespace) -> plan.Whole:
    """What --dry_run needs to know about the trained parts."""
    weight = full.DTYPES[args.weights_dtype].itemsize
    parts = ("transformer", "text_encoder", "text_encoder_2") if args.train_text_encoder else ("transformer",)
    return plan.Whole(parts, weight=weight, gradient=0 if args.fused_backward else weight)


def make_optimizer(groups: list[dict], args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, inside `rounding.Pieces` for bf16 weights or for updates during the backward pass."""
    build = functools.partial(optim.build, name=args.optimizer, learning_rate=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                              weight_decay=args.adam_weight_decay, epsilon=args.adam_epsilon, device=device)  # fmt: skip
    if args.weights_dtype == "fp32" and not args.fused_backward:
        return build(groups)
    return rounding.Pieces(groups, build, seed=args.seed, fused=args.fused_backward, compiled=args.compile)


def save_weights(modules: dict[str, torch.nn.Module], folder: Path, average: ema.Ema | None, write: bool) -> None:
    """Write the trained modules to `folder`; with an average, that goes there, the weights to `folder`/raw. Every process calls it."""
    ema.save(folder, average, lambda place: full.save(modules, place, write=write))


# --------------------------------------------------------------------------- training


def main(args: argparse.Namespace) -> None:
    if args.dry_run:
        return plan.show(args, adapt=lambda transformer: select(transformer, args), whole=full_plan(args))
    run = runtime.start(args)
    if args.weights_dtype == "bf16":
        runtime.check_equal_gpus(run, "--weights_dtype bf16")
    if not args.save_transformer_only:  # the rest of the result: a failed download ends the run before it begins
        path, options = args.pretrained_model_name_or_path, dict(revision=args.revision, variant=args.variant)
        run.require(lambda: full.fetch(path, trained=full_plan(args).parts, **options))

    # Data: the caches are filled first; no encoder stays in memory that is not needed later.
    data = inputs.prepare(run, args)

    # Model: the transformer in --weights_dtype, including frozen blocks; with --train_text_encoder CLIP-L and -G as well.
    dtype = full.DTYPES[args.weights_dtype]
    model = sd3.load(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=dtype,
                     device=run.device, parts=() if args.from_config else ("transformer",))  # fmt: skip
    if args.from_config:
        seeds.seed_everything(args.seed, "transformer")
        model.transformer = sd3.random_transformer(model.path, revision=args.revision, dtype=dtype, device=run.device)
    transformer = model.transformer
    select(transformer, args)
    encoders = {}
    if args.train_text_encoder:
        encoders = sd3.reload_clips(data.encoders, revision=args.revision, variant=args.variant, dtype=dtype)
    modules = {"transformer": transformer, **encoders}
    speed.apply(transformer, args)

    # Optimizer
    learning_rate = optim.learning_rate(args.learning_rate, args.scale_lr, data.order.global_batch)
    text_rate = optim.learning_rate(args.text_encoder_learning_rate or args.learning_rate, args.scale_lr, data.order.global_batch)
    groups = [{"params": full.parameters(transformer), "lr": learning_rate}]
    groups += [{"params": full.parameters(encoder), "lr": text_rate} for encoder in encoders.values()]
    optimizer = make_optimizer(groups, args, run.device)
    schedule = optim.schedule(optimizer, args.lr_scheduler, warmup_steps=args.lr_warmup_steps, total_steps=args.max_train_steps,
                              cycles=args.lr_num_cycles, power=args.lr_power)  # fmt: skip
    network, optimizer = sharding.prepare(run.accelerator, transformer, optimizer)
    weights = [weight for module in modules.values() for weight in full.parameters(module)]  # only now: FSDP2 has replaced them by its own
    average = ema.Ema(weights, args.ema_decay, device="cpu" if args.ema_device == "cpu" else None) if args.use_ema else None
    run.print(f"{sum(p.numel() for p in weights):,} trainable parameters, learning rate {learning_rate:.3g}")

    # What a checkpoint holds, and where the run stands
    log = metrics.Log(run, every=args.logging_steps)
    parts = {"weights": full.State(modules), "optimizer": optimizer, "schedule": schedule, "log": log, "data": data.identity}
    parts |= {"ema": average} if average else {}
    saver = checkpoint.Checkpointer(run, every=args.checkpointing_steps, keep=args.checkpoints_total_limit, parts=parts)
    first_step = saver.resume(args.resume_from_checkpoint)
    validator = validation.Validator(run, args, data, model, log, loss=flow_matching_loss, average=average)
    if first_step == 0:
        validator.validate(0)

    transformer.train()
    batches = data.batches(first_step)
    for step in range(first_step, args.max_train_steps):
        losses = []
        for micro in range(args.gradient_accumulation_steps):
            # 1. data
            batch = next(batches)
            x0, condition = data.encode(batch, args.seed, step, train_text=args.train_text_encoder)  # (b, 16, h, w), (b, L, D)
            # 2. noise
            # twin: noise
            noise = seeds.normal(args.seed, step, batch.positions, "noise", x0.shape[1:], run.device)  # (b, 16, h, w)
            u = seeds.uniform(args.seed, step, batch.positions, "sigma", run.device)  # (b,)
            sigma = flow.sigmas(u, density=args.timestep_density, logit_mean=args.logit_mean, logit_std=args.logit_std,
                                mode_scale=args.mode_scale, shift=sd3.timestep_shift(model, args.shift, *batch.size))  # fmt: skip
            # end twin
            # 3. predict
            with run.no_sync(network, last=micro == args.gradient_accumulation_steps - 1):
                loss = flow_matching_loss(network, x0, noise, sigma, condition).mean()
                run.accelerator.backward(loss / args.gradient_accumulation_steps)
            losses.append(loss.detach())

        # 4. update
        run.average_gradients([weight for encoder in encoders.values() for weight in encoder.parameters()])  # outside of `network`
        if args.fused_backward:
            grad_norm = optimizer.optimizer.grad_norm()  # the weights are updated already
        else:
            grad_norm = run.clip_gradients(weights, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if average:
            average.update()

        log.add(loss=torch.stack(losses).mean(), grad_norm=grad_norm)
        # twin: tail
        done = step + 1
        log.write(done, lr=optim.rate(schedule), epoch=done / data.order.steps_per_epoch)
        validator.validate_if_due(done)
        saver.save_if_due(done)
        if run.stop_requested():
            return saver.stop(done)
        # end twin

    with checkpoint.writing_result(args.output_dir):
        save_weights(modules, args.output_dir, average, run.is_main)
        if run.is_main and not args.save_transformer_only:
            full.complete_pipeline(model.path, args.output_dir, trained=list(modules), revision=args.revision, variant=args.variant)
    validator.validate_last(args.max_train_steps)
    kind = "Fine-tuned transformer" if args.save_transformer_only else "Full fine-tuning"
    card.write(run, args, kind=kind, images=len(data.training), prompt=data.training.images.records[0].prompt)
    run.finish(f"done: {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
