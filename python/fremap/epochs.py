"""Which rows make which batch of an epoch: order, ranks, workers, state. Nothing is read here."""

from __future__ import annotations

import _thread
import os
import threading
import zlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex, TypeAlias

import numpy as np

from fremap.arguments import quantity
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.selection import Numbering

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

__all__ = ["Epoch", "Order", "State"]

Order: TypeAlias = "Literal['shuffle', 'sequential'] | Sequence[int] | npt.NDArray[np.integer[Any]]"
State: TypeAlias = dict[str, Any]
_RowNumbers: TypeAlias = "npt.NDArray[np.integer[Any]]"

_STATE_VERSION = 1
_CHECKED_IDS = 1 << 16
# Shuffling or copying this many rows takes longer than a Ctrl-C may wait.
_LONG_ORDER = 1 << 19
# Seconds after which an order is looked at again, should its waking have been lost.
_LOOK_AGAIN = 0.05


class _Dealt(NamedTuple):
    """A rank's rows in their order (None: as they stand), and a checksum of the whole order."""

    ids: _RowNumbers | None
    check: int


class _Making:
    """An order that a thread of its own makes, so that an interrupt need not wait for it.

    NumPy lets the GIL go there, but Python sees a signal between two of its own steps only.
    After an interrupt the thread goes on, and the next call waits for the same one.
    """

    __slots__ = ("_begun", "_ended", "_error", "_made", "_make", "_owner", "_wake")

    def __init__(self, make: Callable[[], _Dealt]) -> None:
        self._make = make
        self._made: _Dealt | None = None
        self._error: BaseException | None = None
        self._begun = False
        self._ended = False
        self._owner = os.getpid()
        self._wake = threading.Lock()
        self._wake.acquire()

    def _run(self) -> None:
        try:
            self._made = self._make()
        except BaseException as error:  # noqa: BLE001 - it is raised by whoever waits
            self._error = error
        self._ended = True
        self._wake.release()

    @property
    def ends(self) -> bool:
        """Whether it was begun in this process: a child of fork has no thread of its parent's."""
        return self._owner == os.getpid()

    def result(self) -> _Dealt:
        """Have the order made, and wait for it."""
        if not self._begun:
            try:
                # One step of the interpreter, where `Thread.start` has several that an
                # interrupt may come between.
                _thread.start_new_thread(self._run, ())
            except RuntimeError:  # no thread can be started: made here, whatever comes meanwhile
                self._run()
            self._begun = True
        while not self._ended:
            self._wake.acquire(timeout=_LOOK_AGAIN)
        if self._error is not None:
            raise self._error
        assert self._made is not None  # noqa: S101 - one of the two is set by now; tells mypy
        return self._made


class Share(NamedTuple):
    """Whose part of an epoch this is: rank `rank` of `world_size`, and a worker of that."""

    rank: int
    world_size: int
    worker: int
    worker_count: int

    @classmethod
    def of(
        cls,
        rank: SupportsIndex,
        world_size: SupportsIndex,
        worker: SupportsIndex,
        worker_count: SupportsIndex,
    ) -> Share:
        """Check the four numbers."""
        share = cls(
            quantity("batches: rank", rank),
            quantity("batches: world_size", world_size),
            quantity("batches: worker", worker),
            quantity("batches: worker_count", worker_count),
        )
        for name, index, limit_name, limit in (
            ("rank", share.rank, "world_size", share.world_size),
            ("worker", share.worker, "worker_count", share.worker_count),
        ):
            if index >= limit:
                raise ArgumentError(
                    f"batches: {name} is {index} and {limit_name} {limit}; "
                    f"{name} must be from 0 to below {limit_name}"
                )
        return share


class Epoch:
    """The batches of one epoch for one rank, by number.

    The epoch's order is dealt to the ranks like cards: rank r of w has the rows at r, r + w,
    r + 2 w and so on. The rank's rows are cut into batches from the front, and batch k
    is worker ``k % worker_count``'s.

    Parameters
    ----------
    length : int
        Rows that there are.
    batch_size : int
        Rows of a batch.
    order : {"shuffle", "sequential"} or array of int
        The order of the epoch.
    seed : int or None
        For "shuffle". None draws one.
    epoch : int
        Each has an order of its own.
    drop_last, pad : bool
        What is done about rows that do not fill a batch of every rank.
    share : Share
        Whose part this is.
    """

    __slots__ = ("_count", "_dealt_now", "_length", "_making", "_settings", "_share")

    def __init__(
        self,
        length: int,
        batch_size: SupportsIndex,
        order: Order,
        *,
        seed: SupportsIndex | None,
        epoch: SupportsIndex,
        drop_last: bool,
        pad: bool,
        share: Share,
    ) -> None:
        size = quantity("batches: batch_size", batch_size)
        if size == 0:
            raise ArgumentError("batches: batch_size is 0; a batch has at least one row")
        if drop_last and pad:
            raise ArgumentError(
                "batches: drop_last leaves rows out and pad repeats some; choose one of them"
            )
        number = quantity("batches: epoch", epoch)
        name, given = _order(order, length)
        self._length = length if given is None else len(given)
        self._making: _Making | None = None
        self._share = share
        self._count = self._rows_of_rank(size, drop_last=drop_last, pad=pad)
        # A shuffled order is made when it is asked for first: that takes a while.
        self._dealt_now: _Dealt | None = None
        if name != "shuffle":
            self._dealt_now = self._deal(None if given is None else lambda: given)
        self._settings: State = {
            "version": _STATE_VERSION,
            "rows": length,
            "batch_size": size,
            "order": name,
            "seed": _seed(name, seed, share),
            "epoch": number,
            "drop_last": bool(drop_last),
            "pad": bool(pad),
            "rank": share.rank,
            "world_size": share.world_size,
        }

    def _rows_of_rank(self, size: int, *, drop_last: bool, pad: bool) -> int:
        """Count the rank's rows."""
        world = self._share.world_size
        if drop_last:
            return self._length // (world * size) * size
        if pad:
            return -(-self._length // world)
        return len(range(self._share.rank, self._length, world))

    def _dealt(self) -> _Dealt:
        """Return the rank's rows in their order. Two threads may make it at once: the same."""
        dealt = self._dealt_now
        if dealt is None:
            seed, epoch = self._settings["seed"], self._settings["epoch"]
            dealt = self._deal(lambda: _shuffled(self._length, seed, epoch))
            self._dealt_now = dealt
        return dealt

    def _deal(self, order: Callable[[], _RowNumbers] | None) -> _Dealt:
        if order is None:
            return _Dealt(None, _check(None, self._length))

        def make() -> _Dealt:
            every = order()
            return _Dealt(self._part(every), _check(every, self._length))

        if self._length < _LONG_ORDER:
            return make()
        making = self._making
        if making is None or not making.ends:
            making = self._making = _Making(make)
        try:
            dealt = making.result()
        except Exception:
            self._making = None  # the next call tries again
            raise
        self._making = None
        return dealt

    def _part(self, every: _RowNumbers) -> _RowNumbers:
        """Return the rank's part of the order, in memory of its own."""
        share = self._share
        if share.world_size == 1:
            return every[: self._count]
        own = every[share.rank :: share.world_size][: self._count]
        if len(own) < self._count:  # by one row, which comes from the front of the order
            last = ((self._count - 1) * share.world_size + share.rank) % self._length
            return np.append(own, every[last])
        return own.copy()

    @property
    def numbers(self) -> range:
        """The batches of this worker, by their number in the rank."""
        return self.numbers_from(0)

    def numbers_from(self, first: int) -> range:
        """Return what this worker has to do when the rank's batches before `first` are done."""
        size = self._settings["batch_size"]
        batches = -(-self._count // size)
        return range(first + self._share.worker, batches, self._share.worker_count)

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        """Return the rows of batch `number` of the rank."""
        first = number * self._settings["batch_size"]
        last = min(first + self._settings["batch_size"], self._count)
        own = self._dealt().ids
        if own is not None:
            return own[first:last].astype(np.int64)
        places = np.arange(first, last, dtype=np.int64) * self._share.world_size + self._share.rank
        ids: npt.NDArray[np.int64] = places % self._length
        return ids

    def state(self, remaining: range) -> State:
        """Return what it takes to go on with `remaining`, which may be empty."""
        return {
            **self._settings,
            "worker": self._share.worker,
            "worker_count": self._share.worker_count,
            "check": self._dealt().check,
            # An empty range still says where it begins: at the end.
            "next_batch": remaining.start,
        }

    def restored(self, state: State) -> range:
        """Return what this worker has to do after `state` was saved."""
        if state.get("version") != _STATE_VERSION:
            raise ArgumentError(
                f"batches: the state has version {state.get('version')!r}, and this fremap reads "
                f"{_STATE_VERSION}"
            )
        for name, mine in self._settings.items():
            if state.get(name) != mine:
                raise ArgumentError(
                    f"batches: the state was saved with {name}={state.get(name)!r} and this is "
                    f"{name}={mine!r}; a state goes on with the settings that it was saved with"
                )
        if state.get("check") != self._dealt().check:
            raise ArgumentError(
                "batches: the order is not the one that the state was saved with: another array, "
                "or another NumPy whose generator shuffles differently"
            )
        return self._restored_range(state)

    def _restored_range(self, state: State) -> range:
        first = quantity("batches: next_batch of the state", state.get("next_batch", -1))
        saved = (state.get("worker"), state.get("worker_count"))
        share = self._share
        if saved == (0, 1):
            return self.numbers_from(first)
        if saved != (share.worker, share.worker_count):
            raise ArgumentError(
                f"batches: the state is that of worker {saved[0]} of {saved[1]}, this is worker "
                f"{share.worker} of {share.worker_count}"
            )
        return range(first, self.numbers.stop, share.worker_count)


def _order(
    order: Order, length: int
) -> tuple[Literal["shuffle", "sequential", "array"], _RowNumbers | None]:
    """Return the order's name, and its rows if it is an array."""
    if isinstance(order, str):
        if order == "shuffle":
            return "shuffle", None
        if order == "sequential":
            return "sequential", None
        raise ArgumentError(
            f'batches: order is {order!r}; it must be "shuffle", "sequential" or an array of rows'
        )
    given = np.asarray(order)
    if given.ndim != 1:
        raise ArgumentError(f"batches: order has {given.ndim} dimensions; it must have one")
    if len(given) == 0:
        return "array", np.empty(0, dtype=np.int64)
    if given.dtype.kind not in "iu":
        raise ArgumentTypeError(f"batches: order must be row numbers, not {given.dtype}")
    # A copy: the caller may go on changing the array. By pieces, between which an interrupt
    # may come.
    ids: _RowNumbers = np.empty(len(given), _id_type(length))
    for start in range(0, len(given), _LONG_ORDER):
        part = given[start : start + _LONG_ORDER].copy()
        _refuse_outside(part, length)
        copied = ids[start : start + _LONG_ORDER]
        copied[:] = part
        np.add(copied, length, out=copied, where=copied < 0)
    return "array", ids


def _refuse_outside(ids: _RowNumbers, length: int) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if -length <= lowest and highest < length:
        return
    outside = (ids >= length) if lowest >= -length else (ids < -length) | (ids >= length)
    first = int(ids[np.argmax(outside)])
    raise Numbering("batches", "row", length).outside(first)


def _id_type(length: int) -> type[np.int32 | np.int64]:
    """Return the smaller type that row numbers below `length` fit into."""
    return np.int32 if length < 1 << 31 else np.int64


def _seed(name: str, seed: SupportsIndex | None, share: Share) -> int | None:
    if name != "shuffle":
        if seed is not None:
            raise ArgumentError(f'batches: seed is for order="shuffle"; this order is {name}')
        return None
    if seed is not None:
        return quantity("batches: seed", seed)
    if share.world_size > 1 or share.worker_count > 1:
        raise ArgumentError(
            "batches: ranks and workers must shuffle in the same order; give all of them the same "
            "seed"
        )
    return int.from_bytes(os.urandom(8), "little") >> 1


def _shuffled(length: int, seed: int, epoch: int) -> _RowNumbers:
    """Return the rows in the random order of this seed and epoch."""
    ids: _RowNumbers = np.arange(length, dtype=_id_type(length))
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
    generator = np.random.Generator(np.random.PCG64(sequence))
    generator.shuffle(ids)
    return ids


def _check(every: _RowNumbers | None, length: int) -> int:
    """Return a checksum of a sample of the order, the same on every machine."""
    places = np.arange(0, length, max(1, length // _CHECKED_IDS), dtype=np.int64)
    ids = places if every is None else every[places]
    return zlib.crc32(np.ascontiguousarray(ids, dtype="<i8"))
