"""One pool of memory for all automatic budgets, and what limits the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
from fremap import _core

PAGES = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """16 MiB whose pages begin with their number."""
    words = np.zeros((PAGES, 512), np.uint64)
    words[:, 0] = np.arange(PAGES)
    words.tofile(tmp_path / "pages")
    return tmp_path / "pages"


def sparse(tmp_path: Path, size: int) -> Path:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.needs("paged")
def test_automatic_budgets_come_to_half_together(tmp_path: Path) -> None:
    available = _core.available_memory()
    store = fremap.open(sparse(tmp_path, 4 * available // 4096 * 4096))
    windows = [fremap.Window(store, engine="paged") for _ in range(8)]
    budgets = [window.stats().budget_bytes for window in windows]
    assert len(set(budgets)) == 1
    assert 64 << 20 <= budgets[0]
    # What else runs on the machine moves what is available a little.
    assert sum(budgets) <= available * 0.55
    for window in windows[1:]:
        window.close()
    assert windows[0].stats().budget_bytes > 4 * budgets[0]
    windows[0].close()


FROM_BUDGET = """
import sys, numpy as np, fremap
path = sys.argv[1]
budgeted = fremap.open(path)
with fremap.Window(budgeted, 1024, budget=8 << 20, engine="paged") as window:
    window.array(np.uint64, (-1, 512))[:, 0].sum()
try:
    fremap.Slots(budgeted, 1, 4096, engine="paged", budget=8 << 20)
except fremap.BudgetError:
    pass
else:
    raise SystemExit("it fits")
ids = np.arange(4096)
def calls(store):
    for _ in range(40):
        store.read(ids)
    before = fremap._core.system_calls()
    for _ in range(10):
        store.read(ids)
    after = fremap._core.system_calls()
    return sum(n - before.get(name, 0) for name, n in after.items() if name in READS)
READS = {"pread", "preadv", "io_uring_enter", "read", "preadv2"}
print(calls(budgeted), calls(fremap.open(path)))
"""


@pytest.mark.needs("paged")
def test_a_store_is_as_fast_after_a_window_with_a_budget(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FROM_BUDGET, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after, fresh = map(int, done.stdout.split())
    assert after == fresh


@pytest.mark.needs("paged")
def test_what_others_have_mapped_leaves_a_small_budget_its_pages(path: Path) -> None:
    def faults(store: fremap.Store) -> int:
        with fremap.Window(store, engine="paged", budget=8 << 20) as window:
            words = window.array(np.uint64, (PAGES, 512))
            hot = np.random.default_rng(1).permutation(PAGES)[:200]
            for _ in range(10):
                assert (words[hot, 0] == hot).all()
            del words
            return window.stats().pages_evicted

    used = fremap.open(path)
    for _ in range(40):
        used.read(range(PAGES))
    assert faults(used) == faults(fremap.open(path)) == 0


@pytest.mark.needs("paged")
def test_pages_leave_a_window_whose_share_shrinks(tmp_path: Path) -> None:
    """In a process whose half is small: its cgroup's, where one may be made."""
    group = limited_group()
    if group is None:
        pytest.skip("no memory cgroup may be made")
    try:
        done = subprocess.run(
            [sys.executable, "-c", SHRINKING, str(group), sparse(tmp_path, 1 << 30)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        available, first, before, second, after = map(int, done.stdout.split())
        assert available <= 400 << 20
        assert 150 << 20 < first <= 200 << 20
        assert before > 100 << 20
        assert second <= first // 2
        assert after <= second
    finally:
        group.rmdir()
        group.parent.rmdir()


SHRINKING = """
import os, pathlib, sys, numpy as np
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
import fremap
from fremap import _core
available = _core.available_memory()
store = fremap.open(sys.argv[2])
first = fremap.Window(store, engine="paged")
budget = first.stats().budget_bytes
first.array(np.uint8, (-1, 4096))[:, 0].sum()
before = first.stats().present_pages * 4096
second = fremap.Window(store, engine="paged")
print(available, budget, before, second.stats().budget_bytes, first.stats().present_pages * 4096)
sys.stdout.flush()
pathlib.Path(sys.argv[1]).parent.parent.joinpath("cgroup.procs").write_text(str(os.getpid()))
"""


def limited_group() -> Path | None:
    """A memory group without a limit in one that has 400 MiB, version 1 or 2."""
    for top in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        limit = "memory.limit_in_bytes" if top.name == "memory" else "memory.max"
        parent = top / f"fremap-test-{np.random.default_rng().integers(1 << 40)}"
        try:
            if limit == "memory.max":
                (top / "cgroup.controllers").read_text().index("memory")
            parent.mkdir()
        except (OSError, ValueError):
            continue
        if limit == "memory.max":
            (parent / "cgroup.subtree_control").write_text("+memory")
        (parent / limit).write_text(str(400 << 20))
        (parent / "child").mkdir()
        return parent / "child"
    return None


@pytest.mark.parametrize("budget", [100, 2 << 20])
def test_rows_say_what_the_least_budget_is(path: Path, budget: Any) -> None:
    with pytest.raises(fremap.BudgetError, match=f"needs 2101248 bytes.*budget is {budget}"):
        fremap.rows(path, np.uint8, 4096, budget=budget)


def test_rows_tell_their_budget_before_the_first_take(path: Path) -> None:
    with fremap.rows(path, np.uint8, 4096, budget=4 << 20) as rows:
        assert rows.stats().budget_bytes == 4 << 20
