"""Runs of elements, anywhere in the files of a table, laid one after another into memory.

The core reads rows of one size. So this module reads the blocks of elements that cover the runs,
and copies the runs from these. The blocks of a file begin with its first element. If the last
elements do not fill a block, one more block ends where the file ends, and overlaps the one
before it: no block goes beyond the file.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fremap.errors import StoreError

if TYPE_CHECKING:
    import numpy.typing as npt

    from fremap.rows import Rows

__all__ = ["Runs"]

# Bytes of a block: a fraction of what runs have, so that little is read beside them.
_LEAST_BLOCK_BYTES = 512
_MOST_BLOCK_BYTES = 8192
_BLOCKS_OF_A_RUN = 4
# Bytes of blocks that are read together.
_STAGED_BYTES = 8 << 20
# From so many elements a run on, a copy each costs less than a number for each element.
_LONG_RUN = 48


class _Pieces(NamedTuple):
    """Parts of runs, each within one file: its first element there, its length, its place."""

    run: npt.NDArray[np.int64]
    file: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]

    def chosen(self, which: npt.NDArray[np.bool_] | slice) -> _Pieces:
        return _Pieces(*(numbers[which] for numbers in self))


class _Level:
    """The files of which blocks of one size are read."""

    def __init__(self, table: Rows, files: npt.NDArray[np.int64], block: int) -> None:
        shards = []
        kind = table._kind  # noqa: SLF001 - made for it
        self.block = block
        self.element_bytes = kind.row_bytes
        # Of each file: its first block, and how many whole ones it has.
        self.base = np.zeros(len(table.shard_rows), np.int64)
        self.whole = np.zeros(len(table.shard_rows), np.int64)
        self.left = np.zeros(len(table.shard_rows), np.int64)
        count = 0
        for file in files.tolist():
            shard = table._shards[file]  # noqa: SLF001 - made for it
            whole, left = divmod(shard.row_count, block)
            self.base[file], self.whole[file], self.left[file] = count, whole, left
            shards.append(shard._replace(row_count=whole))
            if left:
                end = shard.data_offset + (shard.row_count - block) * self.element_bytes
                shards.append(shard._replace(data_offset=end, row_count=1))
            count += whole + bool(left)
        shape = kind.row_shape if block == 1 else (block, *kind.row_shape)
        self.rows = table._with(tuple(shards), kind._replace(row_shape=shape))  # noqa: SLF001

    def take(self, pieces: _Pieces, values: npt.NDArray[Any]) -> None:
        """Read pieces into their places in `values`, an item an element."""
        first = pieces.first // self.block
        blocks = (pieces.first + pieces.length - 1) // self.block - first + 1
        if self.block == 1 and int(pieces.length.sum()) == len(values):
            ids = ranges(self.base[pieces.file] + first, blocks)
            self._read(pieces, ids, np.cumsum(blocks) - blocks, values)
            return
        # Some at a time, so that memory that the blocks are copied from is still in caches.
        limit = max(1, _STAGED_BYTES // (self.block * self.element_bytes))
        group = (np.cumsum(blocks) - 1) // limit
        bounds = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
        totals = np.add.reduceat(blocks, bounds[:-1])
        staged = np.empty(int(totals.max()) * self.block, values.dtype)
        for begin, end in itertools.pairwise(bounds):
            part = slice(begin, end)
            self._take_some(pieces.chosen(part), first[part], blocks[part], staged, values)

    def _take_some(
        self,
        pieces: _Pieces,
        first: npt.NDArray[np.int64],
        blocks: npt.NDArray[np.int64],
        staged: npt.NDArray[Any],
        values: npt.NDArray[Any],
    ) -> None:
        block = self.block
        begins = np.cumsum(blocks) - blocks
        ids = ranges(self.base[pieces.file] + first, blocks)
        self._read(pieces, ids, begins, staged[: len(ids) * block])
        if block > 1:
            self._align_ends(pieces, first + blocks - 1, begins + blocks - 1, staged)
        source = begins * block + pieces.first - first * block
        copy_runs(staged, source, pieces.length, values, pieces.place)

    def _read(
        self,
        pieces: _Pieces,
        ids: npt.NDArray[np.int64],
        begins: npt.NDArray[np.int64],
        into: npt.NDArray[Any],
    ) -> None:
        try:
            self.rows.take(ids, into.view(np.uint8))
        except StoreError as error:
            # It names a block, and the caller has a run.
            block = error.row
            if block is not None:
                at = int(np.searchsorted(begins, np.flatnonzero(ids == block)[0], "right")) - 1
                error.row = int(pieces.run[at])
                error.strerror = str(error.strerror).replace(f"row {block}:", f"row {error.row}:")
            raise

    def _align_ends(
        self,
        pieces: _Pieces,
        last: npt.NDArray[np.int64],
        staged_at: npt.NDArray[np.int64],
        staged: npt.NDArray[Any],
    ) -> None:
        """Move what the blocks at the ends of files have behind the last whole one to the front."""
        ends = np.flatnonzero(last == self.whole[pieces.file])
        for at in ends.tolist():
            left = int(self.left[pieces.file[at]])
            begin = int(staged_at[at]) * self.block
            end = begin + self.block
            staged[begin : begin + left] = staged[end - left : end].copy()


class Runs:
    """Runs of the elements of a table, by their first element and their number.

    Parameters
    ----------
    table : Rows
        The elements, one a row.
    mean_count : float
        How many elements a run has.
    """

    __slots__ = ("_bases", "_item", "_levels", "_of_level")

    def __init__(self, table: Rows, mean_count: float) -> None:
        element_bytes = max(table.row_bytes, 1)
        wanted = mean_count * element_bytes / _BLOCKS_OF_A_RUN
        block_bytes = min(max(wanted, _LEAST_BLOCK_BYTES), _MOST_BLOCK_BYTES)
        block = max(1, int(block_bytes) // element_bytes)
        counts = table.shard_rows
        self._bases = np.concatenate([[0], np.cumsum(counts)])
        # Files that are shorter than a block are read element by element.
        short = counts < block
        self._of_level = np.where(short, 1, 0)
        self._levels: list[_Level | None] = [
            _Level(table, np.flatnonzero(short == level), size)
            if (short == level).any() or level == 0
            else None
            for level, size in ((False, block), (True, 1))
        ]
        self._item = element_item(table.row_bytes)

    @property
    def rows(self) -> list[Rows]:
        """What reads: of files that are long enough, and of the others if there are any."""
        return [level.rows for level in self._levels if level is not None]

    def take(
        self,
        names: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        values: npt.NDArray[np.uint8],
    ) -> None:
        """Read runs into `values`: run i to element ``places[i]``.

        Parameters
        ----------
        names, starts, counts, places : ndarray of int64
            What errors call each run, its first element through all files, how many it has, and
            where they go.
        values : ndarray of uint8
            The memory, of all elements together.
        """
        items = values.view(self._item)
        some = counts > 0
        pieces = self._pieces(names[some], starts[some], counts[some], places[some])
        for number, level in enumerate(self._levels):
            mine = self._of_level[pieces.file] == number
            if level is not None and mine.any():
                level.take(pieces.chosen(mine), items)

    def _pieces(
        self,
        names: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
    ) -> _Pieces:
        """Cut runs at the ends of files."""
        bases = self._bases
        first = np.searchsorted(bases, starts, "right") - 1
        last = np.searchsorted(bases, starts + counts, "left") - 1
        files = last - first + 1
        if (files == 1).all():
            return _Pieces(names, first, starts - bases[first], counts, places)
        file = ranges(first, files)
        run = np.repeat(np.arange(len(starts)), files)
        begin = np.maximum(starts[run], bases[file])
        end = np.minimum((starts + counts)[run], bases[file + 1])
        places = places[run] + begin - starts[run]
        return _Pieces(names[run], file, begin - bases[file], end - begin, places)


def ranges(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return ``start, start + 1 ...`` of each run, one after another.

    Examples
    --------
    >>> ranges(np.array([7, 2]), np.array([3, 1])).tolist()
    [7, 8, 9, 2]
    """
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def element_item(element_bytes: int) -> np.dtype[Any]:
    """Return a dtype of as many bytes, which NumPy copies fast if it can be."""
    return np.dtype(f"u{element_bytes}" if element_bytes in (1, 2, 4, 8) else f"V{element_bytes}")


def copy_runs(
    source: npt.NDArray[Any],
    begins: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    target: npt.NDArray[Any],
    places: npt.NDArray[np.int64],
) -> None:
    """Copy runs of items from `begins` in one array to `places` in another."""
    if counts.sum() < _LONG_RUN * len(counts):
        target[ranges(places, counts)] = source[ranges(begins, counts)]
        return
    for begin, count, place in zip(begins.tolist(), counts.tolist(), places.tolist(), strict=True):
        target[place : place + count] = source[begin : begin + count]
