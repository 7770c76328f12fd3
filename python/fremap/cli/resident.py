"""Which pages of a file are in the kernel's page cache; none is read to find out."""

import argparse

import numpy as np
import numpy.typing as npt

import fremap
from fremap.cli.report import columns, print_json, show, size, speaks_unicode, thousands

BAR_CELLS = 64
UNICODE_LEVELS = " ▁▂▃▄▅▆▇█"
ASCII_LEVELS = " .:-=+*%#"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap resident``."""
    parser.add_argument("file", metavar="FILE")


def runs(resident: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the runs of resident pages as (first page, number of pages).

    Examples
    --------
    >>> runs(np.array([True, True, False, True]))
    [(0, 2), (3, 1)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], resident, [False]])))
    return [(int(first), int(end - first)) for first, end in edges.reshape(-1, 2)]


def bar(resident: npt.NDArray[np.bool_], levels: str) -> str:
    """Return the file from left to right, each cell as dark as its part is resident.

    Examples
    --------
    >>> bar(np.array([True, True, False, False]), " #")
    '##  '
    """
    parts = np.array_split(resident, min(BAR_CELLS, len(resident)))
    return "".join(levels[int(np.ceil(part.mean() * (len(levels) - 1)))] for part in parts)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    with fremap.open(arguments.file) as store:
        resident = store.resident()
        page_bytes = store.page_bytes
    count = int(resident.sum())
    found = runs(resident)
    if arguments.json:
        print_json(
            {
                "file": arguments.file,
                "page_bytes": page_bytes,
                "page_count": len(resident),
                "resident_page_count": count,
                "runs": [{"start": start, "count": length} for start, length in found],
            }
        )
        return 0
    share = 100 * count / max(len(resident), 1)
    rows = [
        ("pages", thousands(len(resident)), f"of {thousands(page_bytes)} bytes"),
        ("resident", thousands(count), f"{share:.1f} %, {size(count * page_bytes)}"),
        ("runs", thousands(len(found)), ""),
    ]
    show(arguments.file)
    show(columns(rows, right=(1,)))
    if len(resident):
        show(f"  [{bar(resident, UNICODE_LEVELS if speaks_unicode() else ASCII_LEVELS)}]")
    return 0
