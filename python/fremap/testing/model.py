"""The oracle: what a store and a window must show, in plain Python.

A `ModelStore` is a list of bytes, a `ModelWindow` a list of pages that say
what they show, what may be done with them and whether they are there. Neither
makes a system call. They follow the rules of each engine and nothing else, so
that a test can drive a real window and the model side by side and compare.

What the rules leave open the model leaves open: the presence of a page is
True, False, or None where either is right.
"""
# ruff: noqa: S101 - what the oracle asserts is about the test that uses it

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fremap import Prot
from fremap.errors import ArgumentError, PageRangeError, PlacedPageError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

Engine = Literal["alias", "paged", "eager"]
Presence = bool | None

#: Marks a window page that shows nothing, and one with content of its own.
NO_PAGE = -1
PLACED = -2


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


@dataclass(frozen=True, slots=True)
class ModelPage:
    """One page of a window.

    `copy` is content that is the page's own: of a placed page, or, in a window
    that is not coherent, what the store held when the page was loaded. Of a
    page that nobody may touch, `present` says whether its content is kept.
    """

    shows: int
    prot: Prot
    present: Presence = False
    copy: bytes | None = None


class ModelWindow:
    """What a window must show after each operation.

    Operations take lists of checked or unchecked page numbers and, where it
    matters, the set of file pages that are in the kernel's page cache
    (`resident`). None for `resident` means all of them.

    Parameters
    ----------
    store : ModelStore
        What the window is on.
    mapping : sequence of int
        The file page of each window page; -1 for none.
    engine : {"alias", "paged", "eager"}
        Whose rules to follow.
    prot : Prot
        What may be done with the pages; `Prot.WRITE` makes the window writable.
    populate, nonblock : bool
        Whether the pages are loaded at once, and whether without I/O.
    resident : collection of int, optional
        File pages in the page cache.

    Raises
    ------
    ArgumentError
        For a window of no pages.
    PageRangeError
        For a file page outside the store.
    """

    def __init__(
        self,
        store: ModelStore,
        mapping: Sequence[int],
        engine: Engine,
        *,
        prot: Prot = Prot.READ,
        populate: bool = False,
        nonblock: bool = False,
        resident: Collection[int] | None = None,
    ) -> None:
        if not mapping:
            raise ArgumentError("window: a window has at least one page")
        check_pages("window", "file page", [p for p in mapping if p != NO_PAGE], store.page_count)
        self.store = store
        self.engine = engine
        self.prot = prot
        self._pages = [ModelPage(file_page, prot) for file_page in mapping]
        if populate:
            self.populate(range(len(mapping)), nonblock=nonblock, resident=resident)

    @property
    def page_count(self) -> int:
        """Number of window pages."""
        return len(self._pages)

    @property
    def coherent(self) -> bool:
        """Whether writes of others to the store are seen at once."""
        return self.engine == "alias"

    @property
    def mapping(self) -> list[int]:
        """The file page of each window page; -1 none, -2 placed."""
        return [page.shows for page in self._pages]

    @property
    def protection(self) -> list[Prot]:
        """What may be done with each page."""
        return [page.prot for page in self._pages]

    @property
    def present(self) -> list[Presence]:
        """Whether each page is in the window; None where either is right."""
        return [self._seen_present(page) for page in self._pages]

    def content(self, page: int) -> bytes | None:
        """Tell what a window page shows to whoever may read it.

        Parameters
        ----------
        page : int
            A window page.

        Returns
        -------
        bytes or None
            None for a page that shows nothing.
        """
        now = self._pages[page]
        if now.copy is not None:
            return now.copy
        return None if now.shows < 0 else self.store.page(now.shows)

    def readable(self, page: int) -> Presence:
        """Whether touching a page is allowed; otherwise it is a signal.

        Parameters
        ----------
        page : int
            A window page.

        Returns
        -------
        bool or None
            None where the rules leave it open.
        """
        now = self._pages[page]
        if now.shows == NO_PAGE or now.prot == Prot.NONE:
            return False
        return now.present if self.engine == "eager" else True

    def writable(self, page: int) -> Presence:
        """Whether storing to a page is allowed.

        Parameters
        ----------
        page : int
            A window page.

        Returns
        -------
        bool or None
            None where the rules leave it open.
        """
        return self.readable(page) if self._pages[page].prot == Prot.WRITE else False

    def remap(
        self,
        file_pages: Sequence[int],
        at: Sequence[int],
        *,
        prot: Prot | None = None,
        nonblock: bool = False,
        populate: bool = True,
        discard: bool = False,
        resident: Collection[int] | None = None,
    ) -> list[Presence]:
        """Change which file pages some window pages show.

        Parameters
        ----------
        file_pages, at : sequence of int
            File pages, and the window pages that show them from now on.
        prot : Prot, optional
            What may be done with them from now on.
        nonblock, populate : bool
            Load what needs no I/O; load at all.
        discard : bool
            Whether placed pages may be lost.
        resident : collection of int, optional
            File pages in the page cache.

        Returns
        -------
        list of bool or None
            Which are present.

        Raises
        ------
        ArgumentError
            If there are not as many window pages as file pages, or one is
            named twice.
        PageRangeError
            If a page is outside the store or the window.
        PlacedPageError
            If a placed page would be lost.
        UnsupportedError
            For a protection that the engine does not have.
        """
        check_pages("remap", "file page", file_pages, self.store.page_count)
        check_pages("remap", "window page", at, self.page_count)
        if len(file_pages) != len(at):
            raise ArgumentError(f"remap: {len(file_pages)} file pages at {len(at)} window pages")
        self._check_distinct("remap", at)
        if prot is not None:
            self._check_prot("remap", prot)
        self._check_placed("remap", at, discard=discard)
        for file_page, page in zip(file_pages, at, strict=True):
            self._show(page, file_page, self._pages[page].prot if prot is None else prot)
        if populate:
            return self.populate(at, nonblock=nonblock, resident=resident)
        return [self._seen_present(self._pages[page]) for page in at]

    def populate(
        self,
        pages: Sequence[int],
        *,
        nonblock: bool = False,
        resident: Collection[int] | None = None,
    ) -> list[Presence]:
        """Make pages present.

        Parameters
        ----------
        pages : sequence of int
            Window pages.
        nonblock : bool
            Only those that need no I/O.
        resident : collection of int, optional
            File pages in the page cache.

        Returns
        -------
        list of bool or None
            Which are present.

        Raises
        ------
        PageRangeError
            If a page is outside the window.
        """
        check_pages("populate", "window page", pages, self.page_count)
        for page in pages:
            shows = self._pages[page].shows
            if not nonblock or resident is None or shows == PLACED or shows in resident:
                self._load(page, resident if nonblock else None)
        return [self._seen_present(self._pages[page]) for page in pages]

    def evict(self, pages: Sequence[int], *, discard: bool = False) -> None:
        """Drop pages; the next touch brings them back, but in `eager`.

        Parameters
        ----------
        pages : sequence of int
            Window pages.
        discard : bool
            Whether placed pages may be lost; they show nothing afterwards.

        Raises
        ------
        PageRangeError
            If a page is outside the window.
        PlacedPageError
            If a placed page would be lost.
        """
        check_pages("evict", "window page", pages, self.page_count)
        self._check_placed("evict", pages, discard=discard)
        for page in pages:
            now = self._pages[page]
            shows = NO_PAGE if now.shows == PLACED else now.shows
            self._pages[page] = ModelPage(shows, now.prot)

    def protect(self, pages: Sequence[int], prot: Prot) -> None:
        """Change what may be done with pages; their content stays.

        Parameters
        ----------
        pages : sequence of int
            Window pages.
        prot : Prot
            What may be done with them from now on.

        Raises
        ------
        PageRangeError
            If a page is outside the window.
        UnsupportedError
            For a protection that the engine does not have.
        """
        check_pages("protect", "window page", pages, self.page_count)
        self._check_prot("protect", prot)
        for page in pages:
            now = self._pages[page]
            self._pages[page] = replace(now, prot=prot, present=self._protected(now, prot))

    def place(self, pages: Sequence[int], data: bytes | None = None) -> None:
        """Give pages content of their own, with no file behind it.

        Parameters
        ----------
        pages : sequence of int
            Window pages.
        data : bytes, optional
            A page for all of them or one for each; None keeps what is shown.

        Raises
        ------
        PageRangeError
            If a page is outside the window.
        ArgumentError
            If the data has another length, a page is named twice, or a page
            that is to be kept shows nothing.
        """
        check_pages("place", "window page", pages, self.page_count)
        self._check_distinct("place", pages)
        contents = self._placed_contents(pages, data)
        for page, content in zip(pages, contents, strict=True):
            prot = self._pages[page].prot
            self._pages[page] = ModelPage(PLACED, prot, True, content)

    def touch(self, page: int) -> bytes:
        """Read a page as a thread would, loading it where that is how it comes.

        Parameters
        ----------
        page : int
            A window page that may be read.

        Returns
        -------
        bytes
            What it shows.
        """
        assert self.readable(page) is not False, "touching this page is a signal"
        self._load(page)
        content = self.content(page)
        assert content is not None, "a readable page shows something"
        return content

    def store_to(self, page: int, data: bytes) -> None:
        """Write a page as a thread would, through the window.

        Parameters
        ----------
        page : int
            A window page that may be written.
        data : bytes
            A page of content.
        """
        assert self.coherent, "only a coherent window writes through"
        now = self._pages[page]
        self._load(page)
        if now.shows == PLACED:
            self._pages[page] = replace(now, copy=data)
        else:
            self.store.write([now.shows], data)

    def settle(self, page: int, *, present: bool) -> None:
        """Take over what was observed where the rules leave presence open.

        Parameters
        ----------
        page : int
            A window page.
        present : bool
            What was observed.
        """
        now = self._pages[page]
        if now.present is None and now.prot != Prot.NONE:
            copy = None if not present or self.coherent else self.content(page)
            self._pages[page] = replace(now, present=present, copy=copy or now.copy)

    def unsettle(self, file_pages: Collection[int]) -> None:
        """Leave open whether window pages are present.

        Parameters
        ----------
        file_pages : collection of int
            File pages of which nobody can tell whether they were resident: the
            kernel took or brought them while the operation ran.
        """
        for index, page in enumerate(self._pages):
            if page.shows in file_pages:
                self._pages[index] = replace(page, present=None)

    def _show(self, page: int, file_page: int, prot: Prot) -> None:
        """Change what a page shows; what it shows already it need not be given again."""
        now = self._pages[page]
        if (now.shows, now.prot) != (file_page, prot):
            self._pages[page] = ModelPage(file_page, prot)
        elif self.coherent and now.present:
            self._pages[page] = replace(now, present=None)

    def _load(self, page: int, resident: Collection[int] | None = None) -> None:
        """Make one page present, if anything can."""
        now = self._pages[page]
        if now.shows == NO_PAGE:
            return
        if now.prot == Prot.NONE:
            self._pages[page] = replace(now, present=now.present or None)
            return
        copy = now.copy if self.coherent or now.shows == PLACED else self.content(page)
        self._pages[page] = replace(now, present=True, copy=copy)
        if self.coherent and now.present is not True:
            self._fault_around(resident)

    def _fault_around(self, resident: Collection[int] | None) -> None:
        """Where the kernel maps the file, a fault may map resident neighbours too."""
        for index, page in enumerate(self._pages):
            near = page.shows >= 0 and page.present is False
            if near and (resident is None or page.shows in resident):
                self._pages[index] = replace(page, present=None)

    @staticmethod
    def _seen_present(now: ModelPage) -> Presence:
        """Presence of a page, as the window tells it."""
        return False if now.prot == Prot.NONE else now.present

    def _protected(self, now: ModelPage, prot: Prot) -> Presence:
        """Presence of a page after its protection changed.

        Of a page that nobody may touch, `ModelPage.present` says whether its
        content is kept. `eager` has no later fault to bring it back, so it is
        back with the protection; `paged` may do it then or at the touch.
        """
        if now.shows == NO_PAGE or Prot.NONE not in (now.prot, prot) or prot == now.prot:
            return now.present
        if self.coherent:
            return None
        if self.engine == "paged" and prot != Prot.NONE:
            return None
        return now.present

    def _check_prot(self, operation: str, prot: Prot) -> None:
        if prot == Prot.WRITE and self.prot != Prot.WRITE:
            raise ArgumentError(f"{operation}: the window is not writable")
        if self.engine == "eager" and prot not in (Prot.NONE, self.prot):
            raise UnsupportedError(f"{operation}: engine eager has NONE only")

    def _check_placed(self, operation: str, pages: Sequence[int], *, discard: bool) -> None:
        for page in pages:
            if self._pages[page].shows == PLACED and not discard:
                raise PlacedPageError(f"{operation}: window page {page} was placed")

    def _check_distinct(self, operation: str, pages: Sequence[int]) -> None:
        if len(set(pages)) < len(pages):
            raise ArgumentError(f"{operation}: a window page is named twice")

    def _placed_contents(self, pages: Sequence[int], data: bytes | None) -> list[bytes]:
        page_bytes = self.store.page_bytes
        if data is None:
            shown = [self.content(page) for page in pages]
            contents = [content for content in shown if content is not None]
            if len(contents) < len(pages):
                raise ArgumentError("place: a page shows nothing to keep")
            return contents
        if len(data) == page_bytes:
            return [data] * len(pages)
        if len(data) != page_bytes * len(pages):
            raise ArgumentError("place: data must be one page, or one for each window page")
        return [data[i * page_bytes : (i + 1) * page_bytes] for i in range(len(pages))]


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
