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


SWEEP = """
    import os, resource, sys
    import numpy as np
    import fremap
    path, what, engine = sys.argv[1:4]
    steps = [int(step) for step in sys.argv[4:]]
    with open(path, "wb") as file:
        file.truncate(1 << 34)
    store = fremap.open(path, mode="r+")
    every = np.random.default_rng(0).permutation(store.page_count)
    ids = every[:200_000]
    operations = {
        "evict": lambda window: window.evict(ids),
        "flush": lambda window: window.flush(ids),
        "protect": lambda window: window.protect(ids, fremap.Prot.READ),
        "remap": lambda window: window.remap(ids, at=ids[::-1].copy(), populate=False),
    }
    ends = {}
    for more in steps:
        child = os.fork()
        if child == 0:
            # A writable one would refuse to show a page twice.
            prot = fremap.Prot.READ if what == "remap" else fremap.Prot.WRITE
            window = fremap.Window(store, prot=prot, coherent=False, engine=engine, budget=64 << 20)
            used = int(open("/proc/self/statm").read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
            try:
                operations[what](window)
            except (fremap.FremapError, MemoryError):
                pass
            os._exit(0)
        end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends.setdefault(end, []).append(more)
    print(ends if set(ends) != {0} else "all ended by themselves")
"""


@pytest.mark.needs("uffd_wp")
@pytest.mark.parametrize("what", ["evict", "flush", "protect", "remap"])
def test_a_window_near_the_limit_of_memory(tmp_path: Path, what: str, run_script: Run) -> None:
    # With less glibc itself can end the process: it lacks memory for a thread's variables.
    steps = [1 << 20, 1 << 22]
    done = run_script(SWEEP, tmp_path / "pages", what, "paged", *steps)
    assert (done.returncode, done.stdout) == (0, "all ended by themselves\n"), done.stderr
