"""Functions that provide pages, for other processes to find by their names."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from fremap.testing.pages import fill_numbered

Numbers = np.ndarray
Content = np.ndarray


class Noted:
    """Numbered pages; notes which were asked for, a line for each call, and by which process."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def __call__(self, pages: Numbers, out: Content) -> None:
        with self.notes.open("a") as file:
            file.write(f"{os.getpid()} {' '.join(map(str, pages.tolist()))}\n")
        fill_numbered(pages, out)

    @property
    def calls(self) -> list[list[int]]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [[int(number) for number in line.split()[1:]] for line in lines]

    @property
    def pages(self) -> list[int]:
        return sorted(page for call in self.calls for page in call)

    @property
    def processes(self) -> list[int]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [int(line.split()[0]) for line in lines]


class OwnError(Exception):
    """What cannot be made of its arguments, so that it cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Wrong(Noted):
    """Does something wrong when a page is wanted; numbered pages otherwise."""

    def __init__(self, notes: Path, wrong: str, page: int, times: int = 1 << 30) -> None:
        super().__init__(notes)
        self.wrong, self.page, self.times = wrong, page, times

    def __call__(self, pages: Numbers, out: Content) -> object:
        super().__call__(pages, out)
        done = sum(self.page in call for call in self.calls)
        if self.page not in pages or done > self.times:
            return None
        return getattr(self, self.wrong)(pages)

    def raises(self, pages: Numbers) -> None:
        raise ValueError(f"no page {self.page}")

    def raises_system(self, pages: Numbers) -> None:
        raise FileNotFoundError(2, "No such tile", "/tiles/7")

    def raises_own(self, pages: Numbers) -> None:
        raise OwnError(1, 2)

    def leaves(self, pages: Numbers) -> None:
        raise SystemExit(3)

    def returns(self, pages: Numbers) -> Numbers:
        return pages

    def hangs(self, pages: Numbers) -> None:
        time.sleep(1000)

    def dies(self, pages: Numbers) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def exits(self, pages: Numbers) -> None:
        os._exit(7)


class Meets(Noted):
    """Waits until two processes are at work at once."""

    def __call__(self, pages: Numbers, out: Content) -> None:
        super().__call__(pages, out)
        deadline = time.monotonic() + 60
        while len(set(self.processes)) < 2:
            assert time.monotonic() < deadline, "nobody else is at work"
            time.sleep(0.01)


class Broken:
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return refuse, ("this is broken",)

    def __call__(self, pages: Numbers, out: Content) -> None:
        raise AssertionError


def refuse(why: str) -> None:
    raise RuntimeError(why)


def half(pages: Numbers, out: Content) -> None:
    """Write the first half of each page."""
    out[:, : out.shape[1] // 2] = pages[:, None] % 251


def first_words(store: object, pages: list[int]) -> list[int]:
    """Read the first word of each page, in whatever process this is."""
    return store.read(pages).view("<u8")[:, 0].tolist()


class Gated(Noted):
    """Numbered pages; those from some page on once a file is there."""

    def __init__(self, notes: Path, gate: Path, first: int = 0) -> None:
        super().__init__(notes)
        self.gate, self.first = gate, first

    def __call__(self, pages: Numbers, out: Content) -> None:
        super().__call__(pages, out)
        while pages[-1] >= self.first and not self.gate.exists():
            time.sleep(0.01)
