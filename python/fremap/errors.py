"""The exceptions that fremap raises.

Every error of fremap is a `FremapError`, and also the builtin exception that programs usually catch
for it. The compiled core describes a failure by its kind; the table here turns it into the
exception.
"""

from __future__ import annotations

import errno
import os
import resource

__all__ = [
    "ActorLostError",
    "ArgumentError",
    "ArgumentTypeError",
    "BudgetError",
    "ClosedError",
    "DuplicatePageError",
    "ForkError",
    "FormatError",
    "FremapError",
    "MappingLimitError",
    "MemoryLimitError",
    "PageRangeError",
    "PlacedPageError",
    "ProviderError",
    "ProviderTimeoutError",
    "RemapError",
    "SlotsFullError",
    "StoreError",
    "StoreExistsError",
    "StoreIsDirectoryError",
    "StoreNotDirectoryError",
    "StoreNotFoundError",
    "StorePermissionError",
    "TakeCancelledError",
    "TakeTimeoutError",
    "TruncatedError",
    "UnsupportedError",
    "ViewsAliveError",
]


class FremapError(Exception):
    """Every error that fremap raises."""


class PageRangeError(FremapError, IndexError):
    """A page, key or row is outside the store, the window, the slots or the rows.

    Attributes
    ----------
    index : int
        The first index that is outside.
    limit : int
        The number of pages, extents or rows: indexes go from ``-limit``, counted from the end,
        to ``limit - 1``.
    """

    index: int
    limit: int


class ArgumentTypeError(FremapError, TypeError):
    """An argument has the wrong type, such as pages that are not integers."""


class ArgumentError(FremapError, ValueError):
    """An argument is invalid."""


class FormatError(FremapError, ValueError):
    """A file is not what its name or header says, or was shorter than that when it was opened."""


class PlacedPageError(FremapError, ValueError):
    """A placed page, which has no file behind it, would be lost."""


class DuplicatePageError(FremapError, ValueError):
    """Two pages of a window would show the same writable file page."""


class ClosedError(FremapError, ValueError):
    """The object is closed."""


class ForkError(FremapError, RuntimeError):
    """The object belongs to the process that forked this one."""


class ViewsAliveError(FremapError, BufferError):
    """A window cannot be closed while arrays or memoryviews show its memory."""


class UnsupportedError(FremapError, NotImplementedError):
    """The engine, the kernel or the file cannot do this."""


class TakeCancelledError(FremapError):
    """A submitted take was cancelled before all of its rows were read."""


class TakeTimeoutError(FremapError, TimeoutError):
    """A submitted take is not done yet, or an actor of Ray has not answered in time."""


class StoreError(FremapError, OSError):
    """A system call failed.

    `errno`, `strerror` and `filename` are as in every `OSError`. Where the
    cause has a builtin exception of its own (`FileNotFoundError`,
    `PermissionError`, `FileExistsError`, `IsADirectoryError`,
    `NotADirectoryError`), the error is an instance of that too.

    Attributes
    ----------
    completed : int
        How many pages, from the start of the request, were done before the failure; for
        `Slots`, how many extents.
    file_page : int or None
        The file page that failed, if it is known.
    row : int or None
        For `fremap.rows`: the row that failed.
    key : int or None
        For `fremap.Slots`: the key of the extent that failed.
    """

    completed: int = 0
    file_page: int | None = None
    row: int | None = None
    key: int | None = None


class TruncatedError(StoreError):
    """The file is shorter than it was when the store was opened."""


class ProviderError(StoreError):
    """A process that computes or fetches pages has failed.

    If the function of a `ComputedStore` raised an exception that can be pickled, that is the
    cause (``__cause__``).

    Attributes
    ----------
    traceback : str
        The traceback of the process, as text; empty if the process itself failed.
    """

    traceback: str = ""

    def __str__(self) -> str:
        """Return the message, with the traceback of the process."""
        text = super().__str__()
        return f"{text}\n\nIn the provider process:\n{self.traceback}" if self.traceback else text


class ProviderTimeoutError(ProviderError, TimeoutError):
    """A process that computes or fetches pages has not answered in time."""


class ActorLostError(StoreError, ConnectionError):
    """An actor of Ray that reads rows has died, or cannot be placed or reached.

    Attributes
    ----------
    actor : str
        Ray's ID of the actor.
    node : str
        Ray's ID of the node that it ran on; empty if it never ran.
    """

    actor: str = ""
    node: str = ""


class MappingLimitError(FremapError, OSError):
    """The process would have more kernel mappings than `vm.max_map_count` allows."""


class MemoryLimitError(FremapError, MemoryError):
    """A call would need more memory than there is.

    Attributes
    ----------
    completed : int
        How many pages, from the start of the request, were done; mostly none.
    """

    completed: int = 0


class BudgetError(MemoryLimitError):
    """A window, rows or slots would need more memory than their budget."""


class SlotsFullError(BudgetError):
    """A call names more extents than there are free slots: the others are pinned."""


class RemapError(FremapError, OSError):
    """`remap_file_pages` refused a call; on a window, with the errno of the patch of 2002."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """The file does not exist."""


class StorePermissionError(StoreError, PermissionError):
    """The process has no permission to do that with the file."""


class StoreExistsError(StoreError, FileExistsError):
    """The file exists already."""


class StoreIsDirectoryError(StoreError, IsADirectoryError):
    """The path names a directory."""


class StoreNotDirectoryError(StoreError, NotADirectoryError):
    """A part of the path that should be a directory is a file."""


# What `OSError(errno, ...)` chooses by itself, and a subclass of it does not.
_BY_ERRNO: dict[int, type[StoreError]] = {
    errno.ENOENT: StoreNotFoundError,
    errno.EACCES: StorePermissionError,
    errno.EPERM: StorePermissionError,
    errno.EEXIST: StoreExistsError,
    errno.EISDIR: StoreIsDirectoryError,
    errno.ENOTDIR: StoreNotDirectoryError,
}

# Tracebacks name the classes as users import them.
for _name in __all__:
    globals()[_name].__module__ = "fremap"
del _name

_BY_KIND: dict[str, type[FremapError]] = {
    "argument": ArgumentError,
    "duplicate": DuplicatePageError,
    "placed": PlacedPageError,
    "budget": BudgetError,
    "closed": ClosedError,
    "fork": ForkError,
    "memory": MemoryLimitError,
    "slots_full": SlotsFullError,
    "views_alive": ViewsAliveError,
    "unsupported": UnsupportedError,
}


def _page_range(message: str, index: int, limit: int) -> PageRangeError:
    error = PageRangeError(message)
    error.index = index
    error.limit = limit
    return error


def _provider(
    message: str,
    number: int,
    said: tuple[str, bytes],
    path: bytes | None,
    file_page: int | None,
    completed: int,
) -> ProviderError:
    """Make the error of a provider process, caused by what it has pickled."""
    chosen = ProviderTimeoutError if number == errno.ETIMEDOUT else ProviderError
    error = chosen(number, message) if path is None else chosen(number, message, os.fsdecode(path))
    error.traceback, pickled = said
    error.completed = completed
    error.file_page = file_page
    error.__cause__ = _unpickled(pickled)
    return error


def _unpickled(pickled: bytes) -> BaseException | None:
    """Return the exception that a provider process has pickled, if it can be unpickled here."""
    if not pickled:
        return None
    import pickle

    try:
        cause = pickle.loads(pickled)  # noqa: S301 - from a process that this one has started
    except Exception:  # noqa: BLE001 - any class may be raised; its text is told anyway
        return None
    return cause if isinstance(cause, BaseException) else None


def _system(
    kind: str,
    message: str,
    number: int,
    path: bytes | None,
    file_page: int | None,
    completed: int,
) -> FremapError:
    """Make the error of a failed system call; by its kind."""
    if kind == "mapping_limit":
        return MappingLimitError(number, message)
    if kind == "remap":
        return RemapError(number, message)
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        message += (
            f"; {limit} open files are the limit of this process: close some, or raise the limit "
            "(ulimit -n)"
        )
    chosen = TruncatedError if kind == "truncated" else _BY_ERRNO.get(number, StoreError)
    error = chosen(number, message) if path is None else chosen(number, message, os.fsdecode(path))
    error.completed = completed
    error.file_page = file_page
    return error
