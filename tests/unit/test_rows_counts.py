"""What takes cost in system calls: few and early, whatever they take from how many files."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
import safetensors.numpy
from fremap.testing import counting, wait_until_settled

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.any_user

ROW_BYTES = 160
SHARD_ROWS = 4096 * 4
FILES = 12


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("counts")
    table = np.random.default_rng(1).integers(0, 256, (FILES, SHARD_ROWS, ROW_BYTES), np.uint8)
    paths = [folder / f"{number}.bin" for number in range(FILES)]
    for path, part in zip(paths, table, strict=True):
        part.tofile(path)
        drop(path)
    wait_until_settled(paths[-1])
    return paths


def drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def opened(paths: list[Path], *, direct: bool) -> fremap.Rows:
    """Return rows whose files are all open, and a ring that is ready."""
    for path in paths:
        drop(path)
    rows = fremap.rows(paths, np.uint8, ROW_BYTES, direct=direct)
    rows.take(np.arange(0, FILES * SHARD_ROWS, 2000))  # fewer rows would be read without a ring
    return rows


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("direct", [False, True])
def test_a_cold_take_looks_at_each_file_once(paths: list[Path], direct: bool) -> None:
    ids = np.random.default_rng(2).integers(0, FILES * SHARD_ROWS, 600)
    with opened(paths, direct=direct) as rows:
        for path in paths:
            drop(path)
        before = rows.stats()
        with counting() as calls:
            rows.take(ids)
        after = rows.stats()
    assert after.reads - before.reads > 100
    assert calls.made["stat"] <= FILES
    assert calls.made.get("open", 0) == 0
    assert calls.made.get("io_uring_setup", 0) == 0


@pytest.mark.needs("io_uring")
def test_the_device_is_told_before_all_is_prepared(paths: list[Path]) -> None:
    """18 rows: after each fourth of them, and for the wait; not once at the end."""
    ids = np.arange(18) * (SHARD_ROWS * FILES // 18)
    entered = []
    with opened(paths, direct=True) as rows:
        for _ in range(5):
            before = rows.stats()
            with counting() as calls:
                rows.take(ids)
            assert rows.stats().reads - before.reads == 18
            entered.append(calls.made["io_uring_enter"])
    assert min(entered) >= 5
    assert min(entered) <= 8, "each wait that ends early, as for a slow device, is one more"


def test_few_reads_through_the_page_cache_are_asked_for_ahead(paths: list[Path]) -> None:
    """Where the file system does as it is asked; a ring has them in flight elsewhere."""
    command = ["stat", "-f", "-c", "%T", str(paths[0])]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    asked = 18 if kind in ("ext2/ext3", "xfs", "btrfs", "f2fs") else 0
    ids = np.arange(18) * (SHARD_ROWS * FILES // 18)
    with opened(paths, direct=False) as rows:
        for path in paths:
            drop(path)
        with counting() as calls:
            rows.take(ids)
            assert calls.made.get("fadvise", 0) == asked
            assert calls.made.get("io_uring_enter", 0) == 0 or asked == 0
            rows.take(np.random.default_rng(5).permutation(len(rows))[:500])
            assert calls.made.get("fadvise", 0) == asked


@pytest.mark.needs("io_uring")
def test_threads_and_tables_share_rings(paths: list[Path]) -> None:
    count = 16

    def work(rows: fremap.Rows, number: int) -> None:
        draw = np.random.default_rng(number)
        begun.wait()
        for _ in range(30):
            rows.take(draw.integers(0, len(rows), 18))

    with counting() as calls:
        for _ in range(3):
            with opened(paths, direct=True) as rows:
                begun = threading.Barrier(count)
                threads = [
                    threading.Thread(target=work, args=(rows, number)) for number in range(count)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    assert calls.made.get("io_uring_setup", 0) <= count


@pytest.mark.parametrize("direct", [False, True])
def test_a_range_is_read_as_the_stretches_that_it_is(paths: list[Path], direct: bool) -> None:
    """Of two files and a half; a request has a MiB, past the page cache a quarter of one."""
    first, last = SHARD_ROWS // 2, 3 * SHARD_ROWS
    most = 256 << 10 if direct else 1 << 20
    with opened(paths, direct=direct) as rows:
        before = rows.stats()
        taken = rows[first:last]
        reads = rows.stats().reads - before.reads
    whole = np.concatenate([np.fromfile(path, np.uint8) for path in paths[:3]])
    np.testing.assert_array_equal(taken.reshape(-1), whole[first * ROW_BYTES :])
    assert reads <= taken.nbytes // most + 3 * 2


@pytest.mark.needs("sigbus_recovery", "populate_read")
def test_warm_rows_of_many_files_look_at_each_once(paths: list[Path]) -> None:
    for path in paths:
        path.read_bytes()
    with fremap.rows(paths, np.uint8, ROW_BYTES) as rows:
        for _ in range(3):
            rows.take(np.arange(0, len(rows), 16))
        ids = np.random.default_rng(3).permutation(len(rows))[:500]
        rows.take(ids)
        before = rows.stats()
        with counting() as calls:
            rows.take(ids)
        assert rows.stats().rows_copied - before.rows_copied == 500
    assert calls.made["stat"] <= FILES
    assert sum(calls.made.values()) <= FILES + 3, calls.made


@pytest.mark.slow
@pytest.mark.needs("sigbus_recovery", "populate_read")
@pytest.mark.parametrize("row_bytes", [2049, 65_536, 3 << 20])
def test_long_rows_are_copied_without_a_system_call_each(row_bytes: int, tmp_path: Path) -> None:
    count = (24 << 20) // row_bytes
    table = np.random.default_rng(4).integers(0, 256, (count, row_bytes), np.uint8)
    (tmp_path / "file").write_bytes(b"odd" + table.tobytes())
    wait_until_settled(tmp_path / "file")
    with fremap.rows(tmp_path / "file", np.uint8, row_bytes, offset=3, budget=None) as rows:
        for _ in range(4):
            np.testing.assert_array_equal(rows[:], table)
        before = rows.stats()
        with counting() as calls:
            np.testing.assert_array_equal(rows[1:], table[1:])
            np.testing.assert_array_equal(rows.take(np.arange(count)[::-1]), table[::-1])
        after = rows.stats()
    assert after.rows_copied - before.rows_copied == 2 * count - 1
    assert calls.made.get("read", 0) == 0
    assert calls.made["stat"] == 2
    assert sum(calls.made.values()) <= 6, calls.made


def test_each_file_is_looked_at_once_when_rows_are_opened(tmp_path: Path) -> None:
    """Two stats, as there may be another file by the second, an open and a read; no descriptor."""
    for number in range(100):
        length = 8 if number < 98 else number  # the last ones have headers of their own
        np.save(tmp_path / f"{number}.npy", np.full((length, 3), number, np.int16))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with counting() as calls, fremap.rows(tmp_path / "*.npy") as rows:
        assert {call: calls.made[call] for call in ("stat", "open", "read")} == {
            "stat": 200, "open": 100, "read": 100,
        }  # fmt: skip
        # Fewer where a thread of an earlier test has ended meanwhile.
        assert len(os.listdir("/proc/self/fd")) <= before
        assert rows.shape == (98 * 8 + 98 + 99, 3)
        np.testing.assert_array_equal(rows[[0, 8, 98 * 8 - 1, -1]][:, 0], [0, 1, 97, 99])


def test_bytes_that_a_caller_says_are_raw_are_not_read_when_rows_are_opened(tmp_path: Path) -> None:
    """They are opened all the same: whoever may not read them learns it at once."""
    for number in range(100):
        (tmp_path / f"{number}.bin").write_bytes(bytes([number]) * (64 + 8 * 3))
    paths = [tmp_path / f"{number}.bin" for number in range(100)]
    with counting() as calls, fremap.rows(paths, np.uint8, 8, offset=64) as rows:
        assert (calls.made["stat"], calls.made["open"]) == (100, 100)
        assert calls.made.get("read", 0) == 0
        assert rows[[0, 299]][:, 0].tolist() == [0, 99]


@pytest.mark.needs("sigbus_recovery", "populate_read")
@pytest.mark.parametrize("direct", [False, True])
def test_tensors_of_one_file_share_its_descriptor_and_its_map(tmp_path: Path, direct: bool) -> None:
    parts = np.random.default_rng(3).integers(0, 256, (128, 1500, 40), np.uint8)
    for number in range(10):
        held = {f"shard.{at}": parts[at] for at in range(number, 128, 10)}
        safetensors.numpy.save_file(held, tmp_path / f"{number}.safetensors")
        wait_until_settled(tmp_path / f"{number}.safetensors")
    ids = np.random.default_rng(4).integers(0, 128 * 1500, 2000)
    with fremap.rows(tmp_path, tensor="shard.{i}", direct=direct) as rows:
        for _ in range(20):
            np.testing.assert_array_equal(rows.take(ids), parts.reshape(-1, 40)[ids])
        assert rows.stats().open_files == 10
        # What is mapped counts once, however many tensors are in it.
        size = sum(os.path.getsize(tmp_path / f"{number}.safetensors") for number in range(10))
        assert rows.stats().mapped_bytes <= size + 10 * 4096
        if not direct:
            with counting() as calls:
                rows.take(ids)
            assert calls.made.get("stat", 0) <= 10
            assert calls.made.get("read", 0) == 0
