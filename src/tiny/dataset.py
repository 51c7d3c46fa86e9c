"""Write captioned drawings as a data set folder: PNGs and metadata.jsonl. The shipped datas/shapes-new and datas/subject were made by:

    python -m src.tiny.dataset --output datas/shapes-new --new 240 --known 600
    python -m src.tiny.dataset --output datas/subject --subject purple

The drawings are new to the base model: --seed names the series, and the base model was trained on that of seed 0.
Held-out triples of shape and colours are left out, except with --subject.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from src import cli, images
from src.tiny import shapes

SUBJECT_PICTURES = 5  # what DreamBooth is for: a handful
CLASS_PROMPTS = "class_prompts.txt"
NUM_CLASS_PROMPTS = 96  # captions of known shapes, so that none of these is forgotten


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    g = parser.add_argument_group("data set")
    g.add_argument("--output", type=cli.path, required=True, help="folder to write; it must not exist")
    g.add_argument("--new_shape", choices=shapes.NEW_SHAPES, default="heart", help="the shape that the base model does not know")
    g.add_argument("--new", type=cli.non_negative_int, default=240, help="drawings of the new shape")
    g.add_argument("--known", type=cli.non_negative_int, default=600, help="drawings of the known shapes, so that they are not forgotten")
    g.add_argument(
        "--subject",
        choices=shapes.COLORS,
        metavar="COLOUR",
        help=f"instead: {SUBJECT_PICTURES} drawings of one subject, the new shape in this colour, and prompts of its class",
    )
    g.add_argument("--resolution", type=cli.multiple_of_16, default=64, help="side of the pictures in pixels")
    g.add_argument("--seed", type=cli.seed, default=1, help="names the series of drawings; the base model saw seed 0")
    return parser


def write(folder: Path, drawings: list[shapes.Drawing], resolution: int, captions: list[str] | None = None) -> None:
    """One PNG per drawing and a metadata.jsonl of file_name and text.

    Args:
        captions: of the drawings, instead of their own.

    Raises:
        FileExistsError: the folder is there already.
    """
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number, drawing in enumerate(drawings):
            name, text = f"{number:04d}.png", captions[number] if captions else drawing.caption
            images.to_pil(shapes.draw(drawing, resolution)[None])[0].save(folder / name, optimize=True)
            metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")


def write_subject(folder: Path, shape: str, color: str, seed: int, resolution: int) -> None:
    """SUBJECT_PICTURES drawings of one subject, each on another background, and captions of known shapes as prompts of its class."""
    series, drawings = 0, []
    while len(drawings) < SUBJECT_PICTURES:
        drawing = shapes.drawing(series, seed, "all", (shape,))
        series += 1
        if drawing.color == color and drawing.background not in {other.background for other in drawings}:
            drawings.append(drawing)
    write(folder, drawings, resolution, [shapes.subject_prompt(drawing.background) for drawing in drawings])
    prompts = dict.fromkeys(drawing.caption for drawing in shapes.drawings(2 * NUM_CLASS_PROMPTS, seed))
    (folder / CLASS_PROMPTS).write_text("\n".join(list(prompts)[:NUM_CLASS_PROMPTS]) + "\n", encoding="utf-8")


def check(args: argparse.Namespace) -> None:
    """Refuse to write over anything, and to write nothing.

    Raises:
        ValueError: naming the flag.
    """
    if args.output.exists():
        raise ValueError(f"--output {args.output} exists; choose another folder or delete it")
    if args.subject and (args.new, args.known) != (build_parser().get_default("new"), build_parser().get_default("known")):
        raise ValueError("--new and --known have no effect with --subject, which makes a data set of its own; leave them out")
    if args.new + args.known == 0:
        raise ValueError("--new 0 and --known 0 make no drawing; give one of them a number")
    cli.check_writable(args.output, "output")


def main(args: argparse.Namespace) -> None:
    if args.subject:
        write_subject(args.output, args.new_shape, args.subject, args.seed, args.resolution)
        return print(f"{SUBJECT_PICTURES} drawings of a {args.subject} {args.new_shape} and {CLASS_PROMPTS} in {args.output}")
    drawings = shapes.drawings(args.new, args.seed, shapes=(args.new_shape,)) + shapes.drawings(args.known, args.seed)
    write(args.output, drawings, args.resolution)
    print(f"{len(drawings)} drawings in {args.output}")


if __name__ == "__main__":
    main(cli.parse(build_parser(), checks=(check,)))
