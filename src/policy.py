"""The policy of reinforcement learning, from its arguments: a LoRA or all weights of the transformer; and its start, the reference."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src import card, cli, ema, full, lora, optim, quantize, runtime, seeds, sharding, speed, transitions, tuned
from src.data import prompts
from src.pipelines import sd3, sd3_rollout


def check(args: argparse.Namespace) -> None:
    """Refuse a base model, an adapter or a result folder that cannot work, before anything is loaded.

    Raises:
        ValueError: naming the flag.
    """
    sd3.check_folder(args.pretrained_model_name_or_path)
    sd3.check_resolution(args.pretrained_model_name_or_path, args.resolution)
    optim.check(args.optimizer)
    quantize.check(args.quantize_base)
    card.check(args.push_to_hub)
    lora.check_export(args.export_format, args.use_dora)
    if args.init_lora:
        lora.check_init(args.init_lora, rank=args.rank, alpha=args.lora_alpha, use_dora=args.use_dora)
    if args.full_weights:
        full.check_output(args.output_dir, args.pretrained_model_name_or_path)
        sharding.check(os.environ, pieces=False, train_text_encoder=False, optimizer=args.optimizer, mixed_precision=args.mixed_precision)
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError("FSDP2 spreads weights that are trained as a whole: add --full_weights, or train the LoRA with --multi_gpu")
    else:
        sharding.check_whole(os.environ)


# RMS rounding error of a velocity once any weight has changed: measured in bf16; fp16 has three bits more.
ROUNDING = {"bf16": 0.01, "fp16": 0.01 / 8}
MAX_ROUNDING = 2.0  # times the clip; Flow-GRPO's own settings must pass: clip 6.55 nats, rounding 7.2 nats at its last step but one
PAPER_CLIP = 6.55  # nats: Flow-GRPO's 1e-4 a dimension at 512 px


def check_steps(args: argparse.Namespace, updates: int) -> None:
    """Refuse stochastic steps that do not exist, have no log-probability, or whose log-ratio is dominated by rounding.

    Args:
        updates: optimizer steps of an epoch; in the first no weight has changed yet, so ratios are 1.

    Raises:
        ValueError: naming the flag and the cure.
    """
    transitions.check(args.transition, args.noise_level or 0.0)
    first, stop = args.window_range
    sd3_rollout.check_window(args.num_inference_steps, args.window_size or None, (first, stop))
    guarded = getattr(args, "loss", None) == "guard"  # removes the drift, nearly all of the rounding error, from the ratio
    if args.mixed_precision == "no" or guarded or updates == 1:
        return
    step = _first_noisy(args)
    if step is not None:
        cures = [f"--window_range {first} {step}"] if step - first >= max(args.window_size, 1) else []
        cures += _flow_cure(args)
        cures += ["--loss guard"] if hasattr(args, "loss") else []
        raise ValueError(
            f"--window_range {first} {stop}: at step {step} rounding to {args.mixed_precision} alone makes an estimated log-ratio of "
            f"{rounding_nats(args)[step - first]:.2g} nats with {args.transition}, against --clip_nats {args.clip_nats:g}; "
            f"use {' or '.join([*cures, '--mixed_precision no'])}"
        )


def _first_noisy(args: argparse.Namespace) -> int | None:
    """The first step of --window_range whose log-ratio is dominated by rounding, or None."""
    noisy = (rounding_nats(args) > MAX_ROUNDING * args.clip_nats).nonzero().flatten().tolist()
    return args.window_range[0] + noisy[0] if noisy else None


def _flow_cure(args: argparse.Namespace) -> list[str]:
    """The paper's transition and clip, as flags to add to the given ones; empty if they would be refused, too."""
    usual, clip = cli.NOISE_LEVELS["flow"], max(args.clip_nats, PAPER_CLIP)
    kept = usual if args.noise_level == cli.NOISE_LEVELS[args.transition] else args.noise_level  # an unset one follows the transition
    for level in dict.fromkeys((kept, usual)):
        changed = vars(args) | {"transition": "flow", "noise_level": level, "clip_nats": clip}
        if _first_noisy(argparse.Namespace(**changed)) is None:
            flags = {"--transition flow": args.transition != "flow", f"--noise_level {level:g}": level != kept}
            flags[f"--clip_nats {clip:g}"] = clip != args.clip_nats
            return [" ".join(flag for flag, needed in flags.items() if needed)]
    return []


def rounding_nats(args: argparse.Namespace) -> Tensor:
    """Estimated mean size of the log-ratio that 16-bit rounding alone causes at each step of --window_range, nats: (stop - first,).

    Guidance is left out. Its velocity is against + g (towards - against): if the errors of the two predictions were independent, its
    error would be sqrt(g^2 + (g - 1)^2) times as large. They are assumed to be largely the same, since both predictions use the same
    weights and latents. This is not measured; but with independent errors, Flow-GRPO's last step but one would have 235 nats instead of
    7.2, and its public code trains that step in 16 bits with guidance 4.5.
    """
    first, stop = args.window_range
    levels = sd3_rollout.schedule_by_formula(args.num_inference_steps, sd3.local_shift(args.pretrained_model_name_or_path))
    found = transitions.sensitivity(args.transition, levels[first:stop], levels[first + 1 : stop + 1], args.noise_level)
    return sd3_rollout.CHANNELS * (args.resolution // sd3.VAE_SCALE) ** 2 * (ROUNDING[args.mixed_precision] * found) ** 2 / 2


def window(args: argparse.Namespace, epoch: int) -> range:
    """The steps that are stochastic and trained in this epoch."""
    return sd3_rollout.choose_window(
        epoch, args.seed, num_inference_steps=args.num_inference_steps, size=args.window_size or None,
        window_range=tuple(args.window_range), order=args.window_order, shift_every=args.window_shift_epochs,
    )  # fmt: skip


def window_size(args: argparse.Namespace) -> int:
    """Steps of every window."""
    first, stop = args.window_range
    return args.window_size or stop - first


def processes() -> int:
    """Number of processes, according to the launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def samples_per_epoch(args: argparse.Namespace) -> int:
    """Pictures of an epoch over all processes."""
    return args.sample_batch_size * args.sample_num_batches_per_epoch * processes()


@dataclass(frozen=True)
class Rollout:
    """b pictures that wait for the update: the trajectory on the CPU; advantage (b,), 0 for pictures that were not `judged` (b,)."""

    batch: prompts.Batch
    trajectory: sd3_rollout.Trajectory
    advantage: Tensor
    judged: Tensor


def rollouts(
    batches: Sequence[prompts.Batch], trajectories: Sequence[sd3_rollout.Trajectory], advantages: Tensor, judged: Tensor,
    device: torch.device,
) -> list[Rollout]:  # fmt: skip
    """This process's batches with trajectories, advantages and `judged`; advantages, judged: (N,), of all processes, by position."""
    return [
        Rollout(
            batch=batch, trajectory=trajectory, advantage=advantages[batch.positions].to(device), judged=judged[batch.positions].to(device)
        )
        for batch, trajectory in zip(batches, trajectories, strict=True)
    ]


def with_advantage(advantages: Tensor, batches: int) -> Tensor:
    """Which batches of an epoch hold any advantage other than 0, (batches,): the policy gradient of the others is 0.

    The same on every process: a batch here is that of all processes together. Advantages: (N,), by position.
    """
    return advantages.view(batches, -1).any(1)


def ratio_metrics(log_ratio: Tensor, bounded: Tensor, clip_nats: float) -> dict[str, Tensor]:
    """What is logged of replayed steps, (b,) each; bounded: the log-ratio as it is clipped, which GRPO-Guard changes."""
    beyond = {"clip_fraction": (bounded.abs() > clip_nats).float(), "clip_above": (bounded > clip_nats).float()}
    return {"log_ratio": log_ratio.abs(), "drift": bounded, **beyond}


def adapt(transformer: nn.Module, args: argparse.Namespace) -> None:
    """Make trainable an adapter on frozen weights, or with --full_weights all weights that get a gradient."""
    if args.full_weights:
        full.select(transformer)
    else:
        options = {"use_dora": args.use_dora, "layers": args.lora_layers, "blocks": args.lora_blocks}
        lora.add(transformer, rank=args.rank, alpha=args.lora_alpha, **options)


class Policy:
    """The model whose transformer is trained, always in eval mode: nothing in a rollout may depend on dropout.

    Base weights are in the run's precision or fewer bits, a LoRA in fp32; with --full_weights all weights are in fp32.

    Args:
        needs_reference: `reference` will be called; with --full_weights this keeps a frozen copy of all weights.

    Attributes:
        model: transformer (bare) and VAE. tuned: what is trained of the transformer, and its files.
        network: to be called for a gradient: the transformer, or after `prepare` its wrapper for several processes.
    """

    def __init__(self, run: runtime.Run, args: argparse.Namespace, *, needs_reference: bool):
        self.run, self.args = run, args
        if args.full_weights:  # files for the result: a failed download ends the run before it begins
            path, options = args.pretrained_model_name_or_path, dict(revision=args.revision, variant=args.variant)
            run.require(lambda: full.fetch(path, trained=["transformer"], **options))
        tuned.check_layers(args, sd3.transformer_from_config)
        self.model = self._load(("vae",), run.weight_dtype)
        self.model.transformer = self._load(("transformer",), torch.float32 if args.full_weights else run.weight_dtype).transformer
        self.network: nn.Module = self.transformer
        seeds.seed_everything(args.seed, "lora")
        adapt(self.transformer, args)
        self.tuned = tuned.Tuned(run, args, self.transformer, whole=args.full_weights)
        self._copy, self._start = None, None
        if args.init_lora:
            fresh = lora.load(self.transformer, args.init_lora)
            run.print(f"--init_lora {args.init_lora}: loaded" + (f"; {len(fresh)} layers not in it start from zero" if fresh else ""))
            self._start = _Start(self.transformer)
        if args.full_weights and needs_reference:
            # requires_grad as in the trained transformer, so that equal weights give equal bits: the KL starts at 0
            self._copy = self._load(("transformer",), torch.float32).transformer.requires_grad_(True)
            speed.narrow_frozen(self._copy, run.weight_dtype)
        for transformer in filter(None, (self.transformer, self._copy)):  # both, since other kernels round differently
            speed.apply(transformer, args)

    def _load(self, parts: tuple[str, ...], dtype: torch.dtype) -> sd3.SD3:
        args = self.args
        return sd3.load(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=dtype,
                        device=self.run.device, parts=parts, quantized=args.quantize_base)  # fmt: skip

    @property
    def transformer(self) -> nn.Module:
        return self.model.transformer

    @property
    def weights(self) -> list[nn.Parameter]:
        """The trainable parameters, in the model's order; after `prepare` the sharded ones."""
        return self.tuned.parameters

    @property
    def kind(self) -> str:
        """Name of the kind of result in the run's README."""
        return "Full fine-tuning" if self.args.full_weights else "LoRA"

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """Makes `network` work on several processes; returns the optimizer to step."""
        self.network, optimizer = sharding.prepare(self.run.accelerator, self.transformer, optimizer)
        return optimizer

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model that training started from, without gradient: the LoRA off, or as loaded by --init_lora, or the frozen copy.

        No autograd graph that still has to run backward may exist: the weights may be swapped inside.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.run.accelerator.autocast())
            if self._start is not None:
                stack.enter_context(self._start.applied())
            elif self._copy is None:
                assert not self.args.full_weights, "the policy was made without a reference"
                stack.enter_context(lora.disabled(self.transformer))
            yield self._copy or self.transformer

    def parts(self, updates: int) -> dict[str, Any]:
        """Its parts of a checkpoint, and the number of `updates` per epoch."""
        return self.tuned.parts | {"pace": Pace(updates)} | ({"reference": self._start} if self._start else {})


class Pace:
    """Optimizer steps per epoch, a part of a checkpoint: checkpoints are numbered by step, so a resumed run must have as many."""

    def __init__(self, updates: int):
        self.updates = updates

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["updates"] != self.updates:
            raise ValueError(f"saved with {state['updates']} optimizer steps an epoch, this run has {self.updates}")


class _Start:
    """The adapters as training started with them; a part of a checkpoint, since the file that they came from may change."""

    def __init__(self, transformer: nn.Module):
        self.parameters = lora.parameters(transformer)
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    def applied(self) -> contextlib.AbstractContextManager[None]:
        return ema.swapped(self.parameters, self.values)

    def state_dict(self) -> dict[str, Tensor]:
        return {str(number): value for number, value in enumerate(self.values)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for number, value in enumerate(self.values):
            value.copy_(state[str(number)])
