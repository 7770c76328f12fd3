"""The index of Megatron's token files: which part of the ``.bin`` each sequence is."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from fremap.formats.table import Header

__all__ = ["MAGIC", "Index", "index"]

MAGIC = b"MMIDIDX\x00\x00"
_FRONT = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


class Index(NamedTuple):
    """What an index says.

    Attributes
    ----------
    dtype : dtype
        Of the elements of the other file.
    starts : ndarray of int64
        The first element of each sequence.
    lengths : ndarray of int64
        How many elements each has.
    """

    dtype: np.dtype
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def index(header: Header) -> Index:
    """Read an index.

    Parameters
    ----------
    header : Header
        The ``.idx`` file.

    Returns
    -------
    Index
        Where the sequences are.
    """
    front = header.read(0, min(header.size, _FRONT.size))
    if len(front) < _FRONT.size or not front.startswith(MAGIC):
        raise header.wrong("it does not begin like an index of Megatron's")
    _, version, code, count, _documents = _FRONT.unpack(front)
    if version != 1:
        raise header.wrong(f"it is an index of version {version}, not 1")
    if code not in _DTYPES:
        raise header.wrong(f"its elements are of type {code}; fremap knows 1 to {max(_DTYPES)}")
    dtype = np.dtype(_DTYPES[code])
    if count * 12 > header.size - _FRONT.size:
        raise header.wrong(
            f"it claims {count} sequences, for which its {header.size} bytes are too few: it is "
            "truncated"
        )
    lengths = np.frombuffer(header.read(_FRONT.size, count * 4), "<i4").astype(np.int64)
    pointers = np.frombuffer(header.read(_FRONT.size + count * 4, count * 8), "<i8")
    if count and (int(lengths.min()) < 0 or int(pointers.min()) < 0):
        raise header.wrong("it has a sequence of negative length or position")
    starts, odd = np.divmod(pointers.astype(np.int64), dtype.itemsize)
    if odd.any():
        at = int(np.flatnonzero(odd)[0])
        raise header.wrong(
            f"sequence {at} begins at byte {pointers[at]}, within an element of {dtype.itemsize} "
            "bytes"
        )
    return Index(dtype, starts, lengths)
