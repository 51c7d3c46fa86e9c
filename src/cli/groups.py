"""Argument groups that several scripts share; a group holds only flags that every script using it honours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from src.cli.parser import Parser
from src.cli.types import (
    decay,
    existing_file,
    fraction,
    multiple_of_16,
    non_negative_float,
    non_negative_int,
    number,
    path,
    path_or_name,
    positive_float,
    positive_int,
    seed,
    t5_length,
    timestep_shift,
)

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
DENSITIES = ("logit_normal", "uniform", "mode", "cosmap")
SAMPLERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler")  # of noise prediction, in diffusers
ATTENTION_BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs")
NOISE_LEVELS = {"cps": 0.8, "precise": 1.5, "flow": 0.7}  # by --transition; their authors' values

# A flag has two lines, its parsing and its help text: formatted, it would have six.
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
    """Trade-offs between memory, speed and start-up time; the results stay the same but for rounding.

    Args:
        unet: the model may be SDXL, which needs checkpointing.
        graphs: CUDA graphs can be recorded: every forward pass of a step has a backward pass, with no gradient-free pass in between.
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
    """Where results go, what is logged, how a run is repeated and continued; `epochs`: log after every epoch and save after some."""
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
    """Captioned pictures, or preference pairs, their cropping, and the caches on disk; resolution None: by the model, 512 or 1024.

    Args:
        pretrain: the data set is optional and named by --pretrain_dataset_name, and text is always cached.
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
    # In this order: the default of label_column depends on whether chosen_column was given.
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
        lora_learning_rate: default with --use_lora, where that flag exists; warmup: whether the schedule starts with a warm-up by default.
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
    """Batch size, accumulation, and number of optimizer steps."""
    g = parser.add_argument_group("budget")
    g.add_argument("--train_batch_size", type=positive_int, default=1, help="samples per device and forward pass")
    g.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="forward passes per optimizer step")
    g.add_argument("--max_train_steps", type=positive_int, default=max_train_steps, help="optimizer steps in total, resumed ones included")


def add_lora_args(parser: Parser, *, rank: int = 16, alpha_per_rank: int = 1, dropout: bool = True, unet: bool = False) -> None:
    """Size, place and file format of the adapter.

    Args:
        dropout: False where a forward pass has to be reproducible.
        unet: adds --use_lora, and leaves out flags that only apply to SD3's transformer.
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
            "--export_format", choices=("diffusers", "kohya"), default="diffusers", help="kohya: a second file, for ComfyUI and Forge"
        )
    merged = "UNet" if unet else "transformer"
    g.add_argument("--export_merged", action="store_true", help=f"write the merged {merged} as one safetensors file, too")

    def usual_alpha(args: argparse.Namespace) -> float | None:
        adapted = getattr(args, "use_lora", not getattr(args, "full_weights", False))
        return float(alpha_per_rank * args.rank) if adapted else None

    parser.when_unset["lora_alpha"] = usual_alpha


def add_quantization_args(parser: Parser) -> None:
    """The number format of frozen base weights in memory."""
    g = parser.add_argument_group("frozen base")
    g.add_argument(
        "--quantize_base", choices=("int8", "nf4"),
        help="keep the blocks' attention and feed-forward weights in 8 or 4 bits (unset: in --mixed_precision); nf4 needs bitsandbytes",
    )


def add_validation_args(parser: Parser, *, guidance_scale: float = 4.5, inference_steps: int = 28) -> None:
    """Pictures rendered during training, always from the same seeds."""
    g = parser.add_argument_group("validation")
    g.add_argument("--validation_prompt", action="append", metavar="TEXT", help="prompt to render; repeat the flag for several")
    g.add_argument("--validation_prompts_file", type=existing_file, metavar="FILE", help="more prompts: .txt, one a line; .json(l); .csv")
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


def add_validation_pairs_args(parser: Parser) -> None:
    """Held-out pairs of the preference scripts."""
    g = parser.add_argument_group("validation pairs")
    g.add_argument(
        "--num_validation_pairs", type=non_negative_int,
        help="pairs never trained on, for loss and accuracy on fixed noise; whole captions, by hash (unset: one in twenty, at most 64)",
    )


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
    """Prompts of the training pictures."""
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


def add_page_args(parser: Parser) -> None:
    """The demo as a page in the browser."""
    g = parser.add_argument_group("page")
    g.add_argument("--ui", action="store_true",
                   help="serve a page for the browser: base beside LoRA, with sliders; other flags are its first values (needs gradio)")
    g.add_argument("--ui_host", default="127.0.0.1", help="address it listens on; 0.0.0.0 lets the whole network in, without a password")
    g.add_argument("--ui_port", type=positive_int, default=7860, help="port it listens on")
