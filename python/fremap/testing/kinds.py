"""The state machine on each kind of store that fremap has. Needs `hypothesis`."""
# ruff: noqa: S311 - a test's means

from __future__ import annotations

import os
import random
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fremap
from fremap.testing.machine import WindowMachine

if TYPE_CHECKING:
    from fremap.settings import Fault
    from fremap.testing.model import Engine, Tracking

StoreKind = Literal["file", "direct", "memory", "concat"]

#: Files of a row at most.
MAX_PARTS = 5


def _drop_cache(path: Path) -> None:
    """Have nothing of the file in the page cache, if the kernel agrees."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class FileWindowMachine(WindowMachine):
    """The machine on files, which are dropped from the page cache when reopened."""

    direct = False

    def open_store(self, content: bytes, page_bytes: int) -> Any:
        """Make a file in a directory of its own."""
        self.directory = tempfile.TemporaryDirectory(prefix="fremap-")
        self.path = Path(self.directory.name) / "pages"
        self.path.write_bytes(content)
        return fremap.open(self.path, "r+", page_bytes=page_bytes, direct=self.direct)

    def reopen_store(self) -> Any:
        """Open the file anew, with nothing of it in the page cache if the kernel agrees."""
        self.store.close()
        _drop_cache(self.path)
        return fremap.open(self.path, "r+", page_bytes=self.page_bytes, direct=self.direct)

    def release_store(self) -> None:
        """Close the store and remove the file."""
        self.store.close()
        self.directory.cleanup()


class DirectWindowMachine(FileWindowMachine):
    """The machine on files that are read and written past the page cache."""

    direct = True


class ConcatWindowMachine(WindowMachine):
    """The machine on files and shared memory in a row, some of them empty."""

    def open_store(self, content: bytes, page_bytes: int) -> Any:
        """Cut the content between pages, and put each piece into a store of its own."""
        self.directory = tempfile.TemporaryDirectory(prefix="fremap-")
        chosen = random.Random(len(content))
        pages = -(-len(content) // page_bytes)
        ends = sorted(chosen.choices(range(pages + 1), k=chosen.randrange(MAX_PARTS)))
        bounds = [0, *(end * page_bytes for end in ends if end < pages), len(content)]
        self.members: list[Any] = []
        for number, (first, end) in enumerate(pairwise(bounds)):
            if chosen.randrange(3) == 0:
                self.members.append(super().open_store(content[first:end], page_bytes))
                continue
            path = Path(self.directory.name) / f"pages{number}"
            path.write_bytes(content[first:end])
            self.members.append(fremap.open(path, "r+", page_bytes=page_bytes))
        return fremap.concat(self.members)

    def reopen_store(self) -> Any:
        """Open the files anew, out of the page cache; shared memory is as it was."""
        self.store.close()
        for number, member in enumerate(self.members):
            if isinstance(member, fremap.FileStore):
                member.close()
                path = Path(os.fsdecode(member.path or ""))
                _drop_cache(path)
                self.members[number] = fremap.open(path, "r+", page_bytes=self.page_bytes)
        return fremap.concat(self.members)

    def release_store(self) -> None:
        """Close the stores and remove the files."""
        for store in (self.store, *self.members):
            store.close()
        self.directory.cleanup()

    def store_bytes(self) -> int:
        """Tell how long the files are now, all together."""
        return sum(os.fstat(member.fileno()).st_size for member in self.members)


#: The machine's class for each kind of store.
_MACHINES: dict[StoreKind, type[WindowMachine]] = {
    "file": FileWindowMachine,
    "direct": DirectWindowMachine,
    "memory": WindowMachine,
    "concat": ConcatWindowMachine,
}


def window_machine(
    engine: Engine,
    store: StoreKind,
    page_bytes: int = 4096,
    *,
    writable: bool = False,
    tracking: Tracking = "async",
    fault: Fault = "thread",
) -> type[WindowMachine]:
    """Make the state machine of an engine on a kind of store.

    Parameters
    ----------
    engine : {"alias", "paged", "eager"}
        The engine of the window.
    store : {"file", "direct", "memory", "concat"}
        What the window is on.
    page_bytes : int
        Bytes of a page.
    writable : bool
        Whether the window may be written.
    tracking : {"async", "sync"}
        How a writable window of engine "paged" learns what was stored to.
    fault : {"thread", "signal"}
        Who brings an absent page of engine "paged" that is touched.

    Returns
    -------
    type of WindowMachine
        Its `TestCase` is what a test runner runs.
    """
    base = _MACHINES[store]
    how = f"Writable{tracking.title()}" if writable else ""
    how += fault.title() if fault != "thread" else ""
    attributes = {
        "engine": engine,
        "page_bytes": page_bytes,
        "writable": writable,
        "tracking": tracking,
        "fault": fault,
    }
    return type(f"{engine.title()}{store.title()}{page_bytes}{how}", (base,), attributes)
