"""Slots that processes share: what each process sees of them, and how they begin and end."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import _core
from fremap.testing import failures, page_numbers, wait_until_settled
from sharing import (
    EXTENT_BYTES,
    EXTENT_PAGES,
    EXTENTS,
    PAGES,
    SLOTS,
    Child,
    check,
    extent,
    kernel_mappings,
    named,
    shared,
    zeros,
)

if TYPE_CHECKING:
    from collections.abc import Callable


# What they are.


def test_what_they_are(slots: fremap.Slots, name: str, store: fremap.FileStore) -> None:
    assert (slots.shared, slots.engine, slots.closed) == (name, "shared", False)
    assert (slots.slot_count, slots.extent_pages, slots.extent_count) == (SLOTS, 2, EXTENTS)
    assert repr(slots) == (
        f"<fremap.Slots, 6 slots of 8192 bytes, engine 'shared', of FileStore {store.path!r}>"
    )
    assert slots.stats() == fremap.SlotsStats(0, 0, 0, 0, 0, 0)
    array = slots.array(np.uint8)
    assert array.shape == (SLOTS, EXTENT_BYTES)
    assert not array.flags.writeable
    facts = named(name).stat()
    assert (facts.st_mode & 0o777, facts.st_uid) == (0o600, os.geteuid())
    assert facts.st_blocks * 512 >= SLOTS * EXTENT_BYTES, "allocated: no touch can fail"
    assert kernel_mappings(name) == 1


def test_extents_come_and_leave_as_in_slots_of_one_process(slots: fremap.Slots) -> None:
    draw = np.random.default_rng(12)
    for _ in range(60):
        wanted = draw.integers(0, EXTENTS, draw.integers(0, SLOTS + 1))
        places = slots.ensure(wanted)
        assert slots.keys[places].tolist() == wanted.tolist()
        check(slots, wanted.tolist())
    stats = slots.stats()
    assert stats.evictions == stats.misses - stats.filled_slots
    assert stats.bytes_read == stats.misses * EXTENT_BYTES


def test_the_last_extent_is_zeros_behind_the_end(slots: fremap.Slots) -> None:
    last = EXTENTS - 1
    for others in ([0, 1], [2, 3, 4], [last, 7]):
        slots.ensure(range(6))
        check(slots, [last, *others])


def test_errors_name_keys(slots: fremap.Slots, path: Path) -> None:
    with pytest.raises(fremap.PageRangeError, match=f"ensure: key {EXTENTS} is outside"):
        slots.ensure(EXTENTS)
    with pytest.raises(fremap.SlotsFullError):
        slots.ensure(range(SLOTS + 1))
    os.truncate(path, 5 * EXTENT_BYTES)
    with pytest.raises(fremap.TruncatedError, match="key 5 cannot be brought in") as caught:
        slots.pin([3, 4, 5, 6])
    assert (caught.value.key, caught.value.completed) == (5, 2)
    assert sorted(key for key in slots.keys.tolist() if key >= 0) == [3, 4]
    assert slots.stats().pinned_slots == 0
    slots.evict()
    assert slots.stats().filled_slots == 0


def test_options_that_do_not_go_with_it(store: fremap.FileStore) -> None:
    for wrong in ("", "a/b", "ä", "x" * 129, ".\0"):
        with pytest.raises(fremap.ArgumentError, match="name is"):
            shared(store, wrong)
    with pytest.raises(fremap.ArgumentTypeError, match="shared must be a name, not int"):
        shared(store, 7)  # type: ignore[arg-type]
    with pytest.raises(fremap.ArgumentError, match="leave out engine="):
        shared(store, "x", engine="paged")
    with pytest.raises(fremap.BudgetError, match="more than the budget of 4096"):
        shared(store, "x", budget=4096)


def test_more_than_the_machine_has(store: fremap.FileStore, name: str) -> None:
    with pytest.raises(fremap.MemoryLimitError, match=r"Slots: this needs \d{14} bytes of memory"):
        shared(store, name, (1 << 31) - 1, budget=None)
    assert not named(name).exists()
    with pytest.raises(fremap.ArgumentError, match="are more than the address space has"):
        fremap.Slots(store, 1 << 20, (1 << 31) - 1, shared=name, budget=None)


def test_pages_that_no_file_has_are_refused(name: str) -> None:
    with (
        fremap.ComputedStore(EXTENTS, zeros, page_bytes=4096) as store,
        pytest.raises(fremap.UnsupportedError, match="leave out shared="),
    ):
        shared(store, name)


def test_no_more_than_half_of_memory_by_itself(
    store: fremap.FileStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fremap.slot_memory._AUTO_PART", 1 << 40)
    with pytest.raises(fremap.BudgetError, match="memory that all processes share"):
        shared(store, name)
    assert not named(name).exists()
    with shared(store, name, budget=None) as first, shared(store, name) as second:
        first.ensure(0)
        assert second.stats().filled_slots == 1, "what is there may be used"


# Several processes.


def test_an_extent_is_read_once_whoever_asks_first(store: fremap.FileStore, name: str) -> None:
    def read_all(seed: int) -> Callable[[Callable[[], None]], object]:
        def body(_: Callable[[], None]) -> int:
            keys = list(range(EXTENTS))
            random.Random(seed).shuffle(keys)
            with fremap.open(store.path, page_bytes=4096) as own:
                slots = shared(own, name, EXTENTS)
                for first in range(0, EXTENTS, 4):
                    check(slots, keys[first : first + 4])
                counters = own._core.counters()
                return int(counters["bytes_read"] + counters["bytes_copied"])

        return body

    with shared(store, name, EXTENTS) as slots:
        children = [Child(read_all(seed)) for seed in range(4)]
        assert sum(child.answer() for child in children) == PAGES * 4096
        assert slots.stats().misses == EXTENTS


def test_four_processes_read_what_one_does(store: fremap.FileStore, name: str) -> None:
    """The bar of 1.1, where extents leave for others: Zipf, by turns."""
    shares = np.cumsum(1 / np.arange(1, EXTENTS + 1))
    drawn = np.random.default_rng(7).random(2000) * shares[-1]
    keys = np.searchsorted(shares, drawn)
    with shared(store, name + "-alone") as slots:
        for key in keys:
            slots.ensure(key)
        alone = slots.stats().misses

    def part(number: int) -> Callable[[Callable[[], None]], object]:
        def body(pause: Callable[[], None]) -> None:
            pause()
            for key in keys[number::4]:
                with slots.pin(key):
                    pass
                pause()

        return body

    with shared(store, name) as slots:
        children = [Child(part(number)).paused() for number in range(4)]
        for turn in range(len(keys)):
            # At once they would hold more, and come in another order.
            child = children[turn % 4]
            child.go_on()
            child.paused()
        for child in children:
            child.go_on()
            child.answer()
        assert slots.stats().misses <= 1.1 * alone


def test_what_another_process_pins_stays(slots: fremap.Slots) -> None:
    def body(pause: Callable[[], None]) -> None:
        with slots.pin([3, 4, 3]):
            pause()

    child = Child(body).paused()
    try:
        assert slots.stats().pinned_slots == 2
        for key in range(5, EXTENTS):
            slots.ensure([key, 0])
            assert {3, 4} <= set(slots.keys.tolist())
        with pytest.raises(
            fremap.SlotsFullError, match="2 of 6 slots are pinned for other extents"
        ):
            slots.ensure(range(5, 10))
    finally:
        child.go_on()
        child.answer()
    assert slots.stats().pinned_slots == 0
    check(slots, list(range(5, 11)))


def test_who_wants_what_is_being_read_waits_for_it(slots: fremap.Slots) -> None:
    def body(pause: Callable[[], None]) -> None:
        taken = slots._memory.table.reserve("ensure", np.array([9]))
        pause()
        assert isinstance(taken, _core.SharedTaken)
        taken.load(slots.store._core)
        taken.release()

    child = Child(body).paused()
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.extend(slots.ensure([8, 9]).tolist()))
    waiting.start()
    try:
        assert not found
    finally:
        child.go_on()
        child.answer()
        waiting.join()
    assert slots.keys[found].tolist() == [8, 9]
    assert slots.stats().misses == 2


def test_a_wait_for_another_process_can_be_interrupted(slots: fremap.Slots) -> None:
    def body(pause: Callable[[], None]) -> None:
        taken = slots._memory.table.reserve("ensure", np.array([9]))
        pause()
        taken.release()

    class StopError(Exception):
        pass

    def stop(_number: int, _frame: object) -> None:
        raise StopError

    child = Child(body).paused()
    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        with pytest.raises(StopError):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            slots.ensure([9])
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)
        child.go_on()
        child.answer()
    check(slots, [9])
    assert slots.stats().pinned_slots == 0


# Beginning and end.


def test_a_killed_process_leaves_a_name_that_the_next_one_uses(
    store: fremap.FileStore, name: str
) -> None:
    def body(pause: Callable[[], None]) -> None:
        kept.append(shared(store, name))
        kept.append(kept[0].pin([1, 2]))
        pause()

    kept: list[Any] = []
    Child(body).paused().kill()
    assert named(name).exists()
    with shared(store, name) as slots:
        assert slots.stats().filled_slots == 2, "it is warm"
        assert slots.stats().pinned_slots == 0
        check(slots, [1, 2, 3])
        assert slots.stats().misses == 3


def test_a_killed_process_leaves_a_name_for_other_slots_too(
    store: fremap.FileStore, name: str
) -> None:
    def body(pause: Callable[[], None]) -> None:
        kept.append(shared(store, name))
        pause()

    kept: list[fremap.Slots] = []
    Child(body).paused().kill()
    with shared(store, name, SLOTS + 1) as slots:
        check(slots, list(range(SLOTS + 1)))


def test_slots_that_differ_are_refused(
    slots: fremap.Slots, store: fremap.FileStore, name: str, path: Path, tmp_path: Path
) -> None:
    del slots
    with pytest.raises(fremap.ArgumentError, match="has 6 slots of 2 pages of 4096 bytes"):
        shared(store, name, SLOTS + 1)
    with pytest.raises(fremap.ArgumentError, match="1 other process"):
        fremap.Slots(store, 1, SLOTS, shared=name)
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    with (
        fremap.open(other, page_bytes=4096) as copy,
        pytest.raises(fremap.ArgumentError, match="has slots of another store"),
    ):
        shared(copy, name)


def test_a_file_that_was_changed_is_read_anew(slots: fremap.Slots, path: Path, name: str) -> None:
    slots.ensure([0, 1])
    with slots.pin(0) as before, path.open("r+b") as file:
        file.write(b"x" * EXTENT_BYTES)
        file.flush()
        wait_until_settled(path)
        with fremap.open(path, page_bytes=4096) as again, shared(again, name) as other:
            array = other.array(np.uint8)
            assert array[other.ensure(0)[0], 0] == ord("x")
            assert array[before[0], 0] != ord("x"), "a pin is a snapshot"
            assert array[slots.ensure(0)[0], 0] == ord("x")
            del array


def other_owner(path: Path) -> None:
    """Give a file to somebody else, as root can; an ordinary user can only open it to others."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        path.chmod(0o660)


@pytest.mark.parametrize("kind", ["mode", "owner", "link", "short", "empty", "directory"])
def test_what_else_has_the_name_is_refused(
    store: fremap.FileStore, name: str, kind: str, tmp_path: Path
) -> None:
    path = named(name)
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "directory":
        path.mkdir(mode=0o700)
    else:
        path.write_bytes(b"" if kind == "empty" else b"x" * 8192)
        path.chmod(0o644 if kind == "mode" else 0o600)
        if kind == "owner":
            other_owner(path)
    reasons = {
        "mode": "may be opened by others",
        "owner": "belongs to another user" if os.geteuid() == 0 else "may be opened by others",
        "link": "symbolic link",
        "short": "holds no slots",
        "empty": "holds no slots",
        "directory": "Is a directory",
    }
    with pytest.raises(fremap.FremapError, match=reasons[kind]):
        shared(store, name)
    if kind == "directory":
        path.rmdir()
    else:
        path.unlink()


def test_no_room_for_them(store: fremap.FileStore, name: str) -> None:
    for skip in (0, 1, 2):
        full = {"errno": errno.ENOSPC, "skip": skip}
        with (
            failures("fallocate", **full) as calls,
            pytest.raises(fremap.StoreError, match="do not fit into /dev/shm") as caught,
        ):
            shared(store, name)
        assert calls["fallocate"] > skip
        assert caught.value.errno == errno.ENOSPC
        assert not named(name).exists()
    with shared(store, name) as slots:
        check(slots, [0, 1])


def test_the_last_takes_the_name_along(store: fremap.FileStore, name: str) -> None:
    first, second = shared(store, name), shared(store, name)
    first.close()
    first.close()
    assert named(name).exists()
    array = second.array(np.uint8)
    with pytest.raises(fremap.ViewsAliveError, match="still show the memory of these slots"):
        second.close()
    with second:
        place = second.ensure(1)[0]
        before = array[place].copy()
    assert second.closed
    assert not named(name).exists()
    second.close()
    assert kernel_mappings(name) == 1, "views keep the memory, whatever is closed again"
    assert (array[place] == before).all()
    for refused in (second.ensure, second.pin, second.evict):
        with pytest.raises(fremap.ClosedError):
            refused([1])
    with pytest.raises(fremap.ClosedError):
        second.array(np.uint8)


def test_a_name_that_was_removed_by_hand(store: fremap.FileStore, name: str) -> None:
    with shared(store, name) as old:
        old.ensure(0)
        named(name).unlink()
        with shared(store, name) as new:
            assert new.stats().filled_slots == 0
            check(old, [0, 1])
            old.close()
            assert named(name).exists(), "it is not that of the old slots"


# Fork and pickle.


def test_a_child_of_fork_uses_them_as_a_process_of_its_own(slots: fremap.Slots, name: str) -> None:
    pin = slots.pin([1, 2])
    words = slots.array(np.uint64, (EXTENT_PAGES, 512))

    def body(_: Callable[[], None]) -> tuple[int, list[int]]:
        pin.release()
        assert slots.stats().pinned_slots == 2, "its parent's pins are not the child's"
        assert (page_numbers(words[pin.slots[0]]) == extent(1)).all()
        kept = slots.pin([3])
        own = [one for one in _core.list_shared_slots() if one["name"] == name]
        assert kept.slots.tolist() == slots.ensure(3).tolist()
        return slots.stats().pinned_slots, own[0]["processes"]

    child = Child(body)
    pinned, processes = child.answer()
    assert pinned == 3
    assert processes == sorted([os.getpid(), child.pid])
    assert slots.stats().pinned_slots == 2
    pin.release()
    assert slots.stats().pinned_slots == 0


def test_a_child_goes_on_when_its_parent_has_closed_them(
    store: fremap.FileStore, name: str
) -> None:
    slots = shared(store, name)

    def body(pause: Callable[[], None]) -> None:
        pause()
        check(slots, [1, 2])
        slots.close()

    child = Child(body).paused()
    slots.close()
    child.go_on()
    child.answer()


def test_pickling_finds_them_by_name(slots: fremap.Slots) -> None:
    slots.ensure([1, 2])
    with pickle.loads(pickle.dumps(slots)) as again:
        assert again.shared == slots.shared
        check(again, [1, 2])
        assert again.stats() == slots.stats()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_multiprocessing(path: Path, name: str, method: str) -> None:
    """Workers that end as multiprocessing ends them leave no name, also if they are last."""
    program = Path(__file__).with_name("workers.py")
    arguments = [sys.executable, str(program), method, str(path), name]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"misses": 8, "sums": [8, 8]}


@pytest.mark.parametrize("end", ["exit", "exception", "sys.exit"])
def test_an_interpreter_that_ends_leaves_no_name(path: Path, name: str, end: str) -> None:
    last = {"exit": "", "exception": "raise SystemError", "sys.exit": "import sys; sys.exit(3)"}
    text = (
        "import fremap\n"
        f"store = fremap.open({str(path)!r}, page_bytes=4096)\n"
        f"slots = fremap.Slots(store, 2, 6, shared={name!r})\n"
        "pin = slots.pin([1, 2])\n"
        "array = slots.array('u1')\n"
        f"{last[end]}\n"
    )
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, check=False)
    assert ended.returncode == {"exit": 0, "exception": 1, "sys.exit": 3}[end], ended.stderr
