"""Draw the charts of the documentation: `python docs/charts.py`.

`docs/benchmarks/SUITE.json` is what `fremap bench SUITE --json` printed. Each report in it becomes
`docs/pictures/bench-SUITE-NUMBER.svg`, and a few rows of them `docs/pictures/overview.svg`. A bar
that goes to the right says how many times as fast fremap is; one to the left, in orange, how many
times as fast the other is. `tests/docs/test_charts.py` draws them again and compares.
"""

import json
import math
import re
import statistics
import textwrap
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
SUITES = ("take", "batches", "remap", "fault", "dirty", "protect", "scan", "slots", "remote", "ray")

WIDTH, SIDE = 500, 10
BAR_LEFT, BAR_RIGHT = SIDE, WIDTH - 70
ROW, BAR = 42, 14
TITLE_CHARACTERS, LABEL_CHARACTERS = 58, 56

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #24292f }
  .title { font-weight: 600; font-size: 15px }
  .pale { fill: #57606a; font-size: 12px } .end { text-anchor: end }
  .value { font-weight: 600; text-anchor: end }
  .faster { fill: #0969da } .slower { fill: #bc4c00 } .own { fill: #6e7781 }
  .axis { stroke: #57606a; stroke-width: 1.5 } .spread { stroke: #24292f; stroke-width: 1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .pale { fill: #9da7b3 }
    .faster { fill: #58a6ff } .slower { fill: #f0883e } .own { fill: #8b949e }
    .axis { stroke: #9da7b3 } .spread { stroke: #e6edf3 }
  }
"""


@dataclass(frozen=True)
class Bar:
    """One ratio: each round's, and what both sides took."""

    label: str
    speeds: tuple[float, ...]
    ours: float
    theirs: float

    @property
    def speed(self) -> float:
        """How many times as fast fremap is: the median of the rounds."""
        return statistics.median(self.speeds)


def bar_of(row: dict[str, Any]) -> Bar | None:
    """Return what a row of a report draws, if it is a ratio of two times."""
    ours, theirs = row["fremap"], row["other"]
    if not ours or not theirs:
        return None
    rounds = zip(ours["seconds"], theirs["seconds"], strict=True)
    scale = ours["operations"] / theirs["operations"]
    label = re.sub(r"(^|[:,] )(?:than|of)\b", r"\1vs", row["what"])
    speeds = tuple(b / a * scale for a, b in rounds)
    return Bar(label, speeds, ours["microseconds"], theirs["microseconds"])


def bars_of(report: dict[str, Any]) -> list[Bar]:
    """Return the bars of a report."""
    bars = [bar for row in report["rows"] if (bar := bar_of(row))]
    # What all labels begin with says nothing.
    fronts = {bar.label.partition(": ")[0] for bar in bars}
    if len(bars) > 1 and len(fronts) == 1 and all(": " in bar.label for bar in bars):
        bars = [replace(bar, label=bar.label.partition(": ")[2]) for bar in bars]
    return bars


def number(value: float) -> str:
    """Write three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def chart(title: str, bars: list[Bar], unit: str) -> str:
    """Return a chart as SVG.

    Parameters
    ----------
    title : str
        What stands above it.
    bars : list of Bar
        The bars, from the top.
    unit : str
        What the times are of: "a row".

    Returns
    -------
    str
        The picture.
    """
    ends = [end for bar in bars for end in (min(bar.speeds), max(bar.speeds))]
    low, high = math.log(min(*ends, 0.7)), math.log(max(*ends, 1.5))
    heading = textwrap.wrap(title, TITLE_CHARACTERS)

    def x(speed: float) -> float:
        return round(BAR_LEFT + (math.log(speed) - low) / (high - low) * (BAR_RIGHT - BAR_LEFT), 1)

    y = 8.0
    parts = []
    for line in heading:
        y += 18
        parts.append(f'<text class="title" x="{SIDE}" y="{y:g}">{escape(line)}</text>')
    y += 20
    legend = f"times as fast as the other; µs {unit}: fremap | the other"
    parts.append(f'<text class="pale" x="{SIDE}" y="{y:g}">{legend}</text>')
    top = y + 8
    for place, bar in enumerate(bars):
        y = top + place * ROW
        one, end = x(1), x(bar.speed)
        kind = "faster" if bar.speed >= 1 else "slower"
        label = textwrap.shorten(bar.label, LABEL_CHARACTERS, placeholder=" …")
        times = f"{number(bar.ours)} | {number(bar.theirs)}"
        low_x, high_x, right = x(min(bar.speeds)), x(max(bar.speeds)), WIDTH - SIDE
        parts += [
            f'<text x="{SIDE}" y="{y + 16:g}">{escape(label)}</text>',
            f'<text class="pale end" x="{right}" y="{y + 16:g}">{times}</text>',
            f'<path class="{kind}" d="M{one:g} {y + 22:g}H{end:g}v{BAR}H{one:g}z"/>',
            f'<path class="axis" d="M{one:g} {y + 19:g}v{BAR + 6}"/>',
            f'<path class="spread" d="M{low_x:g} {y + 29:g}H{high_x:g}"/>',
            f'<text class="value {kind}" x="{right}" y="{y + 34:g}">{number(bar.speed)} ×</text>',
        ]
    height = top + len(bars) * ROW + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" role="img" aria-label="{escape(title)}">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


#: The rows of the overview: suite, number of the report, end of the bar's label, new label.
OVERVIEW = (
    ("take", 2, "vs np.memmap[ids]", "random rows, not in memory: vs np.memmap[ids]"),
    ("take", 2, "then pread", "the same: vs posix_fadvise a row, then pread"),
    ("take", 3, "cold: vs h5py dataset[ids]", "the same: vs h5py dataset[ids]"),
    ("take", 0, "vs np.memmap[ids]", "random rows, in the page cache: vs np.memmap[ids]"),
    (
        "remap",
        0,
        "mmap(MAP_FIXED|MAP_POPULATE) a page",
        "remap of pages: vs mmap(MAP_FIXED) a page",
    ),
    ("batches", 0, "vs np.memmap[ids] a batch", "batches in the page cache: vs np.memmap[ids]"),
    ("scan", 0, "in order: vs np.memmap", "a scan in the page cache, with a budget: vs np.memmap"),
)


def unit_of(suite: str) -> str:
    """Return what the times of a suite are of."""
    rows = dict.fromkeys(("take", "batches", "remote"), "a row")
    return (rows | {"slots": "a key", "ray": "a take"}).get(suite, "a page")


def pictures() -> dict[str, str]:
    """Return each picture by its file's name."""
    found, reports = {}, {}
    for suite in SUITES:
        reports[suite] = json.loads((DOCS / f"benchmarks/{suite}.json").read_text())["reports"]
        for place, report in enumerate(reports[suite]):
            if bars := bars_of(report):
                title = report["title"][:1].upper() + report["title"][1:]
                found[f"bench-{suite}-{place + 1}.svg"] = chart(title, bars, unit_of(suite))
    chosen = []
    for suite, place, text, label in OVERVIEW:
        bar = next(bar for bar in bars_of(reports[suite][place]) if bar.label.endswith(text))
        chosen.append(replace(bar, label=label))
    title = "How many times as fast fremap is"
    found["overview.svg"] = chart(title, chosen, "a row or page")
    return found


if __name__ == "__main__":
    for name, picture in pictures().items():
        (PICTURES / name).write_text(picture)
