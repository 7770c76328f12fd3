"""A file that another process cuts within a page and makes as long again at once."""

from __future__ import annotations

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


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", ["rows", "store", "remap", "element", "in place"])
def test_no_zeros_without_an_error(path: Path, cutter: Any, how: str, seconds: float) -> None:
    last = np.full(PAGES, PAGES - 1)
    with (
        fremap.open(path, page_bytes=PAGE_BYTES) as store,
        fremap.rows(path, np.uint8, PAGE_BYTES, budget=None) as rows,
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
            window.populate(0)
            window.remap(PAGES - 1, in_place=True)
            return window.pages[:1]

        found: Any = {
            "rows": lambda: rows.take(last),
            "store": lambda: store.read(last),
            "remap": remapped,
            "element": element,
            "in place": in_place,
        }[how]
        for _ in range(WARM_TAKES):
            assert found().all()
        cutter()
        whole, wrong = 0, []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                seen = found()
            except fremap.StoreError:
                continue
            whole += 1
            if not seen.all():
                wrong.append(int((seen == 0).sum()))
        del found, remapped, element, in_place
    assert wrong == []
    assert whole > 0
