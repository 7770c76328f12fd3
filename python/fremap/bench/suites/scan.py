"""A pass over a file larger than the budget: in order, and a word of every sixteenth page.

`fremap.memmap` beside `numpy.memmap` and a buffer that is read into; and how much memory
each took meanwhile.
"""

import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.bench import Bench
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import Contender, Report, paired, timed, times_the_time
from fremap.bench.machine import process_bytes

OURS = "fremap.memmap"
MEMMAP = "np.memmap"
SEQUENTIAL = "np.memmap, MADV_SEQUENTIAL"
READ = "readinto a buffer"
_MOST_BYTES = 512 << 20
_BUDGET_PART = 8
_BUFFER_BYTES = 1 << 20
_STRIDE_PAGES = 16
_WORDS = PAGE_BYTES // 8
# So much beyond its budget an array may take, as a window may.
_MOST_OF_BUDGET = 1.1

Words: TypeAlias = npt.NDArray[np.int64]
Pass: TypeAlias = Callable[[Words], Any]


def warm(bench: Bench) -> Report:
    """Scan a file in the page cache."""
    report = Report("scan", f"scan {_megabytes(bench)} MiB in the page cache")
    bench.warm_file(report)
    return _measure(bench, report, lambda: None)


def cold(bench: Bench) -> Report:
    """Scan a file that is not in the page cache."""
    report = Report("scan", f"scan {_megabytes(bench)} MiB not in the page cache")
    report.notes.append("a host may still cache what was written")
    return _measure(bench, report, bench.file.drop)


def _size(bench: Bench) -> int:
    return min(bench.file.size_bytes, _MOST_BYTES)


def _megabytes(bench: Bench) -> int:
    return _size(bench) >> 20


def _in_order(words: Words) -> Any:
    return words.sum()


def _strided(words: Words) -> Any:
    return words[:: _STRIDE_PAGES * _WORDS].sum()


def _measure(bench: Bench, report: Report, prepare: Callable[[], object]) -> Report:
    path, size = bench.file.path, _size(bench)
    budget = size // _BUDGET_PART
    sides: list[tuple[str, Callable[[Pass], Any]]] = [
        (
            OURS,
            lambda work: work(fremap.memmap(path, np.int64, "r", shape=size // 8, budget=budget)),
        ),
        (MEMMAP, lambda work: work(np.memmap(path, np.int64, "r", shape=size // 8))),
        (SEQUENTIAL, lambda work: work(_sequential(path, size))),
    ]
    for what, work in (("in order", _in_order), ("strided", _strided)):
        contenders, memory = [], dict[str, int]()
        for name, make in [
            *sides,
            (READ, lambda work: _read(path, size, strided=work is _strided)),
        ]:
            contenders.append(_side(name, make, work, prepare, memory))
        pages = size // PAGE_BYTES // (1 if work is _in_order else _STRIDE_PAGES)
        timings = paired(contenders, rounds=bench.rounds, operations=pages, warm_ups=1)
        report.rows += [
            times_the_time(f"{what}: of {name}", timings[OURS], timings[name])
            for name in (MEMMAP, SEQUENTIAL, READ)
        ]
        report.count(
            f"{what}: memory that fremap.memmap took, at most",
            memory[OURS] / budget,
            "of its budget",
            at_most=_MOST_OF_BUDGET,
        )
        for name, taken in memory.items():
            report.count(f"{what}: memory that {name} took, at most", taken / 2**20, "MiB")
    report.notes.append(f"the budget is {budget / 2**20:g} MiB; MADV_SEQUENTIAL is advice alone")
    return report


def _side(
    name: str, make: Callable[[Pass], Any], work: Pass, prepare: Callable[[], object],
    memory: dict[str, int],
) -> Contender:  # fmt: skip
    """Time a pass, the opening and closing of the file with it, and note the memory it took."""

    def run(_number: int) -> Mapping[str, float]:
        prepare()
        before = _forget_most()
        seconds = timed(lambda: make(work))
        memory[name] = max(memory.get(name, 0), process_bytes("VmHWM") - before)
        return {name: seconds}

    return run


def _forget_most() -> int:
    """Have the kernel's record of the most memory begin anew; return what there is now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return process_bytes("VmRSS")


def _sequential(path: Path, size: int) -> Words:
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    memory.madvise(mmap.MADV_SEQUENTIAL)
    return np.frombuffer(memory, np.int64)


def _read(path: Path, size: int, *, strided: bool) -> int:
    """Sum by way of a buffer: what is between the pages of a stride is not read."""
    buffer = np.empty(_BUFFER_BYTES // 8 if not strided else 1, np.int64)
    total = np.int64(0)
    fd = os.open(path, os.O_RDONLY)
    try:
        step = _STRIDE_PAGES * PAGE_BYTES if strided else _BUFFER_BYTES
        with np.errstate(over="ignore"):
            for offset in range(0, size, step):
                count = os.preadv(fd, [buffer], offset) // 8
                total += buffer[:count].sum()
    finally:
        os.close(fd)
    return int(total)
