"""NumPy's own tests of `numpy.memmap`, run on `fremap.memmap`."""

import inspect
from pathlib import Path
from types import ModuleType

import fremap
import pytest


def numpys_tests() -> ModuleType:
    try:
        from numpy._core.tests import test_memmap
    except ImportError:  # NumPy 1
        from numpy.core.tests import test_memmap
    return test_memmap


THEIRS = numpys_tests()
NAMES = [
    f"{cls}.{name}"
    for cls, found in inspect.getmembers(THEIRS, inspect.isclass)
    if cls.startswith("Test")
    for name, _ in inspect.getmembers(found, inspect.isfunction)
    if name.startswith("test")
]


@pytest.mark.parametrize("name", NAMES)
def test_of_numpys(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(THEIRS, "memmap", fremap.memmap)
    cls, method = name.split(".")
    test = getattr(THEIRS, cls)()
    if hasattr(test, "setup_method"):
        test.setup_method()
    try:
        run = getattr(test, method)
        run(**{"tmp_path": tmp_path} if "tmp_path" in inspect.signature(run).parameters else {})
    finally:
        if hasattr(test, "teardown_method"):
            test.teardown_method()


def test_there_are_enough_of_them() -> None:
    assert len(NAMES) >= 15
