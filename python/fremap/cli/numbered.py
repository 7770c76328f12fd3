"""Numbered pages: every word says which page it belongs to, and where in it."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

WORD_INDEX_BITS = 20  # enough for pages of 8 MiB
AT_ONCE_BYTES = 16 << 20


def numbered_pages(
    file_pages: Sequence[int] | npt.NDArray[np.int64], page_bytes: int
) -> npt.NDArray[np.uint8]:
    """Return the content of numbered pages, uint8 (len(file_pages), page_bytes).

    Word w of page p is ``(p + 1) << 20 | w``: never zero, and unlike every
    other word of the file, so that any mixture of pages shows.
    """
    words = np.arange(page_bytes // 8, dtype="<u8")
    first = (np.asarray(file_pages, dtype="<u8") + np.uint64(1)) << np.uint64(WORD_INDEX_BITS)
    content: npt.NDArray[np.uint8] = (first[:, None] | words[None, :]).view(np.uint8)
    return content


def write_numbered_file(path: Path, page_count: int, page_bytes: int) -> None:
    """Make a file of `page_count` numbered pages, on the disk and not just in memory."""
    at_once = max(1, AT_ONCE_BYTES // page_bytes)
    with path.open("xb", buffering=0) as file:
        for first in range(0, page_count, at_once):
            pages = range(first, min(first + at_once, page_count))
            content = memoryview(numbered_pages(pages, page_bytes)).cast("B")
            while content:
                content = content[file.write(content) :]
        os.fsync(file.fileno())


def first_wrong_page(shown: npt.NDArray[np.uint8], file_pages: npt.NDArray[np.int64]) -> int | None:
    """Return the first row of `shown` that is not the numbered page `file_pages` names, or None."""
    page_bytes = shown.shape[1]
    at_once = max(1, AT_ONCE_BYTES // page_bytes)
    for first in range(0, len(file_pages), at_once):
        part = slice(first, first + at_once)
        right = (shown[part] == numbered_pages(file_pages[part], page_bytes)).all(axis=1)
        if not right.all():
            return first + int(np.argmin(right))
    return None
