"""O1, O2, O3, O16, O20: any pages in any order, in one mapping, of files and shared memory."""

import os
from collections.abc import Callable
from pathlib import Path

import fremap
import numpy as np
import pytest

from .conftest import PAGE, MakeStore, Numbered, maps_lines


def test_o1_remap_arbitrary_pages_within_one_existing_mapping(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(256)
    order = np.random.default_rng(1).permutation(256)
    with fremap.Window(store, engine=engine, populate=True) as window:
        memory = window.pages
        address = memory.ctypes.data
        assert window.remap(order).all()
        assert window.pages.ctypes.data == address
        np.testing.assert_array_equal(memory, numbered_pages(order, PAGE))
        # Again, a part of it, so that a remapped page is remapped.
        window.remap(order[:100][::-1], at=50)
        expected = np.concatenate([order[:50], order[:100][::-1], order[150:]])
        np.testing.assert_array_equal(memory, numbered_pages(expected, PAGE))
        np.testing.assert_array_equal(window.mapping, expected)


def test_o1_pages_show_more_than_once(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(16)
    with fremap.Window(store, 8, engine=engine) as window:
        window.remap([5, 5, 0, 5, 15, 0, 1, 5])
        np.testing.assert_array_equal(window.pages, numbered_pages([5, 5, 0, 5, 15, 0, 1, 5], PAGE))


@pytest.mark.needs("paged")
def test_o2_one_mapping_for_four_million_pages_in_random_order(tmp_path: Path) -> None:
    file_pages, window_pages = 1 << 24, 1 << 22  # 64 GiB of file, 16 GiB of window
    path = tmp_path / "sparse"
    random = np.random.default_rng(2)
    order = random.permutation(file_pages)[:window_pages]
    marked = random.choice(window_pages, 200, replace=False)
    with path.open("wb") as file:
        file.truncate(file_pages * PAGE)
        for slot in marked:
            os.pwrite(file.fileno(), int(order[slot]).to_bytes(8, "little"), order[slot] * PAGE)
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, window_pages, mapping="none", engine="paged") as window,
    ):
        assert maps_lines(window) == 1
        present = window.remap(order, populate=False)
        assert not present.any()
        assert maps_lines(window) == 1
        assert window.vma_count == 1
        first_words = window.array("<u8", (window_pages, PAGE // 8))[:, 0]
        np.testing.assert_array_equal(first_words[marked], order[marked])
        assert maps_lines(window) == 1
        assert window.stats().present_pages == len(marked)
        np.testing.assert_array_equal(window.mapping, order)


@pytest.mark.needs("paged")
def test_o2_scattered_content_stays_one_mapping(
    numbered_store: MakeStore, numbered_pages: Numbered
) -> None:
    store = numbered_store(512)
    order = np.random.default_rng(3).permutation(512)
    with fremap.Window(store, engine="paged") as window:
        window.remap(order)
        window.evict(order[:100])
        window.remap(order[:200], at=300)
        assert maps_lines(window) == 1
        np.testing.assert_array_equal(window.pages, numbered_pages(window.mapping, PAGE))


def test_o2_alias_has_a_mapping_a_piece_and_refuses_before_the_limit(
    tmp_path: Path, numbered_pages: Numbered
) -> None:
    """What is said of the other engine: it counts, and stops while the process still can go on."""
    pages = 70_000
    limit = fremap.capabilities().max_map_count
    count = min(pages, 2 * limit)
    with (
        fremap.open(tmp_path / "wide", "w+", size=pages * PAGE, page_bytes=PAGE) as store,
        fremap.Window(store, count, engine="alias") as window,
    ):
        window.remap(range(0, 40, 2), at=100)
        assert maps_lines(window) == window.vma_count == 22
        if limit > 2 * pages:
            return  # a machine that allows more than this file has pages
        before = window.mapping
        with pytest.raises(fremap.MappingLimitError, match=r"vm\.max_map_count") as raised:
            window.remap(range(count - 1, -1, -1))
        assert raised.value.errno == 12
        np.testing.assert_array_equal(window.mapping, before)


def test_o3_files_and_shared_memory(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(64)
    with fremap.Window(store, engine=engine) as window:
        window.remap(range(63, -1, -1))
        np.testing.assert_array_equal(window.pages, numbered_pages(range(63, -1, -1), PAGE))
        # Both are what the store has now, not what it had when it was opened.
        store.write(5, numbered_pages([1000], PAGE))
        window.remap([5], at=0)
        np.testing.assert_array_equal(window.pages[0], numbered_pages([1000], PAGE)[0])


def test_o16_one_call_scattered_on_both_sides(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(300)
    random = np.random.default_rng(16)
    slots = random.permutation(200)[:150]
    ids = random.integers(0, 300, 150)
    expected = np.arange(200)
    expected[slots] = ids
    with fremap.Window(store, 200, engine=engine, populate=True) as window:
        assert window.remap(ids, at=slots).all()
        np.testing.assert_array_equal(window.mapping, expected)
        np.testing.assert_array_equal(window.pages, numbered_pages(expected, PAGE))
        with pytest.raises(fremap.ArgumentError, match=str(slots[0])):
            window.remap([1, 2, 3], at=[slots[0], slots[1], slots[0]])
        np.testing.assert_array_equal(window.mapping, expected)


def test_o20_the_test_program_of_the_patch(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    """Write numbered pages, remap them backwards one by one, check each."""
    pages = 128
    store = numbered_store(pages)
    with fremap.Window(store, engine=engine, populate=True) as window:
        for page in range(pages):
            fremap.remap_file_pages(window, page * PAGE, PAGE, 0, pages - 1 - page)
        first_words = window.array("<u8", (pages, PAGE // 8))[:, 0]
        for page in range(pages):
            expected = numbered_pages([pages - 1 - page], PAGE).view("<u8")[0, 0]
            assert first_words[page] == expected


def test_o20_the_same_by_the_kernels_own_call(
    tmp_path: Path, numbered_file: Callable[..., Path], numbered_pages: Numbered
) -> None:
    """The oracle: what Linux does today, on the same file."""
    import mmap

    pages = 32
    with (
        numbered_file(pages, PAGE).open("r+b") as file,
        mmap.mmap(file.fileno(), pages * PAGE) as mapped,
    ):
        for page in range(pages):
            fremap.remap_file_pages(mapped, page * PAGE, PAGE, 0, pages - 1 - page)
        shown = np.frombuffer(mapped[:], dtype=np.uint8).reshape(pages, PAGE)
        np.testing.assert_array_equal(shown, numbered_pages(range(pages - 1, -1, -1), PAGE))
