"""The calibration: built in, measured on request, kept, shared, damaged, not writable."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import fremap
import pytest
from fremap import _core, calibration
from fremap.calibration import Calibration, CalibrationWarning

VALUES = {"alias_extent_pages": 100, "evict_gap_pages": 8, "batch_pages": 256}
BUILT_IN = Calibration(**_core.default_calibration())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory of the test's own."""
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


def a_document(**values: object) -> bytes:
    """A file in which this machine's entry has these values, too."""
    machines = {calibration._machine(): {**VALUES, **values}}
    return json.dumps({"format": 2, "machines": machines}).encode()


def without_home(program: str, home: str | None) -> str:
    """Run a program as a user whom the password file does not know; what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment.pop("HOME", None)
    if home is not None:
        environment["HOME"] = home
    prologue = """
import pwd
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
import fremap
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prologue + program],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_where_it_is(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration.cache_path() == cache
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert calibration.cache_path() == tmp_path / ".cache/fremap/calibration.json"


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_windows_work_for_users_without_a_home(home: str | None) -> None:
    program = """
with fremap.MemoryStore(1 << 16) as store, fremap.Window(store):
    print(fremap.calibration.cache_path(), fremap.calibration.kept())
try:
    fremap.calibration.save(fremap.calibration.load())
except fremap.StoreError as error:
    print("XDG_CACHE_HOME" in str(error))
"""
    assert without_home(program, home).split() == ["None", "None", "True"]


def test_nothing_is_measured_or_written_unasked(cache: Path, measured: list[int]) -> None:
    assert calibration.load() == BUILT_IN
    with fremap.MemoryStore(1 << 16) as store, fremap.Window(store):
        pass
    assert measured == []
    assert not cache.parent.exists()
    assert calibration.kept() is None


def test_measured_on_request_then_kept(cache: Path, measured: list[int]) -> None:
    assert calibration.load() == BUILT_IN
    assert calibration.measure() == Calibration(**VALUES)
    assert calibration.load() == Calibration(**VALUES)
    calibration._known.clear()  # as another process
    assert calibration.load() == calibration.kept() == Calibration(**VALUES)
    assert len(measured) == 1
    assert [path.name for path in cache.parent.iterdir()] == ["calibration.json"]


def test_measured_and_not_kept(cache: Path, measured: list[int]) -> None:
    assert calibration.measure(keep=False) == Calibration(**VALUES)
    assert calibration.load() == BUILT_IN
    assert not cache.parent.exists()


def test_the_file_is_for_people_too(cache: Path, measured: list[int]) -> None:
    calibration.measure()
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
    assert calibration.load() == BUILT_IN
    calibration.measure()
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
        b"null",
        b"\xff\xfe",
        b"[" * 200_000,
        b" " * (2 << 20),
        b'{"format": 2}',
        b'{"format": 2, "machines": []}',
        b'{"format": 2, "machines": {"x": {"batch_pages": 1}}}',
        b'{"format": 2, "machines": {"x": 3}}',
        a_document(batch_pages=-1),
        a_document(batch_pages=0),
        a_document(batch_pages=2**63 - 1),
        a_document(batch_pages=10**400),
        a_document(batch_pages=1e3),
        a_document(batch_pages=True),
        a_document(batch_pages="1"),
        a_document(batch_pages="x" * 100_000),
        a_document(more=1),
    ],
)
def test_damaged_files_are_said_once_and_not_used(cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    store = fremap.MemoryStore(1 << 16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            fremap.Window(store).close()
    store.close()
    assert len(said) == 1
    assert said[0].category is CalibrationWarning
    text = str(said[0].message)
    assert "fremap calibrate" in text
    assert str(cache) in text
    assert len(text) < len(str(cache)) + 300
    assert calibration.load() == BUILT_IN
    assert calibration.kept() is None
    assert cache.read_bytes() == content


def test_measuring_replaces_a_damaged_file(cache: Path, measured: list[int]) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"{")
    calibration.measure()
    calibration._known.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration.load() == Calibration(**VALUES)


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_what_is_no_file_is_not_waited_for(cache: Path, kind: str) -> None:
    cache.parent.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(cache)
    else:
        cache.mkdir()
    with pytest.warns(CalibrationWarning, match="not a regular file"):
        assert calibration.load() == BUILT_IN


def test_files_of_another_version_are_replaced(cache: Path, measured: list[int]) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text('{"format": 3, "what": "ever"}')
    assert calibration.load() == BUILT_IN
    calibration.measure()
    assert json.loads(cache.read_text())["format"] == 2


def test_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    """Windows do not mind, and say nothing; who wants it kept is told."""
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert calibration.load() == BUILT_IN
    with pytest.raises(fremap.StoreError, match="XDG_CACHE_HOME") as raised:
        calibration.measure()
    assert raised.value.filename == str(tmp_path / "file/fremap/calibration.json")
    assert calibration.load() == BUILT_IN


@pytest.mark.parametrize("value", [-1, 0, 4097, 1.5, True, "1", None, 2**63])
def test_impossible_values(value: object) -> None:
    with pytest.raises(fremap.ArgumentError, match=r"^Calibration: batch_pages"):
        Calibration(alias_extent_pages=1, evict_gap_pages=1, batch_pages=value)


def test_the_real_thing() -> None:
    found = calibration.measure(keep=False)
    assert all(value >= 0 for value in found.to_dict().values())
    with fremap.MemoryStore(1 << 16) as store, fremap.Window(store, calibration=found) as window:
        assert window.populate().all()
