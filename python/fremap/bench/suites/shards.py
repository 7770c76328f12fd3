"""Rows of a table in many files: few and many of a take, cold and warm, short and long.

The bars of a cold take are a loop in C that does nothing else (``benches/c/take_rows.c``) on
the same device, in turn with it.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeAlias

import numpy as np

import fremap
from fremap.bench import loops
from fremap.bench.bench import Bench
from fremap.bench.harness import Contender, Report, paired, timed, times_the_time
from fremap.bench.loops import Loop
from fremap.bench.sharded import PAGE_BYTES, Bytes, FreshRows, Ids, ShardedTable

TAKE = "fremap take"
DIRECT = "fremap take, direct"
LOOP_DIRECT = "C: io_uring, O_DIRECT"
LOOP_ADVISED = "C: posix_fadvise a row, then pread"
LOOP_THREADS = "C: 8 threads of O_DIRECT preadv"
PREADV = "os.preadv"
NUMPY_TAKE = "np.take out of one map"
ROWS = "fremap.rows"
LOOK = "open, fstat and pread of each"

_ROW_BYTES = (160, 256)
_COUNTS = (18, 1024, 4096, 65_536)
_WARM_COUNTS = (1, 4, 18)
# Rows of a round at least: small takes are made many times.
_LEAST_ROWS = 360
_LONG_BYTES = (64 << 10, 1 << 20, 5 << 20)
# What long rows of one round come to.
_LONG_ROUND_BYTES = 40 << 20
_THREADS = 16
_FILES = 10_000
_WARM_REPEATS = 300
# Of a copy's or a device's rate, as times.
_OF_A_COPY = 1 / 0.95

_Take: TypeAlias = Callable[[Ids, Bytes], object]


def _take(rows: fremap.Rows, ids: Ids, out: Bytes) -> None:
    rows.take(ids, out=out)


def _side(name: str, take: _Take, fresh: FreshRows, takes: int, out: Bytes) -> Contender:
    """Time `takes` takes, each of as many rows as `out` has, which nobody has read."""

    def run(_number: int) -> Mapping[str, float]:
        ids = [fresh.draw(len(out)) for _ in range(takes)]
        return {name: timed(lambda: [take(mine, out) for mine in ids])}

    return run


def _loop_side(name: str, loop: Loop, fresh: FreshRows, count: int, takes: int) -> Contender:
    def run(_number: int) -> Mapping[str, float]:
        return {name: sum(loop.run(fresh.draw(count))[0] for _ in range(takes))}

    return run


def _started(
    report: Report, running: ExitStack, table: ShardedTable, row_bytes: int, ways: Sequence[str]
) -> dict[str, Loop]:
    """Start the C loop in each of these ways; where there can be none, the report says why."""
    reason = loops.unavailable()
    if reason:
        report.missing.append(reason)
        return {}
    most = _LONG_ROUND_BYTES // row_bytes
    return {
        way: running.enter_context(
            Loop("take_rows", table.list_file(), most, table.loop_mode(way, row_bytes))
        )
        for way in ways
    }


def cold(bench: Bench) -> Report:
    """Take few and many rows, none of which is in the page cache."""
    report = Report(
        "shards", f"random rows out of {len(bench.table.paths)} files, not in the page cache"
    )
    for row_bytes in _ROW_BYTES:
        _cold_rows(bench, report, row_bytes)
    return report


def _cold_rows(bench: Bench, report: Report, row_bytes: int) -> None:
    table = bench.table
    table.drop()
    fresh = FreshRows(table, row_bytes)
    names = {"direct": LOOP_DIRECT, "advised": LOOP_ADVISED}
    with (
        ExitStack() as running,
        table.rows(row_bytes) as rows,
        table.rows(row_bytes, direct=True) as direct,
    ):
        running_loops = _started(report, running, table, row_bytes, list(names))
        for count in _COUNTS:
            takes = -(-_LEAST_ROWS // count)
            sides = 2 + len(running_loops)
            what = f"{count} rows of {row_bytes} bytes"
            if fresh.left < (bench.rounds + 1) * sides * takes * count:
                report.missing.append(f"{what}: too few pages; pass a larger --file-size")
                continue
            out = np.ones((count, row_bytes), np.uint8)
            contenders = [
                _side(TAKE, partial(_take, rows), fresh, takes, out),
                _side(DIRECT, partial(_take, direct), fresh, takes, out),
            ]
            contenders += [
                _loop_side(names[way], loop, fresh, count, takes)
                for way, loop in running_loops.items()
            ]
            timings = paired(contenders, rounds=bench.rounds, operations=takes * count, warm_ups=1)
            for ours, theirs in ((DIRECT, LOOP_DIRECT), (TAKE, LOOP_ADVISED)):
                if theirs in timings:
                    what_of = f"{what}, {ours}: of {theirs}"
                    report.rows.append(
                        times_the_time(what_of, timings[ours], timings[theirs], at_most=1.1)
                    )


def one_cold(bench: Bench) -> Report:
    """Take a single row, beside ``os.preadv``."""
    table, row_bytes = bench.table, _ROW_BYTES[0]
    report = Report("shards", "one row that is not in the page cache")
    table.drop()
    fresh, shard_rows = FreshRows(table, row_bytes), table.shard_rows(row_bytes)
    takes = max(min(_LEAST_ROWS, fresh.left // (3 * (bench.rounds + 1))), 1)
    out = np.ones((1, row_bytes), np.uint8)

    def preadv(ids: Ids, out: Bytes) -> None:
        shard, row = divmod(int(ids[0]), shard_rows)
        os.preadv(table.fds[shard], [out], table.offset + row * row_bytes)

    with table.rows(row_bytes) as rows, table.rows(row_bytes, direct=True) as direct:
        contenders = [
            _side(TAKE, partial(_take, rows), fresh, takes, out),
            _side(DIRECT, partial(_take, direct), fresh, takes, out),
            _side(PREADV, preadv, fresh, takes, out),
        ]
        timings = paired(contenders, rounds=bench.rounds, operations=takes, warm_ups=1)
    for name in (TAKE, DIRECT):
        report.rows.append(
            times_the_time(f"{name}: of {PREADV}", timings[name], timings[PREADV], at_most=1.1)
        )
    return report


def warm(bench: Bench) -> Report:
    """Take few rows that are in the page cache, beside as many out of a single map."""
    table, row_bytes = bench.table, _ROW_BYTES[0]
    report = Report("shards", f"random rows out of {len(table.paths)} files, in the page cache")
    table.warm()
    one = table.map(0, row_bytes)
    int(one[:, 0].sum())
    draw = np.random.default_rng(2002)
    with table.rows(row_bytes) as rows:
        for _ in range(40):  # all is mapped then
            rows.take(draw.integers(0, len(rows), 8 * len(table.paths) + 4096))
        for count in _WARM_COUNTS:
            out = np.ones((count, row_bytes), np.uint8)
            from_one = partial(np.take, one, axis=0, out=out, mode="clip")
            contenders = [
                _repeated(TAKE, partial(rows.take, out=out), draw, len(rows), count),
                _repeated(NUMPY_TAKE, from_one, draw, len(one), count),
            ]
            timings = paired(contenders, rounds=bench.rounds, operations=_WARM_REPEATS * count)
            what = f"{count} rows: of {NUMPY_TAKE}"
            report.rows.append(
                times_the_time(what, timings[TAKE], timings[NUMPY_TAKE], at_most=1.5)
            )
    return report


def _repeated(
    name: str, take: Callable[[Ids], object], draw: np.random.Generator, limit: int, count: int
) -> Contender:
    def run(_number: int) -> Mapping[str, float]:
        ids = draw.integers(0, limit, (_WARM_REPEATS, count))
        return {name: timed(lambda: [take(mine) for mine in ids])}

    return run


def long_warm(bench: Bench) -> Report:
    """Take long rows and ranges that are in the page cache."""
    report = Report("shards", "long rows and ranges, in the page cache")
    bench.table.warm()
    for row_bytes in _LONG_BYTES:
        _long_warm_rows(bench, report, row_bytes)
    return report


def _long_warm_rows(bench: Bench, report: Report, row_bytes: int) -> None:
    table = bench.table
    draw = np.random.default_rng(2002)
    count = _LONG_ROUND_BYTES // row_bytes
    maps = [table.map(shard, row_bytes) for shard in range(len(table.paths))]
    for each in maps:
        int(each.reshape(-1)[::PAGE_BYTES].sum())
    out = np.ones((count, row_bytes), np.uint8)
    first = min(count, len(maps[0]))
    with table.rows(row_bytes) as rows:
        for _ in range(3):  # all is mapped then
            for start in range(0, len(rows), count):
                rows.take(range(start, min(start + count, len(rows))))

        def take(_number: int) -> Mapping[str, float]:
            ids = draw.integers(0, len(rows), count)
            return {TAKE: timed(lambda: rows.take(ids, out=out))}

        def copy(_number: int) -> Mapping[str, float]:
            shard, row = np.divmod(draw.integers(0, len(rows), count), len(maps[0]))
            begin = time.perf_counter()
            for place, mine, at in zip(out, shard.tolist(), row.tolist(), strict=True):
                np.copyto(place, maps[mine][at])
            return {"np.copyto": time.perf_counter() - begin}

        def take_range(_number: int) -> Mapping[str, float]:
            return {"range": timed(lambda: rows.take(range(first), out=out[:first]))}

        def copy_range(_number: int) -> Mapping[str, float]:
            return {"np.copyto, a range": timed(lambda: np.copyto(out[:first], maps[0][:first]))}

        contenders = [take, copy, take_range, copy_range]
        timings = paired(contenders, rounds=bench.rounds, operations=count)
    size = f"{row_bytes >> 10} KiB"
    report.rows += [
        times_the_time(
            f"rows of {size}: of np.copyto out of maps",
            timings[TAKE], timings["np.copyto"], at_most=_OF_A_COPY,
        ),
        times_the_time(
            f"a range of rows of {size}: of np.copyto out of a map",
            timings["range"], timings["np.copyto, a range"], at_most=_OF_A_COPY,
        ),
    ]  # fmt: skip


def long_cold(bench: Bench) -> Report:
    """Take long rows that are not in the page cache, beside threads of direct reads."""
    report = Report("shards", "long rows, not in the page cache")
    for row_bytes in _LONG_BYTES:
        _long_cold_rows(bench, report, row_bytes)
    return report


def _long_cold_rows(bench: Bench, report: Report, row_bytes: int) -> None:
    table = bench.table
    draw = np.random.default_rng(2002)
    count = _LONG_ROUND_BYTES // row_bytes
    out = np.ones((count, row_bytes), np.uint8)
    with (
        ExitStack() as running,
        table.rows(row_bytes) as rows,
        table.rows(row_bytes, direct=True) as direct,
    ):
        running_loops = _started(report, running, table, row_bytes, ["threads"])
        if not running_loops:
            return

        def fresh() -> Ids:
            table.drop()
            return draw.choice(len(rows), count, replace=False)

        def side(name: str, rows: fremap.Rows) -> Contender:
            def run(_number: int) -> Mapping[str, float]:
                ids = fresh()
                return {name: timed(lambda: rows.take(ids, out=out))}

            return run

        def in_threads(_number: int) -> Mapping[str, float]:
            return {LOOP_THREADS: running_loops["threads"].run(fresh())[0]}

        contenders = [side(TAKE, rows), side(DIRECT, direct), in_threads]
        timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=1)
    for name in (TAKE, DIRECT):
        what = f"rows of {row_bytes >> 10} KiB, {name}: of {LOOP_THREADS}"
        report.rows.append(
            times_the_time(what, timings[name], timings[LOOP_THREADS], at_most=_OF_A_COPY)
        )


def threads(bench: Bench) -> Report:
    """Take few rows in each of many threads, beside the device's rate at a depth as large."""
    table, row_bytes, count = bench.table, _ROW_BYTES[0], 18
    report = Report("shards", f"{_THREADS} threads, {count} rows a take, not in the page cache")
    table.drop()
    fresh = FreshRows(table, row_bytes)
    takes = min(40, fresh.left // (2 * (bench.rounds + 1) * _THREADS * count))
    if takes == 0:
        report.missing.append("too few pages for 16 threads; pass a larger --file-size")
        return report
    with ExitStack() as running, table.rows(row_bytes, direct=True) as direct:
        running_loops = _started(report, running, table, row_bytes, ["direct"])
        if not running_loops:
            return report

        def ours(_number: int) -> Mapping[str, float]:
            ids = [[fresh.draw(count) for _ in range(takes)] for _ in range(_THREADS)]
            begun = threading.Barrier(_THREADS + 1)

            def work(mine: list[Ids]) -> None:
                out = np.ones((count, row_bytes), np.uint8)
                begun.wait()
                for each in mine:
                    direct.take(each, out=out)

            workers = [threading.Thread(target=work, args=(mine,)) for mine in ids]
            for worker in workers:
                worker.start()
            begun.wait()
            begin = time.perf_counter()
            for worker in workers:
                worker.join()
            return {DIRECT: time.perf_counter() - begin}

        def theirs(_number: int) -> Mapping[str, float]:
            ids = fresh.draw(takes * _THREADS * count)
            return {LOOP_DIRECT: running_loops["direct"].run(ids)[0]}

        operations = takes * _THREADS * count
        timings = paired([ours, theirs], rounds=bench.rounds, operations=operations, warm_ups=1)
    report.rows.append(
        times_the_time(f"of {LOOP_DIRECT}", timings[DIRECT], timings[LOOP_DIRECT], at_most=1 / 0.9)
    )
    return report


def opening(bench: Bench) -> Report:
    """Open a table in many small files."""
    report = Report("shards", f"open {_FILES} files in the page cache")
    with ShardedTable.small(bench.directory, _FILES) as table:

        def look() -> None:
            for path in table.paths:
                fd = os.open(path, os.O_RDONLY)
                os.fstat(fd)
                os.pread(fd, 8, 0)
                os.close(fd)

        def ours(_number: int) -> Mapping[str, float]:
            return {ROWS: timed(lambda: table.rows(_ROW_BYTES[0]).close())}

        def theirs(_number: int) -> Mapping[str, float]:
            return {LOOK: timed(look)}

        timings = paired([ours, theirs], rounds=bench.rounds, operations=1)
    report.rows.append(times_the_time(f"of {LOOK}", timings[ROWS], timings[LOOK]))
    report.count("milliseconds", timings[ROWS].microseconds / 1000, "ms", at_most=100)
    return report
