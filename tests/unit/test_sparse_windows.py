"""Large windows of which little is used: what a flush asks the kernel depends on that alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.testing import counting

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = 1 << 20
BLOCK = 512  # pages that share a table
STORED = [3, 5, 5 * BLOCK, PAGES // 2, PAGES - 1]
BLOCKS = len({page // BLOCK for page in STORED})


@pytest.fixture
def store() -> Iterator[Any]:
    with fremap.MemoryStore(PAGES * 4096, page_bytes=4096) as store:
        yield store


def open_window(store: Any, **options: Any) -> Any:
    return fremap.Window(store, prot=Prot.WRITE, coherent=False, budget=None, **options)


@pytest.mark.needs("uffd_wp_async")
@pytest.mark.parametrize("fault", ["thread", "signal"])
def test_flush_and_dirty_scan_only_what_was_loaded(store: Any, fault: str) -> None:
    with open_window(store, engine="paged", tracking="async", fault=fault) as window:
        for call in (window.flush, window.dirty):
            with counting() as calls:
                call()
            assert calls["pagemap_scan"] == 0
        window.pages[STORED] = 7
        with counting() as calls:
            dirty = window.dirty()
        assert np.flatnonzero(dirty).tolist() == STORED
        assert calls["pagemap_scan"] <= BLOCKS
        with counting() as calls:
            window.flush()
        assert calls["pagemap_scan"] <= BLOCKS
        assert (store.read(STORED) == 7).all()
        assert not window.dirty().any()
        window.evict(STORED)
        with counting() as calls:
            window.flush()
        assert calls["pagemap_scan"] == 0


@pytest.mark.needs("uffd_wp")
def test_what_was_stored_to_is_found_by_faults_too(store: Any) -> None:
    with open_window(store, engine="paged", tracking="sync") as window:
        window.pages[STORED] = 7
        assert np.flatnonzero(window.dirty()).tolist() == STORED
        window.flush()
        assert (store.read(STORED) == 7).all()


def test_a_part_of_a_large_window_is_flushed(store: Any, write_back: dict[str, Any]) -> None:
    with fremap.Window(store, 16 * BLOCK, **write_back) as window:
        window.populate([0, 700, 701, 9 * BLOCK])
        window.pages[[0, 700, 701, 9 * BLOCK]] = 7
        window.flush(range(700, 9 * BLOCK))
        assert np.flatnonzero(window.dirty()).tolist() == [0, 9 * BLOCK]
        window.flush(range(9 * BLOCK, 9 * BLOCK + 1))
        assert np.flatnonzero(window.dirty()).tolist() == [0]
