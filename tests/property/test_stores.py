"""A store reads and writes what a run of bytes would, whatever its kind, page and opening."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import fremap
import numpy as np
import pytest
from fremap.errors import ArgumentError, ClosedError, PageRangeError
from fremap.testing import ModelStore, numbered_words
from fremap.testing import strategies as pages_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

pytestmark = pytest.mark.any_user

MAX_BYTES = 40 * 4096
LIBC = ctypes.CDLL(None, use_errno=True)


def resident_pages(descriptor: int, size: int, page_bytes: int) -> set[int]:
    """Pages that `mincore` finds wholly in the page cache."""
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        start = np.frombuffer(memory, np.uint8)
        answer = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        done = LIBC.mincore(
            ctypes.c_void_p(start.ctypes.data),
            ctypes.c_size_t(size),
            answer.ctypes.data_as(ctypes.c_char_p),
        )
        assert done == 0, os.strerror(ctypes.get_errno())
        del start
    whole = [part.all() for part in np.split(answer & 1, range(0, len(answer), page_bytes // 4096))]
    return {page for page, here in enumerate(whole[1:]) if here}


class StoreMachine(RuleBasedStateMachine):
    """A file, opened in every way, beside a model of it."""

    direct: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="fremap-")
        self.path = Path(self.directory.name) / "pages"
        self.generation = 0
        self.store: Any = None

    @initialize(size=st.integers(1, MAX_BYTES), page_bytes=st.sampled_from([4096, 8192, 65536]))
    def create(self, size: int, page_bytes: int) -> None:
        content = numbered_words(range(MAX_BYTES // 4096)).tobytes()[:size]
        self.path.write_bytes(content)
        self.model = ModelStore(content, page_bytes)
        self.open(page_bytes)

    def open(self, page_bytes: int) -> None:
        self.store = fremap.open(self.path, "r+", page_bytes=page_bytes, direct=self.direct)

    @rule(page_bytes=st.sampled_from([4096, 8192, 65536]), cold=st.booleans())
    def reopen(self, page_bytes: int, cold: bool) -> None:
        self.store.sync()
        self.store.close()
        with pytest.raises(ClosedError):
            self.store.read([0])
        if cold:
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.model = ModelStore(self.model.content(), page_bytes)
        self.open(page_bytes)

    @invariant()
    def sizes_agree(self) -> None:
        if self.store is not None:
            model = self.model
            assert (self.store.size, self.store.page_count) == (model.size, model.page_count)

    @rule(data=st.data(), given_out=st.booleans())
    def read(self, data: st.DataObject, given_out: bool) -> None:
        pages = data.draw(pages_of.file_page_lists(self.model.page_count), "pages")
        spelt = data.draw(pages_of.spellings(pages, self.model.page_count), "spelt")
        out = np.full((len(pages), self.model.page_bytes), 0xEE, np.uint8) if given_out else None
        found = self.store.read(spelt, out=out)
        assert found.shape == (len(pages), self.model.page_bytes)
        assert found.tobytes() == self.model.read(pages)
        if out is not None:
            assert np.shares_memory(found, out) or not pages

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        drawn = pages_of.file_page_lists(self.model.page_count, max_size=12)
        pages = data.draw(drawn, "pages")
        spelt = data.draw(pages_of.spellings(pages, self.model.page_count), "spelt")
        self.generation += 1
        numbers = range(len(pages))
        content = numbered_words(numbers, self.model.page_bytes, generation=self.generation)
        self.store.write(spelt, content.view(np.uint8))
        self.model.write(pages, content.tobytes())

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        pages = data.draw(pages_of.file_page_lists(self.model.page_count), "pages")
        self.store.prefetch(data.draw(pages_of.spellings(pages, self.model.page_count), "spelt"))

    @rule(data=st.data())
    def resident(self, data: st.DataObject) -> None:
        pages = data.draw(pages_of.file_page_lists(self.model.page_count), "pages")
        with self.path.open("r+b") as file:
            ask = (file.fileno(), self.model.size, self.model.page_bytes)
            before = resident_pages(*ask)
            found = self.store.resident(pages)
            after = resident_pages(*ask)
        for page, here in zip(pages, found.tolist(), strict=True):
            assert here == (page in before) or page in before ^ after

    @rule(size=st.integers(1, MAX_BYTES))
    def resize(self, size: int) -> None:
        """The size is that of the opening until the store is told to look again."""
        shrinks = self.model.page_count > -(-size // self.model.page_bytes)
        os.truncate(self.path, size)
        if shrinks:
            with pytest.raises(fremap.errors.TruncatedError) as caught:
                self.store.read([0, self.model.page_count - 1])
            assert caught.value.completed <= 1
        self.store.refresh()
        content = self.model.content()[:size].ljust(size, b"\0")
        self.model = ModelStore(content, self.model.page_bytes)

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        beyond = self.model.page_count + data.draw(st.integers(0, 2**40), "beyond")
        page = bytes(self.model.page_bytes)
        for call in (
            lambda: self.store.read([0, beyond]),
            lambda: self.store.read([-1 - self.model.page_count]),
            lambda: self.store.write([beyond], page),
            lambda: self.store.resident([beyond]),
            lambda: self.store.prefetch([beyond]),
        ):
            with pytest.raises(PageRangeError):
                call()
        with pytest.raises(ArgumentError):
            self.store.write([0], page[1:])
        with pytest.raises(ArgumentError):
            self.store.read([0], out=bytearray(len(page) + 1))

    @precondition(lambda self: self.store is not None)
    @rule()
    def file_agrees(self) -> None:
        self.store.sync()
        assert self.path.read_bytes() == self.model.content()

    def teardown(self) -> None:
        if self.store is not None:
            self.file_agrees()
            self.store.close()
        self.directory.cleanup()


class DirectStoreMachine(StoreMachine):
    """The same around the page cache."""

    direct = True


class ConcatStoreMachine(StoreMachine):
    """Files in a row beside the same model; the last one grows and shrinks."""

    @initialize(
        size=st.integers(1, MAX_BYTES),
        page_bytes=st.sampled_from([4096, 8192]),
        cuts=st.lists(st.integers(0, MAX_BYTES // 4096), max_size=5),
    )
    def create_row(self, size: int, page_bytes: int, cuts: list[int]) -> None:
        content = numbered_words(range(MAX_BYTES // 4096)).tobytes()[:size]
        ends = sorted(cut * 4096 // 8192 * 8192 for cut in cuts)
        self.bounds = [0, *(end for end in ends if end < size), size]
        for number, (first, end) in enumerate(pairwise(self.bounds)):
            self.part(number).write_bytes(content[first:end])
        self.model = ModelStore(content, page_bytes)
        self.open(page_bytes)

    def create(self, size: int, page_bytes: int) -> None:
        """Not one file."""

    def part(self, number: int) -> Path:
        return Path(self.directory.name) / f"part{number}"

    def parts(self) -> list[Path]:
        return [self.part(number) for number in range(len(self.bounds) - 1)]

    def open(self, page_bytes: int) -> None:
        options: dict[str, Any] = {"page_bytes": page_bytes, "direct": self.direct}
        members = [fremap.open(path, "r+", **options) for path in self.parts()]
        self.store = fremap.concat(members)

    @rule(page_bytes=st.sampled_from([4096, 8192]), cold=st.booleans())
    def reopen(self, page_bytes: int, cold: bool) -> None:
        self.store.sync()
        self.store.close()
        with pytest.raises(ClosedError):
            self.store.read([0])
        for path in self.parts() if cold else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.model = ModelStore(self.model.content(), page_bytes)
        self.open(page_bytes)

    @rule(data=st.data())
    def resident(self, data: st.DataObject) -> None:
        """What its stores say, in a row."""
        before = np.concatenate([store.resident() for store in self.store.stores])
        found = self.store.resident()
        after = np.concatenate([store.resident() for store in self.store.stores])
        assert ((found == before) | (before != after)).all()
        pages = data.draw(pages_of.file_page_lists(self.model.page_count), "pages")
        assert len(self.store.resident(pages)) == len(pages)

    @rule(size=st.integers(1, MAX_BYTES))
    def resize(self, size: int) -> None:
        start = self.bounds[-2]
        size = max(size, start + 1)
        shrinks = self.model.page_count > -(-size // self.model.page_bytes)
        os.truncate(self.parts()[-1], size - start)
        if shrinks:
            with pytest.raises(fremap.errors.TruncatedError) as caught:
                self.store.read([0, self.model.page_count - 1])
            assert caught.value.filename == str(self.parts()[-1])
        self.store.refresh()
        self.store.stores[-1].refresh()
        content = self.model.content()[:size].ljust(size, b"\0")
        self.model = ModelStore(content, self.model.page_bytes)
        self.bounds[-1] = size

    @precondition(lambda self: self.store is not None)
    @rule()
    def file_agrees(self) -> None:
        self.store.sync()
        held = b"".join(path.read_bytes() for path in self.parts())
        assert held == self.model.content()


class DirectConcatStoreMachine(ConcatStoreMachine):
    """The same around the page cache."""

    direct = True


TestStore = StoreMachine.TestCase
TestDirectStore = DirectStoreMachine.TestCase
TestConcatStore = ConcatStoreMachine.TestCase
TestDirectConcatStore = DirectConcatStoreMachine.TestCase
