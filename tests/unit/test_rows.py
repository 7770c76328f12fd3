"""Rows as Python sees them: what is taken, into what, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import errno
import os
import pickle
import resource
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.errors import ArgumentError, ArgumentTypeError, ClosedError, PageRangeError
from fremap.testing import counting, wait_until_settled

if TYPE_CHECKING:
    from pathlib import Path

ROW_COUNT = 5000

MakeRows = Callable[..., Any]


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 1 << 16, (ROW_COUNT, 7), dtype=np.uint16)


@pytest.fixture
def path(table: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "table.npy", table)
    wait_until_settled(tmp_path / "table.npy")
    return tmp_path / "table.npy"


def warm(rows: Any) -> None:
    """Take until rows are copied from the page cache, where this process can."""
    for _ in range(3):
        rows.take(np.arange(0, len(rows), max(len(rows) // 64, 1)))


INDEXES = [
    3,
    -1,
    np.int32(4),
    slice(None),
    slice(10, 4000, 7),
    slice(-5, None),
    slice(100, 50, -3),
    slice(7, 7),
    range(5, 9),
    range(9, 5, -2),
    range(-3, 0),
    [],
    [5, 5, 0, -1, -ROW_COUNT, 4999],
    (1, 2),
    [[1, 2], [3, -4]],
    np.arange(4999, -1, -1, dtype=np.int32),
    np.arange(20, dtype=np.uint64).reshape(2, 5, 2),
    np.zeros((0, 3), dtype=np.int8),
]


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_rows_are_those_of_numpy(path: Path, table: np.ndarray, index: Any) -> None:
    with fremap.rows(path) as rows:
        expected = table[list(index) if isinstance(index, tuple) else index]
        for _ in range(2):  # read, then copied
            taken = rows.take(index)
            assert taken.dtype == table.dtype
            assert taken.shape == expected.shape
            np.testing.assert_array_equal(taken, expected)
            if not isinstance(index, tuple):
                np.testing.assert_array_equal(rows[index], expected)
            warm(rows)


def test_properties(path: Path, table: np.ndarray) -> None:
    with fremap.rows(path) as rows:
        assert len(rows) == ROW_COUNT
        assert (rows.dtype, rows.dtype_name) == (np.uint16, "uint16")
        assert (rows.shape, rows.ndim, rows.row_shape) == (table.shape, 2, (7,))
        assert (rows.row_bytes, rows.nbytes) == (14, table.nbytes)
        assert rows.shard_rows.tolist() == [ROW_COUNT]
        assert repr(rows) == f"<fremap.Rows {path}: 5000 rows of uint16 (7,)>"
        assert not rows.closed
        np.testing.assert_array_equal(np.asarray(rows), table)
        np.testing.assert_array_equal(np.stack(list(rows)[:3]), table[:3])


def test_a_mask(path: Path, table: np.ndarray) -> None:
    mask = table[:, 0] % 3 == 0
    with fremap.rows(path) as rows:
        np.testing.assert_array_equal(rows[mask], table[mask])
        assert rows[np.zeros(ROW_COUNT, dtype=bool)].shape == (0, 7)
        with pytest.raises(IndexError, match=r"mask of shape \(4,\) for 5000 rows"):
            rows[np.ones(4, dtype=bool)]


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (ROW_COUNT, PageRangeError, "row 5000 is outside"),
        (-ROW_COUNT - 1, PageRangeError, "row -5001 is outside"),
        ([0, 1, -5001, 7000], PageRangeError, "row -5001 is outside"),
        (range(4999, 5001), PageRangeError, "is outside"),
        (range(4998, 5003, 2), PageRangeError, "is outside"),
        (np.array([2**63], dtype=np.uint64), PageRangeError, "is outside"),
        ([2**70], ArgumentError, "does not fit into 64 bits"),
        (np.array([1, 2**70], object), ArgumentError, f"{2**70} does not fit into 64 bits"),
        (np.array([1], object), ArgumentTypeError, "not by an array of object"),
        ([1, None], ArgumentTypeError, "not by a list with a NoneType in it"),
        (1.0, ArgumentTypeError, "float"),
        ([1, True], ArgumentTypeError, "bool"),
        ([[1], [2.0]], ArgumentTypeError, "float"),
        (True, ArgumentTypeError, "bool"),
        (np.ones(ROW_COUNT, dtype=bool), ArgumentTypeError, "rows\\[mask\\]"),
        ("3", ArgumentTypeError, "str"),
        (None, ArgumentTypeError, "NoneType"),
        ([[1, 2], [3]], ArgumentTypeError, "integers"),
    ],
    ids=str,
)
def test_ids_that_are_none(path: Path, ids: Any, error: type[Exception], text: str) -> None:
    with fremap.rows(path) as rows, pytest.raises(error, match=text):
        rows.take(ids)


class Tensor:
    """What a tensor of another library shows of itself."""

    def __init__(self, array: np.ndarray, *, copies: bool = False) -> None:
        self.array = array
        self.copies = copies

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array.copy() if self.copies else self.array


def test_out_of_each_kind(path: Path, table: np.ndarray) -> None:
    ids = [9, 0, -1]
    with fremap.rows(path) as rows:
        array = np.empty((3, 7), np.uint16)
        assert rows.take(ids, out=array) is array
        np.testing.assert_array_equal(array, table[ids])
        plain = bytearray(3 * 14)
        assert np.shares_memory(rows.take(ids, out=plain), np.frombuffer(plain, np.uint8))
        assert bytes(plain) == table[ids].tobytes()
        tensor = Tensor(np.empty((3, 7), np.uint16))
        rows.take(ids, out=tensor)
        np.testing.assert_array_equal(tensor.array, table[ids])
        part = np.zeros((9, 7), np.uint16)
        rows.take(ids, out=part[3:6])
        np.testing.assert_array_equal(part[3:6], table[ids])
        assert not part[:3].any()
        assert not part[6:].any()


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.empty((3, 7), np.int16), ArgumentError),
        (np.empty((2, 7), np.uint16), ArgumentError),
        (np.empty(21, np.uint16), ArgumentError),
        (np.empty((7, 3), np.uint16).T, ArgumentError),
        (np.empty((3, 14), np.uint16)[:, ::2], ArgumentError),
        (bytearray(41), ArgumentError),
        (bytes(42), ArgumentError),
        (Tensor(np.empty((3, 7), np.uint16), copies=True), ArgumentTypeError),
        ([0] * 21, ArgumentTypeError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_out_that_is_none(path: Path, out: Any, error: type[Exception]) -> None:
    before = bytes(out) if isinstance(out, bytearray) else None
    with fremap.rows(path) as rows, pytest.raises(error, match="out"):
        rows.take([1, 2, 3], out=out)
    assert before is None or bytes(out) == before


def test_ids_and_out_may_be_one_memory(path: Path, table: np.ndarray) -> None:
    """The numbers are copied before the first row is."""
    memory = np.empty(100 * 14, np.uint8)
    memory[: 8 * 100] = np.arange(4900, 5000, dtype=np.int64).view(np.uint8)
    with fremap.rows(path) as rows:
        warm(rows)
        rows.take(memory[: 8 * 100].view(np.int64), out=memory)
    np.testing.assert_array_equal(memory.view(np.uint16).reshape(100, 7), table[4900:])


def test_out_in_a_window(engine: str, path: Path, table: np.ndarray) -> None:
    ids = np.random.default_rng(3).integers(0, ROW_COUNT, 2000)
    with (
        fremap.rows(path) as rows,
        fremap.MemoryStore(16 * 4096) as store,
        fremap.Window(
            store, prot=fremap.Prot.WRITE, coherent=engine == "alias", engine=engine, populate=True
        ) as window,
    ):
        if engine == "paged":
            window.evict(None)
        out = window.array(np.uint16)[: 2000 * 7].reshape(2000, 7)
        for _ in range(3):
            out[:] = 0
            rows.take(ids, out=out)
            np.testing.assert_array_equal(out, table[ids])
        del out


@pytest.mark.needs("sigbus_recovery", "populate_read")
def test_warm_rows_take_no_system_call_each(path: Path, table: np.ndarray) -> None:
    ids = np.random.default_rng(5).permutation(ROW_COUNT)
    with fremap.rows(path) as rows:
        warm(rows)
        before = rows.stats()
        with counting() as calls:
            np.testing.assert_array_equal(rows.take(ids), table[ids])
        after = rows.stats()
    assert after.rows_copied - before.rows_copied == ROW_COUNT
    assert after.rows_read == before.rows_read
    assert sum(calls.made.values()) <= 4, calls.made


def test_stats_add_up(path: Path) -> None:
    with fremap.rows(path) as rows:
        for count in (1, 10, 500):
            rows.take(np.arange(count))
        stats = rows.stats()
    assert stats.takes == 3
    assert stats.rows_copied + stats.rows_read == 511
    assert stats.open_files == 1
    assert stats.budget_bytes > 0
    assert stats.page_table_bytes == -(-stats.mapped_bytes // (2 << 20)) * 4096


@pytest.mark.needs("sigbus_recovery", "populate_read")
def test_the_budget_bounds_what_is_mapped(tmp_path: Path) -> None:
    """Three chunks fit; rows come from ten."""
    chunk_rows = (2 << 20) // 512
    table = np.arange(10 * chunk_rows * 128, dtype=np.uint32).reshape(-1, 128)
    table.tofile(tmp_path / "raw")
    budget = 3 * (2 << 20) + 10 * 4096  # where page tables stay, too
    draw = np.random.default_rng(1)
    with fremap.rows(tmp_path / "raw", np.uint32, 128, budget=budget) as rows:
        most = 0
        for _ in range(30):
            ids = draw.integers(0, len(rows), 1000)
            np.testing.assert_array_equal(rows.take(ids), table[ids])
            stats = rows.stats()
            most = max(most, stats.mapped_bytes)
            assert stats.mapped_bytes + stats.page_table_bytes <= budget
        assert most == 3 * (2 << 20)
        # Who stays with other rows gets their chunks mapped in the end.
        for _ in range(40):
            ids = draw.integers(9 * chunk_rows, 10 * chunk_rows, 1000)
            np.testing.assert_array_equal(rows.take(ids), table[ids])
        before = rows.stats()
        rows.take(ids)
        assert rows.stats().rows_copied - before.rows_copied == 1000
        assert rows.stats().mapped_bytes + rows.stats().page_table_bytes <= budget


@pytest.mark.parametrize("budget", [0, -1, True, "much", 1.5])
def test_budgets_that_are_none(path: Path, budget: Any) -> None:
    with pytest.raises(ArgumentError, match="budget"):
        fremap.rows(path, budget=budget)


def test_threads_take_at_once(path: Path, table: np.ndarray) -> None:
    wrong: list[str] = []
    with fremap.rows(path) as rows:

        def work(seed: int) -> None:
            draw = np.random.default_rng(seed)
            out = np.empty((300, 7), np.uint16)
            for _ in range(40):
                ids = draw.integers(-ROW_COUNT, ROW_COUNT, 300)
                if not np.array_equal(rows.take(ids, out=out), table[ids]):
                    wrong.append(f"thread {seed}")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert rows.stats().takes == 160
    assert wrong == []


def test_async_takes_leave_the_loop_running(path: Path, table: np.ndarray) -> None:
    ids = np.arange(0, ROW_COUNT, 3)

    async def main() -> None:
        with fremap.rows(path) as rows:
            turns = 0

            async def turn() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            turning = asyncio.create_task(turn())
            mine = ids.copy()
            takes = [asyncio.create_task(rows.take_async(mine)) for _ in range(8)]
            await asyncio.sleep(0)
            mine[:] = 0  # what was asked for stays what it was
            for taken in await asyncio.gather(*takes):
                np.testing.assert_array_equal(taken, table[ids])
            assert turns > 2
            turning.cancel()
            out = np.empty((2, 7), np.uint16)
            assert await rows.take_async([1, -1], out=out) is out
            np.testing.assert_array_equal(out, table[[1, -1]])
            with pytest.raises(IndexError):
                await rows.take_async([ROW_COUNT])

    asyncio.run(main())


def test_a_cancelled_take_breaks_nothing(path: Path, table: np.ndarray) -> None:
    async def main() -> None:
        with fremap.rows(path) as rows:
            many = np.arange(ROW_COUNT).repeat(100)  # not done before they are cancelled
            tasks = [asyncio.create_task(rows.take_async(many)) for _ in range(20)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            # One that had ended before it was cancelled (without a GIL) has its rows.
            taken = [end for end in ended if not isinstance(end, asyncio.CancelledError)]
            assert len(taken) < len(ended)
            for rows_taken in taken:
                np.testing.assert_array_equal(rows_taken, table[many])
            np.testing.assert_array_equal(await rows.take_async([7]), table[[7]])

    asyncio.run(main())


def test_closed(path: Path) -> None:
    rows = fremap.rows(path)
    warm(rows)
    rows.close()
    rows.close()
    assert rows.closed
    assert "closed" in repr(rows)
    assert rows.stats().open_files == 0
    assert rows.stats().mapped_bytes == 0
    with pytest.raises(ClosedError, match="closed"):
        rows.take([0])
    with pytest.raises(ClosedError, match="closed"):
        asyncio.run(rows.take_async([0]))
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(rows)


def test_pickle_opens_again(path: Path, table: np.ndarray) -> None:
    with fremap.rows([path, path], budget=1 << 22) as rows:
        for other in (pickle.loads(pickle.dumps(rows)), copy.copy(rows)):
            with other:
                assert other.shape == (2 * ROW_COUNT, 7)
                assert other.stats().budget_bytes == 1 << 22
                np.testing.assert_array_equal(other[[0, 5001]], table[[0, 1]])
        kept = pickle.dumps(rows)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="it is another file"):
        pickle.loads(kept)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(kept)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_stores_are_sources(kind: str, tmp_path: Path, table: np.ndarray) -> None:
    content = table.tobytes()
    if kind == "file":
        (tmp_path / "raw").write_bytes(content)
        store: Any = fremap.open(tmp_path / "raw", "r+")
    else:
        store = fremap.MemoryStore(len(content))
        whole = -(-len(content) // store.page_bytes) * store.page_bytes
        store.write(None, content + bytes(whole - len(content)))
    with store, fremap.rows(store, np.uint16, 7) as rows:
        ids = np.random.default_rng(2).permutation(ROW_COUNT)
        for _ in range(4):
            np.testing.assert_array_equal(rows[ids], table[ids])
        # What is written to the store is seen.
        store.write(0, bytes(4096))
        assert not rows[:290].any()


def test_holes_of_shared_memory_stay_holes() -> None:
    with fremap.MemoryStore(64 << 20) as store:
        store.write(0, b"\x01" * 4096)
        with fremap.rows(store, np.uint8, 4096) as rows:
            for _ in range(8):
                taken = rows.take(np.arange(0, len(rows), 7))
                assert taken[0].all()
                assert not taken[1:].any()
        assert np.count_nonzero(store.resident()) == 1


def test_rows_without_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "thin.npy", np.empty((9, 0), np.float32))
    np.save(tmp_path / "none.npy", np.empty((0, 3), np.float32))
    with fremap.rows(tmp_path / "thin.npy") as rows:
        assert rows[[8, 0]].shape == (2, 0)
        with pytest.raises(IndexError):
            rows.take([9])
    with fremap.rows(tmp_path / "none.npy") as rows:
        assert rows[:].shape == (0, 3)
        with pytest.raises(IndexError):
            rows.take([0])
        with pytest.raises(IndexError):
            rows[-1]


# What NumPy takes between the brackets.


def test_a_list_or_a_series_of_bools_is_a_mask(path: Path, table: np.ndarray) -> None:
    class Series:
        """As pandas has it: a dtype, a shape, and an array when asked."""

        dtype, shape = np.dtype(bool), (ROW_COUNT,)

        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            return mask

    mask = np.random.default_rng(3).random(ROW_COUNT) < 0.1
    with fremap.rows(path) as rows:
        for index in (mask, mask.tolist(), list(mask), Series()):
            np.testing.assert_array_equal(rows[index], table[mask])
        with pytest.raises(fremap.PageRangeError, match="one bool a row"):
            rows[[True, False]]
        with pytest.raises(fremap.ArgumentTypeError, match="not bool"):
            rows[[True, 1]]


def test_unsigned_beside_negative_ids(path: Path, table: np.ndarray) -> None:
    with fremap.rows(path) as rows:
        np.testing.assert_array_equal(rows.take([np.uint64(2), -1]), table[[2, -1]])
        np.testing.assert_array_equal(rows[[[np.uint64(2)], [-1]]], table[[[2], [-1]]])
        with pytest.raises(fremap.PageRangeError, match=f"row {2**64 - 1} is outside"):
            rows.take([np.uint64(2**64 - 1), -1])


def test_rows_are_iterated_one_by_one(table: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", table[:9])
    with fremap.rows(tmp_path / "few.npy") as rows:
        found = list(iter(rows))
    np.testing.assert_array_equal(found, table[:9])


# Another file at the path.


def replace(path: Path, table: np.ndarray) -> None:
    """As an atomic save does it."""
    np.save(path.with_name("new.npy"), table)
    path.with_name("new.npy").rename(path)


def test_a_replaced_file_goes_on_as_long_as_it_is_open(path: Path, table: np.ndarray) -> None:
    with fremap.rows(path) as rows:
        np.testing.assert_array_equal(rows[:5], table[:5])
        replace(path, table + 1)
        for _ in range(3):
            np.testing.assert_array_equal(rows.take(np.arange(ROW_COUNT)), table)
    with fremap.rows(path) as rows:
        np.testing.assert_array_equal(rows[:], table + 1)


def test_a_replaced_file_that_has_to_be_opened_is_an_error(path: Path, table: np.ndarray) -> None:
    with fremap.rows(path) as rows:
        replace(path, table + 1)
        with pytest.raises(fremap.StoreError) as caught:
            rows[3]
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, str(path))


def test_a_replaced_file_that_was_closed_for_others(table: np.ndarray, tmp_path: Path) -> None:
    """Mapped or not: with its descriptor gone it cannot be told from the new one."""
    paths = [tmp_path / f"{number}.npy" for number in range(64)]
    for path in paths:
        np.save(path, table[:64])
        wait_until_settled(path)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = len(os.listdir("/proc/self/fd")) + 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limit[1]))  # a quarter may be open
    try:
        with fremap.rows(paths) as rows:
            for _ in range(3):
                rows.take(np.arange(64))  # of the first file
            for number in range(1, 64):
                rows.take([64 * number])
            assert rows.stats().open_files <= most // 4 < 63
            replace(paths[0], table[:64] + 1)
            with pytest.raises(fremap.StoreError) as caught:
                rows.take(np.arange(64))
            assert caught.value.errno == errno.ESTALE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
