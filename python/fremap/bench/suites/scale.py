"""What size costs: time a page from ten thousand to millions, bytes of bookkeeping."""

import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import fremap
from fremap.bench.bench import Bench, verify
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import (
    BenchError,
    Contender,
    Report,
    Timing,
    paired,
    timed,
    times_the_time,
)
from fremap.bench.machine import memory_bytes, process_bytes

_SIZES = (10_000, 40_000, 160_000, 640_000, 2_560_000, 4_194_304)
_LEAST_PAGES = 160_000
_TABLE_PAGES = 4_194_304
_SPARSE_BYTES = 64 << 30


def flat(bench: Bench) -> Report:
    """Remap 10 000 pages to millions, in one window, in turn.

    A size whose pages do not fit in half of the available memory is left out,
    and said.
    """
    room = memory_bytes("MemAvailable") // 2 // PAGE_BYTES
    sizes = [size for size in _SIZES if size <= room]
    if len(sizes) < 2:
        raise BenchError("too little memory to compare two sizes")
    report = Report(
        "scale", f"remap {sizes[0]} to {sizes[-1]} pages, file in the page cache, engine paged"
    )
    bench.warm_file(report)
    left_out = [f"{size} pages" for size in _SIZES if size > room]
    if left_out:
        report.missing.append(f"{', '.join(left_out)}: more than half of the available memory")
    _compare(report, "", _times(bench, sizes, populate=True), at_most=1.2)
    _compare(report, "populate=False, ", _times(bench, list(_SIZES), populate=False), at_most=None)
    return report


def _compare(report: Report, label: str, timings: list[Timing], *, at_most: float | None) -> None:
    """Add a row a size, against the size whose pages are cheapest."""
    cheapest = min(timings, key=lambda timing: timing.microseconds)
    for timing in timings:
        what = f"{label}{timing.name}: of {cheapest.name}"
        row = times_the_time(what, timing, cheapest, at_most=at_most)
        report.rows.append(replace(row, own=True))


def _times(bench: Bench, sizes: list[int], *, populate: bool) -> list[Timing]:
    """Time each size, with pages moved in or with nothing but the mapping changed."""
    file_pages = bench.file.page_count

    def remapping(size: int) -> Contender:
        # A round of a small size is several remaps, so that a round is never short.
        repeats = max(1, _LEAST_PAGES // size)

        def run(number: int) -> Mapping[str, float]:
            generator = np.random.default_rng([size, number])
            seconds = 0.0
            for _ in range(repeats):
                ids = generator.integers(0, file_pages, size)
                seconds += timed(partial(window.remap, ids, populate=populate))
            if populate:
                verify(window, ids)
            return {str(size): seconds / repeats}

        return run

    with bench.window(sizes[-1]) as window:
        contenders = [remapping(size) for size in sizes]
        timings = paired(contenders, rounds=bench.rounds, operations=1, warm_ups=1)
    return [Timing(f"{size} pages", timings[str(size)].seconds, size) for size in sizes]


def bookkeeping(bench: Bench) -> Report:
    """Weigh a window of four million pages over a sparse file of 64 GiB."""
    report = Report(
        "scale", f"bookkeeping of a window of {_TABLE_PAGES} pages over a sparse file of 64 GiB"
    )
    with tempfile.TemporaryDirectory(prefix="fremap-bench-", dir=bench.directory) as directory:
        path = Path(directory) / "sparse.bin"
        with path.open("wb") as file:
            file.truncate(_SPARSE_BYTES)
        # A process of its own: memory that this one has used before would hide what is taken.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            weights = pool.submit(_weigh, path).result()
    report.count("untouched linear window, a page", weights.untouched, "bytes", at_most=0.1)
    report.count("in random order, a page", weights.remapped, "bytes", at_most=16)
    report.count("the same by stats().table_bytes", weights.table, "bytes")
    report.count("kernel mappings of the window", weights.vma_count, "VMAs", at_most=1)
    return report


@dataclass(frozen=True)
class _Weights:
    """Bytes a page that the process took, and the window's kernel mappings."""

    untouched: float
    remapped: float
    table: float
    vma_count: int


def _weigh(path: Path) -> _Weights:
    ids = np.random.default_rng(2002).permutation(_SPARSE_BYTES // PAGE_BYTES)[:_TABLE_PAGES]
    start = _memory_bytes()
    with fremap.open(path) as store, fremap.Window(store, engine="paged") as window:
        untouched = (_memory_bytes() - start) / window.page_count
    start = _memory_bytes()
    with fremap.open(path) as store, fremap.Window(store, _TABLE_PAGES, engine="paged") as window:
        window.remap(ids, populate=False)
        return _Weights(
            untouched,
            (_memory_bytes() - start) / _TABLE_PAGES,
            window.stats().table_bytes / _TABLE_PAGES,
            window.vma_count,
        )


def _memory_bytes() -> int:
    """Sum the resident memory and page tables of this process."""
    return process_bytes("VmRSS") + process_bytes("VmPTE")
