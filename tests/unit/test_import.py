"""`import fremap` does nothing but import, and little of that."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import fremap
import pytest


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@functools.cache
def imported() -> set[str]:
    """The modules that a fresh process has after `import fremap`."""
    return set(run("import fremap, sys; print(*sys.modules)").split())


@pytest.mark.parametrize(
    "module",
    ["multiprocessing", "subprocess", "rich", "hypothesis", "argparse", "asyncio", "matplotlib"],
)
def test_what_is_not_needed_is_not_imported(module: str) -> None:
    assert module not in imported()


def test_no_side_effects() -> None:
    program = """
import os, signal, sys, threading, numpy
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    descriptors = sorted(os.listdir("/proc/self/fd"))
    return handlers, descriptors, threading.active_count(), len(os.listdir("/proc/self/task"))
before = state()
import fremap
assert state() == before
from fremap import _core
assert not any(_core.system_calls().values())
"""
    run(program)


def test_everything_named_is_there() -> None:
    import fremap

    for name in fremap.__all__:
        assert getattr(fremap, name) is not None
    assert fremap.__version__ == fremap._core.__version__


@pytest.mark.parametrize(
    "module", ["fremap.batches", "fremap.slots", "fremap.stats", "json", "secrets"]
)
def test_what_is_loaded_when_it_is_asked_for(module: str) -> None:
    """Each of these is a part of the time of `import fremap`, and few programs want all."""
    assert module not in imported()


def test_dir_offers_what_users_may_use() -> None:
    """Of a fresh process: others import modules of the package, which become its attributes."""
    offered = run("import fremap, fremap.cli; print(*dir(fremap))").split()
    assert {name for name in offered if not name.startswith("__")} <= set(fremap.__all__)
    assert "__version__" in offered


def test_names_are_there_before_they_are_loaded() -> None:
    run("import fremap; assert set(fremap.__all__) <= set(dir(fremap))")
    run("from fremap import *; assert Slots and Batches and WindowStats and calibration.load")
    run("import fremap, fremap.rows; assert callable(fremap.rows)")
    assert "no attribute 'Slot'" in run(
        """
import fremap
try:
    fremap.Slot
except AttributeError as error:
    print(error)
"""
    )


def test_who_checks_types_is_not_told_that_every_name_is_there() -> None:
    """A `__getattr__` that they see makes any misspelt name one of type Any."""
    tree = ast.parse(Path(fremap.__file__).read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert "__dir__" in functions
    assert "__getattr__" not in functions
