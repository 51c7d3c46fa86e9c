"""The demo as a page in the browser: a prompt, the base model's picture beside the LoRA's, their scores, and the pictures of the run.

Nothing here draws or refuses: `Studio` calls the demo's own functions, so that the page draws and refuses as the command line would, with
the same messages. gradio is imported where the page is built; the code behind its button does not need it.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import math
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from src import cli, gallery
from src.pipelines import stock
from src.scorers.base import Scorer
from src.scorers.mixture import Mixture

MAX_SEED = 2**53 - 1  # a browser's numbers are exact up to here
SMALL = 256  # px: pictures below it are enlarged pixel by pixel, others smoothly
DAY = 86400  # s: how long gradio's copies of pictures are kept; the originals stay in --output_dir
TITLES = {"base": "Base model", "tuned": "With the LoRA"}
CSS = """
.gradio-container {max-width: 1500px !important; width: 100%; margin: 0 auto !important}
.gradio-container main {width: 100%}
#header h1 {font-size: 1.5rem; font-weight: 650; margin: 0 0 .15rem}
#header span {color: var(--body-text-color-subdued); margin-right: 1.2em}
#header code, #note code {font-size: .92em}
.picture img {width: 100%; height: 100%; object-fit: contain !important}
.small img {image-rendering: pixelated}
#first .grid-wrap, #chosen .grid-wrap {height: auto; min-height: 0; max-height: none}
.scores {width: 100%; border-collapse: collapse; border: 0; font-variant-numeric: tabular-nums}
.scores tr, .scores td, .scores th {border: 0; padding: 0; background: none; text-align: left; vertical-align: baseline}
.scores th {padding: .75rem .5rem .1rem 0; font-weight: 600; white-space: nowrap}
.scores td.value {padding: .75rem 0 .1rem; text-align: right; white-space: nowrap; font-size: 1.15rem; font-weight: 600}
.scores .change {font-size: .85rem; font-weight: 500; margin-right: .6em; color: var(--body-text-color-subdued)}
.scores .better {color: #15803d} .dark .scores .better {color: #4ade80}
.scores .worse {color: #b91c1c} .dark .scores .worse {color: #f87171}
.scores .bar {height: 5px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; margin: .1rem 0 .25rem}
.scores .bar i {display: block; height: 100%; background: var(--color-accent)}
.scores small, .unjudged {color: var(--body-text-color-subdued); font-size: .8rem; line-height: 1.35}
"""


@dataclasses.dataclass(frozen=True)
class Wish:
    """A visitor's settings, by flag names; all others are those of the command line."""

    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    lora_scale: float


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture that was drawn: `base` or `tuned`, its file, its (width, height) in px, its scores by name, whether it was blacked out."""

    column: str
    path: Path
    size: tuple[int, int]
    scores: Mapping[str, float]
    blacked_out: bool = False  # by the model's safety checker


# --------------------------------------------------------------------------- behind the button


class Studio:
    """One pipeline, loaded once, that draws for all visitors, one picture at a time.

    Args:
        parser, args: the demo's, with --ui.
        pipeline, scorer: what the demo loaded; scorer is None without --scorer.
        render: the demo's function that draws a batch, judges the pictures and keeps them.
        check: the demo's function that refuses flags without effect.
    """

    def __init__(
        self, parser: cli.Parser, args: argparse.Namespace, pipeline: Any, scorer: Mixture | None, render: Callable, check: cli.Check
    ):  # fmt: skip
        self.parser, self.args, self.pipeline, self.scorer = parser, args, pipeline, scorer
        self.render, self.check = render, check
        self.columns = ["base", "tuned"] if args.lora_weights_path else ["base"]
        self._turn, self._index = threading.Lock(), -1

    def first_wish(self, prompt: str) -> Wish:
        """The settings that the page opens with."""
        return Wish(prompt, **{field.name: getattr(self.args, field.name) for field in dataclasses.fields(Wish)[1:]})

    def asked(self, wish: Wish) -> argparse.Namespace:
        """Arguments with which the demo would draw this without a page.

        Raises:
            ValueError: it cannot be drawn.
        """
        if not wish.prompt.strip():
            raise ValueError("the prompt is empty: write what the picture shall show")
        if wish.seed is None or not 0 <= wish.seed <= MAX_SEED:
            raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}")
        changes = dataclasses.asdict(wish) | {"prompt": [wish.prompt.strip()], "prompts_file": None, "compare": len(self.columns) > 1}
        changes |= {name: self.parser.get_default(name) for name in ("ui", "ui_host", "ui_port")}
        asked = argparse.Namespace(**vars(self.args) | changes)
        cli.check(self.parser, asked, [self.check])
        return asked

    def command(self, wish: Wish) -> str:
        """The command that draws the same pictures."""
        return shlex.join(["python", "demo.py", *cli.command_line(self.parser, self.asked(wish), ("what to draw", "model"))])

    def draw(self, wish: Wish, on_step: Callable[[str, int, int], None]) -> Iterator[Shown]:
        """The picture of each column as soon as it is there, from the same noise.

        Args:
            on_step: called with the column, the number of denoising steps done, and their total.

        Raises:
            ValueError: it cannot be drawn.
            MemoryError: the GPU's memory is too small.
        """
        asked = self.asked(wish)
        [prompt], able = asked.prompt, judges(self.scorer, wish.prompt)[0]
        job = gallery.Job(self._number(), prompt, wish.seed)
        for column in self.columns:
            with self._turn:
                if len(self.columns) > 1:
                    self.pipeline.set_adapters("tuned", wish.lora_scale)
                [(path, picture, scores, black)] = self.render(self.pipeline, able, [job], column, asked, partial(on_step, column))
            yield Shown(column, path, picture.size, scores, black)

    def _number(self) -> int:
        """Number of the next picture: above those in --output_dir, and never used twice."""
        with self._turn:
            self._index = max(self._index + 1, gallery.next_index(self.args.output_dir))
            return self._index


def judges(mixture: Mixture | None, prompt: str) -> tuple[Mixture | None, dict[str, str]]:
    """The scorers of a mixture that can judge pictures of this prompt, None if none can; and, by name, why the others cannot."""
    parts = mixture.parts if mixture else ()
    reasons = {part.scorer.name: reason for part in parts if (reason := part.scorer.check_prompt(prompt, None))}
    able = tuple(part for part in parts if part.scorer.name not in reasons)
    return dataclasses.replace(mixture, parts=able) if able else None, reasons


# --------------------------------------------------------------------------- scores


def score_card(
    mixture: Mixture | None, prompt: str, scores: Mapping[str, float], base: Mapping[str, float] | None = None, *, blacked_out: bool = False
) -> str:
    """HTML: each scorer's verdict with its usual range and what it measures.

    Args:
        scores: by name, of those that could judge the prompt; NaN: this picture could not be judged.
        base: scores of the base model's picture, where there is one to compare with.
        blacked_out: whether the model's safety checker left nothing to judge.
    """
    if mixture is None:
        return '<p class="unjudged">Not judged: start the demo with <code>--scorer</code> to see scores here.</p>'
    reasons = judges(mixture, prompt)[1]
    silent = "the model's safety checker blacked the picture out" if blacked_out else "it gave no verdict on this picture"
    rows = [
        _unjudged(part.scorer, reasons.get(part.scorer.name, silent))
        if math.isnan(scores.get(part.scorer.name, math.nan))
        else _judged(part.scorer, scores[part.scorer.name], (base or {}).get(part.scorer.name, math.nan))
        for part in mixture.parts
    ]
    return f'<table class="scores">{"".join(rows)}</table>'


def _judged(scorer: Scorer, score: float, base: float) -> str:
    low, high = scorer.range
    share = min(max((score - low) / (high - low), 0), 1)
    change = ""
    if math.isfinite(base):
        kind = "better" if score > base else "worse"
        change = '<span class="change">±0</span>' if score == base else f'<span class="change {kind}">{score - base:+.3g}</span>'
    return (
        f'<tr><th>{scorer.name}</th><td class="value">{change}{score:.3g}</td></tr>'
        f'<tr><td colspan="2"><div class="bar"><i style="width: {share:.1%}"></i></div>'
        f"<small>{html.escape(scorer.summary)}; usually {low:g} to {high:g}</small></td></tr>"
    )


def _unjudged(scorer: Scorer, reason: str) -> str:
    return (
        f'<tr><th>{scorer.name}</th><td class="value">not judged</td></tr>'
        f'<tr><td colspan="2"><small>{html.escape(reason)}</small></td></tr>'
    )


# --------------------------------------------------------------------------- validation pictures


def run_folder(weights: Path) -> Path | None:
    """The run that made these weights (a folder, a checkpoint in one, a file in either), if it left validation pictures."""
    path = weights.expanduser()
    return next((folder for folder in (path, *path.parents[:2]) if album(folder)), None)


def album(run: Path) -> dict[int, list[tuple[str, str]]]:
    """Step of each validation -> (file, prompt) of its pictures, prompt by prompt."""
    from src import validation  # here, since it imports all that a run needs; only the page needs it

    folders = sorted((path for path in (run / "samples").glob(validation.STEPS) if path.is_dir()), key=validation.step_of)
    pictures = {validation.step_of(folder): sorted(folder.glob("*.png"), key=_numbers_of) for folder in folders}
    return {step: [(str(path), _prompt_of(path)) for path in paths] for step, paths in pictures.items()}


def _numbers_of(path: Path) -> list[int]:
    """Of 03-10.png: prompt 3, seed 10."""
    return [int(number) for number in path.stem.split("-")]


def _prompt_of(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.info.get("prompt", f"prompt {_numbers_of(path)[0]}")  # older runs did not write it into the file


# --------------------------------------------------------------------------- the page


def serve(studio: Studio, prompts: list[str], host: str, port: int) -> None:
    """Serve the page until Ctrl-C; it sends no requests to other machines. The first prompt is filled in; all are offered as examples."""
    import gradio as gr

    args, run = studio.args, run_folder(Path(studio.args.lora_weights_path or studio.args.pretrained_model_name_or_path))
    page = build(studio, prompts, run)
    page.queue(default_concurrency_limit=1)
    page.launch(
        server_name=host, server_port=port, share=False, quiet=True, show_error=True, prevent_thread_lock=True,
        allowed_paths=[str(path.absolute()) for path in (args.output_dir, *([run / "samples", run / "summary.png"] if run else []))],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]), css=CSS,
        footer_links=[], run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False,
    )  # fmt: skip
    print(f"the page is at http://{host}:{port}, its pictures are kept in {args.output_dir}; Ctrl-C ends it", flush=True)
    page.block_thread()


def build(studio: Studio, prompts: list[str], run: Path | None) -> Any:
    """gradio's Blocks: a tab to draw, and one with the run's validation pictures if there is a run."""
    import gradio as gr

    args = studio.args
    facts = {"model": args.pretrained_model_name_or_path, "LoRA": args.lora_weights_path, "precision": args.dtype,
             "device": studio.pipeline.device}  # fmt: skip
    line = "".join(f"<span>{name} <code>{html.escape(str(value))}</code></span>" for name, value in facts.items() if value)
    with gr.Blocks(title="Dive into Stable Diffusion 3.5", analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
        gr.HTML(f"<h1>Dive into Stable Diffusion 3.5</h1>{line}", elem_id="header")
        with gr.Tab("Draw"):
            _draw_tab(studio, prompts)
        if run:
            with gr.Tab("Validation pictures"):
                _album_tab(run, page)
    return page


def _controls(studio: Studio, prompts: list[str]) -> tuple[list[Any], Any]:
    """The inputs, in the order of `Wish`, and the button."""
    import gradio as gr

    first, tuned = studio.first_wish(prompts[0]), len(studio.columns) > 1
    prompt = gr.Textbox(
        first.prompt, label="Prompt", info="What the picture shows. Shift+Enter draws.", lines=2, autofocus=True, elem_id="prompt"
    )
    button = gr.Button("Draw", variant="primary", elem_id="draw")
    lora_scale = gr.Slider(
        min(-1, first.lora_scale), max(2, first.lora_scale), first.lora_scale, step=0.05, label="LoRA scale", visible=tuned,
        info="Strength of the LoRA: 0 is the base model, 1 as trained.", elem_id="lora_scale",
    )  # fmt: skip
    with gr.Group():
        seed = gr.Number(first.seed, label="Seed", info="Decides the noise it starts from.", precision=0, minimum=0, elem_id="seed")
        gr.Button("Next seed", size="sm").click(None, seed, seed, js="seed => seed + 1", api_visibility="private")
    steps = gr.Slider(
        1, max(100, first.num_inference_steps), first.num_inference_steps, step=1, label="Steps", elem_id="steps",
        info="Denoising steps: more are slower, and closer to what the model knows.",
    )  # fmt: skip
    guidance = gr.Slider(
        0, max(15, first.guidance_scale), first.guidance_scale, step=0.1, label="Guidance", elem_id="guidance",
        info="How hard the prompt pulls; 1 is off.",
    )  # fmt: skip
    negative = gr.Textbox(
        first.negative_prompt, label="Negative prompt", info="What to stay away from; needs guidance above 1.", elem_id="negative"
    )
    gr.Examples([[text] for text in prompts], [prompt], label="Prompts to start from", cache_examples=False)
    return [prompt, negative, seed, steps, guidance, lora_scale], button


def _draw_tab(studio: Studio, prompts: list[str]) -> None:
    import gradio as gr

    pictures, cards = {}, {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            controls, button = _controls(studio, prompts)
        with gr.Column(scale=5):
            with gr.Row(equal_height=False):
                for column in studio.columns:
                    with gr.Column(min_width=240):
                        pictures[column] = gr.Image(
                            label=TITLES[column] if len(studio.columns) > 1 else "Picture", type="filepath", interactive=False, height=440,
                            buttons=["download", "fullscreen"], elem_id=column, elem_classes="picture",
                        )  # fmt: skip
                        cards[column] = gr.HTML(elem_id=f"{column}-scores")
            note = gr.Markdown(elem_id="note")
            command = gr.Textbox(
                label="The same from the command line", lines=2, interactive=False, visible=False, buttons=["copy"], elem_id="command"
            )
    bar = gr.Progress()

    def press(*values: Any, progress: Any = bar) -> Iterator[dict]:
        wish, done, started = Wish(*values), {}, time.perf_counter()

        def on_step(column: str, step: int, steps: int) -> None:
            progress((len(done) * steps + step, len(studio.columns) * steps), desc=f"{TITLES[column]}, step {step} of {steps}")

        try:
            same = studio.command(wish)
            yield {**dict.fromkeys(pictures.values()), **dict.fromkeys(cards.values(), ""), note: "", command: gr.update(visible=False)}
            for shown in studio.draw(wish, on_step):
                done[shown.column] = shown
                small = " small" if max(shown.size) < SMALL else ""
                base = done["base"].scores if shown.column == "tuned" else None
                card = score_card(studio.scorer, wish.prompt, shown.scores, base, blacked_out=shown.blacked_out)
                yield {pictures[shown.column]: gr.update(value=str(shown.path), elem_classes=f"picture{small}"), cards[shown.column]: card}
        except (ValueError, MemoryError) as error:
            gr.Warning(str(error), duration=None)
            yield {note: gr.skip()}  # yielding nothing would clear the page
            return
        text = caption(studio, wish, list(done.values()), time.perf_counter() - started)
        yield {note: text, command: gr.update(value=same, visible=True)}

    outputs = [*pictures.values(), *cards.values(), note, command]
    gr.on([button.click, controls[0].submit], press, controls, outputs, show_progress_on=list(pictures.values()), api_visibility="private")


def caption(studio: Studio, wish: Wish, shown: list[Shown], seconds: float) -> str:
    """Markdown below the pictures: size, time, files, what CLIP did not read, and what the model's safety checker blacked out."""
    width, height = shown[0].size
    names = " and ".join(f"`{one.path.name}`" for one in shown)
    parts = [f"{width} x {height} px in {seconds:.1f} s, kept as {names} in `{studio.args.output_dir}`"]
    if long := stock.long_prompts(studio.pipeline, [wish.prompt]):
        parts.append(long)
    if hidden := [one.path.name for one in shown if one.blacked_out]:
        parts.append(gallery.safety_note(hidden, len(shown), scored=studio.scorer is not None))
    return "\n\n".join(parts)


def _album_tab(run: Path, page: Any) -> None:
    """The validation pictures of one step beside those of the first; read again when the page is loaded, since a run may go on."""
    import gradio as gr

    gr.Markdown(f"What the run in `{run}` drew from fixed seeds while it trained.")
    step = gr.Radio(label="Step", info="Optimizer steps when the pictures were drawn.", elem_id="step")
    with gr.Row(equal_height=False):
        first, chosen = (
            gr.Gallery(columns=2, object_fit="contain", height="auto", buttons=["download", "fullscreen"], elem_id=name)
            for name in ("first", "chosen")
        )
    with gr.Accordion("Curves, and the pictures from first to last", open=False, visible=(run / "summary.png").exists()):
        summary = gr.Image(type="filepath", show_label=False, interactive=False, buttons=["download", "fullscreen"])

    def strip(number: int) -> Any:
        return gr.update(value=album(run)[number], label=f"Step {number}")

    def read() -> tuple:
        steps = list(album(run))
        file = run / "summary.png"
        return gr.update(choices=steps, value=steps[-1]), strip(steps[0]), strip(steps[-1]), str(file) if file.exists() else None

    page.load(read, None, [step, first, chosen, summary], api_visibility="private")
    step.input(strip, step, chosen, api_visibility="private")
