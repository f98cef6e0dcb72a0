"""Plain columns for lists: readable on a terminal, easy to cut and grep."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ByteSize, TypeAdapter, ValidationError


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines with every column as wide as its widest entry, two spaces between columns."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def amount_of_bytes(count: int) -> str:
    """10.2 GiB"""
    return ByteSize(count).human_readable(separator=" ")


def parse_amount(text: str) -> int:
    """ "80GiB" or 85899345920 -> bytes. ValueError: it is neither."""
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise ValueError(f"{text!r} is no amount of memory; write it as 80GiB") from None
