"""Rows and arrays of objects on servers."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
from fremap.testing.pages import fill_numbered, numbered_words
from servers import COUNT, PAGE, Served, Server, npy_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.once


def test_rows_of_an_npy_object(server: Server) -> None:
    table = np.arange(300_000, dtype=np.int32).reshape(-1, 3)
    server.served.content = npy_bytes(table)
    with fremap.rows(f"{server.base}/table.npy") as rows:
        assert (rows.dtype, rows.shape) == (table.dtype, table.shape)
        ids = np.random.default_rng(0).integers(0, len(table), (50, 3))
        np.testing.assert_array_equal(rows.take(ids), table[ids])
        np.testing.assert_array_equal(rows[10:90_000], table[10:90_000])
        np.testing.assert_array_equal(rows.submit([5, 99_999]).result(), table[[5, 99_999]])
        for batch in rows.batches(40_000, order="sequential"):
            assert len(batch) in (40_000, 20_000)
        with pytest.raises(fremap.PageRangeError):
            rows.take([len(table)])


def test_rows_of_safetensors_and_raw_bytes(server: Server) -> None:
    from safetensors.numpy import save

    table = np.arange(60_000, dtype=np.float32).reshape(-1, 6)
    server.served.content = save({"a": table[:7] * 2, "b": table})
    with fremap.rows(f"{server.base}/t.safetensors", tensor="b") as rows:
        np.testing.assert_array_equal(rows.take([9_999, 0, 5]), table[[9_999, 0, 5]])
    server.served.content = table.tobytes()
    with fremap.rows(server.served.url, np.float32, 6) as rows:
        np.testing.assert_array_equal(rows.take([9_999, 0, 5]), table[[9_999, 0, 5]])
        again = pickle.loads(pickle.dumps(rows))
        np.testing.assert_array_equal(again.take([1, 2]), table[[1, 2]])


def test_rows_end_the_processes_that_they_started(
    server: Server, started: Callable[[], list[int]], gone: Callable[[list[int]], None]
) -> None:
    """What is opened for a URL is closed with the rows; a store that is given is not."""
    server.served.content = npy_bytes(np.arange(30_000).reshape(-1, 3))
    url = f"{server.base}/table.npy"
    with fremap.rows(url) as rows:
        rows.take([5, 9_999])
        again = pickle.loads(pickle.dumps(rows))
        processes = started()
    gone(processes)
    with again:
        again.take([1])
        processes = started()
    gone(processes)
    with fremap.open(url) as store:
        with fremap.rows(store) as rows:
            rows.take([5])
        assert store.processes


def test_rows_of_unequal_length_share_a_process(
    server: Server, started: Callable[[], list[int]], gone: Callable[[list[int]], None]
) -> None:
    served = server.served
    values, offsets = np.arange(100, 150_000), np.array([0, 7, 7, 140_000])
    served.content = npy_bytes(values)
    served.beside["/offsets.npy"] = npy_bytes(offsets)
    url = f"{server.base}/table.npy"
    with fremap.ragged(url, f"{server.base}/offsets.npy") as lists:
        assert lists[2].tolist() == values[7:140_000].tolist()
        processes = started()
        assert len(processes) == 1
    gone(processes)
    with fremap.rows(url) as table:
        with fremap.ragged(table, offsets) as lists:
            assert lists[0].tolist() == values[:7].tolist()
        assert table.take([3]).tolist() == [103]
        assert started() == processes_of(table)
        again = pickle.loads(pickle.dumps(table))
    again.close()


def processes_of(rows: fremap.Rows) -> list[int]:
    return [process for shard in rows._shards for process in shard.file.processes]


def test_sequences_of_megatron(server: Server) -> None:
    from struct import pack

    tokens, lengths = np.arange(20_000, dtype=np.int32), np.array([5, 0, 19_000], np.int32)
    starts = (np.cumsum(lengths) - lengths).astype(np.int64) * 4
    front = pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, 3, 4)
    documents = np.arange(4, dtype=np.int64)
    index = front + lengths.tobytes() + starts.tobytes() + documents.tobytes()
    server.served.beside = {"/tokens.bin": tokens.tobytes(), "/tokens.idx": index}
    for name in ("tokens.bin", "tokens.idx"):
        with fremap.ragged(f"{server.base}/{name}") as sequences:
            assert sequences[0].tolist() == [0, 1, 2, 3, 4]
            assert sequences[2].tolist() == list(range(5, 19_005))


def checkpoint(folder: str) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """An index and the files that it names, by their paths in a folder; and the tensors."""
    from safetensors.numpy import save

    tensors = {f"t.{n}": np.arange(6_000, dtype=np.float32).reshape(-1, 6) + n for n in range(3)}
    files = {
        "part 1.safetensors": save({"t.0": tensors["t.0"], "t.2": tensors["t.2"]}),
        "more/2.safetensors": save({"t.1": tensors["t.1"]}),
    }
    places = {"t.0": "part 1.safetensors", "t.1": "more/2.safetensors", "t.2": "part 1.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    return {f"{folder}/{name.replace(' ', '%20')}": held for name, held in files.items()}, tensors


def test_tensors_of_a_checkpoint(
    server: Server, started: Callable[[], list[int]], gone: Callable[[list[int]], None]
) -> None:
    """The files that an index names are beside it, at URLs without its query."""
    server.served.beside, tensors = checkpoint("/models")
    url = f"{server.base}/models/model.safetensors.index.json"
    for source in (url, f"{url}?signed=a/b", fremap.open(url)):
        with fremap.rows(source, tensor="t.1") as rows:
            np.testing.assert_array_equal(rows.take([999, 3]), tensors["t.1"][[999, 3]])
        with fremap.rows([source], tensor="t.{i}") as rows:
            np.testing.assert_array_equal(rows[:], np.concatenate(list(tensors.values())))
            processes = started()
    source.close()
    gone(processes)


def test_inspecting(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    from fremap.cli import main

    served = server.served
    served.content = npy_bytes(np.zeros((7, 3), np.int16))
    url = f"{server.base}/table.npy"
    assert main(["inspect", url]) == 0
    assert f"{url}: npy" in capsys.readouterr().out
    served.beside, _ = checkpoint("/models")
    assert main(["inspect", f"{server.base}/models/model.safetensors.index.json", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [file["format"] for file in files] == ["index", "safetensors", "safetensors"]
    assert [array["name"] for array in files[1]["arrays"]] == ["t.0", "t.2"]
    served.beside["/x.h5"] = b"\x89HDF\r\n\x1a\n" + bytes(100)
    assert main(["inspect", f"{server.base}/x.h5"]) != 0
    assert "download it" in capsys.readouterr().err


def test_rows_of_objects_and_files_together(server: Server, tmp_path: Path) -> None:
    table = np.arange(60_000, dtype=np.int64).reshape(-1, 4)
    server.served.content = npy_bytes(table)
    np.save(tmp_path / "more.npy", -table)
    with fremap.rows([tmp_path / "more.npy", f"{server.base}/table.npy"]) as rows:
        ids = [0, 15_000, 29_999, 14_999, 20_000]
        np.testing.assert_array_equal(rows.take(ids), np.concatenate([-table, table])[ids])


def test_each_page_is_fetched_once_for_many_rows(served: Served) -> None:
    with fremap.rows(served.url, np.uint8, 1) as rows:
        served.asked.clear()
        rows.take([5 * PAGE + 1, 9 * PAGE, 5 * PAGE + 7, 6 * PAGE, 5 * PAGE + 1])
        assert sorted(served.asked) == [(5 * PAGE, 7 * PAGE), (9 * PAGE, 10 * PAGE)]


def test_a_row_that_cannot_be_fetched(served: Served) -> None:
    with fremap.rows(served.url, np.uint8, 1) as rows:
        served.etag = '"two"'
        with pytest.raises(fremap.ProviderError, match=r"take .*has changed since"):
            rows.take([5])


@pytest.mark.needs("paged")
def test_an_array_in_a_window(served: Served) -> None:
    expected = numbered_words(np.arange(COUNT), PAGE)
    array = fremap.memmap(served.url, np.uint64, "r", shape=expected.shape, budget=8 << 20)
    assert isinstance(array, np.memmap)
    assert array.filename == served.url
    assert not array.flags.writeable
    # A touch keeps the GIL unless it is of many elements, and the server needs it too.
    np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(array[[5, 3, 60, 5]], expected[[5, 3, 60, 5]])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array[3:5])), expected[3:5])
    assert array.window.engine == "paged"
    part = fremap.memmap(served.url, np.uint64, "r", offset=3 * PAGE + 8, shape=4)
    part.populate()
    assert part.tolist() == expected[3, 1:5].tolist()
    with pytest.raises(fremap.ArgumentError, match="read-only"):
        fremap.memmap(served.url)


@pytest.mark.needs("paged")
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_objects_as_arrays(
    server: Server, order: str, started: Callable[[], list[int]], gone: Callable[[list[int]], None]
) -> None:
    table = np.asarray(np.arange(40_000, dtype=np.int32).reshape(-1, 4), order=order)
    server.served.content = npy_bytes(table)
    url = f"{server.base}/table.npy"
    for array in (
        fremap.load(url),
        fremap.open_memmap(url, "r"),
        fremap.load(fremap.open(url, storage_options={"headers": {"X-Asked": "yes"}})),
    ):
        assert isinstance(array, np.memmap)
        assert (array.dtype, array.filename, array.mode) == (table.dtype, url, "r")
        array.populate()
        np.testing.assert_array_equal(array, table)
        np.testing.assert_array_equal(array[[9_999, 3, 3, 0, 1]], table[[9_999, 3, 3, 0, 1]])
        part = pickle.loads(pickle.dumps(array[5:9]))
        part.populate()
        np.testing.assert_array_equal(part, table[5:9])
    assert server.served.headers[-1]["X-Asked"] == "yes"
    for call, name in ((fremap.open_memmap, "open_memmap"), (fremap.load, "load")):
        with pytest.raises(fremap.ArgumentError, match=f"^{name}: mode .* read-only"):
            call(url, "r+")
    server.served.content = bytes(1000)
    processes = started()
    del array, part
    gone(processes)
    with pytest.raises(fremap.FormatError, match=rf"load: {url}: ") as told:
        fremap.load(url)
    # Though the error has what the call had.
    gone([*processes, *started()])
    assert told.tb is not None


def test_stores_with_files_are_no_file_names(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    np.save(path, np.arange(9))
    with fremap.FileStore(path) as store, fremap.MemoryStore(4096) as memory:
        for one, mode, name in ((store, "r", "FileStore"), (memory, "r+", "MemoryStore")):
            with pytest.raises(
                fremap.ArgumentTypeError, match=f"open_memmap: the file .* not {name}"
            ):
                fremap.open_memmap(one, mode)
            with pytest.raises(fremap.ArgumentTypeError, match=f"memmap: .* not {name}"):
                fremap.memmap(one, mode=mode)


@pytest.mark.needs("paged")
def test_an_array_of_computed_pages() -> None:
    expected = numbered_words(np.arange(9), 4096)
    with fremap.ComputedStore(9, fill_numbered, page_bytes=4096) as store:
        array = fremap.memmap(store, np.uint64, "r", shape=expected.shape)
        array.populate()
        np.testing.assert_array_equal(array, expected)
        part = pickle.loads(pickle.dumps(array[3:]))
        part.populate()
        np.testing.assert_array_equal(part, expected[3:])
        with pytest.raises(fremap.ArgumentError, match="read-only"):
            fremap.memmap(store)
