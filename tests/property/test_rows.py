"""Rows are those of NumPy, bit for bit: any type, shape, ids, shards and offset."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

pytestmark = pytest.mark.any_user

DTYPES = st.one_of(
    arrays_of.boolean_dtypes(),
    arrays_of.integer_dtypes(endianness="?"),
    arrays_of.floating_dtypes(endianness="?"),
    arrays_of.complex_number_dtypes(endianness="?"),
    arrays_of.datetime64_dtypes(endianness="?"),
    arrays_of.byte_string_dtypes(max_len=70),
    arrays_of.array_dtypes(arrays_of.integer_dtypes(), max_size=3, allow_subarrays=False),
)
ROW_SHAPES = arrays_of.array_shapes(min_dims=0, max_dims=3, max_side=9)
SAFE = {"bool", "int8", "uint8", "int64", "uint16", "float16", "float32", "float64"}


def content(row_count: int, dtype: np.dtype, row_shape: tuple[int, ...], seed: int) -> np.ndarray:
    row_bytes = int(np.prod(row_shape, dtype=int)) * dtype.itemsize
    noise = np.random.default_rng(seed).integers(0, 256, row_count * row_bytes, dtype=np.uint8)
    if dtype.kind == "b":
        noise &= 1
    return np.frombuffer(noise.tobytes(), dtype).reshape(row_count, *row_shape)


def same(taken: Any, expected: np.ndarray) -> bool:
    return (
        taken.dtype == expected.dtype
        and taken.shape == expected.shape
        and taken.tobytes() == expected.tobytes()
    )


def indexes(row_count: int) -> st.SearchStrategy[Any]:
    """All that chooses rows of an array."""
    ids = st.integers(-row_count, row_count - 1)
    return st.one_of(
        ids,
        st.slices(row_count),
        st.lists(ids, max_size=60).map(lambda chosen: np.array(chosen, dtype=np.int64)),
        arrays_of.arrays(
            arrays_of.integer_dtypes(sizes=(16, 32, 64)),
            arrays_of.array_shapes(min_dims=1, max_dims=3, max_side=6),
            elements=ids,
        ),
        arrays_of.arrays(np.bool_, row_count),
    )


@st.composite
def places(draw: st.DrawFn) -> tuple[np.ndarray, list[int], str]:
    """A table, the row counts of the files it is in, and what kind these are."""
    dtype, row_shape = np.dtype(draw(DTYPES)), draw(ROW_SHAPES)
    counts = draw(st.lists(st.integers(0, 80), min_size=1, max_size=6).filter(sum))
    kind = draw(st.sampled_from(["raw", "npy", "safetensors"]))
    table = content(sum(counts), dtype, row_shape, draw(st.integers(0, 99)))
    if kind == "safetensors" and (dtype.name not in SAFE or not dtype.isnative):
        kind = "npy"
    return table, counts, kind


def write(folder: Path, table: np.ndarray, counts: list[int], kind: str, offset: int) -> list[str]:
    paths = []
    for number, end in enumerate(np.cumsum(counts)):
        part = table[end - counts[number] : end]
        path = folder / f"{number}.{kind}"
        if kind == "npy":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # names that need format 3.0
                np.save(path, part)
        elif kind == "safetensors":
            safetensors.numpy.save_file({"t": part, "u": part[:1]}, path)
        else:
            path.write_bytes(os.urandom(offset) + part.tobytes())
        paths.append(str(path))
    return paths


@given(place=places(), offset=st.integers(0, 9000), data=st.data())
def test_any_table(place: tuple[np.ndarray, list[int], str], offset: int, data: Any) -> None:
    table, counts, kind = place
    with tempfile.TemporaryDirectory(prefix="fremap-") as folder:
        paths = write(Path(folder), table, counts, kind, offset)
        arguments: dict[str, Any] = {}
        if kind == "raw":
            arguments = {"dtype": table.dtype, "row_shape": table.shape[1:], "offset": offset}
        elif kind == "safetensors":
            arguments = {"tensor": "t"}
        with fremap.rows(paths, **arguments) as rows:
            assert rows.shape == table.shape
            for _ in range(2):
                index = data.draw(indexes(len(table)))
                assert same(np.asarray(rows[index]), np.asarray(table[index]))
                # The second time of what is in the page cache rows are copied.
                rows.take(np.arange(len(table)).repeat(16))
                if not (isinstance(index, np.ndarray) and index.dtype == np.bool_):
                    # By lists alone NumPy keeps the byte order of single numbers.
                    expected = (
                        table[np.asarray([index])] if isinstance(index, int) else table[index]
                    )
                    out = np.empty(table[index].shape, table.dtype)
                    assert rows.take(index, out=out) is out
                    assert out.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A file of several chunks, into which rows of any size can be laid."""
    path = tmp_path_factory.mktemp("rows") / "large.bin"
    noise = np.random.default_rng(11).integers(0, 256, 9 << 20, dtype=np.uint8)
    noise.tofile(path)
    return path, noise


@given(
    row_bytes=st.one_of(
        st.integers(1, 200), st.sampled_from([511, 512, 513, 2047, 2048, 2049, 4096, 65536])
    ),
    offset=st.integers(0, 5000),
    seed=st.integers(0, 1000),
    count=st.integers(1, 600),
    cold=st.booleans(),
)
def test_any_row_size(
    large: tuple[Path, np.ndarray], row_bytes: int, offset: int, seed: int, count: int, cold: bool
) -> None:
    """Rows across pages and chunks, read, copied, and some of both."""
    path, noise = large
    row_count = (len(noise) - offset) // row_bytes
    offset = len(noise) - row_count * row_bytes
    table = noise[offset:].reshape(row_count, row_bytes)
    if cold:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, seed * 4096, 3 << 20, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    draw = np.random.default_rng(seed)
    with fremap.rows(path, np.uint8, row_bytes, offset=offset) as rows:
        for _ in range(4):
            ids = draw.integers(0, row_count, count)
            assert np.array_equal(rows.take(ids), table[ids])
            # A few chunks are read often, and mapped.
            near = draw.integers(0, max(1, row_count // 3), 300)
            assert np.array_equal(rows.take(near), table[near])
