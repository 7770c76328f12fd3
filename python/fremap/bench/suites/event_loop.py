"""How late an event loop is: beside cold takes, beside preads in threads, and idle.

The three take turns, as a host that stops the whole machine for a while makes any loop
late; how much time it took is told beside the delays.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np

from fremap.bench import competitors
from fremap.bench.bench import Bench
from fremap.bench.harness import Report, Timing, paired, times_faster, times_the_time
from fremap.bench.machine import stolen_seconds
from fremap.bench.small_rows import ROW_BYTES, Bytes, ColdRows, Ids, SmallRows

TAKES = "beside take_async"
PREADS = "beside preads in threads"
IDLE = "idle"
_AT_ONCE = 4
_TICK_SECONDS = 0.001
_SETTLE_SECONDS = 0.02
# The idle loop is watched as long as the last takes lasted; before the first, so long.
_FIRST_IDLE_SECONDS = 0.1
_MOST_MILLISECONDS = 5

Work: TypeAlias = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class _Watched:
    """A loop while some work was under way.

    Attributes
    ----------
    seconds
        How long that took.
    late
        How late the loop was at each tick.
    stolen
        Processor seconds that the host gave to others meanwhile.
    """

    seconds: float
    late: list[float]
    stolen: float

    def named(self, side: str) -> Mapping[str, float]:
        """Return what there is to know of a round, by name."""
        return {
            f"{side}: seconds": self.seconds,
            f"{side}: longest delay": max(self.late),
            f"{side}: 99th percentile": float(np.percentile(self.late, 99)),
            f"{side}: stolen": self.stolen,
        }


async def _watch(work: Work) -> _Watched:
    """Tick each millisecond while `work` is under way."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(_TICK_SECONDS)
            late.append(time.perf_counter() - begin - _TICK_SECONDS)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(_SETTLE_SECONDS)
    late.clear()
    begin, stolen = time.perf_counter(), stolen_seconds()
    await work()
    seconds, stolen = time.perf_counter() - begin, stolen_seconds() - stolen
    await asyncio.sleep(3 * _TICK_SECONDS)  # the tick that was due when the work ended counts
    ticking.cancel()
    return _Watched(seconds, late, stolen)


def beside_takes(bench: Bench) -> Report:
    """Take cold rows beside an event loop, and see how late the loop is."""
    sides = SmallRows(bench)
    ids_of = ColdRows(sides, bench.rounds, 2 * _AT_ONCE)
    rows_at_once = _AT_ONCE * ids_of.count
    report = Report(
        "take", f"{_AT_ONCE} takes of {ids_of.count} cold rows at once, beside an event loop"
    )
    lasted = _FIRST_IDLE_SECONDS

    def parts(number: int, first: int) -> list[Ids]:
        return [ids_of.dropped(number, first + each) for each in range(_AT_ONCE)]

    def takes(number: int) -> Mapping[str, float]:
        nonlocal lasted
        ids = parts(number, 0)
        with sides.rows() as rows:
            taken: list[Bytes] = []

            async def work() -> None:
                taken.extend(await asyncio.gather(*map(rows.take_async, ids)))

            watched = asyncio.run(_watch(work))
        lasted = watched.seconds
        _verify(sides, taken, ids)
        return watched.named(TAKES)

    def preads(number: int) -> Mapping[str, float]:
        ids = parts(number, _AT_ONCE)
        outs = [np.empty((ids_of.count, ROW_BYTES), np.uint8) for _ in ids]
        with ThreadPoolExecutor(_AT_ONCE) as pool:

            async def work() -> None:
                loop = asyncio.get_running_loop()
                calls = [
                    partial(
                        competitors.fadvise_then_read, sides.file.fd, some, out,
                        page_bytes=ROW_BYTES, first_byte=sides.offset,
                    )
                    for some, out in zip(ids, outs, strict=True)
                ]  # fmt: skip
                await asyncio.gather(*(loop.run_in_executor(pool, call) for call in calls))

            watched = asyncio.run(_watch(work))
        _verify(sides, outs, ids)
        return watched.named(PREADS)

    def idle(_number: int) -> Mapping[str, float]:
        return asyncio.run(_watch(partial(asyncio.sleep, lasted))).named(IDLE)

    timings = paired([takes, preads, idle], rounds=bench.rounds, operations=1, warm_ups=1)
    _add_rows(report, timings, rows_at_once)
    return report


def _verify(sides: SmallRows, taken: list[Bytes], ids: list[Ids]) -> None:
    for some, asked in zip(taken, ids, strict=True):
        sides.verify(some, asked)


def _add_rows(report: Report, timings: dict[str, Timing], rows_at_once: int) -> None:
    def of_rows(side: str) -> Timing:
        return replace(timings[f"{side}: seconds"], name=side, operations=rows_at_once)

    report.rows.append(
        times_faster("the rows: than preads in threads", of_rows(TAKES), of_rows(PREADS))
    )
    for what, at_most in (("longest delay", _MOST_MILLISECONDS), ("99th percentile", None)):
        ours, theirs = (timings[f"{side}: {what}"] for side in (TAKES, PREADS))
        report.rows.append(times_the_time(f"{what}: of that {PREADS}", ours, theirs))
        for side in (TAKES, PREADS, IDLE):
            value = timings[f"{side}: {what}"].microseconds / 1000
            bar = at_most if side == TAKES else None
            report.count(f"{what}, {side}, median", value, "ms", at_most=bar)
    for side in (TAKES, PREADS, IDLE):
        stolen, seconds = (
            sum(timings[f"{side}: {what}"].seconds) for what in ("stolen", "seconds")
        )
        report.count(
            f"processor time that the host took, {side}", stolen / seconds * 1000, "ms a second"
        )
    report.notes.append(
        "delays are of ticks of 1 ms, of each round the longest and the 99th percentile; what "
        "the host took (steal in /proc/stat) is of all processors together"
    )
