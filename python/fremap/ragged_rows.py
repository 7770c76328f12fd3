"""Rows of unequal length: documents of tokens, sparse rows, lists; many in one call."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TypeAlias

import numpy as np

from fremap import errors
from fremap.arguments import absolute_path, filled_memory
from fremap.closing import ClosedOnExit
from fremap.dtypes import ElementType, empty, is_tensor, said_type, shown_as
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.formats import arrow, megatron, told_format
from fremap.locations import is_remote
from fremap.rowids import as_mask, mask_of, select
from fremap.rows import Rows
from fremap.selection import Numbering
from fremap.shards import Kind
from fremap.sources import Fetched, Opened, is_single, name_of, named_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Unpack

    import numpy.typing as npt

    from fremap.batches import Batches, BatchOptions
    from fremap.dtypes import TypeLike
    from fremap.epochs import Order
    from fremap.pending import Pending
    from fremap.rowids import RowIds
    from fremap.sources import RowsSource
    from fremap.stats import RowsStats

__all__ = ["Ragged", "RaggedRows", "ragged"]


# The elements, and of each row the first and how many.
_Found: TypeAlias = "tuple[Rows, npt.NDArray[np.int64], npt.NDArray[np.int64]]"


class RaggedRows(NamedTuple):
    """Rows that were taken: row i is ``values[offsets[i]:offsets[i + 1]]``.

    Parameters
    ----------
    values : ndarray or torch.Tensor
        The elements of all rows, one row after another.
    offsets : ndarray of int64
        Where each row begins; the last entry is the end of the last row.
    """

    values: Any
    offsets: npt.NDArray[np.int64]


class Ragged(ClosedOnExit):
    """Rows of unequal length, numbered through one file or several; what `ragged` returns.

    Parameters
    ----------
    source : path, Store, h5py.Dataset, several of these, or Rows
        The elements; the same sources as for `rows`.
    offsets : array of int or path, optional
        The element at which each row begins; the last entry is the end of the last row. An
        array, or the path of an ``.npy`` file. Leave it out for Megatron's files, which have
        an index, and for columns of lists in Arrow files (`column`).
    dtype : dtype, optional
        Type of the elements, as for `rows`.
    row_shape : int or tuple of int, optional
        Shape of an element, if it is not a single number; as for `rows`.
    **options
        Options of `rows`: `offset`, `tensor`, `column`, `format`, `budget`, `direct`.

    Raises
    ------
    FormatError
        A header is wrong, a file is truncated, or the offsets do not fit the elements.
    StoreError
        A file cannot be opened.
    ArgumentError
        The offsets are not integers, or an argument is invalid.

    Notes
    -----
    fremap keeps the offsets in memory: 16 bytes a row. It opens, maps and closes the files as
    `Rows` does; threads, children of fork and pickles work in the same way.

    A row is one contiguous part of a file, or several parts if it crosses files. Each part is
    copied or read as a whole. All reads of a take are in flight together, and rows that lie
    close to each other are read by one request.

    Examples
    --------
    >>> import fremap, numpy as np, tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     np.arange(10, dtype=np.int16).tofile(file.name)
    ...     with fremap.ragged(file.name, [0, 3, 3, 10], np.int16) as documents:
    ...         values, offsets = documents.take([2, 1, 0])
    >>> values
    array([3, 4, 5, 6, 7, 8, 9, 0, 1, 2], dtype=int16)
    >>> offsets
    array([ 0,  7,  7, 10])
    """

    __slots__ = (
        "__weakref__",
        "_lengths",
        "_starts",
        "_table",
    )

    def __init__(
        self,
        source: RowsSource | Rows,
        offsets: Any = None,
        dtype: TypeLike | None = None,
        row_shape: SupportsIndex | Sequence[SupportsIndex] | None = None,
        **options: Any,
    ) -> None:
        if offsets is None:
            table, starts, lengths = _found(source, dtype, options)
        else:
            bounds = _bounds(offsets)
            starts, lengths = bounds[:-1], np.diff(bounds)
            if isinstance(source, Rows):
                table = source
            else:
                table = Rows(source, dtype, row_shape, **options)
        try:
            # Its own rows: the caller may close those that were given.
            self._begin(table._with(table._shards, table._kind), starts, lengths)  # noqa: SLF001
        finally:
            if table is not source:
                table.close()

    def _begin(
        self, table: Rows, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> None:
        count = len(table)
        wrong = np.flatnonzero((lengths < 0) | (starts < 0) | (starts + lengths > count))
        if len(wrong):
            at = int(wrong[0])
            raise ArgumentError(
                f"ragged: row {at} goes from element {starts[at]} to {starts[at] + lengths[at]}; "
                f"offsets must not fall, and {_named(table)} has {count} elements"
            )
        self._table = table
        self._starts = starts
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def dtype(self) -> Any:
        """Type of the elements, as `Rows.dtype`."""
        return self._table.dtype

    @property
    def dtype_name(self) -> str:
        """What the elements are, as `Rows.dtype_name`."""
        return self._table.dtype_name

    @property
    def element_shape(self) -> tuple[int, ...]:
        """Shape of an element: ``()`` for numbers."""
        return self._table.row_shape

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many elements each row has."""
        return self._lengths.copy()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._table.closed

    def take(self, ids: RowIds, out: Any = None) -> RaggedRows:
        """Return rows, in any order, one after another.

        Parameters
        ----------
        ids : int, slice, range, sequence or array of int
            Rows, repeats allowed; negative ones count from the end. An array of several axes
            is flattened.
        out : writable memory, optional
            Where to put the elements: a C-contiguous array or tensor of this dtype with at
            least as many elements, or a buffer of at least as many bytes.

        Returns
        -------
        RaggedRows
            The elements and the offsets. If `out` was given, the elements are its first part.

        Raises
        ------
        PageRangeError
            A row does not exist; also an `IndexError`.
        ArgumentTypeError
            `ids` are not integers.
        ArgumentError
            `out` has another type or shape, is too short, or is read-only.
        TruncatedError
            A file is shorter than it was.
        StoreError
            A row cannot be read.
        ClosedError
            `close` was called.

        See Also
        --------
        Rows.take : Rows of one size.
        """
        runs, memory, taken = self._asked(ids, out)
        self._table._core().take(runs, memory)  # noqa: SLF001 - its own
        return taken

    def _asked(
        self, ids: RowIds, out: Any
    ) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.uint8], RaggedRows]:
        """Return what the core takes, the memory that it fills, and what a caller gets."""
        rows = self._ids(ids)
        counts = self._lengths[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        element = self._table._kind.element  # noqa: SLF001 - its own
        shape = (int(offsets[-1]), *self._table.row_shape)
        if out is None:
            array = np.empty(shape, element.dtype)
            values: Any = shown_as(array, element.shown)
        else:
            values = _front(out, shape, element.dtype.itemsize)
            array = filled_memory("take", values, element, shape)
            if not isinstance(values, np.ndarray) and not is_tensor(values):
                values = array
        memory = array.reshape(-1).view(np.uint8)
        return [rows, self._starts[rows], counts], memory, RaggedRows(values, offsets)

    def _ids(self, ids: object) -> npt.NDArray[np.int64]:
        selection, _ = select(ids, len(self))
        if isinstance(selection, tuple):
            return np.arange(*selection)
        return Numbering("take", "row", len(self)).resolved(np.asarray(selection, np.int64))

    def __getitem__(self, index: Any) -> Any:
        """Return a row as an array for an int; for a slice, integers or a mask as `take` does."""
        if isinstance(index, tuple) or index is None or index is Ellipsis:
            raise ArgumentTypeError(
                f"ragged[{index!r}]: rows of unequal length are chosen by an int, a slice, "
                "integers or a mask alone"
            )
        mask = as_mask(index)
        if mask is not None:
            return self.take(np.flatnonzero(mask_of(mask, len(self))))
        _, leading = select(index, len(self))
        taken = self.take(index)
        return taken.values if leading == () else taken

    def __getitems__(self, ids: RowIds) -> list[Any]:
        """Return many rows as a list of arrays, read together."""
        values, offsets = self.take(ids)
        return [values[begin:end] for begin, end in itertools.pairwise(offsets.tolist())]

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over the rows, one by one; `batches` reads many together, ahead."""
        return map(self.__getitem__, range(len(self)))

    def submit(self, ids: RowIds, out: Any = None) -> Pending:
        """Begin to take rows and return at once.

        Parameters
        ----------
        ids : int, slice, range, sequence or array of int
            Rows, repeats allowed; negative ones count from the end. They are copied: you may
            change them as soon as this returns.
        out : writable memory, optional
            Where to put the elements; see `take`. Do not read it before the take has ended.

        Returns
        -------
        Pending
            The take, whose result is `RaggedRows`. If `out` was not given and you drop this
            object, the take is cancelled.

        Raises
        ------
        FremapError
            As `take`, for invalid arguments. `Pending.result` raises errors of reading.
        MemoryLimitError
            No thread can be started.

        See Also
        --------
        Rows.submit : The same for rows of one size.

        Examples
        --------
        >>> import fremap, numpy as np, tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     np.arange(10, dtype=np.int16).tofile(file.name)
        ...     with fremap.ragged(file.name, [0, 3, 3, 10], np.int16) as documents:
        ...         pending = documents.submit([2, 0])
        ...         values, offsets = pending.result()
        >>> values
        array([3, 4, 5, 6, 7, 8, 9, 0, 1, 2], dtype=int16)
        """
        from fremap.pending import Pending

        runs, memory, taken = self._asked(ids, out)
        core = self._table._core().submit(runs, memory, out is None)  # noqa: SLF001 - its own
        return Pending(core, taken)

    async def take_async(self, ids: RowIds, out: Any = None) -> RaggedRows:
        """Return rows as `take` does, without blocking the event loop.

        Parameters
        ----------
        ids : int, slice, range, sequence or array of int
            Rows, repeats allowed; negative ones count from the end.
        out : writable memory, optional
            Where to put the elements; see `take`.

        Returns
        -------
        RaggedRows
            The elements and the offsets.

        Raises
        ------
        FremapError
            As `take`.

        Notes
        -----
        ``await ragged.submit(ids, out)``; see `Rows.take_async`.
        """
        taken: RaggedRows = await self.submit(ids, out)
        return taken

    def batches(
        self, batch_size: SupportsIndex, order: Order = "shuffle", **options: Unpack[BatchOptions]
    ) -> Batches:
        """Return an iterator over the batches of an epoch, which reads ahead.

        Parameters
        ----------
        batch_size : int
            Rows of a batch.
        order : {"shuffle", "sequential"} or array of int, default "shuffle"
            All rows in random order, all rows in order, or the given rows.
        **options
            Options of `Batches`.

        Returns
        -------
        Batches
            The iterator, of `RaggedRows`; it is a context manager.

        Raises
        ------
        ArgumentError
            An argument is invalid, or the state is of other batches.
        PageRangeError
            `order` names a row that does not exist.
        """
        from fremap.batches import Batches

        return Batches(self, batch_size, order, **options)

    def _memory_for(self, ids: npt.NDArray[np.int64]) -> Any:
        """Return memory for a batch, which `take` then fills."""
        return empty((int(self._lengths[ids].sum()), *self._table.row_shape), self._table.dtype)

    def stats(self) -> RowsStats:
        """Return what the rows hold now, and what was done since they were opened, in elements.

        Returns
        -------
        RowsStats
            Counts. Other threads may change them meanwhile.
        """
        return self._table.stats()

    def close(self) -> None:
        """Close the files and unmap them; a second time does nothing."""
        self._table.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} rows"
        return f"<fremap.Ragged {_named(self._table)}: {state} of {self.dtype_name}>"

    def __reduce__(self) -> tuple[Callable[..., Ragged], tuple[object, ...]]:
        if self.closed:
            raise TypeError("closed Ragged cannot be pickled")
        return _reopen, (type(self), self._table, self._starts, self._lengths)


def _reopen(
    cls: type[Ragged],
    table: Rows,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
) -> Ragged:
    made = cls.__new__(cls)
    made._table, made._starts, made._lengths = table, starts, lengths  # noqa: SLF001 - its own
    return made


def _named(table: Rows) -> str:
    return name_of(table._shards[0].file)  # noqa: SLF001 - made of it


def _front(out: Any, shape: tuple[int, ...], item_bytes: int) -> Any:
    """Return as much of the front of `out` as is filled."""
    if hasattr(out, "shape") and hasattr(out, "dtype"):
        if tuple(out.shape[1:]) != shape[1:] or not len(out.shape) or out.shape[0] < shape[0]:
            raise ArgumentError(
                f"take: out has shape {tuple(out.shape)}; it must have {shape[0]} elements or "
                f"more, each of shape {shape[1:]}"
            )
        return out[: shape[0]]
    try:
        plain = memoryview(out).cast("B")
    except TypeError as error:
        raise ArgumentTypeError(f"take: out must be memory, not {type(out).__name__}") from error
    wanted = int(np.prod(shape)) * item_bytes
    if len(plain) < wanted:
        raise ArgumentError(f"take: out has {len(plain)} bytes; it must have {wanted} or more")
    return plain[:wanted]


def _bounds(offsets: Any) -> npt.NDArray[np.int64]:
    """Return where rows begin and the last one ends."""
    if isinstance(offsets, Rows):
        offsets = offsets[:]
    elif isinstance(offsets, str | bytes | os.PathLike):
        with Rows(offsets) as file:
            offsets = file[:]
    bounds = np.asarray(offsets)
    if bounds.ndim != 1 or bounds.dtype.kind not in "iu":
        raise ArgumentTypeError(
            f"ragged: offsets must be integers along one axis, not {bounds.dtype} of shape "
            f"{bounds.shape}"
        )
    if len(bounds) == 0:
        raise ArgumentError("ragged: offsets are empty; there must be one more offset than rows")
    if bounds.dtype.kind == "u" and int(bounds.max()) >= 1 << 63:
        raise ArgumentError(f"ragged: offset {bounds.max()} does not fit into 64 bits")
    return bounds.astype(np.int64)


def _found(source: Any, dtype: TypeLike | None, options: dict[str, Any]) -> _Found:
    """Return rows of files that know where they begin: Arrow's lists, Megatron's sequences."""
    if isinstance(source, Rows):
        raise ArgumentError("ragged: offsets are missing; the source does not say where rows begin")
    sources = [source] if is_single(source) else list(source)
    column = options.pop("column", None)
    if column is not None or (sources and _is_arrow(sources[0])):
        return _lists(sources, column, dtype, options)
    return _sequences([data for one in sources for data in _data_files(one)], dtype, options)


def _is_arrow(source: Any) -> bool:
    """Tell whether the first file of a source is one of Arrow's."""
    path = source if isinstance(source, str | bytes | os.PathLike) else b""
    if not os.path.isfile(os.fsdecode(path)):
        return os.fsdecode(path).endswith(".arrow")
    with Opened(absolute_path("ragged", path), "ragged") as opened:
        return told_format(opened.header, None, typed=True, offset=0) == "arrow"


def _lists(
    sources: list[Any], column: str | None, dtype: TypeLike | None, options: dict[str, Any]
) -> _Found:
    """Return the elements of lists in Arrow's files, and where in them each list is."""
    # The bytes of the files; each record batch has a part of the elements.
    with Rows(sources, np.uint8, format="raw", **options) as whole:
        shards, starts, lengths, kinds = [], [], [], []
        base = 0
        for shard in whole._shards:  # noqa: SLF001 - made for it
            with Opened(shard.file, "ragged") as opened:
                for values, offsets in arrow.lists(opened.header, column):
                    count = values.shape[0]
                    begin = values.data_offset
                    shards.append(shard._replace(data_offset=begin, row_count=count))
                    starts.append(offsets[:-1] + base)
                    lengths.append(np.diff(offsets))
                    base += count
                    held = ElementType(values.dtype, values.dtype_name, values.dtype)
                    kinds.append(Kind(held, values.shape[1:]))
        unlike = next((kind for kind in kinds if kind != kinds[0]), None)
        if unlike is not None:
            raise ArgumentError(
                f"ragged: lists of {unlike.element.name} {unlike.row_shape} and of "
                f"{kinds[0].element.name} {kinds[0].row_shape}; all must be alike"
            )
        element = kinds[0].element
        said = element if dtype is None else element.said(said_type("ragged", dtype))
        if said is None:
            raise ArgumentError(f"ragged: the lists hold {element.name}, not {dtype}")
        kind = kinds[0]._replace(element=said)
        table = whole._with(tuple(shards), kind)  # noqa: SLF001 - made for it
    return table, np.concatenate(starts), np.concatenate(lengths)


def _sequences(files: list[str], dtype: TypeLike | None, options: dict[str, Any]) -> _Found:
    """Return the elements of Megatron's files, and where in them each sequence is."""
    found: list[tuple[str, megatron.Index]] = []
    for data in files:
        fetched = Fetched()
        try:
            name = data.removesuffix(".bin") + ".idx"
            with Opened(fetched.store(name) if is_remote(name) else name, "ragged") as opened:
                found.append((data, megatron.index(opened.header)))
        finally:
            fetched.close()
    if not found:
        raise ArgumentError("ragged: an empty list of files has no rows")
    kinds = {index.dtype for _, index in found}
    if len(kinds) > 1:
        other = next(data for data, index in found if index.dtype != found[0][1].dtype)
        raise ArgumentError(
            f"ragged: {found[0][0]} has elements of {found[0][1].dtype}, {other} of others; all "
            "must be alike"
        )
    table = Rows([data for data, _ in found], dtype or kinds.pop(), format="raw", **options)
    bases = np.cumsum(table.shard_rows) - table.shard_rows
    for (data, index), elements in zip(found, table.shard_rows.tolist(), strict=True):
        beyond = np.flatnonzero(index.starts + index.lengths > elements)
        if len(beyond):
            raise errors.FormatError(
                f"ragged: {data} has {elements} elements, and its index says that row "
                f"{beyond[0]} ends behind them: it is truncated"
            )
    starts = [index.starts + base for (_, index), base in zip(found, bases.tolist(), strict=True)]
    return table, np.concatenate(starts), np.concatenate([index.lengths for _, index in found])


def _data_files(source: Any) -> list[str]:
    """Return the ``.bin`` files that a path or pattern of Megatron's means."""
    if not isinstance(source, str | bytes | os.PathLike):
        raise ArgumentError(
            f"ragged: offsets are missing, and {type(source).__name__} has no index; give them"
        )
    name = os.fsdecode(source)
    if not name.endswith((".bin", ".idx")) and not os.path.exists(name) and not is_remote(name):
        name += ".bin"  # Megatron's way of naming both
    paths = [name]
    if not is_remote(name):
        files: list[Any] = list(named_files(name, Fetched()).files)
        paths = list(map(os.fsdecode, files))
    return [path.removesuffix(".idx") + ".bin" if path.endswith(".idx") else path for path in paths]


def ragged(
    source: RowsSource | Rows,
    offsets: Any = None,
    dtype: TypeLike | None = None,
    row_shape: SupportsIndex | Sequence[SupportsIndex] | None = None,
    **options: Any,
) -> Ragged:
    """Open rows of unequal length, in one file or several.

    Parameters
    ----------
    source : path, Store, h5py.Dataset, several of these, or Rows
        The elements; the same sources as for `rows`. For Megatron's files, the path of the
        ``.bin`` or the ``.idx``, or the beginning that both share; a pattern or a list names
        several.
    offsets : array of int or path, optional
        The element at which each row begins; the last entry is the end of the last row. An
        array (such as ``indptr`` of a CSR matrix), the path of an ``.npy`` file, or `Rows`.
        Leave it out for Megatron's files, and for columns of lists in Arrow files (`column`).
    dtype : dtype, optional
        Type of the elements, as for `rows`.
    row_shape : int or tuple of int, optional
        Shape of an element, if it is not a single number; as for `rows`.
    **options
        Options of `rows`: `offset`, `tensor`, `column`, `format`, `budget`, `direct`.

    Returns
    -------
    Ragged
        The rows; it is a context manager.

    Raises
    ------
    FormatError
        A header is wrong, a file is truncated, or the offsets do not fit the elements.
    StoreError
        A file cannot be opened.
    ArgumentError
        The offsets are not integers, or an argument is invalid.

    See Also
    --------
    rows : Rows of one size.

    Examples
    --------
    >>> import fremap, numpy as np, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/values.npy", np.arange(100, 106))
    ...     np.save(f"{folder}/indptr.npy", np.array([0, 2, 2, 6]))
    ...     with fremap.ragged(f"{folder}/values.npy", f"{folder}/indptr.npy") as lists:
    ...         lists[0].tolist(), lists[-1].tolist(), lists.lengths.tolist()
    ([100, 101], [102, 103, 104, 105], [2, 0, 4])
    """
    return Ragged(source, offsets, dtype, row_shape, **options)
