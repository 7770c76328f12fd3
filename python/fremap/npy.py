"""Arrays in ``.npy`` files, as `memmap` shows them: beside NumPy's `load` and `open_memmap`."""

from __future__ import annotations

import io
import math
import os
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.lib import format as npy

from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.formats.npy import described
from fremap.formats.table import Header
from fremap.layout import Layout
from fremap.locations import is_remote
from fremap.memmap import memmap
from fremap.sources import Opened
from fremap.stores import FileStore, Store

if TYPE_CHECKING:
    import numpy.typing as npt

    from fremap.memmap import Mode
    from fremap.remote_store import RemoteStore
    from fremap.settings import Advice, Budget

__all__ = ["load", "open_memmap"]


def open_memmap(
    filename: str | os.PathLike[str] | RemoteStore | tuple[Any, str],
    mode: Mode = "r+",
    dtype: npt.DTypeLike | None = None,
    shape: int | tuple[int, ...] | None = None,
    fortran_order: bool = False,  # noqa: FBT001, FBT002 - NumPy's
    version: tuple[int, int] | None = None,
    *,
    budget: Budget = "auto",
    advice: Advice = "auto",
) -> memmap:
    """Show the array of a ``.npy`` file, or create one, as `numpy.lib.format.open_memmap`.

    Parameters
    ----------
    filename : str, path or RemoteStore
        The file; not a file object. With mode "r" it may be an object on a server (a URL, or
        anything else that `RemoteStore` takes): touching a page then fetches it.
    mode : {"r+", "r", "w+", "c"}, default "r+"
        As for `memmap`. "w+" writes a header.
    dtype : dtype, optional
        With "w+": type of the elements. Default: float64.
    shape : int or tuple of int, optional
        With "w+", which requires it: shape of the array.
    fortran_order : bool, default False
        With "w+": whether the first index changes fastest.
    version : tuple of int, optional
        With "w+": version of the format, (1, 0) or (2, 0). Default: (1, 0).
    budget : int, str or None, default "auto"
        As for `memmap`.
    advice : {"auto", "normal", "random", "sequential"}, default "auto"
        As for `memmap`.

    Returns
    -------
    memmap
        An array of the file's type and shape.

    Raises
    ------
    FormatError
        The file is not an ``.npy`` file, its header cannot be parsed, or it is shorter than the
        header says.
    ArgumentTypeError
        The elements are Python objects.
    ArgumentError
        The mode is invalid, or "w+" has no shape.
    StoreError
        The file cannot be opened.

    Examples
    --------
    >>> import fremap, os, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = os.path.join(directory, "table.npy")
    ...     table = fremap.open_memmap(path, "w+", "f4", (1000, 16))
    ...     table[:] = 1.5
    ...     table.flush()
    ...     fremap.load(path)[[3, 999], 0]
    array([1.5, 1.5], dtype=float32)
    """
    options: dict[str, Any] = {"budget": budget, "advice": advice}
    if mode in ("w+", "write"):
        path = cast("str | os.PathLike[str]", _checked("open_memmap", filename, mode))
        return _created(path, dtype, shape, fortran_order, version, options)
    return _opened("open_memmap", filename, mode, options)


def load(
    file: str | os.PathLike[str] | RemoteStore | tuple[Any, str],
    mmap_mode: Literal["r", "r+", "c"] = "r",
    *,
    budget: Budget = "auto",
    advice: Advice = "auto",
) -> memmap:
    """Show the array of a ``.npy`` file, as `numpy.load` does with `mmap_mode`.

    Parameters
    ----------
    file : str, path or RemoteStore
        The file, or an object on a server, as for `open_memmap`.
    mmap_mode : {"r", "r+", "c"}, default "r"
        As the mode of `memmap`.
    budget : int, str or None, default "auto"
        As for `memmap`.
    advice : {"auto", "normal", "random", "sequential"}, default "auto"
        As for `memmap`.

    Returns
    -------
    memmap
        An array of the file's type and shape.

    Raises
    ------
    FormatError
        The file is not an ``.npy`` file, its header cannot be parsed, or it is shorter than the
        header says.
    ArgumentTypeError
        The elements are Python objects.
    ArgumentError
        The mode is invalid.
    StoreError
        The file cannot be opened.
    """
    if mmap_mode not in ("r", "r+", "c"):
        raise ArgumentError(f'load: mmap_mode is {mmap_mode!r}; it must be "r", "r+" or "c"')
    return _opened("load", file, mmap_mode, {"budget": budget, "advice": advice})


def _checked(operation: str, file: Any, mode: Mode) -> Any:
    """Return what an array is in, if it can be shown with the mode."""
    if isinstance(file, Store):
        if not file._core.is_provided:  # noqa: SLF001 - its other half
            raise ArgumentTypeError(
                f"{operation}: the file must be a path, or a store whose pages are fetched or "
                f"computed, not {type(file).__name__}; give the path of its file"
            )
    elif hasattr(file, "read"):
        raise ArgumentTypeError(f"{operation}: the file must be a path, not a file object")
    if (isinstance(file, Store) or is_remote(file)) and mode not in ("r", "readonly"):
        raise ArgumentError(
            f"{operation}: mode is {mode!r}; objects on servers and computed pages are read-only: "
            'use mode "r"'
        )
    return file


def _opened(operation: str, file: Any, mode: Mode, options: dict[str, Any]) -> memmap:
    """Show the array of a file that there is."""
    source = _checked(operation, file, mode)
    if not is_remote(source):
        return _shown(source, mode, options)
    from fremap.remote_store import RemoteStore  # `import fremap` does without it

    # One store for both, so that header and elements are of one version.
    store = RemoteStore(source)
    try:
        return _shown(store, mode, options)
    except BaseException:
        store.close()
        raise


def _shown(source: Any, mode: Mode, options: dict[str, Any]) -> memmap:
    """Show the array that a header tells of."""
    kind, shape, fortran, offset = _header(source)
    return memmap(source, kind, mode, offset, shape, "F" if fortran else "C", **options)


def _header(source: Any) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Read the type, the shape, the order, and where the elements begin."""
    if isinstance(source, Store):
        with Opened(source, "load") as opened:
            header = opened.header
            shape, fortran, kind, offset = described(header)
    else:
        with FileStore(source) as store:
            header = Header(store.fileno(), os.fspath(source), store.size, "load")
            shape, fortran, kind, offset = described(header)
    if kind.hasobject:
        raise ArgumentTypeError(f"load: elements of dtype {kind} cannot lie in a file")
    # NumPy makes it longer in mode "r+": zeros would take the place of what is lost.
    header.check_length(offset, math.prod(shape) * kind.itemsize)
    return kind, shape, fortran, offset


def _created(
    path: str | os.PathLike[str],
    dtype: npt.DTypeLike | None,
    shape: int | tuple[int, ...] | None,
    fortran: bool,  # noqa: FBT001 - as it is passed on
    version: tuple[int, int] | None,
    options: dict[str, Any],
) -> memmap:
    """Write a header and show what follows it."""
    if shape is None:
        raise ArgumentError('open_memmap: mode "w+" needs a shape')
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ArgumentTypeError(f"open_memmap: elements of dtype {kind} cannot lie in a file")
    dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
    header = {
        "descr": npy.dtype_to_descr(kind),
        "fortran_order": fortran,
        "shape": dimensions,
    }
    front = io.BytesIO()
    write = npy.write_array_header_2_0 if version == (2, 0) else npy.write_array_header_1_0
    write(front, header)
    offset = front.tell()
    order: Literal["C", "F"] = "F" if fortran else "C"
    # Everything is checked, and the file as long as it will be, before it is emptied.
    whole = memmap(
        path, mode="w+", shape=Layout(kind, "w+", offset, dimensions, order).end, **options
    )
    whole[:offset] = np.frombuffer(front.getbuffer(), np.uint8)
    del whole
    return memmap(path, kind, "r+", offset, dimensions, order, **options)
