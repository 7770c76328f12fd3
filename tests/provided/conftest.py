"""Lets provider processes find the functions of `fills`."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from servers import Served, Server

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def server() -> "Iterator[Server]":
    from servers import running_server

    with running_server() as server:
        yield server


@pytest.fixture
def other() -> "Iterator[Server]":
    """Another server, with the same object."""
    from servers import running_server

    with running_server() as server:
        yield server


@pytest.fixture
def served(server: "Server") -> "Served":
    return server.served


@pytest.fixture
def gone() -> Callable[[list[int]], None]:
    """`gone(processes)` waits until none of them is there any more."""

    def wait(processes: list[int]) -> None:
        assert processes
        deadline = time.monotonic() + 30
        while left := [process for process in processes if runs(process)]:
            assert time.monotonic() < deadline, f"{left} still run"
            time.sleep(0.01)

    return wait


@pytest.fixture
def started() -> Callable[[], list[int]]:
    """`started()` returns the processes that this one has started during the test."""
    before = set(children())
    return lambda: [process for process in children() if process not in before]


def children() -> list[int]:
    """The processes that this one has started and that run."""
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [number for number in numbers if parent(number) == os.getpid() and runs(number)]


def parent(process: int) -> int | None:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return None
    return int(status.rpartition(")")[2].split()[1])


def runs(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
