"""What becomes of takes where actors, nodes and files are lost, and where nobody answers."""

import asyncio
import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fremap import (
    ActorLostError,
    ArgumentError,
    ArgumentTypeError,
    ForkError,
    FormatError,
    StoreError,
    StoreNotFoundError,
    TakeTimeoutError,
    TruncatedError,
)
from nodes import TABLE, actors_of, alive, killed, stopped, wait_until

pytestmark = [pytest.mark.once, pytest.mark.slow, pytest.mark.needs("ray")]


def test_an_actor_that_dies_is_restarted(own_table: Any) -> None:
    ids = [700, 3, 407, -1]
    for shard in own_table._shards[::2]:
        killed(shard.process)
    np.testing.assert_array_equal(own_table.take(ids), TABLE[ids])
    np.testing.assert_array_equal(own_table.take(ids), TABLE[ids])


def test_an_actor_that_is_lost(cluster: Any, parts: list[Path]) -> None:
    from fremap.ray import DistributedRows

    nodes = {cluster.first: parts[:2], cluster.second: parts[2:]}
    with DistributedRows(nodes, actor_options={"max_restarts": 0, "max_task_retries": 0}) as table:
        shard = table._shards[1]
        os.kill(shard.process, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(table.take, [0, 700])
            killed(shard.process)
        for take in (under_way.result, lambda: table.take([0, 700]), lambda: asyncio.run(
            table.take_async([0, 700])
        )):  # fmt: skip
            with pytest.raises(ActorLostError) as raised:
                take()
            error = raised.value
            assert isinstance(error, ConnectionError)
            assert (error.errno, error.node) == (errno.ECONNRESET, cluster.second)
            assert error.actor == shard.actor_id
            assert f"take: actor 1 ({error.actor}, process {shard.process} on node " in str(error)
            assert cluster.second in str(error)
            assert "\n" not in str(error)
        # The other goes on.
        np.testing.assert_array_equal(table.take([406]), TABLE[[406]])


def test_a_node_that_is_lost(cluster: Any, parts: list[Path]) -> None:
    """Its actor would be restarted there and nowhere else."""
    from fremap.ray import DistributedRows

    node = cluster.made.add_node(**{**cluster.node, "include_dashboard": None})
    try:
        with DistributedRows({cluster.first: parts[0], node.node_id: parts[3]}) as table:
            np.testing.assert_array_equal(table.take([7]), TABLE[[408]])
            cluster.made.remove_node(node)
            process = table._shards[1].process
            wait_until(lambda: not alive(process), f"process {process} is alive")
            with pytest.raises(ActorLostError, match=node.node_id) as raised:
                table.take([0, 7])
            assert raised.value.node == node.node_id
            np.testing.assert_array_equal(table.take([0]), TABLE[[0]])
            with pytest.raises(ArgumentError, match=f"no node is {node.node_id!r}; give the ID"):
                DistributedRows({node.node_id: parts[0]})
    finally:
        if node in cluster.made.list_all_nodes():
            cluster.made.remove_node(node)


def test_a_restarted_actor_finds_other_files(cluster: Any, tmp_path: Path) -> None:
    """On the same node; on another one they might be copies."""
    from fremap.ray import DistributedRows

    path = tmp_path / "rows.npy"
    np.save(path, TABLE)
    sources = {cluster.second: path}
    with DistributedRows(sources, timeout=None) as table:
        np.save(tmp_path / "new.npy", TABLE + 1)
        os.replace(tmp_path / "new.npy", path)
        killed(table._shards[0].process)
        with pytest.raises(StoreError, match="files are not those that the table was") as raised:
            table.take([0])
        assert raised.value.errno == errno.ESTALE
    with DistributedRows(sources) as table:
        path.unlink()
        killed(table._shards[0].process)
        with pytest.raises(StoreNotFoundError, match=r"take: actor 0 \(") as raised:
            table.take([0])
        assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, str(path))
        with pytest.raises(StoreNotFoundError, match="refresh: actor 0"):
            table.refresh()


def test_a_restarted_actor_finds_another_file_of_its_store(cluster: Any, tmp_path: Path) -> None:
    """A store is opened anew by its path, which has been given to another file."""
    import fremap
    from fremap.ray import DistributedRows

    path = tmp_path / "rows.npy"
    np.save(path, TABLE)
    with (
        fremap.open(path) as store,
        DistributedRows({cluster.first: [store]}) as table,
    ):
        killed(table._shards[0].process)
        np.testing.assert_array_equal(table.take([1]), TABLE[[1]])
        (process,) = actors_of(table)
        np.save(tmp_path / "new.npy", TABLE + 1)
        os.replace(tmp_path / "new.npy", path)
        killed(process)
        with pytest.raises(StoreError, match="files are not those that the table was"):
            table.take([0])


def test_a_restarted_actor_finds_another_version_of_an_object(cluster: Any) -> None:
    from fremap.ray import DistributedRows
    from servers import npy_bytes, running_server

    with running_server() as server:
        served = server.served
        served.content = npy_bytes(TABLE)
        with DistributedRows({cluster.second: served.url}) as table:
            np.testing.assert_array_equal(table.take([1]), TABLE[[1]])
            killed(table._shards[0].process)
            np.testing.assert_array_equal(table.take([1]), TABLE[[1]])
            (process,) = actors_of(table)
            served.etag, served.content = '"two"', npy_bytes(TABLE + 1)
            killed(process)
            with pytest.raises(StoreError, match="files are not those that the table") as raised:
                table.take([1])
            assert raised.value.errno == errno.ESTALE


def test_what_tells_files_apart(cluster: Any, tmp_path: Path) -> None:
    """Other machines may have copies of files, but no other version of an object."""
    import fremap
    from fremap.ray.actors import _told_files
    from servers import running_server

    def told(source: Any) -> list[str]:
        with fremap.rows(source, np.float32, 12) as rows:
            return _told_files(rows).split()

    path = tmp_path / "rows"
    with running_server() as server:
        sources: list[Any] = [path, server.served.url]
        found = []
        for number in range(2):
            server.served.content, server.served.etag = TABLE.tobytes(), f'"{number}"'
            TABLE.tofile(tmp_path / "new")
            os.replace(tmp_path / "new", path)
            with fremap.open(path, page_bytes=4096) as store:
                found.append([told(source) for source in (*sources, store)])
    differ = [
        [one != other for one, other in zip(*both, strict=True)]
        for both in zip(*found, strict=True)
    ]
    assert differ == [[False, True, False], [False, False, True], [False, True, False]]


def test_which_files_an_actor_may_go_on_with() -> None:
    """The same on the same machine; on another one, files of the same size."""
    from fremap.ray.actors import _same_elsewhere

    assert _same_elsewhere("one which sizes", "two others sizes")
    assert not _same_elsewhere("one which sizes", "one others sizes")
    assert not _same_elsewhere("one which sizes", "two which others")


def test_a_file_that_is_cut_short(cluster: Any, tmp_path: Path, parts: list[Path]) -> None:
    from fremap.ray import DistributedRows

    path = tmp_path / "part.npy"
    shutil.copy(parts[3], path)
    with DistributedRows([parts[1], path]) as table:
        os.truncate(path, path.stat().st_size - 48)
        for take in (table.take, lambda ids: asyncio.run(table.take_async(ids))):
            with pytest.raises(TruncatedError, match="take: row 692 is with actor 1 ") as raised:
                take([0, 692])
            assert (raised.value.row, raised.value.filename) == (692, str(path))
            assert isinstance(raised.value.errno, int | None)
        np.testing.assert_array_equal(table.take([0, 691]), TABLE[[7, 699]])


def test_what_cannot_be_opened(cluster: Any, tmp_path: Path, parts: list[Path]) -> None:
    from fremap.ray import DistributedRows

    missing = tmp_path / "missing.npy"
    with pytest.raises(StoreNotFoundError, match="DistributedRows: actor 1 ") as raised:
        DistributedRows([parts[0], missing])
    assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, str(missing))
    (tmp_path / "text").write_text("seven")
    with pytest.raises(FormatError, match="DistributedRows: actor 0 "):
        DistributedRows([tmp_path / "text"], np.float32)
    np.save(tmp_path / "wide.npy", np.zeros((2, 13), np.float32))
    with pytest.raises(ArgumentError, match=r"has rows of float32 \(13,\), actor 0 .* \(12,\)"):
        DistributedRows([parts[0], tmp_path / "wide.npy"])
    with pytest.raises(ArgumentTypeError, match="has no option 'ofset'"):
        DistributedRows(parts, ofset=3)
    with pytest.raises(ArgumentError, match="budget is 'none'"):
        DistributedRows(parts, budget="none")
    for wrong in (str(parts[0]), parts[0], {str(parts[0])}, 7):
        with pytest.raises(ArgumentTypeError, match="sources must be a mapping of nodes"):
            DistributedRows(wrong)
    for none in ([], {}):
        with pytest.raises(ArgumentError, match="sources is empty"):
            DistributedRows(none)
    with pytest.raises(ArgumentError, match="timeout is 0"):
        DistributedRows(parts, timeout=0)


def test_an_actor_that_does_not_answer(own_table: Any, parts: list[Path]) -> None:
    from fremap.ray import DistributedRows

    slow = own_table._shards[1]
    own_table._timeout = 0.2
    with stopped(slow.process):
        for take in (own_table.take, lambda ids: asyncio.run(own_table.take_async(ids))):
            with pytest.raises(TakeTimeoutError, match=r"actor .* did not answer in 0.2 s") as told:
                take([0, 8, 700])
            assert isinstance(told.value, TimeoutError)
        with pytest.raises(TakeTimeoutError, match=f"take: actor 1 .*{slow.actor_id}"):
            own_table.take([8])
        np.testing.assert_array_equal(own_table.take([0, 700]), TABLE[[0, 700]])
    own_table._timeout = None
    np.testing.assert_array_equal(own_table.take([0, 8]), TABLE[[0, 8]])
    with pytest.raises(TakeTimeoutError, match=r"actor 0 \(.*\) did not answer in 0.5 s; .* waits"):
        DistributedRows(parts[:1], actor_options={"resources": {"nowhere": 1}}, timeout=0.5)


class InterruptedTakeError(Exception):
    """What the signal handler of a test raises, as that of Ctrl-C raises KeyboardInterrupt."""


def test_ctrl_c_ends_a_take(own_table: Any) -> None:
    """Without a limit of time, while an actor does nothing; and `out` is let alone from then on."""

    def interrupt(*_: object) -> None:
        raise InterruptedTakeError

    own_table._timeout = None
    before = signal.signal(signal.SIGALRM, interrupt)
    out = np.full((2, 12), -1, np.float32)
    try:
        with stopped(own_table._shards[1].process):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(InterruptedTakeError):
                own_table.take([0, 8], out)
        np.testing.assert_array_equal(own_table.take([8, 9]), TABLE[[8, 9]])
        assert (out == -1).all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_child_of_fork_is_refused(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's threads are not there; a fork here would also end Ray's part of this process."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(ForkError, match=r"^take: Ray does not work in a child of fork"):
        table.take([0])


def test_a_process_that_leaves_ray(cluster: Any, parts: list[Path]) -> None:
    program = f"""
        import ray, fremap
        from fremap.ray import DistributedRows
        ray.init({cluster.address!r}, log_to_driver=False, logging_level="ERROR")
        table = DistributedRows([{str(parts[0])!r}])
        assert table.take([3]).shape == (1, 12)
        print(table._shards[0].process)
        ray.shutdown()
        for again in range(2):
            try:
                table.take([3])
            except fremap.ActorLostError as error:
                print(error)
            ray.is_initialized() or ray.init({cluster.address!r}, log_to_driver=False,
                                             logging_level="ERROR")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    process, first, second = done.stdout.splitlines()
    assert "take: this process has left Ray (ray.shutdown)" in first
    assert first == second
    wait_until(lambda: not alive(int(process)), f"process {process} is alive")


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_process_that_leaves_ray_between_two_waits_of_a_take(
    asynchronous: bool, returns: bool, cluster: Any, parts: list[Path]
) -> None:
    """What was asked before is not answered, whatever the process is in when it begins to wait."""
    program = f"""
        import asyncio, ray
        from fremap import ActorLostError
        from fremap.ray import DistributedRows
        from fremap.ray import table as module
        def join():
            ray.init({cluster.address!r}, log_to_driver=False, logging_level="ERROR")
        join()
        table = DistributedRows([{str(parts[0])!r}], timeout=20)
        name = "{"awaited" if asynchronous else "got"}"
        wait = getattr(module, name)
        def left(*arguments):
            ray.shutdown()
            {returns} and join()
            return wait(*arguments)
        setattr(module, name, left)
        try:
            asyncio.run(table.take_async([3])) if {asynchronous} else table.take([3])
        except ActorLostError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "take: this process has left Ray (ray.shutdown)" in done.stdout


def test_a_process_that_leaves_ray_while_a_wait_looks_at_it(cluster: Any) -> None:
    """To ask Ray in which connection the process is must not start a new Ray."""
    program = f"""
        import ray
        from fremap.ray import calls
        ray.init({cluster.address!r}, log_to_driver=False, logging_level="ERROR")
        is_initialized, answers = ray.is_initialized, []
        def left_meanwhile():
            answers.append(is_initialized())
            ray.shutdown()
            return answers[-1]
        ray.is_initialized = left_meanwhile
        print(calls.session(), answers[0], is_initialized())
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "None True False\n"), done.stderr


@pytest.mark.parametrize(("timeout", "asynchronous"), [(None, False), (1.5, False), (None, True)])
def test_a_process_that_leaves_ray_in_a_take(
    timeout: float | None, asynchronous: bool, cluster: Any, parts: list[Path]
) -> None:
    """No answer comes then; and Ray is not started anew by what is done about it."""
    program = f"""
        import asyncio, os, signal, threading, fremap, ray
        from concurrent.futures import ThreadPoolExecutor
        from fremap.ray import DistributedRows
        from fremap.ray import table as module
        ray.init({cluster.address!r}, log_to_driver=False, logging_level="ERROR")
        table = DistributedRows([{str(parts[0])!r}], timeout={timeout})
        os.kill(table._shards[0].process, signal.SIGSTOP)
        asked, wait = threading.Event(), module.{"awaited" if asynchronous else "got"}
        def told(*arguments):
            asked.set()
            return wait(*arguments)
        module.{"awaited" if asynchronous else "got"} = told
        with ThreadPoolExecutor(1) as pool:
            if {asynchronous}:
                taken = pool.submit(lambda: asyncio.run(table.take_async([3])))
            else:
                taken = pool.submit(table.take, [3])
            asked.wait()
            ray.shutdown()
            print(table._shards[0].process, repr(taken.exception()), ray.is_initialized())
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    process, _, told = done.stdout.strip().partition(" ")
    assert told.startswith("ActorLostError(107, 'take: this process has left Ray (ray.shutdown)")
    assert told.endswith(" False")
    wait_until(lambda: not alive(int(process)), f"process {process} is alive")


def test_an_actor_that_cannot_be_reached_for_a_while(cluster: Any, parts: list[Path]) -> None:
    """Where Ray repeats nothing, a take that fails says nothing of the next one."""
    from fremap.ray import DistributedRows

    with DistributedRows(parts[:1], actor_options={"max_task_retries": 0}) as table:
        shard = table._shards[0]
        os.kill(shard.process, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(table.take, [0])
            killed(shard.process)
        with pytest.raises(
            ActorLostError, match=r"cannot be reached now \(.*\); ask again"
        ) as told:
            under_way.result()
        assert told.value.actor == shard.actor_id
        np.testing.assert_array_equal(table.take([0]), TABLE[[0]])


def test_an_answer_that_ray_does_not_bring(table: Any) -> None:
    """Of an actor that is well."""
    from fremap.ray.calls import _failed, submitted
    from ray.exceptions import ObjectStoreFullError, PendingCallsLimitExceeded

    told = _failed("take", table._shards[2], ObjectStoreFullError("is full.\nMore of it"))
    assert type(told) is StoreError
    assert told.errno == errno.EIO
    assert "take: Ray brings no answer of actor 2 (" in str(told)
    assert "lost" not in str(told)
    assert "\n" not in str(told)

    def submit() -> None:
        raise PendingCallsLimitExceeded("too many")

    with pytest.raises(StoreError, match=r"no answer of actor 1 .*: too many") as raised:
        submitted("take", table._shards[1], submit)
    assert not isinstance(raised.value, ActorLostError)


def test_errors_in_an_event_loop_are_told_once(
    cluster: Any, parts: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Asyncio logs each exception that nobody looks at."""
    from fremap.ray import DistributedRows

    options = {"max_restarts": 0, "max_task_retries": 0}
    with DistributedRows(parts[:2], actor_options=options) as table:
        for shard in table._shards:
            killed(shard.process)

        async def take() -> None:
            with pytest.raises(ActorLostError):
                await table.take_async([0, 8])
            gc.collect()

        asyncio.run(take())
        gc.collect()
    assert [record.getMessage() for record in caplog.records] == []


def test_an_error_that_is_not_fremaps(table: Any) -> None:
    from fremap.ray.calls import _failed
    from ray.exceptions import RayTaskError

    told = _failed("take", table._shards[2], RayTaskError("take", "", ValueError("seven")))
    assert isinstance(told, StoreError)
    assert told.errno == errno.EIO
    assert "take: actor 2 (" in str(told)
    assert "failed: ValueError('seven')" in str(told)


def test_takes_go_on_while_actors_are_restarted(own_table: Any) -> None:
    """Threads take, and each actor is killed once meanwhile: no take sees it."""
    ended = threading.Event()

    def take(seed: int) -> int:
        draw, done = np.random.default_rng(seed), 0
        while not ended.is_set():
            ids = draw.integers(0, 701, 40)
            np.testing.assert_array_equal(own_table.take(ids), TABLE[ids])
            done += 1
        return done

    with ThreadPoolExecutor(3) as pool:
        takes = [pool.submit(take, seed) for seed in range(3)]
        try:
            for shard in own_table._shards:
                killed(shard.process)
                np.testing.assert_array_equal(own_table.take([shard.first]), TABLE[[shard.first]])
        finally:
            ended.set()
        assert all(one.result() > 0 for one in takes)
