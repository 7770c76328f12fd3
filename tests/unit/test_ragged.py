"""Rows of unequal length: offsets of each kind, Megatron's files, memory that is given."""

import asyncio
import json
import os
import pickle
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
import safetensors.numpy
from fremap.errors import ArgumentError, ArgumentTypeError, ClosedError, FormatError
from fremap.testing import counting, wait_until_settled

pytestmark = pytest.mark.any_user

VALUES = np.random.default_rng(2).integers(0, 1 << 15, 50_000).astype(np.uint16)


def lengths(count: int = 300, most: int = 300) -> np.ndarray:
    return np.random.default_rng(5).integers(0, most, count)


OFFSETS = np.concatenate([[0], np.cumsum(lengths())])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    VALUES.tofile(tmp_path / "values.bin")
    return tmp_path / "values.bin"


def check(taken: fremap.RaggedRows, ids: Any, values: Any = VALUES, offsets: Any = OFFSETS) -> None:
    expected = [values[offsets[row] : offsets[row + 1]] for row in ids]
    assert taken.offsets.tolist() == [0, *np.cumsum(list(map(len, expected))).tolist()]
    assert taken.values.dtype == values.dtype
    np.testing.assert_array_equal(taken.values, np.concatenate([values[:0], *expected]))


def test_take(path: Path) -> None:
    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        assert len(rows) == 300
        assert rows.lengths.tolist() == lengths().tolist()
        ids = [7, 299, 7, 0, 131]
        check(rows.take(ids), ids)
        check(rows.take([]), [])
        check(rows.take(slice(290, None, 3)), range(290, 300, 3))
        check(rows.take(range(5, 0, -1)), range(5, 0, -1))
        check(rows[np.array([-1, -300])], [299, 0])
        check(rows[rows.lengths > 200], np.flatnonzero(rows.lengths > 200))
        check(rows.take(slice(None)), range(300))
        np.testing.assert_array_equal(rows[-2], VALUES[OFFSETS[298] : OFFSETS[299]])
        for row, expected in zip(rows.__getitems__(ids), ids, strict=True):
            np.testing.assert_array_equal(row, VALUES[OFFSETS[expected] : OFFSETS[expected + 1]])
        assert [len(row) for row in rows] == lengths().tolist()
        assert repr(rows) == f"<fremap.Ragged {path}: 300 rows of uint16>"
        for index, error, text in (
            (300, IndexError, "row 300 is outside"),
            ([0, -301], IndexError, "row -301 is outside"),
            ((1, 2), ArgumentTypeError, "chosen by an int"),
            (..., ArgumentTypeError, "chosen by an int"),
            (1.5, TypeError, "float"),
            ([True, False], IndexError, "one bool a row"),
        ):
            with pytest.raises(error, match=text):
                rows[index]
    with pytest.raises(ClosedError):
        rows.take([0])
    assert rows.closed


def test_little_is_read_and_all_of_it_together(tmp_path: Path) -> None:
    """Of a row what it has, by one request, also where it is long."""
    values = np.arange(1 << 20, dtype=np.int32)
    values.tofile(tmp_path / "values")
    count = 1000  # elements of a row
    offsets = np.arange(0, len(values) + 1, count)
    offsets = np.append(offsets, len(values))
    fd = os.open(tmp_path / "values", os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    wait_until_settled(tmp_path / "values")  # or what was read is read again
    ids = np.arange(3, 1000, 50)
    with fremap.ragged(tmp_path / "values", offsets, np.int32) as rows:
        taken = rows.take(ids)
        stats = rows.stats()
    np.testing.assert_array_equal(taken.values.reshape(-1, count)[:, 0], ids * count)
    assert stats.rows_copied + stats.rows_read == len(ids) * count
    assert stats.bytes_read == len(ids) * count * 4
    assert stats.reads == len(ids)


def test_past_the_page_cache(path: Path) -> None:
    with fremap.ragged(path, OFFSETS, np.uint16, direct=True) as rows:
        for _ in range(3):
            check(rows.take(slice(None, None, -1)), range(299, -1, -1))
        stats = rows.stats()
    assert stats.rows_copied == 0  # from maps of the page cache
    assert stats.rows_read > 0


@pytest.mark.parametrize("kind", ["list", "array", "npy", "rows", "uint8"])
def test_offsets_of_each_kind(path: Path, tmp_path: Path, kind: str) -> None:
    offsets: Any = OFFSETS
    if kind == "list":
        offsets = OFFSETS.tolist()
    elif kind == "npy":
        np.save(tmp_path / "offsets.npy", OFFSETS.astype(np.uint32))
        offsets = tmp_path / "offsets.npy"
    elif kind == "rows":
        safetensors.numpy.save_file({"o": OFFSETS}, tmp_path / "offsets.safetensors")
        offsets = fremap.rows(tmp_path / "offsets.safetensors")
    elif kind == "uint8":
        offsets = np.array([3, 3, 200, 255], np.uint8)
        with fremap.ragged(path, offsets, np.uint16) as rows:
            check(rows.take([2, 1]), [2, 1], offsets=offsets.astype(int))
        return
    with fremap.ragged(path, offsets, np.uint16) as rows:
        check(rows.take([9, 1]), [9, 1])


@pytest.mark.parametrize(
    ("offsets", "error", "text"),
    [
        ([0, 5, 4], ArgumentError, "row 1 goes from element 5 to 4; offsets must not fall"),
        ([-1, 5], ArgumentError, "row 0 goes from element -1"),
        ([0, 50_001], ArgumentError, r"to 50001.*has 50000 elements"),
        ([], ArgumentTypeError, "integers along one axis"),
        (np.array([], int), ArgumentError, "one more offset than rows"),
        ([0.0, 1.0], ArgumentTypeError, "integers along one axis"),
        ([[0, 1]], ArgumentTypeError, "integers along one axis"),
        (np.array([0, 2**63], np.uint64), ArgumentError, "64 bits"),
        (None, FileNotFoundError, "No such file"),
    ],
)
def test_offsets_that_are_none(path: Path, offsets: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fremap.ragged(path, offsets, np.uint16)


def test_pairs_of_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "csr.safetensors"
    safetensors.numpy.save_file({"data": VALUES, "indptr": OFFSETS}, file)
    with (
        fremap.rows(file, tensor="data") as data,
        fremap.rows(file, tensor="indptr") as indptr,
        fremap.ragged(data, indptr) as rows,
    ):
        check(rows.take([5, 5, 200]), [5, 5, 200])
        rows.close()
        assert not data.closed


def test_elements_that_are_rows_themselves(tmp_path: Path) -> None:
    vectors = VALUES.reshape(-1, 10)
    np.save(tmp_path / "vectors.npy", vectors)
    offsets = [0, 3, 3, 4000, 5000]
    with fremap.ragged(tmp_path / "vectors.npy", offsets) as rows:
        assert rows.element_shape == (10,)
        check(rows.take([3, 0, 1]), [3, 0, 1], vectors, offsets)
        assert rows[0].shape == (3, 10)


def test_memory_that_is_given(path: Path) -> None:
    ids = [3, 90, 4]
    count = int(lengths()[ids].sum())
    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        for out in (np.empty(count, np.uint16), np.empty(count + 9, np.uint16)):
            taken = rows.take(ids, out=out)
            assert np.shares_memory(taken.values, out)
            check(taken, ids)
        plain = bytearray(2 * count + 3)
        check(rows.take(ids, out=plain), ids)
        assert bytes(plain[: 2 * count]) == rows.take(ids).values.tobytes()
        for bad, error, text in (
            (np.empty(count - 1, np.uint16), ArgumentError, f"must have {count} elements or more"),
            (np.empty(count, np.int16), ArgumentError, "it must be uint16"),
            (np.empty((count, 1), np.uint16), ArgumentError, "each of shape"),
            (np.empty(2 * count, np.uint16)[::2], ArgumentError, "C-contiguous"),
            (bytearray(3), ArgumentError, "bytes; it must have"),
            (bytes(2 * count), ArgumentError, "writable"),
            ([0] * count, ArgumentTypeError, "must be memory"),
        ):
            with pytest.raises(error, match=text):
                rows.take(ids, out=bad)


@pytest.mark.needs("torch")
def test_tensors(path: Path) -> None:
    import torch

    with fremap.ragged(path, OFFSETS, torch.bfloat16) as rows:
        taken = rows.take([3, 4])
        assert taken.values.dtype is torch.bfloat16
        check(taken._replace(values=taken.values.view(torch.uint16).numpy()), [3, 4])
        out = torch.empty(1000, dtype=torch.bfloat16)
        into = rows.take([3, 4], out=out).values
        assert into.data_ptr() == out.data_ptr()
        assert torch.equal(into.view(torch.uint16), taken.values.view(torch.uint16))
        batch = next(rows.batches(2, [3, 4]))
        assert batch.values.dtype is torch.bfloat16


@pytest.mark.needs("torch")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_tensors(path: Path, workers: int) -> None:
    import torch
    from fremap.torch import BatchDataset
    from torch.utils.data import DataLoader

    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        dataset = BatchDataset(rows, 50, "sequential")
        first = 0
        for values, offsets in DataLoader(dataset, batch_size=None, num_workers=workers):
            assert offsets.dtype is torch.int64
            check(fremap.RaggedRows(values.numpy(), offsets.numpy()), range(first, first + 50))
            first += 50
        assert first == 300


def test_batches(path: Path) -> None:
    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        with rows.batches(7, seed=3, return_ids=True) as batches:
            seen = []
            for ids, batch in batches:
                check(batch, ids)
                seen += ids.tolist()
        assert sorted(seen) == list(range(300))
        with rows.batches(50, "sequential", prefetch=0) as batches:
            check(next(batches), range(50))


def test_async_and_threads(path: Path) -> None:
    async def together(rows: fremap.Ragged) -> list[fremap.RaggedRows]:
        return await asyncio.gather(*(rows.take_async([row, 299]) for row in range(20)))

    failed = []

    def take(rows: fremap.Ragged, seed: int) -> None:
        try:
            for _ in range(20):
                ids = np.random.default_rng(seed).integers(0, 300, 40)
                check(rows.take(ids), ids)
        except BaseException as error:
            failed.append(error)

    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        for row, taken in enumerate(asyncio.run(together(rows))):
            check(taken, [row, 299])
        threads = [threading.Thread(target=take, args=(rows, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []


def test_submitted(path: Path, in_child: Callable[..., int]) -> None:
    async def awaited(pending: fremap.Pending) -> Any:
        return await pending

    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        ids = np.array([7, 299, 7, -300])
        pending = rows.submit(ids)
        ids[:] = 1  # they were copied
        check(pending.result(60), [7, 299, 7, 0])
        check(asyncio.run(awaited(pending)), [7, 299, 7, 0])
        assert repr(pending) == (
            f"<fremap.Pending: {pending.result().values.shape} of uint16, done>"
        )
        out = np.zeros(int(OFFSETS[-1]) + 5, np.uint16)
        taken = rows.submit(slice(None), out=out).result(60)
        assert taken.values.base is out
        check(taken, range(300))
        many = [rows.submit([row, 3]) for row in range(300)]
        for row, pending in enumerate(many):
            check(pending.result(60), [row, 3])
        check(rows.submit([]).result(60), [])
        with pytest.raises(IndexError, match="row 300 is outside"):
            rows.submit([300])
        in_child(lambda: check(rows.submit([17, 4]).result(60), [17, 4]))
        last = rows.submit(slice(None))
    check(last.result(60), range(300))  # takes under way outlive close
    with pytest.raises(ClosedError):
        rows.submit([0])


def test_a_submitted_row_that_was_cut_is_named(path: Path) -> None:
    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        os.truncate(path, int(OFFSETS[200]) * 2 - 10)
        pending = rows.submit([3, 250, 4])
        for _ in range(2):
            with pytest.raises(fremap.TruncatedError, match="take: row 250: ") as caught:
                pending.result(60)
            assert caught.value.row == 250


def test_rows_of_a_file_that_has_just_changed_are_read_whole(path: Path) -> None:
    """Each by itself, until it did not change meanwhile; never element by element."""
    with fremap.ragged(path, [0, 20_000, 20_000, 30_000], np.uint16) as rows:
        rows.take([2])
        os.utime(path)  # later than the take begins, as far as the clock tells
        with counting() as calls:
            check(rows.take([0, 2]), [0, 2], offsets=[0, 20_000, 20_000, 30_000])
    assert calls.made.get("pread", 0) + calls.made.get("read", 0) <= 8


def test_pickles_and_children(path: Path, in_child: Callable[..., int]) -> None:
    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        with pickle.loads(pickle.dumps(rows)) as again:
            check(again.take([17]), [17])
            assert repr(again) == repr(rows)
        in_child(lambda: check(rows.take([17, 4]), [17, 4]))
        rows.close()
        with pytest.raises(TypeError, match="closed"):
            pickle.dumps(rows)


def test_a_file_that_was_cut_names_the_row(path: Path) -> None:
    with fremap.ragged(path, OFFSETS, np.uint16) as rows:
        os.truncate(path, int(OFFSETS[200]) * 2 - 10)
        with pytest.raises(fremap.TruncatedError, match="take: row 250: ") as caught:
            rows.take([3, 250, 4])
        assert caught.value.row == 250
        assert caught.value.filename == str(path)


# Megatron's files.

CODES = {1: "u1", 3: "i2", 4: "i4", 8: "u2"}


def write_megatron(prefix: Path, documents: list[np.ndarray], code: int = 8) -> None:
    counts = np.array([len(document) for document in documents], "<i4")
    item_bytes = np.dtype(CODES[code]).itemsize
    pointers = (np.cumsum(counts, dtype="<i8") - counts) * item_bytes
    front = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(counts), len(counts) + 1)
    ends = np.arange(len(counts) + 1, dtype="<i8")
    prefix.with_suffix(".idx").write_bytes(
        front + counts.tobytes() + pointers.astype("<i8").tobytes() + ends.tobytes()
    )
    prefix.with_suffix(".bin").write_bytes(b"".join(document.tobytes() for document in documents))


def documents_of(number: int, code: int = 8) -> list[np.ndarray]:
    random = np.random.default_rng(number)
    return [
        random.integers(0, 100, random.integers(0, 600)).astype(CODES[code])
        for _ in range(int(random.integers(1, 12)))
    ]


@pytest.mark.parametrize("code", CODES)
def test_megatron(tmp_path: Path, code: int) -> None:
    documents = documents_of(4, code)
    write_megatron(tmp_path / "corpus", documents, code)
    for source in ("corpus", "corpus.bin", "corpus.idx"):
        with fremap.ragged(tmp_path / source) as rows:
            assert rows.dtype == CODES[code]
            for row, document in zip(rows, documents, strict=True):
                np.testing.assert_array_equal(row, document)


def test_inspect_counts_sequences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fremap.cli import main

    documents = documents_of(4)
    write_megatron(tmp_path / "corpus", documents)
    assert main(["inspect", str(tmp_path / "corpus.idx"), "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["format"] == "megatron"
    (array,) = file["arrays"]
    assert array["shape"] == [len(documents)]
    assert array["bytes"] == sum(document.nbytes for document in documents)
    assert array["row_bytes"] is None


def test_many_files_with_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = []
    for number in range(400):
        part = documents_of(number)
        write_megatron(tmp_path / f"part-{number}", part)
        documents += part
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with fremap.ragged("part-*.bin") as rows:
        assert len(os.listdir("/proc/self/fd")) <= before
        assert len(rows) == len(documents)
        ids = np.random.default_rng(1).permutation(len(documents))
        values, offsets = rows.take(ids)
        np.testing.assert_array_equal(values, np.concatenate([documents[row] for row in ids]))
        assert np.diff(offsets).tolist() == [len(documents[row]) for row in ids]
        limit = max(1, min(512, os.sysconf("SC_OPEN_MAX") // 4))
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * limit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: b"", "does not begin like an index"),
        (lambda index: b"X" + index[1:], "does not begin like an index"),
        (lambda index: index[:9] + b"\2" + index[10:], "version 2"),
        (lambda index: index[:17] + b"\x63" + index[18:], "type 99"),
        (lambda index: index[:40], "truncated"),
        (lambda index: index[:18] + b"\xff" * 7 + b"\x7f" + index[26:], "too few"),
        (lambda index: index[:34] + b"\xff" * 4 + index[38:], "negative length"),
        (lambda index: index[:38] + b"\x01" + index[39:], "within an element|ends behind"),
        (lambda index: index[:34] + b"\xff\xff\xff\x7f" + index[38:], "ends behind them"),
    ],
    ids=range(9),
)
def test_an_index_that_is_damaged(
    tmp_path: Path, change: Callable[[bytes], bytes], text: str
) -> None:
    write_megatron(tmp_path / "corpus", [np.arange(5, dtype=np.uint16)])
    index = tmp_path / "corpus.idx"
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(FormatError, match=text):
        fremap.ragged(tmp_path / "corpus")


def test_files_that_are_not_alike(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", documents_of(1))
    write_megatron(tmp_path / "b", documents_of(1, 4), 4)
    with pytest.raises(ArgumentError, match=r"elements of uint16, .*of others"):
        fremap.ragged([tmp_path / "a", tmp_path / "b"])
    with (
        fremap.rows(tmp_path / "a.bin", np.uint16) as table,
        pytest.raises(ArgumentError, match="offsets are missing"),
    ):
        fremap.ragged(table)


# Lists in Arrow's files.


@pytest.mark.needs("pyarrow")
@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("large", [False, True])
def test_lists_of_arrow(tmp_path: Path, kind: str, large: bool) -> None:
    import pyarrow as pa

    documents = documents_of(7, 4) * 5
    vectors = [np.arange(len(part) * 2, dtype=np.float32).reshape(-1, 2) for part in documents]
    listed = pa.large_list if large else pa.list_
    table = pa.table(
        {
            "ids": pa.array([part.tolist() for part in documents], listed(pa.int32())),
            "pairs": pa.array(
                [part.tolist() for part in vectors], listed(pa.list_(pa.float32(), 2))
            ),
            "text": ["x"] * len(documents),
        }
    )
    paths = []
    maker = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    for number in range(2):
        paths.append(tmp_path / f"{number}.arrow")
        with maker(str(paths[-1]), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    for source in (paths, str(tmp_path / "?.arrow")):
        for column, expected in (("ids", documents * 2), ("pairs", vectors * 2)):
            with fremap.ragged(source, column=column) as rows:
                assert len(rows) == len(expected)
                for row, part in zip(rows, expected, strict=True):
                    assert row.dtype == part.dtype
                    np.testing.assert_array_equal(row, part)
                ids = [len(rows) - 1, 0, 3]
                np.testing.assert_array_equal(
                    rows.take(ids).values, np.concatenate([expected[row] for row in ids])
                )
    for arguments, error, text in (
        ({"column": "text"}, FormatError, "of type string, which is not a list of unequal length"),
        ({}, FormatError, "3 columns; choose one by column="),
        ({"column": "ids", "dtype": np.int64}, ArgumentError, "the lists hold int32, not"),
    ):
        with pytest.raises(error, match=text):
            fremap.ragged(paths[0], **arguments)
    with pytest.raises(FormatError, match=r"of unequal length by fremap\.ragged"):
        fremap.rows(paths[0], column="ids")


@pytest.mark.needs("pyarrow")
def test_lists_of_arrow_that_are_odd(tmp_path: Path) -> None:
    import pyarrow as pa

    path = tmp_path / "x.arrow"

    def write(column: Any, **options: Any) -> None:
        table = pa.table({"v": column})
        with pa.ipc.new_stream(
            str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)
        ) as writer:
            writer.write_table(table)

    write(pa.array([[1, 2], [], [3]]), compression="zstd")
    with pytest.raises(FormatError, match="is compressed"):
        fremap.ragged(path)
    for column in (pa.array([[1], None]), pa.array([[1], [None]])):
        write(column)
        with pytest.raises(FormatError, match="has missing values"):
            fremap.ragged(path)
    write(pa.array([[1, 2], [], [3]]).slice(1))
    with fremap.ragged(path) as rows:
        assert [row.tolist() for row in rows] == [[], [3]]
    for empty in (pa.array([], pa.list_(pa.int8())), pa.array([[], []], pa.list_(pa.int8()))):
        write(empty)
        with fremap.ragged(path) as rows:
            assert rows.take(slice(None)).values.tolist() == []
            assert len(rows) == len(empty)
