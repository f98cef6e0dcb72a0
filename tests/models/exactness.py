"""What the table of exactness says: errors are noted while the tests run, and docs/exactness.md is made from them.

    EXACTNESS=benchmarks/results/exactness.json make test-full        # notes the errors of tests/models/test_matrix.py
    python -m tests.models.exactness                                  # writes the tables of docs/exactness.md

Without the variable nothing is noted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results" / "exactness.json", ROOT / "docs" / "exactness.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"

Errors = dict[str, float]


def note(table: str, column: str, errors: Errors) -> None:
    """Keep a whole column of a table, replacing an older one."""
    if not os.environ.get("EXACTNESS"):
        return
    path = ROOT / os.environ["EXACTNESS"]
    found = json.loads(path.read_text()) if path.exists() else {}
    found.setdefault(table, {})[column] = errors
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def larger(errors: Errors, name: str, error: float) -> None:
    """Keep the worst."""
    errors[name] = max(error, errors.get(name, 0.0))


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    parts = []
    for table, heading in (("mixer", "layer"), ("model", "model"), ("training", "after three steps, 8 processes")):
        columns = sorted(found[table], key=lambda column: (len(column), column))
        titles = [f"P = {column}" if column.isdigit() else column for column in columns]
        single = found["float32"]["ratio"] if table == "mixer" else {}
        titles += ["float32: error over that of one process, P = 4"] if single else []
        lines = [f"| {heading} | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
        for name in sorted(set[str]().union(*found[table].values())):
            # a layer that is younger than a column is missing there
            cells = [f"{errors[name]:.1e}" if name in (errors := found[table][column]) else "-" for column in columns]
            cells += [f"{single[name]:.2f}" if name in single else "-"] if single else []
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + "\n" + tables(json.loads(RESULTS.read_text())) + "\n" + END + after)


if __name__ == "__main__":
    main()
