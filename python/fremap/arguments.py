"""Checks of arguments that stores and windows share."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from fremap.errors import ArgumentError, PageTypeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# NumPy's own types say only from Python 3.12 on that arrays are buffers.
BufferLike: TypeAlias = "Buffer | npt.NDArray[Any]"

_INT64_MAX = 2**63 - 1


def page_number(pages: object) -> TypeGuard[SupportsIndex]:
    """Tell whether `pages` is one number, not a sequence (some of which claim an index too)."""
    return isinstance(pages, int | np.integer) or (
        hasattr(pages, "__index__") and not hasattr(pages, "__len__")
    )


def quantity(what: str, value: SupportsIndex) -> int:
    """Return a count, size or position as an int that the core can take."""
    if isinstance(value, bool | np.bool_):
        raise PageTypeError(f"{what} must be an integer, not a bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise PageTypeError(f"{what} must be an integer, not {type(value).__name__}") from None
    if not 0 <= number <= _INT64_MAX:
        raise ArgumentError(f"{what} is {number}; it must be from 0 to 2**63 - 1")
    return number


def bytes_of(operation: str, data: BufferLike, sizes: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return `data` as flat uint8, without a copy where that can be; its size is one of `sizes`."""
    array = _array(operation, data)
    if array.dtype.hasobject:
        raise PageTypeError(f"{operation}: data must be bytes or numbers, not Python objects")
    flat: npt.NDArray[np.uint8] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if len(flat) not in sizes:
        wanted = " or ".join(str(size) for size in dict.fromkeys(sizes))
        raise ArgumentError(f"{operation}: data has {len(flat)} bytes; it must have {wanted}")
    return flat


def _array(operation: str, data: Any) -> npt.NDArray[Any]:
    if hasattr(data, "__array__"):
        return np.asarray(data)
    try:
        view = memoryview(data)
    except TypeError:
        raise PageTypeError(
            f"{operation}: data must be a buffer or an array, not {type(data).__name__}"
        ) from None
    return np.asarray(view)
