"""How much memory a command may use."""

from fremap import _core


def available_bytes() -> int:
    """Return what this process may still have: MemAvailable, or less in a cgroup."""
    return _core.available_memory()
