"""A vision-language model as judge, behind any server that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp, Ollama, or OpenAI.

Every picture is one request: the template with the prompt filled in, and the picture as a PNG in a data URL, at temperature 0, or at the
model's own if it takes no other. The number in the reply, divided by --judge_max, is the score. A picture that cannot be judged gets NaN,
never 0, and is reported: a reply without a number says nothing about the picture.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from src import images as pictures
from src.scorers.base import Loader, Option, Scorer, some_prompt

if TYPE_CHECKING:
    from src.scorers.base import Judge

TEMPLATE = Path(__file__).with_name("vlm_judge.txt")
API_KEY = "JUDGE_API_KEY"  # environment variable, so that no key gets into args.json
PAUSES = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth attempt, where the server does not say how long
LONGEST_PAUSE = 60.0  # seconds: upper bound on what a server may ask for
TRANSIENT = {408, 425, 429, 500, 502, 503, 504, 529}  # busy, restarting or overloaded: try again
logger = logging.getLogger("vlm_judge")


class Unjudged(RuntimeError):
    """This picture gets no score; the message is the reason."""


# ---------------------------------------------------------------------------------------------- request and reply


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: of the chat completions.
        timeout: seconds that the server may be silent.
        sleep: what waits between attempts.
        sampling: what requests ask of the model besides; emptied once it has refused the temperature.
    """

    url: str
    model: str
    timeout: float = 60.0
    api_key: str | None = field(default=None, repr=False)
    sleep: Callable[[float], None] = time.sleep
    sampling: dict[str, float] = field(default_factory=lambda: {"temperature": 0})


def chat_url(url: str) -> str:
    """The address of the chat completions below a base address such as http://localhost:8000/v1."""
    return url if url.endswith("/chat/completions") else url.rstrip("/") + "/chat/completions"


def data_url(png: bytes) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def request_body(model: str, question: str, png: bytes) -> dict:
    """One question about one picture, as the protocol wants it."""
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": data_url(png)}}]
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def fill(template: str, prompt: str, maximum: float) -> str:
    """The question: {max} and {prompt} replaced, every other brace left as it is, those in the prompt too."""
    return template.replace("{max}", f"{maximum:g}").replace("{prompt}", prompt)


def parse_score(reply: str, maximum: float) -> float | None:
    """The number after the last "score:" of a reply, or the number that is all of it, divided by `maximum`: in [0, 1].

    None if there is no such number, or it lies outside [0, maximum], or is given "out of" another maximum. The last one counts, because
    models think aloud; no other number does, because "2 dogs" is not a score.
    """
    number = r"(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?(?!,?\d)"  # does not match the 8 of "8,5"
    marked = re.findall(rf"score[\s\"'*_]*[:=][\s\"'*_]*{number}", reply, re.IGNORECASE)
    alone = re.fullmatch(rf"\s*{number}[.\s]*", reply)
    found = marked[-1] if marked else alone.groups() if alone else None
    if found is None or not 0 <= float(found[0]) <= maximum or (found[1] and float(found[1]) != maximum):
        return None
    return float(found[0]) / maximum


def _reply_text(body: bytes) -> str:
    """The text in a server's answer.

    Raises:
        Unjudged: it does not follow the protocol.
    """
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise Unjudged("the answer is not a chat completion")
    return text


def _pause(headers: Mapping[str, str], default: float) -> float:
    """Seconds until the next attempt: the server's Retry-After, if that is in seconds."""
    asked = headers.get("Retry-After", "")
    return min(float(asked), LONGEST_PAUSE) if re.fullmatch(r"\d+(\.\d+)?", asked) else default


def ask(endpoint: Endpoint, question: str, png: bytes) -> str:
    """The reply to one question, in up to four attempts.

    Raises:
        Unjudged: no valid answer: a timeout, an error of the server, or no chat completion.
        ValueError: nothing listens at the address, or the server refuses such requests: a wrong key, model or path.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {})
    sampling = dict(endpoint.sampling)
    data = json.dumps(request_body(endpoint.model, question, png) | sampling).encode()
    for default in (*PAUSES, None):  # None: the last attempt, which returns or raises
        pause = default
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint.url, data, headers), timeout=endpoint.timeout) as answer:
                return _reply_text(answer.read())
        except Unjudged as error:
            failure = error
        except urllib.error.HTTPError as error:
            if error.code not in TRANSIENT:
                refusal = _refusal(endpoint, error)
                if error.code == 400 and sampling and "temperature" in refusal:
                    return ask(_without_temperature(endpoint), question, png)
                raise ValueError(refusal) from None
            failure = Unjudged(f"the server answered {error.code}")
            pause = None if default is None else _pause(error.headers, default)
        except TimeoutError:
            failure = Unjudged(f"no answer within {endpoint.timeout:g} s (--judge_timeout)")
        except urllib.error.URLError as error:
            failure = _unreachable(endpoint, error.reason)
        except (OSError, http.client.HTTPException) as error:
            failure = _broken(error)
        if pause is None:
            raise failure
        endpoint.sleep(pause)


def _without_temperature(endpoint: Endpoint) -> Endpoint:
    """The same endpoint, which from now on leaves the temperature to the model; said once."""
    if endpoint.sampling.pop("temperature", None) is not None:  # several requests may have been under way
        logger.warning("%s refuses temperature 0: it is asked at its own, and scores may vary", endpoint.model)
    return endpoint


def _broken(error: Exception) -> Unjudged:
    return Unjudged(f"the connection broke ({type(error).__name__})")


def _unreachable(endpoint: Endpoint, reason: object) -> Exception:
    """The error to raise for a request that could not be sent."""
    if isinstance(reason, TimeoutError):
        return Unjudged(f"no connection within {endpoint.timeout:g} s (--judge_timeout)")
    if isinstance(reason, (BrokenPipeError, ConnectionResetError)):  # there was a connection
        return _broken(reason)
    return ValueError(f"--judge_url {endpoint.url}: {reason}; start the server, or correct the address")


def _refusal(endpoint: Endpoint, error: urllib.error.HTTPError) -> str:
    """What a refused request means, in one line with the server's own words."""
    words = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
    cure = {401: f"set {API_KEY}", 403: f"set {API_KEY}", 404: "correct the address or --judge_model"}.get(error.code, "")
    return f"--judge_url {endpoint.url} refuses with {error.code}{': ' + words if words else ''}{'; ' + cure if cure else ''}"


# ---------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class Cache:
    """Replies on disk, one small JSON file each, named by the request: evaluations and resumed runs send no request twice.

    Attributes:
        folder: None: nothing is kept.
    """

    folder: Path | None

    def path(self, endpoint: Endpoint, question: str, png: bytes) -> Path | None:
        """Where the reply to this very request lies."""
        if self.folder is None:
            return None
        asked = json.dumps([endpoint.url, endpoint.model, question, hashlib.sha256(png).hexdigest()])
        name = hashlib.sha256(asked.encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.json"

    def read(self, path: Path | None) -> str | None:
        """The reply, or None where there is none.

        Raises:
            ValueError: naming a file that is not one of ours.
        """
        if path is None or not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))["reply"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"--judge_cache: {path} is damaged; delete it") from None

    def write(self, path: Path | None, reply: str) -> None:
        """Store a reply; under another name first, so that a kill leaves no partial file."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")  # identical requests may run at the same time
        half.write_text(json.dumps({"reply": reply}), encoding="utf-8")
        half.replace(path)


# ---------------------------------------------------------------------------------------------- scorer


@dataclass(frozen=True)
class VlmJudge:
    """Sends a request for every picture, several at a time."""

    endpoint: Endpoint
    template: str
    maximum: float
    concurrency: int
    cache: Cache

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> Tensor:
        """Scores (b,) float32 in [0, 1]; NaN for pictures without one, with a warning that counts the reasons."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            verdicts = list(pool.map(self.judge, pictures.to_pil(images), prompts))
        reasons = Counter(verdict for verdict in verdicts if isinstance(verdict, str))
        if reasons:
            listed = "; ".join(f"{number} x {reason}" for reason, number in reasons.most_common(3))
            logger.warning("vlm_judge: %d of %d picture(s) not judged: %s", reasons.total(), len(verdicts), listed)
        values = [float("nan") if isinstance(verdict, str) else verdict for verdict in verdicts]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def judge(self, picture: Any, prompt: str) -> float | str:
        """The score of one PIL picture, or the reason why there is none."""
        file = io.BytesIO()
        picture.save(file, "PNG")
        question, png = fill(self.template, prompt, self.maximum), file.getvalue()
        path = self.cache.path(self.endpoint, question, png)
        try:
            kept = self.cache.read(path)
            reply = ask(self.endpoint, question, png) if kept is None else kept
        except Unjudged as error:
            return str(error)
        score = parse_score(reply, self.maximum)
        if score is None:
            return f"no score from 0 to {self.maximum:g} in the reply {reply[-80:]!r}"
        if kept is None:
            self.cache.write(path, reply)
        return score


def check_options(options: Mapping[str, Any]) -> str | None:
    """What is wrong with the settings, or None; contacts no server."""
    url = urlsplit(options["judge_url"])
    if url.scheme not in ("http", "https") or not url.netloc:
        return f"--judge_url must look like http://localhost:8000/v1, got {options['judge_url']!r}"
    template = Path(options["judge_template"] or TEMPLATE)
    if not template.is_file():
        return f"--judge_template {template}: no such file; leave it out for {TEMPLATE.name}"
    if "{prompt}" not in template.read_text(encoding="utf-8"):
        return f"--judge_template {template} has no {{prompt}}, the place where each prompt goes"
    for name in ("judge_max", "judge_timeout", "judge_concurrency"):
        if not options[name] > 0:
            return f"--{name} must be greater than 0, got {options[name]}"
    cache = options["judge_cache"]
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        return f"--judge_cache {cache} is not a folder; choose another path"
    return None


def check_server(endpoint: Endpoint) -> None:
    """Request the list of models, so that a server that is down or refuses the key is noticed before any training.

    Raises:
        ValueError: nothing listens, or the key is refused. Any other answer passes, as not all servers have such a list.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    request = urllib.request.Request(endpoint.url.removesuffix("/chat/completions") + "/models", headers=headers)
    try:
        urllib.request.urlopen(request, timeout=endpoint.timeout).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ValueError(_refusal(endpoint, error)) from None
    except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
        raise ValueError(f"--judge_url {endpoint.url}: {error}; start the server, or correct the address") from None


def _load(loader: Loader) -> Judge:
    options = loader.options
    endpoint = Endpoint(chat_url(options["judge_url"]), options["judge_model"], options["judge_timeout"], os.environ.get(API_KEY))
    check_server(endpoint)
    template = Path(options["judge_template"] or TEMPLATE).read_text(encoding="utf-8")
    cache = Cache(Path(options["judge_cache"]) if options["judge_cache"] else None)
    return VlmJudge(endpoint, template, options["judge_max"], options["judge_concurrency"], cache)


SCORERS = (
    Scorer(
        name="vlm_judge", summary="a vision-language model on a server: how well the picture shows the prompt, 0 to 1",
        differentiable=False, range=(0.0, 1.0), normalizer=1.0, licence="that of the model on your server", load=_load,
        options=(
            Option("judge_url", required=True),
            Option("judge_model", required=True),
            Option("judge_template"),  # unset: TEMPLATE
            Option("judge_max", default=10.0),
            Option("judge_timeout", default=60.0),
            Option("judge_concurrency", default=8),
            Option("judge_cache"),
        ),
        check_options=check_options, check_prompt=some_prompt,
    ),
)  # fmt: skip
