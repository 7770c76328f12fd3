"""Remap numbered pages with every engine, in a file and in shared memory, and check each page.

The Linux patch of 2002 that added remap_file_pages(2) came with such a test program.
Engines that do not work here are listed with the reason. The exit code is 0 if at
least one engine works and none that works fails.
"""

import argparse
import mmap
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import fremap
from fremap.bench.options import positive
from fremap.cli.numbered import first_wrong_page, numbered_pages
from fremap.cli.report import columns, print_json, show, thousands
from fremap.window import Engine

PAGE_COUNT = 4096
ENGINES: tuple[Engine, ...] = ("paged", "alias", "eager")


@dataclass(frozen=True)
class Result:
    """One engine on one kind of store."""

    engine: str
    store: str
    outcome: str  # "passed", "failed" or "unavailable"
    detail: str
    # Of what passed.
    page_count: int | None = None
    microseconds_a_page: float | None = None
    vma_count_before: int | None = None
    vma_count_after: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap selftest``."""
    parser.add_argument(
        "--pages", type=positive, default=PAGE_COUNT, help="pages to remap (default: %(default)s)"
    )


def remap_backwards(engine: Engine, kind: str, store: fremap.Store) -> Result:
    """Show the numbered pages of `store` from the last to the first, and check each."""
    last = store.page_count - 1
    backwards = np.arange(last, -1, -1)
    with fremap.Window(store, engine=engine) as window:
        before = window.vma_count
        begin = time.perf_counter()
        window.remap(range(last, -1, -1))
        seconds = time.perf_counter() - begin
        wrong = first_wrong_page(window.pages, backwards)
        after = window.vma_count
    if wrong is not None:
        detail = f"window page {wrong} does not show file page {backwards[wrong]}"
        return Result(engine, kind, "failed", detail)
    cost = seconds / store.page_count * 1e6
    mappings = f"kernel mappings {before} → {after}"
    pages = "1 page" if store.page_count == 1 else f"{thousands(store.page_count)} pages"
    detail = f"{pages}, {cost:.2f} µs a page, {mappings}"
    return Result(engine, kind, "passed", detail, store.page_count, cost, before, after)


def attempt(engine: Engine, kind: str, store: fremap.Store) -> Result:
    """Run one engine, or say why it does not run here."""
    state = fremap.capabilities().engines[engine]
    if not state.available:
        return Result(engine, kind, "unavailable", state.detail)
    try:
        return remap_backwards(engine, kind, store)
    except fremap.FremapError as error:
        return Result(engine, kind, "failed", str(error))


def all_results(page_count: int) -> list[Result]:
    """Run every engine on both kinds of store."""
    size = page_count * mmap.PAGESIZE
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="fremap-selftest-") as folder,
        fremap.open(Path(folder) / "pages", "w+", size=size) as file,
        fremap.MemoryStore(size) as memory,
    ):
        for kind, store in (("file", file), ("memory", memory)):
            store.write(None, numbered_pages(range(page_count), mmap.PAGESIZE))
            results += [attempt(engine, kind, store) for engine in ENGINES]
    return results


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    results = all_results(arguments.pages)
    outcomes = [result.outcome for result in results]
    passed = "failed" not in outcomes and "passed" in outcomes
    if arguments.json:
        print_json({"passed": passed, "results": [asdict(result) for result in results]})
    else:
        show(columns([(r.outcome, r.engine, r.store, r.detail) for r in results], indent=""))
    return 0 if passed else 1
