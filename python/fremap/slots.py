"""Slots: memory for a number of extents of a store, which keeps those that are in use.

The memory is one window, or an object that processes share (`slot_memory`). The compiled core
decides which extent is in which slot, which are pinned, and which one makes room; other threads,
and processes, find extents while some are read.
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

    Made by `Slots.pin`. Entering it gives the slot numbers.

    Parameters
    ----------
    taken : fremap._core.Taken or fremap._core.SharedTaken
        The slots, pinned.
    """

    __slots__ = ("_pinned", "_taken")

    def __init__(self, taken: _core.Taken | _core.SharedTaken) -> None:
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
        """Let the extents leave again; later calls do nothing."""
        self._taken.unpin()
        self._pinned = False


class Slots:
    """A fixed number of slots in memory, each of which shows one extent of a store.

    Extent `k` is the file pages ``k * extent_pages`` to ``(k + 1) * extent_pages``; its
    key is `k`. `ensure` says in which slots extents are, and brings in those that are
    in none. The memory is one contiguous read-only array, see `array`.

    Any number of threads may use the slots. An extent stays in its slot until it has to
    make room: what a call has returned may be gone as soon as another call needs room,
    by this thread or another, or by another process that shares the slots, unless it is
    pinned (`pin`). While a call is under way
    nothing that it names leaves.

    Parameters
    ----------
    store : Store
        Whose pages to show: a file, shared memory, several stores in a row, or a computed or
        remote store.
    extent_pages : int
        Pages of an extent. The last extent may be cut short by the end of the store,
        and is zeros behind it.
    slot_count : int
        Extents that there is room for.
    engine : {"auto", "alias", "paged", "eager"}, default "auto"
        How the window of the slots is done. "auto": "alias" if extents are at least as long
        as ``calibration.alias_extent_pages``, the store is read through the page cache,
        and the slots take no more than a quarter of the process's kernel mappings;
        else "paged" where this process may have it; else "eager".
    budget : int, str or None, default "auto"
        Bytes, or a size such as "64M", that the slots may take, with engines other than
        "alias"; slots that do not fit are refused. "auto" is a share of half of what is
        available, None no limit.
    calibration : fremap.calibration.Calibration, optional
        Crossover points; as for `Window` if not given.
    shared : str, optional
        A name, by which all processes of this user find the same slots: letters, digits, ".",
        "_" and "-". The first process makes them, the others must ask for as many slots of the
        same extents of the same store, and the last one to close them, or to end, removes
        them. An extent is read once, whoever asks for it first, and pins hold in all
        processes. The store may be an object on a server, if it was opened by its URL and the
        server tells its version; each version has slots of its own. Without a name the slots are
        this process's own.

    Raises
    ------
    ArgumentError
        A number is zero, or the slots are larger than the address space. Or there are other
        slots of that name.
    BudgetError
        The slots do not fit into the budget.
    UnsupportedError
        The engine cannot be had, or does not go with the store.
    StoreError
        The window cannot be mapped, or there is no room for shared slots.

    Notes
    -----
    `Window` with ``mapping="none"``. A slot that is empty shows nothing: touching it is
    SIGSEGV or SIGBUS. With engine "alias" the memory is the page cache's, a kernel
    mapping a slot; the kernel may take pages back, and a touch reads them again. The
    policy of windows with a budget chooses what is evicted; here it sees hits too.
    Extents are those of the store when the slots were made, also after a `Store.refresh`.
    With engine "alias" a slot shows what others write to the store at once; with the other
    engines, which copy, it shows what was there when the extent was brought in, until
    `evict` has it read again.
    In a child of ``fork`` calls raise `ForkError`; the memory shows what that of a
    `Window` shows there. Pickling makes empty slots on the store, re-opened.

    Shared slots are a file in ``/dev/shm`` that its owner alone may open (mode 0600), allocated
    when it is made, and one kernel mapping in each process. They work in children of ``fork``,
    and pickling finds them by name. If a process is killed, at whatever instruction, the
    others go on: its pins end, and another process reads what it was reading. Only if all were
    killed, the slots stay until a process uses the name again; ``fremap shm`` lists and removes
    them.
    All processes must see the same process numbers (one PID namespace). Slots over a store that
    may be written are written by `write`. With a budget "auto" new shared slots may take half
    of the memory there is.

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
        """Extents of the store, the last perhaps cut short: keys go from 0 to below this."""
        return -(-self._page_count // self._extent_pages)

    @property
    def shared(self) -> str | None:
        """Name of the slots if processes share them, else None."""
        name: str | None = self._settings["shared"]
        return name

    @property
    def engine(self) -> str:
        """How the window of the slots is done; "shared" if processes share them."""
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
        """Return what the slots hold and what they did so far.

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
        """Bring in the extents that are not there, and say in which slots all of them are.

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
            There are not so many slots, or too many of them are pinned. Nothing has changed.
        PageRangeError
            A key is outside the store.
        StoreError
            An extent cannot be read; the error names its key. Extents before it are in
            their slots, it and those after it are not, and their slots are empty. What
            left for them is gone.
        ClosedError, ForkError
            The slots are closed, or were made by the parent process.

        Notes
        -----
        What is missing is one `Window.remap`: sorted, all reads in flight together.
        Waits for calls of other threads that need the room, not for pins. A key that
        another thread is bringing in is waited for, not read twice.
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
            A context manager that gives the slot of each key, and unpins them at its
            end; or call its `release`. Pins of one extent add up.

        Raises
        ------
        SlotsFullError
            There are not so many slots, or too many of them are pinned. Nothing has changed.
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

        Call it after others have written to the store: unless the engine is "alias", a slot
        shows what its extent was when it was brought in.

        Parameters
        ----------
        keys : int, slice, range, array of int or None, optional
            Extents, repeats allowed; those that are in no slot are passed over. None means
            all.

        Returns
        -------
        int
            Slots that were emptied. Their memory may not be touched until they show an
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
        Shared slots that are pinned keep their content for those who pinned them, and the next
        call that names the extent reads it into another slot.

        `Window.evict`. Waits for calls under way that name one of the extents, of which it
        cannot be known whether they read before the change.

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
            Their content, in the order of `keys`: ``n * extent_bytes`` bytes. What lies beyond
            the store's end is not written.

        Raises
        ------
        UnsupportedError
            The slots are not shared (`shared`).
        ArgumentError
            `data` has another size, or a key is named twice.
        SlotsFullError
            There are not so many slots, or too many of them are pinned. Nothing has changed.
        PageRangeError
            A key is outside the store.
        StoreError
            The store may not be written, or a write failed; extents may be written in part, and
            are read again by the next call that names them.
        ClosedError
            The slots are closed.

        Notes
        -----
        `Store.write`: the extents are in the file when this returns, not on the disk
        (`Store.sync`). Calls of any process that name one of them meanwhile wait, and then see
        the new content, never a part of it. Who has pinned an extent keeps the old content until
        the pin ends: a pin is a snapshot. Two that write the same extent at once: the last one
        counts. A process that is killed may leave an extent written in part, as with ``pwrite``.

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

    def _take(
        self, operation: Literal["ensure", "pin"], wanted: Numbers
    ) -> _core.Taken | _core.SharedTaken:
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
            Shape of one extent. One dimension may be -1; as many elements as fit if not
            given. A smaller shape shows the front of each extent.

        Returns
        -------
        ndarray, shape (slot_count, *shape)
            A read-only view, contiguous if the shape fills the extents. While it lives
            the slots cannot be closed.

        Raises
        ------
        ArgumentError
            The shape does not fit into an extent, or an element would lie in two files
            of a `ConcatStore`.
        ArgumentTypeError
            The dtype holds Python objects or has no size.

        Notes
        -----
        A slot shows what `keys` says; one that is empty may not be touched.

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
        """Close for calls; the memory goes with its last view."""
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
        """Be made anew on the store, with nothing in it."""
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
