"""The oracle: what a window must show, in plain Python.

A `ModelWindow` is a list of pages that say what they show, what may be done
with them, whether they are there and whether the store has what they hold; it
makes no system call. It follows the rules of each engine and nothing else, so
that a test can drive a real window and the model side by side and compare.

What the rules leave open the model leaves open: the presence of a page, and
whether it is dirty, is True, False, or None where either is right.
"""
# ruff: noqa: S101 - what the oracle asserts is about the test that uses it

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from fremap import Prot
from fremap.errors import ArgumentError, DuplicatePageError, PlacedPageError, UnsupportedError
from fremap.testing.model_store import ModelStore, check_pages

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

Engine = Literal["alias", "paged", "eager"]
Tracking = Literal["async", "sync"]
Presence = bool | None
Dirtiness = bool | None

#: Marks a window page that shows nothing, and one with content of its own.
NO_PAGE = -1
PLACED = -2


@dataclass(frozen=True, slots=True)
class ModelPage:
    """One page of a window.

    `copy` is content that is the page's own: of a placed page, or, in a window
    that is not coherent, what the store held when the page was loaded and what
    was stored to it since. Of a page that nobody may touch, `present` says
    whether its content is kept. Of a page that is or may be dirty, `clean` is
    what it held when it was loaded or last written to the store. Of a page that was
    placed as it was shown, `kept` is how much of it lay within the store.
    """

    shows: int
    prot: Prot
    present: Presence = False
    copy: bytes | None = None
    dirty: Dirtiness = False
    clean: bytes | None = None
    kept: int | None = None


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
    coherent : bool, optional
        Whether writes are seen by all at once; as the engine does it if not given.
    tracking : {"async", "sync"}
        How engine "paged" learns which pages were stored to.
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
    UnsupportedError
        If the engine is not what `coherent` asks for.
    DuplicatePageError
        For a file page shown twice that may be written in a window of its own.
    """

    def __init__(
        self,
        store: ModelStore,
        mapping: Sequence[int],
        engine: Engine,
        *,
        prot: Prot = Prot.READ,
        coherent: bool | None = None,
        tracking: Tracking = "async",
        populate: bool = False,
        nonblock: bool = False,
        resident: Collection[int] | None = None,
    ) -> None:
        if not mapping:
            raise ArgumentError("window: a window has at least one page")
        check_pages("window", "file page", [p for p in mapping if p != NO_PAGE], store.page_count)
        if coherent is not None and coherent != (engine == "alias"):
            raise UnsupportedError(f"window: engine {engine} with coherent={coherent}")
        self.store = store
        self.engine = engine
        self.prot = prot
        self.tracking = tracking
        self._pages = [ModelPage(file_page, prot) for file_page in mapping]
        self._check_alias("window", self._pages)
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
    def writes_back(self) -> bool:
        """Whether stores change the window alone, and reach the store later."""
        return self.prot == Prot.WRITE and not self.coherent

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

    @property
    def dirty(self) -> list[Dirtiness]:
        """Whether each page has content that is not in the store; None where either is right."""
        return [page.dirty for page in self._pages]

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

    def may_show(self, page: int, found: bytes) -> bool:
        """Whether a window page may show this.

        Parameters
        ----------
        page : int
            A window page that shows something.
        found : bytes
            What was read there.

        Returns
        -------
        bool
            What was stored past the end of the store may be there still, or
            zeros again.
        """
        content = self.content(page)
        assert content is not None, "this page shows nothing"
        if found == content:
            return True
        kept = self._kept_bytes(self._pages[page])
        return found == content[:kept].ljust(len(content), b"\0")

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
        DuplicatePageError
            If a file page would be shown twice that may be written.
        """
        check_pages("remap", "file page", file_pages, self.store.page_count)
        check_pages("remap", "window page", at, self.page_count)
        if len(file_pages) != len(at):
            raise ArgumentError(f"remap: {len(file_pages)} file pages at {len(at)} window pages")
        self._check_distinct("remap", at)
        if prot is not None:
            self._check_prot("remap", prot)
        self._check_placed("remap", at, discard=discard)
        after = list(self._pages)
        for file_page, page in zip(file_pages, at, strict=True):
            after[page] = self._shown(page, file_page, prot)
        self._check_alias("remap", after)
        # All are written before any is loaded: pages may change places, and a page that is
        # shown once more shows what was stored to it.
        wanted = {f for f, page in zip(file_pages, at, strict=True) if not self._stays(page, after)}
        replaced = [page for page in at if after[page] is not self._pages[page]]
        self._write_back(replaced + [i for i, now in enumerate(self._pages) if now.shows in wanted])
        for page in at:
            self._pages[page] = after[page]
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
        self._write_back(pages)
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
        DuplicatePageError
            If a file page that is shown twice could be written.
        """
        check_pages("protect", "window page", pages, self.page_count)
        self._check_prot("protect", prot)
        after = list(self._pages)
        for page in pages:
            after[page] = replace(after[page], prot=prot)
        self._check_alias("protect", after)
        if prot == Prot.NONE:
            self._write_back(pages)
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
        self._write_back(pages)
        for page, content in zip(pages, contents, strict=True):
            now = self._pages[page]
            kept = self._kept_bytes(now) if data is None else None
            self._pages[page] = ModelPage(PLACED, now.prot, True, content, kept=kept)

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
        faults = self._pages[page].present is not True
        self._load(page)
        if faults and self.engine == "paged":
            self._read_behind(page)
        content = self.content(page)
        assert content is not None, "a readable page shows something"
        return content

    def store_to(self, page: int, data: bytes, first: int = 0) -> None:
        """Write to a page as a thread would, through the window.

        Parameters
        ----------
        page : int
            A window page that may be written.
        data : bytes
            What is stored.
        first : int
            The byte of the page where it goes.
        """
        assert self.writable(page) is not False, "storing to this page is a signal"
        old = self.touch(page)
        new = old[:first] + data + old[first + len(data) :]
        now = self._pages[page]
        if now.shows == PLACED:
            self._pages[page] = replace(now, copy=new)
        elif self.coherent:
            self.store.write([now.shows], new)
        else:
            self._pages[page] = self._stored(now, old, new)

    def flush(self, pages: Sequence[int] | None = None) -> None:
        """Write changed pages to the store.

        Parameters
        ----------
        pages : sequence of int, optional
            Window pages; None means all.

        Raises
        ------
        PageRangeError
            If a page is outside the window.
        """
        chosen = range(self.page_count) if pages is None else pages
        check_pages("flush", "window page", chosen, self.page_count)
        self._write_back(chosen)

    def close(self, *, discard: bool = False) -> None:
        """Write what has changed, unless it is given up.

        Parameters
        ----------
        discard : bool
            Whether changed pages are lost.
        """
        if not discard:
            self.flush()

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
            if now.shows == PLACED:
                copy = now.copy
            else:
                copy = self.content(page) if present and not self.coherent else None
            self._pages[page] = replace(now, present=present, copy=copy)

    def settle_content(self, page: int, found: bytes) -> None:
        """Take over what was read where the rules leave open what a page shows.

        Parameters
        ----------
        page : int
            A window page that is present.
        found : bytes
            What was read there, and what it may show.
        """
        now = self._pages[page]
        if now.copy is not None and found != now.copy:
            self._pages[page] = replace(now, copy=found)

    def settle_dirty(self, page: int, *, dirty: bool) -> None:
        """Take over what was observed where the rules leave open whether a page is dirty.

        Parameters
        ----------
        page : int
            A window page.
        dirty : bool
            What was observed.
        """
        now = self._pages[page]
        if now.dirty is None:
            self._pages[page] = replace(now, dirty=dirty, clean=now.clean if dirty else None)

    def unsettle(self, file_pages: Collection[int]) -> None:
        """Leave open whether window pages are present.

        Parameters
        ----------
        file_pages : collection of int
            File pages of which nobody can tell whether they were resident: the
            kernel took or brought them while the operation ran.
        """
        for index, page in enumerate(self._pages):
            # A page that was stored to is there, whatever the kernel does.
            if page.shows in file_pages and page.clean is None:
                self._pages[index] = replace(page, present=None)

    def _shown(self, page: int, file_page: int, prot: Prot | None) -> ModelPage:
        """Return the page as it shows a file page; one it shows already it need not load again."""
        now = self._pages[page]
        wanted = ModelPage(file_page, now.prot if prot is None else prot)
        if (now.shows, now.prot) != (wanted.shows, wanted.prot):
            return wanted
        return replace(now, present=None) if self.coherent and now.present else now

    def _stays(self, page: int, after: Sequence[ModelPage]) -> bool:
        """Whether a page is there, as it is to be."""
        now = self._pages[page]
        return now is after[page] and now.prot != Prot.NONE and now.present is True

    def _stored(self, now: ModelPage, old: bytes, new: bytes) -> ModelPage:
        """Return a page whose content a thread has changed from `old` to `new`."""
        clean = old if now.clean is None else now.clean
        kept = self._kept_bytes(now)
        if self.engine == "eager" and new == clean:
            return replace(now, copy=new, dirty=False, clean=None)
        dirty = True if new[:kept] != clean[:kept] else None
        return replace(now, copy=new, dirty=dirty, clean=clean)

    def _write_back(self, pages: Sequence[int]) -> None:
        """Write dirty pages to the store; they stay, and are clean."""
        for page in pages:
            now = self._pages[page]
            if now.dirty:
                assert now.copy is not None, "a dirty page has content"
                self.store.write([now.shows], now.copy)
            if now.dirty is not False:
                self._pages[page] = replace(now, dirty=False, clean=None)

    def _kept_bytes(self, now: ModelPage) -> int:
        """Bytes of a page that lie within the store; all of a placed one."""
        page_bytes = self.store.page_bytes
        if now.shows < 0:
            return page_bytes if now.kept is None else now.kept
        return min(page_bytes, self.store.size - now.shows * page_bytes)

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

    def _read_behind(self, page: int) -> None:
        """Where faults run forwards, absent pages behind the one that faulted may come with it."""
        for index in range(page + 1, self.page_count):
            now = self._pages[index]
            if now.present is True or now.prot == Prot.NONE or now.shows < 0:
                return
            self._pages[index] = replace(now, present=None)

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
        asynchronous = self.engine == "paged" and self.tracking == "async"
        if prot == Prot.READ and self.writes_back and asynchronous:
            raise UnsupportedError(f"{operation}: tracking async has no READ")

    def _check_alias(self, operation: str, after: Sequence[ModelPage]) -> None:
        if not self.writes_back:
            return
        first: dict[int, int] = {}
        for page, then in enumerate(after):
            other = first.setdefault(then.shows, page)
            shared = then.shows >= 0 and other != page
            if shared and Prot.WRITE in (then.prot, after[other].prot):
                raise DuplicatePageError(
                    f"{operation}: file page {then.shows} at window pages {other} and {page}"
                )

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
