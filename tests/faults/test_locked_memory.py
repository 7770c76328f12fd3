"""A process that locks all its future memory (`mlockall`), as real-time programs do."""

from __future__ import annotations

import errno
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.testing import counting, failures, numbered_words, write_numbered_file

Run = Callable[..., subprocess.CompletedProcess[str]]

MCL_FUTURE = 2
MCL_ONFAULT = 4


@pytest.mark.parametrize("flags", [MCL_FUTURE, MCL_FUTURE | MCL_ONFAULT])
def test_windows_show_the_store_and_not_what_the_kernel_filled_in(
    engine: str, flags: int, tmp_path: Path, run_script: Run
) -> None:
    path = tmp_path / "pages"
    write_numbered_file(path, 16)
    done = run_script(
        """
    import ctypes, sys
    import numpy as np
    import fremap
    from fremap.testing import numbered_words
    engine, path, flags = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def check(window, expected):
        assert (window.array(np.uint64, (16, 512)) == numbered_words(expected)).all()

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mlockall(flags) == 0, ctypes.get_errno()
    with fremap.open(path) as store, fremap.Window(store, engine=engine) as window:
        if engine == "eager":
            window.populate()
        elif engine == "paged":
            assert not window.present().any()
        check(window, range(16))
        window.remap(range(15, -1, -1))
        check(window, range(15, -1, -1))
        window.evict(None)
        if engine == "paged":
            assert not window.present().any()
        window.populate()
        check(window, range(15, -1, -1))
        window.place(3, b"x" * 4096)
        window.remap(range(16), discard=True)
        check(window, range(16))
    print("right")
    """,
        engine,
        path,
        flags,
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def flags_of(address: int, length: int) -> list[list[str]]:
    """`VmFlags` of each kernel mapping of a range."""
    flags, within = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(bound, 16) for bound in bounds.groups())
            within = start < address + length and address < end
        elif within and line.startswith("VmFlags:"):
            flags.append(line.split()[1:])
    return flags


@pytest.mark.parametrize("engine", ["paged", "eager"], indirect=True)
@pytest.mark.parametrize("change", ["protect", "remap"])
def test_what_is_dropped_is_locked_again(engine: str, change: str, tmp_path: Path) -> None:
    """Where `MADV_DONTNEED_LOCKED` is refused (before Linux 5.18) the range is unlocked first."""
    path = tmp_path / "pages"
    write_numbered_file(path, 16)
    with (
        fremap.open(path) as store,
        fremap.Window(store, engine=engine, lock=True) as window,
    ):
        address = window.pages.ctypes.data
        shown = list(range(16))
        with failures("madvise", errno=errno.EINVAL), counting() as calls:
            if change == "protect":
                window.protect([3, 4], Prot.NONE)
            else:
                shown[3:5] = [9, 8]
                window.remap([9, 8], at=[3, 4], prot=Prot.NONE)
        unlocked_and_locked = 2
        assert calls["mlock"] == unlocked_and_locked
        window.protect([3, 4], Prot.READ)
        assert (window.pages.view(np.uint64) == numbered_words(shown)).all()
        flags = flags_of(address, 16 * 4096)
        assert flags
        assert all("lo" in mapping for mapping in flags), flags
