"""Run a command as a container would: `python tests/runners/under_seccomp.py command ...`.

Docker's default filter refuses `userfaultfd`, `io_uring_*` and (without
CAP_SYS_PTRACE) `process_madvise` with EPERM. So does this one, for the command
and its children; it also refuses the ioctl by which `/dev/userfaultfd` makes
one, as that file does not exist in a container.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
USERFAULTFD_IOC_NEW = 0xAA00

# machine: (audit architecture, ioctl, {refused call: number})
IO_URING = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}
MACHINES = {
    "x86_64": (0xC000003E, 16, {"userfaultfd": 323, **IO_URING, "process_madvise": 440}),
    "aarch64": (0xC00000B7, 29, {"userfaultfd": 282, **IO_URING, "process_madvise": 440}),
}

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
NR, ARCH, SECOND_ARGUMENT = 0, 4, 24
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


class SockFprog(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def filter_program(architecture: int, ioctl: int, refused: list[int]) -> bytes:
    """EPERM for the refused calls and for USERFAULTFD_IOC_NEW; all else is allowed."""
    body = [instruction(LOAD, NR)]
    for position, number in enumerate(refused):
        # Past the other refused calls and the five instructions after them.
        body.append(instruction(JUMP_IF_EQUAL, number, then=len(refused) - position - 1 + 4))
    body += [
        instruction(JUMP_IF_EQUAL, ioctl, otherwise=2),
        instruction(LOAD, SECOND_ARGUMENT),
        instruction(JUMP_IF_EQUAL, USERFAULTFD_IOC_NEW, then=1),
        instruction(RETURN, SECCOMP_RET_ALLOW),
        instruction(RETURN, SECCOMP_RET_ERRNO | errno.EPERM),
    ]
    head = [instruction(LOAD, ARCH), instruction(JUMP_IF_EQUAL, architecture, then=1)]
    return b"".join([*head, instruction(RETURN, SECCOMP_RET_ALLOW), *body])


def install(architecture: int, ioctl: int, refused: dict[str, int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    program = filter_program(architecture, ioctl, list(refused.values()))
    fprog = SockFprog(len(program) // 8, program)
    for step in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(fprog), 0, 0),
    ):
        if libc.prctl(*step) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"prctl({step[0]}): {os.strerror(number)}")
    for name, number in refused.items():
        answer = libc.syscall(number, 0, 0, 0, 0, 0, 0)
        if answer != -1 or ctypes.get_errno() != errno.EPERM:
            raise RuntimeError(f"the filter does not refuse {name}")


def main() -> int:
    """Become the command; comes back only to say why not."""
    machine = platform.machine()
    if machine not in MACHINES:
        print(f"under_seccomp: no system call numbers for {machine}", file=sys.stderr)
        return 2
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    install(*MACHINES[machine])
    refused = ", ".join(MACHINES[machine][2])
    print(f"under_seccomp: {refused} refused: {' '.join(sys.argv[1:])}", flush=True)
    return os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
