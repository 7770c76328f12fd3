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


def test_another_object_has_other_slots(served: Served) -> None:
    """What a server has at a URL, and in which version, may depend on what it is sent."""
    with (
        opened(served, storage_options={"headers": {"X-Tenant": "one"}}) as store,
        opened(served, storage_options={"headers": {"X-Tenant": "one"}}) as same,
        opened(served, storage_options={"headers": {"X-Tenant": "two"}}) as other,
        shared(store),
        shared(same),
        pytest.raises(fremap.ArgumentError, match="another version"),
    ):
        shared(other)


@pytest.mark.needs("fsspec")
def test_the_same_url_with_other_options_is_another_object(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "object").write_bytes(name[:1].encode() * PAGE)
        os.utime(tmp_path / name / "object", ns=(1, 1))

    def opened_in(name: str) -> fremap.Store:
        options = {"path": str(tmp_path / name), "target_protocol": "file"}
        return fremap.open("dir://object", storage_options=options)

    with opened_in("one") as store, opened_in("one") as same, opened_in("two") as other:
        assert store.read(0)[0, 0] != other.read(0)[0, 0]
        with (
            shared(store),
            shared(same),
            pytest.raises(fremap.ArgumentError, match="another version"),
        ):
            shared(other)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_PROFILE", "STORAGE_EMULATOR_HOST"])
def test_the_environment_may_name_another_server(
    served: Served, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By which a library finds another object at the same URL, perhaps with an equal ETag."""
    monkeypatch.setenv(name, "http://one.example")
    with opened(served) as store, shared(store):
        # That have nothing to do with it.
        monkeypatch.setenv("AWS_SESSION_TOKEN", "renewed")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://other.example")
        with opened(served) as same, shared(same):
            pass
        monkeypatch.setenv(name, "http://two.example")
        with (
            opened(served) as other,
            pytest.raises(fremap.ArgumentError, match="another version"),
        ):
            shared(other)


@pytest.mark.needs("fsspec")
def test_objects_that_only_their_length_tells_apart_are_refused(tmp_path: Path) -> None:
    """As members of an archive, of which fsspec says no version."""
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("object", bytes(PAGE))
    with (
        fremap.open(f"zip://object::file://{path}") as store,
        pytest.raises(fremap.UnsupportedError, match="leave out shared="),
    ):
        shared(store)


@pytest.mark.needs("fsspec")
def test_file_systems_in_options_are_refused(tmp_path: Path) -> None:
    from fsspec.implementations.local import LocalFileSystem

    (tmp_path / "object").write_bytes(bytes(PAGE))
    options = {"path": str(tmp_path), "fs": LocalFileSystem()}
    with (
        fremap.open("dir://object", storage_options=options) as store,
        pytest.raises(fremap.UnsupportedError, match="leave out shared="),
    ):
        shared(store)


def test_what_nothing_tells_apart_is_refused(served: Served) -> None:
    served.etag = None
    with opened(served) as store, pytest.raises(fremap.UnsupportedError, match="leave out shared="):
        shared(store)


@pytest.mark.needs("fsspec")
def test_objects_without_a_url_are_refused(tmp_path: Path) -> None:
    from fsspec.implementations.local import LocalFileSystem

    path = tmp_path / "object"
    path.write_bytes(bytes(PAGE))
    for name in (str(path), f"file://{path}"):
        with (
            fremap.open((LocalFileSystem(), name)) as store,
            pytest.raises(fremap.UnsupportedError, match="leave out shared="),
        ):
            shared(store)
