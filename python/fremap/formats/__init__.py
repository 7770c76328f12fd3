"""Files that know what is in them: where the data of an array lies, and what it is.

Each format reads a header and checks it against the size of its file. Nothing here
reads data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fremap.errors import FormatError
from fremap.formats import npy, safetensors
from fremap.formats.table import MAX_AXES, Header, Table

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INDEX_SUFFIX", "MAX_AXES", "Header", "Table", "reader", "shard_of"]

INDEX_SUFFIX = ".safetensors.index.json"

_BY_SUFFIX: dict[str, Callable[[Header, str | None], Table]] = {
    ".npy": npy.table,
    ".safetensors": safetensors.table,
}
_ARCHIVES = (".npz", ".gz", ".zip", ".bz2", ".xz", ".zst")


def reader(name: str) -> Callable[[Header, str | None], Table] | None:
    """Return what reads the header of a file of this name; None for raw bytes.

    Parameters
    ----------
    name : str
        Path of the file.

    Returns
    -------
    callable or None
        Takes the header and the name of a tensor, and returns its table.
    """
    lower = name.lower()
    for suffix, table in _BY_SUFFIX.items():
        if lower.endswith(suffix):
            return table
    if lower.endswith(_ARCHIVES):
        raise FormatError(
            f"rows: {name} is an archive or compressed, and has no rows at fixed places; "
            "unpack it first"
        )
    return None


def shard_of(header: Header, tensor: str | None) -> tuple[str, str]:
    """Return the name of the tensor that an index of safetensors means, and its file's path.

    Parameters
    ----------
    header : Header
        The index.
    tensor : str or None
        The tensor that was asked for.

    Returns
    -------
    tuple of str
        Tensor and path.
    """
    return safetensors.shard_of(header, tensor)
