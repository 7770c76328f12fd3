"""The table of these tests, and what they do to processes of Ray."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

COUNTS = (7, 400, 1, 293)
TABLE = np.arange(sum(COUNTS) * 12, dtype=np.float32).reshape(-1, 12)


def processes_of(folder: str) -> list[str]:
    """What processes there are whose command names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if folder in command:
            found.append(f"{path.parent.name}: {command}")
    return found


def wait_until(happened: Callable[[], bool], what: str) -> None:
    """Wait for what another process does; fail where it does not in half a minute."""
    until = time.monotonic() + 30
    while not happened():
        if time.monotonic() > until:
            pytest.fail(f"{what} after 30 s")
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """Have an actor do nothing for a while."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not alive(process), f"process {process} is alive")


def opened(parts: list[Path]) -> Any:
    """The table by three actors on two nodes; the second actor has two files, one of one row."""
    from fremap.ray import DistributedRows

    options = [{}, {"resources": {"second": 1}}, {}]
    return DistributedRows([parts[0], parts[1:3], parts[3]], actor_options=options)


def actors_of(table: Any) -> list[int]:
    """The processes of a table's actors as they are now, after restarts."""
    import ray

    return [
        opened.process
        for opened in ray.get([shard.actor.opened.remote() for shard in table._shards])
    ]
