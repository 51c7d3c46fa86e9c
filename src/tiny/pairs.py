"""Preference pairs of a tiny model's own pictures, ordered by the verifier: `python -m src.tiny.pairs --output datas/pairs`.

Draws some pictures for each of many training captions (never a held-out one) and reads them back from their pixels. A picture that shows
all that its caption asks for wins against one that does not; captions whose pictures are all right, or all wrong, make no pair. The
pictures of a caption take the guidance weights in turn, since these differ in collected preferences, too. The result is a parquet file
with the columns of pickapic_v2, the winner first in one row and second in the next, and the pictures as lossless WebP.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from src import cli, images
from src.tiny import evaluate, shapes


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("pairs")
    g.add_argument("--output", type=cli.path, required=True, help="folder to write; it must not exist")
    g.add_argument(
        "--pretrained_model_name_or_path", type=cli.path_or_name, default="models/tiny-sd15", help="tiny pipeline folder that draws"
    )
    g.add_argument("--num_prompts", type=cli.positive_int, default=256, help="different captions, of the training split")
    g.add_argument("--num_images", type=cli.positive_int, default=8, help="pictures of each, from seeds that no other picture has")
    g.add_argument("--pairs_per_prompt", type=cli.positive_int, default=2, help="pairs of each caption at most; no picture is in two")
    g.add_argument("--num_inference_steps", type=cli.positive_int, default=20, help="denoising steps")
    g.add_argument("--guidance_scale", type=cli.number, nargs="+", default=[2.0], metavar="W",
                   help="classifier-free guidance weights, which the pictures of a caption take in turn; 1 turns it off")  # fmt: skip
    g.add_argument("--batch_size", type=cli.positive_int, default=64, help="pictures drawn at once")
    g.add_argument("--seed", type=cli.seed, default=2, help="names the series of captions; the base model saw seed 0")
    return parser


def draw(pipeline, prompts: list[str], guidance_scales: list[float], *, batch_size: int, num_inference_steps: int) -> Tensor:
    """One picture for each prompt, (n, 3, H, W) in [0, 1]: picture i from the noise of seed i, with guidance_scales[i]."""
    rendered = {}
    for scale in sorted(set(guidance_scales)):  # a pipeline draws a batch with one weight
        chosen = [i for i, own in enumerate(guidance_scales) if own == scale]
        drawn = evaluate.draw(pipeline, [prompts[i] for i in chosen], chosen, batch_size=batch_size, guidance_scale=scale,
                              num_inference_steps=num_inference_steps)  # fmt: skip
        rendered |= zip(chosen, drawn, strict=True)
    return torch.stack([rendered[i] for i in range(len(prompts))])


def pair_up(right: list[bool], pairs_per_prompt: int) -> list[tuple[int, int]]:
    """(winner, loser) among one caption's pictures: the first right one with the first wrong one, and so on; none is in two pairs."""
    winners = [index for index, is_right in enumerate(right) if is_right]
    losers = [index for index, is_right in enumerate(right) if not is_right]
    return list(zip(winners, losers, strict=False))[:pairs_per_prompt]


def write(folder: Path, pairs: list[tuple[str, Tensor, Tensor]]) -> None:
    """A row for each (caption, winner, loser) in folder/pairs.parquet; the winner comes second in every other row."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for number, (caption, winner, loser) in enumerate(pairs):
        both = (winner, loser) if number % 2 == 0 else (loser, winner)
        first, second = (encoded(picture) for picture in images.to_pil(torch.stack(both)))
        rows.append({"caption": caption, "jpg_0": first, "jpg_1": second, "label_0": 1.0 - number % 2})
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pairs.parquet", compression="none")  # pictures do not get smaller


def encoded(picture: Image.Image) -> bytes:
    """A picture as a lossless WebP file, a fifth smaller than a PNG."""
    file = io.BytesIO()
    picture.save(file, format="WEBP", lossless=True, quality=100, method=6)
    return file.getvalue()


def check(args: argparse.Namespace) -> None:
    """Refuse a missing model, flags that make no pair, and to write over anything.

    Raises:
        ValueError: naming the flag.
    """
    if not (Path(args.pretrained_model_name_or_path) / "model_index.json").is_file():
        raise ValueError(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: no pipeline there; try models/tiny-sd15")
    if args.output.exists():
        raise ValueError(f"--output {args.output} exists; choose another folder or delete it")
    if args.num_images < 2:
        raise ValueError("--num_images 1 makes no pair; give at least 2")
    if len(args.guidance_scale) > args.num_images:
        raise ValueError(f"--guidance_scale names {len(args.guidance_scale)} weights for --num_images {args.num_images}: too many")
    cli.check_writable(args.output, "output")


def main(args: argparse.Namespace) -> int:
    """Draws, reads, writes; returns the number of pairs."""
    pipeline = evaluate.load(args.pretrained_model_name_or_path)
    prompts = shapes.captions(args.num_prompts, args.seed)
    repeated = [prompt for prompt in prompts for _ in range(args.num_images)]
    weights = [args.guidance_scale[i % args.num_images % len(args.guidance_scale)] for i in range(len(repeated))]
    pictures = draw(pipeline, repeated, weights, batch_size=args.batch_size, num_inference_steps=args.num_inference_steps)
    right = shapes.correct(shapes.verify(pictures), repeated).tolist()
    pairs = []
    for number, prompt in enumerate(prompts):
        first = number * args.num_images
        for winner, loser in pair_up(right[first : first + args.num_images], args.pairs_per_prompt):
            pairs.append((prompt, pictures[first + winner], pictures[first + loser]))
    if not pairs:
        raise SystemExit(f"error: {sum(right)} of {len(right)} pictures are right, and no caption has both kinds: no pair to write")
    write(args.output, pairs)
    print(f"{sum(right) / len(right):.0%} of {len(right)} pictures right; {len(pairs)} pairs in {args.output}")
    return len(pairs)


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
