"""What the benchmark of bytes counted is what its table and the documentation say, and what they call flat is flat."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.communication import CASES, counted_table, modelled_table
from benchmarks.measuring import RESULTS

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "parallel.md"


def test_tables_are_those_of_the_results() -> None:
    found = json.loads((RESULTS / "communication.json").read_text())
    lengths = sorted({row["length"] for row in found["counted"]})
    worlds = sorted({row["processes"] for row in found["counted"]})
    tables = ["\n".join(counted_table(found["counted"], lengths, worlds)), "\n".join(modelled_table(found["modelled"]))]
    for path in (RESULTS / "communication.md", DOCUMENT):
        assert all(table in path.read_text() for table in tables), f"{path.name} is older than communication.json"
    for name, case in CASES.items():
        sent = {(row["processes"], row["sent"]) for row in found["counted"] if row["layer"] == name}
        assert (len(sent) == len(worlds)) == case.flat, name
