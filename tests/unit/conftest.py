"""Stores of numbered pages, in files and in shared memory."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fremap
import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's calibration out of the tests, and the tests out of it."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))


@pytest.fixture
def shared_name() -> Iterator[str]:
    """A name that nobody has under /dev/shm; removed at the end if it is there."""
    name = f"fremap-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield name
    (Path("/dev/shm") / name).unlink(missing_ok=True)


@pytest.fixture(params=["file", "memory"])
def numbered_store(
    request: pytest.FixtureRequest,
    numbered_file: Callable[..., Path],
    numbered_pages: Callable[..., object],
) -> Callable[[int], fremap.Store]:
    """`numbered_store(page_count)` → a writable store of numbered pages; of each kind."""

    def make(page_count: int) -> fremap.Store:
        if request.param == "file":
            return fremap.open(numbered_file(page_count), "r+", page_bytes=4096)
        store = fremap.MemoryStore(page_count * 4096, page_bytes=4096)
        store.write(None, numbered_pages(range(page_count)))
        return store

    return make
