"""Stores over objects on servers: an HTTP server of the tests' own, and one of S3."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.http_reader import redirected
from fremap.testing.pages import fill_numbered, numbered_words
from servers import Served, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 65536
COUNT = 64
TAIL = b"the end"

needs_s3 = pytest.mark.needs("moto", "obstore", "s3fs")


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def other() -> Iterator[Server]:
    """Another server, with the same object."""
    with running_server() as server:
        yield server


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    server = Server(numbered_words(np.arange(COUNT), PAGE).tobytes() + TAIL)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.served.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def served(server: Server) -> Served:
    return server.served


def content(pages: Any) -> np.ndarray:
    return numbered_words(pages, PAGE).view(np.uint8)


def opened(served: Served, **options: Any) -> fremap.RemoteStore:
    return fremap.RemoteStore(served.url, **options)


# HTTP.


def test_pages_are_ranges_of_an_object(served: Served) -> None:
    with fremap.open(served.url) as store:
        assert isinstance(store, fremap.RemoteStore)
        assert (store.page_bytes, store.size, store.page_count) == (PAGE, len(served.content), 65)
        assert store.url == served.url
        assert not store.writable
        np.testing.assert_array_equal(store.read([9, 3, 9]), content([9, 3, 9]))
        last = store.read(-1)[0]
        assert last[: len(TAIL)].tobytes() == TAIL
        assert not last[len(TAIL) :].any()


def test_neighbours_are_one_request(served: Served) -> None:
    with opened(served, in_flight=1) as store:
        store.read([5, 4, 9, 6, 20])
        pages = [(start // PAGE, end // PAGE) for start, end in served.asked]
        assert sorted(pages) == [(4, 7), (9, 10), (20, 21)]
        served.asked.clear()
        store.read()
        assert sum(end - start for start, end in served.asked) == len(served.content)
        assert len(served.asked) == 2


@pytest.mark.parametrize("in_flight", [1, 3])
def test_requests_in_flight_are_limited(served: Served, in_flight: int) -> None:
    with opened(served, in_flight=in_flight) as store:
        served.gate.clear()
        done: list[np.ndarray] = []
        reading = threading.Thread(target=lambda: done.append(store.read(range(0, 64, 2))))
        reading.start()
        while served.at_once < in_flight:
            reading.join(0.01)
            assert reading.is_alive()
        served.gate.set()
        reading.join()
        np.testing.assert_array_equal(done[0], content(range(0, 64, 2)))
        assert served.most_at_once == in_flight


@pytest.mark.needs("paged")
def test_windows_slots_and_prefetch(served: Served) -> None:
    with opened(served) as store:
        with fremap.Window(store, engine="paged") as window:
            np.testing.assert_array_equal(window.pages[7], content([7])[0])
            np.testing.assert_array_equal(window.pages[:COUNT], content(range(COUNT)))
        with fremap.Slots(store, 2, 4) as slots:
            tiles = slots.array(np.uint8)
            np.testing.assert_array_equal(tiles[slots.ensure(3)].reshape(2, PAGE), content([6, 7]))
            del tiles
        served.asked.clear()
        store.prefetch([1, 2])
        np.testing.assert_array_equal(store.read([2, 1]), content([2, 1]))
        assert served.asked == [(PAGE, 3 * PAGE)]


def test_pages_of_another_size(served: Served) -> None:
    with fremap.open(served.url, page_bytes=4096) as store:
        store.read(3)
        assert served.asked == [(3 * 4096, 4 * 4096)]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_may_pass_is_tried_again(served: Served, status: int) -> None:
    with opened(served) as store:
        served.failing = [status, status]
        np.testing.assert_array_equal(store.read(3), content([3]))
        assert not served.failing


def test_tries_have_a_limit(served: Served) -> None:
    with opened(served, retries=1) as store:
        served.failing = [500] * 10
        with pytest.raises(fremap.ProviderError, match="the server answers 500"):
            store.read(3)
        assert len(served.failing) == 8
        served.failing = []
        np.testing.assert_array_equal(store.read(3), content([3]))


def test_an_answer_that_is_cut_is_asked_for_again(served: Served) -> None:
    with opened(served) as store:
        served.cut = 1
        np.testing.assert_array_equal(store.read([3, 5]), content([3, 5]))
        served.cut = 100
        with pytest.raises(fremap.ProviderError, match=r"were asked for|IncompleteRead"):
            opened(served, retries=0).read([3])


def test_other_bytes_than_those_asked_for_are_an_error(served: Served) -> None:
    with opened(served) as store:
        served.shift = 1
        with pytest.raises(fremap.ProviderError, match="bytes 196608-262143 were asked for, and"):
            store.read(3)


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError)],
)
def test_what_will_not_pass_is_an_error(served: Served, status: int, error: type) -> None:
    served.failing = [status]
    with pytest.raises(fremap.StoreError, match="open: ") as caught:
        fremap.open(served.url)
    assert isinstance(caught.value, error)
    assert caught.value.filename == served.url
    with opened(served) as store:
        served.failing = [status]
        with pytest.raises(fremap.ProviderError) as told:
            store.read(3)
        assert isinstance(told.value.__cause__, error)
        assert told.value.filename == served.url
        assert not served.failing


def test_no_range_outlives_its_request(served: Served) -> None:
    """What comes late for a request that has failed is not written over pages of the next."""
    with opened(served, in_flight=2) as store:
        served.refused[PAGE] = 403
        served.gates = {3 * PAGE: threading.Event(), 15 * PAGE: threading.Event()}
        with pytest.raises(fremap.ProviderError, match="403"):
            store.read([1, 3])
        read: list[np.ndarray] = []
        reading = threading.Thread(target=lambda: read.append(store.read([11, 13, 15, 17])))
        reading.start()
        # Page 13 is where page 3 would go to. A thread of two waits for page 15; the other one,
        # which page 3 would keep, goes on to page 17 when it has page 13 or 3.
        served.wait_for(15 * PAGE)
        served.gates[3 * PAGE].set()
        served.wait_for(17 * PAGE)
        served.gates[15 * PAGE].set()
        reading.join()
        np.testing.assert_array_equal(read[0], content([11, 13, 15, 17]))


def test_a_range_that_fails_ends_the_others(served: Served) -> None:
    """A call tells at once why it fails, whatever else it waits for."""
    with opened(served, timeout=None) as store:
        served.refused[PAGE] = 403
        served.gates[3 * PAGE] = threading.Event()
        with pytest.raises(fremap.ProviderError, match="the server answers 403"):
            store.read([1, 3, 5])
        assert (3 * PAGE, 4 * PAGE) not in served.asked


def test_a_hung_server_is_a_timeout(served: Served) -> None:
    with opened(served, timeout=0.5) as store:
        store.read(0)
        served.gate.clear()
        with pytest.raises(fremap.ProviderTimeoutError):
            store.read(1)
        served.gate.set()
        np.testing.assert_array_equal(store.read(1), content([1]))


@pytest.mark.parametrize("etag", ['"two"', None])
def test_another_version_is_an_error(served: Served, etag: str | None) -> None:
    with opened(served) as store:
        np.testing.assert_array_equal(store.read(3), content([3]))
        served.etag = etag
        for pages in ([3], [1, 5]):
            with pytest.raises(fremap.ProviderError, match="has changed since") as caught:
                store.read(pages)
            assert caught.value.errno == errno.ESTALE
        again = pickle.loads(pickle.dumps(store))
        with pytest.raises(fremap.ProviderError, match="has changed since"):
            again.read(3)


def test_without_a_tag_the_size_tells(served: Served) -> None:
    served.etag = None
    with opened(served) as store:
        np.testing.assert_array_equal(store.read(3), content([3]))
        served.content += b"more"
        with pytest.raises(fremap.ProviderError, match="has changed since"):
            store.read(3)


def test_a_server_without_ranges_is_refused(served: Served) -> None:
    served.ranges = False
    with pytest.raises(fremap.UnsupportedError, match="does not send ranges"):
        fremap.open(served.url)


def test_connections_that_the_server_has_closed_are_no_failure(
    server: Server, served: Served
) -> None:
    """Servers close what is idle; a read after that does not fail, nor use up its retries."""
    with opened(served, retries=0) as store:
        pages = range(0, 64, 2)
        np.testing.assert_array_equal(store.read(pages), content(pages))
        assert len(server.connected) > 2
        for _ in range(2):
            server.hang_up()
            np.testing.assert_array_equal(store.read(pages), content(pages))
        server.hang_up()
        np.testing.assert_array_equal(store.read(7), content([7]))


def test_no_answer_is_asked_for_again(served: Served) -> None:
    """The time is divided among the tries, so that one silence does not use it up."""
    with opened(served, timeout=8.0, retries=3) as store:
        store.read(0)
        served.silent = 1
        np.testing.assert_array_equal(store.read(1), content([1]))
        assert served.silent == 0


def test_redirections_are_followed(server: Server, served: Served) -> None:
    with fremap.open(f"{server.base}/moved") as store:
        assert store.url == f"{server.base}/moved"
        np.testing.assert_array_equal(store.read(3), content([3]))
        served.paths.clear()
        np.testing.assert_array_equal(store.read([5, 7]), content([5, 7]))
        assert served.paths == ["/object"] * 2


def test_another_server_is_told_no_secrets(server: Server, other: Server) -> None:
    """What the caller says to a server is not said to the one that it redirects to."""
    server.served.moved["/moved"] = other.served.url
    secrets = {"Authorization": "Bearer x", "cookie": "y", "Private-Token": "z"}
    options = {"headers": {**secrets, "User-Agent": "somebody"}}
    with fremap.open(f"{server.base}/moved", storage_options=options) as store:
        np.testing.assert_array_equal(store.read([3, 9]), content([3, 9]))
    assert server.served.paths
    assert other.served.asked
    for told in server.served.headers:
        assert secrets.items() <= told.items()
    for told in other.served.headers:
        assert not secrets.keys() & told.keys()
        assert told["User-Agent"] == "somebody"


def test_the_same_server_is_told_all(server: Server, served: Served) -> None:
    options = {"headers": {"Authorization": "Bearer x"}}
    with fremap.open(f"{server.base}/moved", storage_options=options) as store:
        store.read(3)
    assert {told.get("Authorization") for told in served.headers} == {"Bearer x"}


@pytest.mark.parametrize("status", [400, 401, 403, 410])
def test_links_that_expire_are_asked_for_again(
    server: Server, served: Served, other: Server, status: int
) -> None:
    """A server signs a link that is good for some time; the object stays at its own URL."""

    def sign(number: int) -> None:
        other.served.signed = f"/signed?{number}"
        served.moved["/moved"] = f"{other.base}/signed?{number}"

    sign(1)
    other.served.expired = status
    with fremap.open(f"{server.base}/moved", storage_options={}) as store:
        np.testing.assert_array_equal(store.read([3, 9]), content([3, 9]))
        again = pickle.loads(pickle.dumps(store))
        sign(2)
        for one in (store, again):
            np.testing.assert_array_equal(one.read([3, 9, 11]), content([3, 9, 11]))
        sign(3)
        other.served.etag = '"two"'
        with pytest.raises(fremap.ProviderError, match="has changed since"):
            store.read([3, 9])
        other.served.signed = ""
        with pytest.raises(fremap.ProviderError, match=rf"127\.0\.0\.1 answers {status} "):
            store.read(3)


@pytest.mark.parametrize("scheme", ["ftp", "file", "gopher"])
def test_redirections_stay_with_http(server: Server, served: Served, scheme: str) -> None:
    served.moved["/moved"] = f"{scheme}://127.0.0.1/object"
    with pytest.raises(fremap.UnsupportedError, match=f"redirects from http to {scheme}"):
        fremap.open(f"{server.base}/moved")
    assert served.paths == ["/moved"]


def test_redirections_do_not_leave_what_is_encrypted() -> None:
    with pytest.raises(fremap.UnsupportedError, match="redirects from https to http"):
        redirected("https://a/object", "http://a/object")
    assert redirected("http://a/object", "https://b/x") == "https://b/x"
    assert redirected("https://a/b/object?x", "../c?y=1") == "https://a/c?y=1"
    assert redirected("https://a/object", "//b/\xc3\xa9 %20") == "https://b/%C3%A9%20%20"


def test_redirections_in_a_circle_are_an_error(server: Server, served: Served) -> None:
    served.moved = {"/moved": "/on", "/on": "/moved"}
    with pytest.raises(fremap.StoreError, match="redirections"):
        fremap.open(f"{server.base}/moved")
    assert len(served.paths) == 6


def test_an_empty_object(served: Served) -> None:
    served.content = b""
    with opened(served) as store:
        assert (store.size, store.page_count) == (0, 0)
        assert store.read().shape == (0, PAGE)


def test_headers_and_queries_are_sent(served: Served) -> None:
    options = {"headers": {"Authorization": "Bearer x"}}
    with fremap.open(served.url + "?a=1&b=%20", storage_options=options) as store:
        store.read(1)
        assert served.headers[-1]["Authorization"] == "Bearer x"


def test_nobody_listens() -> None:
    with pytest.raises(fremap.StoreError, match="open: "):
        fremap.RemoteStore("http://127.0.0.1:1/object", retries=0)


@pytest.mark.parametrize("status", [400, 405, 501])
def test_what_will_never_pass_is_told_in_the_servers_words(served: Served, status: int) -> None:
    served.failing = [status]
    with pytest.raises(fremap.StoreError, match=rf"open: the server answers {status} \w+") as told:
        fremap.open(served.url)
    assert told.value.errno == errno.EPROTO
    assert len(served.paths) == 1
    with opened(served) as store:
        served.failing = [status]
        with pytest.raises(fremap.ProviderError, match=f"the server answers {status} "):
            store.read(3)
        assert not served.failing


def test_opening_has_an_end(served: Served) -> None:
    """A server that takes connections and never answers does not hold up `open` for ever."""
    served.gates[0] = threading.Event()
    with pytest.raises(fremap.StoreError, match=r"no answer within 0\.5 seconds") as told:
        opened(served, timeout=0.5)
    assert told.value.errno == errno.ETIMEDOUT
    assert told.value.filename == served.url


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"mode": "r+"}, fremap.ArgumentError, "only read"),
        ({"direct": True}, fremap.ArgumentError, "only read"),
        ({"page_bytes": 1000}, fremap.ArgumentError, "page"),
        ({"storage_options": {"key": 1}}, fremap.ArgumentError, "headers alone"),
    ],
)
def test_options_are_checked(served: Served, options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        fremap.open(served.url, **options)


def test_options_of_urls_are_not_those_of_files(tmp_path: Path) -> None:
    with pytest.raises(fremap.ArgumentError, match="goes with a URL"):
        fremap.open(tmp_path / "x", storage_options={})
    with pytest.raises(fremap.ArgumentTypeError, match="source must be a URL"):
        fremap.RemoteStore("no/url")


# Rows and arrays.


def npy_bytes(array: np.ndarray) -> bytes:
    import io

    front = io.BytesIO()
    np.save(front, array)
    return front.getvalue()


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
    with pytest.raises(fremap.ArgumentError, match="only read"):
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
    for call in (fremap.open_memmap, lambda url: fremap.load(url, "r+")):
        with pytest.raises(fremap.ArgumentError, match="only read"):
            call(url)
    server.served.content = bytes(1000)
    with pytest.raises(fremap.FormatError, match=rf"load: {url}: "):
        fremap.load(url)
    processes = started()
    del array, part
    gone(processes)


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
        with pytest.raises(fremap.ArgumentError, match="only read"):
            fremap.memmap(store)


# S3, by each of the ways.


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An S3 client that has a bucket with an object of numbered pages."""
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="pages")
    client.put_object(Bucket="pages", Key="a/object", Body=content(range(COUNT)).tobytes() + TAIL)
    return client


def s3_source(kind: str, endpoint: str) -> tuple[Any, dict[str, Any]]:
    if kind == "url":
        return "s3://pages/a/object", {}
    options = {"client_kwargs": {"endpoint_url": endpoint}}
    if kind == "fsspec url":
        return "s3://pages/a/object", {"storage_options": options}
    if kind == "fsspec":
        import s3fs

        return (s3fs.S3FileSystem(**options), "pages/a/object"), {}
    from obstore.store import S3Store

    store = S3Store("pages", endpoint=endpoint, client_options={"allow_http": True})
    return (store, "a/object"), {}


@needs_s3
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["url", "fsspec url", "fsspec", "obstore"])
def test_objects_in_s3(kind: str, endpoint: str, bucket: Any) -> None:
    source, options = s3_source(kind, endpoint)
    with fremap.open(source, **options) as store:
        assert store.size == COUNT * PAGE + len(TAIL)
        np.testing.assert_array_equal(store.read([9, 3, 4, 60]), content([9, 3, 4, 60]))
        np.testing.assert_array_equal(store.read(range(0, 64, 2)), content(range(0, 64, 2)))
        np.testing.assert_array_equal(store.read(7), content([7]))
        assert store.read(64)[0, : len(TAIL)].tobytes() == TAIL
        bucket.put_object(Bucket="pages", Key="a/object", Body=bytes(len(TAIL) + COUNT * PAGE))
        for pages in ([3], [1, 5, 9]):
            with pytest.raises(fremap.ProviderError, match="has changed since") as caught:
                store.read(pages)
            assert caught.value.errno == errno.ESTALE


@needs_s3
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["url", "fsspec url"])
def test_objects_that_are_not_there(kind: str, endpoint: str, bucket: Any) -> None:
    source, options = s3_source(kind, endpoint)
    with pytest.raises(fremap.StoreNotFoundError):
        fremap.open(source.replace("object", "nothing"), **options)


@needs_s3
def test_rows_in_s3(endpoint: str, bucket: Any) -> None:
    table = np.arange(400_000, dtype=np.int32).reshape(-1, 4)
    bucket.put_object(Bucket="pages", Key="t.npy", Body=npy_bytes(table))
    ids = np.random.default_rng(0).integers(0, len(table), 500)
    with fremap.rows("s3://pages/t.npy") as rows:
        np.testing.assert_array_equal(rows.take(ids), table[ids])


@pytest.mark.needs("fsspec")
def test_other_urls_are_fsspecs(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(content(range(4)).tobytes())
    with fremap.open(f"file://{path}") as store:
        np.testing.assert_array_equal(store.read([3, 0]), content([3, 0]))
        path.write_bytes(bytes(4 * PAGE))
        os.utime(path, ns=(1, 1))
        with pytest.raises(fremap.ProviderError, match="has changed since"):
            store.read(1)
    with pytest.raises(fremap.UnsupportedError, match="in the memory of this process"):
        fremap.open("memory://x")
    with pytest.raises(fremap.UnsupportedError, match="fsspec cannot open"):
        fremap.open("nosuch://x/y")


def test_nothing_is_imported_before() -> None:
    code = (
        "import sys, fremap\n"
        "names = ('fsspec', 'obstore', 'http.client', 'socket', 'multiprocessing')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


# The documentation.

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = re.compile(r"^```python program\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in ("README.md", "docs/start.md", "docs/guides/remote.md", "docs/guides/computed.md")
    for number, block in enumerate(PROGRAM.findall((REPOSITORY / name).read_text()))
]


@pytest.mark.needs("paged")
@pytest.mark.parametrize("block", PROGRAMS)
def test_programs_of_the_documentation_run(block: str, server: Server, tmp_path: Path) -> None:
    server.served.content = npy_bytes(np.arange(40_000).reshape(10_000, 4))
    program = tmp_path / "program.py"
    program.write_text(block.replace("https://example.com", server.base))
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
