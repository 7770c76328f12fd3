"""O17: "add private page here", also "use previous page if one existed"."""

import fremap
import numpy as np
import pytest

from .conftest import PAGE, MakeStore, Numbered


def test_o17_a_private_page_here(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(16)
    with fremap.Window(store, engine=engine, populate=True) as window:
        window.place([3, 9], numbered_pages([500, 501], PAGE))
        expected = np.arange(16)
        expected[[3, 9]] = 500, 501
        np.testing.assert_array_equal(window.pages, numbered_pages(expected, PAGE))
        assert window.mapping.tolist() == [-2 if page in (3, 9) else page for page in range(16)]
        # It is the window's own: the store has what it had.
        np.testing.assert_array_equal(store.read(), numbered_pages(range(16), PAGE))


def test_o17_use_the_previous_page(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(16)
    with fremap.Window(store, engine=engine, populate=True) as window:
        window.remap([12, 13], at=4)
        window.place([4, 5])
        # Cut off from the file: what is written there does not show here.
        store.write([12, 13], numbered_pages([900, 901], PAGE))
        np.testing.assert_array_equal(window.pages[4:6], numbered_pages([12, 13], PAGE))
        window.remap([12, 13], at=4, discard=True)
        np.testing.assert_array_equal(window.pages[4:6], numbered_pages([900, 901], PAGE))


def test_o17_a_page_that_is_not_there_is_read_first(
    numbered_store: MakeStore, engine: str, numbered_pages: Numbered
) -> None:
    store = numbered_store(16)
    with fremap.Window(store, engine=engine) as window:
        window.place(7)
        np.testing.assert_array_equal(window.pages[7], numbered_pages([7], PAGE)[0])


def test_o17_where_nothing_is_shown_there_is_nothing_to_keep(
    numbered_store: MakeStore, engine: str
) -> None:
    store = numbered_store(4)
    with fremap.Window(store, 4, mapping="none", engine=engine) as window:
        with pytest.raises(fremap.ArgumentError, match="window page 2"):
            window.place(2)
        window.place(2, bytes(PAGE))
        assert window.mapping.tolist() == [-1, -1, -2, -1]


def test_o17_placed_pages_are_lost_by_name_only(numbered_store: MakeStore, engine: str) -> None:
    store = numbered_store(8)
    with fremap.Window(store, engine=engine, populate=True) as window:
        window.place(5, b"own!" * (PAGE // 4))
        for lose in (lambda: window.remap(range(3), at=4), lambda: window.evict(None)):
            with pytest.raises(fremap.PlacedPageError, match="window page 5"):
                lose()
        assert bytes(window.pages[5]) == b"own!" * (PAGE // 4)
        window.remap(range(3), at=4, discard=True)
        assert window.mapping.tolist() == [0, 1, 2, 3, 0, 1, 2, 7]
