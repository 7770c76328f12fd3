"""Run by test_pickle.py: passes anonymous memory to a child process and back.

A program of its own, so that a spawned child finds what it is to run.
"""

import multiprocessing
import sys
from typing import Any

import fremap


def fill(store: fremap.MemoryStore, results: Any, taken: Any) -> None:
    """Write into the parent's memory, and send memory made here."""
    store.write(0, b"z" * store.page_bytes)
    made_here = fremap.MemoryStore(store.page_bytes)
    made_here.write(0, b"c" * store.page_bytes)
    results.put(made_here)
    taken.wait()  # a thread of this process hands over the descriptor


def main(method: str) -> None:
    """Print what the parent finds in the memory that went out and that came back."""
    context = multiprocessing.get_context(method)
    results, taken = context.Queue(), context.Event()
    with fremap.MemoryStore(2 * 4096) as store:
        child = context.Process(target=fill, args=(store, results, taken), daemon=True)
        child.start()
        with results.get(timeout=30) as theirs:
            came = chr(theirs.read()[0, 0])
        taken.set()
        child.join()
        print(f"parent saw {chr(store.read()[0, 0])} and {came}")
    sys.exit(child.exitcode)


if __name__ == "__main__":
    main(sys.argv[1])
