"""A child of fork: what the window shows, to be read; errors in calls; never zeros; and a
parent that goes on."""

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
#: Both ways in which stores are noticed, where the kernel has them.
TRACKINGS = [
    pytest.param("async", marks=pytest.mark.needs("uffd_wp_async", "uffd_move")),
    pytest.param("sync", marks=pytest.mark.needs("uffd_wp")),
]

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
    """New ones show the same; the parent closes its window as if none had been asked for."""
    done = run_script(
        FORK
        + """
    def views():
        array = window.pages
        assert (array[:5].view(np.uint64) == numbered_words(range(5))).all()
        assert not array.flags.writeable
        if engine == "paged":
            assert window.mapping.tolist() == [*range(5), -2, *range(6, 16)]
        del array
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
    """Present or absent: what the parent saw, or the signal; never zeros. What was placed is
    the parent's alone where the child reads the store."""
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
    placed = page == 5
    paged = {-signal.SIGBUS if placed else 0}
    others = {0, -signal.SIGSEGV, -signal.SIGBUS}
    assert int(done.stdout) in (paged if engine == "paged" else others)
    if engine == "paged" and placed:
        assert "window page 5 (placed content)" in done.stderr


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
        same = (array[12:].view(np.uint64) == numbered_words(range(12, 16))).all()
        os._exit(0 if same else 6)

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
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


STARTS = """
    import multiprocessing, sys, threading
    import numpy as np
    import fremap
    from fremap.testing import numbered_words

    def look(window, queue):
        # Read through what was passed: by fork the memory itself, else a window made anew.
        window.pages.sum()
        queue.put((window.mapping.tolist(), window.pages.view(np.uint64)[:, 0].tolist()))

    def main():
        method, fault = sys.argv[2:4]
        context = multiprocessing.get_context(method)
        settings = {"fault": fault, "budget": None}
        with fremap.open(sys.argv[1]) as store, fremap.Window(store, **settings) as window:
            window.remap([9, 3, 3, 1], at=2)
            expected = [0, 1, 9, 3, 3, 1, *range(6, 16)]
            words = numbered_words(expected)[:, 0].tolist()
            queue = context.SimpleQueue()
            processes = [context.Process(target=look, args=(window, queue)) for _ in range(3)]
            for process in processes:
                process.start()
            for process in processes:
                assert queue.get() == (expected, words)
            for process in processes:
                process.join()
                assert process.exitcode == 0, process.exitcode
            assert window.pages.view(np.uint64)[:, 0].tolist() == words

    if __name__ == "__main__":
        main()
"""


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("fault", ["thread", "signal"])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_start_methods_of_multiprocessing(
    engine: str, path: Path, method: str, fault: str, run_script: Run
) -> None:
    assert engine == "paged"
    done = run_script(STARTS, path, method, fault)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("fault", ["thread", "signal"])
def test_a_fork_while_another_thread_remaps(
    engine: str, path: Path, fault: str, run_script: Run
) -> None:
    """A child sees one way round or the other of each page, and the same one ever after."""
    done = run_script(
        """
    import os, sys, threading
    import numpy as np
    import fremap
    from fremap.testing import numbered_words
    engine, path, fault = sys.argv[1:4]
    store = fremap.open(path)
    window = fremap.Window(store, engine=engine, fault=fault, budget=None)
    there, back = list(range(16)), list(range(15, -1, -1))
    words = window.pages.view(np.uint64)
    going = True

    def remaps():
        while going:
            window.remap(back)
            window.remap(there, populate=False)

    thread = threading.Thread(target=remaps)
    thread.start()
    ends = []
    for _ in range(25):
        child = os.fork()
        if child == 0:
            seen = words[:, 0].copy()
            one = (seen == numbered_words(there)[:, 0]) | (seen == numbered_words(back)[:, 0])
            same = (words[:, 0] == seen).all() and seen.tolist() == numbered_words(
                window.mapping
            )[:, 0].tolist()
            os._exit(0 if one.all() and same else 7)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    going = False
    thread.join()
    window.remap(back)
    assert (words == numbered_words(back)).all()
    print(set(ends))
    """,
        engine,
        path,
        fault,
    )
    assert (done.returncode, done.stdout) == (0, "{0}\n"), done.stderr


@pytest.mark.needs("paged")
@pytest.mark.parametrize("tracking", TRACKINGS)
@pytest.mark.parametrize("fault", ["thread", "signal"])
def test_what_was_changed_and_not_flushed_is_the_parents_alone(
    path: Path, tracking: str, fault: str, run_script: Run
) -> None:
    done = run_script(
        """
    import os, signal, sys
    import numpy as np
    import fremap
    from fremap.testing import numbered_words
    path, tracking, fault = sys.argv[1:4]
    store = fremap.open(path, "r+")
    how = {"tracking": tracking, "fault": fault, "engine": "paged", "budget": None}
    window = fremap.Window(store, prot=fremap.Prot.WRITE, coherent=False, **how)
    words = window.pages.view(np.uint64)
    words[3], words[4] = 33, 44
    window.flush(4)

    def child_end(page, expected):
        child = os.fork()
        if child == 0:
            os._exit(0 if (words[page] == expected).all() else 8)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    print(child_end(4, 44), child_end(2, numbered_words([2])), child_end(3, 33))
    child = os.fork()
    if child == 0:
        for call in (window.flush, lambda: window.remap([1]), lambda: window.evict(0)):
            try:
                call()
            except fremap.ForkError:
                continue
            os._exit(9)
        try:
            window.array(np.uint64)[0] = 1
        except ValueError:  # read-only
            os._exit(0)
        os._exit(10)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert store.read(3).view(np.uint64)[0, 0] == numbered_words([3])[0, 0]
    window.flush()
    print(child_end(3, 33))
    assert store.read(3).view(np.uint64)[0, 0] == 33
    """,
        path,
        tracking,
        fault,
    )
    assert (done.returncode, done.stdout) == (0, f"0 0 {-signal.SIGBUS}\n0\n0\n"), done.stderr
    assert "window page 3 (file page 3): it was changed in the process" in done.stderr


@pytest.mark.needs("paged")
@pytest.mark.parametrize("tracking", TRACKINGS)
@pytest.mark.parametrize("parent", ["stores", "ends"])
def test_a_childs_child_sees_what_its_parent_saw(
    path: Path, tracking: str, parent: str, run_script: Run
) -> None:
    """Whatever becomes of the first of them, whose page map the others have inherited."""
    done = run_script(
        """
    import os, sys
    import numpy as np
    import fremap
    from fremap.testing import numbered_words
    path, tracking, parent = sys.argv[1:4]
    store = fremap.open(path, "r+")
    window = fremap.Window(store, prot=fremap.Prot.WRITE, coherent=False, tracking=tracking,
        engine="paged", budget=None)
    words = window.pages.view(np.uint64)
    window.populate()
    wait, go = os.pipe()
    ended, ends = os.pipe()
    if os.fork() == 0:
        os.close(go)
        os.read(wait, 1)
        child = os.fork()
        same = (words == numbered_words(range(16))).all()
        if child == 0:
            os._exit(0 if same else 8)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"{code} {same}\\n".encode())
        os._exit(0)
    os.close(ends)
    if parent == "ends":
        os._exit(0)  # which closes the pipe
    words[7, 1] = 5
    os.close(go)
    os.read(ended, 1)
    os._exit(0)
    """,
        path,
        tracking,
        parent,
    )
    assert (done.returncode, done.stdout) == (0, "0 True\n"), done.stderr


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("fault", ["thread", "signal"])
def test_a_child_that_installs_a_handler_of_its_own(
    engine: str, path: Path, fault: str, run_script: Run
) -> None:
    """A new view notices it, as calls do in the parent."""
    done = run_script(
        """
    import faulthandler, os, sys
    import numpy as np
    import fremap
    from fremap.testing import numbered_words
    engine, path, fault = sys.argv[1:4]
    window = fremap.Window(fremap.open(path), engine=engine, fault=fault, budget=None)
    child = os.fork()
    if child == 0:
        faulthandler.enable()
        same = (window.pages.view(np.uint64) == numbered_words(range(16))).all()
        os._exit(0 if same else 8)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """,
        engine,
        path,
        fault,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_coherent_memory_is_seen_by_several_processes(run_script: Run) -> None:
    done = run_script(
        """
    import multiprocessing, sys
    import numpy as np
    import fremap

    def add(window, lock, count):
        words = window.array(np.int64)
        for _ in range(count):
            with lock:
                words[7] += 1

    def main():
        for method in ("fork", "forkserver", "spawn"):
            context = multiprocessing.get_context(method)
            lock = context.Lock()
            with (
                fremap.MemoryStore(4096, page_bytes=4096) as store,
                fremap.Window(store, prot=fremap.Prot.WRITE, coherent=True) as window,
            ):
                adders = [context.Process(target=add, args=(window, lock, 50)) for _ in range(3)]
                for adder in adders:
                    adder.start()
                for adder in adders:
                    adder.join()
                assert window.array(np.int64)[7] == 150, (method, window.array(np.int64)[7])

    if __name__ == "__main__":
        main()
    """
    )
    assert (done.returncode, done.stderr) == (0, "")


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


@pytest.mark.needs("paged")
def test_a_child_gives_back_what_it_closes_and_keeps_what_it_did_not(
    path: Path, run_script: Run
) -> None:
    """Descriptors go with the windows; closing low ones, or using 0 anew, harms no other."""
    done = run_script(
        """
    import os, sys
    import numpy as np
    import fremap
    from fremap.testing import numbered_words
    store = fremap.open(sys.argv[1])
    windows = [fremap.Window(store) for _ in range(20)]
    views = [window.pages for window in windows[:2]]
    os.close(0)

    def count():
        return len(os.listdir("/proc/self/fd"))

    child = os.fork()
    if child == 0:
        before = count()
        for window in windows[2:]:
            window.close()
        given_back = before - count()
        os.closerange(0, 1)
        os.closerange(3, store.fileno())
        os.closerange(store.fileno() + 1, 200)
        assert os.open("/dev/zero", os.O_RDONLY) == 0
        same = all((view.view(np.uint64) == numbered_words(range(16))).all() for view in views)
        os._exit(0 if same and given_back >= 18 else given_back)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert (views[0].view(np.uint64) == numbered_words(range(16))).all()
    """,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.needs("paged", "uffd_wp")
@pytest.mark.parametrize("way", ["", "direct", "direct, by threads"])
def test_a_signal_handler_that_forks_in_the_middle_of_a_call(
    tmp_path: Path, way: str, run_script: Run
) -> None:
    """The call is the parent's: in the child it raises, and nothing is written twice."""
    done = run_script(
        """
    import errno, os, signal, sys
    import numpy as np
    import fremap
    from fremap.testing import failures
    direct = bool(sys.argv[2])
    no_ring = failures("io_uring_setup", errno=errno.EPERM, times=1 << 30)
    if sys.argv[2].endswith("threads"):
        no_ring.__enter__()
    store = fremap.open(sys.argv[1], "w+", size=64 << 20, direct=direct)
    window = fremap.Window(store, prot=fremap.Prot.WRITE, coherent=False, engine="paged")
    # Of a direct store every second page, so that each is a write of its own.
    words = window.array(np.uint64, (window.page_count, -1))[:: 1 + direct]
    parent, children = os.getpid(), []

    def fork(*_):
        child = os.fork()
        if child:
            children.append(child)

    signal.signal(signal.SIGALRM, fork)
    for turn in range(1, 40):
        words[:, 0] = turn
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        try:
            window.flush()
        except fremap.ForkError:
            os._exit(0 if os.getpid() != parent else 11)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if os.getpid() != parent:
            os._exit(0)  # forked between two calls, the last of which sets the timer
        if len(children) >= 3:
            break
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert (store.read(None).view(np.uint64)[:: 1 + direct, 0] == turn).all()
    print(set(ends))
    """,
        tmp_path / "written",
        way,
    )
    assert (done.returncode, done.stdout) == (0, "{0}\n"), done.stderr


@pytest.mark.needs("paged", "uffd_wp")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_child_of_multiprocessing_flushes_at_its_end(
    tmp_path: Path, method: str, run_script: Run
) -> None:
    """It ends without the interpreter's own handlers, also where the parent has windows."""
    done = run_script(
        """
    import multiprocessing, sys
    import numpy as np
    import fremap

    kept = []

    def write(path, page):
        store = fremap.open(path, "r+")
        window = fremap.Window(store, prot=fremap.Prot.WRITE, coherent=False, engine="paged")
        window.pages[page] = page
        kept.append(window)

    if __name__ == "__main__":
        path, method = sys.argv[1:3]
        np.zeros(4 * 4096, np.uint8).tofile(path)
        write(path, 1)
        context = multiprocessing.get_context(method)
        child = context.Process(target=write, args=(path, 3))
        child.start()
        child.join()
        assert child.exitcode == 0
        kept[0].flush()
        print(np.fromfile(path, np.uint8).reshape(4, -1)[:, 0].tolist())
    """,
        tmp_path / "written",
        method,
    )
    assert (done.returncode, done.stdout) == (0, "[0, 1, 0, 3]\n"), done.stderr
