"""The README.md that a run leaves in its folder (a model card that the Hub understands), and the upload."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from pathlib import Path

from src import ema, full, lora, metrics, runtime
from src.errors import first_line

# Not uploaded to the Hub: checkpoints serve only to resume. A `*` matches slashes too.
NOT_UPLOADED = ["checkpoint-*", "logs/*", "*.tmp"]

SD35 = "stabilityai/stable-diffusion-3.5-"
OPENRAIL = {  # under CreativeML Open RAIL(++)-M, by the name of their repository
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-diffusion-xl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
}
WHOLE = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({where!r}, torch_dtype=torch.bfloat16)
image = pipeline({prompt!r}{drawn}).images[0]"""
LORA = """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base!r}, torch_dtype=torch.bfloat16)
pipeline.load_lora_weights({where!r})
image = pipeline({prompt!r}{drawn}).images[0]"""
TRANSFORMER = """import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel

transformer = SD3Transformer2DModel.from_pretrained({where!r}, subfolder="transformer", torch_dtype=torch.bfloat16)
pipeline = DiffusionPipeline.from_pretrained({base!r}, transformer=transformer, torch_dtype=torch.bfloat16)
image = pipeline({prompt!r}{drawn}).images[0]"""
# The most important settings; the card omits those that the run does not have, or has unset or off. The rest is in args.json.
SETTINGS = (
    "resolution", "rank", "lora_alpha", "weights_dtype", "quantize_base", "optimizer", "learning_rate", "lr_scheduler", "train_batch_size",
    "gradient_accumulation_steps", "timestep_density", "prior_loss_weight", "beta_dpo", "loss_type", "loss", "method", "scorer", "prompts",
    "grad_scale", "reward_threshold", "transition", "noise_level", "window_size", "group_size", "sample_batch_size",
    "sample_num_batches_per_epoch", "updates_per_epoch", "num_inner_epochs", "clip_nats", "kl_weight", "guidance_scale", "use_ema",
    "mixed_precision",
)  # fmt: skip

_HF = Path(sys.executable).with_name("hf")  # beside this Python: users of the wrappers need not activate its environment
_HF = _HF if _HF.exists() else "hf"


def check(push_to_hub: bool) -> None:
    """Refuse --push_to_hub without a login: after the training would be too late.

    Raises:
        ValueError: naming the flag and the cure.
    """
    if push_to_hub:
        from huggingface_hub import get_token

        if get_token() is None:
            raise ValueError(f"--push_to_hub: no Hub login on this machine; run `{_HF} auth login` or set HF_TOKEN")


def write(
    run: runtime.Run, args: argparse.Namespace, *, kind: str, prompt: str, images: int | None = None, trained_on: str | None = None
) -> None:  # fmt: skip
    """Write README.md, remove results of an earlier run that this one did not replace, and upload the folder with --push_to_hub.

    Args:
        kind: what was trained, in words; the example loads a LoRA ("... LoRA"), a "Fine-tuned transformer", or else a pipeline.
        prompt: one that suits the data, for the example.
        images: number of training pictures of --dataset_name. trained_on: instead, what training used, and for how long, in words.

    Raises:
        SystemExit: the upload failed; everything is on disk, and the message says how to go on.
    """
    if not run.is_main:
        return
    folder = Path(args.output_dir)
    where = (args.hub_model_id or folder.name) if args.push_to_hub else str(folder)
    readme = folder / "README.md"
    remove_stale(args)
    trained_on = trained_on or f"{images} pictures of `{getattr(args, 'dataset_name', '')}`, {args.max_train_steps} optimizer steps"
    if run.world > 1:  # args.json has the batch size of each process
        trained_on += f", on {run.world} processes"
    readme.write_text(text(args, kind=kind, trained_on=trained_on, prompt=prompt, where=where), encoding="utf-8")
    if not args.push_to_hub:
        return
    from huggingface_hub import HfApi

    run.signals.restore()  # training is over: a signal ends the program
    api = HfApi()
    try:
        repository = api.create_repo(where, exist_ok=True).repo_id  # with the account's name, if none was given
        readme.write_text(text(args, kind=kind, trained_on=trained_on, prompt=prompt, where=repository), encoding="utf-8")
        message = f"{kind}: {trained_on}"
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=NOT_UPLOADED, commit_message=message)
    except (OSError, ValueError) as error:  # the Hub's refusals and a broken connection are OSErrors, an impossible name a ValueError
        advice = f"{folder} is complete; try `{_HF} upload {where} {folder}`"
        raise SystemExit(f"error: the upload failed ({first_line(error)}). {advice}") from error
    run.print(f"uploaded to {repository}")


# Weights in a second form (raw/, merged_...): these files, directly in that folder, or in one folder per part if all weights are trained.
WEIGHT_FILES = (lora.WEIGHTS_NAME, lora.KOHYA_NAME, full.WEIGHTS_NAME, "model.safetensors", "config.json")
WEIGHT_FOLDERS = ("transformer", "unet", *lora.TEXT_PARTS)


def remove_stale(args: argparse.Namespace) -> None:
    """Delete an earlier run's weights in --output_dir in forms that this run does not write: they would pass for its result.

    These are kohya's file, raw weights beside an average, and merged weights. Other files are not ours, and stay with their folder.
    """
    folder, merged = Path(args.output_dir), vars(args).get("export_merged", False)
    if vars(args).get("export_format") != "kohya":
        (folder / lora.KOHYA_NAME).unlink(missing_ok=True)
    for name, written in ((ema.RAW, args.use_ema), ("merged_transformer", merged), ("merged_unet", merged)):
        inside = (*(folder / name / part for part in WEIGHT_FOLDERS), folder / name)
        for place in inside if not written and not (folder / name).is_symlink() else ():
            if not place.is_dir() or place.is_symlink():
                continue
            for file in WEIGHT_FILES:
                (place / file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                place.rmdir()


def text(args: argparse.Namespace, *, kind: str, trained_on: str, prompt: str, where: str) -> str:
    """The card: YAML for the Hub, a picture, how to load, what was measured, how to repeat it, under which licence."""
    folder, base = Path(args.output_dir), hub_name(args.pretrained_model_name_or_path)
    lines = metrics.read(folder / "metrics.jsonl")
    rows = []
    of_scorers = sorted({name for line in lines for name in line} - metrics.NAMES.keys())
    for name in (*metrics.NAMES, *of_scorers):
        values = [line[name] for line in lines if line.get(name) is not None]  # null: it was not finite
        if values and name != "step":
            rows.append(f"| `{name}` | {values[0]:.4g} | {values[-1]:.4g} | {metrics.meaning(name)} |")
    grids = sorted((folder / "samples").glob("step-*.png"))
    picture = f"\n![validation pictures, before and after](samples/{grids[-1].name})\n" if grids else ""
    curves = "\n![curves and samples from first to last](summary.png)\n" if (folder / "summary.png").exists() else ""
    example = LORA if kind.endswith("LoRA") else TRANSFORMER if kind == "Fine-tuned transformer" else WHOLE
    average = ", a moving average of the weights: those of the last step are in `raw/`" if args.use_ema else ""
    command = f" It was started with\n\n```bash\n{shlex.join(['python', *sys.argv])}\n```" if sys.argv[0].endswith(".py") else ""
    return f"""---
{front_matter(args, kind)}---
# {kind} of {base}

{trained_on}, seed {args.seed}{average}.
{picture}
```python
{example.format(base=base, where=where, prompt=prompt, drawn=as_evaluated(args))}
```

| metric | first | last | meaning |
|---|---|---|---|
{chr(10).join(rows)}
{curves}
{settings(args)}. All arguments are in `args.json`; `--config {folder}/args.json --output_dir outputs/again` after the
name of the program or of its wrapper repeats the run.{command}

## Licence

{licence(base)}
"""


def as_evaluated(args: argparse.Namespace) -> str:
    """Arguments that the example adds after training on a reward: size, steps and guidance of the evaluation, not the pipeline's own."""
    guidance, steps = getattr(args, "eval_guidance_scale", None), getattr(args, "eval_num_inference_steps", None)
    if guidance is None:
        return ""
    size, against = getattr(args, "resolution", None), getattr(args, "negative_prompt", "")  # ReFL has no negative prompt
    negative = f", negative_prompt={against!r}" if against and guidance > 1 else ""
    return f", height={size}, width={size}, num_inference_steps={steps}, guidance_scale={guidance}{negative}"


def settings(args: argparse.Namespace) -> str:
    """The arguments of SETTINGS that this run has, as flags in backticks."""
    given = {name: getattr(args, name, None) for name in SETTINGS}
    return ", ".join(f"`--{name}`" if value is True else f"`--{name} {shlex.quote(str(value))}`"
                     for name, value in given.items() if value is not None and value is not False)  # fmt: skip


def licence(base: str) -> str:
    """The licence of weights that were trained from this base model."""
    if base.startswith(SD35):
        return f"Stability AI Community License, that of the base model: https://huggingface.co/{base}/blob/main/LICENSE.md"
    if base in OPENRAIL.values():
        return f"CreativeML Open RAIL{'++' if 'xl' in base else ''}-M, that of the base model: https://huggingface.co/{base}"
    if Path(base).name.startswith("tiny-sd"):
        return "Apache-2.0, as the tiny base model, which is part of the project."
    return "That of the base model."


def hub_name(path: str) -> str:
    """The Hub id of a base model if the folder's name tells (scripts/download.sh keeps the repository's name), else `path`."""
    name = Path(path).name
    if name in OPENRAIL:
        return OPENRAIL[name]
    known = re.fullmatch(r"stable-diffusion-3\.5-(medium|large|large-turbo)", name)
    return SD35 + known[1] if known else path


def front_matter(args: argparse.Namespace, kind: str) -> str:
    """YAML lines for the Hub."""
    import yaml

    base, folder = hub_name(args.pretrained_model_name_or_path), Path(args.output_dir)
    fields: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():  # a folder on this machine means nothing on the Hub
        fields |= {"base_model": base, "base_model_relation": "adapter" if kind.endswith("LoRA") else "finetune"}
    if base.startswith(SD35):
        fields |= {"license": "other", "license_name": "stabilityai-ai-community",
                   "license_link": f"https://huggingface.co/{base}/blob/main/LICENSE.md"}  # fmt: skip
    data = getattr(args, "dataset_name", "")  # a run on a reward has none
    if base in OPENRAIL.values():
        fields["license"] = "openrail++" if "xl" in base else "creativeml-openrail-m"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not Path(data).exists():
        fields["datasets"] = [data]
    tags = [*kind.lower().split(), "template:sd-lora"] if kind.endswith("LoRA") else [kind.lower()]
    fields["tags"] = ["text-to-image", "diffusers", *tags]
    steps = sorted(path for path in (folder / "samples").glob("step-*") if path.is_dir())
    widget = []
    for number, prompt in enumerate(getattr(args, "validation_prompt", None) or []):  # they come first among the validation prompts
        pictures = sorted(steps[-1].glob(f"{number:02d}-*.png")) if steps else []
        widget += [{"text": prompt, "output": {"url": pictures[0].relative_to(folder).as_posix()}}] if pictures else []
    if widget:
        fields["widget"] = widget
    return yaml.safe_dump(fields, allow_unicode=True, sort_keys=False, width=1000)
