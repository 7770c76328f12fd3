"""Reads past the page cache into a window that another thread flushes: nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import counting

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.any_user
PAGES = 1024
ROUNDS = [4, pytest.param(100, marks=pytest.mark.long)]


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """A file of random pages, twice as many, and one of zeros."""
    source, target = tmp_path / "source", tmp_path / "target"
    np.random.default_rng(1).integers(0, 256, 2 * PAGES * 4096, np.uint8).tofile(source)
    target.write_bytes(bytes(PAGES * 4096))
    return source, target


@pytest.mark.parametrize("rounds", ROUNDS)
def test_what_is_read_into_a_window_is_flushed(
    paths: tuple[Path, Path],
    write_back: dict[str, Any],
    threads: Callable[[], Any],
    rounds: int,
) -> None:
    source, target = paths
    content = np.fromfile(source, np.uint8).reshape(2, PAGES, 4096)
    with (
        fremap.open(source, direct=True) as direct,
        fremap.open(target, "r+") as store,
        fremap.Window(store, populate=True, **write_back) as window,
    ):
        for number in range(rounds):
            half = number % 2
            with threads() as running:
                running.start(lambda _: window.flush())
                running.wait_for_rounds(1)
                direct.read(range(half * PAGES, (half + 1) * PAGES), out=window.pages)
            window.flush()
            assert not window.dirty().any()
            assert (window.pages == content[half]).all()
            assert (np.fromfile(target, np.uint8).reshape(PAGES, 4096) == content[half]).all()
        window.evict(None)
        window.populate()
        assert (window.pages == content[half]).all()


def test_a_window_is_read_into_by_way_of_other_memory(
    paths: tuple[Path, Path], write_back: dict[str, Any]
) -> None:
    """A device stores to no window that keeps its changes, but to other memory that is aligned."""
    source, target = paths
    with (
        fremap.open(source, direct=True) as direct,
        fremap.open(target, "r+") as store,
        fremap.Window(store, populate=True, **write_back) as window,
    ):
        aligned = np.frombuffer(memoryview(bytearray(3 * 4096)), np.uint8)
        start = -aligned.ctypes.data % 4096
        direct.read([3, 9])  # what is set up once
        buffers = {"window": window.pages[5:7], "other": aligned[start : start + 2 * 4096]}
        made = {}
        for name, buffer in buffers.items():
            with counting() as calls:
                direct.read([3, 9], out=buffer)
            made[name] = calls["mmap"]
        kept = write_back["engine"] == "paged"
        assert made["window"] - made["other"] == (1 if kept else 0)
        assert np.flatnonzero(window.dirty()).tolist() == [5, 6]
        buffers.clear()
        del buffer
