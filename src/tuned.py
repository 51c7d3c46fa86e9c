"""What is trained of a denoiser, a LoRA on frozen weights or all weights: parameters, optimizer, part of a checkpoint, files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from src import checkpoint, ema, full, lora, optim, runtime


def check_layers(args: argparse.Namespace, from_config: Callable[[str, str | None], nn.Module]) -> None:
    """Refuse names in --lora_layers and --lora_blocks that the model does not have, before anything is loaded.

    Args:
        from_config: (path, revision) -> the denoiser on the meta device.

    Raises:
        SystemExit: naming the flag.
    """
    blocks = getattr(args, "lora_blocks", None)
    if args.lora_layers or blocks:
        with runtime.refusals():
            lora.targets(from_config(args.pretrained_model_name_or_path, args.revision), args.lora_layers, blocks)


class Tuned:
    """A denoiser in training. Every process calls what writes; the main one does.

    Args:
        module: SD3's transformer or a UNet, bare; whole: all its weights are trained, not a LoRA.
    """

    def __init__(self, run: runtime.Run, args: argparse.Namespace, module: nn.Module, *, whole: bool):
        self.run, self.args, self.module, self.whole, self.name = run, args, module, whole, lora.part_of(module)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones, in the model's order."""
        return full.parameters(self.module) if self.whole else lora.parameters(self.module)

    def optimizer(self, total_steps: int, samples: int) -> tuple[Any, Any]:
        """The optimizer and its schedule; prints the learning rate, which --scale_lr multiplies by the `samples` of a step."""
        args, weights = self.args, self.parameters
        rate = optim.learning_rate(args.learning_rate, args.scale_lr, samples)
        scaled = f" = {args.learning_rate:g} x {samples} samples" if args.scale_lr else ""
        self.run.print(f"{sum(p.numel() for p in weights):,} trainable parameters, learning rate {rate:.3g}{scaled}")
        built = optim.build(weights, name=args.optimizer, learning_rate=rate, betas=(args.adam_beta1, args.adam_beta2),
                            weight_decay=args.adam_weight_decay, epsilon=args.adam_epsilon, device=self.run.device)  # fmt: skip
        return built, optim.schedule(built, args.lr_scheduler, warmup_steps=args.lr_warmup_steps, total_steps=total_steps,
                                     cycles=args.lr_num_cycles, power=args.lr_power)  # fmt: skip

    @property
    def parts(self) -> dict[str, Any]:
        """Of a checkpoint: a LoRA in state.pt, all weights in a folder in diffusers' format."""
        return {"weights": full.State({self.name: self.module})} if self.whole else {"lora": lora.State(self.module)}

    def save(self, folder: Path, average: ema.Ema | None) -> None:
        """Write the weights to `folder`; with a moving average, that goes there, the weights to `folder`/raw."""
        args = self.args
        export_format = getattr(args, "export_format", "diffusers")

        def write(place: Path) -> None:
            if self.whole:
                full.save({self.name: self.module}, place, write=self.run.is_main)
            elif self.run.is_main:
                lora.save(self.module, place, export_format)

        ema.save(folder, average, write)

    def writer(self, average: ema.Ema | None) -> Callable[[Path], None] | None:
        """Adds the LoRA to a checkpoint for other programs; None with all weights: a checkpoint has them in that format."""
        return None if self.whole else lambda folder: self.save(folder, average)

    def save_result(self, source: str, average: ema.Ema | None) -> None:
        """Write the run's result in every requested format; all weights as a complete pipeline with the other parts of `source`.

        Raises:
            SystemExit: the disk is full.
        """
        args = self.args
        with checkpoint.writing_result(args.output_dir):
            self.save(args.output_dir, average)
            if self.run.is_main and self.whole:
                full.complete_pipeline(source, args.output_dir, trained=[self.name], revision=args.revision, variant=args.variant)
            elif self.run.is_main and args.export_merged:
                with ema.applied(average):
                    lora.export_merged(self.module, args.output_dir / f"merged_{self.name}")
