"""`fremap.load` and `fremap.open_memmap` beside NumPy's."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ARRAYS = [
    np.arange(600, dtype="<i4").reshape(20, 30),
    np.asfortranarray(np.arange(600, dtype=">f8").reshape(20, 30)),
    np.zeros((3, 0), "u1"),
    np.array([(1, b"x"), (2, b"yz")], [("a", "<i2"), ("\u00e4", "S2")]),
    np.array(7.5),
]


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_what_numpy_saved_is_shown(array: Any, mode: Any, tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    np.save(path, array)
    shown, theirs = fremap.load(path, mode), np.load(path, mmap_mode=mode)
    np.testing.assert_array_equal(shown, array)
    assert (shown.dtype, shown.strides, shown.mode) == (theirs.dtype, theirs.strides, mode)
    assert shown.offset == theirs.offset
    assert type(shown) is fremap.memmap


@pytest.mark.parametrize("version", [None, (1, 0), (2, 0)])
@pytest.mark.parametrize("fortran", [False, True])
def test_what_was_created_numpy_reads(version: Any, fortran: bool, tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    made = fremap.open_memmap(path, "w+", "f4", (20, 30), fortran, version, budget=1 << 20)
    made[:] = np.arange(600).reshape(20, 30)
    made.flush()
    np.testing.assert_array_equal(np.load(path), made)
    assert np.load(path, mmap_mode="r").strides == made.strides
    again = fremap.open_memmap(path)
    again[0, 0] = -1
    assert np.load(path)[0, 0] == -1


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    with pytest.raises(FileNotFoundError):
        fremap.load(path)
    path.write_bytes(b"no array at all")
    with pytest.raises(fremap.FormatError, match="does not begin like"):
        fremap.load(path)
    np.save(path, np.array([None]), allow_pickle=True)
    with pytest.raises(fremap.ArgumentTypeError):
        fremap.load(path)
    with pytest.raises(fremap.ArgumentError, match="mmap_mode is None"):
        fremap.load(path, None)  # type: ignore[arg-type]
    with pytest.raises(fremap.ArgumentError, match="needs a shape"):
        fremap.open_memmap(path, "w+")
    with pytest.raises(fremap.ArgumentTypeError):
        fremap.open_memmap(path, "w+", object, 3)
    with path.open("rb") as file, pytest.raises(fremap.ArgumentTypeError, match="a path"):
        fremap.open_memmap(file)  # type: ignore[arg-type]
    assert path.read_bytes()[:6] == b"\x93NUMPY"


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_file_shorter_than_its_header_says_stays_as_it_is(tmp_path: Path, mode: Any) -> None:
    """NumPy makes it longer in mode "r+", by zeros."""
    path = tmp_path / "array.npy"
    np.save(path, np.arange(1000))
    whole = path.read_bytes()
    path.write_bytes(whole[:4000])
    for opened in (fremap.load, fremap.open_memmap):
        with pytest.raises(fremap.FormatError, match=r"8000 bytes of data .* it is truncated"):
            opened(path, mode)
    assert path.read_bytes() == whole[:4000]


def test_a_file_that_cannot_be_mapped_is_not_emptied(
    tmp_path: Path, in_child: Callable[[Callable[[], None]], int]
) -> None:
    path = tmp_path / "array.npy"
    np.save(path, np.arange(1000))
    whole = path.read_bytes()

    def child() -> None:
        limit = 1 << 34
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with pytest.raises(OSError, match="cannot be mapped"):
            fremap.memmap(path, "u1", "w+", shape=(2 * limit,))
        with pytest.raises(OSError, match="cannot be mapped"):
            fremap.open_memmap(path, "w+", "u1", (2 * limit,))

    assert in_child(child) == 0
    assert path.read_bytes() == whole


def test_a_file_that_cannot_be_made_as_long_is_not_emptied(
    tmp_path: Path, in_child: Callable[[Callable[[], None]], int]
) -> None:
    path = tmp_path / "array.npy"
    np.save(path, np.arange(1000))
    whole = path.read_bytes()

    def child() -> None:
        limit = 1 << 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match=r"array\.npy"):
            fremap.memmap(path, "u1", "w+", shape=(2 * limit,))
        with pytest.raises(OSError, match=r"array\.npy"):
            fremap.open_memmap(path, "w+", "u1", (2 * limit,))
        with pytest.raises(OSError, match=r"array\.npy"):
            fremap.open(path, "w+", size=2 * limit)

    assert in_child(child) == 0
    for wrong in ({"shape": (-3,)}, {"shape": (3,), "budget": -1}, {"shape": (3,), "advice": "?"}):
        with pytest.raises(fremap.ArgumentError):
            fremap.open_memmap(path, "w+", "f4", **wrong)  # type: ignore[arg-type]
    assert path.read_bytes() == whole
