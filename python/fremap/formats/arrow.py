"""Columns of Arrow's files and streams, by pyarrow: where in the file the elements lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fremap.formats.naming import some_names
from fremap.formats.table import Description, Table, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from fremap.formats.table import Header

__all__ = ["MAGIC", "Lists", "described", "lists", "tables"]

#: What a file begins with; a stream has nothing of the kind.
MAGIC = b"ARROW1\0\0"


def tables(header: Header, column: str | None) -> list[Table]:
    """Return where a column lies, one table for each record batch.

    Parameters
    ----------
    header : Header
        The file.
    column : str or None
        The column; None if there is one only.

    Returns
    -------
    list of Table
        In the order of the file; a single one without rows if there are none.
    """
    schema, batches, base = _read(header)
    names = list(schema.names)
    name = _chosen(header, names, column)
    dtype, row_shape = _element(header, name, schema.field(name).type)
    found = []
    for batch in batches:
        if len(batch):
            offset = _place(header, name, batch.column(names.index(name)), dtype, base)
            found.append(Table(dtype, dtype.name, (len(batch), *row_shape), offset, name))
    return [header.check_data(table) for table in found] or [
        Table(dtype, dtype.name, (0, *row_shape), 0, name)
    ]


class Lists(NamedTuple):
    """Lists of unequal length in one record batch.

    Attributes
    ----------
    values : Table
        The elements of all lists, one after another.
    offsets : ndarray of int64
        Where each list begins in these, and behind the last where it ends.
    """

    values: Table
    offsets: npt.NDArray[np.int64]


def lists(header: Header, column: str | None) -> list[Lists]:
    """Return where the lists of a column lie, for each record batch.

    Parameters
    ----------
    header : Header
        The file.
    column : str or None
        The column; None if there is one only.

    Returns
    -------
    list of Lists
        In the order of the file.
    """
    schema, batches, base = _read(header)
    import pyarrow as pa

    name = _chosen(header, list(schema.names), column)
    kind = schema.field(name).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise header.wrong(
            f"column {shown(name)} is of type {kind}, which is not a list of unequal length"
        )
    dtype, shape = _element(header, name, kind.value_type)
    found = []
    for batch in batches:
        array = batch.column(schema.names.index(name))
        if array.null_count:
            raise header.wrong(f"column {shown(name)} has missing values (null); fill them first")
        if len(array):
            place = _place(header, name, array.values, dtype, base)
            values = Table(dtype, dtype.name, (len(array.values), *shape), place, name)
            offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
            found.append(Lists(header.check_data(values), offsets))
    return found or [Lists(Table(dtype, dtype.name, (0, *shape), 0, name), np.zeros(1, np.int64))]


def _chosen(header: Header, names: list[str], column: str | None) -> str:
    """Return the column that the caller wants."""
    if column is None and len(names) != 1:
        raise header.wrong(
            f"it has {len(names)} columns; choose one by column=: {some_names(names)}"
        )
    name = names[0] if column is None else column
    if names.count(name) != 1:
        raise header.wrong(f"it has no column {shown(name)}; it has {some_names(names)}")
    return name


def described(header: Header) -> list[Description]:
    """Return what the columns of a file are.

    Parameters
    ----------
    header : Header
        The file.

    Returns
    -------
    list of Description
        In their order; without places, as each record batch has its own.
    """
    schema, batches, _ = _read(header)
    every = list(batches)
    rows = sum(map(len, every))
    return [
        Description(
            field.name,
            str(field.type),
            (rows,),
            None,
            sum(batch.column(at).nbytes for batch in every),
        )
        for at, field in enumerate(schema)
    ]


def _read(header: Header) -> tuple[Any, Iterator[Any], int]:
    """Return the schema, the record batches, and the address at which the file is mapped."""
    try:
        import pyarrow as pa
        from pyarrow import ipc
    except ImportError:
        raise header.wrong("reading Arrow files needs pyarrow: pip install pyarrow") from None
    if header.fetch is not None:
        raise header.wrong("Arrow files can only be read on this machine; download it")
    try:
        mapped = pa.memory_map(f"/proc/self/fd/{header.fd}")
        base = mapped.read_buffer(1).address if header.size else 0
        mapped.seek(0)
        if header.read(0, min(header.size, len(MAGIC))) == MAGIC:
            file = ipc.open_file(mapped)
            batches = map(file.get_batch, range(file.num_record_batches))
            return file.schema, _each(header, batches), base
        stream = ipc.open_stream(mapped)
        return stream.schema, _each(header, iter(stream)), base
    except (pa.ArrowInvalid, OSError) as error:
        raise header.wrong(f"it is not an Arrow file or stream: {error}") from error


def _each(header: Header, batches: Iterator[Any]) -> Iterator[Any]:
    """Return record batches one by one; errors name this file."""
    import pyarrow as pa

    try:
        yield from batches
    except (pa.ArrowInvalid, OSError) as error:
        raise header.wrong(f"one of its record batches is damaged: {error}") from error


def _element(header: Header, name: str, kind: Any) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the type of the elements, and the shape of a row."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _element(header, name, kind.storage_type)
    if types.is_fixed_size_list(kind):
        dtype, shape = _element(header, name, kind.value_type)
        return dtype, (kind.list_size, *shape)
    if types.is_integer(kind) or types.is_floating(kind):
        return np.dtype(kind.to_pandas_dtype()), ()
    if types.is_timestamp(kind) or types.is_duration(kind):
        return np.dtype(f"{'M' if types.is_timestamp(kind) else 'm'}8[{kind.unit}]"), ()
    if types.is_fixed_size_binary(kind) and not types.is_decimal(kind):
        return np.dtype(f"V{kind.byte_width}"), ()
    raise header.wrong(
        f"column {shown(name)} is of type {kind}, whose rows do not all have the same size in "
        "bytes; cast it to numbers or to lists of a fixed size (pyarrow.list_(type, length)), or "
        "read lists of unequal length by fremap.ragged"
    )


def _place(header: Header, name: str, array: Any, dtype: np.dtype[Any], base: int) -> int:
    """Return the byte of the file where the elements of a column's part begin."""
    import pyarrow as pa

    before = 0
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if array.null_count:
            raise header.wrong(f"column {shown(name)} has missing values (null); fill them first")
        if not pa.types.is_fixed_size_list(array.type):
            break
        before = (before + array.offset) * array.type.list_size
        array = array.values
    buffer = array.buffers()[1]
    if buffer is None or not buffer.size:  # of rows without elements
        return 0
    begin = buffer.address - base
    if begin < 0 or begin + buffer.size > header.size:  # decompressed into other memory
        raise header.wrong(
            f"column {shown(name)} is compressed; write the file without compression"
        )
    return int(begin + (before + array.offset) * dtype.itemsize)
