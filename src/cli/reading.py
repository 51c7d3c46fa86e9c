"""From tokens to checked arguments: a wrapper's flags, --config and the command line, which wins."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from src.cli import refusals
from src.cli.elsewhere import ELSEWHERE, GONE, OTHER_UNITS
from src.cli.environment import check_environment
from src.cli.parser import Parser
from src.cli.scorers import parts

Check = Callable[[argparse.Namespace], None]


def _flag(action: argparse.Action) -> str:
    return next(option for option in action.option_strings if option.startswith("--"))


def _tokens(action: argparse.Action, value: object, where: str) -> list[str]:
    """The command-line tokens for `key: value`; null means unset."""
    flag, name = _flag(action), action.dest
    if value is None:
        return []
    if action.nargs == 0:  # store_true and BooleanOptionalAction
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
        if value:
            return [flag]
        return ["--no-" + flag[2:]] if isinstance(action, argparse.BooleanOptionalAction) else []
    if value is False and "no" in (action.choices or ()):  # YAML 1.1 reads an unquoted `no` as false
        value = "no"
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not isinstance(action, argparse._AppendAction) and action.nargs is None:
        raise ValueError(f"{where}: {name} takes one value, got a list of {len(value)}")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise ValueError(f"{where}: {name} must be a number or a text, got {item!r}")
    if action.nargs is not None:
        return [flag, *map(str, values)]
    return [f"{flag}={item}" for item in values]  # one token each, so that a value may begin with a dash


def read_config(parser: argparse.ArgumentParser, path: Path) -> tuple[list[str], list[str]]:
    """Command-line tokens equivalent to a YAML file of flags, and the names of flags that it sets to null or false.

    Raises:
        ValueError: no such file, not a mapping, unknown key (with the nearest flag), a value of the wrong kind.
    """
    import yaml

    where = f"--config {path}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return [], []
    if not isinstance(content, dict):
        raise ValueError(f"{where}: must be lines of `flag: value`, got a {type(content).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    tokens, unset = [], []
    for key, value in content.items():
        if key not in actions:
            raise ValueError(f"{where}: unknown key {key!r}; {_cure(str(key), actions, lambda near: near.replace(' ', ': '))}")
        found = _tokens(actions[key], value, where)
        tokens += found
        if not found:
            unset.append(key)
    return tokens, unset


def _cure(name: str, names: Collection[str], spelt: Callable[[str], str]) -> str:
    """What to write instead of a name that is none of `names`: by what it is called elsewhere, or else its beginning or its spelling."""
    if near := next((one for one in ELSEWHERE.get(name, ()) if one.split()[0] in names), None):
        return f"did you mean {spelt(near)}?" + (" Its unit is another: docs/migrating.md" if name in OTHER_UNITS else "")
    if gone := GONE.get(name):
        return gone if isinstance(gone, str) else gone["no_hflip" not in names]
    begun = [one for one in names if one.startswith(name)]
    alike = begun if len(begun) == 1 else difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"did you mean {spelt(alike[0])}?" if alike else "--help lists the flags"


def _unknown(parser: argparse.ArgumentParser, rest: list[str]) -> str:
    if not rest[0].startswith("-"):
        return f"unexpected argument {rest[0]}; --help lists the flags"
    names = [option.removeprefix("--") for action in parser._actions for option in action.option_strings if option.startswith("--")]
    return f"unknown flag {rest[0]}; {_cure(rest[0].split('=')[0].lstrip('-'), names, '--{}'.format)}"


def _given(parser: Parser, tokens: list[str]) -> dict[str, object]:
    """The flags that stand in `tokens`, by name, with their values."""
    actions = [action for action in parser._actions if action.dest != "help"]
    unset = {action.dest: None if isinstance(action, argparse._AppendAction) else parser for action in actions}  # a value no flag can have
    found, rest = parser.parse_known_args(tokens, argparse.Namespace(**unset))
    if rest:
        raise ValueError(_unknown(parser, rest))
    return {name: value for name, value in vars(found).items() if value is not unset.get(name, value)}


def _read(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Each flag from its strongest source: command line, its --config, the wrapper, the wrapper's --config, the default.

    A wrapper's flags stand before a lone `--`. Such a value is dropped where it has no effect beside the user's flags, or belongs to a data
    set, prompts or weights that the user replaced. Held-out scorers of a wrapper are dropped if they are trained on, or cannot judge the
    prompts of the evaluation.

    Raises:
        ValueError: an unknown flag, or what `read_config` refuses.
    """
    if not any(action.dest == "config" for action in parser._actions):  # a tool, which has no wrapper, and may have positional arguments
        args, rest = parser.parse_known_args(argv)
        if rest:
            raise ValueError(_unknown(parser, rest))
        return args
    cut = argv.index("--") if "--" in argv else -1
    wrapper, given = _given(parser, argv[: max(cut, 0)]), _given(parser, argv[cut + 1 :])
    path = given.get("config") or wrapper.get("config")
    tokens, unset = read_config(parser, path) if path else ([], [])
    file, own = _given(parser, tokens), wrapper
    if given.get("config"):
        wrapper = {name: value for name, value in wrapper.items() if name not in unset and name not in file}
        values = wrapper | file | given
    else:
        wrapper = file | wrapper
        values = wrapper | given
    for names, others in refusals.BELONG_TOGETHER:
        if any(name in values and values[name] != own.get(name, parser.get_default(name)) for name in others):
            values = {name: value for name, value in values.items() if name not in names or name not in wrapper or name in given}
    args = parser.parse_args([], argparse.Namespace(**values))
    if "eval_scorers" in wrapper and "eval_scorers" not in given:
        held_out, trained_on = parts(args.eval_scorers), parts(args.scorer)
        kept = [part for name, part in held_out.items() if name not in trained_on and parser.judges(args, name)]
        args.eval_scorers = ",".join(kept) or None
    for names, rule, _ in refusals.WITHOUT_EFFECT:
        for name in names:
            if name in wrapper and name not in given and not refusals.counts(rule, args):
                setattr(args, name, parser.get_default(name))
    return args


def check(parser: Parser, args: argparse.Namespace, checks: Iterable[Check] = ()) -> None:
    """The second half of `parse`, after reading: refuses combinations, fills in unset flags, calls the checks.

    Raises:
        ValueError: naming the flag and the cure.
    """
    for refusal in refusals.find(parser, args):
        raise ValueError(refusal)
    for name, value in parser.when_unset.items():
        if getattr(args, name) is None:
            setattr(args, name, value(args))
    if "lr_warmup_steps" in vars(args):
        refusals.check_warmup(args, parser.total_steps(args))
    for one in checks:
        one(args)


def command_line(parser: Parser, args: argparse.Namespace, groups: Collection[str]) -> list[str]:
    """The flags of these argument groups that differ from their defaults, as one would type them."""
    tokens = []
    for action in (action for group in parser._action_groups if group.title in groups for action in group._group_actions):
        value = getattr(args, action.dest)
        if isinstance(value, list) and not isinstance(action, argparse._AppendAction):
            value = ",".join(map(str, value))  # as layer_numbers reads it
        if getattr(args, action.dest) != action.default:
            for token in _tokens(action, str(value) if isinstance(value, Path) else value, _flag(action)):
                flag, _, text = token.partition("=")
                tokens += [token] if text.startswith("-") or not text else [flag, text]
    return tokens


def parse(parser: Parser, argv: list[str] | None = None, checks: Iterable[Check] = ()) -> argparse.Namespace:
    """Arguments from `argv` (None: the command line) and its `--config`; exits with code 2 and one line if anything is wrong.

    Flags before a lone `--` in `argv` are a wrapper's; --config and the flags after it override them.

    Args:
        checks: called with the arguments after the built-in ones, in order; each raises ValueError naming the flag and the cure.
    """
    try:
        args = _read(parser, sys.argv[1:] if argv is None else list(argv))
        check(parser, args, (check_environment, *checks))
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    return args
