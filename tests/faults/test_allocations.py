"""Memory that cannot be had is an error to be caught, never the end of the process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.any_user
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


SWEEP = """
    import os, resource, sys, traceback
    import numpy as np
    import fremap
    # Imported now: the interpreter itself may fail to for lack of memory.
    from fremap import Slots, rows as _
    path, engine, *names = sys.argv[1:]
    with open(path, "wb") as file:
        file.truncate(1 << 34)
    store = fremap.open(path, mode="r+")
    many = np.random.default_rng(0).permutation(store.page_count)[:200_000]
    few = many[:3000]
    data = bytes(4096)

    def touch(window):
        memory = window.array(np.uint8)
        # The kernel reads around each touch of a file, as much as the device is set to.
        for page in few[: 300 if engine == "alias" else None].tolist():
            memory[page * 4096]

    def ensure(window):
        with fremap.Slots(store, 1, 100_000) as slots:
            slots.ensure(many[:50_000])

    def rows(window):
        with fremap.rows(path, np.uint64, 512) as all:
            all.take(many)

    def another(window):
        fremap.Window(store, prot=fremap.Prot.WRITE, coherent=False, engine="paged").close()

    operations = {
        "another": another,
        "dirty": lambda window: window.dirty,
        "ensure": ensure,
        "evict": lambda window: window.evict(many),
        "flush": lambda window: window.flush(many),
        "mapping": lambda window: window.mapping,
        "nonblock": lambda window: window.populate(many, nonblock=True),
        "pin": lambda window: window.pin(few),
        "place": lambda window: window.place(few, data),
        "place shown": lambda window: window.place(few),
        "populate": lambda window: window.populate(few),
        "prefetch": lambda window: store.prefetch(many),
        "present": lambda window: window.present,
        "protect": lambda window: window.protect(many, fremap.Prot.NONE),
        "protect placed": lambda window: window.protect(few, fremap.Prot.NONE),
        "read": lambda window: store.read(few),
        "remap": lambda window: window.remap(many[::-1], at=many, populate=False),
        "remap and read": lambda window: window.remap(few[::-1], at=few),
        "resident": lambda window: store.resident(many),
        "rows": rows,
        "touch": touch,
    }
    options = {
        "alias": dict(engine="alias"),
        "paged": dict(engine="paged", budget=64 << 20),
        "written": dict(engine="paged", budget=64 << 20, prot=fremap.Prot.WRITE, coherent=False),
    }
    options["noted"] = dict(options["written"], tracking="async")
    def near_the_limit(what, more):
        window = fremap.Window(store, **options[engine])
        if what == "protect placed":
            window.place(few, data)
            # Memory that pages are moved to is there from then on.
            window.protect(few[:1], fremap.Prot.NONE)
            window.protect(few[:1], fremap.Prot.READ if engine == "paged" else fremap.Prot.WRITE)
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, limits[1]))
        refused = None
        try:
            operations[what](window)
        except (fremap.FremapError, MemoryError) as error:
            refused = error
        resource.setrlimit(resource.RLIMIT_AS, limits)
        if what == "remap" and refused is not None:
            # What was not done is as it was, and the window goes on.
            done = getattr(refused, "completed", 0)
            shown = window.mapping[many]
            assert (shown[:done] == many[::-1][:done]).all()
            assert (shown[done:] == many[done:]).all()
        window.populate(few[:100])

    wrong = []
    for what in names:
        for more in [0, *(1 << power for power in range(13, 24, 2))]:
            child = os.fork()
            if child == 0:
                try:
                    near_the_limit(what, more)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if end != 0:
                wrong.append(f"{what}, {more} bytes: {end}")
    print("; ".join(wrong) or "all ended by themselves")
"""
OF_STORES = ["prefetch", "read", "resident", "rows"]
OF_COPIES = [
    "another",
    "dirty",
    "ensure",
    "evict",
    "flush",
    "mapping",
    "nonblock",
    "pin",
    "place",
    "place shown",
    "populate",
    "present",
    "protect",
    "protect placed",
    "remap",
    "remap and read",
    "touch",
]
OF_MAPPINGS = ["evict", "mapping", "place", "populate", "present", "protect", "remap", "touch"]


@pytest.mark.needs("uffd_wp")
@pytest.mark.parametrize("engine", ["paged", "written"])
def test_a_window_near_the_limit_of_memory(tmp_path: Path, engine: str, run_script: Run) -> None:
    done = run_script(SWEEP, tmp_path / "pages", engine, *OF_COPIES, timeout=150)
    assert (done.returncode, done.stdout) == (0, "all ended by themselves\n"), done.stderr


@pytest.mark.needs("uffd_wp_async", "uffd_move")
def test_pages_are_taken_out_near_the_limit_of_memory(tmp_path: Path, run_script: Run) -> None:
    names = ["evict", "protect", "protect placed", "remap and read"]
    done = run_script(SWEEP, tmp_path / "pages", "noted", *names, timeout=150)
    assert (done.returncode, done.stdout) == (0, "all ended by themselves\n"), done.stderr


def test_stores_and_mappings_near_the_limit_of_memory(tmp_path: Path, run_script: Run) -> None:
    done = run_script(SWEEP, tmp_path / "pages", "alias", *OF_STORES, *OF_MAPPINGS, timeout=150)
    assert (done.returncode, done.stdout) == (0, "all ended by themselves\n"), done.stderr
