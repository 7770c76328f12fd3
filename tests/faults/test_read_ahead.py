"""What a scan of an absent window brings: clusters, more ahead of them, in frames that go round."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.testing import counting, failures, numbered_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGES = 4096
BUDGET = 4 << 20
CLUSTER = 64  # without a budget
CLUSTERS = PAGES / (BUDGET // 64 // 4096)  # of the file, with it
WAIT = 20  # seconds, for what another thread is to do

pytestmark = pytest.mark.needs("paged")
WRITTEN: dict[str, Any] = {"prot": Prot.WRITE, "coherent": False}
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


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return numbered_words(range(PAGES))


@pytest.fixture(params=["buffered", "direct"])
def store(request: pytest.FixtureRequest, tmp_path: Path, expected: np.ndarray) -> Iterator[Any]:
    path = tmp_path / "pages"
    path.write_bytes(expected.tobytes())
    with fremap.open(path, "r+", direct=request.param == "direct") as opened:
        yield opened


def scan(words: np.ndarray, expected: np.ndarray, start: int, stop: int, step: int) -> None:
    for page in range(start, stop, step):
        assert (words[page : page + step] == expected[page : page + step]).all(), page


@pytest.mark.parametrize("options", KINDS)
def test_scans_in_a_budget(store: Any, expected: np.ndarray, options: dict[str, Any]) -> None:
    """Several at once, from anywhere and of any length, beside touches that jump."""
    with fremap.Window(store, engine="paged", budget=BUDGET, **options) as window:
        views = [window.array(np.uint64, (PAGES, -1))]

        def work(number: int) -> None:
            random, words = np.random.default_rng(number), views[0]
            for _ in range(6):
                start, count = random.integers(0, PAGES), random.integers(1, 900)
                scan(words, expected, int(start), int(min(start + count, PAGES)), 7)
                some = random.integers(0, PAGES, 50)
                assert (words[some] == expected[some]).all()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        stats = window.stats()
        assert stats.present_pages * 4096 <= BUDGET
        assert stats.pages_in - stats.pages_out == stats.present_pages
        views.clear()


@pytest.mark.needs("uffd_move")
def test_a_scan_brings_pages_in_the_frames_of_those_that_left(
    store: Any, expected: np.ndarray
) -> None:
    with fremap.Window(store, engine="paged", budget=BUDGET) as window:
        words = window.array(np.uint64, (PAGES, -1))
        scan(words, expected, 0, PAGES, 64)
        with counting() as calls:
            scan(words, expected, 0, PAGES, 64)
        del words
    assert calls["uffdio_move"] > CLUSTERS, "out and in"
    assert calls["uffdio_copy"] < CLUSTERS / 4


@pytest.mark.needs("uffd_move")
@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("uffdio_move", errno.EBUSY),
        ("uffdio_move", errno.ENOMEM),
        ("uffdio_move_answer", errno.EEXIST),
        ("uffdio_copy", errno.ENOMEM),
        ("madvise", errno.ENOMEM),
    ],
)
@pytest.mark.parametrize("times", [1, 5])
def test_a_scan_goes_on_where_frames_cannot_be_moved(
    store: Any, expected: np.ndarray, call: str, number: int, times: int
) -> None:
    with fremap.Window(store, engine="paged", budget=BUDGET) as window:
        words = window.array(np.uint64, (PAGES, -1))
        scan(words, expected, 0, PAGES, 64)
        for skip in range(0, 12, times):
            with failures(call, errno=number, skip=skip, times=times):
                scan(words, expected, 0, PAGES // 2, 64)
        before = window.stats().pages_in
        with counting() as calls:
            scan(words, expected, 0, PAGES, 64)
        brought = window.stats().pages_in - before
        assert brought > PAGES // 2, "most were not there"
        assert calls["uffdio_move"] > CLUSTERS * brought / PAGES, "frames go round again"
        del words


@pytest.mark.needs("uffd_move")
def test_a_page_that_came_in_part_is_not_seen_when_it_shows_another(tmp_path: Path) -> None:
    """Pages of four system pages: memory lacks for what is behind the fifth of a cluster."""
    page_bytes, count = 16_384, 1024
    first = count // 2
    expected = numbered_words(range(count), page_bytes)
    expected.tofile(tmp_path / "pages")
    with (
        fremap.open(tmp_path / "pages", page_bytes=page_bytes) as store,
        fremap.Window(store, engine="paged", budget=BUDGET) as window,
    ):
        words = window.array(np.uint64, (count, -1))
        met = 0
        for skip in range(4):
            scan(words, expected, 0, first, 1)
            # Nothing of it comes any more, which could take the copies that the touch is to have.
            window.evict(range(first, count))
            with (
                failures("uffdio_move", errno=errno.ENOMEM, skip=skip, times=100),
                failures("uffdio_copy", errno=errno.ENOMEM, skip=5, times=100),
            ):
                assert words[first, 0] == expected[first, 0]
            met += int(not window.present()[first + 1])
            window.remap([3], at=first + 1, populate=False)
            assert (words[first + 1] == expected[3]).all()
            window.remap([first + 1], at=first + 1, populate=False)
            window.evict(None)
        assert met > 0
        del words


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("options", KINDS)
def test_pages_come_before_they_are_touched(
    store: Any, expected: np.ndarray, options: dict[str, Any]
) -> None:
    with fremap.Window(store, engine="paged", budget=None, **options) as window:
        words = window.array(np.uint64, (PAGES, -1))
        scan(words, expected, 0, 2 * CLUSTER - 1, 1)  # 1 + 2 + 4 + ... + a cluster
        ahead = slice(2 * CLUSTER - 1, 6 * CLUSTER - 1)
        wait_until(lambda: bool(window.present()[ahead].all()))
        assert not window.present()[6 * CLUSTER - 1 :].any(), "four clusters, no more"
        assert not window.dirty().any()
        faults = window.stats().faults
        scan(words, expected, 0, 6 * CLUSTER - 1, 1)
        assert window.stats().faults == faults == 7
        del words


def test_calls_end_what_is_read_ahead(store: Any, expected: np.ndarray) -> None:
    """What was evicted stays absent until it is touched, whatever was about to be read."""
    with fremap.Window(store, engine="paged", budget=None) as window:
        words = window.array(np.uint64, (PAGES, -1))
        for start in range(0, PAGES - 8 * CLUSTER, 97):
            scan(words, expected, start, start + 2 * CLUSTER, 1)
            window.evict(None)
            for _ in range(20):
                assert not window.present().any()
                os.sched_yield()
        del words


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_only_read_ahead_is_no_error(
    tmp_path: Path, expected: np.ndarray, direct: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file ends behind what is touched: nobody hears of it."""
    path = tmp_path / "pages"
    path.write_bytes(expected.tobytes())
    with (
        fremap.open(path, direct=direct) as store,
        fremap.Window(store, engine="paged", budget=None) as window,
    ):
        os.truncate(path, 2 * CLUSTER * 4096)
        words = window.array(np.uint64, (PAGES, -1))
        for _ in range(30):
            scan(words, expected, 0, 2 * CLUSTER - 1, 1)
            window.evict(None)
        assert window.stats().pages_unreadable == 0
        del words
    assert capfd.readouterr().err == ""
