"""What passes to other processes, by pickle and by multiprocessing, and what does not."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

import fremap
import numpy as np
import pytest

Numbered = Callable[..., np.ndarray]
MakeFile = Callable[..., Path]


def test_a_file_is_opened_again(numbered_file: MakeFile, numbered_pages: Numbered) -> None:
    with fremap.open(numbered_file(3, 8192), page_bytes=8192) as store:
        with pickle.loads(pickle.dumps(store)) as other:
            assert (other.path, other.page_bytes, other.writable) == (store.path, 8192, False)
            np.testing.assert_array_equal(other.read(2), numbered_pages([2], 8192))
        with copy.copy(store) as other:
            assert other.fileno() != store.fileno()


def test_a_created_file_is_not_created_again(tmp_path: Path) -> None:
    with fremap.open(tmp_path / "new", "w+", size=8192, page_bytes=4096) as store:
        store.write(1, b"x" * 4096)
        with pickle.loads(pickle.dumps(store)) as other:
            assert other.writable
            assert bytes(other.read(1)[0, :2]) == b"xx"


def test_by_descriptor_is_refused(numbered_file: MakeFile) -> None:
    with (
        numbered_file(1).open("rb") as file,
        fremap.open(file.fileno()) as store,
        pytest.raises(TypeError, match="open it by path"),
    ):
        pickle.dumps(store)


def test_a_closed_store_is_refused(numbered_file: MakeFile) -> None:
    store = fremap.open(numbered_file(1))
    store.close()
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(store)


def test_named_memory_is_attached(shared_name: str) -> None:
    with fremap.MemoryStore(4096, name=shared_name) as store:
        store.write(0, b"y" * 4096)
        with pickle.loads(pickle.dumps(store)) as other:
            assert other.name == shared_name
            assert other.read()[0, 0] == ord("y")


def test_anonymous_memory_is_refused_by_pickle() -> None:
    with (
        fremap.MemoryStore(4096) as store,
        pytest.raises(TypeError, match="pass it through multiprocessing"),
    ):
        pickle.dumps(store)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_anonymous_memory_passes_through_multiprocessing(method: str) -> None:
    script = Path(__file__).with_name("pass_memory.py")
    done = subprocess.run(
        [sys.executable, script, method], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "parent saw z and c\n"


def test_a_window_is_opened_again(engine: str, numbered_file: MakeFile) -> None:
    with (
        fremap.open(numbered_file(8, 4096), page_bytes=4096) as store,
        fremap.Window(store, 6, engine=engine, first_page=1) as window,
    ):
        with pickle.loads(pickle.dumps(window)) as linear:
            assert (linear.engine, linear.page_count, linear.writable) == (engine, 6, False)
            assert linear.mapping.tolist() == [1, 2, 3, 4, 5, 6]
        window.remap([7, 0], at=2)
        window.protect(4, fremap.Prot.NONE)
        with pickle.loads(pickle.dumps(window)) as other:
            assert other.store is not window.store
            assert other.mapping.tolist() == [1, 2, 7, 0, 5, 6]
            assert other.protection().tolist() == window.protection().tolist()
            other.populate([2, 3])
            np.testing.assert_array_equal(other.pages[2:4], window.pages[2:4])


def test_a_window_that_may_be_written(tmp_path: Path) -> None:
    with (
        fremap.open(tmp_path / "new", "w+", size=8192, page_bytes=4096) as store,
        fremap.Window(store, prot=fremap.Prot.WRITE, coherent=False, populate=True) as window,
    ):
        window.pages[1] = 7
        with pytest.raises(TypeError, match="flush"):
            pickle.dumps(window)
        window.flush()
        with pickle.loads(pickle.dumps(window)) as other:
            assert (other.writable, other.coherent, other.tracking) == (
                True,
                False,
                window.tracking,
            )
            assert other.pages[1, 0] == 7
        window.place(0, b"x" * 4096)
        with pytest.raises(TypeError, match="placed"):
            pickle.dumps(window)
        window.close(discard=True)
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(window)


@pytest.mark.needs("paged", "uffd_wp")
def test_pages_that_are_only_to_be_read_repeat_others(tmp_path: Path) -> None:
    with (
        fremap.open(tmp_path / "new", "w+", size=32768, page_bytes=4096) as store,
        fremap.Window(
            store, engine="paged", prot=fremap.Prot.WRITE, coherent=False, tracking="sync"
        ) as window,
    ):
        window.protect(range(3), fremap.Prot.READ)
        window.remap([0, 0], at=1)
        with pickle.loads(pickle.dumps(window)) as other:
            assert other.mapping.tolist() == [0, 0, 0, 3, 4, 5, 6, 7]
            assert other.protection().tolist() == window.protection().tolist()


def test_what_is_eager_is_there_again(numbered_file: MakeFile) -> None:
    with (
        fremap.open(numbered_file(8, 4096), page_bytes=4096) as store,
        fremap.Window(store, engine="eager") as window,
    ):
        window.populate([1, 2, 5])
        with pickle.loads(pickle.dumps(window)) as other:
            assert other.present().tolist() == window.present().tolist()
            np.testing.assert_array_equal(other.pages[5], window.pages[5])


class Named(fremap.Window):
    """With arguments of its own."""

    def __new__(cls, path: Path, name: str) -> Self:
        return super().__new__(cls, fremap.open(path))

    def __init__(self, path: Path, name: str) -> None:
        self.name = name


def test_a_subclass_with_arguments_of_its_own(numbered_file: MakeFile) -> None:
    with (
        Named(numbered_file(8, 4096), "x") as window,
        pickle.loads(pickle.dumps(window)) as other,
    ):
        assert (type(other), other.name, other.page_count) == (Named, "x", 8)


@pytest.mark.needs("paged")
def test_a_large_window_is_few_bytes(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 4 << 30)
    with fremap.open(path) as store, fremap.Window(store, engine="paged", budget=None) as window:
        assert len(pickle.dumps(window)) < 2000


def test_a_window_on_anonymous_memory_is_refused_by_pickle() -> None:
    with (
        fremap.MemoryStore(4096) as store,
        fremap.Window(store) as window,
        pytest.raises(TypeError, match="multiprocessing"),
    ):
        pickle.dumps(window)
