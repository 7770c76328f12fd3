"""`remap_file_pages` as it was in October 2002.

Linux 2.5.42 brought the system call, ``MAP_POPULATE`` and ``MAP_NONBLOCK``.
On a `Window` the call does what it did then, errno for errno; on any other
shared mapping it is the kernel's own call, which since Linux 4.0 makes one
mapping a piece.
"""

from __future__ import annotations

import errno
import operator
import os
import sys
from typing import TYPE_CHECKING, Final, SupportsIndex

import numpy as np

from fremap import _core
from fremap.errors import ArgumentError, RemapError, StoreError
from fremap.protection import checked_prot
from fremap.stores import MemoryStore
from fremap.window import Window

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MAP_NONBLOCK", "MAP_POPULATE", "remap_file_pages"]

MAP_POPULATE: Final = 0x8000
"""Prefault what is mapped (``mmap(2)``); a remap does so in any case."""

MAP_NONBLOCK: Final = 0x10000
"""Prefault only what needs no I/O. The kernel ignores it since Linux 2.6.23."""

_PROT_MAX = 0b11
_INT_MAX = 0x7FFF_FFFF


def remap_file_pages(
    target: Buffer,
    start: SupportsIndex,
    size: SupportsIndex,
    prot: SupportsIndex,
    pgoff: SupportsIndex,
    flags: SupportsIndex = 0,
) -> None:
    """Change which file pages a range of an existing shared mapping shows.

    Parameters
    ----------
    target : Window or buffer
        A window, or a shared mapping such as an `mmap.mmap`.
    start : int
        Where the range begins, in bytes from the beginning of `target`; a multiple of the page.
    size : int
        Bytes of the range; on a window, rounded up to whole pages.
    prot : int
        On a window: 0 leaves the protection, ``PROT_READ`` or ``PROT_WRITE``
        set it. The kernel's own call requires 0.
    pgoff : int
        The first page of the file to show, in pages.
    flags : int, default 0
        ``MAP_NONBLOCK``: do no I/O; pages that are not in the page cache
        become absent, and a touch loads them.

    Raises
    ------
    RemapError
        On a window: ``EINVAL`` for an empty range, one outside the window,
        another `prot`, or file pages beyond the end; ``EFAULT`` for pages
        beyond the end of a `MemoryStore`; ``ENOMEM``, with its cause chained,
        where a page cannot be read. Elsewhere: the kernel's answer.
    ArgumentError
        `target` is a view of a window, or an array that shows one; give the
        window itself.

    See Also
    --------
    Window.remap : The same for any pages at any places, and it returns which are present.

    Notes
    -----
    On any other mapping this is ``remap_file_pages(2)`` (Linux
    2.5.46; emulated since 4.0): one kernel mapping for each piece, limited by
    ``vm.max_map_count``. Today's kernel rounds `start` and `size` down,
    and takes file pages beyond the end. Thread safety and atomicity on a
    window are those of `Window.remap`.

    Examples
    --------
    >>> import fremap
    >>> store = fremap.MemoryStore(4 * 4096, page_bytes=4096)
    >>> with fremap.Window(store) as window:
    ...     fremap.remap_file_pages(window, 0, 2 * 4096, 0, pgoff=2)
    ...     window.mapping.tolist()
    [2, 3, 2, 3]
    """
    numbers = [operator.index(value) for value in (start, size, prot, pgoff, flags)]
    if isinstance(target, Window):
        _on_window(target, *numbers)
        return
    # Let go of at once, as a view kept by a traceback would keep `target` from closing.
    with memoryview(target) as view:
        if _shows_window(view.obj):
            raise ArgumentError(
                "remap_file_pages: target shows the memory of a Window, which would no longer "
                "know what its pages show; give the Window itself"
            )
        if min(numbers) < 0 or max(numbers) > sys.maxsize or max(numbers[2], numbers[4]) > _INT_MAX:
            raise _refusal(errno.EINVAL, "an argument is not an address, a size or a page")
        _core.remap_file_pages(view, *numbers)


def _shows_window(owner: object) -> bool:
    """Whether the memory of `owner` is a window's: follows views to what they view."""
    while not isinstance(owner, Window):
        if isinstance(owner, memoryview):
            owner = owner.obj
        elif isinstance(owner, np.ndarray):
            owner = owner.base
        else:
            return False
    return True


def _on_window(window: Window, start: int, size: int, prot: int, pgoff: int, flags: int) -> None:
    page_bytes = window.page_bytes
    count = -(-size // page_bytes)
    if start % page_bytes:
        raise _refusal(errno.EINVAL, f"start {start} is not a multiple of {page_bytes}")
    if count <= 0 or start < 0 or start // page_bytes + count > window.page_count:
        within = window.page_count * page_bytes
        raise _refusal(errno.EINVAL, f"{size} bytes from {start} of a window of {within} bytes")
    if not 0 <= prot <= _PROT_MAX:
        raise _refusal(errno.EINVAL, f"prot is {prot}")
    store = window.store
    if pgoff < 0 or pgoff + count > store.page_count:
        # The patch had one populate function a kind of memory, and these are their answers.
        number = errno.EFAULT if isinstance(store, MemoryStore) else errno.EINVAL
        wanted = f"file pages {pgoff}..{pgoff + count}"
        raise _refusal(number, f"{wanted} of a store of {store.page_count}")
    try:
        window.remap(
            range(pgoff, pgoff + count),
            at=start // page_bytes,
            prot=checked_prot(prot) if prot else None,
            nonblock=bool(flags & MAP_NONBLOCK),
        )
    except StoreError as cause:
        raise _refusal(errno.ENOMEM, "a page cannot be read") from cause


def _refusal(number: int, why: str) -> RemapError:
    return RemapError(number, f"remap_file_pages: {os.strerror(number)}: {why}")
