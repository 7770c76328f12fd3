"""A signal handler that raises at any point of a `with` block leaves nothing behind.

Python runs signal handlers where a function begins, behind a call and at a jump backwards. Here
each such place in fremap's own Python, and in the block, is interrupted in its turn.
"""

from __future__ import annotations

import dis
import functools
import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap.testing import write_numbered_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

pytestmark = pytest.mark.any_user

PAGES = 16
PACKAGE = os.path.dirname(fremap.__file__)
# More places than any of these blocks has.
MOST = 20_000


class Interrupted(BaseException):
    """What the handler raises."""


@functools.cache
def handler_offsets(code: CodeType) -> frozenset[int]:
    """Return where in a function the interpreter may run a signal handler."""
    offsets = set()
    behind_call = False
    for instruction in dis.get_instructions(code):
        if behind_call or instruction.opname in ("RESUME", "JUMP_BACKWARD"):
            offsets.add(instruction.offset)
        behind_call = instruction.opname.startswith("CALL")
    return frozenset(offsets)


def interrupted_at(number: int, block: Callable[[], None]) -> bool:
    """Run `block`, interrupted at the place of that number; False if it has fewer."""
    left = number

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        file = frame.f_code.co_filename
        if not (frame.f_code is block.__code__ or file.startswith(PACKAGE)):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in handler_offsets(frame.f_code):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        block()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    assert left > 0, "an interrupt was swallowed"
    return False


def each_place(block: Callable[[], None]) -> Iterator[int]:
    for number in range(1, MOST):
        if not interrupted_at(number, block):
            assert number > 5, "nothing was interrupted"
            return
        yield number
    raise AssertionError("the block does not end")


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    """Collecting garbage hundreds of times need not look at what all other tests imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pages"
    for each in [path, path.with_suffix(".2")]:
        write_numbered_file(each, PAGES)
    return path


@pytest.mark.needs("paged")
def test_pins(path: Path) -> None:
    with fremap.open(path) as store, fremap.Window(store, engine="paged") as window:

        def block() -> None:
            with window.pin([3, 4]) as pin:
                repr(pin)

        for _ in each_place(block):
            window.evict(None)  # refused for a page that is pinned
        with window.pin(3), pytest.raises(fremap.FremapError, match="pinned"):
            window.evict(3)


def test_holds(path: Path) -> None:
    with fremap.open(path) as store, fremap.Slots(store, 1, 4) as table:

        def block() -> None:
            with table.pin([3, 5]):
                pass

        for _ in each_place(block):
            gc.collect()
            assert table.stats().pinned_slots == 0
            table.ensure([0, 1, 2, 6])  # needs every slot


def open_window(path: Path) -> None:
    with fremap.open(path) as store, fremap.Window(store) as window:
        bytes(window.array(np.uint8)[:8])


def open_rows(path: Path) -> None:
    with fremap.rows(path, np.uint64, 512) as rows:
        rows.take([1, 2])


def open_slots(path: Path) -> None:
    with fremap.open(path) as store, fremap.Slots(store, 1, 2) as table:
        table.ensure([1])


def open_batches(path: Path) -> None:
    with fremap.rows(path, np.uint64, 512) as rows, rows.batches(4, seed=1, prefetch=1) as batches:
        next(batches)


def open_concat(path: Path) -> None:
    with (
        fremap.open(path) as first,
        fremap.open(path.with_suffix(".2")) as second,
        fremap.ConcatStore([first, second]) as both,
        fremap.Window(both, PAGES) as window,
    ):
        window.remap([PAGES + 1, 0], at=2)
        both.read([1, PAGES])


def open_memory(_path: Path) -> None:
    with fremap.MemoryStore(PAGES * 4096) as store, fremap.Window(store) as window:
        bytes(window.array(np.uint8)[:8])
        store.write([1], bytes(4096))


def open_named_memory(path: Path) -> None:
    name = f"fremap-{os.getpid()}-{path.parent.name}"
    try:
        with fremap.MemoryStore(4096, name=name, create=True) as store:
            store.read([0])
    finally:
        # Made or not, and removed or not, when the block was interrupted.
        Path("/dev/shm", name).unlink(missing_ok=True)


def open_memmap(path: Path) -> None:
    array = fremap.memmap(path, np.uint64, "r+", shape=(PAGES, 512))
    array[3].sum()
    array[[2, 1]].sum()
    array.flush()
    array.evict()


def left_open() -> tuple[int, int]:
    """Return how many descriptors are open, and how many threads run."""
    gc.collect()
    own = sum(is_of_the_core(task) for task in os.listdir("/proc/self/task"))
    return len(os.listdir("/proc/self/fd")), own + threading.active_count()


def is_of_the_core(task: str) -> bool:
    try:
        return Path(f"/proc/self/task/{task}/comm").read_text().startswith("fremap")
    except (FileNotFoundError, ProcessLookupError):
        return False  # it ended meanwhile


def stays_open(most: tuple[int, int]) -> bool:
    """Whether more stays open than that, once threads that are about to end have ended."""
    deadline = time.monotonic() + 20
    while any(now > some for now, some in zip(left_open(), most, strict=True)):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.001)
    return False


@pytest.mark.slow
# A file whose opening was interrupted is closed when it is dropped.
@pytest.mark.once
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "opened",
    [
        open_window,
        open_rows,
        open_slots,
        open_batches,
        open_concat,
        open_memory,
        open_named_memory,
        open_memmap,
    ],
)
def test_nothing_stays_open(opened: Callable[[Path], None], path: Path) -> None:
    opened(path)  # what is made once a process
    for thread in threading.enumerate():
        if thread.name.startswith("fremap"):
            thread.join(20)
    before = left_open()

    def block() -> None:
        opened(path)

    for number in each_place(block):
        assert not stays_open(before), f"place {number}: {left_open()}, not {before}"
