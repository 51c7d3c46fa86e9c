"""LoRA and DoRA on an SD3 transformer or a UNet (SD1.x, 2.x, XL), LoRA on SD3's CLIP text encoders: choose layers, add, switch off
(= the reference), save, load, export.

LoRA adds scale * B A to a frozen weight W (out, in), with A (rank, in), B (out, rank), scale = alpha / rank; B starts at zero, so training
starts at the base model. DoRA also learns the length of each row: m * (W + scale * B A) / |W + scale * B A|.

Every function takes the transformer (or UNet) bare or wrapped (DDP, torch.compile); those that say `module` take a text encoder as well.
diffusers and peft are imported inside the functions.
Source: Hu et al., arXiv 2106.09685; Liu et al., arXiv 2402.09353.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"  # peft's name of the one adapter that we train
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for in a folder
KOHYA_NAME = "pytorch_lora_weights_kohya.safetensors"
METADATA_NAME = "lora_adapter_metadata"  # key under which diffusers keeps rank and alpha in the file's header

_JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_DUAL = ("to_q", "to_k", "to_v", "to_out.0")
# Every attention projection. diffusers' scripts take only those of `attn`, 191 of SD3.5-medium's 243, and never train the dual attention.
DEFAULT_LAYERS = tuple(f"attn.{name}" for name in _JOINT) + tuple(f"attn2.{name}" for name in _DUAL)
UNET_LAYERS = tuple(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in _DUAL)  # self- and cross-attention
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of every attention of a CLIP text encoder, as in diffusers' scripts
TEXT_PARTS = ("text_encoder", "text_encoder_2")  # CLIP-L and CLIP-G by their names in a pipeline and in a LoRA file


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside any DistributedDataParallel (`.module`) and torch.compile (`._orig_mod`) wrappers."""
    while True:
        inner = module._modules.get("module", module._modules.get("_orig_mod"))
        if inner is None:
            return module
        module = inner


def part_of(module: nn.Module) -> str:
    """`transformer` (SD3) or `unet`: the module's name in a pipeline, and before every name in a LoRA file."""
    return "transformer" if hasattr(unwrap(module), "transformer_blocks") else "unet"


# --------------------------------------------------------------------------- which layers


def _dead(transformer: nn.Module) -> set[str]:
    """Layers whose gradient is always zero: the last block drops its text tokens, so it does not use their queries."""
    blocks = transformer.transformer_blocks if part_of(transformer) == "transformer" else ()
    return {f"transformer_blocks.{i}.attn.add_q_proj" for i, block in enumerate(blocks) if block.context_pre_only}


def block_numbers(blocks: str, count: int, flag: str = "--lora_blocks") -> set[int]:
    """ "0-2,5" -> {0, 1, 2, 5}.

    Raises:
        ValueError: naming the flag, if `blocks` does not list blocks of a model that has `count`.
    """
    numbers: set[int] = set()
    for part in blocks.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < count:
            raise ValueError(f"{flag}: {part.strip()!r} is no block or range of blocks of this model; all of them are 0-{count - 1}")
        numbers |= set(range(first, last + 1))
    return numbers


_CONTAINERS = r"\.(transformer_blocks|resnets|attentions|downsamplers|upsamplers)"  # a layer's short name follows one of these


def targets(transformer: nn.Module, layers: str | None = None, blocks: str | None = None) -> list[str]:
    """Full names of the layers that get a LoRA, in the model's order, without those that never get a gradient.

    Args:
        layers: comma-separated ends of module names ("attn.to_q,ff.net.2"), of linear layers, in a UNet also of convolutions
            ("conv1,conv2"); None: every attention projection, `attn2` included.
        blocks: comma-separated numbers and ranges of SD3's transformer blocks ("0-11,23"); None: all, and layers outside the blocks too.

    Raises:
        ValueError: naming --lora_layers or --lora_blocks and what exists, if a name or number matches nothing.
    """
    transformer = unwrap(transformer)
    kinds = nn.Linear if part_of(transformer) == "transformer" else (nn.Linear, nn.Conv2d)
    linears = [name for name, module in transformer.named_modules() if isinstance(module, kinds)]
    alive = [name for name in linears if name not in _dead(transformer)]
    if blocks is not None:
        prefixes = tuple(f"transformer_blocks.{i}." for i in block_numbers(blocks, len(transformer.transformer_blocks)))
        alive = [name for name in alive if name.startswith(prefixes)]
    default = DEFAULT_LAYERS if part_of(transformer) == "transformer" else UNET_LAYERS
    wanted = default if layers is None else [name.strip() for name in layers.split(",")]
    matches = {end: [name for name in alive if name == end or name.endswith(f".{end}")] for end in wanted}
    unmatched = [end for end, names in matches.items() if not names] if layers is not None else []
    if unmatched:
        ends = sorted({re.sub(rf"^.*{_CONTAINERS}\.\d+\.", "", f".{name}").removeprefix(".") for name in alive})
        where = "" if blocks is None else f" with --lora_blocks {blocks}"
        raise ValueError(f"--lora_layers: no trainable layer{where} ends in {', '.join(unmatched)}; there are {', '.join(ends)}")
    chosen = {name for names in matches.values() for name in names}
    return [name for name in alive if name in chosen]


# --------------------------------------------------------------------------- adding and switching


def add(
    transformer: nn.Module, *, rank: int, alpha: float | None = None, dropout: float = 0.0, use_dora: bool = False,
    layers: str | None = None, blocks: str | None = None,
) -> None:  # fmt: skip
    """Freeze the transformer and add trainable adapters, in fp32 whatever its dtype; alpha None means alpha = rank (scale 1).

    A is drawn from torch's global generator, N(0, 1/rank^2) as peft's "gaussian"; B is zero.

    Raises:
        ValueError: as `targets` and `check_layers`.
    """
    transformer = unwrap(transformer)
    names = targets(transformer, layers, blocks)
    check_layers(use_dora, names, transformer)
    _attach(transformer, names, rank=rank, alpha=alpha, dropout=dropout, use_dora=use_dora)


def add_text(encoder: nn.Module, *, rank: int, alpha: float | None = None) -> None:
    """The same for a CLIP text encoder, every attention projection; without dropout, so that a prompt has one embedding."""
    names = [name for name, _ in encoder.named_modules() if name.split(".")[-1] in TEXT_LAYERS]
    _attach(encoder, names, rank=rank, alpha=alpha)


def _attach(module: nn.Module, names: list[str], *, rank: int, alpha: float | None, dropout: float = 0.0, use_dora: bool = False) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    module.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, lora_dropout=dropout, use_dora=use_dora, init_lora_weights="gaussian",
        target_modules=names,
    )  # fmt: skip
    inject_adapter_in_model(config, module, ADAPTER)  # not add_adapter: some releases require a peft that is not out yet
    for _, layer in _layers(module):
        if not use_dora and not dropout:  # DoRA takes the precision of its norms from the input; dropout scales in fp32
            layer._cast_input_dtype = _unless_autocast
            if isinstance(layer.base_layer, nn.Linear):  # a class: with a function per layer torch.compile would compile every block anew
                layer.__class__ = _in_place(type(layer))
        for parameter in _tensors(layer).values():
            parameter.data = parameter.data.float()  # peft casts them to the base's dtype, where small updates vanish
        if use_dora:  # m in full precision too, or the start would not be the base model
            layer.lora_magnitude_vector[ADAPTER].weight.data = layer.base_layer.weight.data.float().norm(dim=1)


def _unless_autocast(x: Any, dtype: torch.dtype) -> Any:
    """Replaces peft's cast of a layer's input to fp32, which autocast would undo at once: two passes over memory in each layer."""
    return x if x is None or under_autocast(x) else x.to(dtype)


class PlainLora:
    """Marks a layer of a LoRA without dropout on a linear layer."""


@functools.cache
def _in_place(kind: type) -> type:
    """A subclass of a peft linear layer that adds scale * B A x in place to W x.

    peft's own forward pass takes three passes through memory: scale, add, and a copy of inputs that attention hands over as slices, since
    torch computes the product of a slice and a frozen weight as a batched one.
    """

    class InPlace(kind, PlainLora):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if torch.compiler.is_compiling() or self.merged or not under_autocast(x):
                return super().forward(x, *args, **kwargs)  # the compiler fuses
            flat = x.reshape(-1, x.shape[-1])
            result = self.base_layer(flat)
            if not self.disable_adapters:
                up = self.lora_B[ADAPTER].weight.to(result.dtype)  # (out, rank); autocast does not cast for addmm_
                result = result.addmm_(self.lora_A[ADAPTER](flat), up.t(), alpha=self.scaling[ADAPTER])
            return result.view(*x.shape[:-1], -1)

    return InPlace


def matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank) of an adapted layer; of a convolution with its kernel's two dimensions besides."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def under_autocast(x: Tensor) -> bool:
    """Whether autocast applies to operations on x here."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    """(full name, peft layer) of every adapted layer, in the model's order."""
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in unwrap(module).named_modules() if isinstance(layer, LoraLayer)]


def _tensors(layer: Any) -> dict[str, nn.Parameter]:
    """The adapter's own parameters of one peft layer, by their names in a saved file."""
    tensors = dict(zip(("lora_A.weight", "lora_B.weight"), matrices(layer), strict=True))
    if ADAPTER in layer.lora_magnitude_vector:
        tensors["lora_magnitude_vector"] = layer.lora_magnitude_vector[ADAPTER].weight
    return tensors


def _named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter parameter by its key in a saved file, such as transformer_blocks.0.attn.to_q.lora_A.weight."""
    return {f"{name}.{key}": tensor for name, layer in _layers(module) for key, tensor in _tensors(layer).items()}


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """What to train: every adapter parameter, in the model's order."""
    return list(_named(module).values())


def adapted(module: nn.Module) -> list[str]:
    """Full names of the layers that have an adapter, in the model's order."""
    return [name for name, _ in _layers(module)]


@contextmanager
def disabled(transformer: nn.Module) -> Iterator[None]:
    """Inside, the transformer is the base model (the reference model of RL); afterwards, also if nested or after an error, as before.

    With B = 0 the two are equal to the bit. A model without adapters is equal, too, except under autocast: an adapted layer rounds less
    often. peft's own `enable_adapters` would also turn requires_grad off and on, which an autograd graph may still need.
    """
    layers = [layer for _, layer in _layers(transformer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


# --------------------------------------------------------------------------- saving and loading


def state(module: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, detached and not copied, with the names of a saved file (without the part's prefix, as "transformer.")."""
    return {key: parameter.detach() for key, parameter in _named(module).items()}


def load_state(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors from `state` into the same adapters.

    Raises:
        ValueError: if the names or shapes differ, as with another --rank, --lora_layers or --use_dora.
    """
    own = _named(module)
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += sorted(key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape)
    if wrong:
        raise ValueError(
            f"the saved LoRA does not fit this one in {len(wrong)} tensors, such as {wrong[0]}; "
            "--rank, --lora_layers, --lora_blocks and --use_dora must be those it was saved with"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


class State:
    """The adapters as a part of a checkpoint."""

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        return state(self.module)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        load_state(self.module, tensors)


def _metadata(module: nn.Module) -> dict[str, Any]:
    """Settings that a reader of the file needs. Few keys on purpose: an older peft refuses those it does not know."""
    config = unwrap(module).peft_config[ADAPTER]
    return {
        "r": config.r, "lora_alpha": config.lora_alpha, "use_dora": config.use_dora,
        "target_modules": adapted(module),
    }  # fmt: skip


def check_layers(use_dora: bool, names: list[str], module: nn.Module) -> None:
    """Refuse DoRA on convolutions: it scales the rows of a matrix.

    Raises:
        ValueError: naming --use_dora.
    """
    convolutions = [name for name in names if isinstance(unwrap(module).get_submodule(name), nn.Conv2d)]
    if use_dora and convolutions:
        raise ValueError(f"--use_dora works on linear layers, and {convolutions[0]} is a convolution; leave one of both out")


def check_export(export_format: str, use_dora: bool) -> None:
    """Refuse, before training, a format that the adapter cannot be written in.

    Raises:
        ValueError: naming --export_format.
    """
    if export_format == "kohya" and use_dora:
        raise ValueError(
            "--export_format kohya cannot hold --use_dora: readers of that format disagree on whether dora_scale counts rows or columns; "
            "use --export_format diffusers or --export_merged"
        )


def save(
    transformer: nn.Module, folder: str | Path, export_format: str = "diffusers", *, encoders: Mapping[str, nn.Module] | None = None
) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights` reads, with alpha in its metadata; "kohya": also kohya's file.

    Args:
        encoders: text encoders that were adapted too, by their names in TEXT_PARTS; they go into the same file.

    Raises:
        ValueError: as `check_export`, before anything is written.
    """
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

    check_export(export_format, _metadata(transformer)["use_dora"])
    denoiser, parts = part_of(transformer), {}
    for name, module in {denoiser: transformer, **(encoders or {})}.items():
        parts[f"{name}_lora_layers"] = {key: tensor.cpu().contiguous() for key, tensor in state(module).items()}
        parts[f"{name}_lora_adapter_metadata"] = _metadata(module)
    writer = StableDiffusion3Pipeline if denoiser == "transformer" else StableDiffusionPipeline  # XL's pipeline reads its files, too
    writer.save_lora_weights(str(folder), weight_name=WEIGHTS_NAME, **parts)
    if export_format == "kohya":
        export_kohya(transformer, Path(folder) / KOHYA_NAME, encoders=encoders)


def init_file(path: str | Path) -> Path:
    """The file that --init_lora means: a folder's `pytorch_lora_weights.safetensors` or the file itself.

    Raises:
        ValueError: naming --init_lora, if there is none.
    """
    file = Path(path).expanduser()
    file = file / WEIGHTS_NAME if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"--init_lora {path}: there is no {file.name}; a folder with {WEIGHTS_NAME} or such a file is needed")
    return file


def check_init(path: str | Path, *, rank: int, alpha: float, use_dora: bool) -> None:
    """Refuse an --init_lora whose scaling differs from this run's, or that has kohya's names; reads only the file's header.

    Raises:
        ValueError: naming --init_lora and the flag to change.
    """
    from safetensors import SafetensorError, safe_open

    name = init_file(path)
    try:
        with safe_open(name, framework="numpy") as file:
            keys = file.keys()
            ranks = {key: file.get_slice(key).get_shape()[0] for key in keys if ".lora_A." in key}
            dora = any("lora_magnitude_vector" in key for key in keys)
            metadata = json.loads((file.metadata() or {}).get(METADATA_NAME, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"--init_lora {path}: cannot be read as safetensors ({error}); is the file complete?") from error
    if any(key.startswith("lora_unet_joint_blocks") for key in keys):
        raise ValueError(f"--init_lora {path}: has kohya's names, for ComfyUI and Forge; give the {WEIGHTS_NAME} beside it")
    ours = {"r": rank, "lora_alpha": alpha, "use_dora": use_dora}
    for part in ("transformer", "unet"):  # text encoders have flags of their own, in one program alone
        if found := set(_part(ranks, part).values()):
            _check_scaling(f"--init_lora {path}", part, found, dora, _part(metadata, part), ours)


def _check_scaling(flag: str, part: str, ranks: set[int], dora: bool, metadata: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError if rank, alpha or kind of a saved adapter differ from `ours`, this run's values by the keys of `_metadata`."""
    named = "--text_encoder_rank" if part in TEXT_PARTS else "--rank"
    if ranks != {ours["r"]}:
        raise ValueError(f"{flag}: has rank {', '.join(map(str, sorted(ranks)))}, this run {named} {ours['r']}; pass {named} {max(ranks)}")
    alpha = metadata.get("lora_alpha", ours["r"])  # diffusers' rule for files without metadata: alpha = rank
    if alpha != ours["lora_alpha"]:
        if part in TEXT_PARTS:
            raise ValueError(f"{flag}: has alpha {alpha:g} in {part}, this run {ours['lora_alpha']:g}; it scales all parts by alpha / rank")
        raise ValueError(f"{flag}: has alpha {alpha:g}, this run --lora_alpha {ours['lora_alpha']:g}; pass --lora_alpha {alpha:g}")
    if metadata.get("use_rslora") or metadata.get("alpha_pattern"):
        raise ValueError(f"{flag}: scales its layers by another rule (rsLoRA or an alpha per layer), which this run could not keep")
    if dora != ours["use_dora"]:
        raise ValueError(f"{flag}: is plain LoRA; leave out --use_dora" if ours["use_dora"] else f"{flag}: is DoRA; pass --use_dora")


def _read(path: str | Path, denoiser: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a saved LoRA; raises ValueError naming --init_lora, also if it does not adapt this denoiser."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
    from safetensors import SafetensorError

    flag, file = f"--init_lora {path}", init_file(path)
    try:
        reader = StableDiffusion3Pipeline if denoiser == "transformer" else StableDiffusionPipeline
        options = dict(weight_name=file.name, use_safetensors=True, return_lora_metadata=True)
        tensors, *_, metadata = reader.lora_state_dict(str(file.parent), **options)  # in between, there may be alphas of kohya's format
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{flag}: cannot be read as safetensors ({error}); is the file complete?") from error
    if not any(key.startswith(f"{denoiser}.") and key.endswith("lora_A.weight") for key in tensors):
        raise ValueError(
            f"{flag}: holds no LoRA of {'an SD3 transformer' if denoiser == 'transformer' else 'a UNet'} in diffusers' format "
            f"(no {denoiser}.*.lora_A.weight)"
        )
    return tensors, metadata or {}


def _part(named: dict[str, Any], part: str) -> dict[str, Any]:
    """The entries of one part of the pipeline, without its prefix."""
    return {key.removeprefix(f"{part}."): value for key, value in named.items() if key.startswith(f"{part}.")}


def load(transformer: nn.Module, path: str | Path, *, encoders: Mapping[str, nn.Module] | None = None) -> list[str]:
    """Start the adapters (made by `add`) from a saved LoRA: a folder or file, ours or diffusers'.

    Layers in the file that never get a gradient are ignored.

    Args:
        encoders: text encoders with adapters (made by `add_text`), by their names in TEXT_PARTS.

    Returns:
        Names of adapted layers that the file does not hold; they keep their initial values, with which they change nothing.

    Raises:
        ValueError: naming --init_lora, and the flag to change: another rank, alpha, DoRA, shape, or layers that this run leaves out.
    """
    denoiser, encoders = part_of(transformer), encoders or {}
    tensors, metadata = _read(path, denoiser)
    lost = [part for part in TEXT_PARTS if _part(tensors, part) and part not in encoders]
    if lost:
        keeps = "train_dreambooth_lora_sd3.py --train_text_encoder keeps them"
        cure = keeps if denoiser == "transformer" else "start from a LoRA of the UNet alone"
        raise ValueError(f"--init_lora {path}: adapts {' and '.join(lost)} too, which this run would drop; {cure}")
    fresh = []
    for part, module in {denoiser: transformer, **encoders}.items():
        if part == denoiser or _part(tensors, part):
            fresh += _load_part(module, _part(tensors, part), _part(metadata, part), path, part)
        else:
            fresh += [f"{part}.{name}" for name in adapted(module)]
    return fresh


def _load_part(module: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, Any], path: str | Path, part: str) -> list[str]:
    flag = f"--init_lora {path}"
    own = _named(module)
    tensors = {key: tensor for key, tensor in tensors.items() if key.split(".lora_")[0] not in _dead(unwrap(module))}
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_A.weight")}
    _check_scaling(flag, part, ranks, any("lora_magnitude_vector" in key for key in tensors), metadata, _metadata(module))
    extra = sorted({key.split(".lora_")[0] for key in tensors.keys() - own.keys()})
    if extra:
        raise ValueError(f"{flag}: adapts {len(extra)} layers that this run leaves out, such as {extra[0]}; widen --lora_layers")
    load_state(module, state(module) | tensors)
    return [name for name in adapted(module) if f"{name}.lora_A.weight" not in tensors]


# --------------------------------------------------------------------------- export

# Names in the original SD3 checkpoint, which ComfyUI, A1111 and kohya use; there q, k and v are one layer.
# diffusers' name inside a block -> (original name, which third of it)
_QKV = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
_BLOCK_NAMES = {
    **{f"attn.{name}": ("context_block" if "add" in name else "x_block") + ".attn.qkv" for name in _QKV},
    **{f"attn2.{name}": "x_block.attn2.qkv" for name in ("to_q", "to_k", "to_v")},
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
}  # fmt: skip
_OUTER_NAMES = {
    "context_embedder": "context_embedder", "proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}  # fmt: skip


def _original_name(name: str) -> tuple[str, int | None]:
    """diffusers' name of a linear layer -> its name in the original checkpoint and, if it is a part of qkv, which third."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
    if match is None:
        return _OUTER_NAMES[name], None
    return f"joint_blocks.{match[1]}.{_BLOCK_NAMES[match[2]]}", _QKV.get(match[2].split(".", 1)[1])


def _swaps_halves(transformer: nn.Module, name: str) -> bool:
    """Whether diffusers keeps scale before shift where the original has shift before scale (AdaLayerNormContinuous)."""
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}.norm1_context.linear"
    return name in (last, "norm_out.linear")


def export_kohya(transformer: nn.Module, file: str | Path, *, encoders: Mapping[str, nn.Module] | None = None) -> None:
    """Write the LoRA with kohya's keys (lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight, ...), for A1111, Forge and ComfyUI.

    q, k and v are one layer there: their LoRAs become one of the summed rank n * r, A stacked and B block-diagonal, which is exact.
    A reader scales by alpha / rank, so the alpha of that layer is n * alpha. CLIP-L's layers begin with lora_te1, CLIP-G's with lora_te2.

    Raises:
        ValueError: for DoRA.
    """
    from safetensors.torch import save_file

    transformer = unwrap(transformer)
    metadata = _metadata(transformer)
    check_export("kohya", metadata["use_dora"])
    groups: dict[str, list[tuple[int | None, Tensor, Tensor]]] = {}
    for name, layer in _layers(transformer):
        a, b = (tensor.detach().cpu() for tensor in _tensors(layer).values())
        original, third = _original_name(name)
        groups.setdefault(original, []).append((third, a, b.roll(b.shape[0] // 2, 0) if _swaps_halves(transformer, name) else b))
    tensors = {}
    for original, parts in groups.items():
        out, rank = parts[0][2].shape
        up = torch.cat([b for _, _, b in parts], dim=1)  # (out, n * rank)
        if parts[0][0] is not None:
            up = torch.zeros(3 * out, len(parts) * rank)
            for column, (third, _, b) in enumerate(parts):
                up[third * out : (third + 1) * out, column * rank : (column + 1) * rank] = b
        key = "lora_unet_" + original.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.cat([a for _, a, _ in parts]).contiguous()
        tensors[f"{key}.lora_up.weight"] = up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(metadata["lora_alpha"]) * len(parts))
    for part, encoder in (encoders or {}).items():
        for name, layer in _layers(encoder):
            key = f"lora_te{TEXT_PARTS.index(part) + 1}_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = (t.detach().cpu() for t in _tensors(layer).values())
            tensors[f"{key}.alpha"] = torch.tensor(float(_metadata(encoder)["lora_alpha"]))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    about = {"ss_network_dim": str(metadata["r"]), "ss_network_alpha": str(metadata["lora_alpha"])}
    save_file(tensors, str(file), metadata={"format": "pt", "ss_network_module": "networks.lora_sd3", **about})


def _merged_weight(layer: Any) -> Tensor:
    """The weight of base and adapter together, computed in fp32, returned in the base's dtype."""
    weight = layer.base_layer.weight.detach().float()  # (out, in), of a convolution (out, in, height, width)
    tensors = _tensors(layer)
    update = tensors["lora_B.weight"].detach().flatten(1) @ tensors["lora_A.weight"].detach().flatten(1)
    merged = weight + layer.scaling[ADAPTER] * update.view_as(weight)
    if "lora_magnitude_vector" in tensors:
        merged = merged * (tensors["lora_magnitude_vector"].detach() / merged.norm(dim=1))[:, None]
    return merged.to(layer.base_layer.weight.dtype)


def export_merged(transformer: nn.Module, folder: str | Path) -> None:
    """Write base and adapter as one ordinary transformer or UNet: config.json and one safetensors file; the live model is not touched.

    `SD3Transformer2DModel.from_pretrained(folder)`, or `UNet2DConditionModel`'s, reads it. In the base's dtype: bf16 rounds the sum once.

    Raises:
        ValueError: the base is quantised: its rounded weights are not worth keeping.
    """
    from safetensors.torch import save_file

    transformer = unwrap(transformer)
    layers = dict(_layers(transformer))
    packed = [name for name, layer in layers.items() if not layer.base_layer.weight.is_floating_point()]
    if packed:
        raise ValueError(f"--export_merged: {len(packed)} layers are quantised, such as {packed[0]}; merge into the original model instead")
    tensors = {}
    for key, tensor in transformer.state_dict().items():
        name, _, leaf = key.rpartition(".")
        owner = name.removesuffix(".base_layer")
        if owner in layers and leaf == "weight":
            tensor = _merged_weight(layers[owner])
        elif any(part in key for part in (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")):
            continue
        tensors[f"{owner}.{leaf}"] = tensor.detach().cpu().contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    transformer.save_config(folder)
    save_file(tensors, str(Path(folder) / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})
