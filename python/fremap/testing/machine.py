"""One state machine for every engine: a window is driven beside the model.

After each step the window's mapping, protection, presence, dirtiness and contents,
and what the store holds, are compared with those of a `ModelWindow`. Needs
`hypothesis`. The store is shared memory; for one of your own, subclass
`WindowMachine` and say in `open_store` how it is opened::

    class Mine(WindowMachine):
        engine = "paged"

        def open_store(self, content, page_bytes):
            return MyStore(content, page_bytes)

    TestMine = Mine.TestCase
"""
# ruff: noqa: S101, S311 - a test's means

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import fremap
from fremap import Prot
from fremap.errors import (
    ArgumentTypeError,
    ClosedError,
    DuplicatePageError,
    FremapError,
    PageRangeError,
    ViewsAliveError,
)
from fremap.testing import strategies as pages_of
from fremap.testing.model import NO_PAGE, Engine, ModelWindow, Presence, Tracking
from fremap.testing.model_store import ModelStore
from fremap.testing.pages import numbered_page, numbered_words
from fremap.testing.touch import kernel_reads, kernel_writes, pages_taken

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from fremap.settings import Fault

#: Bounds that keep an example small; every boundary of a small window is near.
MAX_STORE_PAGES = 40
MAX_WINDOW_PAGES = 24
READER_THREADS = 3

#: What a call brings: all, what needs no I/O, nothing.
LOADS = (
    {"populate": True, "nonblock": False},
    {"populate": True, "nonblock": True},
    {"populate": False, "nonblock": False},
)


class WindowMachine(RuleBasedStateMachine):
    """Drives one window and its model through anything that the rules allow.

    Attributes
    ----------
    engine : {"alias", "paged", "eager"}
        The engine of the window.
    page_bytes : int
        Bytes of a page.
    writable : bool
        Whether the window may be written; where its engine is not coherent,
        what is written reaches the store when the rules say so.
    tracking : {"async", "sync"}
        How a writable window of engine "paged" learns what was stored to.
    fault : {"thread", "signal"}
        Who brings an absent page of engine "paged" that is touched.
    """

    engine: ClassVar[Engine] = "alias"
    page_bytes: ClassVar[int] = 4096
    writable: ClassVar[bool] = False
    tracking: ClassVar[Tracking] = "async"
    fault: ClassVar[Fault] = "thread"

    def __init__(self) -> None:
        super().__init__()
        self.generation = 0
        self.store: Any = None
        self.window: Any = None
        self._taken = pages_taken()

    # What is driven: to be overridden for other stores.

    def open_store(self, content: bytes, page_bytes: int) -> Any:
        """Make a store that holds `content` and may be written: anonymous shared memory."""
        store = fremap.MemoryStore(len(content), page_bytes=page_bytes)
        store.write(None, content.ljust(store.page_count * page_bytes, b"\0"))
        return store

    def reopen_store(self) -> Any:
        """Close the store and open it again; where it has none of it cached, the better."""
        return self.store

    def release_store(self) -> None:
        """Close the store and remove what it left behind."""
        self.store.close()

    def store_bytes(self) -> int:
        """Tell how long the store is now, whatever it was when it was opened."""
        return os.fstat(self.store.fileno()).st_size

    def open_window(self, **options: Any) -> Any:
        """Open a window on the store."""
        return fremap.Window(self.store, **options)

    def touch(self, page: int) -> bytes:
        """Read a page as any thread would."""
        with memoryview(self.window) as view, view[self._bytes_of(page)] as part:
            return bytes(part)

    def write(self, page: int, data: bytes, first: int = 0) -> None:
        """Write to a page as any thread would, from its byte `first` on."""
        start = page * self.page_bytes + first
        with memoryview(self.window) as view:
            view[start : start + len(data)] = data

    def kernel_may_read(self, page: int) -> bool:
        """Whether the kernel can read all of a page; False if it can read none of it."""
        return self._kernel_may(kernel_reads, page)

    def kernel_may_write(self, page: int) -> bool:
        """Whether the kernel can write all of a page; False if it can write none of it."""
        return self._kernel_may(kernel_writes, page)

    def protection(self) -> list[Prot]:
        """Ask the window what may be done with each page."""
        return [Prot(prot) for prot in self.window.protection().tolist()]

    # Making and closing.

    @initialize(
        page_count=st.integers(1, MAX_STORE_PAGES), tail_bytes=st.integers(1, 4095), data=st.data()
    )
    def create(self, page_count: int, tail_bytes: int, data: st.DataObject) -> None:
        """Make a store of numbered pages, the last perhaps a part, and a window on it."""
        content = numbered_words(range(page_count), self.page_bytes).tobytes()
        # An alias of large pages cannot end within one.
        if self.engine != "alias" or self.page_bytes == 4096:
            content = content[: -tail_bytes if data.draw(st.booleans(), "part of a page") else None]
        self.model_store = ModelStore(content, self.page_bytes)
        self.store = self.open_store(content, self.page_bytes)
        assert (self.store.page_count, self.store.size) == (page_count, len(content))
        self.length = self.store_bytes()
        self._open(data)

    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        """Close the window, find it closed, and open another on a store with a cold cache."""
        self._perhaps_make_dirty(data)
        self._close(discard=self.writes_back and data.draw(st.booleans(), "discard"))
        self.window.close()
        for call in (self.window.populate, self.window.present, lambda: self.window.remap([0])):
            _expect(ClosedError, call)
        self.window = None
        self.store = self.reopen_store()
        self._open(data)

    @rule()
    def close_under_a_view(self) -> None:
        """Try to close a window that somebody looks at; it goes on."""
        with memoryview(self.window):
            _expect(ViewsAliveError, self.window.close)

    def teardown(self) -> None:
        """Read every page once more, and close."""
        if self.window is not None:
            self._read_all(range(self.model.page_count))
            self._close()
        if self.store is not None:
            self.release_store()

    def _close(self, *, discard: bool = False) -> None:
        self.window.close(**({"discard": True} if discard else {}))
        self.model.close(discard=discard)
        self.read_store()

    def _open(self, data: st.DataObject) -> None:
        limit = self.store.page_count
        options: dict[str, Any] = {"engine": self.engine, "fault": self.fault}
        kind = data.draw(st.sampled_from(["linear", "none", "array"]), "mapping")
        if kind == "array":
            mapping = data.draw(pages_of.mappings(limit, max_size=MAX_WINDOW_PAGES), "pages")
            options["mapping"] = np.array(mapping)
        else:
            first = data.draw(st.integers(0, limit - 1), "first_page")
            count = data.draw(st.integers(1, min(MAX_WINDOW_PAGES, limit - first)), "page_count")
            mapping = [NO_PAGE] * count if kind == "none" else list(range(first, first + count))
            options |= {"mapping": kind, "page_count": count}
            if kind == "linear":
                options["first_page"] = first
        both: dict[str, Any] = {"prot": Prot.READ}
        if self.writable:
            both = {"prot": Prot.WRITE, "coherent": self.engine == "alias"}
        if self.writes_back and self.engine == "paged":
            both["tracking"] = self.tracking
        # A page that is not there in "eager" can be neither read nor written.
        usual = LOADS[:1] * 3 if self.writes_back else ()
        both |= data.draw(st.sampled_from(LOADS[::-1] + usual), "loads")
        if self.writes_back and _repeats(mapping):
            _expect(DuplicatePageError, lambda: self.open_window(**options, **both))
            mapping = _without_repeats(mapping)
            options["mapping"] = np.array(mapping)
        before = self._resident()
        self.window = self.open_window(**options, **both)
        certain, doubtful = self._settled(before)
        self.model = ModelWindow(self.model_store, mapping, self.engine, **both, resident=certain)
        self.model.unsettle(doubtful)
        assert self.window.engine == self.engine
        assert self.window.page_count == len(mapping)
        assert self.window.page_bytes == self.page_bytes

    # Steps.

    @rule(data=st.data())
    def remap(self, data: st.DataObject) -> None:
        """Show other file pages: a run of window pages, or scattered ones."""
        self._perhaps_make_dirty(data)
        window_pages = self.model.page_count
        scattered = data.draw(st.booleans(), "scattered")
        if scattered:
            at = data.draw(pages_of.permutations(window_pages), "at")
            some = st.integers(0, self.store.page_count - 1)
            drawn = st.lists(some, min_size=len(at), max_size=len(at))
        else:
            first = data.draw(st.integers(0, window_pages - 1), "at")
            at = list(range(first, window_pages))
            drawn = pages_of.file_page_lists(self.store.page_count, max_size=len(at))
        if self.writes_back and data.draw(st.integers(0, 3), "once"):
            drawn = self._free_file_pages(at)
        file_pages = data.draw(drawn, "file pages")
        at = at[: len(file_pages)]
        self._remap(data, file_pages, at, np.array(at, dtype=np.int64) if scattered else first)

    @precondition(lambda self: self.writes_back)
    @rule(data=st.data())
    def change_places(self, data: st.DataObject) -> None:
        """Remap pages to each other's places, among them such as were stored to."""
        self._perhaps_make_dirty(data)
        mapping = self.model.mapping
        at = [page for page, shows in enumerate(mapping) if shows >= 0]
        order = data.draw(st.permutations(at), "order")
        self._remap(data, [mapping[page] for page in order], at, np.array(at, dtype=np.int64))

    def _remap(
        self, data: st.DataObject, file_pages: list[int], at: list[int], where: object
    ) -> None:
        flags = data.draw(st.sampled_from(LOADS), "loads") | {"discard": data.draw(st.booleans())}
        prot = data.draw(st.one_of(st.none(), st.sampled_from(self._protections())), "prot")
        spelt = data.draw(pages_of.spellings(file_pages, self.store.page_count), "spelt")
        self._compare(
            lambda: self.window.remap(spelt, where, prot=prot, **flags),
            lambda resident: self.model.remap(
                file_pages, at, prot=prot, **flags, resident=resident
            ),
            at,
        )

    @rule(data=st.data(), nonblock=st.booleans())
    def populate(self, data: st.DataObject, nonblock: bool) -> None:  # noqa: FBT001
        """Make pages present."""
        pages = self._window_pages(data)
        spelt = data.draw(pages_of.spellings(pages, self.model.page_count), "spelt")
        self._compare(
            lambda: self.window.populate(spelt, nonblock=nonblock),
            lambda resident: self.model.populate(pages, nonblock=nonblock, resident=resident),
            pages,
        )

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """Drop pages, placed ones only if told so."""
        self._perhaps_make_dirty(data)
        pages = self._window_pages(data)
        discard = data.draw(st.booleans(), "discard")
        spelt = data.draw(pages_of.spellings(pages, self.model.page_count), "spelt")
        self._compare(
            lambda: self.window.evict(spelt, discard=discard),
            lambda _: self.model.evict(pages, discard=discard),
        )

    @rule(data=st.data())
    def protect(self, data: st.DataObject) -> None:
        """Change what may be done with pages."""
        self._perhaps_make_dirty(data)
        pages = self._window_pages(data)
        prot = data.draw(st.sampled_from(self._protections()), "prot")
        spelt = data.draw(pages_of.spellings(pages, self.model.page_count), "spelt")
        self._compare(
            lambda: self.window.protect(spelt, prot), lambda _: self.model.protect(pages, prot)
        )

    @rule(data=st.data(), form=st.sampled_from(["keep", "one", "each"]))
    def place(self, data: st.DataObject, form: str) -> None:
        """Give pages content of their own."""
        self._perhaps_make_dirty(data)
        pages = data.draw(pages_of.permutations(self.model.page_count), "pages")
        content: bytes | None = None
        given: Any = None
        if form == "keep":
            pages = [page for page in pages if self.model.content(page) is not None]
        else:
            numbers = [1_000_000 + page for page in (pages if form == "each" else pages[:1])]
            words = numbered_words(numbers, self.page_bytes, generation=self._next_generation())
            content = words.tobytes()
            given = words.view(np.uint8) if data.draw(st.booleans(), "as array") else content
        self._compare(
            lambda: self.window.place(pages, given), lambda _: self.model.place(pages, content)
        )

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Touch pages in any order."""
        self._read_all(self._window_pages(data))

    @rule(seed=st.integers(0, 2**16))
    def read_by_threads(self, seed: int) -> None:
        """Touch all pages from several threads at once, each in an order of its own."""
        pages = [page for page in range(self.model.page_count) if self.model.readable(page)]
        orders = [random.Random(seed + i).sample(pages, len(pages)) for i in range(READER_THREADS)]
        with ThreadPoolExecutor(READER_THREADS) as threads:
            for order, contents in zip(orders, threads.map(self._touch_in, orders), strict=True):
                for page, content in zip(order, contents, strict=True):
                    self._check_touched(page, content)

    @rule(data=st.data())
    def write_store(self, data: st.DataObject) -> None:
        """Change the store beside the window: seen at once if coherent, else once reloaded."""
        pages = data.draw(pages_of.permutations(self.store.page_count, max_size=8), "pages")
        words = numbered_words(pages, self.page_bytes, generation=self._next_generation())
        self.store.write(pages, words.view(np.uint8))
        self.model_store.write(pages, words.tobytes())
        self.agree()
        if not self.model.coherent:
            stale = [index for index, shows in enumerate(self.model.mapping) if shows in pages]
            self.window.evict(stale)
            self.model.evict(stale)

    @rule()
    def read_store(self) -> None:
        """Read the whole store."""
        found = self.store.read(None)
        assert found.shape == (self.store.page_count, self.page_bytes)
        assert found.tobytes() == self.model_store.read(range(self.model_store.page_count))

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def write_window(self, data: st.DataObject) -> None:
        """Store to pages through the window."""
        written = self._store_to_pages(data)
        if written and self.model.coherent:
            self.window.flush(data.draw(st.sampled_from([None, written[0]]), "flushed"))

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        """Write changed pages to the store: those that are named, and no others."""
        self._perhaps_make_dirty(data)
        pages = self._window_pages(data)
        spelt = data.draw(pages_of.spellings(pages, self.model.page_count), "spelt")
        self._compare(lambda: self.window.flush(spelt), lambda _: self.model.flush(pages))

    @rule(data=st.data())
    def ask_for_the_impossible(self, data: st.DataObject) -> None:
        """Ask for what is refused; nothing changes."""
        store_pages, window_pages = self.store.page_count, self.model.page_count
        window = self.window
        refused: dict[str, tuple[type[Exception], Callable[[], object]]] = {
            "file page": (PageRangeError, lambda: window.remap([0, store_pages])),
            "negative": (PageRangeError, lambda: window.remap([-store_pages - 1])),
            "at": (PageRangeError, lambda: window.remap([0], at=window_pages)),
            "beyond": (PageRangeError, lambda: window.remap([0, 0], at=window_pages - 1)),
            "populate": (PageRangeError, lambda: window.populate([0, window_pages])),
            "evict": (PageRangeError, lambda: window.evict(window_pages, discard=True)),
            "protect": (PageRangeError, lambda: window.protect([window_pages], Prot.NONE)),
            "flush": (PageRangeError, lambda: window.flush([0, window_pages])),
            "place": (PageRangeError, lambda: window.place([window_pages], bytes(self.page_bytes))),
            "float": (ArgumentTypeError, lambda: window.remap([0.0])),
            "bool": (ArgumentTypeError, lambda: window.populate(np.array([True]))),
            "lengths": (ValueError, lambda: window.remap([0, 0], at=[0])),
            "twice": (ValueError, lambda: window.remap([0, 0], at=[0, 0])),
            "data": (ValueError, lambda: window.place([0], b"short")),
        }
        name = data.draw(st.sampled_from(sorted(refused)), "what")
        error, call = refused[name]
        _expect(error, call)

    # Comparing.

    @invariant()
    def agree(self) -> None:
        """Compare all that can be seen without bringing a page in."""
        window, model = self.window, self.model
        assert window.mapping.tolist() == model.mapping
        assert self.protection() == model.protection
        seen = window.present()
        for page, (real, expected) in enumerate(zip(seen.tolist(), model.present, strict=True)):
            unsure = expected is None or (real != expected and self._may_be_unmapped())
            assert unsure or real == expected, f"window page {page}: present is {real}"
            model.settle(page, present=real)
        for page in range(model.page_count):
            self._agree_on(page)
        if not model.coherent:
            self._agree_on_dirty_pages()
        if self.writes_back:
            self._agree_on_the_store()
        if self.engine == "paged":
            assert window.vma_count == 1

    def _may_be_unmapped(self) -> bool:
        """Whether the kernel has taken pages for itself, and may have unmapped some of a file.

        A touch of such a page is a fault, which maps its neighbours, too.
        """
        return self.engine == "alias" and pages_taken() != self._taken

    def _agree_on(self, page: int) -> None:
        model = self.model
        if model.readable(page) is False:
            assert not self.kernel_may_read(page), f"window page {page} can be read"
        elif model.present[page]:
            assert self.kernel_may_read(page), f"window page {page} cannot be read"
            self._check_content(page, self.touch(page))
            # Trying it would make it dirty, and where it must not be tried it is a signal.
            if self.writable and not self.writes_back:
                assert self.kernel_may_write(page) == model.writable(page), f"window page {page}"

    def _agree_on_dirty_pages(self) -> None:
        found = self.window.dirty().tolist()
        for page, (real, expected) in enumerate(zip(found, self.model.dirty, strict=True)):
            assert expected is None or real == expected, f"window page {page}: dirty is {real}"
            self.model.settle_dirty(page, dirty=real)

    def _agree_on_the_store(self) -> None:
        """Compare what the store holds; what was just written is in the page cache."""
        here = sorted(self._resident())  # not the others: reading them would warm a cold store
        assert self.store.read(here).tobytes() == self.model_store.read(here)
        assert self.store_bytes() == self.length

    def _compare(
        self,
        real: Callable[[], npt.NDArray[np.bool_] | None],
        model: Callable[[Collection[int]], list[Presence] | None],
        pages: Sequence[int] = (),
    ) -> None:
        """Do a step on both sides; the outcome must be the same."""
        repeated, held = _repeats(self.model.mapping), self.model_store.pages()
        before = self._resident()
        found, failure = _outcome(real)
        certain, doubtful = self._settled(before)
        expected, expected_failure = _outcome(lambda: model(certain))
        self._reload_repeats(repeated, held)
        if failure is not None or expected_failure is not None:
            assert type(failure) is type(expected_failure), f"{failure!r}, not {expected_failure!r}"
            return
        if expected is not None:
            assert found is not None
            assert found.dtype == np.bool_
            shows = self.model.mapping
            for page, got, want in zip(pages, found.tolist(), expected, strict=True):
                unsure = want is None or shows[page] in doubtful
                unsure |= want != got and self._may_be_unmapped()
                assert unsure or got == want, f"window page {page}: present is {got}"
            self.model.unsettle(doubtful)

    def _reload_repeats(self, repeated: set[int], held: Sequence[bytes]) -> None:
        """Evict pages that were shown twice, if one of them was written to the store.

        The other shows what it showed or what was written, as it was loaded
        before or after.
        """
        written = {page for page in repeated if self.model_store.page(page) != held[page]}
        stale = [page for page, shows in enumerate(self.model.mapping) if shows in written]
        if stale:
            self.window.evict(stale)
            self.model.evict(stale)

    def _read_all(self, pages: Sequence[int]) -> None:
        for page in pages:
            if self.model.readable(page):
                self._check_touched(page, self.touch(page))

    def _check_touched(self, page: int, found: bytes) -> None:
        self.model.touch(page)
        self._check_content(page, found)

    def _check_content(self, page: int, found: bytes) -> None:
        assert self.model.may_show(page, found), f"window page {page}"
        self.model.settle_content(page, found)

    def _touch_in(self, order: Sequence[int]) -> list[bytes]:
        return [self.touch(page) for page in order]

    def _resident(self) -> set[int]:
        return set(np.flatnonzero(self.store.resident()).tolist())

    def _settled(self, before: set[int]) -> tuple[set[int], set[int]]:
        """File pages resident throughout, and those that came or went."""
        after = self._resident()
        return before & after, before ^ after

    # Writing.

    def _perhaps_make_dirty(self, data: st.DataObject) -> None:
        """As often as not, let a step find pages that were just stored to."""
        if self.writes_back and data.draw(st.booleans(), "dirty"):
            self._store_to_pages(data)
            self.agree()  # settles what is present: a remap asks for it

    def _store_to_pages(self, data: st.DataObject) -> list[int]:
        """Store to pages: other bytes, or those that are there.

        Where the kernel maps the file a store to a part makes only that part present.
        """
        whole = self.model_store.size // self.page_bytes
        able = [
            page
            for page, shows in enumerate(self.model.mapping)
            if self.model.writable(page) and (self.writes_back or shows < whole)
        ]
        able = [page for page in able if self.model.mapping[page] >= 0] or able
        if not able:
            return []
        pages = data.draw(st.lists(st.sampled_from(able), min_size=1, max_size=4), "stored to")
        for page in pages:
            content = numbered_page(page, self.page_bytes, generation=self._next_generation())
            if data.draw(st.integers(0, 7), "other bytes") == 0:
                content = self.model.touch(page)
            start, stop = 0, self.page_bytes
            if self.writes_back and data.draw(st.booleans(), "part"):
                start = data.draw(st.integers(0, stop - 1), "start")
                stop = data.draw(st.integers(start + 1, stop), "stop")
            self.write(page, content[start:stop], start)
            self.model.store_to(page, content[start:stop], start)
        return pages

    # Drawing and addressing.

    @property
    def writes_back(self) -> bool:
        """Whether what is stored to the window reaches the store later."""
        return self.writable and self.engine != "alias"

    def _free_file_pages(self, at: Sequence[int]) -> st.SearchStrategy[list[int]]:
        """Draw file pages for these window pages that are shown nowhere else."""
        shown = {shows for page, shows in enumerate(self.model.mapping) if page not in at}
        free = [page for page in range(self.store.page_count) if page not in shown]
        return st.permutations(free).map(lambda pages: pages[: len(at)])

    def _window_pages(self, data: st.DataObject) -> list[int]:
        drawn = data.draw(pages_of.page_lists(self.model.page_count), "pages")
        return list(drawn)

    def _protections(self) -> list[Prot]:
        return [Prot.NONE, Prot.READ] + ([Prot.WRITE] if self.writable else [])

    def _next_generation(self) -> int:
        self.generation += 1
        return self.generation

    def _bytes_of(self, page: int) -> slice:
        return slice(page * self.page_bytes, (page + 1) * self.page_bytes)

    def _kernel_may(self, probe: Callable[[memoryview, int], bool], page: int) -> bool:
        """Ask of the first and the last system page, which must agree."""
        part = self._bytes_of(page)
        with memoryview(self.window) as view:
            first, last = probe(view, part.start), probe(view, part.stop - 8)
        assert first == last, f"window page {page} can be used in part"
        return first


def _outcome(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except FremapError as error:
        return None, error


def _expect(error: type[Exception], call: Callable[[], object]) -> None:
    _, failure = _outcome(call)
    assert isinstance(failure, error), f"{failure!r}, not {error.__name__}"


def _repeats(mapping: Sequence[int]) -> set[int]:
    """File pages that are shown more than once."""
    return {page for page, times in Counter(mapping).items() if page >= 0 and times > 1}


def _without_repeats(mapping: Sequence[int]) -> list[int]:
    """Return the mapping with each file page where it is shown first, and only there."""
    return [
        NO_PAGE if file_page in mapping[:page] else file_page
        for page, file_page in enumerate(mapping)
    ]
