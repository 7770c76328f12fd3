"""What windows, slots, rows and memmaps count."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

__all__ = ["MemmapStats", "RowsStats", "SlotsStats", "WindowStats"]


def warn_renamed(old: str, new: str) -> None:
    """Warn about a name that 0.2 will remove."""
    warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel=3)


@dataclass(frozen=True, slots=True)
class WindowStats:
    """What a window holds now, and what it has done since it was made.

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
        Pages that are known to be modified and not yet in the store. With ``tracking="async"``
        and engine "eager", only `Window.dirty` finds all of them.
    pinned_pages : int
        Pages that are pinned.
    page_table_bytes : int
        Bytes of the kernel's page tables for the window: one page for each 2 MiB that ever had
        a page. The kernel may have freed some.
    budget_bytes : int
        Bytes that the window may take; 0 if all of it fits, or if there is no limit.
    table_bytes : int
        Bytes of the table that says what each page shows.
    staging_bytes : int
        Bytes of memory into which pages are read before they are moved into the window.
    blocks_trimmed : int
        Engine "alias": blocks of 2 MiB that were unmapped to keep to the budget.
    pages_in, pages_out : int
        How often a page became present, and absent again:
        ``present_pages == pages_in - pages_out``. 0 with engine "alias", whose pages the
        kernel manages.
    faults : int
        Touches of absent pages that were served.
    pages_loaded : int
        Pages that calls loaded.
    pages_moved : int
        Of these, pages that were moved in without a copy (``UFFDIO_MOVE``).
    pages_evicted : int
        Pages that were evicted. Their memory may not all be free yet.
    pages_hit : int
        Pages that `Window.remap` and `Window.populate` found present. Touches of present pages
        leave no trace, so they are not counted.
    bytes_read : int
        Bytes of the pages that calls and faults read from the store; a partial last page counts
        as a whole page. 0 with engine "alias".
    bytes_written : int
        Bytes of the pages of this window that a flush, an eviction, a call or the end of the
        window wrote to the store; a partial last page counts as a whole page. Writes that
        failed half way are not counted.
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
    """What rows hold now, and what they have done since they were opened.

    Attributes
    ----------
    takes : int
        Takes that were started.
    rows_copied : int
        Rows that were copied from the page cache without a system call: hits.
    rows_read : int
        Rows that were read by system calls, including rows that were in the page cache after
        all: the kernel does not say which.
    bytes_read : int
        Bytes that system calls read, including those between rows.
    reads : int
        Read requests to the kernel.
    major_faults : int
        How often copying a row had to wait for a device.
    mapped_bytes : int
        Bytes of the files that are mapped. They count as this process's memory, and stay
        in the page cache when they are unmapped.
    page_table_bytes : int
        Bytes of the kernel's page tables for these maps.
    budget_bytes : int
        Limit for the sum of the two; 0 without a limit.
    open_files : int
        Descriptors that are open.
    cache_hits : int
        Rows that were copied from the rows kept in memory (`cache_bytes`). They do not count as
        copied or read.
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
        Bytes of the kernel's page tables for it.
    budget_bytes : int
        Limit for the sum of the two; with ``budget="auto"``, for all such arrays together. 0
        without a limit.
    blocks_trimmed : int
        Blocks of 2 MiB that were unmapped to keep to the budget.
    advice : {"normal", "random", "sequential"}
        How the kernel reads ahead now.
    minor_faults, major_faults : int
        Faults of the *process* since the array was made, without and with waiting for a device.
        The kernel does not count them for each mapping.
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
    """What slots hold now, and what they have done since they were made.

    Attributes
    ----------
    hits : int
        Keys whose extents had slots already: from an earlier call, from another thread that is
        loading them, or because the same call names the key twice.
    misses : int
        Extents that calls had to load.
    evictions : int
        Extents that were evicted for others.
    bytes_read : int
        Bytes of the extents that were loaded, from the device or the page cache. A partial last
        extent counts as a whole one.
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
