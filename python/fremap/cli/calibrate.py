"""Measure this machine, and keep the result for windows to use.

It takes less than 200 ms and writes one file. Without it, windows use built-in values.
"""

import argparse
from collections.abc import Mapping

import fremap
from fremap.cli.report import columns, print_json, show

_MEANINGS = {
    "alias_extent_pages": "extents of at least so many pages are cheaper to map than to copy",
    "evict_gap_pages": "evict joins runs with at most so many absent pages between them",
    "batch_pages": 'pages that engine "paged" reads before it moves them into a window',
}


def calibration_lines(calibration: Mapping[str, int]) -> str:
    """Return a line for each value of a calibration, with its meaning."""
    rows = [(name, str(value), _MEANINGS[name]) for name, value in calibration.items()]
    return columns(rows, right=(1,))


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap calibrate``, which has none of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    measured = fremap.calibration.measure().to_dict()
    path = str(fremap.calibration.cache_path())
    if arguments.json:
        print_json({"calibration": {**measured}, "calibration_path": path})
    else:
        show(f"measured, and kept in {path}")
        show(calibration_lines(measured))
    return 0
