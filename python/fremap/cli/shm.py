"""List the slots that your processes share, or remove those that killed processes left.

The last process to close shared slots removes them. If all of them were killed, the slots stay
in memory until a process uses the name again, or until this command removes them.
"""

import argparse

from fremap import _core
from fremap.cli.report import columns, print_json, show, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``fremap shm``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list names, sizes, and the processes that use them")
    removing = actions.add_parser("remove", help="remove slots that no process uses")
    removing.add_argument(
        "names", metavar="NAME", nargs="*", help="default: all names that no process uses"
    )
    removing.add_argument(
        "--force",
        action="store_true",
        help="also remove names in use: their processes keep the slots, others make new ones",
    )
    for action in (listing, removing):
        # As every command has it, also behind the action.
        action.add_argument(
            "--json",
            action="store_true",
            default=argparse.SUPPRESS,
            help="print JSON, and nothing else",
        )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    found = _core.list_shared_slots()
    removed = []
    if arguments.action == "remove":
        unused = [one["name"] for one in found if not one["processes"]]
        for name in arguments.names or unused:
            _core.remove_shared_slots(name, arguments.force)
            removed.append(name)
        found = _core.list_shared_slots()
    if arguments.json:
        slots = [{**one, "path": str(one["path"])} for one in found]
        print_json({"slots": slots, "removed": removed})
        return 0
    for name in removed:
        show(f"removed {name}")
    if arguments.action == "list":
        show(_table(found) if found else "no slots are shared")
    return 0


def _table(found: list[dict[str, object]]) -> str:
    rows = [("name", "takes", "slots", "filled", "processes")]
    for one in found:
        processes = one["processes"]
        used = " ".join(map(str, processes)) if isinstance(processes, list) else ""
        taken = size(float(str(one["bytes"])))
        rows.append(
            (
                str(one["name"]),
                taken,
                str(one["slot_count"]),
                str(one["filled_slots"]),
                used or "none",
            )
        )
    return columns(rows, right=(1, 2, 3))
