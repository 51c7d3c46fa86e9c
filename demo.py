"""Generate pictures with Stable Diffusion 3.5, 1.5 or XL, with or without a LoRA, and put base and tuned side by side.

Without arguments it draws with the tiny model that is shipped, on a CPU, in seconds. Every picture is a PNG that carries its prompt,
seed and settings; a grid shows them all; --scorer judges them. A picture depends on its prompt, seed and settings, not on what else is
drawn with it. --ui does the same on a page in the browser.

  python demo.py --prompt "a red star on a white background"
  python demo.py --pretrained_model_name_or_path models/stable-diffusion-3.5-medium --lora_weights_path outputs/lora_sd3 --compare \\
      --prompt "a corgi on a surfboard" --resolution 1024 --dtype bf16
  python demo.py --ui --lora_weights_path outputs/quickstart
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

from src import cli, scorers

DEFAULT_PROMPTS = ["a large red circle on a blue background", "a small yellow star at the top on a purple background",
                   "a large green cross on a white background", "a white triangle at the left on a black background"]  # fmt: skip


# --------------------------------------------------------------------------- arguments


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("what to draw")
    g.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw; repeat for several")
    g.add_argument("--prompts_file", type=cli.existing_file, metavar="FILE", help="more: .txt, one a line; .json(l), .csv: with metadata")
    g.add_argument("--negative_prompt", default="", metavar="TEXT", help="what to stay away from; needs --guidance_scale above 1")
    g.add_argument("--num_images", type=cli.positive_int, default=1, help="pictures per prompt, from the seeds SEED, SEED+1, ...")
    g.add_argument("--seed", type=cli.seed, default=0, help="seed of the first picture of every prompt")
    g.add_argument("--resolution", type=cli.multiple_of_16, help="side of the pictures in pixels (unset: what the model was made for)")
    g.add_argument("--height", type=cli.multiple_of_16, help="height in pixels (unset: --resolution)")
    g.add_argument("--width", type=cli.multiple_of_16, help="width in pixels (unset: --resolution)")
    g.add_argument("--num_inference_steps", type=cli.positive_int, help="denoising steps (unset: SD3.x 28, others 25, tiny models 20)")
    g.add_argument("--scheduler", choices=cli.SAMPLERS, help="sampler of SD1.x, 2.x or XL, a class of diffusers (unset: the model's own)")
    g.add_argument("--guidance_scale", type=cli.non_negative_float, help="guidance; 1 is off (unset: SD3.x 4.5, others 7.5, tiny models 2)")
    g.add_argument("--skip_layer_guidance", type=cli.non_negative_float, default=0.0, metavar="SCALE",
                   help="skip-layer guidance, from 1 %% to 20 %% of the steps; 2.8 is usual for SD3.5-medium, 0 is off")  # fmt: skip
    g.add_argument("--skip_layers", type=cli.layer_numbers, default=[7, 8, 9], metavar="N,N", help="transformer blocks that it leaves out")

    g = parser.add_argument_group("model")
    g.add_argument("--pretrained_model_name_or_path", type=cli.path_or_name, default="models/tiny-sd3",
                   help="folder or Hub id of an SD3.x, SD1.x, SD2.x or SDXL pipeline")  # fmt: skip
    g.add_argument("--lora_weights_path", type=cli.path, help="LoRA: a run's output folder, a checkpoint, or a .safetensors file")
    g.add_argument("--lora_scale", type=cli.number, default=1.0, help="strength of the LoRA; 0 is the base model")
    g.add_argument("--compare", action="store_true", help="draw each picture without and with the LoRA, side by side")
    g.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="precision (unset: bf16 on a GPU, fp32 on a CPU)")
    g.add_argument("--cpu_offload", action="store_true", help="keep on the GPU only the part that is at work: SD3.5-medium in about 12 GB")
    g.add_argument("--max_sequence_length", type=cli.t5_length, help="T5 tokens (unset: what the model's tokenizer says, at most 256)")
    g.add_argument("--batch_size", type=cli.positive_int, default=8, help="pictures drawn at once")

    cli.add_scorer_args(parser, default=None)
    g = parser.add_argument_group("output")
    g.add_argument("--output_dir", type=cli.path, default=Path("outputs/demo"), help="where the PNGs and grid.png go")
    cli.add_page_args(parser)
    parser.when_unset |= {name: partial(default, name) for name in ("dtype", "scorer", "num_inference_steps", "guidance_scale")}
    return parser


def default(name: str, args: argparse.Namespace) -> str | float | None:
    """What a flag is that is unset; on the page of a shipped model, both judges of its world."""
    import torch

    from src.pipelines import stock

    path = args.pretrained_model_name_or_path
    scorer = "shapes,tiny_clip" if args.ui and stock.is_shipped(path) else None
    return ({"dtype": "bf16" if torch.cuda.is_available() else "fp32", "scorer": scorer} | stock.settings(path))[name]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the demo; whatever can be refused without loading a model is refused here, with exit code 2."""
    return cli.parse(build_parser(), argv, checks=(check_flags, check_prompts, check_model))


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that have no effect.

    Raises:
        ValueError: naming the flag and the cure.
    """
    if args.compare and not args.lora_weights_path:
        raise ValueError("--compare needs --lora_weights_path: there is nothing to compare the base model with")
    if args.lora_scale != 1.0 and not args.lora_weights_path:
        raise ValueError(f"--lora_scale {args.lora_scale:g} has no effect without --lora_weights_path")
    if args.guidance_scale <= 1 and args.skip_layer_guidance:
        raise ValueError(f"--skip_layer_guidance has no effect at --guidance_scale {args.guidance_scale:g}; use a value above 1")
    if args.skip_layers != build_parser().get_default("skip_layers") and not args.skip_layer_guidance:
        raise ValueError("--skip_layers has no effect without --skip_layer_guidance; 2.8 is usual")
    if args.skip_layer_guidance and args.num_inference_steps < 6:  # it acts where 1 % < i / steps < 20 %, i from 0
        raise ValueError(f"--skip_layer_guidance covers none of {args.num_inference_steps} steps; use --num_inference_steps 6 or more")
    if args.resolution and args.height and args.width:
        raise ValueError("--resolution has no effect beside --height and --width; leave it out")


def check_prompts(args: argparse.Namespace) -> None:
    """Refuse prompts that are none, and scorers that cannot be loaded, or cannot judge them: on the page prompts are yet to come.

    Raises:
        ValueError: naming the flag and the cure.
    """
    if args.scorer:
        scorers.check(args.scorer, **cli.scorer_options(args))
    prompts = prompts_of(args)
    if args.scorer and not args.ui:
        scorers.check_prompts(args.scorer, [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])


def check_model(args: argparse.Namespace) -> None:
    """Refuse a model that is none, a LoRA that is not for it, flags that its family does not know, and what needs a GPU.

    Raises:
        ValueError: naming the flag and the cure.
    """
    import torch

    from src.pipelines import sd3, stock

    path = args.pretrained_model_name_or_path
    family = stock.model_family(path)
    if args.lora_weights_path:
        stock.check_lora(args.lora_weights_path, path)
    if family == "sd15":
        for flag in ("skip_layer_guidance", "max_sequence_length"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} is for Stable Diffusion 3; {path} is {stock.NAMES[family]}: leave it out")
    elif args.scheduler:
        raise ValueError(f"--scheduler {args.scheduler} is for models that predict noise; {path} predicts velocity: leave it out")
    elif args.skip_layer_guidance:
        blocks = sd3.read_config(path, "transformer/config.json")["num_layers"]
        if max(args.skip_layers) >= blocks:
            raise ValueError(f"--skip_layers {','.join(map(str, args.skip_layers))}: the blocks of {path} are 0 to {blocks - 1}")
    sides = [side for side in (args.resolution, args.height, args.width) if side]
    if family == "sd3" and sides:
        sd3.check_resolution(path, *sides)
    if not torch.cuda.is_available():
        if args.cpu_offload:
            raise ValueError("--cpu_offload has no effect without a GPU, and there is none here; leave it out")
        if args.dtype == "fp16":
            raise ValueError("--dtype fp16 needs a GPU; on a CPU use bf16 or fp32")


def prompts_of(args: argparse.Namespace) -> list:
    """The prompts (data.prompts.Prompt) of the command line, then those of the file; four for the tiny model if there are none.

    Raises:
        ValueError: an empty file, one that cannot be read, or what is not UTF-8.
    """
    from src.data import prompts

    try:
        "".join([*(args.prompt or []), args.negative_prompt]).encode()
    except UnicodeEncodeError:
        raise ValueError("--prompt is not UTF-8 text; use a UTF-8 terminal or --prompts_file") from None
    found = [prompts.Prompt(text) for text in args.prompt or []]
    if args.prompts_file:
        found += prompts.read_file(args.prompts_file, "--prompts_file")
    return found or [prompts.Prompt(text) for text in DEFAULT_PROMPTS]


# --------------------------------------------------------------------------- drawing


def load(args: argparse.Namespace) -> tuple:
    """The stock pipeline with the LoRA, and the mixture of --scorer or None; on the GPU if there is one.

    Raises:
        ValueError: the model is incomplete, the LoRA does not fit it, or a scorer's weights are not what they should be.
    """
    import torch

    from src.pipelines import stock

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = scorers.build(
        args.scorer, device=device, dtype=dtypes[args.scorer_dtype], batch_size=args.scorer_batch_size, **cli.scorer_options(args)
    ) if args.scorer else None  # fmt: skip
    pipeline = stock.load(
        args.pretrained_model_name_or_path, dtype=dtypes[args.dtype], device=device, lora_path=args.lora_weights_path,
        lora_scale=args.lora_scale, cpu_offload=args.cpu_offload, scheduler=args.scheduler,
    )  # fmt: skip
    pipeline.set_progress_bar_config(desc="denoising", leave=False, disable=None)  # None: only on a terminal
    return pipeline, scorer


def draw(pipeline, jobs: list, args: argparse.Namespace, on_step: Callable | None = None):
    """The pipeline's output for the jobs (gallery.Job) in one batch; each starts from the noise of its own seed, drawn on the CPU.

    Args:
        on_step: told after each denoising step how many are done, and of how many.

    Raises:
        MemoryError: that of the GPU is too small; says what to try.
    """
    import torch

    from src.pipelines import sd3

    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    options |= {name: side for name in ("height", "width") if (side := getattr(args, name) or args.resolution)}
    if hasattr(pipeline, "transformer"):
        options["max_sequence_length"] = args.max_sequence_length or sd3.default_sequence_length(pipeline.tokenizer_3)
        if args.skip_layer_guidance:
            options |= {"skip_guidance_layers": args.skip_layers, "skip_layer_guidance_scale": args.skip_layer_guidance}
    if on_step:  # it returns nothing; the pipeline wants its tensors back
        options["callback_on_step_end"] = lambda pipeline, step, t, tensors: on_step(step + 1, pipeline.num_timesteps) or tensors
    try:
        return pipeline(
            prompt=[job.prompt for job in jobs],
            negative_prompt=[args.negative_prompt] * len(jobs) if args.negative_prompt else None,  # of XL zeros, as in training
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs], **options,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise MemoryError("GPU memory is too small; try --cpu_offload, --batch_size 1, --dtype bf16 or a smaller --resolution") from None


# --------------------------------------------------------------------------- files


def settings_of(args: argparse.Namespace, column: str, size: tuple[int, int]) -> dict:
    """What besides prompt and seed decided the picture, by flag names; null: as the model itself says."""
    kept = ("pretrained_model_name_or_path", "lora_scale", "dtype", "negative_prompt", "num_inference_steps", "scheduler",
            "guidance_scale", "skip_layer_guidance", "skip_layers", "max_sequence_length")  # fmt: skip
    lora = str(args.lora_weights_path) if column == "tuned" else None
    return {name: getattr(args, name) for name in kept} | {"width": size[0], "height": size[1], "lora_weights_path": lora}


def render(pipeline, scorer, jobs: list, column: str, args: argparse.Namespace, on_step: Callable | None = None) -> list[tuple]:
    """Draw a batch of jobs (gallery.Job), judge and keep the pictures: file, picture, scores, whether the safety checker made it black."""
    from src import gallery
    from src.scorers.mixture import score_pictures

    if args.compare:  # the same weights, seeds and batches: only the LoRA is switched
        pipeline.disable_lora() if column == "base" else pipeline.enable_lora()
    output = draw(pipeline, jobs, args, on_step)
    drawn, hidden, kept = output.images, gallery.blacked_out(output), []
    asked = [job.prompt for job in jobs], [job.metadata for job in jobs]
    scores = score_pictures(scorer, drawn, *asked, hidden=hidden) if scorer else [{}] * len(jobs)
    for job, picture, verdict, black in zip(jobs, drawn, scores, hidden, strict=True):
        suffix = (f"-{column}" if args.compare else "") + gallery.score_suffix(verdict)
        path = args.output_dir / gallery.file_name(job.index, job.prompt, job.seed, suffix)
        gallery.save(picture, path, job.prompt, job.seed, settings_of(args, column, picture.size), verdict)
        kept.append((path, picture, verdict, black))
    return kept


def main(args: argparse.Namespace) -> None:
    from src import gallery, ui
    from src.pipelines import stock

    stock.quiet()
    started, found = time.perf_counter(), prompts_of(args)
    prompts = [prompt.text for prompt in found]
    try:
        pipeline, scorer = load(args)
    except ValueError as error:
        build_parser().error(" ".join(str(error).split()))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.ui:
        return ui.serve(ui.Studio(build_parser(), args, pipeline, scorer, render, check_flags), prompts, args.ui_host, args.ui_port)
    if note := stock.long_prompts(pipeline, prompts):
        print(note)
    seeds, first = range(args.seed, args.seed + args.num_images), gallery.next_index(args.output_dir)
    jobs = [gallery.Job(index, one.text, seed, one.metadata) for index, (one, seed) in enumerate(product(found, seeds), start=first)]
    columns = ["base", "tuned"] if args.compare else ["tuned" if args.lora_weights_path else "base"]
    cells = {}  # for the grid: the pictures themselves are on disk as soon as they are drawn
    verdicts, blacked_out = {column: [] for column in columns}, []
    for start, column in product(range(0, len(jobs), args.batch_size), columns):
        part = jobs[start : start + args.batch_size]
        try:
            rendered = render(pipeline, scorer, part, column, args)
        except MemoryError as error:
            build_parser().error(str(error))
        for job, (path, picture, verdict, black) in zip(part, rendered, strict=True):
            verdicts[column].append(verdict)
            blacked_out += [path.name] * black
            if job.index - first < gallery.PROMPTS * args.num_images:
                picture.thumbnail((gallery.CELL, gallery.CELL))
                cells[column, job.index - first] = picture, verdict

    gallery.sheet(cells, prompts, columns, seeds).save(args.output_dir / "grid.png")
    if blacked_out:
        print(gallery.safety_note(blacked_out, len(jobs) * len(columns), scored=bool(scorer)))
    for line in gallery.report(verdicts):
        print(line)
    numbers = f"{len(jobs) * len(columns)} picture(s), {first:03d} to {jobs[-1].index:03d}"
    print(f"{numbers}, in {time.perf_counter() - started:.0f} s: {args.output_dir / 'grid.png'}")


if __name__ == "__main__":
    main(parse_args())
