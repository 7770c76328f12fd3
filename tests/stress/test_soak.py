"""Windows made, used and closed again and again: what a process has at the end is what it had."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.any_user
PAGES = 512
PAGE = 4096
WINDOW = 256
#: Of the time, after which a process has what it needs: arenas of the allocator grow for a while.
WARM_UP = 1 / 3
LEAST = 6  # windows, before and after
LENGTHS = [0.5, pytest.param(180, marks=pytest.mark.long)]  # seconds

PAGED = pytest.mark.needs("paged")
SYNC = pytest.mark.needs("paged", "uffd_wp")
ASYNC = pytest.mark.needs("paged", "uffd_wp_async", "uffd_move")
CACHED: dict[str, Any] = {"prot": Prot.WRITE, "coherent": False}
SIGNAL: dict[str, Any] = {"fault": "signal", "budget": None}
KINDS = [
    pytest.param({"engine": "alias"}, id="alias"),
    pytest.param({"engine": "alias", "prot": Prot.WRITE, "coherent": True}, id="alias-write"),
    pytest.param({"engine": "eager"}, id="eager"),
    pytest.param({"engine": "eager", **CACHED}, id="eager-write"),
    pytest.param({"engine": "paged"}, id="paged", marks=PAGED),
    pytest.param({"engine": "paged", "budget": 1 << 20}, id="paged-budget", marks=PAGED),
    pytest.param({"engine": "paged", "tracking": "sync", **CACHED}, id="sync", marks=SYNC),
    pytest.param({"engine": "paged", "tracking": "async", **CACHED}, id="async", marks=ASYNC),
    pytest.param(
        {"engine": "paged", "tracking": "async", "budget": 2 << 20, **CACHED},
        id="async-budget",
        marks=ASYNC,
    ),
    pytest.param({"engine": "paged", **SIGNAL}, id="signal", marks=PAGED),
    pytest.param(
        {"engine": "paged", "tracking": "sync", **CACHED, **SIGNAL}, id="sync-signal", marks=SYNC
    ),
    pytest.param(
        {"engine": "paged", "tracking": "async", **CACHED, **SIGNAL}, id="async-signal", marks=ASYNC
    ),
]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mapping_count() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def names(folder: str) -> int:
    return len(os.listdir(folder))


#: How much more of each there may be at the end. The first two are the allocator's own: its
#: arenas, and stacks of threads that it keeps. A window is three mappings and more.
TOLERANCE = {"bytes": 8 << 20, "mappings": 32, "descriptors": 0, "threads": 0}
WAIT = 10  # seconds, for threads that have ended to be gone


def counted() -> dict[str, int]:
    """What a process has that windows could leave behind."""
    gc.collect()
    return {
        "bytes": resident_bytes(),
        "mappings": mapping_count(),
        "descriptors": names("/proc/self/fd"),
        "threads": names("/proc/self/task"),
    }


def check(before: dict[str, int]) -> None:
    until = time.monotonic() + WAIT
    while True:
        grown = {name: count - before[name] for name, count in counted().items()}
        beyond = [name for name, tolerated in TOLERANCE.items() if grown[name] > tolerated]
        if not beyond or time.monotonic() > until:
            break
        os.sched_yield()
    assert not beyond, grown


def use(path: Path, options: dict[str, Any], number: int) -> None:
    """The life of a window, with a store of its own."""
    random = np.random.default_rng(number)
    writes = options.get("prot") == Prot.WRITE
    store = fremap.open(path, "r+" if writes else "r")
    window = fremap.Window(store, WINDOW, **options)
    window.populate(range(WINDOW // 2))
    words = window.array(np.uint64, (WINDOW, -1))
    shown = random.permutation(np.arange(WINDOW, PAGES))  # none that is shown already
    for half in (0, WINDOW // 2):
        window.remap(shown[half : half + WINDOW // 2], at=half)
    if writes:
        words[: WINDOW // 4, 1] = number
        window.flush(range(WINDOW // 8))
    with pytest.raises(fremap.FremapError):
        window.remap([PAGES])
    with pytest.raises(fremap.FremapError):
        window.remap([0, 1], at=[3, 3])
    with pytest.raises(fremap.FremapError):
        window.evict([WINDOW])
    _threads(lambda: int(words[: WINDOW // 4, 0].sum()))
    window.evict(range(WINDOW // 2, WINDOW))
    if number % 3 == 0:
        del words
        window.close()
        store.close()
    elif number % 3 == 1:
        # A view keeps the window's memory; both go with the last of them.
        window.flush()
        del window, store
        assert words[0, 0] == words[0, 0]
    # Else what is left is garbage, in a cycle.
    elif writes:
        window.flush()
        cycle: list[Any] = [window, words]
        cycle.append(cycle)


def _threads(work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("seconds", LENGTHS)
@pytest.mark.parametrize("options", KINDS)
def test_nothing_is_left_behind(options: dict[str, Any], seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "pages"
    np.arange(PAGES, dtype=np.uint64).repeat(PAGE // 8).tofile(path)
    number = 0

    def run(until: float) -> None:
        nonlocal number
        least = number + LEAST
        while time.monotonic() < until or number < least or number % 3:
            use(path, options, number)
            number += 1

    start = time.monotonic()
    run(start + WARM_UP * seconds)
    before = counted()
    run(start + seconds)
    check(before)
    words = np.fromfile(path, np.uint64).reshape(PAGES, -1)
    assert (words[:, 0] == np.arange(PAGES)).all()
