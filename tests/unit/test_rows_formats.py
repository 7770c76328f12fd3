"""Files that know what is in them: each written by its own library, and each kind of damage."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
import safetensors.numpy
from fremap.dtypes import MAX_AXES
from fremap.errors import ArgumentError, FormatError, StoreError
from hypothesis import given
from hypothesis import strategies as some
from numpy.lib import format as npy_format

pytestmark = pytest.mark.any_user

TABLE = np.arange(24, dtype=np.float32).reshape(6, 4)


def write_npy(path: Path, array: np.ndarray, version: tuple[int, int]) -> Path:
    with path.open("wb") as file:
        if version == (3, 0):
            # NumPy chooses 3.0 itself, for names that latin-1 does not have.
            npy_format.write_array(file, array)
        else:
            npy_format.write_array(file, array, version=version)
    assert path.read_bytes()[6:8] == bytes(version)
    return path


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_npy(tmp_path: Path, version: tuple[int, int]) -> None:
    path = write_npy(tmp_path / "table.npy", TABLE, version)
    with fremap.rows(path) as rows:
        np.testing.assert_array_equal(rows[[5, 0]], TABLE[[5, 0]])
        assert rows.dtype == np.float32


def test_npy_of_version_3(tmp_path: Path) -> None:
    fields = np.zeros(5, dtype=[("größe", "<f4"), ("数", ">i2")])
    fields["数"] = range(5)
    with pytest.warns(UserWarning, match="format 3.0"):
        path = write_npy(tmp_path / "t.npy", fields, (3, 0))
    with fremap.rows(path) as rows:
        assert rows.dtype == fields.dtype
        np.testing.assert_array_equal(rows[::-1], fields[::-1])


@pytest.mark.parametrize(
    "dtype", ["?", "i1", ">i8", "<f2", ">f4", "<c16", "S7", "U3", "M8[s]", "m8[ns]", "V5", "3i4"]
)
def test_npy_of_each_type(tmp_path: Path, dtype: str) -> None:
    array = np.frombuffer(np.random.default_rng(1).bytes(4096), np.uint8)
    item = np.dtype(dtype).base.itemsize
    array = (array & 1 if dtype in "?U3" else array)[: 4096 // item * item]
    if dtype == "U3":
        array = np.array(["a", "äöü", ""] * 20)
    else:
        array = array.view(np.dtype(dtype).base)[:30].reshape(10, 3)
    np.save(tmp_path / "t.npy", array)
    with fremap.rows(tmp_path / "t.npy") as rows:
        taken = rows[[9, 3, 3]]
        assert taken.dtype == array.dtype
        assert taken.tobytes() == array[[9, 3, 3]].tobytes()


def test_npy_in_fortran_order(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.asfortranarray(TABLE))
    with pytest.raises(FormatError, match=r"f\.npy: its array of shape \(6, 4\) is in Fortran"):
        fremap.rows(tmp_path / "f.npy")
    # One column is the same in both orders.
    column = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    header = "{'descr': '<f4', 'fortran_order': True, 'shape': (6, 1), }"
    (tmp_path / "c.npy").write_bytes(
        column + header.ljust(117).encode() + b"\n" + TABLE[:, 0].tobytes()
    )
    with fremap.rows(tmp_path / "c.npy") as rows:
        assert rows.shape == (6, 1)
        assert rows[[2]].tolist() == [[8.0]]


def test_npy_of_objects_and_scalars(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match=r"o\.npy: it holds Python objects"):
        fremap.rows(tmp_path / "o.npy")
    np.save(tmp_path / "s.npy", np.float32(1))
    with pytest.raises(FormatError, match="no axis"):
        fremap.rows(tmp_path / "s.npy")


def npy(
    text: str, *, length: int | None = None, version: bytes = b"\x01\x00", data: int = 96
) -> bytes:
    header = text.encode("latin-1")
    size = len(header) if length is None else length
    return b"\x93NUMPY" + version + struct.pack("<H", size) + header + bytes(data)


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 4)}"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "truncated, or is something else"),
        (b"\x93NUM", "truncated"),
        (b"PK\x03\x04" + bytes(60), "does not begin like an .npy file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (npy(GOOD, version=b"\x09\x00"), "version 9.0"),
        (npy(GOOD, length=60_000), "truncated"),
        (npy(GOOD, data=95), "96 bytes of data"),
        (npy(GOOD.replace("(6, 4)", "(6, 4000000000000)")), "it is truncated"),
        (npy(GOOD.replace("(6, 4)", "(-6, 4)")), "shape is"),
        (npy(GOOD.replace("(6, 4)", "(6.0, 4)")), "shape"),
        (npy(GOOD.replace("(6, 4)", "(True, 4)")), "shape is"),
        (npy(GOOD.replace("<f4", "<nonsense")), "cannot be parsed"),
        (npy(GOOD.replace("<f4", "|V0")), "elements have 0 bytes"),
        (npy(GOOD.replace("'shape'", "'shapes'")), "cannot be parsed"),
        (npy("[1, 2"), "cannot be parsed"),
        (npy("__import__('os').abort()"), "cannot be parsed"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 0xFFFF_FFFF) + bytes(100), "no array needs that"),
        (b"\x93NUMPY\x03\x00" + struct.pack("<I", 4) + b"\xff\xfe{}" + bytes(9), "cannot be"),
        (b"\x93NUMPY\x03\x00" + struct.pack("<I", 2) + b"{}" + bytes(9), "dict of descr"),
    ],
    ids=range(19),
)
def test_npy_that_is_damaged(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "bad.npy").write_bytes(content)
    with pytest.raises(FormatError, match=text) as caught:
        fremap.rows(tmp_path / "bad.npy")
    assert "bad.npy" in str(caught.value)


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "small": np.arange(3, dtype=np.int64),
        "table": TABLE,
        "empty": np.empty((0, 7), np.uint8),
    }
    safetensors.numpy.save_file(tensors, path, metadata={"made": "by its library"})
    for name, tensor in tensors.items():
        with fremap.rows(path, tensor=name) as rows:
            assert (rows.shape, rows.dtype) == (tensor.shape, tensor.dtype)
            np.testing.assert_array_equal(rows[::-1], tensor[::-1])
    with pytest.raises(FormatError, match="3 tensors; choose one by tensor=: 'empty', 'small'"):
        fremap.rows(path)
    with pytest.raises(FormatError, match="no tensor 'tables'; it has 'empty'"):
        fremap.rows(path, tensor="tables")
    safetensors.numpy.save_file({"only": TABLE}, path)
    with fremap.rows(path) as rows:
        np.testing.assert_array_equal(rows[[1]], TABLE[[1]])


RAW_TYPES = [
    ("BF16", "bfloat16", 2),
    ("F8_E4M3", "float8_e4m3fn", 1),
    ("F8_E5M2", "float8_e5m2", 1),
]


@pytest.mark.parametrize(("code", "name", "item_bytes"), RAW_TYPES)
def test_safetensors_of_what_numpy_has_not(
    tmp_path: Path, code: str, name: str, item_bytes: int
) -> None:
    path = tmp_path / "model.safetensors"
    data = np.random.default_rng(4).bytes(6 * 4 * item_bytes)
    entry = {"dtype": code, "shape": [6, 4], "data_offsets": [0, len(data)]}
    write_safetensors(path, {"t": entry}, data)
    with fremap.rows(path) as rows:
        assert rows.dtype_name == name
        assert rows.dtype == np.dtype(f"u{item_bytes}")
        assert rows[:].tobytes() == data
    # A type of somebody's own may be given for it, if it is as long.
    with fremap.rows(path, f"V{item_bytes}") as rows:
        assert rows[:].tobytes() == data
    with pytest.raises(ArgumentError, match=name):
        fremap.rows(path, np.float64)


def write_safetensors(path: Path, entries: Any, data: bytes) -> None:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(begin: int, end: int, shape: Any = (6, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "data_bytes", "text"),
    [
        ({}, 0, "holds no tensor"),
        ({"t": entry(0, 96)}, 95, "truncated"),
        ({"t": entry(0, 96)}, 97, "something was added"),
        ({"t": entry(0, 95)}, 96, "95 bytes"),
        ({"t": entry(-96, 0)}, 96, "not a range of bytes"),
        ({"t": entry(96, 0)}, 96, "not a range of bytes"),
        ({"t": entry(0, 96, [6, -4])}, 96, "shape is"),
        ({"t": entry(0, 96, "6")}, 96, "shape is"),
        ({"t": entry(0, 96, [6, True])}, 96, "shape is"),
        ({"t": entry(0, 96, dtype="F4")}, 96, "of type 'F4'"),
        ({"t": entry(0, 96, dtype=[1])}, 96, "of type"),
        ({"t": 3}, 96, "not a range of bytes"),
        ({"a": entry(0, 96), "b": entry(48, 144)}, 144, "they overlap"),
        ({"a": entry(0, 96), "b": entry(100, 196)}, 196, "hole between"),
        ({"a": entry(4, 100)}, 100, "hole between"),
        (b"[1]", 0, "not a JSON object"),
        (b"{", 0, "not JSON"),
        (b"\xff", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
        (b'{"a": 1, "a": 2}', 0, "twice"),
        ({"t": entry(0, 2**62, [2**60])}, 8, "it is truncated"),
        ({"t": entry(0, 2**70, [2**68])}, 8, "number of 21 digits"),
        ({"t": entry(0, 96, [2**60, 2**60])}, 96, "is more than any memory has"),
        ({"t": entry(0, 4, [1] * 65)}, 4, "65 axes; NumPy has"),
        (b'{"t": {"dtype": "U8", "shape": [1], "shape": [1], "data_offsets": [0, 1]}}', 1, "twice"),
        (b'{"t": 1, "\\u0074": 2}', 0, "twice"),
        (
            {"t": entry(0, 1, [1], "F4"), "u": entry(1, 2, [1], "U8")},
            2,
            "of type 'F4'; fremap knows",
        ),
    ],
    ids=range(27),
)
def test_safetensors_that_are_damaged(
    tmp_path: Path, entries: Any, data_bytes: int, text: str
) -> None:
    path = tmp_path / "bad.safetensors"
    write_safetensors(path, entries, bytes(data_bytes))
    with pytest.raises(FormatError, match=text) as caught:
        fremap.rows(path, tensor="t")
    assert "bad.safetensors" in str(caught.value)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(fremap.FormatError, match=r"a Git LFS pointer, .*run `git lfs pull`"):
        fremap.rows(path)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 9)]
)
def test_safetensors_without_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.safetensors"):
        fremap.rows(tmp_path / "bad.safetensors")


def test_an_index_of_safetensors(tmp_path: Path) -> None:
    for name, number in (("a", 1), ("b", 2)):
        safetensors.numpy.save_file(
            {name: TABLE + number}, tmp_path / f"model-{number}.safetensors"
        )
    index = tmp_path / "model.safetensors.index.json"
    weights = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with fremap.rows(index, tensor="b") as rows:
        np.testing.assert_array_equal(rows[[2]], TABLE[[2]] + 2)
    with pytest.raises(FormatError, match="choose one by tensor="):
        fremap.rows(index)
    for place in ("../x", "/etc/passwd", "", 3):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(FormatError, match="not the name of a file"):
            fremap.rows(index, tensor="a")
    index.write_text("{}")
    with pytest.raises(FormatError, match="no weight_map"):
        fremap.rows(index, tensor="a")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError):
        fremap.rows(index, tensor="a")


def test_raw_bytes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(b"header--" + TABLE.tobytes())
    with fremap.rows(path, np.float32, (2, 2), offset=8) as rows:
        assert rows.shape == (6, 2, 2)
        np.testing.assert_array_equal(rows[[5]], TABLE[[5]].reshape(1, 2, 2))
    with fremap.rows(path, "<f4", offset=8) as rows:
        assert rows.shape == (24,)
        assert rows[23] == TABLE[5, 3]
    with fremap.rows(bytes(path), "<f4", offset=104) as rows:
        assert len(rows) == 0
    for arguments, error, text in (
        ({}, ArgumentError, "pass dtype= to say what they are"),
        ({"dtype": object}, FormatError, "Python objects"),
        ({"dtype": "f4", "row_shape": 5}, FormatError, "not a whole number of rows of 20 bytes"),
        ({"dtype": "f4", "offset": 105}, FormatError, "has 104 bytes"),
        ({"dtype": "f4", "offset": -1}, ArgumentError, "offset"),
        ({"dtype": "f4", "row_shape": 0}, ArgumentError, "no bytes to count by"),
        ({"dtype": "f4", "tensor": "t"}, FormatError, "no tensor named"),
    ):
        with pytest.raises(error, match=text):
            fremap.rows(path, **arguments)


def test_shards(tmp_path: Path) -> None:
    parts = [TABLE[:1], TABLE[1:1], TABLE[1:4], TABLE[4:]]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", part)
    paths = [tmp_path / f"{number}.npy" for number in range(4)]
    with fremap.rows(paths) as rows:
        assert rows.shard_rows.tolist() == [1, 0, 3, 2]
        assert repr(rows).startswith("<fremap.Rows 4 files from ")
        ids = [5, 0, 3, 3, -2, 1]
        np.testing.assert_array_equal(rows[ids], TABLE[ids])
        np.testing.assert_array_equal(rows[:], TABLE)
    TABLE[:3].tofile(tmp_path / "raw")
    with fremap.rows([str(tmp_path / "raw"), paths[2]], np.float32, 4) as rows:
        np.testing.assert_array_equal(rows[[0, 3]], TABLE[[0, 1]])
    np.save(tmp_path / "other.npy", TABLE[:, :3])
    with pytest.raises(ArgumentError, match=r"other\.npy has rows of float32 \(3,\)"):
        fremap.rows([paths[0], tmp_path / "other.npy"])
    with pytest.raises(ArgumentError, match="empty list"):
        fremap.rows([])


def test_what_a_caller_says_must_be_so(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", TABLE)
    with fremap.rows(tmp_path / "t.npy", np.float32, (4,)) as rows:
        assert len(rows) == 6
    for arguments, text in (
        ({"dtype": np.float64}, "holds float32, not float64"),
        ({"row_shape": (2, 2)}, r"rows of shape \(4,\), not \(2, 2\)"),
        ({"offset": 4}, "offset= is for raw bytes"),
        ({"tensor": "t"}, "no tensor named 't'"),
    ):
        with pytest.raises(ValueError, match=text):
            fremap.rows(tmp_path / "t.npy", **arguments)


def test_what_no_row_can_be(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(64))
    with pytest.raises(fremap.FormatError, match="row_shape"):
        fremap.rows(path, "(2,2)i4")
    for shape in ("(0, 1180591620717411303424)", f"({10**30}, 0)"):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        np_path = tmp_path / "huge.npy"
        np_path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        with pytest.raises(fremap.FormatError, match="no memory has"):
            fremap.rows(np_path)
    deep = b"-" * 200_000
    deep_path = tmp_path / "deep.npy"
    deep_path.write_bytes(b"\x93NUMPY\x03\x00" + len(deep).to_bytes(4, "little") + deep)
    with pytest.raises(fremap.FormatError, match="cannot be parsed"):
        fremap.rows(deep_path)
    with pytest.raises(fremap.ArgumentError, match="not a path"):
        fremap.rows("a\0b", np.uint8)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        fremap.rows(tmp_path / "none.npy")
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.filename == str(tmp_path / "none.npy")
    with pytest.raises(ArgumentError, match="a folder without safetensors; give its files, or a"):
        fremap.rows(tmp_path, "u1")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArgumentError, match="not a regular file"):
        fremap.rows(tmp_path / "pipe", "u1")
    (tmp_path / "x.npz").touch()
    with pytest.raises(FormatError, match="unpack it first"):
        fremap.rows(tmp_path / "x.npz", "u1")
    with pytest.raises(TypeError, match="not int"):
        fremap.rows(3, "u1")


def test_a_type_that_is_not_known_leaves_the_others_readable(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    entries = {
        "four": entry(0, 3, [6], "F4"),
        "six": entry(3, 15, [16], "F6_E2M3"),
        "odd": entry(15, 16, {"not": "a shape"}, "F6_E3M2"),
        "table": entry(16, 112),
    }
    write_safetensors(path, entries, bytes(16) + TABLE.tobytes())
    with fremap.rows(path, tensor="table") as rows:
        np.testing.assert_array_equal(rows[:], TABLE)
    with pytest.raises(FormatError, match="'six' is of type 'F6_E2M3'; fremap knows BOOL"):
        fremap.rows(path, tensor="six")


def test_long_digits_in_names_and_metadata_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "names.safetensors"
    name = "9" * 5000
    safetensors.numpy.save_file({name: TABLE}, path, metadata={"hash": "8" * 5000})
    with fremap.rows(path, tensor=name) as rows:
        np.testing.assert_array_equal(rows[:], TABLE)


MOST_TEXT = 1000  # characters of an error, without the path
HOSTILE_SAFETENSORS = {
    "digits": b'{"t": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 1]}}' % (b"9" * 900_000),
    "many digits": b'{"t": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 1]}}'
    % b",".join([b"9" * 4000] * 250),
    "offsets": b'{"t": {"dtype": "U8", "shape": [1], "data_offsets": [0, %s]}}' % (b"9" * 900_000),
    "negative": b'{"t": {"dtype": "U8", "shape": [-%s], "data_offsets": [0, 1]}}' % (b"9" * 5000),
    "float": b'{"t": {"dtype": "U8", "shape": [%s.5], "data_offsets": [0, 1]}}' % (b"9" * 5000),
    "axes": b'{"t": {"dtype": "U8", "shape": [%s], "data_offsets": [0, 1]}}'
    % b",".join([b"9" * 18] * 50_000),
    "type": b'{"t": {"dtype": "%s", "shape": [1], "data_offsets": [0, 1]}}' % (b"F" * 900_000),
    "shape": b'{"t": {"dtype": "U8", "shape": "%s", "data_offsets": [0, 1]}}' % (b"F" * 900_000),
    "place": b'{"t": {"dtype": "U8", "shape": [1], "data_offsets": "%s"}}' % (b"F" * 900_000),
    "name": b'{"%s": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}' % (b"t" * 900_000),
    "names": b"{%s}"
    % b",".join(
        b'"%d%s": {"dtype": "U8", "shape": [1], "data_offsets": [%d, %d]}'
        % (number, b"t" * 50_000, number, number + 1)
        for number in range(20)
    ),
    "depth": b'{"t": ' + b"[" * 900_000,
    "infinite": b'{"t": {"dtype": "U8", "shape": [Infinity, NaN, 1e999], "data_offsets": [0, 1]}}',
    "surrogate": b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 9]}}',
}


@pytest.mark.parametrize("content", HOSTILE_SAFETENSORS.values(), ids=HOSTILE_SAFETENSORS)
def test_hostile_safetensors(tmp_path: Path, content: bytes) -> None:
    """Refused before anything is reckoned with what they say, in few words."""
    path = tmp_path / "bad.safetensors"
    write_safetensors(path, content, bytes(20))
    with pytest.raises(FormatError) as caught:
        fremap.rows(path)
    assert len(str(caught.value)) < len(str(path)) + MOST_TEXT
    assert str(caught.value).count("rows: ") == 1


HOSTILE_NPY = {
    "digits": "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}" % ("9" * 60_000),
    "many digits": "{'descr': '<f4', 'fortran_order': False, 'shape': (%s)}"
    % ("9" * 4000 + ",")
    * 15,
    "hexadecimal": "{'descr': '<f4', 'fortran_order': False, 'shape': (0x%s,)}" % ("f" * 60_000),
    "axes": "{'descr': '<f4', 'fortran_order': False, 'shape': (%s)}" % ("9," * 30_000),
    "axes of one": "{'descr': '<f4', 'fortran_order': False, 'shape': (%s)}" % ("1," * 65),
    "depth": "(" * 60_000,
    "minus": "-" * 60_000 + "1",
    "text": "x" * 60_000,
    "type": "{'descr': '%s', 'fortran_order': False, 'shape': (1,)}" % ("f" * 60_000),
    "length": "{'descr': 'S%s', 'fortran_order': False, 'shape': (1,)}" % ("9" * 60_000),
    "more": "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), '%s': 1}" % ("f" * 60_000),
}


@pytest.mark.parametrize("version", [b"\x01\x00", b"\x03\x00"])
@pytest.mark.parametrize("text", HOSTILE_NPY.values(), ids=HOSTILE_NPY)
def test_hostile_npy(tmp_path: Path, text: str, version: bytes) -> None:
    content = npy(text, data=4)
    if version != b"\x01\x00":
        header = text.encode()
        content = b"\x93NUMPY" + version + struct.pack("<I", len(header)) + header + bytes(4)
    (tmp_path / "bad.npy").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        fremap.rows(tmp_path / "bad.npy")
    assert len(str(caught.value)) < len(str(tmp_path)) + MOST_TEXT
    assert caught.value.__cause__ is None  # which would show all of the header


@given(
    some.recursive(
        some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=5),
        lambda parts: (
            some.lists(parts, max_size=4) | some.dictionaries(some.text(max_size=3), parts)
        ),
        max_leaves=8,
    ),
    some.sampled_from(["dtype", "shape", "data_offsets", None]),
)
def test_headers_of_anything(value: Any, field: str | None) -> None:
    """Whatever JSON says, it is rows or a FormatError."""
    entries = {"t": entry(0, 4, [1]), "u": entry(4, 8, [1])}
    if field is None:
        entries["t"] = value
    else:
        entries["t"][field] = value
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        write_safetensors(Path(file.name), entries, bytes(8))
        for tensor in ("t", "u"):
            with suppress(FormatError), fremap.rows(file.name, tensor=tensor) as rows:
                assert rows[:].nbytes == 4


def test_as_many_axes_as_numpy_has(tmp_path: Path) -> None:
    path = tmp_path / "axes.npy"
    np.save(path, np.zeros([2] + [1] * (MAX_AXES - 1), np.uint8))
    with fremap.rows(path) as rows:
        assert rows[[1, 0]].ndim == MAX_AXES
        with pytest.raises(ArgumentError, match=f"an array of {MAX_AXES + 1}"):
            rows.take([[1, 0]])
    with pytest.raises(ArgumentError, match="axes; NumPy has"):
        fremap.rows(path, row_shape=[1] * MAX_AXES)


def test_files_that_follow_one_another_are_each_what_they_are(tmp_path: Path) -> None:
    """Those that begin alike and are as long are the same; nothing else makes them so."""
    raw = np.arange(24, dtype=np.uint8).tobytes() * 6
    (tmp_path / "0.bin").write_bytes(raw)
    (tmp_path / "1.bin").write_bytes(raw)
    np.save(tmp_path / "2.npy", np.zeros((2, 8), np.uint8))
    assert (tmp_path / "2.npy").stat().st_size == len(raw)
    (tmp_path / "3.zip").write_bytes(raw)
    (tmp_path / "4.bin").write_bytes(b"\x89HDF\r\n\x1a\n" + raw[8:])
    paths = [tmp_path / name for name in ("0.bin", "1.bin", "2.npy", "3.zip", "4.bin")]
    with fremap.rows(paths[:3], np.uint8, 8) as rows:
        assert rows.shard_rows.tolist() == [18, 18, 2]
    with fremap.rows(paths, np.uint8, 8, format="raw") as rows:
        assert rows.shard_rows.tolist() == [18] * 5
    with fremap.rows(paths[:2], np.uint8, 8, offset=[16, 24]) as rows:
        assert rows.shard_rows.tolist() == [16, 15]
    for last, why in ((3, "unpack it first"), (4, "HDF5 file")):
        with pytest.raises(FormatError, match=why):
            fremap.rows([*paths[:2], paths[last]], np.uint8, 8)
    with pytest.raises(ArgumentError, match=r"offset= is for raw bytes; .*2\.npy has a header"):
        fremap.rows(paths[:3], np.uint8, 8, offset=16)
    with pytest.raises(ArgumentError, match="offset= is for raw bytes"):
        fremap.rows([paths[2], paths[2]], offset=[0, 16])


def test_tensors_in_files_with_one_header(tmp_path: Path) -> None:
    for number, name in enumerate(["t", "t", "u", "t"]):
        path = tmp_path / f"{number}.safetensors"
        safetensors.numpy.save_file({name: TABLE + np.float32(number)}, path)
    paths = [tmp_path / f"{number}.safetensors" for number in (0, 1, 3)]
    with fremap.rows(paths, tensor="t") as rows:
        expected = np.concatenate([TABLE + np.float32(number) for number in (0, 1, 3)])
        np.testing.assert_array_equal(rows[:], expected)
    with pytest.raises(FormatError, match=r"2\.safetensors.* has no tensor 't'"):
        fremap.rows([*paths, tmp_path / "2.safetensors"], tensor="t")


def npy_file(text: bytes, data: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    ("said", "shape"),
    [
        ("(3, 2)", (3, 2)),
        ("(6,)", (6,)),
        ("(3,  2)", (3, 2)),
        ("(3, 2,)", (3, 2)),
        ("(6)", None),
        ("(06,)", None),
        ("(3,, 2)", None),
        ("(-6,)", None),
        ("(6,) + (1,)", None),
    ],
)
def test_headers_that_numpy_would_not_write(
    tmp_path: Path, said: str, shape: tuple[int, ...] | None
) -> None:
    """What is read by its look is what NumPy reads, and nothing else."""
    text = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {said}, }}\n".encode()
    (tmp_path / "x.npy").write_bytes(npy_file(text, np.arange(6, dtype="<i2").tobytes()))
    if shape is None:
        with pytest.raises(FormatError, match="header"):
            fremap.rows(tmp_path / "x.npy")
        return
    with fremap.rows(tmp_path / "x.npy") as rows:
        np.testing.assert_array_equal(rows[:], np.load(tmp_path / "x.npy"))
        assert rows.shape == shape


@pytest.mark.parametrize("descr", ["<f3", "|b7", ">u9", "<c1"])
def test_types_that_there_are_not(tmp_path: Path, descr: str) -> None:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (2,), }}\n".encode()
    (tmp_path / "x.npy").write_bytes(npy_file(text, bytes(64)))
    with pytest.raises(FormatError, match="cannot be parsed"):
        fremap.rows(tmp_path / "x.npy")


def test_a_header_is_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long header the end is read later; by then another file may be there."""
    from fremap.sources import Opened

    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({f"tensor.{n}": np.arange(3) for n in range(99)}, path)
    with Opened(str(path)) as opened:
        os.replace(shutil.copy(path, tmp_path / "other"), path)
        with pytest.raises(FormatError, match="another file took its place"):
            opened.header.read(0, opened.header.size)
        assert opened.header.read(0, 8) == path.read_bytes()[:8]
