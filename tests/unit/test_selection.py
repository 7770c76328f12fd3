"""Every way to name pages, and every way to name them wrongly."""

import array
from pathlib import Path
from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
from fremap import ArgumentError, ArgumentTypeError, PageRangeError
from fremap.selection import Numbering

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.any_user

LIMIT = 100


def select(pages: object) -> object:
    selection = Numbering("read", "file page", LIMIT).selection(pages)
    return selection.tolist() if isinstance(selection, np.ndarray) else selection


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        (None, None),
        (5, (5, 6)),
        (np.uint8(5), (5, 6)),
        (-1, (99, 100)),
        (np.int8(-100), (0, 1)),
        (np.array(7), [7]),
        (slice(None), (0, 100)),
        (slice(-10, None), (90, 100)),
        (slice(10, 500), (10, 100)),
        (slice(50, 10), (50, 50)),
        (slice(1, 8, 3), [1, 4, 7]),
        (slice(None, None, -50), [99, 49]),
        (range(3, 9), (3, 9)),
        (range(0), (0, 0)),
        (range(50, 50), (0, 0)),
        (range(9, 3, -2), [9, 7, 5]),
        (range(-100, 0), (0, 100)),
        (range(-3, -1), (97, 99)),
        (range(-2, 2), [-2, -1, 0, 1]),
        (range(1, -3, -1), [1, 0, -1, -2]),
        ([0, -1, -100], [0, -1, -100]),
        (np.array([-1, 5], dtype=np.int16), [-1, 5]),
        (range(5, 6, 1000), [5]),
        ([3, 1, 3], [3, 1, 3]),
        ((2, 4), [2, 4]),
        ([], []),
        ([np.int16(1), 2], [1, 2]),
        (np.array([1, 2], dtype=np.uint64), [1, 2]),
        (np.array([1, 2], dtype=">i4"), [1, 2]),
        (np.arange(10)[::3], [0, 3, 6, 9]),
        (array.array("H", [9, 8]), [9, 8]),
        (np.zeros(0, dtype=np.int8), []),
    ],
)
def test_what_names_pages(pages: object, expected: object) -> None:
    assert select(pages) == expected


def test_runs_are_not_spelt_out() -> None:
    assert Numbering("read", "file page", 1 << 60).selection(range(1 << 60)) == (0, 1 << 60)


def test_int64_arrays_are_not_copied() -> None:
    pages = np.arange(3)
    assert Numbering("read", "file page", LIMIT).selection(pages) is pages


@pytest.mark.parametrize(
    ("pages", "first_bad"),
    [
        (-101, -101),
        (100, 100),
        (10**30, 10**30),
        (np.uint64(2**63 + 5), 2**63 + 5),
        (range(-103, 5), -103),
        (range(-3, 105), 100),
        (range(90, 120), 100),
        (range(90, 10**30), 100),
        (range(10**30, 10**30 + 5), 10**30),
        (range(90, 120, 7), 104),
        (range(0, 10**15, 2), 100),
        (range(5, -105, -1), -101),
        (range(4, -109, -4), -104),
        ([1, -1, 10**30, -101], 10**30),
        ([1, -101, 10**30], -101),
        ([1, -(10**30)], -(10**30)),
        (np.array([3, 2**63, 200], dtype=np.uint64), 2**63),
        (np.array([3, 200, 2**63], dtype=np.uint64), 200),
        ([np.uint64(2**63 + 1)], 2**63 + 1),
    ],
)
def test_beyond_the_limit_names_the_first_bad_one(pages: object, first_bad: int) -> None:
    with pytest.raises(
        PageRangeError, match=rf"^read: file page {first_bad} is outside -100\.\.100$"
    ) as raised:
        select(pages)
    assert raised.value.index == first_bad
    assert raised.value.limit == LIMIT
    assert isinstance(raised.value, IndexError)


@pytest.mark.parametrize(
    "pages",
    [
        True,
        np.True_,
        1.0,
        np.float32(1),
        "12",
        b"\x01",
        object(),
        {1, 2},
        [True, 2],
        [1, 2.0],
        [[1], [2]],
        ["1"],
        [None],
        np.array([True, False]),
        np.array([1.0]),
        np.zeros(0),
        np.array([None]),
        slice("a", None),
        slice(1.5, None),
    ],
)
def test_what_names_no_pages_is_a_type_error(pages: object) -> None:
    with pytest.raises(ArgumentTypeError) as raised:
        select(pages)
    assert isinstance(raised.value, TypeError)


def test_arrays_of_two_dimensions_are_refused() -> None:
    with pytest.raises(ArgumentError, match="one dimension"):
        select(np.zeros((2, 2), dtype=np.int64))


@pytest.mark.parametrize(
    "pages",
    [-1, [-1], np.array([-1]), np.array([-1], dtype=np.int16), range(-1, 0), slice(-1, None)],
)
def test_negative_numbers_count_from_the_end_everywhere(pages: object, engine: str) -> None:
    """In each call that takes a selection, of a store, a window, slots and rows alike."""
    content = np.repeat(np.arange(8, dtype=np.uint8), 4096)
    last = bytes([9]) * 4096
    with fremap.MemoryStore(8 * 4096, page_bytes=4096) as store:
        store.write(None, content)
        assert store.read(pages)[0, 0] == 7
        assert store.resident(pages).tolist() == [True]
        store.prefetch(pages)
        with fremap.Window(store, 4, engine=engine) as window:
            assert window.remap(pages, at=pages).tolist() == [True]
            assert window.mapping.tolist() == [0, 1, 2, 7]
            assert window.populate(pages).tolist() == [True]
            window.evict(pages)
            window.place(pages, last)
            assert window.mapping[-1] == -2
            window.protect(pages, fremap.Prot.NONE)
            assert window.protection().tolist() == [1, 1, 1, 0]
            window.flush(pages)
        with fremap.Slots(store, 2, 2, engine=engine) as slots:
            slot = slots.ensure(pages)
            assert slots.keys[slot].tolist() == [3]
            with slots.pin(pages) as pinned:
                assert pinned.tolist() == slot.tolist()
            assert slots.evict(pages) == 1
        with fremap.rows(store, np.uint8, 4096) as rows:
            assert rows.take(pages).reshape(-1)[0] == 7
        store.write(pages, last)
        assert store.read(7)[0, 0] == 9


def test_a_part_of_a_window_is_asked_about(engine: str) -> None:
    """In the order of the selection, repeats and all."""
    with (
        fremap.MemoryStore(2048 * 4096, page_bytes=4096) as store,
        fremap.Window(
            store, engine=engine, prot=fremap.Prot.WRITE, coherent=engine == "alias"
        ) as window,
    ):
        window.populate([3, 1500, 1501])
        window.place(7, bytes(4096))
        window.protect([9, 1600], fremap.Prot.NONE)
        chosen = [-1, 1501, 3, 9, 3, 1500, 7, 1600]
        array = np.array(chosen)
        for pages in (None, slice(1490, 1510), range(0, 2048, 3), chosen, -548, [], range(5, 5)):
            of = slice(None) if pages is None else [pages] if isinstance(pages, int) else pages
            of = np.array(of, dtype=np.int64) if isinstance(of, list | range) else of
            for ask in (window.present, window.protection, window.pinned):
                assert ask(pages).tolist() == ask()[of].tolist()
        assert window.present(array)[[1, 2, 4, 5, 6]].all()
        assert window.protection(array).tolist() == [3, 3, 3, 0, 3, 3, 3, 0]
        if engine == "alias":
            return
        window.populate(range(1490, 1510))
        window.pages[[3, 1500], 0] = 1
        assert window.dirty(array).tolist() == [p in (3, 1500) for p in chosen]
        assert np.flatnonzero(window.dirty(slice(1490, 1510))).tolist() == [10]
        assert np.flatnonzero(window.dirty()).tolist() == [3, 1500]
        assert window.dirty([]).shape == (0,)


def test_what_is_left_out_means_all(engine: str) -> None:
    with (
        fremap.MemoryStore(8 * 4096, page_bytes=4096) as store,
        fremap.Window(store, engine=engine, populate=True) as window,
    ):
        store.prefetch()
        assert window.present().all()
        window.evict()
        assert not window.present().any()


@pytest.mark.needs("paged")
def test_pinned_pages_are_named() -> None:
    with fremap.MemoryStore(8 * 4096) as store, fremap.Window(store, engine="paged") as window:
        with window.pin([1, -1]):
            assert np.flatnonzero(window.pinned()).tolist() == [1, 7]
            assert window.pinned([-1, 0, 1]).tolist() == [True, False, True]
        assert not window.pinned().any()


@pytest.mark.needs("paged")
def test_negative_numbers_are_pinned_from_the_end() -> None:
    with fremap.MemoryStore(8 * 4096) as store, fremap.Window(store, engine="paged") as window:
        with window.pin([-1, -8]):
            assert np.flatnonzero(window.present()).tolist() == [0, 7]
        assert window.stats().pinned_pages == 0


def test_one_text_says_that_a_number_is_outside(engine: str, tmp_path: Path) -> None:
    """Whether the core or Python finds out, whatever is numbered, in the same words."""
    np.zeros(8).tofile(tmp_path / "rows")
    with (
        fremap.MemoryStore(8 * 4096, page_bytes=4096) as store,
        fremap.Window(store, engine=engine) as window,
        fremap.Slots(store, 1, 2, engine=engine) as slots,
        fremap.rows(tmp_path / "rows", np.float64) as rows,
    ):
        memmap = fremap.memmap(tmp_path / "rows", np.float64, "r")
        calls: dict[str, Callable[[object], object]] = {
            "read: file page": store.read,
            "populate: window page": window.populate,
            "ensure: key": slots.ensure,  # type: ignore[dict-item]
            "take: row": rows.take,  # type: ignore[dict-item]
            "populate: row": lambda pages: memmap.populate(pages),
            "batches: row": lambda pages: rows.batches(1, np.atleast_1d(pages)),
        }
        for what, call in calls.items():
            for number in (8, -9):
                for spelt in (number, np.array([0, number])):
                    with pytest.raises(PageRangeError) as raised:
                        call(spelt)
                    assert str(raised.value) == f"{what} {number} is outside -8..8"
                    assert (raised.value.index, raised.value.limit) == (number, 8)
    with fremap.MemoryStore(8 * 4096, page_bytes=4096) as store:
        for mapping in ([-2], [1 << 70]):
            with pytest.raises(
                PageRangeError, match=rf"file page {mapping[0]} is outside -1\.\.8$"
            ):
                fremap.Window(store, mapping=mapping)
