"""The time of ``import fremap``, against ``import numpy`` alone, a fresh process each."""

import os
import subprocess
import sys
from collections.abc import Mapping

from fremap.bench.bench import Bench
from fremap.bench.harness import BenchError, Contender, Report, paired, timed, times_the_time

_LEAST_ROUNDS = 15


def start(bench: Bench) -> Report:
    """Time whole processes, so that what an import leaves for later counts too."""
    report = Report("import", "python -c 'import fremap', a fresh process")
    # Compiled modules are kept, as they are where both were installed.
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def importing(module: str) -> Contender:
        command = [sys.executable, "-c", f"import {module}"]

        def run(_number: int) -> Mapping[str, float]:
            return {module: timed(lambda: subprocess.run(command, check=True, env=environment))}

        return run

    rounds = max(bench.rounds, _LEAST_ROUNDS)
    try:
        timings = paired([importing("fremap"), importing("numpy")], rounds=rounds, operations=1)
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{' '.join(error.cmd)} failed") from error
    report.rows.append(
        times_the_time("of import numpy", timings["fremap"], timings["numpy"], at_most=1.2)
    )
    return report
