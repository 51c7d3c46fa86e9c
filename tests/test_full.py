"""Which weights are trained, and what the pipeline folder is made of; without a training run."""

import json
import shutil
from pathlib import Path

import pytest
import runs
import torch

from src import full
from src.pipelines import sd3


@pytest.fixture
def transformer(tiny_sd3_folder):
    return sd3.load(tiny_sd3_folder, parts=("transformer",)).transformer


def trained(transformer) -> set[str]:
    return {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}


# --------------------------------------------------------------------------- which weights


def test_everything_is_selected_but_what_never_gets_a_gradient(transformer):
    full.select(transformer)
    everything = {name for name, _ in transformer.named_parameters()}
    dead = {f"transformer_blocks.2.attn.{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")}
    assert trained(transformer) == everything - dead

    transformer.requires_grad_(True)  # the oracle: gradients of a forward pass
    generator = torch.Generator().manual_seed(0)
    latents, embeds, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 16, 4, 4), (2, 32, 32), (2, 16)))
    sd3.velocity(transformer, latents, torch.tensor([0.3, 0.9]), sd3.Conditioning(embeds, pooled)).square().sum().backward()
    still = {name for name, parameter in transformer.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert still == dead


def test_blocks_alone_or_all_but_the_last(transformer):
    full.select(transformer, blocks="0,2")
    assert {name.split(".")[0] for name in trained(transformer)} == {"transformer_blocks"}
    assert {name.split(".")[1] for name in trained(transformer)} == {"0", "2"}
    full.select(transformer, freeze_last=2)
    assert {name.split(".")[1] for name in trained(transformer) if name.startswith("transformer_blocks")} == {"0"}
    assert "proj_out.weight" in trained(transformer)
    full.select(transformer, freeze_last=3)
    assert not any(name.startswith("transformer_blocks") for name in trained(transformer))


def test_blocks_that_do_not_exist_are_refused(transformer):
    with pytest.raises(ValueError, match="--train_blocks: '3' .* 0-2"):
        full.select(transformer, blocks="0,3")
    with pytest.raises(ValueError, match="--freeze_last_blocks 4: this model has 3"):
        full.check_blocks(3, None, 4)
    full.check_blocks(None, "99", 99)  # a Hub id: known only when it is loaded


def test_the_base_model_is_not_overwritten(tiny_sd3_folder, tmp_path):
    (tmp_path / "link").symlink_to(tiny_sd3_folder)
    with pytest.raises(ValueError, match="--output_dir"):
        full.check_output(tmp_path / "link", str(tiny_sd3_folder))
    full.check_output(tmp_path, "owner/model")


# --------------------------------------------------------------------------- files


def test_modules_come_back_bit_for_bit_in_their_dtype(tiny_sd3_folder, tmp_path):
    model = sd3.load(tiny_sd3_folder, parts=("transformer", "text"))
    modules = {"transformer": model.transformer.bfloat16(), **sd3.reload_clips(model, dtype=torch.float32)}
    full.save(modules, tmp_path)
    part = full.State(modules)
    saved = {key: value.clone() for key, value in part.state_dict().items()}
    runs.assert_identical(part.read_files(tmp_path), saved)
    assert saved["transformer/proj_out.weight"].dtype == torch.bfloat16
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.zero_()
    part.load_state_dict(part.read_files(tmp_path))
    runs.assert_identical(part.state_dict(), saved)


def test_a_saved_module_replaces_a_hard_link_and_leaves_its_twin_alone(tiny_sd3_folder, tmp_path):
    base = shutil.copytree(tiny_sd3_folder, tmp_path / "base")
    full.complete_pipeline(str(base), tmp_path / "out", trained=["transformer"])
    weights = base / "text_encoder/model.safetensors"
    before = weights.read_bytes()
    assert (tmp_path / "out/text_encoder/model.safetensors").stat().st_ino == weights.stat().st_ino
    model = sd3.load(base, parts=("text",))
    clips = sd3.reload_clips(model, dtype=torch.float32)
    clips["text_encoder"].text_projection.weight.data.fill_(1)
    full.save({"text_encoder": clips["text_encoder"]}, tmp_path / "out")
    assert weights.read_bytes() == before != (tmp_path / "out/text_encoder/model.safetensors").read_bytes()


def test_the_rest_of_the_pipeline_is_linked_unchanged(tiny_sd3_folder, tmp_path):
    model = sd3.load(tiny_sd3_folder, parts=("transformer",))
    full.save({"transformer": model.transformer}, tmp_path)
    for _ in range(2):  # into what an earlier run left, too
        full.complete_pipeline(str(tiny_sd3_folder), tmp_path, trained=["transformer"])
    ours, theirs = ({p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} for root in (tmp_path, tiny_sd3_folder))
    assert ours == theirs
    for name in ours - {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}:
        assert (tmp_path / name).read_bytes() == (tiny_sd3_folder / name).read_bytes()
        assert ((tmp_path / name).stat().st_ino == (tiny_sd3_folder / name).stat().st_ino) == name.endswith(".safetensors"), name


def test_files_are_copied_where_links_are_impossible(tiny_sd3_folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    full.complete_pipeline(str(tiny_sd3_folder), tmp_path, trained=["transformer"])
    assert (tmp_path / "vae/diffusion_pytorch_model.safetensors").read_bytes() == (
        tiny_sd3_folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()  # fmt: skip
    assert not (tmp_path / "transformer").exists()


def test_a_variant_becomes_the_plain_files_of_the_result(tmp_path):
    """Single files lose the variant's name; shards keep theirs, which the index lists; parts without the variant give their plain files."""
    base, out = tmp_path / "base", tmp_path / "out"
    files = {
        "vae": ["config.json", "diffusion_pytorch_model.safetensors"],
        "text_encoder": ["config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"],
        "text_encoder_3": [
            "model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors",
            "model.safetensors",
        ],
        "tokenizer_3": ["spiece.model", "tokenizer.json"],
    }  # fmt: skip
    for part, names in files.items():
        (base / part).mkdir(parents=True)
        for name in names:
            (base / part / name).write_text(name)
    index = {"_class_name": "StableDiffusion3Pipeline", "image_encoder": [None, None], **{part: ["library", "Class"] for part in files}}
    (base / "model_index.json").write_text(json.dumps(index))
    full.complete_pipeline(str(base), out, trained=["transformer"], variant="fp16")
    assert runs.files(out / "vae") == files["vae"]
    assert runs.files(out / "text_encoder") == ["config.json", "model.safetensors"]
    assert (out / "text_encoder/model.safetensors").read_text() == "model.fp16.safetensors"
    assert runs.files(out / "text_encoder_3") == [
        "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert runs.files(out / "tokenizer_3") == files["tokenizer_3"]

    full.complete_pipeline(str(base), tmp_path / "plain", trained=["transformer"])
    assert (tmp_path / "plain/text_encoder/model.safetensors").read_text() == "model.safetensors"
    assert runs.files(tmp_path / "plain/text_encoder_3") == ["model.safetensors"]


def test_of_a_folder_that_has_a_part_as_variants_alone_one_becomes_its_plain_files(tmp_path):
    """As `hf download` with patterns leaves it: nothing of the base model may change, and the result loads without --variant."""
    base = tmp_path / "base"
    (base / "vae").mkdir(parents=True)
    for name in ("diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        (base / "vae" / name).write_text(name)
    (base / "model_index.json").write_text(json.dumps({"vae": ["library", "Class"]}))
    full.complete_pipeline(str(base), tmp_path / "out", trained=["transformer"])
    assert runs.files(tmp_path / "out/vae") == ["diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "out/vae/diffusion_pytorch_model.safetensors").read_text() == "diffusion_pytorch_model.fp16.safetensors"
    assert all(path.read_text() == path.name for path in (base / "vae").iterdir())


# --------------------------------------------------------------------------- the same of a model on the Hub

SD35 = """
    model_index.json README.md sd3.5_medium.safetensors scheduler/scheduler_config.json vae/config.json
    vae/diffusion_pytorch_model.safetensors transformer/config.json transformer/diffusion_pytorch_model.safetensors
    text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
    text_encoder_2/config.json text_encoder_2/model.safetensors text_encoder_2/model.fp16.safetensors
    text_encoder_3/config.json text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model-00002-of-00002.safetensors
    text_encoder_3/model.safetensors.index.json text_encoder_3/model.fp16-00001-of-00001.safetensors
    text_encoder_3/model.safetensors.index.fp16.json
    text_encoders/clip_g.safetensors text_encoders/t5xxl_fp16.safetensors text_encoders/t5xxl_fp8_e4m3fn.safetensors
    tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer/merges.txt tokenizer_2/tokenizer_config.json tokenizer_2/vocab.json
    tokenizer_3/tokenizer_config.json tokenizer_3/spiece.model
""".split()
SD15 = """
    model_index.json v1-5-pruned.ckpt v1-5-pruned.safetensors scheduler/scheduler_config.json vae/config.json
    vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.bin unet/config.json unet/diffusion_pytorch_model.safetensors
    text_encoder/config.json text_encoder/pytorch_model.bin text_encoder/pytorch_model.fp16.bin text_encoder/openvino_model.bin
    text_encoder/flax_model.msgpack tokenizer/tokenizer_config.json tokenizer/vocab.json
    safety_checker/config.json safety_checker/model.fp16.safetensors safety_checker/pytorch_model.bin safety_checker/pytorch_model.fp16.bin
    feature_extractor/preprocessor_config.json vae_decoder/model.onnx vae_encoder/config.json
""".split()  # as it was published at first, without safetensors of all parts


class Hub:
    """A repository and this machine's cache of it, as `snapshot_download` sees them."""

    def __init__(self, cache: Path, published: list[str]):
        self.cache, self.published, self.reachable, self.asked = cache, published, True, 0
        self.index = {name.split("/")[0]: ["library", "Class"] for name in published if "/" in name and not self.stray(name)}

    @staticmethod
    def stray(name: str) -> bool:
        return name.startswith(("text_encoders/", "vae_decoder/", "vae_encoder/"))

    def keep(self, name: str) -> None:
        path = self.cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        absent = {"image_encoder": [None, None], "requires_safety_checker": True}
        path.write_text(json.dumps(self.index | absent) if name == "model_index.json" else name)

    def snapshot_download(self, repository, *, revision, allow_patterns, ignore_patterns, local_files_only):
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils import filter_repo_objects

        assert (repository, revision) == ("owner/model", "abc")
        if local_files_only or not self.reachable:  # as versions of huggingface_hub that keep no list of the repository's files
            if not self.cache.is_dir():
                raise LocalEntryNotFoundError("cannot find an appropriate cached snapshot folder")
            return str(self.cache)
        self.asked += 1
        for name in filter_repo_objects(self.published, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            self.keep(name)
        return str(self.cache)

    def list_repo_files(self, repository, *, revision):
        if not self.reachable:
            raise ConnectionError("no route to host")
        return self.published

    @property
    def downloaded(self) -> list[str]:
        return sorted(path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*") if path.is_file())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(published):
        one = Hub(tmp_path / "cache", published)
        for name in ("snapshot_download", "list_repo_files"):
            monkeypatch.setattr(f"huggingface_hub.{name}", getattr(one, name))
        return one

    return make


def fetch(trained=("transformer",), **options):
    return full.fetch("owner/model", trained=trained, revision="abc", **options)


def test_of_a_hub_model_the_parts_of_its_index_are_fetched_and_nothing_else(hub):
    one = hub(SD35)
    assert fetch() == one.cache
    unwanted = ("README.md", "sd3.5_medium.safetensors", "text_encoders/", "transformer/")
    assert one.downloaded == sorted(name for name in SD35 if not name.startswith(unwanted) and "fp16" not in name)


def test_a_variant_is_fetched_where_it_is_and_the_plain_files_where_it_is_not(hub):
    one = hub(SD35)
    fetch(variant="fp16")
    weights = [name for name in one.downloaded if name.endswith(".safetensors")]
    assert weights == ["text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors",
                       "text_encoder_3/model.fp16-00001-of-00001.safetensors", "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip


@pytest.mark.parametrize(("variant", "weights"), [
    (None, ["safety_checker/pytorch_model.bin", "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors"]),
    ("fp16", ["safety_checker/model.fp16.safetensors", "text_encoder/pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.safetensors"]),
])  # fmt: skip
def test_a_part_that_has_no_safetensors_comes_as_torchs_own_file(hub, tmp_path, variant, weights):
    one = hub(SD15)
    fetch(("unet",), variant=variant)
    assert [name for name in one.downloaded if not name.endswith((".json", ".txt"))] == weights
    one.reachable = False  # hours later
    full.complete_pipeline("owner/model", tmp_path / "out", trained=["unet"], revision="abc", variant=variant)
    assert runs.files(tmp_path / "out/safety_checker") == ["config.json", Path(weights[0]).name.replace(".fp16", "")]
    assert runs.files(tmp_path / "out/feature_extractor") == ["preprocessor_config.json"] and not (tmp_path / "out/vae_encoder").exists()
    assert json.loads((tmp_path / "out/model_index.json").read_text())["feature_extractor"] == ["library", "Class"]


def test_after_the_training_nothing_is_asked_of_the_hub(hub, tmp_path):
    one = hub(SD35)
    fetch()
    asked = one.asked
    full.complete_pipeline("owner/model", tmp_path / "out", trained=["transformer"], revision="abc")
    assert one.asked == asked and (tmp_path / "out/text_encoder_3/model-00002-of-00002.safetensors").is_file()
    shutil.rmtree(one.cache)  # a cache that was emptied meanwhile is filled again
    full.complete_pipeline("owner/model", tmp_path / "again", trained=["transformer"], revision="abc")
    assert one.asked > asked and runs.files(tmp_path / "again") == runs.files(tmp_path / "out")


def test_parts_that_cannot_be_had_are_refused_in_one_line(hub):
    one = hub(SD35)
    one.reachable = False
    line = "--pretrained_model_name_or_path owner/model: its parts besides transformer go into the result and cannot be downloaded: "
    with pytest.raises(ValueError, match=f"{line}the Hub could not be reached") as error:
        fetch()
    assert "\n" not in str(error.value)
    # As a run leaves the cache that found all its prompts in the text cache: small files of the encoders, a shard of T5
    for name in SD35:
        if not name.startswith(("text_encoder", "tokenizer")) or name.endswith("config.json") or "-00001-of-00002" in name:
            one.keep(name)
    lacking = "text_encoder, text_encoder_2, text_encoder_3, tokenizer, tokenizer_2, tokenizer_3"
    with pytest.raises(ValueError, match=f"owner/model: {lacking} would be missing in the result.* hf download owner/model"):
        fetch()


def test_of_parts_that_are_published_as_a_variant_alone_its_flag_is_named(hub):
    """Both CLIPs in fp16 only, T5 in both forms."""
    one = hub([name for name in SD35 if name not in ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors")])
    line = "owner/model: text_encoder, text_encoder_2 would be missing in the result: they are published as fp16 alone; add --variant fp16"
    with pytest.raises(ValueError, match=line):
        fetch()
    one.reachable = False  # nobody can tell what is published
    with pytest.raises(ValueError, match="text_encoder, text_encoder_2 would be missing in the result, as the copy in this machine's"):
        fetch()
    one.reachable = True
    fetch(variant="fp16")
    assert {"text_encoder/model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors"} < set(one.downloaded)


def test_files_of_a_variant_that_an_earlier_run_fetched_do_not_pass_for_the_plain_ones(hub, tmp_path):
    one = hub(SD15)
    fetch(("unet",), variant="fp16")
    assert "safety_checker/model.fp16.safetensors" in one.downloaded and "safety_checker/pytorch_model.bin" not in one.downloaded
    fetch(("unet",))
    full.complete_pipeline("owner/model", tmp_path / "out", trained=["unet"], revision="abc")
    assert runs.files(tmp_path / "out/safety_checker") == ["config.json", "pytorch_model.bin"]
    assert runs.files(tmp_path / "out/text_encoder") == ["config.json", "pytorch_model.bin"]


def test_parts_that_are_gone_after_the_training_do_not_hide_that_its_weights_are_saved(hub, tmp_path):
    one = hub(SD35)
    fetch()
    shutil.rmtree(one.cache)
    one.reachable = False
    words = f"error: weights are saved in {tmp_path / 'out'}; .* owner/model: .*could not be reached.*hf download owner/model"
    with pytest.raises(SystemExit, match=words) as stop:
        full.complete_pipeline("owner/model", tmp_path / "out", trained=["transformer"], revision="abc")
    assert "\n" not in str(stop.value)


def test_random_weights_are_those_of_the_seed_and_of_the_same_shapes(tiny_sd3_folder, transformer):
    def draw(seed):
        torch.manual_seed(seed)
        return sd3.random_transformer(tiny_sd3_folder, dtype=torch.float32, device="cpu").state_dict()

    first = draw(0)
    runs.assert_identical(first, draw(0))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in transformer.state_dict().items()}
    assert not torch.equal(first["proj_out.weight"], draw(1)["proj_out.weight"])
    assert sd3.block_count(Path(tiny_sd3_folder)) == 3 and sd3.block_count("owner/model") is None
