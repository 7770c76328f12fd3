"""O4, O7, O8, O9, O12, O14, O14b: what is brought in, when, and at what price."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap import _core

from .conftest import (
    PAGE,
    HalfCached,
    MakeStore,
    Numbered,
    costs_no_fault,
    drop_from_page_cache,
    faults_of_touching,
    no_device_reads,
    page_cache_holds,
)

# System calls of a remap of a 16 KiB element (four pages that follow each other
# in the file) into a window that is in use, stated in docs/origin.md.
ELEMENT_CALLS = {"paged": 6, "alias": 5, "eager": 5}


def system_calls() -> dict[str, int]:
    return _core.system_calls()


def calls_since(before: dict[str, int]) -> dict[str, int]:
    now = system_calls()
    return {name: now[name] - before[name] for name in now if now[name] != before[name]}


def test_o4_one_call_for_a_cache_element_and_no_fault_after_it(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(256)
    with fremap.Window(store, 64, engine=engine) as window:
        memory = window.array(np.uint8)
        window.remap(range(200, 204), at=40)  # the window is in use
        faults_of_touching(memory, range(40, 44))
        made = []
        for first in (100, 110, 120):
            before, faults_before = system_calls(), window.stats().faults
            assert window.remap(range(first, first + 4), at=8).all()
            made.append(calls_since(before))
            assert costs_no_fault(memory, range(8, 12))
            assert window.stats().faults == faults_before
            expected = numbered_pages(range(first, first + 4), PAGE)
            np.testing.assert_array_equal(window.pages[8:12], expected)
        # One that meets a page that the kernel is just moving takes more.
        assert min(sum(calls.values()) for calls in made) <= ELEMENT_CALLS[engine], made


@pytest.mark.needs("paged", "uffd_move")
@pytest.mark.parametrize("page_count", [1, 4, 16, 64])
@pytest.mark.parametrize("window_pages", [300, 2048])
def test_o4_elements_of_one_size_cost_two_moves_and_a_read(
    page_count: int, window_pages: int, numbered_store: MakeStore, numbered_pages: Numbered
) -> None:
    store = numbered_store(4096)
    with fremap.Window(store, window_pages, engine="paged") as window:
        window.populate()
        made = []
        for first in range(100, 700, 100):
            before = system_calls()
            pages = range(first, first + page_count)
            assert window.remap(pages, at=window_pages - page_count).all()
            made.append(calls_since(before))
            np.testing.assert_array_equal(
                window.pages[window_pages - page_count :], numbered_pages(pages, PAGE)
            )
        # The first ones set things up; one that meets a page that the kernel is just moving
        # takes more.
        least = {"uffdio_move": 2, "uffdio_move_answer": 2, "read": 1}
        assert any(calls in (least, {**least, "stat": 1}) for calls in made[2:]), made


@pytest.mark.needs("paged")
def test_o4_elements_of_any_size_after_another(
    numbered_store: MakeStore, numbered_pages: Numbered
) -> None:
    store = numbered_store(4096)
    with fremap.Window(store, 1024, engine="paged") as window:
        window.populate()
        shown = np.arange(1024)
        sizes = [1, 64, 3, 64, 65, 1, 200, 2, 1024, 7, 64, 600, 64]
        for step, size in enumerate(sizes):
            first, at = 11 * step + 1, (37 * step) % (1025 - size)
            assert window.remap(range(first, first + size), at=at).all()
            shown[at : at + size] = np.arange(first, first + size)
            np.testing.assert_array_equal(window.pages[:], numbered_pages(shown, PAGE))


def test_o4_no_faults_after_a_scattered_remap(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(2048)
    order = np.random.default_rng(4).permutation(2048)
    with fremap.Window(store, engine=engine) as window:
        memory = window.array(np.uint8)
        assert window.remap(order).all()
        assert costs_no_fault(memory, range(2048))
        assert window.stats().faults == 0
        np.testing.assert_array_equal(window.pages, numbered_pages(order, PAGE))


def test_o7_populate(numbered_store: MakeStore, engine: str, numbered_pages: Numbered) -> None:
    store = numbered_store(128)
    with fremap.Window(store, engine=engine, populate=True) as window:
        assert window.present().all()
        assert costs_no_fault(window.array(np.uint8), range(128))
        np.testing.assert_array_equal(window.pages, numbered_pages(range(128), PAGE))
    with fremap.Window(store, engine=engine) as window:
        memory = window.array(np.uint8)
        assert window.populate([100, 3, 50]).tolist() == [True] * 3
        assert costs_no_fault(memory, [3, 50, 100])
        assert window.populate().all()
        assert costs_no_fault(memory, range(128))
        assert window.stats().faults == 0


def test_o8_nonblock_brings_what_is_cached_and_reads_nothing(
    half_cached: HalfCached, engine: str, numbered_pages: Numbered
) -> None:
    path, cached = half_cached(512)
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, engine=engine) as window,
    ):
        with no_device_reads():
            mask = window.populate(nonblock=True)
        np.testing.assert_array_equal(mask, cached)
        np.testing.assert_array_equal(page_cache_holds(path), cached)
        # A blocking populate brings the rest.
        assert window.populate().all()
        np.testing.assert_array_equal(window.pages, numbered_pages(range(512), PAGE))


def test_o8_nonblock_remap(half_cached: HalfCached, engine: str, numbered_pages: Numbered) -> None:
    path, cached = half_cached(512)
    order = np.random.default_rng(8).permutation(512)
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, engine=engine, mapping="none", page_count=512) as window,
    ):
        with no_device_reads():
            mask = window.remap(order, nonblock=True)
        np.testing.assert_array_equal(mask, cached[order])
        np.testing.assert_array_equal(window.mapping, order)
        assert window.populate().all()
        np.testing.assert_array_equal(window.pages, numbered_pages(order, PAGE))


def test_o8_nonblock_window(half_cached: HalfCached, engine: str) -> None:
    path, cached = half_cached(256)
    with fremap.open(path, page_bytes=PAGE) as store:
        with no_device_reads():
            window = fremap.Window(store, engine=engine, populate=True, nonblock=True)
        with window:
            np.testing.assert_array_equal(window.present(), cached)


def test_o8_the_kernels_own_flag_does_nothing(half_cached: HalfCached) -> None:
    """`MAP_POPULATE | MAP_NONBLOCK` prefaults nothing since 2.6.23, cached or not."""
    import mmap

    path, cached = half_cached(64)
    with path.open("rb") as file:
        flags = mmap.MAP_SHARED | fremap.MAP_POPULATE | fremap.MAP_NONBLOCK
        with mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped:
            memory = np.frombuffer(mapped, dtype=np.uint8)
            assert faults_of_touching(memory, np.flatnonzero(cached)[:1].tolist()) > 0
            del memory


def test_o9_a_skipped_page_never_shows_the_one_before(
    half_cached: HalfCached, engine: str, numbered_pages: Numbered
) -> None:
    path, cached = half_cached(256)
    first_cached = int(np.flatnonzero(cached)[0])
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, mapping=[first_cached] * 256, engine=engine) as window,
    ):
        window.populate()
        mask = window.remap(range(256), nonblock=True)
        np.testing.assert_array_equal(mask, cached)
        np.testing.assert_array_equal(window.present() & ~mask, np.zeros(256, dtype=bool))
        np.testing.assert_array_equal(window.pages[mask], numbered_pages(np.flatnonzero(mask)))
        if engine == "eager":
            # No lazy faults: a touch is a fault, for system calls EFAULT.
            target = os.memfd_create("target")
            skipped = int(np.flatnonzero(~mask)[0])
            with memoryview(window) as memory, pytest.raises(OSError, match="Bad address"):
                os.write(target, memory[skipped * PAGE :][:PAGE])
            os.close(target)
            window.populate()
        # Elsewhere a touch brings the right one.
        np.testing.assert_array_equal(window.pages, numbered_pages(range(256), PAGE))


def locked_bytes() -> int:
    """Bytes of this process that are locked in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmLck"].split()[0]) * 1024


def may_lock(page_count: int) -> bool:
    """Whether this process may surely lock a window of so many pages, and its staging memory."""
    limit = fremap.capabilities().memlock_limit
    return os.geteuid() == 0 or limit is None or limit >= page_count * PAGE + (4 << 20)


def test_o12_locked_windows_are_populated(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(32)
    before = locked_bytes()
    try:
        window = fremap.Window(store, engine=engine, lock=True)
    except fremap.StoreError as refused:
        if may_lock(32) or "RLIMIT_MEMLOCK" not in str(refused):
            raise
        return
    with window:
        assert locked_bytes() - before >= 32 * PAGE
        assert window.locked
        assert window.present().all()
        assert costs_no_fault(window.array(np.uint8), range(32))
        # Locking and populating are one path: what is remapped is present too.
        assert window.remap(range(31, -1, -1)).all()
        assert costs_no_fault(window.array(np.uint8), range(32))
        np.testing.assert_array_equal(window.pages, numbered_pages(range(31, -1, -1), PAGE))
    assert locked_bytes() == before


LOCK_REFUSED = """
import fremap, os, resource, sys
store = fremap.MemoryStore(8 * 4096)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)  # root may lock without limit
try:
    fremap.Window(store, engine=sys.argv[1], lock=True)
except fremap.StoreError as refused:
    print(refused)
"""


def test_o12_the_limit_is_said(engine: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCK_REFUSED, engine],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "RLIMIT_MEMLOCK" in done.stdout


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("engine", ["paged", "eager"], indirect=True)
def test_o14_reads_are_started_before_the_first_is_waited_for(
    half_cached: HalfCached, engine: str, numbered_pages: Numbered
) -> None:
    path, _ = half_cached(512)
    drop_from_page_cache(path, 0, 512)
    order = np.arange(0, 512, 4)  # 128 reads that cannot be merged
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, len(order), mapping="none", engine=engine) as window,
    ):
        before = system_calls()
        assert window.remap(order).all()
        calls = calls_since(before)
        # One by one they would be 128 calls that wait; 128 may be in flight.
        assert calls.get("read", 0) == 0
        assert calls["io_uring_enter"] < len(order)
        np.testing.assert_array_equal(window.pages, numbered_pages(order, PAGE))


def machine_memory_bytes() -> int:
    """Memory and swap of the machine."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))


@pytest.mark.parametrize("engine", ["paged", "eager"], indirect=True)
def test_o14_a_ridiculous_amount_of_memory_is_refused(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "ridiculous"
    with path.open("wb") as file:
        file.truncate(2 * machine_memory_bytes())  # sparse
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, engine=engine) as window,
    ):
        with pytest.raises(fremap.MemoryLimitError, match="bytes of memory") as raised:
            window.populate()
        assert isinstance(raised.value, MemoryError)
        assert window.stats().present_pages == 0
        assert window.populate(range(10)).all()


def test_o14b_prefetch_starts_reads_and_returns(half_cached: HalfCached) -> None:
    path, cached = half_cached(256)
    with fremap.open(path, page_bytes=PAGE) as store:
        store.prefetch(np.flatnonzero(~cached))
        deadline = time.monotonic() + 30
        while not store.resident().all():
            assert time.monotonic() < deadline, "prefetched pages never came"
            os.sched_yield()
        with no_device_reads(), fremap.Window(store, populate=True) as window:
            assert window.present().all()


def test_o14b_prefetch_reads_nothing_into_the_window(
    half_cached: HalfCached, engine: str, numbered_file: Callable[..., Path]
) -> None:
    path, _ = half_cached(64)
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, engine=engine) as window,
    ):
        store.prefetch(range(64))
        assert window.stats().pages_loaded == 0
