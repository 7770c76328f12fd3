"""A child of fork can do what it likes on stores, rows and windows, whatever another thread
of its parent was doing when it was forked."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from fremap.testing import write_numbered_file

if TYPE_CHECKING:
    from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.any_user
PAGES = 512

SCRIPT = """
    import os, signal, sys, threading
    import numpy as np
    import fremap
    from fremap.testing import numbered_words
    path, what, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    pages = 512
    store = fremap.open(path)
    large = fremap.open(path + ".large")
    rows = fremap.rows(path, dtype=np.uint64, row_shape=(512,))
    words = numbered_words(range(pages))
    back = list(range(pages - 1, -1, -1))

    def alias():
        with fremap.Window(store, engine="alias") as window:
            # So many mappings that those of the process are counted, under a lock.
            window.remap(back)
            window.remap(range(pages))
            assert (window.pages[:64].view(np.uint64) == words[:64]).all()

    def trimmed():
        # Larger than its budget: the trimmer starts, and ends with the last such array.
        with fremap.Window(large, 16384, engine="alias", budget=1 << 20) as window:
            assert not window.pages[::4096, 0].any()

    def read():
        assert (store.read(back[:32]).view(np.uint64) == words[::-1][:32]).all()

    def refresh():
        # Of a file so large that letting its map go takes long.
        large.refresh()
        large.resident(5)

    def resident():
        assert store.resident(None).all()

    def prefetch():
        store.prefetch(range(0, pages, 2))

    def take():
        assert (rows.take(back[:64]) == words[::-1][:64]).all()

    def batches():
        got = [batch for batch in rows.batches(128, "sequential", prefetch=2)]
        assert (np.concatenate(got) == words).all()

    def slots():
        with fremap.Slots(store, 8, 4) as held:
            held.ensure([3, 1, 2])
            held.ensure([7, 8, 9, 10])

    def paged():
        with fremap.Window(store) as window:
            window.populate(range(64))
            assert (window.pages[:8].view(np.uint64) == words[:8]).all()

    def opened():
        with fremap.open(path) as other:
            other.read(5)
        with fremap.rows(path, dtype=np.uint64, row_shape=(512,)) as other:
            other.take([1, 2])

    def stats():
        rows.stats()

    operations = {
        each.__name__: each
        for each in (
            read, resident, prefetch, refresh, take, alias, trimmed, batches, slots, paged, opened,
            stats,
        )
    }
    store.read(None)  # into the page cache
    for each in operations.values():
        each()
    going, failed = True, []

    def loops():
        try:
            while going:
                operations[what]()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=loops) for _ in range(2)]
    for thread in threads:
        thread.start()
    ends = set()
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a child that hangs dies of it
            for each in operations.values():
                each()
            os._exit(0)
        ends.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    going = False
    for thread in threads:
        thread.join()
    assert not failed, failed
    print(ends)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pages"
    write_numbered_file(path, PAGES)
    with path.with_name("pages.large").open("wb") as large:
        large.truncate(1 << 40)
    return path


@pytest.mark.parametrize("rounds", [8, pytest.param(400, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "what",
    [
        "read",
        "resident",
        "prefetch",
        "refresh",
        "take",
        "alias",
        "trimmed",
        "batches",
        "slots",
        "paged",
        "opened",
        "stats",
    ],
)
def test_a_child_does_everything_whatever_a_thread_was_doing(
    path: Path, what: str, rounds: int, run_script: Run
) -> None:
    done = run_script(SCRIPT, path, what, rounds)
    assert (done.returncode, done.stdout) == (0, "{0}\n"), done.stderr


@pytest.mark.needs("paged")
@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("lacking", ["", "probe_uffdio_poison"])
def test_forks_and_denials_do_not_wait_for_one_another(
    path: Path, lacking: str, rounds: int, run_script: Run
) -> None:
    """A fork waits for a window's table, which is locked while mappings are reserved."""
    done = run_script(
        """
    import contextlib, errno, os, sys, threading
    import fremap
    from fremap.testing import failures
    path, lacking, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    refused = contextlib.nullcontext()
    if lacking:
        refused = failures(lacking, errno=errno.EINVAL, times=1 << 30)
    with refused:
        store = fremap.open(path)
        windows = [fremap.Window(store, engine="paged") for _ in range(3)]
    going, denials = True, []

    def denies(window):
        while going:
            window.protect(0, fremap.Prot.NONE)
            window.protect(0, fremap.Prot.READ)
            denials.append(window)

    threads = [threading.Thread(target=denies, args=[window]) for window in windows]
    for thread in threads:
        thread.start()
    ends = set()
    for _ in range(rounds):
        child = os.fork()
        if child == 0:
            os._exit(0)
        ends.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    going = False
    for thread in threads:
        thread.join()
    print(ends, set(denials) == set(windows))
    """,
        path,
        lacking,
        rounds,
    )
    assert (done.returncode, done.stdout) == (0, "{0} True\n"), done.stderr
