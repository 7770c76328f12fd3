"""Slots of slots: what is where, who leaves, what is pinned, what is refused, and the end."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import re
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import (
    failures,
    numbered_page,
    numbered_words,
    page_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

EXTENT_PAGES = 4
EXTENTS = 24
SLOTS = 6
TAIL_PAGES = 2  # of the last extent


@pytest.fixture
def path(settled_file: Callable[[int], Path]) -> Path:
    return settled_file((EXTENTS - 1) * EXTENT_PAGES + TAIL_PAGES)


@pytest.fixture
def store(path: Path) -> Iterator[fremap.FileStore]:
    with fremap.open(path, page_bytes=4096) as opened:
        yield opened


@pytest.fixture
def table(store: fremap.FileStore, engine: str) -> Iterator[fremap.Slots]:
    with fremap.Slots(store, EXTENT_PAGES, SLOTS, engine=engine) as made:
        yield made


def keys_of(table: fremap.Slots, wanted: Any) -> list[int]:
    """What the slots show that `ensure` says."""
    slots = table.ensure(wanted)
    return table.keys[slots].tolist()


def shown(table: fremap.Slots) -> list[int]:
    """The extent that each slot shows, by every word of it; -1 for those that are empty."""
    keys = table.keys.tolist()
    words = table.array(np.uint64, (EXTENT_PAGES, 512))
    found = []
    for slot, key in enumerate(keys):
        if key < 0:
            found.append(-1)
            continue
        pages = page_numbers(words[slot])
        first = pages[0, 0]
        behind = TAIL_PAGES if key == EXTENTS - 1 else EXTENT_PAGES
        expected = np.arange(first, first + EXTENT_PAGES)[:, None].repeat(512, axis=1)
        expected[behind:] = -1  # zeros
        assert (pages == expected).all()
        assert first % EXTENT_PAGES == 0
        found.append(int(first) // EXTENT_PAGES)
    return found


def test_what_slots_table_is(table: fremap.Slots, engine: str) -> None:
    assert (table.slot_count, table.extent_pages, table.extent_bytes) == (SLOTS, 4, 16384)
    assert (table.extent_count, table.engine, table.closed) == (EXTENTS, engine, False)
    assert table.keys.tolist() == [-1] * SLOTS
    what = f"6 slots of 16384 bytes, engine '{engine}'"
    assert repr(table) == f"<fremap.Slots, {what}, of FileStore {table.store.path!r}>"
    assert table.stats() == fremap.SlotsStats(0, 0, 0, 0, 0, 0)


def test_ensure_says_where_extents_are(table: fremap.Slots) -> None:
    slots = table.ensure([7, 3, 7, 0])
    assert slots.dtype == np.int64
    assert table.keys[slots].tolist() == [7, 3, 7, 0]
    assert shown(table) == table.keys.tolist()
    assert table.ensure(np.array([0, 7], np.int32)).tolist() == slots[[3, 0]].tolist()
    assert keys_of(table, range(3, 6)) == [3, 4, 5]
    assert table.ensure([]).shape == (0,)
    assert table.stats() == fremap.SlotsStats(
        hits=1 + 2 + 1, misses=5, evictions=0, bytes_read=5 * 16384, filled_slots=5, pinned_slots=0
    )


def test_extents_leave_for_others(table: fremap.Slots) -> None:
    random = np.random.default_rng(12)
    for _ in range(60):
        wanted = random.integers(0, EXTENTS, random.integers(0, SLOTS + 1))
        slots = table.ensure(wanted)
        assert table.keys[slots].tolist() == wanted.tolist()
        assert shown(table) == table.keys.tolist()
    stats = table.stats()
    assert stats.evictions == stats.misses - stats.filled_slots
    assert stats.bytes_read == stats.misses * 16384


def test_what_is_wanted_again_and_again_stays(store: fremap.FileStore) -> None:
    """A scan displaces few of the extents that calls name often: the windows' policy."""
    with fremap.Slots(store, 1, 20) as table:
        hot = np.arange(10)
        for _ in range(3):
            table.ensure(hot)
        for key in range(10, 90):
            table.ensure(key)
        assert len(set(table.keys.tolist()) & set(hot.tolist())) == len(hot)


def test_the_last_extent_is_zeros_behind_the_end(table: fremap.Slots) -> None:
    last = EXTENTS - 1
    for others in ([0, 1], [2, 3, 4, 5, 6], [last, 7]):
        table.ensure([last, *others])
        assert shown(table) == table.keys.tolist()
    table.ensure(range(SLOTS))
    assert shown(table) == list(table.keys)
    assert last not in table.keys


def test_one_read_for_each_stretch(table: fremap.Slots, path: Path) -> None:
    """All of a call's extents are one remap."""
    with fremap.testing.counting() as calls:
        table.ensure([5, 1, 3])
    assert calls["read"] <= 3
    assert calls["io_uring_enter"] <= 3 * EXTENT_PAGES


def test_a_slot_that_is_pinned_stays(table: fremap.Slots) -> None:
    with table.pin([9, 2, 9]) as slots:
        assert table.keys[slots].tolist() == [9, 2, 9]
        assert table.stats().pinned_slots == 2
        for key in range(10, 20):
            table.ensure(key)
            assert table.keys[slots].tolist() == [9, 2, 9]
        table.ensure([20, 21, 22, 23])
        before = table.keys.tolist(), table.stats()
        with pytest.raises(
            fremap.SlotsFullError, match=r"ensure: 5 extents .* 2 of 6 slots are pinned"
        ):
            table.ensure([0, 1, 3, 4, 5])
        with pytest.raises(
            fremap.SlotsFullError, match=r"pin: 7 extents .* 0 of 6 slots are pinned"
        ):
            table.pin([0, 1, 3, 4, 5, 9, 2])
        assert (table.keys.tolist(), table.stats()) == before
        table.ensure([9, 2, 0, 1, 3, 4])
    assert table.stats().pinned_slots == 0
    table.ensure(range(10, 16))
    assert sorted(table.keys.tolist()) == list(range(10, 16))


def test_old_names_of_pins_work_and_warn(table: fremap.Slots) -> None:
    with pytest.warns(DeprecationWarning, match=r"Slots.hold is now called pin"):
        pin = table.hold([1])
    with pin, pytest.warns(DeprecationWarning, match=r"held_slots is now called pinned_slots"):
        assert table.stats().held_slots == 1


def test_pins_add_up_and_end_when_they_are_dropped(table: fremap.Slots) -> None:
    first, second = table.pin(1), table.pin([1, 2])
    assert (first.slots == second.slots[:1]).all()
    first.release()
    first.release()
    assert table.stats().pinned_slots == 2
    table.ensure([3, 4, 5, 6])
    assert {1, 2} <= set(table.keys.tolist())
    del second
    assert table.stats().pinned_slots == 0


def test_arrays(table: fremap.Slots) -> None:
    slot = int(table.ensure(5)[0])
    whole = table.array(np.uint64)
    assert whole.shape == (SLOTS, 2048)
    assert whole.flags.c_contiguous
    assert not whole.flags.writeable
    assert table.array(np.float16, (64, -1)).shape == (SLOTS, 64, 128)
    front = table.array(np.uint8, (3, 1000))
    assert front.shape == (SLOTS, 3, 1000)
    assert front[slot].tobytes() == numbered_page(20)[:3000]
    assert np.shares_memory(front, whole)
    for shape in ((16385,), (3, 3, 4096)):
        with pytest.raises(fremap.ArgumentError, match="does not fit"):
            table.array(np.uint8, shape)
    with pytest.raises(fremap.ArgumentTypeError):
        table.array(object)


def test_a_row_of_files(path: Path, tmp_path: Path, engine: str) -> None:
    """Extents may lie in two files, elements may not."""
    second = tmp_path / "more"
    second.write_bytes(numbered_words(range(94, 100)).tobytes())
    with (
        fremap.concat([fremap.open(path), fremap.open(second)]) as row,
        fremap.Slots(row, EXTENT_PAGES, SLOTS, engine=engine) as table,
    ):
        slots = table.ensure([23, 22, 24])
        first = page_numbers(table.array(np.uint64, (EXTENT_PAGES, 512))[slots, :, 0])
        assert first.tolist() == [[92, 93, 94, 95], [88, 89, 90, 91], [96, 97, 98, 99]]
        with pytest.raises(fremap.ArgumentError, match=r"partly in .*pages and partly in .*more"):
            table.array("S12")
        assert table.array("S12", 600).shape == (SLOTS, 600)


# Which engine.


def test_extents_are_aliased_where_that_pays(store: fremap.FileStore, path: Path) -> None:
    measured = fremap.calibration.load()
    pays = dataclasses.replace(measured, alias_extent_pages=EXTENT_PAGES)
    not_yet = dataclasses.replace(measured, alias_extent_pages=EXTENT_PAGES + 1)
    with fremap.Slots(store, EXTENT_PAGES, SLOTS, calibration=pays) as table:
        assert table.engine == "alias"
    copies = fremap.Slots(store, EXTENT_PAGES, SLOTS, calibration=not_yet)
    assert copies.engine in ("paged", "eager")
    with fremap.Slots(store, EXTENT_PAGES, SLOTS, calibration=pays, budget=1 << 30) as table:
        assert table.engine == copies.engine
    with (
        fremap.open(path, page_bytes=16384) as cut,
        fremap.Slots(cut, 1, SLOTS, calibration=pays) as table,
    ):
        assert table.engine == copies.engine
    copies.close()


@pytest.mark.needs("paged")
def test_a_refusal_names_the_budget_that_is_enough(store: fremap.FileStore) -> None:
    with pytest.raises(fremap.BudgetError) as caught:
        fremap.Slots(store, 512, 8, engine="paged", budget=12 << 20)
    numbers = re.search(r"take (\d+) bytes, and page tables .* (\d+); that", str(caught.value))
    assert numbers is not None
    slots, beside = map(int, numbers.groups())
    assert slots == 8 * 512 * store.page_bytes
    fremap.Slots(store, 512, 8, engine="paged", budget=slots + beside).close()
    with pytest.raises(fremap.BudgetError):
        fremap.Slots(store, 512, 8, engine="paged", budget=slots + beside - 1)


@pytest.mark.needs("paged")
def test_a_table_keeps_to_its_budget(store: fremap.FileStore) -> None:
    with pytest.raises(fremap.BudgetError, match=r"Slots: the slots take \d+ bytes.*12582912"):
        fremap.Slots(store, 512, 8, engine="paged", budget=12 << 20)


# What is refused.


def test_arguments(store: fremap.FileStore) -> None:
    for extent_pages, slot_count in ((0, 1), (1, 0), (-1, 1), (1, 1 << 31)):
        with pytest.raises(fremap.ArgumentError):
            fremap.Slots(store, extent_pages, slot_count)
    with pytest.raises(fremap.ArgumentTypeError):
        fremap.Slots("pages", 1, 1)  # type: ignore[arg-type]
    with pytest.raises(fremap.ArgumentTypeError):
        fremap.Slots(store, 1.5, 1)  # type: ignore[arg-type]
    with pytest.raises(fremap.ArgumentError, match="engine is 'best'"):
        fremap.Slots(store, 1, 1, engine="best")  # type: ignore[arg-type]


def test_keys_outside_and_of_other_types(table: fremap.Slots) -> None:
    before = -EXTENTS - 1
    for wrong in ([0, EXTENTS], [0, before], before, EXTENTS, np.array([2**63], np.uint64)):
        outside = rf"ensure: key .* outside -{EXTENTS}\.\.{EXTENTS}$"
        with pytest.raises(fremap.PageRangeError, match=outside):
            table.ensure(wrong)
    for kind in ([1.0], [True], "ab", np.zeros(2)):
        with pytest.raises(fremap.ArgumentTypeError):
            table.ensure(kind)  # type: ignore[arg-type]
    assert table.stats().misses == 0


# Reads that fail.


def cold(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_a_file_that_is_cut(table: fremap.Slots, path: Path, engine: str) -> None:
    table.ensure(range(6))
    os.truncate(path, 10 * EXTENT_PAGES * 4096 + 4096)
    with pytest.raises(fremap.TruncatedError, match="pin: key 10 cannot be brought in") as caught:
        table.pin([12, 9, 8, 10])
    assert caught.value.filename == str(path)
    assert (caught.value.completed, caught.value.key) == (2, 10)
    keys = table.keys.tolist()
    assert {8, 9} <= set(keys)
    assert not {10, 12} & set(keys)
    assert keys.count(-1) == 2
    assert shown(table) == keys
    assert table.stats().pinned_slots == 0
    assert keys_of(table, [9, 7, 8]) == [9, 7, 8]
    assert shown(table) == table.keys.tolist()


@pytest.mark.parametrize("call", ["read", "io_uring_enter", "madvise", "mmap", "uffdio_move"])
def test_a_call_that_fails(engine: str, store: fremap.FileStore, path: Path, call: str) -> None:
    """Whatever fails: slots show what `keys` says, and the next call brings the rest."""
    for skip in range(6):
        with fremap.Slots(store, EXTENT_PAGES, SLOTS, engine=engine) as table:
            table.ensure(range(4))
            cold(path)
            wanted = [20, 8, 14, 11]
            failed = ""
            with failures(call, errno=errno.EIO, skip=skip):
                try:
                    table.ensure(wanted)
                except fremap.StoreError as error:
                    failed = str(error)
            assert not failed or "ensure: key " in failed
            assert shown(table) == table.keys.tolist()
            assert keys_of(table, wanted) == wanted
            assert shown(table) == table.keys.tolist()


class Interrupted:
    """A window that is interrupted when it has loaded extents."""

    def __init__(self, window: fremap.Window) -> None:
        self.window = window

    def _load(self, *arguments: Any) -> None:
        self.window._load(*arguments)
        raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.window, name)


def test_an_interrupted_call_leaves_its_slots_empty(table: fremap.Slots) -> None:
    table.ensure(range(5))
    window = table._memory._window  # type: ignore[union-attr]
    table._memory._window = Interrupted(window)  # type: ignore[assignment, union-attr]
    with pytest.raises(KeyboardInterrupt) as caught:
        table.pin([4, 9, 8, 7])
    assert caught.traceback  # keeps what the call had
    table._memory._window = window  # type: ignore[union-attr]
    assert table.keys.tolist().count(-1) == 3
    assert 4 in table.keys
    assert table.stats().pinned_slots == 0
    assert shown(table) == table.keys.tolist()
    assert keys_of(table, [9, 8, 7, 6, 5, 4]) == [9, 8, 7, 6, 5, 4]


@pytest.mark.parametrize("size", [40 * 4096, 200 * 4096])
def test_a_store_that_changes_its_size(
    table: fremap.Slots, store: fremap.FileStore, path: Path, size: int
) -> None:
    """Extents are those of the start; what was lost is an error, never zeros."""
    os.truncate(path, size)
    store.refresh()
    assert table.extent_count == EXTENTS
    with pytest.raises(fremap.PageRangeError):
        table.ensure(EXTENTS)
    if store.page_count < EXTENTS * EXTENT_PAGES - TAIL_PAGES:
        for lost in ([20], [3, 20], [EXTENTS - 1]):
            with pytest.raises(fremap.FremapError):
                table.ensure(lost)
    assert keys_of(table, [9, 0, 5, 1, 2, 3]) == [9, 0, 5, 1, 2, 3]
    assert shown(table) == table.keys.tolist()


# Threads.


def test_threads_that_pin_see_what_they_asked_for(table: fremap.Slots) -> None:
    words = table.array(np.uint64, (EXTENT_PAGES, 512))
    wrong: list[Any] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(120):
                wanted = random.integers(0, EXTENTS - 1, 2)
                with table.pin(wanted) as slots:
                    first = page_numbers(words[slots, :, 0])
                    if not (first == wanted[:, None] * EXTENT_PAGES + np.arange(4)).all():
                        wrong.append((wanted, first))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert table.stats().pinned_slots == 0


def test_threads_that_need_the_room_wait(store: fremap.FileStore) -> None:
    """Calls of whole tables, one after the other; nobody is refused for what others do."""
    with fremap.Slots(store, 1, 8) as table:
        failed: list[BaseException] = []

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            try:
                for _ in range(100):
                    table.ensure(random.permutation(90)[:8])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert table.stats().filled_slots == 8


# The end.


def test_closing(table: fremap.Slots) -> None:
    view = table.array(np.uint8)
    with pytest.raises(fremap.ViewsAliveError):
        table.close()
    table.ensure(1)
    pin = table.pin(2)
    del view
    table.close()
    table.close()
    assert table.closed
    pin.release()
    for call in (lambda: table.ensure(1), lambda: table.pin(1), lambda: table.array(np.uint8)):
        with pytest.raises(fremap.ClosedError):
            call()
    assert repr(table) == "<fremap.Slots, closed>"


def test_leaving_with_a_view(store: fremap.FileStore, engine: str) -> None:
    with fremap.Slots(store, EXTENT_PAGES, SLOTS, engine=engine) as table:
        slot = table.ensure(3)[0]
        view = table.array(np.uint64)
    assert table.closed
    assert page_numbers(view[slot, :1]).tolist() == [12]


def test_pickling_makes_empty_slots(table: fremap.Slots, engine: str) -> None:
    table.ensure([1, 2])
    with pickle.loads(pickle.dumps(table)) as other:
        assert (other.slot_count, other.extent_pages, other.engine) == (SLOTS, 4, engine)
        assert other.keys.tolist() == [-1] * SLOTS
        assert keys_of(other, [5, 1]) == [5, 1]
        assert shown(other) == other.keys.tolist()
    table.close()
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(table)


def test_a_child_of_fork_is_refused(
    store: fremap.FileStore, engine: str, in_child: Callable[..., int]
) -> None:
    with fremap.Slots(store, EXTENT_PAGES, SLOTS, engine=engine) as table:
        pin = table.pin([1, 2])
        words = table.array(np.uint64)

        def calls() -> None:
            for call in (
                lambda: table.ensure(1),
                lambda: table.pin(3),
                lambda: table.keys,
                table.stats,
            ):
                with pytest.raises(fremap.ForkError):
                    call()
            assert page_numbers(words[pin.slots, 0]).tolist() == [4, 8]
            pin.release()

        in_child(calls)
        assert table.stats().pinned_slots == 2
        assert keys_of(table, [5, 1]) == [5, 1]
        pin.release()


# What others write.


@pytest.fixture
def written_table(path: Path, engine: str) -> Iterator[fremap.Slots]:
    """A table on a store that the test may write."""
    with (
        fremap.open(path, "r+", page_bytes=4096) as store,
        fremap.Slots(store, EXTENT_PAGES, SLOTS, engine=engine) as made,
    ):
        yield made


def test_what_others_write_is_seen_after_evict(
    written_table: fremap.Slots, path: Path, engine: str
) -> None:
    table = written_table
    before = table.ensure([3, 1])
    words = table.array(np.uint64, (EXTENT_PAGES, 512))
    new = numbered_words(range(3 * EXTENT_PAGES, 4 * EXTENT_PAGES), generation=1)
    with path.open("r+b") as other:
        other.seek(3 * EXTENT_PAGES * 4096)
        other.write(new.tobytes())
    old = numbered_words(range(3 * EXTENT_PAGES, 4 * EXTENT_PAGES))
    expected = new if engine == "alias" else old
    np.testing.assert_array_equal(words[table.ensure(3)[0]], expected.reshape(EXTENT_PAGES, 512))
    assert table.evict([3, 3, 17]) == 1
    assert table.keys[before].tolist() == [-1, 1]
    np.testing.assert_array_equal(words[table.ensure(3)[0]], new.reshape(EXTENT_PAGES, 512))
    assert table.stats().evictions == 1


def test_evict_everything(table: fremap.Slots) -> None:
    table.ensure([5, EXTENTS - 1, 2])
    assert table.evict() == 3
    assert table.evict() == 0
    assert (table.keys == -1).all()
    assert table.stats().filled_slots == 0
    table.ensure(range(SLOTS))
    assert sorted(shown(table)) == list(range(SLOTS))


def test_what_is_pinned_is_not_evicted(table: fremap.Slots) -> None:
    with table.pin([4]):
        table.ensure([5])
        with pytest.raises(fremap.ArgumentError, match="evict: key 4 is pinned"):
            table.evict([5, 4])
        with pytest.raises(fremap.ArgumentError, match="key 4 is pinned"):
            table.evict()
        assert sorted(set(table.keys.tolist())) == [-1, 4, 5]
        assert table.evict(5) == 1
    assert table.evict(4) == 1
    with pytest.raises(fremap.PageRangeError, match="key 24"):
        table.evict(EXTENTS)


def test_evict_beside_calls_of_other_threads(table: fremap.Slots) -> None:
    """Each sees extents that are whole, whatever is evicted meanwhile."""
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            with suppress(fremap.ArgumentError):  # one is pinned now
                table.evict(range(4))

    evictor = threading.Thread(target=evict)
    evictor.start()
    try:
        words = table.array(np.uint64, (EXTENT_PAGES, 512))
        for round_number in range(200):
            key = round_number % 4
            with table.pin([key, 7]) as slots:
                first = page_numbers(words[slots]).reshape(-1)[0]
                assert first == key * EXTENT_PAGES
            table.ensure([8 + round_number % 8])
    finally:
        stop.set()
        evictor.join()
    del words
