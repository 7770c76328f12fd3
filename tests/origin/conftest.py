"""Numbered stores of both kinds, half-cached files, and what the kernel says about memory.

Each test here names the row of `docs/origin.md` that it shows. Helpers look at
the kernel's own answers (`/proc/self/maps`, `mincore`, `/proc/self/io`,
`getrusage`), not at fremap's.
"""

import ctypes
import mmap
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap.testing import pages_taken, wait_until_settled

PAGE = mmap.PAGESIZE

Numbered = Callable[..., np.ndarray]
MakeStore = Callable[[int], fremap.Store]
HalfCached = Callable[[int], tuple[Path, np.ndarray]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's calibration out of the tests, and the tests out of it."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    return base


@pytest.fixture(params=["file", "shm", "memfd"])
def numbered_store(
    request: pytest.FixtureRequest,
    numbered_file: Callable[..., Path],
    numbered_pages: Numbered,
) -> Iterator[MakeStore]:
    """`numbered_store(page_count)` → a writable store of numbered pages, once for each kind."""
    with ExitStack() as opened:

        def make(page_count: int) -> fremap.Store:
            if request.param == "file":
                path = numbered_file(page_count, PAGE)
                # What others have just written is read twice.
                wait_until_settled(path)
                return opened.enter_context(fremap.open(path, "r+", page_bytes=PAGE))
            name = None
            if request.param == "shm":
                name = f"fremap-origin-{os.getpid()}-{os.urandom(4).hex()}"
            store = fremap.MemoryStore(page_count * PAGE, name=name, page_bytes=PAGE)
            opened.enter_context(store)
            if name is not None:
                opened.callback(store.unlink)
            store.write(None, numbered_pages(range(page_count), PAGE))
            return store

        yield make


def page_cache_holds(path: Path) -> np.ndarray:
    """Which pages of a file are in the page cache, by `mincore(2)`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        whole = np.frombuffer(mapped, dtype=np.uint8)
        vector = np.zeros(-(-len(whole) // PAGE), dtype=np.uint8)
        address = ctypes.c_void_p(whole.ctypes.data)
        size = ctypes.c_size_t(len(whole))
        answer = libc.mincore(address, size, ctypes.c_void_p(vector.ctypes.data))
        assert answer == 0, os.strerror(ctypes.get_errno())
        del whole
    return (vector & 1).astype(bool)


def drop_from_page_cache(path: Path, first_page: int, page_count: int) -> None:
    """Make the kernel forget pages of a file that nobody maps."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(
            file.fileno(), first_page * PAGE, page_count * PAGE, os.POSIX_FADV_DONTNEED
        )


@pytest.fixture(scope="session")
def disk_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a file system that has a page cache below it (no tmpfs)."""
    for parent in (tmp_path_factory.getbasetemp(), Path("/var/tmp"), Path.cwd()):
        if not os.access(parent, os.W_OK):
            continue
        with tempfile.TemporaryDirectory(prefix="fremap-", dir=parent) as made:
            probe = Path(made) / "probe"
            probe.write_bytes(bytes(PAGE))
            drop_from_page_cache(probe, 0, 1)
            if not page_cache_holds(probe).any():
                yield Path(made)
                return
    pytest.fail("no directory here is on a disk: set TMPDIR to one that is")


@pytest.fixture
def half_cached(disk_directory: Path, numbered_pages: Numbered) -> Iterator[HalfCached]:
    """`half_cached(page_count)` → a numbered file of which every second 16 pages are cached.

    With it a bool array of which pages those are.
    """
    paths: list[Path] = []

    def make(page_count: int) -> tuple[Path, np.ndarray]:
        path = disk_directory / f"half-cached-{os.urandom(4).hex()}"
        paths.append(path)
        path.write_bytes(numbered_pages(range(page_count), PAGE).tobytes())
        wait_until_settled(path)
        drop_from_page_cache(path, 0, page_count)
        with path.open("rb") as file:
            # Random access reads what is asked for, and nothing ahead of it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for first in range(0, page_count, 32):
                os.pread(file.fileno(), 16 * PAGE, first * PAGE)
        cached = page_cache_holds(path)
        assert cached.any()
        assert not cached.all()
        return path, cached

    yield make
    for path in paths:
        path.unlink()


def bytes_read_from_devices() -> int:
    """Bytes that this process made storage devices read, all threads together."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, value = line.split(": ")
        if name == "read_bytes":
            return int(value)
    raise AssertionError("no read_bytes in /proc/self/io")


@contextmanager
def no_device_reads() -> Iterator[None]:
    """Check that not one byte is read from a device inside."""
    before = bytes_read_from_devices()
    yield
    assert bytes_read_from_devices() - before == 0


def maps_lines(window: fremap.Window) -> int:
    """Lines of `/proc/self/maps` that lie in a window."""
    memory = np.frombuffer(window, dtype=np.uint8)
    first = memory.ctypes.data
    end = first + len(memory)
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(address, 16) for address in line.split()[0].split("-"))
        count += start < end and stop > first
    return count


def faults_of_touching(memory: np.ndarray, pages: range | list[int]) -> int:
    """Read one byte of each page; return the page faults that it cost this thread."""
    offsets = np.array([page * PAGE for page in pages], np.int64)
    read = np.ones(len(offsets), np.uint8)  # written, so that it is there

    # One call of NumPy's, as the interpreter has faults of its own.
    def touch(memory: np.ndarray, offsets: np.ndarray) -> None:
        memory.take(offsets, out=read, mode="clip")

    touch(np.zeros(PAGE, np.uint8), np.zeros_like(offsets))
    before = resource.getrusage(resource.RUSAGE_THREAD)
    touch(memory, offsets)
    after = resource.getrusage(resource.RUSAGE_THREAD)
    return (after.ru_minflt - before.ru_minflt) + (after.ru_majflt - before.ru_majflt)


WAIT = 2  # seconds, for a counter of what was under way


def costs_no_fault(memory: np.ndarray, pages: range | list[int]) -> bool:
    """Whether touching these pages costs no page fault.

    The interpreter may take one of its own meanwhile, so one is let pass where
    there are pages enough to tell; and as many as the kernel took away pages meanwhile.
    """
    before = pages_taken()
    faults = faults_of_touching(memory, pages) - (1 if len(pages) > 2 else 0)
    end = time.monotonic() + WAIT
    while faults > pages_taken() - before:
        if time.monotonic() > end:
            return False
    return True
