"""Writing through slots that processes share."""

from __future__ import annotations

import errno
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
from fremap.testing import failures, page_numbers
from sharing import (
    EXTENT_BYTES,
    EXTENT_PAGES,
    EXTENTS,
    PAGES,
    SLOTS,
    Child,
    check,
    extent,
    shared,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# Writing.


@contextmanager
def writable(path: Path, name: str) -> Iterator[fremap.Slots]:
    with fremap.open(path, "r+", page_bytes=4096) as store, shared(store, name) as slots:
        yield slots


def test_what_is_written_is_in_the_file_and_in_all_processes(path: Path, name: str) -> None:
    with writable(path, name) as slots:
        places = slots.ensure([1, 2])
        array = slots.array(np.uint8)
        pin = slots.pin(2)
        content = np.full((3, EXTENT_BYTES), [[5], [4], [2]], np.uint8)
        slots.write([5, EXTENTS - 1, 2], content)

        def body(_: Callable[[], None]) -> list[int]:
            with slots.pin([1, 2, 5, EXTENTS - 1]) as places:
                return array[places, 7].tolist()

        expected = [int(array[places[0], 7]), 2, 5, 4]
        assert Child(body).answer() == expected
        with slots.pin([1, 2, 5, EXTENTS - 1]) as now:
            assert array[now, 7].tolist() == expected
        assert (
            page_numbers(slots.array(np.uint64, (EXTENT_PAGES, 512))[pin.slots[0]]) == extent(2)
        ).all()
        pin.release()
        written = path.read_bytes()
        assert len(written) == PAGES * 4096, "it is no longer than it was"
        assert set(written[2 * EXTENT_BYTES : 3 * EXTENT_BYTES]) == {2}
        assert set(written[(EXTENTS - 1) * EXTENT_BYTES :]) == {4}
        assert slots.stats().bytes_read == (2 + 3) * EXTENT_BYTES, "what was written is not read"


def test_writes_that_are_refused(store: fremap.FileStore, path: Path, name: str) -> None:
    data = np.zeros(EXTENT_BYTES, np.uint8)
    with shared(store, name) as slots:
        with pytest.raises(fremap.UnsupportedError):
            slots.write(1, data)
        check(slots, [1])
    with (
        fremap.Slots(store, EXTENT_PAGES, SLOTS) as own,
        pytest.raises(fremap.UnsupportedError, match="write: only slots that processes"),
    ):
        own.write(1, data)
    with writable(path, name) as slots:
        with pytest.raises(fremap.ArgumentError, match="write: key 1 is named twice"):
            slots.write([1, 2, 1], np.zeros(3 * EXTENT_BYTES, np.uint8))
        with pytest.raises(fremap.ArgumentError, match="data has 8191 bytes"):
            slots.write(1, data[1:])
        with pytest.raises(fremap.PageRangeError):
            slots.write(EXTENTS, data)
        with slots.pin(range(SLOTS)), pytest.raises(fremap.SlotsFullError):
            slots.write(1, data)
        check(slots, [0, 1])


def test_a_write_that_fails_leaves_what_the_file_has(path: Path, name: str) -> None:
    with writable(path, name) as slots:
        slots.ensure(1)
        with failures("write", errno=errno.EIO), pytest.raises(fremap.StoreError):
            slots.write(1, np.full(EXTENT_BYTES, 9, np.uint8))
        check(slots, [1])


def test_a_writer_that_dies_holds_up_nobody(path: Path, name: str) -> None:
    with writable(path, name) as slots:

        def body(pause: Callable[[], None]) -> None:
            kept = taken = slots._memory.table.reserve("write", np.array([3]))  # type: ignore[arg-type]
            pause()
            taken.release()
            del kept

        child = Child(body).paused()
        array = slots.array(np.uint8)
        new = np.full(EXTENT_BYTES, 8, np.uint8)
        waiting = threading.Thread(target=slots.write, args=(3, new))
        waiting.start()
        child.kill()
        waiting.join()
        assert array[slots.ensure(3)[0], 0] == 8
        del array


def test_nobody_sees_a_part_of_a_write(path: Path, name: str) -> None:
    """Writers of several processes write one value into whole extents; readers check them."""
    rounds = 150
    with writable(path, name) as slots:
        for key in range(4):
            slots.write(key, np.full(EXTENT_BYTES, 1, np.uint8))

        def write(seed: int) -> Callable[[Callable[[], None]], object]:
            def body(_: Callable[[], None]) -> None:
                draw = np.random.default_rng(seed)
                for _ in range(rounds):
                    data = np.full(EXTENT_BYTES, draw.integers(1, 255), np.uint8)
                    slots.write(draw.integers(4), data)

            return body

        def read(_: Callable[[], None]) -> None:
            array = slots.array(np.uint8)
            draw = np.random.default_rng(9)
            for _ in range(rounds):
                key = int(draw.integers(4))
                if draw.random() < 0.2:
                    slots.evict(key)
                with slots.pin(key) as places:
                    first = array[places[0]].copy()
                    assert len(set(first.tolist())) == 1
                    assert (array[places[0]] == first).all()

        children = [Child(write(seed)) for seed in range(2)] + [Child(read) for _ in range(2)]
        for child in children:
            child.answer()
        # What the slots show is what the file has.
        content = path.read_bytes()
        array = slots.array(np.uint8)
        for key in range(4):
            place = slots.ensure(key)[0]
            assert array[place].tobytes() == content[key * EXTENT_BYTES : (key + 1) * EXTENT_BYTES]
        del array
