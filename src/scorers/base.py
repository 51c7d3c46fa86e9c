"""A scorer's declaration, the places of its weights, and the result of a mixture of scorers. Loads nothing, not even torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import hub

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Judge = Callable[[Tensor, list[str], list[dict] | None], Tensor]  # images (b, 3, H, W) in [0, 1], prompts, metadata -> (b,) float32

MODELS = Path("models")  # where scripts/download.sh puts weights


@dataclass(frozen=True)
class Scores:
    """Verdicts on b pictures.

    Attributes:
        total: (b,) float32, the sum over the parts of weight * part / normalizer; NaN where a part is NaN.
        parts: by scorer name (b,) float32, each on the scorer's own scale; NaN: this picture could not be judged.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """Files that the user downloads.

    Attributes:
        folder: name below models/, searched first, and the name for `scripts/download.sh`; or an absolute path that an option gave.
        files: required files, by their paths in the folder and on the Hub alike; "a|b": either of them, a first.
        hub_id: repository searched second; None: there is none.
        by_hand: how to get them, where scripts/download.sh does not know the folder.
    """

    folder: str
    files: tuple[str, ...]
    hub_id: str | None = None
    by_hand: str = ""

    @property
    def local(self) -> Path | None:
        """The folder below models/, if it holds all the files."""
        return None if self._absent() else MODELS / self.folder

    @property
    def cached(self) -> bool:
        """Whether the Hub's own cache on this machine holds all the files."""
        from huggingface_hub import try_to_load_from_cache

        def have(name: str) -> bool:
            return isinstance(try_to_load_from_cache(self.hub_id, name), str)

        return self.hub_id is not None and all(any(map(have, names.split("|"))) for names in self.files)

    @property
    def source(self) -> str:
        """What transformers' `from_pretrained` takes: the local folder, else the Hub id.

        Raises:
            ValueError: the weights are in neither place.
        """
        if reason := self.missing():
            raise ValueError(reason)
        return str(self.local or self.hub_id)

    def _absent(self) -> list[str]:
        """Files that the local folder does not have."""
        folder = MODELS / self.folder
        return [names for names in self.files if not any((folder / name).is_file() for name in names.split("|"))]

    def missing(self) -> str | None:
        """What to do before these weights can be loaded; None if they are here, or can be downloaded from the Hub."""
        from huggingface_hub import constants

        if self.local or self.cached or (self.hub_id and not constants.HF_HUB_OFFLINE):
            return None
        absent = self._absent()[0].replace("|", " or ")
        return f"weights are missing: {MODELS / self.folder} has no {absent}; {self.cure}"

    @property
    def cure(self) -> str:
        """How to get them."""
        return self.by_hand or f"run bash scripts/download.sh {self.folder}"

    def path(self, names: str) -> Path:
        """One of `files` on this machine: below models/, else from the Hub's cache, else downloaded there.

        Raises:
            ValueError: it is in none of these places, or the Hub cannot be reached.
        """
        source, choices = self.source, names.split("|")
        if folder := self.local:
            return next(folder / name for name in choices if (folder / name).is_file())
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        refusals = []
        for name in choices:  # all of them: offline, a file that is not in the cache fails, while the next one may be there
            try:
                return Path(hf_hub_download(source, name))
            except hub.errors() as error:
                refusals.append(error)
        if trouble := next((error for error in refusals if not isinstance(error, RemoteEntryNotFoundError)), None):
            raise ValueError(f"{source} on the Hub: {hub.reason(trouble)}; {self.cure}") from trouble
        raise ValueError(f"{source} on the Hub has no {' or '.join(choices)}")


@dataclass(frozen=True)
class Option:
    """A setting of one scorer, which is also a command-line flag of that name (src/cli/scorers.py).

    Attributes:
        default: what it is when unset.
        choices: the values that are allowed; empty: any.
        required: the scorer cannot work without it.
    """

    name: str
    default: Any = None
    choices: tuple[Any, ...] = ()
    required: bool = False


@dataclass(frozen=True)
class Loader:
    """The argument of `Scorer.load`.

    Attributes:
        device: where networks go.
        dtype: of the weights of large networks; heads and scores are fp32.
        options: every option that the scorer declares, defaults filled in.
        loaded: what the scorers of this mixture share; accessed through `once`.
    """

    device: torch.device
    dtype: torch.dtype
    options: Mapping[str, Any]
    loaded: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of `make`, called once per key and mixture: scorers on one backbone pass the same key."""
        if key not in self.loaded:
            self.loaded[key] = make()
        return self.loaded[key]


def _no_weights(options: Mapping[str, Any]) -> tuple[Weights, ...]:
    return ()


def _nothing_wrong(options: Mapping[str, Any]) -> str | None:
    return None


def _any_prompt(prompt: str, metadata: dict | None) -> str | None:
    return None


def some_prompt(prompt: str, metadata: dict | None) -> str | None:
    """`check_prompt` of scorers that take any prompt but an empty one: why it cannot be judged, or None."""
    return None if prompt.strip() else "it is empty; --prompt says what the picture was to show"


@dataclass(frozen=True)
class Scorer:
    """A scorer's declaration; nothing is loaded before `load` is called.

    Attributes:
        name: as --scorer spells it.
        summary: one line: what it measures.
        differentiable: whether a gradient reaches the pictures.
        range: (low, high) of the scores that pictures get in practice, not a bound.
        normalizer: what a score is divided by in a mixture, so that a weight of 1 means about the same for all.
        licence: of the weights, or of the code where there are none.
        load: makes the judge. It takes images (b, 3, H, W) float32 in [0, 1] on the loader's device with b >= 1, prompts, and metadata or
            None, and returns (b,) float32. It is frozen, and b never exceeds the batch size.
        packages: import name -> what to `pip install`, beyond what requirements.txt always installs.
        options: its settings.
        weights: options -> what must be downloaded.
        check_options: options -> what is wrong with them, naming the flag and the cure, or None. Loads nothing heavy.
        check_prompt: (prompt, its metadata or None) -> why it cannot be judged, or None; `some_prompt` refuses only an empty one.
    """

    name: str
    summary: str
    differentiable: bool
    range: tuple[float, float]
    normalizer: float
    licence: str
    load: Callable[[Loader], Judge]
    packages: Mapping[str, str] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    weights: Callable[[Mapping[str, Any]], tuple[Weights, ...]] = _no_weights
    check_options: Callable[[Mapping[str, Any]], str | None] = _nothing_wrong
    check_prompt: Callable[[str, dict | None], str | None] = _any_prompt

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its own options from `given`, where None means unset; others are left out."""
        return {option.name: option.default if given.get(option.name) is None else given[option.name] for option in self.options}

    def trouble(self, given: Mapping[str, Any], *, weights: bool = True) -> str | None:
        """Why it could not be loaded with these options, and the cure; None if it could; weights: missing ones are such a reason."""
        settings = self.settings(given)
        for option in self.options:
            value = settings[option.name]
            if option.required and value is None:
                return f"needs --{option.name}"
            if option.choices and value not in option.choices:
                return f"--{option.name} must be one of {', '.join(map(str, option.choices))}; got {value!r}"
        if reason := self.check_options(settings):
            return reason
        for package, pip_name in self.packages.items():
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: {sys.executable} -m pip install {pip_name}"
        return next((reason for one in self.weights(settings) if (reason := one.missing())), None) if weights else None
