"""Safetensors: one file, or an index of several."""

from __future__ import annotations

import math
import posixpath
import re
import struct
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from fremap.errors import FormatError
from fremap.formats.naming import pattern_hint, some_names
from fremap.formats.table import LFS_POINTER, Description, Table, is_lfs_pointer, shown

if TYPE_CHECKING:
    import numpy.typing as npt

    from fremap.formats.naming import Names
    from fremap.formats.table import Header

__all__ = ["described", "header_bytes", "index", "indexed", "is_index", "is_safetensors", "tables"]

# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
# Of the name of a file, and of a path (`NAME_MAX`, `PATH_MAX`).
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4095
# Within which an index names its map of weights; only a few numbers stand before it.
_INDEX_FRONT_BYTES = 1 << 16
# What the library of the format writes: no spaces, fields in this order. Group 1 ends where the
# tensors begin.
_CANONICAL = re.compile(
    rb'(\{(?:"__metadata__":\{(?:"(?:[^"\\]|\\.)*+":"(?:[^"\\]|\\.)*+",?+)*+\},?+)?+)'
    rb'(?:"[^"\\\x00-\x1f]*+":\{"dtype":"[A-Z0-9_]++","shape":\[(?:[0-9]{1,18}+,?+)*+\],'
    rb'"data_offsets":\[[0-9]{1,18}+,[0-9]{1,18}+\]\}(?:,(?=")|(?=\})))*+\} *+'
)
# An index as transformers and others write it: numbers and the like about it, then its map.
_CANONICAL_INDEX = re.compile(
    rb'(\s*+\{\s*+(?:"metadata"\s*+:\s*+\{[^{}]*+\}\s*+,\s*+)?+"weight_map"\s*+:\s*+)\{\s*+'
    rb'(?:"[^"\\\x00-\x1f]*+"\s*+:\s*+"[^"\\\x00-\x1f]*+"\s*+(?:,\s*+(?=")|(?=\})))*+\}\s*+\}\s*+'
)
_OFFSETS = re.compile(rb'"data_offsets":\[([0-9]++,[0-9]++)\]')
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


def is_safetensors(header: Header, front: bytes) -> bool:
    """Tell by its content whether a file is of this format.

    Parameters
    ----------
    header : Header
        The file.
    front : bytes
        Its first bytes.

    Returns
    -------
    bool
        Whether it begins with a header, or may be said to.
    """
    if len(front) < _LENGTH_BYTES + 2:
        return False
    (length,) = struct.unpack_from("<Q", front)
    end = _LENGTH_BYTES + length
    return (
        2 <= length <= min(_MAX_HEADER_BYTES, header.size - _LENGTH_BYTES)
        and front[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
        and front[_LENGTH_BYTES + 1 : _LENGTH_BYTES + 2] in b'"} \t\r\n'
        and header.read(end - 1, 1) in b"} \t\r\n"
    )


def is_index(header: Header, front: bytes) -> bool:
    """Tell by its content whether a file is an index of such files.

    Parameters
    ----------
    header : Header
        The file.
    front : bytes
        Its first bytes.

    Returns
    -------
    bool
        Whether it is JSON with a map of weights.
    """
    if not front.lstrip().startswith(b"{") or header.size > _MAX_HEADER_BYTES:
        return False
    begin = header.read(0, min(header.size, _INDEX_FRONT_BYTES))
    return b'"weight_map"' in begin


def tables(header: Header, names: Names) -> list[Table]:
    """Read where tensors are from the header of a safetensors file.

    Parameters
    ----------
    header : Header
        The file.
    names : Names
        Which tensors. One that is named alone must be there; of several this may be the file of
        some, or of none.

    Returns
    -------
    list of Table
        Where they are, in no order that matters.
    """
    text, data_offset = _front(header)
    entries = None if names.any else _scanned(text, names, header.size - data_offset)
    if not entries and (entries is None or not names.many):
        every = _entries(header, text, header.size - data_offset, empty=names.many)
        chosen = names.chosen(every) if names.many else [_chosen(header, list(every), names)]
        entries = {name: every[name] for name in chosen}
    # The others may be of types that are not known here.
    return [
        header.check_data(_table(header, name, entry, data_offset))
        for name, entry in entries.items()
    ]


def described(header: Header) -> list[Description]:
    """Read what all tensors of a file are, those of unknown types too.

    Parameters
    ----------
    header : Header
        The file.

    Returns
    -------
    list of Description
        In the order of the file.
    """
    text, data_offset = _front(header)
    entries = _entries(header, text, header.size - data_offset, empty=True)
    in_order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    return [_description(header, name, entry, data_offset) for name, entry in in_order]


def _description(header: Header, name: str, entry: dict[str, Any], data_offset: int) -> Description:
    begin, end = entry["data_offsets"]
    code = entry.get("dtype")
    dtype_name = _DTYPES[code][1] if isinstance(code, str) and code in _DTYPES else str(code)
    shape = header.checked_shape(entry.get("shape"))
    return Description(name, dtype_name, shape, data_offset + begin, end - begin)


def header_bytes(header: Header) -> int:
    """Return how long the header of a file is.

    Parameters
    ----------
    header : Header
        The file.

    Returns
    -------
    int
        Bytes; those behind are data.
    """
    front = header.read(0, _LENGTH_BYTES)
    if is_lfs_pointer(front):
        raise header.wrong(LFS_POINTER)
    (length,) = struct.unpack("<Q", front)
    if length > _MAX_HEADER_BYTES:
        raise header.wrong(
            f"it claims a header of {length} bytes; safetensors allows {_MAX_HEADER_BYTES}"
        )
    return _LENGTH_BYTES + int(length)


def _front(header: Header) -> tuple[bytes, int]:
    """Return the header's text, and the byte of the file at which data begins."""
    data_offset = header_bytes(header)
    return header.read(_LENGTH_BYTES, data_offset - _LENGTH_BYTES), data_offset


def _entries(header: Header, text: bytes, data_bytes: int, *, empty: bool) -> dict[str, Any]:
    """Return what the header says of each tensor; all of it is checked."""
    entries = _object(header, text)
    entries.pop("__metadata__", None)
    if not entries and not empty:
        raise header.wrong("it holds no tensor")
    _check_cover(header, entries, data_bytes)
    return entries


def _scanned(text: bytes, names: Names, data_bytes: int) -> dict[str, Any] | None:
    """Return the entries of the wanted tensors; None if the header must be parsed as JSON.

    A model has tens of thousands of tensors, and Python objects for all of them take three
    times as long as this. It reads what the library of the format writes, and checks as
    much as JSON does, save that two tensors that nobody asked for may have one name.
    """
    grammar = _CANONICAL.fullmatch(text)
    meant = _beginning(text, names)
    if grammar is None or meant is None:
        return None
    begin = grammar.end(1)
    places = np.fromstring(b",".join(_OFFSETS.findall(text, begin)), np.int64, sep=",")
    if _break_of_cover(places[::2], places[1::2], data_bytes) is not None:
        return None
    entry = rb'"(%s[^"]*+)":\{"dtype":"(\w+)","shape":\[([^]]*)\],"data_offsets":\[(\d+),(\d+)\]\}'
    found = re.compile(entry % re.escape(meant)).findall(text, begin)
    described = {fields[0].decode(): fields for fields in found}
    if len(described) != len(found):
        return None
    return {name: _fields(*described[name]) for name in names.chosen(described)}


def _beginning(text: bytes, names: Names) -> bytes | None:
    """Return what the wanted names begin with; None if the header must be parsed as JSON."""
    prefix = posixpath.commonprefix(names.exact) if names.exact else names.before
    if re.search(r'["\\\x00-\x1f]', prefix):
        return None
    try:
        text.decode("utf-8")
        return prefix.encode("utf-8")
    except UnicodeError:
        return None


def _fields(_name: bytes, dtype: bytes, shape: bytes, begin: bytes, end: bytes) -> dict[str, Any]:
    """Return what JSON would make of an entry."""
    return {
        "dtype": dtype.decode(),
        "shape": list(map(int, shape.split(b","))) if shape else [],
        "data_offsets": [int(begin), int(end)],
    }


def index(header: Header, names: Names) -> dict[str, str]:
    """Return which file in the folder of an index has each wanted tensor.

    Parameters
    ----------
    header : Header
        The index, a JSON file.
    names : Names
        Which tensors.

    Returns
    -------
    dict of str to str
        Names of files, which may have folders in them, by the names of tensors.
    """
    text = _index_text(header)
    files = {} if names.any else _scanned_map(text, names) or {}
    if not files:
        every = _weight_map(header, text)
        chosen = names.chosen(every) if names.many else [_chosen(header, list(every), names)]
        files = {name: every[name] for name in chosen}
    return {name: _beside(header, name, file) for name, file in files.items()}


def indexed(header: Header) -> list[str]:
    """Return the names of all files that an index names, each once.

    Parameters
    ----------
    header : Header
        The index.

    Returns
    -------
    list of str
        In the order in which the index names them.
    """
    files = _weight_map(header, _index_text(header))
    return list(dict.fromkeys(_beside(header, name, file) for name, file in files.items()))


def _index_text(header: Header) -> bytes:
    if header.size > _MAX_HEADER_BYTES:
        raise header.wrong(f"an index of {header.size} bytes; it may have {_MAX_HEADER_BYTES}")
    return header.read(0, header.size)


def _weight_map(header: Header, text: bytes) -> dict[str, Any]:
    files = _object(header, text).get("weight_map")
    if not isinstance(files, dict):
        raise header.wrong("it has no weight_map, which an index of safetensors needs")
    return files


def _scanned_map(text: bytes, names: Names) -> dict[str, str] | None:
    """Return the files of the wanted tensors; None if the index must be parsed as JSON."""
    grammar = _CANONICAL_INDEX.fullmatch(text)
    meant = _beginning(text, names)
    if grammar is None or meant is None:
        return None
    entry = rb'"(%s[^"]*+)"\s*:\s*"([^"]*+)"' % re.escape(meant)
    found = re.compile(entry).findall(text, grammar.end(1))
    files = {name.decode(): file.decode() for name, file in found}
    if len(files) != len(found):
        return None
    return {name: files[name] for name in names.chosen(files)}


def _beside(header: Header, name: str, file: object) -> str:
    """Return the name of a file that has a tensor, which must be beside the index."""
    parts = file.split("/") if isinstance(file, str) else [""]
    if (
        "" in (parts[0], parts[-1])
        or ".." in parts
        or not "".join(parts).isprintable()
        or any(len(part.encode()) > _MAX_NAME_BYTES for part in parts)
        or sum(len(part.encode()) + 1 for part in parts) > _MAX_PATH_BYTES
    ):
        raise header.wrong(
            f"tensor {shown(name)} is in {shown(file)}, which is not the name of a file in the "
            "folder of the index"
        )
    return posixpath.join(*parts)


def _object(header: Header, text: bytes) -> dict[str, Any]:
    """Return what JSON says, in which nothing is named twice and no number is long."""
    try:
        value = _parsed(header, text)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise header.wrong(f"its header is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise header.wrong("its header is not a JSON object")
    return value


def _parsed(header: Header, text: bytes) -> Any:
    import json  # `import fremap` does without it

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise header.wrong("its header has a name twice")
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
    """Tell whether the text has this many digits in a row, even in a name."""
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


def _table(header: Header, name: str, fields: dict[str, Any], data_offset: int) -> Table:
    """Return where a tensor is whose place is known to be in the file."""
    kind = fields.get("dtype")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise header.wrong(
            f"tensor {shown(name)} is of type {shown(kind)}; fremap knows {', '.join(_DTYPES)}"
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
    return Table(dtype, dtype_name, shape, data_offset + begin, name)


def _check_cover(header: Header, entries: dict[str, Any], data_bytes: int) -> None:
    """Fail unless the tensors follow each other and fill the file."""
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
                f"tensor {shown(name)} lies at {shown(at)}, which is not a range of bytes"
            )
        begins.append(at[0])
        ends.append(at[1])
    end = max(ends, default=0)
    if end != data_bytes:
        raise header.wrong(
            f"its tensors take {end} bytes, the file has {data_bytes} for them: "
            "it is truncated, or something was added"
        )
    # They fit into an int64, as the size of a file does.
    found = _break_of_cover(np.array(begins, np.int64), np.array(ends, np.int64), data_bytes)
    if found is not None:
        before, after = found
        names = list(entries)
        one = "the header" if before < 0 else shown(names[before])
        end = 0 if before < 0 else ends[before]
        how = "overlap" if begins[after] < end else "have a hole between them"
        raise header.wrong(
            f"{one} ends at byte {end} of the data and {shown(names[after])} begins at "
            f"{begins[after]}: they {how}"
        )


def _break_of_cover(
    first: npt.NDArray[np.int64], last: npt.NDArray[np.int64], data_bytes: int
) -> tuple[int, int] | None:
    """Return the tensor after which bytes do not go on with the next one, and that next one.

    -1 stands for the header before, or for the end of the file behind.
    """
    if not len(first):
        return None if data_bytes == 0 else (-1, -1)
    if not (first[1:] == last[:-1]).all():  # or they stand in the order of the file
        order = np.lexsort((last, first))
    else:
        order = np.arange(len(first))
    before = np.concatenate([[0], last[order[:-1]]])
    wrong = np.flatnonzero(before != first[order])
    if len(wrong):
        at = int(wrong[0])
        return (int(order[at - 1]) if at else -1, int(order[at]))
    return None if last[order[-1]] == data_bytes else (int(order[-1]), -1)


def _chosen(header: Header, held: list[str], names: Names) -> str:
    """Return the one tensor that the caller wants."""
    if names.any:
        if len(held) == 1:
            return held[0]
        raise header.wrong(f"it has {len(held)} tensors; choose one by tensor=: {some_names(held)}")
    (name,) = names.exact
    if name not in held:
        hint = pattern_hint(names.exact)
        raise header.wrong(f"it has no tensor {shown(name)}; it has {some_names(held)}{hint}")
    return name
