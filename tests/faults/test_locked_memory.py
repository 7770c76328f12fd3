"""A process that locks all its future memory (`mlockall`), as real-time programs do."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from fremap.testing import write_numbered_file

if TYPE_CHECKING:
    from pathlib import Path

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
