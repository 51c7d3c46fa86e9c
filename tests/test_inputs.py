"""Embeddings of prompts on their way from the cache to the device."""

import torch

from src import inputs
from src.data.cache import TensorCache
from src.pipelines import sd3


def test_embeddings_come_in_the_order_of_the_prompts_and_are_read_once_each(tmp_path):
    """A group of GRPO has one prompt, many times, and asks for it at every step of its window."""
    cache, reads = TensorCache(tmp_path, "text", {}), []
    for number, prompt in enumerate(("fox", "owl", "cat")):
        cache.write(prompt, {"embeds": torch.full((2, 3), float(number)), "pooled": torch.full((4,), 10.0 + number)})
    read = cache.read
    cache.read = lambda prompt: reads.append(prompt) or read(prompt)
    texts = inputs.Texts(cache, torch.device("cpu"), sd3)

    found = texts.condition(["owl", "fox", "owl", "owl"])
    assert found.embeds.shape == (4, 2, 3) and found.embeds[:, 0, 0].tolist() == [1, 0, 1, 1]
    assert found.pooled[:, 0].tolist() == [11, 10, 11, 11] and reads == ["owl", "fox"]
    assert texts.condition(["owl", "fox", "owl", "owl"]) is found and len(reads) == 2

    prompts = ["cat", "fox"]
    assert texts.condition(prompts).embeds[:, 0, 0].tolist() == [2, 0]
    prompts[0] = "owl"  # the list is the caller's
    assert texts.condition(prompts).embeds[:, 0, 0].tolist() == [1, 0]
