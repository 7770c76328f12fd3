"""How much memory a command may use."""

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cgroup_room() -> int | None:
    """Return the bytes left below this process's cgroup limit (version 2), or None."""
    entries = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((entry[4:] for entry in entries if entry.startswith("0::/")), "")
    room = None
    folder = CGROUP / path
    while folder.is_relative_to(CGROUP):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
            left = max(0, int(most) - int(used.read_text()))
            room = left if room is None else min(room, left)
        folder = folder.parent
    return room


def available_bytes() -> int:
    """Return what can be allocated without swapping: MemAvailable, or less in a cgroup."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    room = cgroup_room()
    return available * 1024 if room is None else min(available * 1024, room)
