"""Rows of a table in many files: few and many of a take, cold and warm, short and long.

The bars of a cold take are a loop in C that does nothing else (``benches/c/take_rows.c``) on
the same device, in turn with it.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

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

_Take = Callable[[Ids, Bytes], object]


def _side(name: str, take: _Take, fresh: FreshRows, count: int, takes: int, out: Bytes) -> Contender:
    """Time `takes` takes of `count` rows that nobody has read."""

    def run(_number: int) -> Mapping[str, float]:
        ids = [fresh.draw(count) for _ in range(takes)]
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
    most = max(*_COUNTS, _LONG_ROUND_BYTES // row_bytes) if row_bytes < PAGE_BYTES else (
        _LONG_ROUND_BYTES // row_bytes
    )  # fmt: skip
    return {
        way: running.enter_context(
            Loop("take_rows", table.list_file(), most, table.loop_mode(way, row_bytes))
        )
        for way in ways
    }


def cold(bench: Bench) -> Report:
    """Take few and many rows, none of which is in the page cache."""
    table = bench.table
    report = Report("shards", f"random rows out of {len(table.paths)} files, not in the page cache")
    for row_bytes in _ROW_BYTES:
        table.drop()
        fresh = FreshRows(table, row_bytes)
        with (
            ExitStack() as running,
            table.rows(row_bytes) as rows,
            table.rows(row_bytes, direct=True) as direct,
        ):
            loop = _started(report, running, table, row_bytes, ["direct", "advised"])
            for count in _COUNTS:
                takes = -(-_LEAST_ROWS // count)
                sides = 2 + len(loop)
                if fresh.left < (bench.rounds + 1) * sides * takes * count:
                    report.missing.append(
                        f"takes of {count} rows of {row_bytes} bytes: no fresh pages; --file-size"
                    )
                    continue
                out = np.ones((count, row_bytes), np.uint8)
                contenders = [
                    _side(TAKE, lambda ids, out: rows.take(ids, out=out), fresh, count, takes, out),
                    _side(
                        DIRECT, lambda ids, out: direct.take(ids, out=out), fresh, count, takes, out
                    ),
                ]
                names = {"direct": LOOP_DIRECT, "advised": LOOP_ADVISED}
                contenders += [
                    _loop_side(names[way], each, fresh, count, takes) for way, each in loop.items()
                ]
                timings = paired(
                    contenders, rounds=bench.rounds, operations=takes * count, warm_ups=1
                )
                what = f"{count} rows of {row_bytes} bytes"
                if loop:
                    report.rows += [
                        times_the_time(
                            f"{what}, direct: of {LOOP_DIRECT}",
                            timings[DIRECT], timings[LOOP_DIRECT], at_most=1.1,
                        ),
                        times_the_time(
                            f"{what}: of {LOOP_ADVISED}",
                            timings[TAKE], timings[LOOP_ADVISED], at_most=1.1,
                        ),
                    ]  # fmt: skip
    return report


def one_cold(bench: Bench) -> Report:
    """Take a single row, beside ``os.preadv``."""
    table, row_bytes = bench.table, _ROW_BYTES[0]
    report = Report("shards", "one row that is not in the page cache")
    table.drop()
    fresh, shard_rows = FreshRows(table, row_bytes), table.shard_rows(row_bytes)
    takes = min(_LEAST_ROWS, fresh.left // (3 * (bench.rounds + 1)))
    out = np.ones((1, row_bytes), np.uint8)
    for fd in table.fds:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def preadv(ids: Ids, out: Bytes) -> None:
        shard, row = divmod(int(ids[0]), shard_rows)
        os.preadv(table.fds[shard], [out], table.offset + row * row_bytes)

    with table.rows(row_bytes) as rows, table.rows(row_bytes, direct=True) as direct:
        contenders = [
            _side(TAKE, lambda ids, out: rows.take(ids, out=out), fresh, 1, takes, out),
            _side(DIRECT, lambda ids, out: direct.take(ids, out=out), fresh, 1, takes, out),
            _side("os.preadv", preadv, fresh, 1, takes, out),
        ]
        timings = paired(contenders, rounds=bench.rounds, operations=takes, warm_ups=1)
    for fd in table.fds:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
    for name in (TAKE, DIRECT):
        report.rows.append(
            times_the_time(
                f"{name}: of os.preadv", timings[name], timings["os.preadv"], at_most=1.1
            )
        )
    return report


def warm(bench: Bench) -> Report:
    """Take few rows that are in the page cache, beside as many out of a single map."""
    table, row_bytes = bench.table, _ROW_BYTES[0]
    report = Report("shards", f"random rows out of {len(table.paths)} files, in the page cache")
    table.warm()
    shape = (table.shard_rows(row_bytes), row_bytes)
    one = np.memmap(table.paths[0], np.uint8, "r", table.offset, shape)
    int(one[:, 0].sum())
    draw = np.random.default_rng(2002)
    with table.rows(row_bytes) as rows:
        for _ in range(40):  # all is mapped then
            rows.take(draw.integers(0, len(rows), 8 * len(table.paths) + 4096))
        for count in _WARM_COUNTS:
            out = np.ones((count, row_bytes), np.uint8)

            def ours(_number: int, count: int = count, out: Bytes = out) -> Mapping[str, float]:
                ids = draw.integers(0, len(rows), (_WARM_REPEATS, count))
                return {TAKE: timed(lambda: [rows.take(mine, out=out) for mine in ids])}

            def theirs(_number: int, count: int = count, out: Bytes = out) -> Mapping[str, float]:
                ids = draw.integers(0, len(one), (_WARM_REPEATS, count))
                take = np.take
                return {
                    "np.take": timed(
                        lambda: [take(one, mine, axis=0, out=out, mode="clip") for mine in ids]
                    )
                }

            timings = paired([ours, theirs], rounds=bench.rounds, operations=_WARM_REPEATS * count)
            report.rows.append(
                times_the_time(
                    f"{count} rows: of np.take out of one map",
                    timings[TAKE], timings["np.take"], at_most=1.5,
                )
            )  # fmt: skip
    return report


def long_warm(bench: Bench) -> Report:
    """Take long rows and ranges that are in the page cache."""
    table = bench.table
    report = Report("shards", "long rows and ranges, in the page cache")
    table.warm()
    draw = np.random.default_rng(2002)
    for row_bytes in _LONG_BYTES:
        count = _LONG_ROUND_BYTES // row_bytes
        shape = (table.shard_rows(row_bytes), row_bytes)
        maps = [np.memmap(path, np.uint8, "r", table.offset, shape) for path in table.paths]
        for each in maps:
            int(each.reshape(-1)[::PAGE_BYTES].sum())
        out = np.ones((count, row_bytes), np.uint8)
        with table.rows(row_bytes) as rows:
            first = min(count, len(maps[0]))
            for _ in range(3):
                rows.take(range(len(rows) if len(rows) * row_bytes < 1 << 28 else count))
                rows.take(draw.integers(0, len(rows), count), out=out)

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
                return {"copyto range": timed(lambda: np.copyto(out[:first], maps[0][:first]))}

            timings = paired(
                [take, copy, take_range, copy_range], rounds=bench.rounds, operations=count
            )
        bar = 1 / 0.95
        size = f"{row_bytes >> 10} KiB"
        report.rows += [
            times_the_time(
                f"rows of {size}: of np.copyto out of maps",
                timings[TAKE], timings["np.copyto"], at_most=bar,
            ),
            times_the_time(
                f"a range of rows of {size}: of np.copyto out of a map",
                timings["range"], timings["copyto range"], at_most=bar,
            ),
        ]  # fmt: skip
        del maps
    return report


def long_cold(bench: Bench) -> Report:
    """Take long rows that are not in the page cache, beside threads of direct reads."""
    table = bench.table
    report = Report("shards", "long rows, not in the page cache")
    draw = np.random.default_rng(2002)
    for row_bytes in _LONG_BYTES:
        count = _LONG_ROUND_BYTES // row_bytes
        out = np.ones((count, row_bytes), np.uint8)
        with (
            ExitStack() as running,
            table.rows(row_bytes) as rows,
            table.rows(row_bytes, direct=True) as direct,
        ):
            loop = _started(report, running, table, row_bytes, ["threads"])
            if not loop:
                return report

            def fresh(rows: fremap.Rows = rows, count: int = count) -> Ids:
                table.drop()
                return draw.choice(len(rows), count, replace=False)

            def side(name: str, take: _Take, out: Bytes = out) -> Contender:
                def run(_number: int) -> Mapping[str, float]:
                    ids = fresh()
                    return {name: timed(lambda: take(ids, out))}

                return run

            def threads(_number: int, loop: Loop = loop["threads"]) -> Mapping[str, float]:
                return {LOOP_THREADS: loop.run(fresh())[0]}

            contenders = [
                side(TAKE, lambda ids, out, rows=rows: rows.take(ids, out=out)),
                side(DIRECT, lambda ids, out, direct=direct: direct.take(ids, out=out)),
                threads,
            ]
            timings = paired(contenders, rounds=bench.rounds, operations=count, warm_ups=1)
        for name in (TAKE, DIRECT):
            report.rows.append(
                times_the_time(
                    f"rows of {row_bytes >> 10} KiB, {name}: of {LOOP_THREADS}",
                    timings[name], timings[LOOP_THREADS], at_most=1 / 0.95,
                )
            )  # fmt: skip
    return report


def threads(bench: Bench) -> Report:
    """Take few rows in each of many threads, beside the device's rate at a depth as large."""
    table, row_bytes, count = bench.table, _ROW_BYTES[0], 18
    report = Report("shards", f"{_THREADS} threads, {count} rows a take, not in the page cache")
    table.drop()
    fresh = FreshRows(table, row_bytes)
    takes = min(40, fresh.left // (2 * (bench.rounds + 1) * _THREADS * count))
    with ExitStack() as running, table.rows(row_bytes, direct=True) as direct:
        loop = _started(report, running, table, row_bytes, ["direct"])
        if not loop:
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
            return {DIRECT: timed(lambda: [worker.join() for worker in workers])}

        def theirs(_number: int) -> Mapping[str, float]:
            return {LOOP_DIRECT: loop["direct"].run(fresh.draw(takes * _THREADS * count))[0]}

        timings = paired(
            [ours, theirs], rounds=bench.rounds, operations=takes * _THREADS * count, warm_ups=1
        )
    report.rows.append(
        times_the_time(f"of {LOOP_DIRECT}", timings[DIRECT], timings[LOOP_DIRECT], at_most=1 / 0.9)
    )
    return report


def opening(bench: Bench) -> Report:
    """Open a table in many small files."""
    report = Report("shards", f"open {_FILES} files in the page cache")
    table = ShardedTable.small(bench.directory, _FILES)
    with table:

        def ours(_number: int) -> Mapping[str, float]:
            return {"fremap.rows": timed(lambda: table.rows(160).close())}

        def theirs(_number: int) -> Mapping[str, float]:
            def look() -> None:
                for path in table.paths:
                    fd = os.open(path, os.O_RDONLY)
                    os.fstat(fd)
                    os.pread(fd, 8, 0)
                    os.close(fd)

            return {"open, fstat, pread": timed(look)}

        timings = paired([ours, theirs], rounds=bench.rounds, operations=1)
    report.rows.append(
        times_the_time(
            "of open, fstat and pread of each", timings["fremap.rows"],
            timings["open, fstat, pread"],
        )
    )  # fmt: skip
    report.count(
        "milliseconds", timings["fremap.rows"].microseconds / 1000, "ms", at_most=100
    )
    return report
