"""Arrays and memoryviews of a window, and what its end means for them."""

import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap import Prot, Window


@pytest.fixture
def store() -> Iterator[fremap.MemoryStore]:
    """Four pages: 0000, 1111, 2222, 3333."""
    with fremap.MemoryStore(4 * 4096, page_bytes=4096) as made:
        for page in range(4):
            made.write(page, bytes([page]) * 4096)
        yield made


def mapped(address: int) -> bool:
    """Whether an address is within a mapping of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_the_window_is_a_buffer(store: fremap.MemoryStore, engine: str) -> None:
    with Window(store, engine=engine, populate=True) as window, memoryview(window) as view:
        assert view.readonly
        assert (view.nbytes, view.format, view.ndim, view.c_contiguous) == (4 * 4096, "B", 1, True)
        assert view.obj is window
        assert bytes(view[4096:4098]) == b"\x01\x01"
        assert bytes(window) == store.read().tobytes()


def test_read_only_windows_export_read_only_memory(store: fremap.MemoryStore, engine: str) -> None:
    with Window(store, engine=engine) as window:
        assert not window.array(np.uint8).flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            window.pages[0, 0] = 1


def test_writable_windows_export_writable_memory(store: fremap.MemoryStore) -> None:
    with Window(store, prot=Prot.WRITE, coherent=True) as window:
        window.pages[2, :5] = 9
        with memoryview(window) as view:
            assert not view.readonly
            view[0] = 7
        assert store.read([0, 2])[:, 0].tolist() == [7, 9]


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        (np.uint8, None, (16384,)),
        ("<f8", None, (2048,)),
        (np.float32, (-1, 1024), (4, 1024)),
        (np.float32, -1, (4096,)),
        (np.int16, 10, (10,)),
        (np.int16, (2, 3), (2, 3)),
        (np.int16, np.array([2, 3]), (2, 3)),
        (np.int16, (2, -1, 3), (2, 1365, 3)),
        (np.int16, (0, 5), (0, 5)),
        (np.int16, (), ()),
        ("S7", None, (2340,)),
        ([("a", "u1"), ("b", "<u2")], None, (5461,)),
    ],
)
def test_array(
    store: fremap.MemoryStore, dtype: object, shape: object, expected: tuple[int, ...]
) -> None:
    with Window(store) as window:
        array = window.array(dtype, shape)
        assert array.shape == expected
        assert array.dtype == np.dtype(dtype)
        assert not array.flags.owndata


@pytest.mark.parametrize(
    ("dtype", "shape", "error"),
    [
        (object, None, fremap.ArgumentTypeError),
        ("V0", None, fremap.ArgumentTypeError),
        (np.uint8, 16385, fremap.ArgumentError),
        (np.uint8, (5, 4096), fremap.ArgumentError),
        (np.uint8, (-1, -1), fremap.ArgumentError),
        (np.uint8, (-2,), fremap.ArgumentError),
        (np.uint8, (-1, 0), fremap.ArgumentError),
        (np.uint8, (1,) * 65, fremap.ArgumentError),
        (np.uint8, 1.5, fremap.ArgumentTypeError),
        (np.uint8, (1.5,), fremap.ArgumentTypeError),
    ],
)
def test_impossible_arrays(
    store: fremap.MemoryStore, dtype: object, shape: object, error: type[Exception]
) -> None:
    with Window(store) as window, pytest.raises(error):
        window.array(dtype, shape)


def test_close_is_refused_while_views_live(store: fremap.MemoryStore, engine: str) -> None:
    window = Window(store, engine=engine, populate=True)
    array = window.array(np.uint8)
    piece = array[4096:].reshape(3, -1)
    del array
    with pytest.raises(fremap.ViewsAliveError, match="1 array") as raised:
        window.close()
    assert isinstance(raised.value, BufferError)
    # Nothing happened to it.
    assert not window.closed
    assert piece[0, 0] == 1
    window.remap([3], at=1)
    assert piece[0, 0] == 3
    del piece
    window.close()
    window.close()
    assert window.closed


def test_leaving_the_context_with_views_alive(store: fremap.MemoryStore, engine: str) -> None:
    with Window(store, engine=engine, populate=True) as window:
        view = window.array(np.uint8)
    assert window.closed
    address = view.ctypes.data
    # Still there, and still right, for as long as somebody looks.
    assert view[2 * 4096] == 2
    with pytest.raises(fremap.ClosedError):
        window.remap([1])
    with pytest.raises(fremap.ClosedError):
        memoryview(window)
    window.close()
    assert mapped(address)
    del view
    assert not mapped(address)


@pytest.mark.parametrize("engine", ["alias", "paged"], indirect=True)
def test_faults_are_served_after_leaving(store: fremap.MemoryStore, engine: str) -> None:
    with Window(store, engine=engine) as window:
        view = window.array(np.uint8)
    assert view[3 * 4096] == 3


def test_a_window_that_is_forgotten_goes_with_its_last_view(
    store: fremap.MemoryStore, engine: str
) -> None:
    window = Window(store, engine=engine, populate=True)
    gone = weakref.ref(window)
    view = window.pages
    address = view.ctypes.data
    del window
    gc.collect()
    assert gone() is not None  # the view keeps it
    assert view[1, 0] == 1
    del view
    gc.collect()
    assert gone() is None
    assert not mapped(address)


@pytest.mark.parametrize(
    "use",
    [
        lambda window: window.remap([0]),
        lambda window: window.populate(),
        lambda window: window.evict(0),
        lambda window: window.protect(0, Prot.READ),
        lambda window: window.place(0),
        lambda window: window.flush(),
        lambda window: window.mapping,
        lambda window: window.present(),
        lambda window: window.dirty(),
        lambda window: window.protection(),
        lambda window: window.stats(),
        lambda window: window.page_count,
        lambda window: window.vma_count,
        lambda window: window.engine,
        lambda window: window.pages,
        lambda window: window.array(np.uint8),
    ],
)
def test_closed(store: fremap.MemoryStore, use: object) -> None:
    window = Window(store)
    window.close()
    with pytest.raises(fremap.ClosedError, match=r": the window is closed$"):
        use(window)


def test_leaving_hides_no_exception_of_the_callers(store: fremap.MemoryStore) -> None:
    window = Window(store, prot=Prot.WRITE, coherent=True)
    view = window.pages
    with pytest.raises(ZeroDivisionError), window:
        _ = 1 / 0
    assert window.closed
    assert view[1, 0] == 1


def test_leaving_tells_of_a_failed_flush(store: fremap.MemoryStore) -> None:
    """Alone it is raised; beside the caller's own exception it is a note to that."""
    from fremap import _core

    window = Window(store, prot=Prot.WRITE, coherent=True)
    _core.inject_failure("fsync", 0, 5, 1)
    with pytest.raises(fremap.StoreError) as raised, window:
        pass
    assert raised.value.errno == 5
    assert window.closed
    store.refresh()
    window = Window(store, prot=Prot.WRITE, coherent=True)
    _core.inject_failure("fsync", 0, 5, 1)
    with pytest.raises(KeyError) as mine, window:
        raise KeyError("mine")
    assert "flushing" in mine.value.__notes__[0]
    assert window.closed


def test_subclasses_work(store: fremap.MemoryStore) -> None:
    class Tiles(Window):
        def __init__(self, store: fremap.Store, page_count: int) -> None:
            self.name = "tiles"

    with Tiles(store, 2) as window:
        assert (window.page_count, window.name) == (2, "tiles")


def test_closing_while_other_threads_call_and_look(store: fremap.MemoryStore, engine: str) -> None:
    """Each call and each view gets the window, or is told that it is closed."""
    surprises: list[BaseException] = []

    def use(window: Window, start: threading.Barrier) -> None:
        start.wait()
        try:
            for round_number in range(1000):
                window.remap([round_number % 4])
                assert window.array(np.uint8)[0] == round_number % 4
        except fremap.ClosedError:
            return
        except BaseException as error:
            surprises.append(error)

    for _ in range(10):
        window = Window(store, 1, engine=engine, populate=True)
        start = threading.Barrier(2)
        thread = threading.Thread(target=use, args=(window, start))
        thread.start()
        start.wait()
        while not window.closed:
            with contextlib.suppress(fremap.ViewsAliveError):
                window.close()
        thread.join()
    assert surprises == []


def test_leaving_while_other_threads_look(store: fremap.MemoryStore, engine: str) -> None:
    surprises: list[BaseException] = []

    def look(window: Window, start: threading.Barrier) -> None:
        start.wait()
        try:
            for _ in range(1000):
                assert window.array(np.uint8)[2 * 4096] == 2
        except fremap.ClosedError:
            return
        except BaseException as error:
            surprises.append(error)

    for _ in range(10):
        with Window(store, engine=engine, populate=True) as window:
            start = threading.Barrier(3)
            threads = [threading.Thread(target=look, args=(window, start)) for _ in range(2)]
            for thread in threads:
                thread.start()
            start.wait()
        for thread in threads:
            thread.join()
    assert surprises == []


COLLECTED = """
import fremap, gc

class Cycle:
    pass

store = fremap.MemoryStore(4 * 4096, page_bytes=4096)
for _ in range(30):
    gc.disable()
    with fremap.Window(store, engine="eager") as window:
        cycle = Cycle()
        cycle.me, cycle.view = cycle, memoryview(window)
        del cycle
    # The next object that the collector tracks makes it run, and the view goes.
    refused = []
    gc.set_threshold(1)
    gc.enable()
    for _ in range(50):
        try:
            memoryview(window)
        except fremap.ClosedError as error:
            refused.append(error)
    assert len(refused) == 50
"""


def test_a_refused_view_while_the_collector_frees_another() -> None:
    subprocess.run([sys.executable, "-c", COLLECTED], check=True, timeout=60)


IN_A_CHILD = """
import fremap, os, sys
store = fremap.MemoryStore(4 * 4096, page_bytes=4096)
window = fremap.Window(store, engine=sys.argv[1], populate=True)
child = os.fork()
if child == 0:
    try:
        window.remap([1])
    except fremap.ForkError as error:
        assert str(os.getppid()) in str(error)
        os._exit(0)
    os._exit(1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert window.remap([3, 2]).all()
assert window.mapping.tolist() == [3, 2, 2, 3]
"""


def test_a_child_is_told_that_the_window_is_its_parents(engine: str) -> None:
    subprocess.run([sys.executable, "-c", IN_A_CHILD, engine], check=True, timeout=60)


AT_EXIT = """
import fremap, sys, threading
store = fremap.MemoryStore(64 * 4096, page_bytes=4096)
window = fremap.Window(store, engine=sys.argv[1])
view = memoryview(window)
lazy = sys.argv[1] != "eager"
def look():
    while True:
        window.evict(None)
        if lazy:
            view[17 * 4096]
        window.remap(range(63, -1, -1))
threading.Thread(target=look, daemon=True).start()
window.remap(range(64))
"""


def test_the_interpreter_ends_with_windows_in_use(engine: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, engine],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
