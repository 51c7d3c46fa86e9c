"""The UNet that the SD1.5 scripts train, from their arguments, all weights or a LoRA: refusals and loading."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from src import card, checkpoint, cli, full, lora, optim, runtime, seeds, speed, tuned
from src.pipelines import sd15


def add_defaults(parser: cli.Parser) -> None:
    """If not given, --resolution and --gradient_checkpointing are set by whether the model is XL."""
    parser.when_unset["resolution"] = lambda args: 1024 if _is_xl(args) else 512
    parser.when_unset["gradient_checkpointing"] = _is_xl


def _is_xl(args: argparse.Namespace) -> bool:
    runtime.plan_without_download(args)
    sd15.check_folder(args.pretrained_model_name_or_path)  # a wrong path is refused by name
    return sd15.is_xl(args.pretrained_model_name_or_path, args.revision)


def check(args: argparse.Namespace) -> None:
    """Refuse settings of adapter, output, optimizer, upload and checkpoint that cannot work, before anything is loaded.

    Raises:
        ValueError: naming the flag and the cure.
    """
    if args.init_lora:
        lora.check_init(args.init_lora, rank=args.rank, alpha=args.lora_alpha, use_dora=args.use_dora)
    if not args.use_lora:
        full.check_output(args.output_dir, args.pretrained_model_name_or_path)
    optim.check(args.optimizer)
    card.check(args.push_to_hub)
    if not args.dry_run:
        checkpoint.check_resume(args.resume_from_checkpoint, args.output_dir, args.max_train_steps)


def adapt(unet: nn.Module, args: argparse.Namespace) -> None:
    """Make trainable the adapter that the flags describe, or all weights."""
    if args.use_lora:
        lora.add(unet, rank=args.rank, alpha=args.lora_alpha, dropout=args.lora_dropout, use_dora=args.use_dora, layers=args.lora_layers)
    else:
        unet.requires_grad_(True)


def load(run: runtime.Run, args: argparse.Namespace) -> sd15.SD15:
    """The model with a UNet that is ready to be trained: all weights in fp32, or frozen in the run's precision with a LoRA in fp32.

    Raises:
        ValueError: a LoRA that does not fit.
        SystemExit: a layer that does not exist, before anything is loaded; the rest of the pipeline, which the result will need, cannot
            be downloaded.
    """
    path, options = args.pretrained_model_name_or_path, dict(revision=args.revision, variant=args.variant)
    if not args.use_lora:
        run.require(lambda: full.fetch(path, trained=["unet"], **options))
    tuned.check_layers(args, sd15.denoiser_from_config)
    dtype = run.weight_dtype if args.use_lora else torch.float32
    model = sd15.load(path, **options, dtype=dtype, device=run.device, parts=("unet",))
    seeds.seed_everything(args.seed, "lora")
    adapt(model.unet, args)
    if args.init_lora:
        fresh = lora.load(model.unet, args.init_lora)
        run.print(f"--init_lora {args.init_lora}: loaded" + (f"; {len(fresh)} layers are not in it and start from zero" if fresh else ""))
    speed.apply(model.unet, args)
    return model


def load_frozen(run: runtime.Run, args: argparse.Namespace, source: str | None) -> nn.Module:
    """A second UNet beside the trained one, from `source` or, if None, from the base model; use it without gradient.

    All that decides on kernels is as in the trained one, so that equal weights give equal bits: `requires_grad` (torch's matmul folds
    its operands differently for a frozen weight), attention's kernel and compilation.
    """
    path, options = args.pretrained_model_name_or_path, dict(revision=args.revision, variant=args.variant)
    path, options = (source, {}) if source else (path, options)
    unet = sd15.load(path, **options, dtype=torch.float32, device=run.device, parts=("unet",)).unet.requires_grad_(True)
    speed.narrow_frozen(unet, run.weight_dtype)
    speed.apply(unet, args)
    return unet
