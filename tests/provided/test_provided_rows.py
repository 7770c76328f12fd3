"""Rows of stores that no file has: computed, beside files, kept and of unequal length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
from fills import Noted
from fremap.testing.pages import numbered_words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES = 300
WIDTH = 64


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    return Noted(tmp_path / "notes")


@pytest.fixture
def store(noted: Noted) -> Iterator[fremap.ComputedStore]:
    with fremap.ComputedStore(PAGES, noted, page_bytes=4096) as made:
        yield made


@pytest.fixture
def table() -> np.ndarray:
    return numbered_words(np.arange(PAGES)).view(np.uint8).reshape(-1, WIDTH)


@pytest.mark.parametrize(
    "options",
    [{}, {"direct": True}, {"budget": None}, {"cache_bytes": 1 << 20}],
    ids=["auto", "direct", "no budget", "kept"],
)
def test_rows_beside_those_of_a_file(
    store: fremap.ComputedStore, table: np.ndarray, tmp_path: Path, options: dict[str, object]
) -> None:
    draw = np.random.default_rng(5)
    filed = draw.integers(0, 256, (1000, WIDTH), np.uint8)
    filed.tofile(tmp_path / "filed")
    expected = np.concatenate([table, filed, table])
    sources = [store, tmp_path / "filed", store]
    with fremap.rows(sources, np.uint8, WIDTH, **options) as rows:  # type: ignore[arg-type]
        for _ in range(3):
            ids = draw.integers(0, len(expected), 3000)
            np.testing.assert_array_equal(rows.take(ids), expected[ids])
            np.testing.assert_array_equal(rows.submit(ids).result(), expected[ids])
            np.testing.assert_array_equal(rows[99:-99], expected[99:-99])


def test_a_page_that_shards_share_is_asked_for_once(
    store: fremap.ComputedStore, table: np.ndarray, noted: Noted
) -> None:
    with fremap.rows([store, store], np.uint8, WIDTH, format="raw") as rows:
        taken = rows.take([0, len(table), 1, len(table) + 70])
        np.testing.assert_array_equal(taken, table[[0, 0, 1, 70]])
    assert noted.pages == [0, 1]


def test_rows_of_stores_without_a_file_are_not_kept(
    store: fremap.ComputedStore, table: np.ndarray
) -> None:
    with fremap.rows(store, np.uint8, WIDTH, cache_bytes=1 << 20) as rows:
        for _ in range(3):
            np.testing.assert_array_equal(rows.take([7, 3, 7]), table[[7, 3, 7]])
        stats = rows.stats()
        assert (stats.cache_hits, stats.cached_bytes, stats.mapped_bytes) == (0, 0, 0)


def test_rows_longer_than_a_page(store: fremap.ComputedStore, table: np.ndarray) -> None:
    long = table.reshape(-1, 4096 * 5 // 2)
    with fremap.rows(store, np.uint8, long.shape[1]) as rows:
        np.testing.assert_array_equal(rows.take([5, 3, 3, 70]), long[[5, 3, 3, 70]])
        np.testing.assert_array_equal(rows[:], long)


def test_rows_of_unequal_length(store: fremap.ComputedStore, table: np.ndarray) -> None:
    offsets = [0, 10, 10, 1000, len(table)]
    with fremap.ragged(store, offsets, np.uint8, WIDTH) as rows:
        expected = np.concatenate([table[1000:], table[10:1000], table[:10]])
        np.testing.assert_array_equal(rows.take([3, 2, 1, 0]).values, expected)
        np.testing.assert_array_equal(rows.submit([3, 2, 1, 0]).result().values, expected)
