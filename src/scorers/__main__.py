"""Score pictures from the shell, or list the scorers: what each measures, and what it still needs on this machine.

  python -m src.scorers
  python -m src.scorers pickscore outputs/demo/[0-9]*.png --prompt "a red star on a white background"
  python -m src.scorers clip=1,aesthetic=0.5 a.png b.png --prompt "for a.png" --prompt "for b.png"

PNGs of demo.py, and in the samples/ of a run, carry their prompt; it is used unless --prompt is given. The scorers come before the
pictures, flags after them.
"""

import argparse
import json
import math
from pathlib import Path

from src import cli, scorers


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    parser.prog = "python -m src.scorers"
    parser.usage = "%(prog)s [NAME=WEIGHT,... IMAGE ...] [options]"
    g = parser.add_argument_group("what to score")
    g.add_argument("scorer", nargs="?", metavar="NAME=WEIGHT,...", help="scorers and their weights in the total; nothing: list them")
    g.add_argument("images", nargs="*", type=cli.existing_file, metavar="IMAGE", help="files to judge")
    g.add_argument("--prompt", action="append", metavar="TEXT", help="what the pictures were to show: once, or once for each")
    g.add_argument("--metadata", type=cli.existing_file, metavar="FILE", help="JSON lines, one for each picture: what geneval verifies")
    g.add_argument("--json", action="store_true", help="print a line of JSON for each picture instead of a table")
    g = parser.add_argument_group("scorers")
    cli.add_scorer_settings(g)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return cli.parse(build_parser(), argv, checks=(check,))


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be scored before anything is loaded.

    Raises:
        ValueError: naming the flag and the cure.
    """
    if args.scorer is None:
        for flag in ("prompt", "metadata", "json"):
            if getattr(args, flag):
                raise ValueError(f"--{flag} has no effect without scorers and pictures; give their names and files first")
        return
    scorers.check(args.scorer, flag="scorers", **cli.scorer_options(args))
    if not args.images:
        raise ValueError(f"{args.scorer}: no pictures to judge; give their files after it")
    if args.prompt and len(args.prompt) not in (1, len(args.images)):
        raise ValueError(f"--prompt is given {len(args.prompt)} times for {len(args.images)} pictures; give it once, or once for each")
    scorers.check_prompts(args.scorer, prompts_of(args), metadata_of(args), [f"{path} with prompt" for path in args.images])


def prompts_of(args: argparse.Namespace) -> list[str]:
    """A prompt for each picture: that of --prompt, else the one stored in the picture, else an empty one."""
    if args.prompt:
        return args.prompt * (len(args.images) if len(args.prompt) == 1 else 1)
    from src import images

    return [images.prompt_of(path) for path in args.images]


def metadata_of(args: argparse.Namespace) -> list[dict] | None:
    """What --metadata says of each picture.

    Raises:
        ValueError: not one JSON object for each picture.
    """
    if not args.metadata:
        return None
    try:
        lines = [json.loads(line) for line in args.metadata.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"--metadata {args.metadata}: not JSON lines: {error}") from None
    if len(lines) != len(args.images) or not all(isinstance(line, dict) for line in lines):
        wanted = f"a JSON object for each of {len(args.images)} picture(s)"
        raise ValueError(f"--metadata {args.metadata} must hold {wanted}, got {len(lines)} line(s)")
    return lines


# --------------------------------------------------------------------------- the list


def state(scorer: scorers.Scorer, options: dict) -> str:
    """Whether it could be built, and if not, what to do."""
    if reason := scorer.trouble(options):
        return reason
    far = [weights.hub_id for weights in scorer.weights(scorer.settings(options)) if not (weights.local or weights.cached)]
    return f"ready after a download from the Hub ({', '.join(far)})" if far else "ready"


def show_list(options: dict) -> None:
    """Print each scorer with its state, what it measures, and its declared properties."""
    for name in scorers.names():
        scorer = scorers.get(name)
        print(f"{name}: {state(scorer, options)}")
        print(f"    {scorer.summary}")
        low, high = scorer.range
        gradient = "with gradient" if scorer.differentiable else "no gradient"
        print(f"    {gradient}; usually {low:g} to {high:g}, divided by {scorer.normalizer:g} in a mixture; licence: {scorer.licence}")


# --------------------------------------------------------------------------- scores


def score_files(args: argparse.Namespace) -> list[dict[str, float]]:
    """Parts and total of every picture."""
    import torch

    from src.images import open_rgb
    from src.scorers.mixture import score_pictures

    mixture = scorers.build(
        args.scorer, device="cuda" if torch.cuda.is_available() else "cpu",
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[args.scorer_dtype], batch_size=args.scorer_batch_size,
        **cli.scorer_options(args),
    )  # fmt: skip
    prompts, metadata = prompts_of(args), metadata_of(args)
    results = []
    for start in range(0, len(args.images), args.scorer_batch_size):  # no more pictures in memory than are judged at once
        span = slice(start, start + args.scorer_batch_size)
        pictures = [open_rgb(path) for path in args.images[span]]
        results += score_pictures(mixture, pictures, prompts[span], None if metadata is None else metadata[span])
    return results


def show_scores(paths: list[Path], results: list[dict[str, float]], as_json: bool) -> None:
    """A row for each picture, and their mean over those that could be judged."""
    if as_json:
        for path, scores in zip(paths, results, strict=True):
            print(json.dumps({"image": str(path)} | {name: value if math.isfinite(value) else None for name, value in scores.items()}))
        return
    from src.scorers.mixture import means

    names = list(results[0])
    widths = [max(12, len(name) + 2) for name in names]
    print("".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)) + "  image")
    for path, scores in zip(paths, results, strict=True):
        print("".join(f"{scores[name]:>{width}.4f}" for name, width in zip(names, widths, strict=True)) + f"  {path}")
    if len(results) > 1:
        average = means(results)
        judged = min(count for _, count in average.values())
        note = f"mean of {judged}" + (f"; {len(results) - judged} could not be judged" if judged < len(results) else "")
        print("".join(f"{average[name][0]:>{width}.4f}" for name, width in zip(names, widths, strict=True)) + f"  {note}")


def main(args: argparse.Namespace) -> None:
    if args.scorer is None:
        show_list(cli.scorer_options(args))
        return
    try:
        results = score_files(args)
    except ValueError as error:  # a damaged picture, weights that are not the scorer's
        build_parser().error(" ".join(str(error).split()))
    show_scores(args.images, results, args.json)


if __name__ == "__main__":
    main(parse_args())
