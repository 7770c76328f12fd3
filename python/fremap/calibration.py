"""What things cost on this machine, measured once and kept.

The patch of 2002 asked for the choice between dropping single pages and whole
ranges to be "calibrated at boot time". Here a few batch sizes and crossover
points are measured the first time a window is made, in under 200 ms, and kept
in ``$XDG_CACHE_HOME/fremap/calibration.json`` (``~/.cache`` by default) for
each kind of machine and kernel. `load` shows them, `Window(calibration=...)`
overrides them, and removing the file measures them again.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from fremap import _core
from fremap.errors import ArgumentError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Calibration", "CalibrationWarning", "cache_path", "load", "measure", "save"]

_FORMAT = 2
_MACHINES_MAX = 64  # a home directory may be shared by many; the oldest entry goes first


class CalibrationWarning(RuntimeWarning):
    """The kept calibration cannot be read or written; it is measured again instead."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Batch sizes and crossover points.

    Attributes
    ----------
    alias_extent_pages : int
        Extents of so many system pages or more are cheaper to map than to copy.
    evict_gap_pages : int
        Two runs to evict are dropped by one call if no more absent pages than
        this lie between them.
    batch_pages : int
        Pages read before they are swapped into the window together; 4096 at most.

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
        """Refuse what is no number of pages."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ArgumentError(
                    f"Calibration: {field.name} is {value!r}; it must be a number of pages"
                )

    def to_dict(self) -> dict[str, int]:
        """Return the values by name.

        Returns
        -------
        dict of str to int
            As the JSON file holds them.
        """
        return asdict(self)


# What was loaded or measured, so that it is so once a process. Two threads that
# begin together may both measure; no lock, which a fork could leave locked.
_known: dict[Path, Calibration] = {}


def cache_path() -> Path:
    """Return where calibrations are kept.

    Returns
    -------
    Path
        ``$XDG_CACHE_HOME/fremap/calibration.json``, or under ``~/.cache``.
    """
    from pathlib import Path

    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of XDG says that a relative path is to be ignored.
    root = Path(base) if base.startswith("/") else Path("~/.cache").expanduser()
    return root / "fremap" / "calibration.json"


def measure() -> Calibration:
    """Measure now, and keep nothing.

    Returns
    -------
    Calibration
        What this machine costs at this moment.

    Raises
    ------
    StoreError
        There is no memory to measure with.

    Notes
    -----
    Maps, copies and drops a few hundred pages of its own; under 200 ms.
    """
    return Calibration(**_core.calibrate())


def load() -> Calibration:
    """Return this machine's calibration: the kept one, else measured now and kept.

    Returns
    -------
    Calibration
        What windows use unless they are told otherwise.

    Warns
    -----
    CalibrationWarning
        The file is damaged, or cannot be read or written. The calibration is
        then measured, once a process.

    Notes
    -----
    Reads one small file. Any number of threads and processes.
    """
    path = cache_path()
    known = _known.get(path)
    if known is not None:
        return known
    kept = _read(path).get(_machine())
    if kept is not None:
        return _known.setdefault(path, kept)
    fresh = _known.setdefault(path, measure())
    try:
        save(fresh)
    except OSError as error:
        _warn(f"cannot keep the calibration: {error}")
    return fresh


def save(calibration: Calibration) -> None:
    """Keep a calibration for this kind of machine and kernel.

    Parameters
    ----------
    calibration : Calibration
        What `load` is to return from now on.

    Raises
    ------
    OSError
        The file or its directory cannot be written.

    Notes
    -----
    The file is replaced by ``rename(2)``: readers see the old or the new.
    """
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _read(path)
    key = _machine()
    entries.pop(key, None)  # so that it becomes the newest
    entries[key] = calibration
    _replace(path, dict(list(entries.items())[-_MACHINES_MAX:]))
    _known[path] = calibration


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


def _read(path: Path) -> dict[str, Calibration]:
    """Return the kept calibrations by machine; none, with a warning, if the file is no good."""
    import json

    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        _warn(f"cannot read {path}: {error}")
        return {}
    try:
        return _parse(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _warn(f"{path} is damaged and is made anew: {error!r}")
        return {}


def _parse(document: Any) -> dict[str, Calibration]:
    if document["format"] != _FORMAT:
        return {}  # another version's: not damaged, just of no use
    return {key: Calibration(**values) for key, values in document["machines"].items()}


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


def _warn(message: str) -> None:
    warnings.warn(f"fremap.calibration: {message}", CalibrationWarning, stacklevel=3)
