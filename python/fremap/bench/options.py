"""How the command reads numbers and sizes from its arguments, and its exit codes."""

import argparse

from fremap.sizes import size_bytes

EXIT_CODES = """exit codes:
  0    it worked
  1    it did not; standard error says why
  2    the arguments are wrong
  130  Ctrl-C"""


def positive(text: str) -> int:
    """Return a number that is at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def byte_size(text: str) -> int:
    """Return a number of bytes from a text such as 4096, 64M, 1G or 1GiB; units are of 1024."""
    size = size_bytes(text)
    if size is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; give a number of bytes, with K, M, G or T for larger units"
        )
    return positive(str(size))
