"""A shuffled epoch in batches, beside what is done without fremap.

Each side yields the same number of batches of 4 KiB rows, in random order, and each batch is
looked at: the first word of every row. In the page cache, and not.
"""

import importlib.util
import mmap
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench import containers
from fremap.bench.bench import Bench
from fremap.bench.competitors import POOL_THREADS, advised_memmap
from fremap.bench.datafile import PAGE_BYTES, PageDraw
from fremap.bench.harness import BenchError, Contender, Report, Timing, paired, times_faster

OURS = "fremap, rows.batches"
MEMMAP = "np.memmap[ids] a batch"
MEMMAP_RANDOM = "np.memmap[ids] with MADV_RANDOM a batch"
FADVISE = "posix_fadvise a row, then np.memmap[ids], a batch"
POOL = f"a pool of {POOL_THREADS} preads a batch"
WORKERS = 2
OURS_LOADER = f"fremap.torch in a DataLoader, {WORKERS} workers"
LOADER = f"np.memmap in a DataLoader, {WORKERS} workers"
_BATCH_ROWS = 256
_MOST_COLD_ROWS = 8192
_WORDS = PAGE_BYTES // 8

Ids: TypeAlias = npt.NDArray[np.int64]
# What a side makes of ids, and how it opens the file for that.
Reader: TypeAlias = Callable[[Ids], Iterable[Any]]
Opener: TypeAlias = Callable[[ExitStack], Reader]


def warm(bench: Bench) -> Report:
    """Read batches of a file in the page cache, by what was opened before."""
    page_count = bench.file.page_count
    rows = min(bench.pages, page_count) // _BATCH_ROWS * _BATCH_ROWS
    report = Report("batches", f"{rows} rows in batches of {_BATCH_ROWS}, file in the page cache")
    bench.warm_file(report)
    with ExitStack() as opened:
        readers = {name: opener(opened) for name, opener in _openers(bench, report).items()}
        _compare(report, _warm_rounds(bench, report, readers, rows, page_count))
        for container in containers.installed(report):
            with container(bench.file.path, 0, PAGE_BYTES) as other:
                pair: dict[str, Reader] = {
                    OURS: readers[OURS],
                    other.name: partial(_of_container, other),
                }
                some = _container_rows(bench, other)
                timings = _warm_rounds(bench, report, pair, some, other.row_count)
                _compare_container(report, timings, other)
    report.notes.append("all but DataLoaders have the file open from one round to the next")
    return report


def cold(bench: Bench) -> Report:
    """Read batches of a file that is not in the page cache, each row once in the whole run."""
    page_count = bench.file.page_count
    report = Report("batches", "")
    openers = _openers(bench, report)
    rows = _cold_rows(bench, page_count, len(openers))
    report.title = f"{rows} rows in batches of {_BATCH_ROWS}, file not in the page cache"
    _compare(report, _cold_rounds(bench, report, openers, rows, page_count))
    for container in containers.installed(report):
        with container(bench.file.path, 0, PAGE_BYTES) as other:
            pair: dict[str, Opener] = {
                OURS: openers[OURS],
                other.name: partial(_dropped_container, other),
            }
            some = min(_container_rows(bench, other), _cold_rows(bench, other.row_count, len(pair)))
            timings = _cold_rounds(bench, report, pair, some, other.row_count)
            _compare_container(report, timings, other)
    report.notes.append(
        "each row is asked of one side once, but for those beside containers; a host may still "
        "cache the file"
    )
    return report


def _warm_rounds(
    bench: Bench, report: Report, readers: dict[str, Reader], rows: int, page_count: int
) -> dict[str, Timing]:
    draw = PageDraw(page_count)

    def run(name: str, _side: int, number: int) -> float:
        return _seconds(readers[name], draw.distinct(number, rows), name)

    return _paired(bench, report, rows, list(readers), run, warm_ups=2)


def _cold_rows(bench: Bench, page_count: int, sides: int) -> int:
    """Return how many rows each side can have for itself in each round: whole batches."""
    own = page_count // (sides * (bench.rounds + 1))
    return min(bench.pages, _MOST_COLD_ROWS, own) // _BATCH_ROWS * _BATCH_ROWS


def _cold_rounds(
    bench: Bench, report: Report, openers: dict[str, Opener], rows: int, page_count: int
) -> dict[str, Timing]:
    shuffled = np.random.default_rng(2002).permutation(page_count).astype(np.int64)

    def run(name: str, side: int, number: int) -> float:
        first = (number * len(openers) + side) * rows
        # A page that somebody maps is not dropped: the file is opened anew each round.
        bench.file.drop()
        with ExitStack() as opened:
            return _seconds(openers[name](opened), shuffled[first : first + rows], name)

    return _paired(bench, report, rows, list(openers), run, warm_ups=1)


def _openers(bench: Bench, report: Report) -> dict[str, Opener]:
    path, fd = bench.file.path, bench.file.fd
    openers: dict[str, Opener] = {
        OURS: lambda opened: _ours(opened, path),
        MEMMAP: lambda _: _memmap(path, mmap.MADV_NORMAL),
        MEMMAP_RANDOM: lambda _: _memmap(path, mmap.MADV_RANDOM),
        FADVISE: lambda _: _fadvise(path, fd),
        POOL: lambda opened: _pool(opened, fd),
    }
    if importlib.util.find_spec("torch") is None:
        report.missing.append("DataLoader: torch is not installed (pip install torch)")
        return openers
    report.notes.append(
        "a DataLoader has new workers each round; its clock starts at their first batch"
    )
    return openers | {
        OURS_LOADER: lambda opened: _our_loader(opened, path),
        LOADER: lambda _: _loader(path),
    }


def _paired(
    bench: Bench,
    report: Report,
    rows: int,
    names: list[str],
    run: Callable[[str, int, int], float],
    *,
    warm_ups: int,
) -> dict[str, Timing]:
    if rows < 2 * _BATCH_ROWS:
        raise BenchError(f"{report.title}: too few; pass a larger --file-size or --pages")

    def contender(side: int, name: str) -> Contender:
        return lambda number: {name: run(name, side, number)}

    contenders = [contender(side, name) for side, name in enumerate(names)]
    return paired(contenders, rounds=bench.rounds, operations=rows, warm_ups=warm_ups)


def _compare(report: Report, timings: dict[str, Timing]) -> None:
    pairs = [(OURS, name) for name in (MEMMAP, MEMMAP_RANDOM, FADVISE, POOL, LOADER)]
    for ours, theirs in [*pairs, (OURS_LOADER, LOADER)]:
        if theirs in timings:
            what = f"{ours}: than {theirs}"
            report.rows.append(times_faster(what, timings[ours], timings[theirs]))


def _compare_container(
    report: Report, timings: dict[str, Timing], other: containers.Container
) -> None:
    ours, theirs = timings[OURS], timings[other.name]
    report.rows.append(times_faster(f"{OURS}: than {other.name} a batch", ours, theirs))
    report.notes.append(f"beside {other.name}: {ours.operations} rows a round")


def _container_rows(bench: Bench, other: containers.Container) -> int:
    return min(bench.pages, other.most_rows, other.row_count) // _BATCH_ROWS * _BATCH_ROWS


def _seconds(read: Reader, ids: Ids, name: str) -> float:
    """Return the time of all batches, each of which is the next of `ids`."""
    from_first = name in (OURS_LOADER, LOADER)
    done, wrong = 0, 0
    begin = time.perf_counter()
    for batch in read(ids):
        first_words = np.asarray(batch)[:, 0]
        if from_first and done == 0:
            begin = time.perf_counter()
        wrong += int(np.count_nonzero(first_words != ids[done : done + len(first_words)]))
        done += len(first_words)
    seconds = time.perf_counter() - begin
    if wrong or done != len(ids):
        raise BenchError(f"{name}: {wrong} of {done} rows are not those asked for, of {len(ids)}")
    return seconds * len(ids) / (len(ids) - _BATCH_ROWS) if from_first else seconds


def _ours(opened: ExitStack, path: Path) -> Reader:
    rows = opened.enter_context(fremap.rows(path, np.int64, _WORDS))
    return lambda ids: rows.batches(_BATCH_ROWS, ids)


def _split(ids: Ids) -> list[Ids]:
    return [ids[first : first + _BATCH_ROWS] for first in range(0, len(ids), _BATCH_ROWS)]


def _memmap(path: Path, advice: int) -> Reader:
    table = advised_memmap(path, np.int64, advice).reshape(-1, _WORDS)
    return lambda ids: (table[some] for some in _split(ids))


def _fadvise(path: Path, fd: int) -> Reader:
    table = advised_memmap(path, np.int64, mmap.MADV_RANDOM).reshape(-1, _WORDS)

    def batch(some: Ids) -> npt.NDArray[np.int64]:
        for offset in (some * PAGE_BYTES).tolist():
            os.posix_fadvise(fd, offset, PAGE_BYTES, os.POSIX_FADV_WILLNEED)
        rows: npt.NDArray[np.int64] = table[some]
        return rows

    return lambda ids: map(batch, _split(ids))


def _pool(opened: ExitStack, fd: int) -> Reader:
    pool = opened.enter_context(ThreadPoolExecutor(POOL_THREADS))

    def share(rows: list[npt.NDArray[np.int64]], offsets: list[int], part: int) -> None:
        for row, offset in zip(rows[part::POOL_THREADS], offsets[part::POOL_THREADS], strict=True):
            os.preadv(fd, [row], offset)

    def batch(some: Ids) -> npt.NDArray[np.int64]:
        out = np.empty((len(some), _WORDS), np.int64)
        rows, offsets = list(out), (some * PAGE_BYTES).tolist()
        for done in [pool.submit(share, rows, offsets, part) for part in range(POOL_THREADS)]:
            done.result()
        return out

    return lambda ids: map(batch, _split(ids))


def _of_container(other: containers.Container, ids: Ids) -> Iterable[npt.NDArray[np.int64]]:
    """Take each batch in rising order, as h5py wants it, and put it in the order asked for."""
    for some in _split(ids):
        order = np.argsort(some)
        rows = np.empty((len(some), _WORDS), np.int64)
        rows[order] = other.take(some[order]).view(np.int64)
        yield rows


def _dropped_container(other: containers.Container, _opened: ExitStack) -> Reader:
    other.drop()
    return partial(_of_container, other)


def _our_loader(opened: ExitStack, path: Path) -> Reader:
    from torch.utils.data import DataLoader

    from fremap.torch import BatchDataset

    rows = opened.enter_context(fremap.rows(path, np.int64, _WORDS))
    return lambda ids: DataLoader(
        BatchDataset(rows, _BATCH_ROWS, ids), batch_size=None, num_workers=WORKERS,
        multiprocessing_context="fork",
    )  # fmt: skip


def _loader(path: Path) -> Reader:
    from torch.utils.data import DataLoader

    return lambda ids: DataLoader(
        _RowsOfMemmap(path), batch_size=_BATCH_ROWS, sampler=ids.tolist(), num_workers=WORKERS,
        multiprocessing_context="fork",
    )  # fmt: skip


class _RowsOfMemmap:
    """What people give a DataLoader: a row by its number. Each worker has a map of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._table: npt.NDArray[np.int64] | None = None

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        if self._table is None:
            self._table = np.memmap(self._path, np.int64, "r").reshape(-1, _WORDS)
        return np.array(self._table[row])
