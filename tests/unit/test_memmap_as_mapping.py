"""`fremap.memmap` as the kernel's mapping that it is, and within its budget."""

from __future__ import annotations

import doctest
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.bench.memory import MemoryGroup

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = 1 << 14
BUDGET = 8 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB of int64 that are their own index, in rows of a page."""
    path = tmp_path_factory.mktemp("large") / "large"
    np.arange(ROWS * 512, dtype=np.int64).tofile(path)
    return path


def opened(path: Path, mode: str = "r", **options: Any) -> fremap.memmap:
    return fremap.memmap(path, np.int64, mode, shape=(ROWS, 512), **options)


def resident(array: fremap.memmap) -> int:
    stats = array.stats()
    return stats.mapped_bytes + stats.page_table_bytes


def until(condition: Callable[[], bool]) -> bool:
    """Wait, busy, as the trimmer sleeps while the process does."""
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            return False
    return True


# The budget


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_memory_keeps_to_the_budget(large: Path, mode: str) -> None:
    array = opened(large, mode, budget=BUDGET)
    for _ in range(3):
        assert int(array[:, 5].sum()) == int((np.arange(ROWS) * 512 + 5).sum())
        assert until(lambda: resident(array) <= BUDGET)
    assert array.stats().blocks_trimmed > 0
    assert array.stats().budget_bytes == BUDGET


def test_copies_on_write_outlive_what_is_trimmed(large: Path) -> None:
    array = opened(large, "c", budget=BUDGET)
    written = np.arange(3, ROWS, 41)
    stop = threading.Event()
    wrong: list[int] = []

    def scan() -> None:
        while not stop.is_set():
            wrong.extend(np.flatnonzero(np.asarray(array[:, 1]) != np.arange(ROWS) * 512 + 1))

    scanner = threading.Thread(target=scan)
    scanner.start()
    for row in written:
        array[row, 0] = -row
        assert array[row, 0] == -row
    stop.set()
    scanner.join()
    assert wrong == []
    for _ in range(2):
        shown = np.array(array[:, 0])
        assert (shown[written] == -written).all()
        shown[written] = written * 512
        assert (shown == np.arange(ROWS) * 512).all()
    assert array[[3, 0, 44, 7], 0].tolist() == [-3, 0, -44, 7 * 512]
    assert (np.fromfile(large, np.int64).reshape(ROWS, 512)[:, 0] == np.arange(ROWS) * 512).all()


def test_populate_and_evict(large: Path) -> None:
    array = opened(large, budget=None, advice="random")
    assert array.stats().mapped_bytes == 0
    array.populate(range(100, 200))
    assert array.stats().mapped_bytes >= 100 * 4096
    array.populate([3, -1])
    array[5000:5003].populate()
    present = array.window.present()
    assert present[[3, -1, 100, 199, 5000, 5002]].all()
    array.evict()
    assert array.stats().mapped_bytes == array.stats().page_table_bytes == 0
    array.populate(np.arange(ROWS) == 77)
    assert array.window.present()[77]
    array.evict(77)
    assert not array.window.present()[77]
    for rows in ([ROWS], -ROWS - 1, [0, 1 << 40]):
        with pytest.raises(fremap.PageRangeError, match="outside"):
            array.populate(rows)
    with pytest.warns(
        DeprecationWarning, match="MemmapStats.resident_bytes is now called mapped_bytes"
    ):
        assert array.stats().resident_bytes == array.stats().mapped_bytes
    stats = array.stats()
    assert stats.minor_faults + stats.major_faults > 0
    with pytest.raises(fremap.ArgumentError, match="not a view"):
        array.copy().stats()


def test_advice(large: Path) -> None:
    for advice in ("normal", "random", "sequential"):
        array = opened(large, advice=advice)
        assert array.stats().advice == advice
        assert array.window.advice == advice
        assert array[3, 3] == 3 * 512 + 3
    with pytest.raises(fremap.ArgumentError, match="advice is 'willneed'"):
        opened(large, advice="willneed")


MANY = """
import resource, sys, fremap, numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (1200, 1200))
arrays = [fremap.memmap(sys.argv[1], np.int64, "r", shape=(16384, 512)) for _ in range(1000)]
assert all(int(array[7, 7]) == 7 * 512 + 7 for array in arrays)
assert all(array[[9, 3, 9, 1]][:, 0].tolist() == [4608, 1536, 4608, 512] for array in arrays)
from pathlib import Path
names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
assert names.count("fremap-trim") <= 1
print(len(list(Path("/proc/self/fd").iterdir())))
"""


@pytest.mark.slow
def test_a_thousand_arrays_take_a_descriptor_each_and_one_thread(large: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY, large], check=True, timeout=120, capture_output=True, text=True
    )
    assert int(done.stdout) < 1100


# A mapping like any other


def test_it_is_numpys_class_and_pickle_finds_it() -> None:
    assert issubclass(fremap.memmap, np.memmap)
    assert pickle.loads(pickle.dumps(fremap.memmap)) is fremap.memmap
    # As torch's default_convert asks.
    assert fremap.memmap.__module__ == "numpy"


class Table(fremap.memmap):
    """A subclass, which pickle finds by its name."""


def test_subclasses_are_pickled(large: Path) -> None:
    assert pickle.loads(pickle.dumps(Table)) is Table
    again = pickle.loads(pickle.dumps(Table(large, np.int64, "r")))
    assert (type(again), int(again[9])) == (Table, 9)


def test_the_example_of_the_class() -> None:
    test = doctest.DocTestFinder().find(fremap.memmap, "memmap", module=False, globs={})
    results = doctest.DocTestRunner()
    for example in test:
        results.run(example)
    assert results.summarize(verbose=False).failed == 0
    assert results.tries > 0


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_child_of_fork_has_all_of_it_whatever_becomes_of_sigbus(
    large: Path, mode: str, in_child: Callable[[Callable[[], None]], int]
) -> None:
    array = opened(large, mode, budget=BUDGET)
    assert int(array[:, 0].sum()) == int((np.arange(ROWS) * 512).sum())

    def child() -> None:
        # As torch's workers and faulthandler do.
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        assert int(array[:, 0].sum()) == int((np.arange(ROWS) * 512).sum())
        assert array[[5, 1, 4, 2], 1].tolist() == [2561, 513, 2049, 1025]
        if mode == "r+":
            array[3, 3] = 33
            array.flush()

    assert in_child(child) == 0
    if mode == "r+":
        assert array[3, 3] == 33
        array[3, 3] = 3 * 512 + 3


def test_system_calls_read_and_write_it(large: Path, tmp_path: Path) -> None:
    array = opened(large, budget=BUDGET)
    with (tmp_path / "copy").open("wb") as file:
        assert os.write(file.fileno(), array[9000:9100]) == 100 * 4096
    assert (np.fromfile(tmp_path / "copy", np.int64) == np.asarray(array[9000:9100]).ravel()).all()
    other = fremap.memmap(tmp_path / "other", np.int64, "w+", shape=(100, 512), budget=BUDGET)
    with (tmp_path / "copy").open("rb") as file:
        assert file.readinto(other) == other.nbytes
    assert (other == array[9000:9100]).all()
    # Out of band, the buffer is the mapping itself.
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(np.asarray(array), protocol=5, buffer_callback=buffers.append)
    (tmp_path / "buffer").write_bytes(buffers[0].raw()[: 1 << 20])


def test_a_file_cut_within_its_last_page_shows_what_is_left_and_zeros(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    np.ones(8192, np.uint8).tofile(path)
    array, theirs = fremap.memmap(path, mode="r"), np.memmap(path, mode="r")
    os.truncate(path, 5000)
    assert array.sum() == theirs.sum() == 5000


def test_pages_dropped_by_others_lose_nothing(tmp_path: Path) -> None:
    array = fremap.memmap(tmp_path / "file", np.uint8, "w+", shape=1 << 16)
    array[:] = 7
    array._mmap.madvise(4)  # MADV_DONTNEED
    assert (array == 7).all()


def test_views_lead_to_an_mmap(large: Path) -> None:
    """By which joblib, and others, know that workers may map the file themselves."""
    import mmap

    array = opened(large)
    view = np.asarray(array)[3:, ::2]
    while not isinstance(view, fremap.memmap):
        view = view.base
    assert isinstance(view.base, mmap.mmap)
    assert view.base is array._mmap
    assert not memoryview(view.base).obj.closed
    with pytest.raises(BufferError):
        view.base.close()
    with pytest.raises(ValueError, match="WRITEABLE"):
        np.asarray(array).flags.writeable = True


def test_columns_of_rows(large: Path) -> None:
    array = opened(large)
    ids = [7, 3, -1, 100, 7]
    plain = np.asarray(array)
    for columns in (np.s_[:5], np.s_[::-3], np.s_[...], np.s_[510:]):
        found = array[ids, columns]
        np.testing.assert_array_equal(found, plain[ids, columns])
        assert type(found) is np.ndarray
        assert found.base is None
    for index in (np.s_[ids, 3], np.s_[ids, None], np.s_[ids, [1, 2, 3, 4, 5]], np.s_[[0] * 4, :9]):
        np.testing.assert_array_equal(array[index], plain[index])
    cube = array.reshape(ROWS, 8, 64)
    for index in (np.s_[ids, :, :3], np.s_[ids, 2:], np.s_[ids, ..., 1:]):
        np.testing.assert_array_equal(cube[index], plain.reshape(ROWS, 8, 64)[index])
    with pytest.raises(IndexError):
        array[ids, :3, :3]


# Files


@pytest.mark.parametrize("mode", ["ab+", "rb+", "wb+"])
def test_file_objects(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with path.open(mode) as file:
        array = fremap.memmap(file, mode="r+", shape=50)
    array[3] = 200
    array.flush()
    assert path.read_bytes()[3] == 200
    assert path.stat().st_size == (50 if mode == "wb+" else 100)


def test_pickle_opens_the_file_that_the_descriptor_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "file").write_bytes(directory.encode() * 64)
    monkeypatch.chdir(tmp_path / "a")
    with open("file", "rb") as file:
        monkeypatch.chdir(tmp_path / "b")
        array = fremap.memmap(file, mode="r")
    assert pickle.loads(pickle.dumps(array)).tobytes() == b"a" * 64
    monkeypatch.chdir(tmp_path / "a")
    data = pickle.dumps(fremap.memmap("file", mode="r"))
    monkeypatch.chdir(tmp_path / "b")
    assert pickle.loads(data).tobytes() == b"a" * 64


# Limits


IN_A_GROUP = """
import os, sys, fremap, numpy as np
input()
array = fremap.memmap(sys.argv[1], np.uint8, "r")
assert array[::4096].sum() == array.sum() == 0
print(array.stats().blocks_trimmed)
"""


@pytest.mark.slow
@pytest.mark.needs("memory_cgroup")
@pytest.mark.parametrize("parent", [False, True])
def test_a_default_array_is_scanned_under_a_limit_of_memory(tmp_path: Path, parent: bool) -> None:
    """In its own group's limit, and in a parent's."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    made = MemoryGroup.new("memmap")
    assert made is not None
    with made as group, ExitStack() as inner:
        command = [sys.executable, "-c", IN_A_GROUP, path]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        group.limit_further(300 << 20)
        where = inner.enter_context(group.child()) if parent else group
        where.add(process.pid)
        output, _ = process.communicate(b"\n", timeout=300)
        assert process.returncode == 0
        assert int(output) > 0


def test_large_pages_of_a_file_can_be_mapped_as_such(tmp_path: Path) -> None:
    """An array in memory that is not aligned as the file takes 32 times as many faults."""
    path, large = tmp_path / "array", 2 << 20
    array = fremap.memmap(path, np.uint8, "w+", shape=(3 * large + 4097,))
    assert array.size == 3 * large + 4097
    version = tuple(int(part) for part in os.uname().release.split(".")[:2])
    # Before, the kernel does not align memory; and its large pages are not of 2 MiB everywhere.
    aligns = version >= (6, 7) and mmap.PAGESIZE == 4096
    assert array.ctypes.data % large == 0 or not aligns
    with (
        fremap.open(path) as store,
        fremap.Window(store, engine="alias") as window,
    ):
        assert np.frombuffer(window, np.uint8).ctypes.data % large == 0


def test_the_window_of_an_array_is_not_closed_under_it(tmp_path: Path) -> None:
    """The array would go on, without its budget."""
    array = fremap.memmap(tmp_path / "array", np.uint8, "w+", shape=(1 << 16,))
    with pytest.raises(fremap.ViewsAliveError, match="the window shows an array"):
        array.window.close()
    with pytest.raises(fremap.ViewsAliveError), array.window:
        pass
    assert not array.window.closed
    array.evict()
