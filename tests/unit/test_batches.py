"""Batches: what is in them, in which order, for whom, and how they end."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
from fremap import epochs
from fremap.batches import Batches
from hypothesis import given
from hypothesis import strategies as some

pytestmark = pytest.mark.any_user

FIRST_OF_SEED_7 = [4, 18, 2, 15, 9]


class Numbers:
    """Rows that are their own number; `take` can be made to wait or fail."""

    def __init__(self, length: int, before: Callable[[np.ndarray], object] = lambda ids: None):
        self.length, self.before = length, before

    def __len__(self) -> int:
        return self.length

    dtype, row_shape = np.dtype(np.int64), (2,)

    def take(self, ids: np.ndarray, out: np.ndarray) -> np.ndarray:
        assert ids.dtype == np.int64
        self.before(ids)
        return np.stack([ids, -ids], axis=1, out=out)


def ids_of(batches: Batches) -> list[list[int]]:
    return [batch[:, 0].tolist() for batch in batches]


def all_ids(batches: Batches) -> list[int]:
    return [row for batch in ids_of(batches) for row in batch]


def reading_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fremap-batches")]


# Order


def test_in_order() -> None:
    assert ids_of(Batches(Numbers(5), 2, "sequential")) == [[0, 1], [2, 3], [4]]


def test_a_seed_is_one_order_on_every_machine() -> None:
    """The numbers are those of PCG64, written down once."""
    assert all_ids(Batches(Numbers(20), 4, seed=7))[:5] == FIRST_OF_SEED_7


def test_seeds_and_epochs_differ() -> None:
    orders = [
        all_ids(Batches(Numbers(100), 7, seed=seed, epoch=epoch))
        for seed in (1, 2, 2**62)
        for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    assert orders[0] == all_ids(Batches(Numbers(100), 3, seed=1, prefetch=0))


def test_without_a_seed_one_is_drawn_and_told() -> None:
    batches = Batches(Numbers(100), 10)
    order = all_ids(batches)
    assert order != all_ids(Batches(Numbers(100), 10))
    assert order == all_ids(Batches(Numbers(100), 10, seed=batches.state()["seed"]))


def test_a_long_shuffle_is_as_good() -> None:
    length = (1 << 19) + 3
    order = np.concatenate(list(Batches(Numbers(length), 100_000, seed=3, prefetch=0)))[:, 0]
    assert not (np.diff(order) == 1).all()
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


def test_chosen_rows_with_repeats_and_from_the_end() -> None:
    chosen = np.array([3, 3, -1, 0])
    batches = Batches(Numbers(5), 3, chosen)
    chosen[:] = 0  # the caller's own again
    assert ids_of(batches) == [[3, 3, 4], [0]]
    assert ids_of(Batches(Numbers(5), 3, [])) == []
    assert ids_of(Batches(Numbers(1000), 3, np.array([-1], dtype=np.int8))) == [[999]]
    assert ids_of(Batches(Numbers(5), 3, np.array([4], dtype=np.uint64))) == [[4]]


def test_ids_are_given_where_asked_for() -> None:
    for ids, batch in Batches(Numbers(9), 4, seed=1, return_ids=True):
        assert ids.dtype == np.int64
        np.testing.assert_array_equal(ids, batch[:, 0])


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_no_rows(order: str) -> None:
    batches = Batches(Numbers(0), 4, order)
    assert len(batches) == 0
    assert list(batches) == []


# Ranks and workers


@given(
    length=some.integers(0, 60),
    batch_size=some.integers(1, 9),
    world_size=some.integers(1, 4),
    worker_count=some.integers(1, 3),
    ends=some.sampled_from(["keep", "drop", "pad"]),
    order=some.sampled_from(["shuffle", "sequential", "array"]),
)
def test_every_row_once_over_all_ranks_and_workers(
    length: int, batch_size: int, world_size: int, worker_count: int, ends: str, order: str
) -> None:
    chosen = np.arange(length)[::-1] if order == "array" else order
    parts = [
        [
            Batches(
                Numbers(length), batch_size, chosen,
                seed=5 if order == "shuffle" else None, prefetch=0,
                drop_last=ends == "drop", pad=ends == "pad",
                rank=rank, world_size=world_size, worker=worker, worker_count=worker_count,
            )
            for worker in range(worker_count)
        ]
        for rank in range(world_size)
    ]  # fmt: skip
    counts = [sum(map(len, workers)) for workers in parts]
    taken = [[ids_of(batches) for batches in workers] for workers in parts]
    assert counts == [sum(map(len, workers)) for workers in taken]
    rows = [row for workers in taken for batches in workers for batch in batches for row in batch]
    sizes = [len(batch) for workers in taken for batches in workers for batch in batches]
    if ends == "keep":
        assert sorted(rows) == list(range(length))
        assert max(counts) - min(counts) <= 1
    elif ends == "drop":
        assert len(set(rows)) == len(rows) == length - length % (batch_size * world_size)
        assert set(sizes) <= {batch_size}
        assert len(set(counts)) == 1
    else:
        assert set(rows) == set(range(length))
        assert len(rows) == -(-length // world_size) * world_size
        assert len(set(counts)) == 1
    for workers in taken:
        # As a DataLoader takes from its workers in turn: the order of a rank without workers.
        turns = [batches[k] for k in range(length) for batches in workers if k < len(batches)]
        assert [len(batch) for batch in turns[:-1]] == [batch_size] * (len(turns) - 1)


def test_workers_in_turn_have_the_order_of_one() -> None:
    alone = ids_of(Batches(Numbers(50), 4, seed=1, rank=1, world_size=2))
    workers = [
        ids_of(Batches(Numbers(50), 4, seed=1, rank=1, world_size=2, worker=w, worker_count=3))
        for w in range(3)
    ]
    assert [workers[k % 3][k // 3] for k in range(len(alone))] == alone


# State


@given(
    length=some.integers(1, 40),
    batch_size=some.integers(1, 7),
    done=some.integers(0, 45),
    prefetch=some.integers(0, 3),
    worker=some.integers(0, 1),
)
def test_a_state_goes_on_with_exactly_what_was_not_yielded(
    length: int, batch_size: int, done: int, prefetch: int, worker: int
) -> None:
    def make(**more: Any) -> Batches:
        return Batches(
            Numbers(length), batch_size, seed=9, prefetch=prefetch, worker=worker, worker_count=2,
            **more,
        )  # fmt: skip

    whole = ids_of(make())
    with make() as batches:
        front = [next(batches)[:, 0].tolist() for _ in range(min(done, len(batches)))]
        state = json.loads(json.dumps(batches.state()))
    assert front + ids_of(make(state=state)) == whole


def test_the_state_of_a_rank_is_shared_out_among_workers() -> None:
    whole = ids_of(Batches(Numbers(50), 4, seed=1))
    with Batches(Numbers(50), 4, seed=1) as batches:
        for _ in range(5):
            next(batches)
        state = batches.state()
    workers = [
        ids_of(Batches(Numbers(50), 4, seed=1, worker=w, worker_count=2, state=state))
        for w in range(2)
    ]
    assert [workers[k % 2][k // 2] for k in range(len(whole) - 5)] == whole[5:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3}, "batch_size=2 and this is batch_size=3"),
        ({"seed": 2}, "seed=1"),
        ({"epoch": 1}, "epoch=0"),
        ({"rows": Numbers(9)}, "rows=8"),
        ({"order": "sequential", "seed": None}, "order='shuffle'"),
        ({"rank": 1, "world_size": 2}, "rank=0"),
        ({"drop_last": True}, "drop_last=False"),
        ({"worker": 1, "worker_count": 2, "of_worker": True}, "worker 0 of 3"),
        ({"old": True}, "version 0"),
    ],
)
def test_a_state_of_other_batches_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"rows": Numbers(8), "batch_size": 2, "seed": 1}
    more = {"worker_count": 3} if options.pop("of_worker", False) else {}
    state = Batches(**given, **more).state()
    if options.pop("old", False):
        state["version"] = 0
    with pytest.raises(fremap.ArgumentError, match=message):
        Batches(**given | options, state=state)


def test_a_state_of_another_array_is_refused() -> None:
    state = Batches(Numbers(8), 2, [1, 2, 3]).state()
    with pytest.raises(fremap.ArgumentError, match="another array"):
        Batches(Numbers(8), 2, [1, 2, 4], state=state)


# Reading ahead


def test_so_many_batches_are_read_ahead_and_no_more() -> None:
    began: list[int] = []
    enough = threading.Condition()

    def note(ids: np.ndarray) -> None:
        with enough:
            began.append(int(ids[0]))
            enough.notify_all()

    with Batches(Numbers(100, note), 1, "sequential", prefetch=3) as batches:
        assert began == []
        for number in range(5):
            next(batches)
            with enough:
                assert enough.wait_for(lambda: len(began) == number + 4, timeout=30)  # noqa: B023
        assert 1 <= len(reading_threads()) <= 3
        assert sorted(began) == list(range(8))
    assert reading_threads() == []


def test_without_reading_ahead_there_is_no_thread() -> None:
    seen = []
    rows = Numbers(4, lambda ids: seen.append(threading.current_thread()))
    assert all_ids(Batches(rows, 2, "sequential", prefetch=0)) == [0, 1, 2, 3]
    assert set(seen) == {threading.current_thread()}


def test_threads_end_with_the_epoch_and_with_the_iterator() -> None:
    batches = Batches(Numbers(9), 2, prefetch=4)
    list(batches)
    assert reading_threads() == []
    assert list(batches) == []
    dropped = Batches(Numbers(100), 2, prefetch=4)
    next(dropped)
    threads = reading_threads()
    assert threads
    del dropped
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_a_closed_iterator_says_so() -> None:
    batches = Batches(Numbers(9), 2)
    batches.close()
    batches.close()
    with pytest.raises(fremap.ClosedError, match="closed"):
        next(batches)
    assert batches.state()["next_batch"] == 0


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_failed_read_is_raised_in_its_turn_and_can_be_tried_again(prefetch: int) -> None:
    broken = [True]

    def fail(ids: np.ndarray) -> None:
        if 4 in ids and broken:
            raise fremap.StoreError(5, "the disk is gone")

    batches = Batches(Numbers(8, fail), 2, "sequential", prefetch=prefetch)
    assert [next(batches)[0, 0] for _ in range(2)] == [0, 2]
    for _ in range(2):
        with pytest.raises(fremap.StoreError, match="the disk is gone"):
            next(batches)
        assert batches.state()["next_batch"] == 2
    broken.clear()
    assert ids_of(batches) == [[4, 5], [6, 7]]
    assert reading_threads() == []


def test_an_interrupt_loses_no_batch() -> None:
    """The main thread waits for a read that does not end until it was interrupted."""
    interrupted = threading.Event()
    main = threading.main_thread().ident

    def wait(ids: np.ndarray) -> None:
        if 2 in ids and not interrupted.is_set():
            while not interrupted.is_set():
                signal.pthread_kill(main, signal.SIGINT)
                interrupted.wait(0.05)

    def interrupt(number: int, frame: object) -> None:
        # A second signal may be on its way when the first one is handled.
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    batches = Batches(Numbers(6, wait), 2, "sequential", prefetch=1)
    taken = []
    # Who runs the tests in the background may have it ignored.
    before = signal.signal(signal.SIGINT, interrupt)
    interrupts = 0
    try:
        while True:
            try:
                for batch in batches:
                    taken.append(batch[:, 0].tolist())  # noqa: PERF401 - what was taken stays
                break
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupts == 1
    assert taken == [[0, 1], [2, 3], [4, 5]]


def test_an_interrupt_while_the_order_is_made_leaves_it_to_be_made() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    length = 2 << 20
    batches = Batches(Numbers(length), 1 << 20, seed=1)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            while True:
                next(batches)
                batches = Batches(Numbers(length), 1 << 20, seed=1)  # another order to be made
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    done = batches.state()["next_batch"]
    seen = np.zeros(length, bool)
    for batch in batches:
        seen[batch[:, 0]] = True
    assert np.count_nonzero(seen) == length - (done << 20)


def test_several_threads_take_from_one_iterator() -> None:
    batches = Batches(Numbers(2000), 3, seed=4)
    taken: list[int] = []

    def work() -> None:
        for batch in batches:
            taken.extend(batch[:, 0].tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(2000))


def test_a_child_goes_on_where_its_parent_was(in_child: Callable[..., int]) -> None:
    slow = Numbers(40, lambda ids: time.sleep(0.001))
    batches = Batches(slow, 4, seed=2, prefetch=3)
    whole = ids_of(Batches(slow, 4, seed=2))
    assert [next(batches)[:, 0].tolist() for _ in range(2)] == whole[:2]

    def child() -> None:
        assert ids_of(batches) == whole[2:]
        assert [t.name for t in reading_threads()] == []

    assert in_child(child) == 0
    assert ids_of(batches) == whole[2:]


def test_a_child_may_close_what_its_parent_uses(in_child: Callable[..., int]) -> None:
    batches = Batches(Numbers(40), 4, seed=2)
    next(batches)
    assert in_child(batches.close) == 0
    assert len(ids_of(batches)) == 9


def test_batches_are_not_pickled() -> None:
    with pytest.raises(TypeError, match="state="):
        pickle.dumps(Batches(Numbers(4), 2))


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": True}, TypeError, "not a bool"),
        ({"order": "random"}, ValueError, "order is 'random'"),
        ({"order": [1.5]}, TypeError, "not float64"),
        ({"order": [True, False]}, TypeError, "not bool"),
        ({"order": [[1]]}, ValueError, "2 dimensions"),
        ({"order": [1, 8]}, IndexError, "row 8 is outside -8..8"),
        ({"order": [-9, 8]}, IndexError, "row -9 is outside -8..8"),
        ({"order": "sequential", "seed": 1}, ValueError, "seed is for"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"epoch": -1}, ValueError, "epoch is -1"),
        ({"rank": 1}, ValueError, "rank is 1 and world_size 1"),
        ({"worker": 2, "worker_count": 2, "seed": 1}, ValueError, "worker is 2"),
        ({"world_size": 0}, ValueError, "world_size 0"),
        ({"world_size": 2}, ValueError, "the same seed"),
        ({"drop_last": True, "pad": True}, ValueError, "choose one"),
        ({"prefetch": 5000}, ValueError, "at most 1024"),
        ({"prefetch": -1}, ValueError, "prefetch is -1"),
    ],
)
def test_arguments_that_cannot_be(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        Batches(Numbers(8), **{"batch_size": 2} | options)
    assert isinstance(raised.value, fremap.FremapError)


# Threads that cannot be started


class NoMoreThreads:
    """Have `threading.Thread.start` fail after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.left = allowed
        start = threading.Thread.start

        def refusing(thread: threading.Thread) -> None:
            if self.left == 0:
                raise RuntimeError("can't start new thread")
            self.left -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refusing)


def test_without_a_thread_every_next_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(Numbers(10), 4, "sequential")
    limit = NoMoreThreads(monkeypatch, 0)
    for _ in range(3):
        with pytest.raises(fremap.MemoryLimitError, match=r"can't start new thread.*prefetch=0"):
            next(batches)
    limit.left = 2
    assert ids_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    batches.close()


def test_one_thread_reads_everything_if_a_second_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    NoMoreThreads(monkeypatch, 1)
    with Batches(Numbers(100), 4, "sequential", prefetch=8) as batches:
        assert all_ids(batches) == list(range(100))


LITTLE_MEMORY = """
import resource, sys
import numpy as np, fremap
rows = fremap.rows(sys.argv[1], np.uint8, 16)
batches = rows.batches(4, "sequential")
pages = int(open("/proc/self/statm").read().split()[0])
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), before[1]))
said = []
for _ in range(3):
    try:
        next(batches)
    except fremap.MemoryLimitError as error:
        said.append("no thread can be started" in str(error))
if sys.argv[2] == "raise":
    resource.setrlimit(resource.RLIMIT_AS, before)
    said.append(sum(map(len, batches)))
print(said)
"""


@pytest.mark.parametrize(
    ("after", "said"), [("raise", "[True, True, True, 64]"), ("end", "[True, True, True]")]
)
def test_a_limit_on_memory(tmp_path: Path, after: str, said: str) -> None:
    (tmp_path / "rows").write_bytes(bytes(64 * 16))
    command = [sys.executable, "-c", LITTLE_MEMORY, tmp_path / "rows", after]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{said}\n")


# Orders that take long to make


def test_an_interrupt_does_not_wait_for_a_long_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call waits for the order that is being made already."""
    length = epochs._LONG_ORDER
    begun, may_end, made = threading.Event(), threading.Event(), []

    def shuffled(length: int, seed: int, epoch: int) -> np.ndarray:
        made.append((length, seed, epoch))
        begun.set()
        may_end.wait()
        return np.arange(length)[::-1]

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(epochs, "_shuffled", shuffled)
    interrupter = threading.Thread(target=interrupt)
    # A shell has what it runs in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupter.start()
        with Batches(Numbers(length), 3, seed=5, prefetch=0) as batches:
            with pytest.raises(KeyboardInterrupt):
                next(batches)
            interrupter.join()
            may_end.set()
            assert next(batches)[:, 0].tolist() == [length - 1, length - 2, length - 3]
    finally:
        signal.signal(signal.SIGINT, before)
    assert made == [(length, 5, 0)]


def test_a_long_order_of_a_seed_is_what_it_always_was() -> None:
    order = np.arange(epochs._LONG_ORDER + 3, dtype=np.int32)
    sequence = np.random.SeedSequence(7, spawn_key=(2,))
    np.random.Generator(np.random.PCG64(sequence)).shuffle(order)
    with Batches(Numbers(len(order)), 100, seed=7, epoch=2, prefetch=0) as batches:
        assert next(batches)[:, 0].tolist() == order[:100].tolist()


def test_a_long_array_is_checked_to_its_end() -> None:
    length = epochs._LONG_ORDER + 5
    order = np.arange(length)
    order[-2] = -1
    with Batches(Numbers(length), 2, order, prefetch=0) as batches:
        assert batches._epoch.ids(length // 2 - 1).tolist() == [length - 3, length - 1]
    order[-1] = length
    with pytest.raises(fremap.PageRangeError, match=f"row {length} is outside -{length}..{length}"):
        Batches(Numbers(length), 2, order)
