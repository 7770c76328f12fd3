"""The charts in the documentation are those of the runs that are stored beside them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.once
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def charts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("charts", DOCS / "charts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_charts_are_drawn_from_the_stored_runs(charts: ModuleType) -> None:
    drawn = charts.pictures()
    stored = {path.name for path in (DOCS / "pictures").glob("bench-*.svg")} | {"overview.svg"}
    assert set(drawn) == stored
    for name, picture in drawn.items():
        assert (DOCS / "pictures" / name).read_text() == picture, f"python docs/charts.py: {name}"


def test_every_chart_is_shown_with_its_command(charts: ModuleType) -> None:
    page = (DOCS / "benchmarks.md").read_text()
    shown = set(re.findall(r"pictures/(bench-[\w-]+\.svg)", page))
    assert shown == set(charts.pictures()) - {"overview.svg"}
    for suite in charts.SUITES:
        assert re.search(rf"^fremap bench {suite}\b", page, re.MULTILINE)


def test_the_overview_shows_a_loss(charts: ModuleType) -> None:
    assert 'class="slower"' in charts.pictures()["overview.svg"]


def test_a_bar_says_how_many_times_as_fast_fremap_is(charts: ModuleType) -> None:
    def timing(*seconds: float, operations: int) -> dict[str, object]:
        return {"seconds": seconds, "operations": operations, "microseconds": 1.0}

    row = {
        "what": "warm: than it",
        "fremap": timing(1, 2, 3, operations=10),
        "other": timing(2, 2, 3, operations=5),
    }
    bar = charts.bar_of(row)
    assert (bar.label, bar.speeds, bar.speed) == ("warm: vs it", (4, 2, 2), 2)
    assert charts.bar_of({"what": "a count", "fremap": None, "other": None}) is None
    picture = charts.chart("Slow & <fast>", [bar], "a row")
    assert "Slow &amp; &lt;fast&gt;" in picture
    assert "2 ×" in picture
