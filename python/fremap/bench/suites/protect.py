"""Protecting every second page: one vectored call against mprotect(2) a page."""

from collections.abc import Mapping

import numpy as np

import fremap
from fremap.bench.bench import Bench
from fremap.bench.harness import Contender, Report, paired, timed, times_faster
from fremap.bench.machine import counting

NONE = "fremap, NONE"
READ = "fremap, READ"
READ_AND_POPULATE = "fremap, READ and populate"


def every_second(bench: Bench) -> Report:
    """Take away the access to every second page, then give it back.

    A read-only window drops the content of a page nobody may read, so giving
    the access back has two prices: at once, with the next touch a fault, or
    with the pages populated again.
    """
    pages = np.arange(0, bench.pages, 2, dtype=np.int64)
    report = Report(
        "protect", f"protect {len(pages)} pages, every second of the window, engine paged"
    )
    draw = bench.draw()
    bench.warm_file(report)
    with bench.window() as window, bench.loops(report, "mprotect") as running:
        window.remap(draw.distinct(0, bench.pages))

        def ours(_number: int) -> Mapping[str, float]:
            window.populate()
            none = timed(lambda: window.protect(pages, fremap.Prot.NONE))
            read = timed(lambda: window.protect(pages, fremap.Prot.READ))
            return {
                NONE: none,
                READ: read,
                READ_AND_POPULATE: read + timed(lambda: window.populate(pages)),
            }

        contenders: list[Contender] = [ours]
        if running:

            def theirs(_number: int) -> Mapping[str, float]:
                none, read = running["mprotect"].run(pages)
                return {"mprotect, NONE": none, "mprotect, READ": read}

            contenders.append(theirs)
        timings = paired(contenders, rounds=bench.rounds, operations=len(pages))
        if running:
            report.rows += [
                times_faster(
                    "NONE, than mprotect(2) a page",
                    timings[NONE],
                    timings["mprotect, NONE"],
                    at_least=1.5,
                ),
                times_faster(
                    "READ, than mprotect(2) a page",
                    timings[READ],
                    timings["mprotect, READ"],
                    at_least=3,
                ),
                times_faster(
                    "READ and populated, than mprotect(2)",
                    timings[READ_AND_POPULATE],
                    timings["mprotect, READ"],
                ),
            ]
        before = window.vma_count
        with counting() as counts:
            window.protect(pages, fremap.Prot.NONE)
        report.count("NONE, system calls a page", counts.system_call_count / len(pages), "calls")
        report.count("kernel mappings added", window.vma_count - before, "VMAs", at_most=0)
    return report
