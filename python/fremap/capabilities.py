"""Which features of the kernel this process can use; each is tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fremap import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT_COLUMNS = 66  # beside the names in a terminal of 100

__all__ = ["Capabilities", "EngineStatus", "Probe", "capabilities"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One feature of the kernel, and whether this process may use it.

    Attributes
    ----------
    available : bool
        Whether it works in this process.
    detail : str
        What it is used for, or why it is missing.
    remedy : str
        How to get it; empty if it is available.
    since : str
        The kernels that have it; empty if it does not depend on the kernel.
    used_for : str
        What uses it.
    without : str
        What is lost or slower without it.
    """

    available: bool
    detail: str
    remedy: str
    since: str
    used_for: str
    without: str


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Whether an engine works here.

    Attributes
    ----------
    available : bool
        Whether windows can use it.
    detail : str
        Why not; empty if it works.
    """

    available: bool
    detail: str


@dataclass(frozen=True, slots=True, repr=False)
class Capabilities:
    """What works here; `str()` of it is a table to read.

    Attributes
    ----------
    version : str
        The version of fremap.
    python : str
        The version of Python.
    kernel : str
        The kernel's release.
    max_map_count : int
        ``vm.max_map_count``: kernel mappings that a process may have.
    memlock_limit : int or None
        Bytes that this process may lock (``RLIMIT_MEMLOCK``); None: no limit.
    limits : Mapping of str to (int or None)
        Limits of this process by name (``RLIMIT_AS``, ...); None: no limit.
    available_bytes : int or None
        Memory that this process can still use: what the machine has available, or less if a
        memory cgroup leaves less. None if the kernel does not say.
    auto_budget_bytes : int or None
        Bytes that all objects with ``budget="auto"`` share; None if the kernel does not say.
    probes : Mapping of str to Probe
        Each capability by name.
    engines : Mapping of str to EngineStatus
        Each engine by name.
    chosen : str
        The engine of a read-only window with default options; "none" if no engine works.
    reason : str
        Why this engine.
    """

    version: str
    python: str
    kernel: str
    max_map_count: int
    memlock_limit: int | None
    limits: Mapping[str, int | None]
    available_bytes: int | None
    auto_budget_bytes: int | None
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
        return {
            "version": self.version,
            "python": self.python,
            "kernel": self.kernel,
            "max_map_count": self.max_map_count,
            "memlock_limit": self.memlock_limit,
            "limits": dict(self.limits),
            "available_bytes": self.available_bytes,
            "auto_budget_bytes": self.auto_budget_bytes,
            "probes": {name: asdict(probe) for name, probe in self.probes.items()},
            "engines": {
                name: {"available": engine.available, "detail": engine.detail}
                for name, engine in self.engines.items()
            },
            "chosen": self.chosen,
            "reason": self.reason,
        }

    def __repr__(self) -> str:
        """Describe it in a line."""
        engines = [name for name, engine in self.engines.items() if engine.available]
        missing = [name for name, probe in self.probes.items() if not probe.available]
        lacking = f", without {', '.join(missing)}" if missing else ""
        return (
            f"<fremap.Capabilities of Linux {self.kernel}: engines {', '.join(engines) or 'none'}"
            f"{lacking}; print() shows a table>"
        )

    def __str__(self) -> str:
        """Return a table of what works, what is chosen, and what to do about the rest."""
        lines = [f"fremap {self.version}, Python {self.python}, Linux {self.kernel}", "engines"]
        for name, engine in self.engines.items():
            lines += _row(_tick(engine.available), name, engine.detail)
        lines += _row("use", self.chosen, self.reason)
        lines.append("capabilities")
        for name, probe in self.probes.items():
            lines += _row(_tick(probe.available), name, probe.detail)
            if not probe.available:
                if not probe.remedy.startswith("comes with"):  # userfaultfd's own line says it
                    lines += _row("", "", f"without it: {probe.without}")
                lines += _row("", "", f"to get it: {probe.remedy}")
        lines.append("limits")
        lines += _row("", "vm.max_map_count", str(self.max_map_count))
        for name, limit in self.limits.items():
            lines += _row("", name, "none" if limit is None else str(limit))
        lines += _row("", "memory for this process", _bytes(self.available_bytes))
        auto = _bytes(self.auto_budget_bytes)
        if self.auto_budget_bytes is not None:
            auto += " (half of it, shared by all objects with this budget)"
        lines += _row("", 'budget="auto"', auto)
        return "\n".join(lines)


def _bytes(count: int | None) -> str:
    if count is None:
        return "unknown: the kernel does not say"
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count} bytes"


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
    """Find out what this kernel and process can do, and which engine fremap chooses.

    Returns
    -------
    Capabilities
        A snapshot: limits and rights may change while a process runs.

    Notes
    -----
    Each probe makes the real system call on a page of its own and undoes it. All of them take
    about a millisecond. Any number of threads may call this.

    Examples
    --------
    >>> import fremap
    >>> found = fremap.capabilities()
    >>> found.engines["alias"].available
    True
    """
    import platform

    found: dict[str, Any] = _core.capabilities()
    engines = {
        name: EngineStatus(refusal is None, (refusal or "").removeprefix("Window: "))
        for name, refusal in found["engines"].items()
    }
    chosen = found["chosen"]
    available = found["available_bytes"]
    budget = None if available is None else available // 2
    probes = {name: Probe(*found_, *facts) for name, (*found_, facts) in found["probes"].items()}
    return Capabilities(
        version=_core.__version__,
        python=platform.python_version(),
        kernel=found["kernel"],
        max_map_count=found["max_map_count"],
        memlock_limit=found["memlock_limit"],
        limits=MappingProxyType(_limits()),
        available_bytes=available,
        auto_budget_bytes=budget,
        probes=MappingProxyType(probes),
        engines=MappingProxyType(engines),
        chosen=chosen,
        reason=_reason(chosen, swaps=probes["uffd_move"].available),
    )


def _limits() -> dict[str, int | None]:
    import resource

    limits = {}
    for name in ("RLIMIT_AS", "RLIMIT_MEMLOCK", "RLIMIT_NOFILE", "RLIMIT_NPROC"):
        soft, _ = resource.getrlimit(getattr(resource, name))
        limits[name] = None if soft == resource.RLIM_INFINITY else soft
    return limits


def _reason(chosen: str, *, swaps: bool) -> str:
    if chosen == "paged":
        pages = "swaps pages in without a copy" if swaps else "copies pages"
        return f"needs one kernel mapping for any order of pages, and {pages}"
    if chosen == "none":
        return "windows need Linux 5.14; rows and stores work"
    return "the best engine that works here"
