"""Rows of 160 bytes of the data file: what sides take them from, and rows that are cold."""

import mmap
import os
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench import competitors
from fremap.bench.bench import Bench
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import BenchError

ROW_BYTES = 160
MOST_ROWS = 16_384

Ids: TypeAlias = npt.NDArray[np.int64]
Bytes: TypeAlias = npt.NDArray[np.uint8]


class SmallRows:
    """What all sides take from, and to.

    Attributes
    ----------
    row_count, offset
        Rows of the file, and the byte that the first begins at.
    count
        Rows of a take.
    out
        Memory for them.
    """

    def __init__(self, bench: Bench) -> None:
        self.file = bench.file
        self.row_count = self.file.size_bytes // ROW_BYTES
        self.count = min(bench.pages, MOST_ROWS, self.row_count)
        # Last bytes that make no row are left out, as `fremap.rows` would not have them.
        self.offset = self.file.size_bytes % ROW_BYTES
        self.out = np.ones((self.count, ROW_BYTES), dtype=np.uint8)

    def rows(self) -> fremap.Rows:
        """Open the rows."""
        return fremap.rows(self.file.path, np.uint8, ROW_BYTES, offset=self.offset)

    def table(self, advice: int = mmap.MADV_NORMAL) -> Bytes:
        """Map the rows as NumPy does."""
        shape = (self.row_count, ROW_BYTES)
        return competitors.advised_memmap(
            self.file.path, np.uint8, advice, offset=self.offset, shape=shape
        )

    def pages(self, ids: Ids) -> Ids:
        """Return the pages that rows begin in."""
        return (ids * ROW_BYTES + self.offset) // PAGE_BYTES

    def advise_and_take(self, table: Bytes, ids: Ids, out: Bytes) -> None:
        """Call ``posix_fadvise(WILLNEED)`` for each row, then take them from a map."""
        for offset in (ids * ROW_BYTES + self.offset).tolist():
            os.posix_fadvise(self.file.fd, offset, ROW_BYTES, os.POSIX_FADV_WILLNEED)
        np.take(table, ids, axis=0, out=out, mode="clip")

    def verify(self, taken: Bytes, ids: Ids) -> None:
        """Raise unless `taken` is what the file has."""
        if not np.array_equal(taken, self.table()[ids]):
            raise BenchError("the rows are not those that were asked for")


class ColdRows:
    """Rows of pages that no side has read before: a part of one shuffle for each of them.

    Attributes
    ----------
    count
        Rows of a part.
    resident
        How many were in the page cache all the same, after it was dropped for them.
    """

    def __init__(
        self, rows: SmallRows, rounds: int, sides: int, *,
        most: int = MOST_ROWS, row_count: int | None = None,
    ) -> None:  # fmt: skip
        self._rows = rows
        self._row_count = row_count or rows.row_count
        pages = self._row_count * ROW_BYTES // PAGE_BYTES - 1
        self.count = min(rows.count, most, pages // (sides * (rounds + 1)))
        if self.count < 1:
            raise BenchError(
                "the file is too small to give each round pages of its own; pass --file-size"
            )
        self._sides = sides
        self._pages = np.random.default_rng(2002).permutation(pages)
        self.resident = 0

    def part(self, number: int, side: int) -> Ids:
        """Return the rows that one side has in round `number`."""
        first = (number * self._sides + side) * self.count
        pages = self._pages[first : first + self.count].astype(np.int64)
        # A row that begins in the page, wherever.
        within = np.random.default_rng(number).integers(0, PAGE_BYTES // ROW_BYTES, len(pages))
        ids: Ids = (pages * PAGE_BYTES - self._rows.offset) // ROW_BYTES + 1 + within
        return ids.clip(0, self._row_count - 1)

    def dropped(self, number: int, side: int) -> Ids:
        """Return a part once the cache was dropped, and count what is in it all the same."""
        ids = self.part(number, side)
        self._rows.file.drop()
        resident = self._rows.file.resident()[self._rows.pages(ids)]
        self.resident += int(np.count_nonzero(resident))
        return ids
