"""What `fremap.capabilities()` says is what the kernel answers to somebody else who asks.

The suite leaves out tests by what `capabilities()` says, so a probe that finds
too little would hide them. Here the kernel is asked again, with ctypes alone.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from pathlib import Path

import fremap
import pytest

USERFAULTFD = {"x86_64": 323, "aarch64": 282}.get(platform.machine())
IO_URING_SETUP, CACHESTAT = 425, 451
UFFD_USER_MODE_ONLY = 1
UFFDIO_API = 0xC018AA3F
UFFD_FEATURE_POISON, UFFD_FEATURE_MOVE = 1 << 14, 1 << 16
MADV_GUARD_INSTALL = 102

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p


def available(name: str) -> bool:
    return fremap.capabilities().probes[name].available


def userfaultfd() -> int:
    assert USERFAULTFD is not None, f"no number of userfaultfd for {platform.machine()}"
    return int(libc.syscall(USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY))


def test_userfaultfd_and_what_it_has() -> None:
    fd = userfaultfd()
    assert available("userfaultfd") == (fd >= 0)
    assert fremap.capabilities().engines["paged"].available == (fd >= 0)
    if fd < 0:
        assert not available("uffd_move")
        assert not available("uffd_poison")
        return
    answer = bytearray(struct.pack("=QQQ", 0xAA, 0, 0))
    fcntl.ioctl(fd, UFFDIO_API, answer)
    os.close(fd)
    _, features, _ = struct.unpack("=QQQ", answer)
    assert available("uffd_move") == bool(features & UFFD_FEATURE_MOVE)
    assert available("uffd_poison") == bool(features & UFFD_FEATURE_POISON)


def test_io_uring() -> None:
    parameters = ctypes.create_string_buffer(120)
    fd = int(libc.syscall(IO_URING_SETUP, 1, parameters))
    assert available("io_uring") == (fd >= 0)
    if fd >= 0:
        os.close(fd)


def test_cachestat() -> None:
    fd = os.memfd_create("probe")
    whole = (ctypes.c_uint64 * 2)(0, 0)
    counts = (ctypes.c_uint64 * 5)()
    answer = int(libc.syscall(CACHESTAT, fd, whole, counts, 0))
    os.close(fd)
    assert available("cachestat") == (answer == 0)


def test_guard_pages() -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page = libc.mmap(
        None, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0
    )
    address = ctypes.c_void_p(page)
    answer = libc.madvise(address, ctypes.c_size_t(mmap.PAGESIZE), MADV_GUARD_INSTALL)
    assert answer == 0 or ctypes.get_errno() == errno.EINVAL
    libc.munmap(address, ctypes.c_size_t(mmap.PAGESIZE))
    assert available("guard_pages") == (answer == 0)


def test_engines_that_need_nothing_are_there() -> None:
    engines = fremap.capabilities().engines
    assert engines["alias"].available
    assert engines["eager"].available


def test_each_thing_missing_has_its_remedy() -> None:
    for probe in fremap.capabilities().probes.values():
        assert probe.detail
        assert probe.available or probe.remedy


def test_limits_are_the_kernels() -> None:
    capabilities = fremap.capabilities()
    assert capabilities.kernel == os.uname().release
    limit = Path("/proc/sys/vm/max_map_count").read_text()
    assert capabilities.max_map_count == int(limit)


@pytest.mark.parametrize("engine", ["alias", "paged", "eager"])
def test_engine_that_is_missing_is_refused_with_the_reason(engine: fremap.window.Engine) -> None:
    status = fremap.capabilities().engines[engine]
    with fremap.MemoryStore(mmap.PAGESIZE) as store:
        if status.available:
            with fremap.Window(store, engine=engine) as window:
                assert window.engine == engine
        else:
            with pytest.raises(fremap.FremapError, match=engine):
                fremap.Window(store, engine=engine)
