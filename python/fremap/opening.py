"""`fremap.open`: a store for a file, or for an object on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

from fremap.errors import ArgumentError
from fremap.locations import is_remote
from fremap.stores import FileStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fremap.locations import RemoteSource
    from fremap.remote_store import RemoteStore
    from fremap.stores import Mode, PathOrDescriptor

__all__ = ["open"]


@overload
def open(
    file: PathOrDescriptor,
    mode: Mode = "r",
    *,
    size: SupportsIndex | None = None,
    page_bytes: SupportsIndex | None = None,
    direct: bool = False,
) -> FileStore: ...


@overload
def open(
    file: tuple[Any, str],
    mode: Literal["r"] = "r",
    *,
    page_bytes: SupportsIndex | None = None,
) -> RemoteStore: ...


@overload
def open(
    file: str,
    mode: Literal["r"] = "r",
    *,
    page_bytes: SupportsIndex | None = None,
    storage_options: Mapping[str, Any],
) -> RemoteStore: ...


@overload
def open(
    file: PathOrDescriptor | RemoteSource,
    mode: Mode = "r",
    *,
    size: SupportsIndex | None = None,
    page_bytes: SupportsIndex | None = None,
    direct: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> FileStore | RemoteStore: ...


def open(
    file: PathOrDescriptor | RemoteSource,
    mode: Mode = "r",
    *,
    size: SupportsIndex | None = None,
    page_bytes: SupportsIndex | None = None,
    direct: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> FileStore | RemoteStore:
    """Open a file, or an object on a server, as a store of pages.

    Parameters
    ----------
    file : str, bytes, path, int or tuple
        A path, or an open descriptor, which is duplicated. Or a source of `RemoteStore`: a URL
        (``https://``, ``s3://``, …), or a file system and a path in it.
    mode : {"r", "r+", "w+"}, default "r"
        "r": read only. "r+": read and write. "w+": create the file, or empty an existing one.
    size : int, optional
        Bytes of the new file, with mode "w+" only.
    page_bytes : int, optional
        Size of a page: a power of two from the system's page to 1 GiB. Default: the system's
        page, or 64 KiB for an object on a server.
    direct : bool, default False
        Read and write past the page cache (``O_DIRECT``). The writes of a window's flush are
        in flight together.
    storage_options : mapping, optional
        For a URL: see `RemoteStore`, which has more options.

    Returns
    -------
    FileStore or RemoteStore
        The store; it is a context manager.

    Raises
    ------
    StoreError
        The file cannot be opened; also a `FileNotFoundError`,
        `PermissionError`, … as `OSError` would be.
    ArgumentError
        The mode, size or page size is invalid, or an object on a server would be written.

    Notes
    -----
    ``open(2)`` and ``fstat(2)``, or a request to the server; no data is read or mapped yet.

    Examples
    --------
    >>> import fremap, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with fremap.open(f"{folder}/table", "w+", size=10_000, page_bytes=4096) as store:
    ...         store.page_count
    3
    """
    if not is_remote(file):
        if storage_options is not None:
            raise ArgumentError("open: storage_options= is only for URLs")
        return FileStore(file, mode, size=size, page_bytes=page_bytes, direct=direct)  # type: ignore[arg-type]
    if mode != "r" or size is not None or direct:
        raise ArgumentError(
            'open: objects on servers are read-only; mode must be "r", without size= and direct='
        )
    from fremap.remote_store import RemoteStore  # `import fremap` does without it

    return RemoteStore(file, page_bytes=page_bytes, storage_options=storage_options)
