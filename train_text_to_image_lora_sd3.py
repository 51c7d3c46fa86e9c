"""Train a LoRA for Stable Diffusion 3.5 on captioned pictures (rectified flow, https://arxiv.org/abs/2403.03206, section 2).

Every optimizer step:
  1. data      take one global batch of captioned pictures: latents x_0 and text embeddings, from the caches on disk
  2. noise     draw noise and sigma for each picture; x_t = (1 - sigma) x_0 + sigma noise
  3. predict   the transformer, base weights frozen, LoRA trained, predicts the velocity noise - x_0
  4. update    mean squared error, clipped gradient, AdamW on the LoRA weights alone

What differs from the paper: only low-rank updates of the attention projections are trained (https://arxiv.org/abs/2106.09685);
the timestep densities of section 3.1 are densities here, never loss weights, so every choice minimises the same plain velocity loss.

  bash scripts/train_text_to_image_lora_sd3.sh                       # SD3.5-medium on one GPU
  python train_text_to_image_lora_sd3.py --pretrained_model_name_or_path models/tiny-sd3 --dataset_name datas/shapes-new \\
      --resolution 64 --mixed_precision no --no_hflip --max_train_steps 100       # minutes on a CPU
"""

import argparse

import torch
from torch import Tensor

from src import card, checkpoint, cli, ema, flow, inputs, lora, metrics, optim, plan, quantize, runtime, seeds, speed, tuned, validation
from src.pipelines import sd3


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    cli.add_lora_args(parser)
    cli.add_quantization_args(parser)
    cli.add_timestep_args(parser)
    cli.add_text_args(parser)
    cli.add_model_args(parser)
    cli.add_speed_args(parser)
    cli.add_data_args(parser)
    cli.add_optimization_args(parser, learning_rate=1e-4)
    cli.add_budget_args(parser, max_train_steps=1000)
    cli.add_validation_args(parser)
    cli.add_validation_loss_args(parser)
    cli.add_run_args(parser, output_dir="outputs/lora_sd3")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script; whatever can be refused without loading a model is refused here, with exit code 2."""
    return cli.parse(build_parser(), argv, checks=(runtime.check, speed.check, inputs.check, check))


# twin: lora-refusals
def check(args: argparse.Namespace) -> None:
    """Raises ValueError for an adapter, optimizer, upload or checkpoint that cannot work, before anything is loaded."""
    lora.check_export(args.export_format, args.use_dora)
    if args.init_lora:
        lora.check_init(args.init_lora, rank=args.rank, alpha=args.lora_alpha, use_dora=args.use_dora)
    optim.check(args.optimizer)
    quantize.check(args.quantize_base)
    card.check(args.push_to_hub)
    if not args.dry_run:
        checkpoint.check_resume(args.resume_from_checkpoint, args.output_dir, args.max_train_steps)


# end twin


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


# twin: add-lora
def add_lora(transformer: torch.nn.Module, args: argparse.Namespace) -> None:
    """Freeze the transformer and give it the adapter that the flags describe."""
    lora.add(transformer, rank=args.rank, alpha=args.lora_alpha, dropout=args.lora_dropout, use_dora=args.use_dora,
             layers=args.lora_layers, blocks=args.lora_blocks)  # fmt: skip


# end twin


# --------------------------------------------------------------------------- training


def main(args: argparse.Namespace) -> None:
    if args.dry_run:
        return plan.show(args, adapt=lambda transformer: add_lora(transformer, args))
    run = runtime.start(args)
    tuned.check_layers(args, sd3.transformer_from_config)

    # Data: the caches are filled first; no encoder stays in memory that is not needed later.
    data = inputs.prepare(run, args)

    # Model: base weights frozen and in the run's precision or fewer bits, LoRA weights in fp32.
    model = sd3.load(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=run.weight_dtype,
                     device=run.device, parts=("transformer",), quantized=args.quantize_base)  # fmt: skip
    transformer = model.transformer
    seeds.seed_everything(args.seed, "lora")
    add_lora(transformer, args)
    if args.init_lora:
        fresh = lora.load(transformer, args.init_lora)
        run.print(f"--init_lora {args.init_lora}: loaded" + (f"; {len(fresh)} layers are not in it and start from zero" if fresh else ""))
    speed.apply(transformer, args)

    # Optimizer
    trained = tuned.Tuned(run, args, transformer, whole=False)
    weights = trained.parameters
    optimizer, schedule = trained.optimizer(args.max_train_steps, data.order.global_batch)
    average = ema.Ema(weights, args.ema_decay) if args.use_ema else None
    # network: the transformer, wrapped for several processes; call it for forward passes with gradient
    network, optimizer = run.accelerator.prepare(transformer, optimizer)

    # What a checkpoint holds, and where the run stands
    log = metrics.Log(run, every=args.logging_steps)
    parts = trained.parts | {"optimizer": optimizer, "schedule": schedule, "log": log, "data": data.identity}
    parts |= {"ema": average} if average else {}
    saver = checkpoint.Checkpointer(run, every=args.checkpointing_steps, keep=args.checkpoints_total_limit, parts=parts,
                                    write_weights=trained.writer(average))  # fmt: skip
    first_step = saver.resume(args.resume_from_checkpoint)
    validator = validation.Validator(run, args, data, model, log, loss=flow_matching_loss, average=average)
    if first_step == 0:
        validator.validate(0)

    transformer.train()
    batches = data.batches(first_step)
    for step in range(first_step, args.max_train_steps):
        seeds.seed_everything(args.seed, "dropout", step, run.rank)  # LoRA dropout, the only draw that torch makes itself
        losses = []
        for micro in range(args.gradient_accumulation_steps):
            # 1. data; encode draws the latents from the VAE's posterior, by (seed, step)
            batch = next(batches)
            x0, condition = data.encode(batch, args.seed, step)  # (b, 16, h, w), (b, L, D)
            # 2. noise; positions in the global batch, with seed and step, are the key of every random number (src/seeds.py)
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

    # The result comes first: nothing that the last validation may run into can cost it.
    trained.save_result(model.path, average)
    validator.validate_last(args.max_train_steps)
    card.write(run, args, kind="LoRA", images=len(data.training), prompt=data.training.images.records[0].prompt)
    run.finish(f"done: {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
