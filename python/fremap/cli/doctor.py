"""What this kernel and process can do for fremap, what is chosen, and the remedy for the rest.

Each line was found out by trying. Exit code 0 where at least one engine works.
"""

import argparse

import fremap
from fremap.cli.report import columns, print_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap doctor``."""
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine again and keep the result"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    capabilities = fremap.capabilities()
    if arguments.calibrate:
        fremap.calibration.save(fremap.calibration.measure())
    calibration = fremap.calibration.load().to_dict()
    path = fremap.calibration.cache_path()
    if arguments.json:
        result = capabilities.to_dict()
        result["calibration"] = calibration
        result["calibration_path"] = str(path)
        print_json(result)
    else:
        show(str(capabilities))
        show(f"calibration (measured once, kept in {path})")
        show(columns([(name, str(value)) for name, value in calibration.items()], right=(1,)))
    return 0 if any(engine.available for engine in capabilities.engines.values()) else 1
