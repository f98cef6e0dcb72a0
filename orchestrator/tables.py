"""Plain columns for lists: readable on a terminal, easy to cut and grep."""

from __future__ import annotations

import re
from collections.abc import Sequence

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines with every column as wide as its widest entry, two spaces between columns."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def amount_of_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def parse_amount(text: str) -> int:
    """ "80GiB", "80G" or 85899345920 -> bytes, in powers of 1024. ValueError: it is none of these."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory; write it as 80GiB")
    return int(float(match[1]) * 1024 ** ["", "K", "M", "G", "T"].index(match[2].upper()))
