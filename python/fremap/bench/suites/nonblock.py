"""Populating without I/O: what it costs when all is there, and that it reads nothing."""

from collections.abc import Mapping

import numpy as np

from fremap.bench.bench import Bench, verify
from fremap.bench.harness import BenchError, Contender, Report, paired, timed, times_the_time
from fremap.bench.machine import counting

BLOCKING = "fremap, blocking"
NONBLOCK = "fremap, nonblock"


def populate(bench: Bench) -> Report:
    """Populate evicted pages of a warm file, and remap, with and without `nonblock`."""
    report = Report("nonblock", f"populate and remap {bench.pages} pages, all in the page cache")
    draw = bench.draw()
    bench.warm_file(report)
    with bench.window() as window:

        def populating(name: str, *, nonblock: bool) -> Contender:
            def run(number: int) -> Mapping[str, float]:
                ids = draw.distinct(number, bench.pages)
                window.remap(ids, populate=False)
                window.evict(None)
                seconds = timed(lambda: window.populate(nonblock=nonblock))
                verify(window, ids)
                return {name: seconds}

            return run

        def remapping(name: str, *, nonblock: bool) -> Contender:
            def run(number: int) -> Mapping[str, float]:
                ids = draw.distinct(number, bench.pages)
                # The same pages, but no window page may find its own there already.
                window.remap(np.roll(ids, 1))
                return {name: timed(lambda: window.remap(ids, nonblock=nonblock))}

            return run

        settings = {"rounds": bench.rounds, "operations": bench.pages}
        filled = paired(
            [populating(BLOCKING, nonblock=False), populating(NONBLOCK, nonblock=True)], **settings
        )
        swapped = paired(
            [remapping(BLOCKING, nonblock=False), remapping(NONBLOCK, nonblock=True)], **settings
        )
        report.rows.append(
            times_the_time(
                "populate: of the blocking one", filled[NONBLOCK], filled[BLOCKING], at_most=1.3
            )
        )
        report.rows.append(
            times_the_time(
                "remap: of the blocking one", swapped[NONBLOCK], swapped[BLOCKING], at_most=1.3
            )
        )
        ids = draw.distinct(0, bench.pages)
        with counting() as counts:
            here = window.remap(ids, nonblock=True)
        skipped = np.count_nonzero(~here & bench.file.resident()[ids])
        if skipped:
            raise BenchError(f"{skipped} pages were skipped that are in the page cache")
        report.count("read from the device", counts.device_bytes_read, "bytes", at_most=0)
    return report


def half_cached(bench: Bench) -> Report:
    """Remap where only a part is in the page cache: the mask says which, nothing is read."""
    file = bench.file
    count = min(bench.pages, file.page_count)
    report = Report(
        "nonblock", f"nonblocking remap of {count} pages, a part of them in the page cache"
    )
    file.drop()
    file.read_pages(range(0, min(2 * count, file.page_count), 2))
    ids = (
        np.random.default_rng(2002)
        .permutation(min(2 * bench.pages, file.page_count))[:count]
        .astype(np.int64)
    )
    with bench.window(count) as window:
        cached_before = file.resident()[ids]
        with counting() as counts:
            here = window.remap(ids, nonblock=True)
        # The kernel may take pages back at any time: what counts is what mincore says both times.
        cached_after = file.resident()[ids]
        wrong = (here & ~cached_before & ~cached_after) | (~here & cached_before & cached_after)
        report.count(
            "pages whose mask differs from mincore",
            int(np.count_nonzero(wrong)),
            "pages",
            at_most=0,
        )
        report.count("read from the device", counts.device_bytes_read, "bytes", at_most=0)
        report.count("pages shown", int(np.count_nonzero(here)), "pages")
        report.count("pages skipped", int(np.count_nonzero(~here)), "pages")
        with counting() as rest:
            window.populate()
        verify(window, ids)
        report.count("read by the blocking populate afterwards", rest.device_bytes_read, "bytes")
    return report
