"""What a source is: on this machine, or on a server."""

from __future__ import annotations

import re
from typing import Any, TypeAlias, TypeGuard

__all__ = ["RemoteSource", "is_fsspec", "is_remote"]

#: A URL, or a file system of fsspec's or a store of obstore's with a path in it.
RemoteSource: TypeAlias = "str | tuple[Any, str]"

#: Those of fsspec that are behind one another too: ``simplecache::s3://bucket/key``.
_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://")


def is_remote(source: object) -> TypeGuard[RemoteSource]:
    """Tell whether a source is on a server: a URL, or a file system with a path in it."""
    if isinstance(source, str):
        return "://" in source and _URL.match(source) is not None
    return (
        isinstance(source, tuple)
        and len(source) == 2
        and isinstance(source[1], str)
        and (is_fsspec(source[0]) or _is_obstore(source[0]))
    )


def is_fsspec(system: object) -> bool:
    """Tell whether something is a file system of fsspec's."""
    return any(
        (kind.__module__, kind.__name__) == ("fsspec.spec", "AbstractFileSystem")
        for kind in type(system).__mro__
    )


def _is_obstore(store: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "obstore" for kind in type(store).__mro__)
