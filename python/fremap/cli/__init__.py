"""The command `fremap`: doctor, calibrate, demo, selftest, bench, inspect, resident, prefault.

Each command is a module with `add_arguments(parser)` and `run(arguments)`,
which returns the exit code. All take ``--json``: one JSON object on standard
output, and nothing else there.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from fremap._core import __version__
from fremap.cli import calibrate, demo, doctor, inspect, prefault, resident, selftest
from fremap.errors import FremapError

__all__ = ["main"]


class Command(Protocol):
    """What the module of a command has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command; return its exit code."""


COMMANDS: dict[str, tuple[Command, str]] = {
    "doctor": (doctor, "what this kernel and process can do, and what to do about the rest"),
    "calibrate": (calibrate, "measure what things cost on this machine, and keep the result"),
    "demo": (demo, "shuffle all pages of a file through one window, and check each"),
    "selftest": (selftest, "number pages, remap them backwards, check each: every engine"),
    "inspect": (inspect, "what is in a file or a checkpoint: tensors, types, shapes, places"),
    "resident": (resident, "which pages of a file are in the kernel's page cache"),
    "prefault": (prefault, "bring a file into the kernel's page cache"),
}


def parser() -> argparse.ArgumentParser:
    """Return the command line of all commands but ``bench``, which has its own."""
    top = argparse.ArgumentParser(
        prog="fremap", description="Nonlinear file mappings: one window, any pages, in any order."
    )
    top.add_argument("--version", action="version", version=f"fremap {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    commands.add_parser("bench", help="measure; `fremap bench --help` says what", add_help=False)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after ``fremap``; those of this process by default.

    Returns
    -------
    int
        0 when it worked, 1 when it did not, 2 for wrong arguments, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["bench"]:
            from fremap.bench import main as bench

            return bench(words[1:])
        parsed = parser().parse_args(words)
        module, _ = COMMANDS[parsed.command]
        return module.run(parsed)
    except BrokenPipeError:
        # The reader has gone (`fremap doctor | head`). Flushing at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FremapError, OSError) as error:
        print(f"fremap {words[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
