"""A table in many files, and rows of it that no side has read before."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.harness import BenchError

Ids: TypeAlias = npt.NDArray[np.int64]
Bytes: TypeAlias = npt.NDArray[np.uint8]

PAGE_BYTES = 4096
# Rows of each size that is measured fill a file.
SHARD_MULTIPLE = 5 * (1 << 20)
MOST_OPEN = 512
_PIECE_BYTES = 32 << 20


class ShardedTable:
    """Files of noise in a temporary folder, of which rows of any size are taken.

    Attributes
    ----------
    paths, fds
        The files, and a descriptor of each.
    offset
        The byte at which the rows of each file begin, as behind a header.
    shard_bytes
        Bytes of rows in each file, a multiple of `SHARD_MULTIPLE`.
    """

    offset = 64

    def __init__(
        self,
        directory: str | None,
        size_bytes: int,
        shards: int,
        *,
        multiple: int = SHARD_MULTIPLE,
    ) -> None:
        self.shard_bytes = size_bytes // shards // multiple * multiple
        if self.shard_bytes == 0:
            raise BenchError(
                f"{shards} files need {multiple} bytes each; pass --file-size or --shards"
            )
        folder = directory or tempfile.gettempdir()
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < size_bytes:
            raise BenchError(
                f"{folder} has {free_bytes >> 20} MiB free, the table needs "
                f"{size_bytes >> 20}; pass --dir or --file-size"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="fremap-bench-", dir=folder)
        self.paths = [Path(self._folder.name) / f"{shard:05}.bin" for shard in range(shards)]
        self.fds: list[int] = []

    @classmethod
    def small(cls, directory: str | None, shards: int) -> Self:
        """Make a table of many files of ten rows of 160 bytes."""
        return cls(directory, 1600 * shards, shards, multiple=1600)

    def __enter__(self) -> Self:
        noise = np.random.default_rng(2002).bytes(_PIECE_BYTES)
        try:
            for number, path in enumerate(self.paths):
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                # Of ten thousand files not all may be open.
                if len(self.paths) <= MOST_OPEN:
                    self.fds.append(fd)
                os.write(fd, bytes([number % 251 + 1]) * self.offset)
                left = self.shard_bytes
                while left:
                    left -= os.write(fd, memoryview(noise)[:left])
                if len(self.paths) > MOST_OPEN:
                    os.close(fd)
            self.drop()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the files."""
        for fd in self.fds:
            os.close(fd)
        self._folder.cleanup()

    def list_file(self) -> Path:
        """Write the names of the files to a file, a line each."""
        path = Path(self._folder.name) / "list"
        path.write_text("".join(f"{path}\n" for path in self.paths))
        return path

    def shard_rows(self, row_bytes: int) -> int:
        """Return how many rows each file has."""
        return self.shard_bytes // row_bytes

    def rows(
        self, row_bytes: int, shards: int | None = None, *, direct: bool = False
    ) -> fremap.Rows:
        """Open the table, or its first `shards` files, as rows of this size."""
        paths = self.paths[:shards]
        return fremap.rows(paths, np.uint8, row_bytes, offset=self.offset, direct=direct)

    def map(self, shard: int, row_bytes: int) -> Bytes:
        """Map the rows of one file as NumPy does."""
        shape = (self.shard_rows(row_bytes), row_bytes)
        return np.memmap(self.paths[shard], np.uint8, "r", self.offset, shape)

    def drop(self) -> None:
        """Drop all of it from the page cache."""
        for fd in self.fds:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def warm(self) -> None:
        """Read all of it, in order."""
        buffer = bytearray(_PIECE_BYTES)
        for fd in self.fds:
            for offset in range(0, self.shard_bytes + self.offset, _PIECE_BYTES):
                os.preadv(fd, [buffer], offset)

    def loop_mode(self, way: str, row_bytes: int) -> str:
        """Return what tells the C loop how to read rows of this size."""
        return f"{way}:{row_bytes}:{self.offset}:{self.shard_rows(row_bytes)}"


class FreshRows:
    """Rows of pages that nobody has read before: parts of one shuffle of the table's pages.

    The host of a virtual machine may keep what was read, so no side may come by a page twice.
    """

    def __init__(self, table: ShardedTable, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._shard_pages = table.shard_bytes // PAGE_BYTES
        self._shard_rows = table.shard_rows(row_bytes)
        pages = len(table.paths) * self._shard_pages
        self._pages = np.random.default_rng(2002).permutation(pages)
        self._next = 0

    @property
    def left(self) -> int:
        """How many rows there are still."""
        return len(self._pages) - self._next

    def draw(self, count: int) -> Ids:
        """Return rows of the next `count` pages."""
        if count > self.left:
            raise BenchError("the table is too small for as many rounds; pass a larger --file-size")
        pages = self._pages[self._next : self._next + count].astype(np.int64)
        self._next += count
        shard, page = np.divmod(pages, self._shard_pages)
        row = np.minimum(-(-page * PAGE_BYTES // self._row_bytes), self._shard_rows - 1)
        ids: Ids = shard * self._shard_rows + row
        return ids
