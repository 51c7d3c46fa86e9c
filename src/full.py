"""Full fine-tuning: which weights are trained, and the pipeline folder that comes out.

diffusers, transformers and safetensors are imported inside the functions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src import hub, lora, sharding

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # what diffusers looks for in a transformer's folder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by --weights_dtype
_SMALL = ("*.json", "*.txt", "*.model")  # configurations and vocabularies of a part
_VARIANTS = ("fp16", "bf16")  # in which models are published besides their plain files


# --------------------------------------------------------------------------- which weights


def check_blocks(count: int | None, blocks: str | None, freeze_last: int) -> None:
    """Refuse blocks that a transformer of `count` blocks (None: not known yet) does not have.

    Raises:
        ValueError: naming --train_blocks or --freeze_last_blocks.
    """
    if count is None:
        return
    if blocks is not None:
        lora.block_numbers(blocks, count, "--train_blocks")
    if freeze_last > count:
        raise ValueError(f"--freeze_last_blocks {freeze_last}: this model has {count} blocks; give at most that many")


def check_output(output_dir: Path, source: str) -> None:
    """Refuse to write the result over the base model; `runtime.check` refuses to write over any other model that is not ours.

    Raises:
        ValueError: naming --output_dir.
    """
    if output_dir.expanduser().resolve() == Path(source).expanduser().resolve():
        raise ValueError(f"--output_dir {output_dir} is the base model, which the result would replace; choose another folder")


def select(transformer: nn.Module, *, blocks: str | None = None, freeze_last: int = 0) -> None:
    """Make the chosen weights trainable, and freeze the rest.

    Layers that never get a gradient stay frozen: the last block drops its text tokens, so it does not use their queries.

    Args:
        blocks: numbers and ranges of transformer blocks ("0-11,23"): only these are trained. None: all layers, also outside the blocks.
        freeze_last: number of blocks at the end that stay frozen.

    Raises:
        ValueError: as `check_blocks`.
    """
    count = len(transformer.transformer_blocks)
    check_blocks(count, blocks, freeze_last)
    transformer.requires_grad_(blocks is None)
    if blocks is not None:
        for number in lora.block_numbers(blocks, count, "--train_blocks"):
            transformer.transformer_blocks[number].requires_grad_(True)
    for block in transformer.transformer_blocks[count - freeze_last :]:
        block.requires_grad_(False)
    for block in transformer.transformer_blocks:
        if block.context_pre_only:
            block.attn.add_q_proj.requires_grad_(False)
            if block.attn.norm_added_q is not None:
                block.attn.norm_added_q.requires_grad_(False)


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a module, in its order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# --------------------------------------------------------------------------- weights in files


class State:
    """All weights of modules as a part of a checkpoint, in diffusers' files (`transformer/`, ...) instead of `state.pt`.

    Args:
        modules: by the name of their folder in a pipeline, without any wrapper.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": tensor for name, module in self.modules.items() for key, tensor in module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        here = self.state_dict()
        with torch.no_grad():
            for key, tensor in state.items():
                here[key].copy_(sharding.placed(tensor, here[key]))

    def write_files(self, folder: Path, state: dict[str, Tensor]) -> None:
        """One folder per module, from a `state_dict()` with gathered tensors."""
        for name, module in self.modules.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            _write(module, folder / name, own)

    def read_files(self, folder: Path) -> dict[str, Tensor]:
        """The state that `write_files` wrote, with the keys of `state_dict()`.

        Raises:
            ValueError: the folder of a module is missing.
        """
        return {f"{name}/{key}": value for name, module in self.modules.items() for key, value in _read(module, folder / name).items()}


def _write(module: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    """A module as diffusers or transformers saves it; an earlier folder is replaced, never written into: its files may be hard links."""
    from safetensors.torch import save_file

    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if hasattr(module, "save_config"):  # diffusers
        module.save_config(temporary)
        save_file({key: value.contiguous() for key, value in state.items()}, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
    else:
        module.save_pretrained(temporary, state_dict=state)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _read(module: nn.Module, folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not folder.is_dir():
        raise ValueError(f"{folder.parent} holds no {folder.name}/; it was written by another program, or with other flags")
    if hasattr(module, "save_config"):
        return load_file(folder / WEIGHTS_NAME)
    return type(module).from_pretrained(folder, dtype=module.dtype).state_dict()  # in its files the tensors have other names


def save(modules: dict[str, nn.Module], folder: Path, *, write: bool = True) -> None:
    """Write modules into `folder`/NAME, in their dtype; if they are sharded, every process calls it, one of them with `write`."""
    part = State(modules)
    state = sharding.gathered(part.state_dict(), keep=write)
    if write:
        part.write_files(folder, state)


# --------------------------------------------------------------------------- the rest of the pipeline


def complete_pipeline(
    source: str, folder: Path, *, trained: Collection[str], revision: str | None = None, variant: str | None = None
) -> None:
    """Add to `folder` all parts of the pipeline `source` but the `trained` ones: unchanged files, in their original precision.

    Files are hard links where the file system allows them (no second copy of a 9.5 GB encoder), else copies. A variant's name is removed
    from file names, so that the result loads without --variant. For a Hub id, `fetch` has downloaded the files before training.

    Args:
        source: local folder or Hub id of the base model.

    Raises:
        SystemExit: `fetch` fails; the message says that the weights are saved, and how to go on.
    """
    base = _fetched(source, folder, trained=trained, revision=revision, variant=variant)
    for name in (part for part in _parts(base) if part not in trained):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        for file in _files(base / name, variant):
            _link(file, folder / name / _without_variant(file.name, variant))
    shutil.copyfile(base / "model_index.json", folder / "model_index.json")


def _fetched(source: str, folder: Path, **options: Any) -> Path:
    for cached in (True, False):  # False: another program has begun to download a newer version since
        try:
            return fetch(source, **options, cached=cached)
        except ValueError as error:
            trouble = error
    raise SystemExit(
        f"error: weights are saved in {folder}; {trouble}. The rest is to be put beside them: the other parts and model_index.json, which "
        f"hf download {source} fetches"
    ) from trouble


def fetch(source: str, *, trained: Collection[str], revision: str | None = None, variant: str | None = None, cached: bool = False) -> Path:
    """The base model's folder with all files that `complete_pipeline` will add; if `source` is a Hub id, they are downloaded.

    Call it before training: afterwards a lost connection would cost the result. Training itself does not load all of these files: never
    a safety checker, and no text encoder if the text cache is full.

    Args:
        cached: use only this machine's cache.

    Raises:
        ValueError: naming --pretrained_model_name_or_path, if a part is not available.
    """
    base, flag = Path(source).expanduser(), f"--pretrained_model_name_or_path {source}"
    if base.is_dir():
        return base
    from huggingface_hub import snapshot_download

    def download(allowed: list[str], ignored: tuple[str, ...] = ()) -> Path:
        options = dict(allow_patterns=allowed, ignore_patterns=list(ignored), local_files_only=cached)
        return Path(snapshot_download(source, revision=revision, **options))

    try:
        base = download(["model_index.json"])
        parts = [part for part in _parts(base) if part not in trained]  # and no other folder, whatever else lies in the repository
        lacking, small = parts, ["model_index.json", *(f"{part}/{name}" for part in parts for name in _SMALL)]
        for names, ignored in _weights_on_the_hub(variant):
            if lacking:
                base = download([*small, *(f"{part}/{name}" for part in lacking for name in names)], ignored)
            lacking = [part for part in parts if (base / part / "config.json").is_file() and not _weights(base / part, variant)]
    except hub.errors() as error:
        raise ValueError(
            f"{flag}: its parts besides {', '.join(trained)} go into the result and cannot be downloaded: {hub.reason(error)}"
        ) from error
    if incomplete := [part for part in parts if not _is_whole(base / part, variant)]:
        if not cached and (published := _as_variants(source, incomplete, revision=revision, variant=variant)):
            name = published[0][1]
            names = ", ".join(part for part, other in published if other == name)
            raise ValueError(f"{flag}: {names} would be missing in the result: they are published as {name} alone; add --variant {name}")
        raise ValueError(
            f"{flag}: {', '.join(incomplete)} would be missing in the result, as the copy in this machine's cache is incomplete; "
            f"download it with hf download {source}"
        )
    return base


def _parts(base: Path) -> list[str]:
    """The parts that model_index.json names, except those that it sets to null."""
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    return [name for name, kind in index.items() if isinstance(kind, list) and kind[1] is not None]


def _as_variants(source: str, parts: Collection[str], *, revision: str | None, variant: str | None) -> list[tuple[str, str]]:
    """(part, variant) of each part whose weights the Hub has only as another variant; empty if the Hub cannot be reached."""
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(source, revision=revision)
    except hub.errors():  # the caller then only reports what is missing here
        return []
    found = []
    for part in parts:
        names = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        kinds = {_variant_of(name, variant) for name in names if name.endswith(".safetensors") or re.search(r"pytorch_model.*\.bin$", name)}
        if kinds and not kinds & {variant, None}:
            found.append((part, next(name for name in _VARIANTS if name in kinds)))
    return found


def _weights_on_the_hub(variant: str | None) -> list[tuple[list[str], tuple[str, ...]]]:
    """Patterns of weight files to download and to ignore, best first, in the order of `_files`; each is for parts that lack those before.

    Files of torch's own format are matched by pytorch_model in their names: OpenVINO's end in .bin, too.
    """
    others = tuple(f"*.{name}{end}" for name in _VARIANTS for end in (".*", "-*"))
    kinds = []
    for stem, end in (("*", "safetensors"), ("*pytorch_model*", "bin")):
        if variant is not None:
            kinds.append(([f"{stem}.{variant}.{end}", f"{stem}.{variant}-*.{end}"], ()))
        kinds.append(([f"{stem}.{end}"], others))
    return kinds


def _variant_of(name: str, variant: str | None) -> str | None:
    """The variant in a file's name: `variant`, another known one, or None."""
    return next((one for one in (variant, *_VARIANTS) if one and f".{one}" in name), None)


def _files(folder: Path, variant: str | None) -> list[Path]:
    """The files of one part: safetensors if there are any, else .bin; of either those of this variant if there are any, else plain ones.

    A local folder may have only another variant; its files are then used, or the part would be missing in the result.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if ".safetensors" in path.name or ".bin" in path.name]  # and the lists of their shards
    small = [path for path in files if path.suffix in (".json", ".txt", ".model") and path not in weights]
    ends = (".safetensors", ".bin")
    for end, name in [(end, name) for names in ((variant, None), _VARIANTS) for end in ends for name in names]:
        kind = [path for path in weights if end in path.name and _variant_of(path.name, variant) == name]
        if any(path.suffix == end for path in kind):
            return small + kind
    return small


def _weights(folder: Path, variant: str | None) -> list[str]:
    """Names of the weight files among `_files`, except those of another variant."""
    names = [path.name for path in _files(folder, variant) if path.suffix in (".safetensors", ".bin")]
    return [name for name in names if _variant_of(name, variant) in (variant, None)]


def _is_whole(folder: Path, variant: str | None) -> bool:
    """Whether a part in the Hub's cache is complete, with every shard of its weights: --dry_run downloads only some small files."""
    if not folder.is_dir():
        return False
    if not (folder / "config.json").is_file():  # a scheduler or preprocessor has one file, a tokenizer also a vocabulary
        return len(_files(folder, variant)) > (folder / "tokenizer_config.json").is_file()
    names = _weights(folder, variant)
    shards = [shard for name in names if (shard := re.search(r"-\d{5}-of-(\d{5})", name))]
    return bool(names) and all(len(shards) == int(shard[1]) for shard in shards)


def _without_variant(name: str, variant: str | None) -> str:
    """model.fp16.safetensors -> model.safetensors; shards keep their names, which the index lists."""
    return name.replace(f".{_variant_of(name, variant)}.", ".", 1)


def _link(source: Path, target: Path) -> None:
    """Weights become hard links. Small files become copies, so that editing them does not change the base model."""
    real = source.resolve()  # the Hub's cache holds symbolic links
    if source.suffix not in (".safetensors", ".bin"):
        shutil.copyfile(real, target)
        return
    try:
        os.link(real, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(real, target)
