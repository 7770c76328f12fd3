"""The calibration file: kept, shared, damaged, not writable, overridden."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import fremap
import pytest
from fremap import _core, calibration
from fremap.calibration import Calibration, CalibrationWarning

VALUES = {"alias_extent_pages": 100, "evict_gap_pages": 8, "batch_pages": 256}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory of the test's own; measuring counts how often it is done."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache/fremap/calibration.json"
    calibration._known.clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time that something is measured."""
    calls: list[int] = []

    def measure() -> dict[str, int]:
        calls.append(1)
        return VALUES

    monkeypatch.setattr(_core, "calibrate", measure)
    return calls


def test_where_it_is(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration.cache_path() == cache
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert calibration.cache_path() == tmp_path / ".cache/fremap/calibration.json"


def test_measured_once_then_kept(cache: Path, measured: list[int]) -> None:
    assert calibration.load() == Calibration(**VALUES)
    assert calibration.load() == Calibration(**VALUES)
    calibration._known.clear()  # as another process
    assert calibration.load() == Calibration(**VALUES)
    assert len(measured) == 1
    assert [path.name for path in cache.parent.iterdir()] == ["calibration.json"]


def test_the_file_is_for_people_too(cache: Path, measured: list[int]) -> None:
    calibration.load()
    (machine,) = json.loads(cache.read_text())["machines"].items()
    assert os.uname().release in machine[0]
    assert machine[1] == VALUES


def test_it_can_be_set(cache: Path, measured: list[int]) -> None:
    mine = Calibration(**{**VALUES, "batch_pages": 64})
    calibration.save(mine)
    calibration._known.clear()
    assert calibration.load() == mine
    assert measured == []


def test_other_machines_are_kept(cache: Path, measured: list[int]) -> None:
    cache.parent.mkdir(parents=True)
    others = {f"machine {number}": VALUES for number in range(70)}
    cache.write_text(json.dumps({"format": 2, "machines": others}))
    calibration.load()
    machines = list(json.loads(cache.read_text())["machines"])
    assert len(machines) == 64
    assert machines[:-1] == [f"machine {number}" for number in range(7, 70)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"format": 2}',
        b'{"format": 2, "machines": {"x": {"batch_pages": 1}}}',
        b'{"format": 2, "machines": {"x": 3}}',
        json.dumps({"format": 2, "machines": {"x": {**VALUES, "batch_pages": -1}}}).encode(),
        json.dumps({"format": 2, "machines": {"x": {**VALUES, "batch_pages": "1"}}}).encode(),
        json.dumps({"format": 2, "machines": {"x": {**VALUES, "more": 1}}}).encode(),
    ],
)
def test_damaged_files_are_said_and_replaced(
    cache: Path, measured: list[int], content: bytes
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    with pytest.warns(CalibrationWarning, match=str(cache)):
        assert calibration.load() == Calibration(**VALUES)
    calibration._known.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration.load() == Calibration(**VALUES)
    assert len(measured) == 1


def test_files_of_another_version_are_replaced(cache: Path, measured: list[int]) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text('{"format": 3, "what": "ever"}')
    assert calibration.load() == Calibration(**VALUES)
    assert json.loads(cache.read_text())["format"] == 2


def test_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    """Measured once a process, and said."""
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(CalibrationWarning, match="cannot keep"):
        calibration.load()
    calibration.load()
    assert len(measured) == 1
    with pytest.raises(OSError, match="file"):
        calibration.save(Calibration(**VALUES))


@pytest.mark.parametrize("value", [-1, 1.5, True, "1", None, 2**63])
def test_impossible_values(value: object) -> None:
    with pytest.raises(fremap.ArgumentError, match=r"^Calibration: batch_pages"):
        Calibration(alias_extent_pages=1, evict_gap_pages=1, batch_pages=value)


def test_what_the_core_refuses() -> None:
    with fremap.MemoryStore(4096) as store:
        for batch_pages in (0, 1 << 40):
            mine = Calibration(**{**VALUES, "batch_pages": batch_pages})
            with pytest.raises(fremap.ArgumentError, match="batch_pages"):
                fremap.Window(store, calibration=mine)


def test_the_real_thing() -> None:
    found = calibration.measure()
    assert all(value >= 0 for value in found.to_dict().values())
    with fremap.MemoryStore(1 << 16) as store, fremap.Window(store, calibration=found) as window:
        assert window.populate().all()
