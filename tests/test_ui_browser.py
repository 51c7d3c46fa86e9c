"""The page in a real headless browser: type a prompt, press the button, see two pictures and their scores. Nothing leaves this machine."""

import contextlib
import importlib.util
import io
import shlex
import shutil
import socket
import sys
import urllib.request
from urllib.parse import urlsplit

import pytest
import runs
from PIL import Image
from test_ui import make_run

import demo
from src import cli

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [f"{name} is not installed" for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["no Chromium on the path (apt-get install chromium-headless-shell)"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))]


@pytest.fixture(scope="module")
def run(tiny_sd3_folder, tmp_path_factory):
    """A run's folder: a LoRA, and validation pictures of two prompts at steps 0, 20 and 100."""
    return make_run(runs.save_lora(tiny_sd3_folder, tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def served(run, tiny_sd3_folder, tmp_path_factory):
    """The page of a running demo whose way out is a proxy that only listens: (address, output folder, the proxy's socket)."""
    out, log = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("log") / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as outside:
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        ways_out = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy) | {"NO_PROXY": "127.0.0.1,localhost"}
        flags = runs.command_line(ui=True, ui_port=port, pretrained_model_name_or_path=tiny_sd3_folder, lora_weights_path=run,
                                  output_dir=out, num_inference_steps=3, scorer="shapes,jpeg_compressibility")  # fmt: skip
        process = runs.start([sys.executable, "demo.py", *flags], log, **ways_out)
        try:
            runs.wait_for(process, lambda: "the page is at" in log.read_text(), log)
            yield f"http://127.0.0.1:{port}", out, outside
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def page(served):
    """The open page, and every address that the browser asked for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, asked = browser.new_page(viewport={"width": 1400, "height": 1000}), []
        tab.set_default_timeout(120_000)
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(served[0])
        tab.wait_for_selector("#draw")
        yield tab, asked
        browser.close()


def loaded(tab, selector):
    """Addresses of the pictures there, once the browser has them."""
    tab.wait_for_function("s => {const all = [...document.querySelectorAll(s)]; return all.length && all.every(i => i.naturalWidth)}",
                          arg=f"{selector} img")  # fmt: skip
    return [image.get_attribute("src") for image in tab.query_selector_all(f"{selector} img")]


def test_a_prompt_and_the_button_give_two_pictures_and_their_scores(page, served, tmp_path):
    tab, _ = page
    tab.fill("#prompt textarea", "a red heart on a blue background")
    tab.fill("#seed input", "7")
    tab.fill("#lora_scale input[type=number]", "0.5")
    tab.click("#draw")
    tab.wait_for_selector("#command textarea")
    pictures = {}
    for column in ("base", "tuned"):
        [source] = loaded(tab, f"#{column}")
        pictures[column] = Image.open(io.BytesIO(urllib.request.urlopen(source).read()))
        assert pictures[column].text["prompt"] == "a red heart on a blue background" and pictures[column].text["seed"] == "7"
        card = tab.inner_text(f"#{column}-scores")
        assert "shapes" in card and "the share of shape, colour and background" in card and "jpeg_compressibility" in card
    assert pictures["base"].tobytes() != pictures["tuned"].tobytes()
    assert tab.query_selector("#tuned-scores .change") and not tab.query_selector("#base-scores .change")
    assert all(path.name in tab.inner_text("#note") for path in served[1].glob("*.png"))

    words = shlex.split(tab.input_value("#command textarea"))[2:]
    demo.main(demo.parse_args([*words, "--output_dir", str(tmp_path)]))
    for column, shown in pictures.items():
        [path] = tmp_path.glob(f"*-{column}.png")
        assert shown.tobytes() == Image.open(path).tobytes(), "the command line draws the same"


def test_an_empty_prompt_is_said_and_the_pictures_stay(page):
    tab, _ = page
    before = loaded(tab, "#base")
    tab.fill("#prompt textarea", "  ")
    tab.click("#draw")
    tab.get_by_text("the prompt is empty").wait_for()
    assert loaded(tab, "#base") == before


def test_the_next_seed_is_one_more(page):
    tab, _ = page
    tab.fill("#seed input", "41")
    tab.get_by_role("button", name="Next seed").click()
    tab.wait_for_function("() => document.querySelector('#seed input').value === '42'")


def test_the_album_shows_the_chosen_step_beside_the_first(page):
    tab, _ = page
    tab.get_by_role("tab", name="Validation pictures").click()
    tab.get_by_label("100", exact=True).wait_for()
    assert all("step-000000" not in source for source in loaded(tab, "#chosen")) and len(loaded(tab, "#first")) == 4
    tab.get_by_label("20", exact=True).click()
    tab.get_by_text("Step 20").wait_for()
    assert len(loaded(tab, "#chosen")) == 4 and "ünï <b>" in tab.inner_text("#chosen")


def test_nothing_leaves_this_machine(page, served):
    """Runs last: neither the browser nor the server asked anybody else."""
    _, asked = page
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {"127.0.0.1"}
    served[2].setblocking(False)
    with contextlib.suppress(BlockingIOError):
        connection, _ = served[2].accept()
        connection.settimeout(5)
        pytest.fail(f"the server asked for {connection.recv(1000)}")


def test_the_installed_gradio_is_the_tested_one():
    import gradio

    assert f"gradio=={gradio.__version__}" == cli.GRADIO
