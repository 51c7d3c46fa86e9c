"""Command-line arguments shared by the scripts: one function per group, types that carry the rule and the cure.

A script declares the group of its own algorithm first, then calls the groups it honours; a group holds only flags that every
script using it honours. `parse` reads `--config`, then the command line (which wins), then refuses what cannot work:
combinations without effect, folders that cannot be written, packages that are missing. Every refusal is one line that names
the flag and the cure, exit code 2, before anything heavy is imported. Standard library only (yaml inside `--config`).
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
import netrc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
DENSITIES = ("logit_normal", "uniform", "mode", "cosmap")
ATTENTION_BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")

Check = Callable[[argparse.Namespace], None]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines; shows each default except None and False, which the help text itself explains."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=118)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False
        return action.help if unset and not isinstance(action, argparse.BooleanOptionalAction) else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (positive_int, non_negative_int, multiple_of_16):
            return "N"
        if action.type in (number, positive_float, non_negative_float, fraction, decay):
            return "X"
        return "PATH" if action.type is Path else "TEXT"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; `when_unset` holds defaults that depend on other flags."""

    def __init__(self, description: str):
        super().__init__(
            usage="%(prog)s [options]", description=description, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False
        )
        # hidden, so that the script's own group comes first in --help
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.when_unset: dict[str, Callable[[argparse.Namespace], object]] = {}

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


def existing_file(text: str) -> Path:
    """Path of a file that exists."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return path


# --------------------------------------------------------------------------- groups


def add_model_args(parser: Parser, *, default: str = "models/stable-diffusion-3.5-medium") -> None:
    """The base model and its precision."""
    g = parser.add_argument_group("model")
    g.add_argument("--pretrained_model_name_or_path", default=default, help="local folder or Hub id of the base model")
    g.add_argument("--revision", help="Hub revision of the base model (unset: its main branch)")
    g.add_argument("--variant", help='variant of the weight files, for example "fp16" (unset: the plain files)')
    g.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16",
        help="autocast dtype; frozen parts are stored in it, trained weights are fp32",
    )


def add_speed_args(parser: Parser) -> None:
    """What is traded between memory, speed and the time to start; the numbers stay the same but for rounding."""
    g = parser.add_argument_group("speed")
    g.add_argument(
        "--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="recompute activations in the backward pass: about a third more time for a fraction of the activation memory",
    )
    g.add_argument("--checkpoint_every", type=positive_int, default=1, help="recompute every N-th block only: saves less memory, less time")
    g.add_argument("--allow_tf32", action="store_true", help="TF32 in fp32 matrix products and convolutions (Ampere GPUs and later)")
    g.add_argument("--attention_backend", choices=ATTENTION_BACKENDS, default="native", help="kernel of attention, by diffusers' names")
    g.add_argument("--compile", action="store_true", help="torch.compile each block: minutes at the start, faster steps")
    g.add_argument(
        "--compile_mode", choices=COMPILE_MODES, default="default",
        help="reduce-overhead: CUDA graphs, for small pictures and batches of one shape; max-autotune: tries more kernels",
    )


def add_text_args(parser: Parser) -> None:
    """SD3's T5 sequence (SD1.5 has none)."""
    g = parser.add_argument_group("text")
    g.add_argument(
        "--max_sequence_length", type=positive_int,
        help="T5 tokens in training, validation and demo alike (unset: what the model's own tokenizer says, at most 256)",
    )


def add_run_args(parser: Parser, *, output_dir: str, tracker_project_name: str = "dive-sd3") -> None:
    """Where results go, what is logged, how a run is repeated and continued."""
    g = parser.add_argument_group("run")
    g.add_argument("--output_dir", type=Path, default=Path(output_dir), help="folder of weights, checkpoints, samples, metrics")
    g.add_argument("--config", type=Path, metavar="FILE.yaml", help="YAML (or an args.json) that sets flags by name; the command line wins")
    g.add_argument("--seed", type=non_negative_int, help="of every random number (unset: drawn, printed, recorded in args.json)")
    g.add_argument(
        "--report_to", choices=("tensorboard", "wandb", "all", "none"), default="tensorboard", help="tracker, besides metrics.jsonl"
    )
    g.add_argument("--tracker_project_name", default=tracker_project_name, help="project name in the tracker")
    g.add_argument("--logging_steps", type=positive_int, default=10, help="optimizer steps that one line of metrics averages over")
    g.add_argument("--checkpointing_steps", type=positive_int, default=500, help="optimizer steps between checkpoints")
    g.add_argument("--checkpoints_total_limit", type=positive_int, help="keep only the newest N checkpoints (unset: all)")
    g.add_argument(
        "--resume_from_checkpoint", metavar="latest|PATH",
        help="continue a run with its weights, optimizer, EMA, metrics and data order; on a GPU exact only with --deterministic",
    )
    g.add_argument("--deterministic", action="store_true", help="deterministic GPU kernels: the same tensors twice, somewhat slower")
    g.add_argument("--dry_run", action="store_true", help="check everything, print the plan (sizes, steps, memory, FLOPs), load no weights")
    g.add_argument("--push_to_hub", action="store_true", help="upload the result with a model card (needs `hf auth login`)")
    g.add_argument("--hub_model_id", help="repository to push to (unset: the name of --output_dir under your account)")


def add_data_args(parser: Parser, *, dataset_name: str | None = None, resolution: int = 512, caption_dropout: float = 0.1) -> None:
    """Captioned pictures, how they are cut, and the caches on disk."""
    g = parser.add_argument_group("data")
    g.add_argument("--dataset_name", default=dataset_name,
                   help="folder (metadata.jsonl/.csv or one .txt per picture), parquet, webdataset or Hub id")
    g.add_argument("--dataset_revision", help="Hub revision of the data set (unset: its main branch)")
    g.add_argument("--image_column", default="image", help="column of the pictures")
    g.add_argument("--caption_column", default="text", help="column of the captions")
    g.add_argument("--cache_dir", type=Path, default=Path("outputs/cache"), help="folder of downloads and of the latent and text caches")
    g.add_argument("--max_train_samples", type=positive_int, help="use only the first N samples (unset: all)")
    g.add_argument("--strict_data", action="store_true", help="stop at the first broken picture (unset: skip it and print the count)")
    g.add_argument("--resolution", type=multiple_of_16, default=resolution, help="side in pixels; in buckets the root of the area")
    g.add_argument("--aspect_buckets", action="store_true", help="keep aspect ratios up to 2:1, one per global batch (unset: squares)")
    g.add_argument("--random_crop", action="store_true", help="random instead of centre crop (not with --cache_latents)")
    g.add_argument("--no_hflip", action="store_true", help="never mirror a picture (unset: half of the time)")
    g.add_argument("--caption_dropout", type=fraction, default=caption_dropout, help="share of captions left empty (teaches guidance)")
    g.add_argument("--dataloader_num_workers", type=non_negative_int, default=4, help="processes that load samples; 0: the main one")
    g.add_argument(
        "--cache_latents", action=argparse.BooleanOptionalAction, default=True, help="encode every picture once, keep the latents on disk"
    )
    g.add_argument(
        "--cache_text", action=argparse.BooleanOptionalAction, default=True,
        help="encode every caption once, keep the embeddings on disk and no text encoder in memory",
    )
    g.add_argument("--cache_batch_size", type=positive_int, default=8, help="samples per forward pass while the caches are filled")


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


def add_optimization_args(parser: Parser, *, learning_rate: float, weight_decay: float = 1e-2, ema_decay: float = 0.999) -> None:
    """Optimizer, schedule, clipping and the moving average of the weights."""
    g = parser.add_argument_group("optimization")
    g.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw8bit needs bitsandbytes, prodigy needs prodigyopt")
    g.add_argument("--learning_rate", type=positive_float, help=f"peak of the schedule (unset: {learning_rate:g}; prodigy: 1)")
    g.add_argument("--scale_lr", action="store_true", help="multiply the learning rate by the global batch; the result is printed")
    g.add_argument("--lr_scheduler", choices=SCHEDULES, default="constant", help="shape of the learning rate over the run")
    g.add_argument("--lr_warmup_steps", type=non_negative_int, default=0, help="optimizer steps of linear warm-up (not with constant)")
    g.add_argument("--lr_num_cycles", type=positive_int, default=1, help="restarts of cosine_with_restarts")
    g.add_argument("--lr_power", type=positive_float, default=1.0, help="power of polynomial")
    g.add_argument("--adam_beta1", type=decay, default=0.9, help="decay of the first moment")
    g.add_argument("--adam_beta2", type=decay, default=0.999, help="decay of the second moment")
    g.add_argument("--adam_weight_decay", type=non_negative_float, default=weight_decay, help="decoupled weight decay (every optimizer)")
    g.add_argument("--adam_epsilon", type=positive_float, default=1e-8, help="floor of the denominator")
    g.add_argument("--max_grad_norm", type=non_negative_float, default=1.0, help="clip the global gradient norm to this; 0: no clipping")
    g.add_argument("--use_ema", action="store_true", help="keep a moving average of the trained weights; it is validated and saved")
    g.add_argument("--ema_decay", type=decay, default=ema_decay, help="decay of that average per optimizer step")
    parser.when_unset["learning_rate"] = lambda args: 1.0 if args.optimizer == "prodigy" else learning_rate


def add_budget_args(parser: Parser, *, max_train_steps: int, train_batch_size: int = 1) -> None:
    """How much is computed."""
    g = parser.add_argument_group("budget")
    g.add_argument("--train_batch_size", type=positive_int, default=train_batch_size, help="samples per device and forward pass")
    g.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes per optimizer step")
    g.add_argument("--max_train_steps", type=positive_int, default=max_train_steps, help="optimizer steps in total, resumed ones included")


def add_full_args(parser: Parser) -> None:
    """Which weights of the model are trained, in which precision, and what is saved."""
    g = parser.add_argument_group("full fine-tuning")
    g.add_argument(
        "--weights_dtype", choices=("fp32", "bf16"), default="fp32",
        help="of the transformer's weights: fp32, or bf16 with stochastic rounding (half the memory; the optimizer's state stays as it is)",
    )
    g.add_argument(
        "--fused_backward", action="store_true",
        help="update each weight during the backward pass and free its gradient; one process, no accumulation, --max_grad_norm 0",
    )
    g.add_argument("--train_blocks", help='train these transformer blocks alone, for example "0-11,23" (unset: everything)')
    g.add_argument("--freeze_last_blocks", type=non_negative_int, default=0, help="leave the last N transformer blocks as they are")
    g.add_argument("--train_text_encoder", action="store_true", help="train CLIP-L and CLIP-G too (not with --cache_text)")
    g.add_argument("--text_encoder_learning_rate", type=positive_float, help="of those two (unset: that of the transformer)")
    g.add_argument("--from_config", action="store_true", help="start from random transformer weights instead of the base model's")
    g.add_argument("--ema_device", choices=("gpu", "cpu"), default="gpu", help="where the average is kept; cpu: memory for time")
    g.add_argument("--save_transformer_only", action="store_true", help="save no complete pipeline folder, only transformer/")


def add_lora_args(parser: Parser, *, rank: int = 16) -> None:
    """Size, place and file format of the adapter."""
    g = parser.add_argument_group("LoRA")
    g.add_argument("--rank", type=positive_int, default=rank, help="rank of the update matrices")
    g.add_argument("--lora_alpha", type=positive_float, help="the update is scaled by alpha / rank (unset: alpha = rank)")
    g.add_argument("--lora_dropout", type=decay, default=0.0, help="dropout on the adapters' input")
    g.add_argument("--use_dora", action="store_true", help="weight-decomposed LoRA: direction and magnitude separately")
    g.add_argument("--lora_layers", help="comma-separated module suffixes (unset: every attention projection that gets a gradient)")
    g.add_argument("--lora_blocks", help='transformer blocks, for example "0-11,23" (unset: all)')
    g.add_argument("--init_lora", metavar="PATH", help="start from this LoRA file or folder (unset: from zero)")
    g.add_argument(
        "--export_format", choices=("diffusers", "kohya"), default="diffusers", help="kohya: a second file, for ComfyUI, A1111, Forge"
    )
    g.add_argument("--export_merged", action="store_true", help="write the merged transformer as one safetensors file, too")
    parser.when_unset["lora_alpha"] = lambda args: float(args.rank)


def add_quantization_args(parser: Parser) -> None:
    """How a base model that stays frozen is kept in memory."""
    g = parser.add_argument_group("frozen base")
    g.add_argument(
        "--quantize_base", choices=("int8", "nf4"),
        help="keep the blocks' attention and feed-forward weights in 8 or 4 bits (unset: in --mixed_precision); nf4 needs bitsandbytes",
    )


def add_validation_args(parser: Parser, *, guidance_scale: float = 4.5, inference_steps: int = 28, steps: int = 100) -> None:
    """Pictures rendered during training, always from the same seeds."""
    g = parser.add_argument_group("validation")
    g.add_argument("--validation_prompt", action="append", metavar="TEXT", help="prompt to render; repeat the flag for several")
    g.add_argument("--validation_prompts_file", type=existing_file, metavar="FILE", help="text file of more prompts, one a line")
    g.add_argument("--validation_steps", type=positive_int, default=steps, help="optimizer steps between validations")
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


def read_config(parser: argparse.ArgumentParser, path: Path, argv: list[str]) -> list[str]:
    """Command-line tokens equivalent to a YAML file of flags; repeatable flags that `argv` gives itself are left out.

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
        return []
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be lines of `flag: value`, got a {type(content).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    tokens = []
    for key, value in content.items():
        if key not in actions:
            near = difflib.get_close_matches(str(key), actions, n=1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags"))
        action = actions[key]
        repeated = isinstance(action, argparse._AppendAction) and any(token.split("=")[0] in action.option_strings for token in argv)
        if not repeated:  # command line wins, also where both lists would be joined
            tokens += _tokens(action, value, where)
    return tokens


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
    nearest = folder.expanduser().absolute()
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
            raise ValueError(f"--report_to {report_to}: {name} is not installed; pip install {name}, or --report_to none")
    mode = os.environ.get("WANDB_MODE", "online")
    if "wandb" in names and mode not in ("offline", "disabled", "dryrun") and not _wandb_login():
        raise ValueError(f"--report_to {report_to}: no wandb login on this machine; run `wandb login`, or set WANDB_MODE=offline")


# flags, when they count, why they do not
_WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], Callable[[argparse.Namespace], bool], str], ...] = (
    (("lr_warmup_steps",), lambda a: a.lr_scheduler != "constant", "with --lr_scheduler constant; use constant_with_warmup"),
    (("lr_num_cycles",), lambda a: a.lr_scheduler == "cosine_with_restarts", "without --lr_scheduler cosine_with_restarts"),
    (("lr_power",), lambda a: a.lr_scheduler == "polynomial", "without --lr_scheduler polynomial"),
    (("adam_beta1", "adam_beta2", "adam_epsilon"), lambda a: a.optimizer != "adafactor", "with --optimizer adafactor; leave it out"),
    (("ema_decay", "ema_device"), lambda a: a.use_ema, "without --use_ema"),
    (("text_encoder_learning_rate",), lambda a: a.train_text_encoder, "without --train_text_encoder"),
    (("logit_mean", "logit_std"), lambda a: a.timestep_density == "logit_normal", "without --timestep_density logit_normal"),
    (("mode_scale",), lambda a: a.timestep_density == "mode", "without --timestep_density mode"),
    (("checkpoint_every",), lambda a: a.gradient_checkpointing, "without --gradient_checkpointing"),
    (("compile_mode",), lambda a: a.compile, "without --compile"),
    (("hub_model_id",), lambda a: a.push_to_hub, "without --push_to_hub"),
    (("tracker_project_name",), lambda a: a.report_to != "none", "with --report_to none"),
    (("cache_batch_size",), lambda a: a.cache_latents or a.cache_text, "without --cache_latents or --cache_text"),
    (("revision",), lambda a: not os.path.isdir(a.pretrained_model_name_or_path), "on a local --pretrained_model_name_or_path"),
    (("dataset_revision",), lambda a: not os.path.exists(a.dataset_name or ""), "on a local --dataset_name"),
)


def _full_refusals(args: argparse.Namespace) -> Iterator[str]:
    """What cannot work in full fine-tuning."""
    if args.weights_dtype == "bf16" and args.mixed_precision != "bf16":
        yield f"--weights_dtype bf16 needs --mixed_precision bf16, got {args.mixed_precision}"
    if args.optimizer == "prodigy" and (args.weights_dtype == "bf16" or args.fused_backward):
        flag = "--fused_backward" if args.fused_backward else "--weights_dtype bf16"
        yield f"--optimizer prodigy derives its step from all weights at once, {flag} updates them one by one; use adamw"
    if args.text_encoder_learning_rate and args.optimizer == "prodigy":
        yield "--text_encoder_learning_rate contradicts --optimizer prodigy, which finds one step size for all; leave it out"
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
    if args.train_text_encoder and args.cache_text:
        yield "--train_text_encoder changes the embeddings that --cache_text keeps: add --no-cache_text"
    if args.train_text_encoder and args.save_transformer_only:
        yield "--save_transformer_only would drop what --train_text_encoder trained; leave one out"


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
    if has.get("compile_mode") == "reduce-overhead":
        if has["gradient_checkpointing"]:
            yield "--compile_mode reduce-overhead cannot record what --gradient_checkpointing computes twice; use default"
        if has.get("aspect_buckets"):
            yield "--compile_mode reduce-overhead records one size of picture, --aspect_buckets has many; use default"
    if has.get("quantize_base"):
        if has.get("use_dora"):
            yield "--use_dora needs the base's full weights, which --quantize_base does not keep; leave one out"
        if has.get("export_merged"):
            yield "--export_merged would write the rounded weights of --quantize_base: leave it out, and merge the LoRA into the original"
    if has.get("scale_lr") and has["optimizer"] == "prodigy":
        yield "--scale_lr contradicts --optimizer prodigy, which finds its own step size; leave it out"
    if "lr_warmup_steps" in has and has["lr_scheduler"] == "constant_with_warmup" and not has["lr_warmup_steps"]:
        yield "--lr_scheduler constant_with_warmup needs --lr_warmup_steps of at least 1"
    if "lr_warmup_steps" in has and has.get("max_train_steps") and has["lr_warmup_steps"] >= has["max_train_steps"]:
        yield f"--lr_warmup_steps {has['lr_warmup_steps']} must be less than --max_train_steps {has['max_train_steps']}"
    if "weights_dtype" in has:
        yield from _full_refusals(args)
    if "dataset_name" in has and not has["dataset_name"]:
        yield "--dataset_name is required: a folder of captioned pictures, parquet, webdataset or a Hub id"


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


# --------------------------------------------------------------------------- parse


def _unknown(parser: argparse.ArgumentParser, rest: list[str]) -> str:
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(rest[0].split("=")[0], options, n=1) if rest[0].startswith("-") else []
    kind = "unknown flag" if rest[0].startswith("-") else "unexpected argument"
    return f"{kind} {rest[0]}; " + (f"did you mean {near[0]}?" if near else "--help lists the flags")


def _config_path(argv: list[str]) -> Path | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path)
    try:
        return finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError:  # --config without a value: the real parser says so
        return None


def parse(parser: Parser, argv: list[str] | None = None, checks: Iterable[Check] = ()) -> argparse.Namespace:
    """Arguments from `--config`, then `argv` (None: the command line); exits with code 2 and one line if anything is wrong.

    checks: called with the arguments after the built-in ones, in order; each raises ValueError naming the flag and the cure.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    path = _config_path(argv) if any(action.dest == "config" for action in parser._actions) else None
    try:
        tokens = read_config(parser, path, argv) if path else []
        args, rest = parser.parse_known_args(tokens + argv)
        if rest:
            raise ValueError(_unknown(parser, rest))
        for refusal in _refusals(parser, args):
            raise ValueError(refusal)
        for name, value in parser.when_unset.items():
            if getattr(args, name) is None:
                setattr(args, name, value(args))
        for check in (check_environment, *checks):
            check(args)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    return args
