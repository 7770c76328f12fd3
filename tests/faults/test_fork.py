"""A child of fork: errors in calls, never zeros on touch, and a parent that goes on."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from fremap.testing import write_numbered_file

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

FORK = """
    import os, sys
    import numpy as np
    import fremap
    from fremap.errors import ForkError
    from fremap.testing import numbered_words
    engine, path = sys.argv[1:3]
    store = fremap.open(path)
    window = fremap.Window(store, engine=engine)
    window.remap(range(8))
    window.place(5, b"x" * 4096)

    def in_child(body):
        child = os.fork()
        if child == 0:
            body()
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def parent_goes_on():
        window.remap(range(15, -1, -1), at=0, discard=True)
        assert (window.pages.view(np.uint64) == numbered_words(range(15, -1, -1))).all()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pages"
    write_numbered_file(path, 16)
    return path


def test_calls_in_a_child(engine: str, path: Path, run_script: Run) -> None:
    done = run_script(
        FORK
        + """
    def calls():
        page = b"y" * 4096
        for call in (
            lambda: window.remap([1]), window.populate, lambda: window.evict(0),
            lambda: window.protect(0, fremap.Prot.NONE), lambda: window.place(0, page),
            window.flush, window.present,
        ):
            try:
                call()
            except ForkError as error:
                assert str(os.getppid()) in str(error), error
            else:
                os._exit(3)
        window.close()
        store.close()

    print(os.waitstatus_to_exitcode(in_child(calls)))
    parent_goes_on()
    """,
        engine,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_views_in_a_child(engine: str, path: Path, run_script: Run) -> None:
    """New ones are refused; the parent closes its window as if none had been asked for."""
    done = run_script(
        FORK
        + """
    def views():
        for view in (lambda: memoryview(window), lambda: window.pages, lambda: bytes(window)):
            try:
                view()
            except ForkError as error:
                assert str(os.getppid()) in str(error), error
            else:
                os._exit(3)
        window.close()  # no view of these is left to keep it open

    print(os.waitstatus_to_exitcode(in_child(views)))
    parent_goes_on()
    window.close()
    """,
        engine,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("page", [0, 5, 12])
def test_touches_in_a_child(engine: str, path: Path, page: int, run_script: Run) -> None:
    """Present, placed or absent: what the parent saw, or the signal; never zeros."""
    done = run_script(
        FORK
        + f"""
    page = {page}
    expected = b"x" * 8 if page == 5 else numbered_words([page]).tobytes()[:8]
    view = memoryview(window)

    def touch():
        if bytes(view[page * 4096 : page * 4096 + 8]) != expected:
            os._exit(4)

    print(os.waitstatus_to_exitcode(in_child(touch)))
    parent_goes_on()
    """,
        engine,
        path,
    )
    assert done.returncode == 0, done.stderr
    paged = {-signal.SIGSEGV}
    others = {0, -signal.SIGSEGV, -signal.SIGBUS}
    assert int(done.stdout) in (paged if engine == "paged" else others)


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("method", ["os.fork", "multiprocessing"])
def test_a_child_never_sees_its_own_memory_through_the_parents_arrays(
    engine: str, path: Path, method: str, run_script: Run
) -> None:
    done = run_script(
        FORK
        + f"""
    import mmap, multiprocessing
    array = window.pages

    def allocate_and_touch():
        kept = [mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE) for _ in range(4000)]
        for memory in kept:
            memory[:] = b"U" * 8192
        os._exit(int(array[12, 0]))

    if "{method}" == "os.fork":
        print(os.waitstatus_to_exitcode(in_child(allocate_and_touch)))
    else:
        process = multiprocessing.get_context("fork").Process(target=allocate_and_touch)
        process.start()
        process.join()
        print(process.exitcode)
    parent_goes_on()
    """,
        engine,
        path,
    )
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGSEGV}\n"), done.stderr


def test_a_child_that_ends_with_a_window(engine: str, path: Path, run_script: Run) -> None:
    """A child that runs to its end with the parent's window open does not hang or crash."""
    done = run_script(
        FORK
        + """
    child = os.fork()
    if child == 0:
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    parent_goes_on()
    """,
        engine,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_child_makes_windows_of_its_own(engine: str, path: Path, run_script: Run) -> None:
    done = run_script(
        FORK
        + """
    def own():
        with fremap.open(path) as mine, fremap.Window(mine, engine=engine) as own_window:
            own_window.remap(range(15, -1, -1))
            good = (own_window.pages.view(np.uint64) == numbered_words(range(15, -1, -1))).all()
            os._exit(0 if good else 5)

    print(os.waitstatus_to_exitcode(in_child(own)))
    parent_goes_on()
    """,
        engine,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_the_end_of_the_interpreter(engine: str, path: Path, run_script: Run) -> None:
    """Views alive, faults under way in a thread: no crash, no hang."""
    done = run_script(
        FORK
        + """
    import threading
    view = memoryview(window)
    pages = window.pages

    def touch_for_ever():
        while True:
            if engine != "eager":
                window.evict(range(8, 16))
            pages[: 8 if engine == "eager" else 16, 0].sum()

    threading.Thread(target=touch_for_ever, daemon=True).start()
    for _ in range(100):
        window.remap(range(7, -1, -1), discard=True)
    """,
        engine,
        path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
