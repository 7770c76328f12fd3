"""Rows as a data set of PyTorch: `BatchDataset`, for a DataLoader with ``batch_size=None``.

The one module that imports torch, which fremap does not depend on.
"""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING, Any, SupportsIndex

from fremap.arguments import quantity
from fremap.batches import Batches
from fremap.errors import ArgumentError
from fremap.ragged_rows import RaggedRows

try:
    import torch
    from torch.utils.data import IterableDataset, get_worker_info
except ImportError as error:
    raise ImportError("fremap.torch needs PyTorch, which is missing: pip install torch") from error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from fremap.epochs import Order, State
    from fremap.ragged_rows import Ragged
    from fremap.rows import Rows

__all__ = ["BatchDataset"]


class BatchDataset(IterableDataset):
    """Batches of rows as tensors; workers and ranks share an epoch out among them.

    Pass ``batch_size=None`` to the DataLoader: what this yields are batches already. They
    come in the same order whatever the number of workers is. Call `set_epoch` before each
    epoch, or all epochs are shuffled alike.

    Parameters
    ----------
    rows : Rows or Ragged
        Where the rows come from. Batches of unequal rows are values and offsets.
    batch_size : int
        Rows of a batch.
    order : {"shuffle", "sequential"} or array of int, default "shuffle"
        As in `Rows.batches`.
    seed : int, optional
        For "shuffle"; one is drawn if not given, where there is one rank.
    rank, world_size : int, optional
        Which of how many processes; those of ``torch.distributed`` where that is initialized,
        if not given.
    drop_last, pad : bool, default False
        What is done about rows that do not fill a batch of every rank; see `Batches`.
    prefetch : int, default 2
        Batches that each worker reads ahead.
    return_ids : bool, default False
        Yield ``(ids, batch)``.

    Notes
    -----
    Works under fork, forkserver and spawn; with these the paths of the rows are passed on.
    bfloat16 and the kinds of float8 that NumPy does not have are torch's own.

    Examples
    --------
    >>> dataset = BatchDataset(rows, 256, seed=1)  # doctest: +SKIP
    >>> loader = DataLoader(dataset, batch_size=None, num_workers=4)  # doctest: +SKIP
    >>> for epoch in range(10):  # doctest: +SKIP
    ...     dataset.set_epoch(epoch)
    ...     for batch in loader:
    ...         train(batch)
    """

    def __init__(
        self,
        rows: Rows | Ragged,
        batch_size: SupportsIndex,
        order: Order = "shuffle",
        *,
        seed: SupportsIndex | None = None,
        rank: SupportsIndex | None = None,
        world_size: SupportsIndex | None = None,
        drop_last: bool = False,
        pad: bool = False,
        prefetch: SupportsIndex = 2,
        return_ids: bool = False,
    ) -> None:
        super().__init__()
        if rank is None and world_size is None:
            rank, world_size = _rank_and_world_size()
        if rank is None or world_size is None:
            raise ArgumentError("BatchDataset: give both rank and world_size, or neither")
        self._drawn = seed is None and isinstance(order, str) and order == "shuffle"
        if self._drawn and world_size == 1:
            seed = secrets.randbits(63)  # here, so that all workers have the same
        self._rows = rows
        self._batching: dict[str, Any] = {
            "batch_size": batch_size, "order": order, "seed": seed, "rank": rank,
            "world_size": world_size, "drop_last": drop_last, "pad": pad, "prefetch": prefetch,
            "return_ids": return_ids,
        }  # fmt: skip
        # Shared, as workers that outlive an epoch have to learn of the next.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._resumed: State | None = None
        self._batches()  # what is wrong is told here, not by a worker

    def _batches(self, **more: Any) -> Batches:
        return Batches(self._rows, epoch=int(self._epoch), **{**self._batching, **more})

    def set_epoch(self, epoch: SupportsIndex) -> None:
        """Have the next iteration be that of another epoch.

        Parameters
        ----------
        epoch : int
            Its number.
        """
        self._epoch.fill_(int(epoch))
        if self._resumed is not None and self._resumed["epoch"] != int(epoch):
            self._resumed = None

    def state(self, batch_count: SupportsIndex) -> State:
        """Return what it takes to go on after so many batches of this epoch.

        Parameters
        ----------
        batch_count : int
            Batches that were taken from the loader since the epoch began; the loader knows,
            the workers, which are ahead, do not.

        Returns
        -------
        dict
            Fit for JSON.
        """
        return {
            **self._batches().state(),
            "next_batch": quantity("state: batch_count", batch_count),
        }

    def resume(self, state: State) -> None:
        """Have its epoch go on after `state`; call it before the loader's first iteration.

        That holds for each iteration until `set_epoch` names another epoch.

        Parameters
        ----------
        state : dict
            What `state` returned, of the same rows and arguments.

        Raises
        ------
        ArgumentError
            It is of other batches.
        """
        settings = self._batching
        if self._drawn:
            settings = settings | {"seed": state.get("seed")}
        epoch = state.get("epoch", 0)
        # Judged before anything changes.
        Batches(self._rows, epoch=epoch, state=state, **settings).close()
        self._batching, self._resumed = settings, state
        self.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of batches of this rank in an epoch."""
        return len(self._batches())

    def __iter__(self) -> Iterator[Any]:
        """Read this worker's batches.

        Raises
        ------
        ArgumentError
            The DataLoader would make batches of these batches.
        """
        # torch tells a data set nothing of its loader, but what calls this there knows.
        caller = sys._getframe(1).f_locals.get("self")  # noqa: SLF001 - the one way
        if getattr(caller, "auto_collation", False):
            raise ArgumentError(
                "BatchDataset: the DataLoader makes batches of these batches; say "
                "DataLoader(dataset, batch_size=None)"
            )
        return _Reading(self)

    def _share(self) -> dict[str, int]:
        """Return which of the loader's workers this is."""
        worker = get_worker_info()
        return {"worker": worker.id, "worker_count": worker.num_workers} if worker else {}

    def _tensor(self, batch: Any) -> Any:
        if isinstance(batch, torch.Tensor):  # of rows whose dtype is torch's
            return batch
        if isinstance(batch, RaggedRows):
            return RaggedRows(self._tensor(batch.values), torch.from_numpy(batch.offsets))
        tensor = torch.from_numpy(batch)
        name = self._rows.dtype_name
        # Of types that NumPy has not the rows are as many bytes.
        return tensor if name == self._rows.dtype.name else tensor.view(getattr(torch, name))


class _Reading:
    """An iterator over a worker's batches, whose state torchdata's StatefulDataLoader keeps."""

    def __init__(self, dataset: BatchDataset) -> None:
        self._dataset = dataset
        resumed = dataset._resumed  # noqa: SLF001 - its own
        if resumed is not None and resumed["epoch"] != int(dataset._epoch):  # noqa: SLF001
            resumed = None  # that was an epoch ago
        self._batches = dataset._batches(state=resumed, **dataset._share())  # noqa: SLF001

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        dataset, batch = self._dataset, next(self._batches)
        if dataset._batching["return_ids"]:  # noqa: SLF001
            return torch.from_numpy(batch[0]), dataset._tensor(batch[1])  # noqa: SLF001
        return dataset._tensor(batch)  # noqa: SLF001

    def state_dict(self) -> State:
        """Return what it takes to go on from here."""
        return self._batches.state()

    def load_state_dict(self, state_dict: State) -> None:
        """Go on after a state, in the epoch that it is of."""
        dataset = self._dataset
        if state_dict["epoch"] != int(dataset._epoch):  # noqa: SLF001
            dataset.set_epoch(state_dict["epoch"])
        settings = {"seed": state_dict["seed"]} if dataset._drawn else {}  # noqa: SLF001
        batches = dataset._batches(state=state_dict, **dataset._share(), **settings)  # noqa: SLF001
        self._batches.close()
        self._batches = batches


def _rank_and_world_size() -> tuple[int, int]:
    """Return what torch.distributed says, in a process that takes part."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
