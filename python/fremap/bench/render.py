"""Reports as text and as JSON."""

import json
from collections.abc import Iterable, Sequence

from fremap.bench.harness import Report, Row, Timing
from fremap.bench.machine import Machine

_HEADINGS = ("", "fremap µs", "other µs", "result", "", "bar", "met")
_BAR_COLUMNS = 2


def as_text(machine: Machine, reports: Sequence[Report], *, bars: bool = False) -> str:
    """Render a table a report; what was lost and left out below it; with `bars` what was missed."""
    blocks = [str(machine)]
    blocks += [_report_text(report, bars=bars) for report in reports]
    return "\n\n".join(blocks)


def _report_text(report: Report, *, bars: bool) -> str:
    lines = [f"{report.suite}: {report.title}"]
    columns = len(_HEADINGS) if bars else len(_HEADINGS) - _BAR_COLUMNS
    lines += _table(row[:columns] for row in [_HEADINGS, *map(_cells, report.rows)])
    lines += [f"  loses: {_sentence(*pair)}" for pair in report.losses]
    if bars:
        lines += [
            f"  misses its bar: {row.what}: {number(row.value)} {row.unit} ({row.bar})"
            for row in (row.as_speed for row in report.unmet)
        ]
    lines += [f"  not measured: {reason}" for reason in dict.fromkeys(report.missing)]
    lines += [f"  {note}" for note in report.notes]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    met = {None: "", True: "yes", False: "NO"}[row.met]
    row = row.as_speed
    return (
        row.what,
        number(row.ours.microseconds) if row.ours else "",
        number(row.theirs.microseconds) if row.theirs else "",
        number(row.value),
        row.unit,
        row.bar,
        met,
    )


def _sentence(ours: Timing, theirs: Timing) -> str:
    return (
        f"{ours.name} takes {number(ours.microseconds)} µs "
        f"where {theirs.name} takes {number(theirs.microseconds)}"
    )


def number(value: float) -> str:
    """Write three significant digits, and no fewer than a whole number has."""
    if value == int(value):
        return str(int(value))
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Align columns: the first and the units to the left, numbers to the right."""
    cells = list(rows)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    left = {0, 4}
    return [
        "  "
        + "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def as_json(machine: Machine, reports: Sequence[Report]) -> str:
    """Render everything, each round's numbers included."""
    return json.dumps(
        {"machine": vars(machine), "reports": [_report_json(report) for report in reports]},
        indent=2,
        ensure_ascii=False,
    )


def _report_json(report: Report) -> dict[str, object]:
    return {
        "suite": report.suite,
        "title": report.title,
        "rows": [_row_json(row) for row in report.rows],
        "losses": [_sentence(*pair) for pair in report.losses],
        "missing": report.missing,
        "notes": report.notes,
    }


def _row_json(row: Row) -> dict[str, object]:
    return {
        "what": row.what,
        "value": row.value,
        "unit": row.unit,
        "at_least": row.at_least,
        "at_most": row.at_most,
        "met": row.met,
        "ratios": list(row.ratios),
        "fremap": _timing_json(row.ours),
        "other": _timing_json(row.theirs),
    }


def _timing_json(timing: Timing | None) -> dict[str, object] | None:
    if timing is None:
        return None
    return {
        "name": timing.name,
        "microseconds": timing.microseconds,
        "operations": timing.operations,
        "seconds": list(timing.seconds),
    }
