"""Which pages, keys or rows a call means.

Users name them by None (all), an int, a slice, a range or integers in an array or list;
negative numbers count from the end. The core wants None, a run ``(start, stop)``, or an
array of int64. Runs are never spelt out as arrays. The core checks arrays, and counts their
negative numbers from the end; ints and ranges are checked here, with the same error.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np

from fremap import errors
from fremap.arguments import page_number
from fremap.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = ["PageSelection"]

PageSelection: TypeAlias = (
    "SupportsIndex | slice | range | Sequence[int] | npt.NDArray[np.integer[Any]] | None"
)
"""What names pages: None (all), an int, a slice, a range, integers."""

CoreSelection: TypeAlias = "tuple[int, int] | npt.NDArray[np.int64] | None"

_INT64_MAX = 2**63 - 1


class Numbering:
    """Turns what users write into what the core takes, for one coordinate.

    Parameters
    ----------
    operation : str
        The operation, as messages name it.
    coordinate : str
        What is numbered: "file page", "window page", "key" or "row".
    limit : int
        How many there are.
    least : int, optional
        The least number that means something: ``-limit``, which counts from the end, if not
        given.
    """

    __slots__ = ("coordinate", "least", "limit", "operation")

    def __init__(
        self, operation: str, coordinate: str, limit: int, least: int | None = None
    ) -> None:
        self.operation = operation
        self.coordinate = coordinate
        self.limit = limit
        self.least = -limit if least is None else least

    def outside(self, index: int) -> errors.PageRangeError:
        """Make the error for an index that names nothing."""
        where = f"{self.least}..{self.limit}"
        message = f"{self.operation}: {self.coordinate} {index} is outside {where}"
        return errors._page_range(message, index, self.limit)  # noqa: SLF001 - one maker

    def wrong_type(self, found: object) -> ArgumentTypeError:
        """Make the error for something that names no pages."""
        things = self.coordinate.rpartition(" ")[2] + "s"
        return ArgumentTypeError(
            f"{self.operation}: a {self.coordinate} must be an integer; {things} are chosen by "
            f"None, an int, a slice, a range or integers in an array, not by {found}"
        )

    def selection(self, pages: PageSelection) -> CoreSelection:
        """Return what the core takes for `pages`."""
        if pages is None:
            return None
        if isinstance(pages, slice):
            return self._slice(pages)
        if isinstance(pages, range):
            return self._range(pages)
        if isinstance(pages, bool | np.bool_):
            raise self.wrong_type("a bool")
        if page_number(pages):
            page = self.index(pages)
            return page, page + 1
        return self.array(pages)

    def count(self, pages: CoreSelection) -> int:
        """Return how many pages a selection names, repeats counted."""
        if pages is None:
            return self.limit
        if isinstance(pages, tuple):
            return max(0, pages[1] - pages[0])
        return len(pages)

    def index(self, page: SupportsIndex) -> int:
        """Return one page, counted from the front."""
        if isinstance(page, bool | np.bool_):
            raise self.wrong_type("a bool")
        try:
            number = operator.index(page)
        except TypeError:
            raise self.wrong_type(_describe(page)) from None
        if not self.has(number):
            raise self.outside(number)
        return number + self.limit if number < 0 else number

    def has(self, number: int) -> bool:
        """Tell whether a number names something, from the front or from the end."""
        return self.least <= number < self.limit

    def resolved(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return numbers counted from the front, for those that the core does not see."""
        outside = (numbers < -self.limit) | (numbers >= self.limit)
        if outside.any():
            raise self.outside(int(numbers.ravel()[np.argmax(outside)]))
        return np.where(numbers < 0, numbers + self.limit, numbers)

    def array(self, pages: object) -> npt.NDArray[np.int64]:
        """Return integers of any kind as a contiguous array of int64."""
        if isinstance(pages, list | tuple):
            return self._sequence(pages)
        values = np.asarray(pages)
        if values.dtype.kind not in "iu":
            raise self.wrong_type(_describe(pages))
        if values.ndim > 1:
            raise ArgumentError(
                f"{self.operation}: an array of {self.coordinate}s must have one dimension, "
                f"this one has {values.ndim}"
            )
        if values.ndim == 0:
            values = values.reshape(1)
        if values.dtype.kind == "u" and values.dtype.itemsize == 8:
            self._refuse_beyond_int64(values)
        return np.ascontiguousarray(values, dtype=np.int64)

    def _refuse_beyond_int64(self, values: npt.NDArray[Any]) -> None:
        if len(values) and int(values.max()) > _INT64_MAX:
            # Another page may be outside before it; the first one is named.
            first = int(np.argmax(values >= np.uint64(self.limit)))
            raise self.outside(int(values[first]))

    def _slice(self, pages: slice) -> CoreSelection:
        try:
            start, stop, step = pages.indices(self.limit)
        except TypeError:
            raise self.wrong_type("a slice of something else") from None
        if step == 1:
            return start, max(start, stop)
        return np.arange(start, stop, step, dtype=np.int64)

    def _range(self, pages: range) -> CoreSelection:
        if not pages:
            return 0, 0
        if not self.has(pages[0]):
            raise self.outside(pages[0])
        if not self.has(pages[-1]):
            raise self.outside(self._first_outside(pages))
        if pages.step == 1 and (pages[0] >= 0 or pages[-1] < 0):
            start = self.index(pages[0])
            return start, start + len(pages)
        return np.arange(pages.start, pages.stop, pages.step, dtype=np.int64)

    def _first_outside(self, pages: range) -> int:
        """Return the first member that names nothing, of a range that begins within."""
        if pages.step > 0:
            steps = -(-(self.limit - pages.start) // pages.step)
        else:
            steps = (pages.start + self.limit) // -pages.step + 1
        return pages.start + steps * pages.step

    def _sequence(self, pages: list[Any] | tuple[Any, ...]) -> npt.NDArray[np.int64]:
        # NumPy makes 1 of True and 2 of 2.0 where a list mixes them, so types come first.
        for kind in set(map(type, pages)):
            if kind is bool or not issubclass(kind, int | np.integer):
                raise self.wrong_type(f"a {kind.__name__} in a {type(pages).__name__}")
        try:
            return np.array(pages, dtype=np.int64)
        except OverflowError:
            first = next(int(page) for page in pages if not self.has(int(page)))
            raise self.outside(first) from None


def plain_run(pages: object) -> tuple[int, int] | None:
    """Return the pages that an int or a rising range names, None for anything else."""
    if type(pages) is int:
        return (pages, pages + 1) if 0 <= pages < _INT64_MAX else None
    if type(pages) is range and pages.step == 1 and 0 <= pages.start <= pages.stop <= _INT64_MAX:
        return pages.start, pages.stop
    return None


def _describe(found: object) -> str:
    if isinstance(found, np.ndarray):
        return f"an array of {found.dtype}"
    return f"a {type(found).__name__}"
