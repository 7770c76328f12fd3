"""A file page that may be written appears once in a window that is not coherent."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import fremap
import pytest
from fremap import Prot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILE_PAGES = 40


@pytest.fixture
def window(
    write_back: dict[str, Any], numbered_store: Callable[[int], Any]
) -> Iterator[fremap.Window]:
    """Window pages 0 to 19 show file pages 10 to 29."""
    with (
        numbered_store(FILE_PAGES) as store,
        fremap.Window(store, 20, first_page=10, **write_back) as opened,
    ):
        yield opened


def refused(call: Callable[[], object]) -> set[int]:
    """The numbers that the error names."""
    with pytest.raises(fremap.DuplicatePageError) as caught:
        call()
    assert isinstance(caught.value, fremap.FremapError)
    assert isinstance(caught.value, ValueError)
    return {int(number) for number in re.findall(r"\d+", str(caught.value))}


def test_the_first_mapping(
    write_back: dict[str, Any], numbered_store: Callable[[int], Any]
) -> None:
    with numbered_store(FILE_PAGES) as store:
        mapping = [11, 12, 33, 14, 15, 16, -1, 33, -1]
        assert {2, 7, 33} <= refused(lambda: fremap.Window(store, mapping=mapping, **write_back))
        fremap.Window(store, mapping=mapping).close()


@pytest.mark.parametrize("prot", [None, Prot.WRITE])
def test_remap(window: Any, prot: Any) -> None:
    before = window.mapping.tolist()
    assert {3, 12, 22} <= refused(lambda: window.remap([22], at=3, prot=prot))
    assert {3, 17, 35} <= refused(lambda: window.remap([35, 34, 35], at=[3, 4, 17], prot=prot))
    assert window.mapping.tolist() == before
    window.remap([22, 13], at=[3, 12], prot=prot)  # judged on the mapping after the call
    assert (window.mapping[3], window.mapping[12]) == (22, 13)


def test_protect(window: Any) -> None:
    window.protect([3, 12], Prot.NONE)
    window.remap([22], at=3)
    assert {3, 12, 22} <= refused(lambda: window.protect([3, 5], Prot.WRITE))
    assert {3, 12, 22} <= refused(lambda: window.protect([12], Prot.WRITE))
    assert window.protection()[[3, 12]].tolist() == [Prot.NONE, Prot.NONE]
    window.remap([39], at=3)
    window.protect([3, 12], Prot.WRITE)


@pytest.mark.needs("paged", "uffd_wp")
@pytest.mark.parametrize("populate", [True, False])
def test_a_page_shown_once_more_shows_what_was_stored_to_it(
    numbered_store: Callable[[int], Any], populate: bool
) -> None:
    """Pages that are only read may repeat others; what was stored is in the store by then."""
    with (
        numbered_store(FILE_PAGES) as store,
        fremap.Window(
            store, 8, prot=Prot.WRITE, coherent=False, engine="paged", tracking="sync"
        ) as window,
    ):
        window.pages[5] = 7
        window.protect([2, 5], Prot.READ)
        window.remap([5], at=2, populate=populate)
        assert not window.dirty().any()
        assert (window.pages[2] == 7).all()
        assert (window.pages[5] == 7).all()
        assert (store.read([5]) == 7).all()


def test_what_is_stored_is_not_touched_by_a_refusal(window: Any) -> None:
    window.populate()
    window.pages[3] = 7
    refused(lambda: window.remap([22, 23], at=[3, 4]))
    assert (window.pages[3] == 7).all()
    assert window.dirty().nonzero()[0].tolist() == [3]
    assert not (window.store.read([13]) == 7).all()
