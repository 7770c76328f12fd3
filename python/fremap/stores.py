"""Stores: files and shared memory as numbered pages.

A store is a numbered run of *file pages*. It reads and writes pages by system
calls, many in flight together, and tells which are in the kernel's page cache.
Windows (`fremap.Window`) show its pages in memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias

import numpy as np

from fremap import _core
from fremap.arguments import BufferLike, absolute_path, bytes_of, counted, quantity, refuse_objects
from fremap.closing import ClosedOnExit
from fremap.errors import ArgumentError, ArgumentTypeError
from fremap.selection import CoreSelection, Numbering, PageSelection

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    import numpy.typing as npt

    class Shown(Protocol):
        """What a window shows."""

        @property
        def mapping(self) -> npt.NDArray[np.int64]:
            """The file page of each window page."""

    class Elements(Protocol):
        """Elements of an array over it."""

        @property
        def dtype(self) -> np.dtype[Any]:
            """Type of one."""

        @property
        def used_bytes(self) -> int:
            """Bytes of all of them."""


__all__ = ["FileStore", "MemoryStore", "Mode", "PathOrDescriptor", "Store"]

Mode: TypeAlias = Literal["r", "r+", "w+"]
PathOrDescriptor: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes] | int"


class Store(ClosedOnExit):
    """The base class of all stores; make one with `open`, `concat` or `MemoryStore`.

    Every method may be called from several threads at once. Long calls release
    the GIL and end within 100 ms of Ctrl-C.
    """

    __slots__ = ("__weakref__", "_core")

    _core: _core.Store

    def __init__(self) -> None:
        raise TypeError("make a store with fremap.open() or fremap.MemoryStore()")

    @property
    def page_count(self) -> int:
        """Number of file pages; the last may be partial."""
        return self._core.page_count

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._core.page_bytes

    @property
    def size(self) -> int:
        """Bytes of the store, as they were when it was opened or refreshed."""
        return self._core.size

    @property
    def writable(self) -> bool:
        """Whether pages may be written."""
        return self._core.writable

    @property
    def direct(self) -> bool:
        """Whether pages are read and written around the page cache."""
        return self._core.direct

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.closed

    def _called(self) -> str:
        """Return what tells the store from others, for reprs."""
        return f"at {id(self):#x}"

    def __repr__(self) -> str:
        return f"<fremap.{type(self).__name__} {self._called()}, {self._described()}>"

    def _check_pickled(self) -> None:
        """Fail for a store that cannot be pickled as it is closed."""
        if self.closed:
            raise TypeError(f"a closed {type(self).__name__} cannot be pickled")

    @property
    def _named(self) -> str:
        """What reprs of windows and slots call the store."""
        return f"{type(self).__name__} {self._called()}"

    def _described(self) -> str:
        """Return what the repr of every store says of it."""
        if self.closed:
            return "closed"
        state = f"{counted(self.page_count, 'page')} of {self.page_bytes} bytes"
        state += ", writable" if self.writable else ""
        return state + (", direct" if self.direct else "")

    def fileno(self) -> int:
        """Return the descriptor that the store uses; it stays the store's.

        Returns
        -------
        int
            A descriptor, open until the store and its windows are closed.

        Raises
        ------
        UnsupportedError
            The store consists of several files, each with its own descriptor.
        ClosedError
            The store is closed.
        """
        return self._core.fileno()

    def _select(self, operation: str, pages: PageSelection) -> tuple[CoreSelection, int]:
        numbering = Numbering(operation, "file page", self._core.page_count)
        selection = numbering.selection(pages)
        return selection, numbering.count(selection)

    def _check_elements(self, elements: Elements, shown: Shown) -> None:
        """Refuse an array whose elements cannot lie in what a window shows of the store."""

    def _check_extents(self, elements: Elements, extent_pages: int) -> None:
        """The same for an array over each of its extents."""

    def resident(self, pages: PageSelection = None) -> npt.NDArray[np.bool_]:
        """Tell which pages are in the kernel's page cache, without reading any.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            File pages; None means all.

        Returns
        -------
        ndarray of bool, shape (n,)
            For each page asked for, whether all of it is in memory.

        Raises
        ------
        UnsupportedError
            The kernel does not say. It answers only for files that the user owns or may write.
        PageRangeError
            A page is outside the store.

        Notes
        -----
        ``mincore(2)`` over a mapping of the file, or ``cachestat(2)`` (Linux 6.5). Long runs of
        pages cost nanoseconds a page. The answer is a snapshot: the kernel may drop or read pages
        at any moment. Any number of threads may call this.
        """
        selection, _ = self._select("resident", pages)
        return np.frombuffer(self._core.resident(selection), dtype=np.bool_)

    def prefetch(self, pages: PageSelection = None) -> None:
        """Start reading pages into the page cache and return at once.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            File pages; None means all.

        Raises
        ------
        PageRangeError
            A page is outside the store.

        Notes
        -----
        ``posix_fadvise(POSIX_FADV_WILLNEED)`` for each run of pages, about 3 µs each. The kernel
        may ignore it when memory is short. Any number of threads may call this.
        """
        selection, _ = self._select("prefetch", pages)
        self._core.prefetch(selection)

    def read(
        self, pages: PageSelection = None, out: BufferLike | None = None
    ) -> npt.NDArray[np.uint8]:
        """Read pages, in any order, with all requests in flight together.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            File pages, repeats allowed; None means all.
        out : writable buffer, optional
            Where to put them: C-contiguous, exactly ``n * page_bytes`` bytes.

        Returns
        -------
        ndarray of uint8, shape (n, page_bytes)
            The pages in the order asked for; an array over `out` if it was given. The last page
            is zeros beyond the end of the file.

        Raises
        ------
        TruncatedError
            The file is shorter than when it was opened.
        StoreError
            A read failed; the first ``error.completed`` pages are right.
        PageRangeError
            A page is outside the store.
        ArgumentError
            `out` has another size, is read-only or not contiguous.

        Notes
        -----
        Cached pages are copied from a mapping of the file. The rest are sorted, merged and read by
        ``io_uring`` (Linux 5.11; otherwise by a pool of threads), with at most 128 requests in
        flight. Reads are not atomic: a page may show a part of a simultaneous write. Any number of
        threads may call this.

        Examples
        --------
        >>> import fremap, tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(b"a" * 4096 + b"b" * 4096 + b"c")
        ...     file.flush()
        ...     with fremap.open(file.name, page_bytes=4096) as store:
        ...         store.read([2, 0, 1])[:, :2].tolist()
        [[99, 0], [97, 97], [98, 98]]
        """
        selection, count = self._select("read", pages)
        if out is None:
            filled = np.empty((count, self.page_bytes), dtype=np.uint8)
        else:
            filled = self._checked_out(out, count)
        self._core.read(selection, filled)
        return filled

    def _checked_out(self, out: BufferLike, count: int) -> npt.NDArray[np.uint8]:
        expected = count * self.page_bytes
        if isinstance(out, np.ndarray):
            refuse_objects("read", "out", out)
        with memoryview(out) as view:
            refuse_objects("read", "out", view)
            if view.readonly or not view.c_contiguous:
                raise ArgumentError("read: out must be a writable C-contiguous buffer")
            if view.nbytes != expected:
                raise ArgumentError(
                    f"read: out has {view.nbytes} bytes; {count} pages are {expected} bytes"
                )
        if expected == 0:
            return np.empty((0, self.page_bytes), dtype=np.uint8)
        flat = np.frombuffer(memoryview(out).cast("B"), dtype=np.uint8)
        return flat.reshape(count, self.page_bytes)

    def write(self, pages: PageSelection, data: BufferLike) -> None:
        """Write pages.

        Parameters
        ----------
        pages : int, slice, range, array of int or None
            File pages; None means all. If a page is named twice, the last one wins.
        data : buffer or array
            Exactly ``n * page_bytes`` bytes. Bytes beyond the end of the file are not written:
            the file does not grow.

        Raises
        ------
        UnsupportedError
            The store is read-only.
        StoreError
            A write failed; the first ``error.completed`` pages are written.
        PageRangeError
            A page is outside the store.
        ArgumentError
            `data` has another size.

        Notes
        -----
        ``pwrite(2)``, one for each run of pages. The pages are durable after `sync`. Writes are not
        atomic. Any number of threads may call this.
        """
        selection, count = self._select("write", pages)
        self._core.write(selection, bytes_of("write", data, (count * self.page_bytes,)))

    def sync(self) -> None:
        """Make what was written durable.

        Raises
        ------
        StoreError
            The device failed, and what was written since the last successful sync may be lost.
            `sync`, and `Window.flush` of every window on the store, fail until `refresh`.

        Notes
        -----
        ``fsync(2)`` waits for the device and cannot be interrupted. The kernel reports a failed
        write-back only once and then calls the pages clean, so fremap remembers the error. Call
        `refresh`, then write again everything since the last successful sync.
        """
        self._core.sync()

    def refresh(self) -> None:
        """Read the file's size again, after it has grown or shrunk.

        Raises
        ------
        StoreError
            The size cannot be read. Or the file has grown, and a window cannot write back or
            read its last page; call `refresh` again.

        Notes
        -----
        ``fstat(2)``. Windows keep the page count that they were made with. If the file ended
        within a page and has grown, writable windows write the page back up to the old end, and
        load it again. What was written beyond the old end before `refresh` returned is dropped.
        After a `sync` or `Window.flush` that lost writes, `refresh` acknowledges the loss, so
        that later calls can succeed.
        """
        self._core.refresh()

    def close(self) -> None:
        """Close the store; a second time does nothing.

        Notes
        -----
        Windows on the store still work: the descriptor stays open until the last of them is
        closed.
        """
        self._core.close()


class ProvidedStore(Store):
    """What `ComputedStore` and `RemoteStore` have in common; not made directly."""

    __slots__ = ()

    @property
    def processes(self) -> tuple[int, ...]:
        """Process numbers of the store's processes that wait for work."""
        return tuple(self._core.processes())


class FileStore(Store):
    """A file as a store of pages; what `fremap.open` returns.

    Parameters
    ----------
    file : str, bytes, path or int
        A path, or an open descriptor, which is duplicated.
    mode : {"r", "r+", "w+"}, default "r"
        "r": read only. "r+": read and write. "w+": create the file, or empty an existing one.
    size : int, optional
        Bytes of the new file, with mode "w+" only.
    page_bytes : int, optional
        Size of a page: a power of two from the system's page to 1 GiB. Default: the system's
        page.
    direct : bool, default False
        Read and write past the page cache (``O_DIRECT``). The writes of a window's flush are
        in flight together.

    Raises
    ------
    StoreError
        The file cannot be opened; also a `FileNotFoundError`,
        `PermissionError`, … as `OSError` would be.
    ArgumentError
        The mode, size or page size is invalid.

    Notes
    -----
    Sizes are fixed when the store is opened; see `refresh`. Pickling keeps the
    path and opens the file again ("w+" as "r+"); a store opened by descriptor
    cannot be pickled.
    """

    __slots__ = ("_path", "_reopen")

    def __init__(
        self,
        file: PathOrDescriptor,
        mode: Mode = "r",
        *,
        size: SupportsIndex | None = None,
        page_bytes: SupportsIndex | None = None,
        direct: bool = False,
    ) -> None:
        if mode not in ("r", "r+", "w+"):
            raise ArgumentError(f'open: mode is {mode!r}; it must be "r", "r+" or "w+"')
        if (mode == "w+") != (size is not None):
            raise ArgumentError('open: size= must be given with mode "w+", and with no other mode')
        size = None if size is None else quantity("open: size", size)
        page_bytes = _checked_page("open", page_bytes)
        self._path: str | bytes | None
        if isinstance(file, bool):
            raise ArgumentTypeError("open: file must be a path or a descriptor, not a bool")
        if isinstance(file, int):
            if mode == "w+":
                raise ArgumentError('open: mode "w+" needs a path; give a descriptor as "r+"')
            self._path = None
            self._core = _core.Store.from_fd(file, mode == "r+", page_bytes, direct)
        else:
            self._path = absolute_path("open", file)
            self._core = _core.Store.open(os.fsencode(self._path), mode, size, page_bytes, direct)
        reopen_mode: Mode = "r" if mode == "r" else "r+"
        self._reopen = (reopen_mode, self._core.page_bytes, direct)

    @property
    def path(self) -> str | bytes | None:
        """Absolute path of the file; None for a store opened by descriptor."""
        return self._path

    def _called(self) -> str:
        if self._path is None and not self.closed:
            return f"of descriptor {self.fileno()}"
        return repr(self._path)

    def __reduce__(self) -> tuple[Callable[..., FileStore], tuple[object, ...]]:
        if self._path is None:
            raise TypeError(
                "a FileStore opened by descriptor cannot be pickled, as the descriptor means "
                "nothing elsewhere; open it by path"
            )
        self._check_pickled()
        return _reopen_file, (type(self), self._path, *self._reopen)


def _reopen_file(
    cls: type[FileStore],
    path: str | bytes,
    mode: Mode,
    page_bytes: int,
    direct: bool,  # noqa: FBT001
) -> FileStore:
    return cls(path, mode, page_bytes=page_bytes, direct=direct)


class MemoryStore(Store):
    r"""Shared memory as a store of pages.

    Parameters
    ----------
    size : int, optional
        Bytes of new memory; required unless you attach to existing memory.
    name : str, optional
        A name under ``/dev/shm``, without a slash. Memory without a name is anonymous
        (``memfd_create``) and is freed with its last user.
    create : bool, default True
        With a name: create the memory, and fail if it exists. False: attach to existing memory,
        with its size.
    page_bytes : int, optional
        Size of a page: a power of two from the system's page to 1 GiB. Default: the system's
        page.

    Raises
    ------
    StoreError
        The name exists already (also a `FileExistsError`) or does not
        (`FileNotFoundError`), or there is no memory.
    ArgumentError
        The size, name or page size is invalid.

    Notes
    -----
    ``memfd_create(2)`` (Linux 3.17) or a file in ``/dev/shm``. Named memory
    stays until `unlink`. Pickling keeps the name; anonymous memory passes to
    other processes through `multiprocessing` only, by its descriptor.

    Examples
    --------
    >>> import fremap
    >>> with fremap.MemoryStore(3 * 4096, page_bytes=4096) as store:
    ...     store.write(1, b"x" * 4096)
    ...     bytes(store.read([0, 1])[:, 0])
    b'\x00x'
    """

    __slots__ = ("_name",)

    def __init__(
        self,
        size: SupportsIndex | None = None,
        *,
        name: str | None = None,
        create: bool = True,
        page_bytes: SupportsIndex | None = None,
    ) -> None:
        wanted = None if size is None else quantity("MemoryStore: size", size)
        page_bytes = _checked_page("MemoryStore", page_bytes)
        if name is None and not create:
            raise ArgumentError("MemoryStore: create=False attaches to memory by its name=")
        if create and wanted is None:
            raise ArgumentError("MemoryStore: new memory needs a size in bytes")
        if not create and wanted is not None:
            raise ArgumentError("MemoryStore: attached memory (create=False) has its own size")
        self._name = name
        if name is not None:
            self._core = _core.Store.shared_memory(name, wanted, page_bytes)
        else:
            assert wanted is not None  # noqa: S101 - checked above; tells mypy
            _let_multiprocessing_pass_descriptors()
            self._core = _core.Store.memory(wanted, page_bytes)

    @classmethod
    def _from_descriptor(cls, fd: int, page_bytes: int) -> MemoryStore:
        store = cls.__new__(cls)
        store._name = None  # noqa: SLF001 - its own
        store._core = _core.Store.memory_from_fd(fd, page_bytes)  # noqa: SLF001
        return store

    @property
    def name(self) -> str | None:
        """Name under ``/dev/shm``; None for anonymous memory."""
        return self._name

    def unlink(self) -> None:
        """Remove the name; the memory is freed with its last user.

        Raises
        ------
        StoreError
            The name does not exist (also a `FileNotFoundError`).
        ArgumentError
            The memory has no name.

        Notes
        -----
        ``shm_unlink(3)``.
        """
        if self._name is None:
            raise ArgumentError("unlink: anonymous memory has no name to remove")
        _core.Store.unlink_shared_memory(self._name)

    def _called(self) -> str:
        return "anonymous" if self._name is None else repr(self._name)

    def __reduce__(self) -> tuple[Callable[..., MemoryStore], tuple[object, ...]]:
        if self._name is None:
            raise TypeError(
                "an anonymous MemoryStore cannot be pickled; pass it through multiprocessing "
                "(as an argument or in a queue), or give it a name"
            )
        return _attach_memory, (type(self), self._name, self.page_bytes)


def _checked_page(operation: str, page_bytes: SupportsIndex | None) -> int | None:
    return None if page_bytes is None else quantity(f"{operation}: page_bytes", page_bytes)


def _attach_memory(cls: type[MemoryStore], name: str, page_bytes: int) -> MemoryStore:
    return cls(name=name, create=False, page_bytes=page_bytes)


def _rebuild_memory(cls: type[MemoryStore], duplicate: Any, page_bytes: int) -> MemoryStore:
    fd = duplicate.detach()
    try:
        return cls._from_descriptor(fd, page_bytes)
    finally:
        os.close(fd)


def _reduce_for_multiprocessing(
    store: MemoryStore,
) -> tuple[Callable[..., MemoryStore], tuple[object, ...]]:
    from multiprocessing import reduction

    if store.name is not None:
        return store.__reduce__()
    duplicate = reduction.DupFd(store.fileno())
    return _rebuild_memory, (type(store), duplicate, store.page_bytes)


def _let_multiprocessing_pass_descriptors() -> None:
    """Teach multiprocessing's pickler, once there is a store that needs it.

    `import fremap` must stay fast and without effects, and a plain pickle has
    no way to carry a descriptor, so this is done when the first anonymous
    memory is made.
    """
    from multiprocessing import reduction

    reduction.ForkingPickler.register(MemoryStore, _reduce_for_multiprocessing)
