"""`memmap`: an array on a file, like `numpy.memmap`, whose memory stays within a budget.

The array is a mapping of the file (a `Window` of engine "alias"). A thread unmaps what exceeds
the budget. `docs/memmap.md` says what differs from NumPy.
"""

from __future__ import annotations

import collections
import contextlib
import copyreg
import math
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, cast

import numpy as np

from fremap import _core, errors
from fremap.arguments import page_number
from fremap.errors import ArgumentError, UnsupportedError, ViewsAliveError
from fremap.layout import WRITING, Layout, found_at, numpys_filename
from fremap.protection import Prot, checked_prot
from fremap.rowids import select, select_mask
from fremap.selection import Numbering
from fremap.settings import Advice, Budget, CheckedBudget, checked_budget, chosen
from fremap.window import Window

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import BinaryIO, Self, SupportsIndex

    import numpy.typing as npt

    from fremap.selection import CoreSelection
    from fremap.stats import MemmapStats
    from fremap.stores import FileStore, Store

__all__ = ["memmap"]


Mode: TypeAlias = Literal["r", "r+", "w+", "c", "readonly", "readwrite", "write", "copyonwrite"]
# Fewer rows are had by their faults sooner than by a call.
_LEAST_TAKEN = 4
# Of the budget, what `a[ids]` may have mapped for itself; and the least that it can use: a
# block of 2 MiB and its page table.
_TAKING_SHARE = 4
_LEAST_TAKING_BYTES = (2 << 20) + 4096
# Arrays that keep what `a[ids]` reads with.
_MOST_TAKING = 32
# Whole rows are taken, and columns of them copied, where rows are no longer than that.
_WHOLE_ROW_BYTES = 16 << 10
# Nothing is copied, so there is nothing that was to be measured.
_UNMEASURED = {"alias_extent_pages": 1, "evict_gap_pages": 0, "batch_pages": 1}
# Numbers on most machines; `mmap` has it from Python 3.12 on.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
# What the kernel maps by one entry, where all of it is one folio.
_HUGE_PAGE = 2 << 20


class Backing:
    """The part of a file that an array and all its views show.

    Attributes
    ----------
    store : FileStore
        The file.
    window : Window or None
        The window that shows it; None if the array is empty.
    origin : int
        The address at which the file's first byte would be if the window showed it.
    start : int
        The byte of the file at which the window begins.
    path : str, path, Store or None
        How other processes can open the file again.
    mode, budget, advice
        The arguments of `memmap`.
    faults : tuple of int
        Minor and major faults of the process when the array was made.
    """

    __slots__ = (
        "__weakref__", "_rows", "advice", "budget", "faults", "mode", "origin", "path", "start",
        "store", "window",
    )  # fmt: skip

    def __init__(
        self,
        store: FileStore,
        window: Window | None,
        path: str | Path | Store | None,
        layout: Layout,
        budget: CheckedBudget,
        advice: Advice,
    ) -> None:
        self.store = store
        self.window = window
        self.origin = 0
        self.start = layout.offset - layout.offset % store.page_bytes
        self.path = path
        self.mode = layout.mode
        self.budget = budget
        self.advice = advice
        self.faults = _faults()
        self._rows: tuple[object, _core.Rows] | None = None

    def rows(self, first_byte: int, row_bytes: int, count: int) -> _core.Rows:
        """Return `Rows` over the file, to take some; the last such `Rows` are kept."""
        key = (first_byte, row_bytes, count, os.getpid())  # a child of fork makes its own
        kept = self._rows
        if kept is None or kept[0] != key:
            budget = self.budget
            if isinstance(budget, int):
                budget = max(budget // _TAKING_SHARE, _LEAST_TAKING_BYTES)
                if kept is None and self.window is not None and not self.window.closed:
                    self.window._lower_budget(budget)  # noqa: SLF001 - the two share one
            shard = (self.store, (0, 0, 0), self.store.size, first_byte, count)
            kept = self._rows = (key, _core.Rows([shard], row_bytes, budget))
            _taking.append(weakref.ref(self))
            while len(_taking) > _MOST_TAKING:
                # The longest made: it has a descriptor of its own to read with.
                oldest = _taking.popleft()()
                if oldest is not None and oldest is not self:
                    oldest._rows = None  # noqa: SLF001 - one of its kind
        return kept[1]


# Whose rows are kept. Appending and popping need no lock.
_taking: collections.deque[weakref.ref[Backing]] = collections.deque()


class _Kind(type):
    """The class of `memmap`, whose `__module__` is not where pickle finds it."""


def _found(cls: type) -> str | tuple[Any, ...]:
    """Return how pickle finds a class of this kind."""
    return (_memmap, ()) if cls is memmap else cls.__qualname__


copyreg.pickle(_Kind, _found)


def _memmap() -> type[memmap]:
    return memmap


class memmap(np.memmap[Any, np.dtype[Any]], metaclass=_Kind):  # noqa: N801 - as numpy.memmap
    """An array on a file, like `numpy.memmap`, whose memory stays within a budget.

    It is a ``MAP_SHARED`` mapping of the file (``MAP_PRIVATE`` with mode "c"), and supports
    everything that `numpy.memmap` does. When the budget is full, a thread unmaps the pages that
    were mapped first. Nothing is lost by that: the pages stay in the page cache, and a touch
    maps them again.

    Parameters
    ----------
    filename : str, path, file object or Store
        The file, or a file object with a descriptor. With mode "r" it may also be an object on
        a server (a URL, or anything else that `RemoteStore` takes), a `RemoteStore` or a
        `ComputedStore`: touching a page then fetches or computes it.
    dtype : dtype, default uint8
        Type of the elements; no Python objects.
    mode : {"r+", "r", "w+", "c"}, default "r+"
        "r+": read and write an existing file. "r": only read it. "w+": create or empty it, then
        read and write. "c": copy on write, changes stay in memory.
    offset : int, default 0
        Byte of the file at which the array begins.
    shape : int or sequence of int, optional
        Shape of the array. Default: one dimension, as long as the file. With "r+" and "w+" a
        file that is too short is made longer.
    order : {"C", "F"}, default "C"
        Whether the last or the first index changes fastest.
    budget : int, str or None, default "auto"
        Bytes, or a size such as "64M", that the array may have mapped, including page tables
        and what ``a[ids]`` needs. "auto": all objects with this budget share half of the
        available memory. None: no limit.
    advice : {"auto", "normal", "random", "sequential"}, default "auto"
        How the kernel reads ahead of touches (``madvise(2)``). "auto" begins with "normal",
        and stops read-ahead while touches are scattered (Linux 6.7).

    Raises
    ------
    ArgumentError
        The mode, shape or offset is invalid, or the file is too short.
    ArgumentTypeError
        The dtype holds Python objects or has no size.
    StoreError
        The file cannot be opened or made longer; also a `FileNotFoundError` if it is missing.

    Notes
    -----
    ``mmap(2)``, as engine "alias" of `Window`: one descriptor for each array, and one thread
    for all arrays of the process that are larger than their budget. The memory may exceed the
    budget until that thread has run, mostly by less than 32 MiB. In mode "c", changes stay in
    memory even if they exceed the budget; other pages are evicted by ``MADV_PAGEOUT`` (Linux
    5.4) if the user owns the file or may write it.

    Indexing by an array of rows or by a mask (``a[ids]``) reads all rows that are not in the
    page cache together. Everything else reads pages as they are touched.

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

    _backing: Backing | None
    _mmap: mmap.mmap | None
    mode: str

    def __new__(
        cls,
        filename: str | os.PathLike[str] | BinaryIO | Store | tuple[Any, str],
        dtype: npt.DTypeLike = np.uint8,
        mode: Mode = "r+",
        offset: SupportsIndex = 0,
        shape: SupportsIndex | Sequence[SupportsIndex] | None = None,
        order: Literal["C", "F"] = "C",
        *,
        budget: Budget = "auto",
        advice: Advice = "auto",
    ) -> Self:
        """Map the file; see the class."""
        layout = Layout(dtype, mode, offset, shape, order)
        budget = checked_budget(budget, "memmap")
        chosen("advice", advice, "memmap")
        # "w+" empties the file, so its memory, of which there may be none, comes first.
        mapped = _memory(layout) if layout.mode == "w+" else None
        store = layout.opened(filename)
        # The store stays open in the backing; a failure closes it with its last reference.
        layout.fit(store)
        memory: mmap.mmap | Window
        window: Window | None = None
        if store._core.is_provided and layout.nbytes:  # noqa: SLF001 - the core's half
            window = memory = _fetched_window(store, layout, budget, advice)
        else:
            memory = mapped = mapped or _memory(layout)
            if layout.nbytes:
                window = _ArrayWindow(store, layout, mapped, budget, advice)
        self = np.ndarray.__new__(
            cls,
            layout.shape,
            dtype=layout.dtype,
            buffer=memory,
            offset=layout.offset % store.page_bytes if layout.nbytes else 0,
            order=order,
        )
        # NumPy's attributes, which its `__array_finalize__` passes on to views.
        self._mmap = cast("mmap.mmap", memory)
        self.filename = numpys_filename(filename, store)  # type: ignore[assignment]
        self.offset = layout.offset
        self.mode = layout.mode
        path = found_at(store, self.filename)
        self._backing = Backing(store, window, path, layout, budget, advice)
        self._backing.origin = _address(self) - layout.offset
        return self

    def __array_finalize__(self, obj: object) -> None:
        """Pass on what is shown to views, and to nothing else."""
        super().__array_finalize__(obj)
        self._backing = getattr(obj, "_backing", None) if self._mmap is not None else None

    def __array_wrap__(
        self,
        array: npt.NDArray[Any],
        context: Any = None,
        return_scalar: bool | None = None,  # noqa: FBT001 - NumPy's; NumPy 1 gives none
    ) -> Any:
        """Return results as plain arrays, or scalars, as `numpy.memmap` does."""
        array = np.ndarray.__array_wrap__(self, array, context)
        if self is array or not _is_plain(self):
            return array
        if return_scalar or (return_scalar is None and array.ndim == 0):
            return array[()]
        return array.view(np.ndarray)

    def __getitem__(self, index: Any) -> Any:
        """Return an element, a view, or a new array of what was chosen."""
        columns = None
        ids = index
        if isinstance(index, tuple) and index and self._whole_rows(index[1:]):
            ids, columns = index[0], index[1:]
        if isinstance(ids, np.ndarray | list):
            rows = self._rows_chosen(ids)
            if rows is not None:
                taken = self._taken(rows)
                if columns:
                    # Rows first: they lie together in the file.
                    return taken[(slice(None),) * rows.ndim + columns].copy()
                return taken
        result = np.ndarray.__getitem__(self, index)
        if _is_plain(result) and result._mmap is None:  # noqa: SLF001 - one of its own
            return result.view(np.ndarray)
        return result

    def _whole_rows(self, columns: tuple[Any, ...]) -> bool:
        """Tell whether columns are had by taking whole rows first."""
        return (
            self.ndim > 1
            and all(isinstance(column, slice) or column is Ellipsis for column in columns)
            and self.itemsize * math.prod(self.shape[1:]) <= _WHOLE_ROW_BYTES
            and len(columns) < self.ndim
        )

    def _rows_chosen(self, index: npt.NDArray[Any] | list[Any]) -> npt.NDArray[np.int64] | None:
        """Return the rows that an index along the first axis means, if they are to be taken.

        None for all that NumPy does as well, or refuses in its own words.
        """
        backing = self._backing
        if backing is None or backing.window is None or not self.flags.c_contiguous:
            return None
        if not _is_plain(self):
            return None  # a subclass, of which NumPy makes the result
        if self.ndim == 0 or self.nbytes == 0 or _length(index) < _LEAST_TAKEN:
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

    def _taken(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return rows in a new array, absent ones read all in flight together."""
        backing = cast("Backing", self._backing)
        first_byte = _address(self) - backing.origin
        row_bytes = self.nbytes // len(self)
        budget = backing.budget
        small = isinstance(budget, int) and budget < 2 * _LEAST_TAKING_BYTES
        if backing.mode == "c" or small:
            # What was written is here alone; or there is no memory for another map.
            _read_ahead(backing.store, rows.reshape(-1) * row_bytes + first_byte, row_bytes)
            return np.take(self.view(np.ndarray), rows, axis=0)
        out = np.empty((*rows.shape, *self.shape[1:]), dtype=self.dtype)
        taken = out.reshape(-1).view(np.uint8)
        backing.rows(first_byte, row_bytes, len(self)).take(rows.reshape(-1), taken)
        return out

    @property
    def window(self) -> Window | None:
        """The window that shows the file; None for an empty array, and for a computed result."""
        return None if self._backing is None else self._backing.window

    def flush(self) -> None:
        """Make everything durable that was written to the array or to any of its views.

        Raises
        ------
        StoreError
            Writing failed.

        Notes
        -----
        ``fsync(2)``. Processes that map or read the file see every write at once, without this
        call. It does nothing in modes "r" and "c".
        """
        backing = self._backing
        if backing is not None and backing.mode in WRITING:
            backing.store.sync()

    def populate(self, rows: Any = None) -> None:
        """Read rows from the file now, and map them, so that touching them does not fault.

        Parameters
        ----------
        rows : int, slice, range, array of int or bool, optional
            Rows along the first axis. Default: all of this array or view.

        Raises
        ------
        PageRangeError
            A row is outside.
        StoreError
            Reading failed.

        Notes
        -----
        `Window.populate`: absent pages are read all in flight together. Pages that exceed the
        budget are unmapped again.
        """
        window, pages = self._pages("populate", rows)
        if window is not None:
            window.populate(pages)

    def evict(self, rows: Any = None) -> None:
        """Unmap rows; the next touch maps them again.

        Parameters
        ----------
        rows : int, slice, range, array of int or bool, optional
            Rows along the first axis. Default: all of this array or view.

        Raises
        ------
        PageRangeError
            A row is outside.
        UnsupportedError
            The mode is "c", in which changes would be lost.

        Notes
        -----
        `Window.evict`. The pages leave the process's memory but stay in the page cache, which
        the kernel reclaims when it needs memory. Other rows on these pages are unmapped, too.
        """
        window, pages = self._pages("evict", rows)
        if window is None:
            return
        if self._backing is not None and self._backing.mode == "c":
            raise UnsupportedError(
                'evict: an array of mode "c" keeps what was written to it only in its memory; '
                "delete the array to free it"
            )
        window.evict(pages)

    def _pages(self, operation: str, rows: Any) -> tuple[Window | None, Any]:
        """Return the window and the pages of it in which rows lie."""
        backing, window = self._backing, self.window
        if backing is None or window is None or self.size == 0:
            return None, None
        first = self if rows is None or self.ndim == 0 else self[0]
        low, high = _bounds(first)
        base = backing.origin + backing.start
        if first is self:
            return window, range(
                (low - base) // window.page_bytes, -(-(high - base) // window.page_bytes)
            )
        ids = _numbers(operation, rows, len(self))
        begins = ids * self.strides[0] + (low - base)
        return window, _pages_of(begins, high - low, window.page_bytes)

    def stats(self) -> MemmapStats:
        """Return how much of the array is in memory, and counts of what fremap did for it.

        Returns
        -------
        MemmapStats
            The numbers of the whole array that shows the file, even if this is a view of it.

        Raises
        ------
        ArgumentError
            The array is a computed result, not a view of a file.
        """
        from fremap.stats import MemmapStats  # `import fremap` does without it

        backing, window = self._backing, self.window
        if backing is None:
            raise ArgumentError("stats: this array is not a view of a file")
        minor, major = _faults()
        faults = {
            "minor_faults": minor - backing.faults[0],
            "major_faults": major - backing.faults[1],
        }
        if window is None:
            return MemmapStats(0, 0, 0, 0, "normal", **faults)
        stats = window.stats()
        return MemmapStats(
            mapped_bytes=stats.present_pages * window.page_bytes,
            page_table_bytes=stats.page_table_bytes,
            budget_bytes=stats.budget_bytes,
            blocks_trimmed=stats.blocks_trimmed,
            advice=window.advice or "normal",
            **faults,
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle the file's name and the place in it; of results and mode "c" the content."""
        backing = self._backing
        if backing is None or backing.mode == "c":
            return self.view(np.ndarray).__reduce_ex__(protocol)
        if backing.path is None:
            raise TypeError("a memmap on a file without a name cannot be pickled; open it by path")
        low, high = _bounds(self)
        settings = (backing.path, backing.mode, self.offset, backing.budget, backing.advice)
        place = (low - backing.origin, high - low, _address(self) - low)
        # None for the class itself, which cloudpickle would take along as a copy.
        cls = None if _is_plain(self) else type(self)
        return _reopened, (cls, settings, place, self.dtype, self.shape, self.strides)

    def __reduce__(self) -> Any:
        """Pickle as `__reduce_ex__` does."""
        return self.__reduce_ex__(2)


# Libraries ask ``type(a).__module__ == "numpy"`` to know an array of NumPy's: torch's
# ``default_convert`` does. `_Kind` has the class found where it is when it is pickled.
memmap.__module__ = "numpy"


def _is_plain(array: object) -> bool:
    """Tell whether an array is a `memmap` and not of a subclass."""
    return type(array) is memmap


def _memory(layout: Layout) -> mmap.mmap:
    """Return memory for the array, from the page on in which it begins, with nothing in it.

    An `mmap.mmap`, as NumPy's arrays have it: libraries look for it to know a mapped file. It
    has no descriptor, and the window maps the file there. The kernel maps 2 MiB of a file at
    once only where these are aligned in memory as in the file. Linux 6.7 and later align memory
    if its length is a multiple of that, so there may be more of it than the array needs.
    """
    prot = mmap.PROT_READ if layout.mode == "r" else mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    length = len(layout.pages(mmap.PAGESIZE)) * mmap.PAGESIZE
    if length >= _HUGE_PAGE:
        length = -(-length // _HUGE_PAGE) * _HUGE_PAGE
    try:
        return mmap.mmap(-1, length, flags=flags, prot=prot)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 12  # ENOMEM: more than the address space
        message = f"memmap: {layout.nbytes} bytes cannot be mapped: {os.strerror(number)}"
        raise errors._system("system", message, number, None, None, 0) from error  # noqa: SLF001


def _fetched_window(
    store: FileStore, layout: Layout, budget: CheckedBudget, advice: Advice
) -> Window:
    """Return a window whose pages are fetched when they are touched."""
    if advice != "auto":
        raise ArgumentError(
            f"memmap: advice is {advice!r}, which is for the kernel, and the kernel does not read "
            "objects on servers; leave it out"
        )
    pages = layout.pages(store.page_bytes)
    return Window(store, len(pages), first_page=pages.start, engine="paged", budget=budget)


class _ArrayWindow(Window):
    """The window of an array: in memory that is the array's, and private with mode "c"."""

    __slots__ = ()

    def __new__(
        cls,
        store: FileStore,
        layout: Layout,
        memory: mmap.mmap,
        budget: CheckedBudget,
        advice: Advice,
    ) -> Self:
        prot = Prot.READ if layout.mode == "r" else Prot.WRITE
        pages = layout.pages(store.page_bytes)
        self = _core.WindowBase.__new__(
            cls,
            store._core,  # noqa: SLF001 - the core's half
            len(pages),
            pages.start,
            "linear",
            checked_prot(prot),
            True,
            "alias",
            False,
            False,
            False,
            budget,
            "thread",
            "auto",
            _UNMEASURED,
            advice,
            memoryview(memory)[: len(pages) * store.page_bytes],
            layout.mode == "c",
        )
        self._store = store
        self._settings = {"prot": prot, "budget": budget, "tracking": "auto", "advice": advice}
        self._settings["calibration"] = None
        return self

    def __enter__(self) -> NoReturn:
        """Refuse a block whose end would close the window."""
        self.close()

    def close(self, *, discard: bool = False) -> NoReturn:  # noqa: ARG002 - as for others
        """Refuse to close what shows an array.

        Parameters
        ----------
        discard : bool, default False
            Has no effect.

        Raises
        ------
        ViewsAliveError
            Always: the window ends with its array, whose budget it keeps.
        """
        raise ViewsAliveError(
            "close: the window shows an array; it is closed when nothing refers to the array"
        )


def _faults() -> tuple[int, int]:
    """Return the process's minor and major faults so far."""
    import resource  # `import fremap` does without it

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt


def _read_ahead(store: FileStore, first_bytes: npt.NDArray[np.int64], row_bytes: int) -> None:
    """Start the reads of rows that are not in the page cache."""
    pages = _pages_of(first_bytes, row_bytes, store.page_bytes)
    # Where the kernel does not tell, asking for all of them is right too.
    with contextlib.suppress(UnsupportedError):
        pages = pages[~store.resident(pages)]
    store.prefetch(pages)


def _numbers(operation: str, rows: Any, count: int) -> npt.NDArray[np.int64]:
    """Return the numbers of rows, from 0 on."""
    numbering = Numbering(operation, "row", count)
    chosen: CoreSelection
    if isinstance(rows, slice | range) or page_number(rows):
        chosen = numbering.selection(rows)
    elif isinstance(rows, np.ndarray) and rows.dtype == np.bool_:
        chosen, _ = select_mask(rows, count)
    else:
        chosen, _ = select(rows, count)
    if isinstance(chosen, tuple):
        return np.arange(*chosen, dtype=np.int64)
    return numbering.resolved(np.asarray(chosen, np.int64))


def _pages_of(
    first_bytes: npt.NDArray[np.int64], row_bytes: int, page_bytes: int
) -> npt.NDArray[np.int64]:
    """Return the pages in which rows lie, each once, in order."""
    first = first_bytes // page_bytes
    last = (first_bytes + row_bytes - 1) // page_bytes
    if first.size == 0:
        return first
    most = int((last - first).max())
    pages = np.minimum(first[:, None] + np.arange(most + 1), last[:, None]).reshape(-1)
    pages.sort()  # np.unique hashes, which takes ten times as long
    distinct: npt.NDArray[np.int64] = pages[np.concatenate([[True], pages[1:] != pages[:-1]])]
    return distinct


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


def _reopened(
    cls: type[memmap] | None,
    settings: tuple[str | Path | Store, str, int, CheckedBudget, Advice],
    place: tuple[int, int, int],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> memmap:
    """Open again what was pickled: only as much of the file as the array or view reached."""
    path, mode, offset, budget, advice = settings
    low, nbytes, first = place
    reopened: Mode = "r" if mode == "r" else "r+"
    cls = memmap if cls is None else cls
    whole = cls(path, np.uint8, reopened, low, (nbytes,), budget=budget, advice=advice)
    view = np.ndarray.__new__(cls, shape, dtype, whole, first if nbytes else 0, strides)
    view._mmap, view._backing = whole._mmap, whole._backing  # noqa: SLF001 - its other half
    view.filename, view.mode, view.offset = whole.filename, whole.mode, offset
    return view
