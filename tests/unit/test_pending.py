"""Takes that are submitted: waited for, awaited, cancelled, and what is kept meanwhile."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.errors import (
    ArgumentError,
    ClosedError,
    FremapError,
    MemoryLimitError,
    PageRangeError,
    TakeCancelledError,
    TakeTimeoutError,
    TruncatedError,
)
from fremap.testing import failures, wait_until_settled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROW_COUNT = 5000
LONG_BYTES = 1 << 20


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 1 << 16, (ROW_COUNT, 7), dtype=np.uint16)


@pytest.fixture
def path(table: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "table.npy", table)
    wait_until_settled(tmp_path / "table.npy")
    return tmp_path / "table.npy"


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[fremap.Rows]:
    """Rows of a MiB each, of which a take of a thousand lasts until it is cancelled."""
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(4 * LONG_BYTES)
    with fremap.rows(tmp_path / "hole", np.uint8, LONG_BYTES) as rows:
        yield rows


def endless() -> tuple[np.ndarray, np.ndarray]:
    """Return ids and memory of a take of a GiB."""
    count = 1000
    return np.zeros(count, np.int64), np.empty((count, LONG_BYTES), np.uint8)


@pytest.mark.parametrize("ids", [3, slice(5, 4000, 7), [[1, 2], [-1, 0]], [], range(7, 3, -1)])
@pytest.mark.parametrize("direct", [False, True])
def test_the_rows_are_those_of_take(path: Path, table: np.ndarray, ids: Any, direct: bool) -> None:
    with fremap.rows(path, direct=direct) as rows:
        taken = rows.submit(ids).result()
        assert taken.dtype == table.dtype
        np.testing.assert_array_equal(taken, table[ids] if ids != [] else table[:0])


def test_many_at_once_and_into_the_memory_given(path: Path, table: np.ndarray) -> None:
    draw = np.random.default_rng(3)
    with fremap.rows(path) as rows:
        ids = [draw.integers(-ROW_COUNT, ROW_COUNT, draw.integers(1, 60)) for _ in range(200)]
        outs = [np.empty((len(mine), 7), np.uint16) for mine in ids]
        pendings = [rows.submit(mine, out=out) for mine, out in zip(ids, outs, strict=True)]
        wanted = [table[mine] for mine in ids]
        for mine in ids:
            mine[:] = 0  # what was asked for stays what it was
        for pending, out, rows_wanted in zip(pendings, outs, wanted, strict=True):
            assert pending.result() is out
            assert pending.done()
            assert pending.wait(0)
            np.testing.assert_array_equal(out, rows_wanted)
        assert rows.stats().takes == 200


def test_what_is_wrong_with_the_arguments_is_said_at_once(path: Path) -> None:
    with fremap.rows(path) as rows:
        with pytest.raises(PageRangeError, match="5000"):
            rows.submit([ROW_COUNT])
        with pytest.raises(ArgumentError, match="out"):
            rows.submit([1], out=np.empty(3, np.uint16))
    with pytest.raises(ClosedError):
        rows.submit([1])


def test_what_is_wrong_with_a_row_is_said_by_each_result(path: Path) -> None:
    with fremap.rows(path) as rows:
        os.truncate(path, 1000)
        pending = rows.submit([1, ROW_COUNT - 1])
        for _ in range(2):
            with pytest.raises(TruncatedError) as caught:
                pending.result()
            assert caught.value.errno == errno.ENODATA
        assert pending.done()
        assert not pending.cancelled()
        np.testing.assert_array_equal(rows.submit([1]).result(), rows.take([1]))


def test_takes_under_way_outlive_close(path: Path, table: np.ndarray) -> None:
    rows = fremap.rows(path)
    pendings = [rows.submit(slice(None)) for _ in range(20)]
    rows.close()
    for pending in pendings:
        np.testing.assert_array_equal(pending.result(), table)
    assert rows.stats().open_files == 0
    assert rows.stats().mapped_bytes == 0


def test_a_take_that_is_cancelled(slow: fremap.Rows) -> None:
    ids, out = endless()
    pending = slow.submit(ids, out=out)
    assert not pending.wait(0)
    with pytest.raises(TakeTimeoutError, match="still running"):
        pending.result(0.001)
    assert not pending.cancelled()
    pending.cancel()
    assert pending.wait(60)
    assert pending.cancelled()
    with pytest.raises(TakeCancelledError):
        pending.result()
    assert issubclass(TakeTimeoutError, TimeoutError | FremapError)
    # One that has ended stays as it is.
    ended = slow.submit([0])
    ended.wait()
    ended.cancel()
    assert not ended.cancelled()
    assert not ended.result().any()


def test_the_memory_is_kept_until_the_take_has_ended(slow: fremap.Rows) -> None:
    class Memory(np.ndarray):
        """An array that can be watched."""

    ids, out = endless()
    watched = out.view(Memory)
    gone = threading.Event()
    weakref.finalize(watched, gone.set)
    pending = slow.submit(ids, out=watched)
    del watched, out
    gc.collect()
    assert not gone.is_set()
    pending.cancel()
    del pending  # nobody waits for it
    end = time.monotonic() + 60
    # Looked at again and again: without a GIL, memory that another thread lets go of is freed by
    # the thread that made it, once that runs.
    while not gone.wait(0.01):
        assert time.monotonic() < end, "the memory is kept for ever"


def test_it_can_be_watched_by_any_loop(path: Path, table: np.ndarray) -> None:
    """Each await has a descriptor of its own, which is closed."""
    before = len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        with fremap.rows(path) as rows:
            pending = rows.submit([4, 2])
            both = await asyncio.gather(_awaited(pending), _awaited(pending))
            assert both[0] is both[1]
            np.testing.assert_array_equal(both[0], table[[4, 2]])
            np.testing.assert_array_equal(await pending, table[[4, 2]])  # once more
            many = await asyncio.gather(*(rows.take_async([row]) for row in range(50)))
            np.testing.assert_array_equal(np.concatenate(many), table[:50])

    asyncio.run(main())
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # a ring, and an event of a pool


async def _awaited(pending: Any) -> np.ndarray:
    return await pending


def test_an_awaiting_task_that_is_cancelled_cancels_the_take(slow: fremap.Rows) -> None:
    ids, out = endless()
    pending = slow.submit(ids, out=out)

    async def main() -> None:
        task = asyncio.create_task(_awaited(pending))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert pending.wait(60)
    assert pending.cancelled()


def test_its_event_can_be_polled(path: Path) -> None:
    with fremap.rows(path) as rows:
        pending = rows.submit([1])
        event = pending._core.event()
        assert select.select([event], [], [], 60)[0] == [event]
        assert pending.done()
        os.close(event)


def test_no_thread_to_be_had(path: Path, table: np.ndarray) -> None:
    """Without a thread there is an error at once; nothing waits for ever."""
    script = f"""
import resource, fremap, numpy as np
from fremap.errors import MemoryLimitError
rows = fremap.rows({str(path)!r})
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
import threading
threading.stack_size()
hog = []
while True:
    try:
        hog.append(np.ones(1 << 20, np.uint8))
    except MemoryError:
        break
try:
    rows.submit([1])
    print("submitted")
except MemoryLimitError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100
    )
    assert "submit: no thread can be started" in ran.stdout
    assert issubclass(MemoryLimitError, MemoryError)


FORK = """
import os, sys, fremap, numpy as np
from fremap.errors import ForkError
rows = fremap.rows(sys.argv[1])
table = np.load(sys.argv[1])
for turn in range(20):
    pendings = [rows.submit(slice(None)) for _ in range(6)]
    child = os.fork()
    if child == 0:
        seen = []
        for pending in pendings:
            try:
                assert np.array_equal(pending.result(), table)  # it had ended before
            except ForkError as error:
                seen.append(str(error))
        del pendings, pending
        mine = [rows.submit([row, -1]) for row in range(20)]
        for row, pending in enumerate(mine):
            assert np.array_equal(pending.result(), table[[row, -1]])
        os._exit(0)
    for pending in pendings:
        assert np.array_equal(pending.result(), table)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("good")
"""


def test_a_child_of_fork_submits_anew(path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(path)],
        capture_output=True, text=True, check=True, timeout=150,
    )  # fmt: skip
    assert ran.stdout == "good\n"


def test_exit_with_takes_under_way(path: Path) -> None:
    script = f"""
import fremap, numpy as np
rows = fremap.rows({str(path)!r})
kept = [rows.submit(np.arange(5000).repeat(20)) for _ in range(30)]
print("ends")
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100
    )
    assert (ran.stdout, ran.stderr) == ("ends\n", "")


def failure_of(pending: fremap.Pending) -> fremap.StoreError | None:
    try:
        pending.result()
    except fremap.StoreError as error:
        return error
    return None


@pytest.mark.parametrize("call", ["io_uring_enter", "io_uring_setup", "read"])
def test_calls_that_fail(path: Path, table: np.ndarray, call: str) -> None:
    ids = np.random.default_rng(5).permutation(ROW_COUNT)[:500]
    with fremap.rows(path) as rows, failures(call, errno=errno.EIO, skip=0, times=1):
        pending = rows.submit(ids)
        failed = failure_of(pending)
        if failed is None:
            np.testing.assert_array_equal(pending.result(), table[ids])
        else:
            assert failed.errno == errno.EIO
        np.testing.assert_array_equal(rows.submit(ids).result(), table[ids])


@pytest.mark.needs("sigbus_recovery", "populate_read")
def test_cached_rows_are_copied_from_maps(path: Path, table: np.ndarray) -> None:
    """Threads that block SIGBUS could not copy: each row would be a read."""
    with fremap.rows(path) as rows:
        for _ in range(8):
            rows.take(np.arange(ROW_COUNT))
        before = rows.stats()
        found = rows.submit(np.arange(ROW_COUNT)).result()
        np.testing.assert_array_equal(found, table)
        assert rows.stats().rows_copied - before.rows_copied == ROW_COUNT


@pytest.mark.needs("paged", "uffd_wp")
def test_rows_go_into_a_window_whose_faults_are_signals(path: Path, table: np.ndarray) -> None:
    row_bytes = table[0].nbytes
    with (
        fremap.MemoryStore(64 * 4096, page_bytes=4096) as store,
        fremap.Window(
            store, engine="paged", prot=fremap.Prot.WRITE, coherent=False, fault="signal"
        ) as window,
        fremap.rows(path) as rows,
    ):
        count = 32 * 4096 // row_bytes
        out = window.array(np.uint8).reshape(-1)[: count * row_bytes]
        out = out.view(table.dtype).reshape(count, *table.shape[1:])
        ids = np.arange(count) % ROW_COUNT
        rows.submit(ids, out=out).result()
        np.testing.assert_array_equal(out, table[ids])
        del out


def test_a_child_can_print_its_parents_takes(path: Path) -> None:
    with fremap.rows(path) as rows:
        pending = rows.submit([1, 2, 3])
        code = os.fork()
        if code == 0:
            os._exit("Pending" not in repr(pending))
        assert os.waitstatus_to_exitcode(os.waitpid(code, 0)[1]) == 0
        pending.result()
