"""Windows on numbered pages, beside their model, and scripts that are expected to die."""

from __future__ import annotations

import errno
import os
import textwrap
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.testing import (
    NO_PAGE,
    ModelStore,
    ModelWindow,
    failures,
    kernel_reads,
    numbered_page,
    numbered_words,
    wait_until_settled,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prepared_python import PreparedPython

STORE_PAGES = 48
#: A run, repeats, a hole, single pages: 24 window pages.
MAPPING = [5, 6, 7, 8, 30, 2, 19, 2, -1, 40, 41, 42, 1, 3, 47, 46, 45, 44, 9, 10, 11, 12, 20, 0]
#: Where the second and the third store of a row begin: MAPPING and the runs go across.
CONCAT_STARTS = [7, 34]
PLACED_PAGE = 9
DENIED_PAGE = 10


@dataclass
class Scene:
    """A window with something of everything in it, and what it must show."""

    store: Any
    window: Any
    model: ModelWindow

    def check(self) -> None:
        """Mapping, protection and all content are those of the model.

        A page that a failed call left absent may be absent, but never wrong.
        """
        window, model = self.window, self.model
        assert window.mapping.tolist() == model.mapping
        assert window.protection().tolist() == model.protection
        with memoryview(window) as view:
            for page in range(window.page_count):
                first = page * window.page_bytes
                lazy = model.engine != "eager"
                if model.mapping[page] == NO_PAGE or model.protection[page] == Prot.NONE:
                    assert not kernel_reads(view, first), f"window page {page} can be read"
                elif lazy or kernel_reads(view, first):
                    shown = bytes(view[first : first + window.page_bytes])
                    assert shown == model.content(page), f"window page {page}"


def drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`make_store(kind)`: 48 numbered pages as "file", "cold" file, "memory", or "concat".

    The last is a row: a file, another that is cold, and memory. A "direct" file goes
    past the page cache, through io_uring where there is one; "direct by threads" does so
    without, until other calls were made to fail.
    """
    without_ring = ExitStack()
    path = tmp_path / "pages"
    content = numbered_words(range(STORE_PAGES))

    def memory(part: Any) -> Any:
        store = fremap.MemoryStore(part.nbytes, page_bytes=4096)
        store.write(None, part.view(np.uint8))
        return store

    def make(kind: str) -> Any:
        if kind == "concat":
            parts = np.split(content, CONCAT_STARTS)
            paths = [tmp_path / f"part{number}" for number in range(len(parts) - 1)]
            for path_of_part, part in zip(paths, parts, strict=False):
                if not path_of_part.exists():
                    path_of_part.write_bytes(part.tobytes())
                    wait_until_settled(path_of_part)
            drop_cache(paths[-1])
            files = [fremap.open(part, "r+", page_bytes=4096) for part in paths]
            return fremap.concat([*files, memory(parts[-1])])
        if kind == "memory":
            return memory(content)
        if not path.exists():
            path.write_bytes(content.tobytes())
            wait_until_settled(path)
        if kind == "cold":
            drop_cache(path)
        if kind == "direct by threads":
            refused = failures("io_uring_setup", errno=errno.EPERM, times=2**31)
            without_ring.enter_context(refused)
        return fremap.open(path, "r+", page_bytes=4096, direct=kind.startswith("direct"))

    with without_ring:
        yield make


@pytest.fixture
def make_scene(make_store: Callable[..., Any]) -> Callable[..., Any]:
    """`with make_scene(engine, kind) as scene`: everything is closed afterwards.

    `lock=True`: the window is locked, so every page was brought before the scene begins.
    """

    @contextmanager
    def make(engine: str, kind: str, *, lock: bool = False) -> Iterator[Scene]:
        store = make_store(kind)
        model_store = ModelStore(numbered_words(range(STORE_PAGES)).tobytes())
        model = ModelWindow(model_store, MAPPING, engine)
        placed = numbered_page(1_000_000)
        mapping = np.array(MAPPING)
        with store, fremap.Window(store, mapping=mapping, engine=engine, lock=lock) as window:
            if lock:
                model.populate([*range(len(MAPPING))])
            for either in (window, model):
                either.populate([0, 1, 2, 3, DENIED_PAGE])
                either.place([PLACED_PAGE], placed)
                either.protect([DENIED_PAGE], Prot.NONE)
            yield Scene(store, window, model)

    return make


@pytest.fixture
def run_script(
    tmp_path: Path, prepared_python: PreparedPython
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_script(source, *arguments)` runs Python source in a process of its own."""

    def run(
        source: str, *arguments: object, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"  # which processes that it spawns can import
        script.write_text(textwrap.dedent(source))
        return prepared_python.run(script, *arguments, timeout=timeout)

    return run
