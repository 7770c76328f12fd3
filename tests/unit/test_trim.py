"""Budgets of windows that are mappings of their files: what the trimmer does, and what not."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BYTES = 256 << 20
BUDGET = 32 << 20
# What may be mapped beyond a budget until the trimmer has looked.
OVERSHOOT = 32 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 MiB whose pages begin with their number, in the page cache."""
    path = tmp_path_factory.mktemp("trim") / "pages"
    with path.open("wb") as file:
        for first in range(0, BYTES >> 12, 4096):
            words = np.zeros((4096, 512), np.uint64)
            words[:, 0] = np.arange(first, first + 4096)
            file.write(words.tobytes())
    return path


@pytest.fixture
def window(path: Path) -> Iterator[fremap.Window]:
    window = fremap.Window(fremap.open(path), engine="alias", budget=BUDGET)
    yield window
    window.close()


def trimmers() -> list[Path]:
    """The threads that trim, as their directories in /proc."""

    def trims(task: Path) -> bool:
        try:
            return (task / "comm").read_text().strip() == "fremap-trim"
        except (FileNotFoundError, ProcessLookupError):
            return False  # it ended meanwhile

    return [task for task in Path("/proc/self/task").iterdir() if trims(task)]


def until(condition: Callable[[], bool]) -> bool:
    """Wait, busy, as the trimmer sleeps while the process does."""
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            return False
    return True


def resident(window: fremap.Window) -> int:
    stats = window.stats()
    return stats.present_pages * window.page_bytes + stats.page_table_bytes


def numbers(window: fremap.Window) -> Any:
    return window.array(np.uint64, (-1, 512))[:, 0]


def test_a_scan_shows_the_file_and_keeps_to_the_budget(window: fremap.Window) -> None:
    for _ in range(3):
        assert np.array_equal(numbers(window), np.arange(BYTES >> 12))
        assert until(lambda: resident(window) <= BUDGET)
    stats = window.stats()
    assert stats.budget_bytes == BUDGET
    assert stats.blocks_trimmed >= 3 * (BYTES - BUDGET) // (2 << 20) - 16
    gc.collect()


def test_four_threads_scan(window: fremap.Window) -> None:
    found = []
    parts = np.array_split(numbers(window), 4)

    def scan(part: Any) -> None:
        found.extend(int(part.sum()) for _ in range(4))

    scanners = [threading.Thread(target=scan, args=(part,)) for part in parts]
    for scanner in scanners:
        scanner.start()
    for scanner in scanners:
        scanner.join()
    count = BYTES >> 12
    assert sum(found) == 4 * (count * (count - 1) // 2)
    assert until(lambda: resident(window) <= BUDGET)


def test_page_tables_of_single_pages_count(window: fremap.Window) -> None:
    shown = numbers(window)
    for _ in range(8):
        assert int(shown[::511].sum()) == int(np.arange(BYTES >> 12)[::511].sum())
    assert until(lambda: resident(window) <= BUDGET)


def test_what_is_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "written"
    with path.open("wb") as file:
        file.truncate(BYTES // 2)
    store = fremap.open(path, "r+")
    with fremap.Window(
        store, prot=Prot.WRITE, coherent=True, engine="alias", budget=8 << 20
    ) as window:
        shown = numbers(window)
        shown[:] = np.arange(len(shown))
        assert until(lambda: window.stats().blocks_trimmed > 0)
        assert np.array_equal(shown, np.arange(len(shown)))
        del shown
    words = np.fromfile(path, np.uint64).reshape(-1, 512)
    assert np.array_equal(words[:, 0], np.arange(len(words)))


def test_placed_pages_are_kept(path: Path) -> None:
    with fremap.Window(fremap.open(path), engine="alias", budget=4 << 20) as window:
        placed = range(700, 40_000, 777)
        window.place(placed, b"\xff" * 4096)
        shown = numbers(window)
        for _ in range(4):
            found = shown.copy()
            assert (found[list(placed)] == 2**64 - 1).all()
            found[list(placed)] = list(placed)
            assert np.array_equal(found, np.arange(len(found)))
        assert window.stats().blocks_trimmed > 0
        assert window.stats().placed_pages == len(placed)
        del shown


def test_what_is_remapped_meanwhile_is_shown(path: Path) -> None:
    with fremap.Window(fremap.open(path), 16_384, engine="alias", budget=4 << 20) as window:
        shown = numbers(window)
        for first in range(0, 40_000, 5000):
            window.remap(range(first, first + 16_384), populate=False)
            assert np.array_equal(shown, np.arange(first, first + 16_384))
        window.remap(range(20_000, 0, -100), at=300)
        assert shown[300:500].tolist() == list(range(20_000, 0, -100))
        del shown


def test_windows_without_an_own_budget_share_one(path: Path) -> None:
    store = fremap.open(path)
    first, second = (fremap.Window(store, engine="alias") for _ in range(2))
    assert first.stats().budget_bytes == second.stats().budget_bytes > 0
    first.close()
    second.close()


def test_one_thread_for_all_windows_that_goes_with_the_last(path: Path) -> None:
    # The kernel lists a thread for a moment after it was joined.
    assert until(lambda: not trimmers())
    store = fremap.open(path)
    windows = [fremap.Window(store, engine="alias", budget=BUDGET) for _ in range(5)]
    while windows:
        assert len(trimmers()) == 1
        windows.pop().close()
    assert until(lambda: not trimmers())


def test_windows_within_their_budget_need_no_thread(path: Path) -> None:
    store = fremap.open(path)
    with fremap.Window(store, engine="alias", budget=2 * BYTES, advice="normal") as window:
        assert int(numbers(window)[77]) == 77
        assert until(lambda: not trimmers())


def test_an_idle_process_is_not_woken(window: fremap.Window) -> None:
    numbers(window).sum()
    assert until(lambda: len(trimmers()) == 1)  # an earlier one is gone

    def wakes() -> int:
        (task,) = trimmers()
        status = (task / "status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    # Sleeping is the subject: it looks a few times more, and then not at all.
    for _ in range(100):
        before = wakes()
        time.sleep(0.2)
        if wakes() == before:
            break
    else:
        pytest.fail("the trimmer goes on looking")


FORK = """
import os, sys, threading, fremap, numpy as np
window = fremap.Window(fremap.open(sys.argv[1]), engine="alias", budget=8 << 20)
shown = window.array(np.uint64, (-1, 512))[:, 0]
stop = threading.Event()
def scan():
    while not stop.is_set():
        shown.sum()
thread = threading.Thread(target=scan)
thread.start()
for _ in range(12):
    child = os.fork()
    if child == 0:
        assert int(shown[1000]) == 1000
        own = fremap.Window(fremap.open(sys.argv[1]), engine="alias", budget=8 << 20)
        assert int(own.array(np.uint64, (-1, 512))[:, 0].sum()) == sum(range(len(shown)))
        own.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
thread.join()
"""


def test_children_of_fork_have_a_trimmer_of_their_own(path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK, path], check=True, timeout=120)


def test_kernels_without_a_scan_of_the_page_map(path: Path) -> None:
    """Before Linux 6.7 the page map is read entry by entry."""
    fremap._core.inject_failure("pagemap_scan", 0, 25, 1 << 30)  # ENOTTY
    try:
        with fremap.Window(fremap.open(path), engine="alias", budget=BUDGET) as window:
            assert np.array_equal(numbers(window), np.arange(BYTES >> 12))
            assert until(lambda: resident(window) <= BUDGET)
            assert window.stats().blocks_trimmed > 0
    finally:
        fremap._core.clear_failures()
