"""Writing back fails: on a full disk, on a bad one, on a file that was cut short.

Whatever fails, nothing is lost: a page that was stored to is in the file, or is
dirty and shows what was stored; and once the cause is gone the same call succeeds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest
from fremap import Prot
from fremap.errors import FremapError, StoreError, TruncatedError
from fremap.testing import counting, failures, numbered_words, short_writes

pytestmark = pytest.mark.any_user
STORE_PAGES = 48
WINDOW_PAGES = 16
#: Window pages that are stored to: single ones, a run, the last. Page i shows file page i.
DIRTY = [1, 3, 4, 5, 6, 7, 8, 11, 15]
BEFORE = numbered_words(range(STORE_PAGES))
AFTER = numbered_words(range(STORE_PAGES), generation=1)
PLACED = numbered_words(range(5000, 5000 + WINDOW_PAGES)).view(np.uint8)
OTHERS = np.arange(20, 20 + WINDOW_PAGES)
ORDERS = {"remap": np.arange(WINDOW_PAGES), "remap scattered": np.roll(np.arange(WINDOW_PAGES), 5)}

OPERATIONS: dict[str, Callable[[Any], object]] = {
    "flush": lambda window: window.flush(),
    "flush some": lambda window: window.flush(DIRTY[::-1]),
    "evict": lambda window: window.evict(None),
    "remap": lambda window: window.remap(OTHERS),
    "remap scattered": lambda window: window.remap(OTHERS, at=ORDERS["remap scattered"]),
    "remap to NONE": lambda window: window.remap(OTHERS, prot=Prot.NONE),
    "protect by remap": lambda window: window.remap(range(WINDOW_PAGES), prot=Prot.NONE),
    "place": lambda window: window.place(None, PLACED),
    "place what is shown": lambda window: window.place(None),
    "protect NONE": lambda window: window.protect(None, Prot.NONE),
    "close": lambda window: window.close(),
}
EACH = pytest.mark.parametrize("name", OPERATIONS)
DIRECT = ["direct", "direct by threads"]
KINDS = pytest.mark.parametrize("kind", ["file", "memory", *DIRECT])
FOR_GOOD = 2**31
MOST_CALLS = 12  # of one kind, in one operation, that are made to fail one by one

#: What the kernel may answer; EIO where a call is not listed.
ERRNOS = {
    "write": (errno.EIO, errno.EINTR),
    "io_uring_write_answer": (errno.EIO, errno.ENOSPC, errno.EINTR, errno.EAGAIN),
    "madvise": (errno.ENOMEM,),
    "mincore": (errno.ENOMEM,),
    "uffdio_copy": (errno.ENOMEM, errno.EAGAIN),
    "uffdio_move": (errno.EBUSY, errno.EAGAIN, errno.ENOMEM),
    "uffdio_writeprotect": (errno.EAGAIN, errno.ENOMEM),
    "io_uring_enter": (errno.EIO, errno.EINTR, errno.EAGAIN),
    "read": (errno.EIO, errno.EINTR),
}
#: Calls whose failure nobody is told of, as there is nothing to be done about it.
SILENT = {"munmap", "sigaction", "sigmask", "uffd_read", "uffdio_wake"}
#: What writes: calls, and what the kernel answers to writes of a ring.
WRITES = ("write", "io_uring_write_answer")

Child = Callable[[Callable[[], None]], int]


@dataclass
class Scene:
    """A window of which some pages were stored to."""

    store: Any
    window: Any

    def held(self, page: int) -> bytes:
        """What the file holds."""
        return os.pread(self.store.fileno(), 4096, 4096 * page)

    def is_written(self, page: int) -> bool:
        return self.held(page) == AFTER[page].tobytes()

    def shows(self, page: int) -> bool:
        """Whether a dirty page shows what was stored to it."""
        words = self.window.array(np.uint64, (WINDOW_PAGES, -1))
        return bool(self.window.mapping[page] == page and (words[page] == AFTER[page]).all())

    def check(self) -> None:
        """Nothing is lost, and nothing was written but what was stored."""
        dirty = np.zeros(WINDOW_PAGES, bool) if self.window.closed else self.window.dirty()
        for page in DIRTY:
            assert self.shows(page) if dirty[page] else self.is_written(page), f"page {page}"
        assert not np.delete(dirty, DIRTY).any()
        held = np.frombuffer(os.pread(self.store.fileno(), BEFORE.nbytes, 0), BEFORE.dtype)
        changed = np.flatnonzero((held.reshape(BEFORE.shape) != BEFORE).any(axis=1))
        assert np.isin(changed, DIRTY).all(), f"file pages {changed} of {DIRTY}"
        assert os.fstat(self.store.fileno()).st_size == STORE_PAGES * 4096

    def succeed(self, name: str) -> None:
        """Do what has failed before: all that was stored is in the file then."""
        OPERATIONS[name](self.window)
        assert all(self.is_written(page) for page in DIRTY)
        self.check()
        self.window.close()


def make_scene(store: Any, options: dict[str, Any]) -> Scene:
    window = fremap.Window(store, WINDOW_PAGES, populate=True, **options)
    window.array(np.uint64, (WINDOW_PAGES, -1))[DIRTY] = AFTER[DIRTY]
    assert np.flatnonzero(window.dirty()).tolist() == DIRTY
    return Scene(store, window)


def fail(scene: Scene, name: str) -> StoreError:
    """Do what cannot succeed: of a remap, what is completed is done and no more."""
    with pytest.raises(StoreError) as caught:
        OPERATIONS[name](scene.window)
    assert not scene.window.closed
    check_mapping(scene, name, caught.value.completed)
    return caught.value


def check_mapping(scene: Scene, name: str, completed: int) -> None:
    if name in ORDERS:
        expected = np.arange(WINDOW_PAGES)
        expected[ORDERS[name][:completed]] = OTHERS[:completed]
        assert scene.window.mapping.tolist() == expected.tolist()
    elif not name.startswith(("place", "remap")):
        assert scene.window.mapping.tolist() == list(range(WINDOW_PAGES))


# ---------------------------------------------------------------------------
# A device that is full.
# ---------------------------------------------------------------------------

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
LIBC = ctypes.CDLL(None, use_errno=True)


def mount(folder: Path, size: int) -> bool:
    """Mount a file system of `size` bytes that only this process sees, if it may do that."""
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWNS if user == 0 else CLONE_NEWNS | CLONE_NEWUSER) != 0:
        return False
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    alone = LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    options = f"size={size}".encode()
    return alone == 0 and LIBC.mount(b"none", os.fsencode(folder), b"tmpfs", 0, options) == 0


class Limited:
    """A process that may write files only up to page 5, or the first bytes of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pages"
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, store: Any) -> None:
        # A direct write that the limit cuts within a page is refused as a whole.
        limit = 5 * 4096 + (0 if store.direct else 1000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self.before[1]))

    def make_room(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


class Full:
    """A file with holes where the window has pages, on a file system with room for four."""

    def __init__(self, folder: Path) -> None:
        self.path, self.ballast = folder / "pages", folder / "ballast"

    def fill(self, store: Any) -> None:
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        for page in DIRTY:
            place = ctypes.c_int64(page * 4096), ctypes.c_int64(4096)
            assert LIBC.fallocate(store.fileno(), mode, *place) == 0
        with self.ballast.open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="space"):
                while True:
                    file.write(bytes(4096))
            file.truncate(file.tell() - 4 * 4096)

    def make_room(self) -> None:
        self.ballast.unlink()


@EACH
@pytest.mark.parametrize("room", ["limited", "full", *DIRECT])
def test_no_room(
    write_back: dict[str, Any],
    name: str,
    room: str,
    tmp_path: Path,
    make_store: Callable[[str], Any],
    in_child: Child,
) -> None:
    """Where nobody may mount a file system, that is the limit once more."""

    def body() -> None:
        mounted = room == "full" and mount(tmp_path, 1 << 20)
        device = Full(tmp_path) if mounted else Limited(tmp_path)
        device.path.write_bytes(BEFORE.tobytes())
        with make_store(room) as store:
            scene = make_scene(store, write_back)
            device.fill(store)
            for _ in range(2):  # the second failure is like the first
                error = fail(scene, name)
                assert error.errno in ((errno.ENOSPC,) if mounted else (errno.EFBIG, errno.ENOSPC))
                assert error.filename == str(device.path)
                if mounted:
                    assert f"the file system at {tmp_path} has " in str(error)
                assert scene.window.dirty().any()
                scene.check()
            device.make_room()
            scene.succeed(name)

    assert in_child(body) == 0


@pytest.mark.parametrize("opened", ["window", "memmap"])
def test_an_aliased_hole_that_finds_no_room(opened: str, tmp_path: Path, in_child: Child) -> None:
    """The kernel has no memory for the pages, and says that their addresses are bad."""

    def body() -> None:
        if not mount(tmp_path, 1 << 20):
            return
        path = tmp_path / "holes"
        with path.open("wb") as file:
            file.truncate(4 << 20)
        if opened == "window":
            populate = fremap.Window(fremap.open(path), engine="alias").populate
        else:
            populate = fremap.memmap(path, mode="r+").populate
        with pytest.raises(fremap.StoreError, match=f"system at {tmp_path} has 0 bytes") as caught:
            populate()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)

    assert in_child(body) == 0


TOUCHED = """
import sys
import numpy as np
import fremap
path, opened = sys.argv[1:]
if opened == "window":
    window = fremap.Window(fremap.open(path, "r+"), coherent=True, prot=fremap.Prot.WRITE)
    memory = window.array(np.uint8)
else:
    memory = fremap.memmap(path, np.uint8, "r+")
memory[::4096] = 1
"""


@pytest.mark.parametrize("opened", ["window", "memmap"])
def test_a_touch_of_an_aliased_hole_that_finds_no_room(
    opened: str, tmp_path: Path, in_child: Child
) -> None:
    """The kernel sends a signal that says nothing; a line says what is full."""

    def body() -> None:
        if not mount(tmp_path, 1 << 20):
            return
        path = tmp_path / "holes"
        with path.open("wb") as file:
            file.truncate(4 << 20)
        command = [sys.executable, "-c", TOUCHED, path, opened]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGBUS
        [line] = done.stderr.splitlines()
        assert f"the file system of {path} has 0 bytes free" in line
        assert line.startswith("fremap: window page ")
        assert line.endswith("the touch raises SIGBUS")

    assert in_child(body) == 0


def test_changes_that_find_no_room_may_be_given_up(
    write_back: dict[str, Any], tmp_path: Path, in_child: Child
) -> None:
    def body() -> None:
        device = Limited(tmp_path)
        device.path.write_bytes(BEFORE.tobytes())
        with fremap.open(device.path, "r+", page_bytes=4096) as store:
            scene = make_scene(store, write_back)
            device.fill(store)
            fail(scene, "close")
            held = device.path.read_bytes()
            device.make_room()
            scene.window.close(discard=True)
            assert scene.window.closed
            assert device.path.read_bytes() == held

    assert in_child(body) == 0


# ---------------------------------------------------------------------------
# Calls that fail.
# ---------------------------------------------------------------------------


@pytest.fixture
def make_scene_on(make_store: Callable[[str], Any], write_back: dict[str, Any]) -> Any:
    """`make_scene_on(kind)`: a window on a file or on shared memory."""

    def make(kind: str) -> Scene:
        store = make_store(kind)
        store.write(range(WINDOW_PAGES), BEFORE[:WINDOW_PAGES])
        store.sync()
        return make_scene(store, write_back)

    return make


@EACH
@KINDS
def test_each_call_fails_once(make_scene_on: Any, name: str, kind: str) -> None:
    """The n-th call of each kind: what the operation was to write is written in the end."""
    scene = make_scene_on(kind)
    with counting() as calls:
        OPERATIONS[name](scene.window)
    scene.window.close()
    assert sum(calls[write] for write in WRITES) > 0
    for call, count in calls.made.items():
        if call in SILENT:
            continue
        for number in ERRNOS.get(call, (errno.EIO,)):
            for skip in range(min(count, MOST_CALLS)):
                one_failure(make_scene_on(kind), name, call, number, skip)


def check_errno(error: FremapError, number: int) -> None:
    assert not isinstance(error, OSError) or error.errno == number, error


def one_failure(scene: Scene, name: str, call: str, number: int, skip: int) -> None:
    what = f"{name}: {call} number {skip} fails with {errno.errorcode[number]}"
    with scene.store:
        try:
            with failures(call, errno=number, skip=skip):
                OPERATIONS[name](scene.window)
        except FremapError as error:
            error.add_note(what)
            check_errno(error, number)
            check_mapping(scene, name, getattr(error, "completed", 0))
        try:
            scene.check()
            scene.succeed(name)
        except (AssertionError, FremapError) as error:
            error.add_note(what)
            raise


@contextmanager
def bad_device(number: int) -> Iterator[None]:
    """Whoever writes gets this error, for good."""
    with (
        failures(WRITES[0], errno=number, times=FOR_GOOD),
        failures(WRITES[1], errno=number, times=FOR_GOOD),
    ):
        yield


@EACH
@KINDS
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EINTR])
def test_a_bad_device(make_scene_on: Any, name: str, kind: str, number: int) -> None:
    """Writing fails for good: an error each time, and nothing is lost."""
    scene = make_scene_on(kind)
    with scene.store:
        with bad_device(number):
            for _ in range(2):
                assert fail(scene, name).errno == number
                assert np.flatnonzero(scene.window.dirty()).tolist() == DIRTY
                scene.check()
        scene.succeed(name)


@EACH
@KINDS
@pytest.mark.parametrize("most_pages", [1, 2])
def test_short_writes(make_scene_on: Any, name: str, kind: str, most_pages: int) -> None:
    """They are gone on with from where they stopped; a ring's answer may be any number."""
    scene = make_scene_on(kind)
    lengths = most_pages * 4096, most_pages * 4096 + 1000
    with (
        scene.store,
        short_writes(WRITES[0], most_bytes=lengths[0], times=FOR_GOOD) as calls,
        short_writes(WRITES[1], most_bytes=lengths[1], times=FOR_GOOD),
    ):
        OPERATIONS[name](scene.window)
        # All of them are single pages but the run of six.
        assert sum(calls[write] for write in WRITES) == 3 + 6 // most_pages
        assert all(scene.is_written(page) for page in DIRTY)
        scene.check()
        scene.window.close()


@pytest.mark.needs("io_uring")
@pytest.mark.parametrize("name", ["flush", "evict", "close"])
def test_direct_writes_are_in_flight_together(make_scene_on: Any, name: str) -> None:
    """Through a ring, a run each; one that is refused half way is no loss."""
    for enters in range(3):
        scene = make_scene_on("direct")
        with scene.store, failures("io_uring_enter", errno=errno.EIO, skip=enters) as calls:
            OPERATIONS[name](scene.window)
            assert sum(calls[write] for write in WRITES) == 4
            assert calls["io_uring_enter"] > 0
            assert all(scene.is_written(page) for page in DIRTY)
            scene.window.close()


@KINDS
def test_fsync_fails(make_scene_on: Any, kind: str) -> None:
    """The pages are dirty as before, and the next flush writes all of them again."""
    scene = make_scene_on(kind)
    with scene.store:
        with failures("fsync", errno=errno.EIO, times=2):
            for _ in range(2):
                assert fail(scene, "flush").errno == errno.EIO
                assert np.flatnonzero(scene.window.dirty()).tolist() == DIRTY
                scene.check()
        scene.store.write(DIRTY, BEFORE[DIRTY])  # as if the device had forgotten them
        with counting() as calls:
            scene.window.flush()
        assert calls["fsync"] == 1
        scene.succeed("close")


def other_window(store: Any) -> Any:
    return fremap.Window(store, 1, first_page=30, prot=Prot.WRITE, coherent=False)


@pytest.mark.parametrize("name", ["whole flush", "flush", "sync"])
def test_what_was_stored_to_the_file_itself_is_lost_once(make_store: Any, name: str) -> None:
    """Nobody knows what a coherent window has stored: no retry calls it durable."""
    with make_store("file") as store:
        window = fremap.Window(store, 4, prot=Prot.WRITE, coherent=True)
        window.pages[1] = 7
        flushes = {
            "whole flush": window.flush,
            "flush": lambda: window.flush([1]),
            "sync": store.sync,
        }
        with failures("msync" if name == "flush" else "fsync", errno=errno.EIO):
            for _ in range(2):
                with pytest.raises(StoreError, match=r"store\.refresh"):
                    flushes[name]()
        for each in flushes.values():
            with pytest.raises(StoreError, match=r"store\.refresh"):
                each()
        store.refresh()
        for each in flushes.values():
            each()
        window.close()


def test_what_another_window_was_told_is_no_success(make_store: Any) -> None:
    """The pages of both windows are dirty after the sync of one has failed, and written again."""
    with make_store("file") as store:
        store.sync()
        windows = [
            fremap.Window(
                store, 4, first_page=first, prot=Prot.WRITE, coherent=False, populate=True
            )
            for first in (0, 4)
        ]
        for number, window in enumerate(windows):
            window.pages[:] = 100 + number
        with failures("fsync", errno=errno.EIO, times=2):
            for window in windows:
                with pytest.raises(StoreError):
                    window.flush()
        for window in windows:
            assert window.dirty().all()
            window.flush()
            window.close()
        assert (store.read(range(4)) == 100).all()
        assert (store.read(range(4, 8)) == 101).all()


@KINDS
@pytest.mark.parametrize("name", ["evict", "remap", "place", "protect NONE"])
def test_what_was_written_in_passing_is_made_durable(
    make_scene_on: Any, name: str, kind: str
) -> None:
    """By the next flush; where that fails nobody has the pages, and nothing succeeds again
    before that is acknowledged: the kernel tells of it once."""
    scene = make_scene_on(kind)
    with scene.store, other_window(scene.store) as other:
        OPERATIONS[name](scene.window)
        with failures("fsync", errno=errno.EIO), pytest.raises(StoreError):
            scene.window.flush()
        with counting() as calls:
            for call in (scene.window.flush, other.flush, scene.store.sync, scene.window.close):
                with pytest.raises(
                    StoreError, match=r"write it again after store\.refresh"
                ) as caught:
                    call()
                assert caught.value.errno == errno.EIO
        assert calls["fsync"] == 0
        assert not scene.window.closed
        scene.store.refresh()
        for expected in (1, 0):
            with counting() as calls:
                scene.window.flush()
            assert calls["fsync"] == expected
        scene.check()
        scene.window.close()


def test_leaving_the_context_fails(make_store: Any, write_back: dict[str, Any]) -> None:
    """The error is raised, the window stays open, and what was stored is not lost."""
    with make_store("file") as store:
        scene = make_scene(store, write_back)
        with (
            failures("write", errno=errno.EIO, times=FOR_GOOD),
            pytest.raises(StoreError),
            scene.window,
        ):
            pass
        assert not scene.window.closed
        scene.check()
        scene.succeed("close")


def test_leaving_the_context_hides_no_exception(
    make_store: Any, write_back: dict[str, Any]
) -> None:
    with make_store("file") as store:
        scene = make_scene(store, write_back)
        with (
            failures("write", errno=errno.EIO, times=FOR_GOOD),
            pytest.raises(KeyError) as caught,
            scene.window,
        ):
            raise KeyError("the caller's")
        assert any("flush" in note for note in caught.value.__notes__)
        scene.succeed("close")


# ---------------------------------------------------------------------------
# A file that is cut short.
# ---------------------------------------------------------------------------

LEFT = 6 * 4096 + 100


@EACH
@pytest.mark.parametrize("kind", ["file", *DIRECT])
def test_a_file_is_cut_short(
    make_store: Any, write_back: dict[str, Any], name: str, kind: str
) -> None:
    """An error, and never a longer file; once it is as long again all is written."""
    with make_store(kind) as store:
        scene = make_scene(store, write_back)
        os.ftruncate(store.fileno(), LEFT)
        for _ in range(2):
            with pytest.raises(TruncatedError):
                OPERATIONS[name](scene.window)
            assert os.fstat(store.fileno()).st_size == LEFT
            dirty = scene.window.dirty()
            for page in DIRTY:
                assert scene.shows(page) if dirty[page] else scene.is_written(page), f"page {page}"
            assert dirty[[7, 8, 11, 15]].all()
        os.ftruncate(store.fileno(), STORE_PAGES * 4096)
        store.write(range(16, STORE_PAGES), BEFORE[16:])
        for page in set(range(16)) - set(DIRTY):
            store.write(page, BEFORE[page])
        scene.succeed(name)


@pytest.mark.parametrize("tail_bytes", [1, 100, 4095])
@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_ends_within_a_page(
    tmp_path: Path, write_back: dict[str, Any], tail_bytes: int, direct: bool
) -> None:
    """What is stored past its end is dropped; what lies before it is written."""
    path = tmp_path / "pages"
    size = 3 * 4096 + tail_bytes
    path.write_bytes(BEFORE.tobytes()[:size])
    with (
        fremap.open(path, "r+", page_bytes=4096, direct=direct) as store,
        fremap.Window(store, populate=True, **write_back) as window,
    ):
        assert not window.pages[3, tail_bytes:].any()
        window.pages[3] = AFTER[3].view(np.uint8)
        window.flush()
        expected = BEFORE.tobytes()[: 3 * 4096] + AFTER[3].tobytes()[:tail_bytes]
        assert path.read_bytes() == expected
        window.evict(3)
        window.populate(3)
        assert not window.pages[3, tail_bytes:].any()
        window.pages[3] = BEFORE[3].view(np.uint8)
    assert path.read_bytes() == BEFORE.tobytes()[:size]
