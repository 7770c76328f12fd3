"""What this kernel and process may do for fremap, found out by trying."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fremap import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT_COLUMNS = 66  # beside the names in a terminal of 100

__all__ = ["Capabilities", "EngineStatus", "Probe", "capabilities"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing that a kernel may have and a process be allowed.

    Attributes
    ----------
    available : bool
        Whether it works in this process.
    detail : str
        What was found.
    remedy : str
        How to get it; empty where it is there or nothing helps.
    """

    available: bool
    detail: str
    remedy: str


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Whether an engine works here.

    Attributes
    ----------
    available : bool
        Whether windows can use it.
    detail : str
        Why not; empty where it works.
    """

    available: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What works here; `str()` of it is a table to read.

    Attributes
    ----------
    kernel : str
        The kernel's release.
    max_map_count : int
        ``vm.max_map_count``: kernel mappings that a process may have.
    memlock_limit : int or None
        Bytes that this process may lock (``RLIMIT_MEMLOCK``); None: no limit.
    probes : Mapping of str to Probe
        Each capability by name.
    engines : Mapping of str to EngineStatus
        Each engine by name.
    chosen : str
        The engine of a window that leaves the choice to fremap (read-only,
        nothing said of `coherent`); "none" where none works.
    reason : str
        Why that one.
    """

    kernel: str
    max_map_count: int
    memlock_limit: int | None
    probes: Mapping[str, Probe]
    engines: Mapping[str, EngineStatus]
    chosen: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, strings and numbers, as for JSON.

        Returns
        -------
        dict
            The attributes by name.
        """
        fields = ("available", "detail", "remedy")
        return {
            "kernel": self.kernel,
            "max_map_count": self.max_map_count,
            "memlock_limit": self.memlock_limit,
            "probes": {
                name: {field: getattr(probe, field) for field in fields}
                for name, probe in self.probes.items()
            },
            "engines": {
                name: {"available": engine.available, "detail": engine.detail}
                for name, engine in self.engines.items()
            },
            "chosen": self.chosen,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        """Return a table of what works, what is chosen, and what to do about the rest."""
        lines = [f"Linux {self.kernel}, vm.max_map_count {self.max_map_count}", "engines"]
        for name, engine in self.engines.items():
            lines += _row(_tick(engine.available), name, engine.detail)
        lines += _row("use", self.chosen, self.reason)
        lines.append("capabilities")
        for name, probe in self.probes.items():
            lines += _row(_tick(probe.available), name, probe.detail)
            if probe.remedy and not probe.available:
                lines += _row("", "", f"to get it: {probe.remedy}")
        return "\n".join(lines)


def _tick(available: bool) -> str:  # noqa: FBT001 - a mark for a truth value
    return "yes" if available else "no"


def _row(mark: str, name: str, text: str) -> list[str]:
    """Return a row of the table, its text wrapped in the last column."""
    import textwrap

    head = f"  {mark:<3} {name:<26}"
    wrapped = textwrap.wrap(text, _TEXT_COLUMNS) or [""]
    indent = " " * len(head)
    rows = [f"{indent}{line}" for line in wrapped]
    rows[0] = f"{head}{wrapped[0]}".rstrip()
    return rows


def capabilities() -> Capabilities:
    """Find out what this kernel and process may do, which engines work, which is chosen.

    Returns
    -------
    Capabilities
        A snapshot: limits and rights may change while a process runs.

    Notes
    -----
    Each probe makes the real system call on a page of its own and undoes it;
    all together take about a millisecond. Any number of threads.

    Examples
    --------
    >>> import fremap
    >>> found = fremap.capabilities()
    >>> found.engines["alias"].available
    True
    """
    found: dict[str, Any] = _core.capabilities()
    engines = {
        name: EngineStatus(refusal is None, (refusal or "").removeprefix("Window: "))
        for name, refusal in found["engines"].items()
    }
    chosen = found["chosen"]
    return Capabilities(
        kernel=found["kernel"],
        max_map_count=found["max_map_count"],
        memlock_limit=found["memlock_limit"],
        probes=MappingProxyType({name: Probe(*values) for name, values in found["probes"].items()}),
        engines=MappingProxyType(engines),
        chosen=chosen,
        reason=_reason(chosen),
    )


def _reason(chosen: str) -> str:
    if chosen == "paged":
        return "any order is one kernel mapping, and pages are swapped in whole"
    if chosen == "none":
        return "windows need Linux 5.14; rows and stores work"
    return "the best of those that work here"
