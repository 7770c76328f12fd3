"""Rows of fixed size, in one file or thousands: many scattered rows in one call.

Use it for embedding tables, feature stores, token files and tensors: files much larger than memory,
from which a call reads scattered rows. Rows that are in the page cache are copied without a system
call; all others are read at the same time.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fremap import _core
from fremap.closing import ClosedByLast
from fremap.dtypes import said_type
from fremap.formats import names_of, said_format
from fremap.row_array import RowArray
from fremap.rowids import select
from fremap.settings import Budget, CheckedBudget, checked_budget, checked_size
from fremap.shards import (
    Kind,
    RowsSpec,
    Shard,
    checked_offsets,
    checked_shape,
    found_again,
    look,
)
from fremap.sources import RowsSource, as_it_is, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from fremap.dtypes import TypeLike
    from fremap.formats import Format
    from fremap.pending import Pending
    from fremap.rowids import RowIds
    from fremap.selection import CoreSelection
    from fremap.stats import RowsStats
    from fremap.stores import Store

__all__ = ["Rows", "RowsSource", "rows"]


class Rows(RowArray):
    """Rows of fixed size, with one numbering for one file or several; `rows` returns them.

    Parameters
    ----------
    source : path, Store, h5py.Dataset, or several of these
        The files, in order. A pattern as `glob` takes it (``"part-*.npy"``) names several;
        they are sorted by name, with numbers compared as numbers. A folder means the checkpoint
        in it: its index, or else all its safetensors files. fremap recognizes ``.npy``,
        safetensors, an index of these (``.safetensors.index.json``) and Arrow files by their
        content. Everything else is raw bytes.
    dtype : dtype, optional
        Type of the elements; required for raw bytes. It may be a type of ml_dtypes (or its
        name, such as ``"bfloat16"``). With a type of torch, rows are returned as tensors.
    row_shape : int or tuple of int, optional
        Shape of one row. Default for raw bytes: a row is one element.
    offset : int or sequence of int, default 0
        Bytes before the first row of each raw file: one number for all, or one for each.
    tensor : str or list of str, optional
        The tensor of safetensors files; required if there are several. A list of names or a
        pattern with one number (``"model.ngram.shard_{i}"``) joins several tensors to one
        table, in the order of the list or of the number. Each may be in any of the files.
    column : str, optional
        The column of Arrow files; required if there are several.
    format : {"npy", "safetensors", "arrow", "raw"}, optional
        The format of the files, if fremap does not recognize it or should ignore it.
    budget : int, str or None, default "auto"
        Memory for maps of the files and their page tables: bytes, or a size such as "64M". "auto":
        a share of half of the available memory. None: no limit. At least 2 MiB and a page table.
        Cached rows that find no room in it are read by system calls, which takes several times
        as long.
    direct : bool, default False
        Read past the page cache (``O_DIRECT``). Use it if the table is much larger than memory and
        you rarely take the same row twice: then its pages do not fill the page cache. Rows of a
        direct store are always read this way; one direct store among the files makes all of them
        direct.
    cache_bytes : int or str, default 0
        Memory for rows that are taken again and again: bytes, or a size such as "64M". See the
        notes of `Rows`.

    Raises
    ------
    FormatError
        A header is wrong, a file is truncated, or its size is not a multiple of a row.
    StoreError
        A file cannot be opened.
    ArgumentError
        The files do not have rows of the same kind, or an argument is invalid.

    Notes
    -----
    Any number of threads may take rows at once. The file sizes are those at the time of
    opening; rows of a file that was truncated since are an error. Rows show what other
    processes write to a file. While a file changes, and for some milliseconds afterwards, its
    rows are read by system calls.

    fremap opens a file when its rows are taken, and keeps at most a quarter of ``RLIMIT_NOFILE``,
    or 4096 files, open. If another file replaces one of them (as an atomic save does, by a rename),
    rows still come from the old file while fremap has it open. Of a file that was not open then,
    or was closed since, taking them raises ``ESTALE``. fremap never returns rows of the new file:
    make a new object for those.

    With `cache_bytes`, fremap keeps rows that are taken by lists of ids in memory. Rows that are
    taken again stay, and a scan does not displace them. Use it with `direct` if the memory is much
    smaller than the table and some rows are taken much more often than others: the page cache would
    keep a page of 4096 bytes for each of them. If the table fits into the page cache, it only costs
    time. Each take checks whether the files of kept rows have changed (``fstat``), and if so reads
    these rows again. Nevertheless, call `refresh` after you have written to the files: a row that
    is taken during a write may be kept with its old content, and a write through a shared mapping
    may not change the file's times. The memory does not count against the budget. Rows of computed
    and remote stores are not kept.

    A child of `fork` uses maps and descriptors of its own; pickling keeps the paths.
    Converting the object to an array (`numpy.asarray`, ``xarray.DataArray(rows)``) reads all
    rows into memory.

    Examples
    --------
    >>> import fremap, numpy as np, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/table.npy", np.arange(12).reshape(4, 3))
    ...     with fremap.rows(f"{folder}/table.npy") as table:
    ...         table.take([3, 0, -1]).tolist()
    [[9, 10, 11], [0, 1, 2], [9, 10, 11]]
    """

    __slots__ = (
        "__weakref__",
        "_budget",
        "_cache_bytes",
        "_core_now",
        "_direct",
        "_kind",
        "_own",
        "_owner",
        "_row_count",
        "_shards",
    )

    def __init__(
        self,
        source: RowsSource,
        dtype: TypeLike | None = None,
        row_shape: SupportsIndex | Sequence[SupportsIndex] | None = None,
        *,
        offset: SupportsIndex | Sequence[SupportsIndex] = 0,
        tensor: str | Sequence[str] | None = None,
        column: str | None = None,
        format: Format | None = None,  # noqa: A002 - what it is
        budget: Budget = "auto",
        direct: bool = False,
        cache_bytes: SupportsIndex | str = 0,
    ) -> None:
        spec = RowsSpec(
            None if dtype is None else said_type("rows", dtype),
            None if row_shape is None else checked_shape(row_shape),
            checked_offsets(offset),
            names_of(tensor),
            said_format(format),
            column,
        )
        kept = checked_size("rows: cache_bytes", cache_bytes)
        options = (checked_budget(budget, "rows"), bool(direct), kept)
        shards, kind, stores = look(source, spec)
        self._begin(shards, kind, *options, ClosedByLast(stores) if stores else None)

    def _begin(
        self,
        shards: tuple[Shard, ...],
        kind: Kind,
        budget: CheckedBudget,
        direct: bool,  # noqa: FBT001 - as the constructor was told
        cache_bytes: int = 0,
        own: ClosedByLast[Store] | None = None,
    ) -> None:
        self._own = own
        if own is not None:
            own.join(self)
        self._shards = shards
        self._kind = kind
        self._budget = budget
        self._direct = direct
        self._cache_bytes = cache_bytes
        self._open()
        self._row_count = self._core_now.row_count

    def _with(self, shards: tuple[Shard, ...], kind: Kind) -> Rows:
        """Return other rows of these files, with the same options."""
        made = type(self).__new__(type(self))
        made._begin(shards, kind, self._budget, self._direct, own=self._own)  # noqa: SLF001 - its own
        return made

    def _open(self) -> None:
        self._core_now = _core.Rows(
            self._shards, self._kind.row_bytes, self._budget, self._direct, self._cache_bytes
        )
        self._owner = os.getpid()

    def _core(self) -> _core.Rows:
        """Return the core's half, which a child of fork makes again.

        The parent's may have been in the middle of something in another thread.
        """
        if self._owner != os.getpid():
            closed = self._core_now.closed
            self._open()
            if closed:
                self._core_now.close()
        return self._core_now

    @property
    def shard_rows(self) -> npt.NDArray[np.int64]:
        """Number of rows in each file, joined tensor or record batch, in order."""
        return np.array([shard.row_count for shard in self._shards], dtype=np.int64)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core_now.closed

    def take(self, ids: RowIds, out: Any = None) -> Any:
        """Return rows, in any order.

        Parameters
        ----------
        ids : int, slice, range, sequence or array of int
            Rows, repeats allowed; negative ones count from the end.
        out : writable memory, optional
            Where to put them: a C-contiguous array, tensor or buffer of this dtype and shape,
            or of plain bytes of the right length. A tensor may be of any type of torch,
            including bfloat16 and float8, and pinned. Do not pass a mapping of the files
            themselves: rows would be overwritten while they are read.

        Returns
        -------
        ndarray or torch.Tensor, shape ``ids.shape + row_shape``
            The rows in the order asked for; `out` if that is an array or a tensor, else an
            array over its memory.

        Raises
        ------
        PageRangeError
            A row does not exist; also an `IndexError`.
        ArgumentTypeError
            `ids` are not integers.
        ArgumentError
            `out` has another type or shape, or is read-only.
        TruncatedError
            A file is shorter than it was; ``error.row`` and ``error.filename`` say which.
        StoreError
            A row cannot be read, or another file has replaced its file (``ESTALE``).
        ClosedError
            `close` was called.

        Notes
        -----
        Rows in mapped parts of the files are copied. The others are read by ``io_uring``
        (Linux 5.11; otherwise by a pool of threads): sorted, neighbours merged, up to 128
        requests in flight. The GIL is released. Ctrl-C ends the call within 100 ms. After an
        error, `out` may be partly written.

        Examples
        --------
        >>> import fremap, numpy as np, tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     np.arange(10, dtype=np.int16).tofile(file.name)
        ...     with fremap.rows(file.name, np.int16, 2) as pairs:
        ...         pairs.take([[4, 0], [1, 1]]).tolist()
        [[[8, 9], [0, 1]], [[2, 3], [2, 3]]]
        """
        selection, leading = select(ids, self._row_count)
        filled, memory = self._memory("take", leading, out)
        self._core().take(selection, memory)
        return self._shown(filled, out)

    def __dask_tokenize__(self) -> object:
        """Return what dask names a graph by: the state of the files, and where the rows lie."""
        return (
            "fremap.Rows",
            str(self.dtype),
            self._kind.row_shape,
            [(*as_it_is(shard.file), shard.data_offset, shard.row_count) for shard in self._shards],
        )

    def _fill(self, selection: CoreSelection, memory: npt.NDArray[Any]) -> None:
        self._core().take(selection, memory)

    def submit(self, ids: RowIds, out: Any = None) -> Pending:
        """Begin to take rows and return at once.

        Parameters
        ----------
        ids : int, slice, range, sequence or array of int
            Rows, repeats allowed; negative ones count from the end. They are copied: you may
            change them as soon as this returns.
        out : writable memory, optional
            Where to put them; see `take`. Do not read it before the take has ended.

        Returns
        -------
        Pending
            The take; wait for it or await it. If `out` was not given and you drop this object,
            the take is cancelled.

        Raises
        ------
        FremapError
            As `take`, for invalid arguments. `Pending.result` raises errors of reading.
        MemoryLimitError
            No thread can be started.

        Notes
        -----
        Up to four threads of the compiled core run the takes of the whole process, each of
        them one take at a time. They do not need the GIL. `close` lets running takes end.

        Examples
        --------
        >>> import fremap, numpy as np, tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     np.arange(10, dtype=np.int16).tofile(file.name)
        ...     with fremap.rows(file.name, np.int16, 2) as pairs:
        ...         first, second = pairs.submit([4]), pairs.submit([0])
        ...         first.result().tolist(), second.result().tolist()
        ([[8, 9]], [[0, 1]])
        """
        from fremap.pending import Pending

        selection, leading = select(ids, self._row_count)
        filled, memory = self._memory("take", leading, out)
        core = self._core().submit(selection, memory, out is None)
        return Pending(core, self._shown(filled, out))

    async def take_async(self, ids: RowIds, out: Any = None) -> Any:
        """Return rows as `take` does, without blocking the event loop.

        Parameters
        ----------
        ids : int, slice, range, sequence or array of int
            Rows, repeats allowed; negative ones count from the end.
        out : writable memory, optional
            Where to put them; see `take`.

        Returns
        -------
        ndarray or torch.Tensor, shape ``ids.shape + row_shape``
            The rows in the order asked for.

        Raises
        ------
        FremapError
            As `take`.

        Notes
        -----
        ``await rows.submit(ids, out)``. If the awaiting task is cancelled, the take ends
        early: `out` may be written until the reads in flight have ended.
        """
        return await self.submit(ids, out)

    def stats(self) -> RowsStats:
        """Return what the rows hold in memory, and what was done since they were opened.

        Returns
        -------
        RowsStats
            Counts. Other threads may change them meanwhile.
        """
        from fremap.stats import RowsStats

        return RowsStats(**self._core().stats())

    def refresh(self) -> None:
        """Forget the rows that `cache_bytes` keeps, so that they are read again.

        Rows that running takes have read so far are not kept either.
        """
        self._core().refresh()

    def close(self) -> None:
        """Close the files and unmap them; a second time does nothing.

        Notes
        -----
        Running takes are not affected: they keep the files and maps that they use.
        """
        self._core().close()
        if self._own is not None:
            self._own.leave(self)

    def __repr__(self) -> str:
        files = name_of(self._shards[0].file)
        count = len({shard.file for shard in self._shards})
        if count > 1:
            files = f"{count} files from {files} on"
        state = "closed" if self.closed else f"{self._row_count} rows"
        return f"<fremap.Rows {files}: {state} of {self.dtype_name} {self.row_shape}>"

    def _repr_html_(self) -> str:
        """Draw which rows lie in which file, for notebooks."""
        from fremap.pictures import files_picture

        held = ""
        if not self.closed:
            stats = self.stats()
            held = (
                f"{stats.mapped_bytes} bytes mapped, {stats.open_files} files open; "
                f"{stats.rows_copied} rows copied from the page cache, {stats.rows_read} read"
            )
        names = (name_of(shard.file) for shard in self._shards)
        return files_picture(repr(self), names, self.shard_rows, held)

    def __reduce__(self) -> tuple[Callable[..., Rows], tuple[object, ...]]:
        if self.closed:
            raise TypeError("closed Rows cannot be pickled")
        return _reopen, (
            type(self), self._shards, self._kind, self._budget, self._direct, self._cache_bytes,
            () if self._own is None else self._own.shared,
        )  # fmt: skip


def _reopen(
    cls: type[Rows],
    shards: tuple[Shard, ...],
    kind: Kind,
    budget: CheckedBudget,
    direct: bool,  # noqa: FBT001 - as the constructor was told
    cache_bytes: int = 0,
    stores: tuple[Store, ...] = (),
) -> Rows:
    rows = cls.__new__(cls)
    found = tuple(map(found_again, shards))
    own = ClosedByLast(stores) if stores else None
    rows._begin(found, kind, budget, direct, cache_bytes, own)  # noqa: SLF001 - its own
    return rows


def rows(
    source: RowsSource,
    dtype: TypeLike | None = None,
    row_shape: SupportsIndex | Sequence[SupportsIndex] | None = None,
    *,
    offset: SupportsIndex | Sequence[SupportsIndex] = 0,
    tensor: str | Sequence[str] | None = None,
    column: str | None = None,
    format: Format | None = None,  # noqa: A002 - what it is
    budget: Budget = "auto",
    direct: bool = False,
    cache_bytes: SupportsIndex | str = 0,
) -> Rows:
    """Open rows of fixed size, in one file or several.

    Parameters
    ----------
    source : path, Store, h5py.Dataset, or several of these
        The files, in order. A pattern as `glob` takes it (``"part-*.npy"``) names several;
        they are sorted by name, with numbers compared as numbers. A folder means the checkpoint
        in it: its index, or else all its safetensors files. fremap recognizes ``.npy``,
        safetensors, an index of these (``.safetensors.index.json``) and Arrow files by their
        content. Everything else is raw bytes.
    dtype : dtype, optional
        Type of the elements; required for raw bytes. It may be a type of ml_dtypes (or its
        name, such as ``"bfloat16"``). With a type of torch, rows are returned as tensors.
    row_shape : int or tuple of int, optional
        Shape of one row. Default for raw bytes: a row is one element.
    offset : int or sequence of int, default 0
        Bytes before the first row of each raw file: one number for all, or one for each.
    tensor : str or list of str, optional
        The tensor of safetensors files; required if there are several. A list of names or a
        pattern with one number (``"model.ngram.shard_{i}"``) joins several tensors to one
        table, in the order of the list or of the number. Each may be in any of the files.
    column : str, optional
        The column of Arrow files; required if there are several.
    format : {"npy", "safetensors", "arrow", "raw"}, optional
        The format of the files, if fremap does not recognize it or should ignore it.
    budget : int, str or None, default "auto"
        Memory for maps of the files and their page tables: bytes, or a size such as "64M". "auto":
        a share of half of the available memory. None: no limit. At least 2 MiB and a page table.
        Cached rows that find no room in it are read by system calls, which takes several times
        as long.
    direct : bool, default False
        Read past the page cache (``O_DIRECT``). Use it if the table is much larger than memory and
        you rarely take the same row twice: then its pages do not fill the page cache. Rows of a
        direct store are always read this way; one direct store among the files makes all of them
        direct.
    cache_bytes : int or str, default 0
        Memory for rows that are taken again and again: bytes, or a size such as "64M". See the
        notes of `Rows`.

    Returns
    -------
    Rows
        The rows; it is a context manager.

    Raises
    ------
    FormatError
        A header is wrong, a file is truncated, or its size is not a multiple of a row.
    StoreError
        A file cannot be opened.
    ArgumentError
        The files do not have rows of the same kind, or an argument is invalid.

    Notes
    -----
    Reads the header of each file, and no data.

    Examples
    --------
    >>> import fremap, numpy as np, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for number in range(3):
    ...         np.save(f"{folder}/{number}.npy", np.full((2, 4), number, np.float32))
    ...     files = [f"{folder}/{number}.npy" for number in range(3)]
    ...     with fremap.rows(files) as table:
    ...         table.shape, table[[5, 0, 3]][:, 0].tolist()
    ((6, 4), [2.0, 0.0, 1.0])
    """
    return Rows(
        source, dtype, row_shape, offset=offset, tensor=tensor, column=column, format=format,
        budget=budget, direct=direct, cache_bytes=cache_bytes,
    )  # fmt: skip
