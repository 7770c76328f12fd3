"""Run a command as an older kernel would: `python tests/runners/as_older_kernel.py 6.1 pytest`.

What Linux has had since is refused to the command and its children, with the error that
the older kernel gives. System calls and what `madvise` and `ioctl` are asked for are refused
by a seccomp filter. The features of userfaultfd are what the kernel says it has, which no
filter can change: `sitecustomize.py`, in the folder beside this file, has fremap take them
for missing in each Python process that is started here.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from under_seccomp import (
    ARCH,
    JUMP_IF_EQUAL,
    LOAD,
    MACHINES,
    NR,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECCOMP,
    RETURN,
    SECCOMP_MODE_FILTER,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO,
    USERFAULTFD_IOC_NEW,
    SockFprog,
    instruction,
)

HIDING = Path(__file__).parent / "hiding"
CALLS = {
    "x86_64": {"ioctl": 16, "madvise": 28, "process_madvise": 440, "cachestat": 451},
    "aarch64": {"ioctl": 29, "madvise": 233, "process_madvise": 440, "cachestat": 451},
}
UFFDIO_MOVE, UFFDIO_POISON, PAGEMAP_SCAN = 0xC028AA05, 0xC020AA08, 0xC0606610
POPULATE_READ, POPULATE_WRITE, DONTNEED_LOCKED, COLLAPSE = 22, 23, 24, 25
GUARD_INSTALL, GUARD_REMOVE = 102, 103
FIRST_ARGUMENT = 16


@dataclass(frozen=True)
class Refused:
    """A system call that an older kernel refuses, perhaps only with one argument."""

    call: str
    number: int
    position: int = 0
    value: int | None = None

    def instructions(self, calls: dict[str, int]) -> bytes:
        """Return the error of this call and go on for all others."""
        answer = instruction(RETURN, SECCOMP_RET_ERRNO | self.number)
        if self.value is not None:
            argument = instruction(LOAD, FIRST_ARGUMENT + 8 * self.position)
            is_value = instruction(JUMP_IF_EQUAL, self.value, otherwise=1)
            answer = argument + is_value + answer
        skipped = len(answer) // 8
        is_call = instruction(JUMP_IF_EQUAL, calls[self.call], otherwise=skipped)
        return instruction(LOAD, NR) + is_call + answer


def advice(value: int) -> Refused:
    """A kind of advice that `madvise` does not know."""
    return Refused("madvise", errno.EINVAL, 2, value)


def request(value: int, number: int = errno.EINVAL) -> Refused:
    """A request that `ioctl` does not know."""
    return Refused("ioctl", number, 1, value)


#: What each kernel refuses. Before 6.13 `process_madvise` drops no pages.
BEFORE_6_8 = [
    advice(GUARD_INSTALL),
    advice(GUARD_REMOVE),
    Refused("process_madvise", errno.EINVAL),
    request(UFFDIO_MOVE),
]
KERNELS = {
    "6.1": [
        *BEFORE_6_8,
        request(PAGEMAP_SCAN, errno.ENOTTY),
        request(UFFDIO_POISON),
        Refused("cachestat", errno.ENOSYS),
    ],
}
KERNELS["5.15"] = [
    *KERNELS["6.1"],
    advice(COLLAPSE),
    advice(DONTNEED_LOCKED),
    request(USERFAULTFD_IOC_NEW, errno.ENOENT),
]
KERNELS["5.10"] = [*KERNELS["5.15"], advice(POPULATE_READ), advice(POPULATE_WRITE)]


def install(refused: list[Refused]) -> None:
    """Refuse calls to this process and its children from now on."""
    machine = platform.machine()
    head = instruction(LOAD, ARCH) + instruction(JUMP_IF_EQUAL, MACHINES[machine][0], then=1)
    allow = instruction(RETURN, SECCOMP_RET_ALLOW)
    rules = b"".join(rule.instructions(CALLS[machine]) for rule in refused)
    program = head + allow + rules + allow
    fprog = SockFprog(len(program) // struct.calcsize("=HBBI"), program)
    libc = ctypes.CDLL(None, use_errno=True)
    for step in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(fprog), 0, 0),
    ):
        if libc.prctl(*step) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl({step[0]}): {os.strerror(number)}")
    for rule in refused:
        arguments = [-1] * 6
        if rule.value is not None:
            arguments[rule.position] = rule.value
        answer = libc.syscall(CALLS[machine][rule.call], *map(ctypes.c_long, arguments))
        if answer != -1 or ctypes.get_errno() != rule.number:
            raise RuntimeError(f"the filter does not refuse {rule}")


def main() -> int:
    """Become the command; comes back only to say why not."""
    machine = platform.machine()
    if machine not in CALLS:
        print(f"as_older_kernel: no system call numbers for {machine}", file=sys.stderr)
        return 2
    if len(sys.argv) < 3 or sys.argv[1] not in KERNELS:
        print(__doc__, f"Kernels: {', '.join(KERNELS)}.", sep="\n", file=sys.stderr)
        return 2
    kernel, *command = sys.argv[1:]
    install(KERNELS[kernel])
    paths = [str(HIDING), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    print(f"as_older_kernel: as Linux {kernel}: {' '.join(command)}", flush=True)
    return os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
