"""Indexing rows as NumPy does: which rows an index takes, and what is done to them.

The rows of the first axis are taken, and the rest of the index is NumPy's own affair: it is
applied to the rows that were taken.
"""

from __future__ import annotations

import operator
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fremap import errors
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.rowids import as_mask, integers
from fremap.selection import Numbering

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Chosen", "choose"]


class Chosen(NamedTuple):
    """The rows to be taken, and the index to be applied to an array of them."""

    ids: Any
    rest: tuple[Any, ...] = ()

    def of(self, taken: npt.NDArray[Any]) -> Any:
        """Return what the index means, of the rows that were taken."""
        try:
            return taken[self.rest]
        except IndexError as error:
            raise ArgumentError(f"rows: {error}") from None


def choose(index: object, shape: tuple[int, ...]) -> Chosen:
    """Split an index of an array of `shape` in the rows that it needs, and the rest.

    Parameters
    ----------
    index : object
        What stands between the brackets.
    shape : tuple of int
        Of all rows together.

    Returns
    -------
    Chosen
        What to take, and what to do with it.
    """
    if not isinstance(index, tuple):
        index = (index,)
    parts = [part if _is_basic(part) else _array(part) for part in index]
    _check_limits(parts, shape)
    at, consumed = _first_axis(parts, shape)
    if at is None:  # the first axis is left whole
        return Chosen(slice(None), tuple(parts))
    part, before, after = parts[at], parts[:at], parts[at + 1 :]
    if consumed > 1:
        mask = _fitting(part, shape)
        rows = np.flatnonzero(mask.any(axis=tuple(range(1, mask.ndim))))
        return Chosen(rows, (*before, mask[rows], *after))
    if isinstance(part, slice):
        return Chosen(part, (*before, slice(None), *after))
    if isinstance(part, np.ndarray) and part.dtype == np.bool_:
        part = np.flatnonzero(_fitting(part, shape))
    if not before and all(isinstance(other, slice | EllipsisType | None) for other in after):
        axes = (slice(None),) * (part.ndim if isinstance(part, np.ndarray) else 0)
        return Chosen(part, (*axes, *after))
    # Other axes are chosen by numbers too, and NumPy pairs these with those of the rows.
    if not isinstance(part, np.ndarray):
        return Chosen([part], (*before, 0, *after))
    rows, places = np.unique(Numbering("take", "row", shape[0]).resolved(part), return_inverse=True)
    return Chosen(rows, (*before, places.reshape(part.shape), *after))


def _is_basic(part: object) -> bool:
    """Tell whether a part is no array: an int, a slice, `...` or None."""
    if isinstance(part, bool | np.bool_):
        raise ArgumentTypeError(
            f"rows[{part!r}]: a single bool chooses no rows; a mask has one bool a row"
        )
    return part is None or isinstance(part, slice | EllipsisType | int | np.integer)


def _array(part: Any) -> Any:
    """Return a part that chooses by several numbers or bools as an array."""
    mask = as_mask(part)
    if mask is not None:
        return mask
    if isinstance(part, range):
        return np.arange(part.start, part.stop, part.step)
    if hasattr(part, "__index__") and not hasattr(part, "__len__"):
        return operator.index(part)
    return integers(part)


def _first_axis(parts: list[Any], shape: tuple[int, ...]) -> tuple[int | None, int]:
    """Return which part chooses along the first axis, and along how many axes it does."""
    axes = list(map(_axes_of, parts))
    for at, part in enumerate(parts):
        if isinstance(part, EllipsisType):
            if sum(axes) < len(shape):
                return None, 0
        elif part is not None:
            return at, axes[at]
    return None, 0


def _check_limits(parts: list[Any], shape: tuple[int, ...]) -> None:
    """Refuse what is outside along the other axes, before any row is read."""
    axes = [_axes_of(part) for part in parts]
    if sum(axes) > len(shape):
        raise errors._page_range(  # noqa: SLF001 - one maker of messages
            f"rows: {sum(axes)} indexes for an array of {len(shape)} axes", sum(axes), len(shape)
        )
    if sum(isinstance(part, EllipsisType) for part in parts) > 1:
        raise ArgumentError("rows: an index may have only one ellipsis (...)")
    axis = 0
    for part, consumed in zip(parts, axes, strict=True):
        if isinstance(part, EllipsisType):
            axis = len(shape) - sum(axes) + axis
        if axis and (
            isinstance(part, int | np.integer)
            or (isinstance(part, np.ndarray) and part.dtype == np.int64)
        ):
            numbering = Numbering(f"rows, axis {axis}", "index", shape[axis])
            numbering.resolved(np.asarray(part, np.int64))
        elif axis and isinstance(part, np.ndarray):
            _fitting(part, shape, axis)
        axis += consumed


def _axes_of(part: Any) -> int:
    """Return along how many axes a part chooses."""
    if part is None or isinstance(part, EllipsisType):
        return 0
    return part.ndim if isinstance(part, np.ndarray) and part.dtype == np.bool_ else 1


def _fitting(
    mask: npt.NDArray[np.bool_], shape: tuple[int, ...], axis: int = 0
) -> npt.NDArray[np.bool_]:
    if mask.shape != shape[axis : axis + mask.ndim]:
        raise errors._page_range(  # noqa: SLF001 - one maker of messages
            f"rows: a mask of shape {mask.shape} for rows of shape {shape}; it must have one bool "
            "a row, or one for each element of the axes that it stands for",
            len(mask) if mask.ndim else 0,
            shape[axis],
        )
    return mask
