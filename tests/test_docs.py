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


def test_pages_of_algorithms_map_equations_to_functions():
    """A page with a section on the equations names at least five functions; that there are such pages keeps the tests above honest."""
    pages = [page for page in PAGES if "## From equation to function" in page.read_text(encoding="utf-8")]
    assert {"lora.md", "full-finetuning.md"} <= {page.name for page in pages}
    for page in pages:
        assert sum(bool(name) for _, name in references(page)) >= 5, page.name
