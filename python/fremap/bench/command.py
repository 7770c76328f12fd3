"""The command: ``fremap bench SUITE [SUITE ...] [--json] [--plot FILE]``."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fremap
from fremap.bench import plot
from fremap.bench.bench import Bench
from fremap.bench.harness import LEAST_ROUNDS, BenchError, Report, Watcher, watched
from fremap.bench.machine import Machine
from fremap.bench.options import EXIT_CODES, byte_size, positive
from fremap.bench.render import as_json, as_text
from fremap.bench.suites import SUITES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites that are named and print what they found.

    Parameters
    ----------
    argv
        Arguments, without the command's name; those of the process by default.

    Returns
    -------
    int
        0 if everything was measured, whatever the figures are. 1 if a suite cannot run here or
        the chart cannot be written; stderr says why.
    """
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except BrokenPipeError:  # the reader of the report has gone: the command's own matter
        raise
    except (BenchError, fremap.FremapError, OSError) as error:
        print(f"fremap bench: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    chart: Path | None = arguments.plot
    if chart is not None:
        plot.check(chart)
    names = list(SUITES) if "all" in arguments.suites else list(dict.fromkeys(arguments.suites))
    bench = Bench(
        arguments.rounds, arguments.pages, arguments.file_size, arguments.dir, arguments.shards
    )
    machine = Machine.this()
    reports: list[Report] = []
    suites = [(name, suite) for name in names for suite in SUITES[name]]
    with bench:
        for number, (name, suite) in enumerate(suites, 1):
            what = f"{name}, report {number} of {len(suites)}"
            bench.say(f"{what} ...")
            with watched(_progress(what)):
                reports.append(suite(bench))
    print(
        as_json(machine, reports)
        if arguments.json
        else as_text(machine, reports, bars=arguments.bars)
    )
    if chart is not None:
        plot.write(chart, machine, reports)
        bench.say(f"the chart is in {chart}")


def _progress(what: str) -> Watcher:
    """Return what draws the state of a report on a terminal, and how long its rounds will take."""
    begin = time.monotonic()

    def draw(done: int, total: int) -> None:
        left = (time.monotonic() - begin) / done * (total - done)
        state = f"{what}: round {done} of {total}, about {left:.0f} s left"
        # The last round leaves an empty line to whatever is said next.
        print("\r\033[K" + (state if done < total else ""), end="", file=sys.stderr, flush=True)

    return draw if sys.stderr.isatty() else lambda _done, _total: None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fremap bench",
        description="Measure fremap and its alternatives in turn, round by round.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap bench``."""
    parser.add_argument(
        "suites",
        nargs="+",
        choices=[*SUITES, "all"],
        metavar="SUITE",
        help=", ".join([*SUITES, "all"]),
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with the numbers of each round"
    )
    parser.add_argument(
        "--bars",
        action="store_true",
        help="also show the ratio that each row should reach, and whether it does",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="also draw the ratios; FILE ends in one of "
        + ", ".join(plot.SUFFIXES)
        + " (needs matplotlib: pip install matplotlib)",
    )
    parser.add_argument(
        "--rounds",
        type=_rounds,
        default=7,
        metavar="N",
        help=f"measured rounds, at least {LEAST_ROUNDS} (default 7)",
    )
    parser.add_argument(
        "--pages",
        type=positive,
        default=60_000,
        metavar="N",
        help="pages in a round (default 60000)",
    )
    parser.add_argument(
        "--file-size",
        type=byte_size,
        metavar="BYTES",
        help="size of the data file, e.g. 512M (default 4G, or a quarter of memory)",
    )
    parser.add_argument(
        "--shards",
        type=positive,
        default=128,
        metavar="N",
        help="number of files of the suite shards; --file-size is their total size (defaults: "
        "128 and 1G)",
    )
    parser.add_argument(
        "--dir", help="directory of the data file (default: the system's temporary directory)"
    )


def _rounds(text: str) -> int:
    value = positive(text)
    if value < LEAST_ROUNDS:
        raise argparse.ArgumentTypeError(
            f"{value} rounds are too few for a median; at least {LEAST_ROUNDS}"
        )
    return value
