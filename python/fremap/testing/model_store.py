"""The oracle's store: what a file or shared memory must hold, as a list of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fremap.errors import PageRangeError

if TYPE_CHECKING:
    from collections.abc import Sequence


class ModelStore:
    """A numbered run of file pages.

    Parameters
    ----------
    content : bytes
        What the store holds.
    page_bytes : int
        Bytes of a page. The last page may be a part; it reads as zeros past
        the end.
    """

    def __init__(self, content: bytes, page_bytes: int = 4096) -> None:
        self.page_bytes = page_bytes
        self.size = len(content)
        self.page_count = -(-self.size // page_bytes)
        self._pages = [
            content[first : first + page_bytes].ljust(page_bytes, b"\0")
            for first in range(0, self.size, page_bytes)
        ]

    def page(self, file_page: int) -> bytes:
        """Content of one page.

        Parameters
        ----------
        file_page : int
            Which page.

        Returns
        -------
        bytes
            `page_bytes` bytes.
        """
        return self._pages[file_page]

    def pages(self) -> list[bytes]:
        """Content of all pages.

        Returns
        -------
        list of bytes
            As it is now.
        """
        return list(self._pages)

    def read(self, pages: Sequence[int]) -> bytes:
        """Content of pages, one after the other.

        Parameters
        ----------
        pages : sequence of int
            File pages, in any order, with repeats.

        Returns
        -------
        bytes
            `len(pages) * page_bytes` bytes.

        Raises
        ------
        PageRangeError
            If a page is outside the store.
        """
        check_pages("read", "file page", pages, self.page_count)
        return b"".join(self._pages[page] for page in pages)

    def write(self, pages: Sequence[int], data: bytes) -> None:
        """Change the content of pages; of a repeated page, the last one stays.

        Parameters
        ----------
        pages : sequence of int
            File pages.
        data : bytes
            `len(pages) * page_bytes` bytes. What lies past the end of the
            last page's file is dropped: a write never makes it longer.

        Raises
        ------
        PageRangeError
            If a page is outside the store.
        """
        check_pages("write", "file page", pages, self.page_count)
        for position, page in enumerate(pages):
            first = position * self.page_bytes
            kept = min(self.page_bytes, self.size - page * self.page_bytes)
            content = data[first : first + kept]
            self._pages[page] = content.ljust(self.page_bytes, b"\0")

    def content(self) -> bytes:
        """Return the whole store.

        Returns
        -------
        bytes
            `size` bytes.
        """
        return b"".join(self._pages)[: self.size]


def check_pages(operation: str, coordinate: str, pages: Sequence[int], limit: int) -> None:
    """Check page numbers against their limit.

    Parameters
    ----------
    operation, coordinate : str
        What to say in the error.
    pages : sequence of int
        Page numbers.
    limit : int
        The number of pages there are.

    Raises
    ------
    PageRangeError
        Naming the first number outside.
    """
    for page in pages:
        if not 0 <= page < limit:
            raise PageRangeError(f"{operation}: {coordinate} {page} is outside 0..{limit}")
