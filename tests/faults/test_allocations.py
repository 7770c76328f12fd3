"""Memory that cannot be had is an error to be caught, never the end of the process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

HUGE = """
    import resource, sys
    import fremap
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
    what = sys.argv[1]

    def resident():
        fremap.MemoryStore(1 << 48).resident()

    def slots():
        fremap.Slots(fremap.MemoryStore(1 << 20), 1, 2**31 - 1)

    try:
        {"resident": resident, "slots": slots}[what]()
    except fremap.FremapError:  # which of them, the engine decides
        print("refused")
"""


@pytest.mark.parametrize("what", ["resident", "slots"])
def test_more_than_there_is(what: str, run_script: Run) -> None:
    done = run_script(
        HUGE,
        what,
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


NEAR = """
    import os, resource, sys
    import numpy as np
    import fremap
    path, what = sys.argv[1:3]
    with open(path, "wb") as file:
        file.truncate(1 << 33)
    store = fremap.open(path)
    ids = np.random.default_rng(0).permutation(store.page_count)[:200_000]
    store.resident(range(10))
    ends = set()
    for more in [0, *(1 << power for power in range(12, 27)), 3 << 20, 6 << 20]:
        child = os.fork()
        if child == 0:
            used = int(open("/proc/self/statm").read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
            try:
                {"resident": store.resident, "prefetch": store.prefetch}[what](ids)
            except (fremap.FremapError, MemoryError):
                pass
            os._exit(0)
        ends.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(ends)
"""


@pytest.mark.parametrize("what", ["resident", "prefetch"])
def test_a_list_of_pages_near_the_limit_of_memory(
    tmp_path: Path, what: str, run_script: Run
) -> None:
    done = run_script(NEAR, tmp_path / "pages", what)
    assert (done.returncode, done.stdout) == (0, "{0}\n"), done.stderr
