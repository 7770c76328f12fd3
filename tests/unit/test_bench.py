"""`fremap bench`: pairing, judging, rendering; the competitors and the C loops do their whole job.

Nothing here says how fast anything is.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap import _core
from fremap.bench import competitors, fio, harness, loops, memory, pagers
from fremap.bench.datafile import PAGE_BYTES, SPARSE_PARTS, DataFile, PageDraw, SparseFile
from fremap.bench.harness import BenchError, Report, Row, Timing
from fremap.bench.machine import Machine, counting
from fremap.bench.render import as_json, as_text, number
from fremap.bench.sharded import SHARD_MULTIPLE, FreshRows, ShardedTable
from fremap.bench.suites import remap, slots

FILE_PAGES = 512


@pytest.fixture
def file(tmp_path: Path) -> Iterator[DataFile]:
    with DataFile(str(tmp_path), FILE_PAGES * PAGE_BYTES) as made:
        yield made


@pytest.fixture
def file_pages() -> np.ndarray:
    return np.random.default_rng(5).permutation(FILE_PAGES)[:200].astype(np.int64)


def first_words(pages: np.ndarray) -> list[int]:
    return pages.view(np.int64)[:, 0].tolist()


# Rounds


def test_contenders_take_turns_and_each_is_first_in_some_round() -> None:
    order: list[tuple[str, int]] = []

    def contender(name: str) -> harness.Contender:
        def run(number: int) -> Mapping[str, float]:
            order.append((name, number))
            return {name: number + 1.0}

        return run

    timings = harness.paired([contender("a"), contender("b")], rounds=2, operations=10, warm_ups=1)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert timings["a"] == Timing("a", (2.0, 3.0), 10)
    assert timings["b"].seconds == (2.0, 3.0)


def test_a_contender_may_time_several_things() -> None:
    timings = harness.paired(
        [lambda number: {"down": 1.0, "up": 2.0}], rounds=3, operations=1, warm_ups=0
    )
    assert timings["down"].seconds == (1.0, 1.0, 1.0)
    assert timings["up"].seconds == (2.0, 2.0, 2.0)


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    ours = Timing("ours", (1.0, 10.0, 1.0), 1)
    theirs = Timing("theirs", (3.0, 20.0, 5.0), 1)
    assert harness.times_faster("", ours, theirs).ratios == (3.0, 2.0, 5.0)
    assert harness.times_faster("", ours, theirs).value == 3.0
    assert harness.times_the_time("", ours, theirs).value == pytest.approx(1 / 3)


def test_ratio_is_for_an_operation() -> None:
    ours = Timing("ours", (1.0,), 100)
    theirs = Timing("theirs", (1.0,), 50)
    assert harness.times_faster("", ours, theirs).value == 2.0


# Bars


@pytest.mark.parametrize(
    ("row", "met", "bar"),
    [
        (Row("", 7.0, "", at_least=7), True, "≥ 7"),
        (Row("", 6.99, "", at_least=7), False, "≥ 7"),
        (Row("", 1.25, "", at_most=1.25), True, "≤ 1.25"),
        (Row("", 1.26, "", at_most=1.25), False, "≤ 1.25"),
        (Row("", 0, "", at_most=0), True, "≤ 0"),
        (Row("", 1.0, ""), None, ""),
    ],
)
def test_bar(row: Row, met: bool | None, bar: str) -> None:
    assert row.met is met
    assert row.bar == bar


@pytest.fixture
def report() -> Report:
    slow, fast = Timing("slow side", (3e-6,), 1), Timing("fast side", (1e-6,), 1)
    report = Report("remap", "a title", notes=["a note"], missing=["no loop", "no loop"])
    report.rows.append(harness.times_faster("won", fast, slow, at_least=2))
    report.rows.append(harness.times_the_time("lost", slow, fast, at_most=1.25))
    report.count("faults", 4, "faults", at_most=0)
    return report


def test_report_knows_its_losses_and_its_unmet_bars(report: Report) -> None:
    assert [(ours.name, theirs.name) for ours, theirs in report.losses] == [
        ("slow side", "fast side")
    ]
    assert [row.what for row in report.unmet] == ["lost", "faults"]


def test_text_shows_losses_unmet_bars_and_what_is_missing(report: Report) -> None:
    text = as_text(Machine.this(), [report], bars=True)
    assert "loses: slow side takes 3 µs where fast side takes 1" in text
    assert "misses its bar: faults: 4 faults (≤ 0)" in text
    assert "misses its bar: lost: 0.333 times as fast (≥ 0.8)" in text
    assert text.count("not measured: no loop") == 1
    assert "a note" in text
    won = next(line for line in text.splitlines() if "won" in line)
    assert won.split() == ["won", "1", "3", "3", "times", "as", "fast", "≥", "2", "yes"]


def test_text_says_times_as_fast_and_bars_when_asked(report: Report) -> None:
    slow, fast = Timing("slow side", (3e-6,), 1), Timing("fast side", (1e-6,), 1)
    report.rows.append(harness.times_the_time("NONE, of a loop", slow, fast))
    text = as_text(Machine.this(), [report])
    assert "of the time" not in text
    assert "faster" not in text
    assert "≥" not in text
    assert "misses its bar" not in text
    line = next(line for line in text.splitlines() if "a loop" in line)
    assert line.split() == ["NONE,", "vs", "a", "loop", "3", "1", "0.333", "times", "as", "fast"]


def test_json_has_every_round(report: Report) -> None:
    document = json.loads(as_json(Machine.this(), [report]))
    won, lost, faults = document["reports"][0]["rows"]
    assert won["fremap"]["seconds"] == [1e-6]
    assert won["other"]["name"] == "slow side"
    assert lost["met"] is False
    assert faults == faults | {"value": 4, "at_most": 0, "fremap": None, "ratios": []}
    assert document["machine"]["processors"] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (3.0, "3"), (1234.5, "1234"), (0.12345, "0.123"), (9.876, "9.88")]
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


# The file


def test_file_is_numbered_and_removed(tmp_path: Path) -> None:
    with DataFile(str(tmp_path), 3 * PAGE_BYTES + 1) as file:
        pages = np.fromfile(file.path, dtype=np.int64).reshape(-1, PAGE_BYTES // 8)
        assert pages[:, 0].tolist() == [0, 1, 2]
        file.warm()
        assert file.resident().tolist() == [True, True, True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size_bytes", [0, 1 << 50])
def test_file_of_a_size_that_cannot_be_is_refused(tmp_path: Path, size_bytes: int) -> None:
    with pytest.raises(BenchError, match="page"):
        DataFile(str(tmp_path), size_bytes)
    assert list(tmp_path.iterdir()) == []


def test_draw_is_the_same_for_one_round_and_another_for_the_next() -> None:
    draw = PageDraw(1000)
    first = draw.distinct(0, 500)
    assert len(np.unique(first)) == 500
    assert first.tolist() == draw.distinct(0, 500).tolist()
    assert first.tolist() != draw.distinct(1, 500).tolist()
    with pytest.raises(BenchError, match="1001 different pages of a file of 1000"):
        draw.distinct(0, 1001)


def test_sparse_file_has_its_numbers_in_a_quarter(tmp_path: Path) -> None:
    with SparseFile(str(tmp_path), 2 << 20) as file:
        pages = np.fromfile(file.path, dtype=np.int64).reshape(-1, PAGE_BYTES // 8)
        data = file.data_pages()
        assert file.page_count == len(pages) == SPARSE_PARTS * len(data)
        assert pages[data, 0].tolist() == data.tolist()
        assert np.count_nonzero(pages.any(axis=1)) == len(data)
        assert os.stat(file.path).st_blocks * 512 < file.size_bytes
    with pytest.raises(BenchError, match="at least"):
        SparseFile(str(tmp_path), 100)


# Pagers


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[SparseFile]:
    with SparseFile(str(tmp_path), 32 << 20) as made:
        yield made


PAGERS = [
    pytest.param(pagers.FREMAP, marks=pytest.mark.needs("paged")),
    pytest.param(pagers.FREMAP_DIRECT, marks=pytest.mark.needs("paged")),
    pagers.MEMMAP,
    pagers.MMAP_RANDOM,
    pagers.CACHE,
]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGERS)
def test_pager_reads_and_stores(sparse: SparseFile, name: str) -> None:
    pages = np.random.default_rng(7).permutation(sparse.data_pages())[:6000]
    with pagers.PagerProcess(name, sparse.path, 64 << 20, writable=True, group=None) as pager:
        first = pager.touch(pages, None)
        again = pager.touch(pages, None)
        assert 0 == again.misses <= first.misses <= len(pages)
        pager.touch(pages, 42)
        pager.close()
        assert pager.samples >= 3
        assert pager.held_bytes > 0
    stored = np.fromfile(sparse.path, dtype=np.int64).reshape(-1, PAGE_BYTES // 8)[pages, 1] == 42
    assert stored.tolist() == [number % pagers.STORE_EVERY == 0 for number in range(len(pages))]


def test_cache_of_pages_drops_the_one_used_longest_ago(sparse: SparseFile) -> None:
    first, second, third = sparse.data_pages()[:3].tolist()
    room_for_two = 2 * (PAGE_BYTES + 256)
    with pagers.PagerProcess(
        pagers.CACHE, sparse.path, room_for_two, writable=False, group=None
    ) as pager:
        touched = pager.touch(np.array([first, second, first, third, first, second]), None)
        assert (touched.misses, touched.evicted) == (4, 2)


def test_pager_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match=r"OrderedDict.*No such file"),
        pagers.PagerProcess(
            pagers.CACHE, tmp_path / "absent", 1, writable=False, group=None
        ) as pager,
    ):
        pager.touch(np.arange(1), None)


def test_memory_group_is_made_and_removed_or_is_not_to_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    group = memory.MemoryGroup.new("test")
    if group is not None:
        with group:
            assert group._path.exists()
            group.limit_further(1 << 20)
        assert not group._path.exists()
    monkeypatch.setattr(memory, "_parents", lambda: [(tmp_path, 1), (tmp_path / "absent", 2)])
    assert memory.MemoryGroup.new("test") is None
    assert list(tmp_path.iterdir()) == []


# Competitors


@pytest.mark.parametrize("name", ["mmap_fixed", "remap_file_pages"])
def test_piece_window_shows_the_pages(file: DataFile, file_pages: np.ndarray, name: str) -> None:
    with competitors.PieceWindow(file.fd, len(file_pages)) as window:
        for order in (file_pages, file_pages[::-1].copy()):
            outcome = getattr(window, name)(order)
            assert outcome.completed == len(order)
            assert outcome.refusal is None
            assert outcome.vma_count > len(order) / 2
            assert first_words(window.pages) == order.tolist()
    with pytest.raises(ValueError, match="closed"):
        window.mmap_fixed(file_pages)


@pytest.mark.once
@pytest.mark.parametrize("call", [competitors.mmap_fixed, competitors.remap_file_pages])
def test_pieces_end_at_the_limit_of_mappings(
    file: DataFile, call: Callable[..., competitors.Outcome]
) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    scattered = np.arange(limit + 1000) * 7 % FILE_PAGES
    outcome = call(file.fd, scattered)
    assert outcome.refusal is not None
    assert outcome.refusal.startswith("ENOMEM")
    assert outcome.completed < limit
    assert competitors.process_vma_count() < limit / 2, "the pieces are gone again"


def test_remap_file_pages_needs_a_writable_descriptor(
    file: DataFile, file_pages: np.ndarray
) -> None:
    fd = os.open(file.path, os.O_RDONLY)
    try:
        outcome = competitors.remap_file_pages(fd, file_pages)
    finally:
        os.close(fd)
    assert outcome.completed == 0
    assert outcome.refusal is not None
    assert outcome.refusal.startswith("EINVAL")


def test_copiers_copy_the_pages(file: DataFile, file_pages: np.ndarray) -> None:
    for copy in (
        lambda out: competitors.memmap_take(file.path, file_pages, out=out),
        lambda out: competitors.fadvise_then_read(file.fd, file_pages, out),
        lambda out: competitors.pread_pool(file.fd, file_pages, out, threads=3),
    ):
        out = np.zeros((len(file_pages), PAGE_BYTES), dtype=np.uint8)
        assert copy(out).completed == len(file_pages)
        assert first_words(out) == file_pages.tolist()
    assert competitors.memmap_take(file.path, file_pages).completed == len(file_pages)


# The C loops


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("remap_move", marks=pytest.mark.needs("userfaultfd", "uffd_move")),
        pytest.param("fault_copy", marks=pytest.mark.needs("userfaultfd")),
        "mmap_fixed",
        "remap_file_pages",
    ],
)
def test_loop_shows_the_pages(file: DataFile, file_pages: np.ndarray, name: str) -> None:
    """Each loop compares its window with the file after each round, and ends if they differ."""
    with loops.Loop(name, file.path, len(file_pages)) as loop:
        for order in (file_pages, file_pages[:150], file_pages[::-1].copy()):
            assert len(loop.run(order)) == 1


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("fault_copy", "linear", marks=pytest.mark.needs("userfaultfd")),
        pytest.param("fault_signal", "linear", marks=pytest.mark.needs("userfaultfd")),
        ("mmap_fixed", "writable"),
        ("remap_file_pages", "writable"),
    ],
)
def test_loop_has_a_variant(file: DataFile, file_pages: np.ndarray, name: str, mode: str) -> None:
    with loops.Loop(name, file.path, FILE_PAGES, mode) as loop:
        for order in (file_pages, np.arange(100, 300)):
            assert len(loop.run(order)) == 1
    with pytest.raises(BenchError, match=name):
        loops.Loop(name, file.path, FILE_PAGES, "another")


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        pytest.param("direct", marks=pytest.mark.needs("io_uring")),
        pytest.param("buffered", marks=pytest.mark.needs("io_uring")),
        "advised",
        "threads",
    ],
)
@pytest.mark.parametrize("row_bytes", [160, 65_536])
def test_rows_loop_takes_what_fremap_takes(tmp_path: Path, way: str, row_bytes: int) -> None:
    """It reads some rows again by plain reads, and ends if they differ."""
    with (
        ShardedTable(str(tmp_path), 3 * SHARD_MULTIPLE, 3) as table,
        table.rows(row_bytes) as rows,
        loops.Loop("take_rows", table.list_file(), 70, table.loop_mode(way, row_bytes)) as loop,
    ):
        assert len(rows) == 3 * table.shard_rows(row_bytes)
        draw = np.random.default_rng(1)
        for count in (1, 18, 70):
            assert len(loop.run(draw.integers(0, len(rows), count))) == 1
        np.testing.assert_array_equal(rows[[0, 5]], table.map(0, row_bytes)[[0, 5]])


def test_rows_loop_refuses_another_way(tmp_path: Path) -> None:
    with (
        ShardedTable(str(tmp_path), SHARD_MULTIPLE, 1) as table,
        pytest.raises(BenchError, match="take_rows"),
    ):
        loops.Loop("take_rows", table.list_file(), 1, table.loop_mode("another", 160))


def test_no_row_is_drawn_twice(tmp_path: Path) -> None:
    with ShardedTable(str(tmp_path), 2 * SHARD_MULTIPLE, 2) as table:
        fresh = FreshRows(table, 160)
        pages = table.shard_bytes // PAGE_BYTES * 2
        drawn = np.concatenate([fresh.draw(1000) for _ in range(pages // 1000)])
        shard, row = np.divmod(drawn, table.shard_rows(160))
        assert len({*zip(shard.tolist(), (row * 160 // PAGE_BYTES).tolist(), strict=True)}) == len(
            drawn
        )
        assert (drawn >= 0).all()
        assert (drawn < 2 * table.shard_rows(160)).all()
        with pytest.raises(BenchError, match="--file-size"):
            fresh.draw(1000)


def test_mprotect_loop_times_two_things(file: DataFile) -> None:
    with loops.Loop("mprotect", file.path, 100) as loop:
        assert len(loop.run(np.arange(0, 100, 2))) == 2


def test_loop_that_ends_says_why(file: DataFile, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"mmap_fixed\.c: .*No such file"):
        loops.Loop("mmap_fixed", tmp_path / "absent", 1)
    with loops.Loop("mmap_fixed", file.path, 2) as loop, pytest.raises(BenchError, match="request"):
        loop.run(np.arange(3))


def test_without_a_compiler_or_a_checkout_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: DataFile
) -> None:
    assert loops.unavailable() is None
    monkeypatch.setenv("PATH", "")
    assert "no C compiler" in (loops.unavailable() or "")
    assert "fio is not installed" in (fio.unavailable(file.path) or "")
    monkeypatch.setattr(loops, "SOURCES", tmp_path)
    assert "not run from a checkout" in (loops.unavailable() or "")


# Counts


def test_counting_counts_faults_of_the_block() -> None:
    with counting() as counts:
        # More than the allocator keeps at hand, so that the pages are new.
        np.ones(1 << 26, dtype=np.uint8).sum()
    assert counts.faults > 0


def test_counting_counts_no_answers(tmp_path: Path) -> None:
    """What a test can have the kernel answer is no system call."""
    with (
        fremap.MemoryStore(64 * PAGE_BYTES) as store,
        fremap.Window(store, 16, mapping="none") as window,
        counting() as counts,
    ):
        window.remap(range(16))
    path = tmp_path / "pages"
    path.write_bytes(bytes(64 * PAGE_BYTES))
    with (
        fremap.open(path, "r+", direct=True) as direct,
        fremap.Window(
            direct, populate=True, prot=fremap.Prot.WRITE, coherent=False, engine="eager"
        ) as written,
    ):
        written.pages[::2] = 1
        before = _core.system_calls()
        with counting() as flushed:
            written.flush()
        after = _core.system_calls()
    answers = [name for name in after if name.endswith("_answer")]
    assert len(answers) == 2
    for found in (counts, flushed):
        assert found.system_calls
        assert not found.system_calls.keys() & set(answers)
        assert found.system_call_count == sum(found.system_calls.values())
    others = sum(after[name] - before[name] for name in after if name not in answers)
    assert flushed.system_call_count == others


@pytest.mark.needs("paged")
def test_the_loop_of_move_is_left_out_where_the_kernel_has_none() -> None:
    report = Report("remap", "a title")
    _core.inject_failure("probe_uffdio_move", 0, errno.EINVAL, 1_000_000)
    try:
        names = remap._bare_loops(report)
    finally:
        _core.clear_failures()
    assert names == ["mmap_fixed", "remap_file_pages"]
    (said,) = report.missing
    assert "UFFDIO_MOVE" in said


# Slots of extents


@pytest.mark.parametrize(
    "name",
    [
        slots._AUTO,
        slots._PREAD,
        slots._FADVISE,
        slots._POOL,
        slots._MEMMAP,
        slots._MMAP,
        slots._MMAP_RANDOM,
    ],
)
def test_a_side_of_the_slots_reads_what_it_is_asked_for(file: DataFile, name: str) -> None:
    """Of 128 extents the slots hold 32; what it reads is checked, and is wrong elsewhere."""
    accesses = slots._Accesses(FILE_PAGES // 4, 4 * PAGE_BYTES)
    accesses.count = 300
    with slots._sides(file, 4 * PAGE_BYTES, 32)[name]() as side:
        for number in range(3):
            accesses.read(side, number)
        assert side.hit_ratio is None or 0 < side.hit_ratio < 1
    with slots._sides(file, 4 * PAGE_BYTES, 32)[name]() as side:
        accesses.extent_pages = 8
        with pytest.raises(BenchError, match="not the one"):
            accesses.read(side, 0)
