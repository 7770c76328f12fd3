"""The database of 2002 (row O19 of docs/origin.md), small."""

import json
import subprocess
import sys
from pathlib import Path

from sharing import named

PROGRAM = Path(__file__).parents[2] / "examples/database.py"


def test_o19_processes_at_one_store(tmp_path: Path, name: str) -> None:
    file = tmp_path / "database"
    words = ["--file", str(file), "--store", "64M", "--slots", "1M", "--name", name]
    words += ["--processes", "3", "--accesses", "400", "--write-share", "0.3", "--json"]
    command = [sys.executable, str(PROGRAM), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["accesses"] == 1200
    assert told["writes"] > 300
    assert told["mappings_of_slots"] == [1, 1, 1], "whatever they look at"
    assert told["misses"] > 64, "extents left"
    assert told["hits"] > 0
    assert "slots filled" in ended.stderr
    assert not file.exists()
    assert not named(name).exists()
