"""Batch sizes and crossover points of windows: built-in values, or those of this machine.

The patch of 2002 wanted the choice between dropping single pages and whole ranges to be
"calibrated at boot time". Windows use built-in values until you measure this machine, by
``fremap calibrate`` or `measure`. The result is kept in
``$XDG_CACHE_HOME/fremap/calibration.json`` (``~/.cache`` by default) for each kind of machine
and kernel, and used from then on. Importing fremap or making a window measures nothing and
writes no file.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from fremap import _core
from fremap.errors import ArgumentError, StoreError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Calibration", "CalibrationWarning", "cache_path", "kept", "load", "measure", "save"]

_FORMAT = 2
_MACHINES_MAX = 64  # a home directory may be shared by many; the oldest entry goes first
_FILE_BYTES_MAX = 1 << 20  # far more than so many machines take
_LIMITS = {
    "alias_extent_pages": (0, 2**32),
    "evict_gap_pages": (0, 2**32),
    "batch_pages": (1, 4096),
}


class CalibrationWarning(RuntimeWarning):
    """The kept calibration is damaged; the built-in values are used instead."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Batch sizes and crossover points.

    Attributes
    ----------
    alias_extent_pages : int
        Extents of at least this many system pages are cheaper to map than to copy.
    evict_gap_pages : int
        Two runs of pages are evicted by one call if at most this many absent pages lie between
        them.
    batch_pages : int
        Number of pages that are read before they are moved into the window together, from 1 to
        4096.

    Examples
    --------
    >>> import dataclasses, fremap
    >>> store = fremap.MemoryStore(1 << 20)
    >>> mine = dataclasses.replace(fremap.calibration.load(), batch_pages=256)
    >>> fremap.Window(store, calibration=mine).close()
    """

    alias_extent_pages: int
    evict_gap_pages: int
    batch_pages: int

    def __post_init__(self) -> None:
        """Refuse numbers that no window can use."""
        for field in fields(self):
            value = getattr(self, field.name)
            least, most = _LIMITS[field.name]
            if type(value) is not int or not least <= value <= most:
                raise ArgumentError(
                    f"Calibration: {field.name} is {_short(value)}; it must be a number of pages "
                    f"from {least} to {most}"
                )

    def to_dict(self) -> dict[str, int]:
        """Return the values by name.

        Returns
        -------
        dict of str to int
            As the JSON file holds them.
        """
        return asdict(self)


# What windows of this process use, by the path it was read from. Two threads that begin
# together may both read; no lock, which a fork could leave locked.
_known: dict[str | None, Calibration] = {}


def cache_path() -> Path | None:
    """Return where calibrations are kept.

    Returns
    -------
    Path or None
        ``$XDG_CACHE_HOME/fremap/calibration.json``, or under ``~/.cache``; None where
        neither variable is set and this user has no home directory.
    """
    from pathlib import Path

    path = _cache_file()
    return None if path is None else Path(path)


def _cache_file() -> str | None:
    """Return the path by strings alone: a window imports nothing, as it may lack descriptors."""
    root: str | None = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of XDG says that a relative path is to be ignored.
    if not os.path.isabs(root or ""):
        home = _home()
        root = None if home is None else os.path.join(home, ".cache")
    return None if root is None else os.path.join(root, "fremap", "calibration.json")


def _home() -> str | None:
    """Return this user's home directory, or None: containers run as users that have none."""
    home = os.environ.get("HOME", "")
    if not home:
        import pwd

        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            return None
    return home if home.startswith("/") else None


def measure(*, keep: bool = True) -> Calibration:
    """Measure this machine, and keep the result for windows of later processes and this one.

    Parameters
    ----------
    keep : bool, default True
        `save` what was measured. False returns it and changes nothing.

    Returns
    -------
    Calibration
        The values of this machine.

    Raises
    ------
    StoreError
        There is no memory to measure with, or the result cannot be kept.

    Notes
    -----
    Maps, copies and drops a few hundred pages of its own; under 200 ms.
    """
    measured = Calibration(**_core.calibrate())
    if keep:
        save(measured)
    return measured


def load() -> Calibration:
    """Return the calibration that windows use by default.

    Returns
    -------
    Calibration
        The calibration that was kept for this machine and kernel, or built-in values.

    Warns
    -----
    CalibrationWarning
        The file is damaged, and the built-in values are used. Raised once for each process.

    Notes
    -----
    Reads one small file, once a process; measures and writes nothing. Any number of threads and
    processes may call this.
    """
    path = _cache_file()
    known = _known.get(path)
    if known is not None:
        return known
    entries, damage = _read(path)
    found = entries.get(_machine()) or Calibration(**_core.default_calibration())
    chosen = _known.setdefault(path, found)
    if damage and chosen is found:
        warnings.warn(
            f"fremap.calibration: {path} {damage}, so the built-in values are used; run "
            "`fremap calibrate` to measure again, or remove the file",
            CalibrationWarning,
            stacklevel=2,
        )
    return chosen


def kept() -> Calibration | None:
    """Return the calibration that was kept for this machine and kernel.

    Returns
    -------
    Calibration or None
        None if no usable one is kept.
    """
    entries, _ = _read(_cache_file())
    return entries.get(_machine())


def save(calibration: Calibration) -> None:
    """Keep a calibration for this kind of machine and kernel.

    Parameters
    ----------
    calibration : Calibration
        The calibration that `load` returns from now on.

    Raises
    ------
    StoreError
        The file or its directory cannot be written.

    Notes
    -----
    The file is replaced by ``rename(2)``: readers see the old or the new.
    """
    path = cache_path()
    if path is None:
        raise StoreError(
            errno.ENOENT,
            "calibration: this user has no home directory to keep it in; set XDG_CACHE_HOME, or "
            "pass Window(calibration=...)",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries, _ = _read(os.fspath(path))
        key = _machine()
        entries.pop(key, None)  # so that it becomes the newest
        entries[key] = calibration
        _replace(path, dict(list(entries.items())[-_MACHINES_MAX:]))
    except OSError as error:
        raise StoreError(
            error.errno,
            f"calibration: {error.strerror}; make the directory writable, set XDG_CACHE_HOME, or "
            "pass Window(calibration=...)",
            str(path),
        ) from error
    _known[os.fspath(path)] = calibration


def _replace(path: Path, entries: dict[str, Calibration]) -> None:
    import json

    text = json.dumps(
        {"format": _FORMAT, "machines": {key: entry.to_dict() for key, entry in entries.items()}},
        indent=1,
    )
    draft = path.with_name(f"{path.name}.{os.urandom(6).hex()}")
    try:
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: str | None) -> tuple[dict[str, Calibration], str]:
    """Return the kept calibrations by machine, and what is wrong with the file if it is damaged."""
    try:
        text = None if path is None else _text(path)
        if text is None:
            return {}, ""
        import json

        return _parse(json.loads(text)), ""
    # A file that nests deeply is a RecursionError; what is no calibration at all, an ArgumentError.
    except (ValueError, RecursionError) as error:
        return {}, f"is damaged ({_short(error)})"
    except OSError as error:
        return {}, f"cannot be read ({error.strerror})"


def _text(path: str) -> str | None:
    """Return what the file holds, or None where there is none for this user."""
    try:
        # A FIFO in its place may have no writer, and a terminal must not become this process's.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None  # HOME is another user's where a command runs by `sudo` or in a container
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is not a regular file")
        content = os.read(fd, _FILE_BYTES_MAX + 1)
    finally:
        os.close(fd)
    if len(content) > _FILE_BYTES_MAX:
        raise ValueError(f"it has more than {_FILE_BYTES_MAX} bytes")
    return content.decode("utf-8")


def _parse(document: Any) -> dict[str, Calibration]:
    if not isinstance(document, dict) or "format" not in document:
        raise ValueError("it names no format")
    if document["format"] != _FORMAT:
        return {}  # another version's: not damaged, just of no use
    machines = document.get("machines")
    if not isinstance(machines, dict):
        raise ValueError("it lists no machines")
    return {key: _entry(values) for key, values in machines.items()}


def _entry(values: Any) -> Calibration:
    if not isinstance(values, dict) or values.keys() != _LIMITS.keys():
        raise ValueError(f"an entry must have the numbers {', '.join(_LIMITS)}")
    return Calibration(**values)


def _short(value: object) -> str:
    """Return a text of what may be of any size."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _machine() -> str:
    """Name what the measurement depends on: processor, their number, and kernel."""
    system = os.uname()
    return f"{_processor()} x {os.cpu_count()}, {system.machine}, Linux {system.release}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return "unknown processor"  # /proc may be hidden; the rest of the key still holds
    return "unnamed processor"
