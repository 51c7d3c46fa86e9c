"""What a run shows of itself: loss on fixed noise, pictures from fixed seeds beside those before training, and `summary.png` at the end."""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from src import ema, images, inputs, metrics, runtime, seeds, speed
from src.data import buckets, samples

# Levels of the validation loss: the quartiles of (0, 1) and, for composition, a level near pure noise.
SIGMAS = (0.25, 0.5, 0.75, 0.95)
FIXED_SEED = 0  # of validation noise: the same for every run, so that losses of two runs compare
STEPS = "step-[0-9]*"  # in samples: a folder and a grid per validation
FILM_ROWS, FILM_COLUMNS, FILM_CELL = 4, 8, 256  # of summary.png: prompts, validations, pixels a side at most
GRID_CELL = 512  # pixels a side at most, in the grid of a validation: whole pictures of 1024 px would make a sheet of 40 megapixels
LIGHT, DARK = "#9bb7d4", "#1f5fa8"  # curves: as measured, and smoothed


class Validator:
    """Validates at step 0, every --validation_steps, and at the end.

    Args:
        model: the family's, of which the denoiser is used.
        loss: `loss(transformer, x0, noise, sigma, condition) -> (b,)`, the function that training minimises, handed `mask=(b, 1, h, w)` as
            well where pictures have masks; or
        measure: `() -> {metric: value}` of the held-out samples, equal on all processes.
        panels: title and metric of each curve in summary.png; None: those of a supervised run.
        average: its weights stand in for the raw ones while validating, if given.
    """

    def __init__(
        self, run: runtime.Run, args: argparse.Namespace, data: inputs.Inputs, model: Any, log: metrics.Log,
        *, loss: Callable[..., Tensor] | None = None, measure: Callable[[], dict[str, float]] | None = None,
        panels: dict[str, str] | None = None, average: ema.Ema | None = None,
    ):  # fmt: skip
        self.run, self.args, self.data, self.denoiser = run, args, data, model.denoiser
        self.log, self.loss, self.average = log, loss, average
        self.measure, self.panels = measure or self._losses, panels
        self.prompts = inputs.validation_prompts(args)
        seeds_of = [args.validation_seed + n for n in range(args.num_validation_images)]
        names = [[f"{p:02d}-{seed}.png" for seed in seeds_of] for p in range(len(self.prompts))]
        self.album = Album(run, Path(args.output_dir), self.prompts, names)

    def validate_if_due(self, step: int) -> None:
        if step % self.args.validation_steps == 0 and step < self.args.max_train_steps:
            self.validate(step)

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Validation loss and pictures at this step; the denoiser's mode is restored, also after an error."""
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            with speed.as_written(self.args), self.log.untimed(), ema.applied(self.average):
                if len(self.data.held_out):
                    self.log.record(step, **self.measure())
                if self.prompts:
                    self.album.save(step, self._render())
        finally:
            self.denoiser.train(training)

    def validate_last(self, step: int) -> None:
        """The last validation, then `summary.png` from everything that was logged."""
        self.validate(step)
        if self.run.is_main:
            summary(Path(self.args.output_dir), self.prompts, self.panels)

    def _losses(self) -> dict[str, float]:
        """Mean loss over the held-out pictures at each of SIGMAS, and over all; the processes share the pictures."""
        run, total = self.run, torch.zeros(len(SIGMAS), device=self.run.device)
        sigma = torch.tensor(SIGMAS, device=run.device)  # (S,)
        count = len(self.data.held_out)
        for turn in run.turns(count):
            i = min(turn, count - 1)
            batch = samples.collate([self.data.held_out[buckets.Key(i, step=0, position=i)]])
            x0, condition = self.data.encode(batch, FIXED_SEED, step=0)  # (1, 16, h, w)
            positions = range(i * len(SIGMAS), (i + 1) * len(SIGMAS))
            noise = seeds.normal(FIXED_SEED, 0, positions, "validation", x0.shape[1:], run.device)  # (S, 16, h, w)
            masked = {} if batch.mask is None else {"mask": batch.mask.to(run.device).expand(len(SIGMAS), -1, -1, -1)}
            with run.accelerator.autocast():
                loss = self.loss(self.denoiser, x0.expand_as(noise), noise, sigma, condition.expand(len(SIGMAS)), **masked)
            if turn < count:
                total += loss
        means = (run.accelerator.reduce(total, "sum") / count).tolist()  # (S,)
        return {"val_loss": sum(means) / len(means)} | {f"val_loss_sigma_{sigma}": mean for sigma, mean in zip(SIGMAS, means, strict=True)}

    def _render(self) -> Tensor:
        """(prompts * num_validation_images, 3, H, W) in [0, 1], prompt by prompt; the processes share the pictures."""
        args, run = self.args, self.run
        jobs = [(prompt, args.validation_seed + n) for prompt in self.prompts for n in range(args.num_validation_images)]
        share = -(-len(jobs) // run.world)  # every process renders equally many, the last ones again if need be
        mine = [jobs[min(i, len(jobs) - 1)] for i in range(run.rank * share, (run.rank + 1) * share)]
        with run.accelerator.autocast():  # as the prompts below: text encoders that are trained compute in it
            negative = self.data.condition([""]) if args.validation_guidance_scale > 1 else None
        rendered = []
        for start in range(0, share, args.train_batch_size):  # no more at once than training holds
            part = mine[start : start + args.train_batch_size]
            with run.accelerator.autocast():
                pictures = self.data.family.render(
                    self.data.encoders, self.denoiser, self.data.condition([prompt for prompt, _ in part]),
                    negative=negative, seeds=[seed for _, seed in part], height=args.resolution, width=args.resolution,
                    num_inference_steps=args.validation_inference_steps, guidance_scale=args.validation_guidance_scale,
                )  # fmt: skip
            if not pictures.isfinite().all():  # as bytes they would be innocent black
                raise ValueError("validation pictures hold NaN or infinity; try --mixed_precision bf16 or no")
            rendered.append((pictures * 255).round().to(torch.uint8))  # a quarter of the memory, and of the traffic
        return run.gather(torch.cat(rendered))[: len(jobs)].cpu().float() / 255  # (jobs, 3, H, W)


class Album:
    """The pictures of each validation: PNGs under samples/step-N, and a grid with those from before training beside them.

    A run that is continued makes the same pictures again; samples of later steps, which an earlier run left, are removed as they are
    superseded, so that `samples` always tells one story.

    Args:
        names: file names of each prompt's pictures, equally many for all.
    """

    def __init__(self, run: runtime.Run, output_dir: Path, prompts: list[str], names: list[list[str]]):
        self.run, self.folder, self.prompts, self.names = run, output_dir / "samples", prompts, names

    def save(self, step: int, rendered: Tensor) -> None:
        """Writes pictures (n, 3, H, W) in [0, 1], prompt by prompt; the main process does."""
        if not self.run.is_main:
            return
        for stale in self.folder.glob(STEPS):
            if step_of(stale) >= step:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        folder, count = self.folder / f"step-{step:06d}", len(self.names[0])
        folder.mkdir(parents=True)
        pictures, names = images.to_pil(rendered), [name for row in self.names for name in row]
        for name, picture, prompt in zip(names, pictures, (p for p in self.prompts for _ in range(count)), strict=True):
            images.save(picture, folder / name, prompt)

        columns = [(f"step {step}", pictures)]
        earlier = [self.folder / "step-000000" / name for name in names]
        if step > 0 and all(path.exists() for path in earlier):  # a run that was resumed in another folder has none
            columns.insert(0, ("before", [images.open_rgb(path) for path in earlier]))
        cells = [picture for p in range(len(self.names)) for _, part in columns for picture in part[p * count : (p + 1) * count]]
        above = [label for label, _ in columns for _ in range(count)]
        grid = images.grid(cells, columns=count * len(columns), row_labels=self.prompts, column_labels=above, largest=GRID_CELL)
        grid.save(self.folder / f"step-{step:06d}.png")
        self.run.log_image("samples", grid, step)


# --------------------------------------------------------------------------- summary.png


def summary(output_dir: Path, prompts: list[str], panels: dict[str, str] | None = None) -> Path:
    """Draw `summary.png`: the curves of metrics.jsonl, and below them a film strip of the samples from first to last.

    Args:
        panels: title and metric of each curve; None: those of a supervised run.
    """
    strip = _film_strip(output_dir / "samples", prompts)
    width = max(1100, strip.width if strip else 0)
    curves = _curves(metrics.read(output_dir / "metrics.jsonl"), width, panels)
    sheet = Image.new("RGB", (width, curves.height + (strip.height if strip else 0)), "white")
    sheet.paste(curves, (0, 0))
    if strip:
        sheet.paste(strip, ((width - strip.width) // 2, curves.height))
    sheet.save(output_dir / "summary.png")
    return output_dir / "summary.png"


def step_of(path: Path) -> int:
    """Of samples/step-000100 and samples/step-000100.png."""
    return int(path.stem.split("-")[1])


def _evenly(items: list, most: int) -> list:
    """At most `most` of the items, first and last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _film_strip(folder: Path, prompts: list[str]) -> Image.Image | None:
    """One row per prompt, one column per validation, always the first seed; None without samples."""
    prompts = prompts[:FILM_ROWS]
    firsts = {}  # step -> its first picture of each prompt
    for step in sorted((path for path in folder.glob(STEPS) if path.is_dir()), key=step_of):
        rows = [sorted(step.glob(f"{row:02d}-*.png"), key=lambda path: int(path.stem.split("-")[1])) for row in range(len(prompts))]
        if rows and all(rows):  # a run resumed with more prompts has steps without some of them
            firsts[step] = [row[0] for row in rows]
    steps = _evenly(list(firsts), FILM_COLUMNS)
    if not steps:
        return None
    cells = [images.open_rgb(firsts[step][row]) for row in range(len(prompts)) for step in steps]
    names = [f"step {step_of(step)}" for step in steps]
    return images.grid(cells, columns=len(steps), row_labels=prompts, column_labels=names, largest=FILM_CELL)


def _curves(lines: list[dict], width: int, panels: dict[str, str] | None) -> Image.Image:
    """One curve for each of `panels`, or the losses of a supervised run; `width` pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = panels or {"training loss": "loss", "validation loss, fixed noise": "val_loss"}
    curves = {title: points for title, name in wanted.items() if (points := _points(lines, name))}  # what was not measured has none
    levels = panels is None and "validation loss, fixed noise" in curves
    count = max(1, len(curves) + levels)
    figure, axes = plt.subplots(1, count, figsize=(width / 100, 3.3), dpi=100, layout="constrained", squeeze=False)
    axes = list(axes[0])
    for axis, (title, points) in zip(axes, curves.items(), strict=False):
        _curve(axis, points, title)
    if levels:
        _changes(axes[-1], lines, plt.get_cmap("viridis"))
    for axis in axes:
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # inches
    memory = io.BytesIO()
    figure.savefig(memory, format="png")
    plt.close(figure)
    return images.open_rgb(memory.getvalue())


def _points(lines: list[dict], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]  # null: it was not finite


def _changes(axis, lines: list[dict], shades) -> None:
    """By how much the validation loss changed at each noise level."""
    for number, sigma in enumerate(SIGMAS):
        values = _points(lines, f"val_loss_sigma_{sigma}")
        changes = [(step, 100 * (value / values[0][1] - 1)) for step, value in values if values[0][1]]
        axis.plot(*zip(*changes, strict=True), color=shades(number / len(SIGMAS)), linewidth=1.6, marker=".", label=str(sigma))
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.set_title("validation loss by level, change in %", fontsize=11)
    axis.legend(title="sigma", title_fontsize=8, fontsize=8, frameon=False, handlelength=1, loc="center left", bbox_to_anchor=(1, 0.5))


def _curve(axis, points: list[tuple[int, float]], title: str) -> None:
    """A line with a dot for each of few points; of many, a light line and over it their running mean."""
    axis.set_title(title, fontsize=11)
    if len(points) > 20:
        axis.plot(*zip(*points, strict=True), color=LIGHT, linewidth=1.0)
        axis.plot(*zip(*_smoothed(points), strict=True), color=DARK, linewidth=2)
    elif points:
        axis.plot(*zip(*points, strict=True), color=DARK, linewidth=1.6, marker=".")


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Running mean over a tenth of the points, centred; fewer at the ends."""
    half, values = max(1, len(points) // 20), [value for _, value in points]
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, windows, strict=True)]
