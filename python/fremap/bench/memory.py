"""Limits of memory for a process and its page cache: control groups, where we may make one."""

import contextlib
import os
import time
from pathlib import Path
from typing import Self

_ROOT = Path("/sys/fs/cgroup")
_REMOVAL_TRIES = 50


class MemoryGroup:
    """A control group of our own below the one that we are in; leaving the context removes it.

    Memory that its processes take is counted there, and so is the page cache that
    they are the first to fill.
    """

    def __init__(self, path: Path, *, version: int) -> None:
        self._path = path
        self._usage = "memory.usage_in_bytes" if version == 1 else "memory.current"
        self._limit = "memory.limit_in_bytes" if version == 1 else "memory.max"

    @classmethod
    def new(cls, name: str) -> "MemoryGroup | None":
        """Make one, or return None where there can be none."""
        for parent, version in _parents():
            path = parent / f"fremap-bench-{os.getpid()}-{name}"
            try:
                path.mkdir()
            except OSError:
                continue
            group = cls(path, version=version)
            if (path / group._limit).exists():
                return group
            path.rmdir()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # The kernel needs a moment to see that the last process is gone.
        for _ in range(_REMOVAL_TRIES):
            with contextlib.suppress(FileNotFoundError):
                try:
                    self._path.rmdir()
                except OSError:
                    time.sleep(0.02)
                    continue
            return

    def child(self) -> "MemoryGroup":
        """Make a group in this one, with no limit of its own."""
        path = self._path / "child"
        path.mkdir()
        return MemoryGroup(path, version=1 if self._usage == "memory.usage_in_bytes" else 2)

    def add(self, pid: int) -> None:
        """Put a process into it."""
        (self._path / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def limit_further(self, bytes_more: int) -> None:
        """Let it take so much more than it has now."""
        usage = int((self._path / self._usage).read_text(encoding="ascii"))
        (self._path / self._limit).write_text(str(usage + bytes_more), encoding="ascii")


def _parents() -> list[tuple[Path, int]]:
    """Return the groups that we are in, with their version."""
    parents = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            parents.append((_ROOT / "memory" / path.lstrip("/"), 1))
        elif not controllers:
            parents.append((_ROOT / path.lstrip("/"), 2))
    return parents
