"""The state machine finds what it is there to find.

It is run beside a window made of the model itself, where it must find nothing,
and beside such windows with one fault each, where it must find the fault.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fremap import Prot
from fremap.errors import ArgumentTypeError, ClosedError, PlacedPageError
from fremap.testing import NO_PAGE, PLACED, ModelStore, ModelWindow
from fremap.testing.machine import WindowMachine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.once
ENGINES = ("alias", "paged", "eager")


class FakeStore:
    """A store in plain Python; every third page is not resident."""

    def __init__(self, content: bytes, page_bytes: int) -> None:
        self.model = ModelStore(content, page_bytes)
        self.page_count, self.size = self.model.page_count, self.model.size

    def resident(self) -> np.ndarray:
        return np.arange(self.page_count) % 3 != 0

    def read(self, pages: list[int] | None) -> np.ndarray:
        chosen = numbers(pages, self.page_count)
        content = self.model.read(chosen)
        return np.frombuffer(content, np.uint8).reshape(len(chosen), self.model.page_bytes)

    def write(self, pages: list[int], data: np.ndarray) -> None:
        self.model.write(pages, data.tobytes())

    def close(self) -> None:
        pass


def numbers(pages: Any, limit: int) -> list[int]:
    if pages is None or isinstance(pages, slice):
        return list(range(limit))[pages or slice(None)]
    if isinstance(pages, int | np.integer):
        pages = [pages]
    if np.asarray(pages).dtype.kind not in "iu" and len(pages):
        raise ArgumentTypeError("not integers")
    return [int(page) + limit if -limit <= page < 0 else int(page) for page in pages]


class FakeWindow:
    """A window made of the model; the machine must find nothing wrong with it."""

    model_class: type[ModelWindow] = ModelWindow

    def __init__(self, store: FakeStore, **options: Any) -> None:
        mapping = options["mapping"]
        if isinstance(mapping, str):
            first, count = options.get("first_page", 0), options["page_count"]
            linear = range(first, first + count)
            mapping = linear if mapping == "linear" else [NO_PAGE] * count
        self.store, self.engine = store, options["engine"]
        self.page_bytes, self.vma_count, self.closed, self.views = (
            store.model.page_bytes,
            1,
            False,
            0,
        )
        self.model = self.model_class(
            store.model,
            [int(page) for page in mapping],
            self.engine,
            prot=options["prot"],
            coherent=options.get("coherent"),
            tracking=options.get("tracking", "async"),
            populate=options["populate"],
            nonblock=options["nonblock"],
            resident=self.resident(),
        )
        self.page_count = self.model.page_count

    def resident(self) -> set[int]:
        return set(np.flatnonzero(self.store.resident()).tolist())

    def check(self) -> None:
        if self.closed:
            raise ClosedError("closed")

    @property
    def mapping(self) -> np.ndarray:
        return np.array(self.model.mapping)

    def protection(self) -> np.ndarray:
        return np.array(self.model.protection)

    def present(self) -> np.ndarray:
        self.check()
        return self.mask(list(range(self.page_count)))

    def dirty(self) -> np.ndarray:
        """What may be dirty is."""
        for page in range(self.page_count):
            self.model.settle_dirty(page, dirty=True)
        return np.array(self.model.dirty)

    def mask(self, pages: list[int]) -> np.ndarray:
        """What may be present is."""
        for page in range(self.page_count):
            self.model.settle(page, present=True)
        return np.array([self.model.present[page] is not False for page in pages], dtype=bool)

    def remap(self, file_pages: Any, at: Any = 0, **options: Any) -> np.ndarray:
        self.check()
        shown = numbers(file_pages, self.store.page_count)
        where = [*range(at, at + len(shown))] if isinstance(at, int) else numbers(at, 0)
        self.model.remap(shown, where, **options, resident=self.resident())
        return self.mask(where)

    def populate(self, pages: Any = None, *, nonblock: bool = False) -> np.ndarray:
        self.check()
        chosen = numbers(pages, self.page_count)
        self.model.populate(chosen, nonblock=nonblock, resident=self.resident())
        return self.mask(chosen)

    def evict(self, pages: Any, *, discard: bool = False) -> None:
        self.model.evict(numbers(pages, self.page_count), discard=discard)

    def protect(self, pages: Any, prot: Prot) -> None:
        self.model.protect(numbers(pages, self.page_count), prot)

    def place(self, pages: list[int], data: Any) -> None:
        self.model.place(pages, None if data is None else bytes(data))

    def flush(self, pages: Any = None) -> None:
        self.check()
        self.model.flush(numbers(pages, self.page_count))

    def close(self, *, discard: bool = False) -> None:
        if not self.closed:
            self.model.close(discard=discard)
        self.closed = True


class FakeMachine(WindowMachine):
    """The machine beside a window made of the model."""

    window_class: type[FakeWindow] = FakeWindow

    def open_store(self, content: bytes, page_bytes: int) -> FakeStore:
        return FakeStore(content, page_bytes)

    def open_window(self, **options: Any) -> FakeWindow:
        return self.window_class(self.store, **options)

    def close_under_a_view(self) -> None:
        """Plain Python has no views."""

    def touch(self, page: int) -> bytes:
        return self.window.model.touch(page)

    def store_bytes(self) -> int:
        return len(self.store.model.content())

    def write(self, page: int, data: bytes, first: int = 0) -> None:
        self.window.model.store_to(page, data, first)

    def kernel_may_read(self, page: int) -> bool:
        return self.window.model.readable(page) is not False

    def kernel_may_write(self, page: int) -> bool:
        return self.window.model.writable(page) is not False


def fake_machine(
    engine: str, model: type[ModelWindow], writable: bool = False, tracking: str = "async"
) -> type[FakeMachine]:
    window = type("Window", (FakeWindow,), {"model_class": model})
    attributes = {
        "engine": engine,
        "window_class": window,
        "writable": writable,
        "tracking": tracking,
    }
    return type("Machine", (FakeMachine,), attributes)


def passes(machine: type[FakeMachine]) -> None:
    examples = max(1, settings.default.max_examples // 2)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples))


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_right_window_passes(engine: str, writable: bool) -> None:
    passes(fake_machine(engine, ModelWindow, writable))


def test_a_right_window_with_synchronous_tracking_passes() -> None:
    passes(fake_machine("paged", ModelWindow, True, "sync"))


class EvictedComesBackLinear(ModelWindow):
    """O10: the page that comes back is that of a linear mapping."""

    def evict(self, pages: Sequence[int], *, discard: bool = False) -> None:
        super().evict(pages, discard=discard)
        for page in pages:
            super().remap([page % self.store.page_count], [page], populate=False)


class SkippedShowsTheOldPage(ModelWindow):
    """O9: a page that a nonblocking remap skipped shows what was there."""

    def remap(self, file_pages: Sequence[int], at: Sequence[int], **options: Any) -> Any:
        shown = [self.content(page) for page in range(self.page_count)]
        mask = super().remap(file_pages, at, **options)
        for page in at:
            now = self._pages[page]
            if shown[page] is not None and now.present is False:
                self._pages[page] = type(now)(now.shows, now.prot, False, shown[page])
        return mask


class PopulateForgetsProtection(ModelWindow):
    """A populated page may be read, whatever its protection was."""

    def populate(self, pages: Sequence[int], **options: Any) -> Any:
        mask = super().populate(pages, **options)
        self.protect([page for page in pages if self._pages[page].prot == Prot.NONE], Prot.READ)
        return mask


class PlacedIsLost(ModelWindow):
    """A placed page is dropped without having been told so."""

    def evict(self, pages: Sequence[int], *, discard: bool = False) -> None:
        try:
            super().evict(pages, discard=discard)
        except PlacedPageError:
            super().evict(pages, discard=True)


class KeepForgets(ModelWindow):
    """`place(data=None)` gives zeros in place of what was shown."""

    def place(self, pages: Sequence[int], data: bytes | None = None) -> None:
        super().place(pages, bytes(self.store.page_bytes) if data is None else data)


class NonblockReadsAll(ModelWindow):
    """`nonblock` loads what is not resident."""

    def populate(self, pages: Sequence[int], **options: Any) -> Any:
        return super().populate(pages, **(options | {"resident": None}))


class RepeatsAreDropped(ModelWindow):
    """A file page is shown where it is asked for first, and only there."""

    def remap(self, file_pages: Sequence[int], at: Sequence[int], **options: Any) -> Any:
        once = dict(zip(reversed(file_pages), reversed(at), strict=False))
        wrong = super().remap(file_pages, at, **options)
        for file_page, page in zip(file_pages, at, strict=True):
            if once[file_page] != page:
                super().remap([(file_page + 1) % self.store.page_count], [page], discard=True)
        return wrong


class NeighbourIsProtected(ModelWindow):
    """Protection reaches one page too far."""

    def protect(self, pages: Sequence[int], prot: Prot) -> None:
        super().protect(pages, prot)
        super().protect([page + 1 for page in pages if page + 1 < self.page_count], prot)


class DiscardedStaysPlaced(ModelWindow):
    """A placed page that was discarded still counts as placed."""

    def evict(self, pages: Sequence[int], *, discard: bool = False) -> None:
        placed = [page for page, shows in enumerate(self.mapping) if shows == PLACED]
        super().evict(pages, discard=discard)
        super().place([page for page in placed if page in pages], bytes(self.store.page_bytes))


FAULTS = [
    EvictedComesBackLinear,
    SkippedShowsTheOldPage,
    PopulateForgetsProtection,
    PlacedIsLost,
    KeepForgets,
    NonblockReadsAll,
    RepeatsAreDropped,
    NeighbourIsProtected,
    DiscardedStaysPlaced,
]

HUNT = settings(
    max_examples=300,
    stateful_step_count=20,
    phases=[Phase.generate],
    database=None,
    deadline=None,
    derandomize=True,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(fault: type[ModelWindow]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(fake_machine("paged", fault), settings=HUNT)


def forget(window: ModelWindow, pages: Sequence[int]) -> None:
    """Take dirty pages for clean."""
    for page in pages:
        if page < window.page_count:
            window._pages[page] = replace(window._pages[page], dirty=False)


class FlushWritesAll(ModelWindow):
    """`flush` of some pages writes the others too."""

    def flush(self, pages: Sequence[int] | None = None) -> None:
        super().flush(None if pages else [])


class StoresAreWrittenAtOnce(ModelWindow):
    """What is stored reaches the store at once."""

    def store_to(self, page: int, data: bytes, first: int = 0) -> None:
        super().store_to(page, data, first)
        if self.mapping[page] != PLACED:
            self.store.write([self.mapping[page]], self.content(page))


class PopulateWrites(ModelWindow):
    """Pages are written at a time when they must not be."""

    def populate(self, pages: Sequence[int], **options: Any) -> Any:
        self._write_back([page for page in pages if page < self.page_count])
        return super().populate(pages, **options)


class OneIsForgotten(ModelWindow):
    """Of the pages that are written in one go, the last one is not."""

    def _write_back(self, pages: Sequence[int]) -> None:
        dirty = [page for page in pages if self.dirty[page]]
        super()._write_back(dirty[:-1] if len(dirty) > 1 else pages)
        forget(self, dirty)


class EvictedIsLost(ModelWindow):
    """An evicted page is not written."""

    def evict(self, pages: Sequence[int], *, discard: bool = False) -> None:
        forget(self, pages)
        super().evict(pages, discard=discard)


class PlacedOverIsLost(ModelWindow):
    """A page that another is placed over is not written."""

    def place(self, pages: Sequence[int], data: bytes | None = None) -> None:
        forget(self, pages)
        super().place(pages, data)


class RemappedOneByOne(ModelWindow):
    """A page is loaded before one that it changes places with is written."""

    def remap(self, file_pages: Sequence[int], at: Sequence[int], **options: Any) -> Any:
        old = dict(enumerate(self._pages))
        held = self.store.pages()
        mask = super().remap(file_pages, at, **options)
        for page in at:
            now = self._pages[page]
            if now is not old[page] and now.present and now.shows >= 0:
                self._pages[page] = replace(now, copy=held[now.shows])
        return mask


class DirtyStaysDirty(ModelWindow):
    """A page that was written is told to be dirty."""

    @property
    def dirty(self) -> Any:
        return [page.dirty or page.clean is not None for page in self._pages]

    def _write_back(self, pages: Sequence[int]) -> None:
        old = {page: self._pages[page] for page in pages}
        super()._write_back(pages)
        for page in pages:
            self._pages[page] = replace(self._pages[page], clean=old[page].clean)


class AnyPageTwice(ModelWindow):
    """A page may be shown twice and written."""

    def _check_alias(self, operation: str, after: Sequence[Any]) -> None:
        pass


class DiscardIsIgnored(ModelWindow):
    """Changes that are given up are written."""

    def close(self, *, discard: bool = False) -> None:
        super().close()


class NothingIsWrittenAtTheEnd(ModelWindow):
    """`close` gives changes up."""

    def close(self, *, discard: bool = False) -> None:
        super().close(discard=True)


class PlacedIsWritten(ModelWindow):
    """Content that was placed over a page reaches its file page."""

    def place(self, pages: Sequence[int], data: bytes | None = None) -> None:
        shown = self.mapping
        super().place(pages, data)
        for page in pages:
            if shown[page] >= 0:
                self.store.write([shown[page]], self.content(page))


class StoredBytesAreLost(ModelWindow):
    """A store of a part of a page is rounded down to whole words."""

    def store_to(self, page: int, data: bytes, first: int = 0) -> None:
        super().store_to(page, data[: len(data) // 8 * 8], first)


WRITING_FAULTS = [
    FlushWritesAll,
    StoresAreWrittenAtOnce,
    PopulateWrites,
    OneIsForgotten,
    EvictedIsLost,
    PlacedOverIsLost,
    RemappedOneByOne,
    DirtyStaysDirty,
    AnyPageTwice,
    DiscardIsIgnored,
    NothingIsWrittenAtTheEnd,
    PlacedIsWritten,
    StoredBytesAreLost,
]


@pytest.mark.parametrize("fault", WRITING_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_writing_is_found(fault: type[ModelWindow]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(fake_machine("eager", fault, True), settings=HUNT)
