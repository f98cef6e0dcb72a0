"""argparse, but a mistake is one line, with the nearest valid name."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from .arguments import COMMANDS

MISTAKE = 2  # the exit code


class Parser(argparse.ArgumentParser):
    """Leaves with `MISTAKE` and one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"longstride: {message}; see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            nearest = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(choices)}"
            what = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            self.error(f"no {what} {value!r}; {hint}")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="longstride",
        description="Trains long-context hybrid sequence models with every sequence split along its length.",
        epilog="Try it: longstride train configs/quickstart.yaml\nMore on a command: longstride COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"Example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for add in command.adders:
            add(subparser)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments. Overrides may stand before or after options, which argparse alone does not allow."""
    parser = build_parser()
    namespace, rest = parser.parse_known_args(arguments)
    if namespace.command is None:
        return namespace
    unknown = [word for word in rest if word.startswith("-") or not hasattr(namespace, "overrides")]
    if unknown:
        parser.error(f"{namespace.command} does not understand {' '.join(unknown)}")
    if hasattr(namespace, "overrides"):
        namespace.overrides = [*namespace.overrides, *rest]
    return namespace
