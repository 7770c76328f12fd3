"""Run by test_batches_of_rows.py: workers of three ranks read an epoch of what the parent opened.

A program of its own, so that a spawned child finds what it is to run.
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import fremap
import numpy as np

SHARD_ROWS = (1000, 1, 333, 2000, 7)
WORLD_SIZE, WORKERS = 3, 2


def work(rows: fremap.Rows, rank: int, worker: int, results: Any) -> None:
    """Send the ids of this worker's batches, and how many rows were not what they should be."""
    ids: list[int] = []
    wrong = 0
    batches = rows.batches(
        64, seed=5, rank=rank, world_size=WORLD_SIZE, worker=worker, worker_count=WORKERS,
        return_ids=True,
    )  # fmt: skip
    for some, batch in batches:
        ids += some.tolist()
        wrong += int((batch != some[:, None]).sum())
    results.put((ids, wrong))


def main(method: str) -> None:
    """Print how many rows came, how many different ones, and how many were wrong."""
    context = multiprocessing.get_context(method)
    total = sum(SHARD_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        numbers = np.arange(total, dtype=np.int64).repeat(100).reshape(total, 100)
        ends = np.cumsum(SHARD_ROWS)
        for number, part in enumerate(np.split(numbers, ends[:-1])):
            np.save(Path(folder, f"{number}.npy"), part)
        files = [str(Path(folder, f"{number}.npy")) for number in range(len(SHARD_ROWS))]
        with fremap.rows(files) as rows, rows.batches(8, seed=1, prefetch=4) as ours:
            next(ours)  # threads of this process are reading while it forks
            results = context.Queue()
            children = [
                context.Process(target=work, args=(rows, rank, worker, results), daemon=True)
                for rank in range(WORLD_SIZE)
                for worker in range(WORKERS)
            ]
            for child in children:
                child.start()
            mine = 8 + sum(len(batch) for batch in ours)
            parts = [results.get(timeout=60) for _ in children]
            for child in children:
                child.join()
            codes = {child.exitcode for child in children}
    ids = [row for part, _ in parts for row in part]
    wrong = sum(wrong for _, wrong in parts)
    print(f"{mine - total} {len(ids) - total} {len(set(ids)) - total} {wrong} {codes}")


if __name__ == "__main__":
    main(sys.argv[1])
