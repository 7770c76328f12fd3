"""O15: what is cheaper is found out on the machine, once, and kept."""

import dataclasses

import fremap
import pytest
from fremap import _core
from fremap.calibration import Calibration

from .conftest import MakeStore


def dropping_calls(store: fremap.Store, engine: str, gap_pages: int) -> int:
    """Calls that it takes to drop two runs with six absent pages between them."""
    chosen = dataclasses.replace(fremap.calibration.load(), evict_gap_pages=gap_pages)
    with fremap.Window(store, 32, engine=engine, calibration=chosen) as window:
        runs = [*range(4, 8), *range(14, 18)]
        window.remap(runs, at=runs)
        before = _core.system_calls()
        window.evict(runs)
        after = _core.system_calls()
        assert not window.present().any()
        return sum(after[call] - before[call] for call in ("madvise", "process_madvise"))


@pytest.mark.needs("paged")
def test_o15_single_runs_or_the_whole_range(numbered_store: MakeStore) -> None:
    store = numbered_store(32)
    assert dropping_calls(store, "paged", gap_pages=16) == 1
    assert dropping_calls(store, "paged", gap_pages=2) >= 1


def test_o15_calibrated_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fremap.calibration.load()
    assert fremap.calibration.cache_path().exists()
    fremap.calibration._known.clear()

    def again() -> dict[str, int]:
        raise AssertionError("measured again")

    monkeypatch.setattr(_core, "calibrate", again)
    assert fremap.calibration.load() == first
    with fremap.MemoryStore(1 << 16) as store, fremap.Window(store):
        pass


def test_o15_seen_and_overridden(numbered_store: MakeStore) -> None:
    measured = fremap.calibration.measure()
    assert {field.name for field in dataclasses.fields(measured)} == set(measured.to_dict())
    mine = Calibration(alias_extent_pages=1, evict_gap_pages=0, batch_pages=1)
    store = numbered_store(16)
    with fremap.Window(store, calibration=mine) as window:
        assert window.remap(range(15, -1, -1)).all()
