"""A stderr that takes no line: windows go on all the same."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import fremap
import pytest
from fremap.testing import write_numbered_file

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

STDERR = {
    "full": """
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)""",
    "nobody reads": """
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)""",
}


@pytest.mark.needs("userfaultfd_kernel_faults")
@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("stderr", STDERR)
def test_a_line_that_cannot_be_written_keeps_nobody_from_good_pages(
    engine: str, stderr: str, tmp_path: Path, run_script: Run
) -> None:
    path = tmp_path / "pages"
    write_numbered_file(path, 16)
    done = run_script(
        """
    import os, sys
    import fremap
    from fremap.testing import kernel_reads, numbered_page
    engine, path = sys.argv[1:3]
    store = fremap.open(path)
    window = fremap.Window(store, engine=engine)
    os.truncate(path, 8 * 4096)
    view = memoryview(window)
    """
        + STDERR[stderr]
        + """
    for lost, good in [(12, 5), (13, 6)]:
        assert not kernel_reads(view, lost * 4096)
        assert bytes(view[good * 4096 : (good + 1) * 4096]) == numbered_page(good)
    assert window.stats().pages_unreadable == 2
    print("still there")
    """,
        engine,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "still there\n"), done.stderr


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
def test_placed_content_that_somebody_drops_is_a_signal_and_no_hang(
    engine: str, tmp_path: Path, run_script: Run
) -> None:
    """Nobody can bring it again, so whoever touches it must not wait for it."""
    path = tmp_path / "pages"
    write_numbered_file(path, 16)
    done = run_script(
        """
    import ctypes, mmap, sys
    import fremap
    engine, path = sys.argv[1:3]
    window = fremap.Window(fremap.open(path), engine=engine)
    window.place([3])
    page = window.pages[3]
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.madvise(ctypes.c_void_p(page.ctypes.data), 4096, mmap.MADV_DONTNEED) == 0
    print(page[0])
    """,
        engine,
        path,
    )
    poisons = fremap.capabilities().probes["uffd_poison"].available
    assert done.returncode == -(signal.SIGBUS if poisons else signal.SIGSEGV)
    assert "window page 3 (placed content): its content was dropped" in done.stderr
