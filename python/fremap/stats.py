"""What windows, slots, rows and memmaps count."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

__all__ = ["MemmapStats", "RowsStats", "SlotsStats", "WindowStats"]


def warn_renamed(old: str, new: str) -> None:
    """Warn of a name that goes with 0.2."""
    warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=3)


@dataclass(frozen=True, slots=True)
class WindowStats:
    """What a window holds now, and what it did since it was made.

    Attributes
    ----------
    present_pages : int
        Pages whose content is in the window. The memory may be more: see the
        notes of `Window.evict`.
    placed_pages : int
        Pages with content of their own.
    denied_pages : int
        Pages protected with `Prot.NONE`.
    dirty_pages : int
        Pages that are known to have been stored to and are not in the store yet. With
        ``tracking="async"`` and engine "eager" it is `Window.dirty` that asks.
    pinned_pages : int
        Pages that are pinned.
    page_table_bytes : int
        The kernel's page tables for the window: one page of them for each 2 MiB in
        which a page ever was. The kernel may have taken some back.
    budget_bytes : int
        What the window may take; 0 if it fits whole, or has no limit.
    table_bytes : int
        Memory of the table of what each page shows.
    staging_bytes : int
        Memory that content is read into before it is swapped in.
    blocks_trimmed : int
        Engine "alias": blocks of 2 MiB that were unmapped to keep to the budget.
    pages_in, pages_out : int
        How often a page became present, and absent again:
        ``present_pages == pages_in - pages_out``. 0 with engine "alias", whose pages are
        the kernel's.
    faults : int
        Touches of absent pages that were served.
    pages_loaded : int
        Pages that calls brought in.
    pages_moved : int
        Pages of those that were swapped in without a copy (``UFFDIO_MOVE``).
    pages_evicted : int
        Pages that were dropped; not all of their memory need be free yet.
    pages_hit : int
        Pages that `Window.remap` and `Window.populate` were to bring and that were there
        already. Touches of present pages leave no trace, so that they are not counted.
    bytes_read : int
        Bytes of the pages that calls and faults brought from the store; a last page
        that the file has in part counts whole. 0 with engine "alias".
    bytes_written : int
        Bytes of the pages of this window that were written to the store, counted alike,
        when a flush, an eviction, a call or the end of the window wrote them. What was
        written by a writing that failed half way is not counted.
    pages_unreadable : int
        Pages that could not be read when they were touched.
    """

    present_pages: int
    placed_pages: int
    denied_pages: int
    dirty_pages: int
    pinned_pages: int
    page_table_bytes: int
    budget_bytes: int
    table_bytes: int
    staging_bytes: int
    blocks_trimmed: int
    pages_in: int
    pages_out: int
    faults: int
    pages_loaded: int
    pages_moved: int
    pages_evicted: int
    pages_hit: int
    bytes_read: int
    bytes_written: int
    pages_unreadable: int


@dataclass(frozen=True, slots=True)
class RowsStats:
    """What rows hold now, and what they did since they were opened.

    Attributes
    ----------
    takes : int
        Takes that were begun.
    rows_copied : int
        Rows that were copied from the page cache, without a system call: hits.
    rows_read : int
        Rows that were read by system calls. Those that were in the page cache all the
        same are among them: the kernel does not say.
    bytes_read : int
        Bytes that system calls brought, also those between rows.
    reads : int
        Read requests made of the kernel.
    major_faults : int
        Times that a copied row had to be waited for.
    mapped_bytes : int
        Bytes of the files that are mapped. They count as this process's memory, and stay
        in the page cache when they are unmapped.
    page_table_bytes : int
        The kernel's page tables for that.
    budget_bytes : int
        What the two may come to; 0 without a limit.
    open_files : int
        Descriptors that are open.
    cache_hits : int
        Rows that were copied from those kept in memory (`cache_bytes`). They are neither among
        those copied nor among those read.
    cached_bytes : int
        Bytes of the rows that are kept.
    """

    takes: int
    rows_copied: int
    rows_read: int
    bytes_read: int
    reads: int
    major_faults: int
    mapped_bytes: int
    page_table_bytes: int
    budget_bytes: int
    open_files: int
    cache_hits: int
    cached_bytes: int


@dataclass(frozen=True, slots=True)
class MemmapStats:
    """What a `memmap` has in memory now, and what was done since it was made.

    Attributes
    ----------
    mapped_bytes : int
        Bytes of the file that are mapped.
    page_table_bytes : int
        The kernel's page tables for that.
    budget_bytes : int
        What the two may come to, with ``budget="auto"`` those of all such arrays together;
        0 without a limit.
    blocks_trimmed : int
        Blocks of 2 MiB that were unmapped to keep to the budget.
    advice : {"normal", "random", "sequential"}
        How the kernel reads ahead now.
    minor_faults, major_faults : int
        Faults of the *process* since the array was made, without and with waiting for a
        device: the kernel does not count them by mapping.
    """

    mapped_bytes: int
    page_table_bytes: int
    budget_bytes: int
    blocks_trimmed: int
    advice: str
    minor_faults: int
    major_faults: int

    @property
    def resident_bytes(self) -> int:
        """The name of `mapped_bytes` until 0.1."""
        warn_renamed("MemmapStats.resident_bytes", "mapped_bytes")
        return self.mapped_bytes


@dataclass(frozen=True, slots=True)
class SlotsStats:
    """What slots hold now, and what they did since they were made.

    Attributes
    ----------
    hits : int
        Keys named by calls whose extents had slots already: by an earlier call, by another
        thread's that is bringing them, or by the same key before.
    misses : int
        Extents that calls had to bring in.
    evictions : int
        Extents that left for others.
    bytes_read : int
        Bytes of the extents that were brought in, from the device or the page cache; one
        that the store's end cuts short counts whole.
    filled_slots : int
        Slots that show an extent.
    pinned_slots : int
        Slots that are pinned.
    """

    hits: int
    misses: int
    evictions: int
    bytes_read: int
    filled_slots: int
    pinned_slots: int

    @property
    def held_slots(self) -> int:
        """The name of `pinned_slots` until 0.1."""
        warn_renamed("SlotsStats.held_slots", "pinned_slots")
        return self.pinned_slots
