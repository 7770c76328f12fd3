"""Reading and writing memory that may be forbidden, without dying of it.

The kernel answers EFAULT where a thread would get a signal. But where
userfaultfd is open to user mode only, it answers EFAULT for a page that is
merely absent, too: ask it only of pages that are present, or forbidden.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Bytes asked for: enough to reach the page, no more.
_PROBE_BYTES = 8


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
