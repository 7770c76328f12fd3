"""`Prot`: whether a page may be read, written, or not touched at all."""

from __future__ import annotations

import enum
from typing import SupportsIndex

from fremap.errors import ArgumentError, ArgumentTypeError

__all__ = ["Prot"]


class Prot(enum.IntFlag):
    """What may be done with a page of a window.

    `WRITE` includes reading, as it does in every page table. The numbers are
    those of `PROT_NONE`, `PROT_READ` and `PROT_READ | PROT_WRITE`.

    Examples
    --------
    >>> from fremap import Prot
    >>> Prot.READ in Prot.WRITE
    True
    """

    NONE = 0
    READ = 1
    WRITE = 3


def checked_prot(prot: SupportsIndex) -> Prot:
    """Return `prot` as one of the three; `mmap.PROT_WRITE` counts as `WRITE`."""
    if isinstance(prot, bool):
        raise ArgumentTypeError(f"prot must be a fremap.Prot, not {prot!r}")
    try:
        bits = prot.__index__()
    except AttributeError:
        raise ArgumentTypeError(f"prot must be a fremap.Prot, not {prot!r}") from None
    if bits == 0b10:
        return Prot.WRITE
    if bits not in (0, 1, 3):
        raise ArgumentError(f"prot is {bits}; it must be Prot.NONE, Prot.READ or Prot.WRITE")
    return Prot(bits)
