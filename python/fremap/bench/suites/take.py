"""Taking scattered rows of 160 bytes: warm, partly cold, cold, and out of other containers."""

import mmap
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

import fremap
from fremap.bench import competitors, containers
from fremap.bench.bench import Bench
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
from fremap.bench.small_rows import ROW_BYTES, Bytes, ColdRows, Ids, SmallRows

TAKE = "fremap take"
TAKE_OUT = "fremap take, out="
MEMMAP = "np.memmap[ids]"
MEMMAP_RANDOM = "np.memmap[ids], MADV_RANDOM"
NUMPY_TAKE = "np.take(np.memmap, out=)"
FADVISE = "posix_fadvise a row, then np.take"
FADVISE_READ = "posix_fadvise a row, then pread"
POOL = f"preads, {competitors.POOL_THREADS} threads"

_THAN_RANDOM = "than np.memmap[ids] with MADV_RANDOM"

# Sides that read pages of their own in a cold round; `MEMMAP` comes after.
_COLD_SIDES = 5
# One row in so many is cold in the mixed rounds.
_ONE_COLD_IN = 10
# Rounds after which all that rows come from is mapped.
_WARM_UPS = 8

# The rows of a round and a side, in the state that they are to be in.
IdsOf: TypeAlias = Callable[[int, int], Ids]


def warm(bench: Bench) -> Report:
    """Take rows of a file that is in the page cache."""
    sides = SmallRows(bench)
    count, out = sides.count, sides.out
    report = Report("take", f"take {count} random rows of {ROW_BYTES} bytes, in the page cache")
    bench.warm_file(report)
    table, table_random = sides.table(), sides.table(mmap.MADV_RANDOM)
    generator = np.random.default_rng(2002)

    def draw(_number: int, _side: int) -> Ids:
        return generator.integers(0, sides.row_count, count)

    with sides.rows() as rows:

        def take_out(number: int) -> Mapping[str, float]:
            ids = draw(number, 0)
            seconds = timed(lambda: rows.take(ids, out=out))
            if number == 0:  # not later: what it allocates would be in the next one's way
                sides.verify(out, ids)
            return {TAKE_OUT: seconds}

        contenders = [
            _side(TAKE, rows.take, draw),
            _side(MEMMAP, lambda ids: table[ids], draw),
            take_out,
            _side(NUMPY_TAKE, lambda ids: np.take(table, ids, axis=0, out=out, mode="clip"), draw),
            _side(MEMMAP_RANDOM, lambda ids: table_random[ids], draw),
            _side(FADVISE, lambda ids: sides.advise_and_take(table_random, ids, out), draw),
            *_of_reads(sides, out, draw),
        ]
        begin = time.perf_counter()
        _map_all(rows, lambda: rows.take(draw(0, 0)))
        report.notes.append(
            f"{rows.stats().mapped_bytes >> 20} MiB were mapped by takes of "
            f"{time.perf_counter() - begin:.2f} s before the first round"
        )
        for each in (table, table_random):  # np.memmap's pages are mapped too
            int(each[:: PAGE_BYTES // ROW_BYTES, 0].sum())
        timings = paired(contenders, rounds=bench.rounds, operations=count)
        report.rows += [
            times_the_time(f"of {MEMMAP}", timings[TAKE], timings[MEMMAP], at_most=0.5),
            times_the_time("out=: of np.take with out=", timings[TAKE_OUT], timings[NUMPY_TAKE]),
            times_faster(_THAN_RANDOM, timings[TAKE], timings[MEMMAP_RANDOM]),
        ]
        report.rows += [
            times_faster(f"out=: than {name}", timings[TAKE_OUT], timings[name])
            for name in (FADVISE, FADVISE_READ, POOL)
        ]
        ids = draw(0, 0)
        with counting() as counts:
            rows.take(ids, out=out)
        report.count("system calls of a take, a row", counts.system_call_count / count, "calls")
    return report


def cold(bench: Bench) -> Report:
    """Take rows that are not in the page cache, each page read once in the whole run."""
    sides = SmallRows(bench)
    ids_of = ColdRows(sides, bench.rounds, _COLD_SIDES)
    count, out = ids_of.count, sides.out[: ids_of.count]
    report = Report("take", f"take {count} random rows of {ROW_BYTES} bytes, not in the page cache")
    contenders = [*_of_maps(sides, out, ids_of.dropped), *_of_reads(sides, out, ids_of.dropped)]
    timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=1)
    for name in (FADVISE, FADVISE_READ, POOL):
        report.rows.append(times_the_time(f"of {name}", timings[TAKE], timings[name], at_most=1))
    report.rows.append(times_faster(_THAN_RANDOM, timings[TAKE], timings[MEMMAP_RANDOM]))

    def memmap(number: int) -> Mapping[str, float]:
        table = sides.table()
        ids = ids_of.dropped(number, 2)
        return {MEMMAP: timed(lambda: table[ids])}

    # Reads the neighbourhood of each row, and so what others still have to find cold: last.
    late = paired([memmap], rounds=bench.rounds, operations=count, warm_ups=0)
    report.rows.append(times_faster(f"than {MEMMAP}", timings[TAKE], late[MEMMAP]))
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
    sides = SmallRows(bench)
    ids_of = ColdRows(sides, bench.rounds, 3)
    count, out = ids_of.count, sides.out[: ids_of.count]
    report = Report(
        "take", f"take {count} random rows of {ROW_BYTES} bytes, one in {_ONE_COLD_IN} cold"
    )

    def half_warm(number: int, side: int) -> Ids:
        ids = ids_of.dropped(number, side)
        warm_pages = np.delete(sides.pages(ids), slice(None, None, _ONE_COLD_IN))
        # A row may end in the page behind the one it begins in.
        sides.file.read_pages(np.unique(np.concatenate([warm_pages, warm_pages + 1])).tolist())
        return ids

    contenders = _of_maps(sides, out, half_warm)
    timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=1)
    report.rows.append(times_the_time(f"of {FADVISE}", timings[TAKE], timings[FADVISE]))
    report.rows.append(times_faster(_THAN_RANDOM, timings[TAKE], timings[MEMMAP_RANDOM]))
    return report


def _side(name: str, work: Callable[[Ids], object], ids_of: IdsOf, side: int = 0) -> Contender:
    """Time `work` on the rows of each round."""

    def run(number: int) -> Mapping[str, float]:
        ids = ids_of(number, side)
        return {name: timed(lambda: work(ids))}

    return run


def _map_all(rows: fremap.Rows, take: Callable[[], object]) -> None:
    """Take until no more of the file is mapped by that."""
    mapped = -1
    while rows.stats().mapped_bytes > mapped:
        mapped = rows.stats().mapped_bytes
        for _ in range(_WARM_UPS):
            take()


def _of_maps(sides: SmallRows, out: Bytes, ids_of: IdsOf) -> list[Contender]:
    """Return sides 0 to 2: fremap and two that take from a map of their own, each round anew."""

    def take(number: int) -> Mapping[str, float]:
        with sides.rows() as rows:
            rows.take(range(2), out=out[:2])  # what is set up once is
            ids = ids_of(number, 0)
            seconds = timed(lambda: rows.take(ids, out=out))
        sides.verify(out, ids)
        return {TAKE: seconds}

    def fadvise(number: int) -> Mapping[str, float]:
        table = sides.table(mmap.MADV_RANDOM)
        ids = ids_of(number, 1)
        return {FADVISE: timed(lambda: sides.advise_and_take(table, ids, out))}

    def memmap_random(number: int) -> Mapping[str, float]:
        table = sides.table(mmap.MADV_RANDOM)
        ids = ids_of(number, 2)
        return {MEMMAP_RANDOM: timed(lambda: table[ids])}

    return [take, fadvise, memmap_random]


def _of_reads(sides: SmallRows, out: Bytes, ids_of: IdsOf) -> list[Contender]:
    """Return sides 3 and 4, which read each row by a call of its own."""

    def fadvise_read(number: int) -> Mapping[str, float]:
        outcome = competitors.fadvise_then_read(
            sides.file.fd, ids_of(number, 3), out, page_bytes=ROW_BYTES, first_byte=sides.offset
        )
        return {FADVISE_READ: outcome.seconds}

    def pool(number: int) -> Mapping[str, float]:
        outcome = competitors.pread_pool(
            sides.file.fd, ids_of(number, 4), out, page_bytes=ROW_BYTES, first_byte=sides.offset
        )
        return {POOL: outcome.seconds}

    return [fadvise_read, pool]


def in_containers(bench: Bench) -> Report:
    """Take rows out of HDF5 and Zarr, where these are installed: warm, then cold."""
    sides = SmallRows(bench)
    report = Report(
        "take",
        f"random rows of {ROW_BYTES} bytes out of other containers, in the page cache and not",
    )
    for container in containers.installed(report):
        with container(sides.file.path, sides.offset, ROW_BYTES) as other:
            bench.warm_file(report)
            for state, measure in (("warm", _container_warm), ("cold", _container_cold)):
                ours, theirs = measure(bench, sides, other)
                report.rows.append(times_faster(f"{state}: than {other.name}", ours, theirs))
    return report


def _container_warm(
    bench: Bench, sides: SmallRows, other: containers.Container
) -> tuple[Timing, Timing]:
    """Take rows in rising order and without repeats, as h5py wants them."""
    count = min(sides.count, other.most_rows)
    generator = np.random.default_rng(2002)

    def anywhere() -> Ids:
        return generator.integers(0, sides.row_count, sides.count)

    def draw(_number: int, _side: int) -> Ids:
        return np.sort(generator.choice(other.row_count, count, replace=False))

    with sides.rows() as rows:
        ids = draw(0, 0)
        if not np.array_equal(other.take(ids), rows.take(ids)):
            raise BenchError(f"{other.name}: the rows are not those that were asked for")
        _map_all(rows, lambda: rows.take(anywhere()))
        contenders = [_side(TAKE, rows.take, draw), _side(other.name, other.take, draw)]
        timings = paired(contenders, rounds=bench.rounds, operations=count)
    return timings[TAKE], timings[other.name]


def _container_cold(
    bench: Bench, sides: SmallRows, other: containers.Container
) -> tuple[Timing, Timing]:
    """Take such rows of pages that neither side has read before."""
    ids_of = ColdRows(sides, bench.rounds, 2, most=other.most_rows, row_count=other.row_count)

    def dropped(number: int, side: int) -> Ids:
        other.drop()
        return np.sort(ids_of.dropped(number, side))

    take = _of_maps(sides, sides.out[: ids_of.count], dropped)[0]
    contenders = [take, _side(other.name, other.take, dropped, 1)]
    timings = paired(contenders, rounds=bench.rounds, operations=ids_of.count, warm_ups=1)
    return timings[TAKE], timings[other.name]
