"""Objects on servers of HTTP, read by ranges with the standard library alone."""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from typing import TYPE_CHECKING, Any

from fremap.errors import UnsupportedError
from fremap.remote import Facts, changed, cut_short, retried

if TYPE_CHECKING:
    import http.client
    import socket
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    from fremap.remote import Range

__all__ = ["HttpReader"]

_MOST_REDIRECTS = 5
#: Answers of a server that may be others the next time.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_BY_STATUS: dict[int, type[OSError]] = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    410: FileNotFoundError,
}
_CONTENT_RANGE = re.compile(r"\s*bytes (?:(\d+)-(\d+)|\*)/(\d+)\s*", re.IGNORECASE | re.ASCII)


class HttpReader:
    """An object that a server of HTTP has at a URL.

    Parameters
    ----------
    url : str
        Where it is.
    headers : mapping of str to str
        What to say besides with each request.
    in_flight : int
        Requests at once.
    retries : int
        How often a request is made again that failed for what may pass.
    timeout : float
        Seconds that a server may be silent.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], in_flight: int, retries: int, timeout: float
    ) -> None:
        self.url = url
        self.headers = dict(headers)
        self.in_flight = in_flight
        self.retries = retries
        self.timeout = timeout
        self._begin()

    def _begin(self) -> None:
        self._idle: list[http.client.HTTPConnection] = []
        #: Sockets that answers are waited for on.
        self._busy: set[socket.socket] = set()
        self._threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return all but what belongs to this process."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without connections."""
        vars(self).update(state)
        self._begin()

    def facts(self) -> Facts:
        """Ask for the first byte, as some servers tell less without."""
        found: list[Facts] = []
        retried(lambda: found.append(self._asked()), self.retries)
        return found[0]

    def _asked(self) -> Facts:
        for _ in range(_MOST_REDIRECTS + 1):
            # Not kept: who asks does not fetch, as a rule.
            with contextlib.closing(self._connection()) as connection:
                answer = self._ask(connection, {"Range": "bytes=0-0"})
                location = answer.getheader("Location")
                if answer.status // 100 != 3 or not location:
                    return self._told(answer)
                from urllib.parse import urljoin

                self.url = urljoin(self.url, location)
        raise OSError(errno.ELOOP, f"more than {_MOST_REDIRECTS} redirections")

    def _told(self, answer: http.client.HTTPResponse) -> Facts:
        size = _whole_size(answer)
        if answer.status == 416 and size == 0:
            return Facts(0, _version(answer))
        if answer.status == 200 or (answer.status == 206 and size is None):
            raise UnsupportedError(
                f"open: the server of {self.url} does not send ranges of it, so that pages "
                "cannot be read; download it"
            )
        _check_status(answer)
        return Facts(size or 0, _version(answer))

    def _connection(self) -> http.client.HTTPConnection:
        """Return a connection that nobody uses."""
        try:
            return self._idle.pop()
        except IndexError:
            pass
        from http.client import HTTPConnection, HTTPSConnection
        from urllib.parse import urlsplit

        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=self.timeout)

    def _ask(
        self, connection: http.client.HTTPConnection, more: dict[str, str]
    ) -> http.client.HTTPResponse:
        from http.client import HTTPException
        from urllib.parse import urlsplit

        parts = urlsplit(self.url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request(
                "GET", target, headers={"Accept-Encoding": "identity", **self.headers, **more}
            )
            return connection.getresponse()
        except HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        """Fetch ranges, several at once; none goes on after the call has ended.

        The memory that they go to is that of other pages in the next call.
        """
        given_up = threading.Event()
        if len(ranges) == 1:
            self._fetch(ranges[0], facts, given_up)
            return
        from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.in_flight, "fremap-fetch")
        begun: list[Future[None]] = []
        try:
            for wanted in ranges:
                begun.append(self._threads.submit(self._fetch, wanted, facts, given_up))  # noqa: PERF401 - as many as have begun
            done, _ = wait(begun, return_when=FIRST_EXCEPTION)
        finally:
            given_up.set()
            for one in begun:
                one.cancel()
            self._hang_up()
            wait(begun)
        # Not those that have failed since, which is because they were hung up.
        for one in done:
            one.result()

    def _hang_up(self) -> None:
        """End the waiting of those who wait for answers."""
        import socket

        for connected in tuple(self._busy):
            with contextlib.suppress(OSError):  # the server was faster
                # Not by ssl, which would take what is still to come for content.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def _fetch(self, wanted: Range, facts: Facts, given_up: threading.Event) -> None:
        retried(lambda: self._fetch_once(wanted, facts, given_up), self.retries, given_up)

    def _fetch_once(self, wanted: Range, facts: Facts, given_up: threading.Event) -> None:
        connection = self._connection()
        connected = None
        try:
            if connection.sock is None:
                connection.connect()
            connected = connection.sock
            self._busy.add(connected)
            # Who gives up hangs up what is busy after he has said so.
            if given_up.is_set():
                raise ConnectionAbortedError(errno.ECONNABORTED, "another range has failed")
            self._receive(connection, wanted, facts)
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connected)
        self._idle.append(connection)

    def _receive(self, connection: http.client.HTTPConnection, wanted: Range, facts: Facts) -> None:
        headers = {"Range": f"bytes={wanted.start}-{wanted.end - 1}"}
        version = facts.version or ""
        if version.startswith('"'):  # what weak ones promise is not that bytes are the same
            headers["If-Match"] = version
        answer = self._ask(connection, headers)
        if answer.status in (200, 412, 416):
            raise changed()
        _check_status(answer)
        if _whole_size(answer) != facts.size or _version(answer) != facts.version:
            raise changed()
        done = 0
        while done < len(wanted.memory):
            count = answer.readinto(wanted.memory[done:])
            if count == 0:
                raise cut_short(wanted, done)
            done += count
        if answer.read(1):
            raise cut_short(wanted, done + 1)


def _whole_size(answer: http.client.HTTPResponse) -> int | None:
    """Return the bytes of the whole object, where the answer tells."""
    found = _CONTENT_RANGE.fullmatch(answer.getheader("Content-Range") or "")
    return None if found is None else int(found[3])


def _version(answer: http.client.HTTPResponse) -> str | None:
    return answer.getheader("ETag") or answer.getheader("Last-Modified")


def _check_status(answer: http.client.HTTPResponse) -> None:
    """Raise what an answer means that is no success."""
    status = answer.status
    if status == 206:
        return
    text = f"the server answers {status} {answer.reason}"
    if status in _PASSING:
        raise ConnectionError(text)
    if status in _BY_STATUS:
        kind = _BY_STATUS[status]
        raise kind(errno.ENOENT if kind is FileNotFoundError else errno.EACCES, text)
    raise OSError(errno.EPROTO, text) from None
