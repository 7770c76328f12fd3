"""Ctrl-C in a long call: it ends, nothing is lost, and what is left is consistent."""

import itertools
import linecache
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import fremap
import numpy as np
import pytest

TRIES = 20


class StopError(Exception):
    """What the signal handler raises."""


@contextmanager
def alarm_in(call: str) -> Iterator[None]:
    """Raise `StopError` from a signal handler in a line of fremap's that has this call.

    Not between two of them, though the machine may be busy; after 10 ms at the earliest.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        assert frame is not None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if "/fremap/" in frame.f_code.co_filename and call in line:
            raise StopError
        signal.setitimer(signal.ITIMER_REAL, 0.001)

    before = signal.signal(signal.SIGALRM, handler)
    # The timer of pytest-timeout is kept and set again.
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[fremap.FileStore]:
    """A file that is longer to read than a test is to wait: 1 TiB of holes."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with fremap.open(path, page_bytes=4096) as store:
        yield store


def test_reading(sparse: fremap.FileStore) -> None:
    pages = np.random.default_rng(0).integers(0, sparse.page_count, 1 << 17)
    out = np.empty((len(pages), 4096), dtype=np.uint8)
    for _ in range(TRIES):
        with alarm_in("self._core.read("), pytest.raises(StopError):
            while True:
                out[::512, 0] = 1
                sparse.read(pages, out=out)
        if out[::512, 0].any():
            break
    else:
        pytest.fail("every call went on to its end")
    assert not sparse.read([1, 2, 3]).any()


def test_remapping(sparse: fremap.FileStore, engine: str) -> None:
    count = 1 << 15
    random = np.random.default_rng(0)
    orders = itertools.cycle(random.integers(0, sparse.page_count, count) for _ in range(8))
    with fremap.Window(sparse, count, engine=engine) as window:
        for _ in range(TRIES):
            with alarm_in("self._remap("), pytest.raises(StopError):
                for order in orders:
                    window.remap(order)
            # Consistent: what it says is what it shows, and it goes on.
            assert len(window.mapping) == count
            if (window.mapping != order).any():
                break
        else:
            pytest.fail("every call went on to its end")
        assert window.remap([5, 6, 7]).all()
        assert window.mapping[:3].tolist() == [5, 6, 7]


def test_a_signal_that_raises_nothing_ends_nothing(sparse: fremap.FileStore) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        killer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        killer.start()
        while not seen:
            assert sparse.read(range(1 << 14)).shape == (1 << 14, 4096)
        killer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
