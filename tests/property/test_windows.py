"""Every engine on both kinds of store, beside the model, and in sizes that need many batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import page_numbers, pages_taken, write_numbered_file
from fremap.testing.kinds import StoreKind, window_machine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fremap.testing.machine import WindowMachine

KINDS: tuple[StoreKind, ...] = ("file", "memory", "concat")


def run(machine: type[WindowMachine], tests: int = 10, machines: int = 24) -> None:
    """So many machines share the time of so many tests."""
    examples = max(1, settings.default.max_examples * tests // machines)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples))


@pytest.mark.parametrize("page_bytes", [4096, 65536])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_does_what_the_model_does(engine: str, kind: StoreKind, page_bytes: int) -> None:
    run(window_machine(engine, kind, page_bytes))


@pytest.mark.parametrize("page_bytes", [4096, 65536])
@pytest.mark.parametrize("kind", KINDS)
def test_a_writable_window_does_what_the_model_does(kind: StoreKind, page_bytes: int) -> None:
    run(window_machine("alias", kind, page_bytes, writable=True))


@pytest.mark.parametrize(
    ("kind", "page_bytes"),
    [("file", 4096), ("file", 65536), ("direct", 4096), ("memory", 4096), ("concat", 4096)],
)
def test_a_window_writes_back_what_the_model_does(
    write_back: dict[str, Any], kind: StoreKind, page_bytes: int
) -> None:
    tracking = write_back.get("tracking", "async")
    fault = write_back.get("fault", "thread")
    machine = window_machine(
        write_back["engine"], kind, page_bytes, writable=True, tracking=tracking, fault=fault
    )
    run(machine, tests=4, machines=20)


@pytest.mark.needs("paged")
def test_a_window_that_resolves_faults_by_signal() -> None:
    run(window_machine("paged", "file", fault="signal"), tests=1, machines=3)


FILE_PAGES = 6000
WINDOW_PAGES = 5000


@pytest.fixture(scope="module")
def numbered_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "pages"
    write_numbered_file(path, FILE_PAGES)
    return path


@pytest.fixture
def store(numbered_path: Path) -> Iterator[fremap.FileStore]:
    with fremap.open(numbered_path) as opened:
        yield opened


def shown(window: Any) -> np.ndarray:
    """The page that each window page shows, by its first and last word, which agree."""
    words = window.array(np.uint64, (window.page_count, -1))
    first, last = page_numbers(words[:, 0]), page_numbers(words[:, -1])
    assert (first == last).all()
    return first


@pytest.mark.parametrize("populate", [True, False])
def test_large_remaps(engine: str, store: fremap.FileStore, populate: bool) -> None:
    """Random orders, repeats, scattered and overlapping targets, thousands of pages a call."""
    random = np.random.default_rng(20021002)
    expected = np.arange(WINDOW_PAGES)
    with fremap.Window(store, WINDOW_PAGES, engine=engine, populate=populate) as window:
        for _ in range(6):
            at = random.permutation(WINDOW_PAGES)[: random.integers(1, WINDOW_PAGES)]
            file_pages = random.integers(0, FILE_PAGES, len(at))
            mask = window.remap(file_pages, at=at, populate=populate)
            expected[at] = file_pages
            assert mask.all() or not populate
            first = random.integers(0, WINDOW_PAGES - 1000)
            run = random.permutation(FILE_PAGES)[:1000]
            window.remap(run, at=first, populate=populate)
            expected[first : first + 1000] = run
            assert (window.mapping == expected).all()
            if engine == "eager" and not populate:
                window.populate()
            assert (shown(window) == expected).all()


def test_large_evictions(engine: str, store: fremap.FileStore) -> None:
    """What was evicted in any pattern comes back as it was."""
    random = np.random.default_rng(20021003)
    taken = pages_taken()
    with fremap.Window(store, WINDOW_PAGES, engine=engine) as window:
        expected = random.permutation(FILE_PAGES)[:WINDOW_PAGES]
        window.remap(expected)
        for size in (1, 100, 3000, WINDOW_PAGES):
            evicted = random.permutation(WINDOW_PAGES)[:size]
            window.evict(evicted)
            assert not window.present()[evicted].any()
            if engine == "eager":
                window.populate(evicted)
            assert (shown(window) == expected).all()
            unmapped = engine == "alias" and pages_taken() > taken
            assert window.present()[evicted].all() or unmapped


def test_large_protections(engine: str, store: fremap.FileStore) -> None:
    """Pages that were forbidden in any pattern show what they showed."""
    random = np.random.default_rng(20021004)
    with fremap.Window(store, 2000, engine=engine, populate=True) as window:
        expected = random.permutation(FILE_PAGES)[:2000]
        window.remap(expected)
        for _ in range(4):
            denied = random.permutation(2000)[:700]
            window.protect(denied, fremap.Prot.NONE)
            assert (window.protection()[denied] == fremap.Prot.NONE).all()
            moved = denied[:300]
            window.remap(expected[moved][::-1], at=moved)
            expected[moved] = expected[moved][::-1]
            window.protect(denied, fremap.Prot.READ)
            if engine == "eager":
                window.populate()
            assert (shown(window) == expected).all()


def test_large_exchanges(write_back: dict[str, Any], numbered_path: Path, tmp_path: Path) -> None:
    """Pages that were stored to change places, thousands a call: each keeps what it holds."""
    random = np.random.default_rng(20021005)
    path = tmp_path / "pages"
    path.write_bytes(numbered_path.read_bytes())
    stored = np.zeros(FILE_PAGES, np.uint64)
    shown = np.arange(WINDOW_PAGES)
    with (
        fremap.open(path, "r+") as store,
        fremap.Window(store, WINDOW_PAGES, populate=True, **write_back) as window,
    ):
        for number in range(1, 4):
            words = window.array(np.uint64, (WINDOW_PAGES, -1))
            some = random.permutation(WINDOW_PAGES)[: WINDOW_PAGES // 2]
            words[some, 7] = stored[shown[some]] = number
            shown = random.permutation(FILE_PAGES)[:WINDOW_PAGES] if number == 2 else shown[::-1]
            window.remap(shown)
            assert (page_numbers(words[:, 0]) == shown).all()
            known = stored[shown] > 0
            assert (words[known, 7] == stored[shown][known]).all()
            del words
    with fremap.open(path) as store:
        words = store.read(None).view(np.uint64)
    assert (page_numbers(words[:, 0]) == np.arange(FILE_PAGES)).all()
    assert (words[stored > 0, 7] == stored[stored > 0]).all()
