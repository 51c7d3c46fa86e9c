"""Checkpoints: written whole or not at all, rotated, resumed exactly.

output_dir/checkpoint-STEP holds `state.pt` (a dictionary of the parts' states, readable with `torch.load(weights_only=True)`),
the run's `args.json` and whatever `write_weights` adds for other programs. It is written as `checkpoint-STEP.tmp`, flushed to the
disk and renamed: a run killed at any moment leaves the previous checkpoint intact.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from src import sharding
from src.errors import first_line

if TYPE_CHECKING:
    from src.runtime import Run

_NAME = re.compile(r"checkpoint-(\d+)")


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name).group(1))


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first by step."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / "state.pt").is_file()]
    return sorted(found, key=_step)


def find_latest(output_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return (_checkpoints(output_dir) or [None])[-1]


def locate(spec: str | Path | None, output_dir: Path) -> Path | None:
    """The folder that `latest`, a path or None stands for; None: start at step 0."""
    if spec is None:
        return None
    return find_latest(output_dir) if str(spec) == "latest" else Path(spec)


def saved_args(folder: Path) -> dict[str, Any]:
    """The flags of the run that wrote the checkpoint."""
    return json.loads((folder / "args.json").read_text(encoding="utf-8"))


def check_resume(
    spec: str | None, output_dir: Path, max_train_steps: int | None = None, *, num_epochs: int | None = None, updates: int = 1
) -> None:
    """Refuses to resume from a folder that is no checkpoint or is past the end of the run, and to mix two runs in one folder.

    Args:
        max_train_steps: last step of the run; or num_epochs: its last epoch, each of `updates` steps. None: no end.

    Raises:
        ValueError: --resume_from_checkpoint names no checkpoint, or one past the end, or output_dir holds checkpoints that this run would
            not continue.
    """
    flag = f"--resume_from_checkpoint {spec}"
    folder, latest = locate(spec, output_dir), find_latest(output_dir)
    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"{flag}: no such folder; give a checkpoint-STEP folder or `latest`")
        if not _NAME.fullmatch(folder.resolve().name) or not all((folder / name).is_file() for name in ("state.pt", "args.json")):
            inside = find_latest(folder)
            raise ValueError(f"{flag} is no checkpoint; give " + (str(inside) if inside else "a checkpoint-STEP folder or `latest`"))
        limit, end = ("--max_train_steps", max_train_steps) if num_epochs is None else ("--num_epochs", num_epochs)
        needed = -(-_step(folder.resolve()) // updates)
        if end is not None and needed > end:
            raise ValueError(f"{limit} {end}: {folder.name} is past it already; give at least {needed}")
    if latest is not None and (folder is None or folder.resolve() != latest.resolve()):
        raise ValueError(
            f"--output_dir {output_dir} already holds {latest.name}: continue it with --resume_from_checkpoint latest, "
            "choose another --output_dir, or delete it"
        )


def _sync(path: Path) -> None:
    """Forces a file or a folder's list of names onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _no_checksums() -> Iterator[None]:
    """Inside, torch.save computes no checksums, a third of its time. They are not needed: an incomplete file is never renamed."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint; a kill in between leaves no partial one under a checkpoint's name."""
    doomed = folder if folder.suffix == ".tmp" else folder.with_name(folder.name + ".old.tmp")
    if doomed != folder:
        os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _write_failures() -> tuple[type[BaseException], ...]:
    """Exceptions raised when writing to a full or read-only disk."""
    from safetensors import SafetensorError

    return OSError, SafetensorError


@contextlib.contextmanager
def writing_result(output_dir: Path) -> Iterator[None]:
    """Inside, the result of a run is written to its folder: what the disk refuses ends the program with one line.

    Raises:
        SystemExit: says which checkpoint is intact and what to do.
    """
    try:
        yield
    except _write_failures() as error:
        latest = find_latest(output_dir)
        again = "continue with --resume_from_checkpoint latest" if latest else "run again"
        intact = f"; {latest.name} is intact" if latest else ""
        full = getattr(error, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT)  # safetensors' own error has no number
        cure = f"{'Free space there' if full else 'Mend that'}, then {again}"
        raise SystemExit(f"error: could not write the result to {output_dir} ({first_line(error)}){intact}. {cure}") from error


def _difference(saved: dict, here: dict) -> str | None:
    """Why a flat dictionary of tensors, `saved`, cannot be loaded into another, `here`; None if no reason is found."""
    if not isinstance(saved, dict) or not all(isinstance(value, torch.Tensor) for value in (*saved.values(), *here.values())):
        return None  # nested or scalar: the part's own load_state_dict has to judge
    missing, extra = sorted(here.keys() - saved.keys()), sorted(saved.keys() - here.keys())
    if missing or extra:
        return f"{len(missing)} tensors are missing and {len(extra)} unknown, first {(missing + extra)[0]}"
    for name, value in here.items():
        if value.shape != saved[name].shape:
            return f"{name} is {tuple(saved[name].shape)} in the checkpoint and {tuple(value.shape)} here"
    return None


def _copied(tree: Any) -> Any:
    """A nested state with copies of its tensors on the CPU."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return tree.detach().to("cpu", copy=True) if hasattr(tree, "detach") else tree


class Checkpointer:
    """Saves and restores `parts`, each an object with `state_dict` and `load_state_dict` of tensors, numbers and texts.

    A part that also has `write_files(folder, state)` and `read_files(folder) -> state` is kept in files of its own, not in state.pt.
    The speed that a part "log" (metrics.Log) writes does not include the time of saving.
    Put the weights first: they are then checked before the optimizer, which would accept any state. fp16's GradScaler is added
    automatically. In a training step, save last: after the metrics and the validation of that step are on the disk.

    Args:
        every: optimizer steps between checkpoints.
        keep: number of checkpoints to keep, None for all.
        write_weights: called on the main process with the folder, to add weights in the format of other programs.
    """

    def __init__(
        self, run: Run, *, every: int, keep: int | None, parts: dict[str, Any], write_weights: Callable[[Path], None] | None = None
    ):
        self.run, self.every, self.keep, self.write_weights = run, every, keep, write_weights
        self.parts = dict(parts)
        scaler = getattr(run.accelerator, "scaler", None)
        if scaler is not None:
            self.parts["scaler"] = scaler
        self.saved: int | None = None  # the last step that was written
        self._held: tuple[int, dict[str, Any] | None] | None = None
        if run.is_main:
            for stale in run.output_dir.glob("checkpoint-*.tmp"):  # of a run that was killed while saving
                shutil.rmtree(stale)

    def save_if_due(self, step: int) -> bool:
        """Saves at multiples of `every`; returns whether it did."""
        if step % self.every:
            return False
        self.save(step)
        return True

    def save(self, step: int) -> None:
        """Writes checkpoint-STEP and removes the ones beyond `keep`; a step that is saved already is left alone.

        All processes call it, the main one writes.

        Raises:
            SystemExit: on every process if writing failed (full disk): says which checkpoint is intact and what to do.
        """
        if step == self.saved:
            return
        with getattr(self.parts.get("log"), "untimed", contextlib.nullcontext)():
            # on every process: sharded parts are gathered by all of them
            state = {name: sharding.gathered(part.state_dict(), keep=self.run.is_main) for name, part in self.parts.items()}
            failure = None
            if self.run.is_main:
                failure = self._try_write(step, state)
            failure = self.run.broadcast(failure)  # the other processes wait here
        if failure:
            raise SystemExit(failure)
        self.saved = step

    def stop(self, step: int) -> None:
        """Saves, and ends a run that was asked to stop."""
        self.save(step)
        self.run.finish(f"stopped after step {step} with a checkpoint; --resume_from_checkpoint latest goes on")

    def hold(self, step: int, copy: bool = True) -> None:
        """Holds the present state of all parts, copied to the CPU, for `save_held` to restore. Every process calls it.

        For loops that cannot resume at every step: reinforcement learning continues only from the end of an epoch.

        Args:
            copy: False if the state is too large to copy; then call `save_held` only while nothing has changed.
        """
        self._held = None  # first, so that the old and the new copy are never both in memory
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self._held = (step, _copied(sharding.gathered(state)) if copy else None)

    def save_held(self) -> int:
        """Puts every part back as it was at the last `hold`, saves that, and returns its step."""
        assert self._held is not None, "hold() comes first"
        step, state = self._held
        if state is not None:
            self._load(state)
        self.save(step)
        return step

    def _try_write(self, step: int, state: dict) -> str | None:
        """Writes, renames, rotates; if the disk refused, returns the message for the user."""
        output_dir = self.run.output_dir
        folder = output_dir / f"checkpoint-{step}"
        temporary = folder.with_name(folder.name + ".tmp")
        try:
            self._write(temporary, {"step": step, "kinds": self._kinds(), "world": self.run.world, **state})
            if folder.exists():
                _remove(folder)
            os.replace(temporary, folder)
            _sync(output_dir)
        except (*_write_failures(), RuntimeError) as error:
            # torch's writer reports a full disk as RuntimeError; any other one is a mistake in the code and must be seen
            if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container|iostream", str(error)):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            latest = find_latest(output_dir)
            before = f"the previous one, {latest.name}, is intact" if latest else "there is no earlier one"
            return (
                f"error: could not write {folder} ({first_line(error)}); {before}. Free space there "
                "(or use a smaller --checkpoints_total_limit), then continue with --resume_from_checkpoint latest"
            )
        self._rotate(folder)
        return None

    def _write(self, folder: Path, state: dict) -> None:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        for name, part in self._with_files().items():
            part.write_files(folder, state.pop(name))
        with open(folder / "state.pt", "wb") as file, _no_checksums():  # a Python file: a full disk then raises OSError with its reason
            torch.save(state, file)
        shutil.copyfile(self.run.output_dir / "args.json", folder / "args.json")
        if self.write_weights is not None:
            self.write_weights(folder)
        for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
            _sync(path)

    def _rotate(self, newest: Path) -> None:
        if self.keep is None:
            return
        for folder in _checkpoints(self.run.output_dir)[: -self.keep]:
            if folder != newest:
                _remove(folder)

    def resume(self, spec: str | Path | None) -> int:
        """Loads every part from `latest` or a folder; returns the step to continue after, 0 for a fresh start.

        From here on SIGTERM and Ctrl-C only set a flag, on which the training loop saves and stops: call this right before the loop.

        Raises:
            SystemExit: the checkpoint does not fit the flags of this run; says which part and which flags differ.
        """
        self.run.signals.install()

        folder = locate(spec, self.run.output_dir)
        if folder is None:
            if spec is not None:
                self.run.print(f"no checkpoint in {self.run.output_dir}: starting at step 0")
            return 0
        try:
            step, world = self._read(folder)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        self.saved = step if folder.parent.resolve() == self.run.output_dir.resolve() else None
        self.run.print(f"resuming from {folder}, step {step}")
        if note := other_batch(saved_args(folder), world, vars(self.run.args), self.run.world):
            self.run.print(note)
        return step

    def _read(self, folder: Path) -> tuple[int, int]:
        """Loads every part; returns the checkpoint's step and number of processes. Raises ValueError if it does not fit."""
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)  # processes of a machine share the pages
        step, kinds, world = state.pop("step"), state.pop("kinds"), state.pop("world", self.run.world)
        state |= {name: part.read_files(folder) for name, part in self._with_files().items()}
        missing, extra = sorted(self.parts.keys() - state.keys()), sorted(state.keys() - self.parts.keys())
        if missing or extra:
            what = f"no state of {', '.join(missing)}" if missing else f"a state of {', '.join(extra)}, which this run does not use"
            raise ValueError(f"{folder} holds {what}{self._other_flags(folder)}")
        for name, part in self.parts.items():
            difference = _difference(state[name], part.state_dict())
            if kinds.get(name) != self._kinds().get(name):
                difference = f"saved by {kinds.get(name)}, this run uses {self._kinds().get(name)}"
            if difference is None:
                try:
                    self._load({name: state[name]})
                except (ValueError, RuntimeError, KeyError) as error:  # what torch raises for a state of another shape
                    difference = first_line(error)
            if difference is not None:
                raise ValueError(f"{folder} does not fit this run: {name}: {difference}{self._other_flags(folder)}")
        return step, world

    def _load(self, state: dict[str, Any]) -> None:
        """Loads the state of each part, sharded as the part is."""
        for name, value in state.items():
            part = self.parts[name]
            part.load_state_dict(sharding.placed_state(value, part) if hasattr(part, "param_groups") else value)

    def _with_files(self) -> dict[str, Any]:
        return {name: part for name, part in self.parts.items() if hasattr(part, "write_files")}

    def _kinds(self) -> dict[str, str]:
        """Class of each optimizer: torch would load another optimizer's state, and fail steps later."""
        optimizers = {name: part for name, part in self.parts.items() if hasattr(part, "param_groups")}
        bare = {name: getattr(part, "optimizer", part) for name, part in optimizers.items()}  # inside accelerate's wrapper
        return {name: getattr(optimizer, "kind", type(optimizer).__name__) for name, optimizer in bare.items()}

    def _other_flags(self, folder: Path) -> str:
        now = json.loads((self.run.output_dir / "args.json").read_text(encoding="utf-8"))
        changes = changed_flags(saved_args(folder), now)
        return f"; flags that differ: {', '.join(changes)}" if changes else "; pass the flags it was written with (its args.json)"


def other_batch(before: dict[str, Any], world_before: int, now: dict[str, Any], world: int) -> str | None:
    """A line if a step (where pictures are drawn: an epoch) has another number of pictures than in the run that wrote the checkpoint.

    Args:
        before, now: flags; world_before, world: number of processes.
    """
    drawn = "sample_num_batches_per_epoch" in now
    batch, batches = ("sample_batch_size", "sample_num_batches_per_epoch") if drawn else ("train_batch_size", "gradient_accumulation_steps")
    if batch not in now or batch not in before:
        return None
    old, new = (math.prod((flags[batch], flags[batches], size)) for flags, size in ((before, world_before), (now, world)))
    if old == new:
        return None
    fitting, rest = divmod(old, now[batch] * world)
    cure = f"; --{batches} {fitting} would keep them" if fitting and not rest else ""
    what = "an epoch" if drawn else "a step"
    return f"{what} has {new} samples on {world} process(es), {old} on {world_before} before, at the learning rate of the checkpoint{cure}"


def changed_flags(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`--rank 4 -> 8` for each flag that differs, except --resume_from_checkpoint, --output_dir and --dry_run."""
    ignored = {"resume_from_checkpoint", "output_dir", "dry_run"}
    names = [name for name in (*before, *(n for n in now if n not in before)) if name not in ignored]
    return [f"--{name} {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
