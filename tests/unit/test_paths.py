"""A path means what `open()` means by it, at every door, and goes on doing so."""

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest


def by_store(path: Any) -> bytes:
    with fremap.open(path) as store:
        return store.read()[0, :4].tobytes()


def by_memmap(path: Any) -> bytes:
    return bytes(fremap.memmap(path, np.uint8, "r")[:4])


def by_rows(path: Any) -> bytes:
    with fremap.rows(path, np.uint8, 4) as rows:
        return bytes(rows[0])


def by_list_of_rows(path: Any) -> bytes:
    with fremap.rows([path], np.uint8, 4) as rows:
        return bytes(rows[0])


DOORS = [by_store, by_memmap, by_rows, by_list_of_rows]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tree/link/../f` is `real/f` to the kernel, and `tree/f` to `os.path.abspath`."""
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "real" / "sub")
    (tmp_path / "real" / "f").write_bytes(b"real")
    (tmp_path / "tree" / "f").write_bytes(b"tree")
    monkeypatch.chdir(tmp_path / "tree")
    return tmp_path


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", [str, os.fsencode])
def test_the_kernel_resolves_links_and_dots(
    tree: Path, door: Callable[[Any], bytes], kind: Callable[[str], Any]
) -> None:
    assert door(kind("link/../f")) == b"real"
    assert door(kind(f"{tree}/tree/link/../f")) == b"real"
    assert door(kind("./f")) == b"tree"


def test_a_new_file_is_made_where_the_kernel_says(tree: Path) -> None:
    fremap.open("link/../f", "w+", size=4096).close()
    assert (tree / "real" / "f").stat().st_size == 4096
    fremap.memmap("link/../g", np.uint8, "w+", shape=4)
    assert (tree / "real" / "g").stat().st_size == 4
    assert (tree / "tree" / "f").read_bytes() == b"tree"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("path", "builtin", "number"),
    [
        ("f/", NotADirectoryError, errno.ENOTDIR),
        ("f/g", NotADirectoryError, errno.ENOTDIR),
        ("", FileNotFoundError, errno.ENOENT),
        (b"", FileNotFoundError, errno.ENOENT),
        ("nothing/", FileNotFoundError, errno.ENOENT),
    ],
)
@pytest.mark.usefixtures("tree")
def test_what_open_refuses(
    door: Callable[[Any], bytes], path: Any, builtin: type[OSError], number: int
) -> None:
    with pytest.raises(builtin) as caught:
        door(path)
    assert isinstance(caught.value, fremap.StoreError)
    assert caught.value.errno == number


def test_relative_paths_survive_chdir_and_pickle(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fremap.open("link/../f") as store, fremap.rows("link/../f", np.uint8, 4) as rows:
        array = fremap.memmap("link/../f", np.uint8, "r")
        assert store.path == f"{tree}/tree/link/../f"
        pickles = [pickle.dumps(thing) for thing in (store, rows, array)]
        monkeypatch.chdir("/")
        assert bytes(rows[0]) == b"real"  # opened here for the first time
    store, rows, array = map(pickle.loads, pickles)
    with store, rows:
        assert store.read()[0, :4].tobytes() == bytes(rows[0]) == bytes(array[:4]) == b"real"


def test_the_command_opens_what_open_opens(tree: Path) -> None:
    command = [sys.executable, "-m", "fremap", "resident", "link/../f", "--json"]
    (tree / "real" / "f").write_bytes(bytes(3 * os.sysconf("SC_PAGE_SIZE")))
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(told)["page_count"] == 3


def test_a_current_directory_that_is_gone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "gone").mkdir()
    monkeypatch.chdir(tree / "gone")
    (tree / "gone").rmdir()
    with pytest.raises(fremap.StoreError, match="current directory"):
        fremap.open("f")
    assert by_store(tree / "tree" / "f") == b"tree"
