"""Tensors on disk, in a folder named by what they were computed with: a stale cache is never found, so never used.

Three things guard an entry. The folder's name is a fingerprint of everything that all entries share (model files, sequence length,
precision); the entry's name is a hash of its own input (a picture's bytes, size and orientation, or a prompt); and the entry itself
repeats its key. Entries are written to a temporary name and renamed: a kill leaves complete entries and missing ones, no partial ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_WHOLE = 512 * 2**20  # bytes: larger weight files are sampled; SD3.5's CLIP-L and VAE are smaller, in half precision
_BLOCKS, _BLOCK = 256, 4096
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack")
_ABANDONED = 3600  # seconds after which a temporary file is taken for the remains of a killed process


def fingerprint(**named: object) -> str:
    """16 hex digits of the SHA-256 of the values as canonical JSON.

    Raises:
        TypeError, ValueError: for a value that JSON cannot hold, or NaN: its text might differ from one run to the next.
    """
    text = json.dumps(named, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_fingerprint(path: Path | str, subfolders: Iterable[str]) -> str:
    """A hash of the content of a model folder, independent of its place and of file times.

    All files count by name and content, but weight files above 512 MB only by size and 256 evenly spaced blocks of 4 KB: reading
    10 GB would take as long as the caches save. Hidden files, such as downloads leave behind, do not count.

    Raises:
        ValueError: if a subfolder is missing or empty.
    """
    digest = hashlib.sha256()
    for name in sorted(subfolders):
        folder = Path(path) / name
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not _hidden(file.relative_to(folder)))
        if not files:
            raise ValueError(f"--pretrained_model_name_or_path {path}: its part {name!r} is missing or empty")
        for file in files:
            digest.update(f"{name}/{file.relative_to(folder).as_posix()}:{file.stat().st_size};".encode())
            _add_content(digest, file)
    return digest.hexdigest()[:16]


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _add_content(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE or file.suffix not in _WEIGHTS:
            while part := stream.read(2**20):
                digest.update(part)
            return
        for number in range(_BLOCKS):
            stream.seek((size - _BLOCK) * number // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))


# --------------------------------------------------------------------------- the cache


class Unwritable(OSError):
    """An entry could not be written: the disk is full, or was disconnected."""


class NotFinite(ValueError):
    """A computed tensor holds NaN or infinity."""


class TensorCache:
    """Named tensors by key, in root/KIND-FINGERPRINT; fingerprint.json there says what the fingerprint stands for.

    Several processes may write at once: whoever renames last wins, with the same content.

    Raises:
        ValueError: if the folder describes something else than its name says (somebody renamed or edited it).
    """

    def __init__(self, root: Path | str, kind: str, described_by: dict[str, object]):
        self.folder = Path(root) / f"{kind}-{fingerprint(**described_by)}"
        self._temporary = self.folder / "tmp"
        self._temporary.mkdir(parents=True, exist_ok=True)
        for left in self._temporary.iterdir():  # by killed writers; files of running writers are recent
            try:
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink()
            except FileNotFoundError:
                continue  # its writer has just renamed it
        description = json.dumps(described_by, sort_keys=True, indent=1) + "\n"
        note = self.folder / "fingerprint.json"
        try:
            found = json.loads(note.read_text())
        except (FileNotFoundError, ValueError):  # a machine that lost its power leaves an empty file; the folder's name says as much
            self._put(description.encode(), note)
        else:
            if found != json.loads(description):
                raise ValueError(f"the cache {self.folder} was made with other settings than its name says; delete it")

    def file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without an intact entry, each once and in order: to be computed and written."""
        return [key for key in dict.fromkeys(keys) if not self._intact(key)]

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Stores the tensors as they are, dtype included.

        Raises:
            Unwritable: for example on a full disk; an earlier entry stays intact.
        """
        from safetensors.torch import save

        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata={"key": key})
        self._put(data, self.file(key))

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry.

        Raises:
            KeyError: if there is none: fill the cache first.
            ValueError: if its file is damaged; `missing` reports it, so that the next start computes it again.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = self.file(key).read_bytes()
            tensors = load(data)  # refuses a file of another length than its header states
        except FileNotFoundError:
            raise KeyError(f"{self.folder.name} has no entry for {key!r}: hand over all that the run reads before its first step") from None
        except SafetensorError:
            tensors = None
        header = {} if tensors is None else json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if header.get("__metadata__", {}).get("key") != key:
            raise ValueError(f"the cache file {self.file(key)} is damaged; delete it and start again")
        return tensors

    def _intact(self, key: str) -> bool:
        """Whether there is a whole file of this key; cheap, as the tensors are not read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file(key), framework="pt") as entry:
                return (entry.metadata() or {}).get("key") == key
        except (FileNotFoundError, SafetensorError):
            return False

    def _put(self, data: bytes, target: Path) -> None:
        temporary = self._temporary / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            target.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(target)
        except OSError as error:
            raise Unwritable(error.errno, f"cannot write to the cache: {error.strerror}", str(target)) from error
        finally:
            temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------- filling it


def fill(
    cache: TensorCache,
    keys: Sequence[str],
    compute: Callable[[list[str]], Sequence[dict[str, Tensor]]],
    *,
    batch_size: int,
    description: str,
    rank: int = 0,
    world: int = 1,
    group: Callable[[str], Hashable] | None = None,
    together: Callable[[str], Hashable] | None = None,
    named: Callable[[str], str] = repr,
    progress: bool = True,
) -> int:
    """Computes and writes the missing entries of `keys`; returns how many this process computed.

    Entries are written as soon as their batch is done; after an interruption the next call computes the rest. Batches are cut from all
    keys, and a batch with a missing entry is computed in full: rounding depends on the batch size, so this gives an entry the same bits
    with and without interruptions.
    Several processes share the work by `rank` and `world`; all must wait for each other before they read.

    Args:
        compute: up to `batch_size` keys -> as many entries.
        group: only keys with the same value may share a batch (the size of a picture); None: all may.
        together: keys with the same value go to the same process (both orientations of a picture); None: each on its own.
        named: what an error calls a key.

    Raises:
        NotFinite: a computed tensor holds NaN or infinity, which would otherwise come back in every epoch of every run.
    """
    from tqdm import tqdm

    # Shares are cut from all keys, not from the missing ones: a process that looks a moment later finds fewer missing.
    parts: dict[Hashable, list[str]] = {}
    for key in dict.fromkeys(keys):
        parts.setdefault(together(key) if together else key, []).append(key)
    groups: dict[Hashable, list[str]] = {}
    for key in itertools.chain.from_iterable(list(parts.values())[rank::world]):
        groups.setdefault(group(key) if group else None, []).append(key)
    missing = set(cache.missing(itertools.chain.from_iterable(groups.values())))
    with tqdm(total=len(missing), desc=description, unit="", disable=not progress or not missing) as bar:
        for members in groups.values():
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                wanted = missing.intersection(batch)
                if not wanted:
                    continue
                for key, tensors in zip(batch, compute(batch), strict=True):
                    if key in wanted:
                        _check_finite(named(key), tensors)
                        cache.write(key, tensors)
                bar.update(len(wanted))
    return len(missing)


def _check_finite(entry: str, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NotFinite(f"{name} of {entry} holds NaN or infinity and is not cached; try --mixed_precision bf16 or no")
