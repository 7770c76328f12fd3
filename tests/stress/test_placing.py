"""Pages that keep what they show as their own, while other threads make the budget full."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from fremap.testing import write_numbered_file

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.any_user
ROUNDS = 300

# A process of its own: a page that was lost would have its reader wait for ever.
SCRIPT = """
    import random, sys, threading
    import numpy as np
    import fremap
    from fremap.testing import numbered_words

    path, tracking, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    store = fremap.open(path, "r" if tracking == "none" else "r+")
    how = {} if tracking == "none" else {
        "prot": fremap.Prot.WRITE, "coherent": False, "tracking": tracking}
    window = fremap.Window(store, engine="paged", budget=3 << 20, **how)
    words = window.pages.view(np.uint64)[:, 0]
    expected = numbered_words(np.arange(store.page_count))[:, 0]
    stopped = threading.Event()
    wrong = []

    def touch(seed):
        rng = random.Random(seed)
        while not stopped.is_set() and not wrong:
            page = rng.randrange(64, store.page_count)
            if words[page] != expected[page]:
                wrong.append(page)

    threads = [threading.Thread(target=touch, args=[seed]) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        number = 0
        # As many rounds more as the threads need to have the budget evict something.
        while number < rounds or window.stats().pages_evicted <= 40 * number:
            first = number * 7 % 20 if tracking == "none" else 0
            window.remap(range(first, first + 40), populate=False)
            window.place(range(40))
            assert (words[:40] == expected[first : first + 40]).all(), number
            window.evict(range(40), discard=True)
            number += 1
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong
    print("right")
"""


@pytest.mark.needs("paged")
@pytest.mark.parametrize(
    "tracking",
    [
        "none",
        pytest.param("sync", marks=pytest.mark.needs("uffd_wp")),
        pytest.param("async", marks=pytest.mark.needs("uffd_wp_async", "uffd_move")),
    ],
)
def test_a_page_that_is_made_its_own_is_not_evicted_before(
    tracking: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A fault that looks for victims finds none among the pages that `place` has loaded."""
    path, script = tmp_path / "pages", tmp_path / "script.py"
    write_numbered_file(path, 4096)
    script.write_text(textwrap.dedent(SCRIPT))
    rounds = 20 * ROUNDS if request.config.getoption("long") else ROUNDS
    done = subprocess.run(
        [sys.executable, script, path, tracking, str(rounds)],
        capture_output=True,
        text=True,
        timeout=150 if rounds == ROUNDS else 1500,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
