"""Which files a caller means: paths, patterns, folders, stores, and lists of these."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from io import FileIO
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fremap import _core
from fremap.arguments import absolute_path
from fremap.errors import ArgumentError, ArgumentTypeError, StoreError
from fremap.errors import _system as system_error
from fremap.formats.table import Header
from fremap.locations import is_remote
from fremap.stores import FileStore, Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Self

    from fremap.locations import RemoteSource

__all__ = [
    "Fetched",
    "File",
    "Files",
    "Opened",
    "RowsSource",
    "as_it_is",
    "look",
    "looked_at",
    "name_of",
    "named_files",
    "store_error",
]

PathLike: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"
RowsSource: TypeAlias = "PathLike | Store | Any | Iterable[PathLike | Store | Any]"
#: Mode, device, inode, birth in nanoseconds, size, and first bytes of a file.
Looked: TypeAlias = tuple[int, int, int, int, int, bytes]
#: A path that is absolute, a store, or a data set of h5py's.
File: TypeAlias = "str | bytes | Store | Any"

_INDEX = ".safetensors.index.json"
# Bytes of a file that are read when it is looked at: the header of most.
_FRONT_BYTES = 1024
# Files that are looked at together: twice as many each time, while that takes not too long.
_LEAST_TOGETHER = 16
_MOST_TOGETHER = 512
_TOGETHER_SECONDS = 0.02
# What patterns have, as `glob` has it.
_HAS_MAGIC = re.compile(r"[*?[]").search
_NUMBERS = re.compile(r"(\d+)")


class Files(NamedTuple):
    """The files that a caller means, in order.

    Attributes
    ----------
    files : list
        Paths, stores and data sets.
    together : bool
        Whether they are one checkpoint, each tensor of which is in one of them.
    name : str
        What messages call them all.
    """

    files: Sequence[File]
    together: bool
    name: str


class Fetched:
    """Stores of objects on servers, which the caller that opened them closes."""

    __slots__ = ("_beside", "stores")

    def __init__(self) -> None:
        self._beside: dict[tuple[int, str], Store] = {}
        self.stores: list[Store] = []

    def store(self, source: RemoteSource) -> Store:
        """Open an object."""
        from fremap.remote_store import RemoteStore  # `import fremap` does without it

        self.stores.append(RemoteStore(source))
        return self.stores[-1]

    def beside(self, file: File, name: str) -> File:
        """Return what has a name, which may have folders in it, beside a file."""
        path = path_of(file)
        if path is not None:
            return os.path.join(os.path.dirname(path), name)
        known = self._beside.get((id(file), name))
        if known is None:
            from fremap.remote_store import RemoteStore  # `import fremap` does without it

            if not isinstance(file, RemoteStore):
                raise ArgumentError(
                    f"rows: {name_of(file)} says what is in files beside it, and is no file that "
                    "has others beside it; give its path"
                )
            known = self._beside[id(file), name] = file._beside(name)  # noqa: SLF001 - made for it
            self.stores.append(known)
        return known

    def close(self, *, but: Iterable[File] = ()) -> None:
        """Close the stores, except those among `but`, which are kept."""
        kept = [store for store in self.stores if any(store is file for file in but)]
        for store in self.stores:
            if not any(store is one for one in kept):
                store.close()
        self.stores = kept


class Opened:
    """A file while its header is read: opened for it only if its front does not say enough.

    Parameters
    ----------
    file : File
        A path, or a store.
    operation : str
        What the caller asked for.
    looked : tuple or int, optional
        What `_core.look` found, if the file was looked at before.

    Attributes
    ----------
    file : path or Store
        The file.
    header : Header
        Its front.
    identity : tuple of int
        Device and number of the file, and when it was made; of a store zeros.
    """

    __slots__ = ("_looked", "_open", "_operation", "file", "header", "identity")

    def __init__(
        self, file: File, operation: str = "rows", looked: Looked | int | None = None
    ) -> None:
        self.file = file
        self._operation = operation
        self._looked = looked
        self._open: FileIO | None = None

    def __enter__(self) -> Self:
        file, operation = self.file, self._operation
        if isinstance(file, Store):
            has_file = not file._core.is_provided  # noqa: SLF001 - its other half
            fd = file.fileno() if has_file else -1
            fetch = None if has_file else lambda offset, count: _bytes_of(file, offset, count)
            self.header = Header(fd, name_of(file), file.size, operation, fetch=fetch)
            self.identity = (0, 0, 0)
            return self
        looked = look(file) if self._looked is None else self._looked
        if isinstance(looked, int):
            if "\0" in os.fsdecode(file):
                raise ArgumentError(f"{operation}: {file!r} is not a path: it has a null byte")
            raise store_error(OSError(looked, os.strerror(looked)), file)
        mode, device, inode, born, size, front = looked
        name = os.fsdecode(file)
        if stat.S_ISDIR(mode):
            raise ArgumentError(
                f"{operation}: {name} is a folder; a list has files, a folder is given alone"
            )
        if not stat.S_ISREG(mode):
            raise ArgumentError(
                f"{operation}: {name} is not a regular file; a block device can be given as a "
                "store (fremap.open)"
            )
        self.header = Header(self._descriptor, name, size, operation, front)
        self.identity = (device, inode, born)
        return self

    def _descriptor(self) -> int:
        """Open the file, if that is still the one that was looked at."""
        path: Any = self.file
        try:
            # An object, which is closed also where a signal handler raises before it is kept.
            self._open = FileIO(path)
        except OSError as error:
            raise store_error(error, path) from error
        facts = os.fstat(self._open.fileno())
        if (facts.st_dev, facts.st_ino) != self.identity[:2]:
            raise self.header.wrong("another file took its place while its header was read")
        return self._open.fileno()

    def __exit__(self, *exception: object) -> None:
        if self._open is not None:
            self._open.close()


def looked_at(
    files: Sequence[File], *, unread: bool = False
) -> Iterator[tuple[File, Looked | int | None]]:
    """Look at files, many of them together.

    Parameters
    ----------
    files : sequence of File
        Paths, stores and data sets.
    unread : bool, default False
        Whether their first bytes are not needed.

    Yields
    ------
    file : File
        Each file, in order.
    looked : tuple, int or None
        What `_core.look` says of it; None unless it is a path.
    """
    front_bytes = 0 if unread else _FRONT_BYTES
    count = _LEAST_TOGETHER
    begin = 0
    while begin < len(files):
        some = files[begin : begin + count]
        begin += len(some)
        since = time.monotonic()
        named = [file for file in some if isinstance(file, str | bytes)]
        looked = _core.look(named, front_bytes)
        # Ctrl-C waits for one such call.
        quick = time.monotonic() - since < _TOGETHER_SECONDS
        count = min(2 * count, _MOST_TOGETHER) if quick else max(count // 2, 1)
        if len(named) == len(some):
            yield from zip(some, looked, strict=True)
        else:
            each = iter(looked)
            for file in some:
                yield file, next(each) if isinstance(file, str | bytes) else None


def look(file: str | bytes) -> Looked | int:
    """Return what a file is and begins with, or the number of an error."""
    return _core.look([file], _FRONT_BYTES)[0]


def _bytes_of(store: Store, offset: int, count: int) -> bytes:
    """Return bytes of a store that has no file."""
    first = offset // store.page_bytes
    pages = store.read(range(first, -(-(offset + count) // store.page_bytes)))
    start = offset - first * store.page_bytes
    return pages.reshape(-1)[start : start + count].tobytes()


def named_files(source: RowsSource, fetched: Fetched) -> Files:
    """Return the files of a source, their paths absolute; what is on servers as stores."""
    if is_single(source):
        return _named(source, fetched)
    if isinstance(source, set | frozenset | dict) or not hasattr(source, "__iter__"):
        raise ArgumentTypeError(
            "rows: a source is a path, a store, a data set of h5py's, or these in order (a list, "
            f"an iterator), not {type(source).__name__}"
        )
    files: list[File] = []
    for one in source:
        if is_remote(one):
            files.append(fetched.store(one))
        elif isinstance(one, str | bytes | os.PathLike):
            path = absolute_path("rows", one)
            if _HAS_MAGIC(path if isinstance(path, str) else os.fsdecode(path)):
                files.extend(_matching(path))
            else:
                files.append(path)
        elif is_single(one):
            files.append(one)
        else:
            raise ArgumentTypeError(
                f"rows: a file is a path, a store or a data set of h5py's, not {type(one).__name__}"
            )
    if not files:
        raise ArgumentError("rows: an empty list of files has no rows")
    return Files(files, together=False, name=_some(files))


def is_single(source: object) -> bool:
    """Tell whether a source is one file or pattern, not several."""
    is_file = isinstance(source, str | bytes | os.PathLike | Store)
    return is_file or is_remote(source) or is_dataset(source)


def is_dataset(source: object) -> bool:
    """Tell whether something is a data set of h5py's."""
    if isinstance(source, str | bytes):  # as nearly all are
        return False
    return any(
        kind.__module__.startswith("h5py.") and kind.__name__ == "Dataset"
        for kind in type(source).__mro__
    )


def _named(one: Any, fetched: Fetched) -> Files:
    """Return the files of a source that is one thing: a file, a pattern or a folder."""
    files: list[File] = [fetched.store(one) if is_remote(one) else one]
    if isinstance(one, str | bytes | os.PathLike) and not is_remote(one):
        path = absolute_path("rows", one)
        name = os.fsdecode(path)
        if name and "\0" not in name and os.path.isdir(name):
            return _folder(name)
        files = _matching(path) if _HAS_MAGIC(name) else [path]
    return Files(files, together=False, name=_some(files))


def _matching(path: str | bytes) -> list[File]:
    """Return the files that match a pattern; the file itself if there is one of that name."""
    import glob  # `import fremap` does without it

    name = os.fsdecode(path)
    if "\0" in name or os.path.exists(name):
        return [path]
    found: list[str] = glob.glob(name, recursive=True)
    files = [match for match in found if not os.path.isdir(match)]
    if not files:
        text = "rows: no file matches"
        raise system_error("io", text, errno.ENOENT, os.fsencode(name), None, 0)
    files.sort(key=_numbers_in_order)
    return [*files]


def _folder(folder: str) -> Files:
    """Return the files of a checkpoint: its index, or all that are of its format."""
    try:
        names = sorted(os.listdir(folder), key=_numbers_in_order)
    except OSError as error:
        raise store_error(error, folder) from error
    shown = [name for name in names if not name.startswith(".")]
    indexes = [name for name in shown if name.lower().endswith(_INDEX)]
    if len(indexes) > 1:
        raise ArgumentError(
            f"rows: {folder} has {len(indexes)} indexes ({indexes[0]}, {indexes[1]}); give the "
            "path of one"
        )
    chosen = indexes or [name for name in shown if name.lower().endswith(".safetensors")]
    if not chosen:
        raise ArgumentError(
            f"rows: {folder} is a folder without safetensors; give its files, or a pattern such as "
            f"{os.path.join(folder, '*.npy')}"
        )
    files = [os.path.join(folder, name) for name in chosen]
    return Files(files, together=not indexes, name=folder)


def _numbers_in_order(name: str) -> list[tuple[int, str]]:
    """Return what sorts names as people do: shard-2 before shard-10."""
    parts = _NUMBERS.split(name)
    return [
        (int(part), part) if at % 2 and part.isascii() else (0, part)
        for at, part in enumerate(parts)
    ]


def _some(files: Sequence[File]) -> str:
    first = name_of(files[0])
    return first if len(files) == 1 else f"{first} and {len(files) - 1} more"


def name_of(file: File) -> str:
    """Return how messages call a file."""
    url: str | None = getattr(file, "url", None)
    if url is not None:
        return url
    if isinstance(file, Store):
        return repr(file) if path_of(file) is None else os.fsdecode(file.path)  # type: ignore[attr-defined]
    if is_dataset(file):
        dataset: Any = file
        return f"{dataset.file.filename}{dataset.name}"
    return os.fsdecode(file)


def path_of(file: File) -> str | None:
    """Return the path of a file, if it has one."""
    if isinstance(file, Store):
        path = file.path if isinstance(file, FileStore) else None
        return None if path is None else os.fsdecode(path)
    return os.fsdecode(file)


def as_it_is(file: File) -> tuple[object, ...]:
    """Return what tells a file, as it is now, from any other; of a store the object alone."""
    path = path_of(file)
    if path is None:
        return (os.getpid(), id(file))
    try:
        facts = os.stat(path)
    except OSError as error:
        raise store_error(error, path) from error
    return (path, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def store_error(error: OSError, file: str | bytes) -> StoreError:
    """Return an error of the kernel's as one of fremap's."""
    text = f"rows: {os.strerror(error.errno or 0)}"
    made = system_error("io", text, error.errno or 0, os.fsencode(file), None, 0)
    assert isinstance(made, StoreError)  # noqa: S101 - of the kind "io"; tells mypy
    return made
