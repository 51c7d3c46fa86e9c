"""CONTRIBUTING.md: each recipe is carried out in a copy of the repository as it is written.

A block whose first line names a path after the language becomes that file, a diff is applied, the lines of a `bash` block are run.
"""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Besides the programs; of models and data links do.
COPIED = ("src", "tests", "benchmarks", "docs", "scripts", "pyproject.toml", "demo.sh", "README.md", "README_zh.md", "CONTRIBUTING.md")


def recipe(title):
    """(language, path or "", text) of each block under a heading."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", section, re.M | re.S)


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    for source in ROOT.glob("*.py"):
        shutil.copy(source, folder)
    for name in ("models", "datas"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command, folder, text=None):
    found = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, env=runs.environment())
    assert found.returncode == 0, f"{command}: {found.stdout[-3000:]}{found.stderr[-3000:]}"
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("title", "files"), [("Add a scorer", 2), ("Add a trainer", 4), ("Add a model family", 2)])
def test_a_recipe_works_as_it_is_written(title, files, copy):
    blocks = recipe(title)
    assert sum(bool(path) or "cp " in text for _, path, text in blocks) == files + (title == "Add a model family")
    for language, path, text in blocks:
        if path:
            assert not (copy / path).exists(), f"{path} is there already: the recipe adds it"
            (copy / path).write_text(text, encoding="utf-8")
        elif language == "diff":
            run(["git", "apply", "--unidiff-zero", "-"], copy, text)
        else:
            for line in text.splitlines():
                said = run(["bash", "-c", line], copy)
                assert "pytest" not in line or re.search(r"[1-9]\d* passed", said), f"{line}: {said}"
    run(["ruff", "check", "."], copy)


def test_every_recipe_ends_in_commands_that_prove_it():
    for title in re.findall(r"^## (Add .*)$", PAGE, re.M):
        language, path, text = recipe(title)[-1]
        assert (language, path) == ("bash", "") and "pytest" in text


def test_the_family_on_the_page_offers_every_name_that_is_asked_of_one():
    """`family.NAME` anywhere in the shared modules: Conditioning, load, encode_prompts, ..."""
    asked = set()
    for path in ROOT.glob("src/*.py"):
        asked |= set(re.findall(r"\bfamily\.([A-Za-z]\w*)", path.read_text(encoding="utf-8")))
    module = next(text for _, path, text in recipe("Add a model family") if path == "src/pipelines/sd3_clip.py")
    tree = ast.parse(module)
    offered = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    offered |= {name.id for node in tree.body if isinstance(node, ast.Assign) for name in ast.walk(node) if isinstance(name, ast.Name)}
    assert len(asked) > 10 and asked <= offered, asked - offered
