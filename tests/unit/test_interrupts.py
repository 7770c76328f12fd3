"""Ctrl-C in a long call: it ends, nothing is lost, and what is left is consistent."""

import itertools
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fremap
import numpy as np
import pytest


class StopError(Exception):
    """What the signal handler raises."""


@contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    """Raise `StopError` from a signal handler after `seconds`."""

    def handler(number: int, frame: object) -> None:
        raise StopError

    before = signal.signal(signal.SIGALRM, handler)
    # The timer of pytest-timeout is kept and set again.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
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


def stopped_in(raised: pytest.ExceptionInfo[StopError]) -> list[str]:
    """Lines of fremap's that were under way when the signal came."""
    frames = traceback.extract_tb(raised.value.__traceback__)
    return [frame.line for frame in frames if "/fremap/" in frame.filename and frame.line]


def test_reading(sparse: fremap.FileStore) -> None:
    pages = np.random.default_rng(0).integers(0, sparse.page_count, 1 << 17)
    out = np.empty((len(pages), 4096), dtype=np.uint8)
    with alarm_after(0.01), pytest.raises(StopError) as raised:
        while True:
            sparse.read(pages, out=out)
    # Within the call, not between two of them.
    assert any("self._core.read(" in line for line in stopped_in(raised))
    assert not sparse.read([1, 2, 3]).any()


def test_remapping(sparse: fremap.FileStore, engine: str) -> None:
    count = 1 << 15
    random = np.random.default_rng(0)
    orders = [random.integers(0, sparse.page_count, count) for _ in range(8)]
    with fremap.Window(sparse, count, engine=engine) as window:
        with alarm_after(0.01), pytest.raises(StopError) as raised:
            for order in itertools.cycle(orders):
                window.remap(order)
        assert any("self._remap(" in line for line in stopped_in(raised))
        # Consistent: what it says is what it shows, and it goes on.
        assert len(window.mapping) == count
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
