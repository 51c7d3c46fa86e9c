"""The inputs of DreamBooth, from its arguments: pictures of the subject with their masks, and pictures of its class for prior preservation.

Missing class pictures are rendered with the base model before training, by all processes, and kept.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from src import cli, inputs, lora, plan, runtime
from src.data import cache, captions, dreambooth, samples, sources
from src.data.prompts import read_file
from src.pipelines import sd3

CAPTION_COLUMN = "text"  # the default of --caption_column; any other was chosen by the user and must exist


def check(args: argparse.Namespace) -> None:
    """Refuse a model, pictures, masks or a class folder that cannot be trained with, reading small files only.

    Raises:
        ValueError: naming the flag and the cure.
    """
    if args.instance_data_dir and not args.instance_data_dir.is_dir():
        raise ValueError(f"--instance_data_dir {args.instance_data_dir}: no such folder; give one with the pictures of your subject")
    with sources.naming(_flag(args)):
        inputs.check(args, captioned=args.instance_prompt is None or args.caption_column != CAPTION_COLUMN)
        _check_captions(args)
    if args.with_prior_preservation:
        prompts = class_prompts(args)
        if args.class_data_dir:
            there = dreambooth.class_folder(args.class_data_dir, args.num_class_images, prompts)
            if there.missing():
                cli.check_writable(args.class_data_dir, "class_data_dir")


def _flag(args: argparse.Namespace) -> str:
    """The flag that names the pictures."""
    return "--instance_data_dir" if args.instance_data_dir else "--dataset_name"


def _check_captions(args: argparse.Namespace) -> None:
    """For folders alone, which are quick to read: each picture has a prompt and a mask, and some picture uses --instance_prompt."""
    if sources.locate(args.dataset_name, captioned=args.instance_prompt is None).kind not in ("metadata", "txt"):
        return
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    rows = sources.open_source(args.dataset_name, **columns, cache_dir=args.cache_dir, captioned=False).rows
    without = [row.name for row in rows if captions.caption_text(row.caption) is None and not row.unreadable]
    where = f"{_flag(args)} {args.dataset_name}"
    if without and not args.instance_prompt:
        raise ValueError(f"{where}: {len(without)} of {len(rows)} pictures have no caption, such as {without[0]}; give --instance_prompt")
    if not without and args.instance_prompt and not any(row.unreadable for row in rows):
        raise ValueError(f"--instance_prompt has no effect: every picture of {where} has a caption of its own; leave it out")
    if args.mask_data_dir:
        dreambooth.mask_files(args.mask_data_dir, [row.name for row in rows])


def class_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of --class_prompt and --class_prompts_file, in order, each once.

    Raises:
        ValueError: the file holds none, or cannot be read.
    """
    found = list(args.class_prompt or [])
    if args.class_prompts_file:
        found += [prompt.text for prompt in read_file(args.class_prompts_file, "--class_prompts_file")]
    return list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))


def open_images(args: argparse.Namespace) -> tuple[captions.CaptionedImages, captions.CaptionedImages | None]:
    """The subject's pictures, each --repeats times, and those held out for the validation loss (None if there are none).

    Raises:
        ValueError: the pictures cannot be read, or none is left to train on.
    """
    with sources.naming(_flag(args)):
        train, held_out = inputs.open_images(args, default_prompt=args.instance_prompt)
    return train.subset(list(range(len(train))) * args.repeats), held_out


# --------------------------------------------------------------------------- everything that is needed


def prepare(run: runtime.Run, args: argparse.Namespace) -> tuple[inputs.Inputs, inputs.Inputs | None]:
    """Open the pictures, render missing class pictures, lay out the steps, fill the caches.

    Returns:
        The subject's inputs, and with --with_prior_preservation those of its class: as many per step, with random numbers of their own.

    Raises:
        SystemExit: where `open_images` and `src.data.dreambooth` raise ValueError.
    """
    train, held_out = run.require(lambda: open_images(args))  # one download, one scan, and one result for all processes
    there = run.require(lambda: _class_folder(args)) if args.with_prior_preservation else None
    prompts = [record.prompt for part in (train, held_out) if part for record in part.records]
    text = inputs.encode_texts(run, args, [*prompts, *(run.from_main(lambda: _known_prompts(there)) if there else [])])

    if there:
        _render_class(run, args, there, text)
        pictures = run.require(lambda: dreambooth.open_class(there, cache_dir=args.cache_dir, strict=args.strict_data))
    inputs.list_skipped(run, train, *([pictures] if there else []))
    model = _load(run, args, inputs.resident(args, text))

    def assemble(*parts: captions.CaptionedImages, name: str, **options: Any) -> inputs.Inputs:
        return inputs.assemble(run, args, sd3, samples.Samples, parts, parts, name, model=model, text=text, **options)

    def masks(pictures: captions.CaptionedImages, sizes: list[tuple[int, int]]) -> list[Tensor]:
        with runtime.refusals():
            return dreambooth.masks(pictures, sizes, folder=args.mask_data_dir, factor=sd3.VAE_SCALE)

    masked = args.mask_from_alpha or args.mask_data_dir
    data = assemble(train, held_out or train.subset([]), name="pictures", masks=masks if masked else None)
    if there is None:
        return data, None
    return data, assemble(pictures, pictures.subset([]), name="class pictures", first_position=data.order.global_batch)


def planned(args: argparse.Namespace, *, adapt_text: Callable[[nn.Module], None]) -> plan.Subject:
    """What --dry_run needs to know besides the transformer.

    Args:
        adapt_text: applied to CLIP-L and CLIP-G on the meta device with --train_text_encoder.
    """
    with runtime.refusals():
        images, held_out = open_images(args)
    adapters, path = 0, args.pretrained_model_name_or_path
    for name in lora.TEXT_PARTS if args.train_text_encoder else ():
        encoder = sd3.text_encoder_from_config(path, name, args.revision)
        adapt_text(encoder)
        adapters += sum(parameter.numel() for parameter in lora.parameters(encoder))
    if not args.with_prior_preservation:
        return plan.Subject(images, held_out, adapters)
    there = _class_folder(args)
    return plan.Subject(images, held_out, adapters, there.count, len(there.missing()), there.folder, tuple(_known_prompts(there)))


def _load(run: runtime.Run, args: argparse.Namespace, parts: tuple[str, ...]) -> sd3.SD3:
    path, options = args.pretrained_model_name_or_path, dict(revision=args.revision, variant=args.variant)
    return sd3.load(path, **options, dtype=run.weight_dtype, device=run.device, parts=parts)


# --------------------------------------------------------------------------- class pictures


def _class_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that a rendered class picture depends on besides its number."""
    return {
        "base model": inputs.fingerprint(args, "transformer", "vae", "scheduler", *inputs.TEXT_FOLDERS), "variant": args.variant,
        "class prompt": class_prompts(args), "resolution": args.resolution, "number of denoising steps": args.class_inference_steps,
        "guidance scale": args.class_guidance_scale, "T5 length": args.max_sequence_length,
        "precision": str(runtime.WEIGHT_DTYPES[args.mixed_precision]),
    }  # fmt: skip


def _class_folder(args: argparse.Namespace) -> dreambooth.ClassFolder:
    """--class_data_dir, or a folder in the cache, named by a hash of the rendering settings.

    Raises:
        ValueError: naming --class_data_dir, if it cannot be used, or holds pictures that were rendered with other settings.
    """
    settings = _class_settings(args)
    folder = args.class_data_dir or args.cache_dir / f"class-{cache.fingerprint(**settings)}"
    there = dreambooth.class_folder(folder, args.num_class_images, class_prompts(args))
    dreambooth.check_settings(there, settings)
    return there


def _known_prompts(there: dreambooth.ClassFolder) -> list[str]:
    """Prompts of class pictures, including those not rendered yet."""
    if not there.own:
        return list(there.prompts)
    rows = sources.open_source(str(there.folder), image_column="image", caption_column="text", cache_dir=there.folder, captioned=False).rows
    return [*there.prompts, *filter(None, (captions.caption_text(row.caption) for row in rows if row.name in there.own))]


def _render_class(run: runtime.Run, args: argparse.Namespace, there: dreambooth.ClassFolder, text: cache.TensorCache | None) -> None:
    """Render this process's share of the missing class pictures with the base model; it is loaded only if any are missing."""
    missing = there.missing()
    run.barrier()  # every process has looked before one of them writes
    if missing:
        run.print(f"{len(missing)} of {there.count} class pictures are missing: rendering them into {there.folder}")
        render = _renderer(run, args, text)
        share = dict(batch_size=args.sample_batch_size, rank=run.rank, world=run.world, progress=run.is_main)
        dreambooth.render_missing(there, render, settings=_class_settings(args), **share)
        del render
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    run.barrier()


def _renderer(run: runtime.Run, args: argparse.Namespace, text: cache.TensorCache | None) -> Callable[[list[str], list[int]], Tensor]:
    """`render(prompts, seeds) -> (b, 3, H, W)` with the base model, its text from the cache if there is one."""
    model = _load(run, args, ("transformer", "vae") if text else ("transformer", "vae", "text"))

    @torch.no_grad()
    def condition(prompts: list[str]) -> sd3.Conditioning:
        if text:
            return inputs.Texts(text, run.device, sd3).condition(prompts)
        return sd3.encode_prompts(model, prompts, inputs.sequence_length(args))

    def render(prompts: list[str], seeds: list[int]) -> Tensor:
        negative = condition([""]) if args.class_guidance_scale > 1 else None
        with run.accelerator.autocast():
            pictures = sd3.render(
                model, model.transformer, condition(prompts), negative=negative, seeds=seeds, height=args.resolution,
                width=args.resolution, num_inference_steps=args.class_inference_steps, guidance_scale=args.class_guidance_scale,
                batch_size=len(prompts), decode_batch_size=1,  # one of 1024 px takes 1.5 GB
            )  # fmt: skip
        if not pictures.isfinite().all():  # as bytes they would be plain black
            raise ValueError("class pictures hold NaN or infinity; try --mixed_precision bf16 or no")
        return pictures

    return render
