"""Rows past the page cache: the same rows, and nothing of them stays there."""

from __future__ import annotations

import errno
import os
import pickle
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.errors import StoreError, TruncatedError, UnsupportedError
from fremap.testing import counting, failures, wait_until_settled
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.any_user

ROW_BYTES = 160
ROW_COUNT = 60_000
FILES = 3
OFFSET = 72


def resident(path: Path) -> int:
    """Return how many pages of a file are in the page cache."""
    with fremap.open(path) as store:
        return int(np.count_nonzero(store.resident()))


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (FILES * ROW_COUNT, ROW_BYTES), np.uint8)


@pytest.fixture(scope="module")
def paths(table: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("direct")
    made = []
    for number in range(FILES):
        path = folder / f"{number}.bin"
        part = table[number * ROW_COUNT : (number + 1) * ROW_COUNT]
        path.write_bytes(bytes(OFFSET) + part.tobytes())
        drop(path)
        wait_until_settled(path)
        made.append(path)
    return made


@pytest.fixture
def rows(paths: list[Path]) -> Iterator[fremap.Rows]:
    with fremap.rows(paths, np.uint8, ROW_BYTES, offset=OFFSET, direct=True) as opened:
        yield opened


def test_nothing_stays_in_the_page_cache(
    paths: list[Path], table: np.ndarray, rows: fremap.Rows
) -> None:
    before = [resident(path) for path in paths]
    draw = np.random.default_rng(1)
    for count in (1, 3, 18, 700, 20_000):
        ids = draw.integers(0, len(table), count)
        np.testing.assert_array_equal(rows.take(ids), table[ids])
    np.testing.assert_array_equal(rows[59_990:60_010], table[59_990:60_010])
    np.testing.assert_array_equal(rows[:], table)
    assert [resident(path) for path in paths] == before
    stats = rows.stats()
    assert (stats.rows_copied, stats.mapped_bytes) == (0, 0)
    assert stats.rows_read == 1 + 3 + 18 + 700 + 20_000 + 20 + len(table)


def test_each_block_is_read_once(rows: fremap.Rows, table: np.ndarray) -> None:
    """All rows of a stretch, in any order and each ten times, are as many bytes as it has."""
    ids = np.random.default_rng(2).permutation(np.arange(5000, 9000).repeat(10))
    with counting() as calls:
        np.testing.assert_array_equal(rows.take(ids), table[ids])
    stats = rows.stats()
    assert 4000 * ROW_BYTES <= stats.bytes_read <= 4000 * ROW_BYTES + 2 * 4096 * stats.reads
    assert stats.reads <= 4
    assert calls.made.get("fstat", 0) <= 2


@pytest.mark.parametrize("kind", ["direct", "plain"])
def test_rows_of_a_direct_store_are_direct(kind: str, paths: list[Path], table: np.ndarray) -> None:
    before = resident(paths[1])
    ids = np.random.default_rng(4).integers(0, ROW_COUNT, 2000)
    with (
        fremap.open(paths[1], direct=kind == "direct") as store,
        fremap.rows(store, np.uint8, ROW_BYTES, offset=OFFSET, direct=kind == "plain") as rows,
    ):
        np.testing.assert_array_equal(rows.take(ids), table[ROW_COUNT + ids])
    assert resident(paths[1]) == before


def test_what_was_written_through_the_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(ROW_BYTES * 100))
    with (
        fremap.rows(path, np.uint8, ROW_BYTES, direct=True) as rows,
        path.open("r+b", buffering=0) as file,
    ):
        for number in range(1, 50):
            os.pwrite(file.fileno(), bytes([number]) * ROW_BYTES, 7 * ROW_BYTES)
            assert (rows[7] == number).all()


@pytest.mark.parametrize("size", [100, 511, 4096, 70_001, (256 << 10) + 1, 3 << 20])
def test_rows_of_any_size(size: int, tmp_path: Path) -> None:
    count = max(12 * (1 << 20) // size // 2, 5)
    table = np.random.default_rng(size).integers(0, 256, (count, size), np.uint8)
    path = tmp_path / "file"
    path.write_bytes(b"head" * 5 + table.tobytes())
    ids = np.random.default_rng(3).integers(0, count, min(count, 300))
    with fremap.rows(path, np.uint8, size, offset=20, direct=True) as rows:
        np.testing.assert_array_equal(rows.take(ids), table[ids])
        np.testing.assert_array_equal(rows[:], table)
        np.testing.assert_array_equal(rows[1:-1], table[1:-1])
        np.testing.assert_array_equal(rows.take([count - 1] * 3), table[[count - 1] * 3])


@given(data=st.data())
def test_any_rows(paths: list[Path], table: np.ndarray, data: Any) -> None:
    ids = data.draw(st.lists(st.integers(-len(table), len(table) - 1), max_size=300))
    start = data.draw(st.integers(0, len(table)))
    stop = data.draw(st.integers(0, len(table)))
    with fremap.rows(paths, np.uint8, ROW_BYTES, offset=OFFSET, direct=True) as rows:
        np.testing.assert_array_equal(rows.take(ids), table[np.array(ids, np.int64)])
        np.testing.assert_array_equal(rows[start:stop], table[start:stop])


def test_a_file_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    table = np.random.default_rng(5).integers(1, 256, (1000, ROW_BYTES), np.uint8)
    table.tofile(path)
    with fremap.rows(path, np.uint8, ROW_BYTES, direct=True) as rows:
        os.truncate(path, 500 * ROW_BYTES + 80)
        np.testing.assert_array_equal(rows.take([499, 3]), table[[499, 3]])
        for ids in ([500], [1, 500, 2], slice(400, 600), np.arange(1000)):
            with pytest.raises(TruncatedError, match="row 500"):
                rows.take(ids)


def failure_of(rows: fremap.Rows, ids: np.ndarray, out: np.ndarray) -> StoreError | None:
    try:
        rows.take(ids, out=out)
    except StoreError as error:
        return error
    return None


@pytest.mark.parametrize("call", ["read", "io_uring_enter", "io_uring_setup", "stat", "open"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR])
def test_calls_that_fail(paths: list[Path], table: np.ndarray, call: str, number: int) -> None:
    draw = np.random.default_rng(6)
    for skip in range(5):
        ids = draw.integers(0, len(table), 300)
        with fremap.rows(paths, np.uint8, ROW_BYTES, offset=OFFSET, direct=True) as rows:
            out = np.zeros((300, ROW_BYTES), np.uint8)
            with failures(call, errno=number, skip=skip, times=1):
                failed = failure_of(rows, ids, out)
            if failed is None:
                np.testing.assert_array_equal(out, table[ids])
            else:
                assert failed.errno == number
            np.testing.assert_array_equal(rows.take(ids), table[ids])


def test_a_file_system_that_does_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    with (
        failures("open", errno=errno.EINVAL, skip=1, times=1),
        pytest.raises(UnsupportedError, match="direct=True"),
    ):
        fremap.rows(tmp_path / "file", np.uint8, 10, direct=True)


def test_a_pickle_is_direct_too(paths: list[Path], table: np.ndarray, rows: fremap.Rows) -> None:
    with pickle.loads(pickle.dumps(rows)) as again:
        before = resident(paths[0])
        np.testing.assert_array_equal(again.take([5, 6000]), table[[5, 6000]])
        assert resident(paths[0]) == before


@pytest.mark.needs("paged")
def test_into_a_window(paths: list[Path], table: np.ndarray, rows: fremap.Rows) -> None:
    """Memory that the kernel cannot reach in a read."""
    store = fremap.MemoryStore(16 * 4096)
    with (
        store,
        fremap.Window(store, engine="paged", prot=fremap.Prot.WRITE, coherent=False) as window,
    ):
        out = np.frombuffer(window, np.uint8)[: 100 * ROW_BYTES].reshape(100, ROW_BYTES)
        ids = np.random.default_rng(8).integers(0, len(table), 100)
        rows.take(ids, out=out)
        np.testing.assert_array_equal(out, table[ids])
        del out
