"""Everything at once, from several threads, on one window and on one store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.testing import numbered_words, page_numbers

pytestmark = pytest.mark.any_user
WINDOW_PAGES = 96
FILE_PAGES = 1024
ROUNDS = [60, pytest.param(5000, marks=pytest.mark.long)]

Running = Callable[[], AbstractContextManager[Any]]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_writers_of_a_window(engine: str, store: Any, threads: Running, rounds: int) -> None:
    """Each thread has window pages of its own, interleaved, and finds them as it left them."""
    workers = 4
    with fremap.Window(store, WINDOW_PAGES, engine=engine) as window:
        words = window.array(np.uint64, (WINDOW_PAGES, 512))
        generators = [np.random.default_rng(seed) for seed in range(workers)]

        def work(number: int) -> None:
            random = generators[number]
            mine = np.arange(number, WINDOW_PAGES, workers)
            file_pages = random.integers(0, FILE_PAGES, len(mine))
            assert window.remap(file_pages, at=mine, discard=True).all()
            some = mine[random.permutation(len(mine))[:8]]
            window.evict(some)
            window.protect(mine[:5], Prot.NONE)
            window.populate(mine)
            window.protect(mine[:5], Prot.READ)
            window.populate(mine)
            window.place(mine[-2:])
            assert (page_numbers(words[mine]) == file_pages[:, None]).all()
            assert (words[mine] == numbered_words(file_pages)).all()
            assert (window.mapping[mine[:-2]] == file_pages[:-2]).all()
            assert (window.mapping[mine[-2:]] == -2).all()

        with threads() as running:
            running.start(work, workers)
            running.wait_for_rounds(rounds)


@pytest.mark.parametrize("engine", ["alias", "paged"], indirect=True)
@pytest.mark.parametrize("rounds", ROUNDS)
def test_quarrels_over_the_same_pages(
    engine: str, store: Any, threads: Running, rounds: int
) -> None:
    """Threads that remap, evict and populate the same pages: any of the pages, never none."""
    with fremap.Window(store, WINDOW_PAGES, engine=engine) as window:
        words = window.array(np.uint64, (WINDOW_PAGES, 512))
        generators = [np.random.default_rng(seed) for seed in range(4)]
        places = np.arange(512, dtype=np.uint64)

        def quarrel(number: int) -> None:
            random = generators[number]
            at = random.permutation(WINDOW_PAGES)[:40]
            window.remap(random.integers(0, FILE_PAGES, 40), at=at, populate=bool(number % 2))
            window.evict(random.permutation(WINDOW_PAGES)[:20])
            window.populate(random.permutation(WINDOW_PAGES)[:20], nonblock=number == 0)
            seen = words.copy()
            assert (seen & np.uint64(0xFFFF) == places).all()
            numbers = page_numbers(seen)
            assert ((numbers >= 0) & (numbers < FILE_PAGES)).all()

        with threads() as running:
            running.start(quarrel, 4)
            running.wait_for_rounds(rounds)
        assert (words == numbered_words(window.mapping)).all()


@pytest.mark.parametrize("rounds", ROUNDS)
def test_readers_of_a_store(store: Any, threads: Running, rounds: int) -> None:
    """Many threads read one store at once, each into a buffer of its own."""
    generators = [np.random.default_rng(seed) for seed in range(6)]
    buffers = [np.empty((64, 4096), np.uint8) for _ in generators]

    def read(number: int) -> None:
        random, out = generators[number], buffers[number]
        pages = random.integers(0, FILE_PAGES, 64)
        store.read(pages, out=out)
        assert (out.view(np.uint64) == numbered_words(pages)).all()
        store.prefetch(pages)
        assert store.resident(pages).shape == (64,)

    with threads() as running:
        running.start(read, len(generators))
        running.wait_for_rounds(rounds)


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_windows_come_and_go(engine: str, store: Any, threads: Running, rounds: int) -> None:
    """Windows are made, read lazily and closed in several threads."""

    def live(number: int) -> None:
        first = 100 * number
        with fremap.Window(store, 50, first_page=first, engine=engine) as window:
            if engine == "eager":
                window.populate()
            expected = numbered_words(range(first, first + 50))
            assert (window.array(np.uint64, (50, 512)) == expected).all()
            window.remap(range(49, -1, -1))

    with threads() as running:
        running.start(live, 4)
        running.wait_for_rounds(rounds)


def test_closing_under_calls(engine: str, store: Any, threads: Running) -> None:
    """A window that is closed while others call it: they end well or find it closed."""
    for _ in range(20):
        window = fremap.Window(store, WINDOW_PAGES, engine=engine)

        def call(number: int, window: Any = window) -> None:
            try:
                window.remap(range(WINDOW_PAGES - 1, -1, -1))
                window.populate()
            except fremap.errors.ClosedError:
                return

        with threads() as running:
            running.start(call, 3)
            running.wait_for_rounds(1)
            window.close()
