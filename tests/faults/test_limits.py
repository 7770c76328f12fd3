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
    import subprocess
    from collections.abc import Callable, Iterator

PAGED = pytest.mark.needs("paged")
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


FILES = """
    import errno, os, resource, sys
    import fremap
    make = {
        "store": lambda: fremap.open(sys.argv[1]),
        "memmap": lambda: fremap.memmap(sys.argv[1]),
        "window": lambda: fremap.Window(store, 4),
    }[sys.argv[2]]
    store = fremap.open(sys.argv[1])
    kept = [make()]
    limit = len(os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        while True:
            kept.append(make())
    except fremap.FremapError as error:
        print(error.errno == errno.EMFILE, f"{limit} open files are the limit" in str(error))
"""


@pytest.mark.parametrize("what", ["store", "memmap", pytest.param("window", marks=PAGED)])
def test_the_limit_of_open_files_is_named(
    tmp_path: Path, what: str, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "pages").write_bytes(bytes(16 * 4096))
    done = run_script(FILES, tmp_path / "pages", what)
    assert done.stdout == "True True\n", done.stderr


# A thread has 2 MiB of stack, for which there is no room with some of these.
THREADS = """
    import resource, sys
    import fremap
    store = fremap.open(sys.argv[1])
    fremap.Window(store, 4, engine="eager").close()
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    for more in range(0, 2 << 20, 128 << 10):
        resource.setrlimit(resource.RLIMIT_AS, (used + more, -1))
        try:
            fremap.Window(store, 4, engine="paged")
        except fremap.FremapError as error:
            if "no thread can be started" in str(error):
                print(isinstance(error, MemoryError), 'engine="alias"' in str(error))
                break
"""


@PAGED
def test_a_window_that_cannot_start_its_thread_says_so(
    tmp_path: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "pages").write_bytes(bytes(16 * 4096))
    done = run_script(THREADS, tmp_path / "pages")
    assert done.stdout == "True True\n", done.stderr
