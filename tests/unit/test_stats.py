"""What a window counts adds up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot

if TYPE_CHECKING:
    from pathlib import Path

PAGES = 64
PAGE = 4096

KINDS = [
    pytest.param("paged", "sync", marks=pytest.mark.needs("paged", "uffd_wp")),
    pytest.param("paged", "async", marks=pytest.mark.needs("paged", "uffd_wp_async", "uffd_move")),
    ("eager", "auto"),
]


def check(window: fremap.Window) -> Any:
    """What is always so."""
    stats = window.stats()
    assert stats.present_pages == stats.pages_in - stats.pages_out
    assert stats.present_pages == np.count_nonzero(window.present())
    assert stats.bytes_read % PAGE == stats.bytes_written % PAGE == 0
    return stats


@pytest.mark.parametrize(("engine", "tracking"), KINDS)
def test_they_add_up(engine: Any, tracking: Any, tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(bytes(2 * PAGES * PAGE))
    with (
        fremap.open(path, "r+") as store,
        fremap.Window(
            store, PAGES, prot=Prot.WRITE, coherent=False, engine=engine, tracking=tracking
        ) as window,
    ):
        start = check(window)
        window.populate()
        stats = check(window)
        assert stats.present_pages == PAGES
        # What the window brought by itself was counted too.
        assert stats.bytes_read == stats.pages_in * PAGE == stats.pages_loaded * PAGE
        assert stats.pages_hit == start.present_pages
        window.populate(range(10))
        assert check(window).pages_hit == stats.pages_hit + 10
        assert check(window).bytes_read == stats.bytes_read

        words = window.array(np.uint64, (PAGES, -1))
        words[[3, 5, 40]] = 7
        assert check(window).bytes_written == 0
        window.flush()
        assert check(window).bytes_written == 3 * PAGE
        window.flush()
        assert check(window).bytes_written == 3 * PAGE
        words[[5, 6]] = 8
        before = check(window)
        window.evict(range(8))
        after = check(window)
        assert after.bytes_written == 5 * PAGE
        assert after.pages_evicted == before.pages_evicted + 8
        assert after.present_pages == before.present_pages - 8

        words[20] = 9
        window.remap(range(PAGES, PAGES + 8), at=16)
        stats = check(window)
        assert stats.bytes_written == 6 * PAGE
        assert stats.present_pages == after.present_pages
        assert stats.bytes_read == after.bytes_read + 8 * PAGE
        window.remap(range(PAGES, PAGES + 8), at=16)
        assert check(window).pages_hit == stats.pages_hit + 8
        assert check(window).bytes_read == stats.bytes_read
        del words


@pytest.mark.needs("paged")
def test_faults_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(bytes(PAGES * PAGE))
    with fremap.open(path) as store, fremap.Window(store, engine="paged") as window:
        words = window.array(np.uint64, (PAGES, -1))
        for page in reversed(range(0, PAGES, 4)):
            assert words[page, 0] == 0
        stats = check(window)
        assert stats.faults == PAGES // 4
        assert stats.bytes_read == stats.pages_in * PAGE == stats.present_pages * PAGE
        assert stats.pages_loaded == 0
        del words


@pytest.mark.needs("paged")
def test_what_a_budget_drops(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    pages = 4096
    path.write_bytes(bytes(pages * PAGE))
    with (
        fremap.open(path) as store,
        fremap.Window(store, engine="paged", budget=8 << 20) as window,
    ):
        for start in range(0, pages, 256):
            window.populate(range(start, start + 256))
        stats = check(window)
        assert stats.pages_evicted == stats.pages_out == pages - stats.present_pages > 0
        assert stats.bytes_read == pages * PAGE
