"""What the table of exactness says: errors are noted while the tests run, and docs/exactness.md is made from them.

    EXACTNESS=benchmarks/results/exactness.json make test-full        # notes the errors of tests/models
    python -m tests.models.exactness                                  # writes the tables of docs/exactness.md

Without the variable nothing is noted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "exactness.json", ROOT / "docs" / "exactness.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"

GROUPS = ("outputs", "input gradients", "parameter gradients")
Errors = dict[str, float]
GroupErrors = dict[str, Errors]
"""Of each layer or model, an error for each group of tensors that it has."""


def group_of(key: str) -> str:
    """The group of a tensor of `test_split.Result`: outputs and losses, input gradients, parameter gradients."""
    if key in ("local output", "local logits", "loss"):
        return GROUPS[0]
    return GROUPS[1] if key == "local input gradient" else GROUPS[2]


def grouped(errors: Errors, join: Callable[[float, float], float] = max) -> Errors:
    """Errors of tensors -> errors of groups, the largest of each by default."""
    found: Errors = {}
    for key, error in errors.items():
        group = group_of(key)
        found[group] = join(found[group], error) if group in found else error
    return found


def larger(errors: GroupErrors, name: str, found: Errors) -> None:
    """Keep the worst of every group."""
    before = errors.get(name, {})
    errors[name] = {group: max(error, before.get(group, 0.0)) for group, error in found.items()}


def note(table: str, column: str, errors: Mapping[str, Errors | float]) -> None:
    """Keep a whole column of a table, replacing an older one."""
    if not os.environ.get("EXACTNESS"):
        return
    path = ROOT / os.environ["EXACTNESS"]
    found = json.loads(path.read_text()) if path.exists() else {}
    found.setdefault(table, {})[column] = errors
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    parts = [
        _table(found["mixer"], "layer", "{:.0e}"),
        _table(found["model"], "model (no input gradients)", "{:.0e}"),
        _table(found["float32"], "float32: error over that of one process", "{:.2f}"),
        _table(found["training"], "after three steps, 8 processes", "{:.1e}"),
    ]
    return "\n\n".join(parts) + "\n"


def _table(found: dict[str, Any], heading: str, form: str) -> str:
    """A row for each layer, a column for each number of processes; a layer younger than a column is missing there."""
    columns = sorted(found, key=lambda column: (len(column), column))
    titles = [f"P = {column}" if column.isdigit() else column for column in columns]
    lines = [f"| {heading} | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for name in sorted(set[str]().union(*found.values())):
        cells = [_cell(found[column].get(name), form) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(errors: Errors | float | None, form: str) -> str:
    """The groups' errors beside each other; "-" for what was not measured."""
    if errors is None:
        return "-"
    if isinstance(errors, float):
        return form.format(errors)
    cells = [form.format(errors[group]) if errors[group] else "0" for group in GROUPS if group in errors]
    return "0" if set(cells) == {"0"} else ", ".join(cells)


def main() -> None:
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + "\n" + tables(json.loads(RESULTS.read_text())) + "\n" + END + after)


if __name__ == "__main__":
    main()
