"""List the arrays in a file or a checkpoint: names, types, shapes, and where they are.

FILE is a path or a URL: a file, a folder of .safetensors files, or their index. Only headers are
read. Rows are counted as `fremap.rows` counts them.
"""

import argparse
from typing import NamedTuple

from fremap.cli.report import Json, columns, print_json, show, size, thousands
from fremap.formats import Description, Header, arrow, hdf5, megatron, npy, safetensors, told_format
from fremap.formats.table import shown
from fremap.sources import Fetched, Opened, named_files

# The longest name that is printed whole: every line is as wide as the longest one.
_MAX_NAME = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap inspect``."""
    parser.add_argument("file", metavar="FILE")


class Contents(NamedTuple):
    """What is in one file."""

    path: str
    format: str
    size: int
    arrays: list[Description]


def contents(source: str) -> list[Contents]:
    """Return what is in each file that `source` names, and in those that an index names."""
    found = []
    fetched = Fetched()
    try:
        waiting = [*named_files(source, fetched).files]
        for file in waiting:
            with Opened(file, "inspect") as opened:
                header = opened.header
                kind, arrays = arrays_of(header)
                found.append(Contents(header.name, kind, header.size, arrays))
                if kind == "index":
                    waiting += [fetched.beside(file, name) for name in safetensors.indexed(header)]
    finally:
        fetched.close()
    return found


def arrays_of(header: Header) -> tuple[str, list[Description]]:
    """Return the format of a file, and the arrays in it."""
    front = header.read(0, min(header.size, len(megatron.MAGIC)))
    if front.startswith(megatron.MAGIC):
        return "megatron", [sequences(megatron.index(header))]
    if front.startswith(hdf5.MAGIC):
        if header.fetch is not None:
            raise header.wrong("h5py does not read HDF5 files by their pages; download it")
        return "hdf5", hdf5.described(header.name)
    kind = told_format(header, None, typed=False, offset=0)
    if kind == "npy":
        return kind, [npy.description(header)]
    if kind == "safetensors":
        return kind, safetensors.described(header)
    return kind, arrow.described(header) if kind == "arrow" else []


def sequences(index: megatron.Index) -> Description:
    """Return the sequences of an index of Megatron's: rows of unequal length, in the ``.bin``."""
    size = int(index.lengths.sum()) * index.dtype.itemsize
    return Description("sequences", index.dtype.name, (len(index.lengths),), None, size)


def row_count(array: Description) -> int | None:
    """Return how many rows an array has; None where it has no axis."""
    return array.shape[0] if array.shape else None


def row_bytes(array: Description) -> int | None:
    """Return the bytes of a row; None where rows have no one size."""
    rows = row_count(array)
    return array.data_bytes // rows if rows and array.data_offset is not None else None


def described(array: Description) -> Json:
    """Return what is known of an array, as for JSON."""
    rows = row_count(array)
    return {
        "name": array.name,
        "dtype": array.dtype_name,
        "shape": list(array.shape),
        "rows": rows,
        "row_bytes": row_bytes(array),
        "offset": array.data_offset,
        "bytes": array.data_bytes,
    }


def _name(name: str) -> str:
    """Return a name from a file as it is, or where a terminal cannot show that, quoted and cut."""
    return name if name.isprintable() and len(name) <= _MAX_NAME else shown(name)


def lines(array: Description) -> tuple[str, ...]:
    """Return an array as the cells of a line."""
    rows, of_row = row_count(array), row_bytes(array)
    return (
        _name(array.name) or "(array)",
        _name(array.dtype_name),
        str(array.shape),
        "" if rows is None else thousands(rows),
        "" if of_row is None else f"{thousands(of_row)} bytes",
        "" if array.data_offset is None else thousands(array.data_offset),
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    found = contents(arguments.file)
    if arguments.json:
        print_json(
            {
                "files": [
                    {
                        "file": file.path,
                        "format": file.format,
                        "bytes": file.size,
                        "arrays": [described(array) for array in file.arrays],
                    }
                    for file in found
                ]
            }
        )
        return 0
    for file in found:
        show(f"{file.path}: {file.format}, {size(file.size)}")
        if file.arrays:
            head = ("name", "type", "shape", "rows", "a row", "at byte")
            show(columns([head, *map(lines, file.arrays)], right=(3, 4, 5)))
    return 0
