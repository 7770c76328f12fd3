"""The rule of `tests/conftest.py`: a skip is listed, and fails the run where it is not due."""

import shutil
import subprocess
import sys
from pathlib import Path

import fremap
import pytest

pytestmark = pytest.mark.once
TESTS = Path(__file__).resolve().parents[1]
# Stands in for a process that has everything but "paged", whatever is true of this one.
LACKING = """
import pytest
from conftest import available

@pytest.fixture(scope="session", autouse=True)
def lacking():
    available()["paged"] = False
"""


def run(folder: Path, body: str) -> tuple[int, str]:
    for name in ("conftest.py", "forking.py", "prepared_python.py"):
        shutil.copy(TESTS / name, folder)
    (folder / "test_it.py").write_text(f"import pytest\n{LACKING}\n{body}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_missing_capability_is_skipped_and_listed(tmp_path: Path) -> None:
    code, text = run(tmp_path, "def test(engine): pass")
    assert code == 0
    assert "needs paged: 1 tests\n    test_it.py::test[paged]" in text


def test_any_other_skip_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_module')")
    code, text = run(
        tmp_path,
        """
def test_there(): pytest.skip('needs alias')
def test_one_there(): pytest.skip('needs paged, alias')
def test_lazy(): pytest.skip('not today')
@pytest.mark.xfail
def test_expected(): assert False
""",
    )
    assert code == 1
    listed = [line for line in text.splitlines() if line.startswith("NOT ALLOWED")]
    for name, why in (
        ("test_it.py::test_there", "this process has alias"),
        ("test_it.py::test_one_there", "this process has alias"),
        ("test_it.py::test_lazy", "names no capability"),
        ("test_it.py::test_expected", "names no capability"),
        ("test_module.py", "names no capability"),
    ):
        assert [line for line in listed if name in line and why in line], name
    assert len(listed) == 5


def test_unknown_capability_is_a_failure(tmp_path: Path) -> None:
    code, text = run(tmp_path, "@pytest.mark.needs('warp_drive')\ndef test(): pass")
    assert code == 1
    assert "unknown capabilities" in text


def test_names_are_those_of_capabilities() -> None:
    capabilities = fremap.capabilities()
    assert {"alias", "paged", "eager"} == set(capabilities.engines)
    assert not set(capabilities.engines) & set(capabilities.probes)
