"""The shape of the code, as tests: who imports whom, how long things are, that twins are twins, that nothing heavy loads early."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINERS = sorted(ROOT.glob("train_*.py"))
SCRIPTS = [*TRAINERS, ROOT / "demo.py"]
MODULES = sorted((ROOT / "src").rglob("*.py"))

# layer -> the src layers that it may import. Trainers and the demo may import all of them, and are imported by tests only.
MATHS = {"flow", "transitions", "ddpm"}
RUN_LAYER = {
    "runtime", "checkpoint", "metrics", "validation", "inputs", "subject", "plan", "memory", "card", "policy", "rewards", "tuned", "unet",
    "speed", "ui",
}  # fmt: skip
MAY_IMPORT = {
    "__init__": set(),
    "cli": {"cli"}, "seeds": set(), "images": set(), "ema": {"sharding"}, "optim": set(), "lora": set(),
    "activations": set(), "hub": {"errors"}, "errors": set(),
    "gallery": {"images", "scorers"}, "sharding": set(), "rounding": {"seeds"}, "full": {"lora", "sharding", "hub"},
    "norms": {"lora"}, "attention": {"lora"}, "quantize": {"lora"},
    **{name: set() for name in MATHS},
    "pipelines": {"pipelines", "images", "lora", "seeds", "quantize", "hub", "errors", *MATHS},
    "scorers": {"scorers", "images", "tiny", "hub", "errors", "cli"},  # cli: the program in __main__
    "data": {"data", "images", "seeds", "hub", "errors", "tiny"},
    "tiny": {"tiny", "cli", "images", "flow", "seeds", "scorers"},  # scorers: the tour measures by them
    "grpo_variants": MATHS,
    **{name: {*RUN_LAYER, "cli", "seeds", "images", "ema", "optim", "data", "pipelines", "scorers", "lora", "full", "quantize",
              "rounding", "sharding", "gallery", "norms", "attention", "activations", "errors", *MATHS} - {name} for name in RUN_LAYER},
}  # fmt: skip
TAKES_ARGS = RUN_LAYER | {"cli"}
HEAVY = {
    "accelerate", "bitsandbytes", "datasets", "diffusers", "gradio", "matplotlib", "open_clip", "peft", "prodigyopt", "tensorboard",
    "transformers", "wandb",
}  # fmt: skip
MAX_SCRIPT_LINES, MAX_MAIN_LINES, MAX_FUNCTION_LINES, MAX_LINES_TO_BACKWARD = 300, 120, 60, 90


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer(path: Path) -> str:
    return path.relative_to(ROOT / "src").parts[0].removesuffix(".py")


def imported_layers(tree: ast.AST) -> set[str]:
    layers = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "src":
            layers |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
            layers.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            layers |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("src.")}
    return layers


def top_level_imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_library_imports_only_downwards(path):
    tree = ast.parse(path.read_text())
    wrong = imported_layers(tree) - MAY_IMPORT[layer(path)]
    assert not wrong, f"src/{layer(path)} must not import src/{sorted(wrong)}: CONTRIBUTING.md, who may import whom"
    scripts = {name for name in top_level_imports(tree) if name.startswith("train_") or name == "demo"}
    assert not scripts, f"{name_of(path)} imports the script {scripts}"


@pytest.mark.parametrize("path", SCRIPTS + MODULES, ids=name_of)
def test_heavy_packages_are_imported_inside_functions(path):
    early = top_level_imports(ast.parse(path.read_text())) & HEAVY
    assert not early, f"{name_of(path)} imports {sorted(early)} at the top: --help must answer in under 5 s"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_args_stop_at_the_run_layer(path):
    if layer(path) in TAKES_ARGS or path.name == "__main__.py" or path.parent.name == "tiny":  # tiny/ holds command-line programs
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            assert "args" not in names, f"{name_of(path)}:{node.lineno} {node.name} takes args; hand it named values with units"


@pytest.mark.parametrize("path", SCRIPTS + MODULES, ids=name_of)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            limit = MAX_MAIN_LINES if node.name == "main" and path in SCRIPTS else MAX_FUNCTION_LINES
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{name_of(path)}:{node.lineno} {node.name} has {length} lines, the limit is {limit}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_read_in_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_SCRIPT_LINES, f"{len(lines)} lines, the limit is {MAX_SCRIPT_LINES}: move pure functions into a module of src/"
    if path in TRAINERS:
        main = next(i for i, line in enumerate(lines) if line.startswith("def main"))
        backward = next(i for i, line in enumerate(lines) if ".backward(" in line)
        assert backward - main <= MAX_LINES_TO_BACKWARD, f"{backward - main} lines from main to backward()"


def test_twin_blocks_are_identical():
    """`# twin: NAME` ... `# end twin` fences what scripts repeat on purpose: all copies must agree."""
    copies = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        for name, body in re.findall(r"# twin: ([\w-]+)\n(.*?)# end twin", path.read_text(), re.S):
            copies[name]["\n".join(line.strip() for line in body.splitlines())].append(path.name)
    for name, variants in copies.items():
        assert len(variants) == 1, f"twin block {name!r} differs between {list(variants.values())}"


@pytest.mark.parametrize("path", SCRIPTS + MODULES, ids=name_of)
def test_no_module_level_state_and_no_swallowed_errors(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert not re.search(r"^\s*global ", text, re.M)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("Exception", "BaseException", "everything"), f"{name_of(path)}:{node.lineno} catches {caught}"
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{name_of(path)}:{node.lineno} asserts without a message"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_the_argument_module_needs_the_standard_library_only():
    code = "import sys, src.cli; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'yaml', 'numpy')))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
