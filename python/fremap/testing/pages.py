"""Numbered pages: content that tells which page it is, at every aligned word.

A word of eight bytes holds the generation (16 bits), the page's number plus
one (32 bits) and the word's place in the page (16 bits), so that no word of a
numbered page is zero, and none is at home anywhere else.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

WORD_BYTES = 8
#: The clock that the kernel takes the times of files from (CLOCK_REALTIME_COARSE).
_COARSE_CLOCK = 5
_NUMBER_SHIFT = 16
_GENERATION_SHIFT = 48

#: Pages written to a file at once: a bound on memory, whatever the file's size.
_PAGES_A_WRITE = 4096

Words = npt.NDArray[np.uint64]


def numbered_words(numbers: npt.ArrayLike, page_bytes: int = 4096, *, generation: int = 0) -> Words:
    """Content of numbered pages.

    Parameters
    ----------
    numbers : array_like of int
        The numbers of the pages, each below 2**32 - 1.
    page_bytes : int
        Bytes of a page, a multiple of eight up to 512 KiB.
    generation : int
        Tells successive contents of one page apart, below 2**16.

    Returns
    -------
    ndarray of uint64, shape (n, page_bytes // 8)
        One row a page; no word is zero.
    """
    number = np.asarray(numbers, dtype=np.uint64).reshape(-1, 1) + np.uint64(1)
    place = np.arange(page_bytes // WORD_BYTES, dtype=np.uint64)
    stamp = np.uint64(generation << _GENERATION_SHIFT)
    words: Words = (number << np.uint64(_NUMBER_SHIFT)) | place | stamp
    return words


def numbered_page(number: int, page_bytes: int = 4096, *, generation: int = 0) -> bytes:
    """Content of one numbered page.

    Parameters
    ----------
    number : int
        The number of the page.
    page_bytes : int
        Bytes of a page.
    generation : int
        Tells successive contents of one page apart.

    Returns
    -------
    bytes
        `page_bytes` bytes, no word of which is zero.
    """
    return numbered_words([number], page_bytes, generation=generation).tobytes()


def fill_numbered(pages: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
    """Write numbered pages, as a `ComputedStore` asks for them.

    Parameters
    ----------
    pages : ndarray of int64
        The numbers of the pages.
    out : ndarray of uint8, shape (n, page_bytes)
        Where to write them.
    """
    out[...] = numbered_words(pages, out.shape[1]).view(np.uint8)


def page_numbers(words: Words) -> npt.NDArray[np.int64]:
    """Which page each word comes from; -1 for a word of zero.

    Parameters
    ----------
    words : ndarray of uint64
        Words of numbered pages, any shape.

    Returns
    -------
    ndarray of int64
        The numbers, of the same shape.
    """
    number = (words >> np.uint64(_NUMBER_SHIFT)) & np.uint64(0xFFFF_FFFF)
    numbers: npt.NDArray[np.int64] = number.astype(np.int64) - 1
    return numbers


def write_numbered_file(path: str | Path, page_count: int, page_bytes: int = 4096) -> None:
    """Make a file of numbered pages: page i of the file is page number i.

    Parameters
    ----------
    path : str or Path
        The file; replaced if it exists.
    page_count : int
        Its length in pages.
    page_bytes : int
        Bytes of a page.
    """
    with Path(path).open("wb") as file:
        for first in range(0, page_count, _PAGES_A_WRITE):
            numbers = np.arange(first, min(first + _PAGES_A_WRITE, page_count))
            file.write(numbered_words(numbers, page_bytes).tobytes())
    wait_until_settled(path)  # or how it is read, and by how many calls, is left to chance


def wait_until_settled(file: str | os.PathLike[str] | int) -> None:
    """Wait, some milliseconds at most, until a file's last change is past by the kernel's clock.

    Until then fremap copies nothing from a map of it, as another change could go unnoticed.

    Parameters
    ----------
    file : str, path or int
        Its path, or a descriptor.
    """
    changed = os.stat(file).st_ctime_ns
    while time.clock_gettime_ns(_COARSE_CLOCK) <= changed:
        time.sleep(0.001)
