"""Every way to name pages, and every way to name them wrongly."""

import array

import numpy as np
import pytest
from fremap import ArgumentError, ArgumentTypeError, PageRangeError
from fremap.selection import Numbering

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
        (-1, -1),
        (100, 100),
        (10**30, 10**30),
        (np.uint64(2**63 + 5), 2**63 + 5),
        (range(-3, 5), -3),
        (range(90, 120), 100),
        (range(90, 10**30), 100),
        (range(10**30, 10**30 + 5), 10**30),
        (range(90, 120, 7), 104),
        (range(0, 10**15, 2), 100),
        (range(5, -5, -1), -1),
        (range(4, -9, -4), -4),
        ([1, 10**30, -1], 10**30),
        ([1, -1, 10**30], -1),
        (np.array([3, 2**63, 200], dtype=np.uint64), 2**63),
        (np.array([3, 200, 2**63], dtype=np.uint64), 200),
        ([np.uint64(2**63 + 1)], 2**63 + 1),
    ],
)
def test_beyond_the_limit_names_the_first_bad_one(pages: object, first_bad: int) -> None:
    with pytest.raises(PageRangeError, match=rf"^read: file page {first_bad} is outside") as raised:
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
