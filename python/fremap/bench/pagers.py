"""Ways to work on a file that is larger than the memory for it, each in a process of its own.

A pager touches one word of a page after the other. Its process can be put under a
limit of memory, and what it holds is sampled meanwhile. Stores go to the second word
of a page, of which the first bears the page's number.
"""

import mmap
import multiprocessing
import os
import resource
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

import fremap
from fremap.bench.datafile import PAGE_BYTES
from fremap.bench.harness import BenchError, timed
from fremap.bench.machine import process_bytes
from fremap.bench.memory import MemoryGroup

FREMAP = "fremap"
FREMAP_DIRECT = "fremap, direct=True"
FREMAP_MEMMAP = "fremap.memmap"
MEMMAP = "np.memmap"
MMAP_RANDOM = "mmap, MADV_RANDOM"
CACHE = "an OrderedDict of pages"

# One access of so many is a store, where there are stores.
STORE_EVERY = 10
# What an entry of the dictionary and the objects in it cost beside the content.
_ENTRY_BYTES = 256
_WORDS = PAGE_BYTES // 8
_SAMPLE_SECONDS = 0.005
_END_SECONDS = 10
_LONGEST_SECONDS = 60


class TooSlowError(BenchError):
    """A pager that does not get on, as where what it has is read and dropped over and over."""


class _Pager(Protocol):
    """What a process does with its file."""

    def prepare(self, pages: npt.NDArray[np.int64]) -> list[int]:
        """Return what `touch` wants to know of these pages."""

    def touch(self, places: Sequence[int], value: int | None) -> int:
        """Read a word of each and return the sum; with `value`, store to each tenth instead."""

    @property
    def misses(self) -> int:
        """Pages so far that were not there when they were touched."""

    @property
    def evicted(self) -> int | None:
        """Pages so far that had to leave, where that is known."""

    def close(self) -> None:
        """Write what was stored, and end."""


class _Words:
    """The words of a file as one array: an access is an index."""

    words: npt.NDArray[np.int64]

    @staticmethod
    def prepare(pages: npt.NDArray[np.int64]) -> list[int]:
        places: list[int] = (pages * _WORDS).tolist()
        return places

    def touch(self, places: Sequence[int], value: int | None) -> int:
        words = self.words
        total = 0
        if value is None:
            for place in places:
                total += words[place]
            return int(total)
        for first in range(0, len(places), STORE_EVERY):
            words[places[first] + 1] = value
            for place in places[first + 1 : first + STORE_EVERY]:
                total += words[place]
        return int(total)


class _Window(_Words):
    """A window with a budget, on the whole file."""

    direct: ClassVar[bool] = False

    def __init__(self, path: Path, budget_bytes: int, *, writable: bool) -> None:
        self._store = fremap.open(path, "r+" if writable else "r", direct=self.direct)
        self._window = fremap.Window(
            self._store,
            engine="paged",
            prot=fremap.Prot.WRITE if writable else fremap.Prot.READ,
            coherent=False,
            budget=budget_bytes,
        )
        self.words = self._window.array(np.int64)

    @property
    def misses(self) -> int:
        return self._window.stats().faults

    @property
    def evicted(self) -> int | None:
        return self._window.stats().pages_evicted

    def close(self) -> None:
        del self.words
        self._window.close()
        self._store.close()


class _DirectWindow(_Window):
    """The same, with reads and writes past the page cache."""

    direct = True


class _Mapped(_Words):
    """What maps the file and leaves the rest to the kernel: a miss is a major fault."""

    evicted = None

    @property
    def misses(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class _Memmap(_Mapped):
    """`np.memmap`, as it comes; a plain view, whose indexing is not Python's."""

    def __init__(self, path: Path, _budget_bytes: int, *, writable: bool) -> None:
        self._table = np.memmap(path, dtype=np.int64, mode="r+" if writable else "r")
        self.words = self._table.view(np.ndarray)

    def close(self) -> None:
        self._table.flush()


class _FremapMemmap(_Mapped):
    """`fremap.memmap`, as it comes, with the budget."""

    def __init__(self, path: Path, budget_bytes: int, *, writable: bool) -> None:
        mode: Literal["r", "r+"] = "r+" if writable else "r"
        self._table = fremap.memmap(path, np.int64, mode, budget=budget_bytes)
        self.words = self._table.view(np.ndarray)

    def close(self) -> None:
        self._table.flush()


class _MmapRandom(_Mapped):
    """Python's mmap, with the advice that fits the access."""

    def __init__(self, path: Path, _budget_bytes: int, *, writable: bool) -> None:
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._memory = mmap.mmap(fd, 0, access=access)
        os.close(fd)
        self._memory.madvise(mmap.MADV_RANDOM)
        self.words = np.frombuffer(self._memory, dtype=np.int64)

    def close(self) -> None:
        self._memory.flush()


class _Cache:
    """Pages that were read, in a dictionary; the one that was used longest ago leaves."""

    _word = struct.Struct("=q")

    def __init__(self, path: Path, budget_bytes: int, *, writable: bool) -> None:
        self._fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        self._limit = max(1, budget_bytes // (PAGE_BYTES + _ENTRY_BYTES))
        self._make = bytearray if writable else bytes
        self._pages: OrderedDict[int, bytes | bytearray] = OrderedDict()
        self._dirty: set[int] = set()
        self.misses = 0
        self.evicted: int | None = 0

    @staticmethod
    def prepare(pages: npt.NDArray[np.int64]) -> list[int]:
        places: list[int] = pages.tolist()
        return places

    def touch(self, places: Sequence[int], value: int | None) -> int:
        pages, word, total = self._pages, self._word, 0
        for number, place in enumerate(places):
            content = pages.get(place)
            if content is None:
                content = self._load(place)
            else:
                pages.move_to_end(place)
            if value is None or number % STORE_EVERY:
                total += word.unpack_from(content)[0]
            else:
                word.pack_into(content, word.size, value)
                self._dirty.add(place)
        return total

    def _load(self, page: int) -> bytes | bytearray:
        self.misses += 1
        if len(self._pages) >= self._limit:
            left, old = self._pages.popitem(last=False)
            self.evicted = (self.evicted or 0) + 1
            if left in self._dirty:
                self._dirty.remove(left)
                os.pwrite(self._fd, old, left * PAGE_BYTES)
        content = self._make(os.pread(self._fd, PAGE_BYTES, page * PAGE_BYTES))
        self._pages[page] = content
        return content

    def close(self) -> None:
        for page in self._dirty:
            os.pwrite(self._fd, self._pages[page], page * PAGE_BYTES)
        os.fsync(self._fd)
        os.close(self._fd)


_KINDS: dict[str, Callable[..., _Pager]] = {
    FREMAP: _Window,
    FREMAP_DIRECT: _DirectWindow,
    FREMAP_MEMMAP: _FremapMemmap,
    MEMMAP: _Memmap,
    MMAP_RANDOM: _MmapRandom,
    CACHE: _Cache,
}


@dataclass(frozen=True)
class Touched:
    """What one run of accesses came to."""

    seconds: float
    misses: int
    evicted: int | None


@dataclass(frozen=True)
class _Request:
    pages: npt.NDArray[np.int64]
    value: int | None


@dataclass(frozen=True)
class _Answer:
    seconds: float
    total: int
    misses: int
    evicted: int | None


def _serve(
    connection: Connection, name: str, path: Path, budget_bytes: int, *, writable: bool
) -> None:
    """Answer requests until there is None; the process's main function."""
    try:
        connection.send(None)  # all is imported
        connection.recv()
        pager: _Pager = _KINDS[name](path, budget_bytes, writable=writable)
        while (request := connection.recv()) is not None:
            connection.send(_answer(pager, request))
        pager.close()
        connection.send(None)
    except EOFError:
        pass  # whoever asked is gone
    except (fremap.FremapError, OSError) as error:
        connection.send(f"{name}: {error}")


def _answer(pager: _Pager, request: _Request) -> _Answer:
    places = pager.prepare(request.pages)
    misses, evicted = pager.misses, pager.evicted
    total = 0

    def touch() -> None:
        nonlocal total
        total = pager.touch(places, request.value)

    seconds = timed(touch)
    left = None if evicted is None else (pager.evicted or 0) - evicted
    return _Answer(seconds, total, pager.misses - misses, left)


class PagerProcess:
    """A pager at work; leaving the context ends it.

    Attributes
    ----------
    name
        Which it is.
    held_bytes
        The most that it was seen to hold, page tables included, beyond what the process
        had before it opened its file.
    samples
        How often that was asked.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        budget_bytes: int,
        *,
        writable: bool,
        group: MemoryGroup | None,
    ) -> None:
        self.name = name
        self.held_bytes = 0
        self.samples = 0
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, name, path, budget_bytes),
            kwargs={"writable": writable},
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._group = group
        self._before = 0
        try:
            if group is not None:
                group.add(self._pid)
            self._receive()
            self._before = self._bytes()
            if group is not None:
                group.limit_further(budget_bytes + budget_bytes // 10)
            self._connection.send(None)
        except BaseException:
            self._end()
            raise

    @property
    def _pid(self) -> int:
        return self._process.pid or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def touch(self, pages: npt.NDArray[np.int64], value: int | None) -> Touched:
        """Touch a word of each page in turn, and check what was read."""
        self._connection.send(_Request(pages, value))
        begin = time.perf_counter()
        while not self._connection.poll(_SAMPLE_SECONDS):
            if time.perf_counter() - begin > _LONGEST_SECONDS:
                self._process.kill()
                raise TooSlowError(
                    f"{self.name}: {len(pages)} accesses not done in {_LONGEST_SECONDS} s"
                )
            self.held_bytes = max(self.held_bytes, self._bytes() - self._before)
            self.samples += 1
        answer = self._receive()
        self.held_bytes = max(self.held_bytes, self._bytes() - self._before)
        self.samples += 1
        reads = pages if value is None else pages[np.arange(len(pages)) % STORE_EVERY != 0]
        if answer.total != int(reads.sum()):
            raise BenchError(f"{self.name}: the pages that were read are not those asked for")
        return Touched(answer.seconds, answer.misses, answer.evicted)

    def close(self) -> None:
        """Have it write what was stored, and wait for it."""
        self._connection.send(None)
        self._receive()

    def _bytes(self) -> int:
        """Resident memory and page tables."""
        try:
            return process_bytes("VmRSS", self._pid) + process_bytes("VmPTE", self._pid)
        except (OSError, ValueError):
            return 0  # it has just ended; what it said is still to be read

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(_END_SECONDS)
            how = f"exit {self._process.exitcode}"
            raise BenchError(f"{self.name}: its process ended ({how})") from None
        if isinstance(answer, str):
            raise BenchError(answer)
        return answer

    def _end(self) -> None:
        self._connection.close()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
