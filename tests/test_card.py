"""The model card: what the Hub parses, code that runs as printed, figures, and the upload with a stand-in for the Hub."""

import argparse
import ast
import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from src import card, lora, metrics
from src.pipelines import sd3

NASTY = "a \"red\" heart: {on} a\nblue | `background` # 🙂 'quoted'"


@pytest.fixture
def folder(tmp_path):
    """A finished run's folder."""
    lines = [{"step": 0, "val_loss": 0.5}, {"step": 5, "loss": None, "lr": 1e-4}, {"step": 10, "loss": 0.25, "lr": 1e-5},
             {"step": 10, "val_loss": 0.4}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (0, 10):
        (tmp_path / "samples" / f"step-{step:06d}").mkdir(parents=True)
        (tmp_path / "samples" / f"step-{step:06d}" / "00-0.png").write_bytes(b"")
        (tmp_path / "samples" / f"step-{step:06d}.png").write_bytes(b"")
    for name in ("summary.png", "args.json", "pytorch_lora_weights.safetensors", "checkpoint-10/state.pt", "logs/dive/events.1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def arguments(folder, **changes):
    base = dict(output_dir=folder, pretrained_model_name_or_path="models/stable-diffusion-3.5-medium", dataset_name="datas/photos", seed=7,
                max_train_steps=10, push_to_hub=False, hub_model_id=None, validation_prompt=[NASTY], use_ema=False)  # fmt: skip
    return argparse.Namespace(**(base | changes))


def written(folder, world=1, restore=lambda: None, **changes):
    run = SimpleNamespace(is_main=True, print=print, world=world, signals=SimpleNamespace(restore=restore))
    card.write(run, arguments(folder, **changes), kind="LoRA", images=11, prompt=NASTY)
    return (folder / "README.md").read_text(encoding="utf-8")


def front(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


# ---------------------------------------------------------------------------------------------- what the Hub parses


def test_front_matter_is_what_the_hub_expects(folder):
    data = front(written(folder))
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium" and data["base_model_relation"] == "adapter"
    assert data["license"] == "other" and data["license_name"] == "stabilityai-ai-community"
    assert data["license_link"] == "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md"
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image" and "lora" in data["tags"]
    assert data["widget"] == [{"text": NASTY, "output": {"url": "samples/step-000010/00-0.png"}}]
    assert (folder / data["widget"][0]["output"]["url"]).exists()
    assert "datasets" not in data  # a folder on this machine


def test_huggingface_hub_reads_the_card(folder):
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard.load(str((written(folder), folder / "README.md")[1])).data
    assert found.license == "other" and found.base_model == "stabilityai/stable-diffusion-3.5-medium"


@pytest.mark.parametrize(("path", "base", "licence"), [
    ("models/tiny-sd3", None, None),
    ("/somewhere/stable-diffusion-3.5-large", "stabilityai/stable-diffusion-3.5-large", "other"),
    ("somebody/their-sd35", "somebody/their-sd35", None),
    ("stabilityai/stable-diffusion-3.5-large-turbo", "stabilityai/stable-diffusion-3.5-large-turbo", "other"),
])  # fmt: skip
def test_a_base_model_is_named_only_where_the_hub_knows_it(folder, path, base, licence, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "models/tiny-sd3").mkdir(parents=True)
    data = front(written(folder, pretrained_model_name_or_path=path))
    assert data.get("base_model") == base and data.get("license") == licence


def test_a_hub_data_set_is_named(folder):
    assert front(written(folder, dataset_name="someone/pictures"))["datasets"] == ["someone/pictures"]


# ---------------------------------------------------------------------------------------------- what people read


def test_the_code_is_python_whatever_the_prompt_holds(folder):
    code = re.search(r"```python\n(.*?)```", written(folder), re.S)[1]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert NASTY in strings and str(folder) in strings and "stabilityai/stable-diffusion-3.5-medium" in strings


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DreamBooth LoRA", "Fine-tuned transformer", "Full fine-tuning"])
def test_the_code_draws_with_what_was_trained(tiny_sd3_folder, folder, kind):
    where = tiny_sd3_folder
    if kind.endswith("LoRA"):
        where, transformer = folder, sd3.load(tiny_sd3_folder, parts=("transformer",)).transformer
        lora.add(transformer, rank=2)
        (folder / lora.WEIGHTS_NAME).unlink()  # the fixture's, which is empty
        lora.save(transformer, folder)
    args = arguments(folder, pretrained_model_name_or_path=str(tiny_sd3_folder), resolution=32, eval_num_inference_steps=2,
                     eval_guidance_scale=1.0)  # fmt: skip
    text = card.text(args, kind=kind, trained_on="nothing", prompt=NASTY, where=str(where))
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    assert names["image"].size == (32, 32) and type(names["pipeline"]).__name__ == "StableDiffusion3Pipeline"
    assert bool(names["pipeline"].get_active_adapters()) == kind.endswith("LoRA")


@pytest.mark.parametrize(
    ("guidance", "negative", "more"),
    [(1.0, None, {}), (4.5, None, {}), (4.5, "", {}), (4.5, NASTY, {"negative_prompt": NASTY}), (1.0, "blurry", {})],
)
def test_a_run_on_a_reward_is_drawn_as_its_evaluation_was(folder, guidance, negative, more):
    """The pipeline's own guidance, 7, would burn pictures of a policy that learned to do without. A negative prompt needs guidance."""
    given = {} if negative is None else {"negative_prompt": negative}  # ReFL has no such flag
    text = written(folder, resolution=512, eval_num_inference_steps=40, eval_guidance_scale=guidance, **given)
    code = ast.parse(re.search(r"```python\n(.*?)```", text, re.S)[1])
    call = next(node for node in ast.walk(code) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "pipeline")
    passed = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert passed == {"height": 512, "width": 512, "num_inference_steps": 40, "guidance_scale": guidance} | more
    assert ast.literal_eval(call.args[0]) == NASTY


def test_every_measured_metric_is_in_the_table_with_first_last_and_meaning(folder):
    text = written(folder)
    assert f"| `loss` | 0.25 | 0.25 | {metrics.NAMES['loss']} |" in text  # null was not finite
    assert f"| `val_loss` | 0.5 | 0.4 | {metrics.NAMES['val_loss']} |" in text
    assert "| `step`" not in text and "grad_norm" not in text
    assert "11 pictures of `datas/photos`, 10 optimizer steps, seed 7" in text


def test_pictures_in_the_card_exist(folder):
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", written(folder))
    assert links == ["samples/step-000010.png", "summary.png"] and all((folder / link).exists() for link in links)


def test_a_run_without_validation_has_a_card(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    text = written(tmp_path, validation_prompt=None)
    assert "![" not in text and "widget" not in front(text)


def test_settings_are_those_that_the_run_has(folder):
    text = written(folder, rank=16, use_ema=True, quantize_base=None, fused_backward=False, loss="ppo", mixed_precision="bf16")
    assert "`--rank 16`, `--loss ppo`, `--use_ema`, `--mixed_precision bf16`. All arguments are in `args.json`" in text
    assert f"`--config {folder}/args.json --output_dir outputs/again` after the" in text


def test_a_run_of_several_processes_says_so(folder):
    """Batch sizes in args.json are those of each: repeated on one, the run would see half as many pictures a step."""
    assert "10 optimizer steps, on 2 processes, seed 7" in written(folder, world=2)
    assert "10 optimizer steps, seed 7" in written(folder)


def test_every_setting_on_a_card_is_a_flag_of_some_trainer():
    """A renamed flag would silently vanish from the cards."""
    flags = set()
    for script in Path(__file__).parent.parent.glob("train_*.py"):
        parser = importlib.import_module(script.stem).build_parser()
        flags |= {action.dest for action in parser._actions}
    assert set(card.SETTINGS) <= flags


@pytest.mark.parametrize(("base", "words"), [
    ("models/stable-diffusion-3.5-medium", "Stability AI Community License"), ("models/stable-diffusion-v1-5", "CreativeML Open RAIL-M,"),
    ("models/stable-diffusion-xl-base-1.0", "CreativeML Open RAIL++-M,"), ("models/tiny-sd15", "Apache-2.0"),
    ("somebody/their-sd35", "That of the base model."),
])  # fmt: skip
def test_the_licence_is_named_where_it_is_known(folder, base, words):
    assert words in written(folder, pretrained_model_name_or_path=base).split("\n\n## Licence\n\n")[1]


def test_the_command_is_quoted_for_a_shell(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--validation_prompt", "a red; rm -rf $HOME"])
    assert "python train.py --validation_prompt 'a red; rm -rf $HOME'\n" in written(folder)
    monkeypatch.setattr("sys.argv", ["-c"])
    assert "It was started with" not in written(folder)


def test_an_average_is_called_one(folder):
    assert "seed 7, a moving average of the weights: those of the last step are in `raw/`." in written(folder, use_ema=True)
    assert "seed 7.\n" in written(folder)


STALE = [
    ["pytorch_lora_weights_kohya.safetensors"], ["raw/pytorch_lora_weights.safetensors", "raw/unet/config.json"],
    ["merged_transformer/diffusion_pytorch_model.safetensors"], ["merged_unet/diffusion_pytorch_model.safetensors"],
]  # fmt: skip


def lay(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize(("flags", "kept"), [
    ({}, []), (dict(export_format="diffusers", export_merged=False), []), (dict(export_format="kohya"), [0]),
    (dict(use_ema=True), [1]), (dict(export_merged=True), [2, 3]),
])  # fmt: skip
def test_what_an_earlier_run_left_in_forms_that_this_one_does_not_write_is_removed(folder, flags, kept):
    results = "pytorch_lora_weights.safetensors", "checkpoint-4/state.pt", "transformer/config.json"
    lay(folder, *results, *sum(STALE, []))
    written(folder, **flags)
    assert [i for i, names in enumerate(STALE) if all((folder / name).exists() for name in names)] == kept
    assert [i for i, names in enumerate(STALE) if (folder / names[0].split("/")[0]).exists()] == kept
    assert all((folder / name).exists() for name in results)


def test_files_that_no_run_writes_are_not_removed(folder, tmp_path_factory):
    """Somebody's photographs in a folder that has the name of ours, and a link to another one."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    lay(elsewhere, "config.json", "unet/config.json")
    lay(folder, "raw/DSC_0001.NEF", "raw/holiday/config.json", "merged_transformer")
    (folder / "merged_unet").symlink_to(elsewhere)
    (folder / "raw/unet").symlink_to(elsewhere)
    written(folder)
    assert all((folder / name).exists() for name in ("raw/DSC_0001.NEF", "raw/holiday/config.json", "merged_transformer"))
    assert (elsewhere / "config.json").exists() and (elsewhere / "unet/config.json").exists()


def test_only_the_main_process_writes(tmp_path):
    card.write(SimpleNamespace(is_main=False), arguments(tmp_path), kind="LoRA", images=1, prompt="x")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- upload


class Hub:
    """Stands for HfApi: keeps what it was given."""

    def __init__(self, error=None):
        self.created, self.uploaded, self.error = None, None, error

    def create_repo(self, name, *, exist_ok):
        if self.error:
            raise self.error
        self.created = (name, exist_ok)
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        paths = sorted(path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file())
        self.uploaded = (repo_id, list(filter_repo_objects(paths, ignore_patterns=ignore_patterns)), commit_message)


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    def install(error=None):
        stub = Hub(error)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stub)
        return stub

    return install


def test_the_upload_holds_the_result_and_not_the_checkpoints(folder, hub, capsys):
    stub = hub()
    text = written(folder, push_to_hub=True, hub_model_id="me/heart")
    assert stub.created == ("me/heart", True)
    repository, paths, message = stub.uploaded
    assert (repository, message) == ("me/heart", "LoRA: 11 pictures of `datas/photos`, 10 optimizer steps")
    assert paths == ["README.md", "args.json", "metrics.jsonl", "pytorch_lora_weights.safetensors", "samples/step-000000.png",
                     "samples/step-000000/00-0.png", "samples/step-000010.png", "samples/step-000010/00-0.png", "summary.png"]  # fmt: skip
    assert "load_lora_weights('me/heart')" in text
    assert capsys.readouterr().out == "uploaded to me/heart\n"


def test_a_signal_ends_an_upload(folder, hub):
    stub, before = hub(), []
    written(folder, push_to_hub=True, restore=lambda: before.append(stub.uploaded))
    assert before == [None] and stub.uploaded
    written(folder, restore=lambda: before.append("without an upload"))
    assert before == [None]


def test_without_a_name_the_folder_names_the_repository_and_the_card_the_account(folder, hub):
    stub = hub()
    text = written(folder, push_to_hub=True)
    assert stub.created[0] == folder.name and f"load_lora_weights('me/{folder.name}')" in text


@pytest.mark.parametrize(("error", "reason"), [
    (ConnectionError("401 Client Error\nmore lines"), "401 Client Error"), (ConnectionError(), "ConnectionError"),
])  # fmt: skip
def test_a_failed_upload_says_how_to_go_on(folder, hub, error, reason):
    hub(error)
    with pytest.raises(SystemExit) as exit_:
        written(folder, push_to_hub=True, hub_model_id="me/heart")
    assert str(exit_.value).startswith(f"error: the upload failed ({reason}).")
    assert f"hf upload me/heart {folder}" in str(exit_.value)
    assert (folder / "README.md").exists()


def test_a_missing_login_is_refused_before_training(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    card.check(False)
    hf = Path(sys.executable).parent / "hf"
    with pytest.raises(ValueError, match=f"--push_to_hub: no Hub login on this machine; run `{hf} auth login`"):
        card.check(True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    card.check(True)
