"""Checks of the options of windows and other objects."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex, TypeAlias

import numpy as np

from fremap.arguments import counted, page_number, quantity
from fremap.dtypes import MAX_AXES
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.selection import Numbering
from fremap.sizes import size_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fremap.calibration import Calibration
    from fremap.stores import Store

__all__ = [
    "Advice",
    "Budget",
    "CheckedBudget",
    "Elements",
    "Engine",
    "Fault",
    "InitialMapping",
    "Shape",
    "Tracking",
    "checked_budget",
    "checked_extent",
    "chosen",
    "elements_within",
    "first_mapping",
    "measured",
]

Advice: TypeAlias = Literal["auto", "normal", "random", "sequential"]
Budget: TypeAlias = int | str | None
CheckedBudget: TypeAlias = Literal["auto"] | int | None
Engine: TypeAlias = Literal["auto", "alias", "paged", "eager"]
Fault: TypeAlias = Literal["thread", "signal"]
Tracking: TypeAlias = Literal["auto", "async", "sync"]
InitialMapping: TypeAlias = (
    "Literal['linear', 'none'] | Sequence[int] | npt.NDArray[np.integer[Any]]"
)
Shape: TypeAlias = "SupportsIndex | Sequence[SupportsIndex] | None"

_CHOICES = {
    "advice": ("auto", "normal", "random", "sequential"),
    "engine": ("auto", "alias", "paged", "eager"),
    "fault": ("thread", "signal"),
    "tracking": ("auto", "async", "sync"),
}
_ADDRESS_SPACE_BYTES = 1 << 47  # what Linux gives a process on x86-64 unless it asks for more


def chosen(
    setting: Literal["advice", "engine", "fault", "tracking"],
    value: str,
    operation: str = "Window",
) -> str:
    """Return a setting that is one of its choices."""
    if value not in _CHOICES[setting]:
        raise ArgumentError(
            f"{operation}: {setting} is {value!r}; it must be one of {_CHOICES[setting]}"
        )
    return value


def checked_extent(
    store: Store, page_count: SupportsIndex | None, first_page: SupportsIndex
) -> tuple[int | None, int]:
    """Return how many pages a window has, if that was said, and the first that it shows."""
    count = None if page_count is None else quantity("Window: page_count", page_count)
    first = quantity("Window: first_page", first_page)
    if first > store.page_count:
        raise ArgumentError(
            f"Window: first_page is {first} and the store has {counted(store.page_count, 'page')}"
        )
    if count is not None and count * store.page_bytes >= _ADDRESS_SPACE_BYTES:
        raise ArgumentError(f"Window: {count} pages do not fit into the address space")
    return count, first


def checked_budget(budget: object, operation: str = "Window") -> CheckedBudget:
    """Return a budget if it is one."""
    said = budget
    if isinstance(budget, str) and budget != "auto":
        budget = size_bytes(budget)
    elif budget is None:
        return None
    if isinstance(budget, int | np.integer) and not isinstance(budget, bool) and budget > 0:
        # More than any machine has is no limit, however it is written.
        return min(int(budget), 2**63 - 1)
    if budget == "auto":
        return "auto"
    raise ArgumentError(
        f"{operation}: budget is {said!r}; it must be a positive number of bytes, a size such as "
        '"64M", "auto" or None'
    )


def checked_size(what: str, size: SupportsIndex | str) -> int:
    """Return bytes that are given as a number, or as a text such as 64M."""
    if not isinstance(size, str):
        return quantity(what, size)
    number = size_bytes(size)
    if number is None:
        raise ArgumentError(
            f'{what} is {size!r}; it must be a number of bytes, or a size such as "64M"'
        )
    return quantity(what, number)


def first_mapping(
    mapping: object, store: Store
) -> Literal["linear", "none"] | npt.NDArray[np.int64]:
    """Return what a window shows at first, as the core takes it."""
    if isinstance(mapping, str):
        if mapping == "linear":
            return "linear"
        if mapping == "none":
            return "none"
        raise ArgumentError(
            f'Window: mapping is {mapping!r}; it must be "linear", "none" or an array of file pages'
        )
    numbering = Numbering("Window", "file page", store.page_count, least=-1)
    return numbering.array(mapping)


def measured(chosen: Calibration | None) -> dict[str, int]:
    """Return the numbers of the calibration that was given, or of the one that is kept."""
    from fremap import calibration

    return (calibration.load() if chosen is None else chosen).to_dict()


class Elements(NamedTuple):
    """Elements that lie one after another in memory."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    used_bytes: int


def elements_within(
    dtype: npt.DTypeLike, shape: Shape, available_bytes: int, *, max_axes: int = MAX_AXES
) -> Elements:
    """Return the elements of an array, if they fit into this number of bytes."""
    kind = np.dtype(dtype)
    if kind.hasobject or kind.itemsize == 0:
        raise ArgumentTypeError(f"array: elements of dtype {kind} cannot lie in a window")
    dimensions = _shape_within(shape, available_bytes // kind.itemsize)
    if len(dimensions) > max_axes:
        raise ArgumentError(f"array: shape has {len(dimensions)} axes; {max_axes} at most can be")
    return Elements(kind, dimensions, math.prod(dimensions) * kind.itemsize)


def _shape_within(shape: Shape, available: int) -> tuple[int, ...]:
    """Return `shape` with -1 filled in, if it fits into `available` elements."""
    if shape is None:
        return (available,)
    try:
        given = (shape,) if page_number(shape) else tuple(shape)  # type: ignore[arg-type]
        dimensions = [operator.index(length) for length in given]
    except TypeError:
        raise ArgumentTypeError(
            f"array: shape must be an integer or integers, not {shape!r}"
        ) from None
    if dimensions.count(-1) > 1 or any(length < -1 for length in dimensions):
        raise ArgumentError(f"array: shape {shape} is impossible; one dimension may be -1")
    if -1 in dimensions:
        others = -math.prod(dimensions)
        if others == 0:
            raise ArgumentError(f"array: shape {shape} is ambiguous")
        dimensions[dimensions.index(-1)] = available // others
    if math.prod(dimensions) > available:
        raise ArgumentError(f"array: shape {shape} does not fit; {available} elements do")
    return tuple(dimensions)
