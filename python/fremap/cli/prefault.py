"""Read a whole file into the kernel's page cache, and wait until it is there."""

import argparse
import time
from pathlib import Path

import fremap
from fremap.cli.progress import Advance, byte_progress
from fremap.cli.report import print_json, show, size, thousands
from fremap.cli.resident import resident_count

CHUNK_BYTES = 256 << 20  # page tables of one chunk at a time, whatever the size of the file
STEP_BYTES = 16 << 20  # what is read between two looks at the progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap prefault``."""
    parser.add_argument("file", metavar="FILE")


def prefault(store: fremap.Store, advance: Advance) -> None:
    """Populate windows over the whole of `store`, one chunk after the other."""
    chunk = CHUNK_BYTES // store.page_bytes
    step = STEP_BYTES // store.page_bytes
    for first in range(0, store.page_count, chunk):
        count = min(chunk, store.page_count - first)
        store.prefetch(range(first, first + count))
        with fremap.Window(store, count, first_page=first, engine="alias") as window:
            for part in range(0, count, step):
                pages = range(part, min(part + step, count))
                window.populate(pages)
                advance(len(pages) * store.page_bytes)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    with fremap.open(arguments.file) as store:
        before = resident_count(store)
        total = store.page_count * store.page_bytes
        begin = time.perf_counter()
        with byte_progress(Path(arguments.file).name, total) as advance:
            prefault(store, advance)
        seconds = time.perf_counter() - begin
        after = resident_count(store)
        page_count, bytes_ = store.page_count, store.size
    if arguments.json:
        print_json(
            {
                "file": arguments.file,
                "file_bytes": bytes_,
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
