"""How commands print: aligned columns, numbers that can be read, JSON."""

import json
import sys
from collections.abc import Sequence
from typing import TypeAlias

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | dict[str, Json] | None"


def thousands(count: int) -> str:
    """Return `count` in groups of three digits: 262 144."""
    return f"{count:,}".replace(",", " ")


def size(byte_count: float) -> str:
    """Return a number of bytes in the unit that suits it: 1.0 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if byte_count < 1024:
            return f"{byte_count:.0f} {unit}" if unit == "bytes" else f"{byte_count:.1f} {unit}"
        byte_count /= 1024
    return f"{byte_count:.1f} TiB"


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: str = "  ") -> str:
    """Return `rows` as aligned columns, those numbered in `right` flush right.

    Parameters
    ----------
    rows : sequence of sequences of str
        Rows of equal length.
    right : sequence of int, optional
        Columns to align on the right.
    indent : str, optional
        What each line begins with.

    Returns
    -------
    str
        The lines, without a newline at the end.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def speaks_unicode() -> bool:
    """Tell whether standard output takes more than ASCII."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def show(text: str) -> None:
    """Print `text`, in what characters standard output takes."""
    if not speaks_unicode():
        plain = text.replace("µ", "u").replace("→", "->")
        text = plain.encode("ascii", "backslashreplace").decode()
    print(text, flush=True)


def print_json(result: Json) -> None:
    """Print `result` as one JSON object."""
    print(json.dumps(result, indent=2))
