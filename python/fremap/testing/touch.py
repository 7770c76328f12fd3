"""Touching memory that may be forbidden without dying of it, and what the kernel takes away.

The kernel answers EFAULT where a thread would get a signal. But where
userfaultfd is open to user mode only, it answers EFAULT for a page that is
merely absent, too: ask it only of pages that are present, or forbidden.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Bytes asked for: enough to reach the page, no more.
_PROBE_BYTES = 8

#: What /proc/vmstat counts before pages are reclaimed or moved, or after it.
_TAKEN = {"pgscan_file", "compact_isolated", "pgmigrate_success", "pgmigrate_fail"}


@contextmanager
def _probe_file() -> Iterator[int]:
    descriptor = os.memfd_create("fremap-probe", os.MFD_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def kernel_reads(view: memoryview, offset: int) -> bool:
    """Whether the kernel can read from memory.

    Parameters
    ----------
    view : memoryview
        Bytes.
    offset : int
        The first of the bytes to read.

    Returns
    -------
    bool
        False for EFAULT.
    """
    with _probe_file() as probe, view[offset : offset + _PROBE_BYTES] as part:
        try:
            return os.write(probe, part) > 0
        except OSError as error:
            if error.errno == errno.EFAULT:
                return False
            raise


def kernel_writes(view: memoryview, offset: int) -> bool:
    """Whether the kernel can write to memory; its content stays as it is.

    Parameters
    ----------
    view : memoryview
        Writable bytes that can be read.
    offset : int
        The first of the bytes to write.

    Returns
    -------
    bool
        False for EFAULT.
    """
    with _probe_file() as probe, view[offset : offset + _PROBE_BYTES] as part:
        os.write(probe, part)
        try:
            return os.preadv(probe, [part], 0) > 0
        except OSError as error:
            if error.errno == errno.EFAULT:
                return False
            raise


def pages_taken() -> int:
    """Count the pages that the kernel has taken from their users since it was started.

    It takes them to reclaim them, or to move them (compaction), and may unmap those of files
    for either: where no free memory is as long as a large folio that is to be moved, the kernel
    splits the folio and leaves its pages unmapped (seen on Linux 6.18). So a page of a mapped
    file that was present may be absent if this count has risen. The next touch maps it again.

    Returns
    -------
    int
        From /proc/vmstat, for the whole machine. A page may count twice. Pages of anonymous
        memory that are reclaimed do not count.
    """
    lines = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return sum(int(count) for name, count in lines if name in _TAKEN)
