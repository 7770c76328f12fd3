"""Each object says in a line what it is."""

import html
import os
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import fremap
import numpy as np
import pytest
from fremap import Prot

pytestmark = pytest.mark.any_user


def test_batches(tmp_path: Path) -> None:
    np.arange(10).tofile(tmp_path / "rows")
    with fremap.rows(tmp_path / "rows", np.int64) as rows:
        batches = rows.batches(4, "sequential", prefetch=0)
        assert repr(batches) == "<fremap.Batches, 3 of 3 batches left>"
        next(batches)
        assert repr(batches) == "<fremap.Batches, 2 of 3 batches left>"
        assert not batches.closed
        batches.close()
        assert batches.closed
        assert repr(batches) == "<fremap.Batches, closed>"


@pytest.mark.needs("paged")
def test_pins() -> None:
    with fremap.MemoryStore(1 << 16) as store, fremap.Window(store, engine="paged") as window:
        pin = window.pin([1])
        assert repr(pin) == f"<fremap.Pin of 1 page of {window!r}>"
        assert repr(window.pin([2, 3, 2])) == f"<fremap.Pin of 2 pages of {window!r}>"
        pin.release()
        assert repr(pin) == "<fremap.Pin, released>"


def test_holds(numbered_store: Callable[[int], fremap.Store]) -> None:
    with numbered_store(16) as store, fremap.Slots(store, 1, 4) as table:
        pin = table.pin([3, 5])
        slots = pin.slots.tolist()
        assert repr(pin) == f"<fremap.SlotsPin of slots {slots}>"
        pin.release()
        assert repr(pin) == f"<fremap.SlotsPin of slots {slots}, released>"


def test_pins_of_many_slots(numbered_store: Callable[[int], fremap.Store]) -> None:
    with numbered_store(16) as store, fremap.Slots(store, 1, 16) as table:
        text = repr(table.pin(range(10)))
        assert text == "<fremap.SlotsPin of slots [0, 1, 2, 3, 4, 5, 6, 7, … 2 more]>"


def test_stores_windows_and_slots(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "pages"
    path.write_bytes(bytes(3 * 4096))
    with fremap.open(path, "r+", page_bytes=4096) as store:
        assert repr(store) == f"<fremap.FileStore {str(path)!r}, 3 pages of 4096 bytes, writable>"
        how = {"prot": Prot.WRITE, "coherent": engine == "alias"}
        with fremap.Window(store, engine=engine, **how) as window:
            state = f"3 pages of 4096 bytes, engine {engine!r}, writable"
            assert repr(window) == f"<fremap.Window, {state}, of FileStore {str(path)!r}>"
        assert repr(window) == "<fremap.Window, closed>"
        with fremap.Slots(store, 1, 1, engine=engine) as slots:
            state = f"1 slot of 4096 bytes, engine {engine!r}"
            assert repr(slots) == f"<fremap.Slots, {state}, of FileStore {str(path)!r}>"
        with fremap.concat([store]) as row:
            assert repr(row) == ("<fremap.ConcatStore of 1 store, 3 pages of 4096 bytes, writable>")
    assert repr(store) == f"<fremap.FileStore {str(path)!r}, closed>"
    fd = os.open(path, os.O_RDONLY)
    with fremap.open(fd) as store:
        number = store.fileno()
        assert repr(store).startswith(f"<fremap.FileStore of descriptor {number}, ")
    os.close(fd)
    with fremap.MemoryStore(4096, page_bytes=4096) as store:
        assert repr(store) == "<fremap.MemoryStore anonymous, 1 page of 4096 bytes, writable>"


def test_capabilities() -> None:
    text = repr(fremap.capabilities())
    assert text.startswith(f"<fremap.Capabilities of Linux {os.uname().release}: engines ")
    assert "\n" not in text


# Pictures for notebooks.


def drawn(picture: str) -> list[tuple[float, str]]:
    """The rectangles of a picture: how high each is, and what it says of itself."""
    root = ET.fromstring(picture)
    svg = "{http://www.w3.org/2000/svg}"
    return [
        (float(rect.get("height", "0")), rect.findtext(f"{svg}title", ""))
        for rect in root.iter(f"{svg}rect")
    ]


@pytest.mark.needs("paged", "uffd_wp")
def test_a_window_draws_its_pages() -> None:
    with (
        fremap.MemoryStore(100 * 4096, page_bytes=4096) as store,
        fremap.Window(
            store, engine="paged", mapping=[*range(90), *[-1] * 10], prot=Prot.WRITE, coherent=False
        ) as window,
    ):
        window.populate(range(10, 30))
        window.pages[12:15, 0] = 1
        window.place([40, 41], bytes(4096))
        window.protect([50], Prot.NONE)
        with window.pin(range(20, 25)):
            picture = window._repr_html_()
        assert [what for _, what in drawn(picture)] == [
            "pages 0 to 9: absent",
            "pages 10 to 11: present",
            "pages 12 to 14: dirty",
            "pages 15 to 19: present",
            "pages 20 to 24: pinned",
            "pages 25 to 29: present",
            "pages 30 to 39: absent",
            "pages 40 to 41: placed",
            "pages 42 to 49: absent",
            "page 50: denied",
            "pages 51 to 63: absent",
            "pages 64 to 89: absent",
            "pages 90 to 99: shows nothing",
        ]
        assert html.escape(repr(window)) in picture
        for text in ("pinned 5", "placed 2", "denied 1", "a cell is a page"):
            assert text in picture
    assert drawn(window._repr_html_()) == []


def test_every_engine_is_drawn(engine: str) -> None:
    with (
        fremap.MemoryStore(8 * 4096, page_bytes=4096) as store,
        fremap.Window(store, engine=engine, populate=True) as window,
    ):
        assert [what for _, what in drawn(window._repr_html_())] == ["pages 0 to 7: present"]


@pytest.mark.parametrize("engine", ["alias", "paged"], indirect=True)
def test_a_picture_of_a_terabyte_looks_at_few_pages(engine: str) -> None:
    pages = 1 << 28
    with (
        fremap.MemoryStore(pages * 4096, page_bytes=4096) as store,
        fremap.Window(store, engine=engine) as window,
    ):
        window.populate(-1)
        asked: list[int] = []
        look = window._looked

        def counted(sample: np.ndarray) -> object:
            asked.append(len(sample))
            assert len(set(sample.tolist())) == len(sample)
            assert sample.min() == 0
            assert sample.max() < pages
            return look(sample)

        from fremap.pictures import PAGE_STATES, grid_picture

        picture = grid_picture("title", pages, "page", PAGE_STATES, counted)  # type: ignore[arg-type]
        assert asked == [512 * 16]
        assert len(picture) < 1 << 16
        assert "a cell is 524288 pages, of which 16 were looked at" in picture
        assert len(window._repr_html_()) < 1 << 16


def test_cells_of_several_pages_say_how_many_are_present(engine: str) -> None:
    pages = 512 * 4
    with (
        fremap.MemoryStore(pages * 4096, page_bytes=4096) as store,
        fremap.Window(store, engine=engine, mapping="none", page_count=pages) as window,
    ):
        window.remap([0], at=5)
        first, second, third, rest, *_ = drawn(window._repr_html_())
        assert first[1] == "pages 0 to 3: shows nothing"
        assert second[1] == third[1] == "pages 4 to 7: 75% shows nothing, 25% present"
        assert second[0] == pytest.approx(9 * 3 / 4)
        assert second[0] + third[0] == pytest.approx(9)
        assert rest[1] == "pages 8 to 255: shows nothing"


def test_slots_draw_themselves(numbered_store: Callable[[int], fremap.Store]) -> None:
    with numbered_store(16) as store, fremap.Slots(store, 1, 6) as slots:
        slots.ensure([3, 5])
        with slots.pin([7]):
            picture = slots._repr_html_()
        assert [what for _, what in drawn(picture)] == [
            "slots 0 to 1: filled",
            "slot 2: pinned",
            "slots 3 to 5: empty",
        ]
        assert "a cell is a slot; 0 hits, 3 misses, 0 evictions" in picture
    assert drawn(slots._repr_html_()) == []


def test_rows_draw_their_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"<i>&{number:02}.npy" for number in range(20)]
    for number, path in enumerate(paths):
        np.save(path, np.zeros((number + 1, 2)))
    with fremap.rows(paths) as rows:
        rows.take([0, 209])
        picture = rows._repr_html_()
    texts = [what for _, what in drawn(picture)]
    assert texts[:2] == [f"{paths[0]}: 1 row, 0 to 0", f"{paths[1]}: 2 rows, 1 to 2"]
    assert texts[16:] == ["4 more files: 74 rows"]
    assert "<i>" not in picture
    assert re.search("[0-9]+ bytes mapped, [0-9]+ files open", picture)
    assert len(drawn(rows._repr_html_())) == 17


def test_a_name_that_is_no_text_is_drawn(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.bin"
    np.zeros((3, 2)).tofile(os.fsdecode(path))
    with fremap.rows(os.fsdecode(path), np.float64, 2) as rows:
        picture = rows._repr_html_()
    assert "?.bin" in picture
    picture.encode()


def test_a_window_of_the_parent_is_drawn_in_a_child(engine: str) -> None:
    with (
        fremap.MemoryStore(8 * 4096, page_bytes=4096) as store,
        fremap.Window(store, engine=engine) as window,
    ):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if "made before fork()" in window._repr_html_() else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
