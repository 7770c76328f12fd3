"""Touches of random pages by one thread and by many: `fremap.memmap` beside `numpy.memmap`.

Once with the budget that an array has if none is said, and once with an eighth of the
file, where pages have to be mapped again. The arrays stay open from round to round; before
each their pages are unmapped.
"""

import mmap
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.bench import Bench
from fremap.bench.competitors import advised_memmap
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import BenchError, Contender, Report, paired, times_the_time

OURS = "fremap.memmap"
KEPT_SMALL = "fremap.memmap, budget of an eighth"
MEMMAP = "np.memmap"
RANDOM = "np.memmap, MADV_RANDOM"
_WORDS = PAGE_BYTES // 8
_THREADS = (1, 4, 16)
_MOST_COLD = 4096
_BUDGET_PART = 8
_MOST_OF_THE_TIME = 1.1


def warm(bench: Bench) -> Report:
    """Touch pages that are in the page cache."""
    report = Report("scan", "touch random pages in the page cache")
    bench.warm_file(report)
    return _measure(bench, report, bench.pages, cold=False)


def cold(bench: Bench) -> Report:
    """Touch pages that are not."""
    report = Report("scan", "touch random pages not in the page cache")
    report.notes.append("a host may still cache what was written")
    return _measure(bench, report, min(bench.pages, _MOST_COLD), cold=True)


def _measure(bench: Bench, report: Report, count: int, *, cold: bool) -> Report:
    path, size = bench.file.path, bench.file.size_bytes
    shape = (size // PAGE_BYTES, _WORDS)
    ours = fremap.memmap(path, np.int64, "r", shape=shape)
    small = fremap.memmap(path, np.int64, "r", shape=shape, budget=size // _BUDGET_PART)
    sides: dict[str, tuple[Any, Callable[[], object]]] = {
        OURS: (ours, ours.evict),
        KEPT_SMALL: (small, small.evict),
    }
    for name, advice in ((MEMMAP, mmap.MADV_NORMAL), (RANDOM, mmap.MADV_RANDOM)):
        array: Any = advised_memmap(path, np.int64, advice, shape=shape)
        sides[name] = (array, partial(array._mmap.madvise, mmap.MADV_DONTNEED))  # noqa: SLF001
    for threads in _THREADS:
        sums: dict[str, int] = {}
        contenders = [
            _side(name, array.view(np.ndarray), threads, count, sums)
            for name, (array, _) in sides.items()
        ]

        def prepare() -> None:
            for _, unmap in sides.values():
                unmap()
            if cold:
                bench.file.drop()

        timings = paired(
            [partial(_prepared, prepare, contender) for contender in contenders],
            rounds=bench.rounds, operations=count, warm_ups=1,
        )  # fmt: skip
        if len(set(sums.values())) != 1:
            raise BenchError(f"scan: the sides do not agree on the sum: {sums}")
        for name in (MEMMAP, RANDOM):
            what = f"{by_threads(threads)}: of {name}"
            ratio = times_the_time(what, timings[OURS], timings[name], at_most=_MOST_OF_THE_TIME)
            report.rows.append(ratio)
        for name in (MEMMAP, RANDOM):
            what = f"{by_threads(threads)}, budget of an eighth: of {name}"
            report.rows.append(times_the_time(what, timings[KEPT_SMALL], timings[name]))
    report.notes.append(f"fremap.memmap's advice was {ours.stats().advice!r} at the end")
    return report


def by_threads(threads: int) -> str:
    """Say how many threads."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def _prepared(
    prepare: Callable[[], None], contender: Contender, number: int
) -> Mapping[str, float]:
    prepare()
    return contender(number)


def _side(
    name: str, words: npt.NDArray[np.int64], threads: int, count: int, sums: dict[str, int]
) -> Contender:
    """Touch a word of each of the round's pages."""

    def run(number: int) -> Mapping[str, float]:
        pages = np.random.default_rng([2002, number]).integers(0, len(words), count)
        begin = time.perf_counter()
        sums[name] = touch(words, pages, threads)
        return {name: time.perf_counter() - begin}

    return run


def touch(words: npt.NDArray[np.int64], pages: npt.NDArray[np.int64], threads: int) -> int:
    """Return the sum of the first words of pages, touched by so many threads at once.

    NumPy lets go of the GIL while it gathers, and touches one page after the other. It gathers
    from an array whose words follow one another: any other it copies first, all of it.
    """
    flat = words.reshape(-1)

    def gather(some: npt.NDArray[np.int64]) -> int:
        return int(np.take(flat, some * words.shape[1]).sum())

    if threads == 1:
        return gather(pages)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(gather, np.array_split(pages, threads)))
