"""Measure what things cost on this machine, and keep the result for windows to use.

Without it windows use built-in values. Takes under 200 ms, and writes one file.
"""

import argparse

import fremap
from fremap.cli.report import columns, print_json, show


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
        show(columns([(name, str(value)) for name, value in measured.items()], right=(1,)))
    return 0
