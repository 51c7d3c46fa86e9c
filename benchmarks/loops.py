"""The trainers' own steps at a published geometry, with random weights and random batches, for the benchmarks.

A loop is set up with the functions of the training script, from the script's own flags; it leaves out reading data, validating and saving.
This file has the supervised SD3 trainers and the code that all loops share; `aligned.py` has the others, `trainers.py` the list of them.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import train_dreambooth_lora_sd3
import train_full_finetuning_sd3
import train_text_to_image_lora_sd3
from src import cli, flow, full, lora, optim, quantize, runtime, seeds, sharding, speed
from src.pipelines import geometry, sd3, sd15

# Stand-ins of a few thousand weights, with every kind of layer of the real ones, to try the benchmarks on a CPU.
_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TINY = {
    "sd3.5-medium": geometry.MODELS["sd3.5-medium"] | {
        "transformer": geometry.MODELS["sd3.5-medium"]["transformer"] | {
            "sample_size": 8, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32,
            "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8, "dual_attention_layers": (0, 1),
        },
        "vae": geometry.MODELS["sd3.5-medium"]["vae"] | _VAE,
    },
    "sd1.5": geometry.MODELS["sd1.5"] | {
        "unet": geometry.MODELS["sd1.5"]["unet"] | {
            "sample_size": 8, "cross_attention_dim": 16, "attention_head_dim": 2, "block_out_channels": (8, 16), "norm_num_groups": 4,
            "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        "vae": geometry.MODELS["sd1.5"]["vae"] | _VAE,
    },
}  # fmt: skip
PRIOR = ("--with_prior_preservation", "--class_prompt", "a photo of a dog")  # flags of DreamBooth's loop


@dataclass(frozen=True)
class Setting:
    """The configuration of a loop.

    Attributes:
        trainer: a key of `trainers.TRAINERS`.
        resolution: side of the pictures in pixels; batch: pictures (pairs, trajectories) per step.
        flags: of the training script. --compile is left to the caller.
        tokens: L, CLIP's text tokens plus T5's, in SD3; SD1.5 has CLIP's 77.
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
        return sd3.read_config(self.source, f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json")


class Loop:
    """A trainer, set up and ready to step on batches of random latents.

    Attributes:
        unit: of the samples in its speed.
        growth_steps: number of steps to tell whether memory grows.
        may_wait: a step has many forward passes and may wait for the device between them, as the script does.
        starts_random: a check may draw a LoRA's B at random, so that its A gets a gradient, too.
        model: the trained module, weights: its trained parameters; others: further modules to compile.
    """

    unit = "img"
    growth_steps = 200
    may_wait = False
    starts_random = True

    def __init__(
        self, setting: Setting, run: runtime.Run, model: nn.Module, weights: list[nn.Parameter], others: tuple[nn.Module, ...] = ()
    ):  # fmt: skip
        self.setting, self.run, self.args, self.model, self.weights, self.others = setting, run, run.args, model, weights, others
        self.steps = 0

    def draw(self, batch: int) -> None:
        """Go on with batches of this size."""
        raise NotImplementedError

    def adopt(self, other: "Loop") -> None:
        """Take the weights and the batch of a loop of another precision."""
        weights = lora.unwrap(other.model).state_dict()
        for module in (self.model, *self.others):  # a reference gets the policy's weights, which the other loop may hold rounded
            lora.unwrap(module).load_state_dict(weights)

    def losses(self) -> Tensor:
        """The loss of every sample of the batch, (b,), or of all of them, (1,); always with the noise of step 0."""
        raise NotImplementedError

    def step(self) -> Tensor:
        """One optimizer step, as in the training script; returns its loss without waiting for the device."""
        raise NotImplementedError

    def update(self) -> None:
        """Clip the gradients and step the optimizer."""
        if not getattr(self.args, "fused_backward", False):
            self.run.clip_gradients(self.weights, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Values that the script itself checks against a bound, by name: value and bound."""
        return {}

    def forward(self) -> None:
        """One forward pass of the batch without gradient, for loops whose cost is expressed in forward passes."""
        raise NotImplementedError

    def close(self) -> None:
        """End the run and remove its folder."""
        self.run.finish()
        shutil.rmtree(self.run.output_dir)

    def compile(self, **options: Any) -> None:
        """Compile the model by --compile_mode; options: further ones of torch.compile."""
        for module in (self.model, *self.others):
            speed.compile_blocks(module, mode=self.args.compile_mode, **options)


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
        super().adopt(other)
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
        self.update()
        return loss.detach()


class PriorLoop(FlowLoop):
    """The same with as many pictures of the class as of the subject: a forward and a backward pass each, one update."""

    unit = "pair"

    def draw(self, batch: int) -> None:
        super().draw(batch)
        self.subject = self.batch
        self.prior = Sample(self.batch.x0.flip(0), self.batch.condition)
        self.prior.positions = range(batch, 2 * batch)

    def adopt(self, other: "PriorLoop") -> None:
        super().adopt(other)
        self.subject, self.prior = self.batch, Sample(other.prior.x0, self.batch.condition)

    def step(self) -> Tensor:
        total = 0.0
        for batch, weight in ((self.subject, 1.0), (self.prior, self.args.prior_loss_weight)):
            self.batch = batch
            loss = self.losses(self.steps).mean()
            self.run.accelerator.backward(weight * loss)
            total = total + weight * loss.detach()
        self.batch = self.subject
        self.update()
        return total


# --------------------------------------------------------------------------- setting up


def arguments(
    script: ModuleType, setting: Setting, folder: Path, model: Path | None = None, *, dry_run: bool = False
) -> argparse.Namespace:  # fmt: skip
    """The script's arguments from the flags; for a plan also such that this machine could not run.

    Args:
        folder: of the run; model: of configuration files, for scripts that read them.

    Raises:
        ValueError: the script refuses them; its own message.
    """

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser = script.build_parser()
    parser.error = refuse
    known = {option for action in parser._actions for option in action.option_strings}
    plain = ["--dataset_name", "random"] if "--dataset_name" in known else []
    plain += ["--seed", "0", "--report_to", "none", "--output_dir", str(folder), "--resolution", str(setting.resolution)]
    plain += ["--dry_run"] * dry_run + (["--pretrained_model_name_or_path", str(model)] if model else [])
    return cli.parse(parser, [*plain, *setting.flags], checks=(speed.check,))


def start(script: ModuleType, setting: Setting, model: str | None = None) -> runtime.Run:
    """The script's run in a folder of its own, which `Loop.close` removes; its output goes to stderr.

    Args:
        model: a key of geometry.MODELS; its configuration files then serve as the script's base model.
    """
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    if model:
        geometry.write_configs({part: setting.config(model, part) for part in geometry.MODELS[model]}, folder / "model")
    with contextlib.redirect_stdout(sys.stderr):
        return runtime.start(arguments(script, setting, folder, folder / "model" if model else None))


def eager(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments without --compile, which is left to the caller: loops are measured uncompiled, too."""
    return argparse.Namespace(**{**vars(args), "compile": False})


@contextlib.contextmanager
def random_weights(setting: Setting) -> Iterator[list[nn.Module]]:
    """Inside, `sd3.load` and `sd15.load` build random weights of the setting's geometry and read no file; yields the denoisers built."""
    built: list[nn.Module] = []

    def part(model: str, name: str, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
        seeds.seed_everything(0, name)  # by name, so that a reference gets the policy's weights
        return geometry.build(setting.config(model, name), dtype=dtype, device=device)

    def load_sd3(
        path: str, *, parts: tuple[str, ...], dtype: torch.dtype, device: str | torch.device, quantized: str | None = None, **_: Any
    ) -> sd3.SD3:  # fmt: skip
        from diffusers import FlowMatchEulerDiscreteScheduler

        found = {name: part("sd3.5-medium", name, dtype, device) if name in parts else None for name in ("transformer", "vae")}
        if quantized and found["transformer"]:
            quantize.linear_layers(found["transformer"], quantized)
        built.extend(filter(None, [found["transformer"]]))
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(setting.config("sd3.5-medium", "scheduler"))
        config = setting.config("sd3.5-medium", "transformer")
        return sd3.SD3(path=path, **found, scheduler=scheduler, transformer_config=config)

    def load_sd15(
        path: str, *, parts: tuple[str, ...], device: str | torch.device, dtype: torch.dtype = torch.float32, **_: Any
    ) -> sd15.SD15:  # fmt: skip
        from diffusers import PNDMScheduler

        found = {name: part("sd1.5", name, dtype, device) if name in parts else None for name in ("unet", "vae")}
        built.extend(filter(None, [found["unet"]]))
        scheduler = PNDMScheduler.from_config(setting.config("sd1.5", "scheduler"))
        return sd15.SD15(path=path, **found, scheduler=scheduler, xl=False)

    with mock.patch.object(sd3, "load", load_sd3), mock.patch.object(sd15, "load", load_sd15):
        yield built


# --------------------------------------------------------------------------- the supervised trainers


def lora_sd3(setting: Setting) -> Loop:
    """The loop of train_text_to_image_lora_sd3.py."""
    return _adapted(train_text_to_image_lora_sd3, setting, FlowLoop)


def dreambooth_sd3(setting: Setting) -> Loop:
    """The loop of train_dreambooth_lora_sd3.py, with prior preservation."""
    return _adapted(train_dreambooth_lora_sd3, setting, PriorLoop)


def _adapted(script: ModuleType, setting: Setting, kind: type[FlowLoop]) -> Loop:
    run = start(script, setting)
    seeds.seed_everything(0, "transformer")
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"), dtype=run.weight_dtype, device=run.device)
    if run.args.quantize_base:
        quantize.linear_layers(transformer, run.args.quantize_base)
    script.add_lora(transformer, run.args)
    speed.apply(transformer, eager(run.args))
    weights, args = lora.parameters(transformer.train()), run.args
    optimizer = optim.build(weights, name=args.optimizer, learning_rate=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                            weight_decay=args.adam_weight_decay, epsilon=args.adam_epsilon, device=run.device)  # fmt: skip
    return kind(setting, run, transformer, weights, optimizer, script.flow_matching_loss)


def full_sd3(setting: Setting) -> Loop:
    """The loop of train_full_finetuning_sd3.py."""
    script = train_full_finetuning_sd3
    run = start(script, setting)
    seeds.seed_everything(0, "transformer")
    dtype = full.DTYPES[run.args.weights_dtype]
    transformer = geometry.build(setting.config("sd3.5-medium", "transformer"), dtype=dtype, device=run.device)
    script.select(transformer, run.args)
    speed.apply(transformer, eager(run.args))
    weights = full.parameters(transformer.train())
    optimizer = script.make_optimizer([{"params": weights, "lr": run.args.learning_rate}], run.args, run.device)
    return FlowLoop(setting, run, transformer, weights, optimizer, script.flow_matching_loss)
