"""The published scorers written down once more, slowly: plain matrix products over the names in the original files. Oracles only."""

import numpy as np
import torch


def head(state: dict, embedding: np.ndarray, prefix: str = "layers.", relu: bool = False) -> float:
    """An MLP head on one embedding (D,): x <- W x + b for every layer in the order of their numbers; ReLU between them on request."""
    numbers = sorted({int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)})
    x = embedding.astype(np.float64)
    for number in numbers:
        x = state[f"{prefix}{number}.weight"].double().numpy() @ x + state[f"{prefix}{number}.bias"].double().numpy()
        if relu and number != numbers[-1]:
            x = np.maximum(x, 0)
    return float(x[0])


def open_clip_names(state: dict) -> dict:
    """A transformers CLIPModel's tensors by open_clip's names: fused query, key and value; projections the other way round."""
    result = {"logit_scale": state["logit_scale"]}
    towers = (("vision_model", "visual.transformer", "visual_projection", "visual.proj"),
              ("text_model", "transformer", "text_projection", "text_projection"))  # fmt: skip
    for tower, blocks, projection, matrix in towers:
        result[matrix] = state[f"{projection}.weight"].T
        layers = 1 + max(int(name.split(".")[3]) for name in state if name.startswith(f"{tower}.encoder.layers."))
        for number in range(layers):
            old, new = f"{tower}.encoder.layers.{number}", f"{blocks}.resblocks.{number}"
            for kind in ("weight", "bias"):
                result[f"{new}.attn.in_proj_{kind}"] = torch.cat([state[f"{old}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"])
                for theirs, ours in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                                     ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                    result[f"{new}.{theirs}.{kind}"] = state[f"{old}.{ours}.{kind}"]
    result["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    result["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    result["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    result["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    result["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    for theirs, ours in (("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm"),
                         ("ln_final", "text_model.final_layer_norm")):  # fmt: skip
        for kind in ("weight", "bias"):
            result[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    return result


class ImageReward:
    """ImageReward of one picture and prompt, from the tensors of ImageReward.pt by their original names, in fp64."""

    MEAN, STD = 0.16717362830052426, 1.0333394966054072

    def __init__(self, state: dict, vision_heads: int, text_heads: int):
        self.state = {name: value.double() for name, value in state.items()}
        self.vision_heads, self.text_heads = vision_heads, text_heads

    def linear(self, name: str, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x, eps: float):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def attend(query, key, value, heads: int):
        """(Lq, D), (Lk, D), (Lk, D) -> (Lq, D), head by head."""
        pieces = []
        for q, k, v in zip(*(x.chunk(heads, -1) for x in (query, key, value)), strict=True):
            pieces.append(torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v)
        return torch.cat(pieces, -1)

    def see(self, pixels):
        """pixels (3, side, side), normalized -> (patches + 1, D): BLIP's ViT, norms before."""
        prefix = "blip.visual_encoder."
        kernel = self.state[f"{prefix}patch_embed.proj.weight"]
        size = kernel.shape[-1]
        corners = [(y, x) for y in range(0, pixels.shape[1], size) for x in range(0, pixels.shape[2], size)]
        patches = [pixels[:, y : y + size, x : x + size].flatten() for y, x in corners]
        x = torch.stack(patches).double() @ kernel.flatten(1).T + self.state[f"{prefix}patch_embed.proj.bias"]
        x = torch.cat([self.state[f"{prefix}cls_token"][0], x]) + self.state[f"{prefix}pos_embed"][0]
        number = 0
        while f"{prefix}blocks.{number}.norm1.weight" in self.state:
            block = f"{prefix}blocks.{number}."
            q, k, v = self.linear(f"{block}attn.qkv", self.norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}attn.proj", self.attend(q, k, v, self.vision_heads))
            inner = torch.nn.functional.gelu(self.linear(f"{block}mlp.fc1", self.norm(f"{block}norm2", x, 1e-6)))
            x = x + self.linear(f"{block}mlp.fc2", inner)
            number += 1
        return self.norm(f"{prefix}norm", x, 1e-6)

    def read(self, tokens: list[int], seen):
        """Tokens without padding, which nothing attends to -> (L, D): BERT, norms after, each layer looking at the picture."""
        prefix = "blip.text_encoder."
        x = self.state[f"{prefix}embeddings.word_embeddings.weight"][tokens]
        x = x + self.state[f"{prefix}embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(f"{prefix}embeddings.LayerNorm", x, 1e-12)
        number = 0
        while f"{prefix}encoder.layer.{number}.output.dense.weight" in self.state:
            layer = f"{prefix}encoder.layer.{number}."
            for kind, source in (("attention", None), ("crossattention", seen)):
                source = x if source is None else source
                inner = self.attend(
                    self.linear(f"{layer}{kind}.self.query", x), self.linear(f"{layer}{kind}.self.key", source),
                    self.linear(f"{layer}{kind}.self.value", source), self.text_heads,
                )  # fmt: skip
                x = self.norm(f"{layer}{kind}.output.LayerNorm", x + self.linear(f"{layer}{kind}.output.dense", inner), 1e-12)
            inner = torch.nn.functional.gelu(self.linear(f"{layer}intermediate.dense", x))
            x = self.norm(f"{layer}output.LayerNorm", x + self.linear(f"{layer}output.dense", inner), 1e-12)
            number += 1
        return x

    def __call__(self, pixels, tokens: list[int]) -> float:
        first = self.read(tokens, self.see(pixels))[0]
        return (head(self.state, first.numpy(), "mlp.layers.") - self.MEAN) / self.STD
