"""Faults that are resolved in the thread that has them: `fault="signal"`."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.errors import UnsupportedError
from fremap.testing import numbered_words, write_numbered_file

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]
#: Both ways in which stores are noticed, where the kernel has them.
TRACKINGS = [
    pytest.param("async", marks=pytest.mark.needs("uffd_wp_async", "uffd_move")),
    pytest.param("sync", marks=pytest.mark.needs("uffd_wp")),
]

pytestmark = pytest.mark.needs("paged")

PAGES = 512
HOW: dict[str, Any] = {"engine": "paged", "fault": "signal", "budget": None}
BEGIN = """
    import faulthandler, os, signal, sys
    import numpy as np
    import fremap
    from fremap.testing import numbered_words
    store = fremap.open(sys.argv[1], "r+")
    how = {"engine": "paged", "fault": "signal", "budget": None}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pages"
    write_numbered_file(path, PAGES)
    return path


def words(window: fremap.Window) -> np.ndarray[Any, Any]:
    return window.pages.view(np.uint64)[:, 0]


def expected(pages: Any) -> np.ndarray[Any, Any]:
    return numbered_words(pages)[:, 0]


def test_a_touch_brings_its_page_and_those_behind_it_when_touches_run_forwards(path: Path) -> None:
    with fremap.open(path) as store, fremap.Window(store, **HOW) as window:
        assert window.fault == "signal"
        assert words(window)[300] == expected([300])[0]
        assert np.flatnonzero(window.present()).tolist() == [300]
        np.testing.assert_array_equal(words(window), expected(range(PAGES)))
        # 1 at page 300, then 1, 2, 4 .. 64 pages at a time, and 64 on.
        assert window.stats().faults < 30
        window.evict(range(0, PAGES, 2))
        np.testing.assert_array_equal(words(window), expected(range(PAGES)))


def test_what_calls_change_is_what_touches_bring(path: Path) -> None:
    order = np.random.default_rng(3).permutation(PAGES)
    with fremap.open(path) as store, fremap.Window(store, **HOW) as window:
        window.remap(order, populate=False)
        np.testing.assert_array_equal(words(window)[::7], expected(order)[::7])
        window.remap(order[::-1])
        np.testing.assert_array_equal(words(window), expected(order[::-1]))
        window.place(5, b"x" * 4096)
        assert bytes(window.pages[5, :2]) == b"xx"


def test_many_threads_touch_one_page_and_it_is_read_once(path: Path) -> None:
    with fremap.open(path) as store, fremap.Window(store, **HOW) as window:
        array, start, seen = words(window), threading.Barrier(8), []

        def touch() -> None:
            for page in range(PAGES - 1, -1, -1):
                if page % 64 == 0:
                    start.wait()
                seen.append((page, int(array[page])))

        threads = [threading.Thread(target=touch) for _ in range(8)]
        before = store._core.counters()["reads"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 8 * PAGES
        assert {word for page, word in seen} == set(expected(range(PAGES)).tolist())
        assert all(word == expected([page])[0] for page, word in seen[::37])
        reads = store._core.counters()["reads"] - before
        assert reads == window.stats().faults == PAGES


def test_readers_while_pages_are_remapped(path: Path) -> None:
    """The old page or the new one, never another, though each step takes pages away."""
    there, back = np.arange(PAGES), np.arange(PAGES)[::-1]
    with fremap.open(path) as store, fremap.Window(store, **HOW) as window:
        array, wrong, going = words(window), [], True

        def read() -> None:
            choice = np.random.default_rng(threading.get_ident())
            while going:
                page = int(choice.integers(PAGES))
                if array[page] not in expected([page, PAGES - 1 - page]):
                    wrong.append(page)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for turn in range(150):
            window.remap(back if turn % 2 else there, populate=bool(turn % 3))
            window.evict(range(turn % 7, PAGES, 7))
        going = False
        for reader in readers:
            reader.join()
        assert wrong == []


@pytest.mark.parametrize("tracking", TRACKINGS)
def test_stores_are_noticed_and_written(path: Path, tracking: str) -> None:
    how = {**HOW, "prot": Prot.WRITE, "coherent": False, "tracking": tracking}
    with fremap.open(path, "r+") as store, fremap.Window(store, **how) as window:
        array = window.pages.view(np.uint64)
        window.populate(range(8))
        array[3, 0], array[200, 1] = 33, 44  # present; absent
        assert np.flatnonzero(window.dirty()).tolist() == [3, 200]
        window.flush()
        assert not window.dirty().any()
        array[3, 0] += 1
        window.evict(3)
        assert store.read(3).view(np.uint64)[0, 0] == 34
        assert store.read(200).view(np.uint64)[0, 1] == 44
        assert array[3, 0] == 34


@pytest.mark.needs("uffd_wp")
@pytest.mark.parametrize("deaf", ["", "ignore", "block"])
def test_a_store_to_a_page_that_is_to_be_read_is_sigsegv(
    path: Path, deaf: str, run_script: Run
) -> None:
    """It ends the process, as the kernel's own would, whatever is done about SIGSEGV."""
    done = run_script(
        BEGIN
        + f"    deaf = {deaf!r}"
        + """
    if deaf == "ignore":
        signal.signal(signal.SIGSEGV, signal.SIG_IGN)
    elif deaf == "block":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGSEGV})
    window = fremap.Window(
        store, prot=fremap.Prot.WRITE, coherent=False, tracking="sync", **how)
    window.protect(2, fremap.Prot.READ)
    array = window.pages
    print(array[2, 0] == numbered_words([2]).view(np.uint8)[0, 0], flush=True)
    array[3, 0] = 1
    array[2, 0] = 1
    """,
        path,
    )
    end = -signal.SIGBUS if deaf == "block" else -signal.SIGSEGV
    assert (done.returncode, done.stdout) == (end, "True\n"), done.stderr


def test_what_cannot_be_read_is_sigbus_with_a_line(path: Path, run_script: Run) -> None:
    done = run_script(
        BEGIN
        + """
    window = fremap.Window(store, **how)
    array = window.pages
    os.truncate(sys.argv[1], 100 * 4096)
    assert array[99, 0] == numbered_words([99]).view(np.uint8)[0, 0]
    faulthandler.enable()
    window.populate(0)  # a call notices that another handler is in front
    array[100, 0]
    """,
        path,
    )
    assert done.returncode == -signal.SIGBUS
    line = "fremap: window page 100 (file page 100): the file has been truncated; the touch raises"
    assert done.stderr.startswith(line), done.stderr
    assert "Bus error" in done.stderr
    assert "Current thread" in done.stderr


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_handler_of_somebodys_gets_what_is_not_ours(
    path: Path, how: str, run_script: Run
) -> None:
    """Installed before the window's or after it: both work, also for the next fault."""
    done = run_script(
        BEGIN
        + f"""
    import ctypes, mmap
    libc = ctypes.CDLL(None)
    KIND = ctypes.CFUNCTYPE(None, ctypes.c_int)

    @KIND
    def foreign(number):
        os.write(1, b"foreign\\n")
        os._exit(5)

    libc.signal.argtypes = [ctypes.c_int, KIND]
    if "{how}" == "before":
        libc.signal(signal.SIGBUS, foreign)
    window = fremap.Window(store, **how)
    array = window.pages
    if "{how}" == "after":
        libc.signal(signal.SIGBUS, foreign)
        window.populate(0)  # a call notices it
    assert array[300, 0] == numbered_words([300]).view(np.uint8)[0, 0]
    with open(sys.argv[1] + ".other", "w+b") as file:
        file.truncate(4096)
        other = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
        other[0]
    """,
        path,
    )
    assert (done.returncode, done.stdout) == (5, "foreign\n"), done.stderr


def test_a_thread_that_blocks_sigbus_is_told_so(path: Path) -> None:
    with fremap.open(path) as store, fremap.Window(store, **HOW) as window:
        raised: list[UnsupportedError] = []

        def call() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGBUS})
            with pytest.raises(UnsupportedError) as error:
                window.populate(0)
            raised.append(error.value)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert "SIGBUS is blocked in this thread" in str(raised[0])
        assert words(window)[0] == expected([0])[0]


def test_system_calls_get_efault_from_absent_pages(path: Path, tmp_path: Path) -> None:
    with (
        fremap.open(path) as store,
        fremap.Window(store, **HOW) as window,
        (tmp_path / "out").open("wb") as file,
        memoryview(window) as view,
    ):
        with pytest.raises(OSError, match="Bad address"):
            os.write(file.fileno(), view[4096:8192])
        window.populate(1)
        assert os.write(file.fileno(), view[4096:8192]) == 4096


def test_what_it_does_not_do_is_an_error(path: Path) -> None:
    with fremap.open(path) as store:
        with pytest.raises(fremap.ArgumentError, match="budget"):
            fremap.Window(store, **{**HOW, "budget": 1 << 20})
        with pytest.raises(ValueError, match="fault"):
            fremap.Window(store, fault="signals")


def test_ctrl_c_comes_through_while_pages_are_touched(path: Path, run_script: Run) -> None:
    done = run_script(
        BEGIN
        + """
    import threading
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever ignored it before
    window = fremap.Window(store, **how)
    array = window.pages
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        while True:
            array[:, 0].sum()
            window.evict(None)
    except KeyboardInterrupt:
        print("interrupted")
    assert (array.view(np.uint64) == numbered_words(range(512))).all()
    """,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_pages_in_which_a_growing_file_ended_are_forgotten(path: Path) -> None:
    """Each is noted while it is shown, without memory that could be allocated in a fault."""
    ends = 100
    with fremap.open(path, "r+") as store:
        window = fremap.Window(store, PAGES, prot=fremap.Prot.WRITE, coherent=False, **HOW)
        size = 8 * 4096 + 100
        os.truncate(path, size)
        store.refresh()
        for end in range(8, 8 + ends):
            assert bytes(window.pages[end][100:200]) == bytes(100)
            window.evict(end)
            os.truncate(path, (end + 1) * 4096 + 100)
            store.refresh()
        window.close()


@pytest.mark.needs("userfaultfd_kernel_faults")
def test_a_handler_that_is_enabled_again_and_again_is_one_handler(
    path: Path, run_script: Run
) -> None:
    done = run_script(
        BEGIN
        + """
    window = fremap.Window(store, **how)
    for _ in range(400):
        faulthandler.disable()
        faulthandler.enable()
        window.evict(7)
        assert window.pages[7, 0] == numbered_words([7]).view(np.uint8)[0, 0]
    print("resolved")
    """,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "resolved\n"), done.stderr
