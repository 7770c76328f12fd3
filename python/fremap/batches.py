"""Batches of rows, read ahead by threads.

`epochs` decides which rows each batch has. This module reads a bounded number of batches ahead,
by threads that call `Rows.take`.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, SupportsIndex, TypeAlias, TypedDict

from fremap.arguments import quantity
from fremap.closing import ClosedOnExit
from fremap.dtypes import empty
from fremap.epochs import Epoch, Order, Share, State
from fremap.errors import ArgumentError, ClosedError
from fremap.readers import Read, Readers

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    import numpy.typing as npt

__all__ = ["BatchOptions", "Batches"]

_MOST_THREADS = 8
_MOST_PREFETCH = 1024

_Ids: TypeAlias = "npt.NDArray[np.int64]"


class BatchOptions(TypedDict, total=False):
    """The keywords of `Batches`."""

    seed: SupportsIndex | None
    epoch: SupportsIndex
    drop_last: bool
    pad: bool
    rank: SupportsIndex
    world_size: SupportsIndex
    worker: SupportsIndex
    worker_count: SupportsIndex
    prefetch: SupportsIndex
    return_ids: bool
    state: State | None


class TakesRows(Protocol):
    """What batches need of rows."""

    def __len__(self) -> int: ...

    @property
    def dtype(self) -> Any:
        """Type of the elements, NumPy's or torch's."""
        ...

    def take(self, ids: _Ids, out: Any) -> Any:
        """Return these rows in `out`."""
        ...


class Batches(ClosedOnExit):
    """An iterator over the batches of one epoch, which reads ahead.

    Made by `Rows.batches`. A batch is a new array of shape ``(n, *row_shape)`` with
    `batch_size` rows; only the last batch of a rank may have fewer. The threads end with the
    epoch, and when the context is left.

    Parameters
    ----------
    rows : Rows
        Where the rows come from.
    batch_size : int
        Rows of a batch.
    order : {"shuffle", "sequential"} or array of int, default "shuffle"
        All rows in random order, all rows in order, or the given rows (repeats allowed,
        negative ones count from the end).
    seed : int, optional
        For "shuffle": the same seed and epoch give the same order on every machine. Default: a
        random seed, which `state` contains.
    epoch : int, default 0
        Number of the epoch: each epoch is shuffled differently.
    drop_last : bool, default False
        Drop the rows that do not fill a batch on every rank. All ranks then have the same
        number of batches, and all batches are full.
    pad : bool, default False
        Ranks with one row less than others repeat a row from the start of the order. All ranks then
        have the same number of batches, and no row is left out.
    rank, world_size : int, default 0 and 1
        The number of this process, and the number of processes that share the epoch.
    worker, worker_count : int, default 0 and 1
        The number of this worker, and the number of workers of this rank. Worker w reads
        batches w, w + worker_count, … of the rank.
    prefetch : int, default 2
        Number of batches to read ahead. 0: read in the calling thread.
    return_ids : bool, default False
        Yield ``(ids, batch)``, the ids as int64.
    state : dict, optional
        A result of `state`, to continue from there; the other arguments must be the same.

    Raises
    ------
    ArgumentError
        An argument is invalid, or the state is of other batches.
    PageRangeError
        `order` names a row that does not exist.

    Notes
    -----
    Without `drop_last` and `pad`, each row comes exactly once in an epoch, over all ranks and
    workers. Ranks then differ by at most one row, and so perhaps by one batch. The order is
    made by ``numpy.random.Generator(PCG64)`` and kept in memory: 4 bytes a row (8 from 2**31
    rows on). Each rank keeps only its part. Shuffling 10 million rows takes about a second.

    Memory: `prefetch` + 1 batches. Threads: as many as `prefetch`, at most 8; they read and
    copy without the GIL. If a read fails, ``next`` raises when it comes to that batch, and the
    following ``next`` tries it again. In a child of ``fork``, the iterator continues where its
    parent was. Any number of threads may take batches from one iterator.

    Examples
    --------
    >>> import fremap, numpy as np, tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     np.arange(10, dtype=np.int16).tofile(file.name)
    ...     with fremap.rows(file.name, np.int16) as rows:
    ...         with rows.batches(4, "sequential") as batches:
    ...             first, state = next(batches), batches.state()
    ...         rest = list(rows.batches(4, "sequential", state=state))
    >>> first
    array([0, 1, 2, 3], dtype=int16)
    >>> rest
    [array([4, 5, 6, 7], dtype=int16), array([8, 9], dtype=int16)]
    """

    __slots__ = (
        "__weakref__",
        "_begin_epoch",
        "_closed",
        "_epoch",
        "_lock",
        "_pid",
        "_prefetch",
        "_readers",
        "_reads",
        "_remaining",
        "_return_ids",
        "_rows",
        "_seeded",
    )  # fmt: skip

    def __init__(
        self,
        rows: TakesRows,
        batch_size: SupportsIndex,
        order: Order = "shuffle",
        *,
        seed: SupportsIndex | None = None,
        epoch: SupportsIndex = 0,
        drop_last: bool = False,
        pad: bool = False,
        rank: SupportsIndex = 0,
        world_size: SupportsIndex = 1,
        worker: SupportsIndex = 0,
        worker_count: SupportsIndex = 1,
        prefetch: SupportsIndex = 2,
        return_ids: bool = False,
        state: State | None = None,
    ) -> None:
        self._readers: Readers | None = None
        self._prefetch = quantity("batches: prefetch", prefetch)
        if self._prefetch > _MOST_PREFETCH:
            raise ArgumentError(
                f"batches: prefetch is {self._prefetch} batches; at most {_MOST_PREFETCH} are "
                "read ahead"
            )
        if state is not None and seed is None and isinstance(order, str) and order == "shuffle":
            seed = state.get("seed")
        self._seeded = seed is not None
        self._begin_epoch = partial(
            Epoch, len(rows), batch_size, order, epoch=epoch, drop_last=drop_last, pad=pad,
            share=Share.of(rank, world_size, worker, worker_count),
        )  # fmt: skip
        self._epoch = self._begin_epoch(seed=seed)
        self._remaining = self._epoch.numbers if state is None else self._epoch.restored(state)
        self._rows = rows
        self._return_ids = bool(return_ids)
        self._closed = False
        self._begin_here()

    def _begin_here(self) -> None:
        """Forget threads and reads, which are another process's if there are any."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._reads: dict[int, Read] = {}
        self._readers = None

    def __len__(self) -> int:
        """Return the number of batches of this worker in the whole epoch."""
        return len(self._epoch.numbers)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def __repr__(self) -> str:
        """Describe the iterator in a line."""
        if self._closed:
            return "<fremap.Batches, closed>"
        return f"<fremap.Batches, {len(self._remaining)} of {len(self)} batches left>"

    def __iter__(self) -> Self:
        """Return the iterator itself."""
        return self

    def __next__(self) -> Any:
        """Return the next batch, and have those after it read."""
        if self._pid != os.getpid():
            self._begin_here()
        with self._lock:
            if self._closed:
                raise ClosedError("batches: the iterator is closed")
            if not self._remaining:
                raise StopIteration
            ids, batch = self._read(self._remaining[0])
            rest = self._remaining[1:]
            if rest:
                self._read_ahead(rest)
            else:
                self._end_threads()
            self._remaining = rest  # last, so that an interrupt of what is above loses no batch
        return (ids, batch) if self._return_ids else batch

    def _read(self, number: int) -> tuple[_Ids, Any]:
        """Return a batch, which may have been read already."""
        if self._prefetch == 0:
            ids = self._epoch.ids(number)
            return ids, self._rows.take(ids, self._memory(ids))
        self._read_ahead(self._remaining)
        read = self._reads[number]
        try:
            # What interrupts this leaves the read under way, for whoever asks again.
            batch = read.result()
        except Exception:
            del self._reads[number]
            raise
        del self._reads[number]
        return read.ids, batch

    def _read_ahead(self, remaining: range) -> None:
        """Have the first batches of `remaining` read, as many as may be."""
        for number in remaining[: self._prefetch]:
            if number not in self._reads:
                ids = self._epoch.ids(number)
                if self._readers is None:
                    self._readers = Readers(self._rows.take, min(self._prefetch, _MOST_THREADS))
                read = Read(ids, self._memory(ids))
                # Noted once it is sure to end; an interrupt before has it read twice.
                self._readers.begin(read)
                self._reads[number] = read

    def _memory(self, ids: _Ids) -> Any:
        """Return memory for a batch.

        From this thread, which drops the batches too: if each of those that read had its own
        from the allocator, every one would keep some.
        """
        memory_for = getattr(self._rows, "_memory_for", None)  # of rows of unequal length
        if memory_for is not None:
            return memory_for(ids)
        return empty((len(ids), *self._rows.row_shape), self._rows.dtype)  # type: ignore[attr-defined]

    def _end_threads(self) -> None:
        """Begin no read any more, and wait for those under way."""
        readers = self._readers
        if readers is not None:
            readers.end()
        self._reads = {}
        if readers is not None:
            readers.join()
        # Forgotten last: an interrupt before has the next call end them.
        self._readers = None

    def state(self) -> State:
        """Return a state from which the iteration can continue, also in another process.

        Returns
        -------
        dict
            Numbers, strings and booleans, which can be stored as JSON. Batches that were read
            ahead but not yielded count as not done. It does not contain an order that was given
            as an array.

        Notes
        -----
        To detect another order, it contains the number of rows and a checksum of 65 536 of
        them.
        """
        return self._epoch.state(self._remaining)

    def state_dict(self) -> State:
        """Return `state`, by the name under which torchdata and other frameworks ask for it.

        Returns
        -------
        dict
            As `state`.
        """
        return self.state()

    def load_state_dict(self, state_dict: State) -> None:
        """Continue after a state, by the name under which frameworks load one.

        Batches that were read ahead are dropped. If no seed was given, the seed of the state
        is used.

        Parameters
        ----------
        state_dict : dict
            A result of `state`, of batches with the same arguments.

        Raises
        ------
        ArgumentError
            The state is of other batches.
        """
        epoch = self._epoch if self._seeded else self._begin_epoch(seed=state_dict.get("seed"))
        remaining = epoch.restored(state_dict)
        if self._pid != os.getpid():
            self._begin_here()
        with self._lock:
            if self._closed:
                raise ClosedError("batches: the iterator is closed")
            self._end_threads()
            self._epoch, self._remaining = epoch, remaining

    def close(self) -> None:
        """End the threads once their running reads are done; later calls do nothing."""
        if self._pid != os.getpid():
            self._begin_here()
        self._closed = True
        with self._lock:
            self._end_threads()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError(
            "Batches cannot be pickled, because they have threads; pass the rows and state() on, "
            "and call Rows.batches(..., state=state) there"
        )
