"""What a measurement depends on and a reader must know: the machine, counters."""

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import fremap
from fremap import _core


@dataclass(frozen=True)
class Machine:
    """Where the figures come from, with no name that could identify the machine."""

    kernel: str
    processors: int
    processor: str
    virtual: bool
    memory_bytes: int
    transparent_hugepage: str
    max_map_count: int
    python: str
    numpy: str
    fremap: str
    load: float

    @classmethod
    def this(cls) -> "Machine":
        """Describe the machine that runs this."""
        processor = _text("/proc/cpuinfo")
        return cls(
            kernel=platform.release(),
            processors=len(os.sched_getaffinity(0)),
            processor=_field(processor, "model name"),
            virtual="hypervisor" in _field(processor, "flags").split(),
            memory_bytes=memory_bytes("MemTotal"),
            transparent_hugepage=_chosen(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
            max_map_count=int(_text("/proc/sys/vm/max_map_count")),
            python=platform.python_version(),
            numpy=np.__version__,
            fremap=fremap.__version__,
            load=os.getloadavg()[0],
        )

    def __str__(self) -> str:
        kind = "virtual machine" if self.virtual else "machine"
        return (
            f"{self.processors}-processor {kind} ({self.processor}), "
            f"{self.memory_bytes / 2**30:.0f} GiB, Linux {self.kernel}, "
            f"huge pages {self.transparent_hugepage}, load {self.load:.1f}; "
            f"Python {self.python}, NumPy {self.numpy}, fremap {self.fremap}"
        )


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def _field(text: str, name: str) -> str:
    """Return the value of the first ``name : value`` line, or "unknown"."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _chosen(text: str) -> str:
    """Return the bracketed word of a sysfs choice."""
    return text.partition("[")[2].partition("]")[0]


def memory_bytes(name: str) -> int:
    """Read a line of ``/proc/meminfo``, in bytes."""
    return int(_field(_text("/proc/meminfo"), name).removesuffix("kB")) * 1024


def process_bytes(name: str, process: int | str = "self") -> int:
    """Read a size of ``/proc/PID/status`` (`VmRSS`, `VmPTE`), in bytes."""
    return int(_field(_text(f"/proc/{process}/status"), name).removesuffix("kB")) * 1024


def stolen_seconds() -> float:
    """Return the time of all processors that the host gave to others, since it started.

    The kernel counts it in ticks (10 ms), and knows of it in some virtual machines only.
    """
    steal = _text("/proc/stat").split(maxsplit=9)[8]
    return int(steal) / os.sysconf("SC_CLK_TCK")


@dataclass
class Counts:
    """What happened between two moments in this process."""

    system_calls: dict[str, int] = field(default_factory=dict)
    device_bytes_read: int = 0
    faults: int = 0

    @property
    def system_call_count(self) -> int:
        """System calls of fremap's core, all kinds."""
        return sum(self.system_calls.values())


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens in the block; the yielded `Counts` is filled when it ends."""
    counts = Counts()
    calls, read, faults = _core.system_calls(), _device_bytes_read(), _faults()
    yield counts
    # Asked for in the opposite order: what asking costs lands outside.
    counts.faults = _faults() - faults
    counts.device_bytes_read = _device_bytes_read() - read
    after = _core.system_calls()
    counts.system_calls = {
        name: count - calls.get(name, 0)
        for name, count in after.items()
        # Answers are counted beside the calls that they are to.
        if count != calls.get(name, 0) and not name.endswith("_answer")
    }


def _device_bytes_read() -> int:
    return int(_field(_text("/proc/self/io"), "read_bytes"))


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt
