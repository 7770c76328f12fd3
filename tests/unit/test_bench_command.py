"""The command `fremap bench`: each suite runs, keeps its counts and leaves nothing behind."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fremap.bench import command, main, memory


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Two rounds, too few for anybody who asks how fast something is."""
    monkeypatch.setattr(command, "LEAST_ROUNDS", 2)
    return ("--rounds", "2")


def test_a_terminal_is_told_how_long_the_rounds_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock = iter([100.0, 102.0, 108.0, 110.0])
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys, "stderr", Terminal())
    draw = command._progress("remap, report 1 of 2")
    for done in (1, 2, 5):
        draw(done, 5)
    assert sys.stderr.getvalue().split("\r\033[K") == [
        "",
        "remap, report 1 of 2: round 1 of 5, about 8 s left",
        "remap, report 1 of 2: round 2 of 5, about 12 s left",
        "",
    ]


@pytest.mark.slow
@pytest.mark.needs("paged")
@pytest.mark.parametrize(
    "suite", ["remap", "element", "nonblock", "protect", "read", "fault", "dirty"]
)
def test_suite_measures_and_keeps_its_counts(
    suite: str, few_rounds: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--file-size", "16M", "--pages", "300", *few_rounds, "--dir", str(tmp_path)]
    for _ in range(3):
        assert main([suite, "--json", *small]) == 0
        document = json.loads(capsys.readouterr().out)
        assert {report["suite"] for report in document["reports"]} == {suite}
        rows = [row for report in document["reports"] for row in report["rows"]]
        counts = [row for row in rows if row["fremap"] is None]
        assert counts
        missed = [row["what"] for row in counts if row["met"] is False]
        # A page that the kernel was just moving costs a fault, or a call more.
        if not missed:
            break
    assert missed == []
    for row in rows:
        if row["fremap"]:
            assert len(row["fremap"]["seconds"]) == len(row["other"]["seconds"]) >= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.needs("paged")
def test_windows_with_a_budget_are_measured(
    few_rounds: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without limits of memory, as where no group can be made: what needs one is left out."""
    monkeypatch.setattr(memory, "_parents", list)
    # A budget that the program itself is small beside; its pages need not be many.
    small = ["--file-size", "64M", "--pages", "200", *few_rounds, "--dir", str(tmp_path)]
    assert main(["window", "--json", *small]) == 0
    reports = json.loads(capsys.readouterr().out)["reports"]
    assert len(reports) == 4
    for report in reports:
        assert "np.memmap" in report["missing"][0]
        counts = [row for row in report["rows"] if row["fremap"] is None]
        assert [row["what"] for row in counts if row["met"] is False] == []
        assert len([row for row in counts if row["met"]]) == 2
        for row in counts:
            assert "hit ratio" not in row["what"] or 0 <= row["value"] <= 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
@pytest.mark.slow
def test_takes_are_measured(
    few_rounds: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--file-size", "16M", "--pages", "100", *few_rounds, "--dir", str(tmp_path)]
    chart = tmp_path / "take.svg"
    assert main(["take", "--json", "--plot", str(chart), *small]) == 0
    reports = json.loads(capsys.readouterr().out)["reports"]
    assert len(reports) == 5
    assert all(report["rows"] or report["missing"] for report in reports)
    for row in [row for report in reports for row in report["rows"] if row["fremap"]]:
        assert len(row["fremap"]["seconds"]) == len(row["other"]["seconds"]) >= 2
    assert list(tmp_path.iterdir()) == [chart]
    # Matplotlib notes texts beside their outlines.
    assert f"<!-- {reports[0]['title']} -->" in chart.read_text()


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.needs("obstore", "s3fs")
def test_rows_of_an_object_are_measured(
    few_rounds: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--file-size", "16M", *few_rounds, "--dir", str(tmp_path)]
    assert main(["remote", "--json", *small]) == 0
    reports = json.loads(capsys.readouterr().out)["reports"]
    assert len(reports) == 2
    for report in reports:
        assert len(report["rows"]) == len(report["notes"]) == 4
        told = [re.search(r"(\d+) requests, .* at most (\d+)", note) for note in report["notes"]]
        requests, at_once = zip(*[(int(of[1]), int(of[2])) for of in told if of], strict=True)
        # Each side asks for all of the object, the last one for a row at a time.
        assert [count >= 4 for count in requests] == [True, True, False, True]
        assert max(at_once) <= 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.needs("ray")
def test_actors_are_measured(tmp_path: Path) -> None:
    """In a process of its own, which Ray may be started in; `_check` sees to the rows."""
    small = ["--file-size", "40M", "--shards", "8", "--rounds", "5", "--dir", str(tmp_path)]
    arguments = [sys.executable, "-m", "fremap", "bench", "ray", "--json", *small]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    takes, clients = json.loads(done.stdout)["reports"]
    assert len(takes["rows"]) == 6
    assert len([row for row in clients["rows"] if row["unit"] == "a second"]) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.needs("paged")
@pytest.mark.parametrize("suite", ["batches", "scan"])
def test_rows_and_arrays_are_measured(suite: str, tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing else takes."""
    # Two batches for each round of each side: with torch installed there are two sides more.
    size = {"batches": "48M", "scan": "64M"}[suite]
    small = ["--file-size", size, "--pages", "1024", "--rounds", "2", "--dir", str(tmp_path)]
    program = "from fremap.bench import command; command.LEAST_ROUNDS = 2; exit(command.main())"
    arguments = [sys.executable, "-c", program, suite, "--json", *small]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)["reports"]
    assert len(reports) == (5 if suite == "scan" else 2)
    if suite == "scan":
        rewritten = reports.pop()["rows"]
        faults = {row["what"]: row["value"] for row in rewritten[1:]}
        # Each also has some of the interpreter's.
        ours, numpys = (faults[f"{name}: faults a page"] for name in ("fremap.memmap", "np.memmap"))
        assert ours <= 1.5 * numpys
    for report in reports:
        rows = report["rows"]
        passes = report["title"].startswith("scan")
        # Whether the trimmer gets a processor in time is the machine's to say.
        bars = [row["what"] for row in rows if row["met"] is not None]
        if suite == "scan" and not passes:
            assert bars
            assert all("thread" in what and "an eighth" not in what for what in bars)
        else:
            assert all("memory that fremap.memmap took" in what for what in bars)
            assert len(bars) == (3 if passes else 0)
        assert len([row for row in rows if row["fremap"]]) >= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.needs("paged")
def test_every_suite_runs_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", "--file-size", "64M", "--rounds", "5", "--pages", "2000"]) == 0
    assert capsys.readouterr().out.count("\n\n") >= 8


def test_suite_that_cannot_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remap", "--file-size", "999999G", "--dir", str(tmp_path)]) == 1
    assert "pass --file-size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["nosuch"], [], ["read", "--rounds", "4"], ["read", "--pages", "0"]]
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: fremap bench" in capsys.readouterr().err
