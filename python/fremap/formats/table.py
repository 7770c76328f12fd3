"""Reading the header of a file, and checking what it says."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from fremap.dtypes import MAX_AXES
from fremap.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

__all__ = ["LFS_POINTER", "Description", "Header", "Table", "is_lfs_pointer", "shown"]

#: What is wrong with a file of which `is_lfs_pointer` is true.
LFS_POINTER = "it is a Git LFS pointer, not the file that it stands for: run `git lfs pull`"
_LFS_BEGINS = b"version https://git-lfs"

_MAX_ITEM_BYTES = 2**31 - 1
# Characters of an error's text, and of a value in it: a header may be megabytes long.
_MAX_TEXT = 600
_MAX_SHOWN = 120


def is_lfs_pointer(front: bytes) -> bool:
    """Whether a file that begins with `front` seems to be a pointer of Git LFS.

    Parameters
    ----------
    front : bytes
        What the file begins with; a few bytes are enough.

    Returns
    -------
    bool
        True also for a beginning of a pointer.
    """
    return bool(front) and _LFS_BEGINS.startswith(front[: len(_LFS_BEGINS)])


def shown(value: object) -> str:
    """Return what a header says as it is shown in an error: not more than fits there.

    Parameters
    ----------
    value : object
        Of JSON, or a Python literal.

    Returns
    -------
    str
        One line.
    """
    import reprlib  # `import fremap` does without it

    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _MAX_SHOWN
    try:
        text = short.repr(value)
    except ValueError:  # a number with more digits than Python writes down
        text = f"a {type(value).__name__} with a number too long to print"
    return _cut(text, _MAX_SHOWN)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


class Table(NamedTuple):
    """An array in a file: C order, one piece.

    Attributes
    ----------
    dtype : dtype
        Of its elements, or of as many bytes where NumPy has none for them.
    dtype_name : str
        What they really are.
    shape : tuple of int
        Its shape; the rows are along the first axis.
    data_offset : int
        Byte of the file where it begins.
    name : str
        What the file calls it; empty where it has one array only.
    """

    dtype: np.dtype
    dtype_name: str
    shape: tuple[int, ...]
    data_offset: int
    name: str = ""


class Description(NamedTuple):
    """What a file says of an array in it, of any type.

    Attributes
    ----------
    name : str
        What the file calls it; empty where it has one array only.
    dtype_name : str
        What its elements are; what the file says, where that is not known here.
    shape : tuple of int
        Its shape.
    data_offset : int or None
        Byte of the file where it begins; None where it is in several pieces.
    data_bytes : int
        Its bytes.
    """

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    data_offset: int | None
    data_bytes: int


class Header:
    """The front of a file.

    Attributes
    ----------
    name : str
        What messages call it.
    size : int
        Its bytes.
    operation : str
        What the caller asked for.
    front : bytes
        What is known of it: some of its first bytes, or none.
    fetch : callable, optional
        Returns bytes by their offset and number, where there is no descriptor.
    """

    __slots__ = ("_descriptor", "fetch", "front", "name", "operation", "size")

    def __init__(
        self,
        descriptor: int | Callable[[], int],
        name: str,
        size: int,
        operation: str = "rows",
        front: bytes = b"",
        fetch: Callable[[int, int], bytes] | None = None,
    ) -> None:
        self._descriptor = descriptor
        self.name = name
        self.size = size
        self.operation = operation
        self.front = front
        self.fetch = fetch

    @property
    def fd(self) -> int:
        """Its descriptor; the file is opened for it if it is not open."""
        if not isinstance(self._descriptor, int):
            self._descriptor = self._descriptor()
        return self._descriptor

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset`, which are in the file."""
        if offset + count > self.size:
            raise self.wrong(
                f"its header takes {offset + count} bytes, the file has {self.size}: "
                "it is truncated, or is something else"
            )
        if offset + count <= len(self.front):
            return self.front[offset : offset + count]
        if self.fetch is not None:
            return self.fetch(offset, count)
        parts = []
        while count:
            part = os.pread(self.fd, count, offset)
            if not part:
                raise self.wrong("it became shorter while its header was read")
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts)

    def wrong(self, what: str) -> FormatError:
        """Make the error of this file."""
        return FormatError(f"{self.operation}: {self.name}: {_cut(what, _MAX_TEXT)}")

    def checked_shape(self, shape: object) -> tuple[int, ...]:
        """Return a shape that a header gives, if it is one."""
        if isinstance(shape, list | tuple) and len(shape) > MAX_AXES:
            raise self.wrong(
                f"its header says the shape has {len(shape)} axes; NumPy has {MAX_AXES} at most"
            )
        if not isinstance(shape, list | tuple) or not all(
            isinstance(length, int) and not isinstance(length, bool) and length >= 0
            for length in shape
        ):
            raise self.wrong(f"its header says the shape is {shown(shape)}, which is not a shape")
        if any(length > sys.maxsize for length in shape):
            raise self.wrong(
                f"its header says the shape is {shown(shape)}, which no memory has: "
                "it is truncated, or is something else"
            )
        return tuple(shape)

    def checked_dtype(self, dtype: np.dtype) -> np.dtype:
        """Return a dtype of bytes."""
        if dtype.hasobject:
            raise self.wrong("it holds Python objects, which have no bytes to be mapped")
        if dtype.subdtype is not None:
            base, shape = dtype.subdtype
            raise self.wrong(
                f"its elements are arrays of {base} with shape {shape}; say dtype={base} and give "
                "that shape by row_shape="
            )
        if not 0 < dtype.itemsize <= _MAX_ITEM_BYTES:
            raise self.wrong(f"its elements have {dtype.itemsize} bytes")
        return dtype

    def check_data(self, table: Table) -> Table:
        """Return a table whose data is in the file, and has rows."""
        if not table.shape:
            raise self.wrong("it holds a single number (no axis), so it has no rows")
        row_bytes = table.dtype.itemsize * math.prod(table.shape[1:])
        if max(row_bytes, table.shape[0]) > sys.maxsize:
            raise self.wrong(
                f"its header says the shape is {shown(table.shape)}, which no memory has"
            )
        self.check_length(table.data_offset, row_bytes * table.shape[0])
        return table

    def check_length(self, data_offset: int, data_bytes: int) -> None:
        """Fail for a file that is shorter than its header says."""
        if data_offset + data_bytes > self.size:
            raise self.wrong(
                f"its header says {data_bytes} bytes of data from byte {data_offset} on, "
                f"the file has {self.size}: it is truncated"
            )
