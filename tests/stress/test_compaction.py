"""Windows while the kernel migrates their pages.

Linux 6.18 answers EEXIST to a MOVE that met a page under migration, and has moved
it (docs/decisions/006). Only root may ask for compaction; anybody else's run has
what memory pressure brings.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import failures, numbered_words

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.any_user
COMPACT = Path("/proc/sys/vm/compact_memory")
PAGE_BYTES = 16_384
PAGES = 64


def migrate(number: int) -> None:
    """Have the kernel migrate pages of ours, by leaving holes and asking for compaction."""
    holes = np.empty(4096 * 2048, np.uint8)
    holes[::4096] = 1
    if os.access(COMPACT, os.W_OK):
        COMPACT.write_text("1")


@pytest.mark.parametrize("rounds", [200, pytest.param(5000, marks=pytest.mark.long)])
@pytest.mark.parametrize("engine", ["paged"], indirect=True)
def test_pages_are_right_whatever_the_kernel_migrates(
    engine: str, threads: Callable[[], Any], rounds: int, tmp_path: Path
) -> None:
    path = tmp_path / "pages"
    path.write_bytes(numbered_words(range(2 * PAGES), PAGE_BYTES).tobytes())
    random = np.random.default_rng(44)
    with (
        fremap.open(path, page_bytes=PAGE_BYTES) as store,
        fremap.Window(store, PAGES, engine=engine) as window,
        threads() as running,
    ):
        running.start(migrate)
        for _ in range(rounds):
            shown = random.integers(0, 2 * PAGES, PAGES)
            window.remap(shown)
            assert (window.pages == numbered_words(shown, PAGE_BYTES).view(np.uint8)).all()
            window.evict(random.permutation(PAGES)[:20])
            if running.failures:
                break
        running.wait_for_rounds(1)


@pytest.mark.parametrize("lacking", [[], ["pagemap_scan"]])
def test_a_page_under_migration_is_present(lacking: list[str], threads: Callable[[], Any]) -> None:
    """Told by a scan of the page map, and before Linux 6.7 by its entries."""
    pages = 1024  # enough that some are under way at many looks
    with (
        fremap.MemoryStore(pages * PAGE_BYTES, page_bytes=PAGE_BYTES) as store,
        fremap.Window(store, pages, engine="alias") as window,
        ExitStack() as refused,
        threads() as running,
    ):
        for call in lacking:
            refused.enter_context(failures(call, errno=errno.ENOTTY, times=1 << 30))
        window.remap(np.arange(pages))
        window.populate()
        running.start(migrate)
        for _ in range(2000):
            assert window.present().all()
            assert window.stats().present_pages == pages
        running.wait_for_rounds(1)
