"""Windows that may be written and keep their changes: what noticing and writing stores costs.

Each way to notice a store is a side of its own: the kernel notes it ("async"), the
first store to a page is a fault ("sync"), or content is compared ("eager"). Stores
go to the second word of a page: the first bears its number.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.bench import Bench, placements, verify
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import (
    BenchError,
    Contender,
    Report,
    Timing,
    paired,
    timed,
    times_faster,
    times_the_time,
)
from fremap.bench.machine import counting

SHARED = "a shared mmap"
SHARED_SMALL = "a shared mmap on small pages"
MSYNC = "mmap.flush"
PWRITE = "pwrite a page"
PWRITE_FSYNC = "pwrite a page, then fsync"
PWRITE_DIRECT = "O_DIRECT pwrite a page, then fsync"
MADVISE = "madvise a page of a shared mmap"
COMPARE = "comparing with np.memmap"
_WORDS = PAGE_BYTES // 8
_EVERY = 7
_MOST_STORES = 8192

Column = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Kind:
    """A kind of window, by what it tells the suite and what it is made with."""

    name: str
    engine: Literal["paged", "eager"]
    tracking: Literal["auto", "async", "sync"]

    @property
    def side(self) -> str:
        return f"fremap, {self.name}"


_KINDS = (
    _Kind("async", "paged", "async"),
    _Kind("sync", "paged", "sync"),
    _Kind("eager", "eager", "auto"),
)


@dataclass(frozen=True)
class _Side:
    """A window that may be written, and the word of each page that stores go to."""

    kind: _Kind
    window: fremap.Window
    column: Column

    @property
    def name(self) -> str:
        return self.kind.side


@contextmanager
def _sides(
    bench: Bench,
    report: Report,
    page_count: int,
    *,
    mapping: Literal["linear", "none"],
    direct: bool = False,
) -> Iterator[list[_Side]]:
    """Open a window of each kind; the report says which there cannot be."""
    with ExitStack() as stack:
        store = stack.enter_context(fremap.open(bench.file.path, "r+", direct=direct))
        sides = []
        for kind in _KINDS:
            try:
                window = fremap.Window(
                    store,
                    page_count,
                    mapping=mapping,
                    prot=fremap.Prot.WRITE,
                    coherent=False,
                    engine=kind.engine,
                    tracking=kind.tracking,
                )
            except fremap.UnsupportedError as error:
                report.missing.append(f"{kind.name}: {error}")
                continue
            stack.enter_context(window)
            column = window.array(np.int64, (page_count, _WORDS))[:, 1]
            sides.append(_Side(kind, window, column))
        yield sides


@contextmanager
def _shared(bench: Bench, page_count: int) -> Iterator[tuple[mmap.mmap, Column]]:
    """Map the front of the file as a shared mapping, and its pages' second words."""
    memory = mmap.mmap(bench.file.fd, page_count * PAGE_BYTES)
    yield memory, np.frombuffer(memory, dtype=np.int64).reshape(-1, _WORDS)[:, 1]
    # The array holds the map; both go when the caller drops it.


def _check_dirty(side: _Side, pages: npt.NDArray[np.int64]) -> None:
    """Raise unless just these pages are dirty."""
    dirty = np.flatnonzero(side.window.dirty())
    if not np.array_equal(dirty, pages):
        raise BenchError(f"{side.name}: {len(dirty)} pages are dirty, {len(pages)} were stored to")


def _every(pages: int) -> npt.NDArray[np.int64]:
    return np.arange(0, pages, _EVERY, dtype=np.int64)


def remap(bench: Bench) -> Report:
    """Replace the pages of windows that are present and clean; the file is in the page cache."""
    report = Report(
        "dirty",
        f"remap {bench.pages} scattered pages of a window that may be written, "
        "file in the page cache",
    )
    bench.warm_file(report)
    draw = bench.draw()
    with (
        _sides(bench, report, bench.pages, mapping="none") as sides,
        bench.loops(report, "mmap_fixed", "remap_file_pages", mode="writable") as running,
    ):

        def ours(side: _Side) -> Contender:
            def run(number: int) -> Mapping[str, float]:
                ids = draw.distinct(number, bench.pages)
                seconds = timed(lambda: side.window.remap(ids))
                verify(side.window, ids)
                return {side.name: seconds}

            return run

        def theirs(name: str) -> Contender:
            return lambda number: {name: running[name].run(draw.distinct(number, bench.pages))[0]}

        contenders = [*map(ours, sides), *map(theirs, running)]
        timings = paired(contenders, rounds=bench.rounds, operations=bench.pages, warm_ups=3)
        for side in sides:
            for name, label in (
                ("mmap_fixed", "mmap(MAP_FIXED|MAP_POPULATE)"),
                ("remap_file_pages", "remap_file_pages(2)"),
            ):
                if name in timings:
                    report.rows.append(
                        times_faster(
                            f"{side.kind.name}: than {label} a page",
                            timings[side.name],
                            timings[name],
                            at_least=3 if side.kind.engine == "paged" else None,
                        )
                    )
        for side in sides:
            _remap_counts(report, side, draw.distinct(0, bench.pages))
    return report


def _remap_counts(report: Report, side: _Side, ids: npt.NDArray[np.int64]) -> None:
    paged = side.kind.engine == "paged"
    with counting() as counts:
        side.window.remap(ids)
    _check_dirty(side, np.array([], dtype=np.int64))
    report.count(
        f"{side.kind.name}: system calls of a remap, a page",
        counts.system_call_count / len(ids),
        "calls",
    )
    report.notes.append(
        f"{side.kind.name}: system calls: "
        + ", ".join(f"{name} {calls}" for name, calls in sorted(counts.system_calls.items()))
    )
    report.count(
        f"{side.kind.name}: kernel mappings of the window",
        side.window.vma_count,
        "VMAs",
        at_most=1 if paged else None,
    )


def first_store(bench: Bench) -> Report:
    """Store a word to each page that is present and clean."""
    count = min(bench.pages, bench.file.page_count, _MOST_STORES)
    report = Report("dirty", f"first store to {count} pages, each present and clean")
    bench.warm_file(report)
    for where in placements(report):
        _store_first(bench, report, count, where)
    return report


def _store_first(bench: Bench, report: Report, count: int, where: str) -> None:
    faults: dict[str, int] = {}

    def storing(name: str, column: Column, clean: Callable[[], object]) -> Contender:
        def run(number: int) -> Mapping[str, float]:
            clean()
            column.sum()  # all of it is present
            with counting() as counts:
                seconds = timed(lambda: column.fill(number))
            faults[name] = counts.faults
            return {name: seconds}

        return run

    with (
        _sides(bench, report, count, mapping="linear") as sides,
        _shared(bench, count) as (memory, column),
        _shared(bench, count) as (small_memory, small_column),
    ):
        # Without this one fault can be for 512 pages, where the page cache has large folios.
        small_memory.madvise(mmap.MADV_NOHUGEPAGE)
        contenders = []
        for side in sides:
            side.window.populate()
            contenders.append(storing(side.name, side.column, side.window.flush))
        contenders.append(storing(SHARED, column, memory.flush))
        contenders.append(storing(SHARED_SMALL, small_column, small_memory.flush))
        timings = paired(contenders, rounds=bench.rounds, operations=count)
        for side in sides:
            _check_dirty(side, np.arange(count))
            report.rows += [
                times_the_time(
                    f"{side.kind.name}, {where}: of {name}'s first store",
                    timings[side.name],
                    timings[name],
                )
                for name in (SHARED, SHARED_SMALL)
            ]
        for name, seen in faults.items():
            report.count(f"{name}, {where}: faults a page", seen / count, "faults")


def ask(bench: Bench) -> Report:
    """Ask which pages are dirty where a hundredth is, in random places."""
    count = min(bench.pages, bench.file.page_count)
    stored = max(1, count // 100)
    report = Report("dirty", f"dirty() of a window of {count} pages, {stored} of them dirty")
    bench.warm_file(report)
    pages = np.sort(np.random.default_rng(2002).permutation(count)[:stored])
    with _sides(bench, report, count, mapping="linear") as sides:
        # What a program does that has no such call: it compares all with the file.
        table = np.memmap(bench.file.path, dtype=np.int64, mode="r", shape=(count, _WORDS))

        def asking(side: _Side) -> Contender:
            side.window.populate()
            side.column[pages] = np.iinfo(np.int64).max - pages
            return lambda _: {side.name: timed(side.window.dirty)}

        contenders = [asking(side) for side in sides]
        if sides:
            content = sides[0].window.array(np.int64, (count, _WORDS))
            contenders.append(
                lambda _: {COMPARE: timed(lambda: (content != table).any(axis=1))},
            )
        timings = paired(contenders, rounds=bench.rounds, operations=count)
        for side in sides:
            _check_dirty(side, pages)
            report.rows.append(
                times_faster(
                    f"{side.kind.name}: than comparing with np.memmap",
                    timings[side.name],
                    timings[COMPARE],
                )
            )
    return report


def flush(bench: Bench) -> Report:
    """Store to every seventh page, then have it on the device."""
    count = min(bench.pages, bench.file.page_count)
    pages = _every(count)
    report = Report("dirty", f"flush {len(pages)} dirty pages, every seventh of {count}")
    bench.warm_file(report)
    with (
        _sides(bench, report, count, mapping="linear") as sides,
        _shared(bench, count) as (memory, column),
    ):
        contenders = _flushes(sides, pages)
        contenders.append(_flushing(MSYNC, column, pages, memory.flush))
        contenders.append(_pwrite(bench.file.fd, PWRITE_FSYNC, pages, durable=True))
        timings = paired(contenders, rounds=bench.rounds, operations=len(pages))
        for side in sides:
            _check_dirty(side, pages[:0])
            _compare(report, side, timings, (MSYNC, PWRITE_FSYNC))
    return report


def flush_direct(bench: Bench) -> Report:
    """Do the same past the page cache, where each write waits for the device."""
    count = min(bench.pages, bench.file.page_count)
    pages = _every(count)
    report = Report(
        "dirty", f"flush {len(pages)} dirty pages, every seventh of {count}, direct=True"
    )
    try:
        fd = os.open(bench.file.path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        report.missing.append(f"direct=True: {error}")
        return report
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        opened = _sides(bench, report, count, mapping="linear", direct=True)
        sides = stack.enter_context(opened)
        contenders = _flushes(sides, pages)
        contenders.append(_pwrite(fd, PWRITE_DIRECT, pages, durable=True))
        timings = paired(contenders, rounds=bench.rounds, operations=len(pages))
        for side in sides:
            _check_dirty(side, pages[:0])
            _compare(report, side, timings, (PWRITE_DIRECT,))
    return report


def _flushes(sides: list[_Side], pages: npt.NDArray[np.int64]) -> list[Contender]:
    """Flush each window, all of which is present, after stores to `pages`."""
    for side in sides:
        side.window.populate()
    return [_flushing(side.name, side.column, pages, side.window.flush) for side in sides]


def _flushing(
    name: str, column: Column, pages: npt.NDArray[np.int64], work: Callable[[], object]
) -> Contender:
    def run(number: int) -> Mapping[str, float]:
        column[pages] = number
        return {name: timed(work)}

    return run


def _pwrite(fd: int, name: str, pages: npt.NDArray[np.int64], *, durable: bool) -> Contender:
    """Write copies of pages, each by a call; without `durable`, fsync comes after the clock."""
    # Aligned to pages, as O_DIRECT wants it.
    memory = mmap.mmap(-1, len(pages) * PAGE_BYTES)
    content = np.frombuffer(memory, dtype=np.int64).reshape(-1, _WORDS)
    content[:, 0] = pages
    work = list(zip(content, (pages * PAGE_BYTES).tolist(), strict=True))

    def run(number: int) -> Mapping[str, float]:
        content[:, 1] = number

        def write() -> None:
            for page, offset in work:
                os.pwrite(fd, page, offset)
            if durable:
                os.fsync(fd)

        seconds = timed(write)
        os.fsync(fd)
        return {name: seconds}

    return run


def evict(bench: Bench) -> Report:
    """Evict every seventh page: clean pages, then pages that were stored to."""
    count = min(bench.pages, bench.file.page_count)
    pages = _every(count)
    report = Report("dirty", f"evict {len(pages)} pages, every seventh of {count}")
    bench.warm_file(report)
    with (
        _sides(bench, report, count, mapping="linear") as sides,
        _shared(bench, count) as (memory, column),
    ):

        def ours(side: _Side) -> Contender:
            def run(number: int) -> Mapping[str, float]:
                side.window.populate()
                clean = timed(lambda: side.window.evict(pages))
                side.window.populate()
                side.column[pages] = number
                dirty = timed(lambda: side.window.evict(pages))
                if side.window.present()[pages].any():
                    raise BenchError(f"{side.name}: evicted pages are still there")
                side.window.flush()  # fsync, so that the next does not pay for it
                return {f"{side.name}, clean": clean, f"{side.name}, dirty": dirty}

            return run

        def drop() -> None:
            for offset in (pages * PAGE_BYTES).tolist():
                memory.madvise(mmap.MADV_DONTNEED, offset, PAGE_BYTES)

        def shared(number: int) -> Mapping[str, float]:
            column.sum()
            clean = timed(drop)
            column[pages] = number
            dirty = timed(drop)
            memory.flush()
            return {f"{MADVISE}, clean": clean, f"{MADVISE}, dirty": dirty}

        contenders = [
            *map(ours, sides),
            shared,
            _pwrite(bench.file.fd, PWRITE, pages, durable=False),
        ]
        timings = paired(contenders, rounds=bench.rounds, operations=len(pages))
        for side in sides:
            report.rows.append(
                times_the_time(
                    f"{side.kind.name}, clean: of {MADVISE}",
                    timings[f"{side.name}, clean"],
                    timings[f"{MADVISE}, clean"],
                )
            )
        for side in sides:
            for name in (f"{MADVISE}, dirty", PWRITE):
                report.rows.append(
                    times_the_time(
                        f"{side.kind.name}, dirty: of {name.removesuffix(', dirty')}",
                        timings[f"{side.name}, dirty"],
                        timings[name],
                    )
                )
    return report


def _compare(
    report: Report, side: _Side, timings: dict[str, Timing], names: tuple[str, ...]
) -> None:
    report.rows += [
        times_the_time(f"{side.kind.name}: of {name}", timings[side.name], timings[name])
        for name in names
    ]
