"""Teach Stable Diffusion 3.5 one subject from a handful of pictures: DreamBooth (https://arxiv.org/abs/2208.12242) with a LoRA.

Every optimizer step:
  1. data      take as many pictures of the subject ("a photo of sks dog") as of its class ("a photo of a dog"); the latter were rendered
               by the base model before training, so that learning one dog does not change what all others look like
  2. noise     draw noise and sigma for each picture; x_t = (1 - sigma) x_0 + sigma noise
  3. predict   the transformer, base weights frozen, LoRA trained, predicts the velocity noise - x_0
  4. update    mean squared error of the subject's pictures (where their mask says so) + --prior_loss_weight x that of the class's;
               clipped gradient, AdamW on the LoRA weights alone

What differs from the paper: only low-rank updates are trained (https://arxiv.org/abs/2106.09685), of the transformer's attention
projections and, with --train_text_encoder, of both CLIPs'; the loss is rectified flow's (https://arxiv.org/abs/2403.03206, section 2);
subject and class pass through the model one after the other, each with a mean of its own, so that no batch size mixes their weights.

  bash scripts/train_dreambooth_lora_sd3.sh                          # SD3.5-medium on one GPU
  python train_dreambooth_lora_sd3.py --pretrained_model_name_or_path models/tiny-sd3 --instance_data_dir datas/subject \\
      --resolution 64 --mixed_precision no --no_hflip --max_train_steps 100       # minutes on a CPU
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from src import card, checkpoint, cli, ema, flow, lora, metrics, optim, plan, quantize, runtime, seeds, speed, subject, tuned, validation
from src.pipelines import sd3


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    cli.add_dreambooth_args(parser)
    cli.add_lora_args(parser)
    cli.add_quantization_args(parser)
    cli.add_timestep_args(parser)
    cli.add_text_args(parser)
    cli.add_model_args(parser)
    cli.add_speed_args(parser)
    cli.add_data_args(parser, caption_dropout=0.0)
    cli.add_optimization_args(parser, learning_rate=1e-4)
    cli.add_budget_args(parser, max_train_steps=500)
    cli.add_validation_args(parser)
    cli.add_validation_loss_args(parser)
    cli.add_run_args(parser, output_dir="outputs/dreambooth_sd3")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of this script; whatever can be refused without loading a model is refused here, with exit code 2."""
    return cli.parse(build_parser(), argv, checks=(runtime.check, speed.check, subject.check, check))


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


def flow_matching_loss(
    transformer: torch.nn.Module, x0: Tensor, noise: Tensor, sigma: Tensor, condition: sd3.Conditioning, mask: Tensor | None = None
) -> Tensor:
    """Squared error of the velocity predicted at x_t = (1 - sigma) x0 + sigma noise, one value per picture.

    Args:
        x0: clean latents (b, 16, h, w), scaled; noise: (b, 16, h, w), standard normal; sigma: (b,) in [0, 1].
        condition: embeds (b, L, D), pooled (b, P).
        mask: (b, 1, h, w) in [0, 1], the share of each latent that is the subject; None: the whole picture counts.

    Returns:
        (b,) float32, mean over channels and pixels, weighted by the mask.

    Source: arXiv 2403.03206, section 2: conditional flow matching with the straight path, whose velocity is noise - x0.
    """
    x_t = flow.interpolate(x0, noise, sigma)  # (b, 16, h, w)
    velocity = sd3.velocity(transformer, x_t, sigma, condition)  # (b, 16, h, w)
    return flow.velocity_loss(velocity, flow.velocity_target(x0, noise), mask)  # (b,)


# twin: add-lora
def add_lora(transformer: torch.nn.Module, args: argparse.Namespace) -> None:
    """Freeze the transformer and give it the adapter that the flags describe."""
    lora.add(transformer, rank=args.rank, alpha=args.lora_alpha, dropout=args.lora_dropout, use_dora=args.use_dora,
             layers=args.lora_layers, blocks=args.lora_blocks)  # fmt: skip


# end twin


def add_text_lora(encoder: torch.nn.Module, args: argparse.Namespace) -> None:
    """The same for a text encoder: plain LoRA of its own rank, scaled by alpha / rank as the transformer's."""
    rank = args.text_encoder_rank or args.rank
    lora.add_text(encoder, rank=rank, alpha=args.lora_alpha * rank / args.rank)


def save_weights(modules: dict[str, torch.nn.Module], folder: Path, average: ema.Ema | None, export_format: str = "diffusers") -> None:
    """Write the LoRA of all modules to `folder` as one file; with an average, that goes there and the trained weights to `folder`/raw."""
    transformer, encoders = modules["transformer"], {name: modules[name] for name in lora.TEXT_PARTS if name in modules}
    ema.save(folder, average, lambda place: lora.save(transformer, place, export_format, encoders=encoders))


# --------------------------------------------------------------------------- training


def main(args: argparse.Namespace) -> None:
    if args.dry_run:
        planned = subject.planned(args, adapt_text=lambda encoder: add_text_lora(encoder, args))
        return plan.show(args, adapt=lambda transformer: add_lora(transformer, args), subject=planned)
    run = runtime.start(args)
    tuned.check_layers(args, sd3.transformer_from_config)

    # Data: missing class pictures are rendered and the caches filled first; no encoder stays in memory that is not needed later.
    data, prior = subject.prepare(run, args)

    # Model: base weights frozen and in the run's precision or fewer bits, LoRA weights in fp32.
    model = sd3.load(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=run.weight_dtype,
                     device=run.device, parts=("transformer",), quantized=args.quantize_base)  # fmt: skip
    transformer = model.transformer
    seeds.seed_everything(args.seed, "lora")
    add_lora(transformer, args)
    encoders = dict(zip(lora.TEXT_PARTS, data.encoders.text_encoders, strict=False)) if args.train_text_encoder else {}
    for encoder in encoders.values():
        add_text_lora(encoder, args)
    modules = {"transformer": transformer, **encoders}
    if args.init_lora:
        fresh = lora.load(transformer, args.init_lora, encoders=encoders)
        run.print(f"--init_lora {args.init_lora}: loaded" + (f"; {len(fresh)} layers are not in it and start from zero" if fresh else ""))
    speed.apply(transformer, args)

    # Optimizer
    weights = [weight for module in modules.values() for weight in lora.parameters(module)]
    learning_rate = optim.learning_rate(args.learning_rate, args.scale_lr, data.order.global_batch)
    text_rate = optim.learning_rate(args.text_encoder_learning_rate or args.learning_rate, args.scale_lr, data.order.global_batch)
    groups = [{"params": lora.parameters(transformer), "lr": learning_rate}]
    groups += [{"params": lora.parameters(encoder), "lr": text_rate} for encoder in encoders.values()]
    optimizer = optim.build(groups, name=args.optimizer, learning_rate=learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                            weight_decay=args.adam_weight_decay, epsilon=args.adam_epsilon, device=run.device)  # fmt: skip
    schedule = optim.schedule(optimizer, args.lr_scheduler, warmup_steps=args.lr_warmup_steps, total_steps=args.max_train_steps,
                              cycles=args.lr_num_cycles, power=args.lr_power)  # fmt: skip
    average = ema.Ema(weights, args.ema_decay) if args.use_ema else None
    network, optimizer = run.accelerator.prepare(transformer, optimizer)
    run.print(f"{sum(p.numel() for p in weights):,} trainable parameters, learning rate {learning_rate:.3g}")

    # What a checkpoint holds, and where the run stands
    log = metrics.Log(run, every=args.logging_steps, images_per_add=data.order.global_batch * (2 if prior else 1))
    parts = {name: lora.State(module) for name, module in modules.items()} | {"optimizer": optimizer, "schedule": schedule, "log": log}
    parts |= {"data": data.identity} | ({"ema": average} if average else {})
    saver = checkpoint.Checkpointer(run, every=args.checkpointing_steps, keep=args.checkpoints_total_limit, parts=parts,
                                    write_weights=lambda folder: save_weights(modules, folder, average, args.export_format))  # fmt: skip
    first_step = saver.resume(args.resume_from_checkpoint)
    panels = {"loss of the subject": "instance_loss", "loss of its class": "prior_loss", "validation loss": "val_loss"} if prior else None
    validator = validation.Validator(run, args, data, model, log, loss=flow_matching_loss, panels=panels, average=average)
    if first_step == 0:
        validator.validate(0)

    transformer.train()
    streams = {"instance": (data.batches(first_step), 1.0)}  # kind of picture -> its batches, and the weight of its loss
    streams |= {"prior": (prior.batches(first_step), args.prior_loss_weight)} if prior else {}
    last_kind = list(streams)[-1]
    for step in range(first_step, args.max_train_steps):
        seeds.seed_everything(args.seed, "dropout", step, run.rank)  # LoRA dropout, the only draw that torch makes itself
        losses = {kind: [] for kind in streams}
        for micro in range(args.gradient_accumulation_steps):
            for kind, (batches, weight) in streams.items():
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
                last = micro == args.gradient_accumulation_steps - 1 and kind == last_kind
                with run.no_sync(network, last=last):
                    loss = flow_matching_loss(network, x0, noise, sigma, condition, batch.mask).mean()
                    run.accelerator.backward(weight * loss / args.gradient_accumulation_steps)
                losses[kind].append(loss.detach())

        # 4. update
        run.average_gradients([weight for encoder in encoders.values() for weight in lora.parameters(encoder)])  # outside of `network`
        grad_norm = run.clip_gradients(weights, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if average:
            average.update()

        means = {kind: torch.stack(values).mean() for kind, values in losses.items()}
        total = sum(weight * means[kind] for kind, (_, weight) in streams.items())
        log.add(loss=total, grad_norm=grad_norm, **({f"{kind}_loss": mean for kind, mean in means.items()} if prior else {}))
        # twin: tail
        done = step + 1
        log.write(done, lr=optim.rate(schedule), epoch=done / data.order.steps_per_epoch)
        validator.validate_if_due(done)
        saver.save_if_due(done)
        if run.stop_requested():
            return saver.stop(done)
        # end twin

    with checkpoint.writing_result(args.output_dir):
        if run.is_main:
            save_weights(modules, args.output_dir, average, args.export_format)
            if args.export_merged:
                with ema.applied(average):
                    lora.export_merged(transformer, args.output_dir / "merged_transformer")
    validator.validate_last(args.max_train_steps)
    pictures = len(data.training) // args.repeats
    card.write(run, args, kind="DreamBooth LoRA", images=pictures, prompt=data.training.images.records[0].prompt)
    run.finish(f"done: {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
