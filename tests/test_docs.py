"""What the pages under docs/ say of the code: the functions they name exist, and the metrics are those that a run writes."""

import ast
import re
from pathlib import Path

import pytest

from src import metrics

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/*.md"))


def references(page):
    """(file, name) of each `file.py:name` and (file, None) of each `file.py` on a page."""
    return re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", page.read_text(encoding="utf-8"))


def names_in(file):
    """Functions and classes at the top of a module, and `Class.method`."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {f"{node.name}.{inner.name}" for inner in getattr(node, "body", []) if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_on_a_page_exists(page):
    for file, name in references(page):
        assert (ROOT / file).is_file(), f"{page.name} names {file}"
        assert not name or name in names_in(ROOT / file), f"{page.name} names {file}:{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metric_tables_name_metrics_that_are_written(page):
    for table in re.findall(r"^\| metric \|.*\n\|[-| :]+\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.M):
        for row in table.splitlines():
            for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
                assert name in metrics.NAMES, f"{page.name} explains {name}, which no run writes"


# --------------------------------------------------------------------------- the seven pages of the algorithms

EVERY_RUN = {"lr", "epoch", "images_per_second", "seconds", "memory_gb"}  # what these mean stands on lora.md; others may link that
SUPERVISED = {"loss", "grad_norm", "val_loss", *(f"val_loss_sigma_{level}" for level in ("0.25", "0.5", "0.75", "0.95"))}
REINFORCED = {"reward", "reward_std", "eval_reward", "loss", "policy_loss", "log_ratio", "drift", "clip_fraction", "clip_above",
              "no_signal", "grad_norm", "skipped_updates", "unjudged"}  # fmt: skip
LOGGED = {  # what the program of a page writes into metrics.jsonl
    "lora": SUPERVISED | EVERY_RUN,
    "full-finetuning": SUPERVISED | EVERY_RUN,
    "dreambooth": SUPERVISED | EVERY_RUN | {"instance_loss", "prior_loss"},
    "ddpo": REINFORCED | EVERY_RUN,
    "grpo": REINFORCED | EVERY_RUN | {"kl", "group_std"},
    "dpo": EVERY_RUN | {"loss", "accuracy", "val_accuracy", "val_loss", "winner_gain", "loser_gain", "policy_margin", "reference_margin",
                        "grad_norm"},
    "refl": EVERY_RUN - {"epoch"} | {"reward", "loss", "pretrain_loss", "eval_reward", "grad_norm"},
}  # fmt: skip
SECTIONS = (
    "From equation to function", "What the numbers mean", "Settings, and where they come from", "What differs from", "When it goes wrong",
)  # fmt: skip


def explained(text):
    """Metrics in the tables of a page; "`val_loss_sigma_0.25` to `val_loss_sigma_0.95`" names those between, too."""
    found = set()
    for table in re.findall(r"^\| metric \|.*\n\|[-| :]+\n((?:\|.*\n)+)", text, re.M):
        for row in table.splitlines():
            cell = row.split("|")[1]
            found |= set(re.findall(r"`([^`]+)`", cell))
            if "` to `" in cell:
                found |= {name for name in metrics.NAMES if name.startswith("val_loss_sigma_")}
    return found


def test_the_pages_cover_all_metrics():
    """A metric that is new in metrics.NAMES belongs into LOGGED, and so onto a page."""
    assert set().union(*LOGGED.values()) == metrics.NAMES.keys() - {"step"}


@pytest.mark.parametrize("page", sorted(LOGGED))
def test_every_metric_of_a_run_is_explained_on_its_page(page):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    names = explained(text)
    if link := re.search(r"^([^\n]*) are in every run: \[lora.md\]\(lora.md#what-the-numbers-mean\)", text, re.M):
        linked = set(re.findall(r"`([^`]+)`", link[1]))
        assert linked <= explained((ROOT / "docs/lora.md").read_text(encoding="utf-8"))
        names |= linked
    assert not LOGGED[page] - names, f"docs/{page}.md does not explain {sorted(LOGGED[page] - names)}"


@pytest.mark.parametrize("page", sorted(LOGGED))
def test_the_pages_of_algorithms_have_the_same_sections(page):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.M)
    for section in SECTIONS:
        assert any(heading.startswith(section) for heading in headings), f"docs/{page}.md lacks ## {section}"
    opening = text.split("\n\n")[1]
    assert len(re.findall(r"[.:] ", opening + " ")) >= 3, f"docs/{page}.md says what the problem is in fewer than three sentences"


@pytest.mark.parametrize("page", sorted(LOGGED))
def test_pages_of_algorithms_map_equations_to_functions(page):
    """At least five functions; that there are such tables keeps the tests above honest."""
    path = ROOT / f"docs/{page}.md"
    assert sum(bool(name) for _, name in references(path)) >= 5


@pytest.mark.parametrize("page", sorted(LOGGED))
def test_every_setting_has_a_source(page):
    """Rows of the settings' table: a flag, its value, and a reason that is not empty."""
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8").split("## Settings, and where they come from")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`--.*)\|$|^\| (batch.*)\|$", text, re.M)
    assert len(rows) >= 5
    for row in rows:
        cells = [cell.strip() for cell in "".join(row).split(" | ")]
        assert len(cells) == 3 and all(cells), f"docs/{page}.md: {row}"
