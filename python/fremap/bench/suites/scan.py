"""A pass over a file larger than the budget: in order, and a word of every sixteenth page.

`fremap.memmap` beside `numpy.memmap` and buffers that are read into; and how much memory
each took meanwhile.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench import containers
from fremap.bench.bench import Bench
from fremap.bench.competitors import POOL_THREADS, advised_memmap
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import BenchError, Contender, Report, paired, times_the_time
from fremap.bench.machine import process_bytes

OURS = "fremap.memmap"
MEMMAP = "np.memmap"
SEQUENTIAL = "np.memmap, MADV_SEQUENTIAL"
RANDOM = "np.memmap, MADV_RANDOM"
FADVISE = "posix_fadvise ahead, then np.memmap"
READ = "readinto a buffer"
POOL = f"readinto by {POOL_THREADS} threads"
_MOST_BYTES = 2 << 30
_BUDGET_PART = 8
_BUFFER_BYTES = 1 << 20
_BUFFER_PAGES = _BUFFER_BYTES // PAGE_BYTES
_STRIDE_PAGES = 16
_WORDS = PAGE_BYTES // 8
# So much beyond its budget an array may take, and so much more for a moment.
_MOST_OF_BUDGET = 1.1
_OVERSHOOT_BYTES = 32 << 20
_THREADS = 4

Words: TypeAlias = npt.NDArray[np.int64]
Pass: TypeAlias = Callable[[Words], Any]


def warm(bench: Bench) -> Report:
    """Scan a file in the page cache."""
    report = Report("scan", f"scan {_megabytes(bench)} MiB in the page cache")
    bench.warm_file(report)
    return _measure(bench, report, cold=False)


def cold(bench: Bench) -> Report:
    """Scan a file that is not in the page cache."""
    report = Report("scan", f"scan {_megabytes(bench)} MiB not in the page cache")
    report.notes.append("a host may still cache what was written")
    return _measure(bench, report, cold=True)


def _size(bench: Bench) -> int:
    return min(bench.file.size_bytes, _MOST_BYTES)


def _megabytes(bench: Bench) -> int:
    return _size(bench) >> 20


def _in_order(words: Words) -> Any:
    return words.sum()


def _in_order_by_threads(words: Words) -> Any:
    with ThreadPoolExecutor(_THREADS) as pool:
        return _total(pool.map(np.sum, np.array_split(words, _THREADS)))


def _strided(words: Words) -> Any:
    return words[:: _STRIDE_PAGES * _WORDS].sum()


def _measure(bench: Bench, report: Report, *, cold: bool) -> Report:
    path, size = bench.file.path, _size(bench)
    budget = size // _BUDGET_PART
    sides: dict[str, Callable[[Pass], Any]] = {
        OURS: lambda work: work(fremap.memmap(path, np.int64, "r", shape=size // 8, budget=budget)),
        MEMMAP: lambda work: work(_mapped(path, size, mmap.MADV_NORMAL)),
        SEQUENTIAL: lambda work: work(_mapped(path, size, mmap.MADV_SEQUENTIAL)),
        RANDOM: lambda work: work(_mapped(path, size, mmap.MADV_RANDOM)),
        FADVISE: lambda work: _advised(path, size, strided=work is _strided),
        READ: lambda work: _read(path, size, 1, strided=work is _strided),
        POOL: lambda work: _read(path, size, POOL_THREADS, strided=work is _strided),
    }

    def prepare() -> None:
        if cold:
            bench.file.drop()

    passes: tuple[tuple[str, Pass], ...] = (
        ("in order", _in_order),
        (f"in order, {_THREADS} threads", _in_order_by_threads),
        ("strided", _strided),
    )
    for what, work in passes:
        memory, sums = dict[str, int](), dict[str, int]()
        contenders = [
            _side(name, partial(make, work), prepare, memory, sums)
            for name, make in sides.items()
            # In order it is a read a page, each waited for: nobody's advice for a pass.
            if (name != RANDOM or work is _strided)
            # These have a way of their own to go.
            and (work is not _in_order_by_threads or name in (OURS, MEMMAP, SEQUENTIAL))
        ]
        pages = size // PAGE_BYTES // (_STRIDE_PAGES if work is _strided else 1)
        timings = paired(contenders, rounds=bench.rounds, operations=pages, warm_ups=1)
        _check(sums)
        report.rows += [
            times_the_time(f"{what}: of {name}", timings[OURS], timings[name])
            for name in sides
            if name in timings and name != OURS
        ]
        report.count(
            f"{what}: memory that fremap.memmap took, at most",
            memory[OURS] / budget,
            "of its budget",
            at_most=_MOST_OF_BUDGET + _OVERSHOOT_BYTES / budget,
        )
        for name in sides:
            if name in memory:
                taken = memory[name] / 2**20
                report.count(f"{what}: memory that {name} took, at most", taken, "MiB")
    report.notes.append(f"the budget is {budget / 2**20:g} MiB; MADV_SEQUENTIAL is advice alone")
    for container in containers.installed(report):
        with container(path, 0, PAGE_BYTES) as other:
            _beside_container(bench, report, other, cold=cold)
    return report


def _beside_container(
    bench: Bench, report: Report, other: containers.Container, *, cold: bool
) -> None:
    """Scan what a container has, in order and a MiB at a time."""
    pages = min(other.row_count, _size(bench) // PAGE_BYTES)
    budget = pages * PAGE_BYTES // _BUDGET_PART
    name = other.name.replace("[ids]", "[first:last]")

    def prepare() -> None:
        if cold:
            bench.file.drop()
            other.drop()

    def ours() -> Any:
        words = fremap.memmap(bench.file.path, np.int64, "r", shape=pages * _WORDS, budget=budget)
        return _in_order(words)

    def theirs() -> Any:
        return _total(
            other.slice(first, min(_BUFFER_PAGES, pages - first)).view(np.int64).sum()
            for first in range(0, pages, _BUFFER_PAGES)
        )

    memory, sums = dict[str, int](), dict[str, int]()
    contenders = [
        _side(OURS, ours, prepare, memory, sums),
        _side(name, theirs, prepare, memory, sums),
    ]
    timings = paired(contenders, rounds=bench.rounds, operations=pages, warm_ups=1)
    _check(sums)
    report.rows.append(times_the_time(f"in order: of {name}", timings[OURS], timings[name]))


def _side(
    name: str, scan: Callable[[], Any], prepare: Callable[[], object],
    memory: dict[str, int], sums: dict[str, int],
) -> Contender:  # fmt: skip
    """Time a pass, the opening and closing of the file with it; note its sum and its memory."""

    def run(number: int) -> Mapping[str, float]:
        prepare()
        before, tables = _forget_most(), process_bytes("VmPTE")
        begin = time.perf_counter()
        sums[name] = int(scan())
        seconds = time.perf_counter() - begin
        if number > 0:  # the first loads what later ones find loaded
            taken = process_bytes("VmHWM") - before + process_bytes("VmPTE") - tables
            memory[name] = max(memory.get(name, 0), taken)
        return {name: seconds}

    return run


def _check(sums: dict[str, int]) -> None:
    if len(set(sums.values())) != 1:
        raise BenchError(f"scan: the sides do not agree on the sum: {sums}")


def _forget_most() -> int:
    """Have the kernel's record of the most memory begin anew; return what there is now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return process_bytes("VmRSS")


def _mapped(path: Path, size: int, advice: int) -> Words:
    return advised_memmap(path, np.int64, advice, shape=(size // 8,))


def _total(sums: Iterable[np.int64]) -> np.int64:
    """Add up as NumPy does within an array: past the largest number it begins anew."""
    total: np.int64 = np.fromiter(sums, np.int64).sum()
    return total


def _advised(path: Path, size: int, *, strided: bool) -> np.int64:
    """Have the kernel read ahead what is next: a MiB in order, all pages of a stride."""
    words = _mapped(path, size, mmap.MADV_RANDOM if strided else mmap.MADV_NORMAL)
    fd = os.open(path, os.O_RDONLY)
    try:
        if strided:
            for offset in range(0, size, _STRIDE_PAGES * PAGE_BYTES):
                os.posix_fadvise(fd, offset, PAGE_BYTES, os.POSIX_FADV_WILLNEED)
            return _total([_strided(words)])
        sums = []
        for first in range(0, size, _BUFFER_BYTES):
            ahead = first + _BUFFER_BYTES
            os.posix_fadvise(fd, ahead, _BUFFER_BYTES, os.POSIX_FADV_WILLNEED)
            sums.append(words[first // 8 : ahead // 8].sum())
        return _total(sums)
    finally:
        os.close(fd)


def _read(path: Path, size: int, threads: int, *, strided: bool) -> np.int64:
    """Sum by way of a buffer a thread: what is between the pages of a stride is not read."""
    step = _STRIDE_PAGES * PAGE_BYTES if strided else _BUFFER_BYTES
    fd = os.open(path, os.O_RDONLY)

    def share(part: int) -> np.int64:
        buffer = np.empty(1 if strided else _BUFFER_BYTES // 8, np.int64)
        return _total(
            buffer[: os.preadv(fd, [buffer], offset) // 8].sum()
            for offset in range(part * step, size, threads * step)
        )

    try:
        if threads == 1:
            return share(0)
        with ThreadPoolExecutor(threads) as pool:
            return _total(pool.map(share, range(threads)))
    finally:
        os.close(fd)
