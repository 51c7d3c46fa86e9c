"""Predicted and measured memory of a training step: the table in docs/memory-and-speed.md.

  python benchmarks/memory_table.py            # prints the table
  python benchmarks/memory_table.py --write    # and puts it into the page

Predictions are those of --dry_run, on the meta device; "each more" is the memory of a further picture, or pair, after the second. Measured
values are those of the uncompiled batch of one in benchmarks/results/real_geometry_*.json; a value that is not there has not been measured.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import loops, real_geometry, trainers
from src import cli

PAGE = Path(__file__).parent.parent / "docs/memory-and-speed.md"
BEGIN, END = "<!-- table of benchmarks/memory_table.py -->\n", "<!-- end of the table -->\n"

CHECKPOINTED = ("--gradient_checkpointing",)
HALF = (*CHECKPOINTED, "--checkpoint_every", "2")
NARROW = ("--weights_dtype", "bf16", "--optimizer", "adamw8bit")
FUSED = ("--fused_backward", "--max_grad_norm", "0")
Rows = tuple[tuple[str, str, tuple[str, ...]], ...]  # label, trainer, flags
SD3: Rows = (
    ("LoRA, rank 16", "lora", ()),
    ("LoRA, rank 16, every 2nd block checkpointed", "lora", HALF),
    ("LoRA, rank 16, checkpointed", "lora", CHECKPOINTED),
    ("LoRA, rank 128, checkpointed", "lora", (*CHECKPOINTED, "--rank", "128")),
    ("LoRA, rank 16, base in int8, checkpointed", "lora", (*CHECKPOINTED, "--quantize_base", "int8")),
    ("LoRA, rank 16, base in nf4, checkpointed", "lora", (*CHECKPOINTED, "--quantize_base", "nf4")),
    ("full, fp32, AdamW", "full", ()),
    ("full, fp32, AdamW, checkpointed", "full", CHECKPOINTED),
    ("full, bf16, 8-bit Adam", "full", NARROW),
    ("full, bf16, 8-bit Adam, checkpointed", "full", (*NARROW, *CHECKPOINTED)),
    ("full, bf16, 8-bit Adam, checkpointed, fused backward", "full", (*NARROW, *CHECKPOINTED, *FUSED)),
)
SD15: Rows = (
    ("DPO, LoRA of rank 16", "dpo", ("--use_lora",)),
    ("DPO, LoRA of rank 16, checkpointed", "dpo", ("--use_lora", *CHECKPOINTED)),
    ("DPO, full, AdamW", "dpo", ()),
    ("DPO, full, 8-bit Adam, checkpointed", "dpo", ("--optimizer", "adamw8bit", *CHECKPOINTED)),
    ("ReFL, LoRA of rank 16, checkpointed", "refl", ("--use_lora", *CHECKPOINTED)),
    ("ReFL, full, AdamW, checkpointed", "refl", CHECKPOINTED),
    ("ReFL, full, 8-bit Adam, checkpointed", "refl", ("--optimizer", "adamw8bit", *CHECKPOINTED)),
)
TABLES = (("SD3.5-medium", SD3, (512, 1024)), ("SD1.5", SD15, (512,)))


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory-and-speed.md")
    return parser


def measured(results: list[dict], trainer: str, resolution: int, flags: tuple[str, ...]) -> int | None:
    """Bytes that one uncompiled picture took, from the newest result that has it."""
    found = {}
    for row in real_geometry.ROWS:
        if (row.trainer, row.resolution) == (trainer, resolution) and [flag for flag in row.flags if flag != "--compile"] == list(flags):
            for result in results:
                entry = result["rows"].get(row.name, {})
                peak = ((entry.get("uncompiled") or {}).get("1") or {}).get("peak_allocated")
                if peak is not None:
                    found[entry["about"]["date"]] = peak
    return found[max(found)] if found else None


def line(name: str, trainer: str, resolution: int, flags: tuple[str, ...], results: list[dict]) -> str:
    setting = loops.Setting(trainer, resolution, flags)
    one, two, three = (trainers.planned(setting, batch).peak for batch in (1, 2, 3))
    cells = [f"{one / 2**30:.1f}", f"{(three - two) / 2**30:.2f}"]
    if results:
        seen = measured(results, trainer, resolution, flags)
        cells.append("not measured" if seen is None else f"{seen / 2**30:.1f} ({100 * (seen / one - 1):+.0f} %)")
    return f"| {name} | {resolution}² | {' | '.join(cells)} |"


def read_results() -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(real_geometry.RESULTS.glob("real_geometry_*.json"))]


def table() -> str:
    results, blocks = read_results(), []
    for model, rows, sides in TABLES:
        columns = ["predicted", "each more", *(["measured"] if results else [])]  # as long as nothing is, the page says so
        head = [f"| {model} | px | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
        lines = [line(name, trainer, side, flags, results) for side in sides for name, trainer, flags in rows]
        blocks.append("\n".join([*head, *lines]))
    return "\n\n".join(blocks) + "\n"


def main(args: argparse.Namespace) -> str:
    text = table()
    print(text, end="")
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1], encoding="utf-8")
    return text


if __name__ == "__main__":
    main(cli.parse(build_parser()))
