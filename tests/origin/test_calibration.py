"""O15: what is cheaper is measured on the machine when somebody asks, and kept."""

import dataclasses
import os
from pathlib import Path

import fremap
import pytest
from fremap import _core
from fremap.calibration import Calibration

from .conftest import MakeStore


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def test_o15_a_window_measures_nothing_and_writes_no_file(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured() -> dict[str, int]:
        raise AssertionError("a window measured the machine")

    monkeypatch.setattr(_core, "calibrate", measured)
    with fremap.MemoryStore(1 << 16) as store, fremap.Window(store, engine=engine):
        pass
    assert fremap.calibration.load() == Calibration(**_core.default_calibration())
    assert os.listdir(tmp_path) == []


def test_o15_measured_when_asked_for_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = fremap.calibration.measure()
    path = fremap.calibration.cache_path()
    assert path is not None
    assert path.exists()
    fremap.calibration._known.clear()  # as another process
    monkeypatch.setattr(_core, "calibrate", lambda: pytest.fail("measured again"))
    assert fremap.calibration.load() == fremap.calibration.kept() == measured


def test_o15_seen_and_overridden(numbered_store: MakeStore) -> None:
    measured = fremap.calibration.measure(keep=False)
    assert {field.name for field in dataclasses.fields(measured)} == set(measured.to_dict())
    assert fremap.calibration.kept() is None
    mine = Calibration(alias_extent_pages=1, evict_gap_pages=0, batch_pages=1)
    store = numbered_store(16)
    with fremap.Window(store, calibration=mine) as window:
        assert window.remap(range(15, -1, -1)).all()
