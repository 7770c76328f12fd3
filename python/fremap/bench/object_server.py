"""A server that has one file as an object of S3, in a process of its own, for suite `remote`.

It answers GET, with one range, and HEAD, whatever the path and the signature. It does no more, so
that what is measured is the client.
"""

import asyncio
import contextlib
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

_RANGE = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)
_VERSION = b'ETag: "one"\r\nLast-Modified: Fri, 01 Mar 2002 12:00:00 GMT\r\n'
_TALLY_PATH = "/tally"


class Tally(NamedTuple):
    """What a server has done.

    Attributes
    ----------
    requests, content_bytes
        Requests, and bytes that were sent in answer to them.
    most_at_once
        Requests that waited for their answers at the same time.
    """

    requests: int = 0
    content_bytes: int = 0
    most_at_once: int = 0


class ObjectServer:
    """A server that runs, seen from the process that has started it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.endpoint = f"http://127.0.0.1:{port}"

    def tally(self) -> Tally:
        """Return what the server has done since this was last asked."""
        connection = HTTPConnection("127.0.0.1", self._port)
        with contextlib.closing(connection):
            connection.request("GET", _TALLY_PATH)
            return Tally(*json.loads(connection.getresponse().read()))


@contextlib.contextmanager
def object_server(path: Path, delay: float = 0.0) -> Iterator[ObjectServer]:
    """Run a server of a file that begins each answer `delay` seconds after its request."""
    command = [sys.executable, "-c", f"from {__name__} import main; main()", str(path), str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise AssertionError("the server has no stdout")
        try:
            yield ObjectServer(int(process.stdout.readline()))
        finally:
            process.kill()


class _Connection(asyncio.Protocol):
    """A client's connection."""

    def __init__(self, served: "_Served") -> None:
        self._served = served
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        # No client of ours asks again before it has its answer.
        self._received += data
        if self._received.endswith(b"\r\n\r\n"):
            request, self._received = self._received, b""
            self._served.answer(request, self._transport)


class _Served:
    """The object, and what has been done with it."""

    def __init__(self, path: str, delay: float) -> None:
        with open(path, "rb") as file:
            self._content = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        self._delay = delay
        self._at_once = 0
        self._tally = Tally()

    def answer(self, request: bytes, transport: asyncio.Transport) -> None:
        """Answer a request, in time."""
        if request.startswith(f"GET {_TALLY_PATH} ".encode()):
            told, self._tally = json.dumps(self._tally).encode(), Tally()
            transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))
            return
        self._at_once += 1
        asyncio.get_running_loop().call_later(self._delay, self._send, request, transport)

    def _send(self, request: bytes, transport: asyncio.Transport) -> None:
        size = len(self._content)
        wanted = _RANGE.search(request)
        start, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
        status = b"206 Partial Content" if wanted else b"200 OK"
        head = b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n" % (status, _VERSION, end - start)
        if wanted:
            head += b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, size)
        content = self._content[start:end] if request.startswith(b"GET ") else b""
        transport.writelines([head + b"\r\n", content])
        before = self._tally
        self._tally = Tally(
            before.requests + 1,
            before.content_bytes + len(content),
            max(before.most_at_once, self._at_once),
        )
        self._at_once -= 1


async def _serve(path: str, delay: float) -> None:
    """Serve until stdin is closed."""
    loop = asyncio.get_running_loop()
    served = _Served(path, delay)
    server = await loop.create_server(lambda: _Connection(served), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()
    os._exit(0)


def main() -> None:
    """Serve the file that the first argument names; the second one is the delay."""
    asyncio.run(_serve(sys.argv[1], float(sys.argv[2])))
