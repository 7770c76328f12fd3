"""What passes to other processes, by pickle and by multiprocessing, and what does not."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
