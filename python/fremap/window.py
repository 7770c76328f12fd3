"""Windows: contiguous memory whose pages show any pages of a store.

The window of the compiled core does the work; this class checks arguments,
names pages, and makes arrays of what comes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fremap.arguments import BufferLike, bytes_of, counted, page_number
from fremap.ending import flush_at_exit
from fremap.errors import ArgumentError, ArgumentTypeError, ForkError, FremapError
from fremap.protection import Prot, checked_prot
from fremap.reopening import Reduced, reduced
from fremap.selection import Numbering, PageSelection, plain_run
from fremap.settings import (
    Advice,
    Budget,
    Engine,
    Fault,
    InitialMapping,
    Tracking,
    checked_budget,
    checked_extent,
    chosen,
    first_mapping,
    measured,
)
from fremap.stores import Store
from fremap.views import Views

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import numpy.typing as npt

    from fremap._core import Pin
    from fremap.calibration import Calibration
    from fremap.stats import WindowStats

#: What the core takes for a page number at most.
_INT64_MAX = (1 << 63) - 1

__all__ = ["Engine", "Fault", "Tracking", "Window"]


class Window(Views):
    """A contiguous range of memory whose pages show any pages of a store.

    A window is a buffer: `memoryview`, `numpy.frombuffer` and `array` see its memory without
    a copy. Leaving its context flushes it and closes it for calls; the memory is freed with
    the last view. Every method may be called from several threads at once; long calls release
    the GIL and end within 100 ms of Ctrl-C.

    Parameters
    ----------
    store : Store
        Whose pages to show: a file, shared memory, several stores in a row, or a computed or
        remote store.
    page_count : int, optional
        As many as the store has from `first_page` on, or as `mapping` names, if not given.
    first_page : int, default 0
        With the linear mapping: the file page that window page 0 shows.
    mapping : {"linear", "none"} or array of int, default "linear"
        What is shown at first: file pages in order, nothing, or a page for each (-1: none).
    prot : Prot, default Prot.READ
        What may be done with the pages. `Prot.WRITE` includes reading.
    coherent : bool, optional
        Whether every process that maps the file sees a write to the window or the file at once,
        as with ``MAP_SHARED``. Required for a window that may be written. A read-only window
        may be either if it is not given.
    engine : {"auto", "alias", "paged", "eager"}, default "auto"
        How it is done; `fremap.capabilities` says what works here and what "auto" chooses.
    populate : bool, default False
        Make every page present now.
    nonblock : bool, default False
        With `populate`: only those that need no I/O.
    lock : bool, default False
        Keep the pages in memory (``mlock2``); implies `populate`.
    budget : int, str or None, default "auto"
        Bytes, or a size such as "64M", that the window may take. Engine "paged": present pages,
        page tables, staging memory, and what the store has mapped of the file. When it is full,
        fremap evicts pages, and writes modified ones back first; while that fails (a full disk)
        the window grows beyond it. Engine "alias": pages of the file that are mapped, and page
        tables; a thread unmaps the oldest, which loses nothing. Until it has run, the window may
        exceed the budget, mostly by less than 32 MiB. "auto": all objects with this budget share
        half of the memory that the machine and the memory cgroups leave to the process. None: no
        limit.
    fault : {"thread", "signal"}, default "thread"
        Which thread loads an absent page of engine "paged" when it is touched. "thread": one
        thread of the process, for all windows. "signal": the touching thread, in a handler of
        SIGBUS. That is faster, as no other thread has to wake up, but such a window has no
        budget, and system calls get EFAULT from absent pages.
    tracking : {"auto", "async", "sync"}, default "auto"
        How writes to a window of engine "paged" are noticed. "async": the kernel notes them
        (Linux 6.8). "sync": the first write to a page is a fault (Linux 5.7). That costs more,
        but pages can be protected with `Prot.READ`. System calls get EFAULT when they touch
        absent pages or write to clean ones.
    advice : {"auto", "normal", "random", "sequential"}, default "auto"
        How the kernel reads ahead of touches in a window of engine "alias"
        (``madvise(2)``); "auto" follows how the window is touched (Linux 6.7).
    calibration : fremap.calibration.Calibration, optional
        Batch sizes and crossover points; those that ``fremap calibrate`` measured
        and kept, else built-in ones, if not given.

    Raises
    ------
    ArgumentError
        The window is empty or beyond the store, or two options contradict each other (see
        the notes): the error names both.
    UnsupportedError
        This kernel or process cannot do what is asked for.
    MappingLimitError
        Engine "alias" would need more kernel mappings than the process may have.
    BudgetError
        It is too small for one batch of pages, or, with `populate`, for the window.
    DuplicatePageError
        `mapping` shows a page twice in a window that is written and not coherent.
    StoreError
        Mapping, locking or populating failed.

    Notes
    -----
    A window that may be written and is not coherent keeps changes to itself. They reach
    the store by `flush` and `close`, and before a changed page is remapped, evicted (also
    by the budget), placed over or protected with `Prot.NONE`; at no other time. One that is
    dropped or alive when the interpreter ends is flushed; a failure is told on stderr.

    Some options need certain engines; "auto" chooses among those that all of them leave.
    Others exclude each other whatever the engine:

    ============================  ==================================================
    option                        goes with
    ============================  ==================================================
    ``coherent=True``             engine "alias"
    ``coherent=False``            engine "paged" or "eager"
    ``fault="signal"``            engine "paged"; no `budget` in bytes
    ``tracking``                  engine "paged", and ``prot=Prot.WRITE``
    ``advice``                    engine "alias"
    ``lock=True``                 neither `nonblock` nor a `budget` in bytes
    ``nonblock=True``             ``populate=True``
    `first_page`                  ``mapping="linear"``
    `budget` in bytes             with engine "eager", at least the window's bytes
    ============================  ==================================================

    Engine "paged": one ``mmap`` and ``userfaultfd(2)`` (Linux 4.3; pages are swapped in whole
    by ``UFFDIO_MOVE`` from Linux 6.8 on, copied before), one kernel mapping whatever it
    shows, not coherent. Engine "alias": ``mmap(MAP_FIXED)`` a run, coherent, bounded by
    ``vm.max_map_count``. Engine "eager": plain memory, filled by `remap`.

    In a child of ``fork`` the window shows the store at the same addresses, to be read
    (engine "eager": what was there at the fork), and calls that change it raise
    `ForkError`. Pages that were placed, or changed and not flushed, are SIGBUS there.

    Do not have the kernel read absent pages of a window of engine "paged" in order to
    write the file behind it (``os.pwrite(fd, window, offset)``), which may lock what reading
    needs: use `Store.write`. With a budget, pin what it refers to beyond a call
    (``MSG_ZEROCOPY``). Have no device store to a window that is written and not coherent
    (``os.preadv`` on ``O_DIRECT``, GPUs): beside a flush it is lost, as the kernel does not note
    it. Copy, as `Store.read` does. Pages may be read before a touch: `evict` what others wrote.

    Examples
    --------
    >>> import fremap
    >>> store = fremap.MemoryStore(4 * 4096, page_bytes=4096)
    >>> store.write(None, b"".join(bytes([65 + page]) * 4096 for page in range(4)))
    >>> with fremap.Window(store) as window:
    ...     here = window.remap([3, 0, 2], at=1)
    ...     first_bytes = bytes(window.pages[:, 0])
    >>> first_bytes
    b'ADAC'
    """

    __slots__ = ("__weakref__", "_settings", "_store")

    _settings: dict[str, Any]
    _store: Store

    def __new__(
        cls,
        store: Store,
        page_count: SupportsIndex | None = None,
        *,
        first_page: SupportsIndex = 0,
        mapping: InitialMapping = "linear",
        prot: Prot = Prot.READ,
        coherent: bool | None = None,
        engine: Engine = "auto",
        populate: bool = False,
        nonblock: bool = False,
        lock: bool = False,
        budget: Budget = "auto",
        fault: Fault = "thread",
        tracking: Tracking = "auto",
        advice: Advice = "auto",
        calibration: Calibration | None = None,
    ) -> Self:
        """Map the window; see the class."""
        if not isinstance(store, Store):
            raise ArgumentTypeError(
                f"Window: store must be a store, not {type(store).__name__}; fremap.open() makes "
                "one of a path"
            )
        count, first = checked_extent(store, page_count, first_page)
        shown = first_mapping(mapping, store)
        if count is None and not isinstance(shown, str):
            count = len(shown)
        self = super().__new__(
            cls,
            store._core,  # noqa: SLF001 - the wrapper's other half
            count,
            first,
            shown,
            checked_prot(prot),
            coherent,
            chosen("engine", engine),
            bool(populate),
            bool(nonblock),
            bool(lock),
            checked_budget(budget),
            chosen("fault", fault),
            chosen("tracking", tracking),
            measured(calibration),
            chosen("advice", advice),
            None,
            False,
        )
        self._store = store
        self._settings = {"prot": prot, "budget": budget, "tracking": tracking, "advice": advice}
        self._settings["calibration"] = calibration
        if self.writable and not self.coherent:
            flush_at_exit(self)
        return self

    def __enter__(self) -> Self:
        """Return the window itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Flush, close for calls, let the memory go with its last view; stay open on failure."""
        try:
            if not self.closed and self.writable:
                self.flush()
        except ForkError:
            self._leave()  # the parent's to flush
        except FremapError as failure:
            if self.coherent:
                self._leave()  # its changes are the file's already
            if error is None:
                raise
            # The caller's own exception is the one to see; this one is not lost.
            error.add_note(f"fremap: flushing the window on the way out failed too: {failure}")
        else:
            self._leave()

    def close(self, *, discard: bool = False) -> None:
        """Flush the window and unmap it; later calls raise.

        Parameters
        ----------
        discard : bool, default False
            Give up what was stored and not flushed, as the way out where it cannot be written.

        Raises
        ------
        ViewsAliveError
            Arrays or memoryviews still show the window's memory.
        StoreError
            Changes could not be written, and are still there: call `flush` or `close` again.

        Notes
        -----
        ``munmap(2)``, after `flush` where the window keeps changes. Again: does nothing.
        """
        self._close(bool(discard))

    def __reduce__(self) -> Reduced:
        """Be made anew on the store, where there is nothing that the store does not have."""
        return reduced(Window, self, self._settings)

    def __repr__(self) -> str:
        """Describe the window in a line."""
        if self.closed:
            return "<fremap.Window, closed>"
        size = f"{counted(self.page_count, 'page')} of {self.page_bytes} bytes"
        written = ", writable" if self.writable else ""
        store = self._store._named  # noqa: SLF001 - its other half
        return f"<fremap.Window, {size}, engine {self.engine!r}{written}, of {store}>"

    def _repr_html_(self) -> str:
        """Draw which pages are present, dirty, pinned, placed and denied, for notebooks."""
        from fremap.pictures import PAGE_STATES, grid_picture

        count = 0 if self.closed else self.page_count
        return grid_picture(repr(self), count, "page", PAGE_STATES, self._looked)

    def _looked(self, pages: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int8], Any, str]:
        """Return the state of each of these pages, as its place in `PAGE_STATES`."""
        mapping = self._shown(pages)
        state = np.where(mapping == -1, 0, 1).astype(np.int8)
        state[self.present(pages)] = 2
        if self.writable and not self.coherent:
            state[self.dirty(pages)] = 3
        state[self.pinned(pages)] = 4
        state[mapping == -2] = 5
        state[self.protection(pages) == Prot.NONE] = 6
        stats = self.stats()
        counts = {
            "present": stats.present_pages,
            "pinned": stats.pinned_pages,
            "placed": stats.placed_pages,
            "denied": stats.denied_pages,
        }
        return state, counts, ""

    @property
    def store(self) -> Store:
        """The store whose pages the window shows."""
        return self._store

    def remap(
        self,
        file_pages: PageSelection,
        at: PageSelection = 0,
        *,
        prot: Prot | None = None,
        nonblock: bool = False,
        populate: bool = True,
        discard: bool = False,
        in_place: bool = False,
    ) -> npt.NDArray[np.bool_]:
        """Show other pages of the store, in any order.

        Parameters
        ----------
        file_pages : int, slice, range, array of int or None
            What to show; None means every page of the store.
        at : int, slice, range or array of int, default 0
            Where: the first window page, or a window page for each file page.
        prot : Prot, optional
            New protection of these window pages; as it was if not given.
        nonblock : bool, default False
            Bring in only pages that are in the page cache. The others change
            their mapping and are absent: a touch loads the right page.
        populate : bool, default True
            Bring the pages in now; False leaves them to the first touch.
        discard : bool, default False
            Drop placed pages that lie in the range; else they are an error.
        in_place : bool, default False
            No thread reads these window pages during the call: pages that are present
            may be overwritten, as a buffer pool does under its latch.

        Returns
        -------
        ndarray of bool, shape (n,)
            For each page of `file_pages`, whether it is present.

        Raises
        ------
        PageRangeError
            A file page or window page is outside.
        ArgumentError
            A window page is named twice, or `at` has another length than
            `file_pages`.
        PlacedPageError
            A placed page would be lost.
        BudgetError
            The pages are more than the window's budget; nothing changed.
        StoreError
            A read failed: the first ``error.completed`` pages show the new file page,
            the rest the old one; in a window that is written those of the rest whose
            file page is shown elsewhere by now show nothing (-1 in `mapping`).
        MappingLimitError
            Engine "alias": too many runs of pages; nothing changed.
        DuplicatePageError
            A file page that may be written would be shown twice; nothing changed.
        UnsupportedError
            ``nonblock`` where the kernel does not tell what is resident.

        Notes
        -----
        Engine "paged": content is read into staging memory and swapped in by
        ``UFFDIO_MOVE`` (Linux 6.8; ``UFFDIO_COPY`` before), under a microsecond
        a page from the page cache. Engine "alias": ``mmap(MAP_FIXED)`` a
        run of pages. In both an aligned load of another thread sees the old content
        or the new; "eager" overwrites, so keep readers out. Any number of
        threads; calls on one window take turns.

        With `in_place`, a window that is only read, all of whose pages named here are
        present, reads each run of the file straight into its memory: one ``pread``.
        Elsewhere it changes nothing. Pages that could not be read are absent then, and
        show what they showed before.

        Examples
        --------
        >>> import fremap
        >>> store = fremap.MemoryStore(8 * 4096, page_bytes=4096)
        >>> with fremap.Window(store, 4) as window:
        ...     window.remap([7, 3], at=[0, 2]).tolist(), window.mapping.tolist()
        ([True, True], [7, 1, 3, 3])
        """
        if prot is None and type(at) is int and 0 <= at < _INT64_MAX:
            # An element of a cache, at once: the core checks the numbers.
            run = plain_run(file_pages)
            if run is not None:
                present = self._remap(
                    run, at, None, bool(nonblock), bool(populate), bool(discard), bool(in_place)
                )
                return np.frombuffer(present, np.bool_)
        numbering = Numbering("remap", "file page", self._store.page_count)
        shown = numbering.selection(file_pages)
        if shown is None:
            shown = (0, numbering.limit)
        target = self._target(at, numbering.count(shown))
        bits = None if prot is None else checked_prot(prot)
        present = self._remap(
            shown, target, bits, bool(nonblock), bool(populate), bool(discard), bool(in_place)
        )
        return np.frombuffer(present, dtype=np.bool_)

    def _target(self, at: PageSelection, count: int) -> int | npt.NDArray[np.int64]:
        """Return where a remap goes: the first window page, or each of them."""
        if at is None:
            raise ArgumentTypeError("remap: at must be a window page or an array of them, not None")
        if page_number(at):
            return Numbering("remap", "window page", self.page_count).index(at)
        window_pages, named = self._select("remap", at)
        if named != count:
            raise ArgumentError(f"remap: at names {named} window pages for {count} file pages")
        if isinstance(window_pages, tuple):
            return window_pages[0]
        assert isinstance(window_pages, np.ndarray)  # noqa: S101 - None was refused; tells mypy
        return window_pages

    def populate(
        self, pages: PageSelection = None, *, nonblock: bool = False
    ) -> npt.NDArray[np.bool_]:
        """Make pages present, so that no later touch faults.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Window pages; None means all.
        nonblock : bool, default False
            Only pages whose content is in the page cache; nothing is read.

        Returns
        -------
        ndarray of bool, shape (n,)
            For each page asked for, whether it is present.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        BudgetError
            The pages are more than the window's budget; nothing changed. With
            `nonblock` those for which there is no room are skipped.
        StoreError
            A read failed; ``error.completed`` pages from the front are present.
        UnsupportedError
            ``nonblock`` where the kernel does not tell what is resident.

        Notes
        -----
        Engine "paged": as `remap`. Engine "alias": ``madvise(MADV_POPULATE_READ)``
        (Linux 5.14). With `nonblock`, ``mincore(2)`` or ``cachestat(2)`` (Linux
        6.5) decides; a page that the kernel drops meanwhile may cost one read.
        Pages protected with `Prot.NONE` stay absent. Any number of threads.
        """
        selection, _ = self._select("populate", pages)
        return np.frombuffer(self._populate(selection, bool(nonblock)), dtype=np.bool_)

    def evict(self, pages: PageSelection = None, *, discard: bool = False) -> None:
        """Drop pages; the next touch brings them back.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Window pages; None means all.
        discard : bool, default False
            Drop placed pages too; else they are an error.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        PlacedPageError
            A placed page would be lost; nothing changed.
        UnsupportedError
            The window is locked.

        Notes
        -----
        ``madvise(MADV_DONTNEED)``, one call for neighbours that are close
        enough. Engine "eager" has no lazy faults: there an evicted page is
        inaccessible until populated. Engine "paged": what came in by whole
        blocks of 2 MiB may be huge pages, of which the system gets nothing back
        until all of the block is evicted or memory is short. Any number of
        threads.
        """
        selection, _ = self._select("evict", pages)
        self._evict(selection, bool(discard))

    def protect(self, pages: PageSelection, prot: Prot) -> None:
        """Change what may be done with pages.

        Parameters
        ----------
        pages : int, slice, range, array of int or None
            Window pages; None means all.
        prot : Prot
            `NONE` keeps the content and makes a touch SIGSEGV or SIGBUS.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        UnsupportedError
            The engine has no such protection, or the window is read-only.
        MappingLimitError
            Engine "alias": too many pieces; nothing changed.
        DuplicatePageError
            A page that is to be written shows what another page shows.
        StoreError
            NONE: a changed page could not be written.

        Notes
        -----
        Engine "paged" and, with guard pages (Linux 6.13), "eager" add no kernel
        mapping, whatever the pattern. Engine "alias": ``mprotect(2)``, a mapping
        a piece. Any number of threads.
        """
        selection, _ = self._select("protect", pages)
        self._protect(selection, checked_prot(prot))

    def place(self, pages: PageSelection, data: BufferLike | None = None) -> None:
        """Give pages content of their own, with no file behind it.

        Parameters
        ----------
        pages : int, slice, range, array of int or None
            Window pages; None means all.
        data : buffer or array, optional
            ``n * page_bytes`` bytes, or one page for all of them. None keeps
            what the pages show now.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        ArgumentError
            `data` has another size, or a page is named twice.
        StoreError
            With ``data=None``: a page that was absent cannot be read.

        Notes
        -----
        Engine "paged": ``UFFDIO_MOVE`` or ``UFFDIO_COPY``. Engine "alias": a
        private anonymous mapping a page. `mapping` shows -2 for placed pages.
        They are lost by `remap` and `evict` with ``discard=True``, and never
        written to the store. Any number of threads.
        """
        selection, count = self._select("place", pages)
        if data is None:
            content = None
        else:
            sizes = (count * self.page_bytes, self.page_bytes)
            content = bytes_of("place", data, sizes)
        self._place(selection, content)

    def pin(self, pages: PageSelection) -> Pin:
        """Make pages present and keep them so, whatever the budget.

        Parameters
        ----------
        pages : int, slice, range, array of int or None
            Window pages; None means all.

        Returns
        -------
        Pin
            Ends with its ``with`` block, or by `Pin.release`. Pages may be pinned by
            several at once.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        BudgetError
            With what is pinned and placed already the pages are more than the
            budget; nothing changed.
        StoreError
            A page cannot be read.
        UnsupportedError
            Engine "alias", whose pages are the kernel's.

        Notes
        -----
        As `populate`. A pinned page can be remapped, but not evicted. Any number of
        threads.
        """
        selection, _ = self._select("pin", pages)
        return self._pin(selection)

    def flush(self, pages: PageSelection = None) -> None:
        """Write changed pages to the store and make them durable.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Window pages; None means all.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        StoreError
            Writing failed; the pages are still dirty, and flushing again writes them again.
            Where ``fsync`` lost what had left the window it fails until `Store.refresh`.

        Notes
        -----
        A window that keeps its changes: ``pwritev(2)``, neighbours together, in the
        order of the file, then ``fsync(2)``; with ``direct=True`` up to 128 such writes are
        in flight (``io_uring``, or 16 threads where there is none). A store by another
        thread meanwhile leaves its page dirty. The file becomes no longer, unless it is cut
        in the very moment: what was stored past its end is dropped. A coherent window:
        ``fsync(2)`` for all, ``msync(MS_SYNC)`` for a selection; every error lasts until
        `Store.refresh`. What waits for the device cannot be interrupted.
        """
        selection, _ = self._select("flush", pages)
        self._flush(selection)

    def stats(self) -> WindowStats:
        """Return what the window holds and what it did so far.

        Returns
        -------
        WindowStats
            Counters, read without stopping other threads.
        """
        from fremap.stats import WindowStats

        return WindowStats(**self._stats())
