"""`fremap.ray`: a table whose rows lie on several machines, here two of Ray's nodes on this one."""

import asyncio
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import fremap
import numpy as np
import pytest
from fremap import (
    ActorLostError,
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    ForkError,
    FormatError,
    FremapError,
    PageRangeError,
    StoreError,
    StoreNotFoundError,
    TakeTimeoutError,
    TruncatedError,
)

pytestmark = [pytest.mark.once, pytest.mark.slow]
needs_ray = pytest.mark.needs("ray")

# The least that Ray takes is 75 MB.
STORE_BYTES = 80 << 20
COUNTS = (7, 400, 1, 293)
TABLE = np.arange(sum(COUNTS) * 12, dtype=np.float32).reshape(-1, 12)


def processes_of(folder: str) -> list[str]:
    """What processes there are whose command names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if folder in command:
            found.append(f"{path.parent.name}: {command}")
    return found


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Wait for what another process does; fail where it does not in half a minute."""
    until = time.monotonic() + 30
    while not happened():
        if time.monotonic() > until:
            pytest.fail(f"{what} after 30 s")
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray with two nodes, of a processor each."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path has 107 bytes at most
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TMPDIR": folder,
        "RAY_DEDUP_LOGS": "0",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        try:
            second = made.add_node(resources={"second": 4}, **{**node, "include_dashboard": None})
            ray.init(made.address, log_to_driver=False, logging_level="ERROR")
            first = made.head_node
            yield SimpleNamespace(
                made=made, address=made.address, node=node, first=first.node_id,
                second=second.node_id,
            )  # fmt: skip
        finally:
            ray.shutdown()
            made.shutdown()
            wait_until(lambda: not processes_of(folder), f"there are {processes_of(folder)}")
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of a table."""
    folder = tmp_path_factory.mktemp("parts")
    paths = []
    for number, rows in enumerate(np.split(TABLE, np.cumsum(COUNTS)[:-1])):
        paths.append(folder / f"part-{number}.npy")
        np.save(paths[-1], rows)
    return paths


def opened(parts: list[Path]) -> Any:
    """The table by three actors on two nodes; the second actor has two files, one of one row."""
    from fremap.ray import DistributedRows

    options = [{}, {"resources": {"second": 1}}, {}]
    return DistributedRows([parts[0], parts[1:3], parts[3]], actor_options=options)


@pytest.fixture(scope="module")
def table(cluster: Any, parts: list[Path]) -> Iterator[Any]:
    """A table for all tests that leave it as it is."""
    with opened(parts) as made:
        yield made


@pytest.fixture
def own_table(cluster: Any, parts: list[Path]) -> Iterator[Any]:
    """A table whose actors the test may kill."""
    with opened(parts) as made:
        yield made


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """Have an actor do nothing for a while."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not alive(process), f"process {process} is alive")


CHOICES: dict[str, Any] = {
    "one": 5,
    "last": -1,
    "numpys": np.uint8(9),
    "none": [],
    "list": [700, 0, -701, 407, 406, 408, 700],
    "one actor's": [407, 7, 408],
    "grid": np.array([[0, 500], [7, 6], [-1, 408]]),
    "no rows of a grid": np.empty((0, 3), np.int64),
    "unsigned": np.array([1, 699], np.uint64),
    "slice": slice(5, 500),
    "steps": slice(None, None, -3),
    "range": range(400, 410),
    "falling": range(-1, -300, -7),
    "all": slice(None),
}


@needs_ray
@pytest.mark.parametrize("ids", CHOICES.values(), ids=CHOICES)
def test_it_takes_what_rows_take(table: Any, parts: list[Path], ids: Any) -> None:
    with fremap.rows(parts) as local:
        wanted = local.take(ids)
    taken = table.take(ids)
    assert (taken.dtype, taken.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(taken, wanted)
    out = np.ones_like(wanted, order="C")
    assert table.take(ids, out) is out
    np.testing.assert_array_equal(out, wanted)
    memory = bytearray(wanted.nbytes)
    np.testing.assert_array_equal(table.take(ids, memory), wanted)
    assert bytes(memory) == wanted.tobytes()


@needs_ray
def test_it_is_an_array_as_rows_are(table: Any, parts: list[Path]) -> None:
    assert (table.shape, table.ndim, len(table)) == (TABLE.shape, 2, len(TABLE))
    assert (table.dtype, table.dtype_name) == (np.float32, "float32")
    assert (table.row_shape, table.row_bytes, table.nbytes) == ((12,), 48, TABLE.nbytes)
    assert table.shard_rows.tolist() == [7, 401, 293]
    assert len(table.nodes) == 3
    assert repr(table).startswith("<fremap.ray.DistributedRows 3 actors on ")
    assert repr(table).endswith(": 701 rows of float32 (12,)>")
    np.testing.assert_array_equal(table[3:500, 2:5], TABLE[3:500, 2:5])
    np.testing.assert_array_equal(table[TABLE[:, 0] > 4000], TABLE[TABLE[:, 0] > 4000])
    np.testing.assert_array_equal(table[5], TABLE[5])
    np.testing.assert_array_equal(np.asarray(table), TABLE)
    with table.batches(64, seed=3, return_ids=True) as batches:
        seen = [(ids, batch) for ids, batch in batches]
    for ids, batch in seen:
        np.testing.assert_array_equal(batch, TABLE[ids])
    with fremap.rows(parts) as local, local.batches(64, seed=3, return_ids=True) as batches:
        for (ids, _), (ours, _) in zip(batches, seen, strict=True):
            np.testing.assert_array_equal(ours, ids)


WRONG: dict[str, tuple[Any, Any]] = {
    "beyond": ([3, 701, 900], None),
    "before": (np.array([-702]), None),
    "beyond 64 bits": (2**70, None),
    "range": (range(690, 710), None),
    "float": ([1.0], None),
    "bool": ([True], None),
    "mask": (np.ones(701, bool), None),
    "shape of out": ([1], np.empty((2, 12), np.float32)),
    "type of out": ([1], np.empty((1, 12), np.float64)),
    "out read-only": ([1], bytes(48)),
    "no memory": ([1], 7),
}


@needs_ray
@pytest.mark.parametrize(("ids", "out"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_as_rows_say_it(
    table: Any, parts: list[Path], ids: Any, out: Any
) -> None:
    with fremap.rows(parts) as local, pytest.raises(FremapError) as wanted:
        local.take(ids, out)
    with pytest.raises(type(wanted.value)) as raised:
        table.take(ids, out)
    assert str(raised.value) == str(wanted.value)
    assert vars(raised.value) == vars(wanted.value)


@needs_ray
@pytest.mark.parametrize("row_bytes", [1, 160, 4096, 98_304, 98_305, 1 << 20])
def test_rows_of_any_size_in_any_number(cluster: Any, tmp_path: Path, row_bytes: int) -> None:
    """In one inline value, in several, through the object store, and in several rounds."""
    from fremap.ray import DistributedRows

    count = max(10, min(300_000, (20 << 20) // row_bytes))
    rows = np.random.default_rng(row_bytes).integers(0, 256, (count, row_bytes), np.uint8)
    for number, part in enumerate(np.array_split(rows, 2)):
        part.tofile(tmp_path / f"{number}.bin")
    nodes = {node: tmp_path / f"{number}.bin" for number, node in enumerate(
        (cluster.first, cluster.second)
    )}  # fmt: skip
    with DistributedRows(nodes, np.uint8, row_bytes) as table:
        assert [shard.node for shard in table._shards] == [cluster.first, cluster.second]
        for taken in {1, 2, count // 50, count // 20, count // 8, count, count * 11 // 10}:
            ids = np.random.default_rng(taken).integers(-count, count, taken)
            assert np.array_equal(table.take(ids), rows[ids]), taken
        assert np.array_equal(table[:], rows)


@needs_ray
def test_a_take_asks_for_little_at_once(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds at most are under way, each with one request to each actor that it concerns."""
    from fremap.ray import table as module
    from fremap.ray.calls import Round

    asked: list[list[int]] = []
    placed: list[int] = []
    ahead: list[int] = []

    class Watched(Round):
        def __new__(cls, *arguments: Any) -> Self:
            asked.append([call.shard.number for call in arguments[0]])
            ahead.append(len(asked) - len(placed))
            return super().__new__(cls, *arguments)

        def place(self, values: Any) -> None:
            placed.append(len(values))
            super().place(values)

    monkeypatch.setattr(module, "_ROUND_BYTES", 48 * 100)
    monkeypatch.setattr(module, "Round", Watched)
    np.testing.assert_array_equal(table[:], TABLE)
    assert asked == [[0, 1], [1], [1], [1], [1, 2], [2], [2], [2]]
    assert placed == [2, 1, 1, 1, 2, 1, 1, 1]
    assert max(ahead) == 2


@needs_ray
@pytest.mark.needs("ml_dtypes")
def test_types_that_numpy_has_not(cluster: Any, tmp_path: Path) -> None:
    from fremap.ray import DistributedRows

    np.arange(40, dtype=np.uint16).tofile(tmp_path / "rows")
    np.arange(40, dtype=np.int64).tofile(tmp_path / "times")
    for said, path in (("bfloat16", "rows"), ("datetime64[s]", "times"), ("V8", "times")):
        source = tmp_path / path
        with (
            DistributedRows([source, source], said, 4) as table,
            fremap.rows([source, source], said, 4) as local,
        ):
            ids = np.array([[0, 19], [-1, 7]])
            taken = table.take(ids)
            assert (table.dtype, table.dtype_name) == (local.dtype, local.dtype_name)
            assert taken.dtype == local.dtype
            assert taken.tobytes() == local.take(ids).tobytes()


@needs_ray
@pytest.mark.needs("torch")
def test_tensors(cluster: Any, parts: list[Path]) -> None:
    import torch
    from fremap.ray import DistributedRows

    with DistributedRows(parts, torch.float32) as table:
        found = table.take([1, -1])
        assert torch.equal(found, torch.from_numpy(TABLE[[1, -1]]))
        out = torch.empty((2, 12))
        assert table.take([1, -1], out) is out
        assert torch.equal(out, found)


@needs_ray
def test_rows_without_bytes(cluster: Any, tmp_path: Path) -> None:
    from fremap.ray import DistributedRows

    np.save(tmp_path / "none.npy", np.empty((5, 0), np.float32))
    np.save(tmp_path / "empty.npy", np.empty((0, 0), np.float32))
    with DistributedRows([tmp_path / "none.npy", tmp_path / "empty.npy"]) as table:
        assert table.take([4, 0]).shape == (2, 0)
        with pytest.raises(PageRangeError):
            table.take([5])


@needs_ray
def test_an_actor_without_rows(cluster: Any, tmp_path: Path, parts: list[Path]) -> None:
    from fremap.ray import DistributedRows

    np.save(tmp_path / "empty.npy", np.empty((0, 12), np.float32))
    sources = [tmp_path / "empty.npy", parts[0], tmp_path / "empty.npy", parts[1]]
    with DistributedRows(sources) as table:
        np.testing.assert_array_equal(table[[0, 6, 7, -1]], TABLE[[0, 6, 7, 406]])


@needs_ray
def test_options_of_rows_reach_the_actors(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path and a pattern, an offset, and rows that are kept until `refresh`."""
    from fremap.ray import DistributedRows

    monkeypatch.chdir(tmp_path)
    for number in range(2):
        Path(f"part-{number}.bin").write_bytes(b"head" + bytes([number + 1]) * 16)
    with DistributedRows(
        ["part-*.bin"], np.uint8, 8, offset=4, direct=True, cache_bytes="1M"
    ) as table:
        assert table[:].tolist() == [[1] * 8, [1] * 8, [2] * 8, [2] * 8]
        table.refresh()
        assert table.take([3]).tolist() == [[2] * 8]
    with pytest.raises(ClosedError, match="refresh: "):
        table.refresh()


@needs_ray
def test_other_tasks_use_it(table: Any) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def sums(rows: Any, ids: list[int]) -> tuple[float, str]:
        return float(rows.take(ids).sum()), repr(rows)

    asked = [sums.remote(table, [number, 700 - number]) for number in range(4)]
    for number, (total, said) in enumerate(ray.get(asked)):
        assert total == TABLE[[number, 700 - number]].sum()
        assert said == repr(table)
    # Takes of several threads at once.
    with ThreadPoolExecutor(8) as pool:
        ids = [np.random.default_rng(number).integers(0, 701, 50) for number in range(32)]
        for some, found in zip(ids, pool.map(table.take, ids), strict=True):
            np.testing.assert_array_equal(found, TABLE[some])


@needs_ray
def test_actors_end_with_the_last_copy(cluster: Any, parts: list[Path]) -> None:
    import ray
    from fremap.ray import DistributedRows

    @ray.remote(num_cpus=0)
    class Holder:
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def take(self, ids: list[int]) -> Any:
            return self.rows.take(ids)

        def close(self) -> None:
            self.rows.close()

    table = DistributedRows(parts[:2])
    processes = [shard.process for shard in table._shards]
    holder = Holder.remote(table)
    np.testing.assert_array_equal(ray.get(holder.take.remote([406, 0])), TABLE[[406, 0]])
    table.close()
    table.close()
    assert table.closed
    assert "closed" in repr(table)
    np.testing.assert_array_equal(ray.get(holder.take.remote([5])), TABLE[[5]])
    with pytest.raises(ClosedError, match=r"^take: "):
        table.take([0])
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(table)
    ray.get(holder.close.remote())
    wait_until(lambda: not any(map(alive, processes)), f"some of {processes} are alive")


@needs_ray
def test_close_lets_takes_end(own_table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fremap.ray import table as module

    monkeypatch.setattr(module, "_ROUND_BYTES", 48 * 100)
    rounds = own_table._rounds(np.arange(701), out := np.empty_like(TABLE))
    asked = next(rounds)
    own_table.close()
    while asked is not None:
        values = module.got("take", asked.refs, asked.shards, None)
        asked = module._next(rounds, values)
    np.testing.assert_array_equal(out, TABLE)


@needs_ray
def test_an_actor_that_dies_is_restarted(own_table: Any) -> None:
    ids = [700, 3, 407, -1]
    for shard in own_table._shards[::2]:
        killed(shard.process)
    np.testing.assert_array_equal(own_table.take(ids), TABLE[ids])
    np.testing.assert_array_equal(own_table.take(ids), TABLE[ids])


@needs_ray
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


@needs_ray
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


@needs_ray
def test_a_restarted_actor_finds_other_files(cluster: Any, tmp_path: Path) -> None:
    from fremap.ray import DistributedRows

    path = tmp_path / "rows.npy"
    np.save(path, TABLE)
    with DistributedRows([path], timeout=None) as table:
        np.save(tmp_path / "new.npy", TABLE + 1)
        os.replace(tmp_path / "new.npy", path)
        killed(table._shards[0].process)
        with pytest.raises(StoreError, match="files are not those that the table was") as raised:
            table.take([0])
        assert raised.value.errno == errno.ESTALE
    with DistributedRows([path]) as table:
        path.unlink()
        killed(table._shards[0].process)
        with pytest.raises(StoreNotFoundError, match=r"take: actor 0 \(") as raised:
            table.take([0])
        assert (raised.value.errno, raised.value.filename) == (errno.ENOENT, str(path))
        with pytest.raises(StoreNotFoundError, match="refresh: actor 0"):
            table.refresh()


@needs_ray
def test_which_files_an_actor_may_go_on_with() -> None:
    """The same on the same machine; on another one, files of the same size."""
    from fremap.ray.actors import _same_elsewhere

    assert _same_elsewhere("one which sizes", "two others sizes")
    assert not _same_elsewhere("one which sizes", "one others sizes")
    assert not _same_elsewhere("one which sizes", "two which others")


@needs_ray
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


@needs_ray
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


@needs_ray
def test_where_actors_are_placed(cluster: Any, parts: list[Path]) -> None:
    import ray
    from fremap.ray import DistributedRows

    address = ray.nodes()[0]["NodeManagerAddress"]
    with pytest.raises(ArgumentError, match=f"'{address}' means 2 nodes; give the ID of") as raised:
        DistributedRows({address: parts[0]})
    assert cluster.second in str(raised.value)
    with pytest.raises(ArgumentError, match="no node is 'nowhere'"):
        DistributedRows({"nowhere": parts[0]})
    with pytest.raises(ArgumentError, match="give one of the two"):
        DistributedRows({cluster.first: parts[0]}, actor_options={"scheduling_strategy": "SPREAD"})
    with pytest.raises(ArgumentError, match="3 actor_options for 4 actors"):
        DistributedRows(parts, actor_options=[{}] * 3)
    with pytest.raises(ArgumentError, match=r"Ray cannot start actor 0 .*: .*num_cpu"):
        DistributedRows(parts, actor_options={"num_cpu": 1})
    options = {"resources": {"second": 1}}
    with DistributedRows(parts[:2], actor_options=options) as table:
        assert [shard.node for shard in table._shards] == [cluster.second] * 2


@needs_ray
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


@needs_ray
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


@needs_ray
def test_in_an_event_loop(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fremap.ray import table as module

    monkeypatch.setattr(module, "_ROUND_BYTES", 48 * 64)

    async def takes() -> None:
        ids = [np.random.default_rng(number).integers(-701, 701, 200) for number in range(8)]
        found = await asyncio.gather(*(table.take_async(some) for some in ids))
        for some, rows in zip(ids, found, strict=True):
            np.testing.assert_array_equal(rows, TABLE[some])
        out = np.empty((2, 12), np.float32)
        assert await table.take_async([3, -1], out) is out
        assert (await table.take_async([])).shape == (0, 12)
        with pytest.raises(PageRangeError, match="row 701 is outside"):
            await table.take_async([701])
        with stopped(table._shards[1].process):
            task = asyncio.ensure_future(table.take_async([0, 8], out))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        np.testing.assert_array_equal(await table.take_async([8]), TABLE[[8]])
        np.testing.assert_array_equal(out, TABLE[[3, -1]])

    asyncio.run(takes())


@needs_ray
def test_a_child_of_fork_is_refused(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's threads are not there; a fork here would also end Ray's part of this process."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(ForkError, match=r"^take: Ray does not work in a child of fork"):
        table.take([0])


@needs_ray
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
    assert "take: actor 0 (" in second
    assert "is lost" in second
    wait_until(lambda: not alive(int(process)), f"process {process} is alive")


@needs_ray
def test_an_error_that_is_not_fremaps(table: Any) -> None:
    from fremap.ray.calls import _failed
    from ray.exceptions import RayTaskError

    told = _failed("take", table._shards[2], RayTaskError("take", "", ValueError("seven")))
    assert isinstance(told, StoreError)
    assert told.errno == errno.EIO
    assert "take: actor 2 (" in str(told)
    assert "failed: ValueError('seven')" in str(told)


@needs_ray
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


@pytest.mark.parametrize("program", ["import fremap.ray", "import fremap; fremap.ray"])
def test_without_ray_it_says_what_to_do(program: str) -> None:
    command = [sys.executable, "-c", f"import sys; sys.modules['ray'] = None; {program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "ImportError: fremap.ray needs Ray, which is missing: pip install ray" in done.stderr


def test_fremap_alone_does_not_import_ray() -> None:
    program = "import sys, fremap, fremap.row_array; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
