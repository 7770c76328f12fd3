"""Takes from actors of Ray on this machine, beside takes of the same rows in this process.

What an actor costs is the request: the rows are in the page cache, and no network is between.
"""

import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np

import fremap
from fremap.bench.bench import Bench
from fremap.bench.harness import BenchError, Contender, Report, paired, timed, times_the_time
from fremap.bench.sharded import Bytes, Ids, ShardedTable

LOCAL = "fremap.rows"
_ACTORS = (2, 4)
_ROW_BYTES = 256
_COUNTS = (18, 1024, 65_536)
# Takes of a round: of few rows many, so that a round is no moment.
_ROUND_ROWS = 65_536
_MOST_TAKES = 64
_CLIENTS = 4
_STORE_BYTES = 256 << 20

Take: TypeAlias = Callable[[Ids, Bytes], object]


def takes(bench: Bench) -> Report:
    """Take few and many rows, one take after another."""
    report = Report("ray", f"take rows of {_ROW_BYTES} bytes from actors of Ray on this machine")
    for count, sides in _each_count(bench, report, _COUNTS):
        calls = min(_MOST_TAKES, max(_ROUND_ROWS // count, 4))
        contenders = [_contender(bench, name, take, count, calls) for name, take in sides.items()]
        timings = paired(contenders, rounds=bench.rounds, operations=calls)
        for name in list(sides)[1:]:
            what = f"{count} rows from {name}: of {LOCAL}"
            report.rows.append(times_the_time(what, timings[name], timings[LOCAL]))
    return report


def clients(bench: Bench) -> Report:
    """Take few rows in several threads at once."""
    report = Report(
        "ray", f"takes of {_COUNTS[0]} rows of {_ROW_BYTES} bytes in {_CLIENTS} threads at once"
    )
    for count, sides in _each_count(bench, report, _COUNTS[:1]):
        contenders = [_threads(bench, name, take, count) for name, take in sides.items()]
        timings = paired(contenders, rounds=bench.rounds, operations=_MOST_TAKES * _CLIENTS)
        for name in list(sides)[1:]:
            what = f"{name}: of {LOCAL}"
            report.rows.append(times_the_time(what, timings[name], timings[LOCAL]))
        for name, timing in timings.items():
            report.count(f"{name}: takes", 1e6 / timing.microseconds, "a second")
    return report


def _each_count(
    bench: Bench, report: Report, counts: Sequence[int]
) -> Iterator[tuple[int, dict[str, Take]]]:
    """Yield the rows of a take, and who takes them; nothing where Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        report.missing.append("actors: Ray is not installed (pip install ray)")
        return
    table = bench.table
    table.warm()
    with ExitStack() as opened:
        local = opened.enter_context(table.rows(_ROW_BYTES))
        opened.enter_context(_ray())
        sides: dict[str, Take] = {LOCAL: local.take}
        for actors in _ACTORS:
            rows = opened.enter_context(_table(table, actors))
            sides[f"{actors} actors"] = rows.take
        _check(local, sides)
        for count in counts:
            yield count, sides


@contextmanager
def _ray() -> Iterator[None]:
    """Run Ray on this machine, with little memory and no dashboard."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        raise BenchError("ray: this process is part of a cluster already")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local", num_cpus=os.cpu_count(), object_store_memory=_STORE_BYTES,
            include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


def _table(table: ShardedTable, actors: int) -> Any:
    """Open the rows by so many actors, each with its part of the files."""
    from fremap.ray import DistributedRows

    if len(table.paths) < actors:
        raise BenchError(
            f"ray: {len(table.paths)} files for {actors} actors; pass --file-size or --shards"
        )
    parts = [list(map(str, part)) for part in np.array_split(np.array(table.paths), actors)]
    return DistributedRows(parts, np.uint8, _ROW_BYTES, offset=table.offset)


def _check(local: fremap.Rows, sides: Mapping[str, Take]) -> None:
    ids = np.random.default_rng(2002).integers(0, len(local), 5000)
    wanted = local.take(ids)
    for name, take in sides.items():
        out = np.zeros_like(wanted)
        take(ids, out)
        if not np.array_equal(out, wanted):
            raise BenchError(f"ray: {name} has not the rows that were asked for")


def _drawn(bench: Bench, number: int, count: int, calls: int) -> list[Ids]:
    rows = bench.table.shard_rows(_ROW_BYTES) * len(bench.table.paths)
    return list(np.random.default_rng([number, count]).integers(0, rows, (calls, count)))


def _contender(bench: Bench, name: str, take: Take, count: int, calls: int) -> Contender:
    out = np.ones((count, _ROW_BYTES), np.uint8)

    def run(number: int) -> Mapping[str, float]:
        ids = _drawn(bench, number, count, calls)

        def work() -> None:
            for some in ids:
                take(some, out)

        return {name: timed(work)}

    return run


def _threads(bench: Bench, name: str, take: Take, count: int) -> Contender:
    def client(ids: list[Ids]) -> None:
        out = np.ones((count, _ROW_BYTES), np.uint8)
        for some in ids:
            take(some, out)

    def run(number: int) -> Mapping[str, float]:
        drawn = [
            _drawn(bench, number * _CLIENTS + one, count, _MOST_TAKES) for one in range(_CLIENTS)
        ]
        threads = [threading.Thread(target=partial(client, ids)) for ids in drawn]

        def work() -> None:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return {name: timed(work)}

    return run
