"""Objects on servers, read by ranges: what runs in the provider processes of remote stores.

A reader tells how long an object is and which version of it, and fetches ranges of that
version. There is one for file systems of fsspec, one for stores of obstore, and `HttpReader`
(`http_reader`). `RemoteFill` turns pages into ranges.
"""

from __future__ import annotations

import contextlib
import errno
import posixpath
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from fremap.errors import UnsupportedError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    import numpy.typing as npt

__all__ = [
    "Facts",
    "FetchThreads",
    "FsspecReader",
    "ObstoreReader",
    "Range",
    "Reader",
    "RemoteFill",
    "changed",
    "cut_short",
    "retried",
]

_T = TypeVar("_T")

#: Bytes of one request, unless a page is larger.
_MOST_RANGE_BYTES = 4 << 20
_FIRST_PAUSE_SECONDS = 0.1
_MOST_PAUSE_SECONDS = 2.0
#: A certificate that is not right is a ValueError too.
_PERMANENT = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError
)  # fmt: skip
_FINAL_NUMBERS = frozenset({errno.ESTALE, errno.EPROTO, errno.ELOOP})
#: What tells versions of an object apart, as file systems of fsspec call it.
_VERSION_KEYS = (
    "ETag", "etag", "e_tag", "VersionId", "version_id", "generation", "md5Hash", "content_md5",
    "LastModified", "last_modified", "updated", "mtime",
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

    @property
    def options(self) -> str | None:
        """What the object was opened with beside its URL; None if only this process can tell.

        Processes that have the same URL and options mean the same object.
        """

    def facts(self) -> Facts:
        """Ask how long the object is now, and which version."""

    def fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        """Fetch ranges of a version of the object."""

    def beside(self, name: str) -> Reader:
        """Return a reader of another object, by its name beside this one."""


def changed() -> OSError:
    """Make the error for another version of the object."""
    return OSError(errno.ESTALE, "the object has changed since the store was opened; open it again")


def cut_short(wanted: Range, count: int) -> OSError:
    """Make the error for an answer that is too short."""
    return ConnectionError(
        f"bytes {wanted.start}-{wanted.end - 1} were asked for, and {count} of them came"
    )


def retried(call: Callable[[], _T], retries: int, given_up: threading.Event | None = None) -> _T:
    """Call until there is no error that may pass, at most `retries` times more.

    Where others give up what it is a part of, it is not called again.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            return call()
        except Exception as error:
            if not retries or not _may_pass(error):
                raise
            if given_up is not None and given_up.wait(pause):
                raise
        if given_up is None:
            time.sleep(pause)
        retries -= 1
        pause = min(2 * pause, _MOST_PAUSE_SECONDS)


@contextlib.contextmanager
def _of_version(reader: Reader, facts: Facts) -> Iterator[None]:
    """Tell of another version where that is why ranges cannot be had: it may be shorter."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) != errno.ESTALE and reader.facts() != facts:
            raise changed() from error
        raise


def _may_pass(error: Exception) -> bool:
    """Tell whether the same call may do better a little later."""
    is_final = isinstance(error, _PERMANENT) or getattr(error, "errno", 0) in _FINAL_NUMBERS
    return not is_final and isinstance(error, OSError | EOFError)


class FetchThreads:
    """Threads that fetch ranges. Pickling leaves them behind.

    Parameters
    ----------
    count : int
        How many there are, at most.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[type[FetchThreads], tuple[int]]:
        return type(self), (self.count,)

    def run(
        self,
        fetch: Callable[[_T, threading.Event], None],
        wanted: Sequence[_T],
        end: Callable[[], None] | None = None,
    ) -> None:
        """Call `fetch` for each part of what is wanted; return when all calls have ended.

        None may go on, as the memory that it writes to is that of other pages in the next fetch.
        When one has raised, the event that all are given is set and `end` is called, so that those
        under way end soon; the others are never begun.
        """
        import threading

        given_up = threading.Event()
        if len(wanted) == 1:
            fetch(wanted[0], given_up)
            return
        from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, "fremap-fetch")
        begun: list[Future[None]] = []
        try:
            for part in wanted:
                begun.append(self._pool.submit(fetch, part, given_up))  # noqa: PERF401 - as many as have begun
            done, _ = wait(begun, return_when=FIRST_EXCEPTION)
        finally:
            given_up.set()
            for one in begun:
                one.cancel()
            if end is not None:
                end()
            wait(begun)
        # Not those that have failed since, which is because they were ended.
        for one in done:
            one.result()


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
        How often a request is made again after an error that may pass.
    options : str, optional
        What the file system was made with, if by a URL.
    """

    def __init__(
        self, system: Any, path: str, in_flight: int, retries: int, options: str | None = None
    ) -> None:
        self.system = system
        self.path = path
        self.in_flight = in_flight
        self.retries = retries
        self.options = options

    def facts(self) -> Facts:
        """Ask for what the file system knows, not what it has kept of it."""
        return retried(self._asked, self.retries)

    def _asked(self) -> Facts:
        self.system.invalidate_cache()
        info = self.system.info(self.path)
        if info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if info.get("size") is None:
            raise UnsupportedError(
                f"open: the size of {self.path} is not known, so pages cannot be read; download it"
            )
        told = {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}
        return Facts(int(info["size"]), repr(told) if told else None)

    def beside(self, name: str) -> FsspecReader:
        """Return a reader of another object, by its name beside this one."""
        path = posixpath.join(posixpath.dirname(self.path), name)
        return FsspecReader(self.system, path, self.in_flight, self.retries, self.options)

    def fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        """Fetch ranges, and see that the object was the same until then."""
        with _of_version(self, facts):
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
        Requests at once.
    retries : int
        How often ranges are fetched again after an error that may pass, beside what the store
        itself does.
    options : str, optional
        What the store was made with, if by a URL.
    """

    #: Requests that one call of `get_ranges` has in flight.
    TOGETHER = 10
    #: Up to this many ranges are fetched by a call each. Each answer then tells which version it is
    #: of, while `get_ranges` needs one more request that asks for it at the end. For many ranges
    #: `get_ranges` is cheaper: a call of Python's, and turns of the GIL, are for many of them.
    MOST_ALONE = 128
    _MOST_IN_A_CALL = 4 * TOGETHER

    def __init__(
        self, store: Any, path: str, in_flight: int, retries: int, options: str | None = None
    ) -> None:
        self.store = store
        self.path = path
        self.retries = retries
        self.options = options
        self.threads = FetchThreads(in_flight)
        self.callers = FetchThreads(in_flight // self.TOGETHER)

    def facts(self) -> Facts:
        """Ask for the object's metadata."""
        import obstore

        return _told(obstore.head(self.store, self.path))

    def beside(self, name: str) -> ObstoreReader:
        """Return a reader of another object, by its name beside this one."""
        path = posixpath.join(posixpath.dirname(self.path), name)
        return ObstoreReader(self.store, path, self.threads.count, self.retries, self.options)

    def fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        """Fetch ranges of one version, several at once."""
        with _of_version(self, facts):
            self._fetch(ranges, facts)

    def _fetch(self, ranges: Sequence[Range], facts: Facts) -> None:
        callers = self.callers.count
        if len(ranges) <= self.MOST_ALONE or callers == 0:

            def get(wanted: Range, given_up: threading.Event) -> None:
                retried(lambda: self._get(wanted, facts), self.retries, given_up)

            self.threads.run(get, ranges)
            return

        def get_ranges(part: Sequence[Range], given_up: threading.Event) -> None:
            retried(lambda: self._get_ranges(part), self.retries, given_up)

        # As many for each caller, and no neighbours in a call: obstore would join them.
        calls = callers * -(-len(ranges) // (callers * self._MOST_IN_A_CALL))
        self.callers.run(get_ranges, [ranges[call::calls] for call in range(calls)])
        if self.facts() != facts:
            raise changed()

    def _get(self, wanted: Range, facts: Facts) -> None:
        import obstore

        options: Any = {"range": (wanted.start, wanted.end)}
        answer = obstore.get(self.store, self.path, options=options)
        if _told(answer.meta) != facts:
            raise changed()
        _copy(wanted, answer.bytes())

    def _get_ranges(self, ranges: Sequence[Range]) -> None:
        import obstore

        answers = obstore.get_ranges(
            self.store,
            self.path,
            starts=[wanted.start for wanted in ranges],
            ends=[wanted.end for wanted in ranges],
            coalesce=0,
        )
        for wanted, content in zip(ranges, answers, strict=True):
            _copy(wanted, content)


def _told(meta: Any) -> Facts:
    version = {key: str(meta[key]) for key in ("e_tag", "version", "last_modified")}
    return Facts(int(meta["size"]), repr(version))


def _copy(wanted: Range, content: Any) -> None:
    view = memoryview(content)
    if view.nbytes != len(wanted.memory):
        raise cut_short(wanted, view.nbytes)
    wanted.memory[:] = view.cast("B")
