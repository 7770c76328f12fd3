"""Show which pages of a file are in the kernel's page cache, without reading any.

With --watch, look again and again, until Ctrl-C or --count times. A terminal shows only the
last look; a file or a pipe gets all of them. With --json, each look is one JSON object on a
line of its own.
"""

import argparse
import json
import sys
import time

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.options import positive
from fremap.cli.report import Json, columns, print_json, show, size, speaks_unicode, thousands

BAR_CELLS = 64
UNICODE_LEVELS = " ▁▂▃▄▅▆▇█"
ASCII_LEVELS = " .:-=+*%#"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap resident``."""
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=interval,
        const=1.0,
        metavar="SECONDS",
        help="look again every SECONDS (default: 1), until Ctrl-C",
    )
    parser.add_argument("--count", type=positive, metavar="N", help="with --watch: look N times")


def interval(text: str) -> float:
    """Return a number of seconds to wait, more than none."""
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


def resident_count(store: fremap.Store) -> int | None:
    """Return how many pages are in the page cache, or None where the kernel does not tell."""
    try:
        return int(store.resident().sum())
    except fremap.UnsupportedError:
        return None


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


def result(path: str, page_bytes: int, resident: npt.NDArray[np.bool_]) -> dict[str, Json]:
    """Return what --json prints of one look."""
    return {
        "file": path,
        "page_bytes": page_bytes,
        "page_count": len(resident),
        "resident_page_count": int(resident.sum()),
        "runs": [{"start": start, "count": length} for start, length in runs(resident)],
    }


def lines(path: str, page_bytes: int, resident: npt.NDArray[np.bool_]) -> str:
    """Return what is printed of one look."""
    count = int(resident.sum())
    share = 100 * count / max(len(resident), 1)
    rows = [
        ("pages", thousands(len(resident)), f"of {thousands(page_bytes)} bytes"),
        ("resident", thousands(count), f"{share:.1f} %, {size(count * page_bytes)}"),
        ("runs", thousands(len(runs(resident))), ""),
    ]
    text = f"{path}\n{columns(rows, right=(1,))}"
    if len(resident):
        text += f"\n  [{bar(resident, UNICODE_LEVELS if speaks_unicode() else ASCII_LEVELS)}]"
    return text


def watch(arguments: argparse.Namespace, store: fremap.Store) -> None:
    """Look again and again; a file that grows is followed."""
    in_place = sys.stdout.isatty() and not arguments.json
    looks = 0
    while True:
        resident = store.resident()
        if arguments.json:
            print(json.dumps(result(arguments.file, store.page_bytes, resident)), flush=True)
        else:
            text = lines(arguments.file, store.page_bytes, resident)
            if in_place and looks:
                print(f"\033[{text.count(chr(10)) + 1}F\033[J", end="")
            show(text)
        looks += 1
        if looks == arguments.count:
            return
        time.sleep(arguments.watch)
        store.refresh()


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if arguments.count is not None and arguments.watch is None:
        arguments.watch = 1.0
    with fremap.open(arguments.file) as store:
        if arguments.watch is not None:
            try:
                watch(arguments, store)
            except KeyboardInterrupt:  # the way to end it
                return 0
            return 0
        resident, page_bytes = store.resident(), store.page_bytes
    if arguments.json:
        print_json(result(arguments.file, page_bytes, resident))
    else:
        show(lines(arguments.file, page_bytes, resident))
    return 0
