"""Arrays in the files of other libraries: data sets of h5py's, columns of Arrow's."""

import json
import os
import pickle
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
from fremap.errors import ArgumentError, FormatError

pytestmark = pytest.mark.any_user

TABLE = np.arange(60, dtype=np.float32).reshape(20, 3)
needs_h5py = pytest.mark.needs("h5py")
needs_pyarrow = pytest.mark.needs("pyarrow")


@needs_h5py
@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_data_sets(tmp_path: Path, mode: str, userblock: int) -> None:
    import h5py

    path = tmp_path / "x.h5"
    arrays = {
        "plain": TABLE,
        "group/deep": TABLE.astype("i2"),
        "big": TABLE.astype(">f8"),
        "bools": TABLE > 30,
        "complex": TABLE.astype("c8"),
        "half": TABLE.astype("f2"),
        "text": np.array([b"ab", b"c"], "S3"),
        "fields": np.ones(4, [("a", "<i4"), ("b", ">f8")]),
        "none": np.empty((0, 3), np.int64),
    }
    with h5py.File(path, "w", userblock_size=userblock) as file:
        for name, array in arrays.items():
            file[name] = array
    with h5py.File(path, mode) as file:
        for name, array in arrays.items():
            with fremap.rows(file[name]) as rows:
                assert rows.dtype == array.dtype
                assert rows.shape == array.shape
                assert rows[::-1].tobytes() == array[::-1].tobytes()
        if mode == "r+":
            file["plain"][3] = 99  # not flushed
            with fremap.rows(file["plain"]) as rows:
                assert rows[3].tolist() == [99, 99, 99]
        both = [file["plain"], file["plain"]]
        with fremap.rows(both) as rows, pickle.loads(pickle.dumps(rows)) as again:
            assert len(rows) == len(again) == 40
            np.testing.assert_array_equal(again[23], rows[3])
        with pytest.raises(ArgumentError, match="holds float32, not float64"):
            fremap.rows(file["plain"], np.float64)
        for arguments in ({"tensor": "t"}, {"tensor": "t.{i}"}, {"column": "c"}):
            with pytest.raises(ArgumentError, match="is one array"):
                fremap.rows(file["plain"], **arguments)
    # The file itself says what to give.
    with (
        pytest.raises(FormatError, match="an HDF5 file; give a data set")
        if not userblock
        else (pytest.raises(ArgumentError, match="pass dtype= to say what they are"))
    ):
        fremap.rows(path)


@needs_h5py
def test_data_sets_that_are_not_in_one_piece(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "x.h5", "w", userblock_size=512) as file:
        plain = file.create_dataset("plain", data=TABLE)
        file.create_dataset("chunked", data=TABLE, chunks=(5, 3))
        file.create_dataset("gzip", data=TABLE, compression="gzip")
        file.create_dataset("unwritten", (5, 3), dtype="f4")
        file.create_dataset("names", data=["a", "bc"])
        file.create_dataset("external", (4,), "i4", external=str(tmp_path / "raw"))
        file.create_dataset("number", data=3.0)
        file["void"] = h5py.Empty("f4")
        layout = h5py.VirtualLayout(shape=(20, 3), dtype="f4")
        layout[:] = h5py.VirtualSource(plain)
        file.create_virtual_dataset("virtual", layout)
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3,))
        made = h5py.h5d.create(file.id, b"compact", h5py.h5t.NATIVE_INT32, space, compact)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(3, dtype=np.int32))
        for name, text in (
            ("chunked", "is chunked, so its rows are not contiguous"),
            ("gzip", "is chunked and compressed"),
            ("unwritten", "nothing was written to it yet"),
            ("names", "unequal length or references"),
            ("external", "is in external files"),
            ("number", "no axis"),
            ("void", "is empty"),
            ("virtual", "is virtual"),
            ("compact", "is compact"),
        ):
            with pytest.raises(FormatError, match=text) as caught:
                fremap.rows(file[name])
            assert "x.h5" in str(caught.value)
    with (
        h5py.File("memory", "w", driver="core", backing_store=False) as file,
        pytest.raises(FormatError, match="driver 'core'"),
    ):
        fremap.rows(file.create_dataset("t", data=TABLE))


@needs_h5py
def test_data_sets_of_a_file_that_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 keeps the name that it was given, which another directory may have too."""
    import h5py

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        with h5py.File(tmp_path / folder / "x.h5", "w") as file:
            file["t"] = TABLE + len(folder) + ord(folder)
    monkeypatch.chdir(tmp_path / "a")
    with h5py.File("x.h5") as file:
        with fremap.rows(file["t"]) as rows:
            np.testing.assert_array_equal(rows[:], file["t"][:])
        monkeypatch.chdir(tmp_path / "b")
        with pytest.raises(FormatError, match=r"no longer at .*b/x\.h5"):
            fremap.rows(file["t"])
        os.unlink(tmp_path / "b" / "x.h5")
        with pytest.raises(FormatError, match="open it by its absolute path"):
            fremap.rows(file["t"])


@needs_h5py
def test_sparse_rows_of_a_file(tmp_path: Path) -> None:
    """As anndata keeps them: data, indices and indptr."""
    import h5py

    indptr = np.array([0, 3, 3, 60])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["X/data"], file["X/indptr"] = TABLE.ravel(), indptr
        with fremap.ragged(file["X/data"], file["X/indptr"]) as rows:
            assert rows[0].tolist() == [0.0, 1.0, 2.0]
            assert len(rows[2]) == 57


def write_arrow(path: Path, table: Any, kind: str, rows: int = 7, **options: Any) -> Path:
    import pyarrow as pa

    maker = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with maker(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def lists(array: np.ndarray) -> Any:
    """An array of fixed-size lists of fixed-size lists."""
    import pyarrow as pa

    made = pa.array(np.ascontiguousarray(array).ravel())
    for length in array.shape[:0:-1]:
        made = pa.FixedSizeListArray.from_arrays(made, length)
    return made


@needs_pyarrow
@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("suffix", [".arrow", ""])
def test_columns(tmp_path: Path, kind: str, suffix: str) -> None:
    import pyarrow as pa

    arrays: dict[str, np.ndarray] = {
        "vector": TABLE,
        "image": np.arange(20 * 12, dtype=np.uint8).reshape(20, 3, 4),
        "number": np.arange(20, dtype=np.int64),
        "half": TABLE.astype(np.float16),
        "when": np.arange(20).astype("M8[us]"),
    }
    table = pa.table({name: lists(array) for name, array in arrays.items()} | {"text": ["x"] * 20})
    path = write_arrow(tmp_path / f"x{suffix}", table, kind)
    for name, array in arrays.items():
        with fremap.rows(path, column=name) as rows:
            assert (rows.dtype, rows.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(rows[...], array)
            assert rows.shard_rows.tolist() == [7, 7, 6]
    with fremap.rows([path, path], column="vector") as rows:
        np.testing.assert_array_equal(rows[[25, 3]], TABLE[[5, 3]])
    for arguments, error, text in (
        (
            {"column": "text"},
            FormatError,
            "column 'text' is of type string, whose rows do not all have",
        ),
        ({"column": "gone"}, FormatError, "no column 'gone'; it has 'half', 'image'"),
        ({"format": "arrow"}, FormatError, "6 columns; choose one by column="),
        ({"column": "vector", "tensor": "t"}, FormatError, "no tensor named"),
        ({"column": "vector", "dtype": np.int32}, ArgumentError, "holds float32, not int32"),
    ):
        with pytest.raises(error, match=text):
            fremap.rows(path, **arguments)


@needs_pyarrow
def test_columns_that_cannot_be_read_where_they_lie(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"v": lists(TABLE)})
    path = tmp_path / "x.arrow"
    write_arrow(path, table, "stream", compression="zstd")
    with pytest.raises(FormatError, match=r"x\.arrow: column 'v' is compressed"):
        fremap.rows(path)
    for column, text in (
        (pa.array([[1.0, 2.0, 3.0], None], pa.list_(pa.float32(), 3)), "has missing values"),
        (pa.array([[1.0, None]], pa.list_(pa.float32(), 2)), "has missing values"),
        (pa.array([1, None]), "has missing values"),
        (pa.array([[1], [2, 3]]), r"of type list<.*>, whose rows do not all have the same size"),
        (pa.array([True, False]), "of type bool"),
        (pa.array(["a"]).dictionary_encode(), "of type dictionary"),
    ):
        write_arrow(path, pa.table({"v": column}), "file")
        with pytest.raises(FormatError, match=text):
            fremap.rows(path)
    write_arrow(path, table.slice(0, 0), "stream")
    with fremap.rows(path) as rows:
        assert rows.shape == (0, 3)
    np.save(tmp_path / "x.npy", TABLE)
    with pytest.raises(FormatError, match="not an Arrow file, and has no columns"):
        fremap.rows(tmp_path / "x.npy", column="v")


@needs_pyarrow
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_that_is_damaged(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa

    path = write_arrow(tmp_path / "x.arrow", pa.table({"v": lists(TABLE)}), kind)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 8, 13):
        path.write_bytes(whole[:length])
        # A stream may end behind any record batch; all else is told.
        with suppress(FormatError), fremap.rows(path) as rows:
            assert len(rows) in (0, 7, 14, 20)
            np.testing.assert_array_equal(rows[:], TABLE[: len(rows)])


@needs_pyarrow
def test_tensors_of_one_shape(tmp_path: Path) -> None:
    """Arrow's own extension type of them is a list of a fixed size beneath."""
    import pyarrow as pa

    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(TABLE)
    write_arrow(tmp_path / "x.arrow", pa.table({"t": tensors}), "file")
    with fremap.rows(tmp_path / "x.arrow") as rows:
        np.testing.assert_array_equal(rows[:], TABLE)


def test_arrow_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.arrow").write_bytes(b"ARROW1\0\0" + bytes(100))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FormatError, match="pip install pyarrow"):
        fremap.rows(tmp_path / "x.arrow")
    assert os.listdir(tmp_path) == ["x.arrow"]


@needs_pyarrow
def test_inspect_lists_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    from fremap.cli import main

    path = write_arrow(
        tmp_path / "x.arrow", pa.table({"v": lists(TABLE), "n": range(20)}), "stream"
    )
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "fixed_size_list<item: float>[3]" in text or "fixed_size_list<element: float>[3]" in text
    assert "(20,)" in text


@needs_h5py
def test_inspect_lists_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import h5py
    from fremap.cli import main

    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["plain"] = TABLE
        file.create_dataset("deep/chunked", data=TABLE, chunks=(5, 3))
        file["void"] = h5py.Empty("f4")
    assert main(["inspect", str(tmp_path / "x.h5"), "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["format"] == "hdf5"
    arrays = {array["name"]: array for array in file["arrays"]}
    assert arrays["deep/chunked"]["offset"] is None
    assert arrays["void"]["rows"] is None
    plain = arrays["plain"]
    data = (tmp_path / "x.h5").read_bytes()[plain["offset"] :][: plain["bytes"]]
    assert data == TABLE.tobytes()
