"""What is trained of a denoiser: its result in every form that was asked for, averaged where there is an average."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from src import ema, tuned


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """trained(whole, ...) -> (Tuned of one weight, trained to 5 with an average of 2; that average; what was written meanwhile)."""

    def make(whole, **flags):
        module, written = torch.nn.Linear(1, 1, bias=False), []
        module.weight.data.fill_(5.0)
        average = ema.Ema([module.weight], 0.9)
        average.average[0].fill_(2.0)

        def writer(name):
            return lambda *given, **options: written.append((name, *given[1:], options, module.weight.item()))

        for owner, name in (("lora", "save"), ("lora", "export_merged"), ("full", "save"), ("full", "complete_pipeline")):
            monkeypatch.setattr(getattr(tuned, owner), name, writer(name))
        args = argparse.Namespace(output_dir=tmp_path, export_format="kohya", export_merged=True, revision="v2", variant="fp16", **flags)
        return tuned.Tuned(SimpleNamespace(is_main=True), args, module, whole=whole), average, written

    return make


def test_a_lora_is_saved_in_every_form_with_its_average(trained, tmp_path):
    part, average, written = trained(whole=False)
    part.save_result("base", average)
    expected = [("save", tmp_path, "kohya", {}, 2.0), ("save", tmp_path / "raw", "kohya", {}, 5.0)]
    assert written == [*expected, ("export_merged", tmp_path / "merged_unet", {}, 2.0)]
    written.clear()
    part.writer(average)(tmp_path / "checkpoint")
    assert [(entry[1].name, entry[-1]) for entry in written] == [("checkpoint", 2.0), ("raw", 5.0)]


def test_all_weights_are_completed_from_the_same_version_of_the_base_model(trained, tmp_path):
    part, average, written = trained(whole=True)
    part.save_result("base", average)
    saved = [("save", tmp_path, {"write": True}, 2.0), ("save", tmp_path / "raw", {"write": True}, 5.0)]
    assert written == [*saved, ("complete_pipeline", tmp_path, dict(trained=["unet"], revision="v2", variant="fp16"), 5.0)]
    assert part.writer(average) is None  # a checkpoint has them in that form


@pytest.mark.parametrize("flags", [dict(lora_layers="attn.to_x", lora_blocks=None), dict(lora_layers=None, lora_blocks="7")], ids=str)
def test_layers_that_do_not_exist_are_refused_before_anything_is_loaded(monkeypatch, flags):
    asked = []
    args = argparse.Namespace(pretrained_model_name_or_path="base", revision="v2", **flags)

    def refuse(module, layers, blocks):
        asked.append((module, layers, blocks))
        raise ValueError("--lora_layers: no such layer")

    monkeypatch.setattr(tuned.lora, "targets", refuse)
    with pytest.raises(SystemExit, match="error: --lora_layers: no such layer"):
        tuned.check_layers(args, lambda path, revision: (path, revision))
    assert asked == [(("base", "v2"), *flags.values())]
