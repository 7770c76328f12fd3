"""Files that know what is in them: where the data of arrays lies, and what it is.

Each format reads a header and checks it against the size of its file. Nothing here
reads data.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from fremap.errors import ArgumentError, FormatError
from fremap.formats import arrow, hdf5, npy, safetensors
from fremap.formats.naming import Names, names_of
from fremap.formats.table import Description, Header, Table

__all__ = [
    "Description",
    "Format",
    "Header",
    "Names",
    "Table",
    "is_surely_raw",
    "names_of",
    "said_format",
    "told_format",
]

#: What a caller may say that a file is.
Format: TypeAlias = Literal["npy", "safetensors", "arrow", "raw"]
#: What a file is. An index is JSON that names files of safetensors.
_Found: TypeAlias = Literal["npy", "safetensors", "index", "arrow", "raw"]

_FRONT_BYTES = 64
_BY_SUFFIX: dict[str, _Found] = {
    ".npy": "npy",
    ".safetensors": "safetensors",
    ".safetensors.index.json": "index",
    ".arrow": "arrow",
}
_SUFFIXES = tuple(_BY_SUFFIX)
_ARCHIVES = (".npz", ".gz", ".zip", ".bz2", ".xz", ".zst")
_COMPRESSED = "is an archive or compressed, and has no rows at fixed places; unpack it first"
# By what other files begin with: what they are, and what to do. Rows of raw bytes may begin so
# by chance where that is short, so it counts only if the caller does not say what the bytes are.
_REFUSED = {
    hdf5.MAGIC: "is an HDF5 file; give a data set of it, as h5py opens it",
}
_REFUSED_UNLESS_TYPED = {
    b"PK\x03\x04": _COMPRESSED,
    b"\x1f\x8b": _COMPRESSED,
    b"\x28\xb5\x2f\xfd": _COMPRESSED,
    b"\xfd7zXZ\x00": _COMPRESSED,
    b"BZh": _COMPRESSED,
    b"PAR1": "is a Parquet file, whose rows are encoded; write the column to an Arrow or .npy file",
    b"GGUF": "is a GGUF file, which fremap does not read; give dtype=, row_shape= and offset=",
}
# The first bytes of formats that fremap knows; most files of raw bytes have others.
_FIRST_BYTES = tuple(
    {bytes([begin[0]]) for begin in (npy.MAGIC, arrow.MAGIC, *_REFUSED, *_REFUSED_UNLESS_TYPED)}
    | {b"{", b" ", b"\t", b"\r", b"\n"}
)


def said_format(value: object) -> Format | None:
    """Return `format=` as a caller gives it.

    Parameters
    ----------
    value : object
        One of the names, or None.

    Returns
    -------
    str or None
        The name.
    """
    if value is None or value in ("npy", "safetensors", "arrow", "raw"):
        return value
    raise ArgumentError(
        f'rows: format is {value!r}; it must be "npy", "safetensors", "arrow" or "raw"'
    )


def is_surely_raw(name: str, said: Format | None, offset: int, front: bytes | None = None) -> bool:
    """Tell whether a file is raw bytes without a look at more than its front.

    Parameters
    ----------
    name : str
        Its name.
    said : str or None
        The format that the caller says.
    offset : int
        Where the caller says that its rows begin: other formats know it themselves.
    front : bytes, optional
        What it begins with, if that is known.

    Returns
    -------
    bool
        False where `told_format` has to look.
    """
    if said is not None:
        return said == "raw"
    lower = name.lower()
    if lower.endswith(_SUFFIXES):
        return False
    return offset > 0 or (
        front is not None and not lower.endswith(_ARCHIVES) and not _begins_like_a_format(front)
    )


def _begins_like_a_format(front: bytes) -> bool:
    return front.startswith(_FIRST_BYTES) or front[8:9] == b"{"


def told_format(header: Header, said: Format | None, *, typed: bool, offset: int) -> _Found:
    """Return what a file is: by what a caller says, by its content, by its name.

    Parameters
    ----------
    header : Header
        The file.
    said : str or None
        What the caller says that it is.
    typed : bool
        Whether the caller says what elements it has.
    offset : int
        Where the caller says that its rows begin.

    Returns
    -------
    str
        "raw" where nothing tells.
    """
    if is_surely_raw(header.name, said, offset):
        return "raw"
    if said in ("npy", "arrow"):
        return said
    lower = header.name.lower()
    suffix = None
    if lower.endswith(_SUFFIXES):
        suffix = next(suffix for suffix in _SUFFIXES if lower.endswith(suffix))
    front = header.read(0, min(header.size, _FRONT_BYTES))
    if said is not None:
        is_json = said == "safetensors" and front.startswith(b"{")
        return "index" if is_json and not safetensors.is_safetensors(header, front) else said
    if _begins_like_a_format(front):
        found = _by_content(header, front)
        if found is not None:
            return found
        _refuse(header, front, typed=typed or suffix is not None)
    if suffix is not None:
        return _BY_SUFFIX[suffix]
    if lower.endswith(_ARCHIVES):
        raise FormatError(f"rows: {header.name} {_COMPRESSED}")
    return "raw"


def _by_content(header: Header, front: bytes) -> _Found | None:
    if front.startswith(npy.MAGIC):
        return "npy"
    if safetensors.is_safetensors(header, front):
        return "safetensors"
    if safetensors.is_index(header, front):
        return "index"
    return "arrow" if front.startswith(arrow.MAGIC) else None


def _refuse(header: Header, front: bytes, *, typed: bool) -> None:
    """Refuse a file that begins as one does that has no rows at fixed places."""
    refused = _REFUSED if typed else _REFUSED | _REFUSED_UNLESS_TYPED
    for begin, why in refused.items():
        if front.startswith(begin):
            raise FormatError(f"rows: {header.name} {why}")
