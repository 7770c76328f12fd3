"""Rows that are kept in memory: hits, what is seen of a file that changes, threads, children."""

from __future__ import annotations

import os
import pickle
import threading
from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
from fremap.errors import ArgumentError, TruncatedError
from fremap.testing import wait_until_settled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COUNT = 3000
TABLE = np.random.default_rng(9).integers(0, 256, (COUNT, 100), np.uint8)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.bin" for number in range(3)]
    for path, part in zip(paths, np.split(TABLE, 3), strict=True):
        part.tofile(path)
        wait_until_settled(path)
    return paths


def opened(paths: list[Path], cache_bytes: int = 1 << 20, **options: bool) -> fremap.Rows:
    return fremap.rows(paths, np.uint8, 100, cache_bytes=cache_bytes, **options)


@pytest.mark.parametrize("direct", [False, True])
def test_rows_that_are_kept_are_not_read_again(paths: list[Path], direct: bool) -> None:
    ids = np.random.default_rng(1).integers(-COUNT, COUNT, 500)
    with opened(paths, direct=direct) as rows:
        np.testing.assert_array_equal(rows.take(ids), TABLE[ids])
        before = rows.stats()
        assert before.cache_hits == 0
        assert before.cached_bytes >= len(set((ids % COUNT).tolist())) * 100
        for _ in range(3):
            np.testing.assert_array_equal(rows.take(ids), TABLE[ids])
        np.testing.assert_array_equal(rows.submit(ids[::-1]).result(), TABLE[ids[::-1]])
        after = rows.stats()
    assert after.cache_hits == 4 * len(ids)
    assert (after.reads, after.rows_read, after.rows_copied) == (
        before.reads, before.rows_read, before.rows_copied,
    )  # fmt: skip


def test_few_fit(paths: list[Path]) -> None:
    """Whatever leaves and comes, rows are right and the memory is what was asked for."""
    draw = np.random.default_rng(2)
    with opened(paths, 50_000) as rows:
        for _ in range(200):
            ids = (COUNT * draw.random(100) ** 4).astype(np.int64)
            np.testing.assert_array_equal(rows.take(ids), TABLE[ids])
        stats = rows.stats()
        assert 0 < stats.cached_bytes <= 50_000
        assert stats.cache_hits > 5000
        hits = stats.cache_hits
        rows.take(slice(None))  # a scan goes by
        assert rows.stats().cache_hits == hits


def test_none_is_kept_unless_it_is_asked_for(paths: list[Path]) -> None:
    with fremap.rows(paths, np.uint8, 100) as rows, opened(paths, 10) as too_few:
        for table in (rows, too_few):
            for _ in range(3):
                table.take([1, 2])
            assert (table.stats().cache_hits, table.stats().cached_bytes) == (0, 0)
    for wrong in (-1, 1 << 70):
        with pytest.raises(ArgumentError, match="cache_bytes"):
            opened(paths, wrong)
    with pytest.raises(TypeError, match="cache_bytes"):
        fremap.rows(paths, np.uint8, 100, cache_bytes=1.5)  # type: ignore[arg-type]
    for text in ("64X", "", "-1", "8388608T"):
        with pytest.raises(ArgumentError, match="cache_bytes"):
            fremap.rows(paths, np.uint8, 100, cache_bytes=text)


def test_the_memory_may_be_said_as_a_size(paths: list[Path]) -> None:
    for said in ("1M", "1 MiB", "1048576"):
        with fremap.rows(paths, np.uint8, 100, cache_bytes=said) as rows:
            for _ in range(2):
                rows.take([3, 1])
            assert rows.stats().cache_hits == 2


def test_what_others_write_is_seen(paths: list[Path]) -> None:
    with opened(paths) as rows:
        for value in range(1, 4):
            rows.take([1500, 5])
            rows.take([1500, 5])
            with paths[1].open("r+b") as file:
                file.seek(500 * 100)
                file.write(bytes([value]) * 100)
            taken = rows.take([1500, 5])
            assert taken[0].tolist() == [value] * 100
            np.testing.assert_array_equal(taken[1], TABLE[5])
            wait_until_settled(paths[1])
            for _ in range(2):
                assert rows.take([1500])[0].tolist() == [value] * 100
        assert rows.stats().cache_hits > 0


def test_kept_rows_of_a_file_that_was_cut_are_lost(paths: list[Path]) -> None:
    with opened(paths) as rows:
        for _ in range(2):
            rows.take([5, 1500, 2500])
        os.truncate(paths[1], 1000)
        with pytest.raises(TruncatedError, match="row 1500"):
            rows.take([5, 1500, 2500])
        np.testing.assert_array_equal(rows.take([5, 1005, 2500]), TABLE[[5, 1005, 2500]])


def test_threads_children_and_pickles(paths: list[Path], in_child: Callable[..., int]) -> None:
    failed = []
    with opened(paths, 100_000) as rows:

        def work(seed: int) -> None:
            draw = np.random.default_rng(seed)
            try:
                for _ in range(100):
                    ids = (COUNT * draw.random(60) ** 3).astype(np.int64)
                    np.testing.assert_array_equal(rows.take(ids), TABLE[ids])
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            in_child(lambda: np.testing.assert_array_equal(rows.take([7, 8, 7]), TABLE[[7, 8, 7]]))
        for thread in threads:
            thread.join()
        assert failed == []
        with pickle.loads(pickle.dumps(rows)) as again:
            again.take([3])
            again.take([3])
            assert again.stats().cache_hits == 1


def test_what_a_map_stored_is_seen_after_refresh(paths: list[Path]) -> None:
    """A store through a map may change no time of the file."""
    mapped = np.memmap(paths[0], np.uint8, "r+")
    with opened(paths) as rows:
        mapped[:] = 1
        rows.take([0, 1])
        mapped[:] = 2
        mapped.flush()
        rows.refresh()
        assert rows.stats().cached_bytes == 0
        assert (rows.take([0, 1]) == 2).all()
        np.testing.assert_array_equal(rows.take([COUNT - 1]), TABLE[[-1]])
        hits = rows.stats().cache_hits
        wait_until_settled(paths[2])
        rows.take([COUNT - 1])
        assert rows.stats().cache_hits == hits + 1
        rows.refresh()
        rows.refresh()
        np.testing.assert_array_equal(rows.take([COUNT - 1]), TABLE[[-1]])
        assert rows.stats().cache_hits == hits + 1


def test_a_cache_is_no_larger_than_the_table(paths: list[Path]) -> None:
    with opened(paths, cache_bytes=1 << 50) as rows:
        rows.take(range(COUNT - 1, -1, -1))
        np.testing.assert_array_equal(rows.take([5, 4]), TABLE[[5, 4]])
