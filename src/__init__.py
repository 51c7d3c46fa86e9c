"""Library of the training scripts: every module is usable on its own."""

import os

# onnxruntime, which diffusers imports where it is installed, reports to its maker as soon as it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
