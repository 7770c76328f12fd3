"""Programs that `tests/prepared_python.py` runs, after one that was given up."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

import pytest
from prepared_python import PreparedPython

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.once

HANGS = """
import os, time
os.close(1), os.close(2)
time.sleep(3)
"""
SAYS = """
import sys
print("here")
sys.exit(5)
"""


class Stopped(BaseException):
    pass


@pytest.fixture
def python() -> Iterator[PreparedPython]:
    made = PreparedPython()
    yield made
    made.close()


def check(python: PreparedPython, program: Path) -> None:
    done = python.run(program)
    assert (done.returncode, done.stdout, done.stderr) == (5, "here\n", "")


def test_one_that_takes_too_long(python: PreparedPython, tmp_path: Path) -> None:
    slow, says = tmp_path / "slow.py", tmp_path / "says.py"
    slow.write_text("import time; time.sleep(60)")
    says.write_text(SAYS)
    check(python, says)
    with pytest.raises(TimeoutError, match="for longer than"):
        python.run(slow, timeout=0.5)
    check(python, says)


def test_a_wait_for_the_end_that_is_interrupted(python: PreparedPython, tmp_path: Path) -> None:
    """As by the time limit of a test: the next program is not given this one's end."""
    hangs, says = tmp_path / "hangs.py", tmp_path / "says.py"
    hangs.write_text(HANGS)
    says.write_text(SAYS)
    check(python, says)

    def stop(_number: int, _frame: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGUSR1, stop)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(1, signal.pthread_kill, [main, signal.SIGUSR1])
    try:
        timer.start()
        with pytest.raises(Stopped):
            python.run(hangs)
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)
    check(python, says)
