"""The house: a lower room never knows an upper one, and `unsafe` has one room."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CORE = REPOSITORY / "crates/core/src"
PACKAGE = REPOSITORY / "python/fremap"

# Each room of the core with its floor; a room sees its own floor and those below.
CORE_FLOORS = {
    "error": 0,
    "units": 1,
    "sys": 1,
    "room": 1,
    "table": 1,
    "memory": 1,
    "plan": 1,
    "cache": 1,
    "slot_table": 2,
    "stats": 1,
    "calibrate": 2,
    "trim": 2,
    "store": 2,
    "scatter": 2,
    "engine": 3,
    "rows": 3,
    "fault": 3,
    "window": 4,
    "lib": 5,
}
PURE = ("table", "plan", "cache")  # no system call
# Python's memory and descriptors; and the buffer protocol, whose slots are unsafe in PyO3.
UNSAFE_ROOMS_OF_THE_BINDING = {"crates/python/src/raw.rs", "crates/python/src/window.rs"}
PACKAGE_FLOORS = {
    "_core": 0,
    "errors": 1,
    "closing": 1,
    "protection": 1,
    "stats": 1,
    "arguments": 2,
    "formats": 2,
    "ending": 2,
    "selection": 2,
    "rowids": 3,
    "calibration": 2,
    "epochs": 3,
    "batches": 3,
    "readers": 3,
    "stores": 3,
    "concat_store": 4,
    "capabilities": 3,
    "reopening": 4,
    "settings": 4,
    "views": 4,
    "window": 4,
    "slots": 5,
    "layout": 4,
    "memmap": 5,
    "npy": 6,
    "rows": 5,
    "shards": 4,
    "syscall": 5,
    "torch": 6,
    "__init__": 6,
    "testing": 7,
    "bench": 7,
    "cli": 8,
    "__main__": 9,
}


def room_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(path.suffix)


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*", "", source)


def rust_rooms_used(source: str) -> set[str]:
    """The rooms that `crate::room` and `use crate::{room, ...}` name."""
    source = without_comments(source)
    used = set(re.findall(r"\bcrate::(\w+)", source))
    for group in re.findall(r"\buse crate::\{(.*?)\};", source, re.DOTALL):
        flat = re.sub(r"\{[^{}]*\}", "", group)
        used |= set(re.findall(r"(?:^|,)\s*(\w+)", flat))
    return used


def python_rooms_used(source: str) -> set[str]:
    """The rooms of the package that a module imports, at its top or in a function."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), "relative import"
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fremap":
                room = rest.partition(".")[0]
                used.add(room if room in PACKAGE_FLOORS else "__init__")
    return used


RUST_FILES = sorted(CORE.rglob("*.rs"))
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", RUST_FILES, ids=lambda path: str(path.relative_to(CORE)))
def test_core_room_knows_no_upper_room(path: Path) -> None:
    room = room_of(path, CORE)
    used = rust_rooms_used(path.read_text()) & CORE_FLOORS.keys()
    upper = {other for other in used if CORE_FLOORS[other] > CORE_FLOORS[room]}
    assert not upper, f"{room} is below {upper}"
    if room in PURE:
        assert "sys" not in used, f"{room} is pure: no system call"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_package_room_knows_no_upper_room(path: Path) -> None:
    room = room_of(path, PACKAGE)
    upper = {
        other
        for other in python_rooms_used(path.read_text())
        if PACKAGE_FLOORS[other] > PACKAGE_FLOORS[room]
    }
    assert not upper, f"{room} is below {upper}"


def test_every_room_has_a_floor() -> None:
    assert {room_of(path, CORE) for path in RUST_FILES} <= CORE_FLOORS.keys()
    assert {room_of(path, PACKAGE) for path in PYTHON_FILES} <= PACKAGE_FLOORS.keys()


def test_core_knows_no_python() -> None:
    assert "pyo3" not in (REPOSITORY / "crates/core/Cargo.toml").read_text()


def test_unsafe_code_has_its_rooms() -> None:
    found = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "crates").glob("*/src/**/*.rs")
        if not path.is_relative_to(CORE / "sys")
        and re.search(r"\bunsafe\s*(\{|fn|impl|trait|extern)", without_comments(path.read_text()))
    }
    assert found <= UNSAFE_ROOMS_OF_THE_BINDING


def test_reading_of_imports() -> None:
    rust = "use crate::{sys::mm, units::{A, B}};\n// crate::window\nlet x = crate::plan::f();"
    assert rust_rooms_used(rust) >= {"sys", "units", "plan"}
    assert "window" not in rust_rooms_used(rust)
    python = "import fremap\nfrom fremap import _core\nfrom fremap.cli.report import size"
    assert python_rooms_used(python) == {"__init__", "_core", "cli"}
