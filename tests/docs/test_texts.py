"""Documentation that is executed, and texts that hold on any machine."""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_OURS = {".git", ".venv", "target", "dist", "__pycache__", ".hypothesis"}
TEXTS = {".md", ".toml", ".py", ".pyi", ".rs", ".c", ".h", ".yml", ".sh", ""}
MAX_LINES = 700
ON_THE_WEB = "https://github.com/fremap/fremap/blob/main/"
# Written in two parts, so that this file does not match.
MACHINE_PATHS = re.compile(r"/(?:root|work|home/\w+|Users)" + "/")


def files() -> Iterator[Path]:
    for folder, folders, names in os.walk(REPOSITORY):
        folders[:] = sorted(
            name for name in folders if name not in NOT_OURS and "_cache" not in name
        )
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix in TEXTS and path.name not in NOT_OURS:
                yield path


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


MARKDOWN = [path for path in files() if path.suffix == ".md"]


@pytest.mark.parametrize(
    "path",
    [path for path in MARKDOWN if code_blocks(path, "python")],
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one text, one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(code_blocks(path, "python"), 1):
        exec(compile(block, f"{path.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_exist(path: Path) -> None:
    """Each `fremap ...` and `make ...` in a shell block is one there is."""
    from fremap.cli import COMMANDS

    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for block in code_blocks(path, "sh"):
        for command in re.findall(r"^fremap (\w+)", block, re.MULTILINE):
            assert command in {*COMMANDS, "bench"}
        for target in re.findall(r"^make ([\w-]+)", block, re.MULTILINE):
            assert target in targets


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link


def test_links_of_the_readme_are_whole() -> None:
    """An index of packages shows the README without the files beside it."""
    text = (REPOSITORY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("https://"), link
        if link.startswith(ON_THE_WEB):
            assert (REPOSITORY / link.removeprefix(ON_THE_WEB)).exists(), link


def test_the_wheel_has_licences_in_its_metadata_alone() -> None:
    """What maturin includes beside the package lands in the root of site-packages."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert settings["project"]["license-files"] == ["LICENSE*"]
    included = settings["tool"]["maturin"]["include"]
    assert all(entry["format"] == "sdist" for entry in included)
    assert "tests/**/*" in [entry["path"] for entry in included]


def test_no_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}: {match.group()}"
        for path in files()
        if (match := MACHINE_PATHS.search(path.read_text()))
    ]
    assert found == []


def test_no_file_is_too_long() -> None:
    too_long = {
        str(path.relative_to(REPOSITORY)): lines
        for path in files()
        if path.suffix in {".py", ".rs", ".c"}
        and (lines := path.read_text().count("\n")) > MAX_LINES
    }
    assert too_long == {}
