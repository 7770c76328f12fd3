"""A sparse store through a window of a sixteenth of it, as a database would use it.

Every side has a process and a file of its own, and the same memory: a control
group holds its memory and page cache to the budget and a tenth. Data is in a quarter of the
store. Accesses are one word of one page each, one after the other.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fremap.bench.bench import Bench
from fremap.bench.datafile import PAGE_BYTES, SPARSE_PARTS, SparseFile
from fremap.bench.harness import (
    BenchError,
    Contender,
    Report,
    Timing,
    paired,
    times_faster,
    times_the_time,
)
from fremap.bench.memory import MemoryGroup
from fremap.bench.pagers import (
    CACHE,
    FREMAP,
    FREMAP_DIRECT,
    FREMAP_MEMMAP,
    MEMMAP,
    MMAP_RANDOM,
    STORE_EVERY,
    PagerProcess,
    TooSlowError,
    Touched,
)

# O19 in proportion: 16 GiB of store, 4 of data, 1 of window.
_BUDGET_PART = 4
_MOST_ACCESSES = 10_000
_LEAST_ACCESSES = 100
_FILL_ACCESSES = 200
_FILL_SECONDS = 30
# Rounds of the filling, by numbers that no other round has.
_FIRST_FILL = 1 << 20
_ROUND_SECONDS = 2
_SIDES = (FREMAP, FREMAP_DIRECT, FREMAP_MEMMAP, MEMMAP, MMAP_RANDOM, CACHE)
_NEED_LIMIT = (FREMAP_MEMMAP, MEMMAP, MMAP_RANDOM)
_MOST_OF_BUDGET = 1.1

Draw: TypeAlias = Callable[[int, int], npt.NDArray[np.int64]]


def _uniform(data_pages: npt.NDArray[np.int64]) -> Draw:
    """Every page as often as every other."""

    def draw(number: int, count: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng([2002, number])
        return data_pages[generator.integers(0, len(data_pages), count)]

    return draw


def _zipf(data_pages: npt.NDArray[np.int64]) -> Draw:
    """The k-th page, in random order, once for k times the first (exponent 1)."""
    ranked = np.random.default_rng(2002).permutation(data_pages)
    shares = np.cumsum(1 / np.arange(1, len(ranked) + 1))

    def draw(number: int, count: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng([2002, number])
        ranks = np.searchsorted(shares, generator.random(count) * shares[-1])
        pages: npt.NDArray[np.int64] = ranked[ranks]
        return pages

    return draw


@dataclass
class _Side:
    """A pager at work on its own file, and what it did in the measured rounds."""

    process: PagerProcess
    file: SparseFile
    draw: Draw
    whole: int
    stores: bool
    first_round: int
    stored: dict[int, int] = field(default_factory=dict)
    done: list[Touched] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.count = self.whole

    def fill(self, count: int) -> None:
        """Touch `count` different pages, as many as there is room for, before anything counts.

        A side that is slow fills for a limited time, and does less in a round.
        """
        seen: set[int] = set()
        spent, number = 0.0, _FIRST_FILL
        while len(seen) < count and spent < _FILL_SECONDS:
            seen.update(self.draw(number, _FILL_ACCESSES).tolist())
            taken = self._touch(number, _FILL_ACCESSES).seconds
            spent += taken
            number += 1
        affordable = int(_ROUND_SECONDS * _FILL_ACCESSES / taken)
        self.count = max(min(self.count, affordable), min(self.count, _LEAST_ACCESSES))

    def run(self, number: int) -> Mapping[str, float]:
        """Return the seconds that all of a round's accesses take, or would take."""
        touched = self._touch(number, self.count)
        if number >= self.first_round:
            self.done.append(touched)
        return {self.process.name: touched.seconds * self.whole / self.count}

    def _touch(self, number: int, count: int) -> Touched:
        pages = self.draw(number, count)
        if not self.stores:
            return self.process.touch(pages, None)
        value = number + 1
        self.stored.update(dict.fromkeys(pages[::STORE_EVERY].tolist(), value))
        return self.process.touch(pages, value)

    def finish(self) -> None:
        """End the process, and look in the file for what it stored."""
        self.process.close()
        table = np.memmap(self.file.path, dtype=np.int64, mode="r").reshape(-1, PAGE_BYTES // 8)
        pages = np.fromiter(self.stored, dtype=np.int64)
        values = np.fromiter(self.stored.values(), dtype=np.int64)
        lost = int(np.count_nonzero(table[pages, 1] != values))
        if lost:
            raise BenchError(f"{self.process.name}: {lost} stores did not reach the file")

    @property
    def hit_ratio(self) -> float:
        misses = sum(touched.misses for touched in self.done)
        return 1 - misses / (len(self.done) * self.count)


def zipf_reads(bench: Bench) -> Report:
    """Read, the k-th page once for k times the first."""
    return _measure(bench, "Zipf", _zipf, stores=False)


def zipf_writes(bench: Bench) -> Report:
    """The same; each tenth access is a store."""
    return _measure(bench, "Zipf", _zipf, stores=True)


def uniform_reads(bench: Bench) -> Report:
    """Read, every page as often as every other."""
    return _measure(bench, "uniform", _uniform, stores=False)


def uniform_writes(bench: Bench) -> Report:
    """The same; each tenth access is a store."""
    return _measure(bench, "uniform", _uniform, stores=True)


def _measure(
    bench: Bench,
    label: str,
    distribution: Callable[[npt.NDArray[np.int64]], Draw],
    *,
    stores: bool,
) -> Report:
    warm_ups = 1
    count = min(bench.pages, _MOST_ACCESSES)
    sample = bench.sparse_file(FREMAP)
    budget = sample.data_bytes // _BUDGET_PART
    report = Report(
        "window",
        f"{label} accesses, {'a tenth of them stores' if stores else 'all reads'}, to "
        f"{sample.data_bytes >> 20} MiB in a store of {sample.size_bytes >> 20} MiB, "
        f"budget {budget / (1 << 20):g} MiB",
    )
    with ExitStack() as stack:
        sides: list[_Side] = []
        for name in _SIDES:
            group = MemoryGroup.new(str(len(sides)))
            if group is None:
                report.missing.append(
                    f"{', '.join(_NEED_LIMIT)}: no memory control group can be made here"
                )
                if name in _NEED_LIMIT:
                    continue
            else:
                stack.enter_context(group)
            file = bench.sparse_file(name)
            file.drop()
            process = PagerProcess(name, file.path, budget, writable=stores, group=group)
            stack.enter_context(process)
            draw = distribution(file.data_pages())
            sides.append(_Side(process, file, draw, count, stores, warm_ups))
        sides = [side for side in sides if _filled(report, side, budget // PAGE_BYTES)]
        contenders: list[Contender] = [side.run for side in sides]
        timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=warm_ups)
        for side in sides:
            side.finish()
    _add_rows(report, timings, sides, budget)
    return report


def _filled(report: Report, side: _Side, count: int) -> bool:
    """Have a side fill its memory, `count` pages; whether it could in reasonable time."""
    try:
        side.fill(count)
    except TooSlowError as error:
        report.missing.append(str(error))
        return False
    return True


def _add_rows(report: Report, timings: dict[str, Timing], sides: list[_Side], budget: int) -> None:
    for ours in (FREMAP, FREMAP_DIRECT):
        report.rows += [
            times_faster(f"{ours}: than {name}", timings[ours], timings[name])
            for name in (MEMMAP, MMAP_RANDOM, CACHE)
            if name in timings
        ]
    if FREMAP_MEMMAP in timings:
        report.rows += [
            times_the_time(f"{FREMAP_MEMMAP}: of {name}", timings[FREMAP_MEMMAP], timings[name])
            for name in (MEMMAP, MMAP_RANDOM)
            if name in timings
        ]
    for side in sides:
        name = side.process.name
        report.count(f"{name}: accesses a second", 1e6 / timings[name].microseconds, "accesses")
    for side in sides:
        report.count(f"{side.process.name}: hit ratio", side.hit_ratio, "of the accesses")
    report.notes += [
        f"{side.process.name}: {side.count} accesses in a round, not {side.whole}: it is slow"
        for side in sides
        if side.count < side.whole
    ]
    for side in sides:
        if side.process.name in (FREMAP, FREMAP_DIRECT):
            report.count(
                f"{side.process.name}: memory and page tables at most",
                side.process.held_bytes / budget,
                "of the budget",
                at_most=_MOST_OF_BUDGET,
            )
            evicted = sum(touched.evicted or 0 for touched in side.done)
            report.notes.append(
                f"{side.process.name}: {evicted} pages evicted; memory sampled "
                f"{side.process.samples} times"
            )
    report.notes.append(
        f"a store is {SPARSE_PARTS} times its data, which is {_BUDGET_PART} times the budget; "
        "a hit of a mapping is an access without a major fault"
    )
