"""Faults that evict beside calls that evict and flush: every word written is in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.any_user
PAGE = 4096
PAGES = 6144
WRITERS = 2


@pytest.mark.parametrize("rounds", [40, pytest.param(1500, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "tracking",
    [
        pytest.param("async", marks=pytest.mark.needs("paged", "uffd_wp_async", "uffd_move")),
        pytest.param("sync", marks=pytest.mark.needs("paged", "uffd_wp")),
    ],
)
def test_no_write_is_lost_where_faults_evict(
    tmp_path: Path, tracking: Any, rounds: int, threads: Callable[[], Any]
) -> None:
    """A page that a fault takes for its victim may be one that a call takes next."""
    path = tmp_path / "pages"
    path.write_bytes(bytes(PAGES * PAGE))
    last = np.zeros((WRITERS, PAGES), np.uint64)
    generators = [np.random.default_rng(number) for number in range(WRITERS + 2)]
    with fremap.open(path, "r+") as store:
        window = fremap.Window(
            store, prot=Prot.WRITE, coherent=False, tracking=tracking, budget=8 << 20
        )
        words = [window.array(np.uint64, (PAGES, PAGE // 8))]

        def write(number: int) -> None:
            # The word of this writer in each page, which it alone writes.
            for page in generators[number].integers(0, PAGES, 300).tolist():
                assert words[0][page, number] == last[number, page], "a write came undone"
                last[number, page] += 1
                words[0][page, number] = last[number, page]

        def evict(number: int) -> None:
            window.evict(generators[number].permutation(PAGES)[:700])

        def flush(number: int) -> None:
            window.flush(generators[number].permutation(PAGES)[:300])

        with threads() as running:
            running.start(write, WRITERS)
            running.start(evict)
            running.start(flush)
            running.wait_for_rounds(rounds)
        words.clear()
        window.close()
    found = np.fromfile(path, np.uint64).reshape(PAGES, -1)[:, :WRITERS].T
    np.testing.assert_array_equal(found, last)
