"""Installs `src` for editable use: `pip install -e .`.

requirements.txt has the versions that every change is tested with. The lowest ones here have passed all tests as well, except that the
predicted memory of ReFL differs by 0.2 GiB. `pip install -e ".[datasets,optimizers,trackers,scorers,test]"`, then `python -m pytest`.
"""

from setuptools import find_packages, setup

setup(
    name="dive-into-stable-diffusion-3.5",
    version="0.1.0",
    description="Standalone training programs for post-training Stable Diffusion 3.5 (and 1.5)",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["src", "src.*"]),
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "diffusers>=0.42",
        "transformers>=5.17",
        "accelerate>=1.10",
        "peft>=0.19.1",
        "safetensors",
        "pillow",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "psutil",
    ],
    extras_require={
        "datasets": ["datasets>=4.8"],  # hub ids, parquet and webdataset; local folders need nothing
        "optimizers": ["bitsandbytes>=0.50", "prodigyopt>=1.1"],
        "trackers": ["tensorboard", "wandb>=0.22"],
        "scorers": ["open_clip_torch>=3.0", "rapidocr>=3.10", "onnxruntime", "scipy"],  # those that need a package of their own
        "ui": ["gradio>=6.31,<7"],  # demo.py --ui; tested with 6.31.0, which brings Pillow 12.3
        "build": ["open_clip_torch>=3.0"],  # python -m src.tiny.build
        "test": ["pytest>=8", "ruff"],
    },
)
