"""Writing all of an array whose file is in the page cache: `fremap.memmap` beside `numpy.memmap`.

The file was made by `numpy.memmap`, which gives it folios of up to 2 MiB where the file system
has them. The array's size is no multiple of 2 MiB, as most are not. The kernel maps large folios
of a file as such only where the array is aligned as they are, so the faults are counted, too.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

import fremap
from fremap.bench.bench import Bench
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import Report, paired, times_the_time
from fremap.bench.machine import counting

OURS = "fremap.memmap"
MEMMAP = "np.memmap"
_MOST_BYTES = 256 << 20
_MOST_OF_THE_TIME = 1.1


def warm(bench: Bench) -> Report:
    """Write each element of an array that was just opened; nothing is flushed."""
    most = min(bench.file.size_bytes, _MOST_BYTES)
    size = most - PAGE_BYTES
    report = Report("scan", f"rewrite a page less than {most >> 20} MiB in the page cache")
    faults: dict[str, int] = {}
    with tempfile.NamedTemporaryFile(prefix="fremap-bench-", dir=bench.directory) as file:
        made = np.memmap(file.name, np.int64, "w+", shape=size // 8)
        made[:] = -1
        del made

        def run(name: str, opened: Callable[..., Any], number: int) -> Mapping[str, float]:
            array = opened(file.name, np.int64, "r+")
            with counting() as counts:
                begin = time.perf_counter()
                array[:] = number
                seconds = time.perf_counter() - begin
            faults[name] = counts.faults
            return {name: seconds}

        sides: dict[str, Callable[..., Any]] = {OURS: fremap.memmap, MEMMAP: np.memmap}
        contenders = [partial(run, name, opened) for name, opened in sides.items()]
        pages = size // PAGE_BYTES
        timings = paired(contenders, rounds=bench.rounds, operations=pages, warm_ups=1)
    of_numpys = times_the_time(
        f"of {MEMMAP}", timings[OURS], timings[MEMMAP], at_most=_MOST_OF_THE_TIME
    )
    report.rows.append(of_numpys)
    for name, count in faults.items():
        report.count(f"{name}: faults a page", count / pages, "faults")
    return report
