"""Other containers of arrays, if they are installed: the same rows out of HDF5 and Zarr."""

import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from fremap.bench.harness import Report

# What is copied into a container that cannot be laid over the data file.
_MOST_COPIED_BYTES = 256 << 20
_CHUNK_BYTES = 64 << 10

Ids: TypeAlias = npt.NDArray[np.int64]
Bytes: TypeAlias = npt.NDArray[np.uint8]


class Container(ABC):
    """Rows in another container; leaving the context removes it."""

    module: ClassVar[str]
    name: ClassVar[str]
    # Rows are taken one at a time, each as slow as the one before: more tell no more.
    most_rows: ClassVar[int] = 1024

    def __init__(self, path: Path, offset: int, row_bytes: int) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fremap-bench-")
        self.row_count = (path.stat().st_size - offset) // row_bytes
        self.array: Any = None
        self._open(path, offset, row_bytes)

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why it cannot be measured, or None."""
        if importlib.util.find_spec(cls.module):
            return None
        return f"{cls.name}: {cls.module} is not installed (pip install {cls.module})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()
        self._directory.cleanup()

    @property
    def folder(self) -> Path:
        """Where it is."""
        return Path(self._directory.name)

    @abstractmethod
    def _open(self, path: Path, offset: int, row_bytes: int) -> None:
        """Make it hold the rows of a data file."""

    def _close(self) -> None:
        self.array = None

    @abstractmethod
    def drop(self) -> None:
        """Drop from the page cache what it holds in files of its own."""

    @abstractmethod
    def take(self, ids: Ids) -> Bytes:
        """Take rows, whose numbers rise."""

    def slice(self, first: int, count: int) -> Bytes:
        """Take rows that follow one another."""
        rows: Bytes = self.array[first : first + count]
        return rows


class Hdf5(Container):
    """A dataset of HDF5 laid over the data file itself (external storage)."""

    module = "h5py"
    name = "h5py dataset[ids]"

    def _open(self, path: Path, offset: int, row_bytes: int) -> None:
        import h5py  # type: ignore[import-not-found,import-untyped,unused-ignore]

        self._file = h5py.File(self.folder / "rows.h5", "w")
        size = self.row_count * row_bytes
        self.array = self._file.create_dataset(
            "rows",
            (self.row_count, row_bytes),
            np.uint8,
            external=[(str(path), offset, size)],
            efile_prefix="/",
        )

    def _close(self) -> None:
        super()._close()
        self._file.close()

    def drop(self) -> None:
        """Do nothing: its rows are in the data file."""

    def take(self, ids: Ids) -> Bytes:
        """Index the dataset."""
        rows: Bytes = self.array[ids]
        return rows

    def read_into(self, row: int, out: Bytes) -> None:
        """Read one row into memory that is there."""
        self.array.read_direct(out, np.s_[row])


class Zarr(Container):
    """An array of Zarr without compression, chunks of 64 KiB, of the front of the file."""

    module = "zarr"
    name = "zarr array[ids]"

    def _open(self, path: Path, offset: int, row_bytes: int) -> None:
        import zarr  # type: ignore[import-not-found,import-untyped,unused-ignore]

        self.row_count = min(self.row_count, _MOST_COPIED_BYTES // row_bytes)
        shape = (self.row_count, row_bytes)
        self.array = zarr.create_array(
            str(self.folder / "rows.zarr"),
            shape=shape,
            chunks=(_CHUNK_BYTES // row_bytes, row_bytes),
            dtype=np.uint8,
            compressors=None,
        )
        self.array[:] = np.memmap(path, np.uint8, mode="r", offset=offset, shape=shape)
        os.sync()  # what is not on disk yet is not dropped

    def drop(self) -> None:
        """Drop its chunks, each a file."""
        for file in self.folder.rglob("*"):
            if file.is_file():
                fd = os.open(file, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    def take(self, ids: Ids) -> Bytes:
        """Index the array along its first axis."""
        rows: Bytes = self.array.oindex[ids]
        return rows


def installed(report: Report) -> list[type[Container]]:
    """Return those that can be measured here; the report says why the others cannot."""
    found: list[type[Container]] = []
    for container in (Hdf5, Zarr):
        reason = container.unavailable()
        if reason is None:
            found.append(container)
        else:
            report.missing.append(reason)
    return found
