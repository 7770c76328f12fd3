"""Memory of Python objects is refused wherever a caller gives memory: bytes are not pointers."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import _core
from fremap.errors import ArgumentTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = 4096


class Whole(ctypes.Structure):
    """As the format tells it: ``T{<O:item:<q:number:}``."""

    _fields_ = (("item", ctypes.py_object), ("number", ctypes.c_int64))


class Packed(ctypes.Structure):
    """The format says bytes."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("item", ctypes.py_object), ("number", ctypes.c_int64))


class Either(ctypes.Union):
    """The format says bytes."""

    _fields_ = (("item", ctypes.py_object), ("number", ctypes.c_int64))


class Derived(Either):
    """The object is the base's."""

    _fields_ = (("other", ctypes.c_int64),)  # type: ignore[assignment]


RECORD = np.dtype([("O", "f8"), ("item", "O")])
OBJECTS: dict[str, Callable[[], Any]] = {
    "array of objects": lambda: np.full(PAGE // 8, None),
    "array of records": lambda: np.zeros(PAGE // RECORD.itemsize, RECORD),
    "dates beside objects": lambda: np.zeros(PAGE // 16, [("day", "M8[D]"), ("item", "O")]),
    "memoryview of objects": lambda: memoryview(np.full(PAGE // 8, None)),
    "memoryview of records": lambda: memoryview(np.zeros(PAGE // RECORD.itemsize, RECORD)),
    "ctypes": lambda: (ctypes.py_object * (PAGE // 8))(),
    "ctypes in two dimensions": lambda: ((ctypes.py_object * 8) * (PAGE // 64))(),
    "ctypes structure": lambda: (Whole * (PAGE // 16))(),
    "ctypes packed structure": lambda: (Packed * (PAGE // 16))(),
    "ctypes union": lambda: (Either * (PAGE // 8))(),
    "ctypes derived union": lambda: (Derived * (PAGE // 8))(),
}
EACH = pytest.mark.parametrize("name", OBJECTS)
PAGES = np.arange(2 * PAGE, dtype=np.uint8).reshape(2, PAGE)


@pytest.fixture
def store() -> Iterator[Any]:
    with fremap.MemoryStore(2 * PAGE, page_bytes=PAGE) as store:
        store.write(None, PAGES)
        yield store


@EACH
def test_pages_are_not_read_into_objects(store: Any, name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"read: out holds Python objects.* give memory of"):
        store.read([1], out=OBJECTS[name]())


@EACH
def test_objects_are_not_written(store: Any, name: str) -> None:
    with pytest.raises(ArgumentTypeError, match="write: data holds Python objects"):
        store.write([1], OBJECTS[name]())
    assert (store.read() == PAGES).all()


@EACH
def test_objects_are_not_placed(store: Any, name: str) -> None:
    with fremap.Window(store) as window:
        with pytest.raises(ArgumentTypeError, match="place: data holds Python objects"):
            window.place([1], OBJECTS[name]())
        assert window.mapping.tolist() == [0, 1]


@EACH
def test_rows_are_not_taken_into_objects(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows"
    PAGES.tofile(path)
    with fremap.rows(path, dtype="u1", row_shape=(PAGE,)) as rows:
        with pytest.raises(ArgumentTypeError, match="take: out holds Python objects"):
            rows.take([0], out=OBJECTS[name]())
        assert (rows[[1]] == PAGES[1]).all()


def test_page_numbers_are_no_objects(store: Any) -> None:
    pages = np.array([0, 1], dtype=object)
    with fremap.Window(store) as window:
        for call in (store.read, window.remap, window.populate, window.evict):
            with pytest.raises(ArgumentTypeError):
                call(pages)


@pytest.mark.parametrize("make", [OBJECTS["array of objects"], OBJECTS["memoryview of records"]])
def test_the_core_refuses_them_too(store: Any, make: Callable[[], Any]) -> None:
    core: _core.Store = store._core
    with pytest.raises(TypeError, match="Python objects"):
        core.read((1, 2), make())
    with pytest.raises(TypeError, match="Python objects"):
        core.write((1, 2), make())


def test_a_field_that_is_named_so_is_no_object(store: Any) -> None:
    records = np.zeros(PAGE // 8, [("O", "f4"), ("NO", "i4")])
    store.read([1], out=records)
    assert (records.view(np.uint8) == PAGES[1]).all()
    store.write([0], records)
    assert (store.read([0]) == PAGES[1]).all()


def test_pointers_that_are_no_objects_are_bytes(store: Any) -> None:
    addresses = (ctypes.c_void_p * (PAGE // 8))()
    store.read([1], out=addresses)
    assert bytes(addresses) == PAGES[1].tobytes()
