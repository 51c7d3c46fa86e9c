"""Random weights in the layouts that the scorers' authors publish: of the real size for `scorers.py`, tiny for the tests.

`write(name, size)` fills models/ below the current directory with what one scorer needs, so that it loads as from a download.
"""

import json
from pathlib import Path

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.!-"
# CLIP's towers as (width, layers, heads), in transformers' words; BLIP's and SigLIP's configurations
SIZES = {
    "real": {
        "clip_l": {"vision": (1024, 24, 16), "text": (768, 12, 12), "projection": 768, "side": 224, "patch": 14},
        "clip_h": {"vision": (1280, 32, 16), "text": (1024, 24, 16), "projection": 1024, "side": 224, "patch": 14},
        "siglip": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384,
                   "patch_size": 14},
        "openclip": "ViT-H-14",
        "blip": {},
        "swin": {"image_size": 384, "embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
        "mask2former": {"num_queries": 100},  # all else as transformers' defaults
    },
    "tiny": {
        "clip_l": {"vision": (16, 2, 2), "text": (8, 2, 2), "projection": 768, "side": 32, "patch": 8},  # 768: what the heads take
        "clip_h": {"vision": (32, 2, 4), "text": (16, 2, 2), "projection": 12, "side": 32, "patch": 8},
        "siglip": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
                   "patch_size": 14},
        "openclip": "tiny-clip",
        "blip": {
            "vision": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
                       "patch_size": 16, "layer_norm_eps": 1e-6},
            "text": {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "max_position_embeddings": 40, "encoder_hidden_size": 24},
        },
        "swin": {"image_size": 32, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2},
        "mask2former": {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 1,
                        "decoder_layers": 2, "num_attention_heads": 1, "dim_feedforward": 8, "num_queries": 6},
    },
}  # fmt: skip
TINY_OPENCLIP = {  # the "tiny-clip" that the tests add to open_clip's list
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Draw every tensor from a normal of deviation 0.1: with default biases and norms, mistakes would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.normal_(0.0, 0.1, generator=generator)
                if "norm" in name.lower() and name.endswith("weight"):
                    value.add_(1.0)
    return module


def clip_folder(folder: Path, size: str, kind: str, tokenizer=None) -> None:
    """CLIPModel as transformers saves it, with QuickGELU for ViT-L and GELU for ViT-H as the originals have."""
    from transformers import CLIPConfig, CLIPModel

    shape = SIZES[size][kind]
    activation = "quick_gelu" if kind == "clip_l" else "gelu"

    def tower(width: int, layers: int, heads: int) -> dict:
        return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
                "hidden_act": activation, "projection_dim": shape["projection"]}  # fmt: skip

    vision = tower(*shape["vision"]) | {"image_size": shape["side"], "patch_size": shape["patch"]}
    text = tower(*shape["text"]) | {"vocab_size": 49408, "eos_token_id": 49407}
    if tokenizer is not None:
        text |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        tokenizer.save_pretrained(folder)
    spread(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape["projection"]))).save_pretrained(folder)
    patches = (shape["side"] // shape["patch"]) ** 2 + 1
    add_buffers(folder / "model.safetensors", {"text_model": 77, "vision_model": patches})


def add_buffers(file: Path, lengths: dict[str, int]) -> None:
    """Put `position_ids` into a checkpoint, as in the published ones: buffers that older versions of transformers saved."""
    from safetensors.torch import load_file, save_file

    extra = {f"{tower}.embeddings.position_ids": torch.arange(length)[None] for tower, length in lengths.items()}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})


def letter_tokenizer():
    """CLIP's tokenizer over single letters."""
    from transformers import CLIPTokenizer

    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])


def clip_l(models: Path, size: str) -> None:
    clip_folder(models / "clip-vit-large-patch14", size, "clip_l", letter_tokenizer())


def save(module_or_state, file: Path) -> None:
    """A checkpoint in torch's own format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module_or_state if isinstance(module_or_state, dict) else module_or_state.state_dict(), file)


def aesthetic(models: Path, size: str, name: str = "sac+logos+ava1-l14-linearMSE.pth", activation: bool = False) -> None:
    from src.scorers import networks

    clip_l(models, size)
    head = torch.nn.ModuleDict({"layers": networks.mlp(768, activation=activation)})
    save(spread(head), models / "improved-aesthetic-predictor" / name)


def aesthetic_v1(models: Path, size: str) -> None:
    """shunk031's layout: CLIPVisionModelWithProjection and `predictor.*` in one file."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    shape = SIZES[size]["clip_l"]
    width, layers, heads = shape["vision"]
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads, hidden_act="quick_gelu",
        image_size=shape["side"], patch_size=shape["patch"], projection_dim=shape["projection"],
    )  # fmt: skip
    tower, predictor = spread(CLIPVisionModelWithProjection(config)), spread(torch.nn.Linear(shape["projection"], 1))
    folder = models / "aesthetics-predictor-v1-vit-large-patch14"
    config.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())  # that folder names its own class
    described |= {"model_type": "aesthetics_predictor", "architectures": ["AestheticsPredictorV1"]}
    (folder / "config.json").write_text(json.dumps(described))
    state = tower.state_dict() | {f"predictor.{name}": value for name, value in predictor.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    add_buffers(folder / "model.safetensors", {"vision_model": (shape["side"] // shape["patch"]) ** 2 + 1})


def aesthetic_v25(models: Path, size: str) -> None:
    from transformers import SiglipConfig, SiglipModel

    vision = SIZES[size]["siglip"]
    text = {"vocab_size": 100, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    spread(SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).save_pretrained(models / "siglip-so400m-patch14-384")
    sizes = (vision["hidden_size"], 1024, 128, 64, 16, 1)
    layers = [layer for pair in zip(sizes[:-1], sizes[1:], strict=True) for layer in (torch.nn.Linear(*pair), torch.nn.Identity())]
    head = spread(torch.nn.ModuleDict({"scoring_head": torch.nn.Sequential(*layers)}))
    save(head.to(torch.bfloat16), models / "aesthetic-predictor-v2-5/aesthetic_predictor_v2_5.pth")  # published in bf16


def pickscore(models: Path, size: str) -> None:
    clip_folder(models / "pickscore", size, "clip_h")


def open_clip_network(size: str):
    import open_clip

    return spread(open_clip.CLIP(**open_clip.get_model_config(SIZES[size]["openclip"])))


def openclip(models: Path, size: str) -> None:
    from safetensors.torch import save_file

    name, tag = ("ViT-H-14", "laion2b_s32b_b79k") if size == "real" else ("tiny-clip", "tiny")
    folder = models / f"openclip-{name}-{tag}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(open_clip_network(size).state_dict(), folder / "open_clip_model.safetensors")


def hps(models: Path, size: str) -> None:
    save({"state_dict": open_clip_network(size).state_dict(), "epoch": 1, "name": "random"}, models / "hps/HPS_v2.1_compressed.pt")


def image_reward(models: Path, size: str) -> None:
    """BLIP's names, with the parts that the reward does not use."""
    from src.scorers import image_reward as scorer

    shape = SIZES[size]["blip"] or {"vision": scorer.VISION, "text": scorer.TEXT}
    state = spread(scorer.Network(**shape)).state_dict()
    state = {original_name(name): value for name, value in state.items()}
    width, text_width = shape["vision"]["hidden_size"], shape["text"]["hidden_size"]
    for name, inputs in (("vision_proj", width), ("text_proj", text_width)):
        state |= {f"blip.{name}.weight": torch.zeros(256, inputs), f"blip.{name}.bias": torch.zeros(256)}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(shape["text"]["max_position_embeddings"])[None]
    save(state, models / "image-reward/ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS[:13])]
    words += [f"[unused{number}]" for number in range(shape["text"]["vocab_size"] - 2 - len(words))]
    (models / "image-reward/vocab.txt").write_text("\n".join(words) + "\n")


def original_name(name: str) -> str:
    """transformers' name of a tensor -> its name in ImageReward.pt."""
    tower, _, rest = name.partition(".")
    if tower == "mlp":
        return f"mlp.layers.{rest}"
    if tower == "text":
        return f"blip.text_encoder.{rest}"
    whole = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed"}
    if rest in whole:
        return f"blip.visual_encoder.{whole[rest]}"
    for new, old in (("embeddings.patch_embedding.", "patch_embed.proj."), ("post_layernorm.", "norm."), ("encoder.layers.", "blocks."),
                     ("self_attn.projection", "attn.proj"), ("self_attn.qkv", "attn.qkv"), ("layer_norm", "norm")):  # fmt: skip
        rest = rest.replace(new, old)
    return f"blip.visual_encoder.{rest}"


def geneval(models: Path, size: str) -> None:
    """GenEval's detector, Mask2Former on a Swin backbone, and the CLIP that names colours."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

    swin = SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"], **SIZES[size]["swin"])
    folder = models / "mask2former-swin-small-coco-instance"
    config = Mask2FormerConfig(backbone_config=swin, num_labels=80, **SIZES[size]["mask2former"])
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor().save_pretrained(folder)
    clip_l(models, size)


WRITERS = {
    "aesthetic": aesthetic, "aesthetic_v1": aesthetic_v1, "aesthetic_v25": aesthetic_v25, "clip": clip_l, "openclip": openclip,
    "pickscore": pickscore, "hps": hps, "image_reward": image_reward,
    "geneval": geneval, "geneval_strict": geneval,
}  # fmt: skip


def write(name: str, size: str) -> None:
    """What the scorer loads, below models/ in the current directory. `size`: "real" or "tiny"."""
    WRITERS[name](Path("models"), size)
