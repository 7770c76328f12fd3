"""Lazy faults on a warm file, against the bare loop with the same userfaultfd mode.

Where the handler thread runs is most of the price: on another processor, each
fault wakes an idle processor twice. So there are two pairs of rows, all on one
processor and left to the scheduler, both sides alike.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from fremap.bench.bench import Bench, verify
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import BenchError, Contender, Report, paired, timed, times_the_time

FREMAP = "fremap"
MEMMAP = "np.memmap"
_MOST_PAGES = 20_000


def lazy(bench: Bench) -> Report:
    """Touch every page of an evicted window once, in order."""
    count = min(bench.pages, _MOST_PAGES)
    report = Report(
        "fault", f"touch {count} absent pages, file in the page cache, engine paged, handler thread"
    )
    bench.warm_file(report)
    processors = os.sched_getaffinity(0)
    with _on({min(processors)}):
        _measure(bench, report, count, "on one processor")
    if len(processors) > 1:
        _measure(bench, report, count, f"on {len(processors)} processors")
    else:
        report.missing.append("one processor: no figure for a handler thread on another")
    return report


@contextmanager
def _on(processors: set[int]) -> Iterator[None]:
    """Keep this thread, and the threads and processes it starts, on `processors`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _measure(bench: Bench, report: Report, count: int, where: str) -> None:
    draw = bench.draw()
    with bench.window(count) as window, bench.loops(report, "fault_copy", pages=count) as running:
        numbers = np.frombuffer(window, dtype=np.int64)[:: PAGE_BYTES // 8]

        def ours(number: int) -> Mapping[str, float]:
            ids = draw.distinct(number, count)
            window.evict(None)
            window.remap(ids, populate=False)
            before = window.stats().faults
            seconds = timed(numbers.sum)
            if window.stats().faults == before:
                raise BenchError("touching the window took no lazy fault: it was not absent")
            verify(window, ids)
            return {FREMAP: seconds}

        def memmap(number: int) -> Mapping[str, float]:
            ids = draw.distinct(number, count)
            file = bench.file
            table = np.memmap(
                file.path, dtype=np.int64, mode="r", shape=(file.page_count, PAGE_BYTES // 8)
            )
            return {MEMMAP: timed(lambda: table[ids, 0].sum())}

        contenders: list[Contender] = [ours, memmap]
        if running:
            contenders.append(
                lambda number: {
                    "fault_copy": running["fault_copy"].run(draw.distinct(number, count))[0]
                }
            )
        timings = paired(contenders, rounds=bench.rounds, operations=count)
        if running:
            report.rows.append(
                times_the_time(
                    f"{where}: of the bare loop",
                    timings[FREMAP],
                    timings["fault_copy"],
                    at_most=1.3,
                )
            )
        report.rows.append(
            times_the_time(f"{where}: of np.memmap's own fault", timings[FREMAP], timings[MEMMAP])
        )
        before = window.stats().faults
        window.evict(None)
        numbers.sum()
        faults = window.stats().faults - before
        report.count(f"{where}: faults a page", faults / count, "faults", at_most=1)
