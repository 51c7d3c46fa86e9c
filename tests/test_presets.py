"""Presets for small cards: each is a valid --config of its program, says what is predicted for it, and fits the card by that."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import runs

from benchmarks import loops, trainers

PRESETS = sorted((runs.ROOT / "scripts/presets").glob("*gb.yaml"))
GIB = 2**30
VAE = 83_819_683 * 2  # bytes in bf16; the benchmarks' plan has none
CUDA = 0.5 * GIB  # what its context and libraries take
ENCODERS = (123_650_304 + 694_659_840 + 4_762_310_656) * 2 + VAE  # while the text cache is filled
TOKENS = 77 + 256


def wrapper_flags(program):
    """What its wrapper says by itself: nothing of that may make a preset take more."""
    environment = {name: value for name, value in os.environ.items() if name != "TINY"} | {"PRINT_COMMAND": "1"}
    command = ["bash", f"scripts/{program}.sh"]
    return shlex.split(subprocess.run(command, cwd=runs.ROOT, env=environment, check=True, capture_output=True, text=True).stdout)[2:]


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_its_card_and_says_so(path):
    text, size = path.read_text(), int(re.search(r"(\d+)gb", path.stem)[1])
    trainer = "full" if path.stem.startswith("full") else "lora"
    script, setting = trainers.TRAINERS[trainer].script, loops.Setting(trainer, 1024, ("--config", str(path)), TOKENS)
    args = loops.arguments(script, setting, Path("outputs/none"), dry_run=True)
    assert args.resolution == 1024 and f"{script.__name__}.sh --config scripts/presets/{path.name}" in text
    plan = trainers.TRAINERS[trainer].planned(setting, args)
    peak = plan.peak + VAE
    assert float(re.search(r"predicted: ([\d.]+) GiB", text)[1]) == pytest.approx(peak / GIB, abs=0.06)
    behind = loops.Setting(trainer, 1024, (*wrapper_flags(script.__name__), "--", *setting.flags), TOKENS)
    assert trainers.TRAINERS[trainer].planned(behind, loops.arguments(script, behind, Path("outputs/none"), dry_run=True)).peak == plan.peak
    assert peak + CUDA < 0.93 * size * GIB, "room for fragments and a desktop"
    assert ENCODERS + CUDA < size * GIB


def test_there_is_one_for_each_common_size():
    assert {"12gb", "16gb", "24gb", "full-12gb", "full-16gb", "full-24gb"} == {path.stem for path in PRESETS}
