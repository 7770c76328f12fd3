"""The command `fremap`: doctor, selftest, demo, inspect, resident, prefault, shm, bench and others.

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
from fremap.bench.options import EXIT_CODES
from fremap.cli import (
    calibrate,
    completion,
    demo,
    doctor,
    inspect,
    prefault,
    resident,
    selftest,
    shm,
)
from fremap.errors import FremapError

__all__ = ["main"]


class Command(Protocol):
    """What the module of a command has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command; return its exit code."""


COMMANDS: dict[str, tuple[Command, str]] = {
    "doctor": (doctor, "show what fremap can use on this machine, and how to get the rest"),
    "selftest": (selftest, "remap numbered pages with every engine, and check each page"),
    "demo": (demo, "shuffle all pages of a file through one window, and check each"),
    "inspect": (inspect, "list the arrays in a file or a checkpoint: types, shapes, places"),
    "resident": (resident, "show which pages of a file are in the page cache"),
    "prefault": (prefault, "read a file into the page cache"),
    "shm": (shm, "list the slots that processes share, or remove those that killed processes left"),
    "calibrate": (calibrate, "measure this machine, and keep the result for windows to use"),
    "completion": (completion, "print the script that sets up completion in a shell"),
}


def parser(*, bench: bool = False) -> argparse.ArgumentParser:
    """Return the command line of all commands.

    Parameters
    ----------
    bench : bool, default False
        Have the arguments of ``bench`` in it, too; else that is parsed by its own parser.

    Returns
    -------
    argparse.ArgumentParser
        The parser.
    """
    top = argparse.ArgumentParser(
        prog="fremap",
        description="Scattered reads and nonlinear mappings of files larger than memory.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fremap {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    measure = "measure fremap and its alternatives; `fremap bench --help` lists the suites"
    benching = commands.add_parser("bench", help=measure, add_help=False)
    if bench:
        from fremap.bench.command import add_arguments

        add_arguments(benching)
    return top


def complete() -> None:
    """Answer a shell that asks for completions (argcomplete), and end; else do nothing."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:  # a shell that asks has the lines; somebody took the package away
        return
    argcomplete.autocomplete(parser(bench=True))


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
    complete()
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
