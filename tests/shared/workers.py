"""Run by test_shared_slots.py: workers of multiprocessing that share slots.

A program of its own, so that a spawned child finds what it is to run.
"""

import json
import multiprocessing
import sys
from typing import Any

import fremap
import numpy as np
from fremap.testing import page_numbers


def work(slots: fremap.Slots, results: Any, may_end: Any) -> None:
    """Pin all that both workers want, and end after the parent has closed its own."""
    found = 0
    for key in range(8):
        with slots.pin(key) as places:
            words = slots.array(np.uint64, (2, 512))
            found += int(page_numbers(words[places[0]])[0, 0]) == 2 * key
    results.put(found)
    may_end.wait()


def main(method: str, path: str, name: str) -> None:
    """Print what the workers found, and how much was read."""
    context = multiprocessing.get_context(method)
    results, may_end = context.Queue(), context.Event()
    with fremap.open(path, page_bytes=4096) as store:
        with fremap.Slots(store, 2, 12, shared=name) as slots:
            workers = [
                context.Process(target=work, args=(slots, results, may_end)) for _ in range(2)
            ]
            for worker in workers:
                worker.start()
            sums = [results.get(timeout=60) for _ in workers]
            misses = slots.stats().misses
        may_end.set()
        for worker in workers:
            worker.join()
    print(json.dumps({"misses": misses, "sums": sums}))


if __name__ == "__main__":
    main(*sys.argv[1:])
