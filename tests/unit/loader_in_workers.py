"""Run by test_torch.py: a DataLoader whose workers start by one of the three methods."""

import multiprocessing
import sys
import tempfile
import warnings

import fremap
import numpy as np
from fremap.torch import BatchDataset
from torch.utils.data import DataLoader

ROWS, BATCH = 1003, 32


def epochs_of(loader: DataLoader, dataset: BatchDataset, epochs: range) -> list[list[list[int]]]:
    """Each epoch's batches, by their ids."""
    seen = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        batches = list(loader)
        for ids, batch in batches:
            assert (batch == ids[:, None]).all()
        seen.append([ids.tolist() for ids, _ in batches])
    return seen


def main(method: str) -> None:
    """Compare what workers yield with what this process yields; print how it went."""
    with tempfile.NamedTemporaryFile() as file:
        np.arange(ROWS, dtype=np.int64).repeat(50).tofile(file.name)
        rows = fremap.rows(file.name, np.int64, 50)
        dataset = BatchDataset(rows, BATCH, return_ids=True)
        expected = epochs_of(DataLoader(dataset, batch_size=None), dataset, range(2))
        assert expected[0] != expected[1]
        assert sorted(row for ids in expected[0] for row in ids) == list(range(ROWS))
        # Few workers, as each that is spawned imports torch.
        loader = DataLoader(
            dataset, batch_size=None, num_workers=3, multiprocessing_context=method,
            persistent_workers=True,
        )  # fmt: skip
        assert epochs_of(loader, dataset, range(2)) == expected
        assert len(loader) == len(expected[0])
        del loader
        again = BatchDataset(rows, BATCH, return_ids=True)
        again.resume(dataset.state(10))
        loader = DataLoader(again, batch_size=None, num_workers=1, multiprocessing_context=method)
        assert [ids.tolist() for ids, _ in loader] == expected[1][10:]
        if method == "fork":
            assert epochs_of(loader, again, range(1)) == expected[:1]
    print("alike")


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["fremap.torch"])
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
    main(sys.argv[1])
