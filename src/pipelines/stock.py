"""diffusers' own pipelines of SD3.x, SD1.x, SD2.x and SDXL, for drawing: tell the family of a model or a LoRA file, and load both together.

Combinations that cannot work are refused from configurations and file headers, before any weights are read.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src import hub, lora
from src.errors import first_line, last_line
from src.pipelines import common, sd3, sd15

NAMES = {"sd3": "Stable Diffusion 3.x", "sd15": "Stable Diffusion 1.x, 2.x or XL", None: "another kind of model, or no LoRA at all"}


def settings(path: str) -> dict[str, float]:
    """Steps and guidance, by the demo's flags: those that the trainers validate with; shipped models, known by their folders, need less.

    Raises:
        ValueError: as `model_family`.
    """
    steps, guidance = (20, 2.0) if is_shipped(path) else {"sd3": (28, 4.5), "sd15": (25, 7.5)}[model_family(path)]
    return {"num_inference_steps": steps, "guidance_scale": guidance}


def is_shipped(path: str) -> bool:
    """Whether it is a model of the tiny world."""
    return Path(path).name in ("tiny-sd3", "tiny-sd15")


def model_family(path: str) -> str:
    """`sd3`, or `sd15` for the models that predict noise, by the model_index.json of the folder or Hub id.

    Raises:
        ValueError: no such model, not a pipeline, damaged, or another family.
    """
    wrong = None
    try:
        sd3.check_folder(path)  # everything that can be wrong with a folder; a Hub id passes
    except ValueError as error:
        wrong = error
    try:
        name = sd3.read_config(path, "model_index.json").get("_class_name")
    except (OSError, ValueError, AttributeError) as error:  # for a Hub id this error names the flag, for a folder `wrong` does
        raise wrong or error from None
    if name in sd15.PIPELINES:
        return "sd15"
    if wrong and not str(name).startswith("StableDiffusion3"):
        raise ValueError(f"--pretrained_model_name_or_path {path}: holds a {name}; only {NAMES['sd3']}, {NAMES['sd15']} can be drawn with")
    if wrong:
        raise wrong
    return "sd3"


# --------------------------------------------------------------------------- LoRA files


def lora_file(path: Path) -> Path:
    """The file that --lora_weights_path means: itself, or pytorch_lora_weights.safetensors in that folder.

    Raises:
        ValueError: there is none.
    """
    file = path.expanduser() / lora.WEIGHTS_NAME if path.expanduser().is_dir() else path.expanduser()
    if not file.is_file():
        raise ValueError(f"--lora_weights_path {path}: there is no {file}; give a run's output folder, a checkpoint or a .safetensors file")
    return file


def lora_keys(path: Path) -> list[str]:
    """Names of the tensors in a LoRA file; only its header is read, and checked against the file's length.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora_file(path), framework="numpy") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"--lora_weights_path {path}: cannot be read as safetensors ({first_line(error)}); is the file complete?"
        ) from None


def lora_family(keys: list[str]) -> str | None:
    """`sd3`, `sd15`, `kohya` (SD3 in a layout that diffusers does not read) or None, by the names in a LoRA file."""
    if any("joint_blocks_" in key for key in keys):
        return "kohya"
    if any("single_transformer_blocks" in key for key in keys):  # Flux
        return None
    if any(key.startswith("transformer.transformer_blocks.") and ".lora_" in key for key in keys):
        return "sd3"
    return "sd15" if any(key.startswith(("unet.", "lora_unet_", "lora_te_")) and "lora" in key for key in keys) else None


def check_lora(path: Path, model: str) -> None:
    """Refuse a LoRA file that is broken, or made for another family than `model` (a folder or Hub id).

    Raises:
        ValueError: naming the flag and the cure.
    """
    made_for, family = lora_family(lora_keys(path)), model_family(model)
    if made_for == "kohya":
        raise ValueError(f"--lora_weights_path {path}: has kohya's names, for ComfyUI and Forge; give the {lora.WEIGHTS_NAME} beside it")
    if made_for != family:
        raise ValueError(f"--lora_weights_path {path}: is for {NAMES[made_for]}, but {model} is {NAMES[family]}")


# --------------------------------------------------------------------------- loading


def quiet() -> None:
    """No pages of notes on prompts, LoRA layers and kernels nobody asked for, and no progress bars of files: what matters is said here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def load(
    path: str, *, dtype: torch.dtype, device: str, lora_path: Path | None = None, lora_scale: float = 1.0, cpu_offload: bool = False,
    scheduler: str | None = None,
) -> Any:  # fmt: skip
    """The stock pipeline of the model's family on `device`, with the LoRA at its strength.

    Args:
        cpu_offload: keep only the part in use on the GPU.
        scheduler: diffusers class to use instead of the model's own, with the same configuration.

    Raises:
        ValueError: the model is incomplete, or the LoRA does not fit it.
    """
    import diffusers

    name = sd3.read_config(path, "model_index.json")["_class_name"]
    kind = diffusers.StableDiffusion3Pipeline if model_family(path) == "sd3" else getattr(diffusers, name)
    try:
        pipeline = kind.from_pretrained(path, dtype=dtype)
    except hub.errors() as error:
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: cannot be loaded ({hub.reason(error)}); download the model again"
        ) from error
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    if lora_path:
        _add_lora(pipeline, lora_path, lora_scale)
    if device != "cpu":
        pipeline.vae.enable_slicing()  # one picture of 1024 px takes 1.5 GB to decode
    if cpu_offload:
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.to(device)
    return pipeline


def _add_lora(pipeline: Any, path: Path, scale: float) -> None:
    """Load the LoRA, all of it or not at all, and set its strength."""
    from peft.tuners.lora import LoraLayer

    file, flag = lora_file(path), f"--lora_weights_path {path}"
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="tuned")
        pipeline.set_adapters("tuned", scale)
    except (RuntimeError, ValueError, KeyError) as error:  # peft: the sizes differ; diffusers: the model has none of its layers
        raise ValueError(f"{flag}: does not fit the model: {last_line(error)}") from error
    wanted = sum(key.endswith("lora_A.weight") for key in lora_keys(path))
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    layers = sum(isinstance(module, LoraLayer) for part in parts for module in part.modules())
    if layers < wanted:  # diffusers drops the others, with a warning at most
        raise ValueError(f"{flag}: adapts {wanted} layers, the model has only {layers} of them; was it made for a larger one?")


def long_prompts(pipeline: Any, prompts: list[str]) -> str | None:
    """`common.long_prompts` for this pipeline, which itself would print long warnings at every batch."""
    return common.long_prompts(pipeline.tokenizer, prompts, t5=getattr(pipeline, "text_encoder_3", None) is not None)
