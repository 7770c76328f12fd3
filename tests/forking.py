"""Children of fork that tell what was raised in them."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def fork(body: Callable[[], None], writing: int) -> int:
    """Run `body` in a child of fork, which ends with its parent; return the child's number.

    What it raises is written to the pipe `writing`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads take no part
        child = os.fork()
    if child == 0:
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        try:
            body()
            os._exit(0)
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(1)
    return child
