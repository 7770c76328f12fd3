"""Blocks of the documentation that need other packages, run where these are installed."""

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python needs ([\w ]+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
RECIPES = [
    pytest.param(match[2], marks=pytest.mark.needs(*match[1].split()), id=f"{path.name}-{number}")
    for path in TEXTS
    for number, match in enumerate(BLOCK.finditer(path.read_text()), 1)
]


def write_model(folder: Path) -> None:
    """A checkpoint of a table in eight tensors of bfloat16, in two files without an index."""
    folder.mkdir()
    rows = np.zeros((20_000, 2 * 16), np.uint8)
    for file in range(2):
        tensors = {}
        for number in range(file, 8, 2):
            if hasattr(safetensors, "TensorSpec"):
                made = safetensors.TensorSpec(
                    dtype="bfloat16", shape=[len(rows), 16], data_ptr=rows.ctypes.data,
                    data_len=rows.nbytes,
                )  # fmt: skip
            else:  # before 0.8
                made = {"dtype": "bfloat16", "shape": [len(rows), 16], "data": rows.tobytes()}
            tensors[f"model.ngram.shard_{number}"] = made
        safetensors.serialize_file(tensors, folder / f"model-{file}.safetensors", None)


@pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata's own, of torch
@pytest.mark.parametrize("block", RECIPES)
def test_recipes_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "recipe", "exec"), {"__name__": "__main__"})


def test_there_are_some() -> None:
    """Or the pattern that finds them were wrong."""
    assert len(RECIPES) >= 10
