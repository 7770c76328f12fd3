"""What is done about windows that are open when the interpreter ends."""

from __future__ import annotations

import atexit
import sys
import weakref
from typing import Protocol

from fremap.errors import FremapError

__all__ = ["flush_at_exit"]


class Flushable(Protocol):
    """Something that keeps changes until it is flushed."""

    def _flush_at_end(self) -> None: ...


_open: weakref.WeakSet[Flushable] = weakref.WeakSet()


def flush_at_exit(window: Flushable) -> None:
    """Flush `window` when the interpreter ends, if it is open by then.

    Parameters
    ----------
    window : Flushable
        Is not kept alive by this.
    """
    if not _open:
        # Once more if all of the first were gone: flushing twice does nothing.
        atexit.register(_flush_all)
    _open.add(window)


def _flush_all() -> None:
    """Flush what is open; nobody is there to raise to."""
    for window in tuple(_open):
        try:
            window._flush_at_end()  # noqa: SLF001 - the window's other half
        except (FremapError, KeyboardInterrupt) as error:
            sys.stderr.write(f"fremap: a window was not flushed at the end: {error!r}\n")
