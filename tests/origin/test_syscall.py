"""O13: range and argument checks, errno for errno, and through to the kernel's own call."""

import errno
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap import MAP_NONBLOCK, remap_file_pages

from .conftest import PAGE, HalfCached, MakeStore, Numbered

FILE_PAGES = 32
WINDOW_PAGES = 16
END = WINDOW_PAGES * PAGE
READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC


@pytest.fixture
def window(numbered_store: MakeStore, engine: str) -> Iterator[fremap.Window]:
    """Sixteen pages, linear, of a store of 32."""
    with fremap.Window(
        numbered_store(FILE_PAGES), WINDOW_PAGES, engine=engine, populate=True
    ) as made:
        yield made


def test_o13_what_it_does(window: fremap.Window, numbered_pages: Numbered) -> None:
    remap_file_pages(window, 2 * PAGE, 3 * PAGE, 0, 20)
    # Sizes are rounded up, as they were in 2002.
    remap_file_pages(window, 8 * PAGE, PAGE + 1, READ, 30)
    remap_file_pages(window, 15 * PAGE, 1, 0, 0, 0)
    expected = [0, 1, 20, 21, 22, 5, 6, 7, 30, 31, 10, 11, 12, 13, 14, 0]
    assert window.mapping.tolist() == expected
    np.testing.assert_array_equal(window.pages, numbered_pages(expected, PAGE))


@pytest.mark.parametrize(
    ("start", "size", "prot", "pgoff"),
    [
        pytest.param(0, 0, 0, 0, id="empty"),
        pytest.param(0, -PAGE, 0, 0, id="negative size"),
        pytest.param(-PAGE, PAGE, 0, 0, id="before the window"),
        pytest.param(END, PAGE, 0, 0, id="behind the window"),
        pytest.param(END - PAGE, 2 * PAGE, 0, 0, id="across its end"),
        pytest.param(END - PAGE, PAGE + 1, 0, 0, id="across its end when rounded up"),
        pytest.param(0, 1 << 63, 0, 0, id="huge"),
        pytest.param(1 << 64, PAGE, 0, 0, id="beyond all addresses"),
        pytest.param(100, PAGE, 0, 0, id="start within a page"),
        pytest.param(0, PAGE, EXEC, 0, id="exec"),
        pytest.param(0, PAGE, READ | EXEC, 0, id="read and exec"),
        pytest.param(0, PAGE, 8, 0, id="no such protection"),
        pytest.param(0, PAGE, -1, 0, id="negative protection"),
    ],
)
def test_o13_einval(window: fremap.Window, start: int, size: int, prot: int, pgoff: int) -> None:
    with pytest.raises(fremap.RemapError, match="Invalid argument") as raised:
        remap_file_pages(window, start, size, prot, pgoff)
    assert isinstance(raised.value, OSError)
    assert raised.value.errno == errno.EINVAL
    assert window.mapping.tolist() == list(range(WINDOW_PAGES))


@pytest.mark.parametrize("pgoff", [FILE_PAGES, FILE_PAGES - 1, 1 << 64, -1])
def test_o13_file_pages_beyond_the_end(window: fremap.Window, pgoff: int) -> None:
    """EINVAL for a file, EFAULT for shared memory: each had a populate function of its own."""
    with pytest.raises(fremap.RemapError) as raised:
        remap_file_pages(window, 0, 2 * PAGE, 0, pgoff)
    memory = isinstance(window.store, fremap.MemoryStore)
    assert raised.value.errno == (errno.EFAULT if memory else errno.EINVAL)
    assert window.mapping.tolist() == list(range(WINDOW_PAGES))


@pytest.mark.parametrize("engine", ["paged", "eager"], indirect=True)
def test_o13_enomem_where_a_page_cannot_be_read(
    numbered_file: Callable[..., Path], engine: str
) -> None:
    path = numbered_file(FILE_PAGES, PAGE)
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, WINDOW_PAGES, engine=engine, populate=True) as window,
    ):
        with path.open("r+b") as file:
            file.truncate(WINDOW_PAGES * PAGE)
        with pytest.raises(fremap.RemapError) as raised:
            remap_file_pages(window, 0, PAGE, 0, 20)
        assert raised.value.errno == errno.ENOMEM
        assert isinstance(raised.value.__cause__, fremap.TruncatedError)


def test_o13_protection(window: fremap.Window) -> None:
    window.protect([4, 5], fremap.Prot.NONE)
    remap_file_pages(window, 4 * PAGE, PAGE, 0, 9)
    assert window.protection().tolist()[3:7] == [1, 0, 0, 1]
    remap_file_pages(window, 4 * PAGE, PAGE, READ, 9)
    assert window.protection().tolist()[3:7] == [1, 1, 0, 1]


def test_o13_writable_protection(numbered_store: MakeStore) -> None:
    store = numbered_store(4)
    with fremap.Window(store, prot=fremap.Prot.WRITE, coherent=True) as window:
        remap_file_pages(window, 0, PAGE, READ, 3)
        remap_file_pages(window, PAGE, PAGE, READ | WRITE, 2)
        assert window.protection().tolist() == [1, 3, 3, 3]
        remap_file_pages(window, 0, PAGE, WRITE, 3)
        assert window.protection().tolist() == [3] * 4


def test_o13_nonblock_is_honoured(half_cached: HalfCached, engine: str) -> None:
    path, cached = half_cached(128)
    with (
        fremap.open(path, page_bytes=PAGE) as store,
        fremap.Window(store, mapping="none", page_count=128, engine=engine) as window,
    ):
        remap_file_pages(window, 0, 128 * PAGE, 0, 0, MAP_NONBLOCK)
        assert window.mapping.tolist() == list(range(128))
        np.testing.assert_array_equal(window.present(), cached)


@pytest.mark.parametrize("wrong", [1.0, "0", None])
def test_o13_numbers_only(window: fremap.Window, wrong: object) -> None:
    with pytest.raises(TypeError):
        remap_file_pages(window, wrong, PAGE, 0, 0)


@pytest.fixture
def mapped(numbered_file: Callable[..., Path]) -> Iterator[mmap.mmap]:
    """A shared mapping of Python's own."""
    with (
        numbered_file(FILE_PAGES, PAGE).open("r+b") as file,
        mmap.mmap(file.fileno(), WINDOW_PAGES * PAGE) as made,
    ):
        yield made


def test_o13_the_kernels_call(mapped: mmap.mmap, numbered_pages: Numbered) -> None:
    remap_file_pages(mapped, 2 * PAGE, 3 * PAGE, 0, 20)
    shown = np.frombuffer(mapped[:], dtype=np.uint8).reshape(-1, PAGE)
    expected = [0, 1, 20, 21, 22, *range(5, WINDOW_PAGES)]
    np.testing.assert_array_equal(shown, numbered_pages(expected, PAGE))


@pytest.mark.parametrize(
    ("start", "size", "prot", "pgoff"),
    [
        pytest.param(0, 0, 0, 0, id="empty"),
        pytest.param(0, PAGE, READ, 0, id="any protection: EINVAL today"),
        pytest.param(END, PAGE, 0, 0, id="behind the mapping"),
        pytest.param(END - PAGE, 2 * PAGE, 0, 0, id="across its end"),
        pytest.param(-PAGE, PAGE, 0, 0, id="negative"),
        pytest.param(0, PAGE - 1, 0, 0, id="rounded down to nothing"),
        pytest.param(0, PAGE, 0, 1 << 64, id="no such page"),
        pytest.param(0, PAGE, 1 << 40, 0, id="no such protection"),
    ],
)
def test_o13_the_kernels_answers(
    mapped: mmap.mmap, start: int, size: int, prot: int, pgoff: int
) -> None:
    with pytest.raises(fremap.RemapError) as raised:
        remap_file_pages(mapped, start, size, prot, pgoff)
    assert raised.value.errno == errno.EINVAL


def test_o13_the_kernel_takes_pages_beyond_the_end(mapped: mmap.mmap) -> None:
    """Which the patch did not; the difference is documented, and a touch is SIGBUS."""
    remap_file_pages(mapped, 0, PAGE, 0, FILE_PAGES + 5)


def test_o13_private_memory_is_refused_by_the_kernel() -> None:
    with mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        with pytest.raises(fremap.RemapError) as raised:
            remap_file_pages(private, 0, PAGE, 0, 1)
        assert raised.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "shows",
    [
        pytest.param(memoryview, id="memoryview"),
        pytest.param(lambda window: memoryview(window)[PAGE:], id="part of a memoryview"),
        pytest.param(lambda window: window.pages, id="array"),
        pytest.param(lambda window: window.array("<u4", (-1, 1024))[1:], id="part of it"),
        pytest.param(lambda window: memoryview(window.pages), id="memoryview of an array"),
    ],
)
def test_o13_a_view_of_a_window_is_not_the_window(
    shows: Callable[[fremap.Window], object], numbered_store: MakeStore
) -> None:
    store = numbered_store(FILE_PAGES)
    with fremap.Window(store, prot=fremap.Prot.WRITE, coherent=True) as window:
        with pytest.raises(fremap.ArgumentError, match="give the Window"):
            remap_file_pages(shows(window), 0, PAGE, 0, 9)
        assert window.mapping.tolist() == list(range(FILE_PAGES))
        assert bytes(window.pages[0, :8]) == bytes(store.read(0)[0, :8])
