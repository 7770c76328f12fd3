"""Ctrl-C in the middle of everything: the call ends, and what it leaves is consistent."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import page_numbers

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

pytestmark = pytest.mark.any_user

PAGES = 30_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages whose first word is their number plus one; the rest is a hole."""
    path = tmp_path_factory.mktemp("interrupts") / "pages"
    words = np.zeros((PAGES, 512), np.uint64)
    words[:, 0] = (np.arange(PAGES, dtype=np.uint64) + np.uint64(1)) << np.uint64(16)
    path.write_bytes(words.tobytes())
    return path


class interrupted_after:  # noqa: N801
    """Ctrl-C after a while; it comes before the end of the block, which waits for it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGALRM, self.interrupt)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is interrupted_after.__enter__.__code__:
            # Not in the block yet, where nobody would catch it: a moment later.
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            return
        raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
        return kind is KeyboardInterrupt


def check(window: Any) -> None:
    """Every page that is there shows what the mapping says."""
    there = np.flatnonzero(window.present() & (window.mapping >= 0))
    words = window.array(np.uint64, (PAGES, 512))
    shown = page_numbers(words[there, 0])
    wrong = np.flatnonzero(shown != window.mapping[there])
    page = there[wrong[0]] if wrong.size else 0
    assert not wrong.size, (
        f"{wrong.size} pages of {there.size} are wrong; window page {page} shows "
        f"{shown[wrong[0]]}, then {words[page, :3]}, and the mapping says {window.mapping[page]}"
    )


@pytest.mark.parametrize("rounds", [8, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("what", ["remap", "populate", "place", "protect"])
def test_ctrl_c(engine: str, what: str, rounds: int, path: Path) -> None:
    random = np.random.default_rng(8)
    with fremap.open(path) as store, fremap.Window(store, engine=engine) as window:
        for round_number in range(rounds):
            order = random.permutation(PAGES)
            before = window.mapping.copy()
            with interrupted_after(0.001 + 0.004 * random.random()):
                while True:
                    if what == "remap":
                        window.remap(order)
                        before, order = order, random.permutation(PAGES)
                    elif what == "populate":
                        window.evict(None, discard=True)
                        window.populate()
                    elif what == "place":
                        window.place(order[:500])
                        window.remap(before, discard=True)
                    else:
                        window.protect(order[:500], fremap.Prot.NONE)
                        window.protect(None, fremap.Prot.READ)
            mapping = window.mapping
            if what == "remap":
                # A front part of one order, the rest of the one before it.
                done = int((mapping == order).argmin()) if (mapping != order).any() else PAGES
                assert (mapping[done:] == before[done:]).all(), round_number
            check(window)
            window.protect(None, fremap.Prot.READ)
            assert window.remap(before, discard=True).all()
            check(window)


@pytest.mark.parametrize("rounds", [8, pytest.param(300, marks=pytest.mark.long)])
def test_ctrl_c_in_a_read(rounds: int, path: Path) -> None:
    random = np.random.default_rng(9)
    with fremap.open(path) as store:
        for _ in range(rounds):
            with interrupted_after(0.001 + 0.01 * random.random()):
                while True:
                    store.read(random.permutation(PAGES))
        assert (store.read(range(100)).view(np.uint64)[:, 0] >> 16 == np.arange(1, 101)).all()
