"""Taking scattered rows of 160 bytes: warm, partly cold, cold, and beside an event loop."""

import asyncio
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench import competitors, containers
from fremap.bench.bench import Bench
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import (
    BenchError,
    Contender,
    Report,
    paired,
    timed,
    times_faster,
    times_the_time,
)
from fremap.bench.machine import counting

ROW_BYTES = 160
MOST_ROWS = 16_384

TAKE = "fremap take"
TAKE_OUT = "fremap take, out="
MEMMAP = "np.memmap[ids]"
MEMMAP_RANDOM = "np.memmap[ids], MADV_RANDOM"
NUMPY_TAKE = "np.take(np.memmap, out=)"
FADVISE = "posix_fadvise a row, then np.take"
FADVISE_READ = "posix_fadvise a row, then pread"
POOL = f"preads, {competitors.POOL_THREADS} threads"

# Sides that read pages of their own in a cold round; `MEMMAP` comes after.
_COLD_SIDES = 5
# One row in so many is cold in the mixed rounds.
_ONE_COLD_IN = 10
# Rounds after which all that rows come from is mapped.
_WARM_UPS = 8
_LAG_TAKES = 4

Ids = npt.NDArray[np.int64]
Table = np.memmap[tuple[int, int], np.dtype[np.uint8]]


class _Sides:
    """What all of them take from, and to."""

    def __init__(self, bench: Bench) -> None:
        self.file = bench.file
        self.row_count = self.file.size_bytes // ROW_BYTES
        self.count = min(bench.pages, MOST_ROWS, self.row_count)
        # Last bytes that make no row are left out, as `fremap.rows` would not have them.
        self.offset = self.file.size_bytes % ROW_BYTES
        self.out = np.ones((self.count, ROW_BYTES), dtype=np.uint8)

    def rows(self) -> fremap.Rows:
        """Open the rows."""
        return fremap.rows(self.file.path, np.uint8, ROW_BYTES, offset=self.offset)

    def table(self, advice: int = mmap.MADV_NORMAL) -> Table:
        """Map the rows as NumPy does."""
        shape = (self.row_count, ROW_BYTES)
        table = np.memmap(self.file.path, np.uint8, mode="r", offset=self.offset, shape=shape)
        kernel_map: mmap.mmap = table._mmap  # type: ignore[attr-defined] # noqa: SLF001 - np has no other way
        kernel_map.madvise(advice)
        return table

    def verify(self, taken: npt.NDArray[np.uint8], ids: Ids) -> None:
        """Raise unless `taken` is what the file has."""
        if not np.array_equal(taken, self.table()[ids]):
            raise BenchError("the rows are not those that were asked for")


def warm(bench: Bench) -> Report:
    """Take rows of a file that is in the page cache."""
    sides = _Sides(bench)
    count, out = sides.count, sides.out
    report = Report("take", f"take {count} random rows of {ROW_BYTES} bytes, in the page cache")
    bench.warm_file(report)
    table = sides.table()
    draw = np.random.default_rng(2002)
    with sides.rows() as rows:

        def take(_number: int) -> Mapping[str, float]:
            ids = draw.integers(0, sides.row_count, count)
            return {TAKE: timed(lambda: rows.take(ids))}

        def take_out(number: int) -> Mapping[str, float]:
            ids = draw.integers(0, sides.row_count, count)
            seconds = timed(lambda: rows.take(ids, out=out))
            if number == 0:  # not later: what it allocates would be in the next one's way
                sides.verify(out, ids)
            return {TAKE_OUT: seconds}

        def memmap(_number: int) -> Mapping[str, float]:
            ids = draw.integers(0, sides.row_count, count)
            return {MEMMAP: timed(lambda: table[ids])}

        def numpy_take(_number: int) -> Mapping[str, float]:
            ids = draw.integers(0, sides.row_count, count)
            return {NUMPY_TAKE: timed(lambda: np.take(table, ids, axis=0, out=out, mode="clip"))}

        contenders: list[Contender] = [take, memmap, take_out, numpy_take]
        begin = time.perf_counter()
        mapped = -1
        while rows.stats().mapped_bytes > mapped:
            mapped = rows.stats().mapped_bytes
            for number in range(_WARM_UPS):
                take(number)
        report.notes.append(
            f"{mapped >> 20} MiB were mapped by takes of {time.perf_counter() - begin:.2f} s "
            "before the first round"
        )
        int(table[:: PAGE_BYTES // ROW_BYTES, 0].sum())  # np.memmap's pages are mapped too
        timings = paired(contenders, rounds=bench.rounds, operations=count)
        report.rows.append(
            times_the_time("of np.memmap[ids]", timings[TAKE], timings[MEMMAP], at_most=0.5)
        )
        report.rows.append(
            times_the_time("out=: of np.take with out=", timings[TAKE_OUT], timings[NUMPY_TAKE])
        )
        ids = draw.integers(0, sides.row_count, count)
        with counting() as counts:
            rows.take(ids, out=out)
        report.count("system calls of a take, a row", counts.system_call_count / count, "calls")
    return report


class _ColdIds:
    """Rows of pages that no side has read before: a part of one shuffle for each of them."""

    def __init__(self, sides: _Sides, rounds: int, kinds: int) -> None:
        self._sides = sides
        pages = sides.file.page_count - 1
        self.count = min(sides.count, pages // (kinds * (rounds + 1)))
        if self.count == 0:
            raise BenchError(
                "the file is too small to give each round pages of its own; pass --file-size"
            )
        self._kinds = kinds
        self._pages = np.random.default_rng(2002).permutation(pages)
        self.resident = 0

    def part(self, number: int, side: int) -> Ids:
        first = (number * self._kinds + side) * self.count
        pages = self._pages[first : first + self.count].astype(np.int64)
        # A row that begins in the page, wherever.
        within = np.random.default_rng(number).integers(0, PAGE_BYTES // ROW_BYTES, len(pages))
        ids: Ids = (pages * PAGE_BYTES - self._sides.offset) // ROW_BYTES + 1 + within
        return ids.clip(0, self._sides.row_count - 1)

    def drop(self, ids: Ids) -> Ids:
        """Drop the cache, and count those of `ids` whose page is in it all the same."""
        self._sides.file.drop()
        pages = (ids * ROW_BYTES + self._sides.offset) // PAGE_BYTES
        self.resident += int(np.count_nonzero(self._sides.file.resident()[pages]))
        return ids


def cold(bench: Bench) -> Report:
    """Take rows that are not in the page cache, each page read once in the whole run."""
    sides = _Sides(bench)
    ids_of = _ColdIds(sides, bench.rounds, _COLD_SIDES)
    count, fd = ids_of.count, sides.file.fd
    out = sides.out[:count]
    report = Report("take", f"take {count} random rows of {ROW_BYTES} bytes, not in the page cache")

    def take(number: int) -> Mapping[str, float]:
        with sides.rows() as rows:
            rows.take(range(2), out=out[:2])  # what is set up once is
            ids = ids_of.drop(ids_of.part(number, 0))
            seconds = timed(lambda: rows.take(ids, out=out))
        sides.verify(out, ids)
        return {TAKE: seconds}

    def fadvise(number: int) -> Mapping[str, float]:
        table = sides.table(mmap.MADV_RANDOM)
        ids = ids_of.drop(ids_of.part(number, 1))

        def advise_and_take() -> None:
            for offset in (ids * ROW_BYTES + sides.offset).tolist():
                os.posix_fadvise(fd, offset, ROW_BYTES, os.POSIX_FADV_WILLNEED)
            np.take(table, ids, axis=0, out=out, mode="clip")

        return {FADVISE: timed(advise_and_take)}

    def fadvise_read(number: int) -> Mapping[str, float]:
        ids = ids_of.drop(ids_of.part(number, 2))
        outcome = competitors.fadvise_then_read(fd, ids, out, page_bytes=ROW_BYTES)
        return {FADVISE_READ: outcome.seconds}

    def pool(number: int) -> Mapping[str, float]:
        ids = ids_of.drop(ids_of.part(number, 3))
        return {POOL: competitors.pread_pool(fd, ids, out, page_bytes=ROW_BYTES).seconds}

    def memmap_random(number: int) -> Mapping[str, float]:
        table = sides.table(mmap.MADV_RANDOM)
        ids = ids_of.drop(ids_of.part(number, 4))
        return {MEMMAP_RANDOM: timed(lambda: table[ids])}

    contenders: list[Contender] = [take, fadvise, fadvise_read, pool, memmap_random]
    timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=1)
    for name in (FADVISE, FADVISE_READ, POOL):
        report.rows.append(times_the_time(f"of {name}", timings[TAKE], timings[name], at_most=1))
    report.rows.append(
        times_faster("than np.memmap[ids] with MADV_RANDOM", timings[TAKE], timings[MEMMAP_RANDOM])
    )

    def memmap(number: int) -> Mapping[str, float]:
        table = sides.table()
        ids = ids_of.drop(ids_of.part(number, 4))
        return {MEMMAP: timed(lambda: table[ids])}

    # Reads the neighbourhood of each row, and so what others still have to find cold: last.
    late = paired([memmap], rounds=bench.rounds, operations=count, warm_ups=0)
    report.rows.append(times_faster("than np.memmap[ids]", timings[TAKE], late[MEMMAP]))
    report.notes.append(
        f"{ids_of.resident} of the rows' pages were in the page cache when their round began"
    )
    report.notes.append(
        "np.memmap[ids] reads around each row what the device's read-ahead says, of which later "
        "rows of the same round find some"
    )
    return report


def partly_cold(bench: Bench) -> Report:
    """Take rows of which one in ten is not in the page cache."""
    sides = _Sides(bench)
    ids_of = _ColdIds(sides, bench.rounds, 3)
    count, fd = ids_of.count, sides.file.fd
    out = sides.out[:count]
    report = Report(
        "take", f"take {count} random rows of {ROW_BYTES} bytes, one in {_ONE_COLD_IN} cold"
    )

    def half_warm(number: int, side: int) -> Ids:
        ids = ids_of.drop(ids_of.part(number, side))
        pages = (ids * ROW_BYTES + sides.offset) // PAGE_BYTES
        warm_pages = np.delete(pages, slice(None, None, _ONE_COLD_IN))
        # A row may end in the page behind the one it begins in.
        sides.file.read_pages(np.unique(np.concatenate([warm_pages, warm_pages + 1])).tolist())
        return ids

    def take(number: int) -> Mapping[str, float]:
        ids = half_warm(number, 0)
        with sides.rows() as rows:
            rows.take(range(2), out=out[:2])
            seconds = timed(lambda: rows.take(ids, out=out))
        sides.verify(out, ids)
        return {TAKE: seconds}

    def fadvise(number: int) -> Mapping[str, float]:
        ids = half_warm(number, 1)
        table = sides.table(mmap.MADV_RANDOM)

        def advise_and_take() -> None:
            for offset in (ids * ROW_BYTES + sides.offset).tolist():
                os.posix_fadvise(fd, offset, ROW_BYTES, os.POSIX_FADV_WILLNEED)
            np.take(table, ids, axis=0, out=out, mode="clip")

        return {FADVISE: timed(advise_and_take)}

    def memmap_random(number: int) -> Mapping[str, float]:
        ids = half_warm(number, 2)
        table = sides.table(mmap.MADV_RANDOM)
        return {MEMMAP_RANDOM: timed(lambda: table[ids])}

    contenders: list[Contender] = [take, fadvise, memmap_random]
    timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=1)
    report.rows.append(times_the_time(f"of {FADVISE}", timings[TAKE], timings[FADVISE]))
    report.rows.append(
        times_faster("than np.memmap[ids] with MADV_RANDOM", timings[TAKE], timings[MEMMAP_RANDOM])
    )
    return report


def in_containers(bench: Bench) -> Report:
    """Take rows out of HDF5 and Zarr, where these are installed; in the page cache."""
    sides = _Sides(bench)
    report = Report("take", f"random rows of {ROW_BYTES} bytes out of other containers")
    bench.warm_file(report)
    for container in containers.ALL:
        reason = container.unavailable()
        if reason:
            report.missing.append(reason)
            continue
        count = min(sides.count, container.most_rows)
        with container(sides.file.path, sides.offset, ROW_BYTES) as other, sides.rows() as rows:
            timings = paired(_in_order(rows, other, count), rounds=bench.rounds, operations=count)
        report.rows.append(times_faster(f"than {other.name}", timings[TAKE], timings[other.name]))
    return report


def _in_order(rows: fremap.Rows, other: containers.Container, count: int) -> list[Contender]:
    """Return both sides, over rows in order and without repeats, as h5py wants them."""
    generator = np.random.default_rng(2002)

    def draw() -> Ids:
        return np.sort(generator.choice(other.row_count, count, replace=False))

    def take(_number: int) -> Mapping[str, float]:
        ids = draw()
        return {TAKE: timed(lambda: rows.take(ids))}

    def theirs(_number: int) -> Mapping[str, float]:
        ids = draw()
        return {other.name: timed(lambda: other.take(ids))}

    return [take, theirs]


def event_loop(bench: Bench) -> Report:
    """Take cold rows beside an event loop, and see how late the loop is."""
    sides = _Sides(bench)
    ids_of = _ColdIds(sides, 1, _LAG_TAKES)
    report = Report(
        "take", f"{_LAG_TAKES} takes of {ids_of.count} cold rows at once, beside an event loop"
    )

    parts = [ids_of.part(0, side) for side in range(_LAG_TAKES)]

    shares = []

    async def longest_wait(rows: fremap.Rows) -> tuple[float, float]:
        late: list[float] = []

        async def tick() -> None:
            while True:
                begin = time.perf_counter()
                await asyncio.sleep(0.001)
                late.append(time.perf_counter() - begin - 0.001)

        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.3)
        idle = max(late)
        late.clear()
        waited = _processor_wait()
        await asyncio.gather(*map(rows.take_async, parts))
        shares.append((_processor_wait() - waited) / sum(late))
        ticking.cancel()
        return idle, max(late)

    idles, busies = [], []
    for _ in range(bench.rounds):
        ids_of.drop(parts[0])
        with sides.rows() as rows:
            idle, busy = asyncio.run(longest_wait(rows))
        idles.append(idle * 1e3)
        busies.append(busy * 1e3)
    report.count("longest delay of the loop, median", float(np.median(busies)), "ms", at_most=5)
    report.count("longest delay of the loop, of all rounds", max(busies), "ms")
    report.count("the same while nothing is taken", float(np.median(idles)), "ms")
    report.notes.append(
        f"{min(float(np.median(shares)), 1):.0%} of all delays was waiting for a processor that "
        "somebody else had"
    )
    return report


def _processor_wait() -> float:
    """Return the seconds that this process's first thread could have run and did not."""
    process = os.getpid()
    fields = Path(f"/proc/self/task/{process}/schedstat").read_text(encoding="ascii").split()
    return int(fields[1]) / 1e9
