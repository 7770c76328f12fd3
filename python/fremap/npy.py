"""Arrays in ``.npy`` files, as `memmap` shows them: beside NumPy's `load` and `open_memmap`."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.lib import format as npy

from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.formats.npy import described
from fremap.formats.table import Header
from fremap.locations import is_remote
from fremap.memmap import memmap
from fremap.sources import Opened
from fremap.stores import FileStore, Store

if TYPE_CHECKING:
    import numpy.typing as npt

    from fremap.locations import RemoteSource
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
        The file; no file object. What is on a server (a URL, what else `RemoteStore` takes, or
        such a store) is fetched as it is touched, with mode "r" alone.
    mode : {"r+", "r", "w+", "c"}, default "r+"
        As `memmap` has it. "w+" writes a header.
    dtype : dtype, optional
        With "w+": type of the elements; float64 if not given.
    shape : int or tuple of int, optional
        With "w+", which needs it.
    fortran_order : bool, default False
        With "w+": whether the first index changes fastest.
    version : tuple of int, optional
        With "w+": the format's version, (1, 0) if not given, or (2, 0).
    budget : int, str or None, default "auto"
        As `memmap` has it.
    advice : {"auto", "normal", "random", "sequential"}, default "auto"
        As `memmap` has it.

    Returns
    -------
    memmap
        Of the file's type and shape.

    Raises
    ------
    FormatError
        The file has no header of an array, or one that cannot be read.
    ArgumentTypeError
        The elements are Python objects.
    ArgumentError
        The mode cannot be, or "w+" has no shape.
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
    is_store = isinstance(filename, Store)
    if isinstance(filename, Store) and not filename._core.is_provided:  # noqa: SLF001 - its other half
        raise ArgumentTypeError(
            "open_memmap: filename must be a path, or a store whose pages are fetched or computed, "
            f"not {type(filename).__name__}; give the path of its file"
        )
    if hasattr(filename, "read") and not is_store:
        raise ArgumentTypeError("open_memmap: filename must be a path, not a file object")
    options: dict[str, Any] = {"budget": budget, "advice": advice}
    source: Any = filename
    if is_store or is_remote(filename):
        if mode not in ("r", "readonly"):
            raise ArgumentError(
                f"open_memmap: mode is {mode!r}; what is on a server or computed is only read, "
                'with mode "r"'
            )
        if not is_store:
            from fremap.remote_store import RemoteStore  # `import fremap` does without it

            # One store for both, so that header and elements are of one version.
            store = RemoteStore(cast("RemoteSource", filename))
            try:
                return _shown(store, mode, options)
            except BaseException:
                store.close()
                raise
    elif mode in ("w+", "write"):
        return _created(source, dtype, shape, fortran_order, version, options)
    return _shown(source, mode, options)


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
        The file; or what is on a server, as `open_memmap` has it.
    mmap_mode : {"r", "r+", "c"}, default "r"
        As `memmap` has its mode.
    budget : int, str or None, default "auto"
        As `memmap` has it.
    advice : {"auto", "normal", "random", "sequential"}, default "auto"
        As `memmap` has it.

    Returns
    -------
    memmap
        Of the file's type and shape.

    Raises
    ------
    FormatError
        The file has no header of an array, or one that cannot be read.
    ArgumentTypeError
        The elements are Python objects.
    ArgumentError
        The mode cannot be.
    StoreError
        The file cannot be opened.
    """
    if mmap_mode not in ("r", "r+", "c"):
        raise ArgumentError(f'load: mmap_mode is {mmap_mode!r}; it must be "r", "r+" or "c"')
    return open_memmap(file, mmap_mode, budget=budget, advice=advice)


def _shown(source: Any, mode: Mode, options: dict[str, Any]) -> memmap:
    """Show the array of a file that there is."""
    kind, shape, fortran, offset = _header(source)
    return memmap(source, kind, mode, offset, shape, "F" if fortran else "C", **options)


def _header(source: Any) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Read the type, the shape, the order, and where the elements begin."""
    if isinstance(source, Store):
        with Opened(source, "load") as opened:
            shape, fortran, kind, offset = described(opened.header)
    else:
        with FileStore(source) as store:
            header = Header(store.fileno(), os.fspath(source), store.size, "load")
            shape, fortran, kind, offset = described(header)
    if kind.hasobject:
        raise ArgumentTypeError(f"load: elements of dtype {kind} cannot lie in a file")
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
    whole = memmap(path, mode="w+", shape=offset)
    whole[:] = np.frombuffer(front.getbuffer(), np.uint8)
    del whole
    return memmap(path, kind, "r+", offset, dimensions, "F" if fortran else "C", **options)
