"""Lazy faults: on a warm file against a bare loop, on a cold one against a map of it.

The bare loop has the same userfaultfd mode. Where the handler thread runs is most of the
price: on another processor, each fault wakes an idle processor twice. So there are two pairs
of rows, all on one processor and left to the scheduler, both sides alike.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.bench import Bench, placements, verify
from fremap.bench.competitors import advised_memmap
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import BenchError, Contender, Report, paired, timed, times_the_time
from fremap.bench.suites.touches import RANDOM, by_threads, touch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fremap.window import Fault

FREMAP = "fremap"
MEMMAP = "np.memmap"
BARE = "fault_copy"
BARE_SIGNAL = "fault_signal"
_MOST_PAGES = 20_000
_MOST_TIMES_BARE = 1.3
_MOST_COLD = 4096
# Of the time of a map of the file, by the number of threads.
_MOST_TIMES_RANDOM = {1: 1.3, 4: 1.3, 16: 1.5}
_WORDS = PAGE_BYTES // 8


def lazy(bench: Bench) -> Report:
    """Touch every page of an evicted window once, in order; it shows random file pages."""
    count = min(bench.pages, _MOST_PAGES)
    report = Report(
        "fault", f"touch {count} absent pages, file in the page cache, engine paged, handler thread"
    )
    bench.warm_file(report)
    for where in placements(report):
        _measure(bench, report, count, where)
    return report


def _measure(bench: Bench, report: Report, count: int, where: str) -> None:
    draw = bench.draw()
    with bench.window(count) as window, bench.loops(report, BARE, pages=count) as running:
        numbers = np.frombuffer(window, dtype=np.int64)[::_WORDS]

        def ours(number: int) -> Mapping[str, float]:
            ids = draw.distinct(number, count)
            window.evict(None)
            window.remap(ids, populate=False)
            seconds, _ = _touched(window, numbers.sum)
            verify(window, ids)
            return {FREMAP: seconds}

        contenders: list[Contender] = [ours, _memmap(bench, lambda n: draw.distinct(n, count))]
        if running:
            contenders.append(
                lambda number: {BARE: running[BARE].run(draw.distinct(number, count))[0]}
            )
        _add_rows(bench, report, where, contenders, count)
        window.evict(None)
        _, faults = _touched(window, numbers.sum)
        report.count(f"{where}: faults a page", faults / count, "faults", at_most=1)


@dataclass(frozen=True)
class _Resolver:
    """Who resolves faults, and the bare loop that does it alike."""

    fault: Fault
    bare: str


@dataclass(frozen=True)
class _Pattern:
    """An order of touching pages of a window that shows the file as it is."""

    name: str
    pages: Callable[[int], npt.NDArray[np.int64]]


def linear(bench: Bench) -> Report:
    """Touch absent pages of a window on the whole file: a scan forward, and random pages."""
    report, patterns = _linear(bench, "handler thread")
    for where in placements(report):
        for pattern in patterns:
            _measure_linear(bench, report, pattern, _Resolver("thread", BARE), where)
    return report


def by_signal(bench: Bench) -> Report:
    """Do the same in a window whose faults are resolved in the thread that touches."""
    report, patterns = _linear(bench, "signal")
    for pattern in patterns:
        _measure_linear(bench, report, pattern, _Resolver("signal", BARE_SIGNAL), "by signal")
    return report


def cold(bench: Bench) -> Report:
    """Touch random absent pages that are not in the page cache, by one thread and by many."""
    file_pages = bench.file.page_count
    count = min(bench.pages, _MOST_COLD, file_pages)
    report = Report(
        "fault", f"touch {count} random absent pages not in the page cache, engine paged"
    )
    report.notes.append("a host may still cache what was written")
    draw = bench.draw()
    shape = (file_pages, _WORDS)
    table = advised_memmap(bench.file.path, np.int64, mmap.MADV_RANDOM, shape=shape)
    unmap = table._mmap.madvise  # type: ignore[attr-defined]  # noqa: SLF001 - the only way
    with (
        fremap.open(bench.file.path) as store,
        fremap.Window(store, engine="paged", budget=None) as window,
    ):
        numbers = window.array(np.int64, shape)
        for threads, most in _MOST_TIMES_RANDOM.items():
            sums: dict[str, int] = {}

            def run(name: str, words: npt.NDArray[np.int64], number: int) -> Mapping[str, float]:
                ids = draw.distinct(number, count)
                window.evict(None)
                unmap(mmap.MADV_DONTNEED)
                bench.file.drop()
                by = threads  # noqa: B023 - runs within this turn of the loop

                def touch_all() -> None:
                    sums[name] = touch(words, ids, by)  # noqa: B023

                return {name: timed(touch_all)}

            contenders: list[Contender] = [
                partial(run, FREMAP, numbers),
                partial(run, RANDOM, table.view(np.ndarray)),
            ]
            timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=1)
            if len(set(sums.values())) != 1:
                raise BenchError(f"fault: the sides do not agree on the sum: {sums}")
            report.rows.append(
                times_the_time(
                    f"{by_threads(threads)}: of {RANDOM}",
                    timings[FREMAP],
                    timings[RANDOM],
                    at_most=most,
                )
            )
        del numbers
    return report


def _linear(bench: Bench, how: str) -> tuple[Report, tuple[_Pattern, ...]]:
    file_pages = bench.file.page_count
    count = min(bench.pages, _MOST_PAGES, file_pages)
    report = Report(
        "fault",
        f"touch {count} absent pages of a linear window of {file_pages}, "
        f"file in the page cache, engine paged, {how}",
    )
    bench.warm_file(report)
    draw = bench.draw()

    def scan(number: int) -> npt.NDArray[np.int64]:
        """Neighbours, from another place of the file in each round."""
        first = int(np.random.default_rng([2002, number]).integers(0, file_pages - count + 1))
        return np.arange(first, first + count, dtype=np.int64)

    patterns = (
        _Pattern("a scan forward", scan),
        _Pattern("random pages", lambda number: draw.distinct(number, count)),
    )
    return report, patterns


def _measure_linear(
    bench: Bench, report: Report, pattern: _Pattern, resolver: _Resolver, where: str
) -> None:
    what = f"{pattern.name}, {where}"
    count = len(pattern.pages(0))
    bare = resolver.bare
    with (
        fremap.open(bench.file.path) as store,
        fremap.Window(store, engine="paged", fault=resolver.fault, budget=None) as window,
        bench.loops(report, bare, pages=store.page_count, mode="linear") as running,
    ):
        numbers = np.frombuffer(window, dtype=np.int64)[::_WORDS]
        faults = 0

        def ours(number: int) -> Mapping[str, float]:
            nonlocal faults
            ids = pattern.pages(number)
            window.evict(None)
            seconds, faults = _touched(window, lambda: numbers[ids].sum())
            if not np.array_equal(numbers[ids], ids):
                raise BenchError("the pages of the window are not those of the file")
            return {FREMAP: seconds}

        contenders: list[Contender] = [ours, _memmap(bench, pattern.pages)]
        if running:
            contenders.append(lambda number: {bare: running[bare].run(pattern.pages(number))[0]})
        _add_rows(bench, report, what, contenders, count)
        report.count(f"{what}: faults a page", faults / count, "faults", at_most=1)


def _touched(window: fremap.Window, touch: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds that `touch` takes and the lazy faults that it costs: at least one."""
    before = window.stats().faults
    seconds = timed(touch)
    faults = window.stats().faults - before
    if faults == 0:
        raise BenchError("touching the window took no lazy fault: it was not absent")
    return seconds, faults


def _memmap(bench: Bench, pages: Callable[[int], npt.NDArray[np.int64]]) -> Contender:
    """Touch the same pages of a map of the file that is fresh in each round."""

    def run(number: int) -> Mapping[str, float]:
        ids = pages(number)
        file = bench.file
        table = np.memmap(file.path, dtype=np.int64, mode="r", shape=(file.page_count, _WORDS))
        return {MEMMAP: timed(lambda: table[ids, 0].sum())}

    return run


def _add_rows(
    bench: Bench, report: Report, what: str, contenders: list[Contender], count: int
) -> None:
    timings = paired(contenders, rounds=bench.rounds, operations=count)
    for bare in {BARE, BARE_SIGNAL} & timings.keys():
        report.rows.append(
            times_the_time(
                f"{what}: of the bare loop",
                timings[FREMAP],
                timings[bare],
                at_most=_MOST_TIMES_BARE,
            )
        )
    report.rows.append(
        times_the_time(f"{what}: of np.memmap's own fault", timings[FREMAP], timings[MEMMAP])
    )
