"""Stores over objects on servers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex

from fremap import _core, providing
from fremap.arguments import checked_timeout, quantity
from fremap.errors import ArgumentError, ArgumentTypeError, FremapError, UnsupportedError
from fremap.errors import _system as system_error
from fremap.http_reader import HttpReader
from fremap.locations import is_fsspec, is_remote
from fremap.remote import Facts, FsspecReader, ObstoreReader, Reader, RemoteFill
from fremap.stores import ProvidedStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fremap.locations import RemoteSource

__all__ = ["RemoteStore"]

DEFAULT_PAGE_BYTES = 64 << 10
_MOST_PAGE_BYTES = 1 << 30
_INT64_MAX = 2**63 - 1
#: Bytes of pages that one call fetches.
_BATCH_BYTES = 32 << 20
# Variables by which the libraries that read objects find their servers.
_SERVER = re.compile(
    r"(AWS|AZURE|FSSPEC|GCS|GOOGLE|OSS|S3|STORAGE)_(.*_)?(ACCOUNT_NAME|ENDPOINT|HOST|PROFILE)"
)
#: How long a server may be silent where the whole has no limit.
_UNLIMITED_SILENCE_SECONDS = 60.0


class RemoteStore(ProvidedStore):
    """An object on a server as a read-only store of pages; what `fremap.open` returns for a URL.

    A process that the store starts fetches pages on demand, by range requests. Neighbouring
    pages are one request.

    Parameters
    ----------
    source : str or tuple
        A URL; or a pair of a file system of fsspec (or a store of obstore) and a path in it.
        ``http://`` and ``https://`` need no package. Other URLs need obstore or fsspec (``pip
        install fremap[remote]``). obstore is used if it knows the scheme and no `storage_options`
        are given, otherwise fsspec.
    page_bytes : int, default 65536
        Size of a page, the smallest unit that is fetched: a power of two from the system's page
        to 1 GiB.
    in_flight : int, default 32
        Number of simultaneous requests, at most.
    retries : int, default 4
        How often a request is repeated after a temporary failure: no connection, no answer, or
        status 408, 425, 429, 500, 502 to 504. The pause doubles from 0.1 s to 2 s.
    timeout : float or None, default 60.0
        Seconds that opening, or fetching up to 32 MiB, may take, including retries. If an HTTP
        server is silent for ``timeout / (retries + 1)`` seconds, the request is repeated. None:
        no limit for the whole, and 60 seconds for a silent server.
    storage_options : mapping, optional
        Options of fsspec's file system. With HTTP: a mapping of headers, by the name "headers". If
        a server redirects to another one, the other one gets only headers that cannot hold secrets.

    Raises
    ------
    StoreError
        The object does not exist, or may not be read, or its server does not answer.
    UnsupportedError
        The server does not send ranges of bytes, or a package is missing.
    ArgumentError
        An option is invalid.

    Notes
    -----
    The store shows the version of the object at the time of opening, identified by its ETag or its
    time of last modification. If the object changes, calls raise `ProviderError` with ``errno``
    ESTALE, and never mix versions. If the server sends neither, only a change of length is
    detected. fsspec does not say which version an answer comes from, and neither does obstore if it
    is asked for several ranges at once. So the object is checked again after each batch with
    fsspec, and after each batch of more than 128 ranges with obstore.

    Nothing is stored on this machine, except for what windows and slots hold in memory and what
    `prefetch` has requested. Processes work as for `ComputedStore`. Pickling keeps the version.

    Examples
    --------
    >>> import fremap
    >>> store = fremap.open("https://example.com/table.npy")    # doctest: +SKIP
    >>> rows = fremap.rows("s3://bucket/table.npy").take(ids)   # doctest: +SKIP
    """

    __slots__ = ("_facts", "_options", "_reader", "_url")

    def __init__(
        self,
        source: RemoteSource,
        *,
        page_bytes: SupportsIndex | None = None,
        in_flight: SupportsIndex = 32,
        retries: SupportsIndex = 4,
        timeout: float | None = 60.0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        requests = quantity("open: in_flight", in_flight)
        if requests == 0:
            raise ArgumentError("open: in_flight is 0; it must be at least 1")
        again = quantity("open: retries", retries)
        seconds = checked_timeout("open", timeout)
        size = _checked_page_bytes(page_bytes)
        options = _checked_options(storage_options)
        if not is_remote(source):
            raise ArgumentTypeError(
                "open: source must be a URL, or a file system of fsspec's or a store of obstore's "
                f"with a path in it, not {type(source).__name__}"
            )
        url = source[1] if isinstance(source, tuple) else source
        with _errors_of(url):
            reader = _reader(source, requests, again, seconds, options)
        self._begin(url, reader, _asked(url, reader, seconds), (size, seconds))

    def _begin(
        self, url: str, reader: Reader, facts: Facts, options: tuple[int, float | None]
    ) -> None:
        page_bytes, timeout = options
        self._url, self._reader, self._facts, self._options = url, reader, facts, options
        self._core = _core.Store.provided(
            facts.size,
            page_bytes,
            url,
            providing.program(),
            providing.payload(
                "open", RemoteFill(reader, facts, page_bytes), what=f"what reads {url}"
            ),
            1,
            timeout,
            _BATCH_BYTES,
            _content_id(url, reader, facts),
        )

    @property
    def url(self) -> str:
        """The URL by which the store was opened, or the path."""
        return self._url

    def _beside(self, name: str) -> RemoteStore:
        """Open another object, by its name beside this one, with the same options."""
        reader = self._reader.beside(name)
        url = posixpath.join(posixpath.dirname(self._url), name)
        if isinstance(reader, HttpReader):
            url = reader.url
        facts = _asked(url, reader, self._options[1])
        return _reopened(type(self), url, reader, facts, self._options)

    def _called(self) -> str:
        return repr(self._url)

    def __reduce__(self) -> tuple[Callable[..., RemoteStore], tuple[object, ...]]:
        self._check_pickled()
        return _reopened, (type(self), self._url, self._reader, self._facts, self._options)


def _content_id(url: str, reader: Reader, facts: Facts) -> bytes | None:
    """Return what tells the object and its version from others, so that slots can be shared.

    A path means an object only together with a file system, whose state no other process knows;
    and the same URL means another object with other options, or on another server.
    """
    if reader.options is None or facts.version is None:
        return None
    return repr((url, reader.options, _environment(), *facts)).encode()


def _environment() -> list[tuple[str, str]]:
    """Return what the environment says of servers: where they are, and by which profile.

    Such as AWS_ENDPOINT_URL, AWS_PROFILE and STORAGE_EMULATOR_HOST. Credentials are left out, as
    they are renewed.
    """
    return sorted(found for found in os.environ.items() if _SERVER.match(found[0]))


def _reopened(
    cls: type[RemoteStore],
    url: str,
    reader: Reader,
    facts: Facts,
    options: tuple[int, float | None],
) -> RemoteStore:
    store = cls.__new__(cls)
    store._begin(url, reader, facts, options)  # noqa: SLF001 - its own
    return store


def _checked_page_bytes(page_bytes: SupportsIndex | None) -> int:
    """Return the bytes of a page, before a server is asked for pages of them."""
    if page_bytes is None:
        return DEFAULT_PAGE_BYTES
    size = quantity("open: page_bytes", page_bytes)
    least = _core.system_page_bytes
    if not least <= size <= _MOST_PAGE_BYTES or size & (size - 1):
        raise ArgumentError(
            f"open: page_bytes is {size}; it must be a power of two from {least} (the system's "
            f"page) to {_MOST_PAGE_BYTES}"
        )
    return size


def _checked_options(storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    if storage_options is None:
        return {}
    if not isinstance(storage_options, Mapping):
        raise ArgumentTypeError(
            f"open: storage_options must be a mapping, not {type(storage_options).__name__}"
        )
    return dict(storage_options)


def _checked_headers(headers: object) -> dict[str, str]:
    if not isinstance(headers, Mapping) or not all(
        isinstance(name, str) and isinstance(told, str) for name, told in headers.items()
    ):
        raise ArgumentTypeError(
            "open: headers in storage_options must be a mapping of str to str, by name"
        )
    return dict(headers)


def _reader(
    source: RemoteSource,
    in_flight: int,
    retries: int,
    timeout: float | None,
    storage_options: dict[str, Any],
) -> Reader:
    """Return how an object is read."""
    from urllib.parse import urlsplit

    if isinstance(source, tuple):
        where, path = source
        if storage_options:
            raise ArgumentError("open: storage_options= is only for URLs")
        made: FsspecReader | ObstoreReader = (
            FsspecReader(where, path, in_flight, retries)
            if is_fsspec(where)
            else ObstoreReader(where, path, in_flight, retries)
        )
        return _local_checked(path, made)
    if source.partition("://")[0].lower() in ("http", "https"):
        if urlsplit(source).username is not None:
            raise ArgumentError(
                "open: the URL has a user name in it, and messages show URLs; pass it in the "
                'header "Authorization" in storage_options["headers"]'
            )
        headers = _checked_headers(storage_options.pop("headers", {}))
        if storage_options:
            raise ArgumentError(
                f"open: storage_options has {sorted(storage_options)}; for HTTP it may only have "
                "headers"
            )
        silence = _UNLIMITED_SILENCE_SECONDS if timeout is None else timeout / (retries + 1)
        return HttpReader(source, headers, in_flight, retries, silence)
    if not storage_options:
        found = _by_obstore(source, in_flight, retries)
        if found is not None:
            return found
    return _by_fsspec(source, in_flight, retries, storage_options)


def _local_checked(url: str, reader: FsspecReader | ObstoreReader) -> Reader:
    """Refuse what is in the memory of this process alone."""
    kind = type(reader.system if isinstance(reader, FsspecReader) else reader.store)
    if kind.__name__ in ("MemoryFileSystem", "MemoryStore"):
        raise UnsupportedError(
            f"open: {url} is in the memory of this process, where the process that fetches pages "
            "has none of it; use fremap.MemoryStore"
        )
    return reader


def _by_obstore(url: str, in_flight: int, retries: int) -> Reader | None:
    """Return a reader of obstore's, if it is installed and knows the scheme."""
    try:
        from obstore.store import from_url
    except ImportError:
        return None
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme not in ("s3", "s3a", "gs", "az", "abfs", "abfss", "adl", "azure") or not path:
        return None
    options: Any = {"retry_config": {"max_retries": retries}}
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["client_options"] = {"allow_http": True}
    store = from_url(f"{scheme}://{bucket}", **options)
    return ObstoreReader(store, path, in_flight, retries, repr({}))


def _by_fsspec(url: str, in_flight: int, retries: int, storage_options: dict[str, Any]) -> Reader:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UnsupportedError(
            f"open: {url} needs obstore or fsspec: pip install obstore "
            "(or fsspec, and what it needs for this kind of URL)"
        ) from None
    try:
        system, path = url_to_fs(url, **storage_options)
    except (ImportError, ValueError) as error:
        raise UnsupportedError(f"open: fsspec cannot open {url}: {_first_line(error)}") from error
    reader = FsspecReader(system, path, in_flight, retries, _told_options(storage_options))
    return _local_checked(url, reader)


def _told_options(storage_options: dict[str, Any]) -> str | None:
    """Return options as text that is the same in every process, if there is one."""
    try:
        return json.dumps(storage_options, sort_keys=True)
    except (TypeError, ValueError):
        return None  # an object, of which each process has its own


def _asked(url: str, reader: Reader, timeout: float | None) -> Facts:
    """Ask about the object, in this process."""
    with _errors_of(url):
        facts = _within(timeout, reader.facts)
        if facts.size > _INT64_MAX:
            raise OSError(errno.EFBIG, f"the object is said to have {facts.size} bytes")
        return facts


@contextlib.contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """Turn what packages and the system raise into errors that name the object."""
    try:
        yield
    except FremapError:
        raise
    except Exception as error:
        if isinstance(error, TypeError):
            raise ArgumentTypeError(f"open: {url}: {_first_line(error)}") from error
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise ArgumentError(f"open: {url}: {_first_line(error)}") from error
        raise _store_error(url, error) from error


def _within(seconds: float | None, call: Callable[[], Facts]) -> Facts:
    """Return the result of a call if it comes in time; otherwise leave its thread running.

    The packages that read objects have limits of their own, or none: of looking up a name, say.
    """
    if seconds is None:
        return call()
    from concurrent.futures import Future

    done: Future[Facts] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            done.set_exception(error)

    threading.Thread(target=run, name="fremap-open", daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():
            raise
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} seconds") from None


def _store_error(url: str, error: Exception) -> FremapError:
    """Make the error for an object that cannot be read, from one of a package or the system."""
    number = providing.number_of(error)
    what = error.strerror if isinstance(error, OSError) else None
    if not what:
        # Some say pages of what they know of themselves behind the first line.
        what = _first_line(error) if number == errno.EIO else os.strerror(number)
    return system_error("io", f"open: {what}", number, os.fsencode(url), None, 0)


def _first_line(error: Exception) -> str:
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
