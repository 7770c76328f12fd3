"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(\d{1,19}) ?([KMGT]?)(?:I?B)?", re.ASCII)


def size_bytes(text: str) -> int | None:
    """Return the bytes that a text such as 4096, 64M, 1G or 1GiB says; None if it is no size.

    Units are of 1024.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    return None if match is None else int(match[1]) << _UNITS[match[2]]
