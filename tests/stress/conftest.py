"""Threads that read all the time, and the check of every word that they see."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import numbered_words, write_numbered_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FILE_PAGES = 1024


class Threads:
    """Threads that run until told to stop, and whose failures are the test's."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.failures: list[BaseException] = []
        self.rounds: list[int] = []
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[[int], None], count: int = 1) -> None:
        """Run `work(thread number)` again and again, in `count` threads."""
        for _ in range(count):
            number = len(self._threads)
            self.rounds.append(0)
            self._threads.append(threading.Thread(target=self._run, args=(work, number)))
        for thread in self._threads[-count:]:
            thread.start()

    def _run(self, work: Callable[[int], None], number: int) -> None:
        try:
            while not self.stopped.is_set():
                work(number)
                self.rounds[number] += 1
        except BaseException as error:
            self.failures.append(error)
            self.stopped.set()

    def wait_for_rounds(self, count: int) -> None:
        """Until every thread has run so often, or one has failed."""
        while min(self.rounds) < count and not self.failures:
            self.stopped.wait(0.001)

    def stop(self) -> None:
        """Stop all, and raise what one of them has met."""
        self.stopped.set()
        for thread in self._threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


@pytest.fixture
def threads() -> Callable[[], Any]:
    """`with threads() as running: running.start(work, count)`; the end of the block stops them."""

    @contextmanager
    def run() -> Iterator[Threads]:
        running = Threads()
        try:
            yield running
        finally:
            running.stop()

    return run


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """1024 numbered pages."""
    if request.param == "file":
        path = tmp_path / "pages"
        write_numbered_file(path, FILE_PAGES)
        opened: Any = fremap.open(path)
    else:
        opened = fremap.MemoryStore(FILE_PAGES * 4096, page_bytes=4096)
        opened.write(None, numbered_words(range(FILE_PAGES)).view(np.uint8))
    with opened:
        yield opened
