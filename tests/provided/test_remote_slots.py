"""Slots over an object on a server that several processes share: each extent is fetched once."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
from servers import PAGE, Served, content, opened

if TYPE_CHECKING:
    from pathlib import Path

NAME = f"test-remote-{os.getpid()}"
OTHER = """
import sys, fremap, numpy as np
with fremap.open(sys.argv[1]) as store, fremap.Slots(store, 1, 4, shared=sys.argv[2]) as slots:
    tiles = slots.array(np.uint64)
    print([int(tiles[slots.ensure(key)][0, 0]) for key in (3, 4)])
    del tiles
"""


def shared(store: fremap.Store) -> fremap.Slots:
    return fremap.Slots(store, 1, 4, shared=NAME)


def test_processes_fetch_an_extent_once(served: Served) -> None:
    with opened(served) as store, shared(store) as slots:
        slots.ensure(3)
        assert served.asked == [(3 * PAGE, 4 * PAGE)]
        done = subprocess.run(
            [sys.executable, "-c", OTHER, served.url, NAME],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        numbers = content([3, 4]).view(np.uint64)[:, 0].tolist()
        assert (done.stdout, done.stderr) == (f"{numbers}\n", "")
        tiles = slots.array(np.uint8)
        np.testing.assert_array_equal(tiles[slots.ensure(4)].reshape(1, PAGE), content([4]))
        del tiles
        assert served.asked == [(3 * PAGE, 4 * PAGE), (4 * PAGE, 5 * PAGE)]


def test_another_version_has_other_slots(served: Served) -> None:
    """What was fetched of one version is never shown to whoever has opened another."""
    with opened(served) as store:
        with shared(store) as slots:
            slots.ensure(3)
            served.etag = '"two"'
            with (
                opened(served) as newer,
                pytest.raises(fremap.ArgumentError, match="another version"),
            ):
                shared(newer)
        with opened(served) as newer, shared(newer) as slots:
            slots.ensure(3)
            assert len(served.asked) == 2


def test_what_nothing_tells_apart_is_refused(served: Served) -> None:
    served.etag = None
    with opened(served) as store, pytest.raises(fremap.UnsupportedError, match="leave out shared="):
        shared(store)


@pytest.mark.needs("fsspec")
def test_objects_without_a_url_are_refused(tmp_path: Path) -> None:
    from fsspec.implementations.local import LocalFileSystem

    path = tmp_path / "object"
    path.write_bytes(bytes(PAGE))
    with (
        fremap.open((LocalFileSystem(), str(path))) as store,
        pytest.raises(fremap.UnsupportedError, match="leave out shared="),
    ):
        shared(store)


@pytest.mark.needs("fsspec")
def test_a_length_alone_tells_no_version(tmp_path: Path) -> None:
    """The file system of archives tells nothing of a member that one of the same length lacks."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("object", bytes(PAGE))
    with (
        fremap.open(f"zip://object::{tmp_path}/all.zip") as store,
        pytest.raises(fremap.UnsupportedError, match="leave out shared="),
    ):
        shared(store)
