"""Finding where rows lie in the files of a source, before any row is read."""

from __future__ import annotations

import math
import os
import stat
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from fremap.arguments import quantity
from fremap.dtypes import MAX_AXES, ElementType
from fremap.errors import ArgumentError, FormatError
from fremap.formats import (
    Format,
    Header,
    Names,
    Table,
    arrow,
    hdf5,
    is_surely_raw,
    npy,
    safetensors,
    told_format,
)
from fremap.formats.naming import some_names
from fremap.sources import (
    Fetched,
    Opened,
    is_dataset,
    looked_at,
    name_of,
    named_files,
    store_error,
)
from fremap.sources import look as look_at
from fremap.stores import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from fremap.sources import File, Files, Looked, RowsSource

__all__ = ["Kind", "RowsSpec", "Shard", "checked_offsets", "checked_shape", "found_again", "look"]


class Shard(NamedTuple):
    """A file and where its rows lie; `identity` is (device, inode, birth), of a store zeros."""

    file: str | bytes | Store
    identity: tuple[int, int, int]
    size: int
    data_offset: int
    row_count: int


class Kind(NamedTuple):
    """What all rows are."""

    element: ElementType
    row_shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """What arrays of rows have."""
        return self.element.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.element.dtype.itemsize


class RowsSpec(NamedTuple):
    """What a caller says of the rows."""

    element: ElementType | None
    row_shape: tuple[int, ...] | None
    offsets: int | tuple[int, ...]
    names: Names
    format: Format | None
    column: str | None


class _Piece(NamedTuple):
    """Some rows, what they are, and the tensor that they are, if it has a name.

    `begin` is what their file begins with up to the rows, where that and its size alone say what
    is in it; empty for raw bytes.
    """

    shard: Shard
    kind: Kind
    tensor: str = ""
    begin: bytes | None = None

    @property
    def name(self) -> str:
        """What messages call the rows."""
        name = name_of(self.shard.file)
        return f"{name}: tensor {self.tensor!r}" if self.tensor else name


def look(source: RowsSource, spec: RowsSpec) -> tuple[tuple[Shard, ...], Kind, tuple[Store, ...]]:
    """Find out where the rows of a source lie, and what they are; and what was opened for it."""
    fetched = Fetched()
    try:
        pieces = _all_pieces(source, spec, fetched)
    except BaseException:
        fetched.close()
        raise
    shards = tuple(piece.shard for piece in pieces)
    if fetched.stores:
        fetched.close(but=[shard.file for shard in shards])  # an index has no rows itself
    return shards, pieces[0].kind, tuple(fetched.stores)


def _all_pieces(source: RowsSource, spec: RowsSpec, fetched: Fetched) -> list[_Piece]:
    """Find the rows of a source, which must be alike."""
    found = named_files(source, fetched)
    if found.together or spec.names.many:
        pieces = _together(found, spec, fetched)
    else:
        pieces = _one_by_one(found, spec, fetched)
    first = pieces[0]
    for piece in pieces:
        if piece.kind is not first.kind and piece.kind != first.kind:
            raise ArgumentError(
                f"rows: {piece.name} has rows of {piece.kind.element.name} "
                f"{piece.kind.row_shape}, {first.name} of {first.kind.element.name} "
                f"{first.kind.row_shape}; all must be alike"
            )
    return pieces


def _one_by_one(found: Files, spec: RowsSpec, fetched: Fetched) -> list[_Piece]:
    """Find the rows of files each of which has some."""
    pieces: list[_Piece] = []
    offsets = _each_offset(found, spec)
    unread = is_surely_raw("", spec.format, min(offsets))
    before = -1
    each = zip(looked_at(found.files, unread=unread), offsets, strict=True)
    for (file, looked), offset in each:
        same = _alike(pieces[-1], file, looked, spec, offset) if offset == before else None
        if same is not None:
            pieces.append(same)
        else:
            pieces.extend(_pieces(Opened(file, "rows", looked), offset, spec, fetched))
        before = offset
    return pieces


def _alike(
    one: _Piece, file: File, looked: Looked | int | None, spec: RowsSpec, offset: int
) -> _Piece | None:
    """Return the rows of a file that begins like that of others, and is as long.

    Of ten thousand files, each that is taken apart by itself costs five times as much.
    """
    if one.begin is None or isinstance(file, Store) or not isinstance(looked, tuple):
        return None
    mode, device, inode, born, size, front = looked
    _, _, wanted, data_offset, row_count = one.shard
    if size != wanted or not front.startswith(one.begin) or not stat.S_ISREG(mode):
        return None
    if not one.begin and not is_surely_raw(os.fsdecode(file), spec.format, offset, front):
        return None
    shard = Shard(file, (device, inode, born), size, data_offset, row_count)
    return _Piece(shard, one.kind, one.tensor, one.begin)


def found_again(shard: Shard) -> Shard:
    """Return a shard as it is here, which may be another machine."""
    if isinstance(shard.file, Store):
        return shard
    looked = look_at(shard.file)
    if isinstance(looked, int):
        raise store_error(OSError(looked, os.strerror(looked)), shard.file)
    _, device, inode, born, size, _ = looked
    if size != shard.size:
        raise FormatError(
            f"rows: {name_of(shard.file)} has {size} bytes, and had {shard.size} where "
            "these rows come from: it is another file"
        )
    return shard._replace(identity=(device, inode, born))


def checked_shape(row_shape: SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
    """Return the shape of a row as a caller gives it."""
    lengths = (row_shape,) if hasattr(row_shape, "__index__") else tuple(row_shape)
    if len(lengths) >= MAX_AXES:
        raise ArgumentError(
            f"rows: row_shape has {len(lengths)} axes; NumPy has {MAX_AXES} at most, that of the "
            "rows among them"
        )
    return tuple(quantity("rows: row_shape", length) for length in lengths)


def checked_offsets(offset: SupportsIndex | Sequence[SupportsIndex]) -> int | tuple[int, ...]:
    """Return where rows begin as a caller gives it: in all files alike, or in each."""
    if isinstance(offset, list | tuple) or getattr(offset, "ndim", 0) == 1:
        return tuple(quantity("rows: offset", one) for one in offset)  # type: ignore[union-attr]
    return quantity("rows: offset", offset)  # type: ignore[arg-type]


def _each_offset(found: Files, spec: RowsSpec) -> tuple[int, ...]:
    offsets = spec.offsets
    if isinstance(offsets, int):
        return (offsets,) * len(found.files)
    if len(offsets) != len(found.files):
        raise ArgumentError(
            f"rows: {len(offsets)} offsets for {len(found.files)} files; give one for all, or one "
            "for each"
        )
    return offsets


def _piece(opened: Opened, table: Table, spec: RowsSpec, offset: int = 0) -> _Piece:
    """Return where the rows of a table lie, if they are what the caller says."""
    header = opened.header
    kind = _checked_kind(header, table, spec, offset)
    shard = Shard(opened.file, opened.identity, header.size, table.data_offset, table.shape[0])
    return _Piece(shard, kind, table.name)


def _pieces(opening: Opened, offset: int, spec: RowsSpec, fetched: Fetched) -> Iterator[_Piece]:
    """Find the rows of one file, in which there is one table only or one that is named."""
    file = opening.file
    if is_dataset(file):
        if not spec.names.any or spec.column is not None:
            raise ArgumentError(
                f"rows: {name_of(file)} is one array; tensor= and column= name none"
            )
        path, table = hdf5.located(file)
        with Opened(path) as opened:
            yield _piece(opened, opened.header.check_data(table), spec, offset)
        return
    with opening as opened:
        header = opened.header
        found = told_format(header, spec.format, typed=spec.element is not None, offset=offset)
        if spec.column is not None:
            if found not in ("raw", "arrow"):
                raise header.wrong("it is not an Arrow file, and has no columns")
            found = "arrow"  # a stream does not say so itself
        if not spec.names.any and found not in ("safetensors", "index"):
            what = {"npy": "an .npy file", "arrow": "an Arrow file", "raw": "raw bytes"}[found]
            raise header.wrong(f"{what} has no tensor named {spec.names.exact[0]!r}")
        if found == "raw":
            yield _raw(opened, offset, spec)
        elif found == "index":
            ((tensor, name),) = safetensors.index(header, spec.names).items()
            yield from _of_file(fetched.beside(opened.file, name), [tensor], spec)
        else:
            for table in _tables(found, header, spec):
                piece = _piece(opened, table, spec, offset)
                # Its content says so, whatever the file is called.
                header_bytes = _header_bytes(found, table, header)
                if spec.format is None and 0 < header_bytes <= len(header.front):
                    piece = piece._replace(begin=header.front[:header_bytes])
                yield piece


def _header_bytes(found: str, table: Table, header: Header) -> int:
    """Return how many bytes a file begins with that say all of what is in it; 0 if none do."""
    if found == "safetensors":
        return safetensors.header_bytes(header)
    return table.data_offset if found == "npy" else 0


def _tables(found: str, header: Header, spec: RowsSpec) -> list[Table]:
    """Return where in a file that knows what is in it the rows are."""
    if found == "npy":
        return [npy.table(header)]
    if found == "arrow":
        return arrow.tables(header, spec.column)
    return safetensors.tables(header, spec.names)


def _together(found: Files, spec: RowsSpec, fetched: Fetched) -> list[_Piece]:
    """Find tensors in many files; each tensor is in one of them."""
    names = spec.names
    places: dict[str, list[str]] = {}
    pieces: dict[str, _Piece] = {}
    by_path: dict[str, list[str]] = {}
    files: dict[str, File] = {}
    offsets = _each_offset(found, spec)
    for (file, looked), offset in zip(looked_at(found.files), offsets, strict=True):
        if is_dataset(file):
            raise ArgumentError(f"rows: {name_of(file)} is one array, and has no tensors by name")
        with Opened(file, "rows", looked) as opened:
            header = opened.header
            kind = told_format(header, spec.format, typed=True, offset=offset)
            if kind == "index":
                for name, beside in safetensors.index(header, names).items():
                    shard_file = fetched.beside(opened.file, beside)
                    path = name_of(shard_file)
                    files[path] = shard_file
                    places.setdefault(name, []).append(path)
                    by_path.setdefault(path, []).append(name)
            elif kind != "safetensors":
                raise header.wrong("it is not a safetensors file, and has no tensors by name")
            elif names.any:
                files[header.name] = opened.file
                for tensor in safetensors.described(header):
                    by_path.setdefault(header.name, []).append(tensor.name)
            else:
                for table in safetensors.tables(header, names._replace(many=True)):
                    places.setdefault(table.name, []).append(header.name)
                    pieces[table.name] = _piece(opened, table, spec, offset)
    if names.any:
        every = [(path, name) for path, within in by_path.items() for name in within]
        if len(every) != 1:
            raise FormatError(
                f"rows: {found.name} has {len(every)} tensors; choose one by tensor=: "
                f"{some_names(name for _, name in every)}"
            )
        return _of_file(files[every[0][0]], [every[0][1]], spec)
    order = names.in_order(places, found.name)
    for path, held in by_path.items():
        pieces.update(zip(held, _of_file(files[path], held, spec), strict=True))
    return [pieces[name] for name in order]


def _of_file(file: File, held: list[str], spec: RowsSpec) -> list[_Piece]:
    """Find the tensors of a file that an index names, in that order."""
    with Opened(file) as opened:
        tables = {
            table.name: table
            for table in safetensors.tables(opened.header, Names(tuple(held), many=True))
        }
        missing = [name for name in held if name not in tables]
        if missing:
            raise opened.header.wrong(
                f"it has no tensor {some_names(missing)}, which the index says it has"
            )
        return [_piece(opened, tables[name], spec) for name in held]


def _raw(opened: Opened, offset: int, spec: RowsSpec) -> _Piece:
    """Return what rows of raw bytes are, and how many there are."""
    header = opened.header
    if spec.element is None:
        raise ArgumentError(f"rows: {header.name} is raw bytes; pass dtype= to say what they are")
    header.checked_dtype(spec.element.dtype)
    kind = Kind(spec.element, spec.row_shape or ())
    data_bytes = header.size - offset
    if data_bytes < 0:
        raise header.wrong(f"offset is {offset}, the file has {header.size} bytes")
    if kind.row_bytes == 0:
        raise ArgumentError(f"rows: raw rows of shape {kind.row_shape} have no bytes to count by")
    if data_bytes % kind.row_bytes:
        raise header.wrong(
            f"{data_bytes} bytes from byte {offset} on are not a whole number of rows of "
            f"{kind.row_bytes} bytes"
        )
    count = data_bytes // kind.row_bytes
    shard = Shard(opened.file, opened.identity, header.size, offset, count)
    return _Piece(shard, kind, begin=b"")


def _checked_kind(header: Header, table: Table, spec: RowsSpec, offset: int) -> Kind:
    """Return what the rows of a table are, if that is what the caller says."""
    if offset:
        raise ArgumentError(
            f'rows: offset= is for raw bytes; {header.name} has a header (format="raw" reads it '
            "as raw bytes)"
        )
    element = ElementType(table.dtype, table.dtype_name, table.dtype)
    row_shape = table.shape[1:]
    if spec.row_shape is not None and spec.row_shape != row_shape:
        raise ArgumentError(
            f"rows: {header.name} has rows of shape {row_shape}, not {spec.row_shape}"
        )
    said = element if spec.element is None else element.said(spec.element)
    if said is None:
        assert spec.element is not None  # noqa: S101 - or it were `element`; tells mypy
        held = element.name if element.dtype.isbuiltin == 1 else element.dtype
        raise ArgumentError(f"rows: {header.name} holds {held}, not {spec.element.shown}")
    header.checked_dtype(said.dtype)
    return Kind(said, row_shape)
