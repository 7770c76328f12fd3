"""What all tables of rows have in common: each looks like an array of rows.

`Rows` reads rows in this process; `fremap.ray.DistributedRows` asks other machines for them.
"""

from __future__ import annotations

from abc import abstractmethod
from types import EllipsisType
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fremap.arguments import filled_memory
from fremap.closing import ClosedOnExit
from fremap.dtypes import MAX_AXES, is_tensor, shown_as
from fremap.errors import ArgumentError
from fremap.indexing import choose
from fremap.rowids import as_mask, select, select_mask

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    import numpy.typing as npt

    from fremap.batches import Batches, BatchOptions
    from fremap.epochs import Order
    from fremap.rowids import RowIds
    from fremap.selection import CoreSelection
    from fremap.shards import Kind

__all__ = ["RowArray"]

# NumPy exports no buffer of times, nor of types that are not its own.
_EXPORTED = frozenset(map(np.dtype, np.typecodes["All"])) - {*map(np.dtype, "SUVOMm")}


class RowArray(ClosedOnExit):
    """Rows of fixed size, numbered from 0, that a subclass can fetch into memory."""

    __slots__ = ()

    _kind: Kind
    _row_count: int

    @abstractmethod
    def _fill(self, selection: CoreSelection, memory: npt.NDArray[Any]) -> None:
        """Fetch rows, one after the other, into memory that has their size."""

    @abstractmethod
    def take(self, ids: RowIds, out: Any = None) -> Any:
        """Return rows, in any order."""

    def __len__(self) -> int:
        return self._row_count

    @property
    def dtype(self) -> Any:
        """Type of the elements; an unsigned one of the same size if NumPy has no such type."""
        return self._kind.element.shown

    @property
    def dtype_name(self) -> str:
        """What the elements are: "float32", or "bfloat16" where `dtype` is uint16."""
        return self._kind.element.name

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self._kind.row_shape

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self._kind.row_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all rows together."""
        return (self._row_count, *self._kind.row_shape)

    @property
    def ndim(self) -> int:
        """Number of axes of all rows together."""
        return 1 + len(self._kind.row_shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return self._row_count * self._kind.row_bytes

    def __getitem__(self, index: Any) -> Any:
        """Return rows as an array would: by ``3``, ``2:8``, integers, a mask, ``ids, 2:5``."""
        mask = as_mask(index)
        if isinstance(index, tuple | EllipsisType | None) or (mask is not None and mask.ndim > 1):
            chosen = choose(index, self.shape)
            taken = self._array(*select(chosen.ids, self._row_count))
            return shown_as(chosen.of(taken), self._kind.element.shown)
        if mask is not None:
            return self._take(*select_mask(mask, self._row_count), None)
        found = self.take(index)
        return found if found.ndim else found[()]

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over the rows, one by one; `batches` reads many together, ahead."""
        return map(self.__getitem__, range(self._row_count))

    def __getitems__(self, ids: RowIds) -> list[Any]:
        """Return rows as a list, read together, as a torch DataLoader asks for a batch."""
        return list(self.take(ids))

    def __array__(
        self,
        dtype: npt.DTypeLike | None = None,
        copy: bool | None = None,  # noqa: FBT001 - NumPy passes it so
    ) -> Any:
        """Read all rows into memory, for `numpy.asarray` and libraries that call it."""
        if copy is False:
            raise ArgumentError("rows: an array of all rows is always a copy")
        everything = self._array(*select(slice(None), self._row_count))
        return everything if dtype is None else everything.astype(dtype, copy=False)

    def _take(self, selection: Any, leading: tuple[int, ...], out: Any) -> Any:
        filled, memory = self._memory("take", leading, out)
        self._fill(selection, memory)
        return self._shown(filled, out)

    def _shown(self, filled: npt.NDArray[Any], out: Any) -> Any:
        """Return what a call returns for an array that it has filled, or will fill."""
        if filled is out:
            return out
        if out is None:
            return shown_as(filled, self._kind.element.shown)
        return out if isinstance(out, np.ndarray) or is_tensor(out) else filled

    def _array(self, selection: Any, leading: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return rows as a NumPy array, even if they are shown as tensors."""
        filled, memory = self._memory("rows", leading, None)
        self._fill(selection, memory)
        return filled

    def _memory(
        self, operation: str, leading: tuple[int, ...], out: Any
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return an array for the rows, over `out` if it is given, and what the core fills."""
        element, shape = self._kind.element, leading + self._kind.row_shape
        if len(shape) > MAX_AXES:
            raise ArgumentError(
                f"{operation}: ids of {len(leading)} axes and rows of "
                f"{len(self._kind.row_shape)} make an array of {len(shape)}; NumPy has {MAX_AXES} "
                "at most"
            )
        if type(out) is np.ndarray and out.dtype is element.dtype and out.shape == shape:
            # As a rule: no question more than whether it can be filled.
            filled = out if out.flags.carray else filled_memory(operation, out, element, shape)
        elif out is None:
            filled = np.empty(shape, element.dtype)
        else:
            filled = filled_memory(operation, out, element, shape)
        whole = element.dtype in _EXPORTED and shape
        return filled, filled if whole else filled.reshape(-1).view(np.uint8)

    def batches(
        self, batch_size: SupportsIndex, order: Order = "shuffle", **options: Unpack[BatchOptions]
    ) -> Batches:
        """Return an iterator over the batches of an epoch, which reads ahead.

        Parameters
        ----------
        batch_size : int
            Rows of a batch.
        order : {"shuffle", "sequential"} or array of int, default "shuffle"
            All rows in random order, all rows in order, or the given rows.
        **options
            Options of `Batches`: `seed`, `epoch`, `drop_last`, `pad`, `rank`, `world_size`,
            `worker`, `worker_count`, `prefetch`, `return_ids`, `state`.

        Returns
        -------
        Batches
            The iterator; it is a context manager.

        Raises
        ------
        ArgumentError
            An argument is invalid, or the state is of other batches.
        PageRangeError
            `order` names a row that does not exist.

        See Also
        --------
        fremap.torch : The same for a torch DataLoader.
        """
        from fremap.batches import Batches

        return Batches(self, batch_size, order, **options)
