"""Remapping scattered pages: warm, first fill, cold."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench import competitors, fio
from fremap.bench.bench import Bench, empty_window, verify
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import (
    BenchError,
    Contender,
    Report,
    Row,
    Timing,
    paired,
    timed,
    times_faster,
    times_the_time,
)
from fremap.bench.loops import Loop
from fremap.bench.machine import counting

STEADY = "fremap"
FIRST_FILL = "fremap, fresh window"
FIRST_REMAP = "fremap, fresh store and window"
MEMMAP = "np.memmap[ids]"
TAKE = "np.take(np.memmap, out=)"
FADVISE = "posix_fadvise, then pread"
POOL = f"preads, {competitors.POOL_THREADS} threads"
FIO = f"fio, depth {fio.QUEUE_DEPTH}"
DIRECT = "fremap, direct=True"

# The cold sides that read pages of their own in a round; `MEMMAP` comes after.
_COLD_SIDES = 5
_MOST_COLD_PAGES = 16_384


class _WarmSides:
    """The contenders of the warm rows, all over the same pages in a round."""

    def __init__(self, bench: Bench, store: fremap.FileStore, window: fremap.Window) -> None:
        file = bench.file
        self.bench = bench
        self.store = store
        self.window = window
        self.table = np.memmap(
            file.path, dtype=np.uint8, mode="r", shape=(file.page_count, PAGE_BYTES)
        )
        self.out = np.ones((bench.pages, PAGE_BYTES), dtype=np.uint8)

    def pages(self, number: int) -> npt.NDArray[np.int64]:
        return self.bench.draw().distinct(number, self.bench.pages)

    def steady(self, number: int) -> Mapping[str, float]:
        ids = self.pages(number)
        seconds = timed(lambda: self.window.remap(ids))
        verify(self.window, ids)
        return {STEADY: seconds}

    def first_fill(self, number: int) -> Mapping[str, float]:
        ids = self.pages(number)
        with empty_window(self.store, self.bench.pages) as fresh:
            return {FIRST_FILL: timed(lambda: fresh.remap(ids))}

    def first_remap(self, number: int) -> Mapping[str, float]:
        ids = self.pages(number)
        with self.bench.window() as fresh:
            return {FIRST_REMAP: timed(lambda: fresh.remap(ids))}

    def take(self, number: int) -> Mapping[str, float]:
        ids = self.pages(number)
        return {TAKE: timed(lambda: np.take(self.table, ids, axis=0, out=self.out, mode="clip"))}

    def memmap(self, number: int) -> Mapping[str, float]:
        ids = self.pages(number)
        return {MEMMAP: timed(lambda: self.table[ids])}

    def bare(self, loop: Loop) -> Contender:
        return lambda number: {loop.name: loop.run(self.pages(number))[0]}


def warm(bench: Bench) -> Report:
    """Replace the pages of a window that is present; the file is in the page cache."""
    report = Report(
        "remap", f"remap {bench.pages} scattered pages, file in the page cache, engine paged"
    )
    file = bench.warm_file(report)
    with (
        fremap.open(file.path) as store,
        empty_window(store, bench.pages) as window,
        bench.loops(report, *_bare_loops(report)) as running,
    ):
        sides = _WarmSides(bench, store, window)
        contenders: list[Contender] = [sides.steady, *map(sides.bare, running.values())]
        contenders += [sides.first_fill, sides.first_remap, sides.take, sides.memmap]
        timings = paired(contenders, rounds=bench.rounds, operations=bench.pages, warm_ups=3)
        _warm_rows(report, timings)
        _warm_counts(report, window, sides.pages(0))
    return report


def _bare_loops(report: Report) -> list[str]:
    """Return the C loops that this kernel can run."""
    names = ["mmap_fixed", "remap_file_pages"]
    move = fremap.capabilities().probes["uffd_move"]
    if move.available:
        return ["remap_move", *names]
    report.missing.append(f"the bare loop of memcpy and MOVE: UFFDIO_MOVE needs {move.remedy}")
    return names


def _warm_rows(report: Report, timings: dict[str, Timing]) -> None:
    steady, first = timings[STEADY], timings[FIRST_FILL]
    for name, label in (
        ("mmap_fixed", "mmap(MAP_FIXED|MAP_POPULATE)"),
        ("remap_file_pages", "remap_file_pages(2)"),
    ):
        if name in timings:
            report.rows.append(
                times_faster(f"than {label} a page", steady, timings[name], at_least=7)
            )
    if "remap_move" in timings:
        report.rows.append(
            times_the_time(
                "of a bare loop of memcpy and MOVE", steady, timings["remap_move"], at_most=1.25
            )
        )
    report.rows.append(times_faster("than np.memmap[ids]", steady, timings[MEMMAP]))
    report.rows.append(times_the_time("of np.take from a mapped np.memmap", steady, timings[TAKE]))
    report.rows.append(times_the_time("first fill, of a present window", first, steady))
    if "mmap_fixed" in timings:
        report.rows.append(
            times_faster("first fill, than mmap(MAP_FIXED)", first, timings["mmap_fixed"])
        )
    report.rows.append(times_the_time("first fill, of np.memmap[ids]", first, timings[MEMMAP]))
    report.rows.append(
        times_the_time("first remap of a store, of a present window", timings[FIRST_REMAP], steady)
    )


def _warm_counts(report: Report, window: fremap.Window, ids: npt.NDArray[np.int64]) -> None:
    """Count what a remap and the touches after it cost."""
    with counting() as remapping:
        window.remap(ids)
    numbers = np.frombuffer(window, dtype=np.int64)[:: PAGE_BYTES // 8]
    lazy_before = window.stats().faults
    with counting() as touching:
        total = int(numbers.sum())
    if total != int(ids.sum()):
        raise BenchError("the pages of the window are not those that were asked for")
    report.count(
        "system calls of a remap, a page",
        remapping.system_call_count / len(ids),
        "calls",
        at_most=0.1,
    )
    report.count("read from the device by a remap", remapping.device_bytes_read, "bytes", at_most=0)
    report.count("faults of touching every page", touching.faults, "faults", at_most=0)
    report.count(
        "lazy faults of touching every page",
        window.stats().faults - lazy_before,
        "faults",
        at_most=0,
    )
    report.count("kernel mappings of the window", window.vma_count, "VMAs", at_most=1)
    report.notes.append(
        "system calls: " + ", ".join(f"{n} {c}" for n, c in sorted(remapping.system_calls.items()))
    )


class _ColdPages:
    """Pages that no side has read before: a part of one shuffle for each side and round."""

    def __init__(self, bench: Bench) -> None:
        rounds = bench.rounds + 1
        file_pages = bench.file.page_count
        self.count = min(bench.pages, _MOST_COLD_PAGES, file_pages // (1 + _COLD_SIDES * rounds))
        if self.count == 0:
            raise BenchError(
                "the file is too small to give each round pages of its own; pass --file-size"
            )
        # The front of the file stays out of it: windows and the allocator are made warm with that.
        self.front = np.arange(self.count, dtype=np.int64)
        self._shuffled = np.random.default_rng(2002).permutation(np.arange(self.count, file_pages))

    def part(self, number: int, side: int) -> npt.NDArray[np.int64]:
        first = (number * _COLD_SIDES + side) * self.count
        return self._shuffled[first : first + self.count].astype(np.int64)


class _ColdSides:
    """The contenders of the cold rows."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.pages = _ColdPages(bench)
        self.out = np.ones((self.pages.count, PAGE_BYTES), dtype=np.uint8)
        self.resident = 0

    def _cold(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Drop the cache, and count those of `ids` that are in it all the same."""
        self.bench.file.drop()
        self.resident += int(np.count_nonzero(self.bench.file.resident()[ids]))
        return ids

    def fremap(self, name: str, side: int, *, direct: bool) -> Contender:
        """Replace the pages of a window that is present."""

        def run(number: int) -> Mapping[str, float]:
            with self.bench.window(self.pages.count, direct=direct) as window:
                # Two fills that read: the second leaves frames for the reads of the third.
                for shift in (0, 1):
                    self.bench.file.drop()
                    window.remap(np.roll(self.pages.front, shift))
                ids = self._cold(self.pages.part(number, side))
                seconds = timed(lambda: window.remap(ids))
                verify(window, ids)
            return {name: seconds}

        return run

    def fio(self, _number: int) -> Mapping[str, float]:
        self.bench.file.drop()
        return {FIO: fio.random_read_seconds(self.bench.file.path, self.pages.count, PAGE_BYTES)}

    def fadvise(self, number: int) -> Mapping[str, float]:
        ids = self._cold(self.pages.part(number, 2))
        return {FADVISE: competitors.fadvise_then_read(self.bench.file.fd, ids, self.out).seconds}

    def pool(self, number: int) -> Mapping[str, float]:
        ids = self._cold(self.pages.part(number, 3))
        return {POOL: competitors.pread_pool(self.bench.file.fd, ids, self.out).seconds}

    def memmap(self, number: int) -> Mapping[str, float]:
        ids = self._cold(self.pages.part(number, 4))
        return {MEMMAP: competitors.memmap_take(self.bench.file.path, ids).seconds}


def cold(bench: Bench) -> Report:
    """Remap pages that are not in the page cache, each read once in the whole run."""
    sides = _ColdSides(bench)
    count = sides.pages.count
    report = Report(
        "remap", f"remap {count} scattered pages, file not in the page cache, engine paged"
    )
    buffered = sides.fremap(STEADY, 0, direct=False)
    contenders: list[Contender] = [buffered, sides.fadvise, sides.pool]
    contenders.append(sides.fremap(DIRECT, 1, direct=True))
    reason = fio.unavailable(bench.file.path)
    if reason:
        report.missing.append(reason)
    else:
        contenders.append(sides.fio)
    timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=1)
    _cold_rows(report, timings)
    # np.memmap reads the neighbourhood of each page, and so pages that other
    # sides still have to find cold on the host: it comes last.
    bench.file.drop()
    late = paired([sides.memmap], rounds=bench.rounds, operations=count, warm_ups=0)
    report.rows.append(
        times_faster("than np.memmap[ids]", timings[STEADY], late[MEMMAP], at_least=8)
    )
    report.notes.append(
        f"{sides.resident} of the pages were in the page cache when their round began"
    )
    report.notes.append(
        "each page is read once, by one side; a host may still cache what was written"
    )
    return report


def _cold_rows(report: Report, timings: dict[str, Timing]) -> None:
    buffered, direct = timings[STEADY], timings[DIRECT]
    if FIO in timings:
        report.rows.append(
            _share_of_device("of the device's rate (fio, depth 32)", buffered, timings[FIO])
        )
        report.rows.append(_share_of_device("the same, direct=True", direct, timings[FIO]))
    report.rows.append(
        times_the_time("of posix_fadvise a page, then pread", buffered, timings[FADVISE], at_most=1)
    )
    report.rows.append(times_the_time("of a pool of preads", buffered, timings[POOL]))


def _share_of_device(what: str, ours: Timing, device: Timing) -> Row:
    row = times_faster(what, ours, device, at_least=0.9)
    return dataclasses.replace(row, unit="of it")
