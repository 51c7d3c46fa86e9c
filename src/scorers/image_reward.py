"""ImageReward: people's judgement of picture and prompt, BLIP with a reward head (https://arxiv.org/abs/2304.05977).

A ViT-L/16 reads the picture; a BERT that looks at the picture in every layer reads the prompt; an MLP makes the reward of its first token.
transformers' BLIP classes compute it, after the names in ImageReward.pt have been mapped to theirs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import Tensor, nn

from src.scorers import networks, preprocess
from src.scorers.base import Loader, Scorer, Weights, some_prompt

if TYPE_CHECKING:
    from src.scorers.base import Judge

REWARD = Weights("image-reward", ("ImageReward.pt",), "THUDM/ImageReward")
VOCABULARY = Weights("image-reward", ("vocab.txt",), "google-bert/bert-base-uncased")
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw reward, as published
TOKENS = 35  # every prompt is padded or cut to this, as in training
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=16,
              layer_norm_eps=1e-6)  # fmt: skip
TEXT = dict(vocab_size=30524, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=512, encoder_hidden_size=VISION["hidden_size"])  # fmt: skip
_RENAMES = (  # names in ImageReward.pt (BLIP's) -> transformers'
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"(^vision\..*\.)attn\.proj\.", r"\1self_attn.projection."),
    (r"(^vision\..*\.)attn\.qkv\.", r"\1self_attn.qkv."),
    (r"(^vision\..*\.)norm([12])\.", r"\1layer_norm\2."),
    (r"^mlp\.layers\.", "mlp."),
)
# for BLIP's contrastive loss, and a buffer of old versions: not part of the reward
_UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ImageReward.pt by the names that they have in `Network`."""
    result = {}
    for name, value in state.items():
        if not _UNUSED.search(name):
            for pattern, replacement in _RENAMES:
                name = re.sub(pattern, replacement, name)
            result[name] = value
    return result


class Network(nn.Module):
    """BLIP's two towers and the reward head."""

    def __init__(self, vision: dict, text: dict):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.mlp = networks.mlp(text["hidden_size"])

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """pixels (b, 3, side, side) normalized, tokens and mask (b, L) -> rewards (b,) float32."""
        seen = self.vision(pixels).last_hidden_state  # (b, patches + 1, D)
        read = self.text(tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state  # (b, L, D)
        return (self.mlp(read[:, 0].float()).squeeze(1) - MEAN) / STD


def tokenizer():
    """BERT's, with the two tokens that BLIP adds."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab=str(VOCABULARY.path("vocab.txt")), bos_token="[DEC]", additional_special_tokens=["[ENC]"])


def load(loader: Loader) -> Judge:
    path = REWARD.path("ImageReward.pt")
    model = Network(VISION, TEXT)
    networks.load(model, renamed(networks.read(path)), path=path, what="ImageReward v1.0")
    networks.freeze(model, loader)
    model.mlp.float()
    tokens_of = tokenizer()

    def judge(images, prompts, metadata):
        tokens = tokens_of(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").to(loader.device)
        pixels = preprocess.clip_pixels(images, VISION["image_size"], "torchvision").to(loader.dtype)
        return model(pixels, tokens.input_ids, tokens.attention_mask)

    return judge


SCORERS = (
    Scorer(
        name="image_reward", summary="people's judgement of picture and prompt, mean 0 and deviation 1: ImageReward v1.0",
        differentiable=True, range=(-2.0, 2.0), normalizer=1.0, licence="Apache-2.0", load=load,
        weights=lambda options: (REWARD, VOCABULARY), check_prompt=some_prompt,
    ),
)  # fmt: skip
