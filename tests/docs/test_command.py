"""The page of the command has the fields that --json prints, and the exit codes of --help."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import fremap
import numpy as np
import pytest
from fremap.bench.machine import Machine
from fremap.bench.render import as_json
from fremap.cli import COMMANDS, EXIT_CODES, main

pytestmark = pytest.mark.once
PAGE = Path(__file__).parents[2] / "docs/command.md"


def table() -> dict[str, list[str]]:
    """The fields of each command, and of each list that one prints."""
    rows = re.findall(r"^\| (`\w+`(?: of `\w+`)?) \| (`.*`) \|$", PAGE.read_text(), re.MULTILINE)
    return {name.replace("`", ""): re.findall(r"`(\w+)`", fields) for name, fields in rows}


def test_each_command_has_its_fields_told(
    numbered_file: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, array = str(numbered_file(64)), tmp_path / "array.npy"
    np.save(array, np.zeros((4, 2)))
    words = {
        "demo": [path],
        "inspect": [str(array)],
        "resident": [path],
        "prefault": [path],
        "selftest": ["--pages", "8"],
        "completion": ["bash"],
        "shm": ["list"],
    }
    made = fremap.MemoryStore(4096)
    slots = fremap.Slots(made, 1, 1, shared=f"command-{os.getpid()}")
    told = table()
    lists = {name for name in told if " of " in name}
    for command in COMMANDS:
        main([command, *words.get(command, []), "--json"])
        printed = json.loads(capsys.readouterr().out)
        assert list(printed) == told[command], command
        if command == "inspect":
            printed["arrays"] = printed["files"][0]["arrays"]
        for name, of in (entry.split(" of ") for entry in lists):
            if name in printed and of in (command, "files"):
                assert list(printed[name][0]) == told[f"{name} of {of}"]
                lists = lists - {f"{name} of {of}"}
    slots.close()
    assert not lists
    assert list(json.loads(as_json(Machine.this(), []))) == told["bench"]
    assert set(told) - {name for name in told if " of " in name} == {*COMMANDS, "bench"}


def test_exit_codes_are_those_of_the_help() -> None:
    codes = re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert codes == re.findall(r"^  (\d+)", EXIT_CODES, re.MULTILINE)
