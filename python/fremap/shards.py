"""Which files rows lie in, and where: what is found out before any row is read."""

from __future__ import annotations

import math
import os
import stat
from io import FileIO
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, TypeAlias

from fremap import formats
from fremap.arguments import absolute_path, quantity
from fremap.errors import ArgumentError, ArgumentTypeError, FormatError, StoreError
from fremap.errors import _system as system_error
from fremap.formats import MAX_AXES, Header, Table
from fremap.stores import FileStore, Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

    import numpy as np

PathLike: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"
RowsSource: TypeAlias = "PathLike | Store | Sequence[PathLike | Store]"


class Shard(NamedTuple):
    """A file and where its rows lie; `identity` is (device, inode), of a store nothing."""

    file: str | bytes | Store
    identity: tuple[int, int]
    size: int
    data_offset: int
    row_count: int


class Kind(NamedTuple):
    """What all rows are."""

    dtype: np.dtype[Any]
    dtype_name: str
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize


class Asked(NamedTuple):
    """What a caller says of the rows."""

    dtype: np.dtype[Any] | None
    row_shape: tuple[int, ...] | None
    offset: int
    tensor: str | None


def found_again(shard: Shard) -> Shard:
    """Return a shard as it is here, which may be another machine."""
    if isinstance(shard.file, Store):
        return shard
    try:
        facts = os.stat(shard.file)
    except OSError as error:
        raise _store_error(error, shard.file) from error
    if facts.st_size != shard.size:
        raise FormatError(
            f"rows: {name_of(shard.file)} has {facts.st_size} bytes, and had {shard.size} where "
            "these rows come from: it is another file"
        )
    return shard._replace(identity=(facts.st_dev, facts.st_ino))


def named_files(source: RowsSource) -> list[str | bytes | Store]:
    """Return the files of a source, their paths absolute."""
    many = isinstance(source, list | tuple)
    files: Iterable[Any] = source if many else [source]  # type: ignore[assignment]
    found: list[str | bytes | Store] = []
    for file in files:
        if isinstance(file, Store):
            found.append(file)
        elif isinstance(file, str | bytes | os.PathLike):
            found.append(absolute_path("rows", file))
        else:
            raise ArgumentTypeError(
                f"rows: a source is a path, a store or a list of these, not {type(file).__name__}"
            )
    if not found:
        raise ArgumentError("rows: an empty list of files has no rows")
    return found


def name_of(file: str | bytes | Store) -> str:
    """Return how messages call a file."""
    if isinstance(file, Store):
        return repr(file) if _path(file) is None else os.fsdecode(file.path)  # type: ignore[attr-defined]
    return os.fsdecode(file)


def _path(file: str | bytes | Store) -> str | None:
    if isinstance(file, Store):
        path = file.path if isinstance(file, FileStore) else None
        return None if path is None else os.fsdecode(path)
    return os.fsdecode(file)


def checked_shape(row_shape: SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
    """Return the shape of a row as a caller gives it."""
    lengths = (row_shape,) if hasattr(row_shape, "__index__") else tuple(row_shape)
    if len(lengths) >= MAX_AXES:
        raise ArgumentError(
            f"rows: row_shape has {len(lengths)} axes; NumPy has {MAX_AXES} at most, that of the "
            "rows among them"
        )
    return tuple(quantity("rows: row_shape", length) for length in lengths)


def _store_error(error: OSError, file: str | bytes) -> StoreError:
    text = f"rows: {os.strerror(error.errno or 0)}"
    made = system_error("io", text, error.errno or 0, os.fsencode(file), None, 0)
    assert isinstance(made, StoreError)  # noqa: S101 - of the kind "io"; tells mypy
    return made


def look(file: str | bytes | Store, asked: Asked) -> tuple[Shard, Kind]:
    """Find out where the rows of a file lie."""
    if isinstance(file, Store):
        header = Header(file.fileno(), name_of(file), file.size)
        return _shard(file, (0, 0), header, asked)
    name = os.fsdecode(file)
    if name.lower().endswith(formats.INDEX_SUFFIX):
        with _Opened(file) as index:
            tensor, name = formats.shard_of(index.header, asked.tensor)
        return look(name, asked._replace(tensor=tensor))
    with _Opened(file) as opened:
        return _shard(file, opened.identity, opened.header, asked)


class _Opened:
    """A file that is open while its header is read."""

    def __init__(self, file: str | bytes) -> None:
        self._file = file
        self._open: FileIO | None = None

    def __enter__(self) -> Self:
        try:
            # Opening a pipe by mistake must not wait for somebody who writes to it.
            regular = stat.S_ISREG(os.stat(self._file).st_mode)
            # An object, which is closed also where a signal handler raises before it is kept.
            self._open = FileIO(self._file) if regular else None
        except OSError as error:
            raise _store_error(error, self._file) from error
        except ValueError as error:  # a byte that no path has
            raise ArgumentError(f"rows: {self._file!r} is no path: {error}") from error
        name = os.fsdecode(self._file)
        if self._open is None:
            raise ArgumentError(
                f"rows: {name} is no ordinary file; a block device can be given as a store "
                "(fremap.open)"
            )
        facts = os.fstat(self._open.fileno())
        self.header = Header(self._open.fileno(), name, facts.st_size)
        self.identity = (facts.st_dev, facts.st_ino)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open is not None:
            self._open.close()


def _shard(
    file: str | bytes | Store, identity: tuple[int, int], header: Header, asked: Asked
) -> tuple[Shard, Kind]:
    read = formats.reader(_path(file) or "")
    if read is None:
        kind, row_count = _raw(header, asked)
        data_offset = asked.offset
    else:
        table = read(header, asked.tensor)
        kind = _checked_kind(header, table, asked)
        row_count, data_offset = table.shape[0], table.data_offset
    return Shard(file, identity, header.size, data_offset, row_count), kind


def _raw(header: Header, asked: Asked) -> tuple[Kind, int]:
    """Return what rows of raw bytes are, and how many there are."""
    if asked.tensor is not None:
        raise header.wrong(f"raw bytes have no tensor named {asked.tensor!r}")
    if asked.dtype is None:
        raise ArgumentError(f"rows: {header.name} is raw bytes: say what they are by dtype=")
    kind = Kind(header.checked_dtype(asked.dtype), asked.dtype.name, asked.row_shape or ())
    data_bytes = header.size - asked.offset
    if data_bytes < 0:
        raise header.wrong(f"offset is {asked.offset}, the file has {header.size} bytes")
    if kind.row_bytes == 0:
        raise ArgumentError(f"rows: raw rows of shape {kind.row_shape} have no bytes to count by")
    if data_bytes % kind.row_bytes:
        raise header.wrong(
            f"{data_bytes} bytes from byte {asked.offset} on are no whole number of rows of "
            f"{kind.row_bytes} bytes"
        )
    return kind, data_bytes // kind.row_bytes


def _checked_kind(header: Header, table: Table, asked: Asked) -> Kind:
    """Return what the rows of a table are, if that is what the caller says."""
    kind = Kind(table.dtype, table.dtype_name, table.shape[1:])
    if asked.offset:
        raise ArgumentError(f"rows: offset= is for raw bytes; {header.name} has a header")
    if asked.row_shape is not None and asked.row_shape != kind.row_shape:
        raise ArgumentError(
            f"rows: {header.name} has rows of shape {kind.row_shape}, not {asked.row_shape}"
        )
    if asked.dtype is None or asked.dtype == kind.dtype:
        return kind
    # A type of somebody's own for what NumPy does not have.
    if kind.dtype_name != kind.dtype.name and asked.dtype.itemsize == kind.dtype.itemsize:
        return kind._replace(dtype=header.checked_dtype(asked.dtype))
    raise ArgumentError(f"rows: {header.name} holds {kind.dtype_name}, not {asked.dtype}")
