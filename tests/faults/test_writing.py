"""Stores that fall into calls: none is lost, nobody waits for ever, errors leave no harm."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.testing import failures

if TYPE_CHECKING:
    from pathlib import Path

PAGES = 2048
STORED = 1 << 40  # in no page before
PAGE = 4096
TRACKINGS = [
    pytest.param("sync", marks=pytest.mark.needs("paged", "uffd_wp")),
    pytest.param("async", marks=pytest.mark.needs("paged", "uffd_wp_async", "uffd_move")),
]
WRITABLE = [
    pytest.param(("paged", tracking.values[0]), marks=tracking.marks) for tracking in TRACKINGS
]
WRITABLE.append(("eager", "auto"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of zero pages."""
    path = tmp_path / "pages"
    path.write_bytes(bytes(PAGES * PAGE))
    return path


def writable(store: fremap.Store, kind: tuple[str, str], **options: Any) -> fremap.Window:
    engine, tracking = kind
    return fremap.Window(
        store,
        prot=Prot.WRITE,
        coherent=False,
        engine=engine,  # type: ignore[arg-type]
        tracking=tracking,  # type: ignore[arg-type]
        populate=options.pop("populate", engine == "eager"),
        **options,
    )


@pytest.mark.parametrize("tracking", TRACKINGS)
@pytest.mark.parametrize("call", ["evict", "populate", "flush", "remap", "place"])
def test_no_store_is_lost_to_a_call_beside_it(tracking: str, call: str, path: Path) -> None:
    """One thread stores to each page once while another changes all pages all the time."""
    random = np.random.default_rng(50)
    with fremap.open(path, "r+") as store:
        window = writable(store, ("paged", tracking), page_count=PAGES)
        pages = window.pages
        for stamp in range(1, 4):
            order, done = random.permutation(PAGES), threading.Event()

            def store_to_all(
                pages: Any, stamp: int = stamp, order: Any = order, done: Any = done
            ) -> None:
                for page in order:
                    pages[page, 0] = stamp
                done.set()

            writer = threading.Thread(target=store_to_all, args=(pages,))
            writer.start()
            while not done.is_set():
                change(window, call)
            writer.join()
            assert (pages[:, 0] == stamp).all()
            window.flush()
            found = np.fromfile(path, np.uint8).reshape(PAGES, PAGE)
            assert call == "place" or (found[:, 0] == stamp).all()
        del pages
        window.close(discard=True)


def change(window: fremap.Window, call: str) -> None:
    """Do something to all pages that keeps what they show."""
    if call == "evict":
        window.evict(None)
    elif call == "populate":
        window.evict(slice(0, PAGES, 2))
        window.populate()
    elif call == "flush":
        window.flush()
    elif call == "remap":
        window.remap(range(PAGES), populate=False)
    else:
        window.place(slice(0, 64))


@pytest.mark.parametrize("tracking", TRACKINGS)
@pytest.mark.parametrize("call", ["evict", "remap"])
def test_a_store_that_waits_holds_up_nobody_who_has_pythons_lock(
    tracking: str, call: str, path: Path
) -> None:
    """The thread that waits has the GIL; the call that holds its page must not need it."""
    random = np.random.default_rng(51)
    with fremap.open(path, "r+", direct=True) as store:
        window = writable(store, ("paged", tracking), populate=True)
        pages, stop = window.pages, threading.Event()
        pages[::2, 0] = 1

        def touch(pages: Any) -> None:
            page = 0
            while not stop.is_set():
                pages[page % PAGES, 1] = 2
                page += 14

        toucher = threading.Thread(target=touch, args=(pages,))
        toucher.start()
        for _ in range(3):
            if call == "evict":
                window.evict(None)
            else:
                window.remap(random.permutation(PAGES))
        stop.set()
        toucher.join()
        del pages
        window.close()


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_page_remapped_to_itself_keeps_its_changes(kind: tuple[str, str], path: Path) -> None:
    with fremap.open(path, "r+") as store, writable(store, kind) as window:
        pages = window.pages
        pages[0, 0] = 7
        window.remap([0], prot=Prot.NONE)
        window.protect([0], Prot.WRITE)
        window.populate([0])
        assert pages[0, 0] == 7
        del pages
    assert path.read_bytes()[0] == 7


@pytest.mark.parametrize("kind", WRITABLE)
@pytest.mark.parametrize("call", ["uffdio_copy", "madvise"])
def test_a_remap_that_fails_leaves_no_page_twice(
    kind: tuple[str, str], call: str, path: Path
) -> None:
    with fremap.open(path, "r+") as store, writable(store, kind, page_count=4) as window:
        with failures(call, skip=1, errno=5):
            try:
                window.remap([1, 0])
            except fremap.StoreError:
                pass
            else:
                return
        shown = window.mapping[window.mapping >= 0]
        assert len(set(shown.tolist())) == len(shown)


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_what_the_kernel_told_before_it_failed_is_not_forgotten(tracking: str, path: Path) -> None:
    with fremap.open(path, "r+") as store, writable(store, ("paged", tracking)) as window:
        pages = window.pages
        pages[::2, 0] = 9
        with failures("pagemap_scan", skip=1, errno=5):
            try:
                window.flush()
            except fremap.StoreError:
                assert tracking == "async"
        window.flush()
        del pages
    assert (np.fromfile(path, np.uint8).reshape(PAGES, PAGE)[::2, 0] == 9).all()


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_direct_store_is_written_too(kind: tuple[str, str], path: Path) -> None:
    path.write_bytes(bytes(16 * PAGE + 100))
    with fremap.open(path, "r+", direct=True) as store, writable(store, kind) as window:
        pages = window.pages
        pages[:] = 5
        del pages
    assert path.read_bytes() == b"\5" * (16 * PAGE + 100)


@pytest.mark.parametrize("kind", WRITABLE)
def test_a_file_that_has_grown_keeps_what_was_added(kind: tuple[str, str], path: Path) -> None:
    path.write_bytes(b"a" * (PAGE + 100))
    with fremap.open(path, "r+") as store, writable(store, kind) as window:
        pages = window.pages
        pages[1, 0] = ord("b")
        with path.open("ab") as file:
            file.write(b"z" * 50)
        store.refresh()
        window.flush()
        del pages
    assert path.read_bytes()[PAGE:] == b"b" + b"a" * 99 + b"z" * 50


@pytest.mark.needs("paged", "uffd_wp")
def test_a_page_that_was_not_dropped_can_be_stored_to(path: Path) -> None:
    with fremap.open(path, "r+") as store, writable(store, ("paged", "sync")) as window:
        pages = window.pages
        assert pages[3, 0] == 0
        with (
            failures("madvise", errno=12, times=100),
            failures("process_madvise", errno=12, times=100),
            pytest.raises(fremap.StoreError),
        ):
            window.evict([3])
        pages[3, 0] = 4
        assert window.dirty()[3]
        del pages
    assert path.read_bytes()[3 * PAGE] == 4


@pytest.mark.needs("paged", "uffd_wp")
def test_a_store_to_a_page_that_is_only_to_be_read_is_sigsegv(path: Path) -> None:
    program = f"""
import fremap
store = fremap.open({str(path)!r}, "r+")
window = fremap.Window(
    store, prot=fremap.Prot.WRITE, coherent=False, engine="paged", tracking="sync"
)
pages = window.pages
window.place([1], bytes(4096))
window.protect([0, 1], fremap.Prot.READ)
assert pages[0, 0] == pages[1, 0] == 0
print("read", flush=True)
pages[PAGE, 0] = 1
"""
    for page in ("0", "1"):
        ended = subprocess.run(
            [sys.executable, "-c", program.replace("PAGE", page)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (ended.returncode, ended.stdout) == (-11, "read\n"), ended.stderr[-500:]


@pytest.mark.parametrize("kind", WRITABLE)
@pytest.mark.parametrize("how", ["open", "left", "leaked", "failing"])
def test_the_end_of_the_interpreter(kind: tuple[str, str], how: str, path: Path) -> None:
    """What is dirty then is written, or a line on stderr says that it was not."""
    engine, tracking = kind
    program = f"""
import ctypes, fremap
from fremap import _core
store = fremap.open({str(path)!r}, "r+")
window = fremap.Window(
    store, prot=fremap.Prot.WRITE, coherent=False, engine={engine!r}, tracking={tracking!r},
    populate={engine == "eager"},
)
pages = window.pages
pages[5, 0] = 55
if {how!r} in ("left", "leaked"):
    with window:
        pass
    pages[5, 0] = 66
if {how!r} == "leaked":
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pages))
if {how!r} == "failing":
    _core.inject_failure("write", 0, 5, 100)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    if how == "failing":
        assert "not flushed" in ended.stderr
    else:
        assert ended.stderr == ""
        assert path.read_bytes()[5 * PAGE] == (55 if how == "open" else 66)


@pytest.mark.parametrize("kind", WRITABLE)
def test_closing_where_nothing_can_be_written(kind: tuple[str, str], path: Path) -> None:
    with fremap.open(path, "r+") as store:
        window = writable(store, kind)
        pages = window.pages
        pages[1, 0] = 1
        del pages
        with failures("write", errno=28, times=100), pytest.raises(fremap.StoreError) as raised:
            window.close()
        assert raised.value.errno == 28
        assert not window.closed
        assert window.dirty()[1]
        window.close(discard=True)
        assert window.closed
    assert path.read_bytes()[PAGE] == 0


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_no_store_to_a_placed_page_is_lost_to_a_protect_beside_it(
    tracking: str, path: Path, tmp_path: Path
) -> None:
    """A system call stores to the page until it may not; what it stored last is there."""
    stamps = np.arange(1, 1 << 16, dtype=np.uint64)
    (tmp_path / "stamps").write_bytes(stamps.tobytes())
    with (
        fremap.open(path, "r+") as store,
        (tmp_path / "stamps").open("rb") as source,
        writable(store, ("paged", tracking), page_count=4, populate=True) as window,
    ):
        window.place([1], bytes(PAGE))
        memory = window.array(np.uint8, (4, PAGE))
        for _ in range(100):
            # A store in Python makes the page one that system calls may store to.
            memory[1, :8] = 0
            stored: list[int] = [0]
            writer = threading.Thread(target=_keep_storing, args=(source, memory[1, :8], stored))
            writer.start()
            while stored[0] == 0:
                time.sleep(0)
            window.protect([1], Prot.NONE)
            writer.join()
            window.protect([1], Prot.WRITE)
            assert int(memory[1, :8].view(np.uint64)[0]) == stored[0]
        del memory
        window.evict([1], discard=True)


def _keep_storing(source: Any, place: np.ndarray, stored: list[int]) -> None:
    """Read one number after another into `place`, until that is refused."""
    for number in range((1 << 16) - 1):
        try:
            os.preadv(source.fileno(), [memoryview(place)], number * 8)
        except OSError:
            return
        stored[0] = number + 1


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_no_store_is_lost_between_moving_in_and_protecting(tracking: str, path: Path) -> None:
    """A single store to each page, as a second one would have the page written anyway, while
    all pages change between two file pages: it is in one of them."""
    count = 256
    with (
        fremap.open(path, "r+") as store,
        writable(store, ("paged", tracking), page_count=count, populate=True) as window,
    ):
        words = window.array(np.uint64, (count, -1))
        shown = 0
        for place in range(100):
            begin = threading.Barrier(2)

            def store_to_all(words: np.ndarray, place: int, begin: threading.Barrier) -> None:
                begin.wait()
                for page in range(count):
                    words[page, place] = STORED

            writer = threading.Thread(target=store_to_all, args=(words, place, begin))
            writer.start()
            begin.wait()
            while writer.is_alive():
                shown = count - shown
                window.remap(range(shown, shown + count))
            writer.join()
            window.flush()
            both = store.read(range(2 * count)).view(np.uint64).reshape(2, count, -1)
            lost = np.flatnonzero((both[:, :, place] == STORED).sum(axis=0) != 1)
            assert lost.size == 0, f"round {place}: window pages {lost}"
        del words


@pytest.mark.needs("paged", "uffd_wp_async", "uffd_move")
def test_placed_pages_come_back_where_access_cannot_be_taken(tmp_path: Path) -> None:
    """Those that were taken out before the one that could not be show their content again."""
    path = tmp_path / "zeros"
    path.write_bytes(bytes(16 * PAGE))
    with (
        fremap.open(path, "r+") as store,
        fremap.Window(
            store, prot=Prot.WRITE, coherent=False, tracking="async", populate=True
        ) as window,
    ):
        pages = [2, 6, 9]
        window.place(pages, b"".join(bytes([page]) * PAGE for page in pages))
        memory = window.array(np.uint8, (16, PAGE))
        # The second page cannot be moved, nor when it is tried again.
        with (
            failures("uffdio_move", errno=errno.ENOMEM, skip=1, times=2),
            pytest.raises(fremap.StoreError),
        ):
            window.protect(pages, Prot.NONE)
        assert (window.protection(pages) == Prot.WRITE).all()
        assert window.present(pages).all()
        assert memory[pages, 7].tolist() == pages
        memory[pages, 7] = 1
        window.protect(pages, Prot.NONE)
        window.protect(pages, Prot.WRITE)
        assert memory[pages, 7].tolist() == [1, 1, 1]
        assert memory[pages, 8].tolist() == pages
        del memory
