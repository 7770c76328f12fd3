"""One service serves the faults of all windows: its threads and descriptors, and reads together."""

from __future__ import annotations

import collections
import errno
import gc
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.testing import counting, failures, numbered_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGES = 1024
WINDOWS = 40
BUDGET = 2 << 20
WAIT = 60  # seconds, for what another thread is to do

pytestmark = pytest.mark.needs("paged")
WRITTEN: dict[str, Any] = {"prot": Prot.WRITE, "coherent": False, "budget": BUDGET}
KINDS = [
    pytest.param({}, id="read"),
    pytest.param(
        {"tracking": "sync", **WRITTEN}, id="sync", marks=pytest.mark.needs("paged", "uffd_wp")
    ),
    pytest.param(
        {"tracking": "async", **WRITTEN},
        id="async",
        marks=pytest.mark.needs("paged", "uffd_wp_async", "uffd_move"),
    ),
]


@pytest.fixture
def expected() -> np.ndarray:
    return numbered_words(range(PAGES))


@pytest.fixture
def store(tmp_path: Path, expected: np.ndarray) -> Iterator[Any]:
    path = tmp_path / "pages"
    path.write_bytes(expected.tobytes())
    with fremap.open(path, "r+") as opened:
        yield opened


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> collections.Counter[str]:
    """The threads of fremap's that serve windows, by their names."""
    names = map(name_of, Path("/proc/self/task").iterdir())
    ours = {"fremap-fault", "fremap-clean", "fremap-wait"}
    return collections.Counter(name for name in names if name in ours)


def name_of(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""  # it ended meanwhile


def come_to(expected: object, counted: Callable[[], object]) -> bool:
    """Wait for what is counted: the kernel lists a thread for a moment after it was joined."""
    end = time.monotonic() + WAIT
    while counted() != expected:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def forget(store: Any) -> None:
    """Have no page of the file in the page cache."""
    os.fsync(store.fileno())
    os.posix_fadvise(store.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_in_threads(words: np.ndarray, expected: np.ndarray, count: int) -> None:
    """Touch each page once, by `count` threads in random orders; what they see is right."""
    wrong: list[int] = []

    def touch(number: int) -> None:
        pages = np.random.default_rng(number).permutation(np.arange(number, PAGES, count))
        wrong.extend(int(page) for page in pages if (words[page] != expected[page]).any())

    workers = [threading.Thread(target=touch, args=[number]) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT)
        assert not worker.is_alive()
    assert wrong == []


@pytest.mark.parametrize("options", KINDS)
def test_many_windows_have_a_thread_or_two_and_two_descriptors_each(
    store: Any, expected: np.ndarray, options: dict[str, Any]
) -> None:
    gc.collect()
    before = descriptors()
    with ExitStack() as stack:
        for _ in range(WINDOWS):
            window = stack.enter_context(fremap.Window(store, engine="paged", **options))
            assert (window.array(np.uint64, (PAGES, -1))[:64] == expected[:64]).all()
        # The service's own: what it waits with, what wakes it, a ring, the process, its pages.
        assert descriptors() - before <= 2 * WINDOWS + 6
        serving = {"fremap-fault": 1} | ({"fremap-clean": 1} if options else {})
        assert come_to(serving, threads), threads()
    assert come_to({}, threads), threads()
    # Fewer where what an earlier test left was closed meanwhile.
    assert descriptors() <= before


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("count", [1, 16])
def test_pages_that_are_not_in_the_page_cache_come_to_many_threads(
    store: Any, expected: np.ndarray, options: dict[str, Any], count: int
) -> None:
    with fremap.Window(store, engine="paged", **options) as window:
        words = window.array(np.uint64, (PAGES, -1))
        for _ in range(5):
            window.evict(None)
            forget(store)
            touch_in_threads(words, expected, count)
        if not options:
            assert window.stats().pages_in >= 5 * PAGES
        del words


def test_a_ring_waits_for_pages_and_threads_where_there_is_none(
    store: Any, expected: np.ndarray
) -> None:
    with fremap.Window(store, engine="paged", budget=None) as window:
        words = window.array(np.uint64, (PAGES, -1))
        with failures("io_uring_setup", errno=errno.EPERM, times=100):
            forget(store)
            touch_in_threads(words, expected, 4)
        assert threads()["fremap-wait"] > 0
        window.evict(None)
        del words
    assert come_to({}, threads), threads()
    with fremap.Window(store, engine="paged", budget=None) as window:
        words = window.array(np.uint64, (PAGES, -1))
        for skip in range(4):
            window.evict(None)
            forget(store)
            with failures("io_uring_enter", errno=errno.ENOMEM, skip=skip, times=1):
                touch_in_threads(words, expected, 4)
        del words


def test_no_page_is_read_twice_for_threads_that_want_the_same(
    store: Any, expected: np.ndarray
) -> None:
    with fremap.Window(store, engine="paged", budget=None) as window:
        views = [window.array(np.uint64, (PAGES, -1))]
        for page in range(0, PAGES, 16):
            forget(store)
            ready = threading.Barrier(8)

            def touch(page: int = page, ready: threading.Barrier = ready) -> None:
                ready.wait(WAIT)
                assert views[0][page, 0] == expected[page, 0]

            before = window.stats().pages_in
            workers = [threading.Thread(target=touch) for _ in range(8)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(WAIT)
                assert not worker.is_alive()
            assert window.stats().pages_in == before + 1
        views.clear()


@pytest.mark.any_user
@pytest.mark.slow
def test_calls_that_change_pages_while_they_are_read(store: Any, expected: np.ndarray) -> None:
    """Remapped, evicted, denied and allowed: what is seen is what the page shows by then."""
    with fremap.Window(store, engine="paged", budget=None) as window:
        views = [window.array(np.uint64, (PAGES, -1))]
        ends = threading.Event()
        allowed = [set(expected[[page, PAGES - 1 - page], 0].tolist()) for page in range(PAGES)]
        wrong: list[tuple[int, int]] = []

        def touch(number: int) -> None:
            random = np.random.default_rng(number)
            while not ends.is_set():
                page = int(random.integers(0, PAGES))
                seen = int(views[0][page, 0])
                if seen not in allowed[page]:
                    wrong.append((page, seen))

        workers = [threading.Thread(target=touch, args=[number]) for number in range(6)]
        for worker in workers:
            worker.start()
        backwards = np.arange(PAGES)[::-1].copy()
        for number in range(60):
            forget(store)
            if number % 3 == 0:
                window.evict(None)
            elif number % 3 == 1:
                window.remap(backwards, populate=False)
            else:
                window.remap(range(PAGES), populate=number % 2 == 0)
        ends.set()
        for worker in workers:
            worker.join(WAIT)
            assert not worker.is_alive()
        assert wrong == []
        views.clear()


@pytest.mark.any_user
@pytest.mark.slow
def test_windows_come_and_go_beside_faults_of_others(store: Any, expected: np.ndarray) -> None:
    with fremap.Window(store, engine="paged", budget=None) as window:
        words = window.array(np.uint64, (PAGES, -1))
        ends = threading.Event()

        def open_and_close() -> None:
            while not ends.is_set():
                with fremap.Window(store, engine="paged", budget=None) as other:
                    page = other.array(np.uint64, (PAGES, -1))[PAGES - 1]
                    assert page[0] == expected[PAGES - 1, 0]
                    del page

        worker = threading.Thread(target=open_and_close)
        worker.start()
        for _ in range(10):
            window.evict(None)
            forget(store)
            touch_in_threads(words, expected, 4)
        ends.set()
        worker.join(WAIT)
        assert not worker.is_alive()
        del words


def test_children_have_a_service_of_their_own(store: Any, expected: np.ndarray) -> None:
    """Forked while pages are read: the child sees its parent's window, and serves its own."""
    with fremap.Window(store, engine="paged", budget=None) as window:
        words = window.array(np.uint64, (PAGES, -1))
        for _ in range(10):
            window.evict(None)
            forget(store)
            toucher = threading.Thread(target=touch_in_threads, args=[words, expected, 4])
            toucher.start()
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    with fremap.Window(store, engine="paged", budget=None) as own:
                        own_words = own.array(np.uint64, (PAGES, -1))
                        right = bool((own_words == expected).all() and (words == expected).all())
                        status = 0 if right else 2
                        del own_words
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            toucher.join(WAIT)
            assert not toucher.is_alive()
        del words


def test_a_page_in_the_page_cache_costs_no_wait(store: Any, expected: np.ndarray) -> None:
    """One read a fault, and no ring."""
    store.read(range(PAGES))
    order = np.random.default_rng(2).permutation(PAGES)
    with fremap.Window(store, engine="paged", budget=None) as window:
        words = window.array(np.uint64, (PAGES, -1))
        with counting() as calls:
            for page in order.tolist():
                assert words[page, 0] == expected[page, 0]
        assert calls["io_uring_enter"] == 0
        assert calls["uffdio_copy"] <= PAGES
        del words
