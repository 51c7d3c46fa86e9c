"""Workers that load batches share memory, /dev/shm, of which a container has little: what does not fit is refused in time."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

import train_text_to_image_lora_sd3 as script
from src import inputs
from src.data import samples


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(free, **flags) -> what is said of a run on models of SD3.5-medium's sizes with `free` bytes in /dev/shm, "" if nothing."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps({"in_channels": 16}))
    family = SimpleNamespace(
        DENOISER="transformer", VAE_SCALE=8, text_width=lambda config: (4096, 2048), text_tokens=lambda path, revision, length: 77 + length
    )
    flags = dict(
        pretrained_model_name_or_path=str(tmp_path), dataloader_num_workers=4, mixed_precision="bf16", resolution=1024, train_batch_size=1,
        cache_latents=True, cache_text=True, max_sequence_length=256, dry_run=False,
    )  # fmt: skip
    monkeypatch.setattr(inputs, "SHARED", tmp_path)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def answer(free, pictures=1, **changes):
        monkeypatch.setattr(inputs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        try:
            inputs.check_shared_memory(argparse.Namespace(**flags | changes), family, pictures)
        except ValueError as error:
            return str(error)
        return ""

    return answer


def test_workers_need_room_for_their_batches(refused):
    """A sample of 1024 px in bf16: mean and std 2 x 16 x 128 x 128 numbers, text 333 x 4096 + 2048, 2 bytes each: 3,780,608 bytes.

    Four workers with two batches of four each: 120,979,456 bytes, of which a container has 64 MiB, 67,108,864: enough for two.
    """
    docker, needed = 64 * 2**20, 3_780_608 * 4 * 2 * 4
    message = refused(docker, train_batch_size=4)
    assert message == (
        "--dataloader_num_workers 4: the batches that they hold ready take 121 MB of /dev/shm, where 67 MB are free: "
        "in Docker `docker run --shm-size 8g`, or --dataloader_num_workers 2"
    )
    assert refused(needed, train_batch_size=4) == "" and refused(needed - 1, train_batch_size=4)
    assert refused(docker) == "" and refused(0, dataloader_num_workers=0) == ""
    assert refused(0, dry_run=True) == "", "a plan may be made on another machine"
    assert "--dataloader_num_workers 0" in refused(10**6)


def test_what_else_makes_a_batch_larger(refused):
    """Pixels: 3 x 1024 x 1024 of 4 bytes, 12,582,912. Pairs have two pictures, prior preservation two loaders, a machine its processes."""
    text, latents, eight = (333 * 4096 + 2048) * 2, 2 * 16 * 128 * 128 * 2, 2 * 4
    for needed, flags in (
        (eight * (text + 12_582_912), dict(cache_latents=False)),
        (eight * latents, dict(cache_text=False)),
        (eight * (text + 2 * latents), dict(pictures=2)),
        (eight * (text + latents) * 2, dict(with_prior_preservation=True)),
        (eight * (text + latents) * 2, dict(mixed_precision="no")),
    ):
        assert refused(needed, **flags) == "" and refused(needed - 1, **flags), flags


def test_the_processes_of_this_machine_share_it(refused, monkeypatch):
    """The launcher's WORLD_SIZE counts those of other machines, too; what is checked before it starts knows nothing else."""
    needed = 3_780_608 * 2 * 4
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    assert refused(8 * needed) == "" and refused(8 * needed - 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert refused(2 * needed) == "" and refused(2 * needed - 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert refused(16 * needed) == "" and refused(16 * needed - 1)


def test_a_loader_prefetches_as_many_batches_as_are_counted():
    assert samples.loader([0], [[0]], num_workers=1).prefetch_factor == inputs.PREFETCHED


def test_a_trainer_asks_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(inputs, "SHARED", inputs.Path("."))
    tiny = ["--pretrained_model_name_or_path", "models/tiny-sd3", "--dataset_name", "datas/photos", "--resolution", "64"]
    with pytest.raises(SystemExit):
        script.parse_args([*tiny, "--dataloader_num_workers", "3"])
    assert "error: --dataloader_num_workers 3: " in capsys.readouterr().err
    script.parse_args([*tiny, "--dataloader_num_workers", "0"])
