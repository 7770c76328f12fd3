"""What a process that dies leaves of slots that it shares: all that others need."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import fremap
import numpy as np
import pytest
from forking import fork
from fremap import _core
from sharing import (
    EXTENTS,
    SLOTS,
    Child,
    check,
    shared,
)

if TYPE_CHECKING:
    from collections.abc import Callable


# Processes that die.


def test_what_a_dead_process_was_reading_is_read_by_who_waits(slots: fremap.Slots) -> None:
    def body(pause: Callable[[], None]) -> None:
        taken = slots._memory.table.reserve("ensure", np.arange(3))
        pause()
        taken.release()

    child = Child(body).paused()
    waiting = threading.Thread(target=check, args=(slots, [0, 1, 2, 3]))
    waiting.start()
    child.kill()
    waiting.join()
    check(slots, [0, 1, 2, 3])
    assert slots.stats().misses == 3 + 1 + 3
    check(slots, list(range(4, 10)))


def test_pins_of_a_dead_process_end(slots: fremap.Slots) -> None:
    def body(pause: Callable[[], None]) -> None:
        pin = slots.pin(range(SLOTS))
        pause()
        pin.release()

    child = Child(body).paused()
    with pytest.raises(fremap.SlotsFullError):
        slots.ensure(7)
    child.kill()
    check(slots, [7, 8])
    assert slots.stats().pinned_slots == 0


def test_a_process_that_is_stopped_keeps_what_it_has(slots: fremap.Slots) -> None:
    def body(pause: Callable[[], None]) -> None:
        with slots.pin(range(SLOTS)):
            pause()

    child = Child(body).paused()
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    with pytest.raises(fremap.SlotsFullError):
        slots.ensure(7)
    os.kill(child.pid, signal.SIGCONT)
    child.go_on()
    child.answer()
    check(slots, [7])


def storm(store: fremap.FileStore, name: str, kills: int, workers: int = 3) -> None:
    """Kill processes at work, at whatever instruction they are."""
    draw = random.Random(kills)
    progress = mmap.mmap(-1, 4096)

    def done(worker: int) -> int:
        return int(struct.unpack_from("q", progress, worker * 8)[0])

    def work(worker: int, seed: int) -> None:
        own = random.Random(seed)
        with suppress(fremap.SlotsFullError):
            while os.getppid() == parent:
                keys = own.sample(range(EXTENTS), own.randint(1, 2))
                with suppress(fremap.SlotsFullError):
                    if own.random() < 0.1:
                        slots.evict(keys)
                    elif own.random() < 0.5:
                        slots.ensure(keys)
                    else:
                        check(slots, keys)
                struct.pack_into("q", progress, worker * 8, done(worker) + 1)

    parent = os.getpid()

    def start(worker: int, seed: int) -> int:
        return fork(lambda: work(worker, seed), write)

    read, write = os.pipe()
    with shared(store, name) as slots:
        children = [start(worker, worker) for worker in range(workers)]
        for kill in range(kills):
            worker = draw.randrange(workers)
            # Others go on meanwhile.
            until = done(worker) + draw.randint(1, 4)
            while done(worker) < until:
                os.sched_yield()
            for _ in range(draw.randint(0, 2000)):
                pass
            os.kill(children[worker], signal.SIGKILL)
            os.waitpid(children[worker], 0)
            if kill % 10 == 0:
                keys = draw.sample(range(EXTENTS), 2)
                with suppress(fremap.SlotsFullError):
                    check(slots, keys)
            children[worker] = start(worker, kill + workers)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(write)
        with open(read) as pipe:
            text = pipe.read()
        assert not text, text
        # Nothing is lost and nothing is left.
        assert slots.stats().pinned_slots == 0
        for first in range(0, EXTENTS, SLOTS):
            check(slots, list(range(first, first + SLOTS)))
        found = [one for one in _core.list_shared_slots() if one["name"] == name]
        assert [one["processes"] for one in found] == [[os.getpid()]]


def test_processes_that_are_killed_hold_up_nobody(store: fremap.FileStore, name: str) -> None:
    storm(store, name, 30)


@pytest.mark.long
def test_a_thousand_kills_lose_nothing(store: fremap.FileStore, name: str) -> None:
    storm(store, name, 1000)
