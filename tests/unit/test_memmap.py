"""`fremap.memmap`: what it shares with `numpy.memmap`, and what it does differently."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest

LENGTH = 5000
SOME = np.arange(LENGTH, dtype=np.int32)
# 8 MiB in memory at most, of an array of 64.
BUDGET = 8 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    SOME.tofile(path)
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """64 MiB of int64 that are their own index."""
    path = tmp_path / "large"
    np.arange(8 << 20, dtype=np.int64).tofile(path)
    return path


# Modes


def test_reading(path: Path) -> None:
    array = fremap.memmap(path, np.int32, "r")
    np.testing.assert_array_equal(array, SOME)
    assert isinstance(array, np.ndarray)
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.setflags(write=True)


def test_reading_and_writing(path: Path) -> None:
    array = fremap.memmap(path, np.int32, "r+")
    array[7] = -7
    array[-5:] *= 2
    array.flush()
    assert np.memmap(path, np.int32, "r")[7] == -7
    np.testing.assert_array_equal(np.fromfile(path, np.int32)[-5:], SOME[-5:] * 2)


def test_creating(path: Path) -> None:
    array = fremap.memmap(path, "f4", "w+", shape=(3, 4))
    assert not array.any()
    array[:] = np.arange(12).reshape(3, 4)
    del array
    assert path.stat().st_size == 48
    np.testing.assert_array_equal(np.memmap(path, "f4", "r"), np.arange(12))


def test_copy_on_write(path: Path) -> None:
    array = fremap.memmap(path, np.int32, "c")
    array[:] = 1
    array.flush()
    assert array.sum() == LENGTH
    del array
    np.testing.assert_array_equal(np.fromfile(path, np.int32), SOME)
    with pytest.raises(fremap.UnsupportedError, match="only in its memory"):
        fremap.memmap(path, np.int32, "c").evict()


@pytest.mark.parametrize(
    ("name", "mode"),
    [("readonly", "r"), ("readwrite", "r+"), ("write", "w+"), ("copyonwrite", "c")],
)
def test_modes_have_second_names(path: Path, name: str, mode: str) -> None:
    assert fremap.memmap(path, np.int32, name, shape=3).mode == mode


def test_what_is_written_is_seen_at_once_by_all_who_map_the_file(path: Path) -> None:
    array = fremap.memmap(path, np.int32, "r+", shape=10)
    other, theirs = fremap.memmap(path, np.int32, "r"), np.memmap(path, np.int32, "r+")
    array[0] = 5
    assert np.fromfile(path, np.int32, 1)[0] == other[0] == theirs[0] == 5
    theirs[1] = 6
    assert array[1] == other[1] == 6
    with path.open("r+b") as file:
        file.seek(8)
        file.write(np.int32(7).tobytes())
    assert (array[2], array[[0, 1, 2, 3]].tolist()) == (7, [5, 6, 7, 3])


AT_EXIT = """
import fremap, sys
array = fremap.memmap(sys.argv[1], "i4", "r+")
array[3] = 33
"""


def test_stores_reach_the_file_when_the_interpreter_ends(path: Path) -> None:
    subprocess.run([sys.executable, "-c", AT_EXIT, path], check=True, timeout=60)
    assert np.fromfile(path, np.int32)[3] == 33


# Files


def test_a_short_file_is_made_longer(path: Path) -> None:
    array = fremap.memmap(path, np.int32, "r+", offset=4, shape=LENGTH + 10)
    array[-1] = 9
    array.flush()
    assert path.stat().st_size == 4 + 4 * (LENGTH + 10)
    expected = np.concatenate([SOME[1:], np.zeros(10, np.int32), [9]])
    np.testing.assert_array_equal(np.fromfile(path, np.int32)[1:], expected)


def test_an_offset_past_the_end(path: Path) -> None:
    fremap.memmap(path, np.uint8, "r+", offset=100_000, shape=3)[:] = 1
    assert path.stat().st_size == 100_003
    assert np.fromfile(path, np.uint8)[-5:].tolist() == [0, 0, 1, 1, 1]


def test_a_file_of_no_bytes(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ValueError, match="empty file"):
        fremap.memmap(empty, mode="r")
    array = fremap.memmap(empty, mode="r+")
    assert (array.shape, array.mode, array.window) == ((0,), "r+", None)
    assert empty.stat().st_size == 1  # as with NumPy
    array.flush()


def test_an_array_of_no_elements_still_names_its_file(path: Path) -> None:
    for mode in ("r", "r+", "c"):
        array = fremap.memmap(path, np.int32, mode, offset=400, shape=(0, 3))
        assert (array.filename, array.offset, array.mode) == (path, 400, mode)
        assert type(array[:0]) is np.ndarray  # as with NumPy: it shares no memory
        assert array.flags.writeable == (mode != "r")
    assert fremap.memmap(path, np.int32, "r", offset=4 * LENGTH).shape == (0,)


def test_file_objects(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\1\0\0\0")  # still in the object's buffer
        array = fremap.memmap(file, np.int32, "r+")
        assert (array[0], array.filename) == (1, str(path))
    array[1] = 2  # the file is the array's own
    array.flush()
    assert np.fromfile(path, np.int32)[:3].tolist() == [1, 2, 2]
    with tempfile.TemporaryFile(dir=path.parent) as nameless:
        array = fremap.memmap(nameless, np.int32, "w+", shape=5)
        array[:] = 3
        array.flush()
        assert array.filename is None
        nameless.seek(0)
        assert nameless.read() == b"\3\0\0\0" * 5
    with pytest.raises(io.UnsupportedOperation):
        fremap.memmap(io.BytesIO(b"abc"))


def test_names_are_as_numpy_has_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    for name in ("numbers", Path("numbers"), str(path)):
        ours = fremap.memmap(name, np.int32, "r", offset=8)
        theirs = np.memmap(name, np.int32, "r", offset=8)
        assert type(ours.filename) is type(theirs.filename)
        assert (ours.filename, ours.offset, ours.mode) == (
            theirs.filename, theirs.offset, theirs.mode,
        )  # fmt: skip


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "rw"}, ValueError, "mode is 'rw'"),
        ({"mode": "w+"}, ValueError, "needs a shape"),
        ({"order": "A"}, ValueError, "order is 'A'"),
        ({"dtype": object}, TypeError, "dtype object"),
        ({"dtype": "S0"}, TypeError, "cannot lie"),
        ({"offset": -1}, ValueError, "offset is -1"),
        ({"offset": 2.0}, TypeError, "offset"),
        ({"offset": 4 * LENGTH + 1}, ValueError, "beyond the file's 20000"),
        ({"offset": 1}, ValueError, "not a whole number"),
        ({"shape": -1}, ValueError, "negative"),
        ({"shape": (2, -1)}, ValueError, "negative"),
        ({"shape": 2.5}, TypeError, "2.5"),
        ({"shape": LENGTH + 1}, ValueError, "file has 20000 bytes"),
        ({"shape": LENGTH, "offset": 4}, ValueError, "end at byte 20004"),
        ({"budget": 0}, ValueError, "budget is 0"),
        ({"mode": "r+", "shape": 1 << 61}, OSError, "cannot be made"),
        ({"mode": "r+", "shape": 1 << 80}, OSError, "cannot be made"),
        ({"shape": (1,) * 65}, ValueError, "shape has 65 axes"),
    ],
)
def test_arguments_that_cannot_be(
    path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        fremap.memmap(path, **{"dtype": np.int32, "mode": "r"} | options)
    assert isinstance(raised.value, fremap.FremapError)
    np.testing.assert_array_equal(np.fromfile(path, np.int32), SOME)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        fremap.memmap(tmp_path / "none")
    assert raised.value.filename == str(tmp_path / "none")


# Views, results, copies


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_what_becomes_of_it_has_the_kind_that_numpys_has(path: Path, mode: str) -> None:
    kinds: list[list[tuple[Any, ...]]] = []
    for memmap in (np.memmap, fremap.memmap):
        a = memmap(path, np.int32, mode, shape=(50, 100))
        results = [
            a[3], a[3:5], a[3, 4], a[[1, 2]], a[np.arange(20)], a[a > 5], a[..., 0], a[None],
            a[np.arange(50) > 3], a.T, a.reshape(100, 50), a.ravel(), a.flatten(), a.view(np.int16),
            a.view(np.ndarray), a + 1, a.sum(), a.sum(axis=0), np.sum(a), np.add(a, a),
            np.add.reduce(a), a.copy(), copy.copy(a), copy.deepcopy(a), a.astype(float), np.sqrt(a),
            a.real, np.asarray(a), np.array(a, subok=True), a.squeeze(), a.item(0), a.max(),
            a.mean(axis=1), np.concatenate([a, a]), np.where(a > 3, a, 0), a[5][2:7], a[()],
            np.empty_like(a), a == a, -a, abs(a), a.argsort(), np.sort(a), a[:, [1, 2]],
        ]  # fmt: skip
        kinds.append(
            [
                (
                    {memmap: "memmap"}.get(type(result), type(result).__name__),
                    getattr(result, "filename", None),
                    getattr(result, "mode", None),
                    getattr(result, "offset", None),
                    np.shape(result),
                )
                for result in results
            ]
        )
    assert kinds[0] == kinds[1]


def test_as_the_output_of_a_ufunc(path: Path) -> None:
    array = fremap.memmap(path, np.int32, "r+", shape=100)
    result = np.multiply(SOME[:100], 3, out=array)
    assert result is array
    array += 1
    assert type(array) is fremap.memmap
    array.flush()
    np.testing.assert_array_equal(np.fromfile(path, np.int32)[:100], SOME[:100] * 3 + 1)


def test_subclasses_keep_their_class(path: Path) -> None:
    class Table(fremap.memmap):
        pass

    table = Table(path, np.int32, "r")
    assert type(table[:3]) is Table
    assert type(table + 1) is Table
    assert type(table[np.arange(100)]) is Table


def test_results_and_copies_have_no_file(path: Path) -> None:
    for result in (fremap.memmap(path, np.int32, "r").copy(), np.empty_like(fremap.memmap(path))):
        assert (result.filename, result.offset, result.mode, result.window) == (None,) * 4
        result.flush()


@pytest.mark.parametrize("order", ["C", "F"])
def test_views_are_pickled_by_name(path: Path, order: str) -> None:
    array = fremap.memmap(path, np.int32, "r", offset=8, shape=(40, 100), order=order)
    for view in (
        array,
        array[7:9],
        array[::-2, 3:],
        array.T,
        array[4, 5:6],
        array[None],
    ):
        data = pickle.dumps(view)
        again = pickle.loads(data)
        np.testing.assert_array_equal(again, view)
        assert (type(again), again.strides) == (fremap.memmap, view.strides)
        assert (again.filename, again.mode, again.offset) == (path, "r", 8)
        assert len(data) < 1000
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(again)), view)


def test_a_created_file_is_not_created_again(path: Path) -> None:
    array = fremap.memmap(path, np.int32, "w+", shape=10)
    array[:] = 4
    array.flush()
    again = pickle.loads(pickle.dumps(array[3:]))
    assert again.tolist() == [4] * 7
    again[0] = 5
    again.flush()
    assert np.fromfile(path, np.int32)[3] == 5


def test_what_has_no_name_is_not_pickled_and_what_has_no_file_is_as_an_array(path: Path) -> None:
    with tempfile.TemporaryFile() as file:
        array = fremap.memmap(file, np.int32, "w+", shape=5)
        with pytest.raises(TypeError, match="open it by path"):
            pickle.dumps(array)
    private = fremap.memmap(path, np.int32, "c")
    private[0] = 9
    for result in (private, private.copy()):
        again = pickle.loads(pickle.dumps(result))
        assert type(again) is np.ndarray
        assert again[:2].tolist() == [9, 1]


def test_tofile_and_save(path: Path, tmp_path: Path) -> None:
    array = fremap.memmap(path, np.int32, "r", shape=(50, 100))
    for number, view in enumerate((array, array.T, array[:, ::2])):
        other = tmp_path / f"other{number}"
        view.tofile(other)
        np.testing.assert_array_equal(np.fromfile(other, np.int32), np.asarray(view).ravel())
        with other.open("wb") as file:
            file.write(b"head")
            view.tofile(file)
            assert file.tell() == 4 + view.nbytes
        np.save(other, view)
        np.testing.assert_array_equal(np.load(f"{other}.npy"), view)
    with (tmp_path / "numbered").open("wb") as file:
        with pytest.raises((TypeError, AttributeError)):
            array.tofile(file.fileno())
        os.fstat(file.fileno())
    array[0, :3].tofile(tmp_path / "text", sep=",")
    assert (tmp_path / "text").read_text() == "0,1,2"


# Memory


def test_a_large_array_is_whole(large: Path) -> None:
    array = fremap.memmap(large, np.int64, "r")
    assert array.sum() == (8 << 20) * ((8 << 20) - 1) // 2


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_rows_in_any_order_within_the_budget(large: Path, mode: str) -> None:
    array = fremap.memmap(large, np.int64, mode, shape=(1 << 14, 512), budget=BUDGET)
    rows = np.random.default_rng(1).integers(-(1 << 14), 1 << 14, 9000)
    expected = np.where(rows < 0, rows + (1 << 14), rows) * 512
    np.testing.assert_array_equal(array[rows][:, 0], expected)
    np.testing.assert_array_equal(array[rows.tolist()][:, 511], expected + 511)
    np.testing.assert_array_equal(
        array[rows.reshape(90, 100)][..., 3], expected.reshape(90, -1) + 3
    )
    mask = np.zeros(1 << 14, bool)
    mask[rows] = True
    np.testing.assert_array_equal(array[mask][:, 0], np.flatnonzero(mask) * 512)
    # What rows are copied from is a part of the budget.
    assert BUDGET // 2 < array.stats().budget_bytes <= BUDGET - BUDGET // 4


def test_gathered_rows_show_what_was_stored(large: Path) -> None:
    array = fremap.memmap(large, np.int64, "r+", budget=BUDGET)
    rows = np.random.default_rng(2).permutation(8 << 20)[:5000]
    array[rows] = -rows
    np.testing.assert_array_equal(array[rows], -rows)
    np.testing.assert_array_equal(array[1000:][rows[rows >= 1000] - 1000], -rows[rows >= 1000])
    del array
    np.testing.assert_array_equal(np.fromfile(large, np.int64)[rows], -rows)


SCAN = """
import fremap, numpy as np, sys, threading
from pathlib import Path

def rss():
    fields = Path("/proc/self/status").read_text()
    return sum(int(fields.split(name + ":")[1].split()[0]) for name in ("VmRSS", "VmPTE")) * 1024

path, mode, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
array = fremap.memmap(path, np.int64, mode, budget=budget)
assert array.nbytes >= 8 * budget
array[: budget // 16].sum()  # half of the budget: the engine's threads are there
before, most = rss(), 0
step = 1 << 17
for begin in range(0, array.size, step):
    part = array[begin : begin + step]
    assert part.sum() == (begin + begin + step - 1) * step // 2
    if mode == "r+":
        part += 0
    # The trimmer looks every few milliseconds: it is let come.
    while rss() - before > 1.1 * budget:
        pass
    most = max(most, rss())
print(most - before)
"""


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_scan_of_many_times_the_budget_leaves_memory_flat(large: Path, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCAN, large, mode, str(BUDGET)],
        capture_output=True, text=True, timeout=80, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= BUDGET * 1.1


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_child_of_fork_reads(
    large: Path, mode: str, in_child: Callable[[Callable[[], None]], int]
) -> None:
    array = fremap.memmap(large, np.int64, mode, shape=(1 << 14, 512))
    assert array[5:900, 7].sum() == sum(range(5, 900)) * 512 + 895 * 7
    rows = np.random.default_rng(3).permutation(1 << 14)[:500]

    def child() -> None:
        assert (array[rows][:, 9] == rows * 512 + 9).all()
        assert array[:, 0].sum() == sum(range(1 << 14)) * 512
        if mode == "r":
            assert pickle.loads(pickle.dumps(array[3])).tolist() == list(range(1536, 2048))

    assert in_child(child) == 0
    assert (array[rows][:, 9] == rows * 512 + 9).all()


def test_threads_read_and_gather_at_once(large: Path) -> None:
    array = fremap.memmap(large, np.int64, "r", shape=(1 << 14, 512))
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            rows = random.integers(0, 1 << 14, 300)
            found = array[rows, 1] if seed % 2 else array[rows][:, 1]
            wrong.extend(rows[found != rows * 512 + 1].tolist())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_stays_open(path: Path) -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        fremap.memmap(path, np.int32, "r+")[:10].sum()
    with pytest.raises(ValueError, match="file has"):
        fremap.memmap(path, mode="r", shape=1 << 40)
    # Fewer where a thread of an earlier test has ended meanwhile.
    assert set(os.listdir("/proc/self/fd")) <= before
