"""A file that is cut short under everything: an exception, never a crash, never zeros."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.errors import TruncatedError
from fremap.testing import numbered_page, numbered_words, page_numbers, write_numbered_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES = 64
LEFT = 20  # whole pages after the cut


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pages"
    write_numbered_file(path, PAGES)
    return path


@pytest.fixture
def store(path: Path) -> Iterator[Any]:
    with fremap.open(path, "r+", page_bytes=4096) as opened:
        yield opened


ORDER = [3, 0, 19, 7, 40, 2, 63]  # the fifth is beyond the cut
GOOD = 4


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("part", [0, 100])
def test_read(store: Any, path: Path, warm: bool, part: int) -> None:
    if warm:
        store.read(None)
    os.truncate(path, LEFT * 4096 + part)
    out = np.zeros((len(ORDER), 4096), np.uint8)
    with pytest.raises(TruncatedError) as caught:
        store.read(ORDER, out=out)
    assert caught.value.filename == str(path)
    assert caught.value.completed <= GOOD
    done = caught.value.completed
    assert (out[:done] == numbered_words(ORDER[:done]).view(np.uint8)).all()
    store.refresh()
    assert store.page_count == LEFT + (part > 0)
    assert store.read([19]).tobytes() == numbered_page(19)


@pytest.mark.parametrize("warm", [False, True])
def test_remap_and_populate(engine: str, store: Any, path: Path, warm: bool) -> None:
    with fremap.Window(store, 16, engine=engine) as window:
        if warm:
            store.read(None)
            window.populate()
        os.truncate(path, LEFT * 4096)
        before = window.mapping.tolist()
        with pytest.raises(TruncatedError) as caught:
            window.remap(ORDER, at=4)
        done = caught.value.completed
        assert done <= GOOD
        assert window.mapping.tolist() == [*before[:4], *ORDER[:done], *before[4 + done :]]
        assert window.remap(ORDER[:GOOD], at=4).all()
        window.populate()
        shown = page_numbers(window.array(np.uint64, (16, 512)))
        assert (shown == window.mapping[:, None]).all()


def test_populate_beyond_the_end(engine: str, store: Any, path: Path) -> None:
    with fremap.Window(store, 8, first_page=LEFT - 4, engine=engine) as window:
        os.truncate(path, LEFT * 4096)
        with pytest.raises(TruncatedError) as caught:
            window.populate()
        assert caught.value.completed <= 4
        assert caught.value.file_page == LEFT
        assert window.populate(slice(0, 4)).all()
        assert not window.present()[4:].any()
        shown = page_numbers(window.array(np.uint64, (8, 512))[:4])
        assert (shown == np.arange(LEFT - 4, LEFT)[:, None]).all()


@pytest.mark.parametrize(("part", "where"), [(0, "before"), (100, "in the middle of")])
def test_an_error_says_where_the_file_ends(
    engine: str, store: Any, path: Path, part: int, where: str
) -> None:
    with fremap.Window(store, 8, first_page=LEFT - 4, engine=engine) as window:
        os.truncate(path, LEFT * 4096 + part)
        calls = [lambda: store.read([LEFT])]
        # An aliased page is mapped as it is: the rest of it shows zeros.
        calls += [window.populate] if part == 0 or engine != "alias" else []
        for call in calls:
            with pytest.raises(TruncatedError, match=f"ends {where} file page {LEFT}"):
                call()


def test_what_is_in_the_window_stays(store: Any, path: Path) -> None:
    """A window that is not coherent keeps what it has loaded."""
    with fremap.Window(store, engine="eager", populate=True) as window:
        os.truncate(path, 4096)
        shown = page_numbers(window.array(np.uint64, (PAGES, 512)))
        assert (shown == np.arange(PAGES)[:, None]).all()


@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=pytest.mark.long)])
def test_a_file_that_shrinks_and_grows_all_the_time(
    engine: str, store: Any, path: Path, rounds: int
) -> None:
    """Reads and remaps in a race with truncation: they end, or say that the file was cut."""
    done = threading.Event()

    def cut() -> None:
        while not done.is_set():
            os.truncate(path, 8 * 4096)
            os.truncate(path, PAGES * 4096)

    cutter = threading.Thread(target=cut)
    cutter.start()
    random = np.random.default_rng(7)
    outcomes = set()
    try:
        with fremap.Window(store, PAGES, engine=engine) as window:
            for _ in range(rounds):
                order = random.permutation(PAGES)
                try:
                    store.read(order)
                    window.remap(order)
                    outcomes.add("done")
                except TruncatedError:
                    outcomes.add("cut")
    finally:
        done.set()
        cutter.join()
    assert outcomes
    assert store.read(range(8)).tobytes() == numbered_words(range(8)).tobytes()


@pytest.mark.parametrize("seconds", [0.5, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", ["rows", "store"])
def test_a_read_beside_a_truncation_brings_no_zeros(
    tmp_path: Path, how: str, seconds: float
) -> None:
    """The kernel looks at the size, then copies: what is cut off in between reads as zeros."""
    path, page = tmp_path / "cut", 65536
    content = np.ones(2 * page, np.uint8)
    choice = np.random.default_rng(2)

    def cut(delay: float) -> None:
        time.sleep(delay)
        os.truncate(path, 2 * page - 1000)

    wrong, whole, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end or whole == 0:
        path.write_bytes(content.tobytes())
        with (
            fremap.open(path, page_bytes=page) as store,
            fremap.rows(path, np.uint8, page, budget=None) as rows,
        ):
            cutter = threading.Thread(target=cut, args=(choice.random() * 3e-4,))
            cutter.start()
            # Read until it is an error, so that a read is under way when the file is cut.
            with pytest.raises(fremap.StoreError):
                while True:
                    found = rows.take([1]) if how == "rows" else store.read(1)
                    whole += 1
                    if not found.all():
                        wrong.append(int((found == 0).sum()))
            cutter.join()
    assert wrong == []
