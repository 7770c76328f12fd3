"""Counting the system calls that fremap makes, and making some of them fail.

Counters and failures are those of the process: a test that uses them runs
nothing else of fremap beside it. Names of calls are the kernel's
(`sorted(system_calls())` lists them). A name that ends in `_answer` is no call: it
stands for what the kernel answers to one that it has carried out.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from fremap import _core

if TYPE_CHECKING:
    from collections.abc import Iterator


def system_calls() -> dict[str, int]:
    """How many system calls of each kind fremap has made in this process.

    Returns
    -------
    dict of str to int
        Counts by the kernel's name of the call.
    """
    return _core.system_calls()


class Calls:
    """System calls made since the counting began.

    Parameters
    ----------
    before : dict of str to int
        The counts to subtract.
    """

    def __init__(self, before: dict[str, int]) -> None:
        self._before = before
        self._after: dict[str, int] | None = None

    def __getitem__(self, call: str) -> int:
        """Count of one kind of call."""
        after = system_calls() if self._after is None else self._after
        return after[call] - self._before[call]

    @property
    def made(self) -> dict[str, int]:
        """The kinds that were made, and how often."""
        return {call: self[call] for call in self._before if self[call]}

    def stop(self) -> None:
        """Count no further."""
        self._after = system_calls()


@contextmanager
def counting() -> Iterator[Calls]:
    """Count the system calls of a block.

    Yields
    ------
    Calls
        `calls["mmap"]` while the block runs and after it.

    Examples
    --------
    >>> from fremap.testing import counting
    >>> with counting() as calls:
    ...     pass
    >>> calls["mmap"]
    0
    """
    calls = Calls(system_calls())
    try:
        yield calls
    finally:
        calls.stop()


@contextmanager
def failures(call: str, *, errno: int, skip: int = 0, times: int = 1) -> Iterator[Calls]:
    """Make system calls of one kind fail while a block runs.

    Parameters
    ----------
    call : str
        The kernel's name of the call.
    errno : int
        What the call answers in place of being made.
    skip : int
        Calls of this kind that are made before the first one fails.
    times : int
        Calls that fail, one after the other.

    Yields
    ------
    Calls
        Counts of the block; a failed call is counted. The failure was met if
        `calls[call] > skip`.
    """
    calls = Calls(system_calls())
    _core.inject_failure(call, skip, errno, times)
    try:
        yield calls
    finally:
        _core.clear_failures()
        calls.stop()


@contextmanager
def short_writes(call: str, *, most_bytes: int, skip: int = 0, times: int = 1) -> Iterator[Calls]:
    """Make writes fall short while a block runs, as those to a full device do.

    Parameters
    ----------
    call : {"write", "io_uring_write_answer"}
        The calls that fall short; or what the kernel answers to writes of a ring, which
        it has made in full.
    most_bytes : int
        What such a call writes, or answers, at most.
    skip : int
        Calls of this kind that are made before the first one falls short.
    times : int
        Calls that fall short, one after the other.

    Yields
    ------
    Calls
        Counts of the block. A call fell short if `calls[call] > skip`.
    """
    calls = Calls(system_calls())
    _core.inject_short(call, skip, most_bytes, times)
    try:
        yield calls
    finally:
        _core.clear_failures()
        calls.stop()
