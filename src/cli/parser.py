"""The parser: one-line usage and errors, help that opens with the script's docstring, defaults that depend on other flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from src.cli.types import Number, multiple_of_16, path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines; shows each default except None, False and an empty text, which the help itself explains."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=118)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value = action.default
        if value in (None, "") or (value is False and not isinstance(action, argparse.BooleanOptionalAction)):
            return action.help
        if isinstance(value, list):  # as one would type it
            return f"{action.help} (default: {(' ' if action.nargs else ',').join(map(str, value))})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, Number):
            return "N" if action.type.whole else "X"
        if action.type is multiple_of_16:
            return "N"
        return "PATH" if action.type is path else "TEXT"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line.

    Attributes:
        when_unset: defaults that depend on other flags, filled in in this order.
        total_steps: optimizer steps of a run with these arguments, once defaults are filled in; 0 in programs that do not train.
        judges: see `add_eval_args`.
    """

    def __init__(self, description: str):
        super().__init__(
            usage="%(prog)s [options]", description=description, formatter_class=HelpFormatter, allow_abbrev=False, add_help=False
        )
        # hidden, so that the script's own group comes first in --help
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.when_unset: dict[str, Callable[[argparse.Namespace], object]] = {}
        self.total_steps: Callable[[argparse.Namespace], int] = lambda args: getattr(args, "max_train_steps", 0)
        self.judges: Callable[[argparse.Namespace, str], bool] = lambda args, scorer: True

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


def make_parser(doc: str) -> Parser:
    """Parser whose `--help` opens with the script's docstring."""
    return Parser(doc.strip())
