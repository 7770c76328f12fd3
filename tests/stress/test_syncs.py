"""A device that fails to make writes durable, and forgets them: no flush calls that a success.

Where ``fsync`` fails the kernel tells it once and calls the pages clean; what the file shows
afterwards may be gone. So the test puts the file back to what it held at the last sync that
succeeded, and asks after each flush that succeeds whether all is there that was stored.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import failures

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.any_user
LENGTHS = [1, pytest.param(60, marks=pytest.mark.long)]  # seconds
WINDOWS = 2
PAGES = 64  # of one window
WORDS = 512


class Disk:
    """The file, and what of it is known to be durable."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(WINDOWS * PAGES * 4096))
        self.path = path
        self.durable = path.read_bytes()

    def forget(self) -> None:
        """Lose what was written since the last sync that succeeded."""
        with self.path.open("r+b") as file:
            file.write(self.durable)

    def note_synced(self) -> None:
        self.durable = self.path.read_bytes()

    def page(self, page: int) -> np.ndarray:
        return np.frombuffer(self.durable, np.uint64, WORDS, 4096 * page)


class Part:
    """A window on pages of its own, and what was stored to them."""

    def __init__(self, number: int, store: Any, options: dict[str, Any]) -> None:
        self.first = number * PAGES
        self.window = fremap.Window(store, PAGES, first_page=self.first, populate=True, **options)
        self.words = self.window.array(np.uint64, (PAGES, WORDS))
        self.stored = np.zeros(PAGES, np.uint64)

    def store(self, pages: np.ndarray, value: int) -> None:
        self.window.populate(pages)
        for page in pages:
            self.words[page] = value
            self.stored[page] = value

    def check_durable(self, disk: Disk) -> None:
        for page in range(PAGES):
            assert (disk.page(self.first + page) == self.stored[page]).all(), page


@pytest.mark.parametrize("seconds", LENGTHS)
def test_no_flush_succeeds_over_lost_writes(
    tmp_path: Path, write_back: dict[str, Any], seconds: int
) -> None:
    random = np.random.default_rng(seconds)
    disk = Disk(tmp_path / "disk")
    seen = dict.fromkeys(("synced", "kept", "lost"), 0)
    with fremap.open(disk.path, "r+") as store:
        parts = [Part(number, store, write_back) for number in range(WINDOWS)]
        end, value = time.monotonic() + seconds, 0
        while time.monotonic() < end or min(seen.values()) == 0:
            part, value = parts[random.integers(WINDOWS)], value + 1
            part.store(random.choice(PAGES, 5, replace=False), value)
            if random.random() < 0.3:
                part.window.evict(random.choice(PAGES, 8, replace=False))
            if random.random() < 0.5:
                failing = random.random() < 0.5
                flush(part, parts, store, disk, failing=failing, seen=seen)
        acknowledge(store, parts, disk)
        for part in parts:
            del part.words
            part.window.close()


def flush(
    part: Part, parts: list[Part], store: Any, disk: Disk, *, failing: bool, seen: dict[str, int]
) -> None:
    try:
        if failing:
            with failures("fsync", errno=errno.EIO) as calls:
                part.window.flush()
            if calls["fsync"] > 0:
                raise AssertionError("a sync that failed was called a success")
        else:
            part.window.flush()
    except fremap.StoreError as error:
        if error.errno != errno.EIO:
            raise
        disk.forget()
        if "refresh" in str(error):
            seen["lost"] += 1
            for other in parts:
                with pytest.raises(fremap.StoreError, match="refresh"):
                    other.window.flush()
            acknowledge(store, parts, disk)
        else:
            seen["kept"] += 1
        return
    seen["synced"] += 1
    disk.note_synced()
    part.check_durable(disk)


def acknowledge(store: Any, parts: list[Part], disk: Disk) -> None:
    """Store everything again, as whoever is told of the loss has to."""
    store.refresh()
    for part in parts:
        for page in range(PAGES):
            part.store(np.array([page]), int(part.stored[page]))
    for part in parts:
        part.window.flush()
    disk.note_synced()
    for part in parts:
        part.check_durable(disk)
