"""What the scorers' tests share: tiny weights in the published layouts, and pictures."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from src import images

ROOT = Path(__file__).parent.parent
PROMPTS = ["a red fox", "two cats, one dog", "a very long line of words that says nothing " * 8]


def load_benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


weights = sys.modules["scorer_weights"] = load_benchmark("scorer_weights")  # as benchmarks/scorers.py imports it


def photos(count: int = 3, size: tuple[int, int] = (45, 61)) -> list[Image.Image]:
    """RGB pictures of `size` (height, width): noise on a slope. At 32 pixels high, 43 wide: the two ways of cropping differ."""
    generator = np.random.default_rng(0)
    slope = np.linspace(0, 200, size[1])[None, :, None]
    return [Image.fromarray((slope + generator.integers(0, 56, (*size, 3))).astype(np.uint8)) for _ in range(count)]


def batch(pictures: list[Image.Image]) -> torch.Tensor:
    """As the image contract wants them: (b, 3, H, W) in [0, 1]."""
    return torch.stack([images.from_pil(picture) for picture in pictures])


def make_tiny(monkeypatch) -> None:
    """Let the scorers whose geometry is fixed in the code take tiny weights."""
    from src.scorers import hps, image_reward

    blip = weights.SIZES["tiny"]["blip"]
    monkeypatch.setattr(image_reward, "VISION", blip["vision"])
    monkeypatch.setattr(image_reward, "TEXT", blip["text"])
    monkeypatch.setattr(hps, "ARCHITECTURE", "tiny-clip")


def add_tiny_openclip(folder: Path) -> None:
    """Put "tiny-clip" on open_clip's lists of models and of weights."""
    import json

    import open_clip
    from open_clip import pretrained

    (folder / "tiny-clip.json").write_text(json.dumps(weights.TINY_OPENCLIP))
    open_clip.add_model_config(folder / "tiny-clip.json")
    pretrained._PRETRAINED["tiny-clip"] = {"tiny": {"url": "", "hf_hub": ""}}
