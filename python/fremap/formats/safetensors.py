"""Safetensors: one file, or an index of several."""

from __future__ import annotations

import posixpath
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fremap.formats.table import Table

if TYPE_CHECKING:
    from fremap.formats.table import Header

__all__ = ["shard_of", "table"]

# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_NAMES_SHOWN = 8
# Name in the file: (what NumPy has of as many bytes, what it is). All are little endian.
_DTYPES = {
    "BOOL": ("?", "bool"),
    "U8": ("u1", "uint8"),
    "I8": ("i1", "int8"),
    "U16": ("<u2", "uint16"),
    "I16": ("<i2", "int16"),
    "U32": ("<u4", "uint32"),
    "I32": ("<i4", "int32"),
    "U64": ("<u8", "uint64"),
    "I64": ("<i8", "int64"),
    "F16": ("<f2", "float16"),
    "F32": ("<f4", "float32"),
    "F64": ("<f8", "float64"),
    "C64": ("<c8", "complex64"),
    "BF16": ("<u2", "bfloat16"),
    "F8_E4M3": ("u1", "float8_e4m3fn"),
    "F8_E5M2": ("u1", "float8_e5m2"),
    "F8_E8M0": ("u1", "float8_e8m0fnu"),
    "F8_E4M3FNUZ": ("u1", "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": ("u1", "float8_e5m2fnuz"),
}


def table(header: Header, tensor: str | None) -> Table:
    """Read the header of a safetensors file.

    Parameters
    ----------
    header : Header
        The file.
    tensor : str or None
        The tensor; None if there is one only.

    Returns
    -------
    Table
        Where the tensor is.
    """
    (length,) = struct.unpack("<Q", header.read(0, _LENGTH_BYTES))
    if length > _MAX_HEADER_BYTES:
        raise header.wrong(
            f"it claims a header of {length} bytes; safetensors allows {_MAX_HEADER_BYTES}"
        )
    entries = _object(header, header.read(_LENGTH_BYTES, length))
    entries.pop("__metadata__", None)
    data_offset = _LENGTH_BYTES + length
    tables = {name: _entry(header, name, entry) for name, entry in entries.items()}
    _check_cover(header, {name: span for name, (_, span) in tables.items()}, data_offset)
    name = _chosen(header, list(tables), tensor)
    found, (begin, _) = tables[name]
    return header.check_data(Table(found.dtype, found.dtype_name, found.shape, data_offset + begin))


def shard_of(header: Header, tensor: str | None) -> tuple[str, str]:
    """Return the tensor that is meant, and the path of its file beside the index.

    Parameters
    ----------
    header : Header
        The index, a JSON file.
    tensor : str or None
        The tensor; None if there is one only.

    Returns
    -------
    tuple of str
        Tensor and path.
    """
    if header.size > _MAX_HEADER_BYTES:
        raise header.wrong(f"an index of {header.size} bytes; it may have {_MAX_HEADER_BYTES}")
    files = _object(header, header.read(0, header.size)).get("weight_map")
    if not isinstance(files, dict):
        raise header.wrong("it has no weight_map, as an index of safetensors has")
    name = _chosen(header, list(files), tensor)
    file = files[name]
    parts = file.split("/") if isinstance(file, str) else [""]
    if "" in (parts[0], parts[-1]) or ".." in parts or not file.isprintable():
        raise header.wrong(f"tensor {name!r} is in {file!r}, which is no file beside the index")
    return name, posixpath.join(posixpath.dirname(header.name), *parts)


def _object(header: Header, text: bytes) -> dict[str, Any]:
    import json  # `import fremap` does without it

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise header.wrong("its header names something twice")
        return dict(pairs)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise header.wrong(f"its header is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise header.wrong("its header is no JSON object")
    return value


def _entry(header: Header, name: str, entry: object) -> tuple[Table, tuple[int, int]]:
    """Return what a header says of one tensor, and its first and last byte."""
    fields = entry if isinstance(entry, dict) else {}
    kind, offsets = fields.get("dtype"), fields.get("data_offsets")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise header.wrong(f"tensor {name!r} is of type {kind!r}; there are {', '.join(_DTYPES)}")
    shape = header.checked_shape(fields.get("shape"))
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(isinstance(at, int) and not isinstance(at, bool) for at in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise header.wrong(f"tensor {name!r} lies at {offsets!r}, which is no range of bytes")
    code, dtype_name = _DTYPES[kind]
    dtype = np.dtype(code)
    data_bytes = dtype.itemsize
    for length in shape:
        data_bytes *= length
    if offsets[1] - offsets[0] != data_bytes:
        raise header.wrong(
            f"tensor {name!r} has {offsets[1] - offsets[0]} bytes; {shape} of {kind} is "
            f"{data_bytes}"
        )
    return Table(dtype, dtype_name, shape, 0), (offsets[0], offsets[1])


def _check_cover(header: Header, spans: dict[str, tuple[int, int]], data_offset: int) -> None:
    """Fail unless the tensors follow each other and fill the file."""
    ordered = sorted((span, name) for name, span in spans.items())
    if not ordered:
        raise header.wrong("it holds no tensor")
    ends = [((0, 0), "the header"), *ordered]
    for (before, first), (after, second) in pairwise(ends):
        if before[1] != after[0]:
            how = "overlap" if after[0] < before[1] else "have a hole between them"
            raise header.wrong(
                f"{first!r} ends at byte {before[1]} of the data and {second!r} begins at "
                f"{after[0]}: they {how}"
            )
    data_bytes = header.size - data_offset
    if ordered[-1][0][1] != data_bytes:
        raise header.wrong(
            f"its tensors take {ordered[-1][0][1]} bytes, the file has {data_bytes} for them: "
            "it is cut short, or something was added"
        )


def _chosen(header: Header, names: list[str], tensor: str | None) -> str:
    if tensor is not None and tensor in names:
        return tensor
    if tensor is None and len(names) == 1:
        return names[0]
    shown = ", ".join(map(repr, sorted(names)[:_NAMES_SHOWN]))
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    if tensor is None:
        raise header.wrong(f"it has {len(names)} tensors; say which by tensor=: {shown}{more}")
    raise header.wrong(f"it has no tensor {tensor!r}; it has {shown}{more}")
