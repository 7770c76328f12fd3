"""`remap(in_place=True)`: the frames that a window has are overwritten, with the same result."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot, _core
from fremap.testing import wait_until_settled

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096
PAGES = 512
WINDOW = 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbered"
    path.write_bytes(
        np.repeat(np.arange(PAGES, dtype=np.uint64), PAGE // 8).astype(np.uint64).tobytes()
    )
    wait_until_settled(path)
    return path


def shown(window: fremap.Window) -> list[int]:
    return window.array(np.uint64, (len(window.mapping), -1))[:, 7].tolist()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"budget": None},
    {"prot": Prot.WRITE, "coherent": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["read", "no budget", "written"])
def test_it_shows_what_any_remap_shows(path: Path, engine: Any, settings: dict[str, Any]) -> None:
    draws = random.Random(5)
    if engine == "alias":
        settings = {} if "coherent" in settings else settings
    mode = "r+" if "prot" in settings else "r"
    with (
        fremap.open(path, mode) as store,
        fremap.Window(store, WINDOW, engine=engine, **settings) as window,
    ):
        window.populate()
        expected = np.arange(WINDOW)
        for _ in range(200):
            count = draws.choice([1, 2, 5, 16, 60])
            at = draws.randrange(WINDOW - count + 1)
            unique = "prot" in settings
            free = sorted(set(range(PAGES)) - set(expected.tolist())) if unique else None
            match draws.randrange(3):
                case 0 if not unique:
                    first = draws.randrange(PAGES - count)
                    pages: Any = range(first, first + count)
                case 1 if not unique:
                    pages = [draws.randrange(PAGES) for _ in range(count)]
                case _:
                    pages = draws.sample(free or range(PAGES), count)
            if draws.randrange(4) == 0:
                window.evict(range(at, at + draws.randrange(count + 1)))
            assert window.remap(pages, at=at, in_place=True).all()
            expected[at : at + count] = list(pages)
            assert window.mapping.tolist() == expected.tolist()
            assert shown(window) == expected.tolist()


@pytest.mark.needs("paged")
@pytest.mark.parametrize("page_count", [1, 4, 16, 60])
def test_present_pages_take_one_read(path: Path, page_count: int) -> None:
    with fremap.open(path) as store, fremap.Window(store, WINDOW, engine="paged") as window:
        window.populate()
        before = _core.system_calls()
        window.remap(range(100, 100 + page_count), at=2, in_place=True)
        after = _core.system_calls()
        calls = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        assert calls == {"read": 1, "stat": 1}


@pytest.mark.needs("paged")
def test_runs_that_are_not_in_the_page_cache_are_read_together(path: Path) -> None:
    """The kernel reads the others while one is awaited; of a cached file each is one read."""
    pages = [*range(100, 104), *range(140, 144), *range(180, 184)]
    with fremap.open(path) as store, fremap.Window(store, WINDOW, engine="paged") as window:
        window.populate()
        with fremap.testing.counting() as cached:
            window.remap([page + 4 for page in pages], in_place=True)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # Of a file in memory nothing can leave it.
        absent = not store.resident(pages).any()
        with fremap.testing.counting() as calls:
            window.remap(pages, in_place=True)
        assert (cached["read"], cached["fadvise"]) == (3, 0)
        assert (calls["fadvise"] >= 2) == absent
        assert shown(window)[: len(pages)] == pages


@pytest.mark.needs("paged")
def test_runs_are_read_together_where_none_is_told_to_be_cached(path: Path) -> None:
    """As by file systems without `RWF_NOWAIT`."""
    pages = [*range(100, 104), *range(140, 144), *range(180, 184)]
    with fremap.open(path) as store, fremap.Window(store, WINDOW, engine="paged") as window:
        window.populate()
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # Of a file in memory nothing can leave it.
        absent = not store.resident(pages).any()
        with fremap.testing.failures("read", errno=errno.EOPNOTSUPP) as calls:
            window.remap(pages, in_place=True)
        # One that is refused, and one for each run.
        assert (calls["read"], calls["fadvise"]) == (4, 2 if absent else 0)
        assert shown(window)[: len(pages)] == pages


@pytest.mark.needs("paged")
def test_a_limited_number_of_runs_is_read_ahead(tmp_path: Path) -> None:
    """Beyond what a device queues, to begin a read waits, and Ctrl-C with it."""
    path, runs = tmp_path / "large", range(1024, 3072, 4)
    np.repeat(np.arange(3072, dtype=np.uint64), PAGE // 8).tofile(path)
    wait_until_settled(path)
    with fremap.open(path) as store, fremap.Window(store, len(runs), engine="paged") as window:
        window.populate()
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        absent = not store.resident(runs).any()
        # The first run that is awaited fails, and pages are loaded otherwise from there on.
        with fremap.testing.failures("read", errno=errno.EIO, skip=1) as calls:
            assert window.remap(runs, in_place=True).all()
        assert calls["fadvise"] == (128 if absent else 0)
        assert shown(window) == [*runs]


@pytest.mark.parametrize(
    "engine", [pytest.param("paged", marks=pytest.mark.needs("paged")), "eager"]
)
def test_a_truncated_file_leaves_what_was_shown(path: Path, engine: Any) -> None:
    with (
        fremap.open(path) as store,
        fremap.Window(store, WINDOW, engine=engine, budget=None) as window,
    ):
        window.populate()
        os.truncate(path, 300 * PAGE)
        with pytest.raises(fremap.TruncatedError) as raised:
            window.remap([*range(200, 210), *range(290, 310)], at=5, in_place=True)
        assert raised.value.completed == 20
        expected = [*range(5), *range(200, 210), *range(290, 300), *range(25, WINDOW)]
        assert window.mapping.tolist() == expected
        window.populate()
        assert shown(window) == expected


@pytest.mark.needs("paged")
@pytest.mark.parametrize("skip", range(4))
def test_a_read_that_fails_is_made_again_in_the_usual_way(path: Path, skip: int) -> None:
    with fremap.open(path) as store, fremap.Window(store, WINDOW, engine="paged") as window:
        window.populate()
        _core.inject_failure("read", skip, 5, 1)
        try:
            window.remap([10, 20, 30, 40], at=8, in_place=True)
        except fremap.StoreError as error:
            done = error.completed
        else:
            done = 4
        _core.clear_failures()
        expected = [*range(8), *[10, 20, 30, 40][:done], *range(8 + done, WINDOW)]
        assert window.mapping.tolist() == expected
        window.populate()
        assert shown(window) == expected


@pytest.mark.needs("paged", disk=64 << 20)
def test_faults_beside_it_evict_nothing_that_it_reads_into(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = tmp_path / "many"
    count = 8192
    path.write_bytes(np.repeat(np.arange(count, dtype=np.uint64), PAGE // 8).tobytes())
    with (
        fremap.open(path) as store,
        fremap.Window(store, count, engine="paged", budget=8 << 20) as window,
        ThreadPoolExecutor(1) as pool,
    ):
        words = window.array(np.uint64, (count, -1))

        def touch(seed: int) -> None:
            draws = np.random.default_rng(seed)
            for page in draws.integers(256, count, 3000).tolist():
                assert words[page, 3] == page

        touching = pool.submit(touch, 1)
        draws = random.Random(2)
        while not touching.done():
            first, at = draws.randrange(count - 16), draws.randrange(0, 240, 16)
            window.populate(range(at, at + 16))
            window.remap(range(first, first + 16), at=at, in_place=True)
            assert words[at : at + 16, 9].tolist() == list(range(first, first + 16))
        touching.result()


@pytest.mark.needs("paged")
def test_slots_read_straight_into_a_slot_that_is_in_use(path: Path) -> None:
    with (
        fremap.open(path) as store,
        fremap.Slots(store, extent_pages=16, slot_count=2, engine="paged") as slots,
    ):
        words = slots.array(np.uint64, (16, -1))
        slots.ensure([0, 1])
        before = _core.system_calls()
        slot = slots.ensure(5)
        after = _core.system_calls()
        calls = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        assert calls == {"read": 1, "stat": 1}
        assert words[slot[0], :, 0].tolist() == list(range(80, 96))


@pytest.mark.needs("paged")
def test_a_read_that_fails_takes_no_placed_nor_pinned_page(path: Path) -> None:
    with fremap.open(path) as store, fremap.Window(store, 16, engine="paged") as window:
        window.populate()
        window.place(range(8), b"x" * (8 * PAGE))
        pin = window.pin(range(8, 12))
        os.truncate(path, 300 * PAGE)
        for at in (0, 8):
            with pytest.raises(fremap.TruncatedError) as raised:
                window.remap(range(298, 302), at=at, discard=True, in_place=True)
            assert raised.value.completed == 2
        assert window.mapping.tolist() == [298, 299, *[-2] * 6, 298, 299, *range(10, 16)]
        assert window.present().all()
        assert bytes(window.pages[2][:3]) == b"xxx"
        pin.release()
