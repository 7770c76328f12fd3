"""Reading a present window, against an ndarray on small pages."""

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from fremap.bench.bench import Bench, verify
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import BenchError, Contender, Report, paired, timed, times_the_time
from fremap.bench.machine import counting

WINDOW = "fremap"
ARRAY = "ndarray"
_ROW_WORDS = 8
_LEAST_ROUNDS = 15


@contextmanager
def _small_pages(shape: tuple[int, int]) -> Iterator[npt.NDArray[np.int64]]:
    """Make an ndarray without huge pages, as with ``NUMPY_MADVISE_HUGEPAGE=0``."""
    memory = mmap.mmap(-1, shape[0] * shape[1] * 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    yield np.frombuffer(memory, dtype=np.int64).reshape(shape)
    # The array holds the memory; both go when the caller drops it.


def present(bench: Bench) -> Report:
    """Read the same bytes from both: a pass in order, and random 64-byte rows."""
    report = Report("read", f"read {bench.pages} pages that are present, engine paged")
    ids = bench.draw().distinct(0, bench.pages)
    bench.warm_file(report)
    # A pass is short, and where frames lie in memory shows: more rounds than elsewhere.
    rounds = max(bench.rounds, _LEAST_ROUNDS)
    with bench.window() as window, _small_pages((bench.pages, PAGE_BYTES // 8)) as array:
        window.remap(ids)
        verify(window, ids)
        view = np.frombuffer(window, dtype=np.int64).reshape(array.shape)
        array[:] = view
        for what, work, operations in _passes(view):
            timings = paired(
                [_reading(WINDOW, view, work), _reading(ARRAY, array, work)],
                rounds=rounds,
                operations=operations,
            )
            report.rows.append(
                times_the_time(
                    f"{what}: of an ndarray", timings[WINDOW], timings[ARRAY], at_most=1.03
                )
            )
        if not np.array_equal(view, array):
            raise BenchError("the window and its copy differ")
        with counting() as counts:
            view.sum()
        report.count("faults of a pass", counts.faults, "faults", at_most=0)
    return report


def _reading(
    name: str, memory: npt.NDArray[np.int64], work: Callable[[npt.NDArray[np.int64]], object]
) -> Contender:
    def run(_number: int) -> Mapping[str, float]:
        return {name: timed(lambda: work(memory))}

    return run


def _passes(
    memory: npt.NDArray[np.int64],
) -> list[tuple[str, Callable[[npt.NDArray[np.int64]], object], int]]:
    """Say what is read: its name, the work, and the pages or rows of a pass."""
    rows = memory.size // _ROW_WORDS
    count = min(rows, 200_000)
    chosen = np.random.default_rng(2002).integers(0, rows, count)
    out = np.empty((count, _ROW_WORDS), dtype=np.int64)

    def gather(memory: npt.NDArray[np.int64]) -> object:
        return np.take(memory.reshape(-1, _ROW_WORDS), chosen, axis=0, out=out, mode="clip")

    return [("a sum in order", np.sum, len(memory)), ("random rows of 64 bytes", gather, count)]
