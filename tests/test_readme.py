"""What the pages, wrappers and docstrings tell people to type: every script exists, every flag is known to its program."""

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from src import cli, runtime, scorers
from src.tiny import tour

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "models", "datas", "outputs", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md"))])
SHELL = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh")])
PROGRAMS = sorted([*ROOT.glob("train_*.py"), ROOT / "demo.py", *ROOT.glob("benchmarks/*.py"), *ROOT.glob("src/tiny/*.py"),
                   *ROOT.glob("src/*/__main__.py")])  # fmt: skip
SOURCES = [*PAGES, *SHELL, *PROGRAMS]
# Who parses the arguments of a wrapper.
NAMED_OTHERWISE = {  # wrappers
    "train_grpo_sd3": "train_aesthetic_rlhf_grpo_lora_sd3", "train_ddpo_sd3": "train_aesthetic_ddpo_sd3",
    "train_dpo_sd15": "train_dpo_sd_v1_5", "train_refl_sd15": "train_refl_v1_5",
}  # fmt: skip


def wrapper_of(script):
    return f"scripts/{NAMED_OTHERWISE.get(script.stem, script.stem)}.sh"


WRAPPED = {"demo.sh": "demo.py", "scripts/tour.sh": "src/tiny/tour.py", **{wrapper_of(path): path.name for path in ROOT.glob("train_*.py")}}
OWN_ARGUMENTS = {"scripts/env.sh", "scripts/test.sh", "scripts/download.sh", "scripts/quickstart.sh"}  # parse none, or hand them to pytest


def name_of(path):
    return str(path.relative_to(ROOT))


def text_of(path):
    """A file's text; of CONTRIBUTING.md without the recipes, whose files do not exist here: tests/test_contributing.py carries them out.

    Of docs/migrating.md without its left column, the flags that are gone.
    """
    text = path.read_text(encoding="utf-8")
    if path.name == "CONTRIBUTING.md":
        return re.sub(r"^## Add a .*?(?=^## (?!Add a ))", "", text, flags=re.M | re.S)
    return re.sub(r"^\| `--[^|]*\|", "|", text, flags=re.M) if path.name == "migrating.md" else text


def commands(text):
    """Command lines in a page, script or docstring, continuations joined: everything from `python` or `bash` on."""
    text = re.sub(r"\\+\n\s*#?\s*", " ", text)  # a docstring writes its backslash twice
    found = []
    for line in text.splitlines():
        line = re.sub(r"\s+#.*$", "", line.strip().removeprefix("#").strip())  # comments of the shell, and in comments
        for match in re.finditer(r"(?:^|[`;]|&& |\|\| |then |exec |TINY=1 )((?:python3?|bash|launch) [^`;]*)", line):
            found.append(re.split(r" (?:&&|\|\||\||>|2>)\s?", match[1])[0].strip())
    return found


def split(command):
    try:
        return shlex.split(command, comments=True)
    except ValueError:  # a sentence with an apostrophe
        return []


def program(words):
    """(file that is run, its arguments), or None for other commands and for sentences that only mention one."""
    if words[:1] == ["launch"]:
        return words[1], words[2:]
    if words[:1] == ["bash"] and len(words) > 1 and words[1].endswith(".sh"):
        return words[1], words[2:]
    if words[:2] in (["python", "-m"], ["python3", "-m"]) and words[2:] and words[2].startswith("src."):
        module = words[2].replace(".", "/")
        return f"{module}/__main__.py" if (ROOT / module).is_dir() else f"{module}.py", words[3:]
    if words[:1] in (["python"], ["python3"]) and len(words) > 1 and words[1].endswith(".py"):
        return words[1], words[2:]
    return None


def all_commands():
    found = []
    for path in SOURCES:
        for command in commands(text_of(path)):
            parsed = program(split(command))
            if parsed and not re.search(r"[A-Z*<$]|\.\.\.", parsed[0]):  # those are patterns
                found.append((name_of(path), *parsed))
    return found


COMMANDS = all_commands()


def flags_of(file):
    """Option strings that a program knows, by file name."""
    target = WRAPPED.get(file, file)
    sys.path.insert(0, str((ROOT / target).parent))
    try:
        module = importlib.import_module(target.removesuffix(".py").replace("/", ".") if target.startswith("src/") else Path(target).stem)
    finally:
        sys.path.pop(0)
    if hasattr(module, "build_parser"):
        return {option for action in module.build_parser()._actions for option in action.option_strings}
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.parse_args(["--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text.getvalue()))


@pytest.fixture(scope="module")
def known():
    """flags_of, remembered."""
    seen = {}
    return lambda file: seen.setdefault(file, flags_of(file)) if file not in seen else seen[file]


def test_the_commands_that_people_meet_first_are_found():
    """That the search below finds something is part of what it says."""
    pairs = {(where, file) for where, file, _ in COMMANDS}
    assert {("README.md", "scripts/quickstart.sh"), ("README.md", "scripts/test.sh"), ("README.md", "demo.sh"),
            ("README.md", "scripts/train_text_to_image_lora_sd3.sh"), ("demo.sh", "demo.py"), ("demo.py", "demo.py"),
            ("scripts/train_text_to_image_lora_sd3.sh", "train_text_to_image_lora_sd3.py"),
            ("scripts/quickstart.sh", "src/tiny/evaluate.py"), ("scripts/quickstart.sh", "demo.sh"),
            ("train_text_to_image_lora_sd3.py", "train_text_to_image_lora_sd3.py"), ("src/tiny/dataset.py", "src/tiny/dataset.py"),
            ("benchmarks/lora_step.py", "benchmarks/lora_step.py")} <= pairs  # fmt: skip


@pytest.mark.parametrize(("where", "file", "words"), COMMANDS, ids=[f"{where}-{file}-{n}" for n, (where, file, _) in enumerate(COMMANDS)])
def test_every_command_exists_and_knows_its_flags(where, file, words, known):
    assert (ROOT / file).is_file(), f"{where} runs {file}, which does not exist"
    if file in OWN_ARGUMENTS:
        return
    own = words[: words.index("--")] if "--" in words else words  # what follows is for another program
    unknown = {word.split("=")[0] for word in own if word.startswith("--")} - known(file)
    assert not unknown, f"{where}: {file} does not know {sorted(unknown)}"


def test_no_flag_in_prose_is_invented(known):
    """`--flag` in backticks on a page belongs to one of our programs, or to a named tool."""
    files = [name_of(path) for path in PROGRAMS if "def build_parser" in path.read_text()]
    ours = set().union(*(known(file) for file in files))
    theirs = {"--num_processes", "--multi_gpu", "--machine_rank", "--entries", "--lib", "--tests", "--strict-markers"}  # accelerate, pytest
    theirs |= {"--gpus", "--shm-size", "--stop-timeout", "--network"}  # docker run
    for path in PAGES:
        for flag in re.findall(r"`(--[a-z][\w-]*)[^`]*`", text_of(path)):
            assert flag in ours | theirs, f"{name_of(path)} mentions {flag}, which no program has"


def test_every_path_that_the_pages_link_exists():
    for path in PAGES:
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text(encoding="utf-8")):
            if link.startswith("docs/images/"):
                continue  # written with the measurements
            assert (path.parent / link).exists(), f"{name_of(path)} links {link}"


def test_every_script_in_the_readme_table_exists_and_every_shipped_trainer_is_there():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([\w.]+\.py)` \| `([\w./]+\.sh)` \|", text, re.M)
    listed = {row[0] for row in rows}
    assert listed <= {path.name for path in [*ROOT.glob("train_*.py"), ROOT / "demo.py"]}
    assert listed >= {"demo.py", *(WRAPPED[trainer.wrapper] for trainer in tour.TRAINERS.values())}
    for script, wrapper in rows:
        assert WRAPPED[wrapper] == script and (ROOT / wrapper).is_file()


# --------------------------------------------------------------------------- the same in two languages

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
CHARACTERS = r"[\u4e00-\u9fff]"


def skeleton(text):
    """What does not depend on the language: levels of headings, code blocks without their comments, pictures, links to files."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return {
        "headings": re.findall(r"^#+(?= )", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M),
        "blocks": [(kind, re.sub(r" +#.*", "", body) if kind else re.findall(r"^(.*?)(?:  |$)", body, re.M)) for kind, body in blocks],
        "links": sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README_zh.md"}),
        "markers": re.findall(r"<!-- .* -->", text),
        "bullets": len(re.findall(r"^- ", text, re.M)),
        "flags": sorted(re.findall(r"`(--[\w-]+)", text)),
    }


def table_rows(text):
    """Cells of every table without words: code, numbers and links are the same in any language."""
    rows = []
    for line in re.findall(r"^\|.*\|$", text, re.M):
        cells = line.strip("|").split("|")
        rows.append([sorted(re.findall(r"`[^`]*`|\d+(?:\.\d+)?|\]\([^)]*\)|:?-{3}:?", cell)) for cell in cells])
    return rows


def test_both_languages_have_the_same_headings_commands_links_and_flags():
    english, chinese = skeleton(ENGLISH), skeleton(CHINESE)
    assert len(english["blocks"]) >= 6 and len(english["headings"]) >= 8
    for name, value in english.items():
        assert chinese[name] == value, name


def test_both_languages_have_the_same_tables():
    english, chinese = table_rows(ENGLISH), table_rows(CHINESE)
    assert len(english) >= 30
    for one, other in zip_longest(english, chinese):
        assert one == other, f"README.md has {one}, README_zh.md {other}: rows are added to both"


def test_the_chinese_readme_is_chinese():
    """Every paragraph of words and every row of words has been translated; only code, names, BibTeX and what the tour printed are not."""
    prose = re.sub(r"^```.*?^```|^<!-- table of .*?^<!-- end of the table -->", "", CHINESE, flags=re.M | re.S)
    for line in prose.splitlines():
        words = re.findall(r"[A-Za-z]{3,}", re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", line))
        assert len(words) <= 12 and (re.search(CHARACTERS, line) or len(words) <= 4), line
    assert not re.search(CHARACTERS, ENGLISH.replace("中文", ""))


# Of the README's row: as the wrapper stands, and the smallest variant that the row names.
PREDICTED = {
    "train_text_to_image_lora_sd3": ("lora", 1024, [], ["--config", "scripts/presets/12gb.yaml"]),
    "train_full_finetuning_sd3": ("full", 1024, [], ["--config", "scripts/presets/full-12gb.yaml"]),
    "train_dreambooth_lora_sd3": ("dreambooth", 1024, [], ["--config", "scripts/presets/12gb.yaml"]),
    "train_grpo_sd3": ("grpo", 512, [], ["--gradient_checkpointing"]),
    "train_ddpo_sd3": ("ddpo", 512, [], ["--gradient_checkpointing"]),
    "train_dpo_sd15": ("dpo", 512, [], ["--use_lora", "--gradient_checkpointing"]),
    "train_refl_sd15": ("refl", 512, [], ["--use_lora"]),
}
VAE = {"lora": 83_819_683, "full": 83_819_683, "dreambooth": 83_819_683, "dpo": 83_653_863}  # weights that these plans do not count


@pytest.mark.slow
@pytest.mark.parametrize("program", [
    program if program in ("train_text_to_image_lora_sd3", "train_refl_sd15") else pytest.param(program, marks=pytest.mark.long)
    for program in PREDICTED
])  # fmt: skip
def test_predicted_memory_is_that_of_the_wrappers_own_flags(program, monkeypatch):
    """With 77 + 256 text tokens in SD3, and the VAE in bf16 where the benchmarks' plan does not count it."""
    from benchmarks import loops, trainers

    monkeypatch.chdir(ROOT)
    name, resolution, *variants = PREDICTED[program]
    own = [word for word in printed(Path(wrapper_of(Path(program))).name)[2:]]
    own += ["--class_prompt", "a dog"] * (name == "dreambooth")
    model = own.index("--pretrained_model_name_or_path")
    del own[model : model + 2]  # what the plan takes lies in a folder of its own
    shown = re.search(rf"^\| `{program}.py` \|(?:[^|]*\|){{3}} ([\d.]+) \| ([\d.]+)", ENGLISH, re.M)
    for figure, flags in zip(shown.groups(), variants, strict=True):
        setting = loops.Setting(name, resolution, (*own, "--", *flags), 77 + 256)
        peak = trainers.planned(setting).peak + 2 * VAE.get(name, 0)
        assert float(figure) == pytest.approx(peak / 2**30, abs=0.06)


@pytest.mark.parametrize("path", sorted(ROOT.glob("train_*.py")), ids=name_of)
def test_every_trainer_has_a_wrapper_that_knows_a_tiny_run(path):
    wrapper = ROOT / wrapper_of(path)
    assert wrapper.is_file() and "TINY" in wrapper.read_text()


@pytest.mark.parametrize("name", tour.TRAINERS)
def test_a_wrapper_says_what_to_expect_of_its_tiny_run(name):
    """Its figures are those of the tour's table: from `before` to `after` in each row, and the seconds."""
    table, trainer = ENGLISH.split("<!-- table of scripts/tour.sh -->")[1].split("<!-- end")[0], tour.TRAINERS[name]
    rows = re.search(rf"^\| {trainer.title} .*\n(?:\|  .*\n)*", table, re.M)[0].splitlines()
    text = (ROOT / trainer.wrapper).read_text()
    (expected,) = re.findall(r"^#             expect (.*)$", text, re.M)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    for *_, before, after, _, _ in cells:
        assert f": {before.removesuffix(' %')} -> {after}" in expected, "the wrapper's `expect` is copied from README.md's table"
    assert expected.count(" -> ") == len(rows) and f"; {cells[0][-2]} s on two cores" in expected


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_shell_scripts_parse_and_stop_at_errors(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    # What is run stops at the first error; what is sourced leaves that to its caller.
    assert text.startswith("#!") is ("set -euo pipefail" in text)


def test_defaults_in_wrappers_survive_the_parsers_own_checks(monkeypatch):
    """The values too: each wrapper's command line is parsed, apart from models and data that are not shipped."""
    monkeypatch.chdir(ROOT)
    for where, file, words in COMMANDS:
        if not where.startswith("scripts/train_") or not file.startswith("train_"):
            continue
        module = importlib.import_module(Path(file).stem)
        parser = module.build_parser()
        values = {}  # of the wrapper's arrays: whatever they may hold
        for name, held in re.findall(r"^\s*(\w+)\+?=\(([^)]*)\)", (ROOT / where).read_text(), re.MULTILINE):
            word = f"${{{name}[@]}}"
            values[word] = values.get(word, []) + shlex.split(held)
        args, rest = parser.parse_known_args([value for word in words if word not in ("--", "$@") for value in values.get(word, [word])])
        assert isinstance(args, argparse.Namespace) and not rest, f"{where}: {rest}"


def printed(wrapper, *flags):
    """The command that a wrapper followed by these flags would run, in words."""
    command = ["bash", f"scripts/{wrapper}", *flags]
    environment = os.environ | {"PRINT_COMMAND": "1", "NUM_PROCESSES": "1"}
    return shlex.split(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Wrappers run the real recipe, unless a test says otherwise."""
    monkeypatch.delenv("TINY", raising=False)


def wrapped(wrapper, *flags):
    """The arguments that a wrapper followed by these flags hands to its program, as that program's own parser reads them."""
    words = printed(wrapper, *flags)
    module = importlib.import_module(words[1].removesuffix(".py"))
    return cli.parse(module.build_parser(), [*words[2:], *model_of(module)])


def model_of(module):
    """SD1.5 tells its resolution from the model's folder, which has to be there."""
    return ["--pretrained_model_name_or_path", str(ROOT / "models/tiny-sd15")] if "sd15" in module.__name__ else []


GRPO = "train_aesthetic_rlhf_grpo_lora_sd3.sh"


@pytest.mark.parametrize(
    ("wrapper", "flags", "expected"),
    [
        (GRPO, [], {"noise_level": 0.8, "lora_alpha": 64, "learning_rate": 3e-4, "window_size": 3}),
        (GRPO, ["--loss", "nft"], {"noise_level": None}),
        (GRPO, ["--loss", "guard"], {"noise_level": 0.8}),
        (GRPO, ["--transition", "flow"], {"noise_level": 0.7}),
        (GRPO, ["--transition", "precise"], {"noise_level": 1.5}),
        (GRPO, ["--full_weights"], {"learning_rate": 1e-5}),
        (GRPO, ["--optimizer", "prodigy"], {"learning_rate": 1}),
        (GRPO, ["--config", "scripts/presets/grpo_guard.yaml"], {"loss": "guard", "clip_nats": 0.3, "learning_rate": 1e-4}),
        (GRPO, ["--config", "scripts/presets/nft.yaml"], {"loss": "nft", "noise_level": None, "updates_per_epoch": 1}),
        (GRPO, ["--config", "scripts/presets/flow_grpo.yaml"], {"transition": "flow", "window_size": 0, "prompts": "simple_animals"}),
        ("train_aesthetic_ddpo_sd3.sh", ["--full_weights"], {"learning_rate": 1e-5}),
        (GRPO, [], {"eval_prompts": "activities", "eval_scorers": "image_reward"}),
        (GRPO, ["--prompts", "geneval.jsonl", "--scorer", "geneval"], {"eval_prompts": None, "eval_scorers": "image_reward"}),
        (GRPO, ["--prompts", "mine.txt", "--eval_prompts", "activities"], {"eval_prompts": "activities"}),
        (GRPO, ["--scorer", "image_reward"], {"eval_scorers": "clip"}),
        (GRPO, ["--scorer", "clip,image_reward"], {"eval_scorers": None}),
        ("train_aesthetic_ddpo_sd3.sh", ["--scorer", "clip=0.5,image_reward=0.5"], {"eval_scorers": None}),
        ("train_aesthetic_ddpo_sd3.sh", ["--scorer", "clip", "--eval_scorers", "clip"], {"eval_scorers": "clip"}),  # refused later
        ("train_refl_v1_5.sh", ["--scorer", "clip"], {"eval_scorers": None}),
        ("train_text_to_image_lora_sd3.sh", ["--optimizer", "prodigy"], {"learning_rate": 1}),
        ("train_text_to_image_lora_sd3.sh", ["--config", "scripts/presets/12gb.yaml"], {"gradient_checkpointing": True, "rank": 16}),
        ("train_text_to_image_lora_sd3.sh", ["--validation_prompt", "mine"], {"validation_prompt": ["mine"]}),
        ("train_full_finetuning_sd3.sh", ["--optimizer", "prodigy"], {"learning_rate": 1}),
        ("train_full_finetuning_sd3.sh", ["--no-use_ema"], {"use_ema": False}),
        ("train_dpo_sd_v1_5.sh", ["--sft"], {"learning_rate": 5e-6}),
        ("train_dpo_sd_v1_5.sh", ["--optimizer", "prodigy"], {"learning_rate": 1}),
        ("train_dreambooth_lora_sd3.sh", ["--instance_data_dir", "d", "--instance_prompt", "a sks", "--no-with_prior_preservation"],
         {"with_prior_preservation": False}),
        ("train_refl_v1_5.sh", ["--method", "draft", "--draft_k", "1"], {"method": "draft"}),
        ("train_refl_v1_5.sh", [], {"learning_rate": 1e-5}),  # what all weights bear is a tenth of what a LoRA takes
        ("train_refl_v1_5.sh", ["--use_lora"], {"learning_rate": 1e-4}),
        ("train_dpo_sd_v1_5.sh", ["--use_lora"], {"learning_rate": 1e-4}),
        ("train_dpo_sd_v1_5.sh", ["--use_lora", "--learning_rate", "3e-4"], {"learning_rate": 3e-4}),
        ("train_dpo_sd_v1_5.sh", [], {"learning_rate": 5e-6, "chosen_column": "chosen", "caption_column": "prompt"}),
        ("train_dpo_sd_v1_5.sh", ["--dataset_name", "mine"], {"chosen_column": "jpg_0", "caption_column": "caption"}),
    ],
)  # fmt: skip
def test_a_wrapper_takes_the_variants_of_its_algorithm(wrapper, flags, expected):
    """Its own values give way: to what a variant fills in by itself, and where they have no effect beside it."""
    args = vars(wrapped(wrapper, *flags))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("wrapper", "flags", "expected"),
    [
        ("train_aesthetic_ddpo_sd3.sh", [], ("shapes_held_out", "shapes")),
        ("train_aesthetic_ddpo_sd3.sh", ["--prompts", "foxes.txt"], (None, None)),
        ("train_aesthetic_ddpo_sd3.sh", ["--prompts", "drawings.txt"], (None, "shapes")),
        ("train_aesthetic_ddpo_sd3.sh", ["--prompts", "drawings.txt", "--eval_prompts", "foxes.txt"], ("foxes.txt", None)),
        ("train_aesthetic_ddpo_sd3.sh", ["--prompts", "foxes.txt", "--eval_prompts", "shapes_held_out"], ("shapes_held_out", "shapes")),
        ("train_aesthetic_ddpo_sd3.sh", ["--prompts", "foxes.txt", "--eval_scorers", "shapes"], (None, "shapes")),  # refused later
        ("train_aesthetic_ddpo_sd3.sh", ["--prompts", "someone/prompts"], (None, None)),  # what is downloaded later may be anything
        ("train_aesthetic_ddpo_sd3.sh", ["--prompts", "nowhere.txt"], (None, None)),  # refused later, by its own name
        (GRPO, ["--prompts", "foxes.txt"], (None, "tiny_clip")),
        ("train_refl_v1_5.sh", ["--prompts", "foxes.txt"], (None, None)),
        ("train_refl_v1_5.sh", ["--prompts", "drawings.txt"], (None, "shapes_strict")),
    ],
)  # fmt: skip
def test_a_tiny_wrappers_verifier_yields_to_prompts_that_it_cannot_judge(wrapper, flags, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY", "1")
    (tmp_path / "foxes.txt").write_text("a fox\n")
    (tmp_path / "drawings.txt").write_text("a red circle on a blue background\n")
    here = {name: str(tmp_path / name) for name in ("foxes.txt", "drawings.txt", "nowhere.txt")}
    args = wrapped(wrapper, *(here.get(flag, flag) for flag in flags))
    assert (args.eval_prompts, args.eval_scorers) == (here.get(expected[0], expected[0]), expected[1])


def test_a_config_changes_what_belongs_to_it_as_flags_do(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("use_lora: true\ndataset_name: mine")
    args = wrapped("train_dpo_sd_v1_5.sh", "--config", str(file))
    assert (args.learning_rate, args.chosen_column, args.dataset_name) == (1e-4, "jpg_0", "mine")
    file.write_text("use_lora: true\nlearning_rate: 2e-4")
    args = wrapped("train_dpo_sd_v1_5.sh", "--config", str(file))
    assert (args.learning_rate, args.chosen_column) == (2e-4, "chosen")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiny", "wrapper", "flags"),
    [
        ("", GRPO, ["--prompts", "geneval.jsonl", "--scorer", "geneval"]), ("", GRPO, ["--scorer", "pickscore=1"]),
        ("", GRPO, ["--config", "mine.yaml"]), ("", GRPO, ["--scorer", "clip,image_reward"]),
        ("1", GRPO, ["--prompts", "mine.txt", "--scorer", "pickscore=1"]),
        ("", "train_aesthetic_ddpo_sd3.sh", ["--scorer", "jpeg_compressibility", "--prompts", "mine.txt"]),
        ("1", "train_aesthetic_ddpo_sd3.sh", ["--prompts", "mine.txt"]),
        ("", "train_aesthetic_ddpo_sd3.sh", ["--prompts", "geneval.jsonl", "--scorer", "geneval"]),
        ("1", "train_refl_v1_5.sh", ["--scorer", "pickscore", "--prompts", "mine.txt", "--use_lora"]),
    ],
)  # fmt: skip
def test_a_documented_variant_of_a_wrapper_makes_a_plan(tiny, wrapper, flags, tmp_path, monkeypatch, capsys):
    """With the tiny model, as if the weights of all scorers were there: what the wrapper adds must not be refused beside what is given."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TINY", tiny)
    monkeypatch.setattr(scorers.base.Scorer, "trouble", lambda scorer, given, weights: None)
    (tmp_path / "geneval.jsonl").write_text('{"prompt": "a photo of two cats", "include": [{"class": "cat", "count": 2}]}')
    (tmp_path / "mine.txt").write_text("a fox")
    (tmp_path / "mine.yaml").write_text("scorer: image_reward")
    flags = [str(tmp_path / flag) if "." in flag else flag for flag in flags]
    model = "models/tiny-sd15" if "v1_5" in wrapper else "models/tiny-sd3"
    words = printed(wrapper, *flags, "--pretrained_model_name_or_path", model, "--resolution", "64", "--dry_run",
                    "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"))  # fmt: skip
    module = importlib.import_module(words[1].removesuffix(".py"))
    module.main(module.parse_args(words[2:]))
    assert "dry run" in capsys.readouterr().out


@pytest.mark.parametrize("wrapper", sorted(path.name for path in (ROOT / "scripts").glob("train_*.sh")))
def test_the_args_of_a_run_repeat_it_through_the_wrapper(wrapper, tmp_path):
    """Every value is the file's, not the wrapper's; the file here says of each flag what the program would do by itself."""
    module = importlib.import_module(WRAPPED[f"scripts/{wrapper}"].removesuffix(".py"))
    needed = {"train_dreambooth_lora_sd3": ["--instance_data_dir", "datas/subject", "--instance_prompt", "a sks"]}.get(module.__name__, [])
    if "dataset_name" in vars(module.build_parser().parse_args([])) and not needed:
        needed = ["--dataset_name", "elsewhere"]
    run = runtime.plain_args(cli.parse(module.build_parser(), [*needed, *model_of(module), "--seed", "7", "--output_dir", str(tmp_path)]))
    (tmp_path / "args.json").write_text(json.dumps(run))
    assert runtime.plain_args(wrapped(wrapper, "--config", str(tmp_path / "args.json"))) == run
