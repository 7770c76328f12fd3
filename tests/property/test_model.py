"""The model follows the rules of windows that are written and not coherent, one by one."""

from __future__ import annotations

from typing import Any

import pytest
from fremap import Prot
from fremap.errors import DuplicatePageError, FremapError, PageRangeError, UnsupportedError
from fremap.testing import NO_PAGE, PLACED, ModelStore, ModelWindow, numbered_page, numbered_words

pytestmark = pytest.mark.any_user

CACHED = pytest.mark.parametrize("engine", ["paged", "eager"])
STORE_PAGES = 8


def page(generation: int, number: int = 7000) -> bytes:
    return numbered_page(number, generation=generation)


@pytest.fixture
def store() -> ModelStore:
    return ModelStore(numbered_words(range(STORE_PAGES)).tobytes())


def open_window(store: ModelStore, engine: Any, mapping: Any = range(4), **more: Any) -> Any:
    options = {"prot": Prot.WRITE, "coherent": False, "populate": True} | more
    return ModelWindow(store, list(mapping), engine, **options)


@CACHED
def test_stores_stay_in_the_window_until_they_are_flushed(store: ModelStore, engine: str) -> None:
    before = store.content()
    window = open_window(store, engine)
    for number in (1, 3):
        window.store_to(number, page(number))
    assert window.dirty == [False, True, False, True]
    assert (store.content(), window.content(1)) == (before, page(1))
    window.flush([1, 2])
    assert window.dirty == [False, False, False, True]
    assert store.read([1, 3]) == page(1) + numbered_page(3)
    window.flush()
    assert not any(window.dirty)
    assert store.read([1, 3]) == page(1) + page(3)


REPLACEMENTS = {
    "remap": lambda window: window.remap([6], [1]),
    "evict": lambda window: window.evict([1]),
    "place": lambda window: window.place([1], page(9)),
    "keep": lambda window: window.place([1]),
    "NONE": lambda window: window.protect([1], Prot.NONE),
    "close": lambda window: window.close(),
}


@CACHED
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_what_goes_is_written_first(store: ModelStore, engine: str, how: str) -> None:
    window = open_window(store, engine)
    window.store_to(1, page(1))
    window.store_to(2, page(2))
    REPLACEMENTS[how](window)
    assert store.read([1]) == page(1)
    if how != "close":
        assert store.read([2]) == numbered_page(2)
        assert window.dirty == [False, False, True, False]
    if how == "keep":
        assert (window.mapping[1], window.content(1)) == (PLACED, page(1))


@CACHED
def test_dirty_pages_change_places(store: ModelStore, engine: str) -> None:
    window = open_window(store, engine)
    for number in range(4):
        window.store_to(number, page(number))
    window.remap([1, 0, 2], [0, 1, 2])
    assert [window.content(number) for number in range(4)] == [page(1), page(0), page(2), page(3)]
    assert window.dirty == [False, False, True, True]  # what shows it already is not replaced


@CACHED
def test_close_may_give_changes_up(store: ModelStore, engine: str) -> None:
    before = store.content()
    window = open_window(store, engine)
    window.store_to(0, page(1))
    window.close(discard=True)
    assert store.content() == before


def test_the_same_bytes_again(store: ModelStore) -> None:
    """Clean in `eager`, which compares; either in `paged`, which sees the store."""
    for engine, expected in (("eager", False), ("paged", None)):
        window = open_window(store, engine)
        window.store_to(0, page(1)[:8], 16)
        window.store_to(0, numbered_page(0)[16:24], 16)
        assert window.dirty[0] is expected
    window.settle_dirty(0, dirty=True)
    assert window.dirty[0] is True
    window.flush()
    assert window.dirty[0] is False


@CACHED
def test_evict_writes_over_what_was_written_beside(store: ModelStore, engine: str) -> None:
    window = open_window(store, engine)
    window.store_to(0, page(1))
    store.write([0, 1], page(2) + page(3))
    window.evict([0, 1])
    window.populate([0, 1])
    assert (window.content(0), window.content(1)) == (page(1), page(3))


@CACHED
def test_placed_pages_are_never_dirty(store: ModelStore, engine: str) -> None:
    before = store.content()
    window = open_window(store, engine)
    window.place([0], page(1))
    window.store_to(0, page(2))
    window.close()
    assert (window.dirty[0], window.content(0)) == (False, page(2))
    assert store.content() == before


@CACHED
def test_flush_never_makes_the_store_longer(engine: str) -> None:
    store = ModelStore(numbered_words(range(3)).tobytes()[:-1000])
    window = open_window(store, engine, range(3))
    window.store_to(2, page(1))
    window.flush()
    assert store.content() == numbered_words(range(2)).tobytes() + page(1)[:-1000]
    padded = page(1)[:-1000] + bytes(1000)
    assert window.may_show(2, page(1))
    assert window.may_show(2, padded)
    assert not window.may_show(2, page(1)[:-1002] + bytes(1002))
    window.evict([2])
    window.populate([2])
    assert not window.may_show(2, page(1))
    window.store_to(2, b"past", 4096 - 4)
    assert window.dirty[2] is None


TWICE: dict[str, Any] = {
    "made": lambda store, engine: open_window(store, engine, [0, 5, 2, 5]),
    "remap": lambda store, engine: open_window(store, engine).remap([3], [1]),
    "both": lambda store, engine: open_window(store, engine).remap([6, 6], [0, 1]),
    "written": lambda store, engine: denied(store, engine).remap([3], [0], prot=Prot.WRITE),
    "protect": lambda store, engine: shown_twice(store, engine).protect([0], Prot.WRITE),
}


def denied(store: ModelStore, engine: str) -> Any:
    window = open_window(store, engine)
    window.protect([0, 3], Prot.NONE)
    return window


def shown_twice(store: ModelStore, engine: str) -> Any:
    window = denied(store, engine)
    window.remap([3], [0])
    return window


@CACHED
@pytest.mark.parametrize("how", TWICE)
def test_a_file_page_that_may_be_written_appears_once(
    store: ModelStore, engine: str, how: str
) -> None:
    with pytest.raises(DuplicatePageError) as caught:
        TWICE[how](store, engine)
    assert isinstance(caught.value, FremapError)
    assert isinstance(caught.value, ValueError)


def test_repeats_are_free_where_nobody_writes(store: ModelStore) -> None:
    ModelWindow(store, [1, 1, NO_PAGE, NO_PAGE], "paged")
    open_window(store, "paged", [1, 2, NO_PAGE, NO_PAGE])
    window = open_window(store, "paged", tracking="sync")
    window.protect([0, 3], Prot.READ)
    window.remap([3], [0])
    with pytest.raises(DuplicatePageError):
        window.protect([3], Prot.WRITE)
    window.remap([0, 3], [3, 0], prot=Prot.WRITE)  # judged on the mapping after the call
    assert window.mapping == [3, 1, 2, 0]


def test_a_refused_call_changes_nothing(store: ModelStore) -> None:
    before = store.content()
    window = open_window(store, "paged")
    window.store_to(0, page(1))
    for call in (
        lambda: window.remap([3], [0]),
        lambda: window.flush([0, 4]),
        lambda: window.protect([0], Prot.READ),
    ):
        with pytest.raises((DuplicatePageError, PageRangeError, UnsupportedError)):
            call()
    assert (store.content(), window.dirty[0], window.mapping) == (before, True, [0, 1, 2, 3])


def test_read_only_pages(store: ModelStore) -> None:
    """Only synchronous tracking has them, in `paged`; a dirty page stays dirty there."""
    for engine, tracking in (("paged", "async"), ("eager", "async")):
        window = open_window(store, engine, tracking=tracking)
        with pytest.raises(UnsupportedError):
            window.protect([0], Prot.READ)
        with pytest.raises(UnsupportedError):
            window.remap([0], [0], prot=Prot.READ)
    window = open_window(store, "paged", tracking="sync")
    window.store_to(0, page(1))
    window.protect([0], Prot.READ)
    assert (window.readable(0), window.writable(0), window.dirty[0]) == (True, False, True)


def test_engines_that_are_not_what_is_asked_for(store: ModelStore) -> None:
    for engine, coherent in (("alias", False), ("paged", True), ("eager", True)):
        with pytest.raises(UnsupportedError):
            open_window(store, engine, coherent=coherent)


@CACHED
def test_what_is_placed_as_it_is_shown_may_lose_what_lay_past_the_end(engine: str) -> None:
    store = ModelStore(numbered_words(range(3)).tobytes()[:-1000])
    window = open_window(store, engine, range(3))
    window.store_to(2, page(1))
    window.place([2])
    padded = page(1)[:-1000] + bytes(1000)
    assert window.may_show(2, page(1))
    assert window.may_show(2, padded)
    window.settle_content(2, padded)
    window.store_to(2, b"past", 4096 - 4)
    assert window.content(2) == padded[:-4] + b"past"
