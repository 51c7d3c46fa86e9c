"""Command-line arguments shared by the scripts: one function per group, types that carry the rule and the cure.

A script declares the group of its own algorithm first, then calls the groups it honours; a group holds only flags that every
script using it honours. `parse` reads a wrapper's flags, `--config`, and the command line (which wins), then refuses what cannot work:
combinations without effect, folders that cannot be written, packages that are missing. Every refusal is one line that names
the flag and the cure, exit code 2, before anything heavy is imported. Standard library only (yaml inside `--config`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.util
import math
import netrc
import os
import re
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
LOSS_TYPES = ("sigmoid", "ipo", "hinge")
GRADIO = "gradio==6.31.0"  # what --ui was tested with
DENSITIES = ("logit_normal", "uniform", "mode", "cosmap")
ATTENTION_BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
NOISE_LEVELS = {"cps": 0.8, "precise": 1.5, "flow": 0.7}  # by --transition; their authors' values

Check = Callable[[argparse.Namespace], None]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines; shows each default except None, False and an empty text, which the help itself explains."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=118)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value = action.default
        if value in (None, "") or (value is False and not isinstance(action, argparse.BooleanOptionalAction)):
            return action.help
        if isinstance(value, list):  # as one would type it
            return f"{action.help} (default: {(' ' if action.nargs else ',').join(map(str, value))})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (positive_int, non_negative_int, t5_length, seed, multiple_of_16):
            return "N"
        if action.type in (number, positive_float, non_negative_float, fraction, positive_fraction, decay):
            return "X"
        return "PATH" if action.type is path else "TEXT"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line.

    Attributes:
        when_unset: defaults that depend on other flags, filled in in this order.
        total_steps: optimizer steps of a run with these arguments, once they are filled in; 0 in a program that trains nothing.
        judges: see `add_eval_args`.
    """

    def __init__(self, description: str):
        super().__init__(
            usage="%(prog)s [options]", description=description, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False
        )
        # hidden, so that the script's own group comes first in --help
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.when_unset: dict[str, Callable[[argparse.Namespace], object]] = {}
        self.total_steps: Callable[[argparse.Namespace], int] = lambda args: getattr(args, "max_train_steps", 0)
        self.judges: Callable[[argparse.Namespace, str], bool] = lambda args, scorer: True

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


def make_parser(doc: str) -> Parser:
    """Parser whose `--help` opens with the script's docstring."""
    return Parser(doc.strip())


# --------------------------------------------------------------------------- types


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
    return value


def positive_int(text: str) -> int:
    """1, 2, 3, ..."""
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """0, 1, 2, ..."""
    return _whole(text, 0)


def t5_length(text: str) -> int:
    """1 to 512 tokens of T5, what diffusers' pipeline takes; the model was trained with 256."""
    value = _whole(text, 1)
    if value > 512:
        raise argparse.ArgumentTypeError(f"is more than the pipeline takes, got {text}; try 512 or less")
    return value


def seed(text: str) -> int:
    """0 to 2**63 - 1, what a random generator takes, and room for the seeds of the pictures that follow."""
    value = _whole(text, 0)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {text}; try 0")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def positive_fraction(text: str) -> float:
    """A number in (0, 1]."""
    value = fraction(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be greater than 0, at most 1")
    return value


def decay(text: str) -> float:
    """A number in [0, 1): a decay of 1 would never forget its first value."""
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("must be less than 1, got 1; try 0.999")
    return value


def multiple_of_16(text: str) -> int:
    """A side in pixels that the VAE (8x) and the 2x2 patches divide."""
    value = positive_int(text)
    if value % 16:
        nearest = max(16, value // 16 * 16)
        raise argparse.ArgumentTypeError(f"must be a multiple of 16 (8x VAE, 2x2 patches), got {value}; try {nearest}")
    return value


def timestep_shift(text: str) -> float | str:
    """A positive number, "model" or "resolution"."""
    if text in ("model", "resolution"):
        return text
    try:
        return positive_float(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f'must be "model", "resolution" or a number greater than 0, got {text!r}') from None


def layer_numbers(text: str) -> list[int]:
    """ "7,8,9" -> [7, 8, 9]."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be block numbers such as 7,8,9, got {text!r}")
    return [int(number) for number in text.split(",")]


def path_or_name(text: str) -> str:
    """A path, a Hub id or the name of something built in; a leading ~ is the home folder, also in --config and in --flag=~/x.

    The shell expands neither, and not everything that reads a path does: folders would be checked at one place and written at another.
    """
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """A file or folder, there already or not."""
    return Path(path_or_name(text))


def existing_file(text: str) -> Path:
    """Path of a file that exists."""
    file = path(text)
    if not file.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return file


# --------------------------------------------------------------------------- groups
# A flag has two lines, how it is read and what it means: formatted, it would have six.
# fmt: off


def add_model_args(parser: Parser, *, default: str = "models/stable-diffusion-3.5-medium") -> None:
    """The base model and its precision."""
    g = parser.add_argument_group("model")
    g.add_argument("--pretrained_model_name_or_path", type=path_or_name, default=default, help="local folder or Hub id of the base model")
    g.add_argument("--revision", help="Hub revision of the base model (unset: its main branch)")
    g.add_argument("--variant", help='variant of the weight files, for example "fp16" (unset: the plain files)')
    g.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16",
        help="autocast dtype; frozen parts are stored in it, trained weights are fp32",
    )


def add_speed_args(parser: Parser, *, unet: bool = False, graphs: bool = True) -> None:
    """What is traded between memory, speed and the time to start; the numbers stay the same but for rounding.

    Args:
        unet: it may be SDXL, which needs checkpointing.
        graphs: every forward pass of a step has its backward pass, and none without gradient lies between: CUDA graphs can be recorded.
    """
    g = parser.add_argument_group("speed")
    g.add_argument(
        "--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=None if unet else False,
        help="recompute activations in the backward pass: about a third more time for a fraction of the activation memory"
        + (" (unset: for SDXL only)" if unet else ""),
    )
    g.add_argument(
        "--checkpoint_every", type=positive_int, default=1, help="recompute only every N-th block: less time lost, less memory saved"
    )
    g.add_argument(
        "--allow_tf32", action=argparse.BooleanOptionalAction,
        help="TF32 in fp32 matrix products and convolutions, on Ampere GPUs and later (unset: as torch has it, in convolutions alone)",
    )
    g.add_argument("--attention_backend", choices=ATTENTION_BACKENDS, default="native", help="kernel of attention, by diffusers' names")
    g.add_argument("--compile", action="store_true", help="torch.compile each block of the model: minutes at the start, faster steps")
    recorded = "reduce-overhead: CUDA graphs, for small pictures and batches of one shape; " if graphs else ""
    g.add_argument(
        "--compile_mode", choices=[mode for mode in COMPILE_MODES if graphs or mode != "reduce-overhead"], default="default",
        help=f"{recorded}max-autotune-no-cudagraphs: tries more kernels",
    )


def add_text_args(parser: Parser) -> None:
    """SD3's T5 sequence (SD1.5 has none)."""
    g = parser.add_argument_group("text")
    g.add_argument(
        "--max_sequence_length", type=t5_length,
        help="T5 tokens in training and validation; give the demo the same (unset: what the model's own tokenizer says, at most 256)",
    )


def add_run_args(parser: Parser, *, output_dir: str, epochs: bool = False) -> None:
    """Where results go, what is logged, how a run is repeated and continued; `epochs`: logged at every epoch's end, saved at some."""
    g = parser.add_argument_group("run")
    g.add_argument("--output_dir", type=path, default=Path(output_dir), help="folder of weights, checkpoints, samples, metrics")
    g.add_argument("--config", type=path, metavar="FILE.yaml", help="YAML (or an args.json) that sets flags by name; the command line wins")
    g.add_argument("--seed", type=seed, help="seed of every random number (unset: drawn, printed, recorded in args.json)")
    g.add_argument(
        "--report_to", choices=("tensorboard", "wandb", "all", "none"), default="tensorboard", help="tracker, besides metrics.jsonl"
    )
    g.add_argument("--tracker_project_name", default="dive-sd3", help="project name in the tracker")
    if epochs:
        g.add_argument("--checkpointing_epochs", type=positive_int, default=10, help="epochs between checkpoints")
    else:
        g.add_argument("--logging_steps", type=positive_int, default=10, help="optimizer steps that one line of metrics averages over")
        g.add_argument("--checkpointing_steps", type=positive_int, default=500, help="optimizer steps between checkpoints")
    g.add_argument("--checkpoints_total_limit", type=positive_int, help="keep only the newest N checkpoints (unset: all)")
    g.add_argument(
        "--resume_from_checkpoint", type=path_or_name, metavar="latest|PATH",
        help="continue a run with its weights, optimizer, EMA, metrics and data order; on a GPU exact only with --deterministic",
    )
    g.add_argument("--deterministic", action="store_true", help="deterministic GPU kernels: the same tensors twice, somewhat slower")
    g.add_argument("--dry_run", action="store_true", help="check everything, print the plan (sizes, steps, memory, FLOPs), load no weights")
    g.add_argument("--push_to_hub", action="store_true", help="upload the result with a model card (needs `hf auth login`)")
    g.add_argument("--hub_model_id", help="repository to push to (unset: the name of --output_dir under your account)")


def add_data_args(
    parser: Parser, *, resolution: int | None = 512, caption_dropout: float = 0.1, pairs: bool = False, pretrain: bool = False
) -> None:
    """Captioned pictures, or preference pairs, how they are cut, and the caches on disk; resolution None: by the model, 512 or 1024.

    Args:
        pretrain: the pictures may be left out, their flag is --pretrain_dataset_name, and text is always cached.
    """
    g = parser.add_argument_group("captioned pictures, sizes and caches" if pretrain else "data")
    layouts = "folder (metadata.jsonl/.csv) or parquet of pairs, or Hub id" if pairs else (
        "folder (metadata.jsonl/.csv or one .txt per picture), parquet, webdataset or Hub id"
    )
    if pretrain:
        g.add_argument(
            "--pretrain_dataset_name", type=path_or_name, help=f"pictures of the pre-training loss: {layouts} (unset: no such loss)"
        )
        g.add_argument("--pretrain_loss_weight", type=positive_float, default=1.0, help="weight of their denoising loss")
    else:
        g.add_argument("--dataset_name", type=path_or_name, help=layouts)
    g.add_argument("--dataset_revision", help="Hub revision of the data set (unset: its main branch)")
    if pairs:
        _add_pair_columns(parser, g)
    else:
        g.add_argument("--image_column", default="image", help="column of the pictures")
    g.add_argument("--caption_column", default="caption" if pairs else "text", help="column of the captions")
    g.add_argument("--cache_dir", type=path, default=Path("outputs/cache"), help="folder of latents, texts, and copies of data sets")
    g.add_argument("--max_train_samples", type=positive_int, help="use only the first N samples (unset: all)")
    g.add_argument("--strict_data", action="store_true", help="stop at the first broken picture (unset: skip it and print the count)")
    unset = "" if resolution else " (unset: 512, for SDXL 1024)"
    g.add_argument(
        "--resolution", type=multiple_of_16, default=resolution,
        help=f"side of the square in pixels; with --aspect_buckets, the square root of a bucket's area{unset}",
    )
    g.add_argument("--aspect_buckets", action=argparse.BooleanOptionalAction, default=False,
                   help="keep aspect ratios up to 2:1, one per global batch; off: squares")
    g.add_argument("--random_crop", action="store_true", help="random instead of centre crop (not with --cache_latents)")
    g.add_argument("--no_hflip", action="store_true", help="never mirror a picture (unset: half of the time)")
    g.add_argument("--caption_dropout", type=fraction, default=caption_dropout, help="share of captions left empty (teaches guidance)")
    g.add_argument("--dataloader_num_workers", type=non_negative_int, default=4, help="processes that load samples; 0: the main one")
    g.add_argument(
        "--cache_latents", action=argparse.BooleanOptionalAction, default=True, help="encode every picture once, keep the latents on disk"
    )
    if not pretrain:
        g.add_argument(
            "--cache_text", action=argparse.BooleanOptionalAction, default=True,
            help="encode every caption once, keep the embeddings on disk and no text encoder in memory",
        )
    g.add_argument("--cache_batch_size", type=positive_int, default=8, help="samples per forward pass while the caches are filled")


def _add_pair_columns(parser: Parser, group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chosen_column", help="column of the preferred pictures; with labels, of those that a 1 prefers (unset: jpg_0, as in pickapic_v2)"
    )
    group.add_argument("--rejected_column", help="column of the other pictures (unset: jpg_1)")
    group.add_argument(
        "--label_column", help="1: the first picture is preferred, 0: the second, 0.5: neither (unset: label_0, none with --chosen_column)"
    )
    # In this order: whether there are labels depends on the columns that were given.
    parser.when_unset["label_column"] = lambda args: "label_0" if args.chosen_column is None else None
    parser.when_unset["chosen_column"] = lambda args: "jpg_0"
    parser.when_unset["rejected_column"] = lambda args: "jpg_1"


def add_timestep_args(parser: Parser) -> None:
    """Density of the training timesteps."""
    g = parser.add_argument_group("timesteps")
    g.add_argument("--timestep_density", choices=DENSITIES, default="logit_normal", help="density of the noise level before the shift")
    g.add_argument("--logit_mean", type=number, default=0.0, help="mean of the logit-normal density; above 0: more noise")
    g.add_argument("--logit_std", type=positive_float, default=1.0, help="standard deviation of the logit-normal density")
    g.add_argument("--mode_scale", type=number, default=1.29, help="scale of the mode density (SD3 paper, eq. 20)")
    g.add_argument(
        "--shift", type=timestep_shift, default="model", metavar="model|resolution|NUMBER",
        help='s * u / (1 + (s - 1) * u): "model" is the scheduler\'s s, "resolution" scales it by sqrt(pixels / native pixels)',
    )


def add_optimization_args(
    parser: Parser, *, learning_rate: float, lora_learning_rate: float | None = None, weight_decay: float = 1e-2, ema_decay: float = 0.999,
    warmup: bool = False,
) -> None:
    """Optimizer, schedule, clipping and the moving average of the weights.

    Args:
        lora_learning_rate: where --use_lora is a choice; warmup: whether the schedule starts with a warm-up by default.
    """
    peaks = f"{learning_rate:g}" + (f"; with --use_lora {lora_learning_rate:g}" if lora_learning_rate else "")
    g = parser.add_argument_group("optimization")
    g.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw8bit needs bitsandbytes, prodigy needs prodigyopt")
    g.add_argument("--learning_rate", type=positive_float, help=f"peak of the schedule (unset: {peaks}; prodigy: 1)")
    g.add_argument("--scale_lr", action="store_true", help="multiply the learning rate by the global batch; the result is printed")
    default = "constant_with_warmup" if warmup else "constant"
    g.add_argument("--lr_scheduler", choices=SCHEDULES, default=default, help="shape of the learning rate over the run")
    g.add_argument(
        "--lr_warmup_steps", type=non_negative_int,
        help="optimizer steps of linear warm-up (not with constant; unset: 0, with constant_with_warmup 500 or a quarter of a shorter run)",
    )
    g.add_argument("--lr_num_cycles", type=positive_int, default=1, help="restarts of cosine_with_restarts")
    g.add_argument("--lr_power", type=positive_float, default=1.0, help="power of polynomial")
    g.add_argument("--adam_beta1", type=decay, default=0.9, help="decay of the first moment")
    g.add_argument("--adam_beta2", type=decay, default=0.999, help="decay of the second moment")
    g.add_argument("--adam_weight_decay", type=non_negative_float, default=weight_decay, help="decoupled weight decay (every optimizer)")
    g.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="floor of the denominator")
    g.add_argument("--max_grad_norm", type=non_negative_float, default=1.0, help="clip the global gradient norm to this; 0: no clipping")
    g.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=False,
                   help="validate and save a moving average of the trained weights; they themselves go to raw/")
    g.add_argument("--ema_decay", type=decay, default=ema_decay, help="decay of that average per optimizer step")

    def usual(args: argparse.Namespace) -> float:
        if args.optimizer == "prodigy":
            return 1.0
        return lora_learning_rate if lora_learning_rate and args.use_lora else learning_rate

    def warmup_steps(args: argparse.Namespace) -> int:
        return min(500, parser.total_steps(args) // 4) if args.lr_scheduler == "constant_with_warmup" else 0

    parser.when_unset["learning_rate"] = usual
    parser.when_unset["lr_warmup_steps"] = warmup_steps


def add_budget_args(parser: Parser, *, max_train_steps: int) -> None:
    """How much is computed."""
    g = parser.add_argument_group("budget")
    g.add_argument("--train_batch_size", type=positive_int, default=1, help="samples per device and forward pass")
    g.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes per optimizer step")
    g.add_argument("--max_train_steps", type=positive_int, default=max_train_steps, help="optimizer steps in total, resumed ones included")


def add_full_args(parser: Parser) -> None:
    """Which weights of the model are trained, in which precision, and what is saved."""
    g = parser.add_argument_group("full fine-tuning")
    g.add_argument(
        "--weights_dtype", choices=("fp32", "bf16"), default="fp32",
        help="dtype of the transformer's weights; bf16: with stochastic rounding, half the memory; the optimizer's state stays as it is",
    )
    g.add_argument(
        "--fused_backward", action="store_true",
        help="update each weight during the backward pass and free its gradient; one process, no accumulation, --max_grad_norm 0",
    )
    g.add_argument("--train_blocks", help='train these transformer blocks alone, for example "0-11,23" (unset: everything)')
    g.add_argument("--freeze_last_blocks", type=non_negative_int, default=0, help="leave the last N transformer blocks as they are")
    g.add_argument("--train_text_encoder", action="store_true", help="train CLIP-L and CLIP-G too; T5 stays frozen")
    g.add_argument("--text_encoder_learning_rate", type=positive_float, help="learning rate of the text encoders (unset: --learning_rate)")
    g.add_argument("--from_config", action="store_true", help="start from random transformer weights instead of the base model's")
    g.add_argument("--ema_device", choices=("gpu", "cpu"), default="gpu", help="where the average is kept; cpu: memory for time")
    g.add_argument("--save_transformer_only", action="store_true", help="save no complete pipeline folder, only transformer/")


def add_dreambooth_args(parser: Parser) -> None:
    """The subject, its class, what of a picture counts, and the text encoders."""
    g = parser.add_argument_group("DreamBooth")
    g.add_argument("--instance_data_dir", type=path, help="folder with some pictures of the subject (or any data set: --dataset_name)")
    g.add_argument("--instance_prompt", metavar="TEXT", help='caption of pictures without one, such as "a photo of sks dog"')
    g.add_argument("--repeats", type=positive_int, default=1, help="how often an epoch shows each picture of the subject")
    g.add_argument(
        "--mask_from_alpha", action="store_true",
        help="the loss counts opaque pixels alone, as a mean over them: its size does not depend on the subject's",
    )
    g.add_argument(
        "--mask_data_dir", type=path, help="folder of masks: the loss counts what is white in the picture of the same name, a mean over it"
    )
    g.add_argument(
        "--with_prior_preservation", action=argparse.BooleanOptionalAction, default=False,
        help="train on as many pictures of the class as of the subject, in a forward pass of their own, so that the class stays as it is",
    )
    g.add_argument(
        "--class_data_dir", type=path,
        help="pictures of the class; missing ones are rendered into it (unset: a folder in --cache_dir for each prompt, model and setting)",
    )
    g.add_argument(
        "--class_prompt", action="append", metavar="TEXT", help='prompt of class pictures, "a photo of a dog"; several take turns'
    )
    g.add_argument("--class_prompts_file", type=existing_file, metavar="FILE", help="text file of more class prompts, one a line")
    g.add_argument("--num_class_images", type=positive_int, default=100, help="class pictures to train on, the first of the folder")
    g.add_argument("--prior_loss_weight", type=positive_float, default=1.0, help="loss = loss of the subject + this * loss of the class")
    g.add_argument("--sample_batch_size", type=positive_int, default=4, help="class pictures that a process renders at once")
    g.add_argument("--class_inference_steps", type=positive_int, default=28, help="denoising steps of a rendered picture")
    g.add_argument("--class_guidance_scale", type=non_negative_float, default=4.5, help="guidance weight of such a picture; 1: off")
    g.add_argument(
        "--train_text_encoder", action="store_true", help="adapt CLIP-L and CLIP-G too; --cache_text then keeps T5's part out of memory"
    )
    g.add_argument("--text_encoder_learning_rate", type=positive_float, help="learning rate of the text encoders (unset: --learning_rate)")
    g.add_argument(
        "--text_encoder_rank", type=positive_int, help="rank of their update matrices (unset: --rank); scaled as the transformer's"
    )
    parser.when_unset["dataset_name"] = lambda args: str(args.instance_data_dir)


def add_dpo_args(parser: Parser) -> None:
    """The preference loss and its reference model."""
    g = parser.add_argument_group("preference optimisation")
    g.add_argument(
        "--beta_dpo", type=positive_float, default=5000.0,
        help="beta of the logit x = -beta / 2 ((m_w - m_l) - (r_w - r_l)), with mean squared errors m and r of model and reference: the "
        "convention of the paper's code; diffusers has no half, so its 2500 is 5000 here",
    )
    g.add_argument(
        "--loss_type", choices=LOSS_TYPES, default="sigmoid",
        help="sigmoid: -log sigmoid(x); ipo: (x - 1/2)^2; hinge: max(0, 1 - x)",
    )
    g.add_argument("--label_smoothing", type=fraction, default=0.0, help="share of preferences taken to be the wrong way round (sigmoid)")
    g.add_argument("--sft", action="store_true", help="fine-tune on the winners alone, by their denoising loss, without a reference")
    g.add_argument(
        "--reference_model", type=path_or_name, metavar="PATH|ID", help="pipeline whose UNet is the reference (unset: the base model)"
    )


def add_refl_args(parser: Parser) -> None:
    """Which steps of a rollout are trained, and what the loss makes of the reward."""
    g = parser.add_argument_group("reward gradient")
    g.add_argument(
        "--method", choices=("refl", "draft", "draft_lv"), default="refl",
        help="what the gradient flows through: refl one late step, straight to the picture; draft the last --draft_k steps; "
        "draft_lv the last step, and again for --num_renoised copies of the picture that are noised back to it",
    )
    g.add_argument("--num_inference_steps", type=positive_int, default=40, help="denoising steps of a training picture")
    g.add_argument(
        "--mid_range", type=non_negative_int, nargs=2, metavar=("FIRST", "LAST"),
        help="refl draws its step among FIRST to LAST, counted from 0, LAST included (unset: the last quarter, 30 39 of 40)",
    )
    g.add_argument("--draft_k", type=positive_int, default=1, help="steps that draft sends the gradient through, each recomputed there")
    g.add_argument("--num_renoised", type=positive_int, default=2, help="further pictures of draft_lv, at the price of a step each")
    g.add_argument(
        "--guidance_scale", type=non_negative_float, default=7.5,
        help="guidance weight in the rollout, as pictures will be drawn later; 1: off, as published, at half the cost",
    )
    g.add_argument("--eta", type=fraction, default=1.0, help="fresh noise of a rollout's steps: 1 as in DDPM, as published; 0 DDIM, none")
    g.add_argument(
        "--reward_threshold", type=number,
        help="the loss is relu(threshold - reward): better pictures teach no more (unset: 2 for image_reward alone, else minus the reward)",
    )
    g.add_argument(
        "--grad_scale", type=positive_float,
        help="weight of the reward's loss beside the pre-training loss (unset: 1e-3 with one and image_reward, as published for its "
        "deviation of 1, else 1); alone it decides only how --max_grad_norm and --adam_epsilon act",
    )
    g.add_argument("--decode_batch_size", type=positive_int, default=1, help="pictures that are decoded at once, with gradient")

    def last_quarter(args: argparse.Namespace) -> list[int] | None:
        steps = args.num_inference_steps
        return [min(3 * steps // 4, steps - 1), steps - 1] if args.method == "refl" else None

    def as_published(args: argparse.Namespace) -> float:
        """1e-3 is right for a reward of ImageReward's deviation of 1; beside another one pre-training would be next to all that is left."""
        return 1e-3 if args.pretrain_dataset_name is not None and "image_reward" in _scorers_of(args.scorer) else 1.0

    parser.when_unset["mid_range"] = last_quarter
    parser.when_unset["grad_scale"] = as_published
    alone = ("image_reward", "image_reward=1", "image_reward=1.0")  # of weight 1, so that the threshold is in its own units
    parser.when_unset["reward_threshold"] = lambda args: 2.0 if args.scorer in alone else None


def add_lora_args(parser: Parser, *, rank: int = 16, alpha_per_rank: int = 1, dropout: bool = True, unet: bool = False) -> None:
    """Size, place and file format of the adapter.

    Args:
        dropout: False where the same forward pass has to be repeated.
        unet: a LoRA is a choice, and without what only SD3's transformer has.
    """
    unset = "rank" if alpha_per_rank == 1 else f"{alpha_per_rank} x rank"
    g = parser.add_argument_group("LoRA")
    if unet:
        g.add_argument("--use_lora", action="store_true", help="train a LoRA instead of all weights; a reference is the UNet with it off")
    g.add_argument("--rank", type=positive_int, default=rank, help="rank of the update matrices")
    g.add_argument("--lora_alpha", type=positive_float, help=f"the update is scaled by alpha / rank (unset: alpha = {unset})")
    if dropout:
        g.add_argument("--lora_dropout", type=decay, default=0.0, help="dropout on the adapters' input")
    g.add_argument("--use_dora", action="store_true", help="weight-decomposed LoRA: direction and magnitude separately")
    g.add_argument("--lora_layers", help="comma-separated module suffixes (unset: every attention projection that gets a gradient)")
    if not unet:
        g.add_argument("--lora_blocks", help='transformer blocks, for example "0-11,23" (unset: all)')
    g.add_argument("--init_lora", type=path_or_name, metavar="PATH", help="start from this LoRA file or folder (unset: from zero)")
    if not unet:
        g.add_argument(
            "--export_format", choices=("diffusers", "kohya"), default="diffusers", help="kohya: a second file, for ComfyUI, A1111, Forge"
        )
    merged = "UNet" if unet else "transformer"
    g.add_argument("--export_merged", action="store_true", help=f"write the merged {merged} as one safetensors file, too")

    def usual_alpha(args: argparse.Namespace) -> float | None:
        adapted = getattr(args, "use_lora", not getattr(args, "full_weights", False))
        return float(alpha_per_rank * args.rank) if adapted else None

    parser.when_unset["lora_alpha"] = usual_alpha


def add_quantization_args(parser: Parser) -> None:
    """How a base model that stays frozen is kept in memory."""
    g = parser.add_argument_group("frozen base")
    g.add_argument(
        "--quantize_base", choices=("int8", "nf4"),
        help="keep the blocks' attention and feed-forward weights in 8 or 4 bits (unset: in --mixed_precision); nf4 needs bitsandbytes",
    )


def add_validation_args(parser: Parser, *, guidance_scale: float = 4.5, inference_steps: int = 28) -> None:
    """Pictures rendered during training, always from the same seeds."""
    g = parser.add_argument_group("validation")
    g.add_argument("--validation_prompt", action="append", metavar="TEXT", help="prompt to render; repeat the flag for several")
    g.add_argument("--validation_prompts_file", type=existing_file, metavar="FILE", help="text file of more prompts, one a line")
    g.add_argument("--validation_steps", type=positive_int, default=100, help="optimizer steps between validations")
    g.add_argument("--num_validation_images", type=positive_int, default=4, help="pictures per prompt")
    g.add_argument("--validation_guidance_scale", type=non_negative_float, default=guidance_scale, help="guidance weight; 1: off")
    g.add_argument("--validation_inference_steps", type=positive_int, default=inference_steps, help="denoising steps per picture")
    g.add_argument("--validation_seed", type=non_negative_int, default=0, help="seed of the first picture of each prompt; the next add 1")


def add_validation_loss_args(parser: Parser) -> None:
    """Held-out loss of the supervised scripts."""
    g = parser.add_argument_group("validation loss")
    g.add_argument(
        "--num_validation_loss_images", type=non_negative_int,
        help="pictures never trained on, for the loss on fixed noise; chosen by content (unset: one in twenty, at most 16)",
    )


def add_grpo_args(parser: Parser) -> None:
    """Groups, surrogate, KL and the alternatives to the surrogate."""
    g = parser.add_argument_group("GRPO")
    g.add_argument("--group_size", type=positive_int, default=16, help="pictures per prompt (K); their mean reward is the baseline")
    g.add_argument(
        "--loss", choices=("ppo", "guard", "nft"), default="ppo",
        help="ppo: clipped surrogate; guard: GRPO-Guard, which clips all steps alike; nft: DiffusionNFT, on pictures of the ODE sampler",
    )
    g.add_argument(
        "--clip_nats", type=positive_float, default=0.66,
        help="bound on the joint log-ratio of a step; other code clips its mean over D dimensions: 1e-5 at 512 px, D = 65,536: 0.66 nats "
        "(in Flow-GRPO's code for cps, which leaves out 1 / (2 std^2), 0.39 to 0.72 at steps 0 to 4)",
    )
    g.add_argument("--updates_per_epoch", type=positive_int, default=2, help="optimizer steps that an epoch's pictures are divided over")
    g.add_argument(
        "--advantage_std", choices=("group", "global"), default="group",
        help="divide by the standard deviation of the group's rewards, or of all of the epoch",
    )
    g.add_argument("--max_advantage", type=positive_float, default=5.0, help="bound on the absolute advantage")
    g.add_argument(
        "--kl_weight", type=non_negative_float, default=0.0,
        help="weight of the per-step KL to the reference, summed over dimensions; weights from code that averages over D carry over "
        "(see --kl_form); 0: none, which saves a forward pass. "
        "With nft it weighs |velocity - reference|^2, 1e-4 is usual",
    )
    g.add_argument(
        "--kl_form", choices=("exact", "flow_grpo"), default="exact",
        help="flow_grpo: the exact one times |dt|, what Flow-GRPO's weights of 0.04 and 0.01 belong to (--transition flow only); "
        "|dt| is 0.04 to 0.08 at the first five of ten steps, where its 0.04 is as strong as 0.0016 to 0.0033 of the exact one",
    )
    g.add_argument("--nft_strength", type=positive_fraction, default=1.0, help="beta of DiffusionNFT: how far good and bad are told apart")
    g.add_argument("--nft_levels", type=positive_int, default=3, help="noise levels that each picture is trained at, with nft")
    g.add_argument("--nft_old_rate", type=non_negative_float, default=1e-3, help="the old policy's decay grows by this per epoch, with nft")
    g.add_argument("--nft_old_decay", type=decay, default=0.5, help="largest decay of the old policy, which samples, with nft")
    parser.total_steps = lambda args: args.num_epochs * args.updates_per_epoch


def add_ddpo_args(parser: Parser) -> None:
    """Surrogate, inner epochs, and what a reward is compared with."""
    g = parser.add_argument_group("DDPO")
    g.add_argument(
        "--clip_nats", type=positive_float, default=0.66,
        help="bound on the joint log-ratio of a step; other code clips its mean over D dimensions: 1e-5 at 512 px, D = 65,536: 0.66 nats "
        "(in Flow-GRPO's code for cps, which leaves out 1 / (2 std^2), 0.39 to 0.72 at steps 0 to 4)",
    )
    g.add_argument("--num_inner_epochs", type=positive_int, default=1, help="times that an epoch's pictures are trained on")
    g.add_argument(
        "--train_batch_size", type=positive_int,
        help="pictures per device and forward pass; divides --sample_batch_size, and they are drawn as many at once (unset: the same)",
    )
    g.add_argument(
        "--train_gradient_accumulation_steps", type=positive_int,
        help="such batches, with all their steps, per optimizer step (unset: half of an epoch's, or all if that is no whole number)",
    )
    g.add_argument(
        "--train_timestep_fraction", type=positive_fraction, default=1.0,
        help="share of the window's steps that a picture is trained on, chosen anew for each picture and inner epoch",
    )
    g.add_argument(
        "--per_prompt_stat_tracking", action=argparse.BooleanOptionalAction, default=True,
        help="compare a reward with the last ones of its prompt, not with its epoch",
    )
    g.add_argument("--per_prompt_stat_tracking_buffer_size", type=positive_int, default=32, help="rewards that are kept of each prompt")
    g.add_argument(
        "--per_prompt_stat_tracking_min_count", type=positive_int, default=16,
        help="a prompt with fewer is compared with the epoch's pictures",
    )
    g.add_argument("--max_advantage", type=positive_float, default=5.0, help="bound on the absolute advantage")
    parser.when_unset["train_batch_size"] = lambda args: args.sample_batch_size

    def batches(args: argparse.Namespace) -> int:
        return max(1, args.sample_num_batches_per_epoch * args.sample_batch_size // args.train_batch_size)

    def half(args: argparse.Namespace) -> int:
        return batches(args) // (1 if batches(args) % 2 else 2)

    def total_steps(args: argparse.Namespace) -> int:
        return args.num_epochs * args.num_inner_epochs * (batches(args) // args.train_gradient_accumulation_steps)

    parser.when_unset["train_gradient_accumulation_steps"] = half
    parser.total_steps = total_steps


def add_rollout_args(parser: Parser) -> None:
    """How pictures are drawn for training, and how many; `--sample_...` are the names of older DDPO programs."""
    g = parser.add_argument_group("rollout")
    g.add_argument("--num_epochs", type=positive_int, default=200, help="rounds of sampling, scoring and training, resumed included")
    g.add_argument(
        "--sample_batch_size", type=positive_int, default=8,
        help="pictures per device and forward pass, in sampling and in training alike: a step must be scored as it was drawn",
    )
    g.add_argument("--sample_num_batches_per_epoch", type=positive_int, default=16, help="such batches per device and epoch")
    g.add_argument("--resolution", type=multiple_of_16, default=512, help="side of the pictures in pixels")
    g.add_argument(
        "--num_inference_steps", "--sample_num_steps", type=positive_int, default=10, help="denoising steps of a training picture"
    )
    g.add_argument(
        "--guidance_scale", "--sample_guidance_scale", type=non_negative_float, default=1.0,
        help="guidance weight in sampling and training; 1: off, at half the cost (training distils it)",
    )
    g.add_argument("--negative_prompt", default="", help="what guidance moves away from, in evaluation, too")
    g.add_argument(
        "--transition", choices=("cps", "precise", "flow"), default="cps",
        help="stochastic step: cps and precise keep the schedule's noise, flow (Flow-GRPO) leaves grain",
    )
    g.add_argument("--noise_level", type=number, help="a of the transition (unset: cps 0.8, precise 1.5, flow 0.7)")
    g.add_argument(
        "--window_size", type=non_negative_int, default=3,
        help="steps that are stochastic and trained, the others are deterministic; 0: all of --window_range",
    )
    g.add_argument(
        "--window_range", type=non_negative_int, nargs=2, default=[0, 5], metavar=("FIRST", "STOP"),
        help="the window lies in steps FIRST to STOP - 1, counted from 0",
    )
    g.add_argument("--window_order", choices=("random", "progressive"), default="random", help="where it starts in each epoch")
    g.add_argument("--window_shift_epochs", type=positive_int, default=25, help="epochs after which a progressive window moves on by one")
    g.add_argument("--decode_batch_size", type=positive_int, default=4, help="pictures that the VAE decodes at once")
    g.add_argument("--async_rewards", action="store_true", help="score on a background thread while the next batch is drawn; same results")
    g.add_argument("--cache_dir", type=path, default=Path("outputs/cache"), help="folder of the text cache, and of copies of data sets")
    g.add_argument("--cache_batch_size", type=positive_int, default=8, help="prompts per forward pass while the text cache is filled")
    parser.when_unset["noise_level"] = lambda args: None if getattr(args, "loss", None) == "nft" else NOISE_LEVELS.get(args.transition)


def add_prompt_args(parser: Parser) -> None:
    """What is drawn in training."""
    g = parser.add_argument_group("prompts")
    g.add_argument(
        "--prompts", type=path_or_name, default="simple_animals", metavar="NAME|PATH",
        help="simple_animals, activities or shapes; a .txt with one a line, .json, .jsonl, .csv, .parquet, a data set folder or Hub id",
    )
    g.add_argument("--prompt_column", metavar="NAME", help="field of the prompt there (unset: the first of prompt, text, caption)")
    g.add_argument("--prompts_revision", help="Hub revision of those data sets (unset: their main branch)")


def add_policy_args(parser: Parser) -> None:
    """LoRA or all weights; call it after `add_optimization_args`."""
    g = parser.add_argument_group("policy")
    g.add_argument(
        "--full_weights", action="store_true",
        help="train all weights, in fp32, instead of a LoRA; a KL needs a frozen copy of them (learning rate then 1e-05 if unset)",
    )
    lora_rate = parser.when_unset["learning_rate"]
    parser.when_unset["learning_rate"] = lambda a: 1e-5 if a.full_weights and a.optimizer != "prodigy" else lora_rate(a)
    add_quantization_args(parser)


def add_eval_args(
    parser: Parser, judges: Callable[[argparse.Namespace, str], bool], *, steps: int | None = None, guidance_scale: float = 1.0,
    inference_steps: int = 40,
) -> None:
    """Pictures of fixed prompts and seeds by the deterministic sampler, scored during training.

    Args:
        judges: (arguments, a scorer) -> whether it can judge the prompts of the evaluation; a wrapper's scorer that cannot is left out.
        steps: for scripts without epochs.
    """
    parser.judges = judges
    g = parser.add_argument_group("evaluation")
    g.add_argument(
        "--eval_prompts", type=path_or_name, metavar="NAME|PATH",
        help="prompts of the evaluation, named as in --prompts; shapes_held_out for the tiny world (unset: those of training)",
    )
    g.add_argument("--num_eval_prompts", type=positive_int, default=32, help="how many of them, from the first on; picture i has seed i")
    between = "between evaluations; also before training and at the end"
    if steps:
        g.add_argument("--eval_steps", type=positive_int, default=steps, help=f"optimizer steps {between}")
    else:
        g.add_argument("--eval_epochs", type=positive_int, default=20, help=f"epochs {between}")
    g.add_argument("--eval_num_inference_steps", type=positive_int, default=inference_steps, help="denoising steps per picture")
    g.add_argument("--eval_guidance_scale", type=non_negative_float, default=guidance_scale, help="guidance weight; 1: off")
    g.add_argument("--num_eval_images", type=positive_int, default=8, help="pictures that are kept in samples/")
    g.add_argument(
        "--eval_scorers", metavar="NAME[,NAME...]", help="held-out scorers, written as --scorer; they reveal reward hacking"
    )
    g.add_argument(
        "--stop_if_eval_drops", type=positive_float, metavar="FRACTION",
        help="end the run when one of --eval_scorers has fallen, since before training, by more than this share of its usual range, "
        "as docs/scorers.md has it: 0.1 is 0.4 of image_reward, 0.02 of clip",
    )


def add_validation_pairs_args(parser: Parser) -> None:
    """Held-out pairs of the preference scripts."""
    g = parser.add_argument_group("validation pairs")
    g.add_argument(
        "--num_validation_pairs", type=non_negative_int,
        help="pairs never trained on, for loss and accuracy on fixed noise; whole captions, by hash (unset: one in twenty, at most 64)",
    )


def add_scorer_args(parser: Parser, *, default: str | None) -> None:
    """What judges the pictures, and the settings of single scorers.

    Args:
        default: names and weights when --scorer is unset; None: nothing is judged.
    """
    g = parser.add_argument_group("scorer")
    g.add_argument("--scorer", default=default, metavar="NAME=WEIGHT,...",
                   help="what judges the pictures: names and weights, a weight of 1 may be left out; `python -m src.scorers` lists them")
    add_scorer_settings(g)


def add_scorer_settings(g: argparse._ArgumentGroup) -> None:
    """How scorers compute, and the settings of single scorers; `scorer_options` hands those on."""
    g.add_argument("--scorer_batch_size", type=positive_int, default=16, help="pictures judged at once: the memory bound")
    g.add_argument("--scorer_dtype", choices=("fp32", "bf16"), default="fp32", help="weights of the judging networks; scores are fp32")
    g.add_argument("--aesthetic_head", help="head of aesthetic: sac+logos+ava1, ava+logos, ava+logos-relu (unset: the first)")
    g.add_argument("--openclip_model", help="model of openclip, as open_clip calls it (unset: ViT-H-14)")
    g.add_argument("--openclip_pretrained", help="weights of --openclip_model, as open_clip calls them (unset: laion2b_s32b_b79k)")
    g.add_argument("--hps_version", help="version of hps, v2.1 or v2, whose numbers cannot be compared (unset: v2.1)")
    g.add_argument("--judge_url", metavar="URL", help="server of vlm_judge, like http://localhost:8000/v1; its key, if any: $JUDGE_API_KEY")
    g.add_argument("--judge_model", help="model name on the --judge_url server")
    g.add_argument("--judge_template", type=path_or_name, metavar="FILE",
                   help="question of vlm_judge, with {prompt} in it (unset: src/scorers/vlm_judge.txt)")
    g.add_argument("--judge_max", type=positive_float, help="highest mark that the question asks for (unset: 10)")
    g.add_argument("--judge_timeout", type=positive_float, help="seconds to wait for an answer of vlm_judge (unset: 60)")
    g.add_argument("--judge_concurrency", type=positive_int, help="questions to vlm_judge at a time (unset: 8)")
    g.add_argument("--judge_cache", type=path_or_name, metavar="FOLDER", help="where answers of vlm_judge are kept (unset: they are not)")


# setting of a scorer -> the scorer
SCORER_OPTIONS = {
    "aesthetic_head": "aesthetic", "openclip_model": "openclip", "openclip_pretrained": "openclip", "hps_version": "hps",
    **dict.fromkeys(
        ("judge_url", "judge_model", "judge_template", "judge_max", "judge_timeout", "judge_concurrency", "judge_cache"), "vlm_judge"
    ),
}


def add_page_args(parser: Parser) -> None:
    """The demo as a page in the browser."""
    g = parser.add_argument_group("page")
    g.add_argument("--ui", action="store_true",
                   help="serve a page for the browser: base beside LoRA, with sliders; other flags are its first values (needs gradio)")
    g.add_argument("--ui_host", default="127.0.0.1", help="address it listens on; 0.0.0.0 lets the whole network in, without a password")
    g.add_argument("--ui_port", type=positive_int, default=7860, help="port it listens on")


def scorer_options(args: argparse.Namespace) -> dict[str, object]:
    """The settings of single scorers, as `scorers.check` and `scorers.build` take them; None means unset."""
    return {
        "aesthetic_head": args.aesthetic_head, "openclip_model": args.openclip_model, "openclip_pretrained": args.openclip_pretrained,
        "hps_version": args.hps_version, "judge_url": args.judge_url, "judge_model": args.judge_model,
        "judge_template": args.judge_template, "judge_max": args.judge_max, "judge_timeout": args.judge_timeout,
        "judge_concurrency": args.judge_concurrency, "judge_cache": args.judge_cache,
    }


def _judged_by(args: argparse.Namespace, name: str) -> bool:
    """Whether a scorer stands in --scorer, or in the --eval_scorers of a script that has it."""
    return any(name in _scorers_of(spec) for spec in (args.scorer, getattr(args, "eval_scorers", None)))


def _scorers_of(spec: str | None) -> dict[str, str]:
    """The parts of NAME=WEIGHT,... by their names; empty if unset."""
    return {part.partition("=")[0].strip(): part for part in spec.split(",")} if spec else {}


# fmt: on
# --------------------------------------------------------------------------- --config


def _flag(action: argparse.Action) -> str:
    return next(option for option in action.option_strings if option.startswith("--"))


def _tokens(action: argparse.Action, value: object, where: str) -> list[str]:
    """What the command line would say for `key: value`; null means unset."""
    flag, name = _flag(action), action.dest
    if value is None:
        return []
    if action.nargs == 0:  # store_true and BooleanOptionalAction
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
        if value:
            return [flag]
        return ["--no-" + flag[2:]] if isinstance(action, argparse.BooleanOptionalAction) else []
    if value is False and "no" in (action.choices or ()):  # YAML 1.1 reads an unquoted `no` as false
        value = "no"
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not isinstance(action, argparse._AppendAction) and action.nargs is None:
        raise ValueError(f"{where}: {name} takes one value, got a list of {len(value)}")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise ValueError(f"{where}: {name} must be a number or a text, got {item!r}")
    if action.nargs is not None:
        return [flag, *map(str, values)]
    return [f"{flag}={item}" for item in values]  # one token each, so that a value may begin with a dash


def read_config(parser: argparse.ArgumentParser, path: Path) -> tuple[list[str], list[str]]:
    """Command-line tokens equivalent to a YAML file of flags, and the names of the flags that it says are unset or off.

    Raises:
        ValueError: no such file, not a mapping, unknown key (with the nearest flag), a value of the wrong kind.
    """
    import yaml

    where = f"--config {path}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return [], []
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be lines of `flag: value`, got a {type(content).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    tokens, unset = [], []
    for key, value in content.items():
        if key not in actions:
            near = difflib.get_close_matches(str(key), actions, n=1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags"))
        found = _tokens(actions[key], value, where)
        tokens += found
        if not found:
            unset.append(key)
    return tokens, unset


# --------------------------------------------------------------------------- --prompts_file


def read_prompts(path: Path, flag: str) -> list[str]:
    """One prompt per line, without empty ones.

    Raises:
        ValueError: it holds none, or is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut at U+2028 and the like
    except UnicodeDecodeError:
        raise ValueError(f"{flag} {path} is not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{flag} {path} holds no prompt; one per line")
    return prompts


# --------------------------------------------------------------------------- checks


def installed(package: str) -> bool:
    """Whether `import package` would find a real package, without importing it."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder ./wandb of earlier runs has a spec, but no origin


def check_writable(folder: Path, flag: str = "output_dir") -> None:
    """Refuses a folder that could not be created or written; creates nothing.

    Raises:
        ValueError: the path or a parent is a file, or the nearest existing parent is not writable.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"--{flag} {folder}: {nearest} is not a folder; choose another path")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--{flag} {folder}: no permission to write in {nearest}; choose another folder or change its owner")


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            if netrc.netrc(os.path.expanduser(place)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):  # absent or unreadable: wandb cannot use it either
            continue
    return False


def check_trackers(report_to: str) -> None:
    """Refuses a tracker that is not installed, and wandb without a login.

    Raises:
        ValueError: names --report_to and the cure.
    """
    names = {"all": ("tensorboard", "wandb"), "none": ()}.get(report_to, (report_to,))
    for name in names:
        if not installed(name):
            install = f"{sys.executable} -m pip install {name}"
            raise ValueError(f"--report_to {report_to}: {name} is not installed; {install}, or --report_to none")
    mode = os.environ.get("WANDB_MODE", "online")
    if "wandb" in names and mode not in ("offline", "disabled", "dryrun") and not _wandb_login():
        login = f"{sys.executable} -m wandb login"
        raise ValueError(f"--report_to {report_to}: no wandb login on this machine; run `{login}`, or set WANDB_MODE=offline")


def check_page(host: str, port: int) -> None:
    """Refuses a page without gradio, with one whose arguments were others, or at an address that is not free.

    Raises:
        ValueError: names --ui or --ui_port and the cure.
    """
    if not installed("gradio"):
        raise ValueError(f"--ui needs gradio, which is not installed: {sys.executable} -m pip install {GRADIO}")
    version = importlib.metadata.version("gradio")
    if version.split(".")[0] != GRADIO.partition("==")[2].split(".")[0]:
        raise ValueError(f"--ui does not know gradio {version}: {sys.executable} -m pip install {GRADIO}")
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--ui_port {port}: cannot listen on {host} ({error}); try --ui_port {port % 65535 + 1}") from None


def _data_of(args: argparse.Namespace) -> str | None:
    return args.dataset_name if hasattr(args, "dataset_name") else args.pretrain_dataset_name


# flags, when they count, why they do not
_WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], Callable[[argparse.Namespace], bool], str], ...] = (
    (("lr_warmup_steps",), lambda a: a.lr_scheduler != "constant" or a.lr_warmup_steps == 0,
     "with --lr_scheduler constant; use constant_with_warmup"),
    (("lr_num_cycles",), lambda a: a.lr_scheduler == "cosine_with_restarts", "without --lr_scheduler cosine_with_restarts"),
    (("lr_power",), lambda a: a.lr_scheduler == "polynomial", "without --lr_scheduler polynomial"),
    (("adam_beta1", "adam_beta2", "adam_epsilon"), lambda a: a.optimizer != "adafactor", "with --optimizer adafactor; leave it out"),
    (("ema_decay", "ema_device"), lambda a: a.use_ema, "without --use_ema"),
    (("text_encoder_learning_rate", "text_encoder_rank"), lambda a: a.train_text_encoder, "without --train_text_encoder"),
    (("class_data_dir", "class_prompt", "class_prompts_file", "num_class_images", "prior_loss_weight", "sample_batch_size",
      "class_inference_steps", "class_guidance_scale"), lambda a: getattr(a, "with_prior_preservation", True),
     "without --with_prior_preservation"),
    (("logit_mean", "logit_std"), lambda a: a.timestep_density == "logit_normal", "without --timestep_density logit_normal"),
    (("mode_scale",), lambda a: a.timestep_density == "mode", "without --timestep_density mode"),
    (("checkpoint_every",), lambda a: a.gradient_checkpointing, "without --gradient_checkpointing"),
    (("compile_mode",), lambda a: a.compile, "without --compile"),
    (("beta_dpo", "loss_type", "label_smoothing", "reference_model"), lambda a: not a.sft, "with --sft, which has no preferences"),
    (("label_smoothing",), lambda a: a.loss_type == "sigmoid", "without --loss_type sigmoid"),
    (("reference_model",), lambda a: not a.use_lora, "with --use_lora, whose reference is the UNet without it"),
    (("rank", "lora_alpha", "lora_dropout", "use_dora", "lora_layers", "init_lora", "export_merged"),
     lambda a: getattr(a, "use_lora", True), "without --use_lora"),
    (("hub_model_id",), lambda a: a.push_to_hub, "without --push_to_hub"),
    (("tracker_project_name",), lambda a: a.report_to != "none", "with --report_to none"),
    (("cache_batch_size",), lambda a: getattr(a, "cache_latents", True) or getattr(a, "cache_text", True),
     "without --cache_latents or --cache_text"),
    (("revision",), lambda a: not os.path.isdir(a.pretrained_model_name_or_path), "on a local --pretrained_model_name_or_path"),
    (("pretrain_loss_weight", "dataset_revision", "image_column", "caption_column", "max_train_samples", "strict_data", "aspect_buckets",
      "random_crop", "no_hflip", "caption_dropout", "dataloader_num_workers", "cache_latents"),
     lambda a: getattr(a, "pretrain_dataset_name", True), "without --pretrain_dataset_name"),
    (("dataset_revision",), lambda a: not os.path.exists(_data_of(a) or ""), "on a local --dataset_name"),
    (("rank", "lora_alpha", "use_dora", "lora_layers", "lora_blocks", "init_lora", "export_format", "export_merged", "quantize_base"),
     lambda a: not getattr(a, "full_weights", False), "with --full_weights"),
    (("negative_prompt",), lambda a: hasattr(a, "eval_guidance_scale") or a.guidance_scale > 1, "without --guidance_scale above 1"),
    (("negative_prompt",), lambda a: max(a.guidance_scale, getattr(a, "eval_guidance_scale", math.inf)) > 1,
     "without --guidance_scale or --eval_guidance_scale above 1"),
    (("compare",), lambda a: not getattr(a, "ui", False), "with --ui, which always compares; leave it out"),
    (("num_images", "batch_size"), lambda a: not getattr(a, "ui", False), "with --ui, which draws one picture at a time; leave it out"),
    (("ui_host", "ui_port"), lambda a: a.ui, "without --ui"),
    (("window_shift_epochs",), lambda a: a.window_order == "progressive", "without --window_order progressive"),
    (("transition", "noise_level", "window_size", "window_range", "window_order", "clip_nats", "kl_form"),
     lambda a: getattr(a, "loss", None) != "nft", "with --loss nft, which trains on pictures of the deterministic sampler"),
    (("guidance_scale",), lambda a: getattr(a, "loss", None) != "nft", "with --loss nft, which learns to do without guidance"),
    (("kl_form",), lambda a: a.kl_weight > 0, "without --kl_weight"),
    (("learning_rate",), lambda a: getattr(a, "optimizer", None) != "prodigy" or (a.learning_rate or 1) > 0.01,
     "with --optimizer prodigy, which multiplies the step size that it finds by it: leave it out, or give about 1"),
    (("nft_strength", "nft_levels", "nft_old_rate", "nft_old_decay"), lambda a: a.loss == "nft", "without --loss nft"),
    (("per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count"), lambda a: a.per_prompt_stat_tracking,
     "with --no-per_prompt_stat_tracking"),
    (("mid_range",), lambda a: a.method == "refl", "without --method refl"),
    (("draft_k",), lambda a: a.method == "draft", "without --method draft"),
    (("num_renoised",), lambda a: a.method == "draft_lv", "without --method draft_lv"),
    (("stop_if_eval_drops",), lambda a: a.eval_scorers, "without --eval_scorers, the measures that training does not see"),
    (("scorer_batch_size", "scorer_dtype"), lambda a: a.scorer or getattr(a, "eval_scorers", None), "without --scorer"),
    *(((option,), lambda a, name=name: _judged_by(a, name), f"without {name} in --scorer") for option, name in SCORER_OPTIONS.items()),
)  # fmt: skip


# flags of a wrapper that say nothing any more where one of the others is given another value
_BELONG_TOGETHER = (
    (("learning_rate",), ("use_lora", "full_weights")),
    (("chosen_column", "rejected_column", "label_column", "caption_column", "image_column"), ("dataset_name",)),
    (("eval_prompts",), ("prompts",)),  # a verifier may judge no others than its own
)


def _full_refusals(args: argparse.Namespace) -> Iterator[str]:
    """What cannot work in full fine-tuning."""
    if args.weights_dtype == "bf16" and args.mixed_precision != "bf16":
        yield f"--weights_dtype bf16 needs --mixed_precision bf16, got {args.mixed_precision}"
    if args.optimizer == "prodigy" and (args.weights_dtype == "bf16" or args.fused_backward):
        flag = "--fused_backward" if args.fused_backward else "--weights_dtype bf16"
        yield f"--optimizer prodigy derives its step from all weights at once, {flag} updates them one by one; use adamw"
    if args.fused_backward:
        if args.gradient_accumulation_steps > 1:
            yield "--fused_backward updates in every backward pass: use --gradient_accumulation_steps 1 and a larger --train_batch_size"
        if args.max_grad_norm:
            yield "--fused_backward cannot clip by a norm that is known only after the last gradient: add --max_grad_norm 0"
        if args.mixed_precision == "fp16":
            yield "--fused_backward cannot wait for fp16's loss scale: use --mixed_precision bf16 or no"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            yield "--fused_backward works on one process: leave it out, or start one (NUM_PROCESSES=1)"
    if args.train_blocks and args.freeze_last_blocks:
        yield "--freeze_last_blocks contradicts --train_blocks, which says all; give one of them"
    if args.train_text_encoder and args.save_transformer_only:
        yield "--save_transformer_only would drop what --train_text_encoder trained; leave one out"


def _dreambooth_refusals(args: argparse.Namespace) -> Iterator[str]:
    """What cannot work in DreamBooth."""
    if not args.instance_data_dir and not args.dataset_name:
        yield "--instance_data_dir is required: a folder with some pictures of your subject"
    if args.instance_data_dir and args.dataset_name and str(args.instance_data_dir) != args.dataset_name:
        yield "--dataset_name contradicts --instance_data_dir, which names the pictures too; give one of them"
    if args.instance_data_dir and args.dataset_revision:
        yield f"--dataset_revision {args.dataset_revision} has no effect on a local --instance_data_dir"
    if args.mask_from_alpha and args.mask_data_dir:
        yield "--mask_data_dir contradicts --mask_from_alpha, which is another mask; give one of them"
    if args.random_crop and (args.mask_from_alpha or args.mask_data_dir):
        yield "--random_crop may cut off all of what a mask shows: leave it out"
    if args.with_prior_preservation and not (args.class_prompt or args.class_prompts_file or args.class_data_dir):
        yield "--with_prior_preservation needs --class_prompt, what to render without your subject, or pictures in --class_data_dir"
    if args.train_text_encoder and args.export_merged:
        yield "--export_merged writes the transformer alone, without what --train_text_encoder trains; leave one out"


def _refusals(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the combination of flags, one sentence each.

    A flag counts as given if it differs from its default: so the complete args.json of a run serves as --config.
    """
    has = vars(args)
    for names, counts, why in _WITHOUT_EFFECT:
        for name in names:
            if name in has and has[name] != parser.get_default(name) and not counts(args):
                yield f"--{name} {has[name]} has no effect {why}"
    if has.get("random_crop") and has.get("cache_latents"):
        yield "--random_crop needs fresh latents for every crop: add --no-cache_latents"
    if has.get("text_encoder_learning_rate") and has["optimizer"] == "prodigy":
        yield "--text_encoder_learning_rate contradicts --optimizer prodigy, which finds one step size for all; leave it out"
    if has.get("compile_mode") == "reduce-overhead":
        if has["gradient_checkpointing"]:
            yield "--compile_mode reduce-overhead cannot record what --gradient_checkpointing computes twice; use default"
        if has.get("gradient_accumulation_steps", 1) > 1 or has.get("with_prior_preservation"):  # the second replay writes over the first's
            why = "--with_prior_preservation" if has.get("with_prior_preservation") else "--gradient_accumulation_steps"
            yield f"--compile_mode reduce-overhead keeps the gradients of one backward pass an update, {why} has several; use default"
        if has.get("aspect_buckets"):
            yield "--compile_mode reduce-overhead records one size of picture, --aspect_buckets has many; use default"
    if has.get("quantize_base"):
        if has.get("use_dora"):
            yield "--use_dora needs the base's full weights, which --quantize_base does not keep; leave one out"
        if has.get("export_merged"):
            yield "--export_merged would write the rounded weights of --quantize_base: leave it out, and merge the LoRA into the original"
    if has.get("scale_lr") and has["optimizer"] == "prodigy":
        yield "--scale_lr contradicts --optimizer prodigy, which finds its own step size; leave it out"
    if "chosen_column" in has and (has["chosen_column"] is None) != (has["rejected_column"] is None):
        yield "--chosen_column and --rejected_column belong together: give both, or neither for pickapic_v2's jpg_0 and jpg_1"
    if "weights_dtype" in has:
        yield from _full_refusals(args)
    if "instance_data_dir" in has:
        yield from _dreambooth_refusals(args)
    elif "dataset_name" in has and not has["dataset_name"]:
        pictures, pairs = "a folder of captioned pictures, parquet, webdataset", "preference pairs in a folder with metadata.jsonl, parquet"
        what = pairs if "chosen_column" in has else pictures
        yield f"--dataset_name is required: {what} or a Hub id"


def _check_warmup(args: argparse.Namespace, steps: int) -> None:
    """Refuse a warm-up of nothing, and one that never ends; steps: of the whole run."""
    has = vars(args)
    warmup, epochs = has["lr_warmup_steps"], has.get("num_epochs")
    if warmup == 0 and has["lr_scheduler"] == "constant_with_warmup" and steps >= 4:  # a quarter of fewer: 0 steps
        raise ValueError("--lr_scheduler constant_with_warmup needs --lr_warmup_steps of at least 1")
    if warmup >= steps > 0:  # 0: the script itself refuses what leaves an epoch without an update
        end = f"the {steps} optimizer steps of --num_epochs {epochs}" if epochs else f"--max_train_steps {steps}"
        raise ValueError(f"--lr_warmup_steps {warmup} must be less than {end}")


def check_environment(args: argparse.Namespace) -> None:
    """Folders that are written, and trackers: whatever of them the script has.

    Raises:
        ValueError: see `check_writable` and `check_trackers`.
    """
    has = vars(args)
    if "output_dir" in has:
        check_writable(args.output_dir)
    if "cache_dir" in has:
        check_writable(args.cache_dir, "cache_dir")
    if "report_to" in has:
        check_trackers(args.report_to)
    if has.get("ui"):
        check_page(args.ui_host, args.ui_port)


# --------------------------------------------------------------------------- parse


def _unknown(parser: argparse.ArgumentParser, rest: list[str]) -> str:
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(rest[0].split("=")[0], options, n=1) if rest[0].startswith("-") else []
    kind = "unknown flag" if rest[0].startswith("-") else "unexpected argument"
    return f"{kind} {rest[0]}; " + (f"did you mean {near[0]}?" if near else "--help lists the flags")


def _given(parser: Parser, tokens: list[str]) -> dict[str, object]:
    """The flags that stand in `tokens`, by name, with their values."""
    actions = [action for action in parser._actions if action.dest != "help"]
    unset = {action.dest: None if isinstance(action, argparse._AppendAction) else parser for action in actions}  # a value no flag has
    found, rest = parser.parse_known_args(tokens, argparse.Namespace(**unset))
    if rest:
        raise ValueError(_unknown(parser, rest))
    return {name: value for name, value in vars(found).items() if value is not unset[name]}


def _read(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Every flag by its strongest source: what is given, a --config given with it, what a wrapper says, its own --config, the default.

    A wrapper's flags stand before a lone `--`. Its values are of its own recipe: those that have no effect beside what is given, or belong
    to another data set, other prompts or other weights than those that are given, yield, too; so do held-out scorers that are trained on,
    or cannot judge the prompts of the evaluation.

    Raises:
        ValueError: an unknown flag, or what `read_config` refuses.
    """
    if not any(action.dest == "config" for action in parser._actions):  # a tool, which has no wrapper, and may have positional arguments
        args, rest = parser.parse_known_args(argv)
        if rest:
            raise ValueError(_unknown(parser, rest))
        return args
    cut = argv.index("--") if "--" in argv else -1
    wrapper, given = _given(parser, argv[: max(cut, 0)]), _given(parser, argv[cut + 1 :])
    path = given.get("config") or wrapper.get("config")
    tokens, unset = read_config(parser, path) if path else ([], [])
    file, own = _given(parser, tokens), wrapper
    if given.get("config"):
        wrapper = {name: value for name, value in wrapper.items() if name not in unset and name not in file}
        values = wrapper | file | given
    else:
        wrapper = file | wrapper
        values = wrapper | given
    for names, others in _BELONG_TOGETHER:
        if any(name in values and values[name] != own.get(name, parser.get_default(name)) for name in others):
            values = {name: value for name, value in values.items() if name not in names or name not in wrapper or name in given}
    args = parser.parse_args([], argparse.Namespace(**values))
    if "eval_scorers" in wrapper and "eval_scorers" not in given:
        held_out, trained_on = _scorers_of(args.eval_scorers), _scorers_of(args.scorer)
        kept = [part for name, part in held_out.items() if name not in trained_on and parser.judges(args, name)]
        args.eval_scorers = ",".join(kept) or None
    for names, counts, _ in _WITHOUT_EFFECT:
        for name in names:
            if name in wrapper and name not in given and not counts(args):
                setattr(args, name, parser.get_default(name))
    return args


def check(parser: Parser, args: argparse.Namespace, checks: Iterable[Check] = ()) -> None:
    """What `parse` does with arguments that have been read: refuses combinations, fills in what is unset, calls the checks.

    Raises:
        ValueError: naming the flag and the cure.
    """
    for refusal in _refusals(parser, args):
        raise ValueError(refusal)
    for name, value in parser.when_unset.items():
        if getattr(args, name) is None:
            setattr(args, name, value(args))
    if "lr_warmup_steps" in vars(args):
        _check_warmup(args, parser.total_steps(args))
    for one in checks:
        one(args)


def command_line(parser: Parser, args: argparse.Namespace, groups: Collection[str]) -> list[str]:
    """The flags of these argument groups that differ from their defaults, as one would type them."""
    tokens = []
    for action in (action for group in parser._action_groups if group.title in groups for action in group._group_actions):
        value = getattr(args, action.dest)
        if isinstance(value, list) and not isinstance(action, argparse._AppendAction):
            value = ",".join(map(str, value))  # as layer_numbers reads it
        if getattr(args, action.dest) != action.default:
            for token in _tokens(action, str(value) if isinstance(value, Path) else value, _flag(action)):
                flag, _, text = token.partition("=")
                tokens += [token] if text.startswith("-") or not text else [flag, text]
    return tokens


def parse(parser: Parser, argv: list[str] | None = None, checks: Iterable[Check] = ()) -> argparse.Namespace:
    """Arguments from `argv` (None: the command line) and its `--config`; exits with code 2 and one line if anything is wrong.

    What stands before a lone `--` in `argv` is a wrapper's, and yields to --config as well as to what stands after it.

    Args:
        checks: called with the arguments after the built-in ones, in order; each raises ValueError naming the flag and the cure.
    """
    try:
        args = _read(parser, sys.argv[1:] if argv is None else list(argv))
        check(parser, args, (check_environment, *checks))
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    return args
