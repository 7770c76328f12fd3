"""What tests of shared slots have in common: a store, names, and processes that do a thing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from forking import fork
from fremap.testing import page_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

EXTENT_PAGES = 2
EXTENTS = 24
SLOTS = 6
EXTENT_BYTES = EXTENT_PAGES * 4096
TAIL_PAGES = 1  # of the last extent
PAGES = (EXTENTS - 1) * EXTENT_PAGES + TAIL_PAGES


def named(name: str) -> Path:
    return Path(f"/dev/shm/fremap-slots-{os.geteuid()}-{name}")


def shared(store: fremap.Store, name: str, slot_count: int = SLOTS, **options: Any) -> fremap.Slots:
    return fremap.Slots(store, EXTENT_PAGES, slot_count, shared=name, **options)


class Child:
    """A child of fork that runs a function, and can be told to go on."""

    def __init__(self, body: Callable[[Callable[[], None]], object]) -> None:
        """`body` gets a function that says it has come so far, and waits for `go_on`."""
        self._reading, self._writing = os.pipe()
        self._came, said = os.pipe()
        waits, self._goes = os.pipe()

        def pause() -> None:
            os.write(said, b".")
            os.read(waits, 1)

        def run() -> None:
            answer = body(pause)
            os.write(self._writing, b"\0" + json.dumps(answer).encode())

        self.pid = fork(run, self._writing)
        for end in (self._writing, said, waits):
            os.close(end)
        self.status: int | None = None

    def paused(self) -> Child:
        """Wait until the child has come to its next pause."""
        if os.read(self._came, 1) != b".":
            self.answer()
            pytest.fail("the child has ended before its pause")
        return self

    def go_on(self) -> None:
        os.write(self._goes, b".")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._end()

    def _end(self) -> bytes:
        with open(self._reading, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        os.close(self._came)
        os.close(self._goes)
        return text

    def answer(self) -> Any:
        """What the function has returned; its exception is the test's failure."""
        text = self._end()
        if not text.startswith(b"\0"):
            pytest.fail(text.decode() or f"the child ended with {self.status}")
        return json.loads(text[1:])


def extent(key: int) -> np.ndarray:
    """The page number of each word of an extent, -1 behind the store's end."""
    pages = np.arange(key * EXTENT_PAGES, (key + 1) * EXTENT_PAGES)
    pages[pages >= PAGES] = -1
    return pages[:, None].repeat(512, axis=1)


def check(slots: fremap.Slots, keys: list[int]) -> None:
    """Extents are right while they are pinned."""
    with slots.pin(keys) as places:
        words = slots.array(np.uint64, (EXTENT_PAGES, 512))
        for key, place in zip(keys, places.tolist(), strict=True):
            assert (page_numbers(words[place]) == extent(key)).all()


def kernel_mappings(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


def zeros(_pages: np.ndarray, out: np.ndarray) -> None:
    """Compute pages, for what does so in another process."""
    out[:] = 0
