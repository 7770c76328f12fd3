"""Objects on servers, read by ranges: what runs in the provider processes of remote stores.

A reader tells how long an object is and which version of it, and fetches ranges of that
version. There is one for HTTP, of the standard library alone; one for file systems of
fsspec, and one for stores of obstore. `RemoteFill` turns pages into ranges.
"""

from __future__ import annotations

import contextlib
import errno
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from fremap.errors import UnsupportedError

if TYPE_CHECKING:
    import http.client
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import ThreadPoolExecutor

    import numpy.typing as npt

__all__ = ["Facts", "FsspecReader", "HttpReader", "ObstoreReader", "Range", "Reader", "RemoteFill"]

#: Bytes of one request, unless a page is larger.
_MOST_RANGE_BYTES = 4 << 20
_MOST_REDIRECTS = 5
_FIRST_PAUSE_SECONDS = 0.1
_MOST_PAUSE_SECONDS = 2.0
#: Answers of a server that may be others the next time.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_BY_STATUS: dict[int, type[OSError]] = {
    401: PermissionError,
    403: PermissionError,
    404: FileNotFoundError,
    410: FileNotFoundError,
}
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
#: What tells versions of an object apart, as file systems of fsspec call it.
_VERSION_KEYS = (
    "ETag", "etag", "e_tag", "VersionId", "version_id", "generation", "md5Hash", "content_md5",
    "LastModified", "last_modified", "updated", "mtime", "size",
)  # fmt: skip


class Facts(NamedTuple):
    """What a server says of an object.

    Attributes
    ----------
    size : int
        Its bytes.
    version : str or None
        What another version would not have.
    """

    size: int
    version: str | None


class Range(NamedTuple):
    """Bytes of an object, and the memory that they go to.

    Attributes
    ----------
    start : int
        The first byte.
    memory : memoryview
        As long as the range.
    """

    start: int
    memory: memoryview

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.start + len(self.memory)


class Reader(Protocol):
    """One object on a server. Can be pickled; is used by one thread at a time."""

    def facts(self) -> Facts:
        """Ask how long the object is now, and which version."""

    def fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        """Fetch ranges of a version of the object."""


def changed() -> OSError:
    """Make the error for another version of the object."""
    return OSError(errno.ESTALE, "the object has changed since the store was opened; open it again")


def cut_short(wanted: Range, count: int) -> OSError:
    """Make the error for an answer that is too short."""
    return ConnectionError(
        f"bytes {wanted.start}-{wanted.end - 1} were asked for, and {count} of them came"
    )


def retried(call: Callable[[], None], retries: int) -> None:
    """Call until there is no error that may pass, at most `retries` times more."""
    pause = _FIRST_PAUSE_SECONDS
    for left in reversed(range(retries + 1)):
        try:
            return call()
        except Exception as error:
            is_final = isinstance(error, _PERMANENT) or getattr(error, "errno", 0) == errno.ESTALE
            if is_final or not left or not isinstance(error, OSError | EOFError):
                raise
        time.sleep(pause)
        pause = min(2 * pause, _MOST_PAUSE_SECONDS)
    return None


class RemoteFill:
    """Fills pages from an object.

    Parameters
    ----------
    reader : Reader
        How the object is read.
    facts : Facts
        The version that is meant.
    page_bytes : int
        Bytes of a page.
    """

    #: It writes all of every page, whatever is there before.
    fills_all = True

    def __init__(self, reader: Reader, facts: Facts, page_bytes: int) -> None:
        self.reader = reader
        self.facts = facts
        self.page_bytes = page_bytes

    def __call__(self, pages: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """Fetch pages, neighbours by one request."""
        self.reader.fetch(self.ranges(pages, out), self.facts)
        cut = (int(pages[-1]) + 1) * self.page_bytes - self.facts.size
        if cut > 0:
            out[-1, -cut:] = 0

    def ranges(self, pages: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> list[Range]:
        """Return the ranges that rising pages are in, neighbours joined."""
        memory = memoryview(out).cast("B")
        most = max(1, _MOST_RANGE_BYTES // self.page_bytes)
        ends = np.append(np.flatnonzero(np.diff(pages) != 1) + 1, len(pages))
        ranges, first = [], 0
        for end in ends.tolist():
            for at in range(first, end, most):
                start = int(pages[at]) * self.page_bytes
                length = min((min(at + most, end) - at) * self.page_bytes, self.facts.size - start)
                place = at * self.page_bytes
                ranges.append(Range(start, memory[place : place + length]))
            first = end
        return ranges


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
        """Fetch ranges, several at once."""
        if len(ranges) == 1:
            self._fetch(ranges[0], facts)
            return
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(self.in_flight, "fremap-fetch")
        for _done in self._threads.map(self._fetch, ranges, [facts] * len(ranges)):
            pass

    def _fetch(self, wanted: Range, facts: Facts) -> None:
        retried(lambda: self._fetch_once(wanted, facts), self.retries)

    def _fetch_once(self, wanted: Range, facts: Facts) -> None:
        connection = self._connection()
        try:
            self._receive(connection, wanted, facts)
        except BaseException:
            connection.close()
            raise
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
    whole = (answer.getheader("Content-Range") or "").rpartition("/")[2]
    return int(whole) if whole.isdigit() else None


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


class FsspecReader:
    """An object in a file system of fsspec.

    Parameters
    ----------
    system : fsspec.AbstractFileSystem
        The file system.
    path : str
        Where in it the object is.
    in_flight : int
        Requests at once, where the file system makes them together.
    retries : int
        How often ranges are fetched again after an error that may pass.
    """

    def __init__(self, system: Any, path: str, in_flight: int, retries: int) -> None:
        self.system = system
        self.path = path
        self.in_flight = in_flight
        self.retries = retries

    def facts(self) -> Facts:
        """Ask for what the file system knows, not what it has kept of it."""
        self.system.invalidate_cache()
        info = self.system.info(self.path)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if info.get("size") is None:
            raise UnsupportedError(
                f"open: {self.path} has no size that is known, so that pages cannot be read; "
                "download it"
            )
        told = {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}
        return Facts(int(info["size"]), repr(told))

    def fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        """Fetch ranges, and see that the object was the same until then."""
        retried(lambda: self._fetch(ranges), self.retries)
        if self.facts() != facts:
            raise changed()

    def _fetch(self, ranges: Sequence[Range]) -> None:
        together = {"batch_size": self.in_flight} if self.system.async_impl else {}
        answers = self.system.cat_ranges(
            [self.path] * len(ranges),
            [wanted.start for wanted in ranges],
            [wanted.end for wanted in ranges],
            on_error="raise",
            **together,
        )
        for wanted, content in zip(ranges, answers, strict=True):
            if len(content) != len(wanted.memory):
                raise cut_short(wanted, len(content))
            wanted.memory[:] = content


class ObstoreReader:
    """An object in a store of obstore.

    Parameters
    ----------
    store : obstore.store.ObjectStore
        The store.
    path : str
        Where in it the object is.
    in_flight : int
        Requests at once; obstore makes ten at once of one call.
    retries : int
        How often ranges are fetched again after an error that may pass, beside what the store
        itself does.
    """

    #: Requests that one call has in flight.
    TOGETHER = 10

    def __init__(self, store: Any, path: str, in_flight: int, retries: int) -> None:
        self.store = store
        self.path = path
        self.in_flight = in_flight
        self.retries = retries

    def facts(self) -> Facts:
        """Ask for the object's metadata."""
        import obstore

        return _told(obstore.head(self.store, self.path))

    def fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        """Fetch ranges, and see that the object was the same until then."""
        retried(lambda: self._fetch(ranges, facts), self.retries)

    def _fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        import obstore

        if len(ranges) == 1:
            (wanted,) = ranges
            options: Any = {"range": (wanted.start, wanted.end)}
            answer = obstore.get(self.store, self.path, options=options)
            if _told(answer.meta) != facts:
                raise changed()
            _copy(wanted, answer.bytes())
            return
        for wanted, content in zip(ranges, self._answers(ranges), strict=True):
            _copy(wanted, content)
        if self.facts() != facts:
            raise changed()

    def _answers(self, ranges: Sequence[Range]) -> list[Any]:
        """Return the content of ranges."""
        import obstore

        starts, ends = ([wanted.start for wanted in ranges], [wanted.end for wanted in ranges])
        calls = -(-self.in_flight // self.TOGETHER)
        if calls == 1 or len(ranges) <= self.TOGETHER:
            return list(
                obstore.get_ranges(self.store, self.path, starts=starts, ends=ends, coalesce=0)
            )
        import asyncio

        async def gathered() -> list[Any]:
            parts = [
                obstore.get_ranges_async(
                    self.store,
                    self.path,
                    starts=starts[part::calls],
                    ends=ends[part::calls],
                    coalesce=0,
                )
                for part in range(calls)
            ]
            answers: list[Any] = [None] * len(ranges)
            for part, content in enumerate(await asyncio.gather(*parts)):
                answers[part::calls] = content
            return answers

        return asyncio.run(gathered())


def _told(meta: Any) -> Facts:
    version = {key: str(meta[key]) for key in ("e_tag", "version", "last_modified")}
    return Facts(int(meta["size"]), repr(version))


def _copy(wanted: Range, content: Any) -> None:
    view = memoryview(content)
    if view.nbytes != len(wanted.memory):
        raise cut_short(wanted, view.nbytes)
    wanted.memory[:] = view.cast("B")
