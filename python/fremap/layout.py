"""Where an array lies in its file, and how the file is opened for it."""

from __future__ import annotations

import fcntl
import math
import operator
import os
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from fremap import errors
from fremap.arguments import absolute_path, quantity
from fremap.dtypes import MAX_AXES
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.locations import is_remote
from fremap.stores import FileStore, Store

if TYPE_CHECKING:
    from pathlib import Path
    from typing import SupportsIndex

    import numpy.typing as npt

__all__ = ["WRITING", "Layout", "found_at", "numpys_filename"]

WRITING = ("r+", "w+")
_MODES = ("r", "r+", "w+", "c")
_MODE_NAMES = {"readonly": "r", "readwrite": "r+", "write": "w+", "copyonwrite": "c"}


class Layout:
    """Where in its file an array lies: what is asked for, checked before the file is touched."""

    __slots__ = ("_dimensions", "dtype", "mode", "nbytes", "offset", "shape")

    def __init__(
        self, dtype: npt.DTypeLike, mode: str, offset: SupportsIndex, shape: Any, order: str
    ) -> None:
        self.mode = _MODE_NAMES.get(mode, mode)
        if self.mode not in _MODES:
            known = ", ".join([*_MODES, *_MODE_NAMES])
            raise ArgumentError(f"memmap: mode is {mode!r}; it must be one of {known}")
        if order not in ("C", "F"):
            raise ArgumentError(f'memmap: order is {order!r}; it must be "C" or "F"')
        self.dtype = np.dtype(dtype)
        if self.dtype.hasobject or self.dtype.itemsize == 0:
            raise ArgumentTypeError(f"memmap: elements of dtype {self.dtype} cannot lie in a file")
        self.offset = quantity("memmap: offset", offset)
        self._dimensions = None if shape is None else _dimensions(shape)
        if self.mode == "w+" and self._dimensions is None:
            raise ArgumentError('memmap: mode "w+" needs a shape')
        self.shape: tuple[int, ...] = self._dimensions or ()
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte of the file after the array's last."""
        return self.offset + self.nbytes

    def pages(self, page_bytes: int) -> range:
        """Return the pages of the file that the array is on; one for an array of no bytes."""
        first = self.offset // page_bytes
        return range(first, -(-self.end // page_bytes) if self.nbytes else first + 1)

    def opened(self, file: Any) -> FileStore:
        """Open the file; created, if that is asked for."""
        is_provided = isinstance(file, Store) and file._core.is_provided  # noqa: SLF001 - its other half
        if is_provided or is_remote(file):
            if self.mode != "r":
                raise ArgumentError(
                    f"memmap: mode is {self.mode!r}; objects on servers and computed pages are "
                    'read-only: use mode "r"'
                )
            from fremap.remote_store import RemoteStore  # `import fremap` does without it

            # Of a file's store no more is used than all have.
            return cast("FileStore", file if is_provided else RemoteStore(file))
        if isinstance(file, Store):
            raise ArgumentTypeError(
                "memmap: filename must be a path, a file object, or a store whose pages are "
                f"fetched or computed, not {type(file).__name__}; give the path of its file"
            )
        mode: Literal["r", "r+"] = "r+" if self.mode in WRITING else "r"
        if hasattr(file, "read"):
            file.seek(0, os.SEEK_END)  # what the object has buffered is in the file then
            file = file.fileno()
            if mode == "r+" and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_APPEND:
                # A mapping does not append; the store, by which nothing is written, must not.
                return _without_appending(file)
        elif self.mode == "w+" and not isinstance(file, int):
            return FileStore(file, "w+", size=max(self.end, 1))
        return FileStore(file, mode)

    def fit(self, store: FileStore) -> None:
        """Fill in a shape that was not given, and see that the file is long enough."""
        if self._dimensions is None:
            available = store.size - self.offset
            if available < 0:
                raise ArgumentError(
                    f"memmap: offset {self.offset} is beyond the file's {store.size} bytes"
                )
            if available % self.dtype.itemsize:
                raise ArgumentError(
                    f"memmap: the {available} bytes from offset {self.offset} on are not a whole "
                    f"number of elements of {self.dtype.itemsize} bytes; give a shape"
                )
            self.shape = (available // self.dtype.itemsize,)
            self.nbytes = available
        if self.mode in WRITING:
            # As numpy.memmap does, for which a file of no bytes would be no mapping.
            _lengthen(store, max(self.end, 1))
        elif store.size == 0:
            raise ArgumentError(
                'memmap: an empty file cannot be mapped; mode "r+" or "w+" makes it longer'
            )
        elif store.size < self.end:
            raise ArgumentError(
                f"memmap: the file has {store.size} bytes, and the array would end at byte "
                f'{self.end}; mode "r+" makes a file longer'
            )


def _dimensions(shape: Any) -> tuple[int, ...]:
    if hasattr(shape, "__index__") and not isinstance(shape, np.ndarray):
        shape = (shape,)
    try:
        dimensions = tuple(operator.index(length) for length in shape)
    except TypeError:
        raise ArgumentTypeError(
            f"memmap: shape must be an integer or integers, not {shape!r}"
        ) from None
    if len(dimensions) > MAX_AXES:
        raise ArgumentError(
            f"memmap: shape has {len(dimensions)} axes; NumPy has {MAX_AXES} at most"
        )
    if any(length < 0 for length in dimensions):
        raise ArgumentError(
            f"memmap: shape {dimensions} is negative; leave shape out to have all of the file"
        )
    return dimensions


def _lengthen(store: FileStore, size: int) -> None:
    """Make the file at least this many bytes long."""
    if store.size >= size:
        return
    try:
        os.ftruncate(store.fileno(), size)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 27  # EFBIG: more than an off_t
        path = None if store.path is None else os.fsencode(store.path)
        message = f"memmap: the file cannot be made {size} bytes long: {os.strerror(number)}"
        raise errors._system("system", message, number, path, None, 0) from error  # noqa: SLF001
    store.refresh()


def _without_appending(descriptor: int) -> FileStore:
    """Open the file of a descriptor again, to read and to write."""
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        message = (
            "memmap: the file was opened to append, and cannot be opened to be mapped: "
            f"{os.strerror(number)}"
        )
        raise errors._system("system", message, number, None, None, 0) from error  # noqa: SLF001
    try:
        return FileStore(own, "r+")
    finally:
        os.close(own)


def numpys_filename(file: Any, store: FileStore) -> str | Path | None:
    """Return what `numpy.memmap` has as its filename; of what is on a server its URL."""
    if store._core.is_provided:  # noqa: SLF001 - its other half
        return getattr(store, "url", None)
    if isinstance(file, os.PathLike):
        from pathlib import Path  # `import fremap` does without it

        return Path(file).resolve()
    if hasattr(file, "read"):
        name = getattr(file, "name", None)
        return os.fsdecode(absolute_path("memmap", name)) if isinstance(name, str) else None
    return None if store.path is None else os.fsdecode(store.path)


def found_at(store: FileStore, filename: str | Path | None) -> str | Path | Store | None:
    """Return where the file is found again: of a descriptor, where the kernel has it.

    A store without a file is pickled itself, with its options and the version that is meant.
    """
    if store._core.is_provided:  # noqa: SLF001 - its other half
        return store
    if store.path is not None:
        return filename
    path = os.readlink(f"/proc/self/fd/{store.fileno()}")
    try:
        same = os.path.samestat(os.stat(path), os.fstat(store.fileno()))
    except OSError:  # removed, or a file that never had a name
        return None
    return path if same else None
