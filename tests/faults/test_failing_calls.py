"""The n-th system call of each kind fails, during every operation, for every n.

Afterwards the window is as the rules say: of a remap or populate the first
`completed` pages are done and the rest are as they were; nothing shows what it
must not; and the same call, made again, succeeds.
"""

from __future__ import annotations

import copy
import errno
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.errors import FremapError
from fremap.testing import ModelWindow, counting, failures, numbered_page, numbered_words

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.any_user
STORE_PAGES = 48
KINDS = ("file", "cold", "memory", "concat")
WAIT = 20  # seconds, for threads that were joined to be gone
MOST_CALLS = 12  # of one kind, in one operation, that are made to fail one by one

#: What the kernel may answer; EIO where a call is not listed.
ERRNOS = {
    "mmap": (errno.ENOMEM,),
    "mremap": (errno.ENOMEM,),
    "mprotect": (errno.ENOMEM,),
    "madvise": (errno.ENOMEM, errno.EIO),
    "mlock": (errno.ENOMEM,),
    "process_madvise": (errno.EPERM, errno.ENOMEM),
    "mincore": (errno.EAGAIN, errno.ENOMEM),
    "userfaultfd": (errno.EPERM,),
    "uffdio_register": (errno.ENOMEM,),
    "uffdio_copy": (errno.ENOMEM, errno.EAGAIN),
    "uffdio_move": (errno.EBUSY, errno.EAGAIN, errno.ENOMEM),
    "uffdio_move_answer": (errno.EEXIST,),
    "uffdio_poison": (errno.ENOMEM, errno.EAGAIN),
    "io_uring_setup": (errno.EPERM, errno.ENOMEM),
    "io_uring_enter": (errno.EIO, errno.EINTR, errno.EAGAIN),
    "read": (errno.EIO, errno.EINTR),
    "write": (errno.ENOSPC, errno.EINTR),
}
#: Calls whose failure nobody is told of, as there is nothing to be done about it.
SILENT = {"munmap", "sigaction", "sigmask", "uffd_read", "uffdio_wake"}

AT = [4, 5, 6, 12, 13, 1, 0, 20, 21, 22, 10, 3]
FILE_PAGES = [17, 16, 15, 33, 33, 34, 35, 0, 1, 2, 25, 26]
RUN = range(24, 36)


@dataclass(frozen=True)
class Operation:
    """Something to do to a window, and what the model does for the first n pages of it."""

    name: str
    run: Callable[[Any], object]
    model: Callable[[ModelWindow, slice], object]
    partial: bool = True  # whether it may be done in part, and says how far

    def __str__(self) -> str:
        return self.name


def pages_of(sequence: Sequence[int]) -> Callable[[slice], list[int]]:
    return lambda part: list(sequence)[part]


ALL = list(range(24))
FREE = [page for page in ALL if page != 9]  # not the placed one
CONTENTS = numbered_words(range(2000, 2006)).tobytes()
PLACES = [0, 7, 8, 9, 10, 23]

OPERATIONS = [
    Operation(
        "remap",
        lambda window: window.remap(FILE_PAGES, at=AT),
        lambda model, part: model.remap(FILE_PAGES[part], AT[part]),
    ),
    Operation(
        "remap a run",
        lambda window: window.remap(RUN, at=10, prot=Prot.READ),
        lambda model, part: model.remap(RUN[part], ALL[10:22][part], prot=Prot.READ),
    ),
    Operation(
        "remap to NONE",
        lambda window: window.remap(FILE_PAGES, at=AT, prot=Prot.NONE),
        lambda model, part: model.remap(FILE_PAGES[part], AT[part], prot=Prot.NONE),
    ),
    Operation(
        "remap nonblock",
        lambda window: window.remap(FILE_PAGES, at=AT, nonblock=True),
        lambda model, part: model.remap(FILE_PAGES[part], AT[part]),
    ),
    Operation(
        "remap lazily",
        lambda window: window.remap(FILE_PAGES, at=AT, populate=False),
        lambda model, part: model.remap(FILE_PAGES[part], AT[part], populate=False),
    ),
    Operation(
        "populate",
        lambda window: window.populate(),
        lambda model, part: model.populate(ALL[part]),
    ),
    Operation(
        "evict",
        lambda window: window.evict(FREE),
        lambda model, part: model.evict(FREE[part]),
        partial=False,
    ),
    Operation(
        "protect NONE",
        lambda window: window.protect(ALL[::2], Prot.NONE),
        lambda model, part: model.protect(ALL[::2][part], Prot.NONE),
        partial=False,
    ),
    Operation(
        "protect READ",
        lambda window: window.protect(ALL, Prot.READ),
        lambda model, part: model.protect(ALL[part], Prot.READ),
        partial=False,
    ),
    Operation(
        "place",
        lambda window: window.place(PLACES, CONTENTS),
        lambda model, part: model.place(PLACES[part], CONTENTS[: 4096 * len(PLACES[part])]),
        partial=False,
    ),
    Operation(
        "place what is shown",
        lambda window: window.place([0, 4, 9, 10]),
        lambda model, part: model.place([0, 4, 9, 10][part]),
        partial=False,
    ),
]

Scenes = Callable[..., AbstractContextManager[Any]]


def calls_made(make_scene: Scenes, engine: str, kind: str, operation: Operation) -> dict[str, int]:
    """The system calls of an operation that nothing goes wrong in."""
    with make_scene(engine, kind) as scene, counting() as calls:
        operation.run(scene.window)
    return {call: count for call, count in calls.made.items() if call not in SILENT}


def check_errno(error: FremapError, number: int) -> None:
    """An error of the kernel's is the one that was injected, and says how far the call came."""
    if isinstance(error, OSError):
        assert error.errno == number, error
        assert 0 <= getattr(error, "completed", 0) < STORE_PAGES


def check_failed(scene: Any, operation: Operation, error: FremapError, number: int) -> None:
    """The state after an operation that ended with `error`."""
    check_errno(error, number)
    if operation.partial:
        operation.model(scene.model, slice(getattr(error, "completed", 0)))
    else:
        follow_what_was_done(scene, operation)
    scene.check()


def follow_what_was_done(scene: Any, operation: Operation) -> None:
    """Where pages are changed one by one, each is as before or done; nothing between."""
    done = copy.copy(scene.model)
    done._pages = list(scene.model._pages)
    operation.model(done, slice(None))
    window, model = scene.window, scene.model
    states = zip(window.mapping.tolist(), window.protection().tolist(), strict=True)
    for page, state in enumerate(states):
        old, new = model._pages[page], done._pages[page]
        assert state in {(old.shows, old.prot), (new.shows, new.prot)}
        replaced = (old.shows, old.prot) == (new.shows, new.prot) and model.readable(page)
        if state == (new.shows, new.prot) and not (
            replaced and window.present()[page] and window.pages[page].tobytes() == old.copy
        ):
            model._pages[page] = new


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_call_fails_once(
    engine: str, kind: str, operation: Operation, make_scene: Scenes
) -> None:
    made = calls_made(make_scene, engine, kind, operation)
    for call, count in made.items():
        for number in ERRNOS.get(call, (errno.EIO,)):
            for skip in range(min(count, MOST_CALLS)):
                with make_scene(engine, kind) as scene:
                    one_failure(scene, operation, call, number, skip)


LOCKED_OPERATIONS = [
    operation
    for operation in OPERATIONS
    if operation.name not in {"evict", "remap nonblock", "remap lazily"}
]


@pytest.mark.parametrize("operation", LOCKED_OPERATIONS, ids=str)
def test_each_call_fails_once_in_a_locked_window(
    engine: str, operation: Operation, make_scene: Scenes
) -> None:
    """What is dropped, or mapped in its place, is locked again: each a step that can fail."""
    with make_scene(engine, "file", lock=True) as scene, counting() as calls:
        operation.run(scene.window)
    for call, count in calls.made.items():
        for number in ERRNOS.get(call, (errno.EIO,)) if call not in SILENT else ():
            for skip in range(min(count, MOST_CALLS)):
                with make_scene(engine, "file", lock=True) as scene:
                    one_failure(scene, operation, call, number, skip)


def one_failure(scene: Any, operation: Operation, call: str, number: int, skip: int) -> None:
    what = f"{operation}: {call} number {skip} fails with {errno.errorcode[number]}"
    try:
        with failures(call, errno=number, skip=skip):
            operation.run(scene.window)
    except FremapError as error:
        error.add_note(what)
        check_failed(scene, operation, error, number)
    else:
        operation.model(scene.model, slice(None))
        scene.check()
    operation.run(scene.window)
    operation.model(scene.model, slice(None))
    scene.check()


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_a_call_fails_for_good(engine: str, operation: Operation, make_scene: Scenes) -> None:
    """A kind of call that never works again: an error or a way round it, no loop and no harm."""
    for call in calls_made(make_scene, engine, "cold", operation):
        number = ERRNOS.get(call, (errno.EIO,))[0]
        with make_scene(engine, "cold") as scene:
            try:
                with failures(call, errno=number, times=2**31):
                    operation.run(scene.window)
            except FremapError as error:
                error.add_note(f"{operation}: {call} fails with {errno.errorcode[number]}")
                check_failed(scene, operation, error, number)
            operation.run(scene.window)
            operation.model(scene.model, slice(None))
            scene.check()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def fail_to_make(make: Callable[[], Any], made: dict[str, int]) -> None:
    """Make a window with each of its calls failing in turn."""
    for call in made.keys() - SILENT:
        for number in ERRNOS.get(call, (errno.EIO,)):
            for skip in range(min(made[call], MOST_CALLS)):
                try:
                    with failures(call, errno=number, skip=skip):
                        make().close()
                except FremapError as error:
                    check_errno(error, number)


@pytest.mark.parametrize("lock", [False, True])
def test_making_a_window_fails(engine: str, lock: bool, make_store: Callable[[str], Any]) -> None:
    """Nothing is left behind, and the next one is made."""
    with make_store("file") as store:

        def make() -> Any:
            return fremap.Window(store, 16, engine=engine, populate=True, lock=lock)

        with counting() as calls:
            make().close()
        made = calls.made
        fail_to_make(make, made)
        held = open_descriptors(), threads()
        fail_to_make(make, made)
        # The kernel lists a thread for a moment after it was joined.
        end = time.monotonic() + WAIT
        while threads() > held[1] and time.monotonic() < end:
            time.sleep(0.001)
        assert open_descriptors() == held[0]
        assert threads() <= held[1]
        with make() as window:
            assert bytes(window.pages[15]) == numbered_page(15)


STORE_OPERATIONS: dict[str, Callable[[Any], object]] = {
    "read": lambda store: store.read(FILE_PAGES),
    "read all": lambda store: store.read(None),
    "write": lambda store: store.write(FILE_PAGES[:3], numbered_words(FILE_PAGES[:3])),
    "resident": lambda store: store.resident(FILE_PAGES),
    "prefetch": lambda store: store.prefetch(FILE_PAGES),
    "sync": lambda store: store.sync(),
    "refresh": lambda store: store.refresh(),
}


@pytest.mark.parametrize("name", STORE_OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_store_survives(name: str, kind: str, make_store: Callable[[str], Any]) -> None:
    operation = STORE_OPERATIONS[name]
    with make_store(kind) as store, counting() as calls:
        operation(store)
    for call, count in calls.made.items():
        for number in ERRNOS.get(call, (errno.EIO,)):
            for skip in range(min(count, MOST_CALLS)):
                with make_store(kind) as store:
                    try:
                        with failures(call, errno=number, skip=skip):
                            operation(store)
                    except FremapError as error:
                        check_errno(error, number)
                        store.refresh()  # acknowledges a sync that failed
                    operation(store)
                    assert store.page_count == STORE_PAGES
                    assert (store.read(None) == numbered_words(range(STORE_PAGES)).view("u1")).all()


def test_a_failed_read_says_how_far_it_came(make_store: Callable[[str], Any]) -> None:
    """The pages before `completed` are in the caller's buffer."""
    out = np.zeros((STORE_PAGES, 4096), np.uint8)
    for call in ("read", "io_uring_enter"):
        for skip in range(4):
            out[:] = 0
            with make_store("cold") as store, failures(call, errno=errno.EIO, skip=skip):
                try:
                    store.read(None, out=out)
                except fremap.errors.StoreError as error:
                    done = error.completed
                else:
                    done = STORE_PAGES
            assert (out[:done] == numbered_words(range(done)).view(np.uint8)).all()


@pytest.mark.parametrize("call", ["open", "stat"])
def test_opening_fails(call: str, tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(numbered_page(0))
    descriptors = open_descriptors()
    for skip in range(4):
        try:
            with failures(call, errno=errno.EMFILE, skip=skip):
                fremap.open(path).close()
        except fremap.errors.StoreError as error:
            check_errno(error, errno.EMFILE)
            opened = error.filename
        else:
            opened = str(path)
        assert opened == str(path)
        assert open_descriptors() == descriptors
