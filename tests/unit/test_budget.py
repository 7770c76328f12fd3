"""Windows larger than their budget: what stays, what leaves, what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot

if TYPE_CHECKING:
    from collections.abc import Callable

PAGES = 32_768
BUDGET = 32 << 20
PAGED = pytest.mark.needs("paged", "uffd_wp")
KINDS = [
    pytest.param({}, id="read", marks=pytest.mark.needs("paged")),
    pytest.param(
        {"prot": Prot.WRITE, "coherent": False, "tracking": "sync"}, id="sync", marks=PAGED
    ),
    pytest.param(
        {"prot": Prot.WRITE, "coherent": False, "tracking": "async"},
        id="async",
        marks=pytest.mark.needs("paged", "uffd_wp_async", "uffd_move"),
    ),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 MiB whose pages begin with their number."""
    path = tmp_path_factory.mktemp("budget") / "pages"
    with path.open("wb") as file:
        for first in range(0, PAGES, 4096):
            words = np.zeros((4096, 512), np.uint64)
            words[:, 0] = np.arange(first, first + 4096)
            file.write(words.tobytes())
    return path


@pytest.fixture
def make(path: Path) -> Callable[..., Any]:
    """A window of engine "paged" on all of the file, with a budget."""

    def window(**options: Any) -> fremap.Window:
        store = fremap.open(path, "r+")
        return fremap.Window(store, engine="paged", **({"budget": BUDGET} | options))

    return window


def process_kib(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS)
def test_touching_everything_stays_within_the_budget(
    make: Callable[..., Any], options: dict[str, Any]
) -> None:
    with make(**options) as window:
        words = window.array(np.uint64, (PAGES, 512))
        before = process_kib("RssAnon") + process_kib("RssFile") + process_kib("VmPTE")
        random, most = np.random.default_rng(60), 0
        for _ in range(12):
            some = random.permutation(PAGES)[:3000]
            assert (words[some, 0] == some).all()
            now = process_kib("RssAnon") + process_kib("RssFile") + process_kib("VmPTE")
            most = max(most, now - before)
        stats = window.stats()
        assert most * 1024 <= BUDGET * 1.1 + (4 << 20)  # and what the comparison allocates
        assert stats.budget_bytes == BUDGET
        assert stats.pages_evicted > 0
        assert stats.present_pages * 4096 + stats.page_table_bytes <= BUDGET
        assert window.vma_count == 1
        del words


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS[1:])
def test_what_is_stored_survives_that_its_page_leaves(
    make: Callable[..., Any], options: dict[str, Any], path: Path
) -> None:
    with make(**options) as window:
        words = window.array(np.uint64, (PAGES, 512))
        random = np.random.default_rng(61)
        some = random.permutation(PAGES)[:12_000]
        words[some, 1] = some + 1
        assert window.stats().pages_evicted > 0
        assert (words[some, 1] == some + 1).all()
        words[some, 1] = 0
        del words
    assert not np.fromfile(path, np.uint64).reshape(PAGES, 512)[:, 1].any()


@pytest.mark.parametrize("options", KINDS)
def test_calls_evict_for_what_they_bring_and_nothing_of_it(
    make: Callable[..., Any], options: dict[str, Any]
) -> None:
    with make(**options) as window:
        for first in range(0, PAGES - 4000, 4000):
            assert window.populate(range(first, first + 4000)).all()
            assert window.present()[first : first + 4000].all()
        assert window.remap(range(5000)).all()
        assert window.present()[:5000].all()


@pytest.mark.parametrize("options", KINDS)
def test_more_than_the_budget_is_refused_before_anything_changes(
    make: Callable[..., Any], options: dict[str, Any]
) -> None:
    with make(**options) as window:
        for call in (window.populate, lambda: window.remap(range(PAGES)), lambda: window.pin(None)):
            with pytest.raises(fremap.BudgetError, match=f"budget is {BUDGET}"):
                call()
        assert not window.present().any()
        here = window.populate(nonblock=True)
        assert here.any()
        assert not here.all()
        assert (window.present() == here).all()


def told_budget(refused: pytest.ExceptionInfo[fremap.BudgetError]) -> int:
    told = re.search(r"needs (\d+) bytes", str(refused.value))
    assert told is not None
    return int(told[1])


@pytest.mark.parametrize("page_bytes", [4096, 65536, 1 << 20])
@pytest.mark.parametrize("options", KINDS)
def test_the_least_budget_is_told_and_is_enough(options: dict[str, Any], page_bytes: int) -> None:
    with fremap.MemoryStore(512 * page_bytes, page_bytes=page_bytes) as store:

        def window(budget: int) -> fremap.Window:
            return fremap.Window(store, engine="paged", budget=budget, **options)

        with pytest.raises(fremap.BudgetError) as refused:
            window(100_000)
        least = told_budget(refused)
        with pytest.raises(fremap.BudgetError, match=f"needs {least} bytes"):
            window(least - 1)
        window(least).close()


@pytest.mark.parametrize("pages", [10_000, PAGES])
@pytest.mark.parametrize("options", KINDS)
def test_the_budget_that_a_call_needs_is_told_and_is_enough(
    make: Callable[..., Any], options: dict[str, Any], pages: int
) -> None:
    with make(**options) as window, pytest.raises(fremap.BudgetError) as refused:
        window.populate(range(pages))
    with make(**options, budget=told_budget(refused)) as window:
        assert window.populate(range(pages)).all()


@pytest.mark.parametrize("options", KINDS)
def test_pinned_pages_stay(make: Callable[..., Any], options: dict[str, Any]) -> None:
    with make(**options) as window:
        words = window.array(np.uint64, (PAGES, 512))
        with window.pin(range(100, 200)), window.pin([150]):
            assert window.stats().pinned_pages == 100
            assert words[200:, 0].sum() == sum(range(200, PAGES))
            assert window.present()[100:200].all()
            with pytest.raises(fremap.ArgumentError, match="window page 100 is pinned"):
                window.evict(range(50, 150))
            with pytest.raises(fremap.BudgetError, match=r"or release pins\)"):
                window.pin(range(200, PAGES))
        assert window.stats().pinned_pages == 0
        window.evict(range(50, 150))
        assert words[200:, 0].sum() == sum(range(200, PAGES))
        assert not window.present()[150:200].all()
        del words


@pytest.mark.needs("paged")
def test_budgets_that_cannot_be(make: Callable[..., Any], path: Path) -> None:
    with pytest.raises(fremap.BudgetError, match="one batch"):
        make(budget=1 << 19)
    for budget in (0, -1, "much", "0", "-64M", "64M!", 1.5, True):
        with pytest.raises(fremap.ArgumentError, match="budget is"):
            make(budget=budget)
    refused = pytest.raises(fremap.UnsupportedError, match="leave the budget out")
    with fremap.open(path) as store, refused:
        fremap.Window(store, engine="eager", budget=BUDGET)
    with make(budget=1 << 40) as window:
        assert window.stats().budget_bytes == 0


@pytest.mark.parametrize("budget", [64 << 20, "64M", "64 MiB", "65536k", np.int64(64 << 20)])
def test_budgets_are_written_as_the_command_has_them(budget: Any, path: Path) -> None:
    with fremap.open(path) as store, fremap.Slots(store, 1, 2, budget=budget) as slots:
        assert slots.ensure([1]) is not None
    array = fremap.memmap(path, np.uint8, "r", budget=budget)
    assert array.window.stats().budget_bytes == 64 << 20
    with fremap.rows(path, np.uint64, 512, budget=budget) as rows:
        rows.take([1])


@pytest.mark.needs("eager")
def test_an_eager_window_whose_holes_alone_take_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(15 << 40)
    with fremap.open(path) as store, pytest.raises(fremap.UnsupportedError, match="page tables"):
        fremap.Window(store, engine="eager")


TABLES = """
import sys
import numpy as np
import fremap

def page_tables():
    for line in open("/proc/self/status"):
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) << 10

BLOCK_PAGES, BLOCKS, BUDGET = 512, 4096, 16 << 20
store = fremap.MemoryStore(BLOCKS * BLOCK_PAGES * 4096, page_bytes=4096)
with fremap.Window(store, engine="paged", budget=BUDGET) as window:
    words = window.array(np.uint64, (-1, 512))
    before = page_tables()
    for block in range(BLOCKS):
        for page in (3, 200, 400):
            assert words[block * BLOCK_PAGES + page, 0] == 0
    stats = window.stats()
    print(stats.page_table_bytes, page_tables() - before, stats.present_pages)
"""


@pytest.mark.needs("paged")
def test_page_tables_are_given_back_where_the_kernel_reclaims_them() -> None:
    """One page table a touched block would be the whole budget; those of empty blocks go."""
    done = subprocess.run(
        [sys.executable, "-c", TABLES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counted, real, present = map(int, done.stdout.split())
    reclaims = fremap.capabilities().probes["page_table_reclaim"].available
    assert abs(counted - real) < 1 << 20, "what is counted is there"
    assert present * 4096 + counted < BUDGET
    if reclaims:
        assert counted < 4 << 20
    else:
        assert counted == 16 << 20
