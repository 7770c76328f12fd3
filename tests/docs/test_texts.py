"""Documentation that is executed, and texts that hold on any machine."""

import ast
import os
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_OURS = {".git", ".venv", "target", "dist", "site", "__pycache__", ".hypothesis"}
TEXTS = {".md", ".toml", ".py", ".pyi", ".rs", ".c", ".h", ".yml", ".sh", ""}
MAX_LINES = 700
# Where the files of this repository are on the web, and what a page of the documentation is there.
ON_THE_WEB = re.compile(
    r"https://(?:github\.com/fremap/fremap/(?:blob|tree)|raw\.githubusercontent\.com/fremap/fremap)"
    r"/main/(?P<file>[^#?]+)"
    r"|https://fremap\.github\.io/fremap/(?P<page>[^#?]*)"
)
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


def executed(path: Path) -> Any:
    """A text as a parameter; one that imports torch needs it."""
    torch = any("import torch" in block for block in code_blocks(path, "python"))
    marks = [pytest.mark.needs("torch")] if torch else []
    return pytest.param(path, id=str(path.relative_to(REPOSITORY)), marks=marks)


@pytest.mark.parametrize(
    "path", [executed(path) for path in MARKDOWN if code_blocks(path, "python")]
)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one text, one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(code_blocks(path, "python"), 1):
        exec(compile(block, f"{path.name}, block {number}", "exec"), names)


@pytest.mark.once
@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_exist(path: Path) -> None:
    """Each `fremap ...` and `make ...` in a shell block is one there is."""
    from fremap.cli import COMMANDS, parser

    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for block in code_blocks(path, "sh"):
        for command, rest in re.findall(r"^fremap (\w+)(.*)$", block, re.MULTILINE):
            assert command in {*COMMANDS, "bench"}
            words = re.split(r"#|>>?", rest)[0].split()
            if words and "--help" not in words:
                parser(bench=True).parse_args([command, *words])
        for target in re.findall(r"^make ([\w-]+)", block, re.MULTILINE):
            assert target in targets


@pytest.mark.once
@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link


def on_the_web(link: str) -> Path | None:
    """The file of this repository that a link to the web shows, or None."""
    match = ON_THE_WEB.fullmatch(link)
    if match is None:
        return None
    if match["file"]:
        return REPOSITORY / match["file"]
    page = (REPOSITORY / "docs" / match["page"]).with_suffix(".md")
    return page if page.exists() else page.with_suffix("") / "index.md"


@pytest.mark.once
@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_to_our_own_pages_on_the_web_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"https://[^\s)>\"'`]+", path.read_text()):
        file = on_the_web(link.partition("#")[0])
        assert file is None or file.exists(), link


@pytest.mark.once
@pytest.mark.parametrize(
    "path",
    [path for path in MARKDOWN if path.is_relative_to(REPOSITORY / "docs")],
    ids=lambda path: path.name,
)
def test_the_site_shows_code_as_code(path: Path) -> None:
    """A fence with more than a language behind it is text to mkdocs."""
    hooks = runpy.run_path(str(REPOSITORY / "docs/hooks.py"))
    shown = hooks["on_page_markdown"](path.read_text())
    fences = re.findall(r"^ *```(.*)$", shown, re.MULTILINE)
    assert [fence for fence in fences if not re.fullmatch(r"\w*", fence)] == []
    assert len(fences) % 2 == 0


@pytest.mark.once
def test_links_of_the_readme_are_whole() -> None:
    """An index of packages shows the README without the files beside it."""
    text = (REPOSITORY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("https://"), link


@pytest.mark.once
def test_the_readme_is_short() -> None:
    assert (REPOSITORY / "README.md").read_text().count("\n") < 120


@pytest.mark.once
def test_the_wheel_has_licences_in_its_metadata_alone() -> None:
    """What maturin includes beside the package lands in the root of site-packages."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert settings["project"]["license-files"] == ["LICENSE*"]
    included = settings["tool"]["maturin"]["include"]
    assert all(entry["format"] == "sdist" for entry in included)
    assert "tests/**/*" in [entry["path"] for entry in included]


@pytest.mark.once
def test_no_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}: {match.group()}"
        for path in files()
        if (match := MACHINE_PATHS.search(path.read_text()))
    ]
    assert found == []


@pytest.mark.once
def test_no_file_is_too_long() -> None:
    too_long = {
        str(path.relative_to(REPOSITORY)): lines
        for path in files()
        if path.suffix in {".py", ".rs", ".c"}
        and (lines := path.read_text().count("\n")) > MAX_LINES
    }
    assert too_long == {}


@pytest.mark.once
def test_nobody_is_told_to_install_what_is_there() -> None:
    """Who reads a message of the package has it: another install would leave it as it is."""
    advice = re.compile(r"pip install\s+\S*fremap")
    wrong = []
    for path in sorted((REPOSITORY / "python").rglob("*.py")):
        tree = ast.parse(path.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            said = "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
            if id(node) not in texts and advice.search(said):
                wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong
