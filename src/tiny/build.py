"""Train the tiny models that the repository ships, from nothing, on a CPU.

    torchrun --nproc_per_node 2 -m src.tiny.build --only sd3          # 2 cores, writes models/tiny-sd3; `python -m` works too
    torchrun --nproc_per_node 2 -m src.tiny.build --only sd15         # writes models/tiny-sd15
    python -m src.tiny.build --only sd3 --evaluate models/tiny-sd3 --evaluation_prompts 256    # the figures of models/README.md

1. `vae`: an autoencoder learns drawings and random blots (src/tiny/autoencoder.py).
2. `decoder`: its decoder is trained further alone.
3. `transformer`, of sd3, or `unet`, of sd15: the denoiser and its text encoders are trained together, from captions, on the
   autoencoder's latents, until a given share of held-out prompts is drawn right by the verifier's reading (src/tiny/denoiser.py;
   the model-specific parts are in build_sd3.py and build_sd15.py).
4. `save`: the pipeline folder, from the checkpoints of the other stages.

Differences from Stable Diffusion: everything is small, the text encoders are trained jointly instead of coming pretrained,
and the autoencoder's loss has neither LPIPS nor an adversary. Classes, conventions and file layout are the real ones.
"""

import argparse
import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

from src.tiny import build_sd3, build_sd15
from src.tiny.autoencoder import load_vae, measure_latents, train_vae, vae_ceiling
from src.tiny.denoiser import evaluate, load_average, train_denoiser
from src.tiny.loop import count, load_as_fp32, rank_and_processes

FAMILIES = {"sd3": build_sd3, "sd15": build_sd15}
STAGES = ("vae", "decoder", "transformer", "unet", "save")
logger = logging.getLogger("build")


def print_evaluation(family: ModuleType, path: str, guidance_scale: float, n: int) -> None:
    """Print the figures that models/README.md has for a model folder."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path, local_files_only=True)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            print(f"{name}: {count(part):,} parameters")
    print(f"folder: {sum(file.stat().st_size for file in Path(path).rglob('*') if file.is_file()) / 1e6:.2f} MB")
    print("read right after encode and decode:", {name: f"{100 * share:.1f} %" for name, share in vae_ceiling(pipe.vae).items()})
    for scale in (guidance_scale, 1.0):
        scores = {name: f"{100 * share:.1f} %" for name, share in evaluate(pipe, n, scale).items()}
        print(f"{n} held-out prompts, 20 steps, guidance {scale:g}: {scores}")


def save_half(pipe, folder: str) -> None:
    """Write a pipeline folder of fp16 safetensors that loads as fp32 unless a `torch_dtype` is given."""
    pipe.to(torch.float16).save_pretrained(folder)
    load_as_fp32(folder, "text_encoder*/config.json")


def stages(family: ModuleType) -> tuple[str, ...]:
    """Return the names of a model's stages, in order."""
    return ("vae", "decoder", family.DENOISER, "save")


def run_stage(family: ModuleType, pipe, args: argparse.Namespace, stage: str) -> None:
    """Run one stage, starting from the checkpoints of the earlier ones."""
    if stage != "vae":
        load_vae(pipe.vae, args)
    if stage in ("vae", "decoder"):
        train_vae(pipe.vae, args, stage)
    elif stage == family.DENOISER:
        train_denoiser(family, pipe, args)
    elif rank_and_processes()[0] == 0:
        measure_latents(pipe.vae, args)
        load_average(family, pipe, args)
        save_half(pipe, args.output_dir)


def build(args: argparse.Namespace) -> None:
    """Train a model, stage by stage, and write it as fp16 safetensors; stages exchange checkpoints in one folder."""
    family = FAMILIES[args.only]
    started = time.perf_counter()
    pipe = family.make(args)
    for stage in stages(family) if args.stage == "all" else (args.stage,):
        run_stage(family, pipe, args, stage)
        if dist.is_initialized():
            dist.barrier()
        logger.info("stage %s done after %.1f minutes", stage, (time.perf_counter() - started) / 60)


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m src.tiny.build",
        usage="%(prog)s --only {sd3,sd15} [options]",
        allow_abbrev=False,
        description="Train the tiny models that the repository ships, from nothing, on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=list(FAMILIES), required=True, help="which model to build or evaluate")
    parser.add_argument("--output_dir", help="model folder to write; models/tiny-NAME when unset")
    parser.add_argument("--checkpoint_dir", help="folder of checkpoints and the log's neighbour; outputs/build-NAME when unset")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --checkpoint_dir")
    parser.add_argument(
        "--stage",
        choices=["all", *STAGES],
        default="all",
        help="one stage alone, from the checkpoints before it; decoder and transformer, or unet, may run side by side",
    )
    parser.add_argument("--evaluate", metavar="PATH", help="only print the figures of the model folder PATH")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the drawings and the noise")
    parser.add_argument("--vae_steps", type=int, help="optimizer steps of the autoencoder; sd3 4000, sd15 10000 when unset")
    parser.add_argument("--decoder_steps", type=int, help="optimizer steps of its decoder alone; sd3 14000, sd15 4000 when unset")
    parser.add_argument("--vae_batch_size", type=int, default=8, help="pictures in a step of the autoencoder, over all processes")
    parser.add_argument("--vae_pictures", type=int, default=24000, help="pictures that the autoencoder learns from")
    parser.add_argument(
        "--vae_blots",
        type=int,
        help="every so many-th of them is random blots, so that new shapes survive; 0: none; sd3 4, sd15 0 when unset",
    )
    parser.add_argument("--vae_channels", type=int, nargs=4, default=[16, 16, 32, 64], help="channels of the autoencoder's four levels")
    parser.add_argument("--stop_at", type=float, default=0.85, help="stop once this share of held-out prompts is right")
    parser.add_argument("--batch_size", type=int, default=64, help="drawings in a step of the denoiser, over all processes")
    parser.add_argument("--drawings", type=int, default=24000, help="captioned drawings that the denoiser learns from")
    parser.add_argument("--evaluation_steps", type=int, default=500, help="optimizer steps between evaluations and checkpoints")
    parser.add_argument("--evaluation_prompts", type=int, default=128, help="held-out prompts in an evaluation")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance in evaluations")
    sd3 = parser.add_argument_group("sd3")
    sd3.add_argument("--transformer_steps", type=int, help="optimizer steps of transformer and text encoders, at most; 10000 when unset")
    sd3.add_argument("--layers", type=int, help="blocks of the transformer; 6 when unset")
    sd3.add_argument("--heads", type=int, help="attention heads of the transformer, 32 wide each; 4 when unset")
    sd15 = parser.add_argument_group("sd15")
    sd15.add_argument("--unet_steps", type=int, help="optimizer steps of UNet and text encoder, at most; 5000 when unset")
    sd15.add_argument("--unet_channels", type=int, nargs="+", help="channels of the UNet's levels, multiples of 8; 64 64 96 when unset")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; unset folders are named after the model, unset sizes get its defaults, flags of another model are refused."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or f"models/tiny-{args.only}"
    args.checkpoint_dir = args.checkpoint_dir or f"outputs/build-{args.only}"
    family = FAMILIES[args.only]
    for name, value in family.AUTOENCODER.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for other in FAMILIES.values():
        for name, value in other.DEFAULTS.items():
            if other is family and getattr(args, name) is None:
                setattr(args, name, value)
            elif other is not family and getattr(args, name) is not None:
                parser.error(f"--{name} has no effect with --only {args.only}; leave it out")
    if args.stage not in ("all", *stages(family)):
        parser.error(f"--stage {args.stage} is not one of --only {args.only}, whose stages are {', '.join(stages(family))}")
    return args


def start_log(args: argparse.Namespace) -> None:
    """Log to the terminal and to a file beside the checkpoints, in the first process."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    path = Path(f"{args.checkpoint_dir}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.setLevel(logging.INFO)
    for handler in (logging.StreamHandler(), logging.FileHandler(path)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    logger.info("%s", vars(args))


def main(args: argparse.Namespace) -> None:
    """Build, or evaluate with `--evaluate`."""
    if args.evaluate:
        print_evaluation(FAMILIES[args.only], args.evaluate, args.guidance_scale, args.evaluation_prompts)
        return
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo", timeout=timedelta(hours=2))  # one process evaluates and saves while the others wait
    start_log(args)
    build(args)


if __name__ == "__main__":
    main(parse_args())
