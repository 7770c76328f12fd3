"""Touching what must not be touched: the signal, the line on stderr, and nothing else."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from fremap.testing import failures, kernel_reads, numbered_page, write_numbered_file

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

FATAL = {-signal.SIGSEGV, -signal.SIGBUS}

OPEN = """
    import errno, os, sys
    import fremap
    from fremap import Prot, _core
    engine, path = sys.argv[1:3]
    store = fremap.open(path, "r+")

    def touch(window, page):
        with memoryview(window) as view:
            print("touching", flush=True)
            word = bytes(view[page * 4096 : page * 4096 + 8])
        print("touched", word.hex(), flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pages"
    write_numbered_file(path, 16)
    return path


def died_of_touching(done: subprocess.CompletedProcess[str], signals: set[int] = FATAL) -> None:
    assert done.stdout == "touching\n", done.stderr
    assert done.returncode in signals, done.stderr


@pytest.mark.parametrize(
    "what",
    [
        'window = fremap.Window(store, mapping="none", page_count=4, engine=engine)',
        "window = fremap.Window(store, mapping=[0, 1, -1, 3], engine=engine, populate=True)",
        """
    window = fremap.Window(store, engine=engine, populate=True)
    window.protect([1, 2], Prot.NONE)""",
        """
    window = fremap.Window(store, engine=engine, populate=True)
    window.remap([7, 8, 9], prot=Prot.NONE)""",
        """
    window = fremap.Window(store, engine=engine, populate=True)
    window.protect(2, Prot.NONE)
    window.remap([7, 8, 9])
    window.populate()""",
        """
    window = fremap.Window(store, engine=engine)
    window.place(2, b"x" * 4096)
    window.evict(None, discard=True)""",
        """
    window = fremap.Window(store, engine=engine)
    window.place(2, b"x" * 4096)
    window.protect(None, Prot.NONE)""",
    ],
)
def test_a_forbidden_page(engine: str, path: Path, what: str, run_script: Run) -> None:
    done = run_script(OPEN + "    " + what + "\n    touch(window, 2)", engine, path)
    died_of_touching(done)


@pytest.mark.parametrize("engine", ["eager"], indirect=True)
def test_eager_has_no_lazy_faults(engine: str, path: Path, run_script: Run) -> None:
    lazily = "    window = fremap.Window(store, engine=engine)\n    touch(window, 2)"
    died_of_touching(run_script(OPEN + lazily, engine, path), {-signal.SIGSEGV})


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("number", ["EIO", "ENOMEM"])
def test_a_page_that_cannot_be_read(engine: str, path: Path, number: str, run_script: Run) -> None:
    """One line says which window page, which file page and why; then it is the signal."""
    done = run_script(
        OPEN
        + f"""
    window = fremap.Window(store, engine=engine)
    window.remap([11], at=3, populate=False)
    _core.inject_failure("read", 0, errno.{number}, 2**31)
    touch(window, 3)
    """,
        engine,
        path,
    )
    died_of_touching(done)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert re.search(r"window page 3\b.*file page 11\b", lines[0])
    assert {"EIO": "Input/output error", "ENOMEM": "Cannot allocate memory"}[number] in lines[0]


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
def test_a_file_cut_short_under_a_lazy_window(engine: str, path: Path, run_script: Run) -> None:
    done = run_script(
        OPEN
        + """
    window = fremap.Window(store, engine=engine)
    os.truncate(path, 5 * 4096 + 100)
    touch(window, 4)
    touch(window, 9)
    """,
        engine,
        path,
    )
    first, second, third = done.stdout.splitlines()
    assert (first, third) == ("touching", "touching"), done.stderr
    assert second == "touched " + numbered_page(4)[:8].hex()
    assert done.returncode in FATAL
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert re.search(r"window page 9\b.*file page 9\b", lines[0])


@pytest.mark.needs("userfaultfd_kernel_faults")
@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("heal", ["populate", "evict", "remap"])
def test_an_unreadable_page_is_healed(
    engine: str, heal: str, make_scene: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """A page that could not be read stays so until it is populated, evicted or remapped."""
    with make_scene(engine, "file") as scene:
        window, model = scene.window, scene.model
        offset = 6 * 4096
        with memoryview(window) as view:
            with failures("read", errno=5, times=2**31):
                assert not kernel_reads(view, offset)
            assert "window page 6" in capfd.readouterr().err
            assert not kernel_reads(view, offset), "it stays unreadable"
            assert not window.present()[6]
            if heal == "populate":
                assert window.populate(6).all()
            elif heal == "evict":
                window.evict(6)
            else:
                assert window.remap([model.mapping[6]], at=6).all()
            assert kernel_reads(view, offset)
        assert capfd.readouterr().err == ""
        scene.check()


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
def test_a_page_without_access_stays_so_after_a_remap_that_fails(
    engine: str, path: Path, run_script: Run
) -> None:
    """A touch is the signal: not for ever waiting for a page that nobody may have."""
    done = run_script(
        OPEN
        + """
    from fremap.testing import failures
    window = fremap.Window(store, engine=engine, populate=True)
    window.protect(3, Prot.NONE)
    with failures("uffdio_move", errno=errno.ENOMEM, times=100):
        with failures("uffdio_copy", errno=errno.ENOMEM, times=100):
            try:
                window.remap([9], at=3, prot=Prot.READ)
            except OSError:
                pass
            else:
                sys.exit("the kernel refused it")
    assert window.mapping[3] == 3 and window.protection()[3] == Prot.NONE
    touch(window, 3)
    """,
        engine,
        path,
    )
    died_of_touching(done)


@pytest.mark.needs("userfaultfd_kernel_faults")
@pytest.mark.parametrize("engine", ["paged"], indirect=True)
def test_an_unreadable_page_stays_so_after_a_populate_that_fails(
    engine: str, path: Path, run_script: Run
) -> None:
    done = run_script(
        OPEN
        + """
    from fremap.testing import failures, kernel_reads
    window = fremap.Window(store, engine=engine)
    with memoryview(window) as view, failures("read", errno=errno.EIO, times=2**31):
        assert not kernel_reads(view, 3 * 4096)
    with failures("uffdio_move", errno=errno.ENOMEM, times=100):
        with failures("uffdio_copy", errno=errno.ENOMEM, times=100):
            try:
                window.populate(3)
            except OSError:
                pass
            else:
                sys.exit("the kernel refused it")
    touch(window, 3)
    """,
        engine,
        path,
    )
    if done.returncode:
        died_of_touching(done)
    else:
        # Absent again, and read anew, is right too.
        assert done.stdout == f"touching\ntouched {numbered_page(3)[:8].hex()}\n"


def test_signals_of_others_go_where_they_went(engine: str, path: Path, run_script: Run) -> None:
    """A SIGSEGV that has nothing to do with a window kills as it always did."""
    done = run_script(
        OPEN
        + """
    window = fremap.Window(store, engine=engine, populate=True)
    store.read(None)
    import ctypes
    print("touching", flush=True)
    ctypes.string_at(8, 8)
    """,
        engine,
        path,
    )
    died_of_touching(done, {-signal.SIGSEGV})


@pytest.mark.parametrize("child", [False, True], ids=["process", "child"])
@pytest.mark.parametrize("opened", ["window", "memmap"])
def test_a_touch_of_the_file_itself_that_was_cut(
    opened: str, child: bool, path: Path, run_script: Run
) -> None:
    """The kernel says where, and a line says why; a window that is gone says nothing."""
    done = run_script(
        OPEN
        + f"""
    def shown():
        if {opened == "window"}:
            window = fremap.Window(store, mapping=[3, 11], engine=engine)
            return memoryview(window), 4096, window
        return fremap.memmap(path, mode="r"), 11 * 4096, None

    closed = shown()
    del closed
    others = [shown() for _ in range(3)]
    memory, at, window = shown()
    del others
    os.truncate(path, 6 * 4096)
    print("touching", flush=True)
    if {child}:
        pid = os.fork()
        if pid:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.kill(os.getpid(), -code)
    memory[at + 7]
    """,
        "alias",
        path,
    )
    died_of_touching(done, {-signal.SIGBUS})
    page = 1 if opened == "window" else 11
    assert done.stderr == (
        f"fremap: window page {page} (file page 11): the file ends before it, at byte 24576; "
        "the touch raises SIGBUS\n"
    )


def test_a_sigbus_of_an_mmap_of_the_caller(path: Path, run_script: Run) -> None:
    """Reading stores sets up a way to survive SIGBUS; it is not for other mappings."""
    done = run_script(
        OPEN
        + """
    import mmap
    store.read(None)
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    os.truncate(path, 4096)
    window = fremap.Window(store, engine=engine)
    print("touching", flush=True)
    memory[8192]
    """,
        "alias",
        path,
    )
    died_of_touching(done, {-signal.SIGBUS})
    assert done.stderr == ""


@pytest.mark.needs("uffd_wp")
@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("how", ["protect", "remap"])
def test_a_store_to_a_page_that_is_only_to_be_read(
    engine: str, how: str, present: bool, path: Path, run_script: Run
) -> None:
    """SIGSEGV, and the file has what it had."""
    done = run_script(ONLY_TO_BE_READ + "\n    view[4096] = 1", engine, path, how, present)
    died_of_touching(done, {-signal.SIGSEGV})
    assert path.read_bytes()[4096:8192] == numbered_page(1)


@pytest.mark.needs("uffd_wp")
@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("present", [True, False])
def test_a_system_call_stores_to_a_page_that_is_only_to_be_read(
    engine: str, present: bool, path: Path, run_script: Run
) -> None:
    """EFAULT, or the signal that a thread would get; not a call that never ends."""
    source = """
    zeros = os.open("/dev/zero", os.O_RDONLY)
    try:
        os.readv(zeros, [view[4096:8192]])
    except OSError as error:
        assert error.errno == errno.EFAULT
        os.kill(os.getpid(), signal.SIGSEGV)"""
    done = run_script(ONLY_TO_BE_READ + source, engine, path, "protect", present)
    died_of_touching(done, {-signal.SIGSEGV})
    assert path.read_bytes()[4096:8192] == numbered_page(1)


ONLY_TO_BE_READ = (
    OPEN
    + """
    import signal
    signal.alarm(5)
    how, present = sys.argv[3:5]
    window = fremap.Window(
        store, prot=Prot.WRITE, coherent=False, engine=engine, tracking="sync", populate=True
    )
    if how == "protect":
        window.protect([1, 2], Prot.READ)
    else:
        window.remap([1, 2], at=1, prot=Prot.READ)
    view = memoryview(window)
    view[0] = 1
    assert bytes(view[4096:4104]) == bytes.fromhex("0000020000000000")
    if present == "False":
        window.evict(1)
    print("touching", flush=True)"""
)
