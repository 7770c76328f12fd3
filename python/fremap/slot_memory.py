"""Where slots are: a window of this process, or memory that all processes share.

Each of the two loads what a call misses into its slots, and says what is in them.
"""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import TYPE_CHECKING

import numpy as np

from fremap import _core
from fremap.errors import (
    BudgetError,
    FremapError,
    ProviderError,
    StoreError,
    UnsupportedError,
)
from fremap.window import Window

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TypeAlias

    import numpy.typing as npt

    from fremap.calibration import Calibration
    from fremap.settings import CheckedBudget, Engine
    from fremap.stores import Store

    Numbers: TypeAlias = npt.NDArray[np.int64]

__all__ = ["SharedMemory", "WindowMemory", "alias_pays", "naming"]

#: The part of the process's kernel mappings that aliased extents may take.
_MAPPINGS_PART = 4
#: Without a budget, shared slots may take one part in so many of the available memory.
_AUTO_PART = 2
_LAST = -100  # among the finalizers of a child of multiprocessing


class WindowMemory:
    """Slots of this process alone: a window that shows extents of a store.

    Parameters
    ----------
    store : Store
        Whose extents they are.
    extent_pages, slot_count : int
        What the slots are.
    engine, budget, calibration : object
        Those of the window.
    """

    __slots__ = ("_extent_pages", "_page_count", "_store", "_window", "table")

    def __init__(
        self,
        store: Store,
        extent_pages: int,
        slot_count: int,
        engine: Engine,
        budget: CheckedBudget,
        calibration: Calibration | None,
    ) -> None:
        self._store, self._extent_pages = store, extent_pages
        self._window = _slots_window(store, extent_pages * slot_count, engine, budget, calibration)
        #: As it was: extents do not change with the store's size.
        self._page_count = store.page_count
        self.table = _core.SlotTable(slot_count, -(-self._page_count // extent_pages))

    @property
    def engine(self) -> str:
        """How the window is done."""
        return self._window.engine

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._window.closed

    @property
    def buffer(self) -> memoryview:
        """The memory of all slots."""
        return memoryview(self._window)

    def load(self, _taken: _core.Taken, keys: Numbers, slots: Numbers) -> None:
        """Show extents in their slots; keys rise."""
        if (int(keys[-1]) + 1) * self._extent_pages <= self._page_count:
            # No thread reads a slot whose extent is being evicted.
            self._window._load(keys, slots, self._extent_pages)  # noqa: SLF001 - its other half
            return
        file_pages, at = self._pages(keys), self._pages(slots)
        # Keys rise: what lies behind the store's end is the end of the last extent.
        whole = int(np.searchsorted(file_pages, self._page_count))
        if whole < len(file_pages):
            self._window.place(at[whole:], bytes(self._store.page_bytes))
        self._window.remap(file_pages[:whole], at=at[:whole], discard=True, in_place=True)

    def _pages(self, numbers: Numbers) -> Numbers:
        """Pages of extents or of slots, extent by extent."""
        within = np.arange(self._extent_pages)
        return (numbers[:, None] * self._extent_pages + within).reshape(-1)

    def drop(self, slots: Numbers, error: BaseException) -> None:
        """Give back what is in slots that are to be empty."""
        try:
            self._window.evict(self._pages(slots), discard=True)
        except FremapError as failure:
            error.add_note(f"fremap: emptying the slots failed too: {failure}")

    def evict(self, keys: Numbers) -> int:
        """Empty the slots of extents."""
        taken = self.table.evict(keys)
        try:
            slots = np.frombuffer(taken.slots(), np.int64)
            if len(slots):
                self._window.evict(self._pages(slots), discard=True)
        finally:
            taken.release()
        return len(slots)

    def write(self, _keys: Numbers, _data: npt.NDArray[np.uint8]) -> None:
        """Refuse."""
        raise UnsupportedError(
            "write: only slots that processes share (shared=) are written; write to the store, "
            "then evict the keys"
        )

    def close(self) -> None:
        """Unmap the memory."""
        self._window.close()
        self.table.close()

    def leave(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close for calls; the last view frees the memory."""
        self._window.__exit__(kind, error, traceback)
        self.table.close()


class SharedMemory:
    """Slots in memory that all processes of a user share.

    Parameters
    ----------
    store : Store
        Whose extents they are.
    extent_pages, slot_count : int
        What the slots are.
    name : str
        What they are found by.
    budget : int, "auto" or None
        Bytes that they may take.
    """

    __slots__ = ("__weakref__", "_extent_pages", "_page_count", "_store", "table")

    engine = "shared"

    def __init__(
        self, store: Store, extent_pages: int, slot_count: int, name: str, budget: CheckedBudget
    ) -> None:
        slots_bytes = extent_pages * store.page_bytes * slot_count
        most: int | None = None
        if budget == "auto":
            # Asked of whoever makes them: others find them there.
            most = _core.available_memory() // _AUTO_PART
        elif budget is not None and slots_bytes > budget:
            raise BudgetError(
                f"Slots: the slots take {slots_bytes} bytes; that is more than the budget of "
                f"{budget}: use fewer slots, a larger budget, or budget=None"
            )
        self._store, self._extent_pages = store, extent_pages
        self._page_count = store.page_count
        core = store._core  # noqa: SLF001 - its other half
        self.table = _core.SharedSlots(name, core, extent_pages, slot_count, most)
        _let_go_at_exit(self)

    @property
    def closed(self) -> bool:
        """Whether they were closed here."""
        return self.table.closed

    @property
    def buffer(self) -> memoryview:
        """The memory of all slots."""
        return memoryview(self.table)  # type: ignore[arg-type] # stubs lack the protocol

    def load(self, taken: _core.SharedTaken, _keys: Numbers, _slots: Numbers) -> None:
        """Read extents into their slots."""
        taken.load(self._store._core)  # noqa: SLF001 - its other half

    def drop(self, _slots: Numbers, _error: BaseException) -> None:
        """Do nothing: the memory of an empty slot stays, for the next extent."""

    def evict(self, keys: Numbers) -> int:
        """Evict extents, so that the next calls read them again."""
        return self.table.evict(keys)

    def write(self, keys: Numbers, data: npt.NDArray[np.uint8]) -> None:
        """Write extents to the store and to new slots; keys rise."""
        taken = self.table.reserve("write", keys)
        try:
            pages = (keys[:, None] * self._extent_pages + np.arange(self._extent_pages)).reshape(-1)
            whole = int(np.searchsorted(pages, self._page_count))
            content = data.reshape(len(pages), -1)
            self._store.write(pages[:whole], content[:whole])
            taken.fill(data)
            taken.settle(len(keys))
        finally:
            taken.settle(0)
            taken.release()

    def close(self) -> None:
        """Unmap the memory; the last process takes the name along."""
        self.table.close()

    def leave(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Close for calls; the last view frees the memory."""
        self.table.leave()


_open: weakref.WeakSet[SharedMemory] = weakref.WeakSet()
# The process that has registered its exit handler; a child of fork must register its own.
_registered_by: list[int] = []


def _let_go_at_exit(memory: SharedMemory) -> None:
    """Let go of shared slots when the interpreter ends, so that the last takes the name along."""
    _open.add(memory)
    if not _registered_by:
        os.register_at_fork(after_in_child=_register)
    if _registered_by[-1:] != [os.getpid()]:
        _register()


def _register() -> None:
    _registered_by[:] = [os.getpid()]
    atexit.register(_let_go_of_all)
    # A child of multiprocessing ends without them, after its own finalizers; those that are set
    # before it begins its work are forgotten then.
    processes = sys.modules.get("multiprocessing.util")
    if processes is not None:
        processes.register_after_fork(_let_go_of_all, _finalize)
        _finalize()


def _finalize(_: object = None) -> None:
    sys.modules["multiprocessing.util"].Finalize(None, _let_go_of_all, exitpriority=_LAST)


def _let_go_of_all() -> None:
    for memory in tuple(_open):
        memory.table.let_go()


def _slots_window(
    store: Store,
    page_count: int,
    engine: Engine,
    budget: CheckedBudget,
    calibration: Calibration | None,
) -> Window:
    window = Window(
        store,
        page_count,
        mapping="none",
        engine=engine,
        # Copies, where the choice is left: whether aliases pay is known by now.
        coherent=False if engine == "auto" else None,
        # The slots of engine "alias" are the page cache's, which is not fremap's to trim.
        budget=None if engine == "alias" else budget,
        calibration=calibration,
    )
    limit, needed = window.stats().budget_bytes, window._whole_bytes()  # noqa: SLF001
    slots_bytes = page_count * store.page_bytes
    if engine == "alias" and isinstance(budget, int) and budget < slots_bytes:
        limit = budget
    if limit:
        window.close()
        beside = (needed or slots_bytes) - slots_bytes
        also = f", and page tables and the memory that reads go through {beside}" if beside else ""
        raise BudgetError(
            f"Slots: the slots take {slots_bytes} bytes{also}; that is more than the budget of "
            f"{limit}: use fewer slots, a larger budget, or budget=None"
        )
    return window


def alias_pays(store: Store, extent_pages: int, slot_count: int, measured: Calibration) -> bool:
    """Whether mapping extents is cheaper than copying them, by what was measured."""
    page = _core.system_page_bytes
    core = store._core  # noqa: SLF001 - its other half
    if (
        store.direct
        or core.is_provided
        or (store.page_bytes > page and store.size % store.page_bytes)
    ):
        return False
    with open("/proc/sys/vm/max_map_count") as file:
        most = int(file.read()) // _MAPPINGS_PART
    long = extent_pages * store.page_bytes >= measured.alias_extent_pages * page
    return long and slot_count <= most


def naming(error: StoreError, operation: str, key: int, done: int) -> StoreError:
    """Return the same error, saying which extent it was that could not be read."""
    text = f"{operation}: key {key} cannot be brought in: {error.strerror}"
    number = error.errno or 0
    if error.filename is None:
        named = type(error)(number, text)
    else:
        named = type(error)(number, text, error.filename)
    named.completed = done
    named.file_page = error.file_page
    named.key = key
    if isinstance(error, ProviderError) and isinstance(named, ProviderError):
        named.traceback = error.traceback
    return named
