"""A process that writes is killed: what was flushed is in the file, and nothing else is but stores.

What is promised when a process is killed: a flush that returned is in the file; a page
of the file holds what was stored to it at some time, not before its last flush. The
kernel copies each system page (4096 bytes) of a write at once and looks for signals
between two, and waits for the direct writes of a process that ends, so that a system page
is never torn here. A larger page may be, between
its system pages. When the machine goes down, a system page may be torn by the device too.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.any_user
FILE_PAGES = 64
WINDOW_PAGES = 32
MOST_STORED = 8
SYSTEM_WORDS = 512
REPORT = b"flushed."
KILLS = [10, pytest.param(1000, marks=pytest.mark.long)]

Stamps = list[tuple[int, int]]


def stamp(file_page: int | np.ndarray, generation: int) -> Any:
    """The word that a page is full of: which page it is, and which store to it."""
    return np.uint64(generation) << np.uint64(16) | np.uint64(1) + np.uint64(file_page)


def steps(seed: int, generation: int) -> Iterator[tuple[np.ndarray, Stamps, Stamps]]:
    """What a child does, again and again: stores, a remap, and more stores before a flush."""
    random = np.random.default_rng(seed)
    shown = np.arange(WINDOW_PAGES)
    while True:
        before = [(page, generation) for page in drawn(random, shown)]
        shown = random.permutation(FILE_PAGES)[:WINDOW_PAGES]
        after = [(page, generation + 1) for page in drawn(random, shown)]
        yield shown, before, after
        generation += 2


def drawn(random: np.random.Generator, shown: np.ndarray) -> list[int]:
    count = int(random.integers(0, MOST_STORED + 1))
    return [int(page) for page in random.permutation(shown)[:count]]


@dataclass(frozen=True)
class Target:
    """What is written: a descriptor, and whether past the page cache."""

    file: int
    direct: bool = False


def write_until_killed(
    target: Target, page_bytes: int, options: dict[str, Any], seed: int, generation: int, pipe: int
) -> None:
    """Write to a window, and report each flush when it has returned."""
    store = fremap.open(target.file, "r+", page_bytes=page_bytes, direct=target.direct)
    window = fremap.Window(store, WINDOW_PAGES, populate=True, **options)
    words = window.array(np.uint64, (WINDOW_PAGES, -1))
    places = {page: page for page in range(WINDOW_PAGES)}
    for shown, before, after in steps(seed, generation):
        for page, number in before:
            words[places[page]] = stamp(page, number)
        window.remap(shown)
        places = {page: place for place, page in enumerate(shown.tolist())}
        for page, number in after:
            words[places[page]] = stamp(page, number)
        window.flush()
        os.write(pipe, REPORT)


def check(found: np.ndarray, held: np.ndarray, seed: int, generation: int, flushed: int) -> int:
    """Compare the file with what may be in it; the generation that is to follow.

    `held` is what it held before the child began, a stamp for each system page.
    """
    possible = [{int(word) for word in page} for page in held]
    for step, (_, before, after) in enumerate(steps(seed, generation)):
        for page, number in before + after:
            if step < flushed:
                possible[page] = set()
            possible[page].add(int(stamp(page, number)))
        if step == flushed:
            break
    whole = found.reshape(FILE_PAGES, -1, SYSTEM_WORDS)
    assert (whole == whole[:, :, :1]).all(), "a system page is torn"
    for page, words in enumerate(whole[:, :, 0].tolist()):
        wrong = set(words) - possible[page]
        assert not wrong, f"file page {page} holds {wrong}, not {possible[page]}"
    return generation + 2 * (flushed + 1)


@pytest.fixture(params=["file", "direct", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Target]:
    """A file on the disk, through the page cache or past it, or shared memory."""
    if request.param == "memory":
        opened = os.memfd_create("fremap-crash")
    else:
        opened = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
    yield Target(opened, request.param == "direct")
    os.close(opened)


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("page_bytes", [4096, 16_384])
def test_a_writer_is_killed(
    write_back: dict[str, Any],
    target: Target,
    page_bytes: int,
    kills: int,
    in_child: Callable[..., int],
) -> None:
    random = np.random.default_rng(20021031)
    content = np.repeat(stamp(np.arange(FILE_PAGES), 0), page_bytes // 8)
    os.pwrite(target.file, content.tobytes(), 0)
    generation, reports = 1, 0
    for seed in range(kills):
        held = content.reshape(FILE_PAGES, -1, SYSTEM_WORDS)[:, :, 0]
        flushed = one_kill(target, page_bytes, write_back, seed, generation, random, in_child)
        content = np.frombuffer(os.pread(target.file, FILE_PAGES * page_bytes + 1, 0), np.uint64)
        generation = check(content, held, seed, generation, flushed)
        reports += flushed
    assert reports > 0


def one_kill(
    target: Target,
    page_bytes: int,
    options: dict[str, Any],
    seed: int,
    generation: int,
    random: np.random.Generator,
    in_child: Callable[..., int],
) -> int:
    """Kill a writer a while after one of its first flushes; how many it has reported."""
    reading, writing = os.pipe()
    reports = bytearray()

    def kill(child: int) -> None:
        os.close(writing)
        for _ in range(random.integers(0, 6)):
            reports.extend(os.read(reading, len(REPORT)))
        for _ in range(random.integers(0, 20_000)):
            pass
        os.kill(child, signal.SIGKILL)
        while report := os.read(reading, 1 << 16):
            reports.extend(report)

    def body() -> None:
        os.close(reading)
        write_until_killed(target, page_bytes, options, seed, generation, writing)

    try:
        assert in_child(body, kill) == -signal.SIGKILL
    finally:
        os.close(reading)
    return len(reports) // len(REPORT)
