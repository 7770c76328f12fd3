"""Many tensors as one table: by pattern and by list, across the files of a checkpoint."""

import json
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from fremap.errors import ArgumentError, ArgumentTypeError, FormatError
from hypothesis import given
from hypothesis import strategies as some

pytestmark = pytest.mark.any_user

SHARDS = 128
FILES = 10
ROWS_OF_SHARD = 5
BYTES_OF_ROW = 160
NAME = "model.ngram.shard_{}"
PATTERN = NAME.format("{i}")


def content(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(
        0, 128, (ROWS_OF_SHARD, BYTES_OF_ROW), dtype=np.uint8
    )


TABLE = np.concatenate([content(number) for number in range(SHARDS)])


def write(path: Path, tensors: dict[str, np.ndarray], dtype: str = "float8_e4m3fn") -> None:
    """A file made by the library of the format, of a type that NumPy does not have."""
    item_bytes = {"float8_e4m3fn": 1, "bfloat16": 2, "uint8": 1}[dtype]
    fields = {}
    for name, array in tensors.items():
        shape = [len(array), array.shape[1] // item_bytes]
        if hasattr(safetensors, "TensorSpec"):
            fields[name] = safetensors.TensorSpec(
                dtype=dtype, shape=shape, data_ptr=array.ctypes.data, data_len=array.nbytes
            )
        else:  # before 0.8
            fields[name] = {"dtype": dtype, "shape": shape, "data": array.tobytes()}
    safetensors.serialize_file(fields, path, {"format": "pt"})


def checkpoint(folder: Path, dtype: str = "float8_e4m3fn", *, index: bool = True) -> Path:
    """128 tensors in 10 files, dealt like cards, beside tensors that are none of them."""
    weights = {}
    for file in range(FILES):
        name = f"model-{file + 1:05}-of-{FILES:05}.safetensors"
        tensors = {NAME.format(number): content(number) for number in range(file, SHARDS, FILES)}
        tensors[f"model.layers.{file}.up_proj.weight"] = content(1000 + file)
        write(folder / name, tensors, dtype)
        weights.update(dict.fromkeys(tensors, name))
    if index:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    return folder


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("source", ["folder", "index", "files", "no index"])
def test_a_checkpoint_by_pattern(tmp_path: Path, source: str, dtype: str) -> None:
    checkpoint(tmp_path, dtype, index=source != "no index")
    given: Any = tmp_path
    if source == "index":
        given = tmp_path / "model.safetensors.index.json"
    elif source == "files":
        given = sorted(tmp_path.glob("*.safetensors"), reverse=True)
    with fremap.rows(given, tensor=PATTERN) as rows:
        assert rows.shape == (SHARDS * ROWS_OF_SHARD, BYTES_OF_ROW // rows.dtype.itemsize)
        assert rows.dtype_name == dtype
        assert rows.shard_rows.tolist() == [ROWS_OF_SHARD] * SHARDS
        assert f"<fremap.Rows {FILES} files from " in repr(rows)
        np.testing.assert_array_equal(rows[:].view(np.uint8), TABLE)


def test_names_in_a_list_in_their_order(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    numbers = [100, 3, 64]
    with fremap.rows(tmp_path, tensor=[NAME.format(number) for number in numbers]) as rows:
        np.testing.assert_array_equal(rows[:], np.concatenate(list(map(content, numbers))))
    with fremap.rows(tmp_path, tensor=NAME.format(7)) as rows:
        np.testing.assert_array_equal(rows[:], content(7))
    for tensor, error, text in (
        ([NAME.format(0), "gone"], FormatError, "has no tensor 'gone'; `fremap inspect` lists"),
        ([NAME.format(0)] * 2, ArgumentError, "names 'model.ngram.shard_0' twice"),
        ([], ArgumentError, "an empty list"),
        ([3], ArgumentTypeError, "a name, a list of names or a pattern"),
        (3, ArgumentTypeError, "a name, a list of names or a pattern"),
        ("{i}.{j}", ArgumentError, "has 2 placeholders; a pattern has one"),
        ("model.{i}.nothing", FormatError, "no tensor that matches 'model.{i}.nothing'"),
        ("nothing", FormatError, "no tensor 'nothing'; it has"),
        ("model.ngram.shard_*", FormatError, "in a pattern, {i} stands for the number"),
        ("shard_{i:02d}", FormatError, "in a pattern, {i} stands for the number"),
        (["t.0", "t.*"], FormatError, "in a pattern, {i} stands for the number"),
        (None, FormatError, "138 tensors; choose one by tensor="),
    ):
        with pytest.raises(error, match=re.escape(text)):
            fremap.rows(tmp_path, tensor=tensor)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["t.0", "t.1", "t.3", "t.6"], "no tensor 't.2' between 't.1' and 't.3'; 3 numbers of"),
        (["t.08", "t.09", "t.11"], "begin with 't.08'; number 0 or 1 is missing"),
        (["t.00", "t.01", "t.03"], "no tensor 't.02' between"),
        (["t.0", "t.1", "t.01"], "tensors 't.01' and 't.1': number 1 of 't.{}' occurs twice"),
        (["t.x", "t.", "u.0", "t.0.scale", "t.-1"], "no tensor that matches 't.{}'"),
    ],
)
def test_gaps_and_doubles(tmp_path: Path, names: list[str], text: str) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {name: content(0) for name in names})
    with pytest.raises(FormatError) as caught:
        fremap.rows(path, tensor="t.{}")
    assert text in str(caught.value)


def test_numbers_from_one_on_and_with_zeros(tmp_path: Path) -> None:
    names = [f"t.{number:03}.weight" for number in range(1, 12)]
    write(tmp_path / "a.safetensors", {name: content(at) for at, name in enumerate(names)})
    with fremap.rows(tmp_path, tensor="t.{shard}.weight") as rows:
        np.testing.assert_array_equal(rows[:], np.concatenate(list(map(content, range(11)))))


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", {"t.0": content(0), f"{name}": content(1)})
    for tensor in ("t.{i}", ["t.0"], "t.0"):
        with pytest.raises(FormatError, match=r"'t\.0' is in .*a\.safetensors and in .*b\.safe"):
            fremap.rows(tmp_path, tensor=tensor)
    # Files in a list that have a tensor each of one name are joined, as they always were.
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with fremap.rows(files, tensor="t.0") as rows:
        assert len(rows) == 2 * ROWS_OF_SHARD


def test_tensors_that_are_not_alike(tmp_path: Path) -> None:
    unlike = np.ascontiguousarray(content(1)[:, :10])
    write(tmp_path / "a.safetensors", {"t.0": content(0), "t.1": unlike})
    with pytest.raises(ArgumentError) as caught:
        fremap.rows(tmp_path, tensor="t.{i}")
    assert "tensor 't.1' has rows of float8_e4m3fn (10,)" in str(caught.value)
    assert "tensor 't.0' of float8_e4m3fn (160,)" in str(caught.value)


def test_files_without_tensors_and_stores(tmp_path: Path) -> None:
    checkpoint(tmp_path, index=False)
    write(tmp_path / "empty.safetensors", {})
    with fremap.rows(tmp_path, tensor=PATTERN) as rows:
        np.testing.assert_array_equal(rows[:], TABLE)
    stores = [fremap.open(path) for path in sorted(tmp_path.glob("model*.safetensors"))]
    with fremap.rows(stores, tensor=PATTERN) as rows:
        np.testing.assert_array_equal(rows[:], TABLE)
    with fremap.rows(stores[3], tensor=NAME.format(3)) as rows:
        np.testing.assert_array_equal(rows[:], content(3))
    with pytest.raises(FormatError, match="it holds no tensor"):
        fremap.rows(tmp_path / "empty.safetensors", tensor="t")
    np.save(tmp_path / "t.npy", TABLE)
    with pytest.raises(FormatError, match="not a safetensors file, and has no tensors by name"):
        fremap.rows([tmp_path / "empty.safetensors", tmp_path / "t.npy"], tensor=PATTERN)


def test_an_index_that_is_wrong(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"t.0": content(0)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"t.{i}": "a.safetensors" for i in range(2)}}))
    with pytest.raises(FormatError, match=r"has no tensor 't\.1', which the index says it has"):
        fremap.rows(tmp_path, tensor="t.{i}")
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ArgumentError, match="has 2 indexes"):
        fremap.rows(tmp_path, tensor="t.{i}")


@pytest.mark.parametrize(
    "file", ["n" * 256, "n" * 1_000_000, "d/" * 3000 + "n"], ids=["name", "long name", "path"]
)
def test_an_index_of_names_that_no_file_has(tmp_path: Path, file: str) -> None:
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": file}}))
    with pytest.raises(
        FormatError, match="which is not the name of a file in the folder of the index"
    ) as caught:
        fremap.rows(tmp_path, tensor="t")
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    """As a hub's blobs are, whose names are checksums."""
    np.save(tmp_path / "array.npy", TABLE)
    (tmp_path / "array.npy").rename(tmp_path / "1f")
    write(tmp_path / "2e", {"t.0": TABLE})
    (tmp_path / "3d").write_text(json.dumps({"weight_map": {"t.0": "2e"}}))
    TABLE.tofile(tmp_path / "4c")
    for name, arguments in (
        ("1f", {}),
        ("2e", {}),
        ("3d", {}),
        ("3d", {"tensor": "t.{i}"}),
        ("4c", {"dtype": np.uint8, "row_shape": BYTES_OF_ROW}),
    ):
        with fremap.rows(tmp_path / name, **arguments) as rows:
            np.testing.assert_array_equal(rows[:], TABLE)
    # What is told wrongly, or is to be seen byte by byte.
    with fremap.rows(tmp_path / "1f", np.uint8, format="raw") as rows:
        assert rows[:].tobytes() == (tmp_path / "1f").read_bytes()
    with fremap.rows(tmp_path / "1f", np.uint8, BYTES_OF_ROW, offset=128) as rows:
        np.testing.assert_array_equal(rows[:], TABLE)
    with pytest.raises(FormatError, match=r"does not begin like an \.npy file"):
        fremap.rows(tmp_path / "4c", format="npy")
    with pytest.raises(FormatError, match="safetensors allows"):
        fremap.rows(tmp_path / "4c", format="safetensors")
    with fremap.rows(tmp_path / "3d", format="safetensors") as rows:
        assert len(rows) == len(TABLE)
    with pytest.raises(ArgumentError, match="format is 'zip'"):
        fremap.rows(tmp_path / "1f", format="zip")


@pytest.mark.parametrize(
    "front",
    [
        struct.pack("<qq", 3, ord("{")),  # numbers that might be a header's length, and a brace
        struct.pack("<q", 2) + b"{" + bytes(7),
        b'{"a": "b"}',
        b"PK\x03\x04",
        b"\xff" * 8,
    ],
)
def test_raw_bytes_that_begin_like_something_else(tmp_path: Path, front: bytes) -> None:
    data = front.ljust(800, b"\x07")
    (tmp_path / "x.bin").write_bytes(data)
    with fremap.rows(tmp_path / "x.bin", np.uint8, 8) as rows:
        assert rows[:].tobytes() == data


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        np.save(tmp_path / f"part-{number}.npy", np.full((2, 3), number, np.int32))
    expected = np.repeat(np.arange(12, dtype=np.int32), 2)
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / f"part-{number}.npy" for number in range(12)]
    for source in ("part-*.npy", str(tmp_path / "part-*.npy"), iter(paths), (p for p in paths)):
        with fremap.rows(source) as rows:
            assert rows[:][:, 0].tolist() == expected.tolist()
    with fremap.rows(["part-1?.npy", paths[0]]) as rows:
        assert rows[:][:, 0].tolist() == [10, 10, 11, 11, 0, 0]
    # A name with the letters of a pattern is a file where there is one.
    paths[3].rename(tmp_path / "part-[1].npy")
    with fremap.rows("part-[1].npy") as rows:
        assert rows[:][:, 0].tolist() == [3, 3]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        fremap.rows("gone-*.npy")
    with pytest.raises(ArgumentTypeError, match="in order"):
        fremap.rows(set(paths))
    with pytest.raises(ArgumentTypeError, match="not int"):
        fremap.rows([3])
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/a.safetensors", {"t": content(1)})
    with pytest.raises(ArgumentError, match="a list has files, a folder is given alone"):
        fremap.rows(["folder", paths[0]])


def test_an_offset_a_file(tmp_path: Path) -> None:
    parts = []
    for number, front in enumerate((0, 7, 512)):
        part = np.arange(12, dtype=np.int16).reshape(4, 3) + 100 * number
        (tmp_path / f"{number}").write_bytes(bytes(front) + part.tobytes())
        parts.append(part)
    paths = [tmp_path / f"{number}" for number in range(3)]
    with fremap.rows(paths, np.int16, 3, offset=[0, 7, 512]) as rows:
        np.testing.assert_array_equal(rows[:], np.concatenate(parts))
    with pytest.raises(ArgumentError, match="2 offsets for 3 files"):
        fremap.rows(paths, np.int16, 3, offset=[0, 7])
    with pytest.raises(ArgumentError, match="offset is -1"):
        fremap.rows(paths, np.int16, 3, offset=[0, -1, 2])


NAMES = some.text(some.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)


@given(some.dictionaries(NAMES, some.integers(0, 5), min_size=1, max_size=8), some.data())
def test_the_library_and_json_are_read_alike(sizes: dict[str, int], data: Any) -> None:
    """Headers as the library writes them are scanned, others parsed: the same comes of both."""
    arrays = {
        name: np.full((size, 2), at, np.uint8) for at, (name, size) in enumerate(sizes.items())
    }
    arrays.pop("__metadata__", None)
    arrays["t"] = np.arange(8, dtype=np.uint8).reshape(4, 2)
    made = safetensors.numpy.save(arrays, {"note": 'a "quoted" {"t":{"dtype":1}} \\ note'})
    (length,) = struct.unpack_from("<Q", made)
    pretty = json.dumps(json.loads(made[8 : 8 + length]), indent=1).encode()
    again = struct.pack("<Q", len(pretty)) + pretty + made[8 + length :]
    name = data.draw(some.sampled_from(sorted(arrays)))
    with tempfile.TemporaryDirectory(prefix="fremap-") as folder:
        for file in (made, again):
            path = Path(folder, "x.safetensors")
            path.write_bytes(file)
            for tensor in (name, [name]):
                with fremap.rows(path, tensor=tensor) as rows:
                    np.testing.assert_array_equal(rows[:], arrays[name])


@pytest.mark.parametrize("indent", [None, 2])
def test_long_headers_are_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None
) -> None:
    """Of 60 000 tensors only those that are asked for become Python objects."""
    two = np.zeros((1, 2), np.uint8)
    path = tmp_path / "model.safetensors"
    names = [f"model.layers.{number // 300}.experts.{number % 300}.w" for number in range(60_000)]
    write(path, dict.fromkeys(names, two), "uint8")
    index = {"metadata": {"total_size": 120_000}, "weight_map": dict.fromkeys(names, path.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index, indent=indent) + "\n")

    def parsed(text: Any, **options: Any) -> Any:
        raise AssertionError("all of it was parsed")

    monkeypatch.setattr(json, "loads", parsed)
    for source in (tmp_path, path):
        with fremap.rows(source, tensor="model.layers.7.experts.{i}.w") as rows:
            assert rows.shape == (300, 2)
        with fremap.rows(source, tensor=names[5]) as rows:
            assert rows.shape == (1, 2)


@given(some.dictionaries(NAMES, NAMES, max_size=5), some.data())
def test_indexes_are_read_alike(weights: dict[str, str], data: Any) -> None:
    """Scanned or parsed, an index says the same."""
    from fremap.formats import Header, names_of, safetensors

    weights = {name: file.strip("/") or "x" for name, file in weights.items()}
    weights["t.0"] = weights["t.1"] = "file"
    name = data.draw(some.sampled_from(sorted(weights)))
    found = []
    for text in (
        json.dumps({"metadata": {}, "weight_map": weights}, ensure_ascii=False, indent=2),
        json.dumps({"weight_map": weights}, ensure_ascii=False),
        json.dumps({"weight_map": weights, "other": {"weight_map": {"t.0": 1}}}),
    ):
        with tempfile.TemporaryFile() as file:
            file.write(text.encode())
            file.flush()
            header = Header(file.fileno(), "/folder/index", len(text.encode()))
            for tensor in (name, [name], "t.{i}"):
                try:
                    found.append(safetensors.index(header, names_of(tensor)))
                except FormatError as error:
                    found.append(str(error))
    assert found[:3] == found[3:6] == found[6:]
    assert found[2] == {"t.0": "file", "t.1": "file"}
