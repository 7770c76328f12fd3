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
        Bytes of rows in each file, a multiple of the system's page.
    """

    offset = 64

    def __init__(self, directory: str | None, size_bytes: int, shards: int) -> None:
        self.shard_bytes = size_bytes // shards // PAGE_BYTES * PAGE_BYTES
        if self.shard_bytes == 0:
            raise BenchError(f"{shards} files need a page each; pass a larger --file-size")
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

    def __enter__(self) -> Self:
        noise = np.random.default_rng(2002).bytes(_PIECE_BYTES)
        try:
            for number, path in enumerate(self.paths):
                fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                self.fds.append(fd)
                os.write(fd, bytes([number % 251 + 1]) * self.offset)
                left = self.shard_bytes
                while left:
                    left -= os.write(fd, memoryview(noise)[:left])
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

    def rows(self, row_bytes: int, shards: int | None = None, *, direct: bool = False) -> fremap.Rows:
        """Open the table, or its first `shards` files, as rows of this size."""
        paths = self.paths[:shards]
        count = self.shard_rows(row_bytes)
        if self.shard_bytes % row_bytes:
            raise BenchError(f"rows of {row_bytes} bytes do not fill a file")
        del count
        return fremap.rows(paths, np.uint8, row_bytes, offset=self.offset, direct=direct)

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
