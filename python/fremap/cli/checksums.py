"""A checksum for each page of a file, read by system calls, in bounded memory."""

import os

import numpy as np
import numpy.typing as npt

AT_ONCE_BYTES = 16 << 20
SEED = 0xF2E3A9


def page_checksums(pages: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit checksum of each row.

    The sum of the words, each times an odd random number of its own: a changed
    word always shows, and pages that differ more agree once in 2**60 or so.
    """
    page_bytes = pages.shape[1]
    weights = np.random.default_rng(SEED).integers(0, 1 << 63, page_bytes // 8, dtype=np.uint64)
    weights = weights << np.uint64(1) | np.uint64(1)
    at_once = max(1, AT_ONCE_BYTES // page_bytes)
    sums = np.empty(len(pages), dtype=np.uint64)
    for first in range(0, len(pages), at_once):
        part = slice(first, first + at_once)
        sums[part] = (pages[part].view(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
    return sums


def read_exactly(fd: int, into: memoryview, offset: int) -> None:
    """Read until `into` is full or the file ends; what lies past the end is zeros."""
    while into:
        done = os.preadv(fd, [into], offset)
        if done == 0:
            into[:] = bytes(len(into))
            return
        into, offset = into[done:], offset + done


def file_checksums(
    path: str, file_pages: npt.NDArray[np.int64], page_bytes: int
) -> npt.NDArray[np.uint64]:
    """Return the checksum of each of `file_pages`, read with ``preadv(2)`` in file order.

    Parameters
    ----------
    path : str
        The file.
    file_pages : ndarray of int64, shape (n,)
        Its pages, in any order.
    page_bytes : int
        Bytes of a page.

    Returns
    -------
    ndarray of uint64, shape (n,)
        In the order of `file_pages`.
    """
    at_once = max(1, AT_ONCE_BYTES // page_bytes)
    buffer = np.empty((at_once, page_bytes), dtype=np.uint8)
    by_place = np.argsort(file_pages)
    sums = np.empty(len(file_pages), dtype=np.uint64)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first in range(0, len(by_place), at_once):
            places = by_place[first : first + at_once]
            pages = file_pages[places]
            into = memoryview(buffer)[: len(places)].cast("B")
            if pages[-1] - pages[0] + 1 == len(pages):
                read_exactly(fd, into, int(pages[0]) * page_bytes)
            else:
                for slot, page in enumerate(pages.tolist()):
                    row = into[slot * page_bytes : (slot + 1) * page_bytes]
                    read_exactly(fd, row, page * page_bytes)
            sums[places] = page_checksums(buffer[: len(places)])
    finally:
        os.close(fd)
    return sums
