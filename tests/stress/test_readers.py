"""Readers that run through all remaps: every word is the old page's or the new one's.

Pages are numbered word by word, so that a word of zero, of a third page or of
another place in its page is seen. The readers compare with NumPy, which holds
no GIL meanwhile; several of them read while the main thread remaps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import fremap
import numpy as np
import pytest
from fremap.testing import numbered_words

pytestmark = pytest.mark.any_user
WINDOW_PAGES = 64
READERS = 2
ROUNDS = [150, pytest.param(5000, marks=pytest.mark.long)]
ATOMIC = pytest.mark.parametrize("engine", ["alias", "paged"], indirect=True)

Running = Callable[[], AbstractContextManager[Any]]


def page_sets(odd: bool) -> np.ndarray:
    """File pages that window page i may show: one set for odd rounds, another for even."""
    return np.arange(WINDOW_PAGES) * 2 + odd


class Reader:
    """Compares all words of a window with the two pages that each may show."""

    def __init__(self, window: Any) -> None:
        self.words = window.array(np.uint64, (WINDOW_PAGES, 512))
        self.even = numbered_words(page_sets(odd=False))
        self.odd = numbered_words(page_sets(odd=True))

    def __call__(self, number: int) -> None:
        seen = self.words.copy()
        wrong = (seen != self.even) & (seen != self.odd)
        if wrong.any():
            page, word = np.argwhere(wrong)[0]
            raise AssertionError(
                f"{wrong.sum()} wrong words; window page {page} word {word} is "
                f"{seen[page, word]:#x}, {(seen == 0).sum()} words are zero; a second look "
                f"finds {self.words[page, word]:#x}"
            )


@ATOMIC
@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("how", ["run", "scattered", "single", "lazy", "evict", "nonblock"])
def test_readers_run_through_remaps(
    engine: str, store: Any, threads: Running, how: str, rounds: int
) -> None:
    random = np.random.default_rng(41)
    with fremap.Window(store, WINDOW_PAGES, mapping=page_sets(odd=False), engine=engine) as window:
        reader = Reader(window)
        with threads() as running:
            running.start(reader, READERS)
            for round_number in range(rounds):
                change(window, how, page_sets(odd=bool(round_number % 2)), random)
                if running.failures:
                    break
            running.wait_for_rounds(3)
        reader(0)


def change(window: Any, how: str, pages: np.ndarray, random: np.random.Generator) -> None:
    """Show other pages in one of the ways there are."""
    order = random.permutation(WINDOW_PAGES)
    if how == "run":
        window.remap(pages)
    elif how == "scattered":
        window.remap(pages[order], at=order)
    elif how == "single":
        page = int(order[0])
        window.remap(pages[page], at=page)
    elif how == "lazy":
        window.remap(pages[order], at=order, populate=False)
    elif how == "nonblock":
        window.remap(pages[order], at=order, nonblock=True)
    else:
        window.remap(pages)
        window.evict(order[:32])
        window.evict(slice(8, 40))


@ATOMIC
@pytest.mark.parametrize("rounds", ROUNDS)
def test_readers_run_through_place(engine: str, store: Any, threads: Running, rounds: int) -> None:
    """A page that is placed and remapped shows one of both contents at any moment."""
    with fremap.Window(store, WINDOW_PAGES, mapping=page_sets(odd=False), engine=engine) as window:
        reader = Reader(window)
        placed = numbered_words(page_sets(odd=True)).view(np.uint8)
        pages = np.arange(WINDOW_PAGES)
        with threads() as running:
            running.start(reader, READERS)
            for round_number in range(rounds):
                some = pages[round_number % 7 :: 3]
                window.place(some, placed[some])
                window.remap(page_sets(odd=False)[some], at=some, discard=True)
                window.place(some)
                window.remap(page_sets(odd=True)[some], at=some, discard=True)
                if running.failures:
                    break
            running.wait_for_rounds(3)


@ATOMIC
@pytest.mark.parametrize("rounds", ROUNDS)
def test_large_pages(
    engine: str, threads: Running, rounds: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Pages of several system pages: each system page shows the old or the new."""
    page_bytes = 16_384
    path = tmp_path_factory.mktemp("large") / "pages"
    path.write_bytes(numbered_words(range(2 * WINDOW_PAGES), page_bytes).tobytes())
    even = numbered_words(page_sets(odd=False), page_bytes)
    odd = numbered_words(page_sets(odd=True), page_bytes)
    with (
        fremap.open(path, page_bytes=page_bytes) as store,
        fremap.Window(store, WINDOW_PAGES, mapping=page_sets(odd=False), engine=engine) as window,
    ):
        words = window.array(np.uint64, (WINDOW_PAGES, -1))

        def read(number: int) -> None:
            seen = words.copy()
            assert ((seen == even) | (seen == odd)).all()

        random = np.random.default_rng(43)
        with threads() as running:
            running.start(read, READERS)
            for round_number in range(rounds // 2):
                order = random.permutation(WINDOW_PAGES)
                window.remap(page_sets(odd=bool(round_number % 2))[order], at=order)
                window.evict(order[:20])
                if running.failures:
                    break
            running.wait_for_rounds(3)
