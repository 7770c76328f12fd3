"""What people do today instead of fremap: every page by a call of its own.

Each competitor does the whole job that one `Window.remap` does: window page
``i`` ends up showing file page ``file_pages[i]``. The first two make a kernel
mapping a page (through ctypes: about 0.4 µs a call on top of the kernel's
6-7 µs; ``benches/c/`` has the same loops without that). The others copy.

All calls return an `Outcome`; none raises when the kernel refuses part way, for
where they stop (``vm.max_map_count``) is part of what they show.
"""

import ctypes
import errno
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

FilePages: TypeAlias = npt.NDArray[np.int64]
Pages: TypeAlias = npt.NDArray[np.uint8]

MAP_POPULATE = 0x8000
MAP_FIXED = 0x10
POOL_THREADS = 8


@dataclass(frozen=True)
class Outcome:
    """How far one competitor got, and how long it took.

    Attributes
    ----------
    seconds
        The time of the calls alone: no set-up, no tear-down.
    completed
        Pages done; fewer than asked for where the kernel refused.
    errno
        The kernel's refusal, or None.
    vma_count
        Kernel mappings of the process at the end, before tear-down.
    """

    seconds: float
    completed: int
    errno: int | None
    vma_count: int

    @property
    def microseconds_a_page(self) -> float:
        """The cost of a page that was done."""
        return self.seconds / max(self.completed, 1) * 1e6

    @property
    def refusal(self) -> str | None:
        """The kernel's refusal as text, or None."""
        return (
            None
            if self.errno is None
            else f"{errno.errorcode[self.errno]}: {os.strerror(self.errno)}"
        )


def process_vma_count() -> int:
    """Count the kernel mappings of this process: lines of ``/proc/self/maps``."""
    with Path("/proc/self/maps").open("rb") as maps:
        return sum(1 for _ in maps)


class PieceWindow:
    """A shared mapping of a file that is remapped a page a system call.

    Keep one for several rounds to time the steady state, where every page
    replaces a mapping that is there.
    """

    def __init__(self, fd: int, page_count: int, *, page_bytes: int = mmap.PAGESIZE) -> None:
        self._fd = fd
        self._page_count = page_count
        self._page_bytes = page_bytes
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_long,
        ]  # fmt: skip
        self._munmap = libc.munmap
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._remap_file_pages = libc.remap_file_pages
        self._remap_file_pages.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t, ctypes.c_int
        ]  # fmt: skip
        start = self._mmap(None, self._bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._start: int | None = start

    @property
    def _bytes(self) -> int:
        return self._page_count * self._page_bytes

    def close(self) -> None:
        """Unmap; views of `pages` must be gone."""
        if self._start is not None:
            self._munmap(self._start, self._bytes)
            self._start = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pages(self) -> Pages:
        """The mapping as uint8 (page_count, page_bytes); valid until `close`."""
        memory = (ctypes.c_uint8 * self._bytes).from_address(self._open_start())
        pages: Pages = np.ctypeslib.as_array(memory).reshape(self._page_count, self._page_bytes)
        pages.flags.writeable = False
        return pages

    def mmap_fixed(self, file_pages: FilePages) -> Outcome:
        """Call ``mmap(MAP_FIXED | MAP_POPULATE)`` for each page."""
        call, page_bytes, fd = self._mmap, self._page_bytes, self._fd
        flags = mmap.MAP_SHARED | MAP_FIXED | MAP_POPULATE
        failed = ctypes.c_void_p(-1).value
        completed, address, refusal = 0, self._open_start(), None
        begin = time.perf_counter()
        for file_page in file_pages.tolist():
            if (
                call(address, page_bytes, mmap.PROT_READ, flags, fd, file_page * page_bytes)
                == failed
            ):
                refusal = ctypes.get_errno()
                break
            address += page_bytes
            completed += 1
        seconds = time.perf_counter() - begin
        return Outcome(seconds, completed, refusal, process_vma_count())

    def remap_file_pages(self, file_pages: FilePages) -> Outcome:
        """Call ``remap_file_pages(2)`` for each page; it populates by itself.

        The descriptor must be open for writing: a mapping that could never be
        written does not count as shared, and the kernel answers EINVAL.
        """
        call, page_bytes = self._remap_file_pages, self._page_bytes
        system_pages = page_bytes // mmap.PAGESIZE
        completed, address, refusal = 0, self._open_start(), None
        begin = time.perf_counter()
        for file_page in file_pages.tolist():
            if call(address, page_bytes, 0, file_page * system_pages, 0) != 0:
                refusal = ctypes.get_errno()
                break
            address += page_bytes
            completed += 1
        seconds = time.perf_counter() - begin
        return Outcome(seconds, completed, refusal, process_vma_count())

    def _open_start(self) -> int:
        if self._start is None:
            raise ValueError("the mapping is closed")
        return self._start


def mmap_fixed(fd: int, file_pages: FilePages, *, page_bytes: int = mmap.PAGESIZE) -> Outcome:
    """Make a fresh mapping, then call `PieceWindow.mmap_fixed`."""
    with PieceWindow(fd, len(file_pages), page_bytes=page_bytes) as window:
        return window.mmap_fixed(file_pages)


def remap_file_pages(fd: int, file_pages: FilePages, *, page_bytes: int = mmap.PAGESIZE) -> Outcome:
    """Make a fresh mapping, then call `PieceWindow.remap_file_pages`; `fd` must be writable."""
    with PieceWindow(fd, len(file_pages), page_bytes=page_bytes) as window:
        return window.remap_file_pages(file_pages)


def memmap_take(
    path: str | os.PathLike[str],
    file_pages: FilePages,
    *,
    out: Pages | None = None,
    page_bytes: int = mmap.PAGESIZE,
) -> Outcome:
    """Index an ``np.memmap``: default advice, one blocking fault a page that is not mapped.

    With `out`, the copy goes there (``np.take(..., mode="clip")``, which needs
    no buffer of its own); without, NumPy makes a new array as ``[ids]`` does.
    """
    whole = Path(path).stat().st_size // page_bytes
    table = np.memmap(path, dtype=np.uint8, mode="r", shape=(whole, page_bytes))
    begin = time.perf_counter()
    if out is None:
        table[file_pages]
    else:
        np.take(table, file_pages, axis=0, out=out, mode="clip")
    seconds = time.perf_counter() - begin
    return Outcome(seconds, len(file_pages), None, process_vma_count())


def advised_memmap(
    path: str | os.PathLike[str],
    dtype: npt.DTypeLike,
    advice: int,
    *,
    offset: int = 0,
    shape: tuple[int, ...] | None = None,
) -> np.memmap[Any, np.dtype[Any]]:
    """Map as NumPy does, with advice of madvise(2), which NumPy itself has no way to give."""
    table: np.memmap[Any, np.dtype[Any]] = np.memmap(path, dtype, "r", offset, shape)
    kernel_map: mmap.mmap = table._mmap  # type: ignore[attr-defined] # noqa: SLF001 - the only way
    kernel_map.madvise(advice)
    return table


def fadvise_then_read(
    fd: int,
    file_pages: FilePages,
    out: Pages,
    *,
    page_bytes: int = mmap.PAGESIZE,
    first_byte: int = 0,
) -> Outcome:
    """Call ``posix_fadvise(WILLNEED)`` for each page, then pread each into `out`.

    Page 0 begins at `first_byte`.
    """
    offsets = (file_pages * page_bytes + first_byte).tolist()
    rows = list(out)
    begin = time.perf_counter()
    for offset in offsets:
        os.posix_fadvise(fd, offset, page_bytes, os.POSIX_FADV_WILLNEED)
    for row, offset in zip(rows, offsets, strict=True):
        os.preadv(fd, [row], offset)
    seconds = time.perf_counter() - begin
    return Outcome(seconds, len(file_pages), None, process_vma_count())


def pread_pool(
    fd: int,
    file_pages: FilePages,
    out: Pages,
    *,
    threads: int = POOL_THREADS,
    page_bytes: int = mmap.PAGESIZE,
    first_byte: int = 0,
) -> Outcome:
    """Share out the preads into `out` among a pool of `threads` threads."""
    offsets = (file_pages * page_bytes + first_byte).tolist()
    rows = list(out)

    def share(part: int) -> None:
        for row, offset in zip(rows[part::threads], offsets[part::threads], strict=True):
            os.preadv(fd, [row], offset)

    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        for done in [pool.submit(share, part) for part in range(threads)]:
            done.result()
        seconds = time.perf_counter() - begin
    return Outcome(seconds, len(file_pages), None, process_vma_count())
