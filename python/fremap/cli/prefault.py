"""Bring a file into the kernel's page cache, and wait until it is there."""

import argparse
import time

import fremap
from fremap.cli.report import print_json, show, size, thousands

CHUNK_BYTES = 256 << 20  # page tables of one chunk at a time, whatever the size of the file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap prefault``."""
    parser.add_argument("file", metavar="FILE")


def resident_count(store: fremap.Store) -> int | None:
    """Return how many pages are in the page cache, or None where the kernel does not tell."""
    try:
        return int(store.resident().sum())
    except fremap.UnsupportedError:
        return None


def prefault(store: fremap.Store) -> None:
    """Populate windows over the whole of `store`, one chunk after the other."""
    chunk = CHUNK_BYTES // store.page_bytes
    for first in range(0, store.page_count, chunk):
        count = min(chunk, store.page_count - first)
        store.prefetch(range(first, first + count))
        with fremap.Window(store, count, first_page=first, engine="alias", populate=True):
            pass


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    with fremap.open(arguments.file) as store:
        before = resident_count(store)
        begin = time.perf_counter()
        prefault(store)
        seconds = time.perf_counter() - begin
        after = resident_count(store)
        page_count, bytes_ = store.page_count, store.size
    if arguments.json:
        print_json(
            {
                "file": arguments.file,
                "page_count": page_count,
                "resident_before": before,
                "resident_after": after,
                "seconds": seconds,
            }
        )
        return 0
    show(f"{arguments.file}: {size(bytes_)} in {seconds:.2f} s, {size(bytes_ / seconds)} a second")
    if before is None or after is None:
        show("  the kernel does not say what is resident in a file that you cannot write")
    else:
        of = thousands(page_count)
        show(f"  resident pages: {thousands(before)} before, {thousands(after)} of {of} now")
    return 0
