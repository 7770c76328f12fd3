"""What the suites of one run share: settings, the data file, windows, C loops."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench import loops
from fremap.bench.datafile import DataFile, PageDraw, SparseFile, largest_file_bytes
from fremap.bench.harness import BenchError, Report
from fremap.bench.loops import Loop
from fremap.bench.sharded import SHARD_MULTIPLE, ShardedTable

DEFAULT_FILE_BYTES = 4 << 30
# Several files, one a side, each of which has to be written.
DEFAULT_TABLE_BYTES = 1 << 30
DEFAULT_SPARSE_BYTES = 512 << 20
_WARM_TRIES = 3


@dataclass
class Bench:
    """One run. Leaving the context removes its file and ends its loops.

    Attributes
    ----------
    rounds, pages
        Measured rounds, and pages in one.
    file_bytes
        Size of the data file; None for 4 GiB, or what memory allows. Of a sparse file
        the size of its data; None for 512 MiB.
    directory
        Where the file goes; None for the system's temporary directory.
    shards
        Files of the table whose rows lie in many, at most; together they have `file_bytes`, or
        1 GiB.
    """

    rounds: int
    pages: int
    file_bytes: int | None = None
    directory: str | None = None
    shards: int = 128
    _table: ShardedTable | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _file: DataFile | None = None
    _sparse_files: dict[str, SparseFile] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @staticmethod
    def say(text: str) -> None:
        """Tell whoever waits what is under way; the report goes to stdout."""
        print(text, file=sys.stderr, flush=True)

    @property
    def file(self) -> DataFile:
        """The data file, written at the first use."""
        if self._file is None:
            size = self.file_bytes or min(DEFAULT_FILE_BYTES, largest_file_bytes())
            self.say(f"writing a file of {size >> 20} MiB ...")
            self._file = self._stack.enter_context(DataFile(self.directory, size))
        return self._file

    def sparse_file(self, name: str) -> SparseFile:
        """Return the sparse file of this name, written at the first use."""
        if name not in self._sparse_files:
            size = self.file_bytes or DEFAULT_SPARSE_BYTES
            self.say(f"writing {size >> 20} MiB into a sparse file ...")
            file = self._stack.enter_context(SparseFile(self.directory, size))
            self._sparse_files[name] = file
        return self._sparse_files[name]

    @property
    def table(self) -> ShardedTable:
        """The table in many files, written at the first use."""
        if self._table is None:
            size = self.file_bytes or DEFAULT_TABLE_BYTES
            # Of a small table each file is as small as one can be.
            shards = max(min(self.shards, size // SHARD_MULTIPLE), 1)
            self.say(f"writing {size >> 20} MiB into {shards} files ...")
            made = ShardedTable(self.directory, size, shards)
            self._table = self._stack.enter_context(made)
        return self._table

    def warm_file(self, report: Report) -> DataFile:
        """Return the data file, in the page cache; what is not (a hundredth at most) is noted."""
        for _ in range(_WARM_TRIES):
            self.file.warm()
            absent = int(np.count_nonzero(~self.file.resident()))
            if absent == 0:
                return self.file
        # A kernel that pages out early (DAMON) or short of memory takes some back at once.
        if absent > self.file.page_count // 100:
            raise BenchError(
                f"{absent} pages of the file do not stay in the page cache; "
                "pass a smaller --file-size"
            )
        report.notes.append(f"{absent} pages of the file did not stay in the page cache")
        return self.file

    def draw(self) -> PageDraw:
        """Random pages of the file."""
        return PageDraw(self.file.page_count)

    @contextmanager
    def loops(
        self, report: Report, *names: str, pages: int | None = None, mode: str | None = None
    ) -> Iterator[dict[str, Loop]]:
        """Start the named C loops; where there can be none, the report says why."""
        reason = loops.unavailable()
        if reason:
            report.missing.append(reason)
            yield {}
            return
        with ExitStack() as running:
            yield {
                name: running.enter_context(Loop(name, self.file.path, pages or self.pages, mode))
                for name in names
            }

    @contextmanager
    def window(
        self, page_count: int | None = None, *, direct: bool = False
    ) -> Iterator[fremap.Window]:
        """Open an empty read-only paged window on the file."""
        with (
            fremap.open(self.file.path, direct=direct) as store,
            empty_window(store, page_count or self.pages) as window,
        ):
            yield window


@contextmanager
def on_processors(processors: set[int]) -> Iterator[None]:
    """Keep this thread, and the threads and processes it starts, on `processors`."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def placements(report: Report) -> Iterator[str]:
    """Yield where threads run, and have them run there: on one processor, then on all.

    What wakes a handler thread is dearer where that runs on a processor that is idle.
    """
    processors = os.sched_getaffinity(0)
    with on_processors({min(processors)}):
        yield "on one processor"
    if len(processors) > 1:
        yield f"on {len(processors)} processors"
    else:
        report.missing.append("one processor: no figure for a handler thread on another")


def empty_window(store: fremap.FileStore, page_count: int) -> fremap.Window:
    """Make a read-only paged window that shows nothing yet."""
    return fremap.Window(store, page_count, mapping="none", engine="paged")


def verify(window: fremap.Window, file_pages: npt.NDArray[np.int64]) -> None:
    """Raise unless every page shows its file page, of which it bears the number."""
    numbers = np.frombuffer(window, dtype=np.int64).reshape(window.page_count, -1)[
        : len(file_pages), 0
    ]
    wrong = np.flatnonzero(numbers != file_pages)
    if len(wrong):
        page = int(wrong[0])
        raise BenchError(
            f"window page {page} shows page {numbers[page]}, not file page {file_pages[page]}"
        )
