"""The judge on a server, against a stub that answers well, badly, late and not at all."""

import base64
import io
import json
import logging
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from src import scorers
from src.scorers import vlm_judge
from src.scorers.vlm_judge import Cache, Endpoint, VlmJudge

PICTURES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def chat(text):
    """A chat completion whose reply is `text`."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}), {}


class Stub(ThreadingHTTPServer):
    """Answers POST number n with `answers[n]`, the last one for all that follow: (status, body, headers), or a function of the request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.headers_seen = [chat("Score: 7")], [], []
        self.lock, self.release = threading.Lock(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            answer = self.server.answers[min(len(self.server.requests), len(self.server.answers) - 1)]
            self.server.requests.append((self.path, body))
            self.server.headers_seen.append(dict(self.headers))
        status, text, headers = answer(self.server, body) if callable(answer) else answer
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except ConnectionError:  # the client gave up waiting, as it should
            pass

    def do_GET(self):  # the list of models
        self.server.headers_seen.append(dict(self.headers))
        self.send_response(401 if getattr(self.server, "locked", False) else 404)  # 404: a server without such a list
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Stub() as stub:
        thread = threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield stub
        stub.release.set()
        stub.shutdown()


@pytest.fixture
def pauses():
    """Seconds that a judge would have waited between attempts."""
    return []


@pytest.fixture
def judge(server, pauses):
    endpoint = Endpoint(vlm_judge.chat_url(server.url), "looker", timeout=5.0, sleep=pauses.append)
    return VlmJudge(endpoint, "How well does it show {prompt}? 0 to {max}.", 10.0, 4, Cache(None))


def not_judged(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "vlm_judge" and record.levelno == logging.WARNING]


# ---------------------------------------------------------------------------------------------- what is asked


def test_a_request_holds_model_question_and_picture_at_temperature_0(server, judge):
    scores = judge(PICTURES[:1], ["a {red} circle"])
    assert scores.tolist() == pytest.approx([0.7]) and scores.dtype == torch.float32
    ((path, body),) = server.requests
    assert path == "/v1/chat/completions" and body["model"] == "looker" and body["temperature"] == 0
    (message,) = body["messages"]
    question, picture = message["content"]
    assert question == {"type": "text", "text": "How well does it show a {red} circle? 0 to 10."}
    png = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    levels = torch.frombuffer(bytearray(Image.open(io.BytesIO(png)).tobytes()), dtype=torch.uint8).view(8, 8, 3).permute(2, 0, 1)
    assert torch.equal(levels, (PICTURES[0] * 255).round().byte())


def test_a_key_goes_into_the_header_and_nowhere_else(server, judge):
    replace(judge, endpoint=replace(judge.endpoint, api_key="secret"))(PICTURES[:1], ["a"])
    judge(PICTURES[:1], ["a"])
    assert server.headers_seen[0]["Authorization"] == "Bearer secret" and "Authorization" not in server.headers_seen[1]
    assert "secret" not in json.dumps(server.requests) and "secret" not in repr(replace(judge.endpoint, api_key="secret"))


def test_scores_stay_with_their_pictures_when_answers_come_in_any_order(server, judge):
    """The first request is answered only after the second has been: in one thread this would never end."""

    def by_prompt(stub, body):
        text = body["messages"][0]["content"][0]["text"]
        if "show a?" in text:
            assert stub.release.wait(5), "the second request never came while the first was open"
        stub.release.set()
        return chat(f"Score: {'abcd'.index(text.split('show ')[1][0])}")

    server.answers = [by_prompt]
    assert judge(PICTURES, list("abcd")).tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_the_shipped_template_asks_for_the_line_that_is_parsed():
    question = vlm_judge.fill(vlm_judge.TEMPLATE.read_text(), "two dogs", 10.0)
    assert "two dogs" in question and "0 to 10" in question and "{" not in question
    assert question.rstrip().endswith("Score: NUMBER")


# ---------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 0.7),
        ("All there.\nScore: 10", 1.0),
        ("score = 0", 0.0),
        ("**Score:** 8.5", 0.85),
        ('{"reason": "2 dogs", "score": 4}', 0.4),
        ("Score: 3? No, there are two dogs.\nFinal score: 6/10.", 0.6),
        ("9", 0.9),
        (" 9/10. ", 0.9),
        ("I see 2 dogs", None),  # a number, but not a score
        ("Score: high", None),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: 3/5", None),  # out of another maximum
        ("Score: 8,5", None),  # neither 8 nor 85
        ("", None),
    ],
)
def test_the_number_after_the_last_score_is_read_or_nothing(reply, score):
    assert vlm_judge.parse_score(reply, 10.0) == (None if score is None else pytest.approx(score))


def test_a_reply_without_a_score_is_nan_counted_and_not_asked_again(server, judge, pauses, caplog):
    server.answers = [chat("I cannot judge this."), chat("Score: 5")]
    judge = replace(judge, concurrency=1)
    scores = judge(PICTURES[:2], ["a", "b"])
    assert scores.isnan().tolist() == [True, False] and scores[1].item() == 0.5
    assert len(server.requests) == 2 and not pauses
    (line,) = not_judged(caplog)
    assert "1 of 2 picture(s) not judged" in line and "I cannot judge this." in line


@pytest.mark.parametrize("answer", [
    (500, "oops", {}), (429, "slow down", {}), (503, "", {}), (200, "<html>not JSON</html>", {}), (200, "[]", {}),
    (200, '{"choices": []}', {}), (200, '{"choices": [{"message": {"content": null}}]}', {}),
])  # fmt: skip
def test_a_bad_answer_is_asked_for_again_after_longer_and_longer_pauses(server, judge, pauses, answer):
    server.answers = [answer, answer, answer, chat("Score: 2")]
    assert judge(PICTURES[:1], ["a"]).tolist() == pytest.approx([0.2])
    assert pauses == [1.0, 2.0, 4.0] and len(server.requests) == 4


def test_a_server_that_never_answers_well_gives_nan_after_four_attempts(server, judge, caplog):
    server.answers = [(500, "oops", {})]
    assert judge(PICTURES[:2], ["a", "b"]).isnan().all()
    assert len(server.requests) == 8
    assert "2 x the server answered 500" in not_judged(caplog)[0]


def test_the_server_may_say_how_long_to_wait(server, judge, pauses):
    server.answers = [*((429, "", {"Retry-After": text}) for text in ("9", "86400", "tomorrow")), chat("1")]
    judge(PICTURES[:1], ["a"])
    assert pauses == [9.0, vlm_judge.LONGEST_PAUSE, 4.0]


def test_a_late_answer_is_nan_with_the_flag_that_allows_more_time(server, judge, caplog):
    def late(stub, body):
        stub.release.wait(10)
        return chat("Score: 9")

    server.answers = [late]
    impatient = replace(judge, endpoint=replace(judge.endpoint, timeout=0.05))
    assert impatient(PICTURES[:1], ["a"]).isnan().all()
    assert len(server.requests) == 4
    assert "no answer within 0.05 s (--judge_timeout)" in not_judged(caplog)[0]


def test_a_connection_that_breaks_is_nan(server, judge, caplog):
    def hang_up(stub, body):
        raise ConnectionAbortedError

    server.answers, server.handle_error = [hang_up], lambda request, address: None
    assert judge(PICTURES[:1], ["a"]).isnan().all()
    assert "the connection broke" in not_judged(caplog)[0]


def free_port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        return closed.server_port


def test_nobody_at_the_address_stops_the_run(judge, pauses):
    gone = replace(judge, endpoint=replace(judge.endpoint, url=f"http://127.0.0.1:{free_port()}/v1/chat/completions"))
    with pytest.raises(ValueError, match="--judge_url http://127.0.0.1.*refused.*start the server"):
        gone(PICTURES[:1], ["a"])
    assert pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("status", "cure"), [(401, "set JUDGE_API_KEY"), (404, "--judge_model"), (400, "no such parameter")])
def test_a_refused_request_stops_the_run_at_once(server, judge, pauses, status, cure):
    server.answers = [(status, '{"error": "no such parameter"}', {})]
    with pytest.raises(ValueError, match=f"--judge_url .* refuses with {status}: .*{cure}"):
        judge(PICTURES[:1], ["a"])
    assert not pauses


def test_a_model_that_takes_no_temperature_is_asked_without_for_the_rest_of_the_run(server, judge, pauses, caplog):
    """As gpt-5 and the o-series answer. Two at a time are both refused and asked again: 4 requests, and 1 for each picture after that."""
    refusals = threading.Barrier(2)

    def only_its_own(stub, body):
        if "temperature" in body:
            refusals.wait(5)
            message = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
            return 400, json.dumps({"error": {"message": message, "param": "temperature", "code": "unsupported_value"}}), {}
        return chat("Score: 6")

    server.answers = [only_its_own]
    assert judge(PICTURES[:2], ["a", "b"]).tolist() == pytest.approx([0.6, 0.6]) and len(server.requests) == 4
    assert judge(PICTURES[2:], ["c", "d"]).tolist() == pytest.approx([0.6, 0.6]) and len(server.requests) == 6
    assert not pauses and not_judged(caplog) == ["looker refuses temperature 0: it is asked at its own, and scores may vary"]


# ---------------------------------------------------------------------------------------------- cache


def test_the_same_question_is_asked_once_also_by_the_next_run(server, judge, tmp_path):
    server.answers = [chat("fine\nScore: 7"), chat("Score: 1")]
    cached = replace(judge, cache=Cache(tmp_path / "replies"))
    for _ in range(2):
        assert replace(cached)(PICTURES[:1], ["a"]).tolist() == pytest.approx([0.7])
    assert len(server.requests) == 1
    (file,) = (tmp_path / "replies").rglob("*.json")
    assert json.loads(file.read_text()) == {"reply": "fine\nScore: 7"}
    assert not list((tmp_path / "replies").rglob("*.tmp"))


def test_another_picture_prompt_model_or_template_is_another_question(server, judge, tmp_path):
    cached = replace(judge, cache=Cache(tmp_path))
    cached(PICTURES[:1], ["a"])
    for other, images, prompt in (
        (cached, PICTURES[1:2], "a"), (cached, PICTURES[:1], "b"), (replace(cached, template="{prompt}?"), PICTURES[:1], "a"),
        (replace(cached, endpoint=replace(cached.endpoint, model="other")), PICTURES[:1], "a"),
    ):  # fmt: skip
        before = len(server.requests)
        other(images, [prompt])
        assert len(server.requests) == before + 1


def test_what_could_not_be_judged_is_not_kept(server, judge, tmp_path):
    server.answers = [chat("no"), chat("Score: 3")]
    cached = replace(judge, cache=Cache(tmp_path))
    assert cached(PICTURES[:1], ["a"]).isnan().all()
    assert cached(PICTURES[:1], ["a"]).tolist() == pytest.approx([0.3])


def test_a_damaged_file_in_the_cache_is_named(judge, tmp_path):
    cached = replace(judge, cache=Cache(tmp_path))
    cached(PICTURES[:1], ["a"])
    (file,) = tmp_path.rglob("*.json")
    file.write_text("{")
    with pytest.raises(ValueError, match=f"{file.name} is damaged; delete it"):
        cached(PICTURES[:1], ["a"])


# ---------------------------------------------------------------------------------------------- the scorer


def test_the_scorer_leaves_unjudged_pictures_out(server, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    server.answers = [chat("Score: 4"), chat("no idea"), chat("Score: 10")]
    mixture = scorers.build("vlm_judge=2", batch_size=1, judge_url=server.url, judge_model="looker", judge_max=20.0)
    scores = mixture(PICTURES[:3], ["a", "b", "c"])
    assert scores.parts["vlm_judge"].tolist() == pytest.approx([0.2, float("nan"), 0.5], nan_ok=True)
    assert scores.total.tolist() == pytest.approx([0.4, float("nan"), 1.0], nan_ok=True)
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers_seen)


def test_settings_reach_the_judge(server, tmp_path):
    template = tmp_path / "question.txt"
    template.write_text("{prompt}?")
    given = {"judge_url": server.url, "judge_model": "looker", "judge_template": str(template), "judge_max": 5.0, "judge_timeout": 3.0,
             "judge_concurrency": 2, "judge_cache": str(tmp_path / "replies")}  # fmt: skip
    judge = scorers.build("vlm_judge", **given).parts[0].judge
    assert (judge.endpoint.url, judge.endpoint.model, judge.endpoint.timeout) == (server.url + "/chat/completions", "looker", 3.0)
    assert (judge.template, judge.maximum, judge.concurrency, judge.cache.folder) == ("{prompt}?", 5.0, 2, tmp_path / "replies")


def test_a_server_that_is_down_or_refuses_the_key_is_noticed_while_loading(server):
    with pytest.raises(ValueError, match="--judge_url .*start the server"):
        scorers.build("vlm_judge", judge_url=f"http://127.0.0.1:{free_port()}/v1", judge_model="looker")
    server.locked = True
    with pytest.raises(ValueError, match="refuses with 401; set JUDGE_API_KEY"):
        scorers.build("vlm_judge", judge_url=server.url, judge_model="looker")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_url": None}, "needs --judge_url"),
        ({"judge_model": None}, "needs --judge_model"),
        ({"judge_url": "localhost:8000"}, "--judge_url must look like http://localhost:8000/v1, got 'localhost:8000'"),
        ({"judge_template": "nowhere.txt"}, "--judge_template nowhere.txt: no such file"),
        ({"judge_max": 0.0}, "--judge_max must be greater than 0"),
        ({"judge_concurrency": 0}, "--judge_concurrency must be greater than 0"),
        ({"judge_cache": __file__}, "is not a folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_asking_the_server(changes, message):
    options = {"judge_url": "http://localhost:1/v1", "judge_model": "looker"} | changes
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        scorers.check("vlm_judge", **options)


def test_a_template_without_a_place_for_the_prompt_is_refused(tmp_path):
    file = tmp_path / "template.txt"
    file.write_text("How good is it?")
    with pytest.raises(ValueError, match="has no {prompt}"):
        scorers.check("vlm_judge", judge_url="http://localhost:1/v1", judge_model="looker", judge_template=str(file))
