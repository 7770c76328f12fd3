"""Other containers of arrays, if they are installed: the same rows out of HDF5 and Zarr."""

import importlib.util
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

# What is copied into a container that cannot be laid over the data file.
_MOST_COPIED_BYTES = 256 << 20
_CHUNK_BYTES = 64 << 10

Ids = npt.NDArray[np.int64]


class Container(ABC):
    """Rows in another container; leaving the context removes it."""

    module: ClassVar[str]
    name: ClassVar[str]
    most_rows: ClassVar[int]

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
        return f"{cls.name}: {cls.module} is not installed"

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
    def take(self, ids: Ids) -> object:
        """Take rows, whose numbers rise."""


class Hdf5(Container):
    """A dataset of HDF5 laid over the data file itself (external storage)."""

    module = "h5py"
    name = "h5py dataset[ids]"
    most_rows = 1024  # its selections cost a millisecond each, and more the more there are

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

    def take(self, ids: Ids) -> object:
        """Index the dataset."""
        return self.array[ids]


class Zarr(Container):
    """An array of Zarr without compression, chunks of 64 KiB, of the front of the file."""

    module = "zarr"
    name = "zarr array[ids]"
    most_rows = 1024

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

    def take(self, ids: Ids) -> object:
        """Index the array along its first axis."""
        return self.array.oindex[ids]


ALL: tuple[type[Container], ...] = (Hdf5, Zarr)
