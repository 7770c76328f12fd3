"""A server of HTTP with ranges, whose answers can be made wrong and late."""

from __future__ import annotations

import contextlib
import http.server
import io
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
from fremap.testing.pages import numbered_words

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 65536
COUNT = 64
TAIL = b"the end"


@dataclass
class Served:
    """What the server has, and how it answers."""

    content: bytes
    #: What is at other paths.
    beside: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"one"'
    #: How the server says that answers for ranges are encoded.
    encoding: str | None = None
    #: Statuses that the next requests get instead of an answer.
    failing: list[int] = field(default_factory=list)
    #: Requests that get half of what they ask for, and then the end of the connection.
    cut: int = 0
    ranges: bool = True
    #: What the server says that the size is.
    said_size: int | None = None
    #: Bytes behind those asked for that are said to be sent.
    shift: int = 0
    #: Every request waits for this.
    gate: threading.Event = field(default_factory=threading.Event)
    #: Statuses that requests for ranges get, and events that they wait for, by the first byte.
    refused: dict[int, int] = field(default_factory=dict)
    gates: dict[int, threading.Event] = field(default_factory=dict)
    #: Where requests for a path are redirected to.
    moved: dict[str, str] = field(default_factory=lambda: {"/moved": "/object"})
    #: The one link that the server has signed and takes; others get the status.
    signed: str = ""
    expired: int = 403
    #: Requests for ranges that get no answer.
    silent: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    paths: list[str] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.gate.set()

    def wait_for(self, begin: int) -> None:
        """Wait until a range that begins at a byte was asked for."""
        deadline = time.monotonic() + 60
        while not any(f"bytes={begin}-" in sent.get("Range", "") for sent in self.headers):
            assert time.monotonic() < deadline, f"nobody asks for byte {begin}"
            time.sleep(0.01)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        served: Served = self.server.served
        with served.lock:
            served.headers.append(dict(self.headers))
            served.paths.append(self.path)
            served.at_once += 1
            served.most_at_once = max(served.most_at_once, served.at_once)
        self.waits = True
        try:
            self.answer(served)
        finally:
            self.waited()

    def waited(self) -> None:
        """Count the client no longer, which may ask again as soon as it has the answer."""
        with self.server.served.lock:
            self.server.served.at_once -= self.waits
        self.waits = False

    do_HEAD = do_GET  # noqa: N815 - what http.server calls

    def answer(self, served: Served) -> None:
        if self.path in served.moved:
            self.send(302, {"Location": served.moved[self.path]}, b"it is there")
            return
        if self.path.startswith("/signed") and self.path != served.signed:
            self.send(served.expired, content=b"too late")
            return
        known = ("/object", "/table.npy", "/t.safetensors", "/signed")
        path = self.path.partition("?")[0]
        if path not in known and path not in served.beside:
            self.send(404)
            return
        whole = served.beside.get(path, served.content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        is_first = wanted is not None and wanted.groups() == ("0", "0")
        if not is_first:
            served.gate.wait(60)
        begin = int(wanted[1]) if wanted else -1
        if begin in served.gates:
            served.gates[begin].wait(30)
        with served.lock:
            is_silent = served.silent > 0 and not is_first
            served.silent -= is_silent
        if is_silent:
            served.over.wait(60)
            self.close_connection = True
            return
        with served.lock:
            status = served.refused.get(begin)
            if status is None and served.failing:
                status = served.failing.pop(0)
        if status is not None:
            self.send(status)
            return
        tag = {} if served.etag is None else {"ETag": served.etag}
        if self.headers.get("If-Match", served.etag) != served.etag:
            self.send(412)
            return
        if wanted is None or not served.ranges:
            self.send(200, tag, whole)
            return
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(whole))
        if start >= len(whole):
            self.send(416, {"Content-Range": f"bytes */{len(whole)}"})
            return
        content = whole[start:end]
        with served.lock:
            cut = served.cut > 0 and not is_first
            served.cut -= cut
            if not is_first:
                served.asked.append((start, end))
        if served.encoding is not None:
            tag["Content-Encoding"] = served.encoding
        at = start + served.shift * (not is_first)
        place = {
            "Content-Range": f"bytes {at}-{at + end - start - 1}/{served.said_size or len(whole)}"
        }
        self.send(206, {**tag, **place}, content, cut=cut)

    def send(
        self,
        status: int,
        headers: dict[str, str] | None = None,
        content: bytes = b"",
        *,
        cut: bool = False,
    ) -> None:
        self.waited()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Note which connections there are."""
        self.connected.add(request)
        super().finish_request(request, client_address)

    def hang_up(self) -> None:
        """Close all connections, as servers do with those that are idle for long."""
        for connection in tuple(self.connected):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_arguments: object) -> None:
        """Say nothing of clients that are gone."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.connected: set[socket.socket] = set()
        self.served = Served(content)
        self.base = f"http://127.0.0.1:{self.server_address[1]}"
        self.served.url = f"{self.base}/object"


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    server = Server(numbered_words(np.arange(COUNT), PAGE).tobytes() + TAIL)
    # `shutdown` waits for as long as a poll takes.
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    yield server
    server.served.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def content(pages: Any) -> np.ndarray:
    return numbered_words(pages, PAGE).view(np.uint8)


def opened(served: Served, **options: Any) -> fremap.RemoteStore:
    return fremap.RemoteStore(served.url, **options)


def npy_bytes(array: np.ndarray) -> bytes:
    front = io.BytesIO()
    np.save(front, array)
    return front.getvalue()
