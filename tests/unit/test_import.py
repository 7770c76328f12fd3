"""`import fremap` does nothing but import, and little of that."""

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["multiprocessing", "subprocess", "rich", "hypothesis", "argparse", "asyncio", "matplotlib"],
)
def test_what_is_not_needed_is_not_imported(module: str) -> None:
    assert run(f"import fremap, sys; print({module!r} in sys.modules)") == "False"


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
