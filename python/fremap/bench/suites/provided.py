"""What it costs to have pages computed by another process, above computing them.

A side of the bench calls the same function in this process, for the same pages.
"""

import statistics
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.bench import Bench
from fremap.bench.harness import BenchError, Report, Row, Timing, paired
from fremap.testing.pages import fill_numbered, numbered_words

_PAGES = 1 << 20
_PAGE_BYTES = 4096
_TOUCHES = 256
_READ_PAGES = 1024
_OURS, _FILL = "fremap.ComputedStore", "fill alone"
_MOST_TOUCH_US, _MOST_PAGE_US = 150.0, 2.0


def _filled(pages: npt.NDArray[np.int64], together: bool) -> float:  # noqa: FBT001
    """Return the seconds that the function takes for pages, one by one or together."""
    out = np.empty((len(pages) if together else 1, _PAGE_BYTES), np.uint8)
    begin = time.perf_counter()
    for part in [pages] if together else pages.reshape(-1, 1):
        fill_numbered(part, out)
    return time.perf_counter() - begin


def touches(bench: Bench) -> Report:
    """Touch pages of a window one by one, in random order."""
    report = Report("provided", "touch a computed page of 4 KiB")

    def run(number: int) -> Mapping[str, float]:
        pages = np.random.default_rng([number]).permutation(_PAGES)[:_TOUCHES].astype(np.int64)
        begin = time.perf_counter()
        for page in pages.tolist():
            words[page, 0]
        elapsed = time.perf_counter() - begin
        if (words[pages] != numbered_words(pages)).any():
            raise BenchError("provided: a page is not what was computed")
        window.evict(pages)
        return {_OURS: elapsed, _FILL: _filled(pages, together=False)}

    with (
        fremap.ComputedStore(_PAGES, fill_numbered, page_bytes=_PAGE_BYTES) as store,
        fremap.Window(store, engine="paged", budget=None) as window,
    ):
        words = window.array(np.uint64, shape=(_PAGES, -1))
        timings = paired([run], rounds=bench.rounds, operations=_TOUCHES)
    report.rows.append(_above(report.title, timings, _MOST_TOUCH_US))
    return report


def reads(bench: Bench) -> Report:
    """Read scattered pages by one call."""
    report = Report("provided", "read 1 024 scattered computed pages of 4 KiB")
    out = np.empty((_READ_PAGES, _PAGE_BYTES), np.uint8)

    def run(number: int) -> Mapping[str, float]:
        pages = np.random.default_rng([number]).permutation(_PAGES)[:_READ_PAGES].astype(np.int64)
        begin = time.perf_counter()
        store.read(pages, out)
        elapsed = time.perf_counter() - begin
        if (out.view(np.uint64) != numbered_words(pages)).any():
            raise BenchError("provided: a page is not what was computed")
        return {_OURS: elapsed, _FILL: _filled(np.sort(pages), together=True)}

    with fremap.ComputedStore(_PAGES, fill_numbered, page_bytes=_PAGE_BYTES) as store:
        timings = paired([run], rounds=bench.rounds, operations=_READ_PAGES)
    report.rows.append(_above(report.title, timings, _MOST_PAGE_US))
    return report


def _above(what: str, timings: Mapping[str, Timing], at_most: float) -> Row:
    """Return the microseconds a page that are above the function's own."""
    ours, fill = timings[_OURS], timings[_FILL]
    above = [
        (one - other) / ours.operations * 1e6
        for one, other in zip(ours.seconds, fill.seconds, strict=True)
    ]
    return Row(f"{what}: above fill", statistics.median(above), "µs a page", at_most=at_most)
