"""Indexes of any kind, as NumPy has them for an array of all rows."""

import tempfile
from collections.abc import Iterator
from typing import Any

import fremap
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays_of

pytestmark = pytest.mark.any_user

SHAPE = (11, 4, 3)
TABLE = np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE)


@pytest.fixture(scope="module")
def rows() -> Iterator[fremap.Rows]:
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file.name, TABLE)
        with fremap.rows(file.name) as rows:
            yield rows


@some.composite
def parts(draw: some.DrawFn, length: int) -> Any:
    numbers = some.integers(-length, length - 1)
    return draw(
        some.one_of(
            numbers,
            some.slices(length),
            some.just(slice(None)),
            some.lists(numbers, min_size=1, max_size=3),
            arrays_of.arrays(np.int16, some.sampled_from([(1,), (2,), (2, 2)]), elements=numbers),
            arrays_of.arrays(np.bool_, length),
        )
    )


@some.composite
def indexes(draw: some.DrawFn) -> tuple[Any, ...]:
    """Parts for some axes, `...` or none among them, and new axes."""
    count = draw(some.integers(0, 3))
    chosen: list[Any] = [draw(parts(SHAPE[axis])) for axis in range(count)]
    if draw(some.booleans()):
        at = draw(some.integers(0, count))
        chosen = [
            *(draw(parts(SHAPE[axis])) for axis in range(at)),
            ...,
            *(draw(parts(SHAPE[3 - count + axis])) for axis in range(at, count)),
        ]
    for _ in range(draw(some.integers(0, 2))):
        chosen.insert(draw(some.integers(0, len(chosen))), None)
    return tuple(chosen)


@given(index=indexes())
def test_as_numpy_has_it(rows: fremap.Rows, index: tuple[Any, ...]) -> None:
    try:
        expected = TABLE[index]
    except IndexError:  # arrays that do not fit one another
        with pytest.raises(fremap.FremapError):
            rows[index]
        return
    found = rows[index]
    assert type(found) is type(expected)
    np.testing.assert_array_equal(found, expected)


@given(mask=arrays_of.arrays(np.bool_, SHAPE[:2]), index=parts(3))
def test_masks_of_more_than_one_axis(rows: fremap.Rows, mask: np.ndarray, index: Any) -> None:
    np.testing.assert_array_equal(rows[mask], TABLE[mask])
    assert rows[(mask,)].shape == TABLE[mask].shape
    if isinstance(index, int | slice):
        np.testing.assert_array_equal(rows[mask, index], TABLE[mask, index])


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        ((0, 4), IndexError, "axis 1: index 4 is outside -4..4"),
        ((..., -4), IndexError, "axis 2: index -4 is outside -3..3"),
        ((0, [1, 9]), IndexError, "axis 1: index 9 is outside -4..4"),
        ((11, 0), IndexError, "row 11 is outside -11..11"),
        (([3, 12], [0, 1]), IndexError, "row 12 is outside -11..11"),
        ((0, 0, 0, 0), IndexError, "4 indexes for an array of 3 axes"),
        ((0, 1.0), TypeError, "not by a float"),
        ((True, 1), TypeError, "a single bool chooses no rows"),
        (([0, 1], [0, 1, 2]), ValueError, "shape mismatch"),
        ((np.ones((11, 3), bool),), IndexError, r"a mask of shape (11, 3)"),
        ((..., ..., 0), ValueError, "one ellipsis"),
        ((0, [True, False]), IndexError, r"a mask of shape (2,)"),
        ((..., np.ones(4, bool)), IndexError, r"a mask of shape (4,)"),
    ],
)
def test_what_is_no_index(rows: fremap.Rows, index: Any, error: type[Exception], text: str) -> None:
    before = rows.stats().takes
    with pytest.raises(error) as caught:
        rows[index]
    assert text in str(caught.value)
    assert isinstance(caught.value, fremap.FremapError)
    if "shape mismatch" not in text:
        assert rows.stats().takes == before  # told before anything is read
