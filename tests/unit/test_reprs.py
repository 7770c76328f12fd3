"""Each object says in a line what it is."""

from collections.abc import Callable
from pathlib import Path

import fremap
import numpy as np
import pytest


def test_batches(tmp_path: Path) -> None:
    np.arange(10).tofile(tmp_path / "rows")
    with fremap.rows(tmp_path / "rows", np.int64) as rows:
        batches = rows.batches(4, "sequential", prefetch=0)
        assert repr(batches) == "<fremap.Batches, 3 of 3 batches left>"
        next(batches)
        assert repr(batches) == "<fremap.Batches, 2 of 3 batches left>"
        batches.close()
        assert repr(batches) == "<fremap.Batches, closed>"


@pytest.mark.needs("paged")
def test_pins() -> None:
    with fremap.MemoryStore(1 << 16) as store, fremap.Window(store, engine="paged") as window:
        pin = window.pin([1])
        assert repr(pin) == f"<fremap.Pin, of {window!r}>"
        pin.release()
        assert repr(pin) == "<fremap.Pin, released>"


def test_holds(numbered_store: Callable[[int], fremap.Store]) -> None:
    with numbered_store(16) as store, fremap.Slots(store, 1, 4) as bank:
        pin = bank.pin([3, 5])
        slots = pin.slots.tolist()
        assert repr(pin) == f"<fremap.SlotsPin of slots {slots}>"
        pin.release()
        assert repr(pin) == f"<fremap.SlotsPin of slots {slots}, released>"
