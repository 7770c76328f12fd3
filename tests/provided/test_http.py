"""Stores over objects on servers of HTTP: what is asked for, and what goes wrong."""

from __future__ import annotations

import errno
import pickle
import re
import threading
from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
from fremap.http_reader import HttpReader, redirected
from fremap.remote import Facts, Range, retried
from servers import COUNT, PAGE, TAIL, Served, Server, content, opened

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once


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


def test_content_that_is_encoded_is_refused(served: Served) -> None:
    """Some servers compress whatever is asked for; their ranges are those of what they send."""
    with opened(served) as store:
        served.encoding = "identity, GZip"
        with pytest.raises(fremap.ProviderError, match=r"sends the bytes encoded \(GZip\)") as told:
            store.read(3)
        assert told.value.errno == errno.EPROTO
        with pytest.raises(fremap.UnsupportedError, match=r"sends it encoded \(GZip\)"):
            opened(served)
        for encoding in ("identity", "aws-chunked", ""):
            served.encoding = encoding
            with opened(served) as other:
                np.testing.assert_array_equal(other.read(3), content([3]))


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
    with opened(served, timeout=1.5) as store:
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


@pytest.mark.parametrize("is_down", [True, False])
def test_a_server_that_fails_is_left_for_another(
    server: Server, served: Served, other: Server, is_down: bool
) -> None:
    """Where the server redirected to fails, the one that redirects is asked anew."""
    served.moved["/moved"] = other.served.url
    with fremap.RemoteStore(f"{server.base}/moved", retries=1) as store:
        np.testing.assert_array_equal(store.read(3), content([3]))
        served.moved["/moved"] = served.url
        if is_down:
            other.shutdown()
            other.server_close()
            other.hang_up()
        else:
            other.served.failing = [503] * 100
        np.testing.assert_array_equal(store.read(9), content([9]))
        assert (9 * PAGE, 10 * PAGE) in served.asked


def test_nothing_is_tried_again_after_others_gave_up() -> None:
    class SetMeanwhile(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            self.set()
            return super().wait(timeout)

    calls = []

    def fail() -> None:
        calls.append(1)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        retried(fail, 4, SetMeanwhile())
    assert len(calls) == 1


def test_an_idle_connection_is_not_hung_up_for_the_request_before(served: Served) -> None:
    reader = HttpReader(served.url, {}, 2, 0, 30.0)
    busy = []

    class Idle(dict):
        def setdefault(self, key: object, default: object = None) -> object:
            busy.append(set(reader._busy))
            return super().setdefault(key, default)

    reader._idle = Idle()
    facts = Facts(len(served.content), served.etag)
    memory = memoryview(bytearray(PAGE))
    reader.fetch([Range(3 * PAGE, memory)], facts)
    assert bytes(memory) == content([3]).tobytes()
    assert busy == [set()]
    for connections in reader._idle.values():
        for connection in connections:
            connection.close()


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


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_object(served: Served, ranges: bool) -> None:
    served.content, served.ranges = b"", ranges
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
        ({"mode": "r+"}, fremap.ArgumentError, "read-only"),
        ({"direct": True}, fremap.ArgumentError, "read-only"),
        ({"page_bytes": 1000}, fremap.ArgumentError, "page"),
        ({"storage_options": {"key": 1}}, fremap.ArgumentError, "only have headers"),
        ({"storage_options": 3}, fremap.ArgumentTypeError, "must be a mapping, not int"),
        ({"storage_options": {"headers": 3}}, fremap.ArgumentTypeError, "mapping of str to str"),
        ({"storage_options": {"headers": {"a": 3}}}, fremap.ArgumentTypeError, "of str to str"),
        ({"storage_options": {"headers": {"a": "b\nc"}}}, fremap.ArgumentError, "header value"),
    ],
)
def test_options_are_checked(served: Served, options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        fremap.open(served.url, **options)


def test_pages_are_checked_before_the_server_is_asked(served: Served) -> None:
    with pytest.raises(fremap.ArgumentError, match="open: page_bytes is 1000"):
        opened(served, page_bytes=1000)
    assert not served.paths


@pytest.mark.parametrize("size", [2**63, 2**70])
def test_impossible_sizes_are_refused(served: Served, size: int) -> None:
    served.said_size = size
    with pytest.raises(fremap.StoreError, match=f"is said to have {size} bytes"):
        opened(served)


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/x", "http:///x", "https://[::1/x"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(fremap.ArgumentError, match=f"open: {re.escape(url)}: "):
        fremap.open(url)


def test_urls_with_passwords_are_refused_and_not_shown(server: Server) -> None:
    url = server.served.url.replace("://", "://somebody:hidden@")
    with pytest.raises(fremap.ArgumentError, match="Authorization") as told:
        fremap.open(url)
    assert "hidden" not in str(told.value)
    assert not server.served.paths


def test_options_of_urls_are_not_those_of_files(tmp_path: Path) -> None:
    with pytest.raises(fremap.ArgumentError, match="only for URLs"):
        fremap.open(tmp_path / "x", storage_options={})
    with pytest.raises(fremap.ArgumentTypeError, match="source must be a URL"):
        fremap.RemoteStore("no/url")
