"""An element of a cache a call, as a database remaps: 4, 16 and 64 KiB, file in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import (
    BenchError,
    Contender,
    Report,
    Row,
    Timing,
    paired,
    timed,
    times_faster,
)
from fremap.bench.machine import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fremap.bench.bench import Bench

#: Pages of an element, and the bars: of a remap beside remap_file_pages(2), of one in place
#: beside preadv into a pool.
_SIZES = {1: (2.0, 0.67), 4: (1.43, 1.0), 16: (0.91, 1.0)}
#: Calls of a round.
_CALLS = 2000

_Element = tuple[int, int]


class _KernelMapping:
    """A shared mapping of a file that `remap_file_pages(2)` rearranges."""

    def __init__(self, fd: int, page_count: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        word, pointer = ctypes.c_size_t, ctypes.c_void_p
        libc.mmap.restype = pointer
        libc.mmap.argtypes = [pointer, word, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [pointer, word]
        self._call = libc.remap_file_pages
        self._call.argtypes = [pointer, word, ctypes.c_int, word, ctypes.c_int]
        self._unmap = libc.munmap
        self._bytes = page_count * PAGE_BYTES
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._start = libc.mmap(None, self._bytes, access, mmap.MAP_SHARED, fd, 0)
        if self._start == pointer(-1).value:
            raise BenchError(f"mmap: {os.strerror(ctypes.get_errno())}")

    def remap(self, first: int, at: int, count: int) -> None:
        start = self._start + at * PAGE_BYTES
        if self._call(start, count * PAGE_BYTES, 0, first, 0):
            raise BenchError(f"remap_file_pages: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        self._unmap(self._start, self._bytes)


def warm(bench: Bench) -> Report:
    """Remap an element a call, beside the kernel's call and reads into a pool of buffers."""
    page_count = min(bench.pages, 4096)
    report = Report("element", f"an element of a cache a call, {_CALLS} calls a round")
    file = bench.warm_file(report)
    fd = os.open(file.path, os.O_RDWR)
    pool = memoryview(np.ones(page_count * PAGE_BYTES, np.uint8))
    kernel = _KernelMapping(fd, page_count)
    try:
        # Each way has a window of its own: what the other has remapped just so would be a hit.
        with bench.window(page_count) as window, bench.window(page_count) as overwritten:
            window.populate()
            overwritten.populate()

            def in_turn(count: int) -> list[Contender]:
                def run(
                    name: str, call: Callable[[int, int], object]
                ) -> Callable[[int], Mapping[str, float]]:
                    def round_of(number: int) -> Mapping[str, float]:
                        elements = _elements(number, count, file.page_count, page_count)
                        return {name: timed(lambda: _all(call, elements))}

                    return round_of

                return [
                    run("remap", lambda first, at: window.remap(range(first, first + count), at)),
                    run(
                        "in place",
                        lambda first, at: overwritten.remap(
                            range(first, first + count), at, in_place=True
                        ),
                    ),
                    run("kernel", lambda first, at: kernel.remap(first, at, count)),
                    run(
                        "preadv",
                        lambda first, at: os.preadv(
                            fd,
                            [pool[at * PAGE_BYTES : (at + count) * PAGE_BYTES]],
                            first * PAGE_BYTES,
                        ),
                    ),
                ]

            for count, bars in _SIZES.items():
                timings = paired(in_turn(count), rounds=bench.rounds, operations=_CALLS)
                report.rows += _rows(count, bars, timings)
            for name, shown, most in (("atomic", window, 4), ("in place", overwritten, 2)):
                with counting() as counts:
                    shown.remap(range(count), 0, in_place=shown is overwritten)
                calls = counts.system_call_count
                report.count(f"64 KiB, {name}: system calls", calls, "calls", at_most=most)
    finally:
        kernel.close()
        os.close(fd)
    return report


def _elements(number: int, count: int, file_pages: int, page_count: int) -> list[_Element]:
    draws = np.random.default_rng(number)
    first = draws.integers(0, file_pages - count, _CALLS)
    # Where its slot is: elements do not overlap.
    at = draws.integers(0, page_count // count, _CALLS) * count
    return list(zip(first.tolist(), at.tolist(), strict=True))


def _all(call: Callable[[int, int], object], elements: Iterable[_Element]) -> None:
    for first, at in elements:
        call(first, at)


def _rows(count: int, bars: tuple[float, float], timings: Mapping[str, Timing]) -> list[Row]:
    size = f"{count * PAGE_BYTES >> 10} KiB"
    ours, in_place = timings["remap"], timings["in place"]
    kernel, preadv = timings["kernel"], timings["preadv"]
    return [
        times_faster(f"{size}, vs remap_file_pages(2)", ours, kernel, at_least=bars[0]),
        times_faster(f"{size}, vs preadv into a pool", ours, preadv),
        times_faster(f"{size} in place, vs preadv into a pool", in_place, preadv, at_least=bars[1]),
    ]
