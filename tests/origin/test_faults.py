"""O10, O11: pages that went come back as the right ones, by themselves."""

import os
import signal
import subprocess
import sys
import threading

import fremap
import numpy as np
import pytest

from .conftest import PAGE, MakeStore, Numbered

lazy = pytest.mark.parametrize("engine", ["alias", "paged"], indirect=True)


@lazy
def test_o10_a_dropped_nonlinear_page_comes_back_as_it_was(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(128)
    order = np.random.default_rng(10).permutation(128)
    with fremap.Window(store, engine=engine) as window:
        window.remap(order)
        window.evict(None)
        assert not window.present().any()
        np.testing.assert_array_equal(window.mapping, order)
        np.testing.assert_array_equal(window.pages, numbered_pages(order, PAGE))


def test_o10_and_by_a_call(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(64)
    order = np.random.default_rng(10).permutation(64)
    with fremap.Window(store, engine=engine) as window:
        window.remap(order)
        window.evict(range(10, 50))
        assert window.populate().all()
        np.testing.assert_array_equal(window.pages, numbered_pages(order, PAGE))


@lazy
def test_o11_pages_are_reinstalled_by_themselves(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(64)
    with fremap.Window(store, engine=engine) as window:
        window.remap(range(63, -1, -1), populate=False)
        np.testing.assert_array_equal(window.pages, numbered_pages(range(63, -1, -1), PAGE))
        if engine == "paged":
            assert window.stats().faults == 7  # which brought 1, 2, 4, 8, 16, 32 pages and the last


@pytest.mark.needs("paged")
def test_o11_many_threads_fault_on_the_same_pages(
    numbered_store: MakeStore, numbered_pages: Numbered
) -> None:
    store = numbered_store(256)
    order = np.random.default_rng(11).permutation(256)
    failures: list[BaseException] = []
    with fremap.Window(store, engine="paged") as window:
        window.remap(order, populate=False)
        memory = window.pages
        expected = numbered_pages(order, PAGE)

        def read(step: int) -> None:
            try:
                np.testing.assert_array_equal(memory[::step], expected[::step])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(step,)) for step in (1, -1, 3, -5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


@pytest.mark.needs("paged", "userfaultfd_kernel_faults")
def test_o11_system_calls_fault_too(numbered_store: MakeStore, numbered_pages: Numbered) -> None:
    store = numbered_store(16)
    target = os.memfd_create("target")
    with fremap.Window(store, engine="paged") as window, memoryview(window) as memory:
        assert os.write(target, memory[3 * PAGE : 9 * PAGE]) == 6 * PAGE
    assert os.pread(target, 6 * PAGE, 0) == numbered_pages(range(3, 9), PAGE).tobytes()
    os.close(target)


UNREADABLE = """
import fremap, os, sys
path = sys.argv[1]
with open(path, "wb") as file:
    file.truncate(8 * 4096)
store = fremap.open(path, page_bytes=4096)
window = fremap.Window(store, engine="paged")
os.truncate(path, 4096)
memory = memoryview(window)
assert memory[0] == 0
sys.stderr.write("touching\\n")
memory[5 * 4096]
"""


@pytest.mark.needs("paged")
def test_o11_a_page_that_cannot_be_read_is_sigbus_after_a_line(tmp_path: os.PathLike[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE, os.path.join(tmp_path, "short")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # Before Linux 6.6 the page is a mapping without access, whose touch is SIGSEGV.
    poisons = fremap.capabilities().probes["uffd_poison"].available
    end = signal.SIGBUS if poisons else signal.SIGSEGV
    assert done.returncode == -end, done.stderr
    before, after = done.stderr.split("touching\n")
    assert before == ""
    assert after.count("\n") == 1
    assert "window page 5" in after
    assert "file page 5" in after
