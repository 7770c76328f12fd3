"""Show which features of this kernel fremap can use, what each is for, and how to get the rest.

fremap tries each feature. The exit code is 0 if at least one engine works.
"""

import argparse

import fremap
from fremap.cli import seccomp
from fremap.cli.calibrate import calibration_lines
from fremap.cli.report import print_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap doctor``."""
    parser.add_argument(
        "--seccomp",
        nargs="?",
        const="",
        metavar="PROFILE",
        help="print the seccomp rule that a container needs; with PROFILE, a file or '-', print "
        "that profile with the rule added",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if arguments.seccomp is not None:
        return seccomp.run(arguments.seccomp, as_json=arguments.json)
    capabilities = fremap.capabilities()
    calibration = fremap.calibration.load().to_dict()
    path = fremap.calibration.cache_path()
    kept = fremap.calibration.kept() is not None
    if arguments.json:
        result = capabilities.to_dict()
        result["calibration"] = calibration
        result["calibration_path"] = None if path is None else str(path)
        result["calibration_kept"] = kept
        print_json(result)
    else:
        show(str(capabilities))
        source = f"measured, kept in {path}" if kept else "built in; run `fremap calibrate`"
        show(f"calibration ({source})")
        show(calibration_lines(calibration))
    return 0 if any(engine.available for engine in capabilities.engines.values()) else 1
