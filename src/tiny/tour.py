"""All seven trainers on the tiny world, one after another, and one table of what each of them taught: `bash scripts/tour.sh`.

Each stop makes the data that the trainer's tiny recipe needs, if it is missing, runs `TINY=1 bash scripts/train_....sh` as it stands, and
draws and judges held-out prompts before and after, from the same seeds. At the end: a table, and a picture of prompts before and after.

  bash scripts/tour.sh              all seven; run again after a stop, it goes on where it was
  bash scripts/tour.sh lora dpo     these two
  bash scripts/tour.sh --quick      two steps each, to see that everything runs here
  bash scripts/tour.sh --write      and put the table into the README
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src import cli
from src.tiny import tour_report

QUICK = "--max_train_steps 2 --num_validation_images 1 --validation_inference_steps 2"
QUICK_EVALUATION = "--num_eval_prompts 4 --eval_num_inference_steps 2"
DATASETS = {  # path in a recipe -> the program and the arguments that make it
    "datas/shapes-new": ("src.tiny.dataset", "--new 240 --known 600"),
    "datas/subject": ("src.tiny.dataset", "--subject purple"),
    "datas/pairs": ("src.tiny.pairs", "--num_prompts 1280 --num_images 4 --guidance_scale 1 3"),  # docs/dpo.md
}
QUICK_PAIRS = "--num_prompts 8 --num_images 4 --guidance_scale 1 3 --num_inference_steps 10"
UNTIMED = {"began": None, "seconds": 0.0}


@dataclass(frozen=True)
class Trainer:
    """One trainer of the tour.

    Attributes:
        title: in the table and in the picture.
        wrapper: whose tiny recipe is run.
        quick: arguments that cut the recipe down to a few steps.
    """

    title: str
    wrapper: str
    quick: str


TRAINERS = {
    "lora": Trainer("LoRA", "scripts/train_text_to_image_lora_sd3.sh", QUICK),
    "full": Trainer("full fine-tuning", "scripts/train_full_finetuning_sd3.sh", QUICK),
    "dreambooth": Trainer(
        "DreamBooth", "scripts/train_dreambooth_lora_sd3.sh", f"{QUICK} --num_class_images 8 --class_inference_steps 2"
    ),
    "ddpo": Trainer(
        "DDPO", "scripts/train_aesthetic_ddpo_sd3.sh", f"{QUICK_EVALUATION} --num_epochs 1 --sample_num_batches_per_epoch 2"
    ),
    "grpo": Trainer(
        "GRPO, nft loss", "scripts/train_aesthetic_rlhf_grpo_lora_sd3.sh",
        f"{QUICK_EVALUATION} --num_epochs 1 --sample_num_batches_per_epoch 2 --updates_per_epoch 1",
    ),
    "dpo": Trainer("Diffusion-DPO", "scripts/train_dpo_sd_v1_5.sh", f"{QUICK} --train_batch_size 2 --num_validation_pairs 1"),
    "refl": Trainer("ReFL", "scripts/train_refl_v1_5.sh", f"{QUICK_EVALUATION} --max_train_steps 1"),
}  # fmt: skip


class StopError(Exception):
    """The tour ended early: a message for the user, and the exit code."""

    def __init__(self, text: str, code: int = 1):
        super().__init__(text)
        self.code = code


# --------------------------------------------------------------------------- programs


class Shell:
    """Runs programs, one at a time, with their output in a log file and, on a terminal, on the screen.

    On Ctrl-C or SIGTERM it waits for the program: trainers save a checkpoint first. It passes SIGTERM on; Ctrl-C reaches them by itself.
    """

    def __init__(self):
        self.stopped: int | None = None  # the signal
        self._process: subprocess.Popen | None = None
        self._previous = {}

    def __enter__(self) -> Shell:
        self._previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = number
        if number == signal.SIGTERM and self._process:
            self._process.terminate()

    def run(self, command: list[str], log: Path, **env: str) -> int:
        """Exit code of the program; its output is added to the log.

        Raises:
            StopError: the tour was told to stop.
        """
        with log.open("ab") as file:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | env)
            while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                file.write(chunk)
                file.flush()
                if sys.stdout.isatty():
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.flush()
        code = self._process.wait()
        self._process.stdout.close()
        self._process = None
        if self.stopped:
            raise StopError("stopped; the same command goes on from here", 128 + self.stopped)
        return code


def say(text: str) -> None:
    """A line of progress, seen at once where the output is a pipe."""
    print(text, flush=True)


# --------------------------------------------------------------------------- one stop


@dataclass(frozen=True)
class Stop:
    """One trainer's part of a tour.

    Attributes:
        name: key of TRAINERS, and name of the run's folder.
        output_dir: of the tour.
    """

    name: str
    output_dir: Path
    quick: bool = False

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name

    @property
    def settings(self) -> dict[str, int]:
        """How it is measured: arguments of `src.tiny.tour_measure`."""
        return {"num_prompts": 4, "num_inference_steps": 2} if self.quick else {"num_prompts": 128, "num_inference_steps": 20}

    def datasets(self) -> dict[str, tuple[str, str]]:
        """DATASETS; for a quick tour only a small set of pairs, in the tour's folder."""
        return {str(self.output_dir / "pairs"): ("src.tiny.pairs", QUICK_PAIRS)} if self.quick else DATASETS

    def arguments(self) -> list[str]:
        """Flags added to the recipe: where to write, what to resume; none that changes the training, unless the tour is quick."""
        added = ["--output_dir", str(self.folder), "--report_to", "none", "--seed", "0", "--resume_from_checkpoint", "latest"]
        if not self.quick:
            return added
        pairs = ["--dataset_name", str(self.output_dir / "pairs")] if self.name == "dpo" else []
        return [*added, *TRAINERS[self.name].quick.split(), *pairs]

    def command(self) -> str:
        """The trainer's whole command line, as its wrapper would run it."""
        printed = subprocess.run(["bash", TRAINERS[self.name].wrapper, *self.arguments()], check=True, capture_output=True, text=True,
                                 env=os.environ | {"TINY": "1", "PRINT_COMMAND": "1"})  # fmt: skip
        return printed.stdout.strip()

    def finished(self) -> bool:
        """Whether training came to its end: the model card is the last file that a run writes."""
        return (self.folder / "README.md").is_file()

    def result(self, command: str) -> dict[str, Any] | None:
        """The result of an earlier tour, if that had the same command and settings; else None."""
        found = read(self.folder / "result.json")
        return found if found and (found["command"], found["settings"]) == (command, self.settings) else None


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None without one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def step(shell: Shell, stop: Stop, what: str, command: list[str], **env: str) -> None:
    """Runs one program of a stop.

    Raises:
        StopError: it failed; names the step, the log and the cure, with the log's last lines.
    """
    log = stop.folder / f"{what}.log"
    code = shell.run(command, log, **env)
    if code:
        last = [line for line in log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines() if line.strip()][-5:]
        raise StopError(
            "\n".join([f"error: {stop.name}: {what} ended with {code}. The end of {log}:", *(f"    {line}" for line in last)])
            + f"\nCure: run the same command again, it goes on from here; if it ends there again, delete {stop.folder} and start it anew."
        )


def prepare(shell: Shell, stop: Stop, command: str) -> None:
    """Makes the missing ones of the data sets that the command names."""
    known = stop.datasets()
    for path in dict.fromkeys(word for word in shlex.split(command) if word in known):
        if Path(path).exists():
            continue
        module, arguments = known[path]
        say(f"   {path} is missing: python -m {module} --output {path} {arguments}")
        partial = Path(f"{path}.partial")  # renamed at the end: a kill leaves no partial data set
        shutil.rmtree(partial, ignore_errors=True)
        step(shell, stop, "prepare", [sys.executable, "-m", module, "--output", str(partial), *arguments.split()])
        os.replace(partial, path)


def begin(stop: Stop, command: str) -> dict[str, Any]:
    """The state of a stop: seconds of training so far; a folder written by another command is emptied first."""
    state = read(stop.folder / "tour.json")
    if state is None or state["command"] != command:
        if stop.folder.exists():
            say(f"   {stop.folder} holds a run of another command: it starts anew")
            shutil.rmtree(stop.folder)
        stop.folder.mkdir(parents=True)
        state = {"command": command, **UNTIMED}
    if state["began"] is not None:  # killed while it trained: count the time until its last log line
        logged = stop.folder / "metrics.jsonl"
        state["seconds"] += max(0.0, logged.stat().st_mtime - state["began"]) if logged.exists() else 0.0
        state["began"] = None
    write(stop.folder / "tour.json", state)
    return state


def train(shell: Shell, stop: Stop, state: dict[str, Any]) -> None:
    """Runs the wrapper, or goes on from its last checkpoint; adds the seconds it took to the state.

    Raises:
        StopError: it failed, or was told to stop.
    """
    state["began"] = time.time()
    write(stop.folder / "tour.json", state)
    try:
        step(shell, stop, "train", ["bash", TRAINERS[stop.name].wrapper, *stop.arguments()], TINY="1")
    finally:
        state["seconds"], state["began"] = state["seconds"] + time.time() - state["began"], None
        write(stop.folder / "tour.json", state)
    if not stop.finished():
        raise StopError(f"error: {stop.name}: training was told to stop before its end ({stop.folder / 'train.log'}). "
                        "Cure: run the same command again, it goes on from the last checkpoint.")  # fmt: skip


def visit(shell: Shell, stop: Stop) -> dict[str, Any]:
    """Prepares, trains and measures, skipping what is done; returns the result."""
    command = stop.command()
    if found := stop.result(command):
        say(f"   done before; delete {stop.folder} to train again")
        return found
    state = begin(stop, command)
    prepare(shell, stop, command)
    if not stop.finished():
        say(f"   training; its output is in {stop.folder / 'train.log'}")
        train(shell, stop, state)
    say("   drawing and judging held-out prompts, before and after")
    settings = [word for name, value in stop.settings.items() for word in (f"--{name}", str(value))]
    measuring = [sys.executable, "-m", "src.tiny.tour_measure", stop.name, "--run", str(stop.folder)]
    step(shell, stop, "measure", [*measuring, "--before", str(stop.output_dir / "before"), *settings])
    result = {
        "name": stop.name, "title": TRAINERS[stop.name].title, "command": command, "settings": stop.settings,
        "seconds": state["seconds"], "machine": machine(), **read(stop.folder / "measures.json"),
    }  # fmt: skip
    write(stop.folder / "result.json", result)
    return result


def machine() -> str:
    """`2 CPU cores (x86_64), torch 2.15.0`, or the GPU instead of the cores."""
    gpus = (
        shutil.which("nvidia-smi")
        and subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True).stdout.splitlines()
    )
    device = gpus[0] if gpus else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{device}, torch {version('torch')}"


# --------------------------------------------------------------------------- the tour


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    parser.prog = "bash scripts/tour.sh"
    parser.usage = "%(prog)s [TRAINER ...] [options]"
    g = parser.add_argument_group("tour")
    g.add_argument("trainers", nargs="*", metavar="TRAINER", help=f"visit these alone: {', '.join(TRAINERS)} (unset: all of them)")
    g.add_argument(
        "--output_dir", type=cli.path, help="folder of the runs, table.md and tour.png (unset: outputs/tour, or outputs/tour-quick)"
    )
    g.add_argument("--quick", action="store_true", help="a few steps each, to see that everything runs here: the figures mean nothing")
    g.add_argument("--write", action="store_true", help="put the table into README.md and README_zh.md")
    parser.when_unset["output_dir"] = lambda args: Path("outputs/tour-quick" if args.quick else "outputs/tour")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse unknown trainers, and --write for a partial or a quick tour.

    Raises:
        ValueError: naming the argument and the cure.
    """
    unknown = [name for name in args.trainers if name not in TRAINERS]
    if unknown:
        raise ValueError(f"unknown trainer {unknown[0]!r}; choose from {', '.join(TRAINERS)}")
    if args.write and (args.quick or args.trainers):
        other = "--quick" if args.quick else " ".join(args.trainers)
        raise ValueError(f"--write puts the figures of the whole tour on the pages; leave out {other}")
    if args.write:
        tour_report.check_pages(tour_report.PAGES)


def main(args: argparse.Namespace) -> str:
    """Visits, then writes table.md and tour.png of all that is done; returns the table."""
    chosen = [name for name in TRAINERS if name in (args.trainers or TRAINERS)]
    results = {}
    with Shell() as shell:
        for number, name in enumerate(chosen, start=1):
            say(f"== {number}/{len(chosen)} {TRAINERS[name].title}: TINY=1 bash {TRAINERS[name].wrapper}")
            results[name] = visit(shell, Stop(name, args.output_dir, args.quick))
    for name in TRAINERS.keys() - results.keys():  # visited by an earlier tour
        stop = Stop(name, args.output_dir, args.quick)
        if (stop.folder / "result.json").is_file() and (found := stop.result(stop.command())):
            results[name] = found
    ordered = [results[name] for name in TRAINERS if name in results]
    table = tour_report.table(ordered)
    if args.quick:
        table = "A quick tour: a few steps each. These figures say that everything runs, and nothing else.\n\n" + table
    (args.output_dir / "table.md").write_text(table, encoding="utf-8")
    tour_report.picture(ordered, args.output_dir).save(args.output_dir / "tour.png", optimize=True)
    say(f"\n{table}")
    for page in tour_report.PAGES if args.write else ():
        tour_report.write_into(page, table)
    say(f"Look at {args.output_dir / 'tour.png'}: the same prompts and seeds before and after. The table: {args.output_dir / 'table.md'}.")
    return table


if __name__ == "__main__":
    try:
        main(cli.parse(build_parser(), checks=(check,)))
    except StopError as stop_error:
        print(stop_error, file=sys.stderr)
        sys.exit(stop_error.code)
