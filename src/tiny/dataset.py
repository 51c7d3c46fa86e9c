"""Write captioned drawings as a data set folder: PNGs and metadata.jsonl. The shipped datas/shapes-new was made by

    python -m src.tiny.dataset --output datas/shapes-new --new 160 --known 320
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from src import cli, images
from src.tiny import shapes


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("data set")
    g.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist")
    g.add_argument("--new_shape", choices=shapes.NEW_SHAPES, default="heart", help="the shape that the base model does not know")
    g.add_argument("--new", type=cli.non_negative_int, default=160, help="drawings of the new shape")
    g.add_argument("--known", type=cli.non_negative_int, default=320, help="drawings of the known shapes, so that they are not forgotten")
    g.add_argument("--resolution", type=cli.multiple_of_16, default=64, help="side of the pictures in pixels")
    g.add_argument("--seed", type=cli.non_negative_int, default=1, help="names the series of drawings; the base model saw seed 0")
    return parser


def write(folder: Path, drawings: list[shapes.Drawing], resolution: int) -> None:
    """One PNG per drawing and a metadata.jsonl of file_name and text; the split's held-out triples are not among them.

    Raises:
        FileExistsError: the folder is there already.
    """
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number, drawing in enumerate(drawings):
            name = f"{number:04d}.png"
            images.to_pil(shapes.draw(drawing, resolution)[None])[0].save(folder / name, optimize=True)
            metadata.write(json.dumps({"file_name": name, "text": drawing.caption}) + "\n")


def check(args: argparse.Namespace) -> None:
    """Refuse to write over anything, and to write nothing.

    Raises:
        ValueError: naming the flag.
    """
    if args.output.exists():
        raise ValueError(f"--output {args.output} exists; choose another folder or delete it")
    if args.new + args.known == 0:
        raise ValueError("--new 0 and --known 0 make no drawing; give one of them a number")
    cli.check_writable(args.output, "output")


def main(args: argparse.Namespace) -> None:
    drawings = shapes.drawings(args.new, args.seed, shapes=(args.new_shape,)) + shapes.drawings(args.known, args.seed)
    write(args.output, drawings, args.resolution)
    print(f"{len(drawings)} drawings in {args.output}")


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
