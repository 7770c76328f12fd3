"""Rows of several machines are what `fremap.rows` gives for the same files on one."""

import asyncio
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import fremap
import numpy as np
import pytest
from fremap import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    FremapError,
    PageRangeError,
)
from nodes import TABLE, alive, stopped, wait_until

pytestmark = [pytest.mark.once, pytest.mark.slow]
needs_ray = pytest.mark.needs("ray")

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
@pytest.mark.parametrize(
    ("round_rows", "actor_rows", "wanted"),
    [
        (100, 1, [[0, 1], [1], [1], [1], [1, 2], [2], [2], [2]]),
        (1, 100, [[0, 1], [1, 2], [2]]),
    ],
)
def test_a_take_asks_for_little_at_once(
    table: Any,
    round_rows: int,
    actor_rows: int,
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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

    monkeypatch.setattr(module, "_ROUND_BYTES", 48 * round_rows)
    monkeypatch.setattr(module, "_ACTOR_BYTES", 48 * actor_rows)
    monkeypatch.setattr(module, "Round", Watched)
    np.testing.assert_array_equal(table[:], TABLE)
    assert asked == wanted
    assert placed == list(map(len, wanted))
    assert max(ahead) == 2


@needs_ray
def test_a_take_lets_go_of_what_it_has_placed(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two rounds have in the object store is all that a take holds of it."""
    from fremap.ray import table as module

    class Sent(bytearray):
        __slots__ = ("__weakref__",)

    held: list[weakref.ref[Sent]] = []
    got = module.got

    def watched(*arguments: Any) -> list[Any]:
        assert [one for one in held if one() is not None] == []
        values = [Sent(value) for value in got(*arguments)]
        held.extend(map(weakref.ref, values))
        return values

    monkeypatch.setattr(module, "_ROUND_BYTES", 48 * 100)
    monkeypatch.setattr(module, "_ACTOR_BYTES", 0)
    monkeypatch.setattr(module, "got", watched)
    np.testing.assert_array_equal(table[:], TABLE)
    assert len(held) > 7


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

    with DistributedRows([parts], torch.float32) as table:
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
    monkeypatch.setattr(module, "_ACTOR_BYTES", 0)
    rounds = own_table._rounds(np.arange(701), out := np.empty_like(TABLE))
    asked = next(rounds)
    own_table.close()
    while asked is not None:
        values = module.got("take", asked.refs, asked.shards, None, own_table._session)
        asked = module._next(rounds, values)
    np.testing.assert_array_equal(out, TABLE)


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
    for wrong in (7, "x", [7, {}], {"num_cpus"}):
        with pytest.raises(ArgumentTypeError, match="actor_options must be a mapping for all"):
            DistributedRows(parts[:2], actor_options=wrong)
    with pytest.raises(ArgumentError, match=r"cannot start actor 1 .*: .*<generator") as raised:
        DistributedRows([parts[0], (path for path in parts)])
    assert "\n" not in str(raised.value)
    with pytest.raises(ArgumentError, match=r"Ray cannot start actor 0 .*: .*num_cpu"):
        DistributedRows(parts, actor_options={"num_cpu": 1})
    options = {"resources": {"second": 1}}
    with DistributedRows(parts[:2], actor_options=options) as table:
        assert [shard.node for shard in table._shards] == [cluster.second] * 2


@needs_ray
def test_in_an_event_loop(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fremap.ray import table as module

    monkeypatch.setattr(module, "_ROUND_BYTES", 48 * 64)
    monkeypatch.setattr(module, "_ACTOR_BYTES", 0)

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


@pytest.mark.parametrize("program", ["import fremap.ray", "import fremap; fremap.ray"])
def test_without_ray_it_says_what_to_do(program: str) -> None:
    command = [sys.executable, "-c", f"import sys; sys.modules['ray'] = None; {program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "ImportError: fremap.ray needs Ray, which is missing: pip install ray" in done.stderr


def test_fremap_alone_does_not_import_ray() -> None:
    program = "import sys, fremap, fremap.row_array; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
