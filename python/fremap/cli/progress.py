"""The progress of a long command: a bar if rich is installed, else a line of plain text.

Both are drawn on standard error, and only on a terminal: files and pipes get nothing of it.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from fremap.cli.report import size

Advance: TypeAlias = Callable[[int], None]

REDRAW_SECONDS = 0.1


def line(what: str, done: int, total: int, seconds: float) -> str:
    """Return the state as plain text.

    Examples
    --------
    >>> line("big.bin", 1 << 30, 4 << 30, 2.0)
    'big.bin: 25 %, 1.0 GiB of 4.0 GiB, 512.0 MiB/s, 6 s left'
    """
    share = 100 * done // max(total, 1)
    text = f"{what}: {share} %, {size(done)} of {size(total)}"
    if done and seconds > 0:
        rate = done / seconds
        text += f", {size(rate)}/s, {(total - done) / rate:.0f} s left"
    return text


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Advance]:
    """Yield a function to call with the number of bytes that have been done.

    Parameters
    ----------
    what : str
        What is being done, a file's name mostly.
    total : int
        Bytes to be done.

    Yields
    ------
    callable
        Takes a number of bytes.
    """
    if not sys.stderr.isatty():
        yield lambda _count: None
    elif importlib.util.find_spec("rich") is not None:
        with _bar(what, total) as advance:
            yield advance
    else:
        with _text(what, total) as advance:
            yield advance


@contextmanager
def _bar(what: str, total: int) -> Iterator[Advance]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _text(what: str, total: int) -> Iterator[Advance]:
    begin = time.monotonic()
    done, drawn = 0, begin - REDRAW_SECONDS

    def advance(count: int) -> None:
        nonlocal done, drawn
        done += count
        now = time.monotonic()
        if now - drawn >= REDRAW_SECONDS:
            drawn = now
            sys.stderr.write(f"\r\033[K{line(what, done, total, now - begin)}")
            sys.stderr.flush()

    try:
        yield advance
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
