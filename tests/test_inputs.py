"""Embeddings of prompts on their way from the cache to the device, and one scan for all processes."""

import json
import pickle
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch

import train_text_to_image_lora_sd3 as script
from src import inputs, runtime
from src.data import buckets, captions, preferences, samples, sources
from src.data.cache import TensorCache
from src.pipelines import common, sd3


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


# --------------------------------------------------------------------------- what the flags reach


def test_every_flag_of_the_data_reaches_its_reader(tmp_path, monkeypatch):
    seen = []

    def reader(*given, **named):
        seen.append((*given, named))
        return SimpleNamespace(records=[])

    monkeypatch.setattr(captions, "open_captioned", reader)
    monkeypatch.setattr(preferences, "open_preferences", reader)
    args = arguments(
        tmp_path, tmp_path, strict_data=True, max_train_samples=7, dataset_revision="v2", image_column="photo", caption_column="words",
        num_validation_loss_images=0, num_validation_pairs=0, chosen_column="good", rejected_column="bad", label_column="which",
    )  # fmt: skip
    inputs.open_images(args, default_prompt="a dog")
    inputs.open_pairs(args)
    both = dict(cache_dir=tmp_path / "cache", max_train_samples=7, strict=True, revision="v2")
    assert seen == [
        (str(tmp_path), both | dict(image_column="photo", caption_column="words", default_prompt="a dog")),
        (str(tmp_path), preferences.Columns("good", "bad", "which", "words"), both),
    ]


def test_the_loader_gets_this_processs_part_of_the_steps_that_are_left(monkeypatch):
    """The second of two processes, 2 passes of 2 samples a step, positions from 8 on: of 8 + 0..7 it has 8 + 2..3 and 8 + 6..7.

    The script gets whole batches on its device, masks too.
    """

    class Batch:
        def __init__(self, keys):
            self.keys = [(key.step, key.position) for key in keys]

        def to(self, device):
            self.device = device
            return self

    args = Namespace(train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=5, dataloader_num_workers=3)
    run = SimpleNamespace(args=args, rank=1, world=2, device=torch.device("cuda"))
    order, made = buckets.Order([(16, 16)] * 8, 8, seed=0), []
    data = inputs.Inputs(run, sd3, encoders=None, training="pictures", held_out=[], order=order, text=None, sequence_length=16,
                         first_position=8)  # fmt: skip
    monkeypatch.setattr(samples, "loader", lambda what, sampler, **named: made.append((what, named)) or map(Batch, sampler))
    found = list(data.batches(3))
    assert made == [("pictures", dict(num_workers=3, pin_memory=True))] and {batch.device for batch in found} == {run.device}
    assert [batch.keys for batch in found] == [[(step, first), (step, first + 1)] for step in (3, 4) for first in (10, 14)]


# --------------------------------------------------------------------------- several processes


class Process:
    """One of two; what the main one broadcasts reaches the other one as torch.distributed sends it: pickled."""

    from_main, require = runtime.Run.from_main, runtime.Run.require

    def __init__(self, sent: list[bytes], is_main: bool):
        self.sent, self.is_main = sent, is_main

    def broadcast(self, value):
        if self.is_main:
            self.sent.append(pickle.dumps(value))
            return value
        return pickle.loads(self.sent.pop(0))


def opened(monkeypatch, prepare, args: Namespace) -> list:
    """What training and validation have on the main process and on the other one, whose every reading of a picture fails."""
    monkeypatch.setattr(inputs, "_prepare", lambda run, args, family, kind, parts, pictures, name: parts)
    sent, found = [], []
    found.append(prepare(Process(sent, True), args, None))
    with monkeypatch.context() as blind:
        blind.setattr(sources.Folder, "read", lambda *_: pytest.fail("read again"))
        found.append(prepare(Process(sent, False), args, None))
    return found


def test_what_is_skipped_is_listed_and_a_list_of_an_earlier_start_does_not_stay(tmp_path):
    """Of a subject's pictures and of its class, as DreamBooth has them: in one list."""
    run = SimpleNamespace(is_main=True, output_dir=tmp_path, print=print)
    inputs.list_skipped(run, SimpleNamespace(skipped=["a.png: empty"]), SimpleNamespace(skipped=["b.png: no caption"]))
    assert (tmp_path / "skipped.txt").read_text() == "a.png: empty\nb.png: no caption\n"
    inputs.list_skipped(run, SimpleNamespace(skipped=[]))
    assert not (tmp_path / "skipped.txt").exists()


def arguments(folder: Path, tmp_path: Path, **changes) -> Namespace:
    flags = dict(dataset_name=str(folder), image_column="image", caption_column="text", cache_dir=tmp_path / "cache", strict_data=False)
    return Namespace(**flags | dict(max_train_samples=None, dataset_revision=None, num_validation_loss_images=2) | changes)


def test_only_the_main_process_looks_at_the_pictures(tmp_path, monkeypatch, capsys):
    """A read that failed on another one would leave it with one picture fewer, and from there on with other batches."""
    folder = runs.make_pictures(tmp_path / "pictures")
    (folder / "5.png").write_bytes(b"broken")
    main, other = opened(monkeypatch, inputs.prepare, arguments(folder, tmp_path))
    assert [len(part) for part in main] == [5, 2]
    for here, there in zip(main, other, strict=True):
        assert there.records == here.records and there.skipped == here.skipped and len(there.skipped) == 1
        assert there.column_names == here.column_names
        assert [there.image(i).tobytes() for i in range(len(there))] == [here.image(i).tobytes() for i in range(len(here))]
    assert capsys.readouterr().out.count("7 captioned picture(s)") == 1


def test_only_the_main_process_looks_at_the_pairs(tmp_path, monkeypatch):
    folder = runs.make_pictures(tmp_path / "pictures")
    lines = [f'{{"jpg_0": "{i}.png", "jpg_1": "{7 - i}.png", "caption": "pair {i}", "label_0": 1}}\n' for i in range(4)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    columns = dict(chosen_column="jpg_0", rejected_column="jpg_1", label_column="label_0", caption_column="caption")
    args = arguments(folder, tmp_path, num_validation_pairs=1, **columns)
    main, other = opened(monkeypatch, inputs.prepare_pairs, args)
    for here, there in zip(main, other, strict=True):
        assert there.records == here.records and there.ties == here.ties
        assert there.images(0)[1].tobytes() == here.images(0)[1].tobytes()


def test_one_picture_in_twenty_is_held_out_however_many_captions_it_has(tmp_path):
    """20 pictures with 3 captions each: one of them, with its three rows. A single picture: none, without a word."""
    folder = runs.make_pictures(tmp_path / "pictures", 20)
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"caption {n} of {i}"}) for i in range(20) for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    train, held_out = inputs.open_images(arguments(folder, tmp_path, num_validation_loss_images=None))
    assert (len(train), len(held_out)) == (57, 3) and len({record.key for record in held_out.records}) == 1
    (folder / "metadata.jsonl").write_text("\n".join(lines[:1] * 25))
    assert inputs.open_images(arguments(folder, tmp_path, num_validation_loss_images=None))[1] is None


def test_pairs_of_one_caption_hold_none_out_unless_asked(tmp_path):
    folder = runs.make_pictures(tmp_path / "pictures")
    row = {"jpg_0": "0.png", "jpg_1": "1.png", "caption": "one", "label_0": 1}
    (folder / "metadata.jsonl").write_text("\n".join([json.dumps(row)] * 40))
    columns = dict(chosen_column="jpg_0", rejected_column="jpg_1", label_column="label_0", caption_column="caption")
    train, held_out = inputs.open_pairs(arguments(folder, tmp_path, num_validation_pairs=None, **columns))
    assert len(train) == 40 and held_out is None
    with pytest.raises(ValueError, match="--num_validation_pairs 2: .*lower it"):
        inputs.open_pairs(arguments(folder, tmp_path, num_validation_pairs=2, **columns))


def test_what_the_main_process_refuses_all_refuse(tmp_path):
    sent = []
    for is_main in (True, False):
        with pytest.raises(SystemExit, match="error: --dataset_name .*nowhere.* does not exist"):
            inputs.prepare(Process(sent, is_main), arguments(tmp_path / "nowhere", tmp_path))


def test_a_part_that_is_not_loaded_does_not_name_the_cache(tiny_sd3_folder, tmp_path):
    """[null, null] in model_index.json switches T5 off, and its embeddings with it, whether or not its folder is still there."""
    model = shutil.copytree(tiny_sd3_folder, tmp_path / "model")
    args, file = Namespace(pretrained_model_name_or_path=str(model)), model / "model_index.json"

    def found():
        return inputs.fingerprint(args, *inputs.TEXT_FOLDERS)

    complete, index = found(), json.loads(file.read_text())
    file.write_text(json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    without = found()
    assert without != complete
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(model / name)
    assert found() == without


def test_a_cache_is_named_by_all_that_its_entries_depend_on_and_by_nothing_else(tiny_sd3_folder, tmp_path):
    """Latents by the VAE, embeddings by encoders, tokenizers and the number of tokens, both by variant and precision."""

    def names(model=tiny_sd3_folder, dtype=torch.float32, **changes):
        run = SimpleNamespace(weight_dtype=dtype, device="cpu", rank=0, world=1, is_main=True, barrier=lambda: None)
        flags = dict(pretrained_model_name_or_path=str(model), variant=None, max_sequence_length=16, cache_dir=tmp_path, no_hflip=True)
        args, nothing = Namespace(**flags | dict(cache_batch_size=1) | changes), SimpleNamespace(records=[], image=None)
        latents = inputs._latent_cache(run, args, sd3, [nothing, nothing], [[], []], None)
        return inputs.prepare_texts(run, args, []).cache.folder.name, latents.folder.name

    def changed(part: str) -> Path:
        model = shutil.copytree(tiny_sd3_folder, tmp_path / f"other {part}")
        file = next((model / part).glob("*.json"))
        file.write_text(file.read_text() + "\n")
        return model

    others = {
        "both": [dict(variant="fp16"), dict(dtype=torch.bfloat16)],
        "text": [dict(max_sequence_length=8), *(dict(model=changed(part)) for part in ("text_encoder", "text_encoder_3", "tokenizer_2"))],
        "latents": [dict(model=changed("vae"))],
        "neither": [dict(model=changed("transformer")), dict(cache_batch_size=4), dict(no_hflip=False)],
    }
    plain = names()
    for which, changes in others.items():
        for change in changes:
            found = tuple(one != other for one, other in zip(names(**change), plain, strict=True))
            assert found == (which in ("both", "text"), which in ("both", "latents")), change


def test_a_model_of_the_hub_names_the_caches_by_the_commit_of_its_revision(monkeypatch):
    snapshots = {"v2": "/hub/snapshots/1a2b", None: "/hub/snapshots/3c4d"}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, *, revision=None, allow_patterns: snapshots[revision])
    args = Namespace(pretrained_model_name_or_path="owner/model", revision="v2")
    assert inputs.fingerprint(args, "vae") == "owner/model@1a2b"


# --------------------------------------------------------------------------- another data set than that of the checkpoint


@pytest.mark.slow
def test_a_resumed_run_says_that_the_data_set_is_another_and_goes_on(tiny_sd3_folder, tmp_path, capsys):
    """Steps 1 and 2 with eight pictures, 3 with the same, 4 with a new caption, 5 without the last picture, 6 from an older checkpoint."""
    world = runs.make_world(tiny_sd3_folder, tmp_path)
    flags = dict(rank=2, checkpointing_steps=1, train_batch_size=2, resume_from_checkpoint="latest")
    metadata, said = world.data / "metadata.jsonl", []
    for steps in (2, 3, 4, 5, 6):
        text = metadata.read_text()
        if steps == 4:
            metadata.write_text(text.replace("aaa picture", "another picture"))
        elif steps == 5:
            metadata.write_text("\n".join(text.splitlines()[:-1]))
        elif steps == 6:
            metadata.write_text(text.replace("bbb picture", "one more"))
            (tmp_path / "run" / "checkpoint-5" / inputs.Identity.FILE).unlink()
        runs.train(script, world.argv(tmp_path / "run", **flags, max_train_steps=steps))
        said.append([line for line in capsys.readouterr().out.splitlines() if "data set" in line])
    assert said[0] == said[1] == said[4] == []
    assert said[2] == ["the data set is not the checkpoint's: 8 samples as before, but other pictures, captions or another order"]
    assert said[3] == ["the data set is not the checkpoint's: 7 samples to train on, 8 before"]
    assert json.loads((tmp_path / "run" / "checkpoint-6" / inputs.Identity.FILE).read_text())["samples"] == 7


# --------------------------------------------------------------------------- prompts that CLIP does not read to their end


def test_prompts_longer_than_clip_reads_are_counted_and_the_first_is_named(tiny_sd3_folder):
    """CLIP's begin and end of the text are two of its 16 tokens: 14 words of one token fit, the fifteenth does not."""
    tokenizer = sd3.load(tiny_sd3_folder, parts=("text",)).tokenizers[0]
    assert len(tokenizer("a " * 14).input_ids) == 16
    assert common.long_prompts(tokenizer, ["", "a " * 14], t5=True) is common.long_prompts(tokenizer, [], t5=True) is None
    note = "note: 2 of 3 prompts have more than CLIP's 16 tokens, the first begins 'a a a a a a a a a a a a a a a'; "
    prompts = ["a", "a\n" * 15, "a " * 500]
    assert common.long_prompts(tokenizer, prompts, t5=True) == note + "T5 alone reads the rest"
    assert common.long_prompts(tokenizer, prompts, t5=False) == note + "the rest is not read"


@pytest.mark.slow
def test_training_says_which_captions_clip_cuts_once_when_they_are_encoded(tiny_sd3_folder, tmp_path, capsys):
    world = runs.make_world(tiny_sd3_folder, tmp_path)
    metadata = world.data / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("aaa picture", "aaa " * 20 + "picture"))
    said = []
    for name in ("first", "second"):
        runs.train(script, world.argv(tmp_path / name, rank=2, max_train_steps=1))
        said.append([line for line in capsys.readouterr().out.splitlines() if "CLIP" in line])
    assert len(said[0]) == 1 and "have more than CLIP's 16 tokens" in said[0][0] and "T5 alone reads the rest" in said[0][0]
    assert said[1] == []  # the cache has them
