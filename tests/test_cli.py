"""Flags: each is read, explained and refused where it has no effect; --config; checks that leave no trace."""

import argparse
import ast
import importlib
import inspect
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from src import cli
from src.cli import refusals

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in [*ROOT.glob("train_*.py"), ROOT / "demo.py"] if path.exists())


# --------------------------------------------------------------------------- every script: every flag is read, none undeclared


def source_of(thing) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


def reads(tree: ast.AST) -> set[str]:
    """X of every `args.X`, `run.args.X`, `self.args.X` in a piece of code; "?X" where it is read only if the script has it, by
    `getattr(args, "X", default)`, or stands in for a value that was not given, as in `total or args.X`."""
    found = set()
    choices = [node for node in ast.walk(tree) if isinstance(node, (ast.IfExp, ast.BoolOp))]
    chosen = {id(inner) for node in choices for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) == "args":
            found |= {f"?{key.value}" for key in node.args[1:2] if isinstance(key, ast.Constant)}
        if isinstance(node, ast.Attribute):
            owner = node.value
            if (isinstance(owner, ast.Name) and owner.id == "args") or (isinstance(owner, ast.Attribute) and owner.attr == "args"):
                found.add(f"?{node.attr}" if id(node) in chosen else node.attr)
    return found


def resolve(expression: ast.AST, names: dict):
    """The object behind `runtime.start`, `add_lora`, ...; None for what exists only while running."""
    if isinstance(expression, ast.Name):
        return names.get(expression.id)
    if isinstance(expression, ast.Attribute):
        return getattr(resolve(expression.value, names), expression.attr, None)
    return None


def hands_on(call: ast.Call) -> bool:
    """Whether a call is given `args`, or a `run` that holds them."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(getattr(a, "id", getattr(a, "attr", "")) in ("args", "run") for a in given)


def reached(tree: ast.AST, names: dict, seen: set) -> set[str]:
    """Flags read by the code and by every function or class of src that it hands `args` to. What only checks or plans does not count."""
    found = reads(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and hands_on(node)):
        target = resolve(call.func, names)
        module = getattr(target, "__module__", "") or ""
        if target is None or id(target) in seen or not module.startswith("src."):
            continue
        if (
            module == "src.plan" or module.startswith("src.cli")
        ) and target.__name__ != "scorer_options":  # which hands them on to the scorers
            continue
        if target.__name__.startswith("check"):
            continue
        seen.add(id(target))
        inside = vars(sys.modules[module])
        found |= reached(source_of(target), inside, seen)
        made = inside.get(str(getattr(target, "__annotations__", {}).get("return", "")))  # a class that keeps the run
        if inspect.isclass(made) and id(made) not in seen:
            seen.add(id(made))
            found |= reached(source_of(made), vars(sys.modules[made.__module__]), seen)
    return found


def flags_of_script(name: str) -> tuple[set[str], set[str]]:
    """Declared and read flags; what is read only where a script has it counts for those that do."""
    module = importlib.import_module(name)
    declared = {action.dest for action in module.build_parser()._actions} - {"help", "config"}  # cli.parse itself reads --config
    tree = ast.parse(inspect.getsource(module))
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "check"]
    found = reached(tree, vars(module), set())
    return declared, {name for name in found if not name.startswith("?")} | {name for name in declared if f"?{name}" in found}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_of_a_script_is_read_and_none_is_read_undeclared(name):
    declared, read = flags_of_script(name)
    assert not declared - read, f"{name} declares but never reads {sorted(declared - read)}"
    assert not read - declared, f"{name} reads but never declares {sorted(read - declared)}"


def test_the_test_above_notices_both_mistakes():
    tree = ast.parse("def main(args):\n    run = runtime.start(args)\n    print(args.rank, args.unknown)")
    from src import runtime

    found = reached(tree, {"runtime": runtime}, set())
    assert {"rank", "unknown", "output_dir", "seed", "mixed_precision", "report_to"} <= found
    assert "lora_alpha" not in found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help_and_no_group_is_empty(name):
    parser = importlib.import_module(name).build_parser()
    for action in parser._actions:
        assert action.help, f"{action.option_strings} has no help"
        assert not action.help.startswith(("of ", "the same ")), f"{action.option_strings}: say what it is, a reader may come from anywhere"
    assert "usage: " in parser.format_usage() and parser.format_usage().count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason="no script yet")
def test_help_answers_in_five_seconds():
    """Processor time of the child: the same on a busy machine. The better of two: the first may read from a cold disk."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, f"{SCRIPTS[-1]}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert seconds() < 5 or seconds() < 5


# --------------------------------------------------------------------------- a parser with every group


def every_group():
    parser = cli.make_parser("A script.\n\n  1. with steps")
    g = parser.add_argument_group("algorithm")
    g.add_argument("--group_size", type=cli.positive_int, default=24, help="images per prompt")
    cli.add_model_args(parser)
    cli.add_speed_args(parser)
    cli.add_text_args(parser)
    cli.add_data_args(parser)
    parser.set_defaults(dataset_name="some/dataset")
    cli.add_timestep_args(parser)
    cli.add_optimization_args(parser, learning_rate=1e-4)
    cli.add_budget_args(parser, max_train_steps=100)
    cli.add_lora_args(parser)
    cli.add_quantization_args(parser)
    cli.add_validation_args(parser)
    cli.add_validation_loss_args(parser)
    cli.add_run_args(parser, output_dir="outputs/none")
    return parser


@pytest.fixture
def parse(tmp_path):
    def run(*argv, checks=()):
        places = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
        return cli.parse(every_group(), [*places, "--report_to", "none", *argv], checks)

    return run


@pytest.fixture
def refusal(parse, capsys):
    def run(*argv, checks=()):
        with pytest.raises(SystemExit) as stop:
            parse(*argv, checks=checks)
        text = capsys.readouterr().err
        assert stop.value.code == 2 and text.count("\n") == 1, text
        return text

    return run


def test_defaults_pass_and_unset_values_follow_other_flags(parse):
    args = parse()
    assert (args.learning_rate, args.lora_alpha, args.rank, args.seed) == (1e-4, 16.0, 16, None)
    assert (args.shift, args.resolution, args.mixed_precision, args.cache_latents) == ("model", 512, "bf16", True)
    assert parse("--optimizer", "prodigy").learning_rate == 1.0
    assert parse("--optimizer", "prodigy", "--learning_rate", "0.5").learning_rate == 0.5  # a factor of what it finds
    assert parse("--rank", "4").lora_alpha == 4.0
    assert parse("--rank", "4", "--lora_alpha", "8").lora_alpha == 8.0


def test_own_group_first_and_defaults_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(every_group(), ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "algorithm:" and "  1. with steps" in text
    assert "(default: 0.0)" in text and "(default: None)" not in text and "--no-cache_latents" in text


def test_defaults_stand_in_the_help_as_they_would_be_typed(capsys):
    parser = cli.make_parser("A script.")
    parser.add_argument("--window_range", type=int, nargs=2, default=[0, 5], metavar=("FIRST", "STOP"), help="steps")
    parser.add_argument("--skip_layers", type=cli.layer_numbers, default=[7, 8, 9], help="blocks")
    parser.add_argument("--negative_prompt", default="", help="what to avoid")
    parser.add_argument("--seed", type=cli.seed, help="seed of the noise")
    with pytest.raises(SystemExit):
        cli.parse(parser, ["--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-4:] == [
        "--window_range FIRST STOP steps (default: 0 5)", "--skip_layers TEXT blocks (default: 7,8,9)",
        "--negative_prompt TEXT what to avoid", "--seed N seed of the noise",
    ]  # fmt: skip


def test_nothing_given_means_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--rank", "3", "--report_to", "none"])
    assert cli.parse(every_group()).rank == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        (["--lr", "1"], "unknown flag --lr; did you mean --learning_rate?"),
        (["--bs=4"], "unknown flag --bs=4; did you mean --train_batch_size?"),
        (["--resume", "latest"], "unknown flag --resume; did you mean --resume_from_checkpoint?"),
        (["--wandb"], "unknown flag --wandb; did you mean --report_to?"),
        (["--lora_d", "0.1"], "unknown flag --lora_d; did you mean --lora_dropout?"),
        (["--zzz", "1"], "unknown flag --zzz; --help lists the flags"),
        (["--lr", "1"], "unknown flag --lr"),  # no abbreviations: it is not --lr_power
        (["--nonsense_flag=3"], "--help lists"),
        (["stray"], "unexpected argument stray"),
        (["--resolution", "500"], "--resolution: must be a multiple of 16 (8x VAE, 2x2 patches), got 500; try 496"),
        (["--resolution", "7"], "try 16"),
        (["--rank", "0"], "--rank: must be at least 1, got 0"),
        (["--rank", "many"], "--rank: must be a whole number, got 'many'"),
        (["--seed", str(2**63)], f"--seed: must lie in 0 .. 2**63 - 1, got {2**63}"),
        (["--seed", "-1"], "--seed: must lie in 0 .. 2**63 - 1, got -1"),
        (["--learning_rate", "0"], "--learning_rate: must be greater than 0"),
        (["--learning_rate", "nan"], "--learning_rate: must be a finite number"),
        (["--max_grad_norm", "-1"], "--max_grad_norm: must be at least 0"),
        (["--caption_dropout", "1.5"], "--caption_dropout: must lie in [0, 1]"),
        (["--adam_beta1", "1"], "--adam_beta1: must lie in [0, 1), like 0.999, got 1"),
        (["--shift", "big"], '--shift: must be "model", "resolution" or a number'),
        (["--checkpoints_total_limit", "0"], "--checkpoints_total_limit: must be at least 1"),
        (["--mixed_precision", "fp8"], "--mixed_precision: invalid choice: 'fp8'"),
        (["--validation_prompts_file", "/no/such.txt"], "--validation_prompts_file: no such file"),
        (["--rank"], "--rank: expected one argument"),
        (["--dataset_name", ""], "--dataset_name is required"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_flag_and_the_cure(refusal, argv, words):
    assert words in refusal(*argv)


def test_right_values_of_the_special_types(parse):
    assert parse("--shift", "3").shift == 3.0
    assert parse("--shift", "resolution").shift == "resolution"
    assert parse("--resolution", "1008").resolution == 1008
    assert parse("--validation_prompt", "a", "--validation_prompt", "b").validation_prompt == ["a", "b"]
    assert parse("--logit_mean", "-0.5").logit_mean == -0.5


@pytest.mark.parametrize(("steps", "warmup"), [(100, 25), (2000, 500), (4000, 500), (3, 0)])
def test_warm_up_is_500_steps_or_a_quarter_of_a_shorter_run(parse, steps, warmup):
    """Any --max_train_steps goes with a wrapper that asks for constant_with_warmup."""
    assert parse("--lr_scheduler", "constant_with_warmup", "--max_train_steps", str(steps)).lr_warmup_steps == warmup
    assert parse("--max_train_steps", str(steps)).lr_warmup_steps == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr_warmup_steps", "5"], "--lr_warmup_steps 5 has no effect with --lr_scheduler constant; use constant_with_warmup"),
        (["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "0"], "needs --lr_warmup_steps"),
        (["--lr_scheduler", "cosine", "--lr_warmup_steps", "100"], "must be less than --max_train_steps 100"),
        (["--lr_num_cycles", "3", "--lr_scheduler", "cosine"], "--lr_num_cycles 3 has no effect without"),
        (["--lr_power", "2"], "--lr_power 2.0 has no effect without --lr_scheduler polynomial"),
        (["--lr_scheduler", "polynomial", "--learning_rate", "1e-8"], "--lr_scheduler polynomial ends at 1e-7, --learning_rate 1e-08"),
        (["--lr_scheduler", "polynomial", "--learning_rate", "1e-7"], "--learning_rate 1e-07 is no more than that"),
        (["--optimizer", "adafactor", "--adam_beta2", "0.9"], "--adam_beta2 0.9 has no effect with --optimizer adafactor"),
        (["--optimizer", "adafactor", "--adam_epsilon", "1e-6"], "--adam_epsilon"),
        (["--optimizer", "prodigy", "--scale_lr"], "--scale_lr contradicts --optimizer prodigy"),
        (["--ema_decay", "0.9"], "--ema_decay 0.9 has no effect without --use_ema"),
        (["--timestep_density", "uniform", "--logit_mean", "1"], "--logit_mean 1.0 has no effect without --timestep_density logit_normal"),
        (["--timestep_density", "mode", "--logit_std", "2"], "--logit_std"),
        (["--timestep_density", "mode", "--mode_scale", "1.8"], "--mode_scale must lie in [-1, 1.7519], got 1.8; 1.29 is the paper's best"),
        (["--mode_scale", "1"], "--mode_scale 1.0 has no effect without --timestep_density mode"),
        (["--random_crop"], "add --no-cache_latents"),
        (["--no-cache_latents", "--no-cache_text", "--cache_batch_size", "2"], "--cache_batch_size 2 has no effect"),
        (["--hub_model_id", "me/it"], "--hub_model_id me/it has no effect without --push_to_hub"),
        (["--tracker_project_name", "mine"], "--tracker_project_name mine has no effect with --report_to none"),
        (["--revision", "main", "--pretrained_model_name_or_path", "."], "--revision main has no effect on a local"),
        (["--dataset_revision", "main", "--dataset_name", "."], "--dataset_revision main has no effect on a local"),
        (["--quantize_base", "int8", "--use_dora"], "--use_dora needs the base's full weights"),
        (["--quantize_base", "nf4", "--export_merged"], "--export_merged would write the rounded weights"),
        (["--checkpoint_every", "2"], "--checkpoint_every 2 has no effect without --gradient_checkpointing"),
        (["--compile_mode", "reduce-overhead"], "--compile_mode reduce-overhead has no effect without --compile"),
        (["--compile", "--compile_mode", "reduce-overhead", "--gradient_checkpointing"], "cannot record what --gradient_checkpointing"),
        (["--compile", "--compile_mode", "reduce-overhead", "--aspect_buckets"], "--aspect_buckets has many; use default"),
        (["--compile", "--compile_mode", "reduce-overhead", "--gradient_accumulation_steps", "2"], "_steps has several"),
    ],
)
def test_an_option_without_effect_is_an_error(refusal, argv, words):
    assert words in refusal(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--lr_warmup_steps", "5", "--lr_scheduler", "constant_with_warmup"],
        ["--lr_num_cycles", "3", "--lr_scheduler", "cosine_with_restarts"],
        ["--lr_power", "2", "--lr_scheduler", "polynomial"],
        ["--optimizer", "adafactor", "--adam_weight_decay", "0.1"],
        ["--use_ema", "--ema_decay", "0.9"],
        ["--logit_mean", "1", "--logit_std", "2"],
        ["--timestep_density", "mode", "--mode_scale", "1"],
        ["--timestep_density", "mode", "--mode_scale", "-1"],
        ["--random_crop", "--no-cache_latents"],
        ["--no-cache_latents", "--cache_batch_size", "2"],
        ["--hub_model_id", "me/it", "--push_to_hub"],
        ["--checkpoint_every", "2", "--gradient_checkpointing"],
        ["--compile", "--compile_mode", "reduce-overhead"],
        ["--revision", "main", "--pretrained_model_name_or_path", "someone/model"],
    ],
)
def test_the_same_options_with_effect_pass(parse, argv):
    parse(*argv)


def test_rules_ask_for_flags_that_the_programs_have():
    """A rule that asks for another is passed over, as in a trainer of one's own; here it would be a slip."""
    parsers = [importlib.import_module(name).build_parser() for name in SCRIPTS]
    everywhere = set().union(*({action.dest for action in parser._actions} for parser in parsers))
    others = {"getattr", "hasattr", "math", "inf", "os", "path", "exists", "isdir", "_data_of", "judged_by"}
    for names, rule, _ in refusals.WITHOUT_EFFECT:
        assert {*names, *rule.__code__.co_names} - others <= everywhere, names


def test_a_program_may_have_some_flags_of_a_rule_and_set_others_itself():
    """--beta_dpo without --sft, which the rule for it reads; --logit_mean where the density is fixed."""
    parser = cli.make_parser("A trainer of one's own.")
    parser.add_argument("--beta_dpo", type=cli.positive_float, default=1.0, help="as in Diffusion-DPO")
    parser.add_argument("--logit_mean", type=cli.number, default=0.0, help="as in SD3")
    parser.set_defaults(timestep_density="logit_normal")
    parser.add_argument("--config", type=Path, help="as everywhere")  # and so it may have a wrapper
    for argv in (["--beta_dpo", "500", "--logit_mean", "1"], ["--beta_dpo", "500", "--", "--logit_mean", "1"]):
        args = vars(cli.parse(parser, argv))
        assert (args["beta_dpo"], args["logit_mean"], args["timestep_density"]) == (500.0, 1.0, "logit_normal")


# --------------------------------------------------------------------------- --config


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_a_config_sets_flags_and_the_command_line_wins(parse, config):
    text = """
        rank: 4
        learning_rate: 1e-3        # YAML reads this as a text
        mixed_precision: no        # ... and this as false
        cache_latents: false
        use_ema: true
        no_hflip: false
        lora_layers: "-odd"
        seed: null
        validation_prompt: [a red circle, "--dashes"]
    """
    args = parse(*config(textwrap.dedent(text)), "--learning_rate", "2e-3")
    assert (args.rank, args.learning_rate, args.mixed_precision, args.lora_alpha) == (4, 2e-3, "no", 4.0)
    assert (args.cache_latents, args.use_ema, args.no_hflip, args.seed) == (False, True, False, None)
    assert args.lora_layers == "-odd" and args.validation_prompt == ["a red circle", "--dashes"]
    assert parse(*config("cache_latents: false"), "--cache_latents").cache_latents is True


def test_a_repeatable_flag_of_the_command_line_replaces_the_configs(parse, config):
    assert parse(*config("validation_prompt: [a, b]"), "--validation_prompt", "c").validation_prompt == ["c"]
    assert parse(*config("validation_prompt: [a, b]"), "--validation_prompt=c").validation_prompt == ["c"]


def test_a_wrappers_flags_yield_to_a_config_and_that_to_what_is_given(parse, config):
    """Three sources of one flag: 1 by the wrapper, 2 by the file, 3 on the command line; the strongest that is there counts."""
    wrapper, file, given = ["--rank", "1"], config("rank: 2"), ["--rank", "3"]
    assert parse(*wrapper, "--", *file, *given).rank == parse(*wrapper, "--", *given, *file).rank == 3
    assert parse(*wrapper, "--", *file).rank == 2 and parse(*wrapper, "--").rank == 1
    assert parse(*file, *wrapper, "--").rank == 1  # the file is the wrapper's own
    assert parse(*file, "--", *config("seed: 5")).rank == 16  # which another takes the place of
    assert cli.parse(every_group(), ["--", *given, "--report_to", "none"]).rank == 3


def test_what_a_config_says_is_off_or_unset_takes_back_a_wrappers_flag(parse, config):
    wrapper = ["--gradient_checkpointing", "--seed", "7", "--no_hflip", "--"]
    args = parse(*wrapper, *config("gradient_checkpointing: false\nseed: null\nno_hflip: false"))
    assert (args.gradient_checkpointing, args.seed, args.no_hflip) == (False, None, False)


def test_a_repeatable_flag_that_is_given_replaces_a_wrappers(parse, config):
    wrapper = ["--validation_prompt", "a", "--validation_prompt", "b", "--"]
    assert parse(*wrapper, "--validation_prompt", "c", "--validation_prompt", "d").validation_prompt == ["c", "d"]
    assert parse(*wrapper, *config("validation_prompt: [e]")).validation_prompt == ["e"]
    assert parse(*wrapper).validation_prompt == ["a", "b"]


def test_a_wrappers_flag_without_effect_yields_and_ones_own_is_refused(parse, refusal):
    """The wrapper speaks for its own recipe: --optimizer prodigy makes another of it, whose learning rate is 1."""
    assert parse("--learning_rate", "1e-4", "--", "--optimizer", "prodigy").learning_rate == 1
    own = ("--optimizer", "prodigy", "--learning_rate", "1e-4")
    for argv in (own, ("--learning_rate", "1e-3", "--", *own)):  # also where it takes the place of the wrapper's
        assert "--learning_rate 0.0001 has no effect with --optimizer prodigy" in refusal(*argv)
    assert parse("--lr_warmup_steps", "9", "--lr_scheduler", "linear", "--", "--lr_scheduler", "constant").lr_warmup_steps == 0
    assert "unknown flag --bad" in refusal("--bad", "--") and "unknown flag --bad" in refusal("--rank", "2", "--", "--bad")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("zzz: 1", "unknown key 'zzz'; --help lists the flags"),
        ("config: other.yaml", "unknown key 'config'"),
        ("help: true", "unknown key 'help'"),
        ("resolution: 500", "--resolution: must be a multiple of 16"),
        ("rank: 4.5", "--rank: must be a whole number, got '4.5'"),
        ("mixed_precision: fp8", "--mixed_precision: invalid choice"),
        ("use_ema: 1", "use_ema must be true or false, got 1"),
        ("rank: true", "rank must be a number or a text, got True"),
        ("rank: [1, 2]", "rank takes one value, got a list of 2"),
        ("rank: {a: 1}", "rank must be a number or a text"),
        ("lr_warmup_steps: 3", "--lr_warmup_steps 3 has no effect"),
        ("- rank", "must be lines of `flag: value`, got a list"),
        ("rank: [", "not valid YAML"),
    ],
)
def test_a_wrong_config_is_one_line(refusal, config, text, words):
    assert words in refusal(*config(text))


def test_a_missing_or_empty_config(parse, refusal, config, tmp_path):
    assert "No such file" in refusal("--config", str(tmp_path / "no.yaml"))
    assert "expected one argument" in refusal("--config")
    assert parse(*config("# nothing")).rank == 16


# --------------------------------------------------------------------------- checks


def test_checks_run_in_order_and_raise_value_errors_only(refusal, parse):
    seen = []

    def first(args):
        seen.append(args.rank)

    def second(args):
        raise ValueError("--rank is odd;\n  try 4")

    assert "--rank is odd; try 4" in refusal(checks=(first, second))
    assert seen == [16]
    with pytest.raises(KeyError):  # a mistake in the code keeps its traceback
        parse(checks=(lambda args: {}["x"],))


def test_an_output_folder_that_is_or_lies_in_a_file_is_refused(refusal, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "deeper" / "run"):
        text = refusal("--output_dir", str(path))
        assert "--output_dir" in text and "is not a folder" in text
    assert "--cache_dir" in refusal("--cache_dir", str(file / "x"))


def test_a_dangling_link_is_refused(refusal, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert "is not a folder" in refusal("--output_dir", str(link / "run"))


def test_checking_creates_nothing(parse, tmp_path):
    parse("--output_dir", str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_no_permission_is_refused(tmp_path):
    """As root everything is writable: the check runs in a child without privileges."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            cli.check_writable(locked / "run")
        except ValueError as error:
            code = 0 if "--output_dir" in str(error) and "no permission" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """A machine with both trackers installed and no wandb login."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(cli.environment, "installed", lambda package: True)
    return tmp_path / "netrc"


def test_wandb_without_a_login_offers_the_offline_mode(no_login):
    for choice in ("wandb", "all"):
        with pytest.raises(ValueError, match=f"--report_to {choice}.*`{sys.executable} -m wandb login`.*WANDB_MODE=offline"):
            cli.check_trackers(choice)
    cli.check_trackers("tensorboard")
    cli.check_trackers("none")


def test_every_kind_of_wandb_login_is_accepted(no_login, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "made-up")):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            cli.check_trackers("wandb")
    no_login.write_text("machine example.com login user password made-up\n")
    with pytest.raises(ValueError):
        cli.check_trackers("wandb")
    no_login.write_text("machine api.wandb.ai login user password made-up\n")
    cli.check_trackers("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    with pytest.raises(ValueError):
        cli.check_trackers("wandb")


def test_a_missing_tracker_is_one_line(monkeypatch):
    monkeypatch.setattr(cli.environment, "installed", lambda package: False)
    with pytest.raises(ValueError, match=f"--report_to tensorboard: .*; {sys.executable} -m pip install tensorboard, or"):
        cli.check_trackers("tensorboard")


def test_what_is_to_be_installed_goes_where_the_program_runs():
    """A bare `pip` is the system's: who runs a wrapper has never activated .venv."""
    lines = [line for file in [*ROOT.glob("*.py"), *ROOT.glob("src/**/*.py")] for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line.strip() for line in lines if re.search(r"(?<!sys\.executable} -m )pip install [^`-]", line)] == []
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if re.search(r"(?<!\.venv/bin/python -m )pip install", line)] == []


def test_a_folder_named_like_a_package_is_not_the_package(tmp_path, monkeypatch):
    """An offline wandb run leaves ./wandb, which Python would import as an empty namespace."""
    (tmp_path / "surely_no_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not cli.installed("surely_no_package") and not cli.installed("absent_altogether") and cli.installed("json")


def test_scripts_without_a_group_are_not_asked_for_its_flags(tmp_path):
    parser = cli.make_parser("demo")
    parser.add_argument("--output_dir", type=Path, default=tmp_path)
    assert cli.parse(parser, []) == argparse.Namespace(output_dir=tmp_path)


# --------------------------------------------------------------------------- ~, which no shell expands in --config or behind `=`


NAMES_A_PATH = re.compile(
    r"(path|_dir|_file|dataset_name|prompts|^config|template|judge_cache|reference_model|init_lora|resume_from_checkpoint)$"
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_that_names_a_path_knows_the_home_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").touch()
    parser = importlib.import_module(name).build_parser()
    actions = {action.dest: action for action in parser._actions if NAMES_A_PATH.search(action.dest) and not action.dest.startswith("num_")}
    assert {"output_dir", "pretrained_model_name_or_path"} <= set(actions)
    for action in actions.values():
        assert action.type is not None and str(action.type("~/x")) == str(tmp_path / "x"), action.dest


def test_a_config_may_name_the_home_folder(tmp_path, monkeypatch):
    """As if the shell had expanded it: the model is found, the folder is checked and written at one place, and args.json says which."""
    import train_text_to_image_lora_sd3 as script

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").symlink_to(ROOT / "models/tiny-sd3")
    (tmp_path / "photos").symlink_to(ROOT / "datas/photos")
    config = "pretrained_model_name_or_path: ~/m\ndataset_name: ~/photos\noutput_dir: ~/runs/a\nresolution: 64\nmixed_precision: 'no'\n"
    (tmp_path / "run.yaml").write_text(config)
    args = script.parse_args(["--config=~/run.yaml", "--cache_dir=~/cache"])
    assert args.pretrained_model_name_or_path == str(tmp_path / "m") and args.dataset_name == str(tmp_path / "photos")
    assert args.output_dir == tmp_path / "runs/a" and args.cache_dir == tmp_path / "cache"
    assert args.seed is None and args.init_lora is None


def test_what_is_no_path_in_the_home_folder_stays_as_it_is():
    assert cli.path_or_name("owner/name") == "owner/name" and cli.path_or_name("a~b") == "a~b" and cli.path_or_name("./m/") == "./m/"
    assert str(cli.path("~nobody-of-this-name/x")) == "~nobody-of-this-name/x"


def test_no_program_reads_a_path_without_expanding_it():
    files = [*ROOT.glob("*.py"), *ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    assert [file.name for file in files if "type=Path" in file.read_text(encoding="utf-8")] == []
