"""Learning curves of runs on the tiny world: kept in results/learning_curves.json, drawn for the pages, with tables of what goals cost.

  python benchmarks/learning_curves.py --record "grpo nft / seed 0=outputs/tiny_grpo_sd3"     # keep what a run measured, under a name
  python benchmarks/learning_curves.py --processes 2 --record ...                            # of a run with NUM_PROCESSES=2
  python benchmarks/learning_curves.py --write                                               # pictures and tables of the pages, once more

A name is SETTING / SEED: runs of one setting have one colour and one row. Seconds count the whole run up to an evaluation, earlier
evaluations included. Costs are in forward passes of the transformer for one picture; a trained step counts by its FLOPs.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import rl_epoch
from src import cli, metrics

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- table of benchmarks/learning_curves.py -->\n", "<!-- end of the table -->\n"
RESULTS = ROOT / "benchmarks" / "results" / "learning_curves.json"
ASIDE = frozenset({"output_dir", "cache_dir", "report_to", "checkpointing_epochs", "checkpointing_steps"})  # flags that are not kept
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#555555")  # Okabe and Ito, for colour-blind eyes, too


@dataclass(frozen=True)
class Panel:
    """One diagram: a metric of evaluations against minutes, of the runs of some settings, by label."""

    title: str
    metric: str
    settings: dict[str, str]  # setting -> label
    percent: bool = False
    dashed: dict[float, str] = field(default_factory=dict)  # heights of lines, and what they are
    bottom: float | None = None  # of the axis: set so that a small change does not look large


@dataclass(frozen=True)
class Table:
    """One row per setting: what reaching each of `goals` of `metric` cost."""

    page: str  # in docs/
    metric: str
    goals: tuple[float, ...]
    settings: dict[str, str]


_STRICT, _CLIP, _JPEG = "eval/shapes_strict", "eval/tiny_clip", "eval/jpeg_compressibility"
_GOALS = (0.7, 0.829, 0.9115)  # the last two: half, and three quarters, of the way from 66.4 % to the 99.4 % that survive the VAE
_MEANING = ("half: 83 %", "three quarters: 91 %")
# letters: rows of the table in docs/grpo.md; numbers: pictures an epoch
_LOSSES = {"grpo nft two": "A: nft, 256 pictures an epoch", "grpo nft long": "B: nft, 256, 200 epochs", "grpo ppo two": "C: ppo, 256",
           "grpo nft": "E: nft, 128", "grpo ppo": "I: ppo, 128", "grpo guard": "J: guard, 128"}  # fmt: skip
_METHODS = {"refl all weights": "ReFL, all weights", "refl": "ReFL, LoRA", "refl pretrain": "ReFL, LoRA, pre-training loss",
            "refl draft": "DRaFT-1, LoRA", "refl draft_lv": "DRaFT-LV, LoRA"}  # fmt: skip
FIGURES: dict[str, tuple[Panel, ...]] = {
    "grpo.png": (
        Panel("verifier, held-out prompts, unguided: %", _STRICT, _LOSSES, True, dict(zip(_GOALS[1:], _MEANING, strict=True))),
        Panel("tiny_clip on the same pictures", _CLIP, {
            "grpo nft two": "A: nft, 256 pictures an epoch", "grpo ppo two": "C: ppo, 256", "grpo nft": "E: nft, 128",
            "grpo nft kl": "H: nft, 128, --kl_weight 0.1",
        }, bottom=0.7),
    ),
    "ddpo.png": (
        Panel("reward: compressibility of held-out prompts", _JPEG, {"ddpo jpeg": "DDPO, three seeds, two of them 16 epochs"}),
        Panel("what it does to the verifier: %", _STRICT, {"ddpo jpeg": "DDPO on compressibility"}, True),
        Panel("the verifier itself as reward: %", _STRICT, {
            "ddpo shapes two": "DDPO", "grpo ppo two": "GRPO, ppo", "grpo nft two": "GRPO, nft",
        }, True),
    ),
    "refl.png": (
        Panel("tiny_clip, trained on", _CLIP, _METHODS),
        Panel("verifier, held out: %", _STRICT, _METHODS, True),
    ),
}  # fmt: skip
TABLES = (
    Table("grpo.md", _STRICT, _GOALS, {
        "grpo nft two": "A: the second command, `--loss nft`, seeds 0 and 1", "grpo nft long": "B: A with 200 epochs, seed 2",
        "grpo ppo two": "C: the third command, `--loss ppo`, seeds 0, 1 and 2 (185 epochs)",
        "grpo ppo two 1e-3": "D: C, `--learning_rate 1e-3 --max_advantage 5`, 40 epochs",
        "grpo nft": "E: A in small epochs, 80 of them, seeds 0 and 1",
        "grpo nft constant": "F: E, constant learning rate, stopped after 77 epochs",
        "grpo nft lr 1e-3": "G: F, `--learning_rate 1e-3 --max_advantage 1`, stopped after 71",
        "grpo nft kl": "H: E, `--kl_weight 0.1`, 40 epochs",
        "grpo ppo": "I: ppo in small epochs, program's defaults", "grpo guard": "J: I, `--loss guard`",
        "grpo ppo no window": "K: I, every step trained: `--window_size 0 --window_range 0 9`",
        "grpo ppo guided": "L: I, `--guidance_scale 2`",
        "grpo paper": "M: the paper's settings, `--config scripts/presets/flow_grpo.yaml --guidance_scale 2`",
    }),
    Table("ddpo.md", _STRICT, _GOALS[:2], {
        "ddpo shapes two": "DDPO: the third command, seeds 0, 1 and 2", "grpo ppo two": "GRPO, `--loss ppo`, three seeds",
        "grpo nft two": "GRPO, `--loss nft`, two seeds",
    }),
)  # fmt: skip


def build_parser() -> cli.Parser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--record", nargs="+", default=[], metavar="NAME=FOLDER", help="keep runs by their output folders")
    parser.add_argument("--processes", type=cli.positive_int, default=1, help="of those runs, each of which draws its own pictures")
    parser.add_argument("--machine", default="one thread of a CPU for each process", help="kept with them: what they ran on")
    parser.add_argument("--write", action="store_true", help="draw the pictures in docs/images/ and put the tables into the pages")
    return parser


# --------------------------------------------------------------------------- records


def trainer_of(args: argparse.Namespace) -> ModuleType:
    """The training script that has such arguments."""
    by_flag = {"group_size": "train_grpo_sd3", "num_inner_epochs": "train_ddpo_sd3", "draft_k": "train_refl_sd15"}
    return importlib.import_module(next(name for flag, name in by_flag.items() if hasattr(args, flag)))


def passes_per_picture(args: argparse.Namespace) -> float:
    """Cost of one picture in reinforcement learning, sampling and training, in forward passes."""
    nft, (first, stop) = getattr(args, "loss", None) == "nft", args.window_range
    trained = (args.nft_levels if nft else args.window_size or stop - first) * getattr(args, "num_inner_epochs", 1)
    guided = 2 if args.guidance_scale > 1 else 1
    beside = nft + (getattr(args, "kl_weight", 0) > 0)  # passes without gradient: the old policy's, the reference's
    return guided * args.num_inference_steps + (1 if nft else guided) * trained * (rl_epoch.step_cost(args) + beside)


def record(folder: Path, machine: str, processes: int = 1) -> dict[str, Any]:
    """What a run measured: its evaluations, each with the seconds that training had taken by then, its rewards, and its flags.

    Raises:
        ValueError: the folder holds no run, or none that was evaluated.
    """
    if not (folder / "metrics.jsonl").is_file() or not (folder / "args.json").is_file():
        raise ValueError(f"--record: {folder} has no metrics.jsonl and args.json; give the --output_dir of a run")
    args = argparse.Namespace(**json.loads((folder / "args.json").read_text(encoding="utf-8")))
    evaluations, training, seconds, earlier = [], {"step": [], "seconds": [], "reward": []}, 0.0, 0.0
    for line in metrics.read(folder / "metrics.jsonl"):
        if "reward" in line:
            if earlier + line["seconds"] < seconds:  # a resumed run counts from its own start
                earlier = seconds
            seconds = line["seconds"] = earlier + line["seconds"]
            for name, values in training.items():
                values.append(round(line[name], 4))
        elif any(name.startswith("eval") for name in line):
            scores = {name: round(value, 4) for name, value in line.items() if name.startswith("eval") and value is not None}
            evaluations.append({"step": line["step"], "seconds": round(seconds, 1), **scores})
    if not evaluations:
        raise ValueError(f"--record: the run in {folder} was never evaluated; train it with --eval_prompts")
    default = trainer_of(args).build_parser().get_default
    flags = {name: value for name, value in vars(args).items() if name not in ASIDE and value != _plain(default(name))}
    found = {"evaluations": evaluations, "training": training, "flags": flags, "date": date.today().isoformat()}
    found |= {"machine": machine, "processes": processes}
    if hasattr(args, "window_range"):  # reinforcement learning: every line of training is an epoch of equally many updates
        each, pictures = passes_per_picture(args), args.sample_batch_size * args.sample_num_batches_per_epoch * processes
        found |= {"passes_per_picture": round(each, 2), "pictures_per_step": pictures / training["step"][0]}
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def read() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def runs_of(results: dict[str, dict[str, Any]], setting: str) -> list[dict[str, Any]]:
    """The runs of a setting, seed by seed."""
    found = [run for name, run in sorted(results.items()) if name.partition(" / ")[0] == setting]
    if not found:
        raise ValueError(f"{RESULTS.name} has no run of the setting {setting!r}: --record it")
    return found


# --------------------------------------------------------------------------- tables


def reached(run: dict[str, Any], metric: str, goal: float) -> tuple[float, float] | None:
    """Seconds and optimizer steps until the metric first reached the goal, on the straight line between two evaluations; or None."""
    before = None
    for scores in run["evaluations"]:
        now = (scores["seconds"], scores["step"], scores[metric])
        if now[2] >= goal:
            if before is None:
                return now[:2]
            share = (goal - before[2]) / (now[2] - before[2])
            return tuple(a + share * (b - a) for a, b in zip(before[:2], now[:2], strict=True))
        before = now
    return None


def row(label: str, runs: Sequence[dict[str, Any]], metric: str, goals: Sequence[float]) -> str:
    """One line of a table: figures of all seeds side by side, a dash where a goal was not reached."""
    last, passes = [run["evaluations"][-1] for run in runs], runs[0]["passes_per_picture"]
    cells = [f"{passes:.1f}", ", ".join(f"{100 * end[metric]:.1f}" for end in last)]
    cells.append(", ".join(f"{end['seconds'] / 60:.0f}" for end in last))
    for goal in goals:
        costs = []
        for run in runs:
            cost = reached(run, metric, goal)
            costs.append("-" if cost is None else f"{cost[0] / 60:.1f} / {cost[1] * run['pictures_per_step'] * passes / 1000:.0f}")
        cells.append(", ".join(costs))
    return f"| {label} | {' | '.join(cells)} |"


def table(results: dict[str, dict[str, Any]], wanted: Table) -> str:
    goals = [f"to {100 * goal:.0f} %: minutes / 1000 passes" for goal in wanted.goals]
    head = ["run", "passes a picture", "at the end, %", "minutes", *goals]
    rows = [row(label, runs_of(results, setting), wanted.metric, wanted.goals) for setting, label in wanted.settings.items()]
    return "\n".join([f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|", *rows]) + "\n"


def write_into(page: Path, text: str) -> None:
    """Put a table between the page's two markers."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1], encoding="utf-8")


# --------------------------------------------------------------------------- pictures


def draw(results: dict[str, dict[str, Any]], panels: Sequence[Panel], path: Path) -> None:
    """The panels side by side, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), dpi=110, layout="constrained", squeeze=False)
    settings = list(dict.fromkeys(setting for panel in panels for setting in panel.settings))  # one colour in all panels
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw(axis, results, panel, dict(zip(settings, COLORS, strict=False)))
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _draw(axis, results: dict[str, dict[str, Any]], panel: Panel, colors: dict[str, str]) -> None:
    for setting, label in panel.settings.items():
        for number, run in enumerate(runs_of(results, setting)):
            points = [(scores["seconds"] / 60, scores[panel.metric] * (100 if panel.percent else 1)) for scores in run["evaluations"]]
            axis.plot(*zip(*points, strict=True), color=colors[setting], linewidth=1.6, marker=".", label=None if number else label)
    for goal, meaning in panel.dashed.items():
        height = goal * (100 if panel.percent else 1)
        axis.axhline(height, color="#888888", linewidth=0.9, linestyle="--")
        axis.text(axis.get_xlim()[0], height, f" {meaning}", color="#666666", fontsize=8, va="bottom")
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel("minutes, evaluations included")
    axis.set_ylim(bottom=panel.bottom)
    axis.legend(fontsize=8.5, edgecolor="none", loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def main(args: argparse.Namespace) -> None:
    if args.record and args.write:
        raise ValueError("--record and --write: give one of them; pages are written once all their runs are there")
    results = read()
    for entry in args.record:
        name, equals, folder = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"--record: {entry!r} is not NAME=FOLDER, as 'grpo nft / seed 0=outputs/tiny_grpo_sd3'")
        results[name.strip()] = record(Path(folder), args.machine, args.processes)
    if args.record:
        RESULTS.write_text(json.dumps(results, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{len(results)} runs in {RESULTS.name}: {', '.join(sorted(results))}")
        return
    for name, panels in FIGURES.items():
        if args.write:
            draw(results, panels, ROOT / "docs" / "images" / name)
    for wanted in TABLES:
        text = table(results, wanted)
        print(text)
        if args.write:
            write_into(ROOT / "docs" / wanted.page, text)


if __name__ == "__main__":
    main(cli.parse(build_parser()))
