"""Stores whose pages a function computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from fremap import _core, providing
from fremap.arguments import checked_timeout, quantity
from fremap.errors import ArgumentError
from fremap.selection import Numbering
from fremap.stores import ProvidedStore

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from fremap.arguments import BufferLike
    from fremap.providing import Fill
    from fremap.selection import CoreSelection, PageSelection

__all__ = ["ComputedStore"]

_INT64_MAX = 2**63 - 1
#: Bytes of pages that one call of `fill` is asked for.
_BATCH_BYTES = 4 << 20


class ComputedStore(ProvidedStore):
    """A store whose pages a function computes on demand, in processes of their own.

    Use it for pages that are cheaper to compute again than to keep: rendered tiles, decoded
    arrays, generated tables. Windows, rows and slots show them like pages of a file. A page
    that was evicted from a window is computed again.

    Parameters
    ----------
    page_count : int
        Number of pages.
    fill : callable
        ``fill(pages, out)`` writes the content of `pages` (int64, shape (n,), ascending, each
        once) into `out` (uint8, shape (n, page_bytes), zeros at first), and returns None. It
        must produce the same content each time. It is pickled: pass a function of a module, or
        an object with ``__call__`` that holds the data it needs.
    page_bytes : int, optional
        Size of a page: a power of two from the system's page to 1 GiB. Default: the system's
        page.
    workers : int, default 1
        Number of processes that compute at the same time, at most.
    timeout : float or None, default 60.0
        Seconds that one call of `fill` may take before its process is killed. One call computes up
        to 4 MiB of pages, or one page that is larger. None: no limit.
    in_process : bool, default False
        Have `read` call `fill` in this process, in the thread that calls `read`. Windows and
        slots still use the processes.

    Raises
    ------
    ArgumentError
        A number is invalid, or `fill` was defined in an interactive session.
    ArgumentTypeError
        `fill` is not a function, or cannot be pickled.
    UnsupportedError
        A process of another store is importing this program: see the notes.

    Notes
    -----
    No Python code can run in a page fault. So the store starts processes (as `multiprocessing`
    does with "spawn") when it first needs them, and communicates with them through shared
    memory and a socket. If `fill` is defined in the main program, the rest of the program must
    be under ``if __name__ == "__main__":``, as for `multiprocessing`. A process that dies is
    started again, up to three times for a request. The processes exit when the store and its
    windows are closed or dropped, and within a second after this process has ended, however it
    ended.

    If `fill` raises an exception, a call raises `ProviderError` from it, with the traceback of
    the process as text. Touching a page of a window then prints a line on stderr and raises
    SIGBUS. A process that takes longer than `timeout` is killed, and the call raises
    `ProviderTimeoutError`.

    The store is read-only. Engine "alias" needs a file, so windows have engine "paged" or
    "eager". In a child of ``fork``, calls of the store start new processes; touching an absent
    page of the parent's window raises SIGBUS. Pickling pickles `fill`.

    Examples
    --------
    >>> import fremap
    >>> from fremap.testing.pages import fill_numbered, page_numbers
    >>> with fremap.ComputedStore(1 << 20, fill_numbered, page_bytes=4096) as store:
    ...     page_numbers(store.read([7, 99]).view("u8"))[:, 0].tolist()
    [7, 99]
    """

    __slots__ = ("_arguments", "_fill", "_in_process")

    def __init__(
        self,
        page_count: SupportsIndex,
        fill: Fill,
        *,
        page_bytes: SupportsIndex | None = None,
        workers: SupportsIndex = 1,
        timeout: float | None = 60.0,
        in_process: bool = False,
    ) -> None:
        count = quantity("ComputedStore: page_count", page_count)
        bytes_each = _core.system_page_bytes
        if page_bytes is not None:
            bytes_each = quantity("ComputedStore: page_bytes", page_bytes)
        if count * bytes_each > _INT64_MAX:
            raise ArgumentError(
                f"ComputedStore: page_count is {count}; pages of {bytes_each} bytes must be less "
                "than 2**63 bytes together"
            )
        self._core = _core.Store.provided(
            count * bytes_each,
            bytes_each,
            None,
            providing.program(),
            providing.payload("ComputedStore", fill),
            quantity("ComputedStore: workers", workers),
            checked_timeout("ComputedStore", timeout),
            _BATCH_BYTES,
            None,
        )
        self._fill = fill
        self._in_process = bool(in_process)
        self._arguments = (count, bytes_each, int(workers), timeout, self._in_process)

    def _called(self) -> str:
        name = getattr(self._fill, "__qualname__", None) or type(self._fill).__qualname__
        return f"by {name}"

    def read(
        self, pages: PageSelection = None, out: BufferLike | None = None
    ) -> npt.NDArray[np.uint8]:
        """Compute pages, in any order.

        Parameters
        ----------
        pages : int, slice, range, array of int or None, optional
            Pages, repeats allowed; None means all.
        out : writable buffer, optional
            Where to put them: C-contiguous, exactly ``n * page_bytes`` bytes.

        Returns
        -------
        ndarray of uint8, shape (n, page_bytes)
            The pages in the order asked for; an array over `out` if it was given.

        Raises
        ------
        ProviderError
            `fill` raised an exception, or its process died; the first ``error.completed`` pages
            are right. With ``in_process=True`` the exception itself is raised.
        ProviderTimeoutError
            `fill` took too long.
        PageRangeError
            A page is outside the store.
        ArgumentError
            `out` has another size, is read-only or not contiguous.

        Notes
        -----
        Pages are computed in batches of up to 4 MiB, as many at once as there are `workers`. Pages
        that `prefetch` has requested are not computed twice. Any number of threads may call this.
        """
        if not self._in_process:
            return super().read(pages, out)
        selection, count = self._select("read", pages)
        filled = (
            np.zeros((count, self.page_bytes), dtype=np.uint8)
            if out is None
            else self._checked_out(out, count)
        )
        self._read_here(self._numbers(selection), filled)
        return filled

    def _numbers(self, selection: CoreSelection) -> npt.NDArray[np.int64]:
        """Return the pages of a selection one by one."""
        if selection is None:
            return np.arange(self.page_count, dtype=np.int64)
        if isinstance(selection, tuple):
            return np.arange(*selection, dtype=np.int64)
        return Numbering("read", "file page", self.page_count).resolved(np.asarray(selection))

    def _read_here(self, numbers: npt.NDArray[np.int64], filled: npt.NDArray[np.uint8]) -> None:
        """Have `fill` compute pages in this process."""
        if self.closed:
            self._core.read((0, 0), np.empty(0, np.uint8))  # raises what every call raises
        batch = max(1, _BATCH_BYTES // self.page_bytes)
        for start in range(0, len(numbers), batch):
            wanted = numbers[start : start + batch]
            into = filled[start : start + batch]
            pages, places = np.unique(wanted, return_inverse=True)
            if np.array_equal(pages, wanted):
                into.fill(0)
                providing.provide(self._fill, pages, into)
            else:
                content = np.zeros((len(pages), self.page_bytes), np.uint8)
                providing.provide(self._fill, pages, content)
                into[...] = content[places]

    def __reduce__(self) -> tuple[Callable[..., ComputedStore], tuple[object, ...]]:
        self._check_pickled()
        return _made_anew, (type(self), self._fill, *self._arguments)


def _made_anew(
    cls: type[ComputedStore],
    fill: Fill,
    page_count: int,
    page_bytes: int,
    workers: int,
    timeout: float | None,
    in_process: bool,  # noqa: FBT001
) -> ComputedStore:
    return cls(
        page_count,
        fill,
        page_bytes=page_bytes,
        workers=workers,
        timeout=timeout,
        in_process=in_process,
    )
