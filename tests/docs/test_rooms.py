"""The house: a lower room never knows an upper one, and `unsafe` has one room."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once
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
    "shared_slots": 3,
    "stats": 1,
    "io": 1,
    "calibrate": 2,
    "trim": 2,
    "store": 2,
    "scatter": 2,
    "engine": 3,
    "rows": 3,
    "window": 4,
    "lib": 5,
}
PURE = ("table", "plan", "cache")  # no system call
# Python's memory and descriptors; and the buffer protocol, whose slots are unsafe in PyO3.
UNSAFE_ROOMS_OF_THE_BINDING = {
    "crates/python/src/raw.rs",
    "crates/python/src/shared_slots.rs",
    "crates/python/src/window.rs",
}
PACKAGE_FLOORS = {
    "_core": 0,
    "errors": 1,
    "closing": 1,
    "protection": 1,
    "stats": 1,
    "sizes": 1,
    "arguments": 2,
    "dtypes": 2,
    "formats": 2,
    "ending": 2,
    "selection": 2,
    "rowids": 3,
    "indexing": 4,
    "calibration": 2,
    "epochs": 3,
    "batches": 3,
    "readers": 3,
    "stores": 3,
    "providing": 2,
    "computed_store": 4,
    "locations": 2,
    "remote": 2,
    "http_reader": 2,
    "remote_store": 4,
    "opening": 5,
    "concat_store": 4,
    "capabilities": 3,
    "reopening": 4,
    "settings": 4,
    "pictures": 3,
    "views": 4,
    "window": 4,
    "slot_memory": 5,
    "slots": 5,
    "layout": 4,
    "memmap": 5,
    "npy": 6,
    "pending": 4,
    "row_array": 5,
    "rows": 5,
    "ragged_rows": 6,
    "shards": 5,
    "sources": 5,
    "syscall": 5,
    "torch": 6,
    "ray": 6,
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


def circles(uses: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that all use one another, directly or not."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            new = uses.get(ahead.pop(), set()) - found
            found |= new
            ahead.extend(new)
        return found

    reach = {module: reached(module) for module in uses}
    groups = {
        frozenset(other for other in reach[module] if module in reach.get(other, set()))
        for module in uses
        if module in reach[module]
    }
    return [sorted(group) for group in groups]


def rust_module(path: Path) -> str:
    parts = path.relative_to(CORE).with_suffix("").parts
    return "/".join(parts[:-1] if parts[-1] in {"mod", "lib"} else parts)


def use_paths(tree: str) -> list[str]:
    """The paths of a `use`, with its braces taken apart."""
    start, brace, rest = tree.strip().partition("{")
    if not brace:
        return [start.partition(" as ")[0].strip()]
    depth, parts = 0, [""]
    for letter in rest.rpartition("}")[0]:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [start + path for part in parts if part.strip() for path in use_paths(part)]


def rust_modules_used(module: str, source: str, modules: set[str]) -> set[str]:
    """The modules whose items a module names; not those that it lies in.

    A module is the sum of what lies in it, so a use of its own parent is none.
    """
    source = without_comments(source).partition("#[cfg(test)]\nmod tests {")[0]
    paths = [path for tree in re.findall(r"\buse ([^;]+);", source) for path in use_paths(tree)]
    paths += re.findall(r"\b(?:crate|super)(?:::\w+)+", re.sub(r"\buse [^;]+;", "", source))
    used = set()
    for path in paths:
        first, *names = [name.strip() for name in path.split("::")]
        at = [] if first == "crate" else module.split("/")
        while first == "super":
            at.pop()
            first, *names = names or [""]
        if first not in {"crate", "self"}:
            names.insert(0, first)
        for name in names:
            if "/".join([*at, name]) not in modules:
                break
            at.append(name)
        found = "/".join(at)
        if found in modules and found != module and not module.startswith(found + "/"):
            used.add(found)
    return used - {""}


def test_no_circle_of_rust_modules() -> None:
    modules = {rust_module(path): path for path in RUST_FILES}
    uses = {
        module: rust_modules_used(module, path.read_text(), set(modules))
        for module, path in modules.items()
    }
    assert uses["engine/paged"] >= {"engine/cached", "sys/uffd"}, "the reading works"
    assert not circles(uses)


def python_modules_used(source: str, modules: set[str]) -> set[str]:
    """The modules of the package that a module needs at run time."""
    used = set()
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` needs the module; the package only for its own names.
            names = {f"{node.module}.{alias.name}" for alias in node.names} - {"fremap._core"}
            used |= (names & modules) | ({node.module} & modules if names - modules else set())
        elif isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names if alias.name in modules}
    return used


def test_no_circle_of_python_modules() -> None:
    def name(path: Path) -> str:
        parts = ("fremap", *path.relative_to(PACKAGE).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    modules = {name(path): path for path in PYTHON_FILES}
    uses = {
        module: python_modules_used(path.read_text(), set(modules)) - {module}
        for module, path in modules.items()
    }
    assert uses["fremap.slots"] >= {"fremap.slot_memory", "fremap.stores"}, "the reading works"
    assert not circles(uses)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    modules = {"sys", "sys/mm", "sys/fork", "sys/ring", "sys/ring/pool", "units"}
    source = "use super::{fork::exclude, ring::{self, pool::Pool}};\nuse crate::units::Run;"
    assert rust_modules_used("sys/mm", source, modules) == {
        "sys/fork",
        "sys/ring",
        "sys/ring/pool",
        "units",
    }
    assert rust_modules_used("sys/ring/pool", "use super::Ring;", modules) == set()


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


def test_the_places_that_the_architecture_names_are_there() -> None:
    page = (REPOSITORY / "docs/architecture.md").read_text()
    table = page.partition("## Where to change what")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z_/]+(?:\.rs|\.py|/))`", table)
    assert len(named) >= 10
    missing = [
        name for name in named if not (CORE / name).exists() and not (REPOSITORY / name).exists()
    ]
    assert not missing
    for room in re.findall(r"^\| `([a-z_/]+)` \|", page.partition("## Rooms")[2], re.MULTILINE):
        found = (CORE / room, CORE / f"{room}.rs")
        assert any(path.exists() for path in found), room


def test_the_architecture_names_every_lock() -> None:
    page = (REPOSITORY / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \|", page.partition("## Locks")[2], re.MULTILINE)
    told = {name.rpartition("::")[2] for row in rows for name in re.findall(r"`([\w:.]+)`", row)}
    name = r"^ *(?:pub(?:\(\w+\))? )?(?:static )?(\w+): "
    lock = re.compile(name + r"(?:Arc<)?(?:Fork)?(?:Lock|Mutex|RwLock)<", re.MULTILINE)
    for path in (REPOSITORY / "crates").glob("*/src/**/*.rs"):
        source = without_comments(path.read_text()).partition("#[cfg(test)]")[0]
        if path.name != "tests.rs":
            assert set(lock.findall(source)) <= told, path
