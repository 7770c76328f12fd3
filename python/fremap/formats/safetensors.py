"""Safetensors: one file, or an index of several."""

from __future__ import annotations

import math
import posixpath
import struct
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from fremap.errors import FormatError
from fremap.formats.table import Table, shown

if TYPE_CHECKING:
    from fremap.formats.table import Header

__all__ = ["shard_of", "table"]

# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_NAMES_SHOWN = 8
# Digits of a number: enough for 2**63, and few enough to be reckoned with.
_MAX_DIGITS = 20
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
    _check_cover(header, entries, header.size - data_offset)
    # The others may be of types that are not known here.
    return header.check_data(
        _entry(header, _chosen(header, list(entries), tensor), entries, data_offset)
    )


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
        raise header.wrong(
            f"tensor {shown(name)} is in {shown(file)}, which is no file beside the index"
        )
    return name, posixpath.join(posixpath.dirname(header.name), *parts)


def _object(header: Header, text: bytes) -> dict[str, Any]:
    """Return what JSON says, in which nothing is named twice and no number is long."""
    try:
        value = _parsed(header, text)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise header.wrong(f"its header is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise header.wrong("its header is no JSON object")
    return value


def _parsed(header: Header, text: bytes) -> Any:
    import json  # `import fremap` does without it

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise header.wrong("its header names something twice")
        return made

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise header.wrong(f"its header has a number of {len(digits)} digits")
        return int(digits)

    plain = text.decode("utf-8")
    if not _has_long_number(text):
        value = json.loads(plain)
        if _names_each_once(text, value):
            return value
    # Calls back for each number and each object, for which long headers take ten times longer.
    return json.loads(plain, object_pairs_hook=unique, parse_int=integer)


def _has_long_number(text: bytes) -> bool:
    """Tell whether so many digits follow each other, be it in a name."""
    digits = np.frombuffer(text, np.uint8) - ord("0") < 10
    for shift in (1, 2, 4, 8):  # runs of 2, 4, 8, 16
        digits = digits[:-shift] & digits[shift:]
    return bool(digits.any())


def _names_each_once(text: bytes, value: object) -> bool:
    """Tell whether each tensor is described once for certain: as often as there are names."""
    if not isinstance(value, dict) or b"\\" in text:
        return False
    count = len(value) - ("__metadata__" in value)
    fields = (b'"dtype"', b'"shape"', b'"data_offsets"')
    return (
        all(text.count(field) == count for field in fields)
        and text.count(b'"__metadata__"') <= 1
        and all(
            type(entry) is dict and len(entry) == len(fields)
            for name, entry in value.items()
            if name != "__metadata__"
        )
    )


def _entry(header: Header, name: str, entries: dict[str, Any], data_offset: int) -> Table:
    """Return where a tensor is whose place is known to be in the file."""
    fields = entries[name]
    kind = fields.get("dtype")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise header.wrong(
            f"tensor {shown(name)} is of type {shown(kind)}; known are {', '.join(_DTYPES)}"
        )
    shape = header.checked_shape(fields.get("shape"))
    code, dtype_name = _DTYPES[kind]
    dtype = np.dtype(code)
    data_bytes = dtype.itemsize * math.prod(shape)
    begin, end = fields["data_offsets"]
    if end - begin != data_bytes:
        raise header.wrong(
            f"tensor {shown(name)} has {end - begin} bytes; {shown(shape)} of {kind} is "
            f"{data_bytes if data_bytes <= sys.maxsize else 'more than any memory has'}"
        )
    return Table(dtype, dtype_name, shape, data_offset + begin)


def _check_cover(header: Header, entries: dict[str, Any], data_bytes: int) -> None:
    """Fail unless the tensors follow each other and fill the file."""
    if not entries:
        raise header.wrong("it holds no tensor")
    begins, ends = [], []
    for name, entry in entries.items():
        at = entry.get("data_offsets") if type(entry) is dict else None
        if (
            type(at) is not list
            or len(at) != 2
            or type(at[0]) is not int
            or type(at[1]) is not int
            or not 0 <= at[0] <= at[1]
        ):
            raise header.wrong(
                f"tensor {shown(name)} lies at {shown(at)}, which is no range of bytes"
            )
        begins.append(at[0])
        ends.append(at[1])
    if max(ends) != data_bytes:
        raise header.wrong(
            f"its tensors take {max(ends)} bytes, the file has {data_bytes} for them: "
            "it is cut short, or something was added"
        )
    # They fit into an int64, as the size of a file does.
    first, last = np.array(begins, np.int64), np.array(ends, np.int64)
    order = np.lexsort((last, first))
    before = np.concatenate([[0], last[order[:-1]]])
    after = first[order]
    wrong = np.flatnonzero(before != after)
    if len(wrong):
        place = int(wrong[0])
        names = list(entries)
        one = "the header" if place == 0 else shown(names[order[place - 1]])
        how = "overlap" if after[place] < before[place] else "have a hole between them"
        raise header.wrong(
            f"{one} ends at byte {before[place]} of the data and {shown(names[order[place]])} "
            f"begins at {after[place]}: they {how}"
        )


def _chosen(header: Header, names: list[str], tensor: str | None) -> str:
    if tensor is not None and tensor in names:
        return tensor
    if tensor is None and len(names) == 1:
        return names[0]
    some = ", ".join(map(shown, sorted(names)[:_NAMES_SHOWN]))
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    if tensor is None:
        raise header.wrong(f"it has {len(names)} tensors; say which by tensor=: {some}{more}")
    raise header.wrong(f"it has no tensor {shown(tensor)}; it has {some}{more}")
