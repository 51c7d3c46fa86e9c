"""The tensor cache: nothing stale is ever found, nothing half-written is ever read, and a kill costs the batch in hand only."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from src.data.cache import NotFinite, TensorCache, Unwritable, fill, fingerprint, folder_fingerprint

ROOT = Path(__file__).parent.parent


def make(folder: Path, kind: str = "latents", **described: object) -> TensorCache:
    return TensorCache(folder, kind, {"vae": "abc", **described})


def entry(key: str) -> dict[str, torch.Tensor]:
    """An entry that anybody can recompute from its key."""
    return {"mean": torch.full((2, 3), float(len(key))), "std": torch.arange(4, dtype=torch.bfloat16)}


def compute(keys: list[str]) -> list[dict[str, torch.Tensor]]:
    return [entry(key) for key in keys]


def files(cache: TensorCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.safetensors"))


# --------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_depends_on_names_and_values_but_not_on_their_order():
    assert fingerprint(a=1, b="x") == fingerprint(b="x", a=1)
    different = [fingerprint(**named) for named in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {})]
    assert len(set(different)) == len(different) and all(len(f) == 16 and int(f, 16) >= 0 for f in different)


def test_a_value_without_a_canonical_text_is_refused():
    with pytest.raises(TypeError):
        fingerprint(a=object())
    with pytest.raises(ValueError):
        fingerprint(a=float("nan"))


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    for part in ("vae", "text_encoder"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text('{"scaling_factor": 1.5}')
        (folder / part / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    return folder


def test_a_model_folder_is_known_wherever_it_lies_and_whenever_it_was_copied(model, tmp_path):
    before = folder_fingerprint(model, ["vae"])
    copy = tmp_path / "elsewhere" / "other name"
    shutil.copytree(model, copy)
    os.utime(copy / "vae" / "model.safetensors", (1, 1))
    (copy / "vae" / ".cache").mkdir()
    (copy / "vae" / ".cache" / "lock").write_text("left by a download")
    assert folder_fingerprint(copy, ["vae"]) == before == folder_fingerprint(str(copy), ("vae",))


def test_any_change_of_the_model_is_seen(model):
    seen = {folder_fingerprint(model, parts) for parts in (["vae"], ["vae", "text_encoder"], ["text_encoder"])}
    weights = model / "vae" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    stamp = weights.stat()
    data[12345] ^= 1  # one bit, with the same size and time
    weights.write_bytes(data)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    seen.add(folder_fingerprint(model, ["vae"]))
    (model / "vae" / "config.json").write_text('{"scaling_factor": 1.6}')
    seen.add(folder_fingerprint(model, ["vae"]))
    (model / "vae" / "extra.json").write_text("{}")
    seen.add(folder_fingerprint(model, ["vae"]))
    assert len(seen) == 6


def test_huge_weights_are_sampled_at_both_ends_and_by_size(model, monkeypatch):
    monkeypatch.setattr("src.data.cache._WHOLE", 1000)
    weights = model / "vae" / "model.safetensors"
    data = bytearray(os.urandom(3_000_000))
    seen = set()
    for change in (None, 0, len(data) - 1, "longer"):
        if change == "longer":
            data.append(0)
        elif change is not None:
            data[change] ^= 1
        weights.write_bytes(data)
        seen.add(folder_fingerprint(model, ["vae"]))
    assert len(seen) == 4


def test_a_missing_part_is_named(model):
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path.*'text_encoder_3'"):
        folder_fingerprint(model, ["vae", "text_encoder_3"])


# --------------------------------------------------------------------------- entries


@pytest.mark.parametrize("key", ["a", "", "../../etc/passwd", "日本語", "x" * 5000, "a/b\nc"])
def test_what_was_written_is_read_bit_by_bit(tmp_path, key):
    cache = make(tmp_path)
    tensors = {"embeds": torch.randn(3, 5).bfloat16(), "pooled": torch.randn(7), "n": torch.tensor([1, 2])}
    cache.write(key, tensors)
    got = make(tmp_path).read(key)  # another start
    assert got.keys() == tensors.keys()
    assert all(got[name].dtype == tensors[name].dtype and torch.equal(got[name], tensors[name]) for name in tensors)
    assert cache.file(key).is_relative_to(cache.folder) and cache.missing([key]) == []


def test_views_and_gradients_are_stored_as_values(tmp_path):
    cache = make(tmp_path)
    base = torch.randn(4, 6, requires_grad=True)
    cache.write("a", {"t": base.t()[1:3]})
    assert torch.equal(cache.read("a")["t"], base.detach().t()[1:3])


def test_missing_keeps_the_order_and_names_each_once(tmp_path):
    cache = make(tmp_path)
    cache.write("b", entry("b"))
    assert cache.missing(["c", "b", "a", "c"]) == ["c", "a"]
    with pytest.raises(KeyError, match="no entry for 'c'"):
        cache.read("c")


@pytest.mark.parametrize("change", [{"vae": "abd"}, {"resolution": 512}, {"crop": "random"}, {"dtype": "bf16"}])
def test_other_settings_find_nothing(tmp_path, change):
    make(tmp_path).write("a", entry("a"))
    assert make(tmp_path).missing(["a"]) == []
    assert make(tmp_path, **change).missing(["a"]) == ["a"]
    assert make(tmp_path, kind="text").missing(["a"]) == ["a"]


def test_the_folder_says_what_it_is(tmp_path):
    cache = make(tmp_path, resolution=512)
    assert cache.folder.name.startswith("latents-")
    assert json.loads((cache.folder / "fingerprint.json").read_text()) == {"vae": "abc", "resolution": 512}


def test_an_empty_note_is_written_again(tmp_path):
    """What a machine that lost its power can leave of a file that had just been renamed."""
    (make(tmp_path, resolution=512).folder / "fingerprint.json").write_text("")
    note = make(tmp_path, resolution=512).folder / "fingerprint.json"
    assert json.loads(note.read_text()) == {"vae": "abc", "resolution": 512}


def test_a_renamed_folder_is_refused(tmp_path):
    old, new = make(tmp_path, resolution=512), make(tmp_path, resolution=256)
    shutil.rmtree(new.folder)
    old.folder.rename(new.folder)
    with pytest.raises(ValueError, match="other settings.*delete it"):
        make(tmp_path, resolution=256)


def test_an_entry_under_another_name_is_not_believed(tmp_path):
    cache = make(tmp_path)
    cache.write("a", entry("a"))
    cache.file("b").parent.mkdir(exist_ok=True)
    shutil.copy(cache.file("a"), cache.file("b"))
    assert cache.missing(["a", "b"]) == ["b"]
    with pytest.raises(ValueError, match="damaged"):
        cache.read("b")


def damage(data: bytes) -> dict[str, bytes]:
    cut = {"empty": b"", "stub": data[:5], "header": data[:40], "tail": data[:-1]}
    return {**cut, "longer": data + b"x", "zeros": bytes(len(data)), "huge": b"\xff" * 64}


@pytest.mark.parametrize("kind", damage(b""))
def test_a_damaged_entry_is_refused_and_computed_again(tmp_path, kind):
    cache = make(tmp_path)
    cache.write("a", entry("a"))
    cache.file("a").write_bytes(damage(cache.file("a").read_bytes())[kind])
    with pytest.raises(ValueError, match="damaged; delete it"):
        cache.read("a")
    assert cache.missing(["a"]) == ["a"]
    fill(cache, ["a"], compute, batch_size=1, description="x", progress=False)
    assert torch.equal(cache.read("a")["mean"], entry("a")["mean"])


def test_a_full_disk_leaves_the_old_entry_and_says_so(tmp_path, monkeypatch):
    cache = make(tmp_path)
    cache.write("a", entry("a"))

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])  # what fits
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Unwritable, match="cannot write to the cache: No space left"):
        cache.write("a", {"mean": torch.zeros(9)})
    monkeypatch.undo()
    assert torch.equal(cache.read("a")["mean"], entry("a")["mean"]) and not list((cache.folder / "tmp").iterdir())


def test_an_entry_appears_under_its_name_by_renaming_only(tmp_path, monkeypatch):
    """Stopped just before the rename, neither a new entry nor a change of the old one is to be seen."""
    cache = make(tmp_path)
    cache.write("a", entry("a"))

    def stop(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    for key in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            cache.write(key, {"mean": torch.zeros(9)})
    assert torch.equal(cache.read("a")["mean"], entry("a")["mean"]) and cache.missing(["a", "b"]) == ["b"]
    assert files(cache) == [cache.file("a")] and not list((cache.folder / "tmp").iterdir())


def test_what_killed_writers_left_is_removed_but_not_what_is_being_written(tmp_path):
    cache = make(tmp_path)
    old, young = cache.folder / "tmp" / "1-old", cache.folder / "tmp" / "2-young"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    make(tmp_path)
    assert not old.exists() and young.exists()


# --------------------------------------------------------------------------- filling


def test_fill_computes_batches_of_all_keys_in_which_one_is_missing(tmp_path):
    cache = make(tmp_path)
    for key in "bef":
        cache.write(key, entry(key))
    before, calls = cache.file("b").stat().st_mtime_ns, []
    done = fill(cache, list("abcadefg"), lambda keys: calls.append(keys) or compute(keys), batch_size=2, description="x", progress=False)
    assert calls == [["a", "b"], ["c", "d"], ["g"]] and done == 4
    assert cache.file("b").stat().st_mtime_ns == before  # what is there stays
    assert fill(cache, list("abcdefg"), pytest.fail, batch_size=3, description="x", progress=False) == 0  # all is there


@pytest.mark.parametrize("written", range(1, 7))
def test_an_interrupted_filling_ends_with_the_same_entries(tmp_path, written, monkeypatch):
    """Values that depend on the batch, as those of real kernels do in their last bits; stopped after 1 to 6 of 7 entries."""

    def compute(keys):
        return [{"mean": torch.tensor([float(len(keys)), float(ord(key))])} for key in keys]

    def finish(folder):
        fill(make(folder), list("abcdefg"), compute, batch_size=3, description="x", progress=False)
        return {key: make(folder).read(key)["mean"].tolist() for key in "abcdefg"}

    write, left = TensorCache.write, iter([True] * written)

    def write_or_stop(cache, key, tensors):
        if not next(left, False):
            raise KeyboardInterrupt
        write(cache, key, tensors)

    whole = finish(tmp_path / "whole")
    monkeypatch.setattr(TensorCache, "write", write_or_stop)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "stopped")
    monkeypatch.undo()
    assert finish(tmp_path / "stopped") == whole


def test_batches_keep_groups_apart(tmp_path):
    calls = []

    def note(keys):
        calls.append(keys)
        return compute(keys)

    fill(make(tmp_path), ["s1", "w1", "s2", "w2", "s3"], note, batch_size=2, description="x", group=lambda key: key[0], progress=False)
    assert calls == [["s1", "s2"], ["s3"], ["w1", "w2"]]


def test_stopped_by_an_error_it_goes_on_where_it_stopped(tmp_path):
    keys = [f"k{i}" for i in range(10)]
    seen = []

    def breaks(batch):
        if len(seen) >= 4:
            raise RuntimeError("out of memory")
        seen.extend(batch)
        return compute(batch)

    with pytest.raises(RuntimeError):
        fill(make(tmp_path), keys, breaks, batch_size=2, description="x", progress=False)
    rest = []
    fill(make(tmp_path), keys, lambda batch: rest.extend(batch) or compute(batch), batch_size=2, description="x", progress=False)
    assert seen == keys[:4] and rest == keys[4:]


def test_ranks_share_the_work_whenever_they_look(tmp_path):
    """Rank 1 looks after rank 0 has finished: a share of the *missing* keys would then leave keys to nobody."""
    keys = [f"k{i}" for i in range(7)]
    done = [[], []]
    for rank in (0, 1):
        options = {"batch_size": 2, "description": "x", "rank": rank, "world": 2, "progress": False}
        fill(make(tmp_path), keys, lambda batch, rank=rank: done[rank].extend(batch) or compute(batch), **options)
    assert done == [keys[0::2], keys[1::2]] and make(tmp_path).missing(keys) == []


def test_what_belongs_together_is_one_ranks_share(tmp_path):
    """a and b, the first and the third of three, are rank 0's, wherever their keys stand; rank 1 looks when all is there but b1."""
    keys = ["a0", "c0", "a1", "b0", "b1", "c1"]
    done = [[], []]
    for rank in (0, 1):
        options = {"batch_size": 2, "description": "x", "rank": rank, "world": 2, "progress": False, "together": lambda key: key[0]}
        fill(make(tmp_path), keys, lambda batch, rank=rank: done[rank].extend(batch) or compute(batch), **options)
        make(tmp_path).file("b1").unlink() if rank == 0 else None
    assert done == [["a0", "a1", "b0", "b1"], ["c0", "c1"]]  # the share is cut from all keys, not from the missing ones


def test_nan_is_never_cached(tmp_path):
    """An fp16 VAE that overflows would otherwise poison every later run."""
    cache = make(tmp_path)
    for named, options in (("'a'", {}), ("cat.png", {"named": {"a": "cat.png"}.get})):
        with pytest.raises(NotFinite, match=f"mean of {named} holds NaN.*--mixed_precision"):
            poisoned = [{"mean": torch.tensor([1.0, float("inf")])}]
            fill(cache, ["a"], lambda keys, p=poisoned: p, batch_size=1, description="x", progress=False, **options)
    assert cache.missing(["a"]) == ["a"]


def test_a_bar_shows_only_where_there_is_work(tmp_path, capsys):
    for _ in range(2):
        fill(make(tmp_path), ["a", "b"], compute, batch_size=1, description="cache latents")
    assert capsys.readouterr().err.count("2/2") == 1


# --------------------------------------------------------------------------- other processes

WRITER = """
import sys, time, torch
from src.data.cache import Unwritable, TensorCache, fill
folder, count, pause, size = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
cache = TensorCache(folder, "latents", {"vae": "abc"})
def compute(keys):
    time.sleep(pause)
    return [{"mean": torch.full((size,), float(key[1:]))} for key in keys]
fill(cache, [f"k{i}" for i in range(count)], compute, batch_size=1, description="x", progress=False)
"""


def writer(folder: Path, count: int, pause: float, size: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(count), str(pause), str(size)], cwd=ROOT, env=environment)


@pytest.mark.slow
def test_killed_while_filling_it_computes_only_the_rest(tmp_path):
    """SIGKILL at a random place in a stream of 4 MB writes: whatever has its final name is whole."""
    keys, size = [f"k{i}" for i in range(200)], 1_000_000
    process = writer(tmp_path, len(keys), 0.005, size)
    try:
        deadline = time.monotonic() + 120
        while len(files(TensorCache(tmp_path, "latents", {"vae": "abc"}))) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    cache = make(tmp_path)
    there = [key for key in keys if cache.file(key).exists()]
    assert 5 <= len(there) < 200 and there == keys[: len(there)]
    assert cache.missing(keys) == keys[len(there) :]  # every file under its final name is whole
    rest = []

    def quick(batch):
        rest.extend(batch)
        return [{"mean": torch.full((10,), float(key[1:]))} for key in batch]

    fill(cache, keys[:60], quick, batch_size=4, description="x", progress=False)
    assert rest == keys[len(there) // 4 * 4 : 60]  # from the batch on in which it was killed
    assert all(torch.equal(cache.read(key)["mean"], torch.full((size,), float(key[1:]))) for key in there[:5])


@pytest.mark.slow
def test_two_writers_at_once_do_not_disturb_each_other(tmp_path):
    both = [writer(tmp_path, 60, 0.0, 50_000) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    cache = make(tmp_path)
    assert cache.missing(f"k{i}" for i in range(60)) == [] and len(files(cache)) == 60
    assert all(torch.equal(cache.read(f"k{i}")["mean"], torch.full((50_000,), float(i))) for i in range(60))
    assert not list((cache.folder / "tmp").iterdir())
    with safe_open(files(cache)[0], "pt") as file:  # any safetensors reader opens an entry
        assert file.metadata()["key"].startswith("k")
