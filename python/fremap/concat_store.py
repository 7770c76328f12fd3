"""`ConcatStore`: the pages of several stores, one store after the other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from fremap import _core, errors
from fremap.arguments import counted
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.stores import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

    from fremap.stores import Elements, Shown

__all__ = ["ConcatStore", "concat"]

_NPY_MAGIC = b"\x93NUMPY"


class ConcatStore(Store):
    """The pages of several stores, one store after the other; what `concat` returns.

    Parameters
    ----------
    stores : iterable of Store
        At least one, with pages of one size. All but the last have whole pages.

    Raises
    ------
    ArgumentError
        Page sizes differ, a file other than the last ends within a page, a writable file is
        given twice, or the data of an ``.npy`` file does not begin at a page.
    ArgumentTypeError
        Something in `stores` is not a store.
    ClosedError
        One of the stores is closed.
    StoreError
        A file's size cannot be asked for, or its first bytes cannot be read.

    Notes
    -----
    The files stay open as long as this store or a window on it exists. But once one of `stores`
    is closed, calls of this store raise `ClosedError`. Closing this store does not close the
    others. It is writable if all of them are. `refresh` reads only the last file's size again:
    the sizes of the others determine the numbers of the pages after them. At most 4096 of its
    files are mapped to copy cached pages; the others are read by system calls. Pickling
    pickles `stores`.
    """

    __slots__ = ("_first_pages", "_stores")

    def __init__(self, stores: Iterable[Store]) -> None:
        self._stores = tuple(stores)
        for store in self._stores:
            if not isinstance(store, Store):
                raise ArgumentTypeError(
                    f"concat: stores must be stores, not {type(store).__name__}; fremap.open() "
                    "makes one of a path"
                )
            provided = store._core.is_provided  # noqa: SLF001 - the other half
            if not (store.closed or provided or isinstance(store, ConcatStore)):
                _check_npy(store)
        cores = [store._core for store in self._stores]  # noqa: SLF001 - the other half
        self._core = _core.Store.concat(cores)
        counts = [store.page_count for store in self._stores]
        self._first_pages = np.cumsum([0, *counts[:-1]], dtype=np.int64)

    @property
    def stores(self) -> tuple[Store, ...]:
        """The stores that it consists of, in order."""
        return self._stores

    def _check_elements(self, elements: Elements, shown: Shown) -> None:
        """Refuse elements that would begin in one file and end in another."""
        if self.page_bytes % elements.dtype.itemsize:
            self._check_pages(elements, shown.mapping)

    def _check_extents(self, elements: Elements, extent_pages: int) -> None:
        if self.page_bytes % elements.dtype.itemsize:
            for key in np.unique(self._first_pages // extent_pages):
                first = key * extent_pages
                self._check_pages(elements, np.arange(first, first + extent_pages))

    def _check_pages(self, elements: Elements, pages: npt.NDArray[np.int64]) -> None:
        """Do that where memory shows these pages one after the other."""
        item_bytes = elements.dtype.itemsize
        pages = pages[: -(-elements.used_bytes // self.page_bytes)]
        # Of empty stores that begin with a page, too, the last is the one that has it.
        store_of = np.searchsorted(self._first_pages, pages, side="right") - 1
        meets = np.flatnonzero((store_of[1:] != store_of[:-1]) & (pages[1:] >= 0))
        starts = (meets + 1) * self.page_bytes
        within = np.flatnonzero((starts % item_bytes != 0) & (pages[meets] >= 0))
        if len(within):
            before, after = store_of[meets[within[0]]], store_of[meets[within[0]] + 1]
            raise ArgumentError(
                f"array: an element of dtype {elements.dtype} ({item_bytes} bytes) would lie "
                f"partly in {_name(self._stores[before])} and partly in "
                f"{_name(self._stores[after])}, which meet at byte {starts[within[0]]}; use "
                "fremap.rows, which reads rows of any length from each file"
            )

    def _called(self) -> str:
        return f"of {counted(len(self._stores), 'store')}"

    def __reduce__(self) -> tuple[Callable[..., ConcatStore], tuple[object, ...]]:
        self._check_pickled()
        return type(self), (self._stores,)


def concat(stores: Iterable[Store]) -> ConcatStore:
    """Join stores to one store, whose pages are those of the first, then of the second, ….

    Parameters
    ----------
    stores : iterable of Store
        At least one, with pages of one size. All but the last have whole pages.

    Returns
    -------
    ConcatStore
        The store; it does not own `stores`.

    Raises
    ------
    ArgumentError
        Page sizes differ, a file other than the last ends within a page, a writable file is
        given twice, or the data of an ``.npy`` file does not begin at a page.
    ArgumentTypeError
        Something in `stores` is not a store.
    ClosedError
        One of the stores is closed.
    StoreError
        A file's size cannot be asked for, or its first bytes cannot be read.

    Notes
    -----
    ``fstat(2)`` and one ``pread(2)`` of 12 bytes for each file; nothing is opened or mapped.

    Examples
    --------
    >>> import fremap
    >>> left = fremap.MemoryStore(2 * 4096, page_bytes=4096)
    >>> right = fremap.MemoryStore(4096, page_bytes=4096)
    >>> with fremap.concat([left, right]) as store:
    ...     store.write(2, b"r" * 4096)
    ...     store.page_count, bytes(right.read(0)[0, :3])
    (3, b'rrr')
    """
    return ConcatStore(stores)


def _name(store: Store) -> str:
    path = getattr(store, "path", None) or getattr(store, "name", None)
    return repr(store) if path is None else os.fsdecode(path)


def _check_npy(store: Store) -> None:
    """Refuse an ``.npy`` file, whatever it is called, whose data lies beside the pages."""
    try:
        start = os.pread(store.fileno(), 12, 0)
    except OSError as error:
        message = f"concat: {_name(store)} cannot be read: {error.strerror}"
        path = getattr(store, "path", None)
        number = error.errno or 0
        name = None if path is None else os.fsencode(path)
        raise errors._system("io", message, number, name, 0, 0) from error  # noqa: SLF001
    if len(start) < 12 or not start.startswith(_NPY_MAGIC):
        return
    length_bytes = 2 if start[6] == 1 else 4
    data_offset = 8 + length_bytes + int.from_bytes(start[8 : 8 + length_bytes], "little")
    if data_offset % store.page_bytes:
        raise ArgumentError(
            f"concat: {_name(store)} is an npy file whose data begins at byte {data_offset}, off "
            "the pages; use fremap.rows, which knows the format"
        )
