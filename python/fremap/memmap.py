"""`memmap`: an array on a file, as `numpy.memmap` is, whose resident set keeps to a budget.

The array lies in a `Window` of engine "paged". `docs/memmap.md` compares the two, behaviour
by behaviour.
"""

from __future__ import annotations

import math
import mmap
import operator
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from fremap import _core, errors
from fremap.arguments import absolute_path, quantity
from fremap.errors import ArgumentError, PageTypeError, UnsupportedError
from fremap.protection import Prot
from fremap.settings import checked_budget
from fremap.stores import FileStore
from fremap.window import Window

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import BinaryIO, Self, SupportsIndex

    import numpy.typing as npt

__all__ = ["memmap"]

Budget: TypeAlias = Literal["auto"] | int | None

Mode: TypeAlias = Literal["r", "r+", "w+", "c", "readonly", "readwrite", "write", "copyonwrite"]
_MODES = ("r", "r+", "w+", "c")
_MODE_NAMES = {"readonly": "r", "readwrite": "r+", "write": "w+", "copyonwrite": "c"}
_WRITING = ("r+", "w+")
# Fewer rows are had by their faults sooner than by a call.
_LEAST_TAKEN = 4
_LEAST_POPULATED = 16
_POPULATED_PAGES = 4096
_WRITTEN_BYTES = 1 << 20


class Backing:
    """What an array and all its views show: a part of a file, in a window or a private mapping.

    Attributes
    ----------
    store : FileStore
        The file.
    window : Window or None
        Where it is shown; None for mode "c" and where there is nothing to show.
    origin : int
        The address at which the file's first byte would be, were it shown.
    start : int
        The byte of the file at which the window begins.
    filename, offset, mode, budget
        As `memmap` has them.
    """

    __slots__ = (
        "_pid", "_rows", "budget", "filename", "mode", "offset", "origin", "start", "store",
        "window",
    )  # fmt: skip

    def __init__(
        self,
        store: FileStore,
        window: Window | None,
        filename: str | Path | None,
        offset: int,
        mode: str,
        budget: Budget,
    ) -> None:
        self.store = store
        self.window = window
        self.origin = 0
        self.start = offset - offset % store.page_bytes
        self.filename = filename
        self.offset = offset
        self.mode = mode
        self.budget = budget
        self._rows: tuple[object, _core.Rows] | None = None
        self._pid = os.getpid()

    @property
    def inherited(self) -> bool:
        """Whether this is a child of fork, to which the window is its parent's."""
        return self._pid != os.getpid()

    @property
    def clean(self) -> bool:
        """Whether the file has all that the array has."""
        return self.mode == "r" or (self.window is not None and self.window.coherent)

    def rows(self, first_byte: int, row_bytes: int, count: int) -> _core.Rows:
        """Return rows of the file, to take some; the last that were asked for are kept."""
        key = (first_byte, row_bytes, count, os.getpid())  # a child of fork makes its own
        kept = self._rows
        if kept is None or kept[0] != key:
            places = [(self.store._core, first_byte, count)]  # noqa: SLF001 - the core's half
            kept = self._rows = (key, _core.Rows(places, row_bytes, self.budget))
        return kept[1]

    def unflushed(self) -> bool:
        """Tell whether the window has changes that the file has not."""
        window = self.window
        if window is None or window.coherent or not window.writable:
            return False
        return bool(window.dirty().any())


class memmap(np.ndarray[Any, np.dtype[Any]]):  # noqa: N801 - as numpy.memmap
    """An array on a file, read as it is touched, whose memory keeps to a budget.

    As `numpy.memmap`, whose parameters it has. What differs is that memory is bounded, and
    that what is stored to it reaches the file by `flush`, when its page has to leave, and
    when the last view is gone; at no other time.

    Parameters
    ----------
    filename : str, path or file object
        The file. Of a file object the descriptor is used.
    dtype : dtype, default uint8
        Type of the elements; no Python objects.
    mode : {"r+", "r", "w+", "c"}, default "r+"
        Read and write a file that exists; read it; create it or empty it, then read and
        write; or copy on write: what is stored stays in memory.
    offset : int, default 0
        Byte of the file at which the array begins.
    shape : int or sequence of int, optional
        As long as the file, of one dimension, if not given. With "r+" and "w+" a file that is
        too short is made longer.
    order : {"C", "F"}, default "C"
        Whether the last or the first index changes fastest.
    budget : "auto", int or None, default "auto"
        Bytes of memory that the array may take; "auto" is half of what is available, None no
        limit.

    Raises
    ------
    ArgumentError
        The mode, shape or offset cannot be, or the file is too short.
    PageTypeError
        The dtype holds Python objects or has no size.
    StoreError
        The file cannot be opened or made longer; a `FileNotFoundError` where it is missing.
    UnsupportedError
        A budget in bytes with mode "c", or where there is no userfaultfd.
    BudgetError
        The budget is too small for one batch of pages.

    Notes
    -----
    A `Window` of engine "paged", one ``mmap`` and ``userfaultfd(2)``, not coherent: what
    other processes write to the file is seen when a page is read the next time.
    With `budget` "auto" or None, where this process has no userfaultfd, the array is a
    ``MAP_SHARED`` mapping of the file, as `numpy.memmap` is; mode "c" is a ``MAP_PRIVATE``
    one. `engine` tells. Their memory is the page cache's and the kernel's to bound.

    Indexing by an array of rows (``a[ids]``, of a mask too) reads all pages that are absent
    together. Everything else reads them as they are touched. Any number of threads.

    Examples
    --------
    >>> import fremap, numpy as np, tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     table = fremap.memmap(file.name, "f4", "w+", shape=(1000, 16))
    ...     table[:] = np.arange(1000)[:, None]
    ...     table.flush()
    ...     fremap.memmap(file.name, "f4", "r", shape=(1000, 16))[[3, 999], 0]
    array([  3., 999.], dtype=float32)
    """

    __array_priority__ = -100.0  # as numpy.memmap

    _backing: Backing | None

    def __new__(
        cls,
        filename: str | os.PathLike[str] | BinaryIO,
        dtype: npt.DTypeLike = np.uint8,
        mode: Mode = "r+",
        offset: SupportsIndex = 0,
        shape: SupportsIndex | Sequence[SupportsIndex] | None = None,
        order: Literal["C", "F"] = "C",
        *,
        budget: Budget = "auto",
    ) -> Self:
        """Map the file; see the class."""
        layout = _Layout(dtype, mode, offset, shape, order)
        budget = checked_budget(budget)
        store = layout.opened(filename)
        # The store stays open in the backing; a failure closes it with its last reference.
        layout.fit(store)
        window, memory = _shown(store, layout, budget)
        self = super().__new__(
            cls,
            layout.shape,
            dtype=layout.dtype,
            buffer=memory,
            offset=layout.offset % store.page_bytes if layout.nbytes else 0,
            order=order,
        )
        name = _filename(filename, store)
        self._backing = Backing(store, window, name, layout.offset, layout.mode, budget)
        self._backing.origin = _address(self) - layout.offset
        return self

    def __array_finalize__(self, obj: object) -> None:
        """Pass on what is shown to views, and to nothing else."""
        backing = getattr(obj, "_backing", None)
        shares = backing is not None and np.may_share_memory(self, cast("memmap", obj))
        self._backing = backing if shares else None

    def __array_wrap__(
        self,
        array: npt.NDArray[Any],
        context: Any = None,
        return_scalar: bool | None = None,  # noqa: FBT001 - NumPy's; NumPy 1 gives none
    ) -> Any:
        """Return results as plain arrays, or scalars, as `numpy.memmap` does."""
        array = super().__array_wrap__(array, context)
        if self is array or type(self) is not memmap:
            return array
        if return_scalar or (return_scalar is None and array.ndim == 0):
            return array[()]
        return array.view(np.ndarray)

    def __getitem__(self, index: Any) -> Any:
        """Return an element, a view, or a new array of what was chosen."""
        if isinstance(index, np.ndarray | list):
            rows = self._rows_chosen(index)
            if rows is not None:
                return self._gathered(rows)
        result = super().__getitem__(index)
        if type(result) is memmap and result._backing is None:  # noqa: SLF001 - one of its own
            return result.view(np.ndarray)
        return result

    def _rows_chosen(self, index: npt.NDArray[Any] | list[Any]) -> npt.NDArray[np.int64] | None:
        """Return the rows that an index along the first axis means, if they are to be gathered.

        None for all that NumPy does as well, or refuses in its own words.
        """
        backing = self._backing
        if backing is None or backing.window is None or not self.flags.c_contiguous:
            return None
        if type(self) is not memmap:
            return None  # a subclass, of which NumPy makes the result
        if not backing.clean and backing.inherited:
            return None  # populating is not for a child
        least = _LEAST_TAKEN if backing.clean else _LEAST_POPULATED
        if self.ndim == 0 or self.nbytes == 0 or _length(index) < least:
            return None
        if isinstance(index, list) and not all(isinstance(i, int | np.integer) for i in index):
            return None
        chosen = np.asarray(index)
        if chosen.dtype == np.bool_:
            return np.flatnonzero(chosen) if chosen.shape == self.shape[:1] else None
        if chosen.dtype.kind not in "iu" or chosen.size == 0:
            return None
        if int(chosen.min()) < -len(self) or int(chosen.max()) >= len(self):
            return None
        rows = chosen.astype(np.int64)
        np.add(rows, len(self), out=rows, where=rows < 0)
        return rows

    def _gathered(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return rows in a new array, absent ones read all in flight together."""
        backing = cast("Backing", self._backing)
        out = np.empty((rows.size, *self.shape[1:]), dtype=self.dtype)
        row_bytes = self.nbytes // len(self)
        first_byte = _address(self) - backing.origin
        if backing.clean:
            taken = out.reshape(-1).view(np.uint8)
            backing.rows(first_byte, row_bytes, len(self)).take(rows.reshape(-1), taken)
        else:
            self._take_populated(rows.reshape(-1), first_byte - backing.start, row_bytes, out)
        return out.reshape(*rows.shape, *self.shape[1:])

    def _take_populated(
        self, rows: npt.NDArray[np.int64], first_byte: int, row_bytes: int, out: npt.NDArray[Any]
    ) -> None:
        """Take rows from the window, as many at a time as fit into a quarter of the budget."""
        window = cast("Window", self.window)
        plain, taken = self.view(np.ndarray), out
        if not plain.flags.aligned:
            # As bytes: NumPy would take from a copy of the whole array.
            plain = plain.reshape(len(self), -1).view(np.uint8)
            taken = out.reshape(-1).view(np.uint8).reshape(len(rows), row_bytes)
        pages_a_row = (row_bytes - 1) // window.page_bytes + 2
        budget_pages = window.stats().budget_bytes // window.page_bytes
        most = min(_POPULATED_PAGES, budget_pages // 4 or _POPULATED_PAGES)
        step = max(1, most // pages_a_row)
        for begin in range(0, len(rows), step):
            some = rows[begin : begin + step]
            if pages_a_row <= most:
                window.populate(_pages_of(some * row_bytes + first_byte, row_bytes, window))
            # All are within: "clip" spares NumPy a second buffer.
            np.take(plain, some, axis=0, out=taken[begin : begin + step], mode="clip")

    @property
    def filename(self) -> str | Path | None:
        """The file: a path if one was given, else its absolute name; None of a result."""
        return None if self._backing is None else self._backing.filename

    @property
    def offset(self) -> int | None:
        """Byte of the file at which the whole array begins, of views too; None of a result."""
        return None if self._backing is None else self._backing.offset

    @property
    def mode(self) -> str | None:
        """The mode that the file was opened with; None of a result."""
        return None if self._backing is None else self._backing.mode

    @property
    def window(self) -> Window | None:
        """The window that the array lies in; None in mode "c", of no bytes, and of a result."""
        return None if self._backing is None else self._backing.window

    def flush(self) -> None:
        """Write what was stored to the array, or to any view of its file, and make it durable.

        Raises
        ------
        StoreError
            Writing failed. The changes are still there: flush again.

        Notes
        -----
        `Window.flush`. Nothing to do in modes "r" and "c".
        """
        if self.window is not None and self.window.writable:
            self.window.flush()

    def tofile(
        self,
        fid: Any,
        sep: str = "",
        format: str = "%s",  # noqa: A002 - NumPy's names
    ) -> None:
        """Write the elements to a file, as `numpy.ndarray.tofile` does.

        Parameters
        ----------
        fid : file object, str or path
            Where to.
        sep : str, default ""
            Between elements; as binary if empty.
        format : str, default "%s"
            Of elements as text.

        Notes
        -----
        A piece at a time by way of other memory: where userfaultfd is user-mode-only, a
        system call that reads an absent page gets EFAULT.
        """
        if sep or self.window is None or not self.flags.c_contiguous:
            super().tofile(fid, sep, format)
            return
        flat = self.view(np.ndarray).reshape(-1)
        step = max(1, _WRITTEN_BYTES // self.itemsize)
        with nullcontext(fid) if hasattr(fid, "write") else open(os.fspath(fid), "wb") as file:
            for begin in range(0, flat.size, step):
                flat[begin : begin + step].copy().tofile(file)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle the file's name and the place in it; of results and mode "c" the content."""
        backing = self._backing
        if backing is None or backing.mode == "c":
            return self.view(np.ndarray).__reduce_ex__(protocol)
        if backing.filename is None:
            raise TypeError("a memmap on a file without a name cannot be pickled; open it by path")
        if backing.unflushed():
            raise TypeError(
                "a memmap with changes that the file has not cannot be pickled; call flush() first"
            )
        low, high = _bounds(self)
        settings = (backing.filename, backing.mode, backing.offset, backing.budget)
        place = (low - backing.origin, high - low, _address(self) - low)
        return _reopened, (type(self), settings, place, self.dtype, self.shape, self.strides)

    def __reduce__(self) -> Any:
        """Pickle as `__reduce_ex__` does."""
        return self.__reduce_ex__(2)


class _Layout:
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
            raise PageTypeError(f"memmap: elements of dtype {self.dtype} cannot lie in a file")
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

    def opened(self, file: Any) -> FileStore:
        """Open the file; created, if that is asked for."""
        writing = self.mode in _WRITING
        if hasattr(file, "read"):
            file.seek(0, os.SEEK_END)  # what the object has buffered is in the file then
            return FileStore(file.fileno(), "r+" if writing else "r")
        if self.mode == "w+":
            return FileStore(file, "w+", size=max(self.end, 1))
        return FileStore(file, "r+" if writing else "r")

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
                    f"memmap: the {available} bytes from offset {self.offset} on are no whole "
                    f"number of elements of {self.dtype.itemsize} bytes; give a shape"
                )
            self.shape = (available // self.dtype.itemsize,)
            self.nbytes = available
        if self.mode in _WRITING:
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
        raise PageTypeError(
            f"memmap: shape must be an integer or integers, not {shape!r}"
        ) from None
    if any(length < 0 for length in dimensions):
        raise ArgumentError(
            f"memmap: shape {dimensions} is negative; leave shape out to have all of the file"
        )
    return dimensions


def _lengthen(store: FileStore, size: int) -> None:
    """Make the file at least so many bytes long."""
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


def _shown(
    store: FileStore, layout: _Layout, budget: Budget
) -> tuple[Window | None, memoryview | mmap.mmap | bytearray | bytes]:
    """Return the memory that shows the array, from the page on in which it begins."""
    if layout.nbytes == 0:
        return None, b"\0" if layout.mode == "r" else bytearray(1)
    first = layout.offset // store.page_bytes
    if layout.mode == "c":
        if isinstance(budget, int):
            raise UnsupportedError(
                'memmap: mode "c" keeps what is stored in memory, so that a budget cannot hold; '
                'leave it out, or open a copy of the file with "r+"'
            )
        start = first * store.page_bytes
        private = mmap.mmap(
            store.fileno(), layout.end - start, access=mmap.ACCESS_COPY, offset=start
        )
        return None, private
    window = _window(store, layout, budget, first)
    return window, memoryview(window)


def _window(store: FileStore, layout: _Layout, budget: Budget, first: int) -> Window:
    count = -(-layout.end // store.page_bytes) - first
    prot = Prot.WRITE if layout.mode in _WRITING else Prot.READ
    try:
        return Window(
            store, count, first_page=first, prot=prot, coherent=False, engine="paged", budget=budget
        )
    except UnsupportedError as refusal:
        if isinstance(budget, int):
            raise UnsupportedError(
                f"memmap: memory cannot be kept to a budget here ({refusal}); without a budget "
                "the array is a plain mapping, whose memory is the page cache's"
            ) from refusal
    return Window(store, count, first_page=first, prot=prot, coherent=True, engine="alias")


def _filename(file: Any, store: FileStore) -> str | Path | None:
    """Return what `numpy.memmap` has as its filename."""
    if isinstance(file, os.PathLike):
        from pathlib import Path  # `import fremap` does without it

        return Path(file).resolve()
    if hasattr(file, "read"):
        name = getattr(file, "name", None)
        return os.fsdecode(absolute_path("memmap", name)) if isinstance(name, str) else None
    return None if store.path is None else os.fsdecode(store.path)


def _length(index: npt.NDArray[Any] | list[Any]) -> int:
    return 0 if isinstance(index, np.ndarray) and index.ndim == 0 else len(index)


def _address(array: npt.NDArray[Any]) -> int:
    """Return where in memory the element at index 0 is."""
    return int(array.__array_interface__["data"][0])


def _bounds(array: npt.NDArray[Any]) -> tuple[int, int]:
    """Return the lowest address of an array and the one after the highest."""
    low = high = _address(array)
    if array.size == 0:
        return low, low
    for length, stride in zip(array.shape, array.strides, strict=True):
        low += min(0, (length - 1) * stride)
        high += max(0, (length - 1) * stride)
    return low, high + array.itemsize


def _pages_of(
    first_bytes: npt.NDArray[np.int64], row_bytes: int, window: Window
) -> npt.NDArray[np.int64]:
    """Return the window pages in which rows lie, each once, in order."""
    first = first_bytes // window.page_bytes
    last = (first_bytes + row_bytes - 1) // window.page_bytes
    most = int((last - first).max())
    pages = np.minimum(first[:, None] + np.arange(most + 1), last[:, None]).reshape(-1)
    pages.sort()  # np.unique hashes, which takes ten times as long
    distinct: npt.NDArray[np.int64] = pages[np.concatenate([[True], pages[1:] != pages[:-1]])]
    return distinct


def _reopened(
    cls: type[memmap],
    settings: tuple[str | Path, str, int, Budget],
    place: tuple[int, int, int],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> memmap:
    """Open again what was pickled: only as much of the file as the array or view reached."""
    filename, mode, offset, budget = settings
    low, nbytes, first = place
    reopened: Mode = "r" if mode == "r" else "r+"
    whole = cls(filename, np.uint8, reopened, low, (nbytes,), budget=budget)
    backing = cast("Backing", whole._backing)
    backing.offset = offset
    view = np.ndarray.__new__(cls, shape, dtype, whole, first if nbytes else 0, strides)
    view._backing = backing  # noqa: SLF001 - its other half
    return view
