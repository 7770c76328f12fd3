"""A fault that needs room never waits for a write to the file: the kernel may have it locked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from fremap.testing import write_numbered_file

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[[str, str], None]
PAGES = 2048

BEGIN = """
    import os, sys, threading
    import numpy as np
    import fremap
    from fremap.testing import numbered_words

    path, tracking = sys.argv[1:3]
    store = fremap.open(path, "r+")
    window = fremap.Window(
        store, engine="paged", prot=fremap.Prot.WRITE, coherent=False, tracking=tracking,
        budget=4 << 20)
    words = window.pages.view(np.uint64)
    expected = numbered_words(np.arange(store.page_count))[:, 0]
    budget_pages = (4 << 20) // 4096
"""

WRITING = [
    pytest.param("sync", marks=pytest.mark.needs("uffd_wp")),
    pytest.param("async", marks=pytest.mark.needs("uffd_wp_async", "uffd_move")),
]
# A system call that touches absent pages, or protected ones, needs the kernel's own faults.
DIRECT = [pytest.param("async", marks=pytest.mark.needs("uffd_wp_async", "uffd_move"))]


@pytest.fixture
def run(tmp_path: Path, run_script: Callable[..., Any]) -> Run:
    """`run(tracking, script)` in a process: one that waits for itself cannot be interrupted."""

    def in_process(tracking: str, script: str) -> None:
        path = tmp_path / "pages"
        write_numbered_file(path, PAGES)
        done = run_script(BEGIN + script, path, tracking, timeout=100)
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr

    return in_process


def opens_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.needs("paged", "userfaultfd_kernel_faults")
@pytest.mark.parametrize("tracking", DIRECT)
@pytest.mark.parametrize("busy", ["", "evict", "remap"])
def test_a_direct_read_of_the_file_into_a_window_full_of_changed_pages(
    tracking: str, busy: str, tmp_path: Path, run: Run
) -> None:
    """The kernel holds the inode's lock while it faults on the pages to read into."""
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(4096))
    assert opens_direct(probe), "this test needs a file system with O_DIRECT for its files"
    run(
        tracking,
        f"""
    busy = {busy!r}
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    stopped = threading.Event()

    def change():
        while not stopped.is_set():
            words[:200, 1] += np.uint64(1)
            if busy == "evict":
                window.evict(range(200))
            elif busy == "remap":
                window.remap(range(200), discard=True)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for number in range(20):
            words[200:1200, 1] = number  # more pages than the budget allows
            first = 1200 + number * 40
            into = window.pages[first : first + 40].reshape(-1).data
            assert os.preadv(direct, [into], 0) == 40 * 4096
    finally:
        stopped.set()
        thread.join()
    window.flush()
    for number in range(20):
        first = 1200 + number * 40
        assert (words[first : first + 40, 0] == expected[:40]).all(), number
    assert (words[200:1200, 1] == 19).all()
    print("done")
    """,
    )


@pytest.mark.needs("paged")
@pytest.mark.parametrize("tracking", WRITING)
def test_changed_pages_leave_for_others_and_come_back_as_they_were(tracking: str, run: Run) -> None:
    run(
        tracking,
        """
    def change(owner):
        rng = np.random.default_rng(owner)
        mine = np.arange(owner, store.page_count, 4)
        for _ in range(2000):
            page = int(rng.choice(mine))
            words[page, 1] += np.uint64(1)
            counts[page] += 1

    counts = np.zeros(store.page_count, np.uint64)
    before = words[:, 1].copy()
    threads = [threading.Thread(target=change, args=[owner]) for owner in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A fault goes beyond the budget where writing falls behind; later ones make up for it.
    page = 0
    while int(window.present().sum()) > budget_pages + 64:
        assert words[page % store.page_count, 0] == expected[page % store.page_count]
        page += 1
    window.flush()
    assert not window.dirty().any()
    window.evict(None)
    assert (words[:, 1] - before == counts).all()
    assert (words[:, 0] == expected).all()
    print("done")
    """,
    )


@pytest.mark.needs("paged")
@pytest.mark.parametrize("tracking", WRITING)
def test_a_child_and_the_end_of_the_interpreter_beside_the_thread_that_writes(
    tracking: str, tmp_path: Path, run: Run
) -> None:
    run(
        tracking,
        """
    for number in range(30):
        words[:1500, 1] = number
        child = os.fork()
        if child == 0:
            os._exit(0 if (words[1500:1600, 0] == expected[1500:1600]).all() else 1)
        assert os.waitpid(child, 0)[1] == 0
    words[:1500, 1] = 77
    print("done")
    """,
    )
    written = (tmp_path / "pages").read_bytes()
    for page in range(1500):
        assert int.from_bytes(written[page * 4096 + 8 : page * 4096 + 16], sys.byteorder) == 77
