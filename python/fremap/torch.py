"""Rows for PyTorch: `BatchDataset` for training, `RowEmbedding` as a layer of a model.

The only module that imports torch, on which fremap does not depend.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from fremap.arguments import quantity
from fremap.batches import Batches
from fremap.errors import ArgumentError, ArgumentTypeError, PageRangeError
from fremap.ragged_rows import RaggedRows

try:
    import torch
    from torch.utils.data import IterableDataset, get_worker_info
except ImportError as error:
    raise ImportError("fremap.torch needs PyTorch: pip install torch") from error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from fremap.epochs import Order, State
    from fremap.pending import Pending
    from fremap.ragged_rows import Ragged
    from fremap.rows import Rows

__all__ = ["BatchDataset", "RowEmbedding"]

# Lookups that are kept ready by `prefetch`, and memory that is kept for later ones.
_MOST_AHEAD = 2


class BatchDataset(IterableDataset):
    """Batches of rows as tensors; workers and ranks divide the epoch among them.

    Pass ``batch_size=None`` to the DataLoader, because this already yields batches. Their order
    does not depend on the number of workers. Call `set_epoch` before each epoch; otherwise all
    epochs have the same order.

    Parameters
    ----------
    rows : Rows or Ragged
        Where the rows come from. A batch of `Ragged` is a pair of values and offsets.
    batch_size : int
        Rows of a batch.
    order : {"shuffle", "sequential"} or array of int, default "shuffle"
        As for `Rows.batches`.
    seed : int, optional
        For "shuffle"; required with several ranks. Default: a random seed.
    rank, world_size : int, optional
        The number of this process, and the number of processes. Default: those of
        ``torch.distributed`` if it is initialized.
    drop_last, pad : bool, default False
        What to do with rows that do not fill a batch on every rank; see `Batches`.
    prefetch : int, default 2
        Batches that each worker reads ahead.
    return_ids : bool, default False
        Yield ``(ids, batch)``.

    Notes
    -----
    Works with fork, forkserver and spawn; the latter two pass the paths of the rows on.
    bfloat16 and float8, which NumPy does not have, become tensors of torch's types.

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
        """Choose the epoch of the next iteration.

        Parameters
        ----------
        epoch : int
            Its number.
        """
        self._epoch.fill_(int(epoch))
        if self._resumed is not None and self._resumed["epoch"] != int(epoch):
            self._resumed = None

    def state(self, batch_count: SupportsIndex) -> State:
        """Return a state from which to continue after some batches of this epoch.

        Parameters
        ----------
        batch_count : int
            How many batches you have taken from the loader in this epoch. The workers do not
            know, because they read ahead.

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
        """Continue the epoch after a state; call it before the loader's first iteration.

        Every iteration then begins there, until `set_epoch` chooses another epoch.

        Parameters
        ----------
        state : dict
            A result of `state`, with the same rows and arguments.

        Raises
        ------
        ArgumentError
            The state is of other batches.
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
                "BatchDataset: the DataLoader would make batches of these batches; use "
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


#: Those that a child of fork has to make ready again.
_embeddings: weakref.WeakSet[RowEmbedding] = weakref.WeakSet()


def _ready_in_child() -> None:
    for embedding in list(_embeddings):
        embedding._begin_in_child()  # noqa: SLF001 - its own module


os.register_at_fork(after_in_child=_ready_in_child)


class RowEmbedding(torch.nn.Module):
    """Look rows up by their numbers, like `torch.nn.Embedding`, in a table that stays in files.

    For inference: the table has no gradient. Each call reads the rows that it needs once into
    pinned memory, copies them to the device on a stream of its own, converts them there, and
    returns one row for each id.

    Parameters
    ----------
    rows : Rows
        The table. The module does not close it.
    device : torch.device or str, default "cpu"
        The device of the results; ``module.to(device)`` changes it.
    dtype : torch.dtype, optional
        Type to which the rows are converted on the device. Default: unchanged, or torch's
        default type if there is a `scale`.
    scale : Rows, optional
        Factors by which the rows are multiplied, in float32, before they are converted. It has
        the same number of rows. Each of them has one number, or several, each for an equal part
        of a row's last axis.

    Raises
    ------
    ArgumentError
        `scale` does not fit the rows, or torch has no type for them.

    See Also
    --------
    Rows.submit : Reads rows while the caller goes on, without torch.

    Notes
    -----
    Ids may be of any integer type and shape, on any device. Ids on a GPU are first copied to
    the host, which waits for the GPU: if the host knows the ids, pass them from there.
    `prefetch` starts the reads of a later call; two of them may be waiting.

    Any number of threads may call it. ``torch.compile`` leaves it out of its graphs.

    The results on the CPU are tested with every release. The code for CUDA follows the
    documentation of PyTorch (pinned memory, a side stream, ``record_stream``), but fremap's own
    tests have not run it on a GPU.

    Examples
    --------
    >>> table = fremap.rows("model", tensor="ngram.shard_{i}", direct=True)  # doctest: +SKIP
    >>> embed = RowEmbedding(table, device="cuda", dtype=torch.bfloat16)  # doctest: +SKIP
    >>> for ids, ids_next in steps:  # doctest: +SKIP
    ...     found = embed(ids)
    ...     embed.prefetch(ids_next)
    ...     run(found)
    """

    _anchor: torch.Tensor

    def __init__(
        self,
        rows: Rows,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale: Rows | None = None,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.scale = scale
        self._type = _torch_type(rows)
        self._scale_type = None if scale is None else _torch_type(scale)
        if scale is not None:
            _check_scale(rows, scale)
        if dtype is None:
            dtype = self._type if scale is None else torch.get_default_dtype()
        self.dtype = dtype
        # Tells `to` where this is; of a type that no conversion of a model changes.
        self.register_buffer(
            "_anchor", torch.empty(0, dtype=torch.uint8, device=device), persistent=False
        )
        self._begin()

    def _begin(self) -> None:
        self._begin_in_child()
        _embeddings.add(self)

    def _begin_in_child(self) -> None:
        # A thread of the parent may have the lock, and its lookups are read there.
        self._lock = threading.Lock()
        self._ahead: list[_Lookup] = []
        self._free: list[_Memory] = []
        self._streams: dict[torch.device, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of the results."""
        return self._anchor.device

    @property
    def num_embeddings(self) -> int:
        """Number of rows, as `torch.nn.Embedding` calls it."""
        return len(self.rows)

    def prefetch(self, ids: torch.Tensor) -> None:
        """Start to read the rows of a later call with the same ids, and return at once.

        Parameters
        ----------
        ids : Tensor of int
            The ids of the call. If two such reads are waiting already, the older one is dropped.
        """
        lookup = self._begun(_on_host(ids), wait=False)
        with self._lock:
            self._ahead.append(lookup)
            given_up = self._ahead[:-_MOST_AHEAD]
            del self._ahead[:-_MOST_AHEAD]
        for old in given_up:
            old.cancel()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the row of each id.

        Parameters
        ----------
        ids : Tensor of int
            Numbers of rows, of any shape.

        Returns
        -------
        Tensor, shape ``ids.shape + row_shape``
            The rows, on the device.

        Raises
        ------
        PageRangeError
            A row does not exist; also an `IndexError`.
        StoreError
            A row cannot be read.
        """
        wanted = _on_host(ids)
        shape = (*ids.shape, *self.rows.row_shape)
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        lookup = self._found_ahead(wanted) or self._begun(wanted, wait=True)
        lookup.wait()
        *tables, places = self._on_device(lookup)
        found = _expanded(self._converted(*tables), places).reshape(shape)
        with self._lock:
            if len(self._free) < _MOST_AHEAD:
                self._free.append(lookup.memory)
        return found

    def _found_ahead(self, wanted: torch.Tensor) -> _Lookup | None:
        with self._lock:
            for at, lookup in enumerate(self._ahead):
                if torch.equal(lookup.ids, wanted):
                    return self._ahead.pop(at)
        return None

    def _begun(self, wanted: torch.Tensor, *, wait: bool) -> _Lookup:
        unique, places = torch.unique(wanted, return_inverse=True)
        if len(unique) and int(unique[0]) < 0:
            raise PageRangeError(f"RowEmbedding: row {int(unique[0])} is negative")
        with self._lock:
            memory = self._free.pop() if self._free else _Memory()
        tables = [(self.rows, self._type)]
        if self.scale is not None and self._scale_type is not None:
            tables.append((self.scale, self._scale_type))
        room = memory.room(
            [len(unique) * table.row_bytes for table, _ in tables],
            places,
            pinned=self.device.type == "cuda",
        )
        outs = [
            part.view(kind).reshape(len(unique), *table.row_shape)
            for part, (table, kind) in zip(room, tables, strict=True)
        ]
        pendings = []
        for (table, _), out in zip(tables, outs, strict=True):
            if wait:
                table.take(unique.numpy(), out=out)
            else:
                pendings.append(table.submit(unique.numpy(), out=out))
        return _Lookup(wanted, memory, outs, pendings)

    def _on_device(self, lookup: _Lookup) -> list[torch.Tensor]:
        """Return what was read, and the place of each id among it, on the device."""
        sources = [*lookup.outs, lookup.memory.places]
        device = self.device
        if device.type == "cuda":
            return self._by_side_stream(sources, lookup.memory, device)
        return [source.to(device) for source in sources]

    def _by_side_stream(
        self, sources: list[torch.Tensor], memory: _Memory, device: torch.device
    ) -> list[torch.Tensor]:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        with torch.cuda.stream(stream):
            copies = [source.to(device, non_blocking=True) for source in sources]
            memory.in_use = torch.cuda.Event()
            memory.in_use.record(stream)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for copy in copies:
            # Their memory belongs to the side stream, and must outlive what follows here.
            copy.record_stream(current)
        return copies

    def _converted(self, found: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        if scale is None:
            return found.to(self.dtype)
        count, lead = len(found), found.shape[1:-1]
        factors = scale.to(torch.float32).reshape(count, *(1 for _ in lead), -1, 1)
        parts = found.to(torch.float32).reshape(count, *lead, factors.shape[-2], -1)
        return (parts * factors).to(self.dtype).reshape(found.shape)

    def extra_repr(self) -> str:
        """Describe the table, for the module's repr.

        Returns
        -------
        str
            Its length, the shape of its rows, and what they are converted to.
        """
        scaled = "" if self.scale is None else ", scaled"
        return f"{len(self.rows)}, {self.rows.row_shape}, dtype={self.dtype}{scaled}"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(self.__dict__)
        for name in ("_lock", "_ahead", "_free", "_streams"):
            state.pop(name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()


class _Memory:
    """Memory that rows are read into, and the places of ids among them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.places = torch.empty(0, dtype=torch.int64)
        #: When the device has read it; None if it has.
        self.in_use: Any = None

    def room(self, lengths: list[int], places: torch.Tensor, *, pinned: bool) -> list[torch.Tensor]:
        """Return buffers of these sizes, aligned for any type, once the memory is not in use."""
        if self.in_use is not None:
            self.in_use.synchronize()
            self.in_use = None
        begins = [0]
        for length in lengths:
            begins.append(begins[-1] + -(-length // 64) * 64)
        if self._bytes.numel() < begins[-1] or (pinned and not self._bytes.is_pinned()):
            size = 1 << max(begins[-1] - 1, 1 << 12).bit_length()
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.places = places.pin_memory() if pinned else places
        return [
            self._bytes[begin : begin + length]
            for begin, length in zip(begins, lengths, strict=False)
        ]


class _Lookup(NamedTuple):
    """Rows that were read, or are."""

    ids: torch.Tensor
    memory: _Memory
    outs: list[torch.Tensor]
    pendings: list[Pending]

    def wait(self) -> None:
        for pending in self.pendings:
            pending.result()

    def cancel(self) -> None:
        # They keep the memory until they end.
        for pending in self.pendings:
            pending.cancel()


def _torch_type(rows: Rows) -> torch.dtype:
    found = getattr(torch, rows.dtype_name, None)
    if not isinstance(found, torch.dtype):
        raise ArgumentError(f"RowEmbedding: torch has no type {rows.dtype_name}")
    return found


def _check_scale(rows: Rows, scale: Rows) -> None:
    if len(scale) != len(rows):
        raise ArgumentError(f"RowEmbedding: scale has {len(scale)} rows, the table {len(rows)}")
    last = rows.row_shape[-1] if rows.row_shape else 1
    parts = scale.row_shape[0] if scale.row_shape else 1
    if len(scale.row_shape) > 1 or parts == 0 or last % parts:
        raise ArgumentError(
            f"RowEmbedding: scale has rows of shape {scale.row_shape}; it must be one number, or "
            f"so many that they divide {last}, the last axis of the table's rows"
        )


def _on_host(ids: torch.Tensor) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex():
        kind = getattr(ids, "dtype", type(ids).__name__)
        raise ArgumentTypeError(f"RowEmbedding: ids must be a tensor of integers, not {kind}")
    if ids.dtype is torch.bool:
        raise ArgumentTypeError("RowEmbedding: ids must be integers, not bools")
    # A copy: the caller may change them, while rows are read.
    return ids.detach().to("cpu", torch.int64, copy=True).reshape(-1)


def _expanded(found: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the row of each place, moved as whole numbers: torch indexes not every type."""
    flat = found.reshape(len(found), -1)
    row_bytes = flat.shape[1] * flat.element_size()
    words = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
    word = next(kind for size, kind in words if row_bytes % size == 0)
    return flat.view(word).index_select(0, places).view(flat.dtype)
