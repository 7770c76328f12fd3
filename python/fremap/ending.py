"""Flushing windows that are still open when the interpreter exits."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from typing import Protocol

from fremap.errors import FremapError

__all__ = ["flush_at_exit"]


class Flushable(Protocol):
    """Something that keeps changes until it is flushed."""

    def _flush_at_end(self) -> None: ...


_open: weakref.WeakSet[Flushable] = weakref.WeakSet()
# The process that has registered its exit handler; a child of fork must register its own.
_registered_by: list[int] = []
_LAST = -100  # among the finalizers of a child of multiprocessing


def flush_at_exit(window: Flushable) -> None:
    """Flush `window` when the interpreter ends, if it is open by then.

    Parameters
    ----------
    window : Flushable
        Is not kept alive by this.
    """
    if _registered_by[-1:] != [os.getpid()]:
        _registered_by[:] = [os.getpid()]
        atexit.register(_flush_all)
        # A child of multiprocessing ends without them, after its own finalizers.
        processes = sys.modules.get("multiprocessing.util")
        if processes is not None:
            processes.Finalize(None, _flush_all, exitpriority=_LAST)
    _open.add(window)


def _flush_all() -> None:
    """Flush open windows; report failures on stderr, as no caller is left to raise to."""
    for window in tuple(_open):
        try:
            window._flush_at_end()  # noqa: SLF001 - the window's other half
        except (FremapError, KeyboardInterrupt) as error:
            sys.stderr.write(f"fremap: a window was not flushed at the end: {error!r}\n")
