"""Files that grow and shrink under a window that is written: `refresh` takes in what they gain."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.errors import StoreError
from fremap.testing import counting, failures

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OLD, GAINED, MINE = 1, 2, 3
HAD = 100  # bytes of the last page


class Scene:
    """A file of two whole pages and a part of a third, and a window on it."""

    def __init__(self, path: Path, kind: str, page_bytes: int, options: dict[str, Any]) -> None:
        self.page_bytes = page_bytes
        self.stack = ExitStack()
        self.first = 0  # byte of the store at which the file begins
        size = 2 * page_bytes + HAD
        if kind == "memory":
            self.store: Any = fremap.MemoryStore(size, page_bytes=page_bytes)
            self.fd = os.dup(self.store.fileno())
        else:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.truncate(self.fd, size)
            self.store = fremap.open(path, "r+", page_bytes=page_bytes, direct=kind == "direct")
        os.pwrite(self.fd, bytes([OLD]) * size, 0)
        if kind == "row":
            before = fremap.MemoryStore(page_bytes, page_bytes=page_bytes)
            self.store = fremap.concat([before, self.stack.enter_context(self.store)])
            self.first = page_bytes
        self.stack.enter_context(self.store)
        self.window = self.stack.enter_context(
            fremap.Window(self.store, first_page=self.first // page_bytes, populate=True, **options)
        )
        self.page = np.frombuffer(memoryview(self.window), np.uint8)[2 * page_bytes :]

    def grow(self, count: int | None = None) -> None:
        """Append, through another descriptor, up to the end of the page."""
        count = self.page_bytes - HAD if count is None else count
        os.pwrite(self.fd, bytes([GAINED]) * count, os.fstat(self.fd).st_size)

    def held(self) -> np.ndarray:
        """The last page in the file."""
        return np.frombuffer(os.pread(self.fd, self.page_bytes, 2 * self.page_bytes), np.uint8)

    def evict(self) -> None:
        self.window.evict([2])
        self.window.populate([2])

    def close(self) -> None:
        del self.page
        self.stack.close()
        os.close(self.fd)


KINDS = ["file", "memory", "direct", "row"]


@pytest.fixture(params=[4096, 65536], ids=["4K", "64K"])
def page_bytes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=KINDS)
def scene(
    request: pytest.FixtureRequest, tmp_path: Path, page_bytes: int, write_back: dict[str, Any]
) -> Iterator[Scene]:
    scene = Scene(tmp_path / "file", request.param, page_bytes, write_back)
    yield scene
    scene.close()


@pytest.mark.parametrize("stored", ["clean", "dirty", "dirty behind the end"])
def test_what_the_file_gained_is_there_after_a_refresh(scene: Scene, stored: str) -> None:
    """With what was stored before, and what is stored from then on all reaches the file."""
    expected = np.full(scene.page_bytes, GAINED, np.uint8)
    expected[:HAD] = OLD
    if stored != "clean":
        scene.page[50:60] = expected[50:60] = MINE
    if stored == "dirty behind the end":
        scene.page[200:300] = MINE  # is not the file's, and is dropped
    scene.grow()
    scene.store.refresh()
    assert scene.window.present()[2]
    assert (scene.page == expected).all()
    assert (scene.held() == expected).all()
    scene.page[70:80] = expected[70:80] = MINE
    scene.page[200:300] = expected[200:300] = MINE
    scene.page[-10:] = expected[-10:] = MINE
    scene.window.flush()
    assert not scene.window.dirty().any()
    assert (scene.held() == expected).all()
    scene.evict()
    assert (scene.page == expected).all()


def test_a_file_grows_within_the_page_again_and_again(scene: Scene) -> None:
    expected = np.zeros(scene.page_bytes, np.uint8)
    expected[:HAD] = OLD
    for end in range(HAD + 500, 4001, 500):
        scene.grow(500)
        expected[end - 500 : end] = GAINED
        scene.store.refresh()
        assert (scene.page == expected).all()
        scene.page[end - 10 : end] = expected[end - 10 : end] = MINE
        scene.page[end + 10] = MINE
        scene.window.flush()
        expected[end:] = 0
        assert (scene.held() == expected[:end]).all()
        scene.page[end + 10] = 0


def test_a_page_that_was_absent_comes_whole(scene: Scene) -> None:
    scene.window.evict([2])
    scene.grow()
    scene.store.refresh()
    assert not scene.window.present()[2]
    scene.window.populate([2])
    scene.page[200:300] = MINE
    scene.window.flush()
    assert (scene.held()[200:300] == MINE).all()
    assert (scene.held()[300:] == GAINED).all()


def test_pages_of_the_window_s_own_and_denied_ones_stay(scene: Scene) -> None:
    scene.page[:] = MINE
    scene.window.protect([2], Prot.NONE)
    scene.grow()
    scene.store.refresh()
    scene.window.protect([2], Prot.WRITE)
    scene.window.populate([2])
    assert (scene.page[:HAD] == MINE).all()
    assert (scene.page[HAD:] == GAINED).all()
    scene.window.place([2], np.full(scene.page_bytes, 9, np.uint8))
    scene.grow(scene.page_bytes)
    scene.store.refresh()
    assert (scene.page == 9).all()
    scene.window.evict([2], discard=True)
    scene.window.populate([0])


def test_a_file_that_shrank_keeps_its_size(scene: Scene) -> None:
    """What is stored behind its new end is dropped; when it grows again that is the file's."""
    os.truncate(scene.fd, 2 * scene.page_bytes + 40)
    scene.store.refresh()
    scene.page[30:90] = MINE
    scene.window.flush()
    assert (scene.held() == [OLD] * 30 + [MINE] * 10).all()
    scene.evict()
    scene.grow(1000)
    scene.store.refresh()
    scene.page[1000:1010] = MINE
    scene.window.flush()
    expected = [OLD] * 30 + [MINE] * 10 + [GAINED] * 960 + [MINE] * 10 + [GAINED] * 30
    assert (scene.held() == expected).all()


def test_a_refresh_that_fails_says_so_and_can_be_made_again(
    tmp_path: Path, write_back: dict[str, Any]
) -> None:
    scene = Scene(tmp_path / "file", "file", 4096, write_back)
    scene.page[50:60] = MINE
    scene.grow()
    with (
        failures("write", errno=errno.EIO, times=2**31),
        pytest.raises(StoreError, match=r"refresh \(file page 2\)") as caught,
    ):
        scene.store.refresh()
    assert caught.value.errno == errno.EIO
    assert scene.window.dirty().tolist() == [False, False, True]
    scene.store.refresh()
    scene.window.populate([2])
    scene.page[200:300] = MINE
    scene.window.flush()
    expected = np.full(4096, GAINED, np.uint8)
    expected[:HAD] = OLD
    expected[50:60] = expected[200:300] = MINE
    assert (scene.held() == expected).all()
    scene.close()


def test_a_window_that_is_gone_is_not_refreshed(tmp_path: Path, write_back: dict[str, Any]) -> None:
    scene = Scene(tmp_path / "file", "file", 4096, write_back)
    for _ in range(10):
        fremap.Window(scene.store, **write_back).close()
    with counting() as calls:
        scene.store.refresh()
    assert (calls["read"], calls["write"]) == (0, 0)
    scene.close()


def test_every_window_on_the_store_is_refreshed(tmp_path: Path, write_back: dict[str, Any]) -> None:
    scene = Scene(tmp_path / "file", "file", 4096, write_back)
    with fremap.Window(scene.store, 1, first_page=2, populate=True, **write_back) as other:
        scene.grow()
        scene.store.refresh()
        assert (scene.page[HAD:] == GAINED).all()
        assert (other.pages[0, HAD:] == GAINED).all()
    scene.close()
