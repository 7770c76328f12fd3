"""Windows as Python sees them: making them, changing them, seeing them. On every engine."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap import Prot, Window

Numbered = Callable[..., np.ndarray]
MakeFile = Callable[..., Path]

FILE_PAGES = 64


@pytest.fixture
def store(numbered_file: MakeFile) -> Iterator[fremap.Store]:
    """64 numbered pages, writable."""
    with fremap.open(numbered_file(FILE_PAGES), "r+", page_bytes=4096) as opened:
        yield opened


def expect(window: Window, numbered_pages: Numbered, mapping: list[int]) -> None:
    """Check that the window says and shows this mapping."""
    assert window.mapping.tolist() == mapping
    np.testing.assert_array_equal(window.pages, numbered_pages(mapping))


def test_properties(store: fremap.Store, engine: str) -> None:
    with Window(store, 16, engine=engine) as window:
        assert window.page_count == 16
        assert window.page_bytes == 4096
        assert window.engine == engine
        assert window.store is store
        assert window.coherent is (engine == "alias")
        assert not window.writable
        assert not window.locked
        assert not window.closed
        assert window.vma_count == 1
        text = repr(window)
        assert text.startswith(f"<fremap.Window, 16 pages of 4096 bytes, engine {engine!r}, of ")
    assert window.closed
    assert repr(window) == "<fremap.Window, closed>"


def test_initial_mappings(store: fremap.Store, engine: str, numbered_pages: Numbered) -> None:
    with Window(store, engine=engine, populate=True) as window:
        expect(window, numbered_pages, list(range(FILE_PAGES)))
    with Window(store, 3, first_page=60, engine=engine, populate=True) as window:
        expect(window, numbered_pages, [60, 61, 62])
    with Window(store, first_page=60, engine=engine, populate=True) as window:
        expect(window, numbered_pages, [60, 61, 62, 63])
    for chosen in ([5, 5, 9], (5, 5, 9), np.array([5, 5, 9], dtype=np.uint16)):
        with Window(store, mapping=chosen, engine=engine, populate=True) as window:
            expect(window, numbered_pages, [5, 5, 9])
    with Window(store, 2, mapping="none", engine=engine) as window:
        assert window.mapping.tolist() == [-1, -1]
        assert not window.present().any()
    with Window(store, mapping=[7, -1], engine=engine, populate=True) as window:
        assert window.mapping.tolist() == [7, -1]
        np.testing.assert_array_equal(window.pages[:1], numbered_pages([7]))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"page_count": 0}, fremap.ArgumentError),
        ({"page_count": -1}, fremap.ArgumentError),
        ({"page_count": 65}, fremap.ArgumentError),
        ({"page_count": 1, "first_page": 64}, fremap.ArgumentError),
        ({"first_page": 64}, fremap.ArgumentError),
        ({"first_page": 65}, fremap.ArgumentError),
        ({"first_page": -1}, fremap.ArgumentError),
        ({"page_count": 1 << 62}, fremap.ArgumentError),
        ({"page_count": 1 << 80}, fremap.ArgumentError),
        ({"page_count": 1 << 61, "mapping": "none"}, fremap.ArgumentError),
        ({"page_count": 2, "mapping": [1]}, fremap.ArgumentError),
        ({"mapping": []}, fremap.ArgumentError),
        ({"mapping": "random"}, fremap.ArgumentError),
        ({"mapping": [64]}, fremap.PageRangeError),
        ({"mapping": [-2]}, fremap.PageRangeError),
        ({"mapping": [1 << 70]}, fremap.PageRangeError),
        ({"mapping": [1.5]}, fremap.ArgumentTypeError),
        ({"page_count": True}, fremap.ArgumentTypeError),
        ({"page_count": 1.0}, fremap.ArgumentTypeError),
        ({"prot": Prot.NONE}, fremap.ArgumentError),
        ({"prot": 4}, fremap.ArgumentError),
        ({"prot": "r"}, fremap.ArgumentTypeError),
        ({"prot": True}, fremap.ArgumentTypeError),
        ({"prot": Prot.WRITE}, fremap.ArgumentError),
        ({"engine": "best"}, fremap.ArgumentError),
    ],
)
def test_impossible_windows(
    store: fremap.Store, arguments: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"^Window|^prot"):
        Window(store, **arguments)


WRITE = {"prot": Prot.WRITE, "coherent": False}


@pytest.mark.parametrize(
    ("arguments", "one", "other"),
    [
        ({"engine": "alias", "coherent": False}, 'engine="alias"', "coherent=False"),
        ({"engine": "paged", "coherent": True}, 'engine="paged"', "coherent=True"),
        ({"engine": "eager", "coherent": True}, 'engine="eager"', "coherent=True"),
        ({"engine": "alias", "fault": "signal"}, 'engine="alias"', 'fault="signal"'),
        ({"engine": "eager", "fault": "signal"}, 'engine="eager"', 'fault="signal"'),
        ({"coherent": True, "fault": "signal"}, "coherent=True", 'fault="signal"'),
        ({**WRITE, "engine": "eager", "tracking": "sync"}, 'engine="eager"', 'tracking="sync"'),
        (
            {"prot": Prot.WRITE, "coherent": True, "tracking": "async"},
            "coherent=True",
            'tracking="async"',
        ),
        ({"tracking": "sync"}, 'tracking="sync"', "prot=Prot.READ"),
        ({"engine": "paged", "advice": "random"}, 'engine="paged"', 'advice="random"'),
        ({"engine": "eager", "advice": "normal"}, 'engine="eager"', 'advice="normal"'),
        ({"coherent": False, "advice": "random"}, "coherent=False", 'advice="random"'),
        ({"fault": "signal", "advice": "sequential"}, 'fault="signal"', 'advice="sequential"'),
        ({"fault": "signal", "budget": 1 << 40}, 'fault="signal"', f"budget={1 << 40}"),
        ({"lock": True, "budget": 1 << 40}, "lock=True", f"budget={1 << 40}"),
        ({"lock": True, "nonblock": True}, "lock=True", "nonblock=True"),
        ({"nonblock": True}, "nonblock=True", "populate=False"),
        ({"mapping": "none", "page_count": 1, "first_page": 3}, "first_page=3", 'mapping="none"'),
        ({"mapping": [1, 2], "first_page": 1}, "first_page=1", "a mapping of file pages"),
    ],
)
def test_options_that_contradict_each_other(
    store: fremap.Store, arguments: dict[str, object], one: str, other: str
) -> None:
    """One error names both, whatever this kernel can do, and what to do about it."""
    text = f"^Window: {re.escape(one)} and {re.escape(other)} contradict each other: .*; .+"
    with pytest.raises(fremap.ArgumentError, match=text):
        Window(store, **arguments)


def test_the_engine_is_chosen_by_all_that_is_asked(store: fremap.Store) -> None:
    with Window(store, advice="random") as window:
        assert (window.engine, window.advice) == ("alias", "random")
    with Window(store, coherent=True) as window:
        assert window.engine == "alias"
    with Window(store, coherent=False) as window:
        assert window.engine in ("paged", "eager")


@pytest.mark.needs("paged")
def test_options_of_engine_paged_choose_it(store: fremap.Store) -> None:
    with Window(store, fault="signal") as window:
        assert (window.engine, window.fault) == ("paged", "signal")


def test_a_path_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(fremap.ArgumentTypeError, match=r"fremap\.open"):
        Window(tmp_path)


def test_remap_forms(store: fremap.Store, engine: str, numbered_pages: Numbered) -> None:
    with Window(store, 8, engine=engine, populate=True) as window:
        assert window.remap([7, 3, 60]).tolist() == [True] * 3
        expect(window, numbered_pages, [7, 3, 60, 3, 4, 5, 6, 7])
        assert window.remap(range(20, 22), at=6).all()
        expect(window, numbered_pages, [7, 3, 60, 3, 4, 5, 20, 21])
        window.remap([1, 2, 3], at=[5, 0, 4])
        expect(window, numbered_pages, [2, 3, 60, 3, 3, 1, 20, 21])
        window.remap(40, at=np.int32(7))
        window.remap(slice(50, 52), at=range(1, 3))
        window.remap(slice(9, 7, -1), at=slice(3, 5))
        expect(window, numbered_pages, [2, 50, 51, 9, 8, 1, 20, 40])
        window.remap(range(63, -1, -8), at=slice(None))
        expect(window, numbered_pages, list(range(63, -1, -8)))
        assert window.remap([]).shape == (0,)
        expect(window, numbered_pages, list(range(63, -1, -8)))


@pytest.mark.parametrize(
    ("file_pages", "at", "error"),
    [
        ([1, 2], [0], fremap.ArgumentError),
        ([1], [0, 1], fremap.ArgumentError),
        (range(3), range(2), fremap.ArgumentError),
        ([1, 2], [3, 3], fremap.ArgumentError),
        ([64], 0, fremap.PageRangeError),
        ([0, -65], 0, fremap.PageRangeError),
        ([1], 8, fremap.PageRangeError),
        ([1, 2], 7, fremap.PageRangeError),
        ([1], -9, fremap.PageRangeError),
        ([1, 2], -1, fremap.PageRangeError),
        ([1, 2], [0, -9], fremap.PageRangeError),
        ([1, 2], [7, -1], fremap.ArgumentError),
        ([1], 1 << 70, fremap.PageRangeError),
        (None, 0, fremap.PageRangeError),
        ([1], None, fremap.ArgumentTypeError),
        ([1], True, fremap.ArgumentTypeError),
        ([1], 0.0, fremap.ArgumentTypeError),
        ([True], 0, fremap.ArgumentTypeError),
        ([1.0], 0, fremap.ArgumentTypeError),
        (3.0, 0, fremap.ArgumentTypeError),
    ],
)
def test_impossible_remaps_change_nothing(
    store: fremap.Store, engine: str, file_pages: object, at: object, error: type[Exception]
) -> None:
    with Window(store, 8, engine=engine) as window:
        with pytest.raises(error, match=r"^remap"):
            window.remap(file_pages, at)
        assert window.mapping.tolist() == list(range(8))


def test_populate_and_evict(store: fremap.Store, engine: str, numbered_pages: Numbered) -> None:
    with Window(store, 8, engine=engine) as window:
        assert not window.present().any()
        assert window.populate([1, 6]).tolist() == [True, True]
        present = np.flatnonzero(window.present()).tolist()
        # The kernel maps neighbours in the page cache along with a page of a file.
        assert present == [1, 6] or (engine == "alias" and {1, 6} <= set(present))
        assert window.populate().all()
        window.evict(slice(2, 5))
        assert np.flatnonzero(~window.present()).tolist() == [2, 3, 4]
        assert window.populate(range(2, 5)).all()
        expect(window, numbered_pages, list(range(8)))
        with pytest.raises(fremap.PageRangeError, match=r"^evict: window page 8"):
            window.evict([3, 8])
        with pytest.raises(fremap.PageRangeError, match=r"^populate: window page -9"):
            window.populate(-9)


@pytest.mark.parametrize("engine", ["alias", "paged"], indirect=True)
def test_lazy_touch(store: fremap.Store, engine: str, numbered_pages: Numbered) -> None:
    with Window(store, 8, engine=engine) as window:
        window.remap([40, 30, 20], at=2, populate=False)
        np.testing.assert_array_equal(window.pages[3], numbered_pages([30])[0])
        expect(window, numbered_pages, [0, 1, 40, 30, 20, 5, 6, 7])


def test_place(store: fremap.Store, engine: str, numbered_pages: Numbered) -> None:
    with Window(store, 6, engine=engine, populate=True) as window:
        window.place(1, b"p" * 4096)
        window.place([3, 4], numbered_pages([200, 201]).view("<u8"))
        window.place(5)
        assert window.mapping.tolist() == [0, -2, 2, -2, -2, -2]
        assert bytes(window.pages[1]) == b"p" * 4096
        np.testing.assert_array_equal(window.pages[3:], numbered_pages([200, 201, 5]))
        for lose in (lambda: window.remap([9], at=4), lambda: window.evict([0, 4])):
            with pytest.raises(fremap.PlacedPageError, match=r"window page 4 .* discard=True"):
                lose()
        assert window.stats().placed_pages == 4
        window.remap([9], at=4, discard=True)
        window.evict([1], discard=True)
        assert window.mapping.tolist()[2:5] == [2, -2, 9]
        with pytest.raises(fremap.ArgumentError, match=r"^place: data has 5 bytes"):
            window.place(0, b"short")


def test_protect(store: fremap.Store, engine: str, numbered_pages: Numbered) -> None:
    with Window(store, 6, engine=engine, populate=True) as window:
        window.protect([1, 3], Prot.NONE)
        assert window.protection().tolist() == [1, 0, 1, 0, 1, 1]
        assert window.stats().denied_pages == 2
        window.protect(None, Prot.READ)
        assert window.protection().tolist() == [1] * 6
        window.populate()
        expect(window, numbered_pages, list(range(6)))
        with pytest.raises(fremap.FremapError, match=r"^protect"):
            window.protect(0, Prot.WRITE)
        with pytest.raises(fremap.ArgumentTypeError):
            window.protect(0, 1.0)


def test_a_coherent_writable_window(store: fremap.Store, numbered_pages: Numbered) -> None:
    with Window(store, 4, prot=Prot.WRITE, coherent=True) as window:
        assert window.writable
        assert window.coherent
        window.remap([9, 8], at=1)
        words = window.array("<u8", (4, 512))
        words[1] = numbered_pages([500]).view("<u8")
        # Coherent: the store has it at once.
        np.testing.assert_array_equal(store.read(9), numbered_pages([500]))
        window.flush([1])
        window.flush()
        del words


def test_writing_needs_a_writable_store(numbered_file: MakeFile) -> None:
    with (
        fremap.open(numbered_file(1)) as store,
        pytest.raises(PermissionError, match=r'"r\+"') as raised,
    ):
        Window(store, prot=Prot.WRITE, coherent=True)
    assert isinstance(raised.value, fremap.StoreError)
    assert raised.value.filename == store.path


def test_the_window_outlives_its_store(
    numbered_file: MakeFile, engine: str, numbered_pages: Numbered
) -> None:
    store = fremap.open(numbered_file(8), page_bytes=4096)
    window = Window(store, engine=engine, populate=True)
    store.close()
    with window:
        window.remap([7, 6, 5])
        expect(window, numbered_pages, [7, 6, 5, 3, 4, 5, 6, 7])
    with pytest.raises(fremap.ClosedError, match=r"^Window: the store is closed"):
        Window(store)


def test_larger_pages(numbered_file: MakeFile, engine: str, numbered_pages: Numbered) -> None:
    with (
        fremap.open(numbered_file(6, 65536), page_bytes=65536) as store,
        Window(store, 4, engine=engine, populate=True) as window,
    ):
        window.remap([5, 0], at=[0, 3])
        assert window.mapping.tolist() == [5, 1, 2, 0]
        np.testing.assert_array_equal(window.pages, numbered_pages([5, 1, 2, 0], 65536))


def test_ids_and_data_may_lie_in_the_window(store: fremap.Store) -> None:
    """What a call is given is copied before the window changes under it."""
    with fremap.MemoryStore(64 * 4096, page_bytes=4096) as memory:
        ids = np.arange(512)[::-1] % 64
        memory.write(0, ids)
        with Window(memory, 512, mapping="none") as window:
            window.remap([0])
            own = window.array(np.int64)[:512]
            window.remap(own)
            del own
            assert window.mapping.tolist() == ids.tolist()
            window.remap([0], at=3)
            window.place([2, 5], window.pages[3])
            assert window.array(np.int64, (-1, 512))[5].tolist() == ids.tolist()


def test_a_truncated_file_is_an_exception(
    numbered_file: MakeFile, numbered_pages: Numbered
) -> None:
    path = numbered_file(16)
    for engine in ("paged", "eager"):
        if not fremap.capabilities().engines[engine].available:
            continue
        with (
            fremap.open(path, page_bytes=4096) as store,
            Window(store, 4, engine=engine, populate=True) as window,
        ):
            with path.open("r+b") as file:
                file.truncate(8 * 4096)
            with pytest.raises(fremap.TruncatedError) as raised:
                window.remap([4, 12, 5])
            done = raised.value.completed
            assert done <= 1
            assert window.mapping.tolist() == [4, 12, 5, 3][:done] + list(range(4))[done:]
            np.testing.assert_array_equal(window.pages, numbered_pages(window.mapping))
        path = numbered_file(16)


def test_stats_are_frozen(store: fremap.Store, engine: str) -> None:
    with Window(store, 8, engine=engine) as window:
        window.remap([1, 2])
        stats = window.stats()
        assert stats.pages_loaded == 2
        with pytest.raises(AttributeError):
            stats.pages_loaded = 0


def test_dirty(store: fremap.Store, engine: str) -> None:
    with Window(store, 8, engine=engine) as window:
        assert window.dirty().tolist() == [False] * 8


def test_many_threads(store: fremap.Store, engine: str, numbered_pages: Numbered) -> None:
    """Calls from many threads, each on its own part of the window."""
    failures: list[BaseException] = []
    with Window(store, 32, engine=engine, populate=True) as window:

        def work(first: int) -> None:
            try:
                random = np.random.default_rng(first)
                for _ in range(30):
                    order = random.integers(0, FILE_PAGES, 8)
                    window.remap(order, at=first)
                    window.evict([first, first + 7])
                    window.populate(range(first, first + 8))
                    part = window.pages[first : first + 8]
                    np.testing.assert_array_equal(part, numbered_pages(order))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(first,)) for first in (0, 8, 16, 24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_lock(store: fremap.Store, engine: str) -> None:
    with Window(store, 4, engine=engine, lock=True) as window:
        assert window.locked
        assert window.present().all()
        with pytest.raises(fremap.UnsupportedError, match="lock"):
            window.evict(0)
