"""The bare C loops of ``benches/c/``: compiled when needed, driven round by round."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Self, cast

import numpy as np
import numpy.typing as npt

from fremap.bench.harness import BenchError

SOURCES = Path(__file__).parents[3] / "benches" / "c"


def unavailable() -> str | None:
    """Return why the loops cannot be had, or None."""
    if not (SOURCES / "loop.h").exists():
        return "not run from a checkout: the bare C loops (benches/c/) are not in the package"
    if shutil.which("cc") is None:
        return "no C compiler (cc): the bare C loops cannot be built"
    return None


class Loop:
    """One loop: a process that answers requests over a pipe.

    `mode` is for loops that have a variant; their sources say which.
    Leaving the context ends it and removes what was compiled.
    """

    def __init__(self, name: str, path: Path, page_count: int, mode: str | None = None) -> None:
        self.name = name
        self._directory = tempfile.TemporaryDirectory(prefix="fremap-bench-")
        program = Path(self._directory.name) / name
        compiled = subprocess.run(
            ["cc", "-O2", "-pthread", "-o", program, SOURCES / f"{name}.c"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if compiled.returncode != 0:
            self._directory.cleanup()
            raise BenchError(f"cc benches/c/{name}.c failed:\n{compiled.stderr}")
        self._process = subprocess.Popen(
            [program, path, str(page_count), *([mode] if mode else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._requests = cast("IO[bytes]", self._process.stdin)
        if self._line() != b"ready\n":
            raise self._failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._directory.cleanup()

    def run(self, pages: npt.NDArray[np.int64]) -> list[float]:
        """Run one round over `pages`; return the seconds of each of its parts."""
        request = np.concatenate(([len(pages)], pages)).astype(np.int64)
        try:
            self._requests.write(request.tobytes())
            self._requests.flush()
        except BrokenPipeError:
            raise self._failure() from None
        answer = self._line()
        if not answer:
            raise self._failure()
        return [int(nanoseconds) / 1e9 for nanoseconds in answer.split()]

    def _line(self) -> bytes:
        return cast("IO[bytes]", self._process.stdout).readline()

    def _failure(self) -> BenchError:
        """End the process and wrap what it said."""
        _, said = self._process.communicate()
        self._directory.cleanup()
        text = said.decode(errors="replace").strip()
        return BenchError(f"benches/c/{self.name}.c: {text or 'ended early'}")
