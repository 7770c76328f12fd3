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
#: Of the answers of calls: NumPy would make one of its type in each.
_BOOL = np.dtype(np.bool_)

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
        The store whose pages the window shows: a file, shared memory, a `ConcatStore`, or a
        computed or remote store.
    page_count : int, optional
        Number of window pages. Default: the store's pages from `first_page` on, or the length
        of `mapping`.
    first_page : int, default 0
        With ``mapping="linear"``: the file page that window page 0 shows.
    mapping : {"linear", "none"} or array of int, default "linear"
        What the window shows at first: the file pages in order, nothing, or one file page for
        each window page (-1: nothing).
    prot : Prot, default Prot.READ
        Whether the pages may be read only, or also written (`Prot.WRITE`).
    coherent : bool, optional
        Whether every process that maps the file sees a write to the window or the file at once, as
        with ``MAP_SHARED``. Required for a writable window. Default for a read-only window: what
        the engine offers.
    engine : {"auto", "alias", "paged", "eager"}, default "auto"
        How pages get into the window (see the notes). `fremap.capabilities` says which engines
        work here, and which one "auto" chooses.
    populate : bool, default False
        Make every page present now.
    nonblock : bool, default False
        With `populate`: only the pages that need no I/O.
    lock : bool, default False
        Keep the pages in memory (``mlock2``); implies `populate`.
    budget : int, str or None, default "auto"
        Bytes, or a size such as "64M", that the window may take. Engine "paged": present pages,
        page tables, staging memory, and what the store has mapped of the file. When it is full,
        fremap evicts pages, and writes modified ones back first; while that fails (a full disk)
        the window grows beyond it. Engine "alias": pages of the file that are mapped, and page
        tables; a thread unmaps the oldest, which loses nothing. Until it has run, the window may
        exceed the budget, mostly by less than 32 MiB. "auto": all objects with this budget share
        half of the memory that the machine and the memory cgroups leave to the process. None:
        no limit.
    fault : {"thread", "signal"}, default "thread"
        Which thread loads an absent page of engine "paged" when it is touched. "thread": one
        thread of the process, for all windows. "signal": the touching thread, in a handler of
        SIGBUS. That is faster, because no other thread has to wake up. But such a window has no
        budget, and system calls that touch absent pages fail with EFAULT.
    tracking : {"auto", "async", "sync"}, default "auto"
        How writes to a window of engine "paged" are noticed. "async": the kernel notes them
        (Linux 6.8). "sync": the first write to a page is a fault (Linux 5.7). That costs more,
        but pages can be protected with `Prot.READ`. System calls that touch absent pages, or
        write to clean ones, may fail with EFAULT.
    advice : {"auto", "normal", "random", "sequential"}, default "auto"
        How the kernel reads ahead of touches in a window of engine "alias"
        (``madvise(2)``); "auto" follows how the window is touched (Linux 6.7).
    calibration : fremap.calibration.Calibration, optional
        Batch sizes and crossover points. Default: those that ``fremap calibrate`` measured, or
        built-in ones.

    Raises
    ------
    ArgumentError
        The window has no page, or ends beyond the store. Or two options contradict each other
        (see the notes): the error names both.
    UnsupportedError
        This kernel or process cannot do what is asked for.
    MappingLimitError
        Engine "alias" would need more kernel mappings than the process may have.
    BudgetError
        The budget is too small for one batch of pages, or, with `populate`, for the window.
    DuplicatePageError
        `mapping` shows a page twice in a writable window that is not coherent.
    StoreError
        Mapping, locking or populating failed.

    Notes
    -----
    A writable window that is not coherent keeps its changes to itself. They reach the store by
    `flush` and `close`, and before a changed page is remapped, evicted (also by the budget),
    replaced by `place` or protected with `Prot.NONE`; at no other time. A window that is
    dropped, or still open when the interpreter exits, is flushed; a failure is reported on
    stderr.

    Some options need certain engines; "auto" chooses an engine that has all of them. Other
    options exclude each other, whatever the engine:

    ============================  ==================================================
    option                        requires
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

    Engine "paged": one ``mmap`` and ``userfaultfd(2)`` (Linux 4.3). It copies pages, or swaps
    them in by ``UFFDIO_MOVE`` (Linux 6.8). It needs one kernel mapping, whatever the window
    shows, and is not coherent. Engine "alias": one ``mmap(MAP_FIXED)`` for each run of
    consecutive pages. It is coherent, and limited by ``vm.max_map_count``. Engine "eager":
    plain memory, loaded by `remap`.

    In a child of ``fork`` the window shows the store at the same addresses, read-only. Touching
    a page that was placed, or changed and not flushed, raises SIGBUS there. Engine "eager" shows
    what it showed at the fork, and "alias" the file, which stores change as in the parent. Calls
    that change the window raise `ForkError`.

    Four kinds of access from outside need care:

    - Do not write absent pages of a "paged" window to the file behind it by a system call
      (``os.pwrite(fd, window, offset)``): the kernel may lock the file that fremap has to read.
      Use `Store.write`.
    - With a budget, pin pages that the kernel refers to beyond a call (``MSG_ZEROCOPY``).
    - Let no device write into a writable window that is not coherent (``os.preadv`` on
      ``O_DIRECT``, GPUs): the kernel does not note such writes, and a flush beside them loses
      them. Use `Store.read`, which copies.
    - fremap may read pages before they are touched. After another process has written to the
      file, call `evict`.

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
        """Flush, and close for calls; the last view frees the memory. Stay open on failure."""
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
            Drop changes that were not flushed, for example because they cannot be written.

        Raises
        ------
        ViewsAliveError
            Arrays or memoryviews still show the window's memory.
        StoreError
            Changes could not be written. They are not lost: call `flush` or `close` again.

        Notes
        -----
        ``munmap(2)``, after `flush` if the window keeps changes. Closing again does nothing.
        """
        self._close(bool(discard))

    def __reduce__(self) -> Reduced:
        """Pickle as a new window on the store; refuse what the store does not have."""
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
            The file pages to show; None means every page of the store.
        at : int, slice, range or array of int, default 0
            Where to show them: the first window page, or a window page for each file page.
        prot : Prot, optional
            New protection of these window pages. Default: unchanged.
        nonblock : bool, default False
            Load only pages that are in the page cache. The others change their mapping and are
            absent: the first touch loads the right page.
        populate : bool, default True
            Load the pages now. False: the first touch of each loads it.
        discard : bool, default False
            Drop placed pages in the range. Otherwise they are an error.
        in_place : bool, default False
            You promise that no thread reads these window pages during the call, so present
            pages may be overwritten, as a buffer pool does under its latch.

        Returns
        -------
        ndarray of bool, shape (n,)
            For each page of `file_pages`, whether it is present.

        Raises
        ------
        PageRangeError
            A file page is outside the store, or a window page outside the window.
        ArgumentError
            A window page is named twice, or `at` has another length than
            `file_pages`.
        PlacedPageError
            A placed page would be lost.
        BudgetError
            The pages are more than the window's budget; nothing changed.
        StoreError
            A read failed: the first ``error.completed`` pages show the new file page, and the
            rest the old one. In a writable window, a page of the rest shows nothing (-1 in
            `mapping`) if its old file page is now shown elsewhere.
        MappingLimitError
            Engine "alias": too many runs of pages; nothing changed.
        DuplicatePageError
            A writable file page would be shown twice; nothing changed.
        UnsupportedError
            `nonblock`, and the kernel does not say what is resident.

        Notes
        -----
        Engine "paged": pages are read into staging memory and swapped in by ``UFFDIO_MOVE``
        (Linux 6.8; ``UFFDIO_COPY`` before). A page from the page cache takes less than a
        microsecond. Engine "alias": one ``mmap(MAP_FIXED)`` for each run. In both, an
        aligned load of another thread sees the old content or the new. Engine "eager"
        overwrites pages, so keep readers out. Any number of threads may call this; calls on
        one window take turns.

        `in_place` has an effect only in a read-only window, if all pages named here are
        present: each run of the file is read directly into the window by one ``pread``. If the
        read fails, these pages are absent and keep their old mapping.

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
                return np.frombuffer(present, _BOOL)
        numbering = Numbering("remap", "file page", self._store.page_count)
        shown = numbering.selection(file_pages)
        if shown is None:
            shown = (0, numbering.limit)
        target = self._target(at, numbering.count(shown))
        bits = None if prot is None else checked_prot(prot)
        present = self._remap(
            shown, target, bits, bool(nonblock), bool(populate), bool(discard), bool(in_place)
        )
        return np.frombuffer(present, _BOOL)

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
            The pages do not fit into the window's budget; nothing changed. With `nonblock`,
            pages for which there is no room are skipped instead.
        StoreError
            A read failed; the first ``error.completed`` pages are present.
        UnsupportedError
            `nonblock`, and the kernel does not say what is resident.

        Notes
        -----
        Engine "paged": as `remap`. Engine "alias": ``madvise(MADV_POPULATE_READ)`` (Linux 5.14).
        With `nonblock`, ``mincore(2)`` or ``cachestat(2)`` (Linux 6.5) decides; if the kernel drops
        a page meanwhile, it may cost one read. Pages protected with `Prot.NONE` stay absent. Any
        number of threads may call this.
        """
        selection, _ = self._select("populate", pages)
        return np.frombuffer(self._populate(selection, bool(nonblock)), dtype=np.bool_)

    def evict(self, pages: PageSelection = None, *, discard: bool = False) -> None:
        """Drop pages from the window; the next touch of each loads it again.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Window pages; None means all.
        discard : bool, default False
            Drop placed pages too. Otherwise they are an error.

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
        ``madvise(MADV_DONTNEED)``, one call for runs of pages that are close to each other. In
        engine "eager", an evicted page is inaccessible until it is populated. In engine "paged",
        pages that were loaded in whole blocks of 2 MiB may be huge pages. Their memory returns to
        the system once the whole block is evicted, or when memory is short. Any number of threads
        may call this.
        """
        selection, _ = self._select("evict", pages)
        self._evict(selection, bool(discard))

    def protect(self, pages: PageSelection, prot: Prot) -> None:
        """Deny or allow access to pages.

        Parameters
        ----------
        pages : int, slice, range, array of int or None
            Window pages; None means all.
        prot : Prot
            With `Prot.NONE` the pages keep their content, and touching them raises SIGSEGV or
            SIGBUS.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        ArgumentError
            `Prot.WRITE`, and the window is read-only.
        UnsupportedError
            The engine does not support this protection.
        MappingLimitError
            Engine "alias": too many pieces; nothing changed.
        DuplicatePageError
            A page would become writable, and another window page shows the same file page.
        StoreError
            `Prot.NONE`: a changed page could not be written back.

        Notes
        -----
        Engines "paged" (Linux 6.6) and "eager" (guard pages, Linux 6.13) add no kernel mapping,
        whatever the pattern. Engine "alias": ``mprotect(2)``, one mapping for each piece. Any
        number of threads may call this.
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
            ``n * page_bytes`` bytes, or one page for all of them. None: the content that the
            pages show now.

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
        Engine "paged": ``UFFDIO_MOVE`` or ``UFFDIO_COPY``. Engine "alias": one private anonymous
        mapping for each page. `mapping` shows -2 for placed pages. They are never written to the
        store, and only `remap` and `evict` with ``discard=True`` drop them. Any number of threads
        may call this.
        """
        selection, count = self._select("place", pages)
        if data is None:
            content = None
        else:
            sizes = (count * self.page_bytes, self.page_bytes)
            content = bytes_of("place", data, sizes)
        self._place(selection, content)

    def pin(self, pages: PageSelection) -> Pin:
        """Make pages present, and keep them in memory until the pin is released.

        Parameters
        ----------
        pages : int, slice, range, array of int or None
            Window pages; None means all.

        Returns
        -------
        Pin
            It ends with its ``with`` block, or by `Pin.release`. Several pins may hold a page.

        Raises
        ------
        PageRangeError
            A page is outside the window.
        BudgetError
            The pages do not fit into the budget beside those that are pinned and placed
            already; nothing changed.
        StoreError
            A page cannot be read.
        UnsupportedError
            Engine "alias", whose pages the kernel may reclaim.

        Notes
        -----
        As `populate`. A pinned page can be remapped, but not evicted. Any number of threads may
        call this.
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
            Writing failed. The pages are still dirty, and the next flush writes them again. If
            ``fsync`` failed after pages had left the window, flush fails until `Store.refresh`.

        Notes
        -----
        A window that is not coherent: ``pwritev(2)`` in the order of the file, neighbours together,
        then ``fsync(2)``. With ``direct=True`` up to 128 such writes are in flight (``io_uring``,
        or 16 threads). A page that another thread writes to meanwhile stays dirty. Bytes beyond the
        end of the file are not written. There is one exception: if the file is truncated in that
        very moment, the write makes it longer again. A coherent window: ``fsync(2)`` for all pages,
        ``msync(MS_SYNC)`` for a selection; after an error, flush fails until `Store.refresh`.
        Waiting for the device cannot be interrupted.
        """
        selection, _ = self._select("flush", pages)
        self._flush(selection)

    def stats(self) -> WindowStats:
        """Return what the window holds, and what it has done so far.

        Returns
        -------
        WindowStats
            Counters, read without stopping other threads.
        """
        from fremap.stats import WindowStats

        return WindowStats(**self._stats())
