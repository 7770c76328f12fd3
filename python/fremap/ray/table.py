"""The client: a table whose rows are on other machines."""

from __future__ import annotations

import os
from collections import deque
from contextlib import closing
from typing import TYPE_CHECKING, Any, SupportsIndex, TypedDict

import numpy as np
import ray

from fremap.arguments import checked_timeout, counted
from fremap.errors import ArgumentTypeError, ClosedError, ForkError
from fremap.ray.actors import Shard, numbered, on_nodes, settings_of, split, started
from fremap.ray.calls import Call, Round, awaited, got, left, session, submitted
from fremap.row_array import RowArray
from fremap.rowids import select
from fremap.selection import Numbering

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from typing import Unpack

    import numpy.typing as npt

    from fremap.dtypes import TypeLike
    from fremap.formats import Format
    from fremap.rowids import RowIds
    from fremap.selection import CoreSelection
    from fremap.settings import Budget
    from fremap.shards import Kind
    from fremap.sources import RowsSource

__all__ = ["DistributedRows"]

# Rows that a take asks all actors for at once; a second round is under way meanwhile. Of many
# actors each has so much to do that its rows, not the requests, take the time.
_ROUND_BYTES = 16 << 20
_ACTOR_BYTES = 1 << 20
_ROUNDS_AHEAD = 2
# Ray sends a value of up to 100 KiB, as pickled, with the answer. More than eight of them take
# as long as one that goes through the object store.
_INLINE_BYTES = 96 << 10
_MOST_INLINE = 8


class RowsOptions(TypedDict, total=False):
    """What `fremap.rows` may be told of the files of each actor."""

    offset: SupportsIndex | Sequence[SupportsIndex]
    tensor: str | Sequence[str] | None
    column: str | None
    format: Format | None
    budget: Budget
    direct: bool
    cache_bytes: SupportsIndex | str


class DistributedRows(RowArray):
    """Rows of fixed size that lie on several machines, read there by actors of Ray.

    Parameters
    ----------
    sources : mapping or sequence
        What each actor opens, in the order of the rows. A mapping starts one actor for each node:
        keys are the IDs, addresses or names of nodes, and values the files there, as `fremap.rows`
        takes them (a path, a pattern, a folder, a list). A sequence starts one actor for each
        source, and Ray places the actors by `actor_options`. Relative paths are made absolute on
        this machine.
    dtype : dtype, optional
        Type of the elements; see `fremap.rows`.
    row_shape : int or tuple of int, optional
        Shape of one row; see `fremap.rows`.
    actor_options : mapping or sequence of mapping, optional
        Options of Ray's ``Actor.options``, for all actors or for each: ``resources``,
        ``scheduling_strategy``, ``num_cpus``, ``memory``, ``max_concurrency``, ``max_restarts``.
    timeout : float, optional
        Seconds to wait for an answer: until all files are open, and for each round of a take (see
        the notes). None: no limit.
    **options
        Options of `fremap.rows`, the same for all actors: `offset`, `tensor`, `column`, `format`,
        `budget`, `direct`, `cache_bytes`.

    Raises
    ------
    ArgumentError
        The actors have rows of different kinds, there is no such node, or Ray refuses an option.
    StoreError
        An actor cannot open a file.
    ActorLostError
        An actor has died, or Ray cannot place it.
    TakeTimeoutError
        Not all actors have opened their files in time.

    See Also
    --------
    fremap.rows : The same on one machine.

    Notes
    -----
    fremap must be installed on every machine. If this process is not connected to Ray yet,
    ``ray.init()`` is called.

    An actor reserves no CPU in Ray, serves four requests at once, and is restarted up to three
    times; `actor_options` changes that. Requests are repeated after a restart, so a take survives
    it. A restarted actor continues only if it finds the same files or, on another machine, files of
    the same sizes. If Ray does not restart it any more, takes raise `ActorLostError`.

    A take asks for rows in rounds of 16 MiB, or of 1 MiB for each actor if that is more. Up to two
    rounds of a take are in the object stores. An actor holds at most one round for each request
    that it serves, in addition to the memory that `fremap.rows` uses.

    You can pass the object to other tasks and actors of Ray: it is pickled without the rows. The
    actors end when the object and all copies are closed or gone, or when the process that made it
    ends. Any number of threads may take at once. In an event loop, use `take_async`.

    Examples
    --------
    >>> import fremap.ray  # doctest: +SKIP
    >>> table = fremap.ray.DistributedRows(  # doctest: +SKIP
    ...     {"10.0.0.7": "/data/part-0*.npy", "10.0.0.8": "/data/part-1*.npy"}
    ... )
    >>> table.take([7, 100_000_000, -1])  # doctest: +SKIP
    """

    __slots__ = (
        "_closed", "_first", "_kind", "_owner", "_row_count", "_session", "_shards",
        "_timeout",
    )  # fmt: skip

    def __init__(
        self,
        sources: Mapping[str, RowsSource] | Sequence[RowsSource],
        dtype: TypeLike | None = None,
        row_shape: SupportsIndex | Sequence[SupportsIndex] | None = None,
        *,
        actor_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = 60.0,
        **options: Unpack[RowsOptions],
    ) -> None:
        unknown = options.keys() - RowsOptions.__annotations__.keys()
        if unknown:
            raise ArgumentTypeError(f"DistributedRows: rows has no option {min(unknown)!r}")
        checked = checked_timeout("DistributedRows", timeout)
        nodes, each = split(sources)
        settings = settings_of(actor_options, len(each))
        if not ray.is_initialized():
            ray.init()
        if nodes is not None:
            settings = on_nodes(nodes, settings)
        begun = [
            started(number, source, setting, (dtype, row_shape), options)
            for number, (source, setting) in enumerate(zip(each, settings, strict=True))
        ]
        here = session()
        asked = [shard.actor.opened.remote() for shard in begun]
        found = got("DistributedRows", asked, begun, checked, here)
        self._begin(numbered(begun, found), found[0].kind, checked)

    def _begin(self, shards: Sequence[Shard], kind: Kind, timeout: float | None) -> None:
        self._shards = tuple(shards)
        self._kind = kind
        self._timeout = timeout
        self._first = np.array([shard.first for shard in shards], np.int64)
        self._row_count = int(self.shard_rows.sum())
        self._owner = os.getpid()
        self._session = session()
        self._closed = False

    @property
    def shard_rows(self) -> npt.NDArray[np.int64]:
        """Rows of each actor, in order."""
        return np.array([shard.row_count for shard in self._shards], np.int64)

    @property
    def nodes(self) -> list[str]:
        """Address of the node that each actor was started on, in order."""
        return [shard.address for shard in self._shards]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def take(self, ids: RowIds, out: Any = None) -> Any:
        """Return rows, in any order.

        Parameters
        ----------
        ids : int, slice, range, sequence or array of int
            Rows, repeats allowed; negative ones count from the end.
        out : writable memory, optional
            Where to put them; see `Rows.take`.

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
            An actor cannot read a row, or was restarted and found other files (``ESTALE``).
        ActorLostError
            An actor has died and is not restarted; also a `ConnectionError`.
        TakeTimeoutError
            An actor has not answered in time.
        ClosedError
            `close` was called.

        Notes
        -----
        Each round sends one request to each actor that has some of the rows. Ctrl-C ends the call
        at once. After an error, `out` may be partly written, but nothing writes to it later.
        """
        return self._take(*select(ids, self._row_count), out)

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
        The loop's own thread asks for the rows and copies them into place, a round at a time. If
        the awaiting task is cancelled, nothing is written to `out` any more.
        """
        selection, leading = select(ids, self._row_count)
        filled, memory = self._memory("take", leading, out)
        with closing(self._rounds(selection, memory)) as rounds:
            asked = next(rounds, None)
            while asked is not None:
                values = await awaited(
                    "take", asked.refs, asked.shards, self._timeout, self._session
                )
                asked = _next(rounds, values)
        return self._shown(filled, out)

    def _fill(self, selection: CoreSelection, memory: npt.NDArray[Any]) -> None:
        with closing(self._rounds(selection, memory)) as rounds:
            asked = next(rounds, None)
            while asked is not None:
                values = got("take", asked.refs, asked.shards, self._timeout, self._session)
                asked = _next(rounds, values)

    def _rounds(
        self, selection: CoreSelection, memory: npt.NDArray[Any]
    ) -> Generator[Round, list[Any], None]:
        """Ask for rows, round by round, and put the values that are sent for each in place."""
        shards = self._open_shards("take")
        count, ids_between = self._chosen(selection)
        row_bytes = self._kind.row_bytes
        if not count or not row_bytes:
            return
        rows = memory.reshape(-1).view(np.uint8).view(np.dtype((np.void, row_bytes)))
        step = max(1, max(_ROUND_BYTES, len(shards) * _ACTOR_BYTES) // row_bytes)
        under_way: deque[Round] = deque()
        try:
            for first in range(0, count, step):
                last = min(first + step, count)
                under_way.append(self._asked(shards, ids_between(first, last), rows[first:last]))
                if len(under_way) == _ROUNDS_AHEAD:
                    under_way[0].place((yield under_way[0]))
                    under_way.popleft()
            while under_way:
                under_way[0].place((yield under_way[0]))
                under_way.popleft()
        finally:
            # After an error, or an interrupt.
            if under_way and session() == self._session:
                for asked in under_way:
                    asked.cancel()

    def _open_shards(self, operation: str) -> tuple[Shard, ...]:
        """Return the shards, which a call keeps: `close` lets it end."""
        shards = self._shards
        if self._owner != os.getpid():
            raise ForkError(
                f"{operation}: Ray does not work in a child of fork; use the table in a task of Ray"
            )
        if self._closed:
            raise ClosedError(f"{operation}: the table is closed")
        if self._session is None or session() != self._session:
            raise left(operation)
        return shards

    def _chosen(
        self, selection: CoreSelection
    ) -> tuple[int, Callable[[int, int], npt.NDArray[np.int64]]]:
        """Return how many rows are chosen, and what gives a part of them."""
        if isinstance(selection, tuple):
            start, stop = selection
            return stop - start, lambda first, last: np.arange(start + first, start + last)
        assert selection is not None  # noqa: S101 - rows are chosen by ids
        ids = Numbering("take", "row", self._row_count).resolved(selection)
        return len(ids), lambda first, last: ids[first:last]

    def _asked(
        self,
        shards: tuple[Shard, ...],
        ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.void],
    ) -> Round:
        """Ask each actor for those of `ids` that it has."""
        # Numbers of 16 bits are sorted by radix, in a fraction of the time.
        owners = (np.searchsorted(self._first, ids, side="right") - 1).astype(np.uint16)
        counts = np.bincount(owners, minlength=len(shards))
        some = np.flatnonzero(counts)
        if len(some) == 1:
            return Round([self._call(shards[some[0]], ids, None)], rows)
        order = np.argsort(owners, kind="stable")
        places = np.split(order, np.cumsum(counts[some])[:-1])
        calls = [
            self._call(shards[number], ids[where], where)
            for number, where in zip(some, places, strict=True)
        ]
        return Round(calls, rows)

    def _call(
        self, shard: Shard, ids: npt.NDArray[np.int64], places: npt.NDArray[np.intp] | None
    ) -> Call:
        piece_rows = _INLINE_BYTES // self._kind.row_bytes
        pieces = -(-len(ids) // piece_rows) if piece_rows else _MOST_INLINE + 1
        if pieces > _MOST_INLINE:
            pieces, piece_rows = 1, 0
        method = shard.actor.take
        if pieces > 1:
            method = method.options(num_returns=pieces)
        numbers = (ids - shard.first).tobytes()
        refs = submitted("take", shard, lambda: method.remote(numbers, piece_rows, shard.files))
        return Call(shard, refs if isinstance(refs, list) else [refs], piece_rows, places)

    def refresh(self) -> None:
        """Forget the rows that `cache_bytes` keeps, so that the actors read them again."""
        shards = self._open_shards("refresh")
        refs = [submitted("refresh", shard, shard.actor.refresh.remote) for shard in shards]
        got("refresh", refs, shards, self._timeout, self._session)

    def close(self) -> None:
        """Release the actors; a second time does nothing.

        Notes
        -----
        They end once no copy of the object is open in any process. Running takes of other threads
        are not affected.
        """
        self._closed = True
        self._shards = tuple(shard._replace(actor=None) for shard in self._shards)

    def __repr__(self) -> str:
        nodes = len({shard.node for shard in self._shards})
        where = f"{counted(len(self._shards), 'actor')} on {counted(nodes, 'node')}"
        state = "closed" if self.closed else f"{self._row_count} rows"
        return (
            f"<fremap.ray.DistributedRows {where}: {state} of {self.dtype_name} {self.row_shape}>"
        )

    def __reduce__(self) -> tuple[Callable[..., DistributedRows], tuple[object, ...]]:
        if self._closed:
            raise TypeError("closed DistributedRows cannot be pickled")
        return _again, (type(self), self._shards, self._kind, self._timeout)


def _again(
    cls: type[DistributedRows], shards: tuple[Shard, ...], kind: Kind, timeout: float | None
) -> DistributedRows:
    rows = cls.__new__(cls)
    rows._begin(shards, kind, timeout)  # noqa: SLF001 - its own
    return rows


def _next(rounds: Generator[Round, list[Any], None], values: list[Any]) -> Round | None:
    try:
        return rounds.send(values)
    except StopIteration:
        return None
