"""NumPy's own files, versions 1.0 to 3.0."""

from __future__ import annotations

import ast
import io
import math
import re
import struct
import tokenize
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy_format

from fremap.formats.table import LFS_POINTER, Description, Table, is_lfs_pointer, shown

if TYPE_CHECKING:
    from fremap.formats.table import Header

__all__ = ["MAGIC", "described", "description", "table"]

MAGIC = b"\x93NUMPY"
# NumPy itself stops at 10 000, unless told otherwise; long lists of fields take more.
_MAX_HEADER_BYTES = 1 << 20
# What NumPy writes for numbers; of ten thousand files each other way to read it takes a second.
_LENGTH = rb"(?:0|[1-9]\d{0,17})"
_PLAIN = re.compile(
    rb"\{'descr': '([<>|][biufc]\d{1,2})', 'fortran_order': (True|False), 'shape': \("
    rb"((?:%b,)?|%b(?:, %b)+)\), \} *\n?" % (_LENGTH, _LENGTH, _LENGTH)
)
# What reading a header that is none can raise: the last two of a text nested too deep.
_MISREAD = (
    ValueError, SyntaxError, TypeError, KeyError, tokenize.TokenError, MemoryError, RecursionError,
)  # fmt: skip


def table(header: Header) -> Table:
    """Read the header of an .npy file.

    Parameters
    ----------
    header : Header
        The file.

    Returns
    -------
    Table
        Where the array is.
    """
    checked, fortran, dtype, data_offset = described(header)
    if fortran and sum(length > 1 for length in checked) > 1:
        raise header.wrong(
            f"its array of shape {shown(checked)} is in Fortran order, so its rows are not "
            "contiguous; save np.ascontiguousarray(array) instead"
        )
    dtype = header.checked_dtype(dtype)
    return header.check_data(Table(dtype, dtype.name, checked, data_offset))


def description(header: Header) -> Description:
    """Read what the array of an .npy file is, whether it has rows or not.

    Parameters
    ----------
    header : Header
        The file.

    Returns
    -------
    Description
        The array.
    """
    shape, _, dtype, data_offset = described(header)
    data_bytes = min(math.prod(shape) * dtype.itemsize, header.size - data_offset)
    return Description("", dtype.name, shape, data_offset, data_bytes)


def described(header: Header) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Read what the header of an .npy file says.

    Parameters
    ----------
    header : Header
        The file.

    Returns
    -------
    tuple
        The shape, whether it is in Fortran order, the type of the elements, and the byte at
        which they begin.
    """
    front = header.read(0, len(MAGIC) + 2)
    if is_lfs_pointer(front):
        raise header.wrong(LFS_POINTER)
    if not front.startswith(MAGIC):
        raise header.wrong("it does not begin like an .npy file")
    version = (front[-2], front[-1])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise header.wrong(f"it is an .npy file of version {version[0]}.{version[1]}, not 1.0-3.0")
    length_at = len(front)
    layout = "<H" if version == (1, 0) else "<I"
    length_bytes = struct.calcsize(layout)
    (length,) = struct.unpack(layout, header.read(length_at, length_bytes))
    if length > _MAX_HEADER_BYTES:
        raise header.wrong(f"it claims a header of {length} bytes; no array needs that")
    data_offset = length_at + length_bytes + length
    text = header.read(length_at, length_bytes + length)
    try:
        shape, fortran, dtype = _parsed(version, text, length_bytes)
    except _MISREAD as error:
        # The error itself may show all of the header.
        raise header.wrong(f"its header cannot be parsed: {error}") from None
    return header.checked_shape(shape), fortran, dtype, data_offset


def _parsed(
    version: tuple[int, int], text: bytes, length_bytes: int
) -> tuple[object, bool, np.dtype[Any]]:
    plain = _PLAIN.fullmatch(text, length_bytes)
    if plain is not None:
        said, order, lengths = plain.groups()
        shape = tuple(int(length) for length in lengths.split(b",") if length)
        return shape, order == b"True", np.dtype(said.decode())
    if version == (1, 0):
        return npy_format.read_array_header_1_0(io.BytesIO(text), max_header_size=_MAX_HEADER_BYTES)
    if version == (2, 0):
        return npy_format.read_array_header_2_0(io.BytesIO(text), max_header_size=_MAX_HEADER_BYTES)
    # NumPy has no public reader for 3.0, which differs by its encoding alone.
    fields = ast.literal_eval(text[length_bytes:].decode("utf-8"))
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("it must be a dict of descr, fortran_order and shape")
    if not isinstance(fields["fortran_order"], bool):
        raise ValueError("fortran_order must be a bool")
    return fields["shape"], fields["fortran_order"], npy_format.descr_to_dtype(fields["descr"])
