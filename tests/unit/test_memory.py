"""One pool of memory for all automatic budgets, and what limits the process."""

from __future__ import annotations

import errno
import os
import re
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
    assert budgets[0] >= 64 << 20
    # What else runs here moves what is available. Each for itself would come to four times.
    assert sum(budgets) <= max(available, _core.available_memory()) * 0.75
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


@pytest.mark.needs("paged", "memory_cgroup")
def test_pages_leave_a_window_whose_share_shrinks(tmp_path: Path) -> None:
    """In a process whose cgroup has no limit, but one above it has."""
    group = limited_group()
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


@pytest.mark.slow
@pytest.mark.needs("paged", "memory_cgroup")
@pytest.mark.parametrize(
    "tracking",
    [
        pytest.param("sync", marks=pytest.mark.needs("uffd_wp")),
        pytest.param("async", marks=pytest.mark.needs("uffd_wp_async", "uffd_move")),
    ],
)
def test_more_is_written_through_a_window_than_the_group_may_have(
    tracking: str, tmp_path: Path
) -> None:
    """It ends, where the kernel throttles who has many dirty pages, and all is written."""
    group = limited_group(192 << 20)
    path = sparse(tmp_path, 240 << 20)
    try:
        done = subprocess.run(
            [sys.executable, "-c", WRITING, str(group), path, tracking],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert (done.returncode, done.stdout) == (0, "written\n"), done.stderr
    finally:
        group.rmdir()
        group.parent.rmdir()
    words = np.memmap(path, np.uint64, "r")[::512]
    assert (words == np.arange(1, 240 * 256 + 1)).all()


WRITING = """
import os, pathlib, sys, numpy as np
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
import fremap
with fremap.open(sys.argv[2], "r+") as store, fremap.Window(
    store, engine="paged", prot=fremap.Prot.WRITE, coherent=False, tracking=sys.argv[3]
) as window:
    words = window.array(np.uint64, (-1, 512))
    for first in range(0, len(words), 4096):
        words[first : first + 4096] = np.arange(first + 1, first + 4097)[:, None]
    window.flush()
    del words
print("written", flush=True)
pathlib.Path(sys.argv[1]).parent.parent.joinpath("cgroup.procs").write_text(str(os.getpid()))
"""


def limited_group(limit_bytes: int = 400 << 20) -> Path:
    """A memory group without a limit in one that has, version 1 or 2."""
    top = Path("/sys/fs/cgroup/memory")
    limit = "memory.limit_in_bytes"
    if not top.exists():
        top, limit = top.parent, "memory.max"
        (top / "cgroup.subtree_control").write_text("+memory")
    parent = top / f"fremap-test-{np.random.default_rng().integers(1 << 40)}"
    parent.mkdir()
    if limit == "memory.max":
        (parent / "cgroup.subtree_control").write_text("+memory")
    (parent / limit).write_text(str(limit_bytes))
    (parent / "child").mkdir()
    return parent / "child"


@pytest.mark.parametrize("budget", [100, 2 << 20])
def test_rows_say_what_the_least_budget_is(path: Path, budget: Any) -> None:
    with pytest.raises(fremap.BudgetError, match=f"needs 2101248 bytes.*budget is {budget}"):
        fremap.rows(path, np.uint8, 4096, budget=budget)


def test_rows_tell_their_budget_before_the_first_take(path: Path) -> None:
    with fremap.rows(path, np.uint8, 4096, budget=4 << 20) as rows:
        assert rows.stats().budget_bytes == 4 << 20


@pytest.mark.parametrize("budget", [1 << 63, 1 << 70, np.uint64(1 << 63)])
def test_a_budget_beyond_every_machine_is_one(path: Path, budget: Any) -> None:
    with fremap.rows(path, np.uint8, 4096, budget=budget) as rows:
        assert rows.stats().budget_bytes == (1 << 63) - 1


@pytest.mark.needs("paged")
def test_a_window_takes_a_budget_beyond_every_machine(path: Path) -> None:
    with fremap.Window(fremap.open(path), engine="paged", budget=1 << 70) as window:
        assert window.populate().all()


def test_named_memory_larger_than_its_file_system_is_refused() -> None:
    facts = os.statvfs("/dev/shm")
    size = (facts.f_blocks * facts.f_frsize or 1 << 60) + 4096
    name = f"fremap-large-{os.getpid()}"
    if facts.f_blocks == 0:
        with fremap.MemoryStore(size, name=name):
            fremap.MemoryStore.unlink(name)
        return
    with pytest.raises(OSError, match=f"{size} bytes.*/dev/shm.*free") as caught:
        fremap.MemoryStore(size, name=name)
    assert caught.value.errno == errno.ENOSPC
    assert not Path("/dev/shm", name).exists()


@pytest.mark.needs("alias")
def test_a_mapping_limit_says_the_number_that_is_needed(tmp_path: Path) -> None:
    limit = fremap.capabilities().max_map_count
    store = fremap.open(sparse(tmp_path, 4 * limit * 4096))
    with fremap.Window(store, engine="alias") as window:
        with pytest.raises(fremap.MappingLimitError) as caught:
            window.remap(range(2 * limit)[::-1])
        text = str(caught.value)
        needed, in_use, left = map(
            int, re.search(r"up to (\d+) .* has (\d+), so (\d+)", text).groups()
        )
        assert left == limit - in_use
        assert f"vm.max_map_count={in_use + needed + 1000}`" in text


MANY = """
import sys, threading, numpy as np, fremap
from pathlib import Path
root = Path(sys.argv[1])
files = []
for number in range(4096):
    path = root / str(number)
    np.full(4096, number % 251, np.uint8).tofile(path)
    files.append(path)
limit = fremap.capabilities().max_map_count
objects = [fremap.rows(files, np.uint8, 512) for _ in range(6)]
for rows in objects:
    for _ in range(4):
        got = rows.take(np.arange(len(rows)))
        assert (got[:, 0] == np.repeat(np.arange(4096) % 251, 8)).all()
print(sum(1 for _ in open("/proc/self/maps")), limit)
thread = threading.Thread(target=lambda: None)
thread.start()
thread.join()
"""


@pytest.mark.slow
@pytest.mark.needs("sigbus_recovery")
def test_many_objects_over_many_files_leave_mappings_to_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    mappings, limit = map(int, done.stdout.split())
    assert 4096 < mappings <= limit // 4 + 2000
