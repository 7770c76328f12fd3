"""Objects on HTTP servers, read by range requests with only the standard library."""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import string
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from fremap.errors import UnsupportedError
from fremap.remote import Facts, FetchThreads, changed, cut_short, retried

if TYPE_CHECKING:
    import http.client
    import socket
    from collections.abc import Mapping, Sequence

    from fremap.remote import Range

__all__ = ["HttpReader"]

_MOST_REDIRECTS = 5
#: Bytes of an answer that are read to keep its connection.
_MOST_DRAINED_BYTES = 64 << 10
#: The caller's headers that a server other than that of the URL gets.
_FOR_ANYBODY = frozenset({"accept", "accept-language", "user-agent"})
#: What servers answer when a link that they have signed is too old.
_EXPIRED = frozenset({400, 401, 403, 404, 410})
#: Answers of a server that may be others the next time.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Ways to encode content that leave its bytes as they are. The second is that of uploads by signed
#: chunks, which some servers of S3 repeat.
_AS_IT_IS = frozenset({"", "identity", "aws-chunked"})
_BY_STATUS: dict[int, type[OSError]] = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    410: FileNotFoundError,
}
_CONTENT_RANGE = re.compile(r"\s*bytes (?:(\d+)-(\d+)|\*)/(\d+)\s*", re.IGNORECASE | re.ASCII)


class _Server(NamedTuple):
    """Whom a connection leads to."""

    scheme: str
    host: str
    port: int


class _Exchange(NamedTuple):
    """A request that was made, and the beginning of its answer."""

    server: _Server
    connection: http.client.HTTPConnection
    socket: socket.socket
    #: What messages call the server.
    who: str
    answer: http.client.HTTPResponse


class HttpReader:
    """An object that a server of HTTP has at a URL.

    Where the server redirects to another URL, that is asked from then on, until it refuses (links
    that are signed expire) or fails: then the server is asked anew. Another server gets none of
    `headers` that could be a secret.

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
    silence : float
        Seconds that a server may be silent.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], in_flight: int, retries: int, silence: float
    ) -> None:
        self.url = url
        self.headers = dict(headers)
        self.retries = retries
        self.silence = silence
        self.threads = FetchThreads(in_flight)
        self._begin()

    def _begin(self) -> None:
        #: Where the server says that the object is, if it is elsewhere.
        self._target: str | None = None
        self._idle: dict[_Server, list[http.client.HTTPConnection]] = {}
        #: Sockets that answers are waited for on.
        self._busy: set[socket.socket] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return all but what belongs to this process, or will not stay true."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without connections."""
        vars(self).update(state)
        self._begin()

    @property
    def options(self) -> str:
        """The headers: what a server has at a URL may depend on any of them."""
        return repr(sorted(self.headers.items()))

    def beside(self, name: str) -> HttpReader:
        """Return a reader of another object, by its name beside this one."""
        from urllib.parse import quote, urljoin

        # The query is this object's, the signature of a link as a rule.
        url = urljoin(self.url, "./" + quote(name))
        return HttpReader(url, self.headers, self.threads.count, self.retries, self.silence)

    def facts(self) -> Facts:
        """Ask for the first byte, as some servers tell less without."""
        try:
            return retried(self._asked, self.retries)
        finally:
            # The process that asks is usually not the one that fetches.
            for server in tuple(self._idle):
                self._forget(server)

    def _asked(self) -> Facts:
        exchange = self._request({"Range": "bytes=0-0"}, threading.Event())
        try:
            return self._told(exchange)
        finally:
            self._end(exchange)

    def _told(self, exchange: _Exchange) -> Facts:
        answer = exchange.answer
        size = _whole_size(answer)
        if answer.status == 416 and size == 0:
            return Facts(0, _version(answer))
        if answer.status == 200 and answer.length == 0:
            # Nothing has no ranges.
            return Facts(0, _version(answer))
        if answer.status == 200 or (answer.status == 206 and size is None):
            raise UnsupportedError(
                f"open: the server of {self.url} does not send ranges of bytes, so pages cannot be "
                "read; download it"
            )
        _check_status(exchange)
        encoding = _encoding(answer)
        if encoding is not None:
            raise UnsupportedError(
                f"open: the server of {self.url} sends it encoded ({encoding}) although that was "
                "not asked for, so that ranges are not those of its content; download it"
            )
        return Facts(size or 0, _version(answer))

    def _request(self, more: dict[str, str], given_up: threading.Event) -> _Exchange:
        """Ask where the object is, which another server may have."""
        remembered = self._target
        url = remembered or self.url
        redirections = 0
        while True:
            try:
                exchange = self._ask(url, more, given_up)
            except OSError:
                # It may be down for good, and another be named instead.
                self._target = None
                raise
            answer = exchange.answer
            location = answer.getheader("Location")
            if answer.status // 100 == 3 and location:
                redirections += 1
                if redirections > _MOST_REDIRECTS:
                    self._end(exchange)
                    raise OSError(errno.ELOOP, f"more than {_MOST_REDIRECTS} redirections")
                try:
                    url = redirected(url, location)
                finally:
                    self._end(exchange)
            elif remembered is not None and answer.status in _EXPIRED:
                self._end(exchange)
                remembered = self._target = None
                url = self.url
            else:
                # After a failure, ask the URL's server again: it may redirect to another one.
                is_elsewhere = answer.status == 206 and url != self.url
                self._target = url if is_elsewhere else None
                return exchange

    def _ask(self, url: str, more: dict[str, str], given_up: threading.Event) -> _Exchange:
        """Make a request, by a connection that is there or by a new one."""
        server, target = _split(url)
        headers = {"Accept-Encoding": "identity", **self._headers_for(server), **more}
        kept = self._kept(server)
        if kept is not None:
            try:
                return self._exchanged(server, kept, target, headers, given_up)
            except OSError as error:
                # Else the server has closed it, as it was idle, which is no failure.
                if isinstance(error, TimeoutError) or given_up.is_set():
                    raise
        return self._exchanged(server, self._connection(server), target, headers, given_up)

    def _kept(self, server: _Server) -> http.client.HTTPConnection | None:
        """Return an idle connection, if there is one."""
        try:
            return self._idle[server].pop()
        except LookupError:
            return None

    def _headers_for(self, server: _Server) -> dict[str, str]:
        if server == _split(self.url)[0]:
            return self.headers
        return {name: told for name, told in self.headers.items() if name.lower() in _FOR_ANYBODY}

    def _connection(self, server: _Server) -> http.client.HTTPConnection:
        from http.client import HTTPConnection, HTTPSConnection

        kind = HTTPSConnection if server.scheme == "https" else HTTPConnection
        return kind(server.host, server.port, timeout=self.silence)

    def _exchanged(
        self,
        server: _Server,
        connection: http.client.HTTPConnection,
        target: str,
        headers: dict[str, str],
        given_up: threading.Event,
    ) -> _Exchange:
        """Make a request by a connection, and read the beginning of the answer."""
        from http.client import HTTPException

        connected = None
        try:
            if connection.sock is None:
                connection.connect()
            connected = connection.sock
            self._busy.add(connected)
            # A thread that gives up says so before it closes busy connections.
            if given_up.is_set():
                why = "another request of this read has failed"
                raise ConnectionAbortedError(errno.ECONNABORTED, why)
            connection.request("GET", target, headers=headers)
            who = "the server" if server == _split(self.url)[0] else server.host
            return _Exchange(server, connection, connected, who, connection.getresponse())
        except BaseException as error:
            self._busy.discard(connected)
            connection.close()
            if isinstance(error, OSError | HTTPException):
                self._forget(server)
            if isinstance(error, HTTPException) and not isinstance(error, OSError):
                raise _broken(error) from error
            raise

    def _forget(self, server: _Server) -> None:
        """Close the idle connections to a server: what has ended one has ended all, mostly."""
        # One by one, as other threads take and add some meanwhile.
        while (kept := self._kept(server)) is not None:
            kept.close()

    def _end(self, exchange: _Exchange) -> None:
        """Be done with an answer, and keep its connection if nothing more is to come by it."""
        answer = exchange.answer
        try:
            # What was asked for was read, or could not be.
            if answer.status != 206 and (answer.length or 0) <= _MOST_DRAINED_BYTES:
                with contextlib.suppress(Exception):  # of what nobody wants
                    answer.read(_MOST_DRAINED_BYTES)
        finally:
            # Before another thread can have the connection, which is to be hung up then.
            self._busy.discard(exchange.socket)
            if answer.isclosed():
                self._idle.setdefault(exchange.server, []).append(exchange.connection)
            else:
                answer.close()
                exchange.connection.close()

    def fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        """Fetch ranges, several at once; none is still running when the call has returned.

        The memory that they go to is that of other pages in the next call.
        """
        self.threads.run(
            lambda wanted, given_up: self._fetch(wanted, facts, given_up), ranges, self._hang_up
        )

    def _hang_up(self) -> None:
        """Wake the threads that wait for answers, and end their waiting."""
        import socket

        for connected in tuple(self._busy):
            with contextlib.suppress(OSError):  # the server was faster
                # Not by ssl, which would take what is still to come for content.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def _fetch(self, wanted: Range, facts: Facts, given_up: threading.Event) -> None:
        retried(lambda: self._fetch_once(wanted, facts, given_up), self.retries, given_up)

    def _fetch_once(self, wanted: Range, facts: Facts, given_up: threading.Event) -> None:
        headers = {"Range": f"bytes={wanted.start}-{wanted.end - 1}"}
        version = facts.version or ""
        if version.startswith('"'):  # what weak ones promise is not that bytes are the same
            headers["If-Match"] = version
        exchange = self._request(headers, given_up)
        try:
            _receive(exchange, wanted, facts)
        finally:
            self._end(exchange)


def redirected(url: str, location: str) -> str:
    """Return where the server of a URL says that the object is.

    Raises
    ------
    UnsupportedError
        Whoever listens could read it there, or it is not HTTP.
    """
    from urllib.parse import quote, urljoin, urlsplit

    # The bytes as they came; bytes that a URL cannot have must be quoted.
    target = urljoin(url, quote(location, safe=string.punctuation, encoding="iso-8859-1"))
    scheme, before = urlsplit(target).scheme, urlsplit(url).scheme
    if scheme == "https" or scheme == before == "http":
        return target
    raise UnsupportedError(
        f"open: the server of {url} redirects from {before} to {scheme}, which is not followed; "
        "give that URL"
    )


@functools.lru_cache(64)  # of each request it is asked three times
def _split(url: str) -> tuple[_Server, str]:
    """Return which server has a URL, and what to ask it for."""
    from urllib.parse import quote, urlsplit

    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if not parts.hostname:
        raise ValueError("the URL names no server")
    server = _Server(scheme, parts.hostname, parts.port or (443 if scheme == "https" else 80))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return server, quote(target, safe=string.punctuation)


def _receive(exchange: _Exchange, wanted: Range, facts: Facts) -> None:
    """Read the content of an answer, if it is what was asked for."""
    from http.client import HTTPException

    answer = exchange.answer
    if answer.status in (200, 412, 416):
        raise changed()
    _check_status(exchange)
    if _whole_size(answer) != facts.size or _version(answer) != facts.version:
        raise changed()
    encoding = _encoding(answer)
    if encoding is not None:
        raise OSError(
            errno.EPROTO,
            f"the server sends the bytes encoded ({encoding}), which was not asked for",
        )
    sent = answer.getheader("Content-Range") or ""
    if f"{wanted.start}-{wanted.end - 1}/" not in sent:
        raise OSError(
            errno.EPROTO,
            f"bytes {wanted.start}-{wanted.end - 1} were asked for, and the server sends {sent}",
        )
    done = 0
    try:
        while done < len(wanted.memory):
            count = answer.readinto(wanted.memory[done:])
            if count == 0:
                raise cut_short(wanted, done)
            done += count
        if answer.read(1):
            raise cut_short(wanted, done + 1)
    except HTTPException as error:
        raise _broken(error) from error


def _broken(error: http.client.HTTPException) -> OSError:
    """Make the error for an answer that is not what HTTP has."""
    return ConnectionError(f"{type(error).__name__}: {error}")


def _whole_size(answer: http.client.HTTPResponse) -> int | None:
    """Return the bytes of the whole object, where the answer tells."""
    found = _CONTENT_RANGE.fullmatch(answer.getheader("Content-Range") or "")
    return None if found is None else int(found[3])


def _encoding(answer: http.client.HTTPResponse) -> str | None:
    """Return how content is encoded, where its bytes are not as they are."""
    told = (answer.getheader("Content-Encoding") or "").split(",")
    return next((name for name in map(str.strip, told) if name.lower() not in _AS_IT_IS), None)


def _version(answer: http.client.HTTPResponse) -> str | None:
    return answer.getheader("ETag") or answer.getheader("Last-Modified")


def _check_status(exchange: _Exchange) -> None:
    """Raise what an answer means that is no success."""
    status = exchange.answer.status
    if status == 206:
        return
    text = f"{exchange.who} answers {status} {exchange.answer.reason}"
    if status in _PASSING:
        raise ConnectionError(text)
    if status in _BY_STATUS:
        kind = _BY_STATUS[status]
        raise kind(errno.ENOENT if kind is FileNotFoundError else errno.EACCES, text)
    raise OSError(errno.EPROTO, text)
