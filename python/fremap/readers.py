"""Threads that read batches ahead.

An interrupt (Ctrl-C) may come between any two steps of the thread that waits. So nothing
that it waits for is guarded by a lock that an interrupt could leave locked: what is to be
read goes through a queue that is written in C, and that a read has ended is a flag, beside
which a lock only wakes who waits for it.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from fremap.errors import MemoryLimitError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    import numpy.typing as npt

__all__ = ["Read", "Readers"]

# Seconds after which a read is looked at again, should its waking have been lost.
_LOOK_AGAIN = 0.05


class Read:
    """A batch that is to be read.

    Parameters
    ----------
    ids : ndarray of int64
        The rows.
    memory : ndarray
        Where they go.
    """

    __slots__ = ("_ended", "_error", "_wake", "ids", "memory")

    def __init__(self, ids: npt.NDArray[np.int64], memory: npt.NDArray[Any]) -> None:
        self.ids = ids
        self.memory = memory
        self._ended = False
        self._error: BaseException | None = None
        self._wake = threading.Lock()
        self._wake.acquire()

    def run(self, take: Callable[..., npt.NDArray[Any]]) -> None:
        """Read it, in a thread of its own."""
        try:
            self.memory = take(self.ids, self.memory)
        except BaseException as error:  # noqa: BLE001 - it is raised where the batch is asked for
            self._error = error
        self._ended = True
        self._wake.release()

    def result(self) -> npt.NDArray[Any]:
        """Wait for the batch, and return it or raise what reading it raised."""
        while not self._ended:
            self._wake.acquire(timeout=_LOOK_AGAIN)
        if self._error is not None:
            raise self._error
        return self.memory


class Readers:
    """A few threads that read.

    Parameters
    ----------
    take : callable
        Reads rows into memory: ``take(ids, memory)``.
    most : int
        Threads at most.
    """

    __slots__ = ("__weakref__", "_dropped", "_most", "_take", "_threads", "_waiting")

    def __init__(self, take: Callable[..., npt.NDArray[Any]], most: int) -> None:
        self._take = take
        self._most = most
        self._threads: list[threading.Thread] = []
        self._waiting: SimpleQueue[Read | None] = SimpleQueue()
        # Ends the threads where this object is dropped, with no Python in it that a signal
        # handler could interrupt. The threads keep it.
        self._dropped = weakref.ref(self, partial(self._waiting.put, None))
        if not _all:
            atexit.register(_end_all)
        _all.add(self)

    def begin(self, read: Read) -> None:
        """Have a batch read.

        Raises
        ------
        MemoryLimitError
            There is no thread, and none can be started. With one there, it reads alone.
        """
        if len(self._threads) < self._most:
            self._start_thread()
        self._waiting.put(read)

    def _start_thread(self) -> None:
        # Daemons, as one that waits for work must not keep the interpreter from its end.
        thread = threading.Thread(
            target=_serve,
            args=(self._waiting, self._take, self._dropped),
            name="fremap-batches",
            daemon=True,
        )
        # Noted first: an interrupt may come when it runs already.
        self._threads.append(thread)
        _running.add(thread)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            self._threads.remove(thread)
            _running.discard(thread)
            if not self._threads:
                raise MemoryLimitError(
                    f"batches: no thread can be started to read ahead ({error}): a limit on "
                    "processes or memory is reached (ulimit -u, ulimit -v, pids.max of the "
                    "cgroup); raise it, or say prefetch=0 to read in the calling thread"
                ) from error

    def end(self) -> None:
        """Begin no read any more; those under way go on."""
        try:
            while True:
                self._waiting.get_nowait()
        except Empty:
            pass
        self._waiting.put(None)

    def join(self) -> None:
        """Wait for the reads under way, after `end`."""
        _join(self._threads)


_all: weakref.WeakSet[Readers] = weakref.WeakSet()
_running: set[threading.Thread] = set()


def _serve(
    waiting: SimpleQueue[Read | None],
    take: Callable[..., npt.NDArray[Any]],
    _dropped: weakref.ref[Readers],
) -> None:
    """Read batches until none is left."""
    while (read := waiting.get()) is not None:
        read.run(take)
        del read  # and its memory with it
    waiting.put(None)  # for the next thread
    _running.discard(threading.current_thread())


def _end_all() -> None:
    """At the interpreter's end: no thread may come back from a read after it."""
    for readers in tuple(_all):
        readers.end()
    _join(tuple(_running))


def _join(threads: Iterable[threading.Thread]) -> None:
    """Wait for threads, but for those that an interrupt kept from being started."""
    for thread in threads:
        if thread.is_alive():
            thread.join()
