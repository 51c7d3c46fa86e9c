"""Scores of pictures in training on a reward: of rollouts, on a background thread if wanted, and of fixed prompts for evaluation."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src import checkpoint, cli, ema, inputs, metrics, runtime, scorers, speed, validation
from src.data import prompts

if TYPE_CHECKING:
    from src.scorers.mixture import Mixture

# --------------------------------------------------------------------------- prompts and scorers, before anything is loaded


@dataclass(frozen=True)
class Prompts:
    """What is drawn in training, and what is drawn in evaluation."""

    training: list[prompts.Prompt]
    evaluation: list[prompts.Prompt]

    @property
    def evaluated(self) -> list[str]:
        """The texts of the evaluation."""
        return [prompt.text for prompt in self.evaluation]


def check(args: argparse.Namespace, *, differentiable: bool = False) -> None:
    """Refuse prompts and scorers that do not work, alone or together; prompts that have to be downloaded are looked at later.

    --dry_run needs no weights of scorers.

    Args:
        differentiable: --scorer has to pass a gradient to the pictures.

    Raises:
        ValueError: naming the flag and the cure.
    """
    options = cli.scorer_options(args)
    for flag, spec in (("--scorer", args.scorer), ("--eval_scorers", args.eval_scorers)):
        if spec is not None:
            scorers.check(spec, differentiable and flag == "--scorer", flag=flag, weights=not args.dry_run, **options)
    if differentiable and args.deterministic and "hps" in scorers.parse(args.scorer) and torch.cuda.is_available():
        raise ValueError("--deterministic: the gradient of hps's resizing is not, on a GPU; leave it out, or train on another scorer")
    both = scorers.parse(args.scorer).keys() & scorers.parse(args.eval_scorers).keys() if args.eval_scorers else ()
    if both:
        raise ValueError(f"--eval_scorers {args.eval_scorers}: {', '.join(sorted(both))} is trained on, and evaluated anyway; leave it out")
    sources = {"--prompts": args.prompts} | ({} if args.eval_prompts is None else {"--eval_prompts": args.eval_prompts})
    if all([prompts.is_local(source, flag=flag) for flag, source in sources.items()]):  # a list: each is looked at
        read_prompts(args)


def lacking(args: argparse.Namespace) -> list[str]:
    """What --dry_run passed over and a run will not: weights of scorers that are not here, with the cure."""
    found = []
    for flag, spec in (("--scorer", args.scorer), ("--eval_scorers", args.eval_scorers)):
        try:
            scorers.check(spec, flag=flag, **cli.scorer_options(args)) if spec else None
        except ValueError as error:
            found.append(str(error))
    return found


def read_prompts(args: argparse.Namespace) -> Prompts:
    """Raises ValueError naming the flag, if a source cannot be read, or holds a prompt that a scorer cannot judge."""
    training = _read(args, "--prompts", args.prompts)
    eval_flag, source = _evaluated(args)
    evaluation = (training if args.eval_prompts is None else _read(args, eval_flag, source))[: args.num_eval_prompts]
    judged = [("--prompts", training, args.scorer), (eval_flag, evaluation, args.scorer)]
    judged += [(eval_flag, evaluation, args.eval_scorers)] if args.eval_scorers else []
    for flag, found, spec in judged:
        try:
            scorers.check_prompts(spec, [prompt.text for prompt in found], [prompt.metadata for prompt in found])
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from None
    return Prompts(training, evaluation)


def judges(args: argparse.Namespace, scorer: str) -> bool:
    """Whether a scorer can judge the prompts of the evaluation; of prompts that are not here yet: whether it could judge a plain one.

    Args:
        args: not checked yet.
    """
    flag, source = _evaluated(args)
    found = [prompts.Prompt("a fox")]
    with contextlib.suppress(ValueError):  # a source that is none: `check` refuses it by its own name
        if prompts.is_local(source, flag=flag):
            found = _read(args, flag, source)[: args.num_eval_prompts]
    try:
        scorers.check_prompts(scorer, [prompt.text for prompt in found], [prompt.metadata for prompt in found])
    except ValueError:
        return False
    return True


def _evaluated(args: argparse.Namespace) -> tuple[str, str]:
    """The flag that names the prompts of the evaluation, and their source."""
    return ("--prompts", args.prompts) if args.eval_prompts is None else ("--eval_prompts", args.eval_prompts)


def _read(args: argparse.Namespace, flag: str, source: str) -> list[prompts.Prompt]:
    return prompts.read(source, column=args.prompt_column, cache_dir=args.cache_dir, revision=args.prompts_revision, flag=flag)


def build(run: runtime.Run, args: argparse.Namespace, spec: str) -> Mixture:
    """The scorers of a spec on this process's device."""
    options = cli.scorer_options(args)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.scorer_dtype]
    return scorers.build(spec, device=run.device, dtype=dtype, batch_size=args.scorer_batch_size, **options)


# --------------------------------------------------------------------------- rollouts


@dataclass(frozen=True)
class Scored:
    """An epoch's scores, of all processes, in the order of their positions.

    Attributes:
        total: (N,) float32 on the CPU; NaN: a scorer could not judge the picture. parts: by scorer (N,).
        groups: (N,) whole numbers; equal ones are pictures of one prompt.
    """

    total: Tensor
    parts: dict[str, Tensor]
    groups: Tensor

    def metrics(self) -> dict[str, float]:
        """Means over the pictures that could be judged, under the names of metrics.jsonl."""
        judged = self.total.isfinite()
        means = {f"reward/{name}": values.nanmean().item() for name, values in self.parts.items()}
        good, groups = self.total[judged], self.groups[judged]
        means |= {"reward": good.mean().item(), "reward_std": good.std(correction=0).item(), "unjudged": (~judged).sum().item()}
        of_groups = [part.std(correction=0) for part in (good[groups == group] for group in groups.unique()) if len(part) > 1]
        return means | ({"group_std": torch.stack(of_groups).mean().item()} if of_groups else {})


class Rewards:
    """Scores the pictures of an epoch, batch by batch, in the order in which they come.

    Args:
        background: score on a thread of its own while the caller goes on; the numbers are the same. At most one batch waits while
            another is scored, so that pictures do not pile up.
    """

    def __init__(self, run: runtime.Run, mixture: Mixture, *, background: bool):
        self.run, self.mixture = run, mixture
        on_gpu = run.device.type == "cuda"  # a new thread would take GPU 0, whichever is this process's
        options: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (run.device,)} if on_gpu else {}
        self._thread = ThreadPoolExecutor(1, "rewards", **options) if background else None
        self._stream = torch.cuda.Stream(run.device) if background and on_gpu else None
        self._scored: list[Future | tuple[Tensor, dict[str, Tensor]]] = []
        self._positions: list[int] = []
        self._groups: list[int] = []

    def submit(self, images: Tensor, batch: prompts.Batch) -> None:
        """Images (b, 3, H, W) in [0, 1] of a batch; they are not kept."""
        self._positions += batch.positions
        self._groups += batch.groups
        if self._thread is None:
            self._scored.append(self._score(images, batch, None))
            return
        ready = torch.cuda.current_stream(images.device).record_event() if self._stream else None
        if len(self._scored) > 1:
            self._scored[-2].result()
        self._scored.append(self._thread.submit(self._score, images, batch, ready))

    @torch.no_grad()
    def _score(self, images: Tensor, batch: prompts.Batch, ready: torch.cuda.Event | None) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            if ready is not None:  # the pictures were made on the main thread's stream
                self._stream.wait_event(ready)
                images.record_stream(self._stream)
            scores = self.mixture(images, batch.texts, batch.metadata)
            return scores.total.float().cpu(), {name: values.float().cpu() for name, values in scores.parts.items()}

    def collect(self) -> Scored:
        """Waits for this epoch's scores and puts those of all processes together; every process calls it.

        Raises:
            ValueError: no picture could be judged.
        """
        found = [item.result() if isinstance(item, Future) else item for item in self._scored]
        names = list(found[0][1])
        rows = [torch.stack([total, *(parts[name] for name in names)], dim=1) for total, parts in found]  # (b, 1 + parts) each
        positions, groups = (torch.tensor(numbers, device=self.run.device) for numbers in (self._positions, self._groups))
        everywhere = self.run.gather(positions)
        order = everywhere.argsort().cpu()
        assert torch.equal(everywhere.cpu()[order], torch.arange(len(order))), (  # a picture's reward is looked up by its position
            "every position of the epoch has to be scored once: number the pictures anew where some are left out or drawn again"
        )
        together = self.run.gather(torch.cat(rows).to(self.run.device)).cpu()[order]  # (N, 1 + parts)
        groups = self.run.gather(groups).cpu()[order]  # (N,)
        self._scored, self._positions, self._groups = [], [], []
        if not together[:, 0].isfinite().any():
            raise ValueError("no picture of this epoch could be judged; is the scorer (or its server) working?")
        return Scored(together[:, 0], {name: together[:, i] for i, name in enumerate(names, start=1)}, groups)

    def close(self) -> None:
        """Ends the thread; what it was not yet asked for is dropped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


def stop(run: runtime.Run, saver: checkpoint.Checkpointer, scoring: Rewards) -> None:
    """Ends a run that was told to stop inside an epoch, which no other process could take up in the middle: it goes back to its start.

    What was drawn and learned since is given up; resumed, the run does that epoch again and ends as it would have.
    """
    scoring.close()
    step = saver.save_held()
    run.finish(f"stopped inside an epoch; checkpoint-{step} holds its beginning, --resume_from_checkpoint latest goes on from there")


# --------------------------------------------------------------------------- evaluation


class Evaluator:
    """Draws and scores fixed prompts from fixed seeds by the deterministic sampler: before training, every --eval_epochs (in a script
    without epochs: --eval_steps), and at the end.

    Picture i is that of prompt i and seed i. The first of them are kept in `samples`, beside those from before training. Belongs into a
    checkpoint: it remembers what --eval_scorers said before training.

    Args:
        model: with denoiser and VAE, of the family of `texts`.
        average: its weights stand in for the raw ones meanwhile, if given.
    """

    def __init__(
        self, run: runtime.Run, args: argparse.Namespace, model: Any, texts: inputs.Texts, found: Sequence[prompts.Prompt],
        log: metrics.Log, mixture: Mixture, *, average: ema.Ema | None = None,
    ):  # fmt: skip
        self.run, self.args, self.model, self.texts, self.prompts = run, args, model, texts, list(found)
        self.log, self.average = log, average
        self.mixtures = [mixture] + ([build(run, args, args.eval_scorers)] if args.eval_scorers else [])
        shown = [prompt.text for prompt in self.prompts[: args.num_eval_images]]
        self.album = validation.Album(run, Path(args.output_dir), shown, [[f"{i:02d}-{i}.png"] for i in range(len(shown))])
        self.before: dict[str, float] = {}  # of each held-out scorer, at its first evaluation: step 0
        self.now: dict[str, float] = {}
        self._step = -1  # of the last evaluation
        self.every = getattr(args, "eval_epochs", None) or getattr(args, "eval_steps", None)
        self.rounds = getattr(args, "num_epochs", None) or getattr(args, "max_train_steps", None)
        # no more at once than training holds
        self.batch_size = getattr(args, "train_batch_size", None) or getattr(args, "sample_batch_size", None)

    def evaluate_if_due(self, done: int, step: int) -> None:
        """done: epochs so far, or optimizer steps in a script without."""
        if done % self.every == 0 and done < self.rounds:
            self.evaluate(step)

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Pictures and their scores at this optimizer step; every process calls it."""
        with speed.as_written(self.args), self.log.untimed(), ema.applied(self.average):
            scores, pictures = self._draw_and_score()
            means = {f"eval/{name}": values.nanmean().item() for name, values in scores.items() if name != "reward"}
            self.log.record(step, eval_reward=scores["reward"].nanmean().item(), **means)
            self.album.save(step, pictures)
        names = self.mixtures[1].names if len(self.mixtures) > 1 else []
        self.now = {name: means[f"eval/{name}"] for name in names}
        self.before, self._step = self.now | self.before, step  # a scorer that a resumed run brings along begins here

    def evaluate_last(self, step: int) -> None:
        """The last evaluation, unless this step has had it, then `summary.png` from everything that was logged."""
        if step != self._step:
            self.evaluate(step)
        if self.run.is_main:
            held_out = {f"{name}, not trained on": f"eval/{name}" for name in list(self.now)[:2]}
            panels = {"reward, training pictures": "reward", "reward, evaluation": "eval_reward"} | held_out
            validation.summary(Path(self.args.output_dir), self.album.prompts, panels)

    def dropped(self) -> str | None:
        """What to say if a held-out measure has fallen further than --stop_if_eval_drops allows, else None.

        A fall is measured by the scorer's usual range: of a score around 0, such as ImageReward's, the value itself is no measure.
        """
        limit = self.args.stop_if_eval_drops
        for name, value in self.now.items() if limit else ():
            start, (low, high) = self.before[name], scorers.get(name).range
            if not start - value <= limit * (high - low):  # a value that is NaN has fallen, too
                fell = f"{name} fell from {start:.4g} to {value:.4g}"
                return f"{fell}, by more than --stop_if_eval_drops {limit:g} of its usual range, {low:g} to {high:g}: a hacked reward?"
        return None

    def _draw_and_score(self) -> tuple[dict[str, Tensor], Tensor]:
        """Scores by name (prompts,), the training mixture's total as "reward"; and the pictures that are kept (n, 3, H, W)."""
        args, run, count = self.args, self.run, len(self.prompts)
        share = -(-count // run.world)  # every process draws equally many, the last prompt again if need be
        mine = [min(i, count - 1) for i in range(run.rank * share, (run.rank + 1) * share)]
        against = getattr(args, "negative_prompt", "")  # what training moves away from; ReFL has no such flag
        negative = self.texts.condition([against]) if args.eval_guidance_scale > 1 else None
        names, columns, kept = [], [], []
        for start in range(0, share, self.batch_size):
            part = mine[start : start + self.batch_size]
            found = [self.prompts[i] for i in part]
            texts, metadata = [prompt.text for prompt in found], [prompt.metadata for prompt in found]
            with run.accelerator.autocast():
                pictures = self.texts.family.render(
                    self.model, self.model.denoiser, self.texts.condition(texts), negative=negative, seeds=part,
                    height=args.resolution, width=args.resolution, num_inference_steps=args.eval_num_inference_steps,
                    guidance_scale=args.eval_guidance_scale, batch_size=self.batch_size, decode_batch_size=args.decode_batch_size,
                )  # fmt: skip
            scored = [mixture(pictures, texts, metadata) for mixture in self.mixtures]
            values = {"reward": scored[0].total} | {name: value for scores in scored for name, value in scores.parts.items()}
            names = list(values)
            columns.append(torch.stack([value.float() for value in values.values()], dim=1))  # (b, names)
            if start < args.num_eval_images:
                kept.append((pictures * 255).round().to(torch.uint8))
        together = run.gather(torch.cat(columns))[:count].cpu()  # (prompts, names)
        # Each process keeps the first of its share: either these are all of the first, or shares are whole and follow each other.
        shown = run.gather(torch.cat(kept)[: args.num_eval_images])[: min(args.num_eval_images, count)]
        return dict(zip(names, together.T, strict=True)), shown.cpu().float() / 255

    def state_dict(self) -> dict[str, Any]:
        return {"before": dict(self.before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = dict(state["before"])
