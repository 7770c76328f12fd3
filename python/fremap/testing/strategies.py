"""Hypothesis strategies for what windows and stores take.

Needs `hypothesis`. Each strategy draws plain values: lists of page numbers, or
the forms in which a caller may write them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fremap.testing.model import NO_PAGE

DrawFn = Callable[[st.SearchStrategy[Any]], Any]

#: The integer types in which callers keep page numbers.
_PAGE_TYPES = (np.int64, np.int32, np.uint32, np.uint64, np.int16)


def page_lists(
    limit: int, *, min_size: int = 0, max_size: int = 32, repeats: bool = True
) -> st.SearchStrategy[list[int]]:
    """Draw pages in any order.

    Parameters
    ----------
    limit : int
        The number of pages there are.
    min_size, max_size : int
        How many are drawn.
    repeats : bool
        Whether a page may be drawn more than once.

    Returns
    -------
    SearchStrategy
        Lists of page numbers.
    """
    return st.one_of(
        st.lists(
            st.integers(0, limit - 1),
            min_size=min_size,
            max_size=max_size if repeats else min(max_size, limit),
            unique=not repeats,
        ),
        page_runs(limit, min_size=min_size, max_size=max_size).map(list),
    )


@st.composite
def page_runs(draw: DrawFn, limit: int, *, min_size: int = 0, max_size: int = 32) -> range:
    """Draw consecutive pages, up or down.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    limit : int
        The number of pages there are.
    min_size, max_size : int
        How many are drawn.

    Returns
    -------
    range
        With a step of 1 or -1.
    """
    first = draw(st.integers(0, max(0, limit - max(1, min_size))))
    count = draw(st.integers(min_size, min(max_size, limit - first)))
    run = range(first, first + count)
    return run[::-1] if draw(st.booleans()) else run


@st.composite
def permutations(draw: DrawFn, limit: int, *, max_size: int = 32) -> list[int]:
    """Draw distinct pages in a random order; as often as not all of them.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    limit : int
        The number of pages there are.
    max_size : int
        How many are drawn at most.

    Returns
    -------
    list of int
        Page numbers, none twice.
    """
    size = min(limit, max_size)
    order: list[int] = draw(st.permutations(range(size)))
    return order[: draw(st.integers(1, size))] if draw(st.booleans()) else order


@st.composite
def repeated(draw: DrawFn, limit: int, *, max_size: int = 32) -> list[int]:
    """Draw few distinct pages, each of them often.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    limit : int
        The number of pages there are.
    max_size : int
        How many are drawn at most.

    Returns
    -------
    list of int
        Page numbers with many repeats.
    """
    few = draw(st.lists(st.integers(0, limit - 1), min_size=1, max_size=3))
    drawn: list[int] = draw(st.lists(st.sampled_from(few), min_size=1, max_size=max_size))
    return drawn


def file_page_lists(limit: int, *, max_size: int = 32) -> st.SearchStrategy[list[int]]:
    """Draw what a remap may show: runs, orders, repeats, anything.

    Parameters
    ----------
    limit : int
        The number of pages of the store.
    max_size : int
        How many are drawn at most.

    Returns
    -------
    SearchStrategy
        Lists of file pages.
    """
    return st.one_of(
        page_lists(limit, max_size=max_size),
        permutations(limit, max_size=max_size),
        repeated(limit, max_size=max_size),
    )


def mappings(limit: int, *, max_size: int = 32) -> st.SearchStrategy[list[int]]:
    """Draw a window's first mapping; some of its pages show nothing.

    Parameters
    ----------
    limit : int
        The number of pages of the store.
    max_size : int
        Pages of the window at most.

    Returns
    -------
    SearchStrategy
        Lists of file pages and -1.
    """
    shown = st.integers(0, limit - 1)
    return st.lists(st.one_of(shown, shown, st.just(NO_PAGE)), min_size=1, max_size=max_size)


@st.composite
def spellings(draw: DrawFn, pages: list[int], limit: int) -> Any:
    """Draw one of the forms in which a caller may write these pages.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    pages : list of int
        Page numbers.
    limit : int
        The number of pages there are: all of them in order may be None.

    Returns
    -------
    None, int, slice, range, list, tuple or ndarray
        A form of the same pages.
    """
    forms: list[Any] = [pages, tuple(pages)]
    forms += [np.array(pages, dtype=kind) for kind in _PAGE_TYPES if limit <= np.iinfo(kind).max]
    forms.append(np.repeat(np.array(pages, dtype=np.int64), 2)[::2])
    # Counted from the end, all of them and every second one.
    behind = [page - limit for page in pages]
    forms += [behind, np.array(behind, dtype=np.int64), np.array(behind, dtype=np.int32)]
    forms.append([pair[number % 2] for number, pair in enumerate(zip(behind, pages, strict=True))])
    if len(pages) == 1:
        forms += [pages[0], np.int32(pages[0]), behind[0]]
    if pages == list(range(limit)):
        forms += [None, slice(None)]
    run = _as_range(pages)
    if run is not None:
        forms += [run, range(run.start - limit, run.stop - limit, run.step)]
        if run.step > 0:
            forms.append(slice(run.start, run.stop, run.step))
    return draw(st.sampled_from(forms))


def _as_range(pages: list[int]) -> range | None:
    """Return the range that has these members, if there is one."""
    if len(pages) < 2:
        return range(pages[0], pages[0] + 1) if pages else range(0)
    step = pages[1] - pages[0]
    if step == 0:
        return None
    run = range(pages[0], pages[-1] + (1 if step > 0 else -1), step)
    return run if list(run) == pages else None
