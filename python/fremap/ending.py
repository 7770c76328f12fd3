"""What is done about windows that are open when the interpreter ends."""

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
# The process that has said what is done at its end; a child of fork has to say it anew.
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
    """Flush what is open; nobody is there to raise to."""
    for window in tuple(_open):
        try:
            window._flush_at_end()  # noqa: SLF001 - the window's other half
        except (FremapError, KeyboardInterrupt) as error:
            sys.stderr.write(f"fremap: a window was not flushed at the end: {error!r}\n")
