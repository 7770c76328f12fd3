"""O5, O6: protection with the remap, and page by page without a mapping a page."""

import errno
import os
import subprocess
import sys

import fremap
import numpy as np
import pytest
from fremap import Prot

from .conftest import PAGE, MakeStore, Numbered, maps_lines


def kernel_can_read(window: fremap.Window, page: int) -> bool:
    """Whether a system call may read a window page (EFAULT if not)."""
    target = os.memfd_create("target")
    try:
        with memoryview(window) as memory:
            os.write(target, memory[page * PAGE :][:PAGE])
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    finally:
        os.close(target)
    return True


def test_o5_new_protection_for_the_remapped_range(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(32)
    with fremap.Window(store, 16, engine=engine, populate=True) as window:
        window.remap([20, 21, 22], at=4, prot=Prot.NONE)
        assert window.mapping.tolist()[3:8] == [3, 20, 21, 22, 7]
        assert window.protection().tolist()[3:8] == [1, 0, 0, 0, 1]
        assert [kernel_can_read(window, page) for page in range(3, 8)] == [
            True,
            False,
            False,
            False,
            True,
        ]
        window.remap([25, 26, 27], at=4, prot=Prot.READ)
        assert window.protection().tolist() == [1] * 16
        np.testing.assert_array_equal(window.pages[4:7], numbered_pages([25, 26, 27], PAGE))


def test_o5_a_writable_window_becomes_read_only_in_part(numbered_store: MakeStore) -> None:
    store = numbered_store(16)
    with fremap.Window(store, prot=Prot.WRITE, coherent=True) as window:
        window.remap([9, 8], at=2, prot=Prot.READ)
        assert window.protection().tolist()[1:5] == [3, 1, 1, 3]
        # readinto stores by a system call: EFAULT where it may not.
        with memoryview(window) as memory, open("/dev/zero", "rb", buffering=0) as zero:
            assert zero.readinto(memory[PAGE : 2 * PAGE]) == PAGE
            with pytest.raises(OSError, match="Bad address"):
                zero.readinto(memory[2 * PAGE : 3 * PAGE])


TOUCH_DENIED = """
import fremap, sys
store = fremap.MemoryStore(4 * 4096, page_bytes=4096)
window = fremap.Window(store, engine=sys.argv[1], populate=True)
window.protect(2, fremap.Prot.NONE)
memory = memoryview(window)
memory[4096]
memory[2 * 4096]
"""


def test_o5_touching_a_denied_page_is_a_signal(engine: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOUCH_DENIED, engine], capture_output=True, timeout=60, check=False
    )
    assert done.returncode in (-7, -11), done.stderr


def test_o6_protection_keeps_the_content(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(32)
    order = np.random.default_rng(6).permutation(32)
    with fremap.Window(store, engine=engine) as window:
        window.remap(order)
        window.place(3, b"kept" * (PAGE // 4))
        window.protect(slice(None, None, 3), Prot.NONE)
        denied = np.arange(32) % 3 == 0
        np.testing.assert_array_equal(window.protection() == 0, denied)
        assert [kernel_can_read(window, page) for page in range(32)] == (~denied).tolist()
        # Populate leaves them denied.
        window.populate()
        assert not kernel_can_read(window, 6)
        window.protect(None, Prot.READ)
        window.populate()
        expected = numbered_pages(order, PAGE)
        expected[3] = np.frombuffer(b"kept" * (PAGE // 4), dtype=np.uint8)
        np.testing.assert_array_equal(window.pages, expected)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("paged", marks=pytest.mark.needs("paged", "uffd_poison")),
        pytest.param("eager", marks=pytest.mark.needs("eager", "guard_pages")),
    ],
    indirect=True,
)
def test_o6_every_second_page_adds_no_mapping(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(512)
    with fremap.Window(store, engine=engine, populate=True) as window:
        assert maps_lines(window) == 1
        window.protect(slice(None, None, 2), Prot.NONE)
        assert maps_lines(window) == 1
        assert window.vma_count == 1
        assert not kernel_can_read(window, 100)
        assert kernel_can_read(window, 101)
        window.protect(slice(None, None, 2), Prot.READ)
        assert maps_lines(window) == 1
        window.populate()
        np.testing.assert_array_equal(window.pages, numbered_pages(range(512), PAGE))


def test_o6_alias_adds_a_mapping_a_page(numbered_store: MakeStore) -> None:
    """What page protection costs without an engine: `mprotect` splits."""
    store = numbered_store(64)
    with fremap.Window(store, engine="alias", populate=True) as window:
        window.protect(slice(None, None, 2), Prot.NONE)
        assert maps_lines(window) == window.vma_count == 64
        window.protect(None, Prot.READ)
        assert maps_lines(window) == 1
