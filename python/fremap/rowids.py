"""Which rows a call means, as NumPy would understand it along the first axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np

from fremap import errors
from fremap.arguments import page_number
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.selection import Numbering

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fremap.selection import CoreSelection

__all__ = ["RowIds", "as_mask", "integers", "mask_of", "select", "select_mask"]

RowIds: TypeAlias = "SupportsIndex | slice | range | Sequence[Any] | npt.NDArray[np.integer[Any]]"

_INT64_MAX = 2**63 - 1
_INT64 = np.dtype(np.int64)


def select(ids: object, count: int) -> tuple[CoreSelection, tuple[int, ...]]:
    """Return what the core takes for `ids` of `count` rows, and their shape.

    Limits are checked in the core, save where a number does not fit into an int64.

    Parameters
    ----------
    ids : int, slice, range, sequence or array of int
        Rows; negative ones count from the end.
    count : int
        Rows that there are.

    Returns
    -------
    tuple
        The selection, and the shape of the ids.
    """
    if isinstance(ids, np.ndarray) and ids.dtype == _INT64 and ids.ndim == 1:
        return ids if ids.flags.contiguous else np.ascontiguousarray(ids), ids.shape
    numbering = Numbering("take", "row", count)
    if isinstance(ids, slice | range):
        chosen = numbering.selection(ids)
        return chosen, (numbering.count(chosen),)
    if isinstance(ids, list | tuple):
        if not len(ids):
            return (0, 0), (0,)
    elif page_number(ids) and not isinstance(ids, bool | np.bool_):
        number = numbering.index(ids)
        return (number, number + 1), ()
    array = integers(ids, count)
    return array.reshape(-1), array.shape


def integers(ids: object, count: int = _INT64_MAX) -> npt.NDArray[np.int64]:
    """Return integers as an array that the core takes. Limits are checked where they have to be.

    Parameters
    ----------
    ids : sequence or array of int
        The numbers.
    count : int
        How many things they choose of, as an error says it.

    Returns
    -------
    ndarray of int64
        C-contiguous.
    """
    if isinstance(ids, list | tuple):
        _check_types(ids)
    array = _array(ids)
    if array.dtype.kind == "f" and isinstance(ids, list | tuple):
        # All are integers: NumPy has no type for an unsigned one beside a negative one.
        return _mixed(ids, count)
    if array.dtype.kind not in "iu":
        raise _wrong_type(ids, array)
    if array.dtype.kind == "u" and array.size and int(array.max()) > _INT64_MAX:
        raise _outside(int(array.ravel()[np.argmax(array.ravel() >= np.uint64(count))]), count)
    return np.asarray(array, dtype=np.int64, order="C")


def as_mask(index: object) -> npt.NDArray[np.bool_] | None:
    """Return an index as a mask if it is one: an array, a series or a list of bools.

    Parameters
    ----------
    index : object
        What stands between the brackets.

    Returns
    -------
    ndarray of bool or None
        The mask.
    """
    if isinstance(index, list):
        if not index or not all(isinstance(part, bool | np.bool_) for part in index):
            return None
    elif getattr(index, "shape", ()) == () or not _says_bool(getattr(index, "dtype", "")):
        return None
    try:
        return np.asarray(index, dtype=np.bool_)
    except (TypeError, ValueError) as error:  # a series that lacks some
        raise ArgumentTypeError(f"rows: a mask must be all bools; {error}") from error


def _says_bool(dtype: object) -> bool:
    """Tell whether a dtype is that of bools: NumPy's, torch's, or one of pandas' three."""
    return str(dtype).removeprefix("torch.").startswith("bool")


def _mixed(ids: Sequence[Any], count: int) -> npt.NDArray[np.int64]:
    numbers = np.array(ids, dtype=object)
    for number in numbers.flat:
        if not -count <= number < count:
            raise _outside(int(number), count)
    return numbers.astype(np.int64)


def mask_of(mask: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.bool_]:
    """Return a mask that has one bool for each of `count` rows.

    Parameters
    ----------
    mask : ndarray of bool
        The mask.
    count : int
        Rows that there are.

    Returns
    -------
    ndarray of bool, shape (count,)
        The same.
    """
    if mask.shape != (count,):
        raise errors._page_range(  # noqa: SLF001 - one maker of messages
            f"rows: a mask of shape {mask.shape} for {count} rows; it must have one bool a row",
            len(mask) if mask.ndim else 0,
            count,
        )
    return mask


def select_mask(mask: npt.NDArray[np.bool_], count: int) -> tuple[CoreSelection, tuple[int, ...]]:
    """Return the rows at which `mask` is true.

    Parameters
    ----------
    mask : ndarray of bool, shape (count,)
        One for each row.
    count : int
        Rows that there are.

    Returns
    -------
    tuple
        The selection, and the shape of it.
    """
    chosen = np.flatnonzero(mask_of(mask, count))
    return chosen, chosen.shape


def _array(ids: object) -> npt.NDArray[Any]:
    try:
        return np.asarray(ids)
    except (ValueError, TypeError, OverflowError) as error:
        raise ArgumentTypeError(f"take: rows are chosen by integers; {error}") from error


def _check_types(ids: list[Any] | tuple[Any, ...]) -> None:
    """Refuse what NumPy would make an integer of, if it stands beside one."""
    for kind in set(map(type, ids)):
        if issubclass(kind, bool | np.bool_ | float | np.floating | str | bytes):
            raise ArgumentTypeError(
                f"take: a row must be an integer, not {kind.__name__}; a mask is an array of bool, "
                "as in rows[mask]"
            )
        if issubclass(kind, list | tuple):
            for part in ids:
                if isinstance(part, kind):
                    _check_types(part)


def _outside(number: int, count: int) -> errors.PageRangeError:
    return Numbering("take", "row", count).outside(number)


def _wrong_type(ids: object, array: npt.NDArray[Any]) -> errors.FremapError:
    found = f"an array of {array.dtype}" if hasattr(ids, "dtype") else f"a {type(ids).__name__}"
    if array.dtype.kind == "b":
        return ArgumentTypeError(
            f"take: rows are chosen by integers, not by {found}; for a mask, use rows[mask]"
        )
    if array.dtype.kind == "O":
        large = (
            id_ for id_ in array.flat if isinstance(id_, int) and not -1 << 63 <= id_ < 1 << 64
        )
        if (number := next(large, None)) is not None:
            return ArgumentError(f"take: {number} does not fit into 64 bits")
        if not hasattr(ids, "dtype") and array.size:
            other = (id_ for id_ in array.flat if not isinstance(id_, int))
            found += f" with a {type(next(other, ids)).__name__} in it"
    return ArgumentTypeError(
        f"take: rows are chosen by an int, a slice, a range or integers in an array, not by {found}"
    )
