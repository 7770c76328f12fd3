"""Rows whose files fail: cut short, replaced, unreadable; few descriptors, and fork."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap.errors import FremapError, StoreError, TruncatedError
from fremap.testing import failures, wait_until_settled

pytestmark = pytest.mark.any_user

Run = Callable[..., subprocess.CompletedProcess[str]]

ROW_BYTES = 160
ROW_COUNT = 40_000  # a little more than three chunks
LENGTHS = pytest.mark.parametrize("seconds", [0.5, pytest.param(60, marks=pytest.mark.long)])


@pytest.fixture
def table() -> np.ndarray:
    # No byte is zero, so that zeros show.
    return np.random.default_rng(5).integers(1, 256, (ROW_COUNT, ROW_BYTES), dtype=np.uint8)


@pytest.fixture
def path(table: np.ndarray, tmp_path: Path) -> Path:
    table.tofile(tmp_path / "raw")
    wait_until_settled(tmp_path / "raw")
    return tmp_path / "raw"


def open_rows(path: Path) -> fremap.Rows:
    return fremap.rows(path, np.uint8, ROW_BYTES)


def warm(rows: fremap.Rows) -> None:
    for _ in range(3):
        rows.take(np.arange(0, len(rows), max(len(rows) // 512, 1)))


@pytest.mark.parametrize("state", ["warm", "read", "slice"])
@pytest.mark.parametrize(
    "left", [0, 1, 4096 * 700 + 1, 4096 * 700 + 100, ROW_COUNT * ROW_BYTES - 1]
)
def test_a_file_that_is_cut(path: Path, table: np.ndarray, state: str, left: int) -> None:
    with open_rows(path) as rows:
        if state == "warm":
            warm(rows)
        os.truncate(path, left)
        good = np.arange(left // ROW_BYTES)
        bad = left // ROW_BYTES
        ids: object = np.concatenate([good[::3], [ROW_COUNT - 1, bad], good[1::3]])
        if state == "slice":
            ids = slice(max(bad - 40, 0), bad + 40)
        for _ in range(2):
            with pytest.raises(TruncatedError) as caught:
                rows.take(ids)
            assert caught.value.filename == str(path)
            assert caught.value.row in (
                (bad, ROW_COUNT - 1) if state != "slice" else range(bad, bad + 40)
            )
            assert f"row {caught.value.row}" in str(caught.value)
            assert f"has {left} bytes now" in str(caught.value)
        if len(good):
            np.testing.assert_array_equal(rows.take(good[:100]), table[:100])


def test_a_file_that_is_cut_again_and_again(path: Path, table: np.ndarray) -> None:
    """Beside takes: each is right, or an error; never zeros."""
    content = path.read_bytes()
    over = threading.Event()

    def cut() -> None:
        draw = np.random.default_rng(1)
        while not over.is_set():
            os.truncate(path, int(draw.integers(0, len(content))))
            with path.open("r+b") as file:
                file.write(content)

    cutting = threading.Thread(target=cut)
    draw = np.random.default_rng(2)
    outcomes = {"right": 0, "error": 0}
    with open_rows(path) as rows:
        warm(rows)
        cutting.start()
        try:
            # As many more as the thread that cuts needs to get a processor.
            while sum(outcomes.values()) < 400 or not outcomes["error"]:
                ids = draw.integers(0, ROW_COUNT, 200)
                try:
                    taken = rows.take(ids)
                except TruncatedError:
                    outcomes["error"] += 1
                else:
                    outcomes["right"] += 1
                    # While the file is written again, what is not yet written is a hole.
                    wrong = taken != table[ids]
                    assert not taken[wrong].any()
        finally:
            over.set()
            cutting.join()
        np.testing.assert_array_equal(rows[:], table)


def test_a_grown_file_has_the_rows_it_had(path: Path, table: np.ndarray) -> None:
    with open_rows(path) as rows:
        with path.open("ab") as file:
            file.write(b"more" * 1000)
        assert len(rows) == ROW_COUNT
        np.testing.assert_array_equal(rows[-3:], table[-3:])


def shards(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number:05}.bin" for number in range(count)]
    for number, path in enumerate(paths):
        np.full(12, number + 1, np.int32).tofile(path)
    return paths


@contextmanager
def descriptors(soft: int) -> Iterator[None]:
    """Let this process have so many more descriptors than are open."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_ten_thousand_files(tmp_path: Path) -> None:
    paths = shards(tmp_path, 10_000)
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    wrong: list[int] = []
    try:
        with fremap.rows(paths, np.int32, 3) as rows:
            assert len(rows) == 40_000

            def work(seed: int) -> None:
                draw = np.random.default_rng(seed)
                for _ in range(3):
                    ids = draw.integers(0, 40_000, 6000)
                    if not (rows.take(ids) == (ids // 4 + 1)[:, None]).all():
                        wrong.append(seed)

            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            everything = rows[:]
            assert (everything == np.arange(40_000).repeat(3).reshape(-1, 3) // 4 + 1).all()
            assert rows.stats().open_files <= 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
    assert wrong == []


@LENGTHS
def test_threads_share_the_descriptors(tmp_path: Path, seconds: float) -> None:
    """Reads in flight keep files open; those of all takes together leave some."""
    paths = shards(tmp_path, 2000)
    raised: list[BaseException] = []
    end = time.monotonic() + seconds
    with descriptors(160), fremap.rows(paths, np.int32, 3) as rows:

        def take(seed: int) -> None:
            draw = np.random.default_rng(seed)
            while time.monotonic() < end and not raised:
                ids = draw.integers(0, 8000, 3000)
                try:
                    assert (rows.take(ids) == (ids // 4 + 1)[:, None]).all()
                except BaseException as error:
                    raised.append(error)

        threads = [threading.Thread(target=take, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for path in paths[::3]:
                with contextlib.suppress(OSError):  # as short of descriptors as the others
                    fd = os.open(path, os.O_RDONLY)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(fd)
        for thread in threads:
            thread.join()
    assert raised == []


def test_few_descriptors_are_enough(tmp_path: Path) -> None:
    """Others may have taken all but a few of what the process may open."""
    paths = shards(tmp_path, 300)
    with fremap.rows(paths, np.int32, 3) as rows:
        rows.take([0])  # what is set up once is
        rows.take([0, 400])
        with descriptors(6):
            ids = np.arange(0, 1200, 3)
            assert (rows.take(ids) == (ids // 4 + 1)[:, None]).all()


def test_no_descriptor_at_all(tmp_path: Path) -> None:
    """Rows of the files that are open come; the first that cannot be opened is named."""
    with fremap.rows(shards(tmp_path, 300), np.int32, 3) as rows:
        rows.take(range(1196, 1200))
        paths = [str(tmp_path / file) for file in sorted(os.listdir(tmp_path))]
        with failures("open", errno=errno.EMFILE, skip=0, times=10_000):
            rows.take(range(1196, 1200))
            with pytest.raises(StoreError) as caught:
                rows.take(np.arange(1200))
        assert caught.value.errno == errno.EMFILE
        assert caught.value.row is not None
        assert caught.value.filename == str(paths[caught.value.row // 4])
        assert (rows[:][:, 0] == np.arange(1200) // 4 + 1).all()


def test_a_shard_that_is_replaced(tmp_path: Path) -> None:
    paths = shards(tmp_path, 3)
    with fremap.rows(paths, np.int32, 3) as rows:
        rows.take([0, 5, 11])
        np.full(12, 99, np.int32).tofile(tmp_path / "new")
        (tmp_path / "new").rename(paths[1])
        assert rows[5].tolist() == [2, 2, 2]  # open: the file it was
    with fremap.rows(paths, np.int32, 3) as rows:
        np.full(12, 77, np.int32).tofile(tmp_path / "new")
        (tmp_path / "new").rename(paths[1])
        with pytest.raises(StoreError, match="the path now leads to another file") as caught:
            rows.take([0, 5])
        assert (caught.value.errno, caught.value.row) == (errno.ESTALE, 5)
        assert caught.value.filename == str(paths[1])
        paths[1].unlink()
        with pytest.raises(FileNotFoundError):
            rows.take([5])
        assert rows[[0, 11]].tolist() == [[1] * 3, [3] * 3]
    with fremap.rows([paths[0], paths[2]], np.int32, 3) as rows:
        os.truncate(paths[2], 40)
        with pytest.raises(TruncatedError, match="row 7: the file has 40 bytes now"):
            rows.take([4, 7])
        assert rows[6].tolist() == [3, 3, 3]


def outcome_of(call: Callable[[], object]) -> FremapError | None:
    try:
        call()
    except FremapError as error:
        return error
    return None


@pytest.mark.parametrize("warmed", [False, True])
@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("read", errno.EIO),
        ("read", errno.EINTR),
        ("read", errno.EFAULT),
        ("open", errno.EIO),
        ("open", errno.EMFILE),
        ("fstat", errno.EIO),
        ("mmap", errno.ENOMEM),
        ("madvise", errno.ENOMEM),
        ("mincore", errno.EAGAIN),
        ("sigaction", errno.EINVAL),
        ("sigmask", errno.EINVAL),
        ("io_uring_setup", errno.EPERM),
        ("io_uring_enter", errno.EIO),
        ("io_uring_enter", errno.EINTR),
    ],
)
def test_calls_that_fail(
    path: Path, table: np.ndarray, call: str, number: int, warmed: bool
) -> None:
    """The n-th call of a kind fails: rows are right or there is an error, and then all is well."""
    call = {"fstat": "stat"}.get(call, call)
    draw = np.random.default_rng(3)
    for skip in range(6):
        with open_rows(path) as rows:
            if warmed:
                warm(rows)
            ids = draw.integers(0, ROW_COUNT, 700)
            out = np.zeros((700, ROW_BYTES), np.uint8)
            with failures(call, errno=number, skip=skip, times=1):
                failure = outcome_of(partial(rows.take, ids, out=out))
            if failure is None:
                np.testing.assert_array_equal(out, table[ids])
            else:
                assert isinstance(failure, OSError)
                assert failure.errno == number
            np.testing.assert_array_equal(rows.take(ids), table[ids])
            assert rows.stats().page_table_bytes * 512 >= rows.stats().mapped_bytes


@pytest.mark.needs("io_uring")
def test_reads_without_a_ring(path: Path, table: np.ndarray) -> None:
    ids = np.random.default_rng(4).permutation(ROW_COUNT)[:3000]
    with open_rows(path) as rows, failures("io_uring_setup", errno=errno.EPERM, skip=0, times=1000):
        np.testing.assert_array_equal(rows.take(ids), table[ids])


@pytest.mark.needs("sigbus_recovery", "populate_read")
def test_rows_that_left_the_page_cache(path: Path, table: np.ndarray) -> None:
    """A chunk that was mapped has holes by now: noticed, and read."""
    ids = np.random.default_rng(6).integers(0, ROW_COUNT, 5000)
    with open_rows(path) as rows:
        warm(rows)
        assert rows.stats().mapped_bytes > 0
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        # What is mapped stays in the cache unless the file system is asked to write it anew.
        os.ftruncate(fd, ROW_COUNT * ROW_BYTES // 2)
        os.ftruncate(fd, ROW_COUNT * ROW_BYTES)
        os.pwrite(fd, table.tobytes(), 0)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        for _ in range(3):
            np.testing.assert_array_equal(rows.take(ids), table[ids])


FORK = """
    import os, sys, threading, warnings
    import numpy as np
    import fremap
    # Python warns of such forks since 3.12, as other locks than fremap's might stay taken.
    warnings.simplefilter("ignore", DeprecationWarning)
    path = sys.argv[1]
    table = np.fromfile(path, np.uint8).reshape(-1, 160)
    rows = fremap.rows([path, path], np.uint8, 160)
    ids = np.random.default_rng(1).integers(0, len(rows), 3000)
    def right():
        return np.array_equal(rows.take(ids), table[ids % len(table)])
    assert right() and right() and right()

    def in_child():
        child = os.fork()
        if child == 0:
            ok = right() and right() and right() and rows.stats().takes == 3
            os._exit(0 if ok else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def test_a_child_of_fork_goes_on(path: Path, run_script: Run) -> None:
    done = run_script(FORK + "\n    assert in_child() == 0\n    assert right()\n", path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_beside_takes(path: Path, run_script: Run) -> None:
    """Whatever other threads are in the middle of, a child does not wait for them."""
    done = run_script(
        FORK
        + """
    over = False
    def take():
        while not over:
            assert right()
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads: thread.start()
    try:
        ends = [in_child() for _ in range(20)]
    finally:
        over = True
        for thread in threads: thread.join()
    assert ends == [0] * 20, ends
    """,
        path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_multiprocessing_by_each_start_method(path: Path, run_script: Run) -> None:
    done = run_script(
        """
        import multiprocessing, sys
        import numpy as np
        import fremap

        def work(rows):
            ids = np.arange(0, len(rows), 7)
            return int(rows.take(ids).astype(np.int64).sum())

        if __name__ == "__main__":
            rows = fremap.rows(sys.argv[1], np.uint8, 160)
            expected = work(rows)
            for method in ("fork", "forkserver", "spawn"):
                with multiprocessing.get_context(method).Pool(2) as pool:
                    assert pool.map(work, [rows] * 4) == [expected] * 4, method
        """,
        path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_is_replaced_under_its_number_is_an_error(tmp_path: Path) -> None:
    """A file system may give the number of a file that was removed to the next one."""
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(4096, dtype=np.int32).reshape(-1, 4))
    with fremap.rows(path) as rows:
        for _ in range(20):
            path.unlink()
            np.save(path, np.ones((1024, 4), np.float32))
            with pytest.raises(fremap.StoreError, match=r"replaced|another"):
                rows.take([1])


def resident_bytes_of(path: Path) -> int:
    """What this process has mapped of a file and touched."""
    own, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            own = line.endswith(str(path))
        elif own and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.needs("sigbus_recovery", "populate_read")
@LENGTHS
def test_threads_that_unmap_from_under_each_other_stay_within_the_budget(
    tmp_path: Path, seconds: float
) -> None:
    """A chunk that leaves while rows of it are copied is not mapped again, uncounted."""
    path, budget = tmp_path / "rows", 16 << 20
    np.random.default_rng(1).integers(0, 256, 128 << 20, np.uint8).tofile(path)
    with fremap.rows(path, np.uint8, 160, offset=(128 << 20) % 160, budget=budget) as rows:
        end = time.monotonic() + seconds

        def take(seed: int) -> None:
            choice = np.random.default_rng(seed)
            while time.monotonic() < end or rows.stats().rows_copied == 0:
                rows.take(choice.integers(0, len(rows), 20_000))

        threads = [threading.Thread(target=take, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert resident_bytes_of(path) <= rows.stats().mapped_bytes <= budget
