"""What size costs: time a page from ten thousand to millions, bytes of bookkeeping."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import fremap
from fremap.bench.bench import Bench, verify
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import BenchError, Contender, Report, Timing, paired, spread, timed
from fremap.bench.machine import memory_bytes, process_bytes

_SIZES = (10_000, 40_000, 160_000, 640_000, 2_560_000, 4_194_304)
_TABLE_PAGES = 4_194_304
_SPARSE_BYTES = 64 << 30


def flat(bench: Bench) -> Report:
    """Remap 10 000 pages to millions, in one window, in turn.

    A size whose pages do not fit in half of the available memory is left out,
    and said.
    """
    bench.warm_file()
    room = memory_bytes("MemAvailable") // 2 // PAGE_BYTES
    sizes = [size for size in _SIZES if size <= room]
    if len(sizes) < 2:
        raise BenchError("too little memory to compare two sizes")
    report = Report(
        "scale", f"remap {sizes[0]} to {sizes[-1]} pages, file in the page cache, engine paged"
    )
    left_out = [f"{size} pages" for size in _SIZES if size > room]
    if left_out:
        report.missing.append(f"{', '.join(left_out)}: more than half of the available memory")
    timings = _filled(bench, sizes)
    costs = [timing.microseconds for timing in timings]
    report.count("cost a page, largest over smallest size's", spread(costs), "times", at_most=1.2)
    for timing in timings:
        report.count(f"remap of {timing.operations} pages, a page", timing.microseconds, "µs")
    for timing in _table_only(bench):
        report.count(
            f"populate=False, {timing.operations} pages, a page", timing.microseconds, "µs"
        )
    return report


def _filled(bench: Bench, sizes: list[int]) -> list[Timing]:
    """Time each size with its pages moved in."""
    with bench.window(sizes[-1]) as window:
        file_pages = bench.file.page_count

        def remapping(size: int) -> Contender:
            def run(number: int) -> Mapping[str, float]:
                ids = np.random.default_rng([size, number]).integers(0, file_pages, size)
                seconds = timed(lambda: window.remap(ids))
                verify(window, ids)
                return {str(size): seconds}

            return run

        timings = paired(
            [remapping(size) for size in sizes], rounds=bench.rounds, operations=1, warm_ups=1
        )
        return [Timing(f"{size} pages", timings[str(size)].seconds, size) for size in sizes]


def _table_only(bench: Bench) -> list[Timing]:
    """Time each size with nothing but the mapping changed."""
    with bench.window(_SIZES[-1]) as window:
        file_pages = bench.file.page_count

        def remapping(size: int) -> Contender:
            def run(number: int) -> Mapping[str, float]:
                ids = np.random.default_rng([size, number]).integers(0, file_pages, size)
                return {str(size): timed(lambda: window.remap(ids, populate=False))}

            return run

        timings = paired(
            [remapping(size) for size in _SIZES], rounds=bench.rounds, operations=1, warm_ups=1
        )
        return [Timing(f"{size} pages", timings[str(size)].seconds, size) for size in _SIZES]


def bookkeeping(bench: Bench) -> Report:
    """Weigh a window of four million pages over a sparse file of 64 GiB."""
    report = Report(
        "scale", f"bookkeeping of a window of {_TABLE_PAGES} pages over a sparse file of 64 GiB"
    )
    with tempfile.TemporaryDirectory(prefix="fremap-bench-", dir=bench.directory) as directory:
        path = Path(directory) / "sparse.bin"
        with path.open("wb") as file:
            file.truncate(_SPARSE_BYTES)
        file_pages = _SPARSE_BYTES // PAGE_BYTES
        ids = np.random.default_rng(2002).permutation(file_pages)[:_TABLE_PAGES]
        start = _memory_bytes()
        with fremap.open(path) as store, fremap.Window(store, engine="paged") as untouched:
            grown = _memory_bytes() - start
            report.count(
                "untouched linear window, a page",
                grown / untouched.page_count,
                "bytes",
                at_most=0.1,
            )
        start = _memory_bytes()
        with (
            fremap.open(path) as store,
            fremap.Window(store, _TABLE_PAGES, engine="paged") as window,
        ):
            window.remap(ids, populate=False)
            grown = _memory_bytes() - start
            report.count(
                "pages in random order, process memory a page",
                grown / _TABLE_PAGES,
                "bytes",
                at_most=16,
            )
            report.count(
                "the same by stats().table_bytes",
                window.stats().table_bytes / _TABLE_PAGES,
                "bytes",
            )
            report.count("kernel mappings of the window", window.vma_count, "VMAs", at_most=1)
    return report


def _memory_bytes() -> int:
    """Sum the resident memory and page tables of this process."""
    return process_bytes("VmRSS") + process_bytes("VmPTE")
