"""Weights spread over two processes by FSDP2 itself (on a CPU accelerate would quietly use plain data parallelism instead)."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import sharded
import torch
import yaml

import train_full_finetuning_sd3
from src import sharding


def alone(model: Path, out: Path, *rest: object) -> None:
    out.mkdir(exist_ok=True)
    (out / "args.json").write_text("{}")
    sharded.train(str(model), str(out), *rest)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def assert_close(one: Path, other: Path) -> None:
    """The same gradients summed in another order; Adam's epsilon of 1e-2 keeps its steps proportional to them."""
    for folder in ("", "ema"):
        ours, theirs = weights(one / folder), weights(other / folder)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole(tiny_sd3_folder, tmp_path_factory):
    """Four steps of one process."""
    out = tmp_path_factory.mktemp("sharding") / "whole"
    alone(tiny_sd3_folder, out, 0, 4, "fp32")
    return out


@pytest.mark.slow
def test_two_sharded_processes_train_as_one_and_each_continues_the_other(tiny_sd3_folder, whole, tmp_path):
    """Weights, moments and average are DTensors (asserted in there); checkpoints hold whole tensors and move between the two."""
    for name in ("two", "again", "spread", "bf16", "compiled"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text("{}")
    (tmp_path / "again/checkpoint-2").symlink_to(tmp_path / "two/checkpoint-2")
    (tmp_path / "spread/checkpoint-2").symlink_to(whole / "checkpoint-2")
    jobs = [f"{tmp_path}/{job}" for job in ("two,0,4,fp32", "again,2,4,fp32", "spread,2,4,fp32", "bf16,0,4,bf16", "compiled,0,2,compiled")]
    log = tmp_path / "log"
    runs.finish(runs.fork(["tests/sharded.py", tiny_sd3_folder, *jobs], log, ranks=2), log, seconds=300)
    assert_close(tmp_path / "two", whole)
    compiled, plain = weights(tmp_path / "compiled"), weights(tmp_path / "two/checkpoint-2")
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-5)

    for part in ("transformer", "ema/transformer"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    runs.assert_identical(runs.state(tmp_path / "again/checkpoint-4"), runs.state(tmp_path / "two/checkpoint-4"))
    assert_close(tmp_path / "spread", whole)

    shutil.copytree(tmp_path / "two/checkpoint-2", tmp_path / "one/checkpoint-2")
    alone(tiny_sd3_folder, tmp_path / "one", 2, 4, "fp32")
    assert_close(tmp_path / "one", whole)

    ours, theirs, start = weights(tmp_path / "bf16"), weights(whole), weights(tiny_sd3_folder)
    assert {value.dtype for value in ours.values()} == {torch.float32}
    moved = torch.cat([(theirs[name] - start[name]).flatten() for name in ours])
    off = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    assert off.norm() < 0.05 * moved.norm()  # gradients computed in bf16: 3 digits


@pytest.mark.slow
def test_the_program_itself_runs_sharded_and_ends_as_on_one_process(tiny_sd3_folder, tmp_path):
    """With accumulation, average, validation pictures and an even number of held-out ones: two for each process, or one would wait."""
    world = runs.make_world(tiny_sd3_folder, tmp_path)
    flags = dict(
        max_train_steps=2, train_batch_size=1, gradient_accumulation_steps=2, use_ema=True, num_validation_loss_images=4,
        validation_prompt=["a red ring"], validation_steps=1, adam_epsilon=1e-2, learning_rate=1e-2, lr_scheduler="constant",
    )  # fmt: skip
    log = tmp_path / "log"
    arguments = world.argv(tmp_path / "two", **flags)
    runs.finish(runs.fork(["tests/sharded_program.py", "train_full_finetuning_sd3", *arguments], log, ranks=2), log, seconds=120)
    one = train_full_finetuning_sd3.parse_args(world.argv(tmp_path / "one", **(flags | {"train_batch_size": 2})))
    train_full_finetuning_sd3.main(one)
    for folder in (".", "raw"):
        ours, theirs = weights(tmp_path / "two" / folder), weights(tmp_path / "one" / folder)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    for name in ("val_loss", "loss", "grad_norm"):
        assert runs.values(tmp_path / "two", name) == pytest.approx(runs.values(tmp_path / "one", name), rel=1e-4)


def test_one_process_loads_what_it_saved(tiny_sd3_folder, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-2", tmp_path / "again/checkpoint-2")
    alone(tiny_sd3_folder, tmp_path / "again", 2, 4, "fp32")
    for part in ("", "ema"):
        runs.assert_identical(weights(tmp_path / "again" / part), weights(whole / part))


def test_only_who_writes_keeps_whole_tensors(monkeypatch):
    """Eight processes that each kept the 36 GB of a transformer with its moments and average would fill 290 GB of RAM."""
    tensor, plain = torch.ones(2), torch.zeros(1)
    monkeypatch.setattr(sharding, "sharded", lambda value: value is tensor)
    monkeypatch.setattr(sharding, "whole", lambda value: value * 2)
    assert sharding.gathered({"a": [tensor], "b": plain})["a"][0].tolist() == [2, 2]
    assert sharding.gathered({"a": [tensor], "b": plain}, keep=False) == {"a": [None], "b": plain}


def test_plain_tensors_pass_through():
    tensor = torch.ones(2)
    tree = {"a": [tensor, 1, "x"], "b": (tensor,), "c": None}
    found = sharding.gathered(tree)
    assert found["a"][0] is tensor and found["b"] == (tensor,) and found["a"][1:] == [1, "x"]
    assert sharding.whole(tensor) is tensor and sharding.placed(tensor, torch.zeros(2)) is tensor
    optimizer = torch.optim.AdamW([torch.nn.Parameter(tensor)])
    state = optimizer.state_dict()
    assert sharding.placed_state(state, optimizer) is state


def test_without_fsdp2_prepare_is_accelerates():
    prepared = SimpleNamespace(prepare=lambda *objects: objects)
    model, optimizer = torch.nn.Linear(1, 1), object()
    assert sharding.prepare(prepared, model, optimizer) == (model, optimizer)


def test_fsdp2_computes_under_autocast_with_inputs_left_as_they_are():
    """bf16 has 8 bits: 711.0 would become 712. The plugin's policy is what accelerate hands to fully_shard."""
    plugin = SimpleNamespace(mixed_precision_policy=None)
    accelerator = SimpleNamespace(
        is_fsdp2=True, mixed_precision="bf16", state=SimpleNamespace(fsdp_plugin=plugin), prepare=lambda *objects: objects,
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )  # fmt: skip
    linear, released = torch.nn.Linear(2, 2), []
    linear.set_reshard_after_forward = released.append  # a method of what accelerate has sharded
    model, _ = sharding.prepare(accelerator, linear, None)
    assert released == [True] and model(torch.ones(1, 2)).dtype == torch.bfloat16
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs) == (torch.bfloat16, torch.float32, False)


def test_the_configuration_file_is_one_that_accelerate_reads_and_shards_the_blocks():
    from accelerate.commands.config.config_args import load_config_from_file

    path = runs.ROOT / "scripts/accelerate/fsdp2.yaml"
    config = load_config_from_file(str(path))
    settings = yaml.safe_load(path.read_text())["fsdp_config"]
    assert config.distributed_type == "FSDP" and settings["fsdp_version"] == 2
    from diffusers.models.transformers import transformer_sd3

    assert hasattr(transformer_sd3, settings["fsdp_transformer_layer_cls_to_wrap"])


def test_fp16_is_refused_where_weights_are_spread():
    """accelerate 1.15 takes the loss scale off the gradients twice there, which torch refuses at the first step."""
    settings = dict(pieces=False, train_text_encoder=False, optimizer="adamw")
    spread = {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match="--mixed_precision fp16 does not work under FSDP2: use bf16"):
        sharding.check(spread, **settings, mixed_precision="fp16")
    sharding.check(spread, **settings, mixed_precision="bf16")
    sharding.check({}, **settings, mixed_precision="fp16")
    sharding.check(spread | {"WORLD_SIZE": "1"}, **settings, mixed_precision="fp16")  # nothing is spread over one process
