"""A file that another process cuts within a page and makes as long again at once."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import wait_until_settled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.any_user
PAGE_BYTES = 4096
PAGES = 64
CUT_BYTES = 1000
WARM_TAKES = 50

CUTTER = """
import os, select, sys, time
path, size, cut_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_WRONLY)
print("begun", flush=True)
while not select.select([0], [], [], 0.002)[0]:
    for _ in range(20):
        os.ftruncate(fd, size - cut_bytes)
        os.pwrite(fd, bytes([1]) * cut_bytes, size - cut_bytes)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ones"
    path.write_bytes(bytes([1]) * (PAGES * PAGE_BYTES))
    wait_until_settled(path)
    return path


@pytest.fixture
def cutter(path: Path) -> Iterator[Any]:
    """Start the other process when called."""
    started = []

    def start() -> None:
        command = [sys.executable, "-c", CUTTER, path, str(PAGES * PAGE_BYTES), str(CUT_BYTES)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()

    yield start
    for process in started:
        process.communicate(b"end")
        assert process.returncode == 0


@pytest.mark.parametrize("seconds", [0.5, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", ["rows", "store", "remap", "element", "in place", "place"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_no_zeros_without_an_error(
    path: Path, cutter: Any, mode: Any, how: str, seconds: float
) -> None:
    last = np.full(PAGES, PAGES - 1)
    with (
        fremap.open(path, mode, page_bytes=PAGE_BYTES) as store,
        fremap.rows(store, np.uint8, PAGE_BYTES, budget=None) as rows,
        fremap.Window(store, PAGES, mapping="none", engine="eager") as window,
    ):

        def remapped() -> np.ndarray:
            window.evict(None)
            window.remap(last)
            return window.pages

        def element() -> np.ndarray:
            window.evict(0)
            window.remap(PAGES - 1)
            return window.pages[:1]

        def in_place() -> np.ndarray:
            window.remap(0, at=0)
            window.remap(PAGES - 1, at=0, in_place=True)
            return window.pages[:1]

        def place() -> np.ndarray:
            window.evict(0, discard=True)
            window.remap(PAGES - 1, populate=False)
            window.place(0)
            return window.pages[:1]

        found: Any = {
            "rows": lambda: rows.take(last),
            "store": lambda: store.read(last),
            "remap": remapped,
            "element": element,
            "in place": in_place,
            "place": place,
        }[how]
        for _ in range(WARM_TAKES):
            assert found().all()
        cutter()
        whole, wrong = 0, []
        end = time.monotonic() + seconds
        while time.monotonic() < end or whole == 0:
            try:
                seen = found()
            except fremap.StoreError:
                continue
            whole += 1
            if not seen.all():
                wrong.append(int((seen == 0).sum()))
        del found, remapped, element, in_place, place
    assert wrong == []


# Touches the last page again and again: in windows of its own, or in one of its parent's. A
# touch that finds the file cut is SIGBUS, and ends the process.
TOUCHER = """
import collections, os, sys, time
import numpy as np
import fremap
path, how, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
store = fremap.open(path, page_bytes=4096)
last = store.page_count - 1

def opened():
    fault = "signal" if how == "signal" else "thread"
    # Each page is read by itself: pages that cannot be read together say nothing.
    shown = np.full(512 if how == "child" else 1, last)
    return fremap.Window(store, len(shown), mapping=shown, fault=fault, engine="paged")

def touch(window):
    while True:
        if how != "child":
            window.evict()
        if not window.pages.all():
            os._exit(1)
        if how == "child":
            os._exit(0)
        if time.monotonic() > end:
            os._exit(0)

parents = opened()
print("warm" if parents.pages.all() else "wrong", flush=True)
parents.evict()
sys.stdin.readline()
end = time.monotonic() + seconds
ends = collections.Counter()
while time.monotonic() < end:
    child = os.fork()
    if child == 0:
        # The lines that say why a touch is a signal.
        os.close(2)
        touch(parents if how == "child" else opened())
    ends[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] += 1
print(dict(ends))
"""


@pytest.mark.needs("paged")
@pytest.mark.parametrize("seconds", [0.5, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", ["thread", "signal", "child"])
def test_no_touch_shows_zeros(path: Path, cutter: Any, how: str, seconds: float) -> None:
    command = [sys.executable, "-c", TOUCHER, path, how, str(seconds)]
    toucher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with toucher:
        assert toucher.stdout is not None
        assert toucher.stdout.readline() == "warm\n"
        cutter()
        out, _ = toucher.communicate("go\n")
    ends = ast.literal_eval(out)
    assert ends.get(1, 0) == 0, ends
    assert set(ends) <= {0, -signal.SIGBUS}
    assert ends
