"""A store of numbered pages, and slots over it that processes share."""

from __future__ import annotations

import itertools
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import fremap
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

sys.path.insert(0, str(Path(__file__).parent))

from sharing import PAGES, named, shared

_numbers = itertools.count()


@pytest.fixture
def path(settled_file: Callable[[int], Path]) -> Path:
    return settled_file(PAGES)


@pytest.fixture
def store(path: Path) -> Iterator[fremap.FileStore]:
    with fremap.open(path, page_bytes=4096) as opened:
        yield opened


@pytest.fixture
def name() -> Iterator[str]:
    """A name for slots, which nothing may have in the end."""
    made = f"test-{os.getpid()}-{next(_numbers)}"
    yield made
    left = named(made).exists()
    with suppress(FileNotFoundError):
        named(made).unlink()
    assert not left, "the last to go takes the name along"


@pytest.fixture
def slots(store: fremap.FileStore, name: str) -> Iterator[fremap.Slots]:
    with shared(store, name) as made:
        yield made
