"""Scattered rows of an object in S3, from a server on this machine that does nothing else.

obstore is asked for the same ranges of bytes as fremap asks for: the pages of 64 KiB that the rows
lie in, neighbours joined. It hands over the pages' bytes, of which nobody has made rows yet.
"""

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.bench import Bench
from fremap.bench.datafile import PAGE_BYTES as _ROW_BYTES
from fremap.bench.harness import BenchError, Contender, Report, paired, timed, times_faster
from fremap.bench.object_server import ObjectServer, Tally, object_server

_ROWS = 4096
_PAGE_BYTES = 64 << 10
# Of those that are read one by one.
_FEW_ROWS = 32
_DELAY_SECONDS = 0.01
_LEAST_RATE, _LEAST_OF_FILES = 0.9, 5
_BUCKET, _KEY = "bench", "object"
_BY_OBSTORE, _BY_HTTP = "fremap take, by obstore", "fremap take, by http.client"
_GET_RANGES, _FILE = "obstore get_ranges", "s3fs file, row by row"

_Ids: TypeAlias = npt.NDArray[np.int64]


def loopback(bench: Bench) -> Report:
    """Take rows from a server that answers at once: what is measured is what requests cost."""
    return _takes(bench, "an object of S3 on this machine", 0.0)


def distant(bench: Bench) -> Report:
    """Take rows from a server that begins to answer late, as one far away does."""
    return _takes(
        bench, f"an object of S3, each answer {_DELAY_SECONDS * 1e3:g} ms late", _DELAY_SECONDS
    )


def _takes(bench: Bench, where: str, delay: float) -> Report:
    report = Report("remote", f"{_ROWS} random rows of {_ROW_BYTES} bytes: {where}")
    for package in ("obstore", "s3fs"):
        if importlib.util.find_spec(package) is None:
            report.missing.append(f"{package} is missing: pip install {package}")
            return report
    file = bench.warm_file(report)
    with ExitStack() as running:
        server = running.enter_context(object_server(file.path, delay))
        sides = _Sides(server, file.size_bytes, running)
        timings = paired(sides.contenders, rounds=bench.rounds, operations=_ROWS, warm_ups=1)
    few = replace(timings[_FILE], operations=_FEW_ROWS)
    for name in (_BY_OBSTORE, _BY_HTTP):
        # URLs of S3 are read by obstore.
        least = _LEAST_RATE if name == _BY_OBSTORE else None
        ours, ranges = timings[name], timings[_GET_RANGES]
        report.rows += [
            times_faster(f"{name}: than {_GET_RANGES}", ours, ranges, at_least=least),
            times_faster(f"{name}: than {_FILE}", ours, few, at_least=_LEAST_OF_FILES),
        ]
    for name, tally in sides.tallies.items():
        report.notes.append(
            f"{name}: {tally.requests} requests, {tally.content_bytes / 2**20:.1f} MiB, at most "
            f"{tally.most_at_once} requests at once"
        )
    return report


class _Sides:
    """What takes rows of the object, each way in turn."""

    def __init__(self, server: ObjectServer, size_bytes: int, running: ExitStack) -> None:
        from obstore.store import S3Store
        from s3fs import S3FileSystem

        self._server = server
        self._row_count = size_bytes // _ROW_BYTES
        self._out = np.ones((_ROWS, _ROW_BYTES // 8), np.int64)
        #: What the last round of each side asked for.
        self.tallies: dict[str, Tally] = {}
        self._store = S3Store(
            _BUCKET,
            endpoint=server.endpoint,
            region="us-east-1",
            access_key_id="bench",
            secret_access_key="bench",  # noqa: S106 - the server takes any
            client_options={"allow_http": True},
        )
        system = S3FileSystem(
            key="bench",
            secret="bench",  # noqa: S106
            client_kwargs={"endpoint_url": server.endpoint, "region_name": "us-east-1"},
        )
        path = f"{_BUCKET}/{_KEY}"
        self._file: Any = running.enter_context(system.open(path, cache_type="none"))
        sources: dict[str, Any] = {
            _BY_OBSTORE: (self._store, _KEY),
            _BY_HTTP: f"{server.endpoint}/{path}",
        }
        self.contenders: list[Contender] = []
        for name, source in sources.items():
            store = running.enter_context(fremap.RemoteStore(source, page_bytes=_PAGE_BYTES))
            rows = running.enter_context(fremap.rows(store, np.int64, _ROW_BYTES // 8))
            self.contenders.append(self._take(name, rows))
        self.contenders += [self._ranges, self._row_by_row]

    def _timed(self, name: str, work: Callable[[], object]) -> Mapping[str, float]:
        self._server.tally()
        seconds = timed(work)
        self.tallies[name] = self._server.tally()
        return {name: seconds}

    def _drawn(self, number: int, count: int = _ROWS) -> _Ids:
        return np.random.default_rng([number]).integers(0, self._row_count, count)

    def _take(self, name: str, rows: fremap.Rows) -> Contender:
        def run(number: int) -> Mapping[str, float]:
            ids = self._drawn(number)
            taken = self._timed(name, lambda: rows.take(ids, out=self._out))
            _check(self._out[:, 0], ids)
            self._out.fill(-1)
            return taken

        return run

    def _ranges(self, number: int) -> Mapping[str, float]:
        import obstore

        pages = np.unique(self._drawn(number) * _ROW_BYTES // _PAGE_BYTES)
        parts = np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1)
        starts = [int(part[0]) * _PAGE_BYTES for part in parts]
        ends = [(int(part[-1]) + 1) * _PAGE_BYTES for part in parts]
        answers: list[Any] = []

        def get() -> None:
            got = obstore.get_ranges(self._store, _KEY, starts=starts, ends=ends, coalesce=0)
            answers.extend(got)

        taken = self._timed(_GET_RANGES, get)
        numbers = np.array([np.frombuffer(answer, np.int64, 1)[0] for answer in answers])
        _check(numbers, np.array(starts) // _ROW_BYTES)
        return taken

    def _row_by_row(self, number: int) -> Mapping[str, float]:
        ids = self._drawn(number, _FEW_ROWS)
        answers: list[bytes] = []

        def read() -> None:
            for row in ids.tolist():
                self._file.seek(row * _ROW_BYTES)
                answers.append(self._file.read(_ROW_BYTES))

        taken = self._timed(_FILE, read)
        _check(np.array([np.frombuffer(answer, np.int64, 1)[0] for answer in answers]), ids)
        return taken


def _check(numbers: _Ids, expected: _Ids) -> None:
    """Raise unless rows begin with their numbers, as the file's pages do."""
    if (numbers != expected).any():
        raise BenchError("remote: a row is not that which was asked for")
