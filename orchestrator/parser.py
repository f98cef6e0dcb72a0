"""argparse, but a mistake is one line, with the nearest valid name."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

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
            self.error(f"no {action.metavar or action.dest} {value!r}; {hint}")
