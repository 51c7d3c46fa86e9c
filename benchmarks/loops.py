"""The trainers' own steps at a published geometry, with random weights and random batches: what the benchmarks here measure.

A trainer is added by one function that takes a `Setting` and returns a `Loop`, and an entry in TRAINERS. A loop is set up with the
functions of the training script, from the script's own flags; what it leaves out is reading data, validating and saving.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import train_full_finetuning_sd3
import train_text_to_image_lora_sd3
from src import cli, flow, full, lora, optim, plan, quantize, runtime, seeds, sharding, speed
from src.pipelines import geometry, sd3

# Stand-ins of a few thousand weights, with every kind of layer of the real ones, to try the benchmarks on a CPU.
TINY = {
    "sd3.5-medium": {
        "transformer": geometry.MODELS["sd3.5-medium"]["transformer"] | {
            "sample_size": 8, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32,
            "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0, 1),
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a loop is made of.

    Attributes:
        trainer: a key of TRAINERS.
        resolution: side of the pictures in pixels; batch: pictures (pairs, trajectories) per step.
        flags: of the training script. --compile is left to whoever asks for the loop.
        tokens: L, CLIP's text tokens plus T5's.
        source: "published", "tiny" for the stand-ins, or a pipeline folder whose geometry to take.
    """

    trainer: str
    resolution: int
    flags: tuple[str, ...] = ()
    tokens: int = 154
    source: str = "published"

    def config(self, model: str, part: str) -> geometry.Config:
        """Geometry of one part, such as the transformer of "sd3.5-medium"."""
        if self.source in ("published", "tiny"):
            return (geometry.MODELS if self.source == "published" else TINY)[model][part]
        return sd3.read_config(self.source, f"{part}/config.json")


class Loop:
    """A trainer, set up and ready to step on batches of random latents.

    Attributes:
        unit: what its speed is counted in.
        model: the module whose blocks are compiled; weights: what is trained.
    """

    unit = "img"

    def __init__(self, setting: Setting, run: runtime.Run, model: nn.Module, weights: list[nn.Parameter]):
        self.setting, self.run, self.args, self.model, self.weights = setting, run, run.args, model, weights
        self.steps = 0

    def draw(self, batch: int) -> None:
        """Go on with batches of this size."""
        raise NotImplementedError

    def adopt(self, other: "Loop") -> None:
        """Take the weights and the batch of a loop of another precision."""
        raise NotImplementedError

    def losses(self) -> Tensor:
        """The loss of every sample of the batch, (b,), always with the noise of step 0."""
        raise NotImplementedError

    def step(self) -> Tensor:
        """One optimizer step, as in the training script; returns its loss, which nothing has waited for."""
        raise NotImplementedError

    def close(self) -> None:
        """End the run and remove its folder."""
        self.run.finish()
        shutil.rmtree(self.run.output_dir)

    def compile(self, **options: Any) -> None:
        """Compile the model as --compile_mode says; options of torch.compile besides."""
        speed.compile_blocks(self.model, mode=self.args.compile_mode, **options)


@dataclass
class Sample:
    """A batch as `inputs.Inputs.encode` gives it."""

    x0: Tensor  # (b, 16, h, w)
    condition: sd3.Conditioning  # embeds (b, L, D), pooled (b, P)
    positions: range = field(init=False)

    def __post_init__(self):
        self.positions = range(len(self.x0))


class FlowLoop(Loop):
    """Steps 2 to 4 of the supervised SD3 trainers.

    Args:
        loss: the script's loss of every sample.
    """

    def __init__(
        self, setting: Setting, run: runtime.Run, model: nn.Module, weights: list[nn.Parameter], optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
    ):  # fmt: skip
        super().__init__(setting, run, model, weights)
        self.loss = loss
        self.policy, self.optimizer = sharding.prepare(run.accelerator, model, optimizer)
        self.draw(1)

    def draw(self, batch: int) -> None:
        config, device = lora.unwrap(self.model).config, self.run.device
        seeds.seed_everything(0, "batch")
        side = self.setting.resolution // sd3.VAE_SCALE
        x0 = torch.randn(batch, config.in_channels, side, side, device=device)
        kind = dict(device=device, dtype=self.run.weight_dtype)
        embeds = torch.randn(batch, self.setting.tokens, config.joint_attention_dim, **kind)
        self.batch = Sample(x0, sd3.Conditioning(embeds, torch.randn(batch, config.pooled_projection_dim, **kind)))

    def adopt(self, other: "FlowLoop") -> None:
        lora.unwrap(self.model).load_state_dict(lora.unwrap(other.model).state_dict())
        self.batch = Sample(other.batch.x0, other.batch.condition.to(self.run.weight_dtype))

    def losses(self, step: int = 0) -> Tensor:
        args, batch = self.args, self.batch
        noise = seeds.normal(args.seed, step, batch.positions, "noise", batch.x0.shape[1:], self.run.device)  # (b, 16, h, w)
        u = seeds.uniform(args.seed, step, batch.positions, "sigma", self.run.device)  # (b,)
        shift = geometry.MODELS["sd3.5-medium"]["scheduler"]["shift"] if args.shift == "model" else args.shift
        sigma = flow.sigmas(u, density=args.timestep_density, logit_mean=args.logit_mean, logit_std=args.logit_std, shift=shift)
        return self.loss(self.policy, batch.x0, noise, sigma, batch.condition)

    def step(self) -> Tensor:
        loss = self.losses(self.steps).mean()
        self.run.accelerator.backward(loss)
        if not getattr(self.args, "fused_backward", False):
            self.run.clip_gradients(self.weights, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.detach()


# --------------------------------------------------------------------------- the trainers


def arguments(script: ModuleType, setting: Setting, folder: Path, *, dry_run: bool = False) -> argparse.Namespace:
    """What the script makes of the flags; for a plan also those that this machine could not run.

    Raises:
        ValueError: the script refuses them; its own message.
    """

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser = script.build_parser()
    parser.error = refuse
    plain = ["--dataset_name", "random", "--seed", "0", "--report_to", "none", "--output_dir", str(folder)]
    plain += ["--dry_run"] * dry_run + ["--resolution", str(setting.resolution)]
    return cli.parse(parser, [*plain, *setting.flags], checks=(speed.check,))


def start(script: ModuleType, setting: Setting) -> runtime.Run:
    """The script's run in a folder of its own, which `Loop.close` removes; what it prints goes to the error channel."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    with contextlib.redirect_stdout(sys.stderr):
        return runtime.start(arguments(script, setting, folder))


def apply_speed(model: nn.Module, args: argparse.Namespace) -> None:
    """As in the scripts, but for --compile: the eager loop is measured, too."""
    speed.apply(model, argparse.Namespace(**{**vars(args), "compile": False}))


def lora_sd3(setting: Setting) -> Loop:
    """Of train_text_to_image_lora_sd3.py."""
    script = train_text_to_image_lora_sd3
    run = start(script, setting)
    seeds.seed_everything(0, "transformer")
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"), dtype=run.weight_dtype, device=run.device)
    if run.args.quantize_base:
        quantize.linear_layers(transformer, run.args.quantize_base)
    script.add_lora(transformer, run.args)
    apply_speed(transformer, run.args)
    weights, args = lora.parameters(transformer.train()), run.args
    optimizer = optim.build(weights, name=args.optimizer, learning_rate=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                            weight_decay=args.adam_weight_decay, epsilon=args.adam_epsilon, device=run.device)  # fmt: skip
    return FlowLoop(setting, run, transformer, weights, optimizer, script.flow_matching_loss)


def full_sd3(setting: Setting) -> Loop:
    """Of train_full_finetuning_sd3.py."""
    script = train_full_finetuning_sd3
    run = start(script, setting)
    seeds.seed_everything(0, "transformer")
    dtype = full.DTYPES[run.args.weights_dtype]
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"), dtype=dtype, device=run.device)
    script.select(transformer, run.args)
    apply_speed(transformer, run.args)
    weights = full.parameters(transformer.train())
    optimizer = script.make_optimizer([{"params": weights, "lr": run.args.learning_rate}], run.args, run.device)
    return FlowLoop(setting, run, transformer, weights, optimizer, script.flow_matching_loss)


TRAINERS: dict[str, Callable[[Setting], Loop]] = {"lora": lora_sd3, "full": full_sd3}


# --------------------------------------------------------------------------- what they should need


def planned_lora_sd3(setting: Setting, args: argparse.Namespace) -> plan.StepMemory:
    """As --dry_run plans it, for the parts that the loop holds."""
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"))
    number = plan.BYTES[args.mixed_precision]
    counts = {"transformer": sum(p.numel() for p in transformer.parameters())}
    weights = plan.weight_bytes(counts, transformer, number, quantized=args.quantize_base)
    train_text_to_image_lora_sd3.add_lora(transformer, args)
    trained = sum(p.numel() for p in lora.parameters(transformer))
    return plan.step_memory(args, transformer, weights, trained=trained, tokens=setting.tokens)


def planned_full_sd3(setting: Setting, args: argparse.Namespace) -> plan.StepMemory:
    """As --dry_run plans it, for the parts that the loop holds."""
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"))
    whole = train_full_finetuning_sd3.full_plan(args)
    weights = plan.weight_bytes({"transformer": sum(p.numel() for p in transformer.parameters())}, transformer, whole.weight)
    train_full_finetuning_sd3.select(transformer, args)
    trained = sum(p.numel() for p in full.parameters(transformer))
    return plan.step_memory(args, transformer, weights, trained=trained, tokens=setting.tokens, whole=whole)


PLANNED: dict[str, Callable[[Setting, argparse.Namespace], plan.StepMemory]] = {"lora": planned_lora_sd3, "full": planned_full_sd3}
SCRIPTS = {"lora": train_text_to_image_lora_sd3, "full": train_full_finetuning_sd3}


def planned(setting: Setting, batch: int) -> plan.StepMemory | None:
    """The memory of a step of `batch` samples; None for a trainer that has no plan yet. Nothing is built but on the meta device."""
    if setting.trainer not in PLANNED:
        return None
    args = arguments(SCRIPTS[setting.trainer], setting, Path(tempfile.gettempdir()) / "planned", dry_run=True)
    args.train_batch_size = batch
    return PLANNED[setting.trainer](setting, args)


def make(setting: Setting) -> Loop:
    return TRAINERS[setting.trainer](setting)
