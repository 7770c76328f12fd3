"""The file that suites measure on, and whether it is in the page cache."""

import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from fremap.bench.harness import BenchError
from fremap.bench.machine import memory_bytes

PAGE_BYTES = mmap.PAGESIZE
# Of a sparse file, one part of so many has content.
SPARSE_PARTS = 4
_PIECE_BYTES = 64 << 20
_SPARSE_PIECE_BYTES = 1 << 20


def largest_file_bytes() -> int:
    """Return a quarter of the available memory: file, windows and loops must fit together."""
    return memory_bytes("MemAvailable") // 4


class DataFile:
    """A temporary file whose pages begin with their number.

    The rest of a page is noise, so that nothing below can store it as less.
    It has no name of its own from the start, so that it is gone with this
    process, however that ends; `path` is its descriptor's.
    """

    def __init__(self, directory: str | None, size_bytes: int) -> None:
        self.page_count = size_bytes // PAGE_BYTES
        self.size_bytes = self.page_count * PAGE_BYTES
        self._directory = Path(directory or tempfile.gettempdir())
        self._check_room()
        self.fd, name = tempfile.mkstemp(prefix="fremap-bench-", dir=self._directory)
        Path(name).unlink()
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.fd}")

    def _check_room(self) -> None:
        if self.page_count == 0:
            raise BenchError(f"the file must hold at least a page of {PAGE_BYTES} bytes")
        if self.size_bytes > 2 * largest_file_bytes():
            raise BenchError(
                f"a file of {self.size_bytes >> 20} MiB does not stay in the page cache here; pass "
                f"--file-size {max(largest_file_bytes() >> 20, 1)}M or less"
            )
        self._check_disk(self.size_bytes)

    def _check_disk(self, needed_bytes: int) -> None:
        free_bytes = shutil.disk_usage(self._directory).free
        if free_bytes < needed_bytes:
            raise BenchError(
                f"{self._directory} has {free_bytes >> 20} MiB free, the file needs "
                f"{needed_bytes >> 20}; pass --dir or --file-size"
            )

    def __enter__(self) -> Self:
        try:
            self._write()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which removes it."""
        os.close(self.fd)

    def _write(self) -> None:
        generator = np.random.default_rng(2002)
        piece_pages = min(_PIECE_BYTES // PAGE_BYTES, self.page_count)
        piece = generator.integers(0, 2**63, (piece_pages, PAGE_BYTES // 8), dtype=np.int64)
        for first in range(0, self.page_count, piece_pages):
            pages = piece[: self.page_count - first]
            pages[:, 0] = np.arange(first, first + len(pages))
            view = memoryview(pages).cast("B")
            while view:
                view = view[os.write(self.fd, view) :]
        os.fsync(self.fd)

    def drop(self) -> None:
        """Drop from the page cache what can be dropped: clean pages that nobody maps."""
        os.fsync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def warm(self) -> None:
        """Read all of it, in order."""
        buffer = bytearray(_PIECE_BYTES)
        for offset in range(0, self.size_bytes, _PIECE_BYTES):
            os.preadv(self.fd, [buffer], offset)

    def read_pages(self, pages: Iterable[int]) -> None:
        """Bring just these pages into the page cache, without read-ahead."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)
        buffer = bytearray(PAGE_BYTES)
        for page in pages:
            os.preadv(self.fd, [buffer], page * PAGE_BYTES)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_NORMAL)

    def resident(self) -> npt.NDArray[np.bool_]:
        """Ask mincore(2) which pages are in the page cache; no fremap code is involved."""
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        states = np.zeros(self.page_count, dtype=np.uint8)
        with mmap.mmap(self.fd, self.size_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE) as linear:
            memory = ctypes.c_char.from_buffer(linear)
            failed = mincore(ctypes.addressof(memory), self.size_bytes, states.ctypes.data)
            del memory  # an exported buffer would keep the map from closing
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return (states & 1).astype(np.bool_)


class SparseFile(DataFile):
    """A file of holes, where the first MiB of each four has content.

    Attributes
    ----------
    data_bytes
        Bytes that are no holes.
    """

    def __init__(self, directory: str | None, data_bytes: int) -> None:
        self._pieces = data_bytes // _SPARSE_PIECE_BYTES
        self.data_bytes = self._pieces * _SPARSE_PIECE_BYTES
        super().__init__(directory, self.data_bytes * SPARSE_PARTS)

    def _check_room(self) -> None:
        if self._pieces == 0:
            raise BenchError(f"the file must hold at least {_SPARSE_PIECE_BYTES} bytes of data")
        self._check_disk(self.data_bytes)

    def _write(self) -> None:
        os.truncate(self.fd, self.size_bytes)
        generator = np.random.default_rng(2002)
        shape = (_SPARSE_PIECE_BYTES // PAGE_BYTES, PAGE_BYTES // 8)
        pages = generator.integers(0, 2**63, shape, dtype=np.int64)
        for numbers in self.data_pages().reshape(self._pieces, -1):
            pages[:, 0] = numbers
            os.pwrite(self.fd, pages, int(numbers[0]) * PAGE_BYTES)
        os.fsync(self.fd)

    def data_pages(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the pages that are no holes."""
        piece_pages = _SPARSE_PIECE_BYTES // PAGE_BYTES
        pages = np.arange(self.page_count, dtype=np.int64)
        return pages.reshape(self._pieces, -1)[:, :piece_pages].reshape(-1)


class PageDraw:
    """Random file pages, fresh for each round and the same for all its contenders."""

    def __init__(self, page_count: int, seed: int = 2_5_42) -> None:
        self._page_count = page_count
        self._seed = seed

    def distinct(self, number: int, count: int) -> npt.NDArray[np.int64]:
        """Draw `count` different pages in random order, for round `number`."""
        if count > self._page_count:
            raise BenchError(
                f"{count} different pages of a file of {self._page_count}; "
                "pass --file-size or --pages"
            )
        generator = np.random.default_rng([self._seed, number])
        return generator.choice(self._page_count, count, replace=False, shuffle=True).astype(
            np.int64
        )
