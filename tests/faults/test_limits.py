"""The limits that others hit: the number of mappings, memory, and what a process may lock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.errors import FremapError, MappingLimitError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = int(Path("/proc/sys/vm/max_map_count").read_text())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    """A sparse file of more pages than a process may have mappings."""
    with fremap.open(tmp_path / "sparse", "w+", size=(LIMIT + 5000) * 4096) as opened:
        yield opened


def mappings() -> int:
    with Path("/proc/self/maps").open() as file:
        return sum(1 for _ in file)


def test_alias_refuses_before_the_limit(store: Any) -> None:
    """Nothing has changed, and the rest of the process has mappings left."""
    with fremap.Window(store, engine="alias", coherent=True) as window:
        before = mappings()
        backwards = np.arange(store.page_count)[::-1]
        with pytest.raises(MappingLimitError) as caught:
            window.remap(backwards, populate=False)
        assert "vm.max_map_count" in str(caught.value)
        assert mappings() <= before + 8
        assert (window.mapping == np.arange(store.page_count)).all()
        with pytest.raises(MappingLimitError):
            window.protect(np.arange(0, store.page_count, 2), Prot.NONE)
        with pytest.raises(MappingLimitError):
            fremap.Window(store, mapping=backwards, engine="alias")
        assert (window.protection() == Prot.READ).all()


def test_alias_goes_up_to_the_limit_and_back(store: Any) -> None:
    room = LIMIT - 1000 - mappings() - 500
    with fremap.Window(store, room, engine="alias") as window:
        backwards = np.arange(room)[::-1]
        window.remap(backwards, populate=False)
        assert window.vma_count == room
        assert mappings() <= LIMIT - 1000
        with pytest.raises(MappingLimitError):
            fremap.Window(store, 4000, mapping=np.arange(4000)[::-1], engine="alias")
        window.remap(range(room), populate=False)
        assert window.vma_count == 1
    with fremap.Window(store, 4000, mapping=np.arange(4000)[::-1], engine="alias") as window:
        assert window.vma_count == 4000


def test_a_cached_window_knows_no_such_limit(store: Any) -> None:
    """The same in engine "paged": one mapping, whatever the order."""
    backwards = np.arange(store.page_count)[::-1]
    with fremap.Window(store, engine="auto") as window:
        if window.engine == "alias":
            assert not fremap.capabilities().engines["paged"].available
            return
        window.remap(backwards, populate=False)
        every_other = np.arange(0, store.page_count, 2)
        if window.engine == "eager" or fremap.capabilities().probes["uffd_poison"].available:
            window.protect(every_other, Prot.NONE)
        else:  # each page without access is a mapping, of which there is a limit
            with pytest.raises(FremapError):
                window.protect(every_other, Prot.NONE)
            assert mappings() <= LIMIT - 1000
            window.protect(every_other, Prot.READ)
        assert window.engine != "paged" or window.vma_count == 1
        assert (window.mapping == backwards).all()
