"""`fremap bench --plot`: what is drawn, and what is said before anything is measured."""

import dataclasses
import sys
from pathlib import Path

import pytest
from fremap.bench import harness, main, plot
from fremap.bench.harness import BenchError, Report, Timing
from fremap.bench.machine import Machine
from matplotlib.colors import to_hex

pytestmark = pytest.mark.once
SLOW = Timing("slow side", (3e-6, 4e-6, 5e-6), 1)
FAST = Timing("fast side", (1e-6, 1e-6, 1e-6), 1)


@pytest.fixture
def report() -> Report:
    report = Report("remap", "a title with $ and _")
    report.rows = [
        harness.times_faster("than the slow side", FAST, SLOW, at_least=7),
        harness.times_the_time("in order: of the fast side", SLOW, FAST, at_most=1.25),
        dataclasses.replace(harness.times_the_time("of itself", SLOW, FAST), own=True),
    ]
    report.count("faults", 4, "faults", at_most=0)
    return report


def test_a_bar_goes_from_1_to_the_speed_whatever_the_unit(report: Report) -> None:
    [axes] = plot.figure(Machine.this(), [report]).axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert [bar.get_x() for bar in axes.patches] == [1, 1, 1]
    assert ends == pytest.approx([4, 0.25, 0.25])
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    assert colours == [plot._FASTER, plot._SLOWER, plot._OWN]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["vs the slow side", "in order: vs the fast side", "vs itself"]
    assert axes.get_title(loc="left") == "a title with $ and _"


def test_rounds_and_the_bar_to_meet_are_marked(report: Report) -> None:
    [axes] = plot.figure(Machine.this(), [report]).axes
    lines = [list(line.get_xdata()) for line in axes.lines]
    for expected in ([3, 5], [7, 7], [1 / 5, 1 / 3], [0.8, 0.8]):
        assert pytest.approx(expected) in lines
    low, high = axes.get_xlim()
    assert low < 1 / 5 < 7 < high
    texts = [text.get_text() for text in axes.texts]
    assert {"4", "0.25", "≥ 7 missed", "≥ 0.8 missed"} <= set(texts)


def test_a_panel_a_report_that_has_ratios_on_one_axis(report: Report) -> None:
    counts = Report("read", "counts alone", rows=report.rows[3:])
    other = Report("read", "another", rows=report.rows[:1])
    drawn = plot.figure(Machine.this(), [report, counts, other])
    assert [axes.get_title(loc="left") for axes in drawn.axes] == [
        "a title with $ and _",
        "another",
    ]
    assert drawn.axes[0].get_xlim() == drawn.axes[1].get_xlim()
    title, machine = (text.get_text() for text in drawn.texts)
    assert "fremap bench remap read" in title
    assert machine.replace("\n", " ") == str(Machine.this())
    with pytest.raises(BenchError, match="nothing to draw"):
        plot.figure(Machine.this(), [counts])


@pytest.mark.parametrize(("low", "high"), [(0.5, 2), (0.9, 60), (1e-3, 500)])
def test_axis_has_a_few_round_numbers(low: float, high: float) -> None:
    ticks = plot._ticks(low, high)
    assert 1 in ticks
    assert 3 <= len(ticks) <= 9
    assert all(low <= tick <= high for tick in ticks)


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG"), ("PNG", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")],
)
def test_format_is_that_of_the_suffix(
    report: Report, tmp_path: Path, suffix: str, start: bytes
) -> None:
    path = tmp_path / f"chart.{suffix}"
    plot.check(path)
    plot.write(path, Machine.this(), [report])
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chart.jpg", "one of .png, .svg, .pdf"),
        ("chart", "one of .png, .svg, .pdf"),
        ("absent/chart.png", "there is no directory"),
        ("folder.png", "cannot be written"),
    ],
)
def test_wrong_file_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    assert main(["read", "--plot", str(tmp_path / name)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_without_matplotlib_the_remedy_is_said_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["read", "--plot", str(tmp_path / "chart.png")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "pip install matplotlib" in captured.err
