"""Slots: a fixed number of places in memory, each of which shows an extent of a store.

The memory is one window, or an object that processes share (`slot_memory`). The compiled core
decides which extent is in which slot, which are pinned, and which one makes room; other threads and
processes can find extents while some are being read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias, TypeVar, overload

import numpy as np

from fremap import _core
from fremap import calibration as calibrations
from fremap.arguments import bytes_of, counted, quantity
from fremap.dtypes import MAX_AXES
from fremap.errors import (
    ArgumentError,
    ArgumentTypeError,
    StoreError,
)
from fremap.selection import Numbering, PageSelection
from fremap.settings import (
    Budget,
    Engine,
    Shape,
    checked_budget,
    chosen,
    elements_within,
)
from fremap.slot_memory import SharedMemory, WindowMemory, alias_pays, naming
from fremap.stats import SlotsStats, warn_renamed
from fremap.stores import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    import numpy.typing as npt

    from fremap.arguments import BufferLike
    from fremap.calibration import Calibration

__all__ = ["Slots", "SlotsPin"]

_Scalar = TypeVar("_Scalar", bound=np.generic)
Numbers: TypeAlias = "npt.NDArray[np.int64]"

# Slots that the repr of a pin names.
_MOST_SHOWN = 8


class SlotsPin:
    """Slots that keep their extents until this is released, or dropped.

    Made by `Slots.pin`. Its ``with`` statement gives the slot numbers.

    Parameters
    ----------
    taken : fremap._core.Taken
        The slots, pinned.
    """

    __slots__ = ("_pinned", "_taken")

    def __init__(self, taken: _core.Taken) -> None:
        self._taken = taken
        self._pinned = True

    def __repr__(self) -> str:
        """Describe the pin in a line."""
        state = "" if self._pinned else ", released"
        slots = self.slots
        shown = ", ".join(map(str, slots[:_MOST_SHOWN].tolist()))
        more = f", … {len(slots) - _MOST_SHOWN} more" if len(slots) > _MOST_SHOWN else ""
        return f"<fremap.SlotsPin of slots [{shown}{more}]{state}>"

    @property
    def slots(self) -> Numbers:
        """The slot of each key that was named."""
        return np.frombuffer(self._taken.slots(), np.int64)

    def __enter__(self) -> Numbers:
        """Return the slot of each key."""
        return self.slots

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the slots."""
        self.release()

    def release(self) -> None:
        """Allow the extents to be evicted again; later calls do nothing."""
        self._taken.unpin()
        self._pinned = False


class Slots:
    """A fixed number of slots in memory, each of which shows one extent of a store.

    Extent `k` is the file pages ``k * extent_pages`` to ``(k + 1) * extent_pages``; its
    key is `k`. `ensure` loads the extents that are in no slot, and says in which slot each
    extent is. The memory is one contiguous read-only array, see `array`.

    Any number of threads may use the slots. An extent stays in its slot until another extent
    needs the room. So what one call has returned may be evicted by the next call, of this
    thread, of another thread, or of another process that shares the slots. `pin` prevents
    that. A call evicts none of the extents that another running call names.

    Parameters
    ----------
    store : Store
        The store whose extents the slots show: a file, shared memory, a `ConcatStore`, or a
        computed or remote store.
    extent_pages : int
        Pages of an extent. The last extent may end beyond the store, and is zeros there.
    slot_count : int
        Number of slots.
    engine : {"auto", "alias", "paged", "eager"}, default "auto"
        The engine of the slots' `Window`. "auto": "alias" if extents have at least
        ``calibration.alias_extent_pages`` pages, the store is read through the page cache,
        and the slots need no more than a quarter of the process's kernel mappings; otherwise
        "paged" if it works here; otherwise "eager".
    budget : int, str or None, default "auto"
        Bytes, or a size such as "64M", that the slots may take with engines other than
        "alias". Slots that do not fit are refused. "auto": a share of half of the available
        memory. None: no limit.
    calibration : fremap.calibration.Calibration, optional
        Crossover points. Default: as for `Window`.
    shared : str, optional
        A name of letters, digits, ".", "_" and "-", by which all processes of this user find
        the same slots. The first process makes them. The others must ask for the same number
        of slots, of the same extents of the same store. The last one to close them, or to
        exit, removes them. An extent is read once for all processes, and a pin holds in all of
        them. The store may be an object on a server, if all open it by the same URL with the
        same `storage_options` and the same endpoints in the environment, and the server gives its
        version; each version has slots of its own. Default: the slots belong to this process alone.

    Raises
    ------
    ArgumentError
        A number is zero, or the slots do not fit into the address space, or there are other
        slots of that name.
    BudgetError
        The slots do not fit into the budget.
    UnsupportedError
        The engine does not work here, or not with this store.
    StoreError
        The window cannot be mapped, or there is no space for shared slots.

    Notes
    -----
    Slots are a `Window` with ``mapping="none"``. Touching an empty slot raises SIGSEGV or SIGBUS.
    With engine "alias" a slot is one kernel mapping of page cache: the kernel may reclaim pages,
    and a touch reads them again. The eviction policy is that of windows with a budget, except that
    it also sees hits. The extents are those that the store had when the slots were made, even after
    a `Store.refresh`. With engine "alias" a slot shows at once what other processes write to the
    store. The other engines copy: a slot shows what was there when the extent was loaded, until
    `evict`. In a child of ``fork``, calls raise `ForkError`, and the memory behaves as that of a
    `Window`. Unpickling opens the store again, with empty slots.

    Shared slots are a file in ``/dev/shm`` that only its owner may open (mode 0600), and one
    kernel mapping in each process. Their memory is allocated when they are made. They work in
    children of ``fork``, and pickling finds them by name. If a process is killed, at any
    instruction, the others continue: its pins end, and another process reads what it was
    reading. If all are killed, the slots stay until a process uses the name again; ``fremap
    shm`` lists and removes them. All processes must be in one PID namespace. Use `write` if
    the store is writable. With the budget "auto", new shared slots may take half of the memory.

    Examples
    --------
    >>> import fremap, numpy as np
    >>> store = fremap.MemoryStore(8 * 4096, page_bytes=4096)
    >>> store.write(None, np.repeat(np.arange(8, dtype=np.uint8), 4096))
    >>> with fremap.Slots(store, extent_pages=2, slot_count=2) as slots:
    ...     tiles = slots.array(np.uint8)
    ...     first = tiles[slots.ensure([3, 1, 3])][:, 0].tolist()
    ...     del tiles
    >>> first
    [6, 2, 6]
    """

    __slots__ = (
        "__weakref__",
        "_extent_pages",
        "_memory",
        "_page_count",
        "_settings",
        "_slot_count",
        "_store",
    )

    def __init__(
        self,
        store: Store,
        extent_pages: SupportsIndex,
        slot_count: SupportsIndex,
        *,
        engine: Engine = "auto",
        budget: Budget = "auto",
        calibration: Calibration | None = None,
        shared: str | None = None,
    ) -> None:
        if not isinstance(store, Store):
            raise ArgumentTypeError(f"Slots: store must be a store, not {type(store).__name__}")
        chosen("engine", engine)
        pages = quantity("Slots: extent_pages", extent_pages)
        count = quantity("Slots: slot_count", slot_count)
        if pages == 0 or count == 0 or count >= 1 << 31:
            raise ArgumentError(
                f"Slots: {count} slots of {pages} pages; there must be a slot and a page in it, "
                "and less than 2**31 slots"
            )
        budget = checked_budget(budget, "Slots")
        self._settings: dict[str, Any] = {
            "engine": engine, "budget": budget, "calibration": calibration, "shared": shared
        }  # fmt: skip
        self._memory: WindowMemory | SharedMemory
        if shared is not None:
            _check_shared(shared, engine, calibration)
            self._memory = SharedMemory(store, pages, count, shared, budget)
        else:
            if (
                engine == "auto"
                and budget in ("auto", None)
                and alias_pays(store, pages, count, calibration or calibrations.load())
            ):
                engine = "alias"
            self._memory = WindowMemory(store, pages, count, engine, budget, calibration)
        self._store = store
        self._extent_pages = pages
        self._slot_count = count
        #: As it was: extents do not change with the store's size.
        self._page_count = store.page_count

    # What it is.

    @property
    def store(self) -> Store:
        """The store whose extents the slots show."""
        return self._store

    @property
    def slot_count(self) -> int:
        """Number of slots."""
        return self._slot_count

    @property
    def extent_pages(self) -> int:
        """Pages of an extent, and of a slot."""
        return self._extent_pages

    @property
    def extent_bytes(self) -> int:
        """Bytes of an extent, and of a slot."""
        return self._extent_pages * self._store.page_bytes

    @property
    def extent_count(self) -> int:
        """Extents of the store, the last perhaps partial: keys go from 0 to below this."""
        return -(-self._page_count // self._extent_pages)

    @property
    def shared(self) -> str | None:
        """Name of the slots if processes share them, else None."""
        name: str | None = self._settings["shared"]
        return name

    @property
    def engine(self) -> str:
        """The engine of the slots' window; "shared" if processes share the slots."""
        return self._memory.engine

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._memory.closed

    @property
    def keys(self) -> Numbers:
        """Key of the extent that each slot shows, -1 if it is empty. A copy."""
        return np.frombuffer(self._memory.table.keys(), np.int64)

    def stats(self) -> SlotsStats:
        """Return what the slots hold, and what they have done so far.

        Returns
        -------
        SlotsStats
            All of one moment.

        Raises
        ------
        ForkError
            The slots were made by the parent process.
        """
        counts = self._memory.table.stats()
        arrivals = counts.pop("arrivals")
        return SlotsStats(bytes_read=arrivals * self.extent_bytes, **counts)

    def __repr__(self) -> str:
        if self.closed:
            return "<fremap.Slots, closed>"
        size = f"{counted(self.slot_count, 'slot')} of {self.extent_bytes} bytes"
        store = self._store._named  # noqa: SLF001 - its other half
        return f"<fremap.Slots, {size}, engine {self.engine!r}, of {store}>"

    def _repr_html_(self) -> str:
        """Draw which slots are filled and pinned, for notebooks."""
        from fremap.pictures import SLOT_STATES, grid_picture

        count = 0 if self.closed else self.slot_count
        return grid_picture(repr(self), count, "slot", SLOT_STATES, self._looked)

    def _looked(self, slots: Numbers) -> tuple[npt.NDArray[np.int8], dict[str, int], str]:
        """Return the state of each of these slots, as its place in `SLOT_STATES`."""
        keys, pinned = self._memory.table.at(slots)
        state = (np.frombuffer(keys, np.int64) >= 0).astype(np.int8)
        state[np.frombuffer(pinned, np.bool_)] = 2
        stats = self.stats()
        done = f"{stats.hits} hits, {stats.misses} misses, {stats.evictions} evictions"
        return state, {"filled": stats.filled_slots, "pinned": stats.pinned_slots}, done

    # Extents in and out.

    def ensure(self, keys: PageSelection) -> Numbers:
        """Load the extents that are in no slot, and return the slot of each extent.

        Parameters
        ----------
        keys : int, slice, range, array of int or None
            Extents, in any order, repeats allowed; None means all.

        Returns
        -------
        ndarray of int64, shape (n,)
            The slot of each key, in the order of `keys`.

        Raises
        ------
        SlotsFullError
            There are more keys than slots, or too many slots are pinned. Nothing has changed.
        PageRangeError
            A key is outside the store.
        StoreError
            An extent cannot be read; the error names its key. Extents before it are in their slots.
            The slots of this extent and of those after it are empty: the extents that were evicted
            for them do not come back.
        ClosedError, ForkError
            The slots are closed, or were made by the parent process.

        Notes
        -----
        Missing extents are loaded by one `Window.remap`: sorted, all reads in flight together. A
        call waits for calls of other threads that use the slots it needs, but not for pins. If
        another thread is loading an extent, the call waits for it instead of reading it twice.
        """
        wanted = self._wanted("ensure", keys)
        found = self._memory.table.find("ensure", wanted)
        if found is not None:
            return np.frombuffer(found, np.int64)
        taken = self._take("ensure", wanted)
        taken.release()
        return np.frombuffer(taken.slots(), np.int64)

    def pin(self, keys: PageSelection) -> SlotsPin:
        """Do what `ensure` does, and keep the extents in their slots.

        Parameters
        ----------
        keys : int, slice, range, array of int or None
            Extents, in any order, repeats allowed; None means all.

        Returns
        -------
        SlotsPin
            A context manager that gives the slot of each key, and releases the pins at its end;
            or call its `release`. An extent stays while any pin holds it.

        Raises
        ------
        SlotsFullError
            There are more keys than slots, or too many slots are pinned. Nothing has changed.
        PageRangeError
            A key is outside the store.
        StoreError
            As from `ensure`; nothing is pinned.
        ClosedError, ForkError
            The slots are closed, or were made by the parent process.

        Notes
        -----
        No system call beyond those of `ensure`.

        Examples
        --------
        >>> import fremap
        >>> store = fremap.MemoryStore(8 * 4096, page_bytes=4096)
        >>> with fremap.Slots(store, extent_pages=1, slot_count=2) as slots:
        ...     with slots.pin([7]) as pinned:
        ...         _ = slots.ensure(0), slots.ensure(1), slots.ensure(2)
        ...         int(slots.keys[pinned[0]])
        7
        """
        taken = self._take("pin", self._wanted("pin", keys))
        taken.pin()
        return SlotsPin(taken)

    def hold(self, keys: PageSelection) -> SlotsPin:
        """Do what `pin` does: its name until 0.1.

        Parameters
        ----------
        keys : int, slice, range, array of int or None
            As for `pin`.

        Returns
        -------
        SlotsPin
            As from `pin`.
        """
        warn_renamed("Slots.hold", "pin")
        return self.pin(keys)

    def evict(self, keys: PageSelection = None) -> int:
        """Empty the slots of extents, so that the next call that names them reads them again.

        Call it after another process has written to the store: unless the engine is "alias", a
        slot shows its extent as it was when it was loaded.

        Parameters
        ----------
        keys : int, slice, range, array of int or None, optional
            Extents, repeats allowed; those that are in no slot are ignored. None means all.

        Returns
        -------
        int
            Number of slots that were emptied. Do not touch their memory until they show an
            extent again.

        Raises
        ------
        ArgumentError
            One of the extents is pinned, and the slots are not shared. Nothing has changed.
        PageRangeError
            A key is outside the store.
        ClosedError, ForkError
            The slots are closed, or were made by the parent process.

        Notes
        -----
        A pinned shared slot keeps its content for the processes that pinned it; the next call
        that names the extent reads it into another slot.

        `Window.evict`. It waits for running calls that name one of the extents, because they
        may have read it before the change.

        Examples
        --------
        >>> import fremap
        >>> store = fremap.MemoryStore(8 * 4096, page_bytes=4096)
        >>> with fremap.Slots(store, extent_pages=1, slot_count=2) as slots:
        ...     slot = slots.ensure(7)
        ...     store.write(7, b"x" * 4096)
        ...     slots.evict(7), int(slots.array("u1")[slots.ensure(7)][0, 0])
        (1, 120)
        """
        wanted = self._wanted("evict", keys)
        if keys is None:
            shown = self.keys
            wanted = shown[shown >= 0]
        return self._memory.evict(wanted)

    def write(self, keys: PageSelection, data: BufferLike) -> None:
        """Write whole extents to the store, and show them to all processes.

        Parameters
        ----------
        keys : int, slice, range, array of int or None
            Extents, each once.
        data : buffer or array
            Their content, in the order of `keys`: ``n * extent_bytes`` bytes. Bytes beyond the
            end of the store are not written.

        Raises
        ------
        UnsupportedError
            The slots are not shared (`shared`).
        ArgumentError
            `data` has another size, or a key is named twice.
        SlotsFullError
            There are more keys than slots, or too many slots are pinned. Nothing has changed.
        PageRangeError
            A key is outside the store.
        StoreError
            The store is read-only, or a write failed. Extents may be partly written, and the
            next call that names them reads them again.
        ClosedError
            The slots are closed.

        Notes
        -----
        `Store.write`: the extents are in the file when this returns, but not on the disk
        (`Store.sync`). Calls of any process that name one of them wait, and then see the new
        content, never a part of it. A pin is a snapshot: its holder keeps the old content until
        the pin ends. If two processes write the same extent, the last one wins. A process that
        is killed may leave an extent partly written, as with ``pwrite``.

        Examples
        --------
        >>> import fremap, numpy as np
        >>> store = fremap.MemoryStore(8 * 4096, name="docs-slots")
        >>> with fremap.Slots(store, extent_pages=1, slot_count=4, shared="docs-slots") as slots:
        ...     with slots.pin(2) as before:
        ...         slots.write(2, np.full(4096, 7, np.uint8))
        ...         after = slots.ensure(2)
        ...         shown = slots.array(np.uint8)
        ...         int(shown[before[0], 0]), int(shown[after[0], 0])
        (0, 7)
        >>> del shown
        >>> store.unlink()
        """
        wanted = self._wanted("write", keys)
        content = bytes_of("write", data, (len(wanted) * self.extent_bytes,))
        rising = np.argsort(wanted, kind="stable")
        ordered = wanted[rising]
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(twice):
            raise ArgumentError(f"write: key {ordered[twice[0]]} is named twice; name it once")
        extents = content.reshape(len(wanted), self.extent_bytes)
        if (rising[1:] < rising[:-1]).any():
            extents = extents[rising]
        if len(wanted):
            self._memory.write(ordered, extents)

    def _wanted(self, operation: str, keys: PageSelection) -> Numbers:
        """Return keys as an array of int64."""
        numbering = Numbering(operation, "key", self.extent_count)
        selection = numbering.selection(keys)
        if selection is None:
            selection = (0, numbering.limit)
        return np.arange(*selection) if isinstance(selection, tuple) else selection

    def _take(self, operation: Literal["ensure", "pin"], wanted: Numbers) -> _core.Taken:
        """Bring extents in; none of them leaves before what is returned is released."""
        while True:
            taken: Any = self._memory.table.reserve(operation, wanted)
            try:
                keys, slots = (np.frombuffer(part, np.int64) for part in taken.missing())
                if len(keys):
                    self._load(operation, taken, keys, slots)
                if taken.wait():
                    return taken  # type: ignore[no-any-return]
            except BaseException:
                # Not when it is dropped: the error's traceback keeps it alive.
                taken.settle(0)
                taken.release()
                raise
            # Another thread could not read an extent: this one finds out why.
            taken.release()

    def _load(self, operation: str, taken: Any, keys: Numbers, slots: Numbers) -> None:
        """Show extents in their slots; where that fails, empty those that were not reached."""
        try:
            self._memory.load(taken, keys, slots)
        except BaseException as error:
            completed = error.completed if isinstance(error, StoreError) else 0
            done = min(completed // self._extent_pages, len(keys) - 1)
            self._memory.drop(slots[done:], error)
            taken.settle(done)
            if isinstance(error, StoreError):
                raise naming(error, operation, int(keys[done]), done) from error
            raise
        taken.settle(len(keys))

    # The memory.

    @overload
    def array(
        self, dtype: type[_Scalar] | np.dtype[_Scalar], shape: Shape = None
    ) -> npt.NDArray[_Scalar]: ...

    @overload
    def array(self, dtype: npt.DTypeLike, shape: Shape = None) -> npt.NDArray[Any]: ...

    def array(self, dtype: npt.DTypeLike, shape: Shape = None) -> npt.NDArray[Any]:
        """Show the memory as an array whose item `i` is slot `i`, without a copy.

        Parameters
        ----------
        dtype : dtype
            Type of the elements; no Python objects.
        shape : int or sequence of int, optional
            Shape of one extent. One dimension may be -1. Default: as many elements as fit. A
            smaller shape shows the beginning of each extent.

        Returns
        -------
        ndarray, shape (slot_count, *shape)
            A read-only view, contiguous if the shape fills the extents. The slots cannot be
            closed while it exists.

        Raises
        ------
        ArgumentError
            The shape does not fit into an extent, or an element would lie in two files
            of a `ConcatStore`.
        ArgumentTypeError
            The dtype holds Python objects or has no size.

        Notes
        -----
        A slot shows what `keys` says. Do not touch an empty slot.

        Examples
        --------
        >>> import fremap, numpy as np
        >>> store = fremap.MemoryStore(64 * 4096, page_bytes=4096)
        >>> with fremap.Slots(store, extent_pages=4, slot_count=8) as slots:
        ...     slots.array(np.float16, (64, -1)).shape
        (8, 64, 128)
        """
        # The slots are an axis, too.
        elements = elements_within(dtype, shape, self.extent_bytes, max_axes=MAX_AXES - 1)
        self._store._check_extents(elements, self._extent_pages)  # noqa: SLF001 - its other half
        memory = np.frombuffer(self._memory.buffer, np.uint8)
        used = memory.reshape(self.slot_count, -1)[:, : elements.used_bytes]
        view: npt.NDArray[Any] = used.view(elements.dtype)
        return view.reshape(self.slot_count, *elements.shape)

    # The end.

    def __enter__(self) -> Self:
        """Return the slots themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close for calls; the last view frees the memory."""
        self._memory.leave(kind, error, traceback)

    def close(self) -> None:
        """Unmap the memory; later calls raise.

        Raises
        ------
        ViewsAliveError
            Arrays still show its memory.

        Notes
        -----
        ``munmap(2)``. Closing again does nothing.
        """
        self._memory.close()

    def __reduce__(self) -> tuple[Callable[..., Slots], tuple[object, ...]]:
        """Pickle as new slots on the store, which are empty."""
        if self.closed:
            raise TypeError("closed Slots cannot be pickled")
        arguments = (self._store, self._extent_pages, self._slot_count, self._settings)
        return _made_anew, (type(self), *arguments)


def _made_anew(
    cls: type[Slots], store: Store, extent_pages: int, slot_count: int, settings: dict[str, Any]
) -> Slots:
    return cls(store, extent_pages, slot_count, **settings)


def _check_shared(shared: object, engine: str, calibration: object) -> None:
    """Refuse what does not go with shared slots."""
    if not isinstance(shared, str):
        raise ArgumentTypeError(f"Slots: shared must be a name, not {type(shared).__name__}")
    if engine != "auto" or calibration is not None:
        raise ArgumentError(
            "Slots: shared slots have memory of their own; leave out engine= and calibration="
        )
