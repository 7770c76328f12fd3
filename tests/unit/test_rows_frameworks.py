"""Rows as other libraries see them: pandas, dask, torch's loader, torchdata, grain."""

import json
import os
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest

TABLE = np.arange(400, dtype=np.float32).reshape(100, 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", TABLE)
    return tmp_path / "rows.npy"


@pytest.mark.needs("pandas")
def test_series_choose_rows(path: Path) -> None:
    import pandas as pd

    numbers = [3, 0, 99]
    mask = pd.Series(np.arange(100) % 3 == 0)
    with fremap.rows(path) as rows:
        for ids in (
            pd.Series(numbers),
            pd.Series(numbers, dtype="Int64"),
            pd.Series(numbers, dtype="uint8"),
            pd.Index(numbers),
        ):
            np.testing.assert_array_equal(rows[ids], TABLE[numbers])
            np.testing.assert_array_equal(rows.take(ids), TABLE[numbers])
        for chosen in (mask, mask.astype("boolean")):
            np.testing.assert_array_equal(rows[chosen], TABLE[::3])
            np.testing.assert_array_equal(rows[chosen, 1:3], TABLE[::3, 1:3])
        with pytest.raises(TypeError, match="integers"):
            rows[pd.Series([1, None, 3], dtype="Int64")]
        lacking = mask.astype("boolean")
        lacking[7] = pd.NA
        with pytest.raises(fremap.ArgumentTypeError, match="a mask must be all bools"):
            rows[lacking]


def test_lists_of_mixed_integers(path: Path) -> None:
    with fremap.rows(path) as rows:
        ids: list[Any] = [np.int64(1), 2, np.uint8(3), np.uint64(4), -5, np.array(6)]
        np.testing.assert_array_equal(rows[ids], TABLE[[1, 2, 3, 4, -5, 6]])
        np.testing.assert_array_equal(rows[ids, [0, 1, 2, 3, 0, np.uint64(1)]], TABLE[
            [1, 2, 3, 4, -5, 6], [0, 1, 2, 3, 0, 1]
        ])  # fmt: skip
        assert rows[np.array(3)].shape == (4,)
        np.testing.assert_array_equal(rows[memoryview(np.array([3, 4]))], TABLE[[3, 4]])
        assert rows.take(np.array(3, np.uint16)).shape == (4,)
        assert isinstance(rows.__getitems__([1, 2]), list)


@pytest.mark.needs("dask")
def test_dask_computes(path: Path) -> None:
    import dask.array as da
    from dask.base import tokenize

    with fremap.rows(path) as rows, fremap.rows(path) as same:
        for chunks in ("auto", (30, 2)):
            array = da.from_array(rows, chunks=chunks)
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array[5:50:3, 1:].compute(), TABLE[5:50:3, 1:])
            np.testing.assert_array_equal(array[[9, 1, 1]].compute(), TABLE[[9, 1, 1]])
            assert array.sum().compute() == TABLE.sum()
        assert tokenize(rows) == tokenize(same)
        np.save(path, TABLE + 1)  # another file, and other rows
        os.utime(path, ns=(1, 1))
        with fremap.rows(path) as changed:
            assert tokenize(changed) != da.from_array(rows).name
            first = tokenize(changed)
            os.utime(path, ns=(2, 2))
            assert tokenize(changed) != first


@pytest.mark.needs("torch")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_a_batch_in_one_call(path: Path, workers: int) -> None:
    import torch
    from torch.utils.data import DataLoader

    with fremap.rows(path) as rows:
        batches = list(DataLoader(rows, batch_size=8, shuffle=True, num_workers=workers))
        assert sorted(torch.cat(batches)[:, 0].tolist()) == TABLE[:, 0].tolist()
        if not workers:
            assert rows.stats().takes == len(batches)


def test_state_by_the_names_of_frameworks(path: Path) -> None:
    with fremap.rows(path) as rows, rows.batches(8, seed=3, epoch=2) as batches:
        next(batches)
        state = json.loads(json.dumps(batches.state_dict()))
        expected = list(batches)
        with rows.batches(8, seed=3, epoch=2) as again:
            for _ in range(5):
                next(again)
            again.load_state_dict(state)
            np.testing.assert_array_equal(np.concatenate(list(again)), np.concatenate(expected))
            again.load_state_dict(state)  # after its end
            assert len(list(again)) == len(expected)
        # A seed that nobody gave is the state's.
        with rows.batches(8, epoch=2) as drawn:
            drawn.load_state_dict(state)
            np.testing.assert_array_equal(np.concatenate(list(drawn)), np.concatenate(expected))
        for arguments in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 1}):
            with rows.batches(8, **arguments) as other:
                before = other.state()
                with pytest.raises(fremap.ArgumentError, match="the state was saved with"):
                    other.load_state_dict(state)
                assert other.state() == before
        with pytest.raises(fremap.ClosedError):
            drawn.load_state_dict(state)


@pytest.mark.needs("torch", "torchdata")
@pytest.mark.filterwarnings("ignore:'set_vital'")  # torchdata's own, of torch
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on(path: Path, workers: int) -> None:
    import torch
    from fremap.torch import BatchDataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(rows: fremap.Rows) -> Any:
        return StatefulDataLoader(
            BatchDataset(rows, 8, seed=1), batch_size=None, num_workers=workers
        )

    with fremap.rows(path) as rows:
        whole = list(loader(rows))
        first = loader(rows)
        taken = iter(first)
        begun = [next(taken) for _ in range(5)]
        state = first.state_dict()
        resumed = loader(rows)
        resumed.load_state_dict(state)
        assert torch.equal(torch.cat(begun + list(resumed)), torch.cat(whole))


@pytest.mark.needs("torch")
def test_the_state_of_a_dataset_says_its_epoch(path: Path) -> None:
    import torch
    from fremap.torch import BatchDataset

    with fremap.rows(path) as rows:
        dataset = BatchDataset(rows, 8, return_ids=True)
        dataset.set_epoch(4)
        reading = iter(dataset)
        next(reading)
        state = reading.state_dict()
        rest = torch.cat([ids for ids, _ in reading])
        other = iter(BatchDataset(rows, 8, return_ids=True))
        other.load_state_dict(state)
        assert torch.equal(torch.cat([ids for ids, _ in other]), rest)


@pytest.mark.needs("grain")
def test_a_source_of_grain(path: Path) -> None:
    import grain

    with fremap.rows(path) as rows:
        assert isinstance(rows, grain.sources.RandomAccessDataSource)
        batches = list(grain.MapDataset.source(rows).shuffle(seed=1).batch(10))
        assert len(batches) == 10
        assert sorted(np.concatenate(batches)[:, 0].tolist()) == TABLE[:, 0].tolist()
