"""Data sets of HDF5 files, as h5py has them: where in the file their elements lie."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fremap.errors import FormatError
from fremap.formats.table import Description, Table

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MAGIC", "described", "located"]

#: What a file begins with, unless it has a block of its user's before.
MAGIC = b"\x89HDF\r\n\x1a\n"

# By which HDF5 reads and writes the file itself, through a descriptor.
_PLAIN_DRIVER = "sec2"


def described(path: str) -> list[Description]:
    """Return what the data sets of a file are; those that are not in one piece without a place.

    Parameters
    ----------
    path : str
        The file.

    Returns
    -------
    list of Description
        By name.
    """
    try:
        import h5py
    except ImportError:
        raise FormatError(
            f"rows: {path}: reading HDF5 files needs h5py: pip install h5py"
        ) from None
    found: list[Description] = []

    def visit(name: str, node: Any) -> None:
        if not isinstance(node, h5py.Dataset):
            return
        try:
            _, table = located(node)
            place: int | None = table.data_offset
        except FormatError:  # what it is can be told all the same
            place = None
        shape = tuple(node.shape or ())
        found.append(Description(name, str(node.dtype), shape, place, int(node.nbytes)))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def located(dataset: Any) -> tuple[str, Table]:
    """Return the path of a data set's file, and where in it the elements are.

    Parameters
    ----------
    dataset : h5py.Dataset
        Open; what was written to it is flushed to the file.

    Returns
    -------
    tuple of str and Table
        The path, and the place. That it lies within the file is not checked.
    """
    name = f"{dataset.file.filename}: data set {dataset.name!r}"
    dtype: np.dtype[Any] = dataset.dtype
    if dtype.hasobject:
        raise FormatError(
            f"rows: {name} has elements of unequal length or references; write them as numbers, or "
            "as values and offsets (fremap.ragged)"
        )
    how = _scattered(dataset)
    if how is not None:
        raise FormatError(
            f"rows: {name} is {how}, so its rows are not contiguous in the file; copy it to a data "
            "set that is: create_dataset(name, data=dataset[:])"
        )
    if dataset.file.driver != _PLAIN_DRIVER:
        raise FormatError(
            f"rows: {name} is opened by the driver {dataset.file.driver!r}, which is not the file "
            "itself; open it by its path"
        )
    if dataset.file.mode != "r":
        dataset.flush()
    shape = tuple(map(int, dataset.shape))
    size = int(dataset.size) * dtype.itemsize
    held = dataset.id.get_storage_size()
    if held != size:
        what = (
            "nothing was written to it yet" if held == 0 else f"it takes {held} bytes, not {size}"
        )
        raise FormatError(f"rows: {name} is not contiguous in its file: {what}")
    offset = int(dataset.id.get_offset() or 0) if size else 0
    path = os.path.abspath(os.fsdecode(dataset.file.filename))
    if not _is_at(path, dataset.file.id.get_vfd_handle()):
        raise FormatError(
            f"rows: {name} is in a file that is no longer at {path}; open it by its absolute path"
        )
    return path, Table(dtype, dtype.name, shape, offset, str(dataset.name))


def _is_at(path: str, descriptor: int) -> bool:
    """Tell whether the file that is open is the one at a path, which may be a relative one's."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _scattered(dataset: Any) -> str | None:
    """Return why elements are not in one piece of the file, if they are not."""
    if dataset.shape is None:
        return "empty"
    if dataset.is_virtual:
        return "virtual"
    if dataset.external:
        return "in external files"
    if dataset.chunks is not None:
        return "chunked and compressed" if dataset.compression else "chunked"
    if dataset.size and dataset.id.get_offset() is None and dataset.id.get_storage_size():
        return "compact (in the object's header)"
    return None
