"""Reports as a chart: how many times as fast fremap is, a panel for each report.

Only what is a ratio of two times is drawn; counts are in the report alone.
"""

import importlib.util
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fremap.bench.harness import BenchError, Report, Row
from fremap.bench.machine import Machine
from fremap.bench.render import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

# Inches, but for the columns: points to the right of the axes.
_WIDTH = 12.0
_ROW = 0.31
_PANEL = 0.8
_TITLE_LINE = 0.17
_HEADER = 1.0
_FOOTER = 0.55
_COLUMNS = (46, 104, 162, 172)
_LABEL_CHARACTERS = 56
_TITLE_CHARACTERS = 95
_LINE_CHARACTERS = 165
_SMALL = 8.5

# Told apart by those who see no red or no green, too.
_FASTER = "#0072b2"
_SLOWER = "#d55e00"
_OWN = "#8c8c8c"
_PALE = "#666666"


def check(path: Path) -> None:
    """Raise unless a chart can be written to `path`; before anything is measured.

    Raises
    ------
    BenchError
        What is wrong with the name, or what is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BenchError(
            f"--plot {path}: the format is told by the suffix, one of {', '.join(SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise BenchError(f"--plot {path}: there is no directory {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BenchError(f"--plot {path}: cannot be written")
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install matplotlib")


def write(path: Path, machine: Machine, reports: Sequence[Report]) -> None:
    """Draw `reports` into a file, in the format of its suffix."""
    figure(machine, reports).savefig(path, dpi=150)


def figure(machine: Machine, reports: Sequence[Report]) -> "Figure":
    """Draw a panel for each report that has ratios.

    Raises
    ------
    BenchError
        None has any.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [(report, rows) for report in reports if (rows := _ratios(report))]
    if not panels:
        raise BenchError("--plot: nothing to draw, as nothing that was measured is a ratio")
    height = _HEADER + sum(_height(*panel) for panel in panels) + _FOOTER
    between = (0, _FOOTER / height, 1, 1 - (_HEADER + _FOOTER) / height)
    drawn = Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(rect=between))
    row_counts = [len(rows) for _, rows in panels]
    grid = drawn.subplots(len(panels), squeeze=False, height_ratios=row_counts)
    limits = _limits([row for _, rows in panels for row in rows])
    for axes, (report, rows) in zip(grid[:, 0], panels, strict=True):
        _draw(axes, report, rows, limits)
    names = " ".join(dict.fromkeys(report.suite for report in reports))
    drawn.text(
        0.012, 1 - 0.12 / height, f"fremap bench {names}: how many times as fast fremap is",
        fontsize=14, fontweight="bold", va="top", parse_math=False,
    )  # fmt: skip
    drawn.text(
        0.012, 1 - 0.45 / height, textwrap.fill(str(machine), _LINE_CHARACTERS),
        fontsize=_SMALL, color=_PALE, va="top", parse_math=False,
    )  # fmt: skip
    _add_legend(drawn, height, [row for _, rows in panels for row in rows])
    return drawn


def _ratios(report: Report) -> list[Row]:
    return [row for row in report.rows if row.speeds]


def _title(report: Report) -> str:
    return textwrap.fill(report.title, _TITLE_CHARACTERS)


def _height(report: Report, rows: Sequence[Row]) -> float:
    return _PANEL + _TITLE_LINE * _title(report).count("\n") + _ROW * len(rows)


def _bar(row: Row) -> float | None:
    """Return the least speed that meets the row's bar."""
    return row.as_speed.at_least


def _label(row: Row) -> str:
    return textwrap.fill(row.versus, _LABEL_CHARACTERS)


def _colour(row: Row) -> str:
    return _OWN if row.own else _SLOWER if row.lost else _FASTER


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the ends of the axis, with 1 well between them."""
    values = [value for row in rows for value in (*row.speeds, _bar(row) or 1)]
    return min(*values, 1 / 1.6) / 1.25, max(*values, 1.6) * 1.25


def _ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten between the limits; their doubles and halves, too, if few."""
    steps = (1,) if high / low > 1000 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(-6, 7) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _draw(axes: "Axes", report: Report, rows: Sequence[Row], limits: tuple[float, float]) -> None:
    places = range(len(rows))
    speeds = [row.speed for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(limits)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # From 1 to the speed: to the left, where fremap is slower.
    axes.barh(
        places, [speed - 1 for speed in speeds], left=1, height=0.62,
        color=[_colour(row) for row in rows], zorder=2,
    )  # fmt: skip
    for place, row in zip(places, rows, strict=True):
        axes.plot(
            [min(row.speeds), max(row.speeds)], [place, place], color="black", lw=0.9, zorder=3
        )
        bar = _bar(row)
        if bar is not None:
            axes.plot([bar, bar], [place - 0.43, place + 0.43], color="black", lw=2.6, zorder=4)
        _add_columns(axes, place, row)
    axes.axvline(1, color="black", lw=1, zorder=2.5)
    ticks = _ticks(*limits)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=_SMALL)
    axes.set_xticks([], minor=True)
    axes.set_yticks(places, [_label(row) for row in rows], fontsize=9, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(
        _title(report),
        loc="left", fontsize=10, fontweight="bold", pad=22, parse_math=False,
    )  # fmt: skip
    headings = ["times", "fremap µs", "other µs"]
    if any(_bar(row) is not None for row in rows):
        headings.append("bar")
    for points, heading in zip(_COLUMNS, headings, strict=False):
        _beside(axes, (1, 1), points, heading, height=7, color=_PALE)


def _add_columns(axes: "Axes", place: int, row: Row) -> None:
    """Write a row's figures beside its bar."""
    sides = [side.microseconds for side in (row.ours, row.theirs) if side]
    texts = [number(value) for value in (row.speed, *sides)]
    colours = [_colour(row), _PALE, _PALE]
    bar = _bar(row)
    if bar is not None:
        texts.append(f"≥ {number(bar)}" + ("" if row.met else " missed"))
        colours.append(_PALE if row.met else _SLOWER)
    for points, text, colour in zip(_COLUMNS, texts, colours, strict=False):
        bold = "bold" if points == _COLUMNS[0] or text.endswith("missed") else "normal"
        _beside(axes, (1, place), points, text, color=colour, weight=bold)


def _beside(
    axes: "Axes", at: tuple[float, float], points: int, text: str, *,
    color: str, height: int = 0, weight: str = "normal",
) -> None:  # fmt: skip
    """Write into a column; above the axes if there is a `height`, else at a row."""
    axes.annotate(
        text, at, xytext=(points, height), textcoords="offset points",
        xycoords="axes fraction" if height else ("axes fraction", "data"),
        ha="left" if points == _COLUMNS[-1] else "right", va="bottom" if height else "center",
        fontsize=_SMALL, color=color, fontweight=weight, parse_math=False,
    )  # fmt: skip


def _add_legend(drawn: "Figure", height: float, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [
        Patch(color=_FASTER, label="fremap is faster"),
        Patch(color=_SLOWER, label="fremap is slower"),
    ]
    if any(row.own for row in rows):
        handles.append(Patch(color=_OWN, label="fremap beside itself"))
    handles.append(Line2D([], [], color="black", lw=0.9, label="slowest to fastest round"))
    if any(_bar(row) is not None for row in rows):
        tick = Line2D(
            [], [], color="black", marker="|", ms=11, mew=2.6, ls="none", label="the bar to meet"
        )
        handles.append(tick)
    drawn.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.005, 0.08 / height),
        ncols=len(handles), frameon=False, fontsize=_SMALL,
    )  # fmt: skip
