"""Several database processes at one store, each page of which is in memory once.

In 2002 database servers with hundreds of processes were the reason for nonlinear mappings: a
cache of pages in shared memory, and in each process a kernel mapping for every piece of the file
that it looked at. Here the processes share one set of slots, which is one mapping in each.

A sparse file is the database. It has elements of 16 KiB; an element has a version, its own
number, and words that follow from the two. Processes read and write elements chosen by Zipf's
law. A reader checks every word of what it pinned, and that it is no older than what was written
before it asked. Run it with ``--help`` for the sizes; the default is 16 GiB of store and 1 GiB of
slots.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fremap
import numpy as np
from fremap.sizes import size_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    Words = npt.NDArray[np.uint64]

ELEMENT_BYTES = 16 << 10
ELEMENT_WORDS = ELEMENT_BYTES // 8
# Records that are locked together, so that versions of an element follow each other.
LOCKS = 64
_MIX = np.uint64(0x9E3779B97F4A7C15)
_PLACES = np.arange(2, ELEMENT_WORDS, dtype=np.uint64)


def content(key: int, version: int) -> Words:
    """Return an element: its version, its number, and words that no other element has."""
    if version == 0:
        return np.zeros(ELEMENT_WORDS, np.uint64)  # a hole of the file
    element = np.empty(ELEMENT_WORDS, np.uint64)
    element[:2] = version, key
    element[2:] = (_PLACES + np.uint64((key << 24) ^ version)) * _MIX
    return element


class Versions:
    """The newest version of each element that was committed, shared by all processes."""

    def __init__(self, elements: int) -> None:
        self._memory = mmap.mmap(-1, elements * 8)
        self.newest: Words = np.frombuffer(self._memory, np.uint64)


class Zipf:
    """Draws elements: in a random order, the k-th once for k times the first."""

    def __init__(self, elements: int, seed: int) -> None:
        self._shares = np.cumsum(1 / np.arange(1, elements + 1))
        self._ranked = np.random.default_rng(2002).permutation(elements)
        self.random = np.random.default_rng(seed)

    def draw(self, count: int) -> npt.NDArray[np.int64]:
        """Return the numbers of elements."""
        drawn = self.random.random(count) * self._shares[-1]
        chosen: npt.NDArray[np.int64] = self._ranked[np.searchsorted(self._shares, drawn)]
        return chosen


def read(slots: fremap.Slots, elements: Words, versions: Versions, key: int) -> int:
    """Read an element and check it; return its version."""
    least = int(versions.newest[key])
    with slots.pin(key) as places:
        element = elements[places[0]]
        version = int(element[0])
        if version < least:
            raise SystemExit(f"element {key}: version {version} after {least} was committed")
        if not np.array_equal(element, content(key, version)):
            raise SystemExit(f"element {key}: not as version {version} was written")
    return version


def serve(
    number: int,
    options: argparse.Namespace,
    slots: fremap.Slots,
    versions: Versions,
    locks: Any,
    out: Any,
) -> None:
    """Be a database process: read and write elements, and check every answer."""
    keys = Zipf(slots.extent_count, number)
    elements: Words = slots.array(np.uint64)
    writes = 0
    for key in keys.draw(options.accesses).tolist():
        if keys.random.random() >= options.write_share:
            read(slots, elements, versions, key)
            continue
        with locks[key % LOCKS]:
            version = read(slots, elements, versions, key) + 1
            slots.write(key, content(key, version))
            # Whoever reads from now on must see it.
            versions.newest[key] = version
        writes += 1
    out.put((number, writes, kernel_mappings(), memory()))


def shared(store: fremap.Store, options: argparse.Namespace) -> fremap.Slots:
    """Return the slots that all processes have."""
    pages = ELEMENT_BYTES // store.page_bytes
    count = options.slots_bytes // ELEMENT_BYTES
    return fremap.Slots(store, pages, count, shared=options.name)


def kernel_mappings() -> tuple[int, int]:
    """Return how many kernel mappings this process has, and how many of them are the slots."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len(lines), sum("fremap-slots-" in line for line in lines)


def memory() -> dict[str, int]:
    """Return bytes of this process: its own, and those that it shares with others."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"own": "RssAnon", "shared": "RssShmem", "page_tables": "VmPTE"}
    return {name: int(fields[field].split()[0]) << 10 for name, field in names.items()}


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--file", default="database.bin", help="made, and removed")
    parser.add_argument("--store", dest="store_bytes", type=size_bytes, default=16 << 30)
    parser.add_argument("--slots", dest="slots_bytes", type=size_bytes, default=1 << 30)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--accesses", type=int, default=50_000, help="of each process")
    parser.add_argument("--write-share", type=float, default=0.1)
    parser.add_argument("--name", default=f"database-{os.getpid()}", help="of the slots")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser.parse_args(words)


def report(slots: fremap.Slots, done: int, options: argparse.Namespace) -> None:
    """Print what the slots hold now."""
    stats = slots.stats()
    named = max(1, stats.hits + stats.misses)
    print(
        f"{done} of {options.processes} processes done: {stats.filled_slots} of {slots.slot_count} "
        f"slots filled, {stats.hits / named:.1%} hits, {stats.bytes_read >> 20} MiB brought",
        file=sys.stderr if options.json else sys.stdout,
        flush=True,
    )


def main(words: list[str] | None = None) -> int:
    """Run the processes, and check the file at the end."""
    options = options_of(words)
    extents = options.store_bytes // ELEMENT_BYTES
    with open(options.file, "xb") as file:
        file.truncate(extents * ELEMENT_BYTES)
    try:
        answer = run(options, extents)
    finally:
        os.unlink(options.file)
    if options.json:
        print(json.dumps(answer))
    return 0


def run(options: argparse.Namespace, extents: int) -> dict[str, object]:
    """Start the processes, wait for them, and compare the file with what they committed."""
    context = multiprocessing.get_context("fork")
    versions, out = Versions(extents), context.Queue()
    locks = [context.Lock() for _ in range(LOCKS)]
    began = time.monotonic()
    with fremap.open(options.file, "r+", page_bytes=4096) as store, shared(store, options) as slots:
        arguments = (options, slots, versions, locks, out)
        processes = [
            context.Process(target=serve, args=(number, *arguments))
            for number in range(options.processes)
        ]
        for process in processes:
            process.start()
        waiting, told = list(processes), []
        while waiting:
            waiting[0].join(timeout=5)
            while not out.empty():
                told.append(out.get())
            waiting = [process for process in waiting if process.exitcode is None]
            report(slots, options.processes - len(waiting), options)
        while len(told) < options.processes and not any(each.exitcode for each in processes):
            told.append(out.get(timeout=10))
        if any(process.exitcode for process in processes):
            raise SystemExit("a process found what it should not have found")
        seconds = time.monotonic() - began
        stats = slots.stats()
        changed = np.flatnonzero(versions.newest)
        pages = ELEMENT_BYTES // store.page_bytes
        for key in changed.tolist():
            found = store.read(range(key * pages, (key + 1) * pages)).view(np.uint64).reshape(-1)
            if not np.array_equal(found, content(key, int(versions.newest[key]))):
                raise SystemExit(f"element {key} of the file is not what was committed last")
    for number, writes, (mappings, of_slots), bytes_of in sorted(told):
        print(
            f"process {number}: {writes} writes; {mappings} kernel mappings, {of_slots} of them "
            f"the slots; memory {bytes_of['own'] >> 20} MiB of its own, {bytes_of['shared'] >> 20} "
            f"MiB shared, page tables {bytes_of['page_tables'] >> 10} KiB",
            file=sys.stderr if options.json else sys.stdout,
        )
    return {
        "accesses": options.processes * options.accesses,
        "writes": sum(writes for _, writes, _, _ in told),
        "elements_changed": len(changed),
        "mappings_of_slots": [of_slots for _, _, (_, of_slots), _ in told],
        "hits": stats.hits,
        "misses": stats.misses,
        "seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
