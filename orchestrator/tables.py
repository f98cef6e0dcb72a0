"""Plain columns for lists: readable on a terminal, easy to cut and grep."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines with every column as wide as its widest entry, two spaces between columns."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def show(header: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None) -> None:
    """Prints `columns`; on a terminal the last column is wrapped to fit, elsewhere a line stays a line."""
    console = console or Console()
    if not console.is_terminal:
        console.file.write(columns(header, rows) + "\n")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(name, no_wrap=name != header[-1], overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def amount_of_bytes(count: int) -> str:
    """10.2 GiB"""
    return ByteSize(count).human_readable(separator=" ")


def parse_amount(text: str) -> int:
    """ "80GiB" or 85899345920 -> bytes. ValueError: it is neither."""
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise ValueError(f"{text!r} is no amount of memory; write it as 80GiB") from None
