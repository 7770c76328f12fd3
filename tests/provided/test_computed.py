"""Stores whose pages a function computes: what windows, slots and calls show of them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fremap
import numpy as np
import pytest
from fills import Broken, Gated, Meets, Noted, Wrong, first_words, half
from fremap.testing.pages import fill_numbered, numbered_words

PAGES = 4096
ENGINES = ("paged", "eager")
Gone = Callable[[list[int]], None]

# Requests and pages pass through pipes and shared memory, which no user and no container lacks.
reads_alone = pytest.mark.once
computed_engine = pytest.mark.parametrize("engine", ENGINES, indirect=True)


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    return Noted(tmp_path / "notes")


def wrong(tmp_path: Path, what: str, page: int, times: int = 1 << 30) -> Wrong:
    return Wrong(tmp_path / "notes", what, page, times)


def computed(fill: object = fill_numbered, **options: object) -> fremap.ComputedStore:
    return fremap.ComputedStore(PAGES, fill, page_bytes=4096, **options)  # type: ignore[arg-type]


def words(pages: object) -> np.ndarray:
    return numbered_words(pages).view(np.uint8)  # type: ignore[arg-type]


# What is read.


@reads_alone
@pytest.mark.parametrize("in_process", [False, True])
@pytest.mark.parametrize(
    "pages", [[7, 3, 7, 4095, 0], range(9, 2, -3), slice(0, 100), 5, -1, [-1, 2], [], None]
)
def test_pages_come_in_the_order_asked_for(pages: object, in_process: bool) -> None:
    with computed(in_process=in_process) as store:
        expected = words(np.atleast_1d(np.arange(PAGES)[slice(None) if pages is None else pages]))
        np.testing.assert_array_equal(store.read(pages), expected)
        out = np.full((len(expected), 4096), 7, np.uint8)
        assert store.read(pages, out) is not None
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("in_process", [False, True])
def test_what_is_not_written_is_zeros(in_process: bool) -> None:
    with computed(half, in_process=in_process) as store:
        for pages in ([200, 100], [5, 6]):
            read = store.read(pages, np.full((2, 4096), 9, np.uint8))
            assert not read[:, 2048:].any()
            assert (read[:, :2048] == np.array(pages)[:, None]).all()


@reads_alone
@pytest.mark.parametrize("in_process", [False, True])
def test_a_function_is_given_rising_pages_once(noted: Noted, in_process: bool) -> None:
    with computed(noted, in_process=in_process) as store:
        store.read([9, 3, 9, 4, 3])
        assert noted.calls == [[3, 4, 9]]


@pytest.mark.parametrize("in_process", [False, True])
def test_pages_outside_are_refused(in_process: bool) -> None:
    with (
        computed(in_process=in_process) as store,
        pytest.raises(fremap.PageRangeError, match="4096 is outside"),
    ):
        store.read([0, PAGES])


@reads_alone
def test_large_reads_are_many_batches(noted: Noted) -> None:
    with computed(noted) as store:
        np.testing.assert_array_equal(store.read(), words(range(PAGES)))
        assert noted.pages == list(range(PAGES))
        assert max(map(len, noted.calls)) == 1024


def test_large_pages() -> None:
    with fremap.ComputedStore(3, half, page_bytes=1 << 23) as store:
        assert store.read([2])[0, :: 1 << 20].tolist() == [2] * 4 + [0] * 4


@reads_alone
def test_workers_are_at_work_together(tmp_path: Path) -> None:
    with computed(Meets(tmp_path / "notes"), workers=2) as store:
        np.testing.assert_array_equal(store.read([5, 6]), words([5, 6]))
        assert len(store.processes) == 2


def test_threads_share_the_processes(noted: Noted) -> None:
    failures: list[BaseException] = []
    with computed(noted, workers=2) as store, fremap.Window(store, engine="eager") as window:

        def read(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(20):
                    pages = rng.integers(0, PAGES, 10)
                    np.testing.assert_array_equal(store.read(pages), words(pages))
                    window.remap(pages[:1], at=seed)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(set(noted.processes)) <= 2


# What windows and slots show.


@computed_engine
def test_a_window_shows_computed_pages(engine: str) -> None:
    with (
        computed() as store,
        fremap.Window(store, engine=engine, mapping="none", page_count=64) as w,
    ):
        pages = np.random.default_rng(0).permutation(PAGES)[:64]
        assert w.remap(pages).all()
        np.testing.assert_array_equal(w.pages, words(pages))
        w.remap([1, 2], at=[5, 9], in_place=True)
        np.testing.assert_array_equal(w.pages[[5, 9]], words([1, 2]))
        assert not w.coherent
        assert w.engine == engine


@pytest.mark.needs("paged")
def test_touches_bring_pages(noted: Noted) -> None:
    with computed(noted) as store, fremap.Window(store, engine="paged") as window:
        assert not noted.calls
        assert window.pages[7].tobytes() == words([7]).tobytes()
        assert noted.calls == [[7]]
        np.testing.assert_array_equal(window.pages, words(range(PAGES)))
        assert noted.pages == list(range(PAGES))


@pytest.mark.needs("paged")
def test_touches_of_other_windows_do_not_wait_for_one_that_is_slow(
    noted: Noted, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gated = Gated(tmp_path / "of gated", gate)
    with (
        computed(noted) as fast,
        computed(gated) as slow,
        fremap.Window(fast, engine="paged") as others,
        fremap.Window(slow, engine="paged") as window,
    ):
        # More than the service has helpers for. NumPy copies a page without the GIL.
        pages = range(0, PAGES, max(1, PAGES // 40))
        threads = [threading.Thread(target=window.pages[page].copy) for page in pages]
        for thread in threads:
            thread.start()
        while not gated.calls:
            threading.Event().wait(0.01)
        np.testing.assert_array_equal(others.pages, words(range(PAGES)))
        gate.touch()
        for thread in threads:
            thread.join()
        np.testing.assert_array_equal(window.pages, words(range(PAGES)))
        del threads


@pytest.mark.needs("paged")
def test_closing_waits_for_nothing_that_is_computed_ahead(noted: Noted, tmp_path: Path) -> None:
    """Touches that run forwards have pages behind them computed, until they bring 64 at once."""
    gate = tmp_path / "gate"
    gated = Gated(noted.notes, gate, first=127)
    with computed(gated, timeout=None) as store:
        window = fremap.Window(store, engine="paged", budget=None)
        try:
            for page in range(64):
                window.pages[page].copy()
            deadline = time.monotonic() + 30
            while gated.pages[-1] < 127:
                assert time.monotonic() < deadline, "nothing is computed ahead"
                time.sleep(0.01)
            window.close()
        finally:
            gate.touch()


@pytest.mark.needs("paged")
def test_pages_that_left_are_computed_again(noted: Noted) -> None:
    with (
        computed(noted) as store,
        fremap.Window(store, engine="paged", budget=1 << 20) as window,
    ):
        for _ in range(2):
            np.testing.assert_array_equal(window.pages, words(range(PAGES)))
        assert len(noted.pages) > PAGES
        assert window.stats().pages_evicted > 0
        window.evict(7)
        before = len(noted.pages)
        assert window.pages[7].tobytes() == words([7]).tobytes()
        assert len(noted.pages) > before


@computed_engine
def test_slots_show_extents(engine: str) -> None:
    with computed() as store, fremap.Slots(store, 4, 8, engine=engine) as slots:
        tiles = slots.array(np.uint8)
        for keys in ([3, 1, 1000], [5, 3, 17, 900, 2, 1], range(8)):
            shown = tiles[slots.ensure(keys)].reshape(-1, 4096)
            np.testing.assert_array_equal(shown, words([4 * k + i for k in keys for i in range(4)]))
        del tiles, shown


def test_slots_choose_an_engine_that_copies() -> None:
    with computed() as store, fremap.Slots(store, 1024, 2) as slots:
        assert slots.engine in ENGINES


# What is asked for ahead.


@reads_alone
def test_what_is_prefetched_is_computed_once(noted: Noted) -> None:
    with computed(noted) as store:
        store.prefetch([5, 6, 9])
        np.testing.assert_array_equal(store.read([9, 4, 5]), words([9, 4, 5]))
        assert store.resident([4, 5, 6, 9]).tolist() == [False, False, True, False]
        assert noted.calls == [[5, 6, 9], [4]]
        np.testing.assert_array_equal(store.read([6, 6]), words([6, 6]))
        assert noted.pages == [4, 5, 6, 6, 9]


@computed_engine
def test_nonblock_shows_what_was_prefetched(engine: str, noted: Noted) -> None:
    with (
        computed(noted) as store,
        fremap.Window(store, engine=engine, mapping="none", page_count=4) as w,
    ):
        store.prefetch([5, 6])
        store.read(6)
        here = w.remap([4, 5, 6, 7], nonblock=True)
        assert here.tolist() == [False, True, False, False]
        np.testing.assert_array_equal(w.pages[1], words([5])[0])
        assert noted.calls == [[5, 6]]


@reads_alone
def test_prefetches_beyond_what_is_kept_are_dropped(noted: Noted) -> None:
    with fremap.ComputedStore(64, noted, page_bytes=1 << 21) as store:
        store.prefetch()
        store.read(31)
        assert store.resident().tolist() == [True] * 31 + [False] * 33
        store.prefetch(63)
        read = store.read(63)
        assert read.tobytes() == numbered_words([63], 1 << 21).tobytes()
        assert noted.pages == [*range(32), 63]
        store.refresh()
        assert not store.resident().any()


@reads_alone
def test_a_prefetch_that_fails_is_told_by_the_read(tmp_path: Path) -> None:
    with computed(wrong(tmp_path, "raises", 7)) as store:
        store.prefetch([6, 7])
        with pytest.raises(fremap.ProviderError, match="no page 7"):
            store.read([7])
        np.testing.assert_array_equal(store.read([6]), words([6]))


# What goes wrong in the function.


@reads_alone
def test_an_exception_is_the_cause(tmp_path: Path) -> None:
    with computed(wrong(tmp_path, "raises", 1500)) as store:
        out = np.zeros((2048, 4096), np.uint8)
        with pytest.raises(fremap.ProviderError, match="ValueError: no page 1500") as caught:
            store.read(range(2048), out)
        error = caught.value
        assert (error.errno, error.completed, error.file_page) == (5, 1024, 1024)
        assert isinstance(error, OSError)
        assert "in raises" in error.traceback
        assert "providing.py" not in error.traceback
        assert error.traceback in str(error)
        assert isinstance(error.__cause__, ValueError)
        np.testing.assert_array_equal(out[:1024], words(range(1024)))
        np.testing.assert_array_equal(store.read([1, 2]), words([1, 2]))


@reads_alone
@pytest.mark.parametrize(
    ("what", "number", "text", "cause"),
    [
        ("raises_system", 2, "FileNotFoundError: .*No such tile", FileNotFoundError),
        ("raises_own", 5, "OwnError: 1 and 2", type(None)),
        ("leaves", 5, "SystemExit: 3", SystemExit),
        ("returns", 5, "TypeError: fill returned ndarray; it must write", TypeError),
    ],
)
def test_other_exceptions(tmp_path: Path, what: str, number: int, text: str, cause: type) -> None:
    with computed(wrong(tmp_path, what, 7)) as store:
        with pytest.raises(fremap.ProviderError, match=text) as caught:
            store.read(7)
        assert caught.value.errno == number
        assert isinstance(caught.value.__cause__, cause)
        np.testing.assert_array_equal(store.read(8), words([8]))


@computed_engine
def test_a_remap_that_fails_says_how_far_it_came(engine: str, tmp_path: Path) -> None:
    fill = wrong(tmp_path, "raises", 7)
    with (
        computed(fill) as store,
        fremap.Window(store, engine=engine, mapping="none", page_count=2) as w,
    ):
        w.remap([1, 2])
        with pytest.raises(fremap.ProviderError) as caught:
            w.remap([7, 3])
        assert caught.value.completed == 0
        np.testing.assert_array_equal(w.pages, words([1, 2]))


def test_slots_name_the_extent(tmp_path: Path) -> None:
    with computed(wrong(tmp_path, "raises", 7)) as store, fremap.Slots(store, 1, 4) as slots:
        with pytest.raises(fremap.ProviderError, match="key 7 cannot") as caught:
            slots.ensure([7])
        assert caught.value.key == 7
        assert "in raises" in caught.value.traceback


@reads_alone
def test_a_function_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with computed(Broken()) as store:
        for _ in range(2):
            with pytest.raises(fremap.ProviderError, match="this is broken"):
                store.read(0)


@reads_alone
@pytest.mark.parametrize("what", ["dies", "exits"])
def test_a_process_that_dies_is_started_again(tmp_path: Path, what: str) -> None:
    fill = wrong(tmp_path, what, 7, times=2)
    with computed(fill) as store:
        np.testing.assert_array_equal(store.read([6, 7]), words([6, 7]))
        assert len(set(fill.processes)) == 3


@reads_alone
@pytest.mark.parametrize(
    ("what", "text"), [("dies", "was ended by signal 9, 3 times"), ("exits", "ended with status 7")]
)
def test_one_that_dies_always_is_an_error(tmp_path: Path, what: str, text: str) -> None:
    with computed(wrong(tmp_path, what, 7)) as store:
        with pytest.raises(fremap.ProviderError, match=text) as caught:
            store.read(7)
        assert caught.value.errno == 5
        np.testing.assert_array_equal(store.read(6), words([6]))


@reads_alone
def test_one_that_died_while_it_waited_is_not_missed(noted: Noted, gone: Gone) -> None:
    with computed(noted) as store:
        store.read(1)
        (process,) = store.processes
        os.kill(process, signal.SIGKILL)
        gone([process])
        np.testing.assert_array_equal(store.read(2), words([2]))
        assert noted.calls == [[1], [2]]
        assert store.processes != (process,)


@reads_alone
def test_one_that_hangs_is_ended(tmp_path: Path, gone: Gone) -> None:
    fill = wrong(tmp_path, "hangs", 7)
    with computed(fill, timeout=1.5) as store:
        with pytest.raises(fremap.ProviderTimeoutError, match=r"within 1\.5 s") as caught:
            store.read(7)
        assert isinstance(caught.value, TimeoutError)
        gone(fill.processes)
        np.testing.assert_array_equal(store.read(6), words([6]))


@pytest.mark.parametrize("call", ["read", "populate"])
def test_a_call_is_interrupted(tmp_path: Path, call: str) -> None:
    fill = wrong(tmp_path, "hangs", 7, times=1)

    class RungError(Exception):
        pass

    def ring(*_: object) -> None:
        raise RungError

    def ring_once_it_hangs() -> None:
        while 7 not in fill.pages:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGUSR1)

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, ring)
    try:
        with computed(fill, timeout=None) as store:
            window = fremap.Window(store, 1, first_page=7)
            store.read(0)
            ringing = threading.Thread(target=ring_once_it_hangs)
            with pytest.raises(RungError):
                ringing.start()
                store.read(7) if call == "read" else window.populate()
            ringing.join()
            # The process that nobody waits for keeps nobody waiting.
            np.testing.assert_array_equal(store.read([6, 7]), words([6, 7]))
            window.close()
    finally:
        signal.signal(signal.SIGUSR1, before)


@reads_alone
def test_no_process_is_to_be_had(injected: Callable[..., None]) -> None:
    with computed() as store:
        injected("posix_spawn", 11)
        with pytest.raises(fremap.ProviderError, match="no provider process can be started"):
            store.read(7)
        np.testing.assert_array_equal(store.read(7), words([7]))


@pytest.fixture
def injected() -> object:
    def inject(call: str, number: int) -> None:
        fremap._core.inject_failure(call, 0, number, 2)

    yield inject
    fremap._core.clear_failures()


# What cannot be.


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fill": None}, fremap.ArgumentTypeError, "fill must be a function"),
        ({"fill": lambda pages, out: None}, fremap.ArgumentTypeError, "cannot be pickled"),
        ({"workers": 0}, fremap.ArgumentError, "workers is 0"),
        ({"timeout": 0}, fremap.ArgumentError, "timeout is 0"),
        ({"timeout": "1"}, fremap.ArgumentTypeError, "timeout must be seconds"),
        ({"page_bytes": 5000}, fremap.ArgumentError, "page"),
        ({"page_count": -1}, fremap.ArgumentError, "must not be negative"),
        ({"page_count": 1 << 62}, fremap.ArgumentError, "less than 2\\*\\*63 bytes together"),
        ({"page_count": (1 << 51) - 1}, fremap.ArgumentError, "stores end at"),
        ({"timeout": float("inf")}, fremap.ArgumentError, "timeout is inf"),
        ({"timeout": 1e300}, fremap.ArgumentError, "timeout is 1e\\+300"),
    ],
)
def test_arguments_are_checked(options: dict, error: type, text: str) -> None:
    arguments = {"page_count": 1, "fill": fill_numbered, **options}
    with pytest.raises(error, match=text):
        fremap.ComputedStore(**arguments)


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda store: fremap.Window(store, engine="alias"), 'use engine="paged"'),
        (lambda store: fremap.Window(store, coherent=True), 'use engine="paged"'),
        (lambda store: fremap.Window(store, prot=fremap.Prot.WRITE, coherent=False), "written"),
        (lambda store: fremap.Window(store, fault="signal", budget=None), 'fault="thread"'),
        (lambda store: fremap.concat([store, store]), "has no file"),
        (lambda store: store.fileno(), "no file"),
        (lambda store: fremap.Slots(store, 1, 1, engine="alias"), 'use engine="paged"'),
    ],
)
def test_what_needs_a_file_is_refused(use: Callable[..., object], text: str) -> None:
    with computed() as store, pytest.raises(fremap.UnsupportedError, match=text):
        use(store)


def test_it_is_not_written() -> None:
    with computed() as store, pytest.raises(fremap.FremapError):
        store.write(0, bytes(4096))


@reads_alone
def test_a_closed_store_refuses(noted: Noted, gone: Gone) -> None:
    store = computed(noted)
    store.read(0)
    processes = noted.processes
    store.close()
    gone(processes)
    for call in (lambda: store.read(0), lambda: store.prefetch(0), store.resident):
        with pytest.raises(fremap.ClosedError):
            call()
    with pytest.raises(TypeError, match="closed"):
        pickle.dumps(store)


def test_windows_go_on_after_a_close(noted: Noted) -> None:
    store = computed(noted)
    window = fremap.Window(store, engine="eager", mapping="none", page_count=1)
    store.read(0)
    store.close()
    window.remap([7])
    np.testing.assert_array_equal(window.pages, words([7]))
    window.close()


# Other processes.


def test_pickled_it_computes_again() -> None:
    fill = functools.partial(fill_numbered)
    with computed(fill, workers=2, timeout=5) as store, pickle.loads(pickle.dumps(store)) as other:
        assert (other.page_count, other.page_bytes) == (PAGES, 4096)
        np.testing.assert_array_equal(other.read([7]), words([7]))


@reads_alone
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_in_a_pool(method: str) -> None:
    with computed() as store, multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(first_words, (store, [7, 8])) == numbered_words([7, 8])[:, 0].tolist()


def test_a_child_of_fork_has_processes_of_its_own(
    noted: Noted, in_child: Callable[..., int]
) -> None:
    with computed(noted) as store:
        store.read(1)
        theirs = store.processes

        def body() -> None:
            assert store.processes == ()
            np.testing.assert_array_equal(store.read([7, 8]), words([7, 8]))
            assert not set(store.processes) & set(theirs)
            store.close()
            os._exit(0)

        assert in_child(body) == 0
        np.testing.assert_array_equal(store.read(2), words([2]))
        assert store.processes == theirs


SCRIPT = """
import os, signal, sys
import fremap
from fills import Noted, Wrong
from pathlib import Path

def main():
    fill = Wrong(Path(sys.argv[1]), "hangs", 7)
    store = fremap.ComputedStore(64, fill, page_bytes=4096, workers=2, timeout=None)
"""


@pytest.fixture
def run_main(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs the end of a program, which has a store of which page 7 hangs."""

    def run(body: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "program.py"
        path.write_text(
            SCRIPT
            + textwrap.indent(textwrap.dedent(body), "    ")
            + '\nif __name__ == "__main__":\n    main()\n'
        )
        command = [sys.executable, "-W", "error", path, tmp_path / "notes"]
        places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=100, env=environment, check=False
        )

    return run


RunMain = Callable[[str], subprocess.CompletedProcess[str]]

ENDS = {
    "returns": "store.read(0)",
    "closes": "store.read(0); store.close()",
    "raises": "store.read(0); raise SystemExit(4)",
    "killed": "store.read(0); os.kill(os.getpid(), signal.SIGKILL)",
    "killed at work": """
        import threading, time
        store.read(0)
        threading.Thread(target=store.read, args=(7,), daemon=True).start()
        while not any(7 in call for call in fill.calls):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)""",
    "leaves at work": """
        import threading, time
        store.read(0)
        threading.Thread(target=store.read, args=(7,), daemon=True).start()
        while not any(7 in call for call in fill.calls):
            time.sleep(0.01)""",
}


@reads_alone
@pytest.mark.parametrize("end", ENDS)
def test_no_process_is_left_behind(end: str, run_main: RunMain, tmp_path: Path, gone: Gone) -> None:
    done = run_main(ENDS[end])
    codes = {"raises": 4, "killed": -9, "killed at work": -9}
    assert done.returncode == codes.get(end, 0), done.stderr
    assert not done.stderr
    gone(Noted(tmp_path / "notes").processes)


@pytest.mark.needs("paged")
def test_a_touch_that_fails_is_a_signal_after_a_line(run_main: RunMain) -> None:
    done = run_main("""
        fill.wrong = "raises"
        store = fremap.ComputedStore(64, fill, page_bytes=4096)
        window = fremap.Window(store)
        print(window.pages[6, 2] + 1, flush=True)
        window.pages[7, 0]
        """)
    assert done.returncode in (-signal.SIGBUS, -signal.SIGSEGV)
    assert done.stdout == "8\n"
    (line,) = done.stderr.splitlines()
    assert "window page 7 (file page 7)" in line
    assert "ValueError: no page 7; the touch raises" in line


@pytest.mark.needs("paged")
def test_a_child_cannot_touch_what_only_its_parent_can_have(run_main: RunMain) -> None:
    done = run_main("""
        window = fremap.Window(store)
        window.populate(range(4))
        child = os.fork()
        if child == 0:
            window.pages[3, 0]
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(window.pages[5].tobytes() == store.read(5).tobytes())
        """)
    assert done.stdout.split() == [str(-signal.SIGBUS), "True"], done.stderr
    assert "provided by processes of the process that made the window" in done.stderr


@reads_alone
def test_a_program_without_a_guard_is_told(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(
        "import fremap\n"
        "def fill(pages, out): out[...] = 1\n"
        "store = fremap.ComputedStore(4, fill)\n"
        "print(store.read(0)[0, 0])\n"
    )
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert 'under `if __name__ == "__main__":`' in done.stderr


@reads_alone
def test_a_program_of_its_own_functions(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(
        "import fremap\n"
        "def fill(pages, out): out[...] = pages[:, None]\n"
        "if __name__ == '__main__':\n"
        "    with fremap.ComputedStore(40, fill) as store:\n"
        "        print(store.read(39)[0, 0])\n"
    )
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "39\n"), done.stderr


def test_functions_of_a_session_are_refused() -> None:
    code = "import fremap\ndef fill(pages, out): pass\nfremap.ComputedStore(4, fill)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "define it in a module and import it" in done.stderr
