"""Paired rounds, and what they come to: timings, rows with their bars, a report.

A suite measures two or more contenders in turn (A B A B ...), each round over
fresh pages that are the same for all of them. A ratio is the median of the
rounds' own ratios, so that a machine that is slow for a second is slow for both
sides of it.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

LEAST_ROUNDS = 5
# The units of ratios: theirs by ours, and ours by theirs.
_FASTER, _OF_THE_TIME = "times faster", "of the time"


class BenchError(Exception):
    """A suite that cannot run here, and why."""


@dataclass(frozen=True)
class Timing:
    """The rounds of one contender.

    Attributes
    ----------
    name
        The contender.
    seconds
        Each round's time.
    operations
        Operations (pages, faults, calls) in a round.
    """

    name: str
    seconds: tuple[float, ...]
    operations: int

    @property
    def microseconds(self) -> float:
        """The median round's time for an operation."""
        return statistics.median(self.seconds) / self.operations * 1e6


Contender: TypeAlias = Callable[[int], Mapping[str, float]]
#: Is told how many rounds of how many are over.
Watcher: TypeAlias = Callable[[int, int], None]

_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Have `watcher` told of each round that ends meanwhile."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def paired(
    contenders: Sequence[Contender], *, rounds: int, operations: int, warm_ups: int = 2
) -> dict[str, Timing]:
    """Run the contenders in turn, `warm_ups` rounds unmeasured and `rounds` measured.

    A contender is called with the number of the round, unmeasured ones first,
    and returns the seconds of each thing it timed, by name. Each round begins
    with another contender, so that none always runs after the same neighbour.
    """
    seconds: dict[str, list[float]] = {}
    for number in range(warm_ups + rounds):
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            taken = contender(number)
            if number >= warm_ups:
                for name, elapsed in taken.items():
                    seconds.setdefault(name, []).append(elapsed)
        for watcher in _watchers:
            watcher(number + 1, warm_ups + rounds)
    return {name: Timing(name, tuple(taken), operations) for name, taken in seconds.items()}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Row:
    """One line of a report: a value, and the bar it is held to.

    Attributes
    ----------
    what
        What was measured.
    value, unit
        The result, in the terms of the bar.
    at_least, at_most
        The bar, or neither.
    ours, theirs
        The timings that a ratio is made of.
    ratios
        Each round's ratio.
    own
        Whether both sides are cases of one kind, so that neither can lose.
    """

    what: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    ours: Timing | None = None
    theirs: Timing | None = None
    ratios: tuple[float, ...] = ()
    own: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is no bar."""
        if self.at_least is not None:
            return self.value >= self.at_least
        if self.at_most is not None:
            return self.value <= self.at_most
        return None

    @property
    def lost(self) -> bool:
        """Whether ours is slower: by the medians of both, or by the median of the rounds' ratios.

        The two may differ where the rounds do.
        """
        if self.ours is None or self.theirs is None or self.own:
            return False
        return self.ours.microseconds > self.theirs.microseconds or self.speed < 1

    @property
    def speed(self) -> float:
        """How many times as fast ours is, in whichever unit the value is; of a ratio."""
        return statistics.median(self.speeds)

    @property
    def speeds(self) -> tuple[float, ...]:
        """The same of each round; empty where there is no ratio."""
        if self.ours is None or self.theirs is None:
            return ()
        return tuple(b / a for a, b in _pairs(self.ours, self.theirs))

    @property
    def bar(self) -> str:
        """The bar as text."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return ""

    @property
    def as_speed(self) -> "Row":
        """The same row as people read it: a ratio of times as how many times as fast ours is."""
        if self.unit not in (_FASTER, _OF_THE_TIME):
            return self
        least = self.at_least or (1 / self.at_most if self.at_most else None)
        return replace(
            self, what=self.versus, value=self.speed, unit="times as fast",
            at_least=least, at_most=None,
        )  # fmt: skip

    @property
    def versus(self) -> str:
        """What was measured, with "vs" for the "than" or "of" of its ratio."""
        return re.sub(r"(^|[:,] )(?:than|of)\b", r"\1vs", self.what)


def times_faster(what: str, ours: Timing, theirs: Timing, *, at_least: float | None = None) -> Row:
    """Return how many times faster `ours` is: the median of the rounds' ratios."""
    ratios = tuple(b / a for a, b in _pairs(ours, theirs))
    return Row(
        what, statistics.median(ratios), _FASTER,
        at_least=at_least, ours=ours, theirs=theirs, ratios=ratios,
    )  # fmt: skip


def times_the_time(what: str, ours: Timing, theirs: Timing, *, at_most: float | None = None) -> Row:
    """Return how many times as long `ours` takes: the median of the rounds' ratios."""
    ratios = tuple(a / b for a, b in _pairs(ours, theirs))
    return Row(
        what, statistics.median(ratios), _OF_THE_TIME,
        at_most=at_most, ours=ours, theirs=theirs, ratios=ratios,
    )  # fmt: skip


def _pairs(ours: Timing, theirs: Timing) -> list[tuple[float, float]]:
    """Return each round's time for an operation, both sides."""
    return [
        (a / ours.operations, b / theirs.operations)
        for a, b in zip(ours.seconds, theirs.seconds, strict=True)
    ]


@dataclass
class Report:
    """What a suite found.

    Attributes
    ----------
    suite
        Its name.
    title
        What it measures, in a line.
    rows
        Ratios and counts, each with its bar where it has one.
    notes
        The state things were measured in.
    missing
        What was not measured, and why.
    """

    suite: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def count(self, what: str, value: float, unit: str, *, at_most: float | None = None) -> None:
        """Add a value that is no ratio of times."""
        self.rows.append(Row(what, value, unit, at_most=at_most))

    @property
    def losses(self) -> list[tuple[Timing, Timing]]:
        """What was slower, and what it was slower than."""
        return [(row.ours, row.theirs) for row in self.rows if row.ours and row.theirs and row.lost]

    @property
    def unmet(self) -> list[Row]:
        """Rows that miss their bar."""
        return [row for row in self.rows if row.met is False]
