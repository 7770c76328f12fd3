"""`fremap.torch`: batches as tensors, in workers and ranks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import fremap
import numpy as np
import pytest

needs_torch = pytest.mark.needs("torch")


@pytest.fixture
def rows(tmp_path: Path) -> fremap.Rows:
    np.save(tmp_path / "rows.npy", np.arange(60, dtype=np.float32).reshape(20, 3))
    return fremap.rows(tmp_path / "rows.npy")


def test_without_torch_it_says_what_to_do() -> None:
    program = "import sys; sys.modules['torch'] = None; import fremap.torch"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "ImportError: fremap.torch needs PyTorch: pip install" in done.stderr


def test_fremap_alone_does_not_import_it() -> None:
    program = "import sys, fremap; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@needs_torch
def test_tensors_in_batches(rows: fremap.Rows) -> None:
    import torch
    from fremap.torch import BatchDataset

    dataset = BatchDataset(rows, 8, "sequential")
    assert len(dataset) == 3
    assert torch.equal(torch.cat(list(dataset)), torch.arange(60.0).reshape(20, 3))
    ids, batch = next(iter(BatchDataset(rows, 8, [5, 5], return_ids=True)))
    assert ids.tolist() == [5, 5]
    assert batch.tolist() == [[15, 16, 17]] * 2


@needs_torch
def test_types_that_numpy_has_not(tmp_path: Path) -> None:
    import torch
    from fremap.torch import BatchDataset

    class Half:
        dtype, dtype_name, row_shape = np.dtype(np.uint16), "bfloat16", (2,)

        def __len__(self) -> int:
            return 4

        def take(self, ids: np.ndarray, out: np.ndarray) -> np.ndarray:
            out[:] = 0x3F80
            return out

    (batch,) = BatchDataset(Half(), 4)
    assert batch.dtype == torch.bfloat16
    assert batch.tolist() == [[1.0, 1.0]] * 4


@needs_torch
def test_ranks(rows: fremap.Rows) -> None:
    from fremap.torch import BatchDataset

    parts = [
        BatchDataset(rows, 4, seed=1, rank=rank, world_size=3, return_ids=True) for rank in range(3)
    ]
    ids = [row for part in parts for ids, _ in part for row in ids.tolist()]
    assert sorted(ids) == list(range(20))
    with pytest.raises(ValueError, match="the same seed"):
        BatchDataset(rows, 4, rank=0, world_size=3)
    with pytest.raises(ValueError, match="both rank and world_size"):
        BatchDataset(rows, 4, seed=1, rank=0)


RANK_OF_THE_GROUP = """
import sys, fremap, torch.distributed as distributed
from fremap.torch import BatchDataset
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
dataset = BatchDataset(fremap.rows(sys.argv[1]), 4, seed=1)
assert (dataset._batching["rank"], dataset._batching["world_size"]) == (0, 1)
distributed.destroy_process_group()
"""


@pytest.mark.once
@pytest.mark.slow
@needs_torch
def test_the_rank_is_that_of_the_process_group(rows: fremap.Rows, tmp_path: Path) -> None:
    arguments = [tmp_path / "rows.npy", tmp_path / "meeting"]
    subprocess.run([sys.executable, "-c", RANK_OF_THE_GROUP, *arguments], check=True, timeout=60)


@needs_torch
@pytest.mark.parametrize("change", [{"batch_size": 4}, {"rows": 19}, {"epoch": -1}, {"seed": 4}])
def test_a_state_of_other_batches_changes_nothing(
    rows: fremap.Rows, change: dict[str, Any]
) -> None:
    from fremap.torch import BatchDataset

    dataset = BatchDataset(rows, 8, seed=3)
    expected = [batch.tolist() for batch in dataset]
    with pytest.raises(fremap.ArgumentError):
        dataset.resume(dataset.state(1) | change)
    assert [batch.tolist() for batch in dataset] == expected


@pytest.mark.once
@pytest.mark.slow
@needs_torch
@pytest.mark.timeout(180)
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_loader(method: str) -> None:
    script = Path(__file__).with_name("loader_in_workers.py")
    done = subprocess.run(
        [sys.executable, script, method], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alike\n"


@pytest.mark.once
@pytest.mark.slow
@needs_torch
def test_the_module_is_there_when_asked_for() -> None:
    program = "import fremap; fremap.torch.BatchDataset"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_asked_for_without_torch_it_says_what_to_do() -> None:
    program = "import sys; sys.modules['torch'] = None; import fremap; fremap.torch"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "ImportError: fremap.torch needs PyTorch: pip install" in done.stderr


@needs_torch
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_batches_are_refused(rows: fremap.Rows, workers: int) -> None:
    from fremap.torch import BatchDataset
    from torch.utils.data import DataLoader

    dataset = BatchDataset(rows, 8, "sequential")
    with pytest.raises(fremap.ArgumentError, match="batch_size=None"):
        list(DataLoader(dataset, num_workers=workers))
    assert len(list(DataLoader(dataset, batch_size=None, num_workers=workers))) == 3


@needs_torch
def test_tensors_that_numpy_cannot_show(rows: fremap.Rows) -> None:
    import torch

    bad = [
        torch.empty((1, 3), requires_grad=True),
        torch.empty((1, 3), device="meta"),
    ]
    for out in bad:
        with pytest.raises(fremap.ArgumentTypeError, match="take: out is a tensor"):
            rows.take([0], out=out)


class Tensor:
    """What torch's tensors do that NumPy cannot show."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def data_ptr(self) -> int:
        return 0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise self.error


@pytest.mark.parametrize("error", [TypeError("BFloat16"), RuntimeError("requires grad")])
def test_an_out_that_refuses_to_be_an_array(rows: fremap.Rows, error: Exception) -> None:
    with pytest.raises(fremap.ArgumentTypeError, match=f"take: out is a tensor .*{error}"):
        rows.take([0], out=Tensor(error))
