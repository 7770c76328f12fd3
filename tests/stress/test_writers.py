"""Writers, readers, remappers, evictors and flushers at once, on one window.

Every word says whose page it is in, where in the page, and which store it comes from:
a store that is lost, one that comes back, and one that lands elsewhere all show.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    Running = Callable[[], AbstractContextManager[Any]]

pytestmark = pytest.mark.any_user
WORDS = 512
OWNERS = 3
OWN_WINDOW_PAGES = 8
OWN_FILE_PAGES = 16
WINDOW_PAGES = OWNERS * OWN_WINDOW_PAGES
FILE_PAGES = OWNERS * OWN_FILE_PAGES
STORES = 64  # of one round
PLACES = np.arange(WORDS, dtype=np.uint64)


def word(owner: int, number: int, places: np.ndarray = PLACES) -> np.ndarray:
    """Words of the store with this number to these places of a page."""
    return np.uint64(number) << np.uint64(24) | np.uint64(owner) << np.uint64(16) | places


class Owner:
    """Some window pages, the file pages that they show in turn, and what was stored there."""

    def __init__(self, number: int, store: Any, window: Any) -> None:
        self.number = number
        self.store, self.window = store, window
        self.words = window.array(np.uint64, (WINDOW_PAGES, WORDS))
        self.at = np.arange(number, WINDOW_PAGES, OWNERS)
        self.file_pages = own_file_pages(number)
        self.random = np.random.default_rng(number)
        self.stores = 0
        self.last = np.zeros(WORDS, np.uint64)
        self.moving = threading.Lock()

    def write(self) -> None:
        """Store single words, whatever their pages show at that moment; then look for them."""
        for place in self.random.permutation(WORDS)[:STORES]:
            self.stores += 1
            value = word(self.number, self.stores, PLACES[place])
            self.words[self.random.choice(self.at), place] = value
            self.last[place] = value
        with self.moving:
            # Nothing is remapped now: each page is in the window or in the store.
            shown = self.window.mapping[self.at]
            hidden = np.setdiff1d(self.file_pages, shown)
            stored = self.store.read(hidden).view(np.uint64)
            self.check(np.concatenate([self.words[self.at], stored]))

    def check(self, pages: np.ndarray) -> None:
        """The last store to each place is in one of the pages."""
        found = (pages == self.last).any(axis=0) | (self.last == 0)
        lost = np.flatnonzero(~found)
        assert found.all(), (
            f"owner {self.number}: stores {self.last[lost] >> np.uint64(24)} of {self.stores} "
            f"are lost, at the words {lost}"
        )

    def remap(self, random: np.random.Generator) -> None:
        """Show others of its file pages, none twice, or the same again."""
        with self.moving:
            shown = self.window.mapping[self.at]
            if random.integers(2):
                shown = random.permutation(self.file_pages)[:OWN_WINDOW_PAGES]
            self.window.remap(shown, at=self.at, populate=bool(random.integers(2)))

    def check_file(self) -> None:
        self.check(self.store.read(self.file_pages).view(np.uint64))


def own_file_pages(owner: int) -> np.ndarray:
    return np.arange(owner * OWN_FILE_PAGES, (owner + 1) * OWN_FILE_PAGES)


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    content = np.concatenate([np.tile(word(owner, 0), OWN_FILE_PAGES) for owner in range(OWNERS)])
    if request.param == "file":
        path = tmp_path / "pages"
        path.write_bytes(content.tobytes())
        opened: Any = fremap.open(path, "r+", page_bytes=4096)
    else:
        opened = fremap.MemoryStore(content.nbytes, page_bytes=4096)
        opened.write(None, content.view(np.uint8))
    with opened:
        yield opened


@pytest.mark.parametrize("rounds", [60, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("write_back", ["paged-async", "paged-sync"], indirect=True)
def test_no_store_is_lost(
    write_back: dict[str, Any], store: Any, threads: Running, rounds: int
) -> None:
    """Stores race with everything else; each lands in one of the pages that its page shows."""
    shown = np.empty(WINDOW_PAGES, int)
    for owner in range(OWNERS):
        shown[owner::OWNERS] = own_file_pages(owner)[:OWN_WINDOW_PAGES]
    window = fremap.Window(store, mapping=shown, **write_back)
    owners = [Owner(number, store, window) for number in range(OWNERS)]
    tags = np.repeat(np.arange(OWNERS, dtype=np.uint64)[None], OWN_WINDOW_PAGES, axis=0).ravel()
    generators = [np.random.default_rng(100 + number) for number in range(2 * OWNERS + 3)]

    def write(number: int) -> None:
        owners[number].write()

    def remap(number: int) -> None:
        owners[number % OWNERS].remap(generators[number])

    def evict(number: int) -> None:
        window.evict(generators[number].permutation(WINDOW_PAGES)[:5])

    def flush(number: int) -> None:
        random = generators[number]
        window.flush(random.permutation(WINDOW_PAGES)[:6] if random.integers(2) else None)
        window.dirty()

    def read(number: int) -> None:
        seen = owners[0].words.copy()
        assert (seen & np.uint64(0xFFFF) == PLACES).all()
        assert (seen >> np.uint64(16) & np.uint64(0xFF) == tags[:, None]).all()
        most = np.array([owner.stores for owner in owners])[tags.astype(int)]
        assert (seen >> np.uint64(24) <= most[:, None].astype(np.uint64)).all()

    with threads() as running:
        for work, count in ((write, OWNERS), (remap, OWNERS), (evict, 1), (flush, 1), (read, 1)):
            running.start(work, count)
        running.wait_for_rounds(rounds)
    for owner in owners:
        owner.words = None
    window.close()
    for owner in owners:
        owner.check_file()


@pytest.mark.parametrize("rounds", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_each_page_holds_what_was_stored_last(
    write_back: dict[str, Any], store: Any, threads: Running, rounds: int
) -> None:
    """Each thread has pages of its own, and does with them what it likes; others flush all."""
    window = fremap.Window(store, mapping=np.full(WINDOW_PAGES, -1), **write_back)
    view = [window.array(np.uint64, (WINDOW_PAGES, WORDS))]
    held = store.read(None).view(np.uint64).copy()
    generators = [np.random.default_rng(seed) for seed in range(OWNERS)]
    stores = [0] * OWNERS

    def own(number: int) -> None:
        random, words = generators[number], view[0]
        at = np.arange(number, WINDOW_PAGES, OWNERS)
        shown = random.permutation(own_file_pages(number))[:OWN_WINDOW_PAGES]
        assert window.remap(shown, at=at).all()
        for place, file_page in zip(at, shown, strict=True):
            stores[number] += 1
            start, stop = sorted(random.integers(0, WORDS + 1, 2))
            words[place, start:stop] = word(number, stores[number])[start:stop]
            held[file_page, start:stop] = word(number, stores[number])[start:stop]
        assert (words[at] == held[shown]).all()
        some = at[random.permutation(OWN_WINDOW_PAGES)[:4]]
        window.evict(some[:2])
        window.protect(some[2:], Prot.NONE)
        window.protect(some[2:], Prot.WRITE)
        assert window.populate(at).all()
        assert (words[at] == held[shown]).all()
        window.place(at[:1])
        assert (words[at] == held[shown]).all()
        words[at[0]] = 0  # of a placed page nothing is written
        window.remap(shown[:1], at=at[:1], discard=True)
        assert (words[at] == held[shown]).all()

    def flush(number: int) -> None:
        window.flush()
        window.dirty()

    with threads() as running:
        running.start(own, OWNERS)
        running.start(flush, 2)
        running.wait_for_rounds(rounds)
    view.clear()
    window.close()
    assert (store.read(None).view(np.uint64) == held).all()
