"""Kernels and containers that lack something: the calls are refused here as they would be there.

What is left is slower or needs more mappings; what a window shows is the same.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.errors import UnsupportedError
from fremap.testing import (
    counting,
    failures,
    kernel_reads,
    numbered_page,
    numbered_words,
    write_numbered_file,
)

Scenes = Callable[..., AbstractContextManager[Any]]
FOR_GOOD = 2**31

MISSING = {
    "UFFDIO_MOVE": ("uffdio_move", errno.EINVAL),
    "process_madvise": ("process_madvise", errno.EPERM),
    "io_uring_setup": ("io_uring_setup", errno.ENOSYS),
    "io_uring_enter": ("io_uring_enter", errno.EPERM),
    "cachestat": ("cachestat", errno.ENOSYS),
}


def exercise(scene: Any) -> None:
    """Some of everything, beside the model."""
    random = np.random.default_rng(2)
    window, model = scene.window, scene.model
    for either in (window, model):
        either.evict([9], discard=True)
    for _ in range(6):
        at = random.permutation(24)[:12].tolist()
        file_pages = random.integers(0, 48, 12).tolist()
        for either in (window, model):
            either.remap(file_pages, at=at)
        scene.check()
        for either in (window, model):
            either.protect(at[:3], Prot.NONE)
            either.evict(at[3:6])
        scene.check()
        for either in (window, model):
            either.populate([*range(24)])
            either.place(at[6:8], numbered_page(2_000_000))
            either.protect([*range(24)], Prot.READ)
        scene.check()
        for either in (window, model):
            either.evict([*range(24)], discard=True)
            either.remap(file_pages[:4], at=[0, 1, 2, 3], populate=False)
            either.populate([*range(24)])
        scene.check()


@pytest.mark.parametrize("kind", ["file", "cold", "memory"])
@pytest.mark.parametrize("missing", MISSING)
def test_without(engine: str, missing: str, kind: str, make_scene: Scenes) -> None:
    call, number = MISSING[missing]
    with failures(call, errno=number, times=FOR_GOOD), make_scene(engine, kind) as scene:
        exercise(scene)


@pytest.mark.needs("guard_pages")
@pytest.mark.parametrize("engine", ["eager"], indirect=True)
def test_without_guard_pages(engine: str, make_scene: Scenes) -> None:
    """`MADV_GUARD_INSTALL` is what an eager window tries first; holes are mappings then."""
    with failures("madvise", errno=errno.EINVAL):
        manager = make_scene(engine, "file")
        scene = manager.__enter__()
    try:
        assert scene.window.vma_count > 1
        exercise(scene)
    finally:
        manager.__exit__(None, None, None)


@pytest.mark.needs("userfaultfd_kernel_faults")
@pytest.mark.parametrize("engine", ["paged"], indirect=True)
def test_with_user_mode_faults_only(engine: str, make_scene: Scenes) -> None:
    """An ordinary user's userfaultfd: system calls on absent pages get EFAULT, threads do not."""
    with counting() as calls, make_scene(engine, "file"):
        opened = calls["userfaultfd"]
    # The last one is the window's: the system call and the device are refused,
    # the system call for user mode only is not.
    with failures("userfaultfd", errno=errno.EPERM, skip=opened - 1, times=2):
        manager = make_scene(engine, "file")
        scene = manager.__enter__()
    try:
        with memoryview(scene.window) as view:
            assert not scene.window.present()[6]
            assert not kernel_reads(view, 6 * 4096)
            assert bytes(view[6 * 4096 : 7 * 4096]) == numbered_page(19)
            assert kernel_reads(view, 6 * 4096)
        exercise(scene)
    finally:
        manager.__exit__(None, None, None)


@pytest.mark.needs("userfaultfd_kernel_faults", "uffd_poison")
@pytest.mark.parametrize("engine", ["paged"], indirect=True)
@pytest.mark.parametrize("heal", ["evict", "populate", "remap"])
def test_an_unreadable_page_is_healed_without_poison(
    engine: str, heal: str, make_scene: Scenes
) -> None:
    """Before Linux 6.6 such a page is a mapping of its own, which has to go again."""
    refused = {"errno": errno.EINVAL, "times": FOR_GOOD}
    with (
        failures("probe_uffdio_poison", **refused),
        failures("probe_uffdio_move", **refused),
    ):
        manager = make_scene(engine, "file")
        scene = manager.__enter__()
    try:
        window, model = scene.window, scene.model
        vma_count = window.vma_count
        with memoryview(window) as view:
            with failures("read", errno=errno.EIO, times=FOR_GOOD):
                assert not kernel_reads(view, 6 * 4096)
            assert window.vma_count > vma_count
            if heal == "evict":
                window.evict(6)
            elif heal == "populate":
                assert window.populate(6).all()
            else:
                assert window.remap([model.mapping[6]], at=6).all()
            assert window.vma_count == vma_count
            assert kernel_reads(view, 6 * 4096)
        scene.check()
    finally:
        manager.__exit__(None, None, None)


@pytest.mark.parametrize("engine", ["auto", "alias", "paged", "eager"])
def test_windows_need_linux_5_14(engine: str, tmp_path: Path) -> None:
    """Without MADV_POPULATE_READ each way to a window says so; rows and stores work."""
    path = tmp_path / "pages"
    write_numbered_file(path, 8)
    told = rf"need Linux 5\.14 .*this is Linux {re.escape(os.uname().release)}; use `fremap\.rows`"
    with (
        failures("probe_madv_populate_read", errno=errno.EINVAL, times=FOR_GOOD),
        fremap.open(path, "r+") as store,
    ):
        for make in (
            lambda: fremap.Window(store, engine=engine),
            lambda: fremap.Slots(store, 2, 2),
            lambda: fremap.memmap(path, np.uint64, "r"),
            fremap.calibration.measure,
        ):
            with pytest.raises(UnsupportedError, match=told):
                make()
        assert store.read([7, 2]).tobytes() == numbered_page(7) + numbered_page(2)
        store.write([3], np.frombuffer(numbered_page(90), np.uint8))
        assert store.read([3]).tobytes() == numbered_page(90)
        rows = fremap.rows(path, row_shape=(512,), dtype=np.uint64)
        assert rows.take([5, 0]).tobytes() == numbered_page(5) + numbered_page(0)
        found = fremap.capabilities()
        assert not any(status.available for status in found.engines.values())
        assert (found.chosen, found.probes["populate_read"].available) == ("none", False)


@pytest.mark.parametrize("engine", ["paged"], indirect=True)
def test_without_move_a_chunk_is_one_drop_and_one_copy(engine: str, tmp_path: Path) -> None:
    """Whatever the order of its pages: a call for each would cost more than the copies."""
    path = tmp_path / "pages"
    write_numbered_file(path, 4096)
    chunk_pages = 256
    numbers = fremap.calibration.Calibration(
        alias_extent_pages=64, evict_gap_pages=64, batch_pages=chunk_pages
    )
    order = (1235 * np.arange(4096) + 1) % 4096  # no page stays what it is
    with (
        failures("probe_uffdio_move", errno=errno.EINVAL, times=FOR_GOOD),
        fremap.open(path) as store,
        fremap.Window(
            store, engine=engine, budget=None, calibration=numbers, populate=True
        ) as window,
    ):
        with counting() as calls:
            window.remap(order)
        made = {name: calls.made.get(name, 0) for name in ("madvise", "uffdio_copy", "uffdio_move")}
        chunks = 4096 // chunk_pages
        assert made["uffdio_copy"] == chunks
        assert made["madvise"] <= 2 * chunks + 8  # the file's map is filled by it too
        assert made["uffdio_move"] == 0
        assert (window.array(np.uint64, (4096, 512)) == numbered_words(order)).all()


LACKING = {
    "6.1": {
        "uffd_move",
        "uffd_poison",
        "uffd_wp_async",
        "guard_pages",
        "process_madvise",
        "cachestat",
    }
}
LACKING["5.15"] = LACKING["6.1"]
LACKING["5.10"] = {*LACKING["6.1"], "populate_read"}


@pytest.mark.parametrize("kernel", LACKING)
def test_a_command_as_an_older_kernel(kernel: str) -> None:
    """What the runner hides is missing in the command and in its children."""
    runner = Path(__file__).parents[1] / "runners" / "as_older_kernel.py"
    missing = """
import fremap
probes = fremap.capabilities().probes
print(*[name for name, probe in probes.items() if not probe.available])
"""
    twice = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {missing!r}], check=True)"
    )
    for source in (missing, twice):
        done = subprocess.run(
            [sys.executable, runner, kernel, sys.executable, "-c", source],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert LACKING[kernel] <= set(done.stdout.splitlines()[-1].split())
